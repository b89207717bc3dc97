"""Settings of a run: our keys, keys of Lightning and the original, and errors."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from ldm.data.buckets import Buckets
from ldm.data.drawings import EmojiTransform
from ldm.data.folder import ImageFolder
from ldm.data.hub import HubDataset
from ldm.data.shards import Shards
from ldm.data.transforms import PhotoTransform, TagShuffle
from ldm.loading.config import format_yaml, parse_yaml, read_yaml
from ldm.train.config import schema
from ldm.train.config.settings import Settings, read_settings, require_keys
from ldm.train.optim.schedules import build_lr_multiplier
from ldm.train.tasks.autoencoder import AdversarialTask, ReconstructionTask
from ldm.train.tasks.criterion import Criterion
from ldm.train.tasks.diffusion import DiffusionTask
from ldm.train.tasks.noise_levels import LogNormal
from quick import slow_except
from train.tinyrun import ROOT

TRAIN_CONFIGS = sorted([*ROOT.glob("configs/demo/*.yaml"), *ROOT.glob("configs/train/*.yaml")])
CONFIGS = sorted(ROOT.glob("configs/*/*.yaml"))
# Without `optimizer`, learning rates are scaled as in the original.
RECIPES = [path for path in TRAIN_CONFIGS if "optimizer" in read_yaml(path).get("lightning", {})]
# As published for the training of SD 2 inpainting.
SD2_LIGHTNING = """
  find_unused_parameters: true
  modelcheckpoint: {params: {every_n_train_steps: 5000}}
  callbacks:
    metrics_over_trainsteps_checkpoint: {params: {every_n_train_steps: 10000}}
    image_logger:
      target: main.ImageLogger
      params:
        enable_autocast: false
        disabled: false
        batch_frequency: 1000
        max_images: 4
        increase_log_steps: false
        log_first_step: false
        log_images_kwargs:
          use_ema_scope: false
          inpaint: false
          plot_progressive_rows: false
          plot_diffusion_rows: false
          N: 4
          unconditional_guidance_scale: 5.0
          unconditional_guidance_label: [""]
          ddim_steps: 50
          ddim_eta: 0.0
  trainer:
    benchmark: true
    val_check_interval: 5000000
    num_sanity_val_steps: 0
    accumulate_grad_batches: 1
"""


def read(lightning: str = "", *, model: str = "{}") -> Settings:
    return read_settings(parse_yaml(f"model: {model}\nlightning: {lightning}\n"))


def make_linear_config(**changes: Any) -> dict[str, Any]:
    params = {"warm_up_steps": [4], "f_min": [0.2], "f_max": [1.0], "f_start": [0.0]}
    params |= {"cycle_lengths": [10]} | changes
    return {"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": params}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_our_recipes_are_read_without_messages(path: Path) -> None:
    config = read_yaml(path)
    trainer = config.setdefault("lightning", {}).setdefault("trainer", {})
    trainer.setdefault("max_steps", 1)
    result, base = read_settings(config), config["model"]["base_learning_rate"]
    assert result.messages == ()
    batches = result.data.batch_size * result.trainer.accumulate_grad_batches
    factor = batches if trainer.get("scale_lr") else 1
    assert result.build_lr_schedule()[0].lr == pytest.approx(factor * base)


def test_the_training_config_of_sd2_inpainting_is_translated() -> None:
    result = read(SD2_LIGHTNING, model="{params: {use_ema: false}}")
    callbacks = result.callbacks
    assert callbacks.save_steps == 5000
    assert callbacks.export_steps == 10_000
    assert (callbacks.image_steps, callbacks.image_minutes) == (1000, None)
    assert callbacks.sampling == {"steps": 50, "scale": 5.0, "eta": 0.0}
    assert callbacks.validate_steps == 5_000_000
    assert result.trainer.max_epochs == 1000
    assert result.trainer.benchmark is True
    assert result.optimizer.ema_decay == 0.0
    assert any("num_sanity_val_steps" in message for message in result.messages)
    assert "no validation: data.params.validation is missing" in result.messages
    assert any("log_images_kwargs.plot_diffusion_rows" in message for message in result.messages)


def test_null_removes_a_callback_of_another_file() -> None:
    callbacks = read("{callbacks: {image_logger: null, setup_callback: null}}").callbacks
    assert (callbacks.image_steps, callbacks.image_minutes) == (None, 10)


@pytest.mark.parametrize(
    ("params", "decay", "weights"), [("{}", 0.0, "raw"), ("{ema_decay: 0.99}", 0.99, "ema")]
)
def test_an_autoencoder_has_the_ema_that_its_config_asks_for(
    params: str, decay: float, weights: str
) -> None:
    result = read(model=f"{{target: ldm.models.autoencoder.AutoencoderKL, params: {params}}}")
    assert (result.optimizer.ema_decay, result.callbacks.export_weights) == (decay, weights)


def test_captions_for_validation_are_prompts_of_the_image_grids() -> None:
    spec = {"target": "ldm.data.simple.TextOnly", "params": {"captions": ["a", "b"], "n_gpus": 2}}
    result = read_settings({"data": {"params": {"batch_size": 1, "validation": spec}}})
    assert result.callbacks.prompts == ["a", "b"]
    assert result.config["data"]["params"] == {"batch_size": 1}


def test_arguments_of_lightning_are_translated() -> None:
    result = read(
        "{trainer: {precision: 16, gpus: '0,1,', max_steps: -1, max_epochs: 3, "
        "gradient_clip_val: 0, strategy: ddp_find_unused_parameters_false, max_time: {hours: 2}, "
        "val_check_interval: 100, accumulate_grad_batches: 4, limit_val_batches: 5, "
        "log_every_n_steps: 7}, logger: {target: pytorch_lightning.loggers.WandbLogger, "
        "params: {project: p, offline: true}}}"
    )
    trainer, callbacks = result.trainer, result.callbacks
    assert trainer.precision == "16-mixed"
    assert trainer.strategy == "ddp"
    assert (trainer.max_steps, trainer.max_epochs) == (None, 3)
    assert trainer.max_time == 7200
    assert trainer.gradient_clip_val is None
    assert (callbacks.validate_steps, callbacks.validate_batches) == (25, 5)
    assert callbacks.log_steps == 7
    assert callbacks.loggers == ["csv", "wandb"]
    assert callbacks.wandb == {"project": "p", "mode": "offline"}


def test_a_config_of_the_original_scales_the_learning_rate_by_the_total_batch_size() -> None:
    result = read_settings(parse_yaml("""
        model: {base_learning_rate: 1e-6}
        data: {params: {batch_size: 4}}
        lightning: {trainer: {accumulate_grad_batches: 2}}"""))  # fmt: skip
    schedule, message = result.build_lr_schedule(16)
    assert schedule(0, 0.0) == schedule(10_000, 0.9) == pytest.approx(1.28e-4)
    assert message == (
        "learning rate 1.28e-04 = 2 (accumulate_grad_batches) x 16 (ranks) x 4 (batch_size) x "
        "1.00e-06 (base_learning_rate)"
    )
    assert result.replace(trainer={"scale_lr": False}).build_lr_schedule(16)[0].lr == 1e-6


@pytest.mark.parametrize(
    ("target", "is_warned"), [("LatentDiffusion", True), ("AutoencoderKL", False)]
)
def test_a_learning_rate_that_is_too_high_after_scaling_is_warned_of(
    caplog: pytest.LogCaptureFixture, target: str, is_warned: bool
) -> None:
    """As in the config lsun_churches, which says in a comment that it must not be scaled."""
    model = f"model: {{target: {target}, base_learning_rate: 5e-5}}"
    result = read_settings(parse_yaml(f"{{{model}, data: {{params: {{batch_size: 96}}}}}}"))
    result.build_lr_schedule()
    message = "learning rate 4.80e-03: diffusion models often diverge above 3e-04"
    assert (message in caplog.text) == is_warned


def test_captions_are_dropped_as_the_model_config_says() -> None:
    model = "{params: {unet_config: {}, ucg_training: {txt: {p: 0.2, val: ''}}}}"
    assert read(model=model).objective == {"conditioning_dropout_prob": 0.2}
    assert read(model="{params: {unet_config: {}}}").objective == {"conditioning_dropout_prob": 0.0}
    assert read("{optimizer: {}, trainer: {max_steps: 1}}", model=model).objective == {}


def test_callbacks_are_recognized_by_their_class() -> None:
    result = read(
        "{callbacks: {grids: {target: main.ImageLogger, params: {batch_frequency: 7, "
        "max_images: null}}, "
        "lr: {target: pytorch_lightning.callbacks.LearningRateMonitor}}}"
    )
    assert (result.callbacks.image_steps, result.callbacks.max_images) == (7, 4)
    assert any("lightning.callbacks.lr is ignored" in message for message in result.messages)


def test_epochs_are_converted_to_steps_once_their_length_is_known() -> None:
    result = read("{trainer: {max_epochs: 3, check_val_every_n_epoch: 2}, "
                    "modelcheckpoint: {params: {every_n_epochs: 1, save_top_k: 3}}}")  # fmt: skip
    with pytest.raises(ValueError, match="is unknown, give `max_steps`"):
        result.convert_epochs_to_steps(None)
    limited = read("{trainer: {max_epochs: 3, max_steps: 70}}").convert_epochs_to_steps(None)
    assert limited.trainer.max_steps == 70
    assert "max_epochs is ignored: the length of the data is unknown" in limited.messages[-1]
    result = result.convert_epochs_to_steps(50)
    assert result.trainer.max_steps == 150
    assert result.callbacks.validate_steps == 100
    assert result.callbacks.save_steps == 50
    assert (result.callbacks.save_top_k, result.callbacks.monitor) == (3, None)


@pytest.mark.parametrize("count", ["0", "null", "{4: 2}"])
def test_an_invalid_accumulation_is_refused_by_its_name(count: str) -> None:
    trainer = f"{{trainer: {{val_check_interval: 100, accumulate_grad_batches: {count}}}}}"
    with pytest.raises(ValueError, match=r"^lightning\.trainer\.accumulate_grad_batches: `"):
        read(trainer)


@pytest.mark.parametrize("interval", ["check_val_every_n_epoch: 1", "val_check_interval: 100"])
def test_zero_validation_batches_disable_validation(interval: str) -> None:
    callbacks = read(f"{{trainer: {{limit_val_batches: 0, {interval}}}}}").callbacks
    assert (callbacks.validate_steps, callbacks.validate_epochs) == (None, None)


def test_ignored_arguments_of_lightning_are_named() -> None:
    trainer = "limit_val_batches: 0.5, profiler: simple, reload_dataloaders_every_epoch: true"
    result = read(f"{{trainer: {{{trainer}, min_steps: 3}}}}")
    assert result.callbacks.validate_batches == 8
    ignored = [text.split()[0].rpartition(".")[2] for text in result.messages if "ignored" in text]
    assert ignored == [
        "profiler", "reload_dataloaders_every_epoch", "min_steps", "limit_val_batches",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("lightning", "message"),
    [
        ("trainer: {shard_size: 2}", "trainer.shard_size is ignored: it is for `strategy: hsdp`"),
        ("trainer: {devices: 2, gpus: 1}", "trainer.devices is ignored: `gpus` is set"),
        ("trainer: {devices: 2, accelerator: cpu}", "trainer.devices is ignored: --nproc or"),
        ("objective: {weighting: v, min_snr_gamma: 5}", "objective.weighting is ignored, as `min"),
        ("lora: {targets: text}", "data.params.texts is ignored"),
        ("textual_inversion: {token: x}", "data.params.texts is ignored"),
        ("callbacks: {monitor: val/loss}", "callbacks.monitor is ignored, as `save_top_k` is 0"),
        ("callbacks: {export: ckpt}, lora: {rank: 2}", "callbacks.export: ckpt is ignored"),
        ("callbacks: {save_top_k: 1}, optimizer: {}, trainer: {max_steps: 1}",
         "no validation: validate_steps and validate_epochs are missing"),
        ("logger: {target: pytorch_lightning.loggers.WandbLogger, "
         "params: {project: p, log_model: true}}", "lightning.logger.params.log_model is ignored"),
        ("strategy: {target: pytorch_lightning.strategies.DDPStrategy, params: {timeout: 9}}",
         "lightning.strategy.params.timeout is ignored"),
    ],
)  # fmt: skip
def test_settings_without_effect_are_named(lightning: str, message: str) -> None:
    data = "validation: {root: x}, texts: {cache_dir: x}"
    config = f"{{lightning: {{{lightning}}}, data: {{params: {{{data}}}}}}}"
    assert [text for text in read_settings(parse_yaml(config)).messages if message in text]


def test_fast_dev_run_sets_the_number_of_steps() -> None:
    limits = [read(f"{{trainer: {{fast_dev_run: {n}}}}}").trainer.max_steps for n in ("true", 5)]
    assert limits == [1, 5]


def test_the_monitor_of_the_original_is_used() -> None:
    text = """
        {{model: {{params: {{unet_config: {{}}, monitor: val/loss_simple_ema}}}},
          data: {{params: {{train: {{}}, validation: {held_out}}}}}, lightning: {lightning}}}"""

    def read_monitoring(held_out: str = "{}", lightning: str = "{}") -> list[Any]:
        result = read_settings(parse_yaml(text.format(held_out=held_out, lightning=lightning)))
        return [
            result.callbacks.save_top_k,
            result.callbacks.monitor,
            result.callbacks.validate_epochs,
        ]

    assert read_monitoring("{root: x}") == [3, "val/loss_simple_ema", 1]
    assert read_monitoring() == [0, None, None]
    fewer = "{modelcheckpoint: {params: {save_top_k: 1, monitor: val/loss_simple}}}"
    assert read_monitoring("{root: x}", fewer) == [1, "val/loss_simple", 1]
    best_only = (
        "{modelcheckpoint: {params: {monitor: val/loss}}, optimizer: {}, trainer: {max_steps: 1}}"
    )
    assert read_monitoring("{root: x}", best_only) == [1, "val/loss", None]
    none = "{modelcheckpoint: {params: {save_top_k: 0}}}"
    assert read_monitoring("{root: x}", none) == [0, "val/loss_simple_ema", 1]
    highest = "{modelcheckpoint: {params: {mode: max, monitor: val/psnr}}}"
    assert read_monitoring("{}", highest) == [0, None, None]


def test_a_learning_rate_schedule_is_constant_after_its_last_cycle() -> None:
    multiplier = build_lr_multiplier(make_linear_config(verbosity_interval=0))
    assert [multiplier(n) for n in (0, 2, 10, 99)] == pytest.approx([0, 0.5, 0.2, 0.2])


def test_the_scheduler_of_the_model_is_used_unless_the_optimizer_has_one() -> None:
    model = {"base_learning_rate": 1.0, "params": {"scheduler_config": make_linear_config()}}
    config = {"model": model, "data": {"params": {"batch_size": 2}}}
    result = read_settings({**config, "lightning": {"trainer": {"max_steps": 9}}})
    schedule, _ = result.build_lr_schedule()
    assert schedule(2, 0.5) == pytest.approx(1.0)  # 0.5 x batch 2
    optimizer = {"lr_scheduler": "linear", "lr_warmup_steps": 0}
    lightning = {"trainer": {"max_steps": 9}, "optimizer": optimizer}
    result = read_settings({**config, "lightning": lightning})
    assert result.build_lr_schedule()[0](2, 0.5) == pytest.approx(0.5)
    assert any("replaces" in message for message in result.messages)


SCHEMAS = {
    "trainer": schema.TrainerOptions,
    "callbacks": schema.CallbackOptions,
    "lora": schema.LoraOptions,
    "textual_inversion": schema.TextualInversionOptions,
}


def test_former_names_of_keys_are_read() -> None:
    trainer = {"max_steps": 1, "checkpoint_gradients": True, "broken_share": 0.5}
    trainer |= {"strategy": "hsdp", "shard": 2, "sanity": False}
    callbacks = {"best": -1, "sampling": {"grid": "karras", "rescale": 0.5}, "images": 3}
    callbacks |= {"log_every": 7, "weights": "raw", "dtype": "full"}
    callbacks |= {"evaluation": {"steps": 50, "prompts": "prompts.txt"}}
    objective = {"offset_noise": 0.1, "timesteps": [0, 200], "noise_bias": 2.0}
    inversion = {"token": "x", "vectors": 2, "init": "cat"}
    lightning = {"trainer": trainer, "objective": objective, "callbacks": callbacks}
    lightning["textual_inversion"] = inversion
    latents = {"latents": {"cache": "cache", "variants": 3, "batch": 4}}
    result = read_settings({"lightning": lightning, "data": {"params": latents}})
    assert result.trainer.gradient_checkpointing is True
    assert (result.trainer.max_unreadable_fraction, result.trainer.shard_size) == (0.5, 2)
    assert result.trainer.check_initial_loss is False
    renamed = {"noise_offset": 0.1, "timestep_range": (0, 200), "timestep_bias": 2.0}
    assert result.objective == renamed
    assert (result.callbacks.save_top_k, result.callbacks.max_images) == (-1, 3)
    assert (result.callbacks.export_weights, result.callbacks.export_dtype) == ("raw", "full")
    assert result.callbacks.log_steps == 7
    assert result.textual_inversion is not None
    renamed = {"token": "x", "num_vectors": 2, "initializer_words": "cat"}
    assert result.textual_inversion.model_dump() == renamed
    assert result.callbacks.evaluation is not None
    assert result.callbacks.evaluation.every_n_steps == 50
    assert result.callbacks.sampling == {"scheduler": "karras", "guidance_rescale": 0.5}
    renamed = {"cache_dir": "cache", "variants_per_image": 3, "batch_size": 4}
    assert result.config["data"]["params"]["latents"] == renamed


def test_former_names_of_autoencoder_losses_are_read() -> None:
    result = read(
        "{trainer: {max_steps: 1}, objective: {l1: 1, l2: 2, gradient: 3, kl: 4, peak: 5, "
        "outlier: 6, trained: decoder}}",
        model="{target: ldm.models.autoencoder.AutoencoderKL}",
    )
    assert result.objective == {
        "l1_weight": 1, "l2_weight": 2, "image_gradient_weight": 3, "kl_weight": 4,
        "top_errors_weight": 5, "outlier_weight": 6, "trainable_part": "decoder",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["lora", "textual_inversion"])
def test_lora_and_textual_inversion_of_an_autoencoder_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"lightning.{name} is for diffusion models only"):
        read(f"{{{name}: {{rank: 2}}}}", model="{target: ldm.models.autoencoder.AutoencoderKL}")


def test_a_key_with_both_names_is_refused() -> None:
    message = r"^lightning\.optimizer\.warm_up is the former name of `lr_warmup_steps`: give one .*"
    with pytest.raises(ValueError, match=message):
        read("{trainer: {max_steps: 1}, optimizer: {warm_up: 1, lr_warmup_steps: 1}}")


def test_invalid_values_are_refused_with_their_keys() -> None:
    for section, schema_class in SCHEMAS.items():
        for key in schema_class.model_fields:
            message = rf"lightning\.{section}(\.{key}: `| needs)"
            with pytest.raises(ValueError, match=message):
                read_settings({"lightning": {section: {key: [{}]}}})


def test_the_schema_has_the_arguments_of_tasks() -> None:
    keywords = {*signature(ReconstructionTask).parameters, *signature(AdversarialTask).parameters}
    assert {*schema.list_keys(schema.AutoencoderObjective)} == keywords - {"model", "config"}
    keywords = {*signature(DiffusionTask).parameters, *signature(Criterion).parameters}
    positional = {"model", "criterion_options", "schedule", "parameterization", "model_sigma_data"}
    assert {*schema.list_keys(schema.DiffusionObjective)} == keywords - positional


@pytest.mark.parametrize(
    ("section", "constructor", "difference"),
    [
        (schema.FolderOptions, ImageFolder, {"seed"}),
        (schema.HubOptions, HubDataset, {"seed"}),
        (schema.WebDatasetOptions, Shards, {"seed", "allow_commands"}),
        (schema.PhotoOptions, PhotoTransform, {"name"}),
        (schema.EmojiOptions, EmojiTransform, {"name"}),
        (schema.BucketOptions, Buckets, {"size"}),
        (schema.TagOptions, TagShuffle, set()),
        (schema.LogNormalOptions, LogNormal, set()),
    ],
)
def test_the_schema_has_the_arguments_of_datasets_and_transforms(
    section: type, constructor: Callable[..., object], difference: set[str]
) -> None:
    assert {*schema.list_keys(section)} ^ {*signature(constructor).parameters} == difference


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.base_learning_ratee=1", "model: unknown key `base_learning_ratee`, did you mean"),
        ("model.param.x=1", "model: unknown key `param`, did you mean `params`"),
        ("model.params.unet_config={target: x, param: 1}", "unet_config: unknown key `param`, did"),
        ("data.param.batch_size=3", "data: unknown key `param`, did you mean `params`"),
        ("model.ckpt_path=x", "model: unknown key `ckpt_path`, did you mean `params.ckpt_path`"),
        ("model.base_learning_rate=-1", "rate: `-1` should be greater than or equal to 0"),
        ("model.base_learning_rate=.nan", "rate: `nan` should be a finite number"),
        ("model.params.ucg_training={txt: 0.1}", "ucg_training.txt: `0.1` should be a mapping"),
        ("model.params.ucg_training={txt: {p: 0.1, val: cat}}", "txt.val: `cat` should be ''"),
        ("model.params.unet_trainable=attn", "unet_trainable: `attn` should be 'all' or True"),
        ("model.params.num_timesteps_cond=3", "params.num_timesteps_cond: `3` should be 1"),
        ("model.params.loss_type=l3", "model.params.loss_type: `l3` should be 'l2' or 'l1'"),
        ("model=7", "model: `7` should be a mapping"),
        ("data.params.batch_size=0", "data.params.batch_size: `0` should be greater"),
        ("data.params.validation=photos", "data.params.validation: `photos` should be a mapping"),
        ("data.params.validation.target=ldm.data.simple.TextOnly",
         "data.params.validation: TextOnly needs `captions`"),
        ("lightning.trainr=1", "lightning: unknown section `trainr`, did you mean `trainer`"),
        ("lightning.lora.targets=[]", "lightning.lora.targets: `[]` has too few values"),
        ("lightning.trainer.strategy=hsdp",
         "lightning.trainer: `strategy: hsdp` needs `shard_size`"),
        ("lightning.trainer.accelerator=tpu", "accelerator: `tpu` should be one of auto, cpu"),
        ("lightning.callbacks.image_logger={target: main.ImageLogger, "
         "params: {max_images: 4, log_images_kwargs: {N: a}}}",
         "lightning.callbacks.image_logger.params.log_images_kwargs.N: `a` should be a whole"),
        ("lightning.trainer.num_nodes=two", "num_nodes: `two` should be a whole number"),
        ("lightning.trainer.max_steps=2.5", "max_steps: `2.5` should be a whole number or null"),
        ("lightning.lora={targets: null}", "lightning.lora.targets: `None` should be"),
        ("lightning.trainer.max_time=abc", "trainer.max_time: `abc` should be a time (DD:HH:"),
        ("lightning.trainer.compile=perhaps", "compile: `perhaps` should be true or false"),
        ("lightning.trainer.seed=true", "lightning.trainer.seed: `True` should be a whole number"),
        ("lightning.optimizer.betas=[0.9,2]", "betas: `2` should be less than 1"),
        ("lightning.optimizer.beta=[0.9,2]", "unknown key of adamw `beta`, did you mean `betas`"),
        ("lightning.objective.min_snr_gamma=-1", "`-1` should be greater than 0 or null"),
        ("lightning.objective.conditioning_dropout_prob={txt: 2}",
         "conditioning_dropout_prob.txt: `2` should be less than or equal to 1"),
        ("lightning.objective.conditioning_dropout_prob={txt: a}",
         "conditioning_dropout_prob.txt: `a` should be a valid number"),
        ("lightning.trainer.fast_dev_run=abc", "fast_dev_run: `abc` should be a whole number"),
        ("lightning.objective.noise_ofset=0",
         "lightning.objective: unknown key `noise_ofset`, did"),
        ("lightning.callbacks.prompts=5", "prompts: `5` should be a valid string or null"),
        ("lightning.callbacks.sampling.step=3", "sampling: unknown key `step`, did you mean `st"),
        ("lightning.callbacks.sampling.steps=0", "callbacks.sampling.steps: `0` should be greater"),
        ("lightning.callbacks.image_logger=true", "image_logger: `True` should be a mapping"),
        ("lightning.callbacks.image_logger.params=5", "params: `5` should be a mapping"),
        ("lightning.textual_inversion.num_vectors=2", "textual_inversion needs `token`"),
        ("lightning.trainer.max_step=3", "lightning.trainer: unknown key `max_step`, did you mean"),
        ("lightning.trainers.max_steps=3", "unknown section `trainers`, did you mean `trainer`"),
        ("lightning.trainer.max_steps=null", "needs `max_steps` or `max_time`"),
        ("lightning.trainer.precision=64", "`64` should be '32', 'bf16-mixed' or '16-mixed'"),
        ("lightning.trainer.strategy=deepspeed_stage_2", "strategy: `deepspeed` should be"),
        ("lightning.trainer.gradient_clip_algorithm=value", "`value` should be 'norm'"),
        ("lightning.callbacks.image_logger.params.batch_freqency=1", "mean `batch_frequency`"),
        ("lightning.callbacks.image_logger.params.log_images_kwargs=5",
         "log_images_kwargs: `5` should be a mapping"),
        ("lightning.callbacks.image_logger.param=1", "image_logger: unknown key `param`, did you"),
        ("lightning.modelcheckpoint.param=1", "modelcheckpoint: unknown key `param`, did you"),
        ("lightning.callbacks.mine.target=my.Own", "callbacks.mine: unknown callback `my.Own`"),
        ("lightning.callbacks.mine={target: main.ImageLogger, params: {batch: 1}}",
         "callbacks.mine.params: unknown parameter of ImageLogger `batch`"),
        ("lightning.logger.target=x.MLFlowLogger", "unknown logger `x.MLFlowLogger`"),
    ],
)  # fmt: skip
def test_errors_name_the_key_and_the_value(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_settings(parse_yaml("{model: {}, data: {}, lightning: {}}", [override]))


def test_one_text_stands_for_a_list_and_counts_may_have_exponents() -> None:
    result = read("{trainer: {max_steps: 1e6, nan_limit: .inf, gradient_clip_val: .inf}, "
                    "lora: {targets: text}, callbacks: {export: ckpt, loggers: csv, prompts: a cat,"
                    " save_steps: off, image_minutes: .inf}}")  # fmt: skip
    assert repr(result.trainer.max_steps) == "1000000"
    assert result.trainer.nan_limit == result.callbacks.image_minutes == math.inf
    assert result.lora is not None
    assert result.lora.targets == ["text"]
    callbacks = result.callbacks
    assert (callbacks.export, callbacks.loggers) == (["ckpt"], ["csv"])
    assert (callbacks.prompts, callbacks.save_steps) == (["a cat"], 0)


def test_times_are_read_in_the_formats_of_lightning() -> None:
    times = {"01:10:00": 4200, "01:00:00:00": 86400, "90": 90, "90.5": 90.5}
    for text, seconds in times.items():
        assert read(f"{{trainer: {{max_time: '{text}'}}}}").trainer.max_time == seconds
        assert read(f"{{trainer: {{max_time: {seconds}}}}}").trainer.max_time == seconds


@pytest.mark.parametrize("path", slow_except(CONFIGS, *TRAIN_CONFIGS), ids=lambda path: path.stem)
def test_a_printed_config_reads_back_the_same(path: Path) -> None:
    result = read_settings(read_yaml(path))
    printed = read_settings(parse_yaml(format_yaml(result.to_config())))
    assert replace(printed, config=result.config, messages=result.messages) == result


def test_missing_keys_are_named_together() -> None:
    config = read_yaml(ROOT / "configs/stable-diffusion/v2-inference-v.yaml")
    with pytest.raises(ValueError, match="missing in the config: `data.params.train`, `data"):
        require_keys(config, "model.target", "data.params.train", "data.params.batch_size")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cycle_lengths": [10, 20]}, "must be equally long"),
        ({"f_max": ["high"]}, "invalid values"),
        ({"f_top": [1]}, "unknown parameter of LambdaLinearScheduler `f_top`"),
    ],
)
def test_an_invalid_scheduler_config_is_refused(changes: dict[str, Any], message: str) -> None:
    config = {"model": {"params": {"scheduler_config": make_linear_config(**changes)}}}
    with pytest.raises(ValueError, match=f"^model.params.scheduler_config: .*{message}"):
        read_settings(config)

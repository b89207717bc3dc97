"""Models of every task are trained, draw samples, and are exported and loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.loading.config import format_yaml
from ldm.loading.files.checkpoint import read_checkpoint
from ldm.loading.load import load
from ldm.pipelines import families
from ldm.runtime.errors import ConfigError, FileFormatError
from ldm.train.loop import train
from ldm.train.runs.exports import export
from ldm.train.tasks.diffusion import DiffusionTask
from quick import slow_except
from train.tinyrun import build_run_from, build_tiny_run, make_tiny_config

pytestmark = pytest.mark.usefixtures("no_states")
ENCODERS = "ldm.modules.encoders.modules"
DDPM_PREFIX = "ldm.models.diffusion.ddpm."
LOW_SCALE = {
    "target": "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation",
    "params": {"noise_schedule_config": {"linear_end": 0.02}, "max_noise_level": 10},
}
CLIP_IMAGE = {
    "target": "ldm.modules.encoders.modules.FrozenCLIPImageEmbedder",
    "params": {
        "freeze": False,
        "model": {
            "embed_dim": 32,
            "text_cfg": {"width": 32, "heads": 2, "layers": 1, "vocab_size": 8},
            "vision_cfg": {
                "image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16,
            },
        },
    },
}  # fmt: skip
DEPTH = {"target": "ldm.modules.midas.api.MiDaSInference", "params": {"model_type": None}}
UNCLIP = {
    "conditioning_key": "crossattn-adm",
    "embedding_dropout": 0.25,
    "embedder_config": {
        "target": "ldm.modules.encoders.modules.FrozenOpenCLIPImageEmbedder",
        "params": {"arch": CLIP_IMAGE["params"]["model"]},  # type: ignore[index]
    },
    "noise_aug_config": {
        "target": "ldm.modules.encoders.modules.CLIPEmbeddingNoiseAugmentation",
        "params": {"timestep_dim": 32},
    },
}
# By task: class, in_channels of the UNet, conditions of the transform, parameters of the model.
TASKS: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "inpaint": ("LatentInpaintDiffusion", 9, {"mask": {}}, {"conditioning_key": "hybrid"}),
    "depth2img": (
        "LatentDepth2ImageDiffusion", 5, {"depth": {}},
        {"conditioning_key": "hybrid", "depth_stage_config": DEPTH},
    ),
    "upscale": (
        "LatentUpscaleDiffusion", 7, {"lr": {"factor": 4}},
        {"conditioning_key": "hybrid-adm", "low_scale_config": LOW_SCALE, "low_scale_key": "lr"},
    ),
    "vary": ("LatentDiffusion", 4, {}, {"cond_stage_config": CLIP_IMAGE}),
    "unclip": ("ImageEmbeddingConditionedLatentDiffusion", 4, {}, UNCLIP),
    "enlarge": (
        "LatentUpscaleFinetuneDiffusion", 16, {"lr": {"factor": 2}},
        {"conditioning_key": "hybrid", "concat_keys": ["lr"], "reshuffle_patch_size": 2},
    ),
    # Of latent-diffusion:
    "class2img": (
        "LatentDiffusion", 4, {},
        {"conditioning_key": "crossattn", "cond_stage_key": "class_label",
         "cond_stage_config": {"target": f"{ENCODERS}.ClassEmbedder",
                               "params": {"n_classes": 1001, "embed_dim": 32}}},
    ),
    "txt2img": (
        "LatentDiffusion", 4, {},
        {"conditioning_key": "crossattn", "cond_stage_key": "caption",
         "cond_stage_config": {"target": f"{ENCODERS}.BERTEmbedder",
                               "params": {"n_embed": 32, "n_layer": 1}}},
    ),
    "super_resolve": (
        "LatentDiffusion", 7, {"lr": {"factor": 4}},
        {"conditioning_key": None, "cond_stage_key": "LR_image",
         "cond_stage_config": {"target": "torch.nn.Identity"}},
    ),
    "inpaint_unprompted": (
        "LatentDiffusion", 9, {"mask": {}},
        {"conditioning_key": None, "cond_stage_key": "masked_image",
         "cond_stage_config": "__is_first_stage__"},
    ),
}  # fmt: skip
# Parameters of UNets with a vector condition.
VECTOR_PARAMS: dict[str, dict[str, Any]] = {
    "upscale": {"num_classes": 10},
    "unclip": {"num_classes": "sequential", "adm_in_channels": 64},
}
CACHED_SHAPES: dict[str, dict[str, Any]] = {
    "inpaint": {"masked": (5, 8, 8)},
    "depth2img": {"depth": (1, 8, 8)},
    "upscale": {"lr": (3, 8, 8)},
    "vary": {"jpg": (3, 32, 32)},
    "unclip": {"jpg": (3, 32, 32)},
    "enlarge": {"lr": (3, 16, 16)},
    "class2img": {"class_label": ()},
    "txt2img": {},
    "super_resolve": {"lr": (3, 8, 8)},
    "inpaint_unprompted": {"masked": (5, 8, 8)},
}


def make_config(task: str, folder: Path, **params: Any) -> dict[str, Any]:
    class_name, in_channels, conditions, overrides = TASKS[task]
    config = make_tiny_config("lightning.trainer.max_steps=1", "lightning.callbacks.max_images=2")
    model = config["model"]["params"] | overrides | params
    model["unet_config"]["params"]["in_channels"] = in_channels
    model["unet_config"]["params"] |= VECTOR_PARAMS.get(task, {})
    config["model"] |= {"target": DDPM_PREFIX + class_name, "params": model}
    train = config["data"]["params"]["train"]
    train["transform"]["conditions"] = conditions
    if task == "class2img":
        train["fields"] = {"class_label": 3}
    config["data"]["params"]["latents"] = {"cache_dir": folder / "latents", "variants_per_image": 1}
    return config


@pytest.mark.parametrize("task", slow_except(TASKS, "unclip"))
def test_a_model_of_each_task_is_trained_and_loaded(task: str, tmp_path: Path) -> None:
    config = make_config(task, tmp_path)
    run = build_run_from(config, tmp_path / "run")
    if task == "unclip":
        assert isinstance(run.task, DiffusionTask)
        assert run.task.conditioning_dropout_prob == {"txt": 0.1, "embedding": 0.25}
    source: Any = run.source
    sample = source.dataset[0, 0]
    shapes = {n: tuple(sample[n].shape) for n in sample.keys() - {"txt", "aesthetic_score"}}
    assert shapes == {"z": (4, 8, 8), "z_std": (4, 8, 8)} | CACHED_SHAPES[task]
    input_conv: Any = run.model.unet.input_blocks[0][0]  # type: ignore[union-attr]
    before = input_conv.weight[:, -1].detach().clone()
    train(run)
    # The condition is in the last channel.
    assert not torch.equal(before, input_conv.weight[:, -1])
    assert len(list((tmp_path / "run" / "images" / "train").glob("*.png"))) == 1
    (tmp_path / "model.yaml").write_text(format_yaml({"model": config["model"]}))
    model = load(tmp_path / "model.yaml", run.checkpoints / "last.safetensors")
    family = families.find_family(model.conditioner)
    if task == "enlarge":  # the original has no script for it
        assert family is None
    else:
        assert family is not None
        assert families.FAMILIES[family].function == task.removesuffix("_unprompted")


@pytest.mark.parametrize(
    ("task", "key"), [("inpaint", "mask"), ("upscale", "lr"), ("enlarge", "lr")]
)
def test_a_missing_conditioning_image_is_named(task: str, key: str, tmp_path: Path) -> None:
    config = make_config(task, tmp_path)
    config["data"]["params"]["train"]["transform"]["conditions"] = {}
    with pytest.raises(
        ConfigError, match=rf"train.transform: .* add `conditions: {{{key}: {{}}}}`"
    ):
        build_run_from(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("key", "encoder"),
    [
        ("segmentation", {"target": f"{ENCODERS}.SpatialRescaler", "params": {"n_stages": 2}}),
        ("coordinates_bbox", {"target": f"{ENCODERS}.BERTEmbedder",
                              "params": {"n_embed": 32, "n_layer": 1, "use_tokenizer": False}}),
    ],
)  # fmt: skip
def test_inputs_that_no_data_has_are_refused(
    key: str, encoder: dict[str, Any], tmp_path: Path
) -> None:
    params = {"cond_stage_key": key, "cond_stage_config": encoder}
    conditioning = {"conditioning_key": None if key == "segmentation" else "crossattn"}
    config = make_config("class2img", tmp_path, **params, **conditioning)
    with pytest.raises(ConfigError, match=f"the model reads `{key}`, training on it is not supp"):
        build_run_from(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_label": 1001}, r"has the `class_label` 1001, but the model's are 0 … 1000"),
        ({}, r"has no `class_label`, which the model reads; `class_folders: true` takes it"),
    ],
)
def test_class_labels_are_checked_before_training(
    fields: dict[str, int], message: str, tmp_path: Path
) -> None:
    config = make_config("class2img", tmp_path)
    config["data"]["params"]["train"]["fields"] = fields
    with pytest.raises(FileFormatError, match=message):
        build_run_from(config, tmp_path / "run")


def test_a_model_without_conditions_is_trained_and_draws_samples(tmp_path: Path) -> None:
    config = make_tiny_config("lightning.trainer.max_steps=1", "lightning.callbacks.max_images=2")
    params = config["model"]["params"]
    params |= {"cond_stage_config": "__is_unconditional__", "cond_stage_trainable": False}
    params |= {"conditioning_key": None}
    params["unet_config"]["params"] |= {"use_spatial_transformer": False, "context_dim": None}
    train(build_run_from(config, tmp_path))
    assert len(list((tmp_path / "images" / "train").glob("*.png"))) == 1


def test_new_input_channels_start_at_zero(tmp_path: Path) -> None:
    text_run = build_tiny_run(tmp_path / "text")
    export(text_run)
    weights = text_run.checkpoints / "last.safetensors"
    depth_run = build_run_from(
        make_config("depth2img", tmp_path, ckpt_path=str(weights)), tmp_path / "depth"
    )
    models: list[Any] = [load(ckpt=weights), depth_run.model]
    z, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    depth = {"depth": torch.rand(1, 1, 8, 8)}
    conds = [models[0].condition({"txt": ["cat"]}), models[1].condition({"txt": ["cat"], **depth})]
    with torch.no_grad():
        predictions = [
            m.denoiser.add_noise_and_predict(z, c, t, torch.zeros_like(z))
            for m, c in zip(models, conds, strict=True)
        ]
    torch.testing.assert_close(*predictions, atol=2e-3, rtol=0)
    assert models[1].conditioner.text.token_ids.equal(models[0].conditioner.text.token_ids)


def test_load_only_unet_takes_the_unet_and_the_scale_factor(tmp_path: Path) -> None:
    text_run = build_tiny_run(tmp_path / "text")
    export(text_run)
    weights = str(tmp_path / "measured.ckpt")
    measured = read_checkpoint(text_run.checkpoints / "last.safetensors").state_dict | {
        "scale_factor": torch.tensor(0.3)
    }
    torch.save({"state_dict": measured}, weights)
    params = {"ckpt_path": weights, "load_only_unet": True, "scale_by_std": True}
    config = make_config("vary", tmp_path, **params)
    first_stage = config["model"]["params"]["first_stage_config"]
    first_stage["params"] |= {"ckpt_path": weights, "ignore_keys": ["decoder."]}
    config["lightning"]["trainer"]["seed"] = 5
    run: Any = build_run_from(config, tmp_path / "run")
    expected: Any = text_run.model
    names = {"unet.out.2.weight": True, "autoencoder.decoder.conv_in.weight": False}
    for name, is_equal in names.items():
        actual, other = run.model.get_parameter(name), expected.get_parameter(name)
        assert torch.allclose(actual, other, atol=1e-3) == is_equal, name
    assert run.model.scale_factor == pytest.approx(0.3)  # not measured again


def test_finetune_keys_need_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`finetune_keys` needs a `ckpt_path`"):
        build_run_from(make_config("inpaint", tmp_path, finetune_keys=["any"]), tmp_path)

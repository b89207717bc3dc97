"""Translate `lightning:` from the keys of Lightning 1.4 and the original's `main.py` to ours.

    trainer.*                                   any argument of Lightning's Trainer
    modelcheckpoint.params.*                    when to save, and which weights to keep
    callbacks.<name>.{target, params}           main.ImageLogger, checkpoints at fixed steps
    logger, strategy, find_unused_parameters
    model.params: scheduler_config, use_ema, ucg_training, monitor     how the model is trained;
                  and for `sgm`: see `sgm.py`

Our keys are kept. A message says which keys of the trainer and the callbacks are ignored.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ldm.runtime.errors import check_names, make_unknown_name_error
from ldm.runtime.types import JsonMapping, JsonObject
from ldm.train.config.schema import AUTOENCODER_CLASSES, LightningTrainerArguments, list_keys
from ldm.train.config.sgm import is_sgm_model, translate_training
from ldm.train.config.specs import SPEC_KEYS, drop_nulls, get_section, read_spec

__all__ = ["KNOWN_KEYS", "LIGHTNING_ONLY_SECTIONS", "read_gpus", "translate"]

LIGHTNING_ONLY_SECTIONS = ("modelcheckpoint", "logger", "strategy", "find_unused_parameters")
# Ignored arguments of Lightning's Trainer, and why.
IGNORED_TRAINER_ARGUMENTS = {
    **dict.fromkeys(
        ("num_processes", "auto_select_gpus", "distributed_backend"),
        "--nproc, --gpus or torchrun determine the processes",
    ),
    **dict.fromkeys(
        ("logger", "checkpoint_callback", "enable_checkpointing", "enable_progress_bar",
         "enable_model_summary", "progress_bar_refresh_rate", "process_position", "weights_summary",
         "default_root_dir", "weights_save_path", "flush_logs_every_n_steps", "log_gpu_memory",
         "move_metrics_to_cpu"),
        "a run always saves, logs and shows its progress, see lightning.callbacks",
    ),
    **dict.fromkeys(
        ("reload_dataloaders_every_n_epochs", "reload_dataloaders_every_epoch",
         "multiple_trainloader_mode", "replace_sampler_ddp", "use_distributed_sampler",
         "prepare_data_per_node", "overfit_batches", "limit_train_batches",
         "truncated_bptt_steps"),
        "training data is an endless stream, split among the ranks",
    ),
    **dict.fromkeys(
        ("auto_lr_find", "auto_scale_batch_size", "amp_backend", "amp_level", "plugins",
         "min_steps", "min_epochs", "tpu_cores", "ipus", "stochastic_weight_avg", "deterministic",
         "detect_anomaly", "inference_mode", "barebones", "sync_batchnorm", "track_grad_norm",
         "profiler", "num_sanity_val_steps", "limit_test_batches", "limit_predict_batches"),
        "not supported",
    ),
    "resume_from_checkpoint": "use --resume",
}  # fmt: skip
LOGGERS = {
    "WandbLogger": "wandb",
    "TestTubeLogger": "tensorboard",
    "TensorBoardLogger": "tensorboard",
    "CSVLogger": "csv",
}
BUILT_IN_CALLBACKS = (
    "setup_callback", "learning_rate_logger", "cuda_callback", "ignore_keys_callback",
    "checkpoint_callback",
)  # fmt: skip
# class of a callback -> its usual name in the original's configs
CALLBACK_NAMES = {
    "ImageLogger": "image_logger",
    "ModelCheckpoint": "metrics_over_trainsteps_checkpoint",
    "SetupCallback": "setup_callback",
    "LearningRateMonitor": "learning_rate_logger",
    "CUDACallback": "cuda_callback",
}
IMAGE_LOGGER_PARAMETERS = ("batch_frequency", "max_images", "increase_log_steps", "disabled",
                           "log_images_kwargs")  # fmt: skip
IGNORED_IMAGE_LOGGER_PARAMETERS = (
    "clamp", "rescale", "log_on_batch_idx", "log_first_step", "enable_autocast", "log_all_val",
    "save_input", "log_before_first_step",
)  # fmt: skip
# name in the original or Lightning -> ours
SAMPLING_NAMES = {"ddim_steps": "steps", "unconditional_guidance_scale": "scale", "ddim_eta": "eta"}
SAVE_NAMES = {"every_n_train_steps": "save_steps", "every_n_epochs": "save_epochs",
              "period": "save_epochs", "every_n_val_epochs": "save_epochs"}  # fmt: skip
WANDB_NAMES = {n: n for n in ("project", "name", "entity", "tags", "group", "mode", "id")}
BEST_CHECKPOINT_KEYS = ("save_top_k", "monitor")
DEFAULT_SAVE_TOP_K = 3  # the original's, if the model has a `monitor`
CHECKPOINT_INTERVAL = 10_000  # steps, the original's default
KNOWN_KEYS = {
    "trainer": (*IGNORED_TRAINER_ARGUMENTS, *list_keys(LightningTrainerArguments)),
    "callbacks": ("image_logger", "metrics_over_trainsteps_checkpoint", *BUILT_IN_CALLBACKS),
}

Sections = dict[str, JsonObject]


@dataclass
class _Translation:
    """Sections with our keys, and messages to log."""

    sections: Sections
    messages: list[str] = field(default_factory=list)

    def set_defaults(self, section: str, **values: Any) -> None:
        """Set values of a section, except those that the config sets under our names."""
        for key, value in values.items():
            self.sections.setdefault(section, {}).setdefault(key, value)

    def add_ignored(self, where: str, names: Iterable[str], reason: str = "") -> None:
        """Add messages that keys in `where` are ignored."""
        suffix = f": {reason}" if reason else ""
        self.messages += [f"{where}.{name} is ignored{suffix}" for name in names]


def translate(config: JsonMapping) -> tuple[Sections, list[str]]:
    """Translate a whole config into sections of `lightning:` with our keys.

    Returns:
        The sections, and messages on changed and ignored keys.
    """
    lightning = get_section(config, "lightning")
    names = [name for name in lightning if name not in LIGHTNING_ONLY_SECTIONS]
    result = _Translation({name: dict(get_section(config, f"lightning.{name}")) for name in names})
    _translate_trainer(result)
    _translate_callbacks(config, result)
    _translate_modelcheckpoint(config, result)
    if lightning.get("logger") is not None:
        _translate_logger(lightning["logger"], result)
    strategy = lightning.get("strategy")
    if strategy is not None:
        result.set_defaults("trainer", strategy=strategy)
    if isinstance(strategy, Mapping):
        result.add_ignored("lightning.strategy.params", strategy.get("params") or {})
    if lightning.get("find_unused_parameters") is not None:
        result.add_ignored("lightning", ["find_unused_parameters"], "always true")
    _translate_model(config, result)
    # In Lightning, a callback with its own `monitor` keeps the best checkpoint by default.
    params = drop_nulls(get_section(config, "lightning.modelcheckpoint.params"))
    if params.get("monitor") and params.get("mode", "min") == "min":
        result.set_defaults("callbacks", save_top_k=1)
    return result.sections, result.messages


def read_gpus(trainer: JsonMapping) -> list[int] | int | None:
    """Read the GPUs of Lightning's Trainer: a list of indices, a count, -1 = all, None = not set.

    `gpus: 0,1,` and `devices: 0,1,` name two; `gpus: 2` is any two, `gpus: 0` none.
    """
    value = trainer.get("gpus", trainer.get("devices"))
    if trainer.get("accelerator") == "cpu":
        return 0
    if value is None or value == "auto":
        return None
    entries = value if isinstance(value, list) else str(value).split(",")
    is_list = isinstance(value, list) or len(entries) > 1
    with suppress(ValueError, IndexError):
        numbers = [int(entry) for entry in entries if str(entry).strip()]
        if min(numbers, default=0) >= (0 if is_list else -1):
            return numbers if is_list else numbers[0]
    raise ValueError(
        f"lightning.trainer.gpus: `{value}` should be a count of GPUs or a list such as `0,1,`"
    )


def _translate_trainer(result: _Translation) -> None:
    trainer = result.sections.get("trainer", {})
    for key in [key for key in trainer if key in IGNORED_TRAINER_ARGUMENTS]:
        del trainer[key]
        result.add_ignored("lightning.trainer", [key], IGNORED_TRAINER_ARGUMENTS[key])
    arguments = {key: trainer.pop(key, None) for key in list_keys(LightningTrainerArguments)}
    for key in ("max_steps", "max_epochs"):
        if trainer.get(key) == -1:  # unlimited, for Lightning
            trainer[key] = None
    if arguments["gpus"] is not None and arguments["devices"] is not None:
        result.add_ignored("lightning.trainer", ["devices"], "`gpus` is set")
    elif arguments["accelerator"] == "cpu" and arguments["devices"] not in (None, 1, "1", "auto"):
        result.add_ignored(
            "lightning.trainer", ["devices"], "--nproc or torchrun determine the processes"
        )
    if arguments["fast_dev_run"]:
        trainer["max_steps"] = int(arguments["fast_dev_run"])
    if arguments["terminate_on_nan"]:
        trainer.setdefault("nan_limit", 1)
    if arguments["log_every_n_steps"] is not None:
        result.set_defaults("callbacks", log_steps=arguments["log_every_n_steps"])

    # An integer counts batches, a float is a fraction of an epoch.
    val_interval, val_batches = arguments["val_check_interval"], arguments["limit_val_batches"]
    if val_batches == 0:
        result.set_defaults("callbacks", validate_steps=None, validate_epochs=None)
    elif isinstance(val_interval, float) and val_interval <= 1:
        result.set_defaults("callbacks", validate_epochs=val_interval)
    elif val_interval is not None:
        accumulation = trainer.get("accumulate_grad_batches", 1)
        if not isinstance(accumulation, int) or accumulation < 1:  # `schema` raises for it later
            accumulation = 1
        result.set_defaults("callbacks", validate_steps=max(1, int(val_interval) // accumulation))
    elif arguments["check_val_every_n_epoch"] is not None:
        result.set_defaults("callbacks", validate_epochs=arguments["check_val_every_n_epoch"])
    if isinstance(val_batches, int) and val_batches > 0:
        result.set_defaults("callbacks", validate_batches=val_batches)
    elif val_batches:  # in Lightning a float is a fraction of the validation data
        reason = "give a number of batches, or lightning.callbacks.validate_batches"
        result.add_ignored("lightning.trainer", ["limit_val_batches"], reason)


def _translate_callbacks(config: JsonMapping, result: _Translation) -> None:
    """Translate the original's callbacks, recognized by name or by the class in `target`."""
    callbacks = result.sections.get("callbacks", {})
    for key, spec in list(callbacks.items()):
        where = f"lightning.callbacks.{key}"
        target = str(spec.get("target", "")) if isinstance(spec, Mapping) else ""
        class_name = target.rpartition(".")[2]
        name = CALLBACK_NAMES.get(class_name, key)
        if target and class_name not in CALLBACK_NAMES:
            raise make_unknown_name_error("callback", target, CALLBACK_NAMES, where)
        if name not in KNOWN_KEYS["callbacks"]:
            continue
        check_names("key", get_section(config, where), SPEC_KEYS, where)
        del callbacks[key]
        if spec is None:  # null removes a callback that another config file has set
            continue
        if name in BUILT_IN_CALLBACKS:
            result.add_ignored("lightning.callbacks", [key], "it is built in")
            continue
        params = drop_nulls(get_section(config, f"{where}.params"))
        if name == "image_logger":
            _translate_image_logger(params, f"{where}.params", result)
        else:  # checkpoints at fixed steps
            interval = params.pop("every_n_train_steps", CHECKPOINT_INTERVAL)
            result.set_defaults("callbacks", export_steps=interval)
            result.add_ignored(f"{where}.params", params, "all of these checkpoints are kept")


def _translate_image_logger(params: JsonObject, where: str, result: _Translation) -> None:
    known = [*IMAGE_LOGGER_PARAMETERS, *IGNORED_IMAGE_LOGGER_PARAMETERS]
    check_names("parameter of ImageLogger", params, known, where)
    kwargs = drop_nulls(get_section(params, "log_images_kwargs"))
    max_images = params.get("max_images", 4)
    num_images = kwargs.pop("N", max_images)
    for key, value in (("max_images", max_images), ("log_images_kwargs.N", num_images)):
        if not isinstance(value, int):
            raise ValueError(f"{where}.{key}: `{value}` should be a whole number")
    result.set_defaults(
        "callbacks",
        image_minutes=None,
        max_images=min(max_images, num_images),
        sampling=_pop_renamed(kwargs, SAMPLING_NAMES),
    )
    if not params.get("disabled"):
        result.set_defaults(
            "callbacks",
            image_steps=params.get("batch_frequency", 750),
            image_early=params.get("increase_log_steps", True),
        )
    ignored = [key for key in params if key in IGNORED_IMAGE_LOGGER_PARAMETERS]
    result.add_ignored(where, [*ignored, *(f"log_images_kwargs.{key}" for key in kwargs)])


def _translate_modelcheckpoint(config: JsonMapping, result: _Translation) -> None:
    where = "lightning.modelcheckpoint"
    check_names("key", get_section(config, where), SPEC_KEYS, where)
    params = get_section(config, f"{where}.params")
    # False values such as `save_last: false` have no effect here, except `save_top_k: 0`.
    params = {key: value for key, value in params.items() if value or key == "save_top_k"}
    values = _pop_renamed(params, SAVE_NAMES)
    if params.get("mode", "min") == "min":
        params.pop("mode", None)
        values |= {key: params.pop(key) for key in BEST_CHECKPOINT_KEYS if key in params}
    result.set_defaults("callbacks", **values)
    reason = (
        "the last `keep_states` states are kept to resume from, the `save_top_k` best weights by "
        "`monitor`"
    )
    result.add_ignored(f"{where}.params", params, reason)


def _pop_renamed(params: JsonObject, names: Mapping[str, str]) -> JsonObject:
    """Remove the keys of `names` from the parameters; return them under our names."""
    return {new: params.pop(old) for old, new in names.items() if old in params}


def _translate_logger(spec: object, result: _Translation) -> None:
    name, params = read_spec(spec, LOGGERS, "lightning.logger", kind="logger")
    result.set_defaults("callbacks", loggers=list(dict.fromkeys(["csv", LOGGERS[name]])))
    if name == "WandbLogger":
        if params.pop("offline", False):
            params["mode"] = "offline"
        result.set_defaults("callbacks", wandb=_pop_renamed(params, WANDB_NAMES))
    result.add_ignored("lightning.logger.params", params)


def _translate_model(config: JsonMapping, result: _Translation) -> None:
    """Translate training options among the parameters of the original's model class."""
    model, params = get_section(config, "model"), get_section(config, "model.params")
    if params.get("scheduler_config") is not None:
        if "lr_scheduler" in result.sections.get("optimizer", {}):
            result.messages.append(
                "lightning.optimizer.lr_scheduler replaces model.params.scheduler_config"
            )
        else:
            result.set_defaults("optimizer", scheduler_config=params["scheduler_config"])
    is_sgm = is_sgm_model(model)
    if is_sgm:
        _translate_sgm_model(params, result)
    if "optimizer" in get_section(config, "lightning"):
        return
    is_autoencoder = str(model.get("target")).rpartition(".")[2] in AUTOENCODER_CLASSES
    if is_autoencoder and params.get("ema_decay"):
        result.set_defaults("optimizer", ema_decay=params["ema_decay"])
    elif is_autoencoder or not params.get("use_ema", not is_sgm):
        reason = "ema_decay is missing" if is_autoencoder else "use_ema is false"
        result.set_defaults("optimizer", ema_decay=0.0)
        result.set_defaults("callbacks", export_weights="raw")
        result.messages.append(f"model.params.{reason}: no EMA of the weights")
    _set_validation_defaults(config, result)
    if is_sgm:
        result.set_defaults("trainer", scale_lr=False)
        result.set_defaults("objective", conditioning_dropout_prob=None)
    elif "unet_config" in params:
        key = params.get("cond_stage_key", "txt")
        dropout = (params.get("ucg_training") or {}).get(key) or {}
        result.set_defaults("objective", conditioning_dropout_prob=dropout.get("p", 0.0))


def _translate_sgm_model(params: JsonMapping, result: _Translation) -> None:
    """Translate training options among the parameters of an `sgm` model."""
    translated = translate_training(params)
    if "name" in result.sections.get("optimizer", {}) and translated["optimizer"]:
        result.messages.append("lightning.optimizer.name replaces model.params.optimizer_config")
        translated["optimizer"] = {}
    sampling = translated["callbacks"].pop("sampling", {})
    for name, values in translated.items():
        result.set_defaults(name, **values)
    callbacks = result.sections.setdefault("callbacks", {})
    callbacks["sampling"] = {**sampling, **(callbacks.get("sampling") or {})}


def _set_validation_defaults(config: JsonMapping, result: _Translation) -> None:
    """Set the original's defaults with validation data: validate each epoch, keep the best."""
    data, params = get_section(config, "data.params"), get_section(config, "model.params")
    if not data.get("validation"):
        return
    is_set = result.sections.get("callbacks", {}).keys() & {"validate_steps", "validate_epochs"}
    if not is_set and "shards" not in get_section(config, "data.params.train"):
        result.set_defaults("callbacks", validate_epochs=1)
    # The losses of other autoencoder tasks do not have the names that a `monitor` has.
    loss_class = str(get_section(params, "lossconfig").get("target"))
    if params.get("monitor") and ("unet_config" in params or loss_class.endswith("Discriminator")):
        result.set_defaults("callbacks", monitor=params["monitor"], save_top_k=DEFAULT_SAVE_TOP_K)

"""`lightning:` in the words of Lightning 1.4 and of the original's `main.py` -> in ours.

    trainer.*                                   any argument of Lightning's Trainer
    modelcheckpoint.params.*                    when to save, and which weights to keep
    callbacks.<name>.{target, params}           main.ImageLogger, checkpoints at fixed steps
    logger, strategy, find_unused_parameters
    model.params: scheduler_config, use_ema, ucg_training, monitor     what decides how is trained

Words that are ours already pass. Nothing is dropped in silence: there is a note for each.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ldm.runtime.errors import unknown_name

__all__ = ["KNOWN", "SECTIONS", "read_gpus", "section", "translate"]

SECTIONS = ("modelcheckpoint", "logger", "strategy", "find_unused_parameters")
DEVICES = ("accelerator", "gpus", "devices", "num_nodes")  # read before
# Arguments of Lightning's Trainer that mean nothing here, and why.
WITHOUT_MEANING = {
    **dict.fromkeys(
        ("num_processes", "auto_select_gpus", "distributed_backend"),
        "--nproc, --gpus or torchrun decide where a run lives",
    ),
    **dict.fromkeys(
        ("logger", "checkpoint_callback", "enable_checkpointing", "enable_progress_bar",
         "enable_model_summary", "progress_bar_refresh_rate", "process_position", "weights_summary",
         "default_root_dir", "weights_save_path", "flush_logs_every_n_steps", "log_gpu_memory",
         "track_grad_norm", "profiler", "move_metrics_to_cpu"),
        "a run always saves, shows its progress and logs, see lightning.callbacks",
    ),
    **dict.fromkeys(
        ("limit_test_batches", "limit_predict_batches", "num_sanity_val_steps",
         "reload_dataloaders_every_n_epochs", "multiple_trainloader_mode", "replace_sampler_ddp",
         "use_distributed_sampler", "prepare_data_per_node", "overfit_batches",
         "limit_train_batches", "truncated_bptt_steps"),
        "the data is one endless sequence, whatever the ranks",
    ),
    **dict.fromkeys(
        ("auto_lr_find", "auto_scale_batch_size", "amp_backend", "amp_level", "plugins",
         "min_steps", "min_epochs", "tpu_cores", "ipus", "stochastic_weight_avg", "deterministic",
         "detect_anomaly", "inference_mode", "barebones", "sync_batchnorm"),
        "this trainer has no such thing",
    ),
    "resume_from_checkpoint": "use --resume",
}  # fmt: skip
PRECISIONS = {
    "32": "32", "32-true": "32", "16": "16-mixed", "16-mixed": "16-mixed", "bf16": "bf16-mixed",
    "bf16-mixed": "bf16-mixed",
}  # fmt: skip
STRATEGIES = ("auto", "ddp", "fsdp", "hsdp")
LOGGERS = {
    "WandbLogger": "wandb",
    "TestTubeLogger": "tensorboard",
    "TensorBoardLogger": "tensorboard",
    "CSVLogger": "csv",
}
WITHOUT_CALLBACK = (
    "setup_callback", "learning_rate_logger", "cuda_callback", "ignore_keys_callback",
    "checkpoint_callback",
)  # fmt: skip
# Classes of callbacks, and the names that the original gives them.
CLASSES = {
    "ImageLogger": "image_logger",
    "ModelCheckpoint": "metrics_over_trainsteps_checkpoint",
    "SetupCallback": "setup_callback",
    "LearningRateMonitor": "learning_rate_logger",
    "CUDACallback": "cuda_callback",
}
BEST = 3  # weights that the original keeps, if the model names what to monitor
STEP_CHECKPOINTS = 10_000  # steps between them in the original, if nothing is said
KNOWN = {
    "trainer": (*WITHOUT_MEANING, *DEVICES, "strategy", "val_check_interval",
                "check_val_every_n_epoch", "limit_val_batches", "log_every_n_steps",
                "terminate_on_nan", "fast_dev_run", "gradient_clip_algorithm"),
    "callbacks": ("image_logger", "metrics_over_trainsteps_checkpoint", *WITHOUT_CALLBACK),
}  # fmt: skip

Sections = dict[str, dict[str, Any]]


def translate(raw: Mapping[str, Any]) -> tuple[Sections, list[str]]:
    """A whole config -> its sections of `lightning:` in our words, and notes on what was changed.

    Raises ValueError for a value that cannot be meant here.
    """
    callbacks = section(raw, "lightning.callbacks")
    specs = [f"callbacks.{key}" for key, spec in callbacks.items() if isinstance(spec, Mapping)]
    for name in ("modelcheckpoint", *specs):
        section(raw, f"lightning.{name}.params")  # refuses what is not a mapping
    notes: list[str] = []
    sections: Sections = {}
    for name, value in (raw.get("lightning") or {}).items():
        if name not in SECTIONS:
            if value is not None and not isinstance(value, Mapping):
                raise ValueError(f"lightning.{name}: `{value}` should be a mapping of keys")
            sections[name] = dict(value or {})
    given = {name: (raw.get("lightning") or {}).get(name) for name in SECTIONS}
    _trainer(sections, notes)
    _callbacks(sections, notes)
    if given["modelcheckpoint"] is not None:
        _modelcheckpoint(given["modelcheckpoint"], sections, notes)
    if given["logger"] is not None:
        _logger(given["logger"], sections)
    if given["strategy"] is not None:
        _strategy(given["strategy"], sections)
    if given["find_unused_parameters"] is not None:
        notes.append("lightning.find_unused_parameters has no meaning here: it is seen by itself")
    _model(raw, sections, notes)
    return sections, notes


def section(raw: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The section `where`, "model.params", of a config; {} if there is none.

    Raises:
        ValueError: it is not a mapping.
    """
    node = raw
    names = where.split(".")
    for depth, name in enumerate(names, 1):
        value = node.get(name)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            place = ".".join(names[:depth])
            raise ValueError(f"{place}: `{value}` should be a mapping of keys")
        node = value
    return node


def read_gpus(trainer: Mapping[str, Any]) -> list[int] | int | None:
    """The GPUs that Lightning's Trainer is given: their numbers, how many, -1 = all, None = unset.

    `gpus: 0,1,` and `devices: 0,1,` name two; `gpus: 2` is any two, `gpus: 0` none.

    Raises:
        ValueError: it is anything else.
    """
    value = trainer.get("gpus", trainer.get("devices"))
    if trainer.get("accelerator") == "cpu":
        return 0
    if value is None or value == "auto":
        return None
    words = value if isinstance(value, list) else str(value).split(",")
    try:
        numbers = [int(word) for word in words if str(word).strip()]
    except ValueError:
        raise ValueError(
            f"lightning.trainer.gpus: `{value}` should be a number of GPUs or a list as `0,1,`"
        ) from None
    is_list = isinstance(value, list) or "," in str(value)
    return numbers if is_list else numbers[0]


def _held_out(raw: Mapping[str, Any], params: Mapping[str, Any], sections: Sections) -> None:
    """Held-out data is looked at after every epoch, and the three best weights are kept."""
    data = (raw.get("data") or {}).get("params") or {}
    if not data.get("validation"):
        return
    is_said = sections.get("callbacks", {}).keys() & {"validate_steps", "validate_epochs"}
    if not is_said and "shards" not in (data.get("train") or {}):
        _put(sections, "callbacks", validate_epochs=1)
    losses = str((params.get("lossconfig") or {}).get("target"))
    if params.get("monitor") and ("unet_config" in params or losses.endswith("Discriminator")):
        _put(sections, "callbacks", monitor=params["monitor"], best=BEST)


def _put(sections: Sections, section: str, **values: Any) -> None:
    """What was said in our words already wins."""
    kept = sections.setdefault(section, {})
    for key, value in values.items():
        kept.setdefault(key, value)


def _trainer(sections: Sections, notes: list[str]) -> None:
    trainer = sections.get("trainer", {})
    for key in DEVICES:
        trainer.pop(key, None)
    for key in [key for key in trainer if key in WITHOUT_MEANING]:
        del trainer[key]
        notes.append(f"lightning.trainer.{key} has no meaning here: {WITHOUT_MEANING[key]}")
    if "precision" in trainer:
        trainer["precision"] = PRECISIONS.get(str(trainer["precision"]), trainer["precision"])
    for limit in ("max_steps", "max_epochs"):
        if trainer.get(limit) == -1:  # as Lightning says "any number"
            trainer[limit] = None
    if isinstance(trainer.get("max_time"), Mapping):
        units = ("days", "hours", "minutes", "seconds")
        trainer["max_time"] = ":".join(str(trainer["max_time"].get(unit, 0)) for unit in units)
    if "strategy" in trainer:
        _strategy(trainer.pop("strategy"), sections)
    if trainer.pop("fast_dev_run", False):
        trainer["max_steps"] = 1
    if trainer.pop("terminate_on_nan", False):
        trainer.setdefault("nan_limit", 1)
    if trainer.pop("gradient_clip_algorithm", None) not in (None, "norm"):
        raise ValueError("lightning.trainer.gradient_clip_algorithm: only `norm` is supported")
    if not trainer.get("gradient_clip_val", 1.0):
        trainer["gradient_clip_val"] = None
    _validation(trainer, sections)
    if "log_every_n_steps" in trainer:
        _put(sections, "callbacks", log_every=trainer.pop("log_every_n_steps"))


def _validation(trainer: dict[str, Any], sections: Sections) -> None:
    """When and on how much is validated: whole numbers count batches, shares are of an epoch."""
    every, epochs = (
        trainer.pop("val_check_interval", None),
        trainer.pop("check_val_every_n_epoch", None),
    )
    if isinstance(every, float) and every <= 1:
        _put(sections, "callbacks", validate_epochs=every)
    elif every is not None:
        parts = trainer.get("accumulate_grad_batches", 1)
        _put(sections, "callbacks", validate_steps=max(1, int(every) // parts))
    elif epochs is not None:
        _put(sections, "callbacks", validate_epochs=epochs)
    limit = trainer.pop("limit_val_batches", None)
    if isinstance(limit, int) and limit > 0:
        _put(sections, "callbacks", validate_batches=limit)
    elif limit == 0:
        _put(sections, "callbacks", validate_steps=None, validate_epochs=None)


def _callbacks(sections: Sections, notes: list[str]) -> None:
    """Callbacks that are meant by their name in the original, or by the class that they target."""
    callbacks = sections.get("callbacks", {})
    readers: dict[str, Callable[[dict[str, Any], Sections, list[str]], None]] = {
        "image_logger": _image_logger,
        "metrics_over_trainsteps_checkpoint": _step_checkpoints,
    }
    for key in list(callbacks):
        spec = callbacks[key] if isinstance(callbacks[key], Mapping) else {}
        target = str(spec.get("target", ""))
        name = CLASSES.get(target.rpartition(".")[2], key)
        if target and target.rpartition(".")[2] not in CLASSES:
            raise unknown_name("callback", target, CLASSES, f"lightning.callbacks.{key}")
        if name in WITHOUT_CALLBACK:
            del callbacks[key]
            notes.append(f"lightning.callbacks.{key} has no meaning here: that is built in")
        elif name in readers:
            del callbacks[key]
            readers[name](dict(spec.get("params") or {}), sections, notes)


def _image_logger(params: dict[str, Any], sections: Sections, notes: list[str]) -> None:
    where = "lightning.callbacks.image_logger.params"
    ours: dict[str, Any] = {"image_minutes": None}
    if not params.pop("disabled", False):
        ours["image_steps"] = params.pop("batch_frequency", 750)
        ours["image_early"] = params.pop("increase_log_steps", True)
    params.pop("batch_frequency", None)
    params.pop("increase_log_steps", None)
    ours["images"] = params.pop("max_images", 4)
    kwargs = dict(params.pop("log_images_kwargs", None) or {})
    if "N" in kwargs:
        ours["images"] = min(ours["images"], kwargs.pop("N"))
    names = {"ddim_steps": "steps", "unconditional_guidance_scale": "scale", "ddim_eta": "eta"}
    ours["sampling"] = {new: kwargs.pop(old) for old, new in names.items() if old in kwargs}
    _put(sections, "callbacks", **ours)
    known = ("clamp", "rescale", "log_on_batch_idx", "log_first_step", "enable_autocast",
             "log_all_val", "save_input", "log_before_first_step")  # fmt: skip
    for key in params:
        if key not in known:
            every = ["batch_frequency", "max_images", "increase_log_steps", "disabled", *known]
            raise unknown_name("parameter of ImageLogger", key, every, where)
    left = [*params, *(f"log_images_kwargs.{key}" for key in kwargs)]
    if left:
        notes.append(f"{where}: no meaning here for {', '.join(left)}")


def _step_checkpoints(params: dict[str, Any], sections: Sections, notes: list[str]) -> None:
    steps = params.pop("every_n_train_steps", STEP_CHECKPOINTS)
    _put(sections, "callbacks", export_steps=steps)
    if params:
        notes.append(
            "lightning.callbacks.metrics_over_trainsteps_checkpoint.params: no meaning here for "
            f"{', '.join(params)}; all of these checkpoints are kept"
        )


def _modelcheckpoint(spec: Mapping[str, Any], sections: Sections, notes: list[str]) -> None:
    params = dict(spec.get("params") or {})
    names = {"every_n_train_steps": "save_steps", "every_n_epochs": "save_epochs",
             "period": "save_epochs", "every_n_val_epochs": "save_epochs"}  # fmt: skip
    ours = {new: params.pop(old) for old, new in names.items() if params.get(old)}
    if params.get("mode", "min") == "min":
        kept = {"save_top_k": "best", "monitor": "monitor"}
        ours |= {new: params.pop(old) for old, new in kept.items() if params.get(old) is not None}
        params.pop("mode", None)
    _put(sections, "callbacks", **ours)
    if params:
        notes.append(
            f"lightning.modelcheckpoint.params: no meaning here for {', '.join(params)}; the last "
            "states are kept to resume from, and the weights with the lowest `monitor`"
        )


def _logger(spec: Mapping[str, Any] | str | bool, sections: Sections) -> None:
    where = "lightning.logger"
    if not isinstance(spec, Mapping):
        raise ValueError(f"{where}: `{spec}` is no mapping with a `target`")
    name = str(spec.get("target", "")).rpartition(".")[2]
    if name not in LOGGERS:
        raise unknown_name("logger", spec.get("target"), LOGGERS, where)
    ours: dict[str, Any] = {"loggers": list(dict.fromkeys(["csv", LOGGERS[name]]))}
    if name == "WandbLogger":
        names = ("project", "name", "entity", "tags", "group", "mode", "id")
        params = dict(spec.get("params") or {})
        if params.get("offline"):
            params["mode"] = "offline"
        ours["wandb"] = {key: params[key] for key in names if key in params}
    _put(sections, "callbacks", **ours)


def _strategy(spec: Any, sections: Sections) -> None:
    """A name, or {"target": …DDPStrategy}."""
    name = str(spec["target"]).rpartition(".")[2] if isinstance(spec, Mapping) else str(spec)
    short = name.lower().removesuffix("strategy").partition("_")[0] if name else "auto"
    if short not in STRATEGIES:
        raise unknown_name("strategy", name, STRATEGIES, "lightning.trainer")
    _put(sections, "trainer", strategy=short)


def _model(raw: Mapping[str, Any], sections: Sections, notes: list[str]) -> None:
    """What the original's model class decides about its own training."""
    params = (raw.get("model") or {}).get("params") or {}
    scheduler = params.get("scheduler_config")
    if scheduler is not None:
        if "decay" in sections.get("optimizer", {}):
            notes.append("model.params.scheduler_config yields to lightning.optimizer.decay")
        else:
            _put(sections, "optimizer", schedule=scheduler)
    if "optimizer" in (raw.get("lightning") or {}):
        return
    if params.get("use_ema") is False:
        _put(sections, "optimizer", ema_decay=0.0)
        _put(sections, "callbacks", weights="raw")
        notes.append("model.params.use_ema is false: no average of the weights is made")
    _held_out(raw, params, sections)
    if "unet_config" in params:
        dropped = (params.get("ucg_training") or {}).get(params.get("cond_stage_key", "txt")) or {}
        _put(sections, "objective", drop=dropped.get("p", 0.0))

"""Settings of a run: the `lightning:` section of a config, and keys of other sections.

`schema` defines all keys. Keys of Lightning 1.4 and of the original's `main.py` are translated by
`lightning`; a message says which are ignored.
"""

import logging
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TypeVar

from ldm.runtime.errors import check_names
from ldm.runtime.types import JsonMapping, JsonObject
from ldm.train.config import lightning, schema
from ldm.train.config.datamodules import extract_sample_prompts, read_data, translate_data_module
from ldm.train.config.renamed_keys import rename_keys
from ldm.train.config.schema import validate_section
from ldm.train.config.specs import SPEC_KEYS, check_specs, drop_nulls, get_section
from ldm.train.optim.schedules import SCHEDULER_CONFIG_KEY, LearningRateSchedule

__all__ = ["Devices", "Settings", "read_settings", "require_keys"]

LIGHTNING_SECTIONS = ("trainer", "optimizer", "objective", "callbacks", "lora", "textual_inversion")
# Defaults of configs without `lightning.optimizer`, which were written for the original.
ORIGINAL_TRAINER_DEFAULTS: JsonObject = {"gradient_clip_val": None, "scale_lr": True}
ORIGINAL_OPTIMIZER_DEFAULTS: JsonObject = {
    "lr_warmup_steps": 0, "lr_scheduler": "constant", "weight_decay": 1e-2,
}  # fmt: skip
DEFAULT_MAX_EPOCHS = 1000  # as in Lightning
HIGH_LEARNING_RATE = 3e-4  # scaled by the batch; diffusion models often diverge above
LIMIT_KEYS = ("max_steps", "max_epochs", "max_time")
log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Devices:
    """The devices of a run.

    Args:
        gpus: Indices, or a count, -1 = all; None = one process, on the first GPU if there is one.
        needs_gpu: Whether a machine without a GPU is an error; else its CPU is used.
    """

    gpus: list[int] | int | None = None
    num_nodes: int = 1
    needs_gpu: bool = False


@dataclass(frozen=True)
class Settings:
    """The settings of one run.

    Args:
        config: The whole config, from which the others are read.
        loader: Batch size and number of workers, defaults in a config without data.
        objective: Keywords of the task, a `DiffusionObjective` or an `AutoencoderObjective`.
        messages: Lines to log, on translated and ignored keys.
    """

    config: JsonMapping
    model: schema.ModelConfig
    loader: schema.LoaderOptions
    trainer: schema.TrainerOptions
    optimizer: schema.OptimizerOptions
    objective: JsonMapping
    callbacks: schema.CallbackOptions
    devices: Devices = Devices()
    lora: schema.LoraOptions | None = None
    textual_inversion: schema.TextualInversionOptions | None = None
    messages: tuple[str, ...] = ()

    @cached_property
    def data(self) -> schema.DataOptions:
        """All of `data.params`, read on first use, as it is missing if only a model is built."""
        return read_data(self.config["data"])

    def replace(self, **sections: JsonMapping) -> "Settings":
        """Return a copy with changed values, not validated: `replace(trainer={"max_steps": 3})`."""
        changed = copy(self)  # with the cached `data`
        for name, values in sections.items():
            vars(changed)[name] = vars(self)[name].model_copy(update=values)
        return changed

    def convert_epochs_to_steps(self, steps_per_epoch: Fraction | int | None) -> "Settings":
        """Return a copy with all numbers of epochs converted to steps.

        Args:
            steps_per_epoch: None if the length of the data is unknown; numbers of epochs are then
                ignored, with a message, if there are numbers of steps, too.
        Raises:
            ValueError: Only a number of epochs is set, and the length of the data is unknown.
        """
        trainer, callbacks, messages = self.trainer, self.callbacks, list(self.messages)
        changes: dict[str, dict[str, float]] = {"trainer": {}, "callbacks": {}}
        for section, prefix, epochs, limit in (
            ("trainer", "max", trainer.max_epochs, trainer.max_steps),
            ("callbacks", "save", callbacks.save_epochs, callbacks.save_steps),
            ("callbacks", "validate", callbacks.validate_epochs, callbacks.validate_steps),
        ):
            if epochs is None:
                continue
            if steps_per_epoch is None:
                problem = "the length of the data is unknown"
                key, steps_key = f"lightning.{section}.{prefix}_epochs", f"`{prefix}_steps`"
                if limit:
                    messages.append(f"{key} is ignored: {problem}, {steps_key} is {limit}")
                    continue
                raise ValueError(
                    f"{key}: {problem}, give {steps_key}, or for shards `data.params.train.length`"
                )
            count = max(1, round(epochs * steps_per_epoch))
            changes[section][f"{prefix}_steps"] = min(count, limit) if limit else count
        converted = self.replace(**changes)
        vars(converted)["messages"] = tuple(messages)
        return converted

    def build_lr_schedule(self, world_size: int = 1) -> tuple[LearningRateSchedule, str]:
        """Return the learning rate schedule of the run, and an explanation of its peak.

        Logs a warning if scaling by the batch probably makes it too high; the original does not.

        Raises:
            ValueError: The config has no `base_learning_rate`.
        """
        require_keys(self.config, "model.base_learning_rate")
        base = self.model.base_learning_rate or 0.0
        lr, explanation = base, f"learning rate {base:.2e} (base_learning_rate, scale_lr false)"
        if self.trainer.scale_lr:
            accumulation, batch_size = self.trainer.accumulate_grad_batches, self.loader.batch_size
            lr = accumulation * world_size * batch_size * base
            explanation = (
                f"learning rate {lr:.2e} = {accumulation} (accumulate_grad_batches) x {world_size} "
                f"(ranks) x {batch_size} (batch_size) x {base:.2e} (base_learning_rate)"
            )
            if lr > HIGH_LEARNING_RATE and not self.model.is_autoencoder:
                log.warning(
                    "learning rate %.2e: diffusion models often diverge above %.0e; set "
                    "scale_lr: false if base_learning_rate should not be scaled",
                    lr, HIGH_LEARNING_RATE,
                )  # fmt: skip
        return _build_schedule(self.optimizer, lr), explanation

    def find_sharding_problem(self) -> str | None:
        """Return why FSDP cannot shard the weights of this run; None if it can."""
        if self.lora or self.textual_inversion or self.model.is_autoencoder:
            return "LoRAs, embeddings and autoencoders cannot be sharded, use ddp"
        if self.trainer.channels_last or self.trainer.ema_device:
            return "fsdp and hsdp do not work with `channels_last` or `ema_device: cpu`"
        return None

    def check_strategy(self, world_size: int) -> None:
        """Raise ValueError if the strategy does not support the run on this number of processes."""
        strategy, shard_size = self.trainer.strategy, self.trainer.shard_size
        if world_size == 1 or strategy not in ("fsdp", "hsdp"):
            return
        problem = self.find_sharding_problem()
        if strategy == "hsdp" and (not shard_size or world_size % shard_size):
            problem = f"`shard_size` is {shard_size}, it must divide the {world_size} processes"
        if problem:
            raise ValueError(f"lightning.trainer.strategy: {problem}")

    def to_config(self) -> JsonObject:
        """Return the whole config, with defaults of all keys of `lightning:`."""
        optimizer = self.optimizer.model_dump(exclude={"options"}) | self.optimizer.options
        inversion = self.textual_inversion
        sections = {
            "trainer": self.trainer.model_dump(),
            "optimizer": {k: [*v] if isinstance(v, tuple) else v for k, v in optimizer.items()},
            "objective": dict(self.objective),
            "callbacks": self.callbacks.model_dump(),
            "lora": self.lora.model_dump() if self.lora else {},
            "textual_inversion": inversion.model_dump() if inversion else {},
        }
        return {**self.config, "lightning": sections}


def read_settings(config: JsonMapping) -> Settings:
    """Read and check the settings of a whole config, as `ldm.loading.config` reads it.

    Raises:
        ValueError: A section or key is unknown (the message suggests the nearest one), or a value
            is not allowed.
    """
    config = rename_keys(config)
    check_specs(get_section(config, "model.params"), "model.params")
    config, sample_prompts = extract_sample_prompts(config)
    data_module = get_section(config, "data")
    check_names("key", data_module, SPEC_KEYS, "data")
    if data_module:
        config = {**config, "data": translate_data_module(data_module)}
    model = _read_section(schema.ModelConfig, config, "model", suggested_keys=["params.ckpt_path"])
    _read_section(schema.ModelParams, config, "model.params")
    loader = _read_section(schema.LoaderOptions, config, "data.params")
    lightning_trainer = _read_section(schema.LightningTrainerArguments, config, "lightning.trainer")
    known = [*LIGHTNING_SECTIONS, *lightning.LIGHTNING_ONLY_SECTIONS]
    check_names("section", get_section(config, "lightning"), known, "lightning")
    sections, messages = lightning.translate(config)
    is_autoencoder = model.is_autoencoder
    values = {name: sections.get(name, {}) for name in LIGHTNING_SECTIONS}
    if sample_prompts is not None:
        values["callbacks"] = {"prompts": sample_prompts, **values["callbacks"]}
    for name in ("lora", "textual_inversion"):
        if is_autoencoder and values[name]:
            raise ValueError(f"lightning.{name} is for diffusion models only")
    if "optimizer" not in (config.get("lightning") or {}):
        values["trainer"] = ORIGINAL_TRAINER_DEFAULTS | values["trainer"]
        scaling = "scaled by the batch" if values["trainer"]["scale_lr"] else "not scaled"
        messages.append(
            f"no `lightning.optimizer`: {'Adam' if is_autoencoder else 'AdamW'} as in the "
            f"original, learning rate {scaling}, no gradient clipping"
        )
        if is_autoencoder:  # AdamW without weight decay is Adam
            values["optimizer"] = {"weight_decay": 0.0} | values["optimizer"]
        values["optimizer"] = ORIGINAL_OPTIMIZER_DEFAULTS | values["optimizer"]
    limits = {key: values["trainer"].get(key) for key in LIMIT_KEYS if key in values["trainer"]}
    if limits and not any(limits.values()):
        raise ValueError("lightning.trainer needs `max_steps` or `max_time` (or `max_epochs`)")
    if not limits:
        values["trainer"] = {**values["trainer"], "max_epochs": DEFAULT_MAX_EPOCHS}
        messages.append(
            f"lightning.trainer has no limit: {DEFAULT_MAX_EPOCHS} epochs, as in Lightning"
        )

    def validate(schema_class: type[T], section: str) -> T:
        where, keys = f"lightning.{section}", lightning.KNOWN_KEYS.get(section, ())
        return validate_section(schema_class, values[section], where, suggested_keys=keys)

    trainer = validate(schema.TrainerOptions, "trainer")
    callbacks = validate(schema.CallbackOptions, "callbacks")
    if trainer.strategy == "hsdp" and not trainer.shard_size:
        raise ValueError("lightning.trainer: `strategy: hsdp` needs `shard_size`")
    if trainer.strategy != "hsdp" and trainer.shard_size:  # older configs may have it
        messages.append("lightning.trainer.shard_size is ignored: it is for `strategy: hsdp`")
    messages += _make_validation_messages(callbacks, get_section(config, "data.params"))
    if all(values["objective"].get(key) is not None for key in ("weighting", "min_snr_gamma")):
        messages.append("lightning.objective.weighting is ignored, as `min_snr_gamma` is set")
    lora = validate(schema.LoraOptions, "lora") if values["lora"] else None
    is_text_trained = values["textual_inversion"] or (lora and "text" in lora.targets)
    if is_text_trained and get_section(config, "data.params").get("texts"):
        messages.append("data.params.texts is ignored: training changes the contexts")
    if (lora or values["textual_inversion"]) and "ckpt" in callbacks.export:
        messages.append("lightning.callbacks.export: ckpt is ignored for LoRA and embeddings")
    return Settings(
        config=config,
        model=model,
        loader=loader,
        trainer=trainer,
        optimizer=_read_optimizer(values["optimizer"]),
        objective=(
            validate(schema.AutoencoderObjective, "objective")
            if is_autoencoder
            else validate(schema.DiffusionObjective, "objective")
        ),
        callbacks=callbacks,
        devices=Devices(
            lightning.read_gpus(lightning_trainer),
            lightning_trainer.get("num_nodes", 1),
            needs_gpu=lightning_trainer.get("accelerator") in ("gpu", "cuda"),
        ),
        lora=lora,
        textual_inversion=(
            validate(schema.TextualInversionOptions, "textual_inversion")
            if values["textual_inversion"]
            else None
        ),
        messages=tuple(messages),
    )


def require_keys(config: JsonMapping, *keys: str) -> None:
    """Raise ValueError if any of these dotted keys is missing from a config."""
    missing = []
    for key in keys:
        section, _, name = key.rpartition(".")
        if get_section(config, section).get(name) is None:
            missing.append(f"`{key}`")
    if missing:
        raise ValueError(f"missing in the config: {', '.join(missing)}")


def _make_validation_messages(options: schema.CallbackOptions, data: JsonMapping) -> Iterator[str]:
    """Yield messages on validation keys that have no effect."""
    has_interval = options.validate_steps or options.validate_epochs
    if not data.get("validation"):
        if has_interval or options.save_top_k:
            yield "no validation: data.params.validation is missing"
    elif options.save_top_k and not has_interval:
        yield "no validation: validate_steps and validate_epochs are missing"
    if options.monitor and not options.save_top_k:
        yield "lightning.callbacks.monitor is ignored, as `save_top_k` is 0"


def _read_section(
    schema_class: type[T], config: JsonMapping, where: str, suggested_keys: Sequence[str] = ()
) -> T:
    values = drop_nulls(get_section(config, where))
    return validate_section(schema_class, values, where, suggested_keys=suggested_keys)


def _read_optimizer(values: JsonMapping) -> schema.OptimizerOptions:
    """Read the optimizer; keys that are not common to all optimizers are its `options`."""
    where, common_keys = "lightning.optimizer", schema.list_keys(schema.OptimizerOptions)
    common_keys.remove("options")
    common = {key: value for key, value in values.items() if key in common_keys}
    optimizer = validate_section(schema.OptimizerOptions, common, where)
    options: JsonObject = validate_section(
        schema.OPTIMIZER_OPTIONS[optimizer.name],
        {key: value for key, value in values.items() if key not in common_keys},
        where,
        kind=f"key of {optimizer.name}",
        suggested_keys=common_keys,
    )
    try:
        _build_schedule(optimizer, 1.0)
    except (TypeError, ArithmeticError, LookupError) as error:
        raise ValueError(f"{SCHEDULER_CONFIG_KEY}: invalid values: {error}") from error
    return optimizer.model_copy(update={"options": options})


def _build_schedule(optimizer: schema.OptimizerOptions, lr: float) -> LearningRateSchedule:
    return LearningRateSchedule(
        lr, optimizer.lr_warmup_steps, optimizer.lr_scheduler, optimizer.scheduler_config
    )

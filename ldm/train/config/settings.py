"""Settings of a run: the `lightning:` section of a config, with what it reads of the others.

`schema` has all keys. Names of Lightning 1.4 and of the original's `main.py` are translated by
`lightning`; what has no meaning today becomes a note.
"""

from dataclasses import dataclass, replace
from fractions import Fraction

from ldm.runtime.errors import unknown_name
from ldm.runtime.types import JsonMapping, JsonObject
from ldm.train.config import lightning, schema
from ldm.train.config.schema import (
    OPTIONS,
    Batches,
    Callbacks,
    Denoising,
    LightningTrainer,
    Lora,
    Model,
    ModelParams,
    Optimizer,
    Reconstruction,
    TextualInversion,
    Trainer,
    validate,
)  # fmt: skip
from ldm.train.optim.schedules import WHERE, LearningRate

__all__ = ["Devices", "Settings", "check_complete", "read_settings"]

SECTIONS = ("trainer", "optimizer", "objective", "callbacks", "lora", "textual_inversion")
# Defaults of a config that names no optimizer, so was written for the original.
ORIGINAL: dict[str, JsonObject] = {
    "trainer": {"gradient_clip_val": None, "scale_lr": True},
    "optimizer": {"warm_up": 0, "decay": "constant", "weight_decay": 1e-2},
}
EPOCHS = 1000  # Lightning's default, if a run has no end
LIMITS = ("max_steps", "max_epochs", "max_time")


@dataclass(frozen=True)
class Devices:
    """Where a run lives.

    Args:
        gpus: their numbers, or how many: -1 = all; None: all, without a process for each.
        num_nodes: machines.
    """

    gpus: list[int] | int | None = None
    num_nodes: int = 1


@dataclass(frozen=True)
class Settings:
    """The settings of one run.

    Args:
        raw: the whole config that they were read from.
        objective: keywords of the task.
        lora, textual_inversion: what is trained beside a frozen model, None for nothing.
        notes: lines to tell the user: what was renamed, or has no meaning here.
    """

    raw: JsonMapping
    model: Model
    data: Batches
    trainer: Trainer
    optimizer: Optimizer
    objective: Denoising | Reconstruction
    callbacks: Callbacks
    devices: Devices = Devices()
    lora: Lora | None = None
    textual_inversion: TextualInversion | None = None
    notes: tuple[str, ...] = ()

    def change(
        self,
        *,
        trainer: JsonMapping | None = None,
        optimizer: JsonMapping | None = None,
        callbacks: JsonMapping | None = None,
        data: JsonMapping | None = None,
    ) -> "Settings":
        """A copy with other values: `change(trainer={"max_steps": 3})`; they are not checked."""
        return replace(
            self,
            trainer=self.trainer.model_copy(update=trainer),
            optimizer=self.optimizer.model_copy(update=optimizer),
            callbacks=self.callbacks.model_copy(update=callbacks),
            data=self.data.model_copy(update=data),
        )

    def count_epochs(self, steps: Fraction | int | None) -> "Settings":
        """A copy in which all that is counted in epochs is counted in steps.

        Args:
            steps: in an epoch; None if the data has no end.
        Raises:
            ValueError: a number of epochs is set, and the data has no end.
        """
        trainer, callbacks = self.trainer, self.callbacks
        sections: dict[str, dict[str, float]] = {"trainer": {}, "callbacks": {}}
        for section, key, epochs, limit in (
            ("trainer", "max", trainer.max_epochs, trainer.max_steps),
            ("callbacks", "save", callbacks.save_epochs, callbacks.save_steps),
            ("callbacks", "validate", callbacks.validate_epochs, callbacks.validate_steps),
        ):
            if epochs is None:
                continue
            if steps is None:
                raise ValueError(
                    f"lightning.{section}.{key}_epochs: the data has no known length, give "
                    f"`{key}_steps`"
                )
            count = max(1, round(epochs * steps))
            sections[section][f"{key}_steps"] = min(count, limit) if limit else count
        return self.change(trainer=sections["trainer"], callbacks=sections["callbacks"])

    def learning_rate(self, world_size: int = 1) -> tuple[LearningRate, str]:
        """The learning rate of the run, and a line that explains it.

        Args:
            world_size: processes on all nodes.
        Raises:
            ValueError: the config has no `base_learning_rate`.
        """
        check_complete(self.raw, "model.base_learning_rate")
        base = self.model.base_learning_rate or 0.0
        lr, line = base, f"learning rate {base:.2e} (base_learning_rate, scale_lr false)"
        if self.trainer.scale_lr:
            accumulation, batch = self.trainer.accumulate_grad_batches, self.data.batch_size
            lr = accumulation * world_size * batch * base
            line = (
                f"learning rate {lr:.2e} = {accumulation} (accumulate_grad_batches) x {world_size} "
                f"(ranks) x {batch} (batch_size) x {base:.2e} (base_learning_rate)"
            )
        return _rate(self.optimizer, lr), line

    def to_config(self) -> JsonObject:
        """The whole config with every key of `lightning:` filled in."""
        optimizer = self.optimizer.model_dump(exclude={"options"}) | self.optimizer.options
        sections = {
            "trainer": self.trainer.model_dump(),
            "optimizer": {k: [*v] if isinstance(v, tuple) else v for k, v in optimizer.items()},
            "objective": dict(self.objective),
            "callbacks": self.callbacks.model_dump(),
            "lora": self.lora.model_dump() if self.lora else {},
            "textual_inversion": (
                self.textual_inversion.model_dump() if self.textual_inversion else {}
            ),
        }
        return {**self.raw, "lightning": sections}


def read_settings(raw: JsonMapping) -> Settings:
    """The settings of a whole config, checked.

    Args:
        raw: the config as `ldm.loading.config` reads it.
    Raises:
        ValueError: a section or key is unknown, naming the nearest known one, or a value is not
            allowed; also of what a run reads in `model` and `data`.
    """
    model, data, devices = _read_original(raw)
    sections, notes = lightning.translate(raw)
    for name in sections:
        if name not in SECTIONS:
            raise unknown_name("section", name, [*SECTIONS, *lightning.SECTIONS], "lightning")
    is_autoencoder = model.target.endswith("AutoencoderKL")
    defaults = {}
    if "optimizer" not in (raw.get("lightning") or {}):
        notes.append(
            "no `lightning.optimizer`: AdamW as in the original, learning rate scaled by the "
            "batch, no clipping"
        )
        defaults = ORIGINAL
        if is_autoencoder:  # Adam, not AdamW
            defaults = {**ORIGINAL, "optimizer": {**ORIGINAL["optimizer"], "weight_decay": 0.0}}
    values = {name: {**defaults.get(name, {}), **sections.get(name, {})} for name in SECTIONS}
    limits = [values["trainer"].get(key) for key in LIMITS]
    if not any(limits):
        if any(key in values["trainer"] for key in LIMITS):
            raise ValueError("lightning.trainer needs `max_steps` or `max_time` (or `max_epochs`)")
        values["trainer"]["max_epochs"] = EPOCHS
        notes.append(f"lightning.trainer has no limit: {EPOCHS} epochs, as in Lightning")
    lora, inversion = values["lora"], values["textual_inversion"]
    known = lightning.KNOWN
    return Settings(
        raw=raw,
        model=model,
        data=data,
        trainer=validate(Trainer, values["trainer"], "lightning.trainer", also=known["trainer"]),
        optimizer=_read_optimizer(values["optimizer"]),
        objective=(
            validate(Reconstruction, values["objective"], "lightning.objective")
            if is_autoencoder
            else validate(Denoising, values["objective"], "lightning.objective")
        ),
        callbacks=validate(
            Callbacks, values["callbacks"], "lightning.callbacks", also=known["callbacks"]
        ),
        devices=devices,
        lora=validate(Lora, lora, "lightning.lora") if lora else None,
        textual_inversion=(
            validate(TextualInversion, inversion, "lightning.textual_inversion")
            if inversion
            else None
        ),
        notes=tuple(notes),
    )


def check_complete(raw: JsonMapping, *keys: str) -> None:
    """Raises ValueError if a config has not all of these keys, "model.base_learning_rate"."""
    missing = []
    for key in keys:
        section, _, name = key.rpartition(".")
        if lightning.section(raw, section).get(name) is None:
            missing.append(f"`{key}`")
    if missing:
        raise ValueError(f"missing in the config: {', '.join(missing)}")


def _read_original(raw: JsonMapping) -> tuple[Model, Batches, Devices]:
    """What is read as it stands, and what `lightning` computes with; null counts as missing."""

    def set_values(where: str) -> JsonObject:
        values = lightning.section(raw, where)
        return {key: value for key, value in values.items() if value is not None}

    model = validate(Model, set_values("model"), "model", also=["params.ckpt_path"])
    validate(ModelParams, set_values("model.params"), "model.params")
    data = validate(Batches, set_values("data.params"), "data.params")
    trainer = validate(LightningTrainer, set_values("lightning.trainer"), "lightning.trainer")
    return model, data, Devices(lightning.read_gpus(trainer), trainer.get("num_nodes", 1))


def _read_optimizer(values: JsonMapping) -> Optimizer:
    """Its own keywords are those of the optimizer that is chosen."""
    own = schema.fields_of(Optimizer)
    own.remove("options")
    optimizer = validate(
        Optimizer, {k: v for k, v in values.items() if k in own}, "lightning.optimizer"
    )
    options: JsonObject = validate(
        OPTIONS[optimizer.name],
        {k: v for k, v in values.items() if k not in own},
        "lightning.optimizer",
        kind=f"key of {optimizer.name}",
        also=own,
    )
    try:
        _rate(optimizer, 1.0)
    except (TypeError, ArithmeticError, LookupError) as error:
        raise ValueError(f"{WHERE}: its numbers cannot be used: {error}") from error
    return optimizer.model_copy(update={"options": options})


def _rate(optimizer: Optimizer, lr: float) -> LearningRate:
    return LearningRate(lr, optimizer.warm_up, optimizer.decay, optimizer.schedule)

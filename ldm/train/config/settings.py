"""What a run is told, besides its model and its data: the `lightning:` section of a config.

Sections and keys are those of DEFAULTS. What Lightning 1.4 and the original's `main.py` call
otherwise is put into these words by `translation`; what means nothing today becomes a note.
"""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from ldm.runtime.errors import unknown_name
from ldm.train.config import lightning, schema
from ldm.train.config.schema import seconds
from ldm.train.optim.schedules import WHERE, Rate

__all__ = ["DEFAULTS", "Settings", "read", "refuse_incomplete", "seconds"]

DEFAULTS: dict[str, dict[str, Any]] = {
    "trainer": {
        "max_steps": None,  # the run ends after so many steps …
        "max_epochs": None,  # … or so many passes over the data …
        "max_time": None,  # … or so much time, DD:HH:MM:SS, over all sessions: whatever is first
        "gradient_clip_val": 1.0,  # largest norm of the gradients; null: any
        "accumulate_grad_batches": 1,
        "scale_lr": False,  # learning rate = accumulate x ranks x batch x base_learning_rate
        "precision": "32",  # or bf16-mixed, 16-mixed
        "strategy": "auto",  # or ddp, fsdp, hsdp
        "shard": None,  # ranks that share one copy of the weights in hsdp
        "attention": None,  # a backend of nets.attention
        "seed": 23,
        "benchmark": False,  # cuDNN tries its algorithms
        "compile": False,
        "channels_last": False,
        "checkpoint_gradients": None,  # null: as `use_checkpoint` of the model's config says
        "ema_device": None,  # null: with the weights; or cpu
        "keep": 2,  # states to resume from
        "nan_limit": 10,  # losses in a row that are not finite end the run
        "broken_share": 0.01,  # of unreadable files that ends the run
        "timeout": 45,  # seconds of silence after which a rank counts as lost
        "sanity": True,  # the loss of the untouched model is looked at before step 1
    },
    # name: adamw | muon …; schedule: a `scheduler_config`; other keys go to the optimizer
    "optimizer": {
        "name": "adamw", "warm_up": 100, "decay": "cosine", "schedule": None, "ema_decay": 0.9999
    },
    "objective": {},  # keywords of the task
    "callbacks": {
        "log_every": 20,  # steps between lines of the log
        "loggers": ["csv", "tensorboard"],  # or wandb
        "wandb": {},  # project, name, entity, tags, mode
        "save_minutes": 3,
        "save_steps": None,
        "save_epochs": None,
        "image_minutes": 10,
        "image_steps": None,
        "image_early": False,  # also at steps 1, 2, 4, 8 …
        "images": 16,
        "prompts": None,  # of the grids; null: the first captions of the data
        "sampling": {},  # steps, scale, eta of the grids
        "validate_steps": None,
        "validate_epochs": None,
        "validate_batches": 8,
        "best": 0,  # exports that stay, those with the lowest loss on held-out data; -1: all
        "monitor": None,  # that loss; null: val/loss_ema, or val/loss without an average
        "export": ["safetensors"],  # and/or ckpt
        "export_steps": None,  # also to checkpoints/trainstep_checkpoints, and all are kept
        "weights": "ema",  # or raw, both
        "dtype": "half",  # of exports, or full
    },
    "lora": {},  # keywords of what is trained beside a frozen model; empty: nothing is
    "textual_inversion": {},
}  # fmt: skip
# What holds for a config that names no optimizer, so was written for the original.
ORIGINAL: dict[str, dict[str, Any]] = {
    "trainer": {"gradient_clip_val": None, "scale_lr": True},
    "optimizer": {"warm_up": 0, "decay": "constant", "weight_decay": 1e-2},
}
EPOCHS = 1000  # Lightning's end of a run that is told none
MODEL = ("base_learning_rate", "target", "params")


class Settings(dict[str, dict[str, Any]]):
    """The sections of DEFAULTS, every key filled in.

    notes: lines to tell the user: what was understood otherwise, or has no meaning here.
    """

    def __init__(self, sections: Mapping[str, dict[str, Any]], notes: list[str]) -> None:
        super().__init__(sections)
        self.notes = notes

    def count_epochs(self, steps: Fraction | int | None) -> None:
        """Turns everything that is counted in epochs into steps.

            steps: in an epoch; None if the data has no end.
        Raises ValueError if a number of epochs was asked for then.
        """
        pairs = [("trainer", "max")] + [("callbacks", key) for key in ("save", "validate")]
        for section, key in pairs:
            options = self[section]
            epochs, limit = options[f"{key}_epochs"], options[f"{key}_steps"]
            if epochs is None:
                continue
            if steps is None:
                raise ValueError(
                    f"lightning.{section}.{key}_epochs: the data has no known length, give "
                    f"`{key}_steps`"
                )
            counted = max(1, round(epochs * steps))
            options[f"{key}_steps"] = min(counted, limit) if limit else counted

    def rate(self, base: float, *, batch: int, world: int = 1) -> tuple[Rate, str]:
        """The learning rate of a run, and a line that says where it is from.

        base: `model.base_learning_rate`. batch: of one rank. world: ranks on all nodes.
        """
        parts, scaled = self["trainer"]["accumulate_grad_batches"], self["trainer"]["scale_lr"]
        lr, line = base, f"learning rate {base:.2e} (base_learning_rate, scale_lr false)"
        if scaled:
            lr = parts * world * batch * base
            line = (
                f"learning rate {lr:.2e} = {parts} (accumulate_grad_batches) x {world} (ranks) x "
                f"{batch} (batch_size) x {base:.2e} (base_learning_rate)"
            )
        options = self["optimizer"]
        return Rate(lr, options["warm_up"], options["decay"], options["schedule"]), line


def read(raw: Mapping[str, Any]) -> Settings:
    """The settings of a whole config.

    Raises ValueError for an unknown section or key, naming the nearest known one, and for a value
    that cannot be, also of what a run reads in `model` and `data`.
    """
    _check_original(raw)
    given, notes = lightning.translate(raw)
    target, defaults = str(schema.at(raw, "model").get("target")), DEFAULTS
    if "optimizer" not in schema.at(raw, "lightning"):
        notes.append(
            "no `lightning.optimizer`: AdamW as in the original, learning rate scaled by the "
            "batch, no clipping"
        )
        defaults = {name: {**keys, **ORIGINAL.get(name, {})} for name, keys in DEFAULTS.items()}
        if target.endswith("AutoencoderKL"):
            defaults["optimizer"]["weight_decay"] = 0.0  # Adam, not AdamW
    _check_keys(given)
    merged = _checked(
        {name: {**keys, **given.get(name, {})} for name, keys in defaults.items()}, target
    )
    trainer = given.get("trainer", {})
    limits = ("max_steps", "max_epochs", "max_time")
    if not any(merged["trainer"][key] for key in limits):
        if any(key in trainer for key in limits):
            raise ValueError("lightning.trainer needs `max_steps` or `max_time` (or `max_epochs`)")
        merged["trainer"]["max_epochs"] = EPOCHS
        notes.append(f"lightning.trainer names no end: {EPOCHS} epochs, as in Lightning")
    made = Settings(merged, notes)
    _check_schedule(made)
    return made


def refuse_incomplete(raw: Mapping[str, Any], *wanted: str) -> None:
    """Raises ValueError if a config has not all that is wanted, "model.base_learning_rate"."""
    places = {where: where.rpartition(".") for where in wanted}
    lacking = [
        f"`{where}`"
        for where, (section, _, key) in places.items()
        if schema.at(raw, section).get(key) is None
    ]
    if lacking:
        raise ValueError(f"the config lacks {', '.join(lacking)}")


def _check_original(raw: Mapping[str, Any]) -> None:
    """What is read as it stands, and what `translation` computes with."""
    for key in schema.at(raw, "model"):
        if key not in MODEL:
            known = (*MODEL, "params.ckpt_path")  # some configs have it a level too high
            raise unknown_name("key", key, known, "model")
    for where, kinds in schema.ORIGINAL.items():
        said = {key: value for key, value in schema.at(raw, where).items() if value is not None}
        schema.checked(said, kinds, where)
    callbacks = schema.at(raw, "lightning.callbacks")
    specs = [f"callbacks.{key}" for key, spec in callbacks.items() if isinstance(spec, Mapping)]
    for name in ("modelcheckpoint", *specs):
        schema.at(raw, f"lightning.{name}.params")  # refuses what is no mapping


def _check_keys(given: Mapping[str, Mapping[str, Any]]) -> None:
    for section in given:
        if section not in DEFAULTS:
            known = [*DEFAULTS, *lightning.SECTIONS]
            raise unknown_name("section", section, known, "lightning")
    for section in ("trainer", "callbacks"):
        known = [*DEFAULTS[section], *lightning.KNOWN[section]]
        schema.refuse_unknown(given.get(section, {}), known, f"lightning.{section}")


def _checked(sections: Mapping[str, dict[str, Any]], target: str) -> dict[str, dict[str, Any]]:
    """All values as they are used.

    target: the class of the model, which knows what its objective can be told.
    """
    kinds = {**schema.KINDS, "objective": schema.kinds_of_objective(target)}
    made = {
        name: schema.checked(keys, kinds[name], f"lightning.{name}")
        for name, keys in sections.items()
    }
    # These have no keys but those of KINDS, or of what is chosen.
    name, callbacks = made["optimizer"]["name"], made["callbacks"]
    closed = {
        "optimizer": (made["optimizer"], schema.kinds_of_optimizer(name)),
        "callbacks.sampling": (callbacks["sampling"], kinds["callbacks.sampling"]),
        **{part: (made[part], kinds[part]) for part in ("objective", "lora", "textual_inversion")},
    }
    for part, (keys, known) in closed.items():
        of = f" of {name}" if part == "optimizer" else ""
        schema.refuse_unknown(keys, known, f"lightning.{part}", of)
        keys.update(schema.checked(keys, known, f"lightning.{part}"))
    if made["textual_inversion"] and "token" not in made["textual_inversion"]:
        raise ValueError("lightning.textual_inversion needs `token`, the word to be learned")
    return made


def _check_schedule(settings: Settings) -> None:
    try:
        settings.rate(1.0, batch=1)
    except (TypeError, ArithmeticError, LookupError) as error:
        raise ValueError(f"{WHERE}: its numbers cannot be used: {error}") from error

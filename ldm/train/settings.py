"""What a run is told, besides its model and its data: the `lightning:` section of a config.

Sections and keys are those of DEFAULTS. What Lightning 1.4 and the original's `main.py` call
otherwise is put into these words by `translation`; what means nothing today becomes a note.
"""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from ldm.loading import legacy
from ldm.train import translation
from ldm.train.schedules import Rate

__all__ = ["DEFAULTS", "Settings", "read", "seconds"]

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
        "loggers": ["csv", "tensorboard"],  # or wandb; those not installed are left out
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
CHOICES = {
    ("trainer", "precision"): ("32", "bf16-mixed", "16-mixed"),
    ("trainer", "strategy"): translation.STRATEGIES,
    ("callbacks", "weights"): ("ema", "raw", "both"),
    ("callbacks", "dtype"): ("half", "full"),
    ("callbacks", "loggers"): ("csv", "tensorboard", "wandb"),
    ("callbacks", "export"): ("safetensors", "ckpt"),
}


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
            values = self[section]
            epochs, limit = values[f"{key}_epochs"], values[f"{key}_steps"]
            if epochs is None:
                continue
            if steps is None:
                raise ValueError(
                    f"lightning.{section}.{key}_epochs: the data has no known length, give "
                    f"`{key}_steps`"
                )
            counted = max(1, round(epochs * steps))
            values[f"{key}_steps"] = min(counted, limit) if limit else counted

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

    Raises ValueError for an unknown section, key or choice, naming the nearest known one.
    """
    given, notes = translation.translate(raw)
    defaults = DEFAULTS
    if "optimizer" not in (raw.get("lightning") or {}):
        notes.append(
            "no `lightning.optimizer`: AdamW as in the original, constant learning rate scaled by "
            "the batch, no clipping"
        )
        defaults = {name: {**keys, **ORIGINAL.get(name, {})} for name, keys in DEFAULTS.items()}
        if str((raw.get("model") or {}).get("target")).endswith("AutoencoderKL"):
            defaults["optimizer"]["weight_decay"] = 0.0  # Adam, not AdamW
    _check_keys(given)
    merged = {name: {**values, **given.get(name, {})} for name, values in defaults.items()}
    _check_values(merged)
    trainer = given.get("trainer", {})
    limits = ("max_steps", "max_epochs", "max_time")
    if not any(merged["trainer"][key] for key in limits):
        if any(key in trainer for key in limits):
            raise ValueError("lightning.trainer needs `max_steps` or `max_time` (or `max_epochs`)")
        merged["trainer"]["max_epochs"] = EPOCHS
        notes.append(f"lightning.trainer names no end: {EPOCHS} epochs, as in Lightning")
    return Settings(merged, notes)


def seconds(text: str | int | float) -> float:
    """ "DD:HH:MM:SS", or a part of it from the right, or a number of seconds -> seconds."""
    if not isinstance(text, str):
        return float(text)
    total = 0.0
    for part, unit in zip(reversed(text.split(":")), (1, 60, 3600, 86400), strict=False):
        total += float(part) * unit
    return total


def _check_keys(given: Mapping[str, Mapping[str, Any]]) -> None:
    for section in given:
        if section not in DEFAULTS:
            known = [*DEFAULTS, *translation.SECTIONS]
            raise legacy.unknown("section", section, known, "lightning")
    for section in ("trainer", "callbacks"):
        for key in given.get(section, {}):
            if key not in DEFAULTS[section]:
                known = [*DEFAULTS[section], *translation.KNOWN[section]]
                raise legacy.unknown("key", key, known, f"lightning.{section}")


def _check_values(merged: Mapping[str, Mapping[str, Any]]) -> None:
    for (section, key), allowed in CHOICES.items():
        value = merged[section][key]
        for one in value if isinstance(value, list | tuple) else [value]:
            if one not in allowed:
                raise ValueError(
                    f"lightning.{section}.{key}: `{one}` is none of {', '.join(allowed)}"
                )
    parts = merged["trainer"]["accumulate_grad_batches"]
    if not isinstance(parts, int) or parts < 1:
        raise ValueError(
            f"lightning.trainer.accumulate_grad_batches: `{parts}` is no positive number"
        )

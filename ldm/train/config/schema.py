"""What the values of a config may be: kinds of values, and a table of the keys that have them.

A kind reads a value as it stands in a file and gives it as it is used: `1.0e+6` is a count, one
word is a list of one. For what cannot be it raises ValueError, which `checked` completes:

    lightning.callbacks.images: `-3` is no whole number >= 0
"""

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import GRIDS
from ldm.nets.attention import BACKENDS
from ldm.pipelines.sampling import LEGACY
from ldm.runtime.errors import unknown_name
from ldm.train.config.lightning import STRATEGIES
from ldm.train.optim.optimizers import OPTIMIZERS
from ldm.train.tasks.adaptation import TARGETS

__all__ = [
    "KINDS",
    "ORIGINAL",
    "at",
    "checked",
    "kinds_of_objective",
    "kinds_of_optimizer",
    "refuse_unknown",
    "seconds",
]

Kind = Callable[[Any], Any]
Kinds = Mapping[str, Kind]

SIGNS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}


def seconds(text: str | int | float) -> float:
    """ "DD:HH:MM:SS", or a part of it from the right, or a number of seconds -> seconds."""
    if not isinstance(text, str):
        return float(text)
    total = 0.0
    for part, unit in zip(reversed(text.split(":")), (1, 60, 3600, 86400), strict=False):
        total += float(part) * unit
    return total


def at(raw: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The section `where`, "model.params", of a config; {} if there is none.

    Raises ValueError for what is no mapping.
    """
    found: Any = raw
    names = where.split(".")
    for depth, name in enumerate(names, 1):
        found = found.get(name)
        if found is None:
            return {}
        if not isinstance(found, Mapping):
            raise ValueError(f"{'.'.join(names[:depth])}: `{found}` is no mapping of keys")
    return found


def checked(values: Mapping[str, Any], kinds: Kinds, where: str) -> dict[str, Any]:
    """The values of a section as they are used; those that no kind is known of are as they were.

    Raises ValueError for the first that cannot be, naming it by `where` and its key.
    """
    made = dict(values)
    for key in (key for key in values if key in kinds):
        try:
            made[key] = kinds[key](values[key])
        except ValueError as error:
            raise ValueError(f"{where}.{key}: {error}") from None
    return made


def refuse_unknown(given: Iterable[str], known: Iterable[str], where: str, of: str = "") -> None:
    """Raises ValueError for a key outside `known`."""
    known = list(known)
    for key in given:
        if key not in known:
            raise unknown_name(f"key{of}", key, known, where)


def number(*limits: str, null: bool = False, inf: bool = False, whole: bool = False) -> Kind:
    """A number, if it keeps to all limits, ">= 0"; never NaN.

    null, inf: whether it may be that. whole: a count; it may be written 1.0e+6 where it may be inf,
        as such a one is only compared.
    """
    tests = [(SIGNS[sign], float(limit)) for sign, limit in map(str.split, limits)]
    kind = "whole number" if whole else "number" if inf else "finite number"
    name = f"{kind} {' and '.join(limits)}".strip()

    def read(value: Any) -> Any:
        if null and value is None:
            return None
        value = 0 if value is False else value  # `save_steps: off`
        fits = isinstance(value, int | float) and value is not True
        fits = fits and (inf or -math.inf < value < math.inf)
        fits = fits and all(test(value, limit) for test, limit in tests)  # which NaN never passes
        if fits and whole and isinstance(value, float) and value < math.inf:
            fits = inf and value.is_integer()
        if not fits:
            raise _refused(value, name, null)
        return int(value) if whole and value < math.inf else value

    return read


def count(*limits: str, null: bool = False, inf: bool = False) -> Kind:
    return number(*limits, null=null, inf=inf, whole=True)


def choice(*allowed: Any, null: bool = False) -> Kind:
    def read(value: Any) -> Any:
        if (value is None and null) or (isinstance(value, str) and value in allowed):
            return value
        raise ValueError(f"`{value}` is none of {', '.join([*allowed, *['null'] * null])}")

    return read


def some(allowed: Iterable[str]) -> Kind:
    """A list of names; one alone is a list of it."""
    one = choice(*allowed)
    return lambda value: [one(name) for name in (value if isinstance(value, list) else [value])]


def flag(value: Any) -> bool:
    if value is None or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise ValueError(f"`{value}` is neither true nor false")


def pair(first: Kind, second: Kind) -> Kind:
    def read(value: Any) -> list[Any]:
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise ValueError(f"`{value}` is no list of two numbers")
        return [first(value[0]), second(value[1])]

    return read


def optional(kind: Kind) -> Kind:
    """What `kind` reads, or null, of which only `kind` itself does not speak."""
    return lambda value: None if value is None else kind(value)


def mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"`{value}` is no mapping of keys")
    return dict(value)


def text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"`{value}` is no text")
    return value


def texts(value: Any) -> list[str]:
    """A list of texts; one alone is a list of it."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ValueError(f"`{value}` is neither a list of texts nor null")
    return found


def duration(value: Any) -> Any:
    """A time that `seconds` reads; 0 is none."""
    is_time = isinstance(value, int | float | str) and value is not True
    try:
        is_time = is_time and str(value).count(":") < 4 and seconds(value) >= 0
    except ValueError:
        is_time = False
    if not is_time:
        raise ValueError(f"`{value}` is no time, which is DD:HH:MM:SS, seconds >= 0, or null")
    return value


def shares(value: Any) -> Any:
    """A share, or several by name."""
    if not isinstance(value, Mapping):
        return SHARE(value)
    return {name: SHARE(one) for name, one in value.items()}


def dropped(value: Any) -> Any:
    """The original's {key: {p: share, val: what takes its place}}."""
    for name, one in mapping(value).items():
        if not isinstance(one, Mapping) or "p" not in one:
            raise ValueError(f"`{one}` for `{name}` is no mapping {{p: a share, val: …}}")
        SHARE(one["p"])
    return value


def kinds_of_objective(target: str) -> Kinds:
    """Of `lightning.objective`, for the class of a model that a config names."""
    return RECONSTRUCTION if target.endswith("AutoencoderKL") else DENOISING


def kinds_of_optimizer(name: str) -> Kinds:
    """Of `lightning.optimizer`, for the optimizer of that name."""
    own = {key: MOMENTS.get((name, key)) or MOMENTS["", key] for key in OPTIMIZERS[name][1]}
    return dict(KINDS["optimizer"]) | own


def _refused(value: Any, name: str, null: bool) -> ValueError:
    said = f"neither a {name} nor null" if null else f"no {name}"
    return ValueError(f"`{value}` is {said}")


SHARE, FACTOR = number(">= 0", "<= 1"), number(">= 0")
BELOW_ONE = number(">= 0", "< 1")
MINUTES, STEPS = number(">= 0", null=True, inf=True), count(">= 0", null=True, inf=True)  # 0: never
EPOCHS = number("> 0", null=True)
# By optimizer, or for all the others.
MOMENTS = {
    ("", "betas"): pair(BELOW_ONE, BELOW_ONE),
    ("", "weight_decay"): FACTOR,
    ("", "momentum"): BELOW_ONE,
    ("", "eps"): FACTOR,
    ("adafactor", "eps"): pair(number(">= 0", null=True), FACTOR),
    ("adafactor", "beta2_decay"): number("<= 0"),
    ("adafactor", "d"): number(">= 1"),
}  # fmt: skip
WEIGHTING: dict[str, Kind] = {  # `Criterion`'s, which stand in the model's own parameters too
    "loss_type": choice("l2", "l1"), "l_simple_weight": FACTOR, "original_elbo_weight": FACTOR,
    "learn_logvar": flag, "logvar_init": number(), "scale_by_std": flag,
}  # fmt: skip
DENOISING: Kinds = {
    **WEIGHTING,
    "drop": shares,
    "prior_weight": FACTOR,
    "noise_bias": number("> 0"),
    "offset_noise": FACTOR,
    "input_perturbation": FACTOR,
    "min_snr_gamma": number("> 0", null=True, inf=True),
}
RECONSTRUCTION: Kinds = {
    **dict.fromkeys(("l1", "l2", "gradient", "kl"), FACTOR),
    "trained": choice("all", "decoder"),
    "learn_logvar": flag,
    "export_losses": flag,
    "perceptual": optional(mapping),
}
# Of every config, whoever wrote it, before anything is translated; null is the same as nothing.
ORIGINAL: dict[str, Kinds] = {
    "model": {"base_learning_rate": FACTOR},
    "model.params": {
        **WEIGHTING, "embedding_dropout": SHARE, "ucg_training": dropped, "use_ema": flag,
        "scheduler_config": mapping,
    },
    "data.params": {"batch_size": count(">= 1"), "num_workers": count(">= 0")},
    "lightning.trainer": {
        "accumulate_grad_batches": count(">= 1"),
        "num_nodes": count(">= 1"),
        "val_check_interval": number("> 0"),
        "check_val_every_n_epoch": number("> 0"),
        "limit_val_batches": FACTOR,
        "log_every_n_steps": count(">= 1", inf=True),
    },
}  # fmt: skip
KINDS: dict[str, Kinds] = {
    "trainer": {
        "max_steps": STEPS,
        "max_epochs": EPOCHS,
        "max_time": optional(duration),
        "gradient_clip_val": number(">= 0", null=True, inf=True),
        "accumulate_grad_batches": count(">= 1"),
        "precision": choice("32", "bf16-mixed", "16-mixed"),
        "strategy": choice(*STRATEGIES),
        "shard": count(">= 1", null=True),
        "attention": choice("auto", *BACKENDS, null=True),
        "seed": count(">= -1000000000000", "<= 1000000000000"),  # torch's end at 64 bits
        "checkpoint_gradients": optional(flag),
        "ema_device": choice("cpu", null=True),
        "keep": count(">= 1"),
        "nan_limit": count(">= 1", inf=True),
        "broken_share": SHARE,
        "timeout": number("> 0"),
        **dict.fromkeys(("scale_lr", "benchmark", "compile", "channels_last", "sanity"), flag),
    },
    "optimizer": {
        "name": choice(*OPTIMIZERS),
        "warm_up": FACTOR,
        "decay": choice("constant", "linear", "cosine"),
        "schedule": optional(mapping),
        "ema_decay": BELOW_ONE,
    },
    "callbacks": {
        "log_every": count(">= 1", inf=True),
        "loggers": some(("csv", "tensorboard", "wandb")),
        "wandb": mapping,
        **dict.fromkeys(("save_minutes", "image_minutes"), MINUTES),
        **dict.fromkeys(("save_steps", "image_steps", "validate_steps", "export_steps"), STEPS),
        **dict.fromkeys(("save_epochs", "validate_epochs"), EPOCHS),
        "image_early": flag,
        "images": count(">= 0"),
        "prompts": optional(texts),
        "sampling": mapping,
        "validate_batches": count(">= 1"),
        "best": count(">= -1"),
        "monitor": optional(text),
        "export": some(("safetensors", "ckpt")),
        "weights": choice("ema", "raw", "both"),
        "dtype": choice("half", "full"),
    },
    "callbacks.sampling": {
        "steps": count(">= 1"),
        "scale": number(),
        "eta": FACTOR,
        "sampler": choice(*SAMPLERS),
        "grid": choice(*GRIDS, null=True),
        "rescale": SHARE,
        "unet_tile": count(">= 1", null=True),
        "legacy": some(LEGACY),
    },
    "lora": {
        "rank": count(">= 1"),
        "alpha": number("> 0", null=True),
        "targets": some(TARGETS),
    },
    "textual_inversion": {"token": text, "vectors": count(">= 1"), "init": optional(text)},
}

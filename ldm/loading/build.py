"""A model without memory (on the meta device) that a config describes, and filling it with weights.

Strict: every tensor, every shape. Nothing is initialised, as all of it is replaced.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.encoders.lowres import LowRes
from ldm.encoders.text import OpenCLIPText
from ldm.loading import legacy
from ldm.loading.config import instantiate
from ldm.loading.families import recognise_family
from ldm.loading.files.checkpoint import release_pages
from ldm.loading.legacy import original_name
from ldm.model import LatentDiffusion

__all__ = ["add_unused_weights", "build_on_meta", "check_weights", "fill_weights"]

log = logging.getLogger(__name__)

TEXT = "conditioner.text."
PREFIXES = ("", "unet.", "autoencoder.", TEXT)


def build_on_meta(
    spec: Mapping[str, Any],
    *,
    allow: Sequence[str] = (),
    where: str = "config",
    skipped: list[str] | None = None,
) -> nn.Module:
    """The module of a translated config without memory: every weight is on the meta device."""
    args: dict[str, Any] = {"allow": allow, "skipped": skipped}
    if spec["target"] != legacy.MODEL:
        with torch.device("meta"), _NoInit():
            return cast(nn.Module, instantiate(spec, where=where, **args))
    parts = dict(spec["params"])
    for name in ("unet", "autoencoder", "conditioner"):  # the rest is numbers, wanted for real
        with torch.device("meta"), _NoInit():
            parts[name] = instantiate(parts[name], where=f"{where}.{name}", **args)
    return cast(nn.Module, instantiate({**spec, "params": parts}, where=where, **args))


def fill_weights(
    model: nn.Module,
    state: dict[str, Tensor],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    mapped: bool = False,
    misfit: str = "the weights do not fit",
) -> None:
    """Puts weights into a model on the meta device, strictly; `state` is used up.

        state: under our names, as `legacy.rename` gives them; for a single part also bare names.
        mapped: the tensors are pages of a file: those that are copied are given back at once, so
            that the peak is what the model keeps.
    Raises ValueError with counts and the first ten names that do not fit.
    """
    wanted = model.state_dict()
    prefix = next((p for p in PREFIXES if any(p + name in state for name in wanted)), "")
    for name in [name for name in state if not name.startswith(prefix)]:
        del state[name]  # other parts of a whole model
    check_weights(wanted, {n.removeprefix(prefix): v for n, v in state.items()}, misfit)
    weights: dict[str, Tensor] = {}
    for name in list(state):  # in the order of the file, so that the system reads ahead
        old = state.pop(name)
        kind = dtype if old.is_floating_point() else old.dtype
        weights[name.removeprefix(prefix)] = new = old.to(device=device, dtype=kind)
        if mapped and new.data_ptr() != old.data_ptr():
            release_pages(old)
    model.load_state_dict(weights, strict=True, assign=True)
    is_upscaler = isinstance(model, LatentDiffusion) and model.conditioner.find(LowRes) is not None
    if dtype == torch.float16 and is_upscaler:
        model.autoencoder.float()  # the upscaler's overflows in float16


def add_unused_weights(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Puts zeros in place of what no computation uses, where other programs leave it out.

    These are the projection of OpenCLIP's text tower, and its last block if that is not run.
    state: under our names. where: the file that it is from.
    """
    text = model.conditioner.find(OpenCLIPText) if isinstance(model, LatentDiffusion) else None
    if text is None:
        return
    unused = tuple(TEXT + name for name in text.unused)
    wanted = model.state_dict()
    lacking = [name for name in wanted if name.startswith(unused) and name not in state]
    kind = next((value.dtype for name, value in state.items() if name.startswith(TEXT)), None)
    if kind is not None:  # else it is not this that the file lacks
        state |= {name: torch.zeros(wanted[name].shape, dtype=kind) for name in lacking}
    if kind is not None and lacking:
        log.info("`%s` lacks %d tensors of the text tower that are not used", where, len(lacking))


def check_weights(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], misfit: str) -> None:
    """Raises ValueError with counts and the first ten names, if weights do not fit.

    wanted, state: under our names.
    """
    missing = [original_name(name) for name in wanted if name not in state]
    unexpected = [original_name(name) for name in state if name not in wanted]
    shapes = [
        f"{original_name(name)} {tuple(state[name].shape)} for {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    if not (missing or unexpected or shapes):
        return
    lines = [
        f"{kind}: {', '.join(names[:10])}{', …' if len(names) > 10 else ''}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
        )
        if names
    ]
    counts = f"{len(missing)} missing, {len(unexpected)} unexpected, {len(shapes)} of another shape"
    family = recognise_family(state)
    if family is not None:
        lines.append(f"hint: the weights look like {family.title} (`{family.config}.yaml`)")
    raise ValueError("\n".join([f"{misfit}: {counts}", *lines]))


class _NoInit(TorchFunctionMode):
    """Skips filling meta tensors: without effect, but torch would load its compiler for it."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in FILLS and args and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


FILLS = frozenset(
    f"{name}_"
    for name in (
        "add", "clamp", "copy", "div", "erfinv", "fill", "mul", "normal", "trunc_normal", "uniform",
        "kaiming_normal", "kaiming_uniform", "xavier_normal", "xavier_uniform", "zero", "zeros",
        "ones", "constant", "orthogonal",
    )
)  # fmt: skip

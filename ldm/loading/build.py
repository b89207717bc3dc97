"""Build modules on the meta device, and fill them with weights.

Strict: every tensor, every shape. Nothing is initialised, as all of it is replaced.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.encoders.lowres import LowRes
from ldm.encoders.text import OpenCLIPText
from ldm.loading.config import instantiate
from ldm.loading.families import recognise_family
from ldm.loading.files.checkpoint import release_pages
from ldm.loading.legacy import MODEL, original_name
from ldm.model import LatentDiffusion
from ldm.runtime.errors import WeightsMismatch

__all__ = ["add_unused_weights", "build_on_meta", "check_weights", "fill_weights", "meta_device"]

log = logging.getLogger(__name__)

TEXT = "conditioner.text."
PREFIXES = ("", "unet.", "autoencoder.", TEXT)
LISTED = 10  # names of each kind in a message


@contextmanager
def meta_device() -> Iterator[None]:
    """Modules built inside have weights without memory, which are not initialised."""
    with torch.device("meta"), _NoInit():
        yield


def build_on_meta(
    spec: Mapping[str, Any],
    *,
    allow: Sequence[str] = (),
    where: str = "config",
    skipped: list[str] | None = None,
) -> nn.Module:
    """The module of a translated config, with every weight on the meta device.

    Args:
        spec: as `translate_config` returns it.
        allow, where, skipped: as for `instantiate`.
    """
    parts = dict(spec["params"])
    if spec["target"] != MODEL:
        with meta_device():
            module = instantiate(spec, allow=allow, where=where, skipped=skipped)
    else:
        for name in ("unet", "autoencoder", "conditioner"):  # the schedule needs its numbers
            with meta_device():
                parts[name] = instantiate(
                    parts[name], allow=allow, where=f"{where}.{name}", skipped=skipped
                )
        spec = {**spec, "params": parts}
        module = instantiate(spec, allow=allow, where=where, skipped=skipped)
    return cast(nn.Module, module)


def fill_weights(
    model: nn.Module,
    state: dict[str, Tensor],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    mapped: bool = False,
    misfit: str = "the weights do not fit",
) -> None:
    """Put weights into a model on the meta device, strictly.

    Args:
        state: under our names; for a single part also bare names. It is used up.
        mapped: the tensors are pages of a file: those that are copied are given back at once, so
            that the peak is what the model keeps.
        misfit: how a message about weights that do not fit begins.

    Raises:
        WeightsMismatch: with counts and the first names that do not fit.
    """
    wanted = model.state_dict()
    prefix = next((p for p in PREFIXES if any(p + name in state for name in wanted)), "")
    for name in [name for name in state if not name.startswith(prefix)]:
        del state[name]  # other parts of a whole model
    check_weights(wanted, {n.removeprefix(prefix): v for n, v in state.items()}, misfit)
    weights: dict[str, Tensor] = {}
    for name in list(state):  # in the order of the file, so that the system reads ahead
        old = state.pop(name)
        new = old.to(device=device, dtype=dtype if old.is_floating_point() else old.dtype)
        weights[name.removeprefix(prefix)] = new
        if mapped and new.data_ptr() != old.data_ptr():
            release_pages(old)
    model.load_state_dict(weights, strict=True, assign=True)
    is_upscaler = isinstance(model, LatentDiffusion) and model.conditioner.find(LowRes) is not None
    if dtype == torch.float16 and is_upscaler:
        model.autoencoder.float()  # the upscaler's overflows in float16


def add_unused_weights(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Add zeros for weights that no computation uses, where other programs leave them out.

    These are the projection of OpenCLIP's text tower, and its last block if that is not run.

    Args:
        state: under our names.
        where: the file that it is from.
    """
    text = model.conditioner.find(OpenCLIPText) if isinstance(model, LatentDiffusion) else None
    dtype = next((value.dtype for name, value in state.items() if name.startswith(TEXT)), None)
    if text is None or dtype is None:  # without any weights of the tower, more is missing
        return
    unused = tuple(TEXT + name for name in text.unused)
    missing = {
        name: torch.zeros(value.shape, dtype=dtype)
        for name, value in model.state_dict().items()
        if name.startswith(unused) and name not in state
    }
    state |= missing
    if missing:
        log.info("`%s`: %d unused tensors of the text tower are missing", where, len(missing))


def check_weights(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], misfit: str) -> None:
    """Check that weights have the names and shapes of a model, all under our names.

    Raises:
        WeightsMismatch: with counts, the first names in the original's words, and the family that
            the weights look like.
    """
    problems = {
        "missing": [original_name(name) for name in wanted if name not in state],
        "unexpected": [original_name(name) for name in state if name not in wanted],
        "mismatched": [
            f"{original_name(name)} {tuple(state[name].shape)}, expected {tuple(value.shape)}"
            for name, value in wanted.items()
            if name in state and state[name].shape != value.shape
        ],
    }
    if not any(problems.values()):
        return
    counts = ", ".join(f"{len(names)} {problem}" for problem, names in problems.items())
    lines = [f"{misfit}: {counts}"]
    for problem, names in problems.items():
        if names:
            more = ", …" if len(names) > LISTED else ""
            lines.append(f"{problem}: {', '.join(names[:LISTED])}{more}")
    family = recognise_family(state)
    if family is not None:
        lines.append(f"hint: the weights look like {family.title} (`{family.config}.yaml`)")
    raise WeightsMismatch("\n".join(lines))


class _NoInit(TorchFunctionMode):
    """Skips filling meta tensors: without effect, but torch would load its compiler for it."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")  # `nn.init` passes it by name
        is_fill = getattr(func, "__name__", "") in FILLS
        if is_fill and isinstance(tensor, Tensor) and tensor.is_meta:
            return tensor
        return func(*args, **kwargs)


FILLS = frozenset(
    f"{name}_"
    for name in (
        "add", "clamp", "copy", "div", "erfinv", "fill", "mul", "normal", "trunc_normal", "uniform",
        "kaiming_normal", "kaiming_uniform", "xavier_normal", "xavier_uniform", "zero", "zeros",
        "ones", "constant", "orthogonal",
    )
)  # fmt: skip

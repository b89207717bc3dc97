"""Build modules on the meta device, and fill them with weights.

Strict: every tensor, every shape. Nothing is initialised, as all of it is replaced.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
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
from ldm.runtime.types import JsonMapping

__all__ = ["add_unused_weights", "build_on_meta", "check_weights", "fill_weights", "meta_device"]

log = logging.getLogger(__name__)

TEXT = "conditioner.text."
PREFIXES = ("", "unet.", "autoencoder.", TEXT)
MAX_LISTED = 10  # names of each kind in a message


@contextmanager
def meta_device() -> Iterator[None]:
    """Modules built inside have weights without memory, which are not initialised."""
    with torch.device("meta"), _NoInit():
        yield


def build_on_meta(
    spec: JsonMapping,
    *,
    allow: Sequence[str] = (),
    where: str = "config",
    skipped: list[str] | None = None,
) -> nn.Module:
    """The module of a translated config, with every weight on the meta device.

    Arguments are those of `instantiate`.
    """
    build = partial(instantiate, allow=allow, skipped=skipped)
    with meta_device():
        if spec["target"] != MODEL:
            return cast(nn.Module, build(spec, where=where))
        params = dict(spec["params"])
        for name in ("unet", "autoencoder", "conditioner"):
            params[name] = build(params[name], where=f"{where}.{name}")
    # Outside, as the schedule computes its tables.
    return cast(nn.Module, build({**spec, "params": params}, where=where))


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
        state: under our names; for a single part also bare names. It is emptied.
        mapped: the tensors are pages of a file: those that are copied are given back at once, so
            that the peak is what the model keeps.
        misfit: how the message about weights that do not fit begins; see `check_weights`.
    """
    model_state = model.state_dict()
    prefix = next((p for p in PREFIXES if any(p + name in state for name in model_state)), "")
    for name in [name for name in state if not name.startswith(prefix)]:
        del state[name]  # other parts of a whole model
    check_weights(model_state, {n.removeprefix(prefix): v for n, v in state.items()}, misfit)
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


def add_unused_weights(model: nn.Module, state: dict[str, Tensor], file: str | Path) -> None:
    """Add zeros to `state` for weights that no computation uses and other programs leave out.

    These are the projection of OpenCLIP's text tower, and its last block if that is not run.
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
        log.info("`%s`: %d unused tensors of the text tower are missing", file, len(missing))


def check_weights(
    model_state: Mapping[str, Tensor], state: Mapping[str, Tensor], misfit: str
) -> None:
    """Raise WeightsMismatch unless weights have the names and shapes of a model.

    It has counts, the first names in the original's words, and the family of the weights.
    """
    problems = {
        "missing": [original_name(name) for name in model_state if name not in state],
        "unexpected": [original_name(name) for name in state if name not in model_state],
        "mismatched": [
            f"{original_name(name)} {tuple(state[name].shape)}, expected {tuple(value.shape)}"
            for name, value in model_state.items()
            if name in state and state[name].shape != value.shape
        ],
    }
    if not any(problems.values()):
        return
    counts = ", ".join(f"{len(names)} {problem}" for problem, names in problems.items())
    lines = [f"{misfit}: {counts}"]
    for problem, names in problems.items():
        if names:
            more = ", …" if len(names) > MAX_LISTED else ""
            lines.append(f"{problem}: {', '.join(names[:MAX_LISTED])}{more}")
    family = recognise_family(state)
    if family is not None:
        lines.append(f"hint: the weights look like {family.title} (`{family.config}.yaml`)")
    raise WeightsMismatch("\n".join(lines))


class _NoInit(TorchFunctionMode):
    """Skips filling meta tensors: without effect, but torch would load its compiler for it."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: JsonMapping | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")  # `nn.init` passes it by name
        is_fill = getattr(func, "__name__", "") in FILLS
        if is_fill and isinstance(tensor, Tensor) and tensor.is_meta:
            return tensor
        return func(*args, **kwargs)


FILLS = frozenset(
    {
        "add_", "clamp_", "constant_", "copy_", "div_", "erfinv_", "fill_", "kaiming_normal_",
        "kaiming_uniform_", "mul_", "normal_", "ones_", "orthogonal_", "trunc_normal_", "uniform_",
        "xavier_normal_", "xavier_uniform_", "zero_", "zeros_",
    }
)  # fmt: skip

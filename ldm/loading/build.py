"""Build modules on the meta device, and fill them with weights.

Nothing is initialised, as all of it is replaced.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.encoders.lowres import LowRes
from ldm.loading.config import instantiate
from ldm.loading.files.checkpoint import release_pages
from ldm.loading.legacy import MODEL
from ldm.model import LatentDiffusion
from ldm.runtime.types import JsonMapping

__all__ = ["build_on_meta", "fill_weights", "meta_device"]


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
    """Build the module of a translated config, every weight on the meta device.

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
    autoencoder_dtype: torch.dtype | None = None,
) -> None:
    """Put weights into a model on the meta device.

    Args:
        state: what `match_weights` returns. It is emptied.
        mapped: the tensors are pages of a file: those that are copied are given back at once, so
            that the peak is what the model keeps.
        autoencoder_dtype: of a whole model's autoencoder; None for `dtype`.
    """
    weights: dict[str, Tensor] = {}
    for name in list(state):  # in the order of the file, so that the system reads ahead
        old = state.pop(name)
        target = autoencoder_dtype if name.startswith("autoencoder.") else None
        new = old.to(device, (target or dtype) if old.is_floating_point() else old.dtype)
        weights[name] = new
        if mapped and new.data_ptr() != old.data_ptr():
            release_pages(old)
    model.load_state_dict(weights, strict=True, assign=True)
    is_upscaler = isinstance(model, LatentDiffusion) and model.conditioner.find(LowRes) is not None
    if dtype == torch.float16 and is_upscaler:
        model.autoencoder.float()  # the upscaler's overflows in float16


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

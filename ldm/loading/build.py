"""Build modules on the meta device, and fill them with weights.

Initialization is skipped, as all weights are replaced.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.loading.config import instantiate
from ldm.loading.files.checkpoint import release_pages, would_overflow
from ldm.loading.legacy import LATENT_DIFFUSION, translate_config
from ldm.loading.weight_names import VAE_PREFIX
from ldm.runtime.types import JsonMapping
from ldm.runtime.warn import warn_caller

__all__ = ["build_on_meta", "fill_weights", "meta_device"]


@contextmanager
def meta_device() -> Iterator[None]:
    """Build modules inside the context without memory for weights, and without initialization."""
    with torch.device("meta"), _NoInit():
        yield


def build_on_meta(
    spec: JsonMapping,
    *,
    allow: Sequence[str] = (),
    where: str = "config",
    skipped: list[str] | None = None,
) -> nn.Module:
    """Build the module of a config, with all weights on the meta device.

    The arguments are those of `instantiate`; a whole config has the key `model`.
    """
    spec = translate_config(spec, where=where, skipped=skipped)
    build = partial(instantiate, allow=allow, skipped=skipped)
    with meta_device():
        if spec["target"] != LATENT_DIFFUSION:
            return cast(nn.Module, build(spec, where=where))
        params = dict(spec["params"])
        for name in ("unet", "autoencoder", "conditioner"):
            params[name] = build(params[name], where=f"{where}.{name}")
    # Outside the context, as the noise schedule computes real tables.
    return cast(nn.Module, build({**spec, "params": params}, where=where))


def fill_weights(
    model: nn.Module,
    state: dict[str, Tensor],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    memory_mapped: bool = False,
    autoencoder_dtype: torch.dtype | None = None,
) -> None:
    """Fill a model on the meta device with weights.

    Args:
        state: Weights from `match_weights`; emptied one by one, so that memory is freed early.
        memory_mapped: Whether tensors are memory-mapped: their pages are then released after the
            copy, so that peak memory is the size of the model.
        autoencoder_dtype: Dtype of a whole model's autoencoder; None = `dtype`.
    """
    weights: dict[str, Tensor] = {}
    overflowing_name = None  # of the first weight that overflows
    for name in list(state):  # in file order, so that the system reads ahead
        old = state.pop(name)
        target_dtype = old.dtype
        if old.is_floating_point():
            is_autoencoder = name.startswith(VAE_PREFIX)
            target_dtype = (autoencoder_dtype if is_autoencoder else None) or dtype
            if overflowing_name is None and _may_overflow(old, target_dtype):
                overflowing_name = name if would_overflow(old, target_dtype) else None
        new = old.to(device, target_dtype)
        weights[name] = new
        if memory_mapped and new.data_ptr() != old.data_ptr():
            release_pages(old)
    model.load_state_dict(weights, strict=True, assign=True)
    if overflowing_name is not None:
        warn_caller(f"`{overflowing_name}` has values too large for {dtype}, which become infinite")


def _may_overflow(value: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a tensor's range exceeds that of a dtype: faster than `would_overflow`."""
    limit = torch.finfo(dtype).max
    if limit >= torch.finfo(value.dtype).max or value.numel() == 0:
        return False
    low, high = value.aminmax()
    return not (-limit <= float(low) and float(high) <= limit)


class _NoInit(TorchFunctionMode):
    """Skips initializing meta tensors, which has no effect but makes torch import its compiler."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: JsonMapping | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")  # `nn.init` passes it by name
        is_init = getattr(func, "__name__", "") in INIT_FUNCTIONS
        if is_init and isinstance(tensor, Tensor) and tensor.is_meta:
            return tensor
        return func(*args, **kwargs)


INIT_FUNCTIONS = frozenset(
    {
        "add_", "clamp_", "constant_", "copy_", "div_", "erfinv_", "fill_", "kaiming_normal_",
        "kaiming_uniform_", "mul_", "normal_", "ones_", "orthogonal_", "trunc_normal_", "uniform_",
        "xavier_normal_", "xavier_uniform_", "zero_", "zeros_",
    }
)  # fmt: skip

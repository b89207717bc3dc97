"""Find NaN and infinity in the outputs of a model, and in its weights."""

from typing import TypeVar

import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.model import LatentDiffusion
from ldm.pipelines.families import quote_name
from ldm.runtime.errors import NonFinite

__all__ = ["check_finite", "check_finite_weights"]

TensorOrCond = TypeVar("TensorOrCond", Tensor, Cond)


def check_finite(value: TensorOrCond, stage: str) -> TensorOrCond:
    """Return the value; raise NonFinite if it contains NaN or infinity.

    Args:
        stage: The part of the model that computed the value, for the error.
    """
    tensors = [value] if isinstance(value, Tensor) else value.tensors().values()
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise NonFinite(stage)
    return value


def check_finite_weights(model: LatentDiffusion, error: NonFinite) -> None:
    """Raise a NonFinite that names a weight that is NaN or infinite, if there is one."""
    weights = {name: w for name, w in model.named_parameters() if w.is_floating_point()}
    if broken := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        dtype = weights[broken[0]].dtype
        remedy = "download it again" if dtype == torch.float32 else "try float32"
        cause = f"{len(broken)} of its weights in {quote_name(model)} are not"
        raise NonFinite(error.stage, f"{cause}, such as `{broken[0]}`: {remedy}") from error

"""Weights computed from the names of parameters, so that golden files need not hold them.

Every floating tensor with a dimension gets z = randn(shape) from a CPU generator seeded with
crc32("SALT|KEY"), scaled according to its name. `UNCHANGED_BUFFERS` keep their value.
"""

import math
import zlib
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

_UNCHANGED_BUFFERS = """
betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod
log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod
posterior_variance posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2
lvlb_weights logvar scale_factor decay num_updates attn_mask position_ids num_batches_tracked
mean std data_mean data_std shift scale clip_mean clip_std
"""
UNCHANGED_BUFFERS = frozenset(_UNCHANGED_BUFFERS.split())
EMBEDDINGS = (
    "token_embedding.weight", "positional_embedding", "position_embedding.weight", "pos_embed",
    "cls_token", "label_emb.weight",
)  # fmt: skip


def make_weight(key: str, shape: tuple[int, ...], salt: str) -> Tensor:
    """Make the float32 value of the parameter `key`."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{salt}|{key}".encode()))
    z = torch.randn(shape, generator=generator)
    name = key.rpartition(".")[2]
    if name == "running_var":
        return 1 + 0.25 * z.abs()
    if name == "running_mean" or (len(shape) == 1 and name not in ("weight", "gamma", "g")):
        return 0.1 * z
    if len(shape) == 1:
        return 1 + 0.1 * z
    if key.endswith(EMBEDDINGS):
        return 0.5 * z
    gain = 1.5 if {"to_q", "to_k"} & set(key.split(".")[-2:]) else 1.0
    return z * (gain / math.sqrt(math.prod(shape[1:])))


def fill(state: Mapping[str, Tensor], salt: str, prefix: str = "") -> dict[str, Tensor]:
    """Return `state` with the weights of the recipe; its keys are PREFIX + name."""
    filled = dict(state)
    for key, value in state.items():
        is_unchanged = key.rpartition(".")[2] in UNCHANGED_BUFFERS
        if value.is_floating_point() and value.dim() and not is_unchanged:
            filled[key] = make_weight(prefix + key, tuple(value.shape), salt).to(value.dtype)
    return filled


def fill_on_demand(network: nn.Module, salt: str, prefix: str = "") -> None:
    """Give each layer of a network on the meta device its weights only while it runs."""

    def add_weights(layer: nn.Module, inputs: object, *, prefix: str) -> None:
        state = {key: value for key, value in layer.state_dict().items() if "." not in key}
        layer.load_state_dict(fill(state, salt, prefix), strict=False, assign=True)

    def remove_weights(layer: nn.Module, inputs: object, output: object) -> None:
        layer.to("meta")

    for name, layer in network.named_modules():
        if next(layer.parameters(recurse=False), None) is not None:
            layer.register_forward_pre_hook(partial(add_weights, prefix=f"{prefix}{name}."))
            layer.register_forward_hook(remove_weights)

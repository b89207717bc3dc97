"""SDXL's micro-conditioning: sizes, crops and scores as features of the vector.

Podell et al. 2023 (arXiv:2307.01952), section 2.2.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from ldm.conditioning import Encoder, EncoderOptions, Slot
from ldm.nets.blocks import timestep_embedding
from ldm.runtime.errors import ArgumentError

__all__ = ["SizeEmbedding"]


class SizeEmbedding(Encoder):
    """Numbers (B, n) or (B,) -> concatenated sinusoidal embeddings, (B, n outdim) float32.

    Sizes are (height, width) in pixels, crops (top, left); `key` is a batch key such as
    `original_size_as_tuple`.
    """

    slot: Slot = "vector"
    IGNORED_PARAMS: ClassVar[frozenset[str]] = frozenset({"device"})

    def __init__(self, *, key: str, outdim: int = 256, **options: Unpack[EncoderOptions]) -> None:
        super().__init__(**options)
        self.key = key
        self.outdim = outdim

    def forward(self, numbers: Tensor | Sequence[Sequence[float]]) -> Tensor:
        x = torch.as_tensor(numbers)
        if x.dim() == 1:
            x = x[:, None]
        if x.dim() != 2:
            raise ArgumentError(f"`{self.key}` must be (B, n) numbers, got {tuple(x.shape)}")
        return timestep_embedding(x.flatten(), self.outdim).reshape(len(x), -1)

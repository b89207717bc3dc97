"""Encoders of class labels, and of conditions that are in the batch already."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ldm.conditioning import Cond, Encoder, EncoderOptions, Slot
from ldm.runtime.errors import ArgumentError

__all__ = ["ClassEmbedder", "IdentityEncoder"]

SLOT_BY_DIM: dict[int, Slot] = {2: "vector", 3: "crossattn", 4: "concat"}


class ClassEmbedder(Encoder):
    """Class labels (B,) int64 -> a vector (B, D), or one token (B, 1, D).

    With an unconditional class, the option `null`, labels can be dropped in training.

    Args:
        embed_dim: D.
        key: Batch key of the labels.
        add_sequence_dim: Whether the output is a token.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        n_classes: int = 1000,
        add_sequence_dim: bool = False,
        key: str = "cls",
        **options: Unpack[EncoderOptions],
    ) -> None:
        super().__init__(**options)
        self.key = key
        self.slot = "crossattn" if add_sequence_dim else "vector"
        self.droppable = self.null is not None
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, labels: Tensor | Sequence[int | Tensor]) -> Tensor:
        if not isinstance(labels, Tensor):  # some were dropped
            labels = torch.tensor([int(n) for n in labels], device=self.embedding.weight.device)
        x: Tensor = self.embedding(labels)  # (B, D)
        return x[:, None] if self.slot == "crossattn" else x


class IdentityEncoder(Encoder):
    """Passes a tensor (B, D), (B, N, D) or (B, C, h, w) to the slot for its dimensions."""

    IGNORED_PARAMS: ClassVar[frozenset[str]] = frozenset({"device"})

    def __init__(self, *, key: str, **options: Unpack[EncoderOptions]) -> None:
        super().__init__(**options)
        self.key = key

    def forward(self, value: Tensor) -> Cond:
        if value.dim() not in SLOT_BY_DIM:
            raise ArgumentError(f"`{self.key}` must have 2 to 4 dimensions, got {value.dim()}")
        return Cond(**{SLOT_BY_DIM[value.dim()]: value})

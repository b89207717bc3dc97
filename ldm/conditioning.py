"""What the network listens to.

A network has three ears, and a `Cond` has one slot for each:

    crossattn (B, N, D)     tokens for the cross-attention layers        a prompt
    concat    (B, C, h, w)  channels joined to the noisy latent          a mask, a depth map
    vector    (B, D)        added to the time embedding                  a noise level, an image

A `Conditioner` is a set of named encoders; each says which record it reads (`key`), which slot it
fills (`slot`) and, if its record may be left out, what stands for "nothing" (`null`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Cond", "Conditioner"]

# Two fillings of one slot are joined along this axis: tokens, channels, features.
_JOIN = {"crossattn": 1, "concat": 1, "vector": 1}


@dataclass(frozen=True)
class Cond:
    """The three slots; an empty one is None. All that are filled share the batch size."""

    crossattn: Tensor | None = None
    concat: Tensor | None = None
    vector: Tensor | None = None

    def filled(self) -> dict[str, Tensor]:
        """The slots that hold something, by name."""
        slots = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: value for name, value in slots if value is not None}

    def __len__(self) -> int:
        return next((len(value) for value in self.filled().values()), 0)

    def __getitem__(self, rows: slice) -> "Cond":
        return Cond(**{name: value[rows] for name, value in self.filled().items()})

    def cat(self, other: "Cond") -> "Cond":
        """This batch followed by `other`.

        Raises ValueError unless both fill the same slots.
        """
        mine, theirs = self.filled(), other.filled()
        if mine.keys() != theirs.keys():
            raise ValueError(f"cannot join a condition of {set(mine)} with one of {set(theirs)}")
        return Cond(**{name: torch.cat([mine[name], theirs[name]]) for name in mine})

    def repeat(self, n: int) -> "Cond":
        """Every row n times in place: rows 0, 0, 1, 1, … for n = 2."""
        return Cond(**{k: v.repeat_interleave(n, dim=0) for k, v in self.filled().items()})

    def to(self, *args: Any, **kwargs: Any) -> "Cond":
        """All slots on another device or in another dtype, as `Tensor.to`."""
        return Cond(**{name: value.to(*args, **kwargs) for name, value in self.filled().items()})

    def add(self, slot: str, value: Tensor) -> "Cond":
        """With `value` in a slot, joined behind what is there."""
        held = getattr(self, slot)
        joined = value if held is None else torch.cat([held, value], dim=_JOIN[slot])
        return replace(self, **{slot: joined})


class Conditioner(nn.Module):
    """Named encoders, run over one batch.

        encoders: modules with `key`, `slot`, perhaps `null`, called with `batch[key]`.

    The names are the attribute names, so that weights are `conditioner.text.…`.
    """

    def __init__(self, **encoders: nn.Module) -> None:
        super().__init__()
        for name, encoder in encoders.items():
            self.add_module(name, encoder)

    def forward(
        self,
        batch: Mapping[str, Any],
        drop: float | Mapping[str, float] = 0.0,
        generator: torch.Generator | None = None,
    ) -> Cond:
        """The condition of a batch; each record is replaced by "nothing" with probability `drop`.

            drop: for all that encoders read, or for some by name: {"txt": 0.1}.
        Raises KeyError if the batch lacks what an encoder reads.
        """
        cond = Cond()
        encoder: Any
        for name, encoder in self.named_children():
            if encoder.key not in batch:
                given = ", ".join(f"`{key}`" for key in batch)
                raise KeyError(f"encoder `{name}` reads `{encoder.key}`, the batch has {given}")
            records = batch[encoder.key]
            share = drop.get(encoder.key, 0.0) if isinstance(drop, Mapping) else drop
            if share and hasattr(encoder, "null"):
                lost = torch.rand(len(records), generator=generator) < share
                records = [
                    encoder.null if gone else r for r, gone in zip(records, lost, strict=True)
                ]
            cond = cond.add(encoder.slot, encoder(records))
        return cond

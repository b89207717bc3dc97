"""Conditions of the UNet: `Cond` holds them, an `Encoder` makes one, a `Conditioner` runs several.

A condition reaches the UNet in one of three ways, each of which is a slot of `Cond`:

    crossattn (B, N, D)     tokens for the cross-attention layers        a prompt
    concat    (B, C, h, w)  channels concatenated to the noisy latent    a mask, a depth map
    vector    (B, D)        added to the time embedding                  a noise level, an image
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Batch", "Cond", "Conditioner", "Config", "Encoder", "PrepareOptions", "Slot"]

Batch = Mapping[str, Any]  # tensors, and lists of texts or of images, by batch key
Config = Mapping[str, Any]  # parameters as in a YAML file
Slot = Literal["crossattn", "concat", "vector"]
EncoderT = TypeVar("EncoderT", bound="Encoder")


@dataclass(frozen=True)
class Cond:
    """The condition of a batch. An empty slot is None; all others have the same batch size."""

    crossattn: Tensor | None = None
    concat: Tensor | None = None
    vector: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the slots that are not None, by name."""
        slots = {"crossattn": self.crossattn, "concat": self.concat, "vector": self.vector}
        return {name: value for name, value in slots.items() if value is not None}

    def __len__(self) -> int:
        return next((len(value) for value in self.tensors().values()), 0)

    def __getitem__(self, rows: slice) -> "Cond":
        return Cond(**{name: value[rows] for name, value in self.tensors().items()})

    def cat(self, other: "Cond") -> "Cond":
        """Concatenate two conditions of the same slots along the batch axis."""
        first, second = self.tensors(), other.tensors()
        if first.keys() != second.keys():
            raise ValueError(f"cannot join a condition of {set(first)} with one of {set(second)}")
        return Cond(**{name: torch.cat([first[name], second[name]]) for name in first})

    def repeat(self, n: int) -> "Cond":
        """Repeat every row n times, in place: rows 0, 0, 1, 1, … for n = 2."""
        return Cond(**{k: v.repeat_interleave(n, dim=0) for k, v in self.tensors().items()})

    def add(self, slot: Slot, value: Tensor) -> "Cond":
        """Fill a slot; what it held is followed by `value` along axis 1 (tokens or channels)."""
        current = self.tensors().get(slot)
        joined = value if current is None else torch.cat([current, value], dim=1)
        return replace(self, **{slot: joined})


@dataclass(frozen=True)
class PrepareOptions:
    """What `Encoder.prepare` may use besides the batch.

    Attributes:
        size: (h, w) of the latent.
        encode: Image (B, 3, H, W) in [-1, 1] -> z, sampled from the posterior.
        generator: Random generator; None for torch's global one.
    """

    size: tuple[int, int]
    encode: Callable[[Tensor], Tensor]
    generator: torch.Generator | None = None

    def randn(self, shape: Sequence[int]) -> Tensor:
        """Draw standard normal noise, on the generator's device."""
        return torch.randn(*shape, generator=self.generator, device=self._device)

    def randint(self, high: int, n: int) -> Tensor:
        """Draw n integers in [0, high), on the generator's device."""
        return torch.randint(high, (n,), generator=self.generator, device=self._device)

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu") if self.generator is None else self.generator.device


class Encoder(nn.Module):
    """Turns one entry of a batch into one slot of a `Cond`: `encoder(batch[encoder.key])`.

    Attributes:
        key: Batch key of the input.
        slot: Slot of `Cond` for the output.
        droppable: Whether samples may be replaced by `null`, for classifier-free guidance.
        null: The unconditional sample, such as an empty prompt.
        cache_key: Batch key that `prepare` computes without randomness (or that holds an image in
            pixels), which a latent cache stores; None if there is none.
        generation: The Stable Diffusion (1 or 2) whose models have this encoder for text.
        unused: Prefixes of the names of weights that do not affect the output.
    """

    key: str
    slot: Slot
    droppable: ClassVar[bool] = False
    null: ClassVar[object] = None
    cache_key: str | None = None
    generation: ClassVar[int | None] = None

    @property
    def unused(self) -> tuple[str, ...]:
        return ()

    def prepare(self, batch: Batch, options: PrepareOptions) -> dict[str, Tensor]:
        """Compute the entries that this encoder needs, and the batch does not have.

        Whatever is slow or random belongs here and not in `forward`, which then gives the same
        result for the conditional and the unconditional batch.
        """
        return {}


class Conditioner(nn.Module):
    """Encoders by name; the one of the prompt, or of what replaces it, is `text`.

    The names are the attribute names, so that weights are called `conditioner.text.…`.
    """

    text: Encoder | None

    def __init__(self, **encoders: Encoder) -> None:
        super().__init__()
        for name, encoder in encoders.items():
            if not isinstance(encoder, Encoder):
                raise TypeError(f"encoder `{name}` must be an Encoder, got {type(encoder)}")
            self.add_module(name, encoder)
        if "text" not in encoders:
            self.register_module("text", None)

    @property
    def encoders(self) -> dict[str, Encoder]:
        return {k: v for k, v in self.named_children() if isinstance(v, Encoder)}

    @property
    def keys(self) -> frozenset[str]:
        """Batch keys that the encoders read."""
        return frozenset(encoder.key for encoder in self.encoders.values())

    def find(self, kind: type[EncoderT]) -> EncoderT | None:
        """Return the first encoder of a class, or None."""
        return next((e for e in self.encoders.values() if isinstance(e, kind)), None)

    def get(self, kind: type[EncoderT]) -> EncoderT:
        """Return the first encoder of a class; a ValueError names those that there are."""
        encoder = self.find(kind)
        if encoder is None:
            names = ", ".join(type(e).__name__ for e in self.encoders.values()) or "none"
            raise ValueError(f"this model has no {kind.__name__}, its encoders: {names}")
        return encoder

    def forward(
        self,
        batch: Batch,
        drop: float | Mapping[str, float] = 0.0,
        generator: torch.Generator | None = None,
    ) -> Cond:
        """Encode a batch, which has an entry for the `key` of each encoder.

        Args:
            drop: Probability of replacing a sample by the encoder's `null`; for all encoders, or by
                batch key, such as {"txt": 0.1}.
            generator: Random generator for `drop`.
        """
        cond = Cond()
        for name, encoder in self.encoders.items():
            if encoder.key not in batch:
                keys = ", ".join(f"`{key}`" for key in batch)
                raise KeyError(f"encoder `{name}` reads `{encoder.key}`, the batch has {keys}")
            samples = batch[encoder.key]
            p = drop.get(encoder.key, 0.0) if isinstance(drop, Mapping) else drop
            if p and encoder.droppable:
                dropped = torch.rand(len(samples), generator=generator) < p
                pairs = zip(samples, dropped, strict=True)
                samples = [encoder.null if is_dropped else sample for sample, is_dropped in pairs]
            cond = cond.add(encoder.slot, encoder(samples))
        return cond

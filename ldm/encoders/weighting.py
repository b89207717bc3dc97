"""Contexts of parsed prompts: encode chunks, weight their tokens, concatenate the outputs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.encoders.chunks import Chunk, Splitter
from ldm.prompts.prompt import Part, Prompt, Text

__all__ = ["PromptEncoder", "split_output"]

ROUNDING = 1e-6  # means below it, as a multiple of the standard deviation, count as 0
MIN_WEIGHT = 1e-5  # compel's; its factor tan((1 - weight) pi / 2) is infinite at weight 0


@dataclass
class PromptEncoder:
    """Makes contexts of parsed prompts.

    Args:
        run: The text encoder: (ids (k, N), is_masked (k, N) or None) -> its output; see
            `TextEncoder.encode_tokens`.
        device: Device of the text encoder.
    """

    run: Callable[[Tensor, Tensor | None], Tensor | Cond]
    splitter: Splitter
    device: torch.device

    def encode(self, prompt: Prompt) -> tuple[Tensor, Tensor | None]:
        """Return context (1, k N, D) and pooled output (1, P), if any, of a prompt of k chunks."""
        outputs = [self._encode_part(part, prompt.syntax) for part in prompt.parts]
        return torch.cat([z for z, _ in outputs]).flatten(0, 1)[None], outputs[0][1]

    def _encode_part(self, part: Part, syntax: str) -> tuple[Tensor, Tensor | None]:
        """Return the chunks (k, N, D) and the pooled output (1, P) of a weighted sum of texts."""
        outputs = [self._encode_text(text, syntax) for text in part.texts]
        z, pooled = outputs[0]
        if part.mix != (1.0,):
            count = max(len(z) for z, _ in outputs)
            chunks = [self._fill(z, count) for z, _ in outputs]
            z = _weighted_sum(part.mix, chunks)
            vectors = [vector for _, vector in outputs if vector is not None]
            pooled = _weighted_sum(part.mix, vectors) if vectors else None
        if part.weight != 1:
            z = self._empty + (z - self._empty) * part.weight
        return z, pooled

    def _encode_text(self, text: Text, syntax: str) -> tuple[Tensor, Tensor | None]:
        """Return the weighted chunks (k, N, D), and the pooled output (1, P) of the first."""
        chunks = self.splitter.split(text, syntax)
        ids = torch.tensor([self.splitter.to_ids(chunk) for chunk in chunks], device=self.device)
        weights = torch.tensor(
            [self.splitter.list_weights(chunk) for chunk in chunks], device=self.device
        )[..., None]  # (k, N, 1)
        z, pooled = split_output(self.run(ids, None))
        pooled = None if pooled is None else pooled[:1]
        if bool((weights == 1).all()):
            return z, pooled
        if syntax == "a1111":
            weighted = scale_to_mean(z.float(), weights)
        elif syntax == "a1111_no_norm":
            weighted = z.float() * weights
        elif syntax == "comfy":
            weighted = self._scale_from_empty(z, weights)
        else:
            weighted = self._blend_with_masked(z, ids, weights, chunks, text)
        return weighted.to(z.dtype), pooled

    def _blend_with_masked(
        self, z: Tensor, ids: Tensor, weights: Tensor, chunks: Sequence[Chunk], text: Text
    ) -> Tensor:
        """Weight as compel: blend with outputs in which pieces of weight below 1 are masked.

        A piece of weight w is masked in an output that gets the blend weight tan((1 - w) pi / 2).
        """
        pieces = [self.splitter.list_pieces(chunk) for chunk in chunks]
        piece_indices = torch.tensor(pieces)  # (k, N)
        z_sum, weight_sum = self._scale_from_empty(z, weights), 1.0
        for index, piece in enumerate(piece for section in text for piece in section):
            positions = (piece_indices.flatten() == index).nonzero()
            if piece.weight >= 1 or not len(positions):
                continue
            is_masked = torch.zeros(piece_indices.numel(), dtype=torch.bool)
            is_masked[int(positions[0]) : int(positions[-1]) + 1] = True
            is_masked = is_masked.view_as(piece_indices)
            is_masked[:, 0] = is_masked[:, -1] = False  # a piece may reach over special tokens
            masked_z, _ = split_output(self.run(ids, is_masked.to(self.device)))
            blend_weight = math.tan((1 - max(piece.weight, MIN_WEIGHT)) * math.pi / 2)
            z_sum = z_sum + blend_weight * self._scale_from_empty(masked_z, weights)
            weight_sum += blend_weight
        return z_sum / weight_sum

    def _scale_from_empty(self, z: Tensor, weights: Tensor) -> Tensor:
        """Return empty + weight (z - empty) per token, exactly z at weight 1."""
        empty = self._empty.float()
        return torch.where(weights == 1, z.float(), empty + (z.float() - empty) * weights)

    def _fill(self, z: Tensor, count: int) -> Tensor:
        """Append empty chunks, to `count` in all."""
        return torch.cat([z, self._empty.expand(count - len(z), -1, -1)])

    @cached_property
    def _empty(self) -> Tensor:
        """Context (1, N, D) of the empty prompt."""
        ids = torch.tensor([self.splitter.to_ids([])], device=self.device)
        return split_output(self.run(ids, None))[0]


def scale_to_mean(z: Tensor, weights: Tensor) -> Tensor:
    """Weight chunks z (k, N, D) by (k, N, 1), then restore the mean of each, as A1111.

    A mean that is 0 up to rounding, as after a norm without bias, is not restored.
    """
    weighted = z * weights
    before, after = (value.mean(dim=(1, 2), keepdim=True) for value in (z, weighted))
    is_zero = torch.min(before.abs(), after.abs()) < ROUNDING * z.std()
    return weighted * torch.where(is_zero, 1.0, before / after)


def split_output(output: Tensor | Cond) -> tuple[Tensor, Tensor | None]:
    """Return context and pooled output, if any, of a text encoder."""
    if isinstance(output, Tensor):
        return output, None
    assert output.crossattn is not None
    return output.crossattn, output.vector


def _weighted_sum(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    terms = [weight * value for weight, value in zip(weights, values, strict=True)]
    return torch.stack(terms).sum(dim=0)

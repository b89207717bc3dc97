"""Encode parsed prompts: encode chunks, weight their tokens, concatenate the contexts."""

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

ROUNDING_ERROR = 1e-6  # of means, as a multiple of the standard deviation; smaller ones count as 0
MIN_WEIGHT = 1e-5  # compel's; its factor tan((1 - weight) pi / 2) is infinite at weight 0


@dataclass
class PromptEncoder:
    """Encodes parsed prompts as contexts.

    Args:
        encode_tokens: `TextEncoder.encode_tokens`, (ids (k, N), is_masked (k, N) or None) ->
            context, or `Cond` of context and pooled output.
        device: Device of the text encoder.
    """

    encode_tokens: Callable[[Tensor, Tensor | None], Tensor | Cond]
    splitter: Splitter
    device: torch.device

    def encode(self, prompt: Prompt) -> tuple[Tensor, Tensor | None]:
        """Encode a prompt of k chunks as context (1, k N, D) and pooled output (1, P), if any."""
        outputs = (self._encode_part(part, prompt.syntax) for part in prompt.parts)
        contexts, pooled = zip(*outputs, strict=True)
        return torch.cat(contexts).flatten(0, 1)[None], pooled[0]

    def _encode_part(self, part: Part, syntax: str) -> tuple[Tensor, Tensor | None]:
        """Encode a blend of texts as context (k, N, D) and pooled output (1, P), if any."""
        outputs = [self._encode_text(text, syntax) for text in part.texts]
        context, pooled = outputs[0]
        if part.mix != (1.0,):
            num_chunks = max(len(context) for context, _ in outputs)
            contexts = [self._append_empty_chunks(context, num_chunks) for context, _ in outputs]
            context = _compute_weighted_sum(part.mix, contexts)
            vectors = [vector for _, vector in outputs if vector is not None]
            pooled = _compute_weighted_sum(part.mix, vectors) if vectors else None
        if part.weight != 1:
            context = self._empty_context + (context - self._empty_context) * part.weight
        return context, pooled

    def _encode_text(self, text: Text, syntax: str) -> tuple[Tensor, Tensor | None]:
        """Encode a text as weighted context (k, N, D) and pooled output (1, P) of its chunk 0."""
        chunks = self.splitter.split(text, syntax)
        ids = torch.tensor([self.splitter.to_ids(chunk) for chunk in chunks], device=self.device)
        weights = torch.tensor(
            [self.splitter.get_token_weights(chunk) for chunk in chunks], device=self.device
        )[..., None]  # (k, N, 1)
        context, pooled = split_output(self.encode_tokens(ids, None))
        pooled = None if pooled is None else pooled[:1]
        if bool((weights == 1).all()):
            return context, pooled
        if syntax == "a1111":
            weighted = _weight_and_restore_mean(context.float(), weights)
        elif syntax == "a1111_no_norm":
            weighted = context.float() * weights
        elif syntax == "comfy":
            weighted = self._scale_from_empty(context, weights)
        else:
            weighted = self._blend_with_masked(context, ids, weights, chunks, text)
        return weighted.to(context.dtype), pooled

    def _blend_with_masked(
        self, context: Tensor, ids: Tensor, weights: Tensor, chunks: Sequence[Chunk], text: Text
    ) -> Tensor:
        """Weight as compel: blend with contexts in which pieces of weight below 1 are masked.

        A piece of weight w is masked in a context that gets the blend weight tan((1 - w) pi / 2).
        """
        indices = [self.splitter.get_piece_indices(chunk) for chunk in chunks]
        piece_indices = torch.tensor(indices)  # (k, N)
        weighted_sum, weight_sum = self._scale_from_empty(context, weights), 1.0
        for index, piece in enumerate(piece for section in text for piece in section):
            positions = (piece_indices.flatten() == index).nonzero()
            if piece.weight >= 1 or not len(positions):
                continue
            is_masked = torch.zeros(piece_indices.numel(), dtype=torch.bool)
            is_masked[int(positions[0]) : int(positions[-1]) + 1] = True
            is_masked = is_masked.view_as(piece_indices)
            is_masked[:, 0] = is_masked[:, -1] = False  # a piece may extend over special tokens
            masked_context, _ = split_output(self.encode_tokens(ids, is_masked.to(self.device)))
            blend_weight = math.tan((1 - max(piece.weight, MIN_WEIGHT)) * math.pi / 2)
            weighted_sum += blend_weight * self._scale_from_empty(masked_context, weights)
            weight_sum += blend_weight
        return weighted_sum / weight_sum

    def _scale_from_empty(self, context: Tensor, weights: Tensor) -> Tensor:
        """Return empty + weight (context - empty) per token, exactly the context at weight 1."""
        empty, context = self._empty_context.float(), context.float()
        return torch.where(weights == 1, context, empty + (context - empty) * weights)

    def _append_empty_chunks(self, context: Tensor, num_chunks: int) -> Tensor:
        """Append the context of empty chunks, up to `num_chunks` in all."""
        empty = self._empty_context.expand(num_chunks - len(context), -1, -1)
        return torch.cat([context, empty])

    @cached_property
    def _empty_context(self) -> Tensor:
        """Context (1, N, D) of the empty prompt."""
        ids = torch.tensor([self.splitter.to_ids([])], device=self.device)
        return split_output(self.encode_tokens(ids, None))[0]


def _weight_and_restore_mean(context: Tensor, weights: Tensor) -> Tensor:
    """Weight a context (k, N, D) by (k, N, 1), then restore the mean of each chunk, as A1111.

    A mean that is 0 up to rounding, as after a norm without bias, is not restored.
    """
    weighted = context * weights
    before, after = (value.mean(dim=(1, 2), keepdim=True) for value in (context, weighted))
    is_zero = torch.min(before.abs(), after.abs()) < ROUNDING_ERROR * context.std()
    return weighted * torch.where(is_zero, 1.0, before / after)


def split_output(output: Tensor | Cond) -> tuple[Tensor, Tensor | None]:
    """Split the output of a text encoder into context and pooled output, if any."""
    if isinstance(output, Tensor):
        return output, None
    assert output.crossattn is not None
    return output.crossattn, output.vector


def _compute_weighted_sum(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    terms = [weight * value for weight, value in zip(weights, values, strict=True)]
    return torch.stack(terms).sum(dim=0)

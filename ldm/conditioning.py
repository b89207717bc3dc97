"""Conditioning of the UNet: a `Conditioner` runs `Encoder`s, whose outputs form a `Cond`.

The output of an encoder reaches the UNet through one of three slots of `Cond`:

    crossattn (B, N, D)     tokens for the cross-attention layers        a prompt
    concat    (B, C, h, w)  channels concatenated to the noisy latent    a mask, a depth map
    vector    (B, D)        added to the time embedding                  a noise level, an image

`context_mask` may exclude tokens of `crossattn` from attention.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypedDict, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

__all__ = [
    "DROPOUT_QUIRKS", "AnyCond", "Batch", "Composition", "Cond", "Conditioner", "Config",
    "DropRate", "Encoder", "EncoderOptions", "PrepareOptions", "ScheduledCond", "Slot",
    "repeat_to_equal_length", "zero_samples",
]  # fmt: skip

Batch = Mapping[str, Any]  # tensors, lists of texts or lists of images, by key
Config = Mapping[str, Any]  # keys as in a YAML file
Slot = Literal["crossattn", "concat", "vector"]
JoinAxis = Literal["tokens", "features"]
DropRate = float | Mapping[str, float] | None  # see `Conditioner.forward`
DROPOUT_QUIRKS = ("independent-dropout", "mutating-legacy-ucg")  # see `Conditioner.forward`
TOKEN_FIELDS = {"crossattn", "context_mask"}  # fields of `Cond` with tokens along axis 1
SECOND_PROMPT_KEY = "txt_2"  # batch key of SDXL's second prompt, read by the encoder `text_2`
EncoderT = TypeVar("EncoderT", bound="Encoder")


@dataclass(frozen=True)
class Cond:
    """The condition of a batch. Fields that are not None have the same batch size.

    Args:
        crossattn: Tokens for cross-attention, (B, N, D).
        concat: Channels concatenated to the noisy latent, (B, C, h, w).
        vector: Features added to the time embedding, (B, D) or (B,).
        context_mask: Tokens of `crossattn` to keep, bool (B, N); None = all.
        perturbed: Samples to run with perturbed self-attention (PAG), bool (B,); None = none.
    """

    crossattn: Tensor | None = None
    concat: Tensor | None = None
    vector: Tensor | None = None
    context_mask: Tensor | None = None
    perturbed: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields that are not None, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def __len__(self) -> int:
        return next((len(value) for value in self.tensors().values()), 0)

    def __getitem__(self, samples: slice) -> "Cond":
        return Cond(**{name: value[samples] for name, value in self.tensors().items()})

    def cat_samples(self, other: "Cond") -> "Cond":
        """Concatenate two conditions with the same fields along the batch axis.

        See `repeat_to_equal_length` for different numbers of tokens.
        """
        first, second = self.tensors(), other.tensors()
        if first.keys() != second.keys():
            fields = f"{sorted(first)} and {sorted(second)}"
            raise ValueError(f"cannot concatenate conditions with the fields {fields}")
        values = {name: [first[name], second[name]] for name in first}
        for name in TOKEN_FIELDS & values.keys():
            values[name] = repeat_to_equal_length(values[name])
        return Cond(**{name: torch.cat(tensors) for name, tensors in values.items()})

    def repeat(self, n: int) -> "Cond":
        """Repeat each sample n times: 0, 0, 1, 1, … for n = 2."""
        fields = self.tensors().items()
        return Cond(**{name: value.repeat_interleave(n, dim=0) for name, value in fields})

    def join_fields(self, other: "Cond", axis: JoinAxis = "tokens") -> "Cond":
        """Add the fields of another condition of the same samples; concatenate those in both.

        Args:
            axis: Axis along which `crossattn` is concatenated, "tokens" (1) or "features" (2); all
                other fields are concatenated along axis 1. With "features", tokens are repeated to
                equal length, and `context_mask` keeps a token if both masks do.
        """
        joined, added = self.tensors(), other.tensors()
        if "context_mask" in joined.keys() | added.keys():
            for fields in (joined, added):  # a missing mask keeps all tokens
                if (tokens := fields.get("crossattn")) is not None:
                    ones = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
                    fields.setdefault("context_mask", ones)
        for name, value in added.items():
            if name in joined:
                values = [joined[name], value.to(joined[name].device)]
                if name in TOKEN_FIELDS and axis == "features":
                    first, second = repeat_to_equal_length(values)
                    is_mask = name == "context_mask"
                    value = first & second if is_mask else torch.cat([first, second], dim=2)
                else:
                    value = torch.cat(values, dim=1)
            joined[name] = value
        return Cond(**joined)

    def zero_samples(self, mask: Tensor) -> "Cond":
        """Return a copy in which samples are zero where the mask (B,) is true.

        `context_mask` is unchanged, as attention to no token at all is undefined.
        """
        zeroed = {name: zero_samples(value, mask) for name, value in self.tensors().items()}
        return replace(Cond(**zeroed), context_mask=self.context_mask)


@dataclass(frozen=True)
class Composition:
    """Conditions of several subprompts per sample, whose guidance is summed.

    Liu et al. 2022 (arXiv:2206.01714).

    Args:
        cond: Conditions of all M subprompts of the batch.
        sample_indices: Index in the batch of each subprompt's sample, int64 (M,).
        weights: Guidance weight of each subprompt, (M,).
        batch_size: Number of samples, B.
    """

    cond: Cond
    sample_indices: Tensor
    weights: Tensor
    batch_size: int

    def __len__(self) -> int:
        return self.batch_size

    def compose(self, uncond: Tensor, predictions: Tensor) -> Tensor:
        """Return u + sum of w (c - u) over the subprompts of each sample, (B, C, h, w).

        Args:
            uncond: Predictions u (B, C, h, w) for the negative prompts.
            predictions: Predictions c (M, C, h, w) for the subprompts, with weights w.
        """
        indices = self.sample_indices.to(uncond.device)
        weights = self.weights.to(uncond).view(-1, *[1] * (uncond.dim() - 1))
        return uncond.index_add(0, indices, weights * (predictions - uncond[indices]))


@dataclass(frozen=True)
class ScheduledCond:
    """Conditions that change during sampling (prompt editing).

    Args:
        entries: (last step of the condition, condition), in ascending order; steps count from 0.
    """

    entries: tuple[tuple[int, "Cond | Composition"], ...]

    def __len__(self) -> int:
        _, first_cond = self.entries[0]
        return len(first_cond)

    def at(self, step: int) -> "Cond | Composition":
        """Return the condition of a step; the last entry also applies to all later steps."""
        conditions = (cond for last_step, cond in self.entries if last_step >= step)
        return next(conditions, self.entries[-1][1])


AnyCond = Cond | Composition | ScheduledCond


def repeat_to_equal_length(values: Sequence[Tensor]) -> list[Tensor]:
    """Repeat tensors (B, N, …) along axis 1 to the least common multiple of their lengths.

    This does not change attention, as all tokens of a tensor are repeated equally often.
    """
    length = math.lcm(*(value.shape[1] for value in values))
    return [
        value if value.shape[1] == length
        else value.repeat(1, length // value.shape[1], *[1] * (value.dim() - 2))
        for value in values
    ]  # fmt: skip


def zero_samples(value: Tensor, mask: Tensor) -> Tensor:
    """Return a copy of a tensor (B, …) in which samples are zero where the mask (B,) is true."""
    return value.masked_fill(mask.to(value.device).view(-1, *[1] * (value.dim() - 1)), 0)


@dataclass(frozen=True)
class PrepareOptions:
    """Arguments of `Encoder.prepare` besides the batch.

    Args:
        latent_size: (h, w) of the latent.
        encode: Image (B, 3, H, W) in [-1, 1] -> z, sampled from the posterior.
        generator: Random generator; None = torch's global one.
    """

    latent_size: tuple[int, int]
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


class EncoderOptions(TypedDict, total=False):
    """Options of encoders for training and guidance; the first three have sgm's names.

    Args:
        ucg_rate: Probability of dropping a sample in training, see `Conditioner.forward`.
        legacy_ucg_value: Replacement of a dropped sample; None = `null` or zeros.
        is_trainable: Whether the encoder can be trained, else it is frozen.
        null: See `Encoder`.
    """

    ucg_rate: float
    legacy_ucg_value: object
    is_trainable: bool
    null: object


class Encoder(nn.Module):
    """Encodes one entry of a batch for a slot of a `Cond`: `encoder(batch[encoder.key])`.

    `forward` returns a tensor, or a `Cond` if it fills several slots.

    Attributes:
        key: Batch key of the input.
        slot: Slot of `Cond` for an output that is a tensor.
        droppable: Whether classifier-free guidance replaces samples by `null`.
        null: The unconditional input, such as ""; None = the unconditional output is zeros.
        cache_key: Batch key of the entry that latent caches store: an image, or a deterministic
            result of `prepare`; None = nothing is cached.
        source_key: Batch key of the conditioning image from which the input may be computed; None
            = the input is not computed from an image.
        sd_version: 1 or 2 for the text encoder of Stable Diffusion 1 or 2; None = other encoders.
        ucg_rate, legacy_ucg_value, is_trainable: See `EncoderOptions`.
    """

    key: str
    slot: Slot
    droppable: bool = False
    null: object = None
    cache_key: str | None = None
    source_key: str | None = None
    sd_version: ClassVar[int | None] = None
    ucg_rate: float = 0.0
    legacy_ucg_value: object = None
    is_trainable: bool = True

    def __init__(self, **options: Unpack[EncoderOptions]) -> None:
        super().__init__()
        for name, value in options.items():
            setattr(self, name, value)

    @property
    def unused_weights(self) -> tuple[str, ...]:
        """Name prefixes of weights that do not affect the output and may be missing in files."""
        return ()

    def forward(self, samples: Any) -> Any:
        """Encode samples; this class returns them unchanged."""
        return samples

    def condition(self, samples: Any) -> Cond:
        """Encode samples to a `Cond`; an output that is a tensor fills `slot`."""
        output: Tensor | Cond = self(samples)
        return output if isinstance(output, Cond) else Cond(**{self.slot: output})

    def prepare(self, batch: Batch, options: PrepareOptions) -> dict[str, Tensor]:
        """Compute entries that this encoder needs and that are missing in the batch.

        Slow or random computations belong here, not in `forward`: they run once, so that the
        conditional and the unconditional batch get the same result.
        """
        return {}


class Conditioner(nn.Module):
    """Runs encoders, and joins their outputs in the order of the encoders.

    Encoders are submodules, so that their weights are named `conditioner.text.…`. The encoder of
    the prompt, or of the image that replaces it, is called `text`.

    Args:
        join: Axis along which `crossattn` is concatenated, see `Cond.join_fields`.
    """

    text: Encoder | None

    def __init__(self, *, join: JoinAxis = "tokens", **encoders: Encoder) -> None:
        super().__init__()
        self.join: JoinAxis = join
        for name, encoder in encoders.items():
            if not isinstance(encoder, Encoder):
                raise TypeError(f"encoder `{name}` must be an Encoder, got {type(encoder)}")
            if not encoder.is_trainable:
                encoder.requires_grad_(False)
            self.add_module(name, encoder)
        if "text" not in encoders:
            self.register_module("text", None)

    @property
    def encoders(self) -> dict[str, Encoder]:
        """Encoders by name, in order."""
        children = self.named_children()
        return {name: child for name, child in children if isinstance(child, Encoder)}

    @property
    def keys(self) -> frozenset[str]:
        """Batch keys that the encoders read."""
        return frozenset(encoder.key for encoder in self.encoders.values())

    def find_all(self, encoder_class: type[EncoderT]) -> list[EncoderT]:
        """Return the encoders of a class, in order."""
        return [e for e in self.encoders.values() if isinstance(e, encoder_class)]

    def find(self, encoder_class: type[EncoderT]) -> EncoderT | None:
        """Return the first encoder of a class, or None."""
        return next(iter(self.find_all(encoder_class)), None)

    def get(self, encoder_class: type[EncoderT]) -> EncoderT:
        """Return the first encoder of a class, or raise a ValueError that lists all encoders."""
        encoder = self.find(encoder_class)
        if encoder is None:
            names = ", ".join(type(e).__name__ for e in self.encoders.values()) or "none"
            raise ValueError(f"this model has no {encoder_class.__name__}; its encoders: {names}")
        return encoder

    def forward(
        self,
        batch: Batch,
        drop: DropRate = 0.0,
        generator: torch.Generator | None = None,
        legacy: Collection[str] = (),
    ) -> Cond:
        """Encode a batch, which has an entry for the `key` of each encoder.

        The encoder `text_2` reads `txt_2` instead if the batch has it.

        Args:
            drop: Probability of dropping a sample: one number for all `droppable` encoders, numbers
                by batch key, such as {"txt": 0.1}, or None = the `ucg_rate` of each encoder.
                A dropped sample is replaced by the encoder's `legacy_ucg_value`; if that is None,
                by its `null` (but not if `drop` is None); if both are None, its output is zeros.
                Encoders with the same batch key drop the same samples.
            generator: Random generator for `drop`; None = torch's global one.
            legacy: Quirks of sgm (`generative-models`), names in DROPOUT_QUIRKS:
                "independent-dropout" drops each output independently; with "mutating-legacy-ucg",
                later encoders with the same batch key get the replaced samples.
        """
        cond, dropper = Cond(), _SampleDropper(drop, generator, legacy)
        entries = dict(batch)
        for name, encoder in self.encoders.items():
            has_second_prompt = name == "text_2" and SECOND_PROMPT_KEY in entries
            key = SECOND_PROMPT_KEY if has_second_prompt else encoder.key
            if key not in entries:
                keys = ", ".join(f"`{key}`" for key in entries)
                raise KeyError(f"encoder `{name}` reads `{key}`, the batch has {keys}")
            entries[key], samples = dropper.replace(encoder, entries[key])
            cond = cond.join_fields(dropper.zero(encoder, encoder.condition(samples)), self.join)
        return cond


@dataclass
class _SampleDropper:
    """Replaces dropped samples before an encoder runs, or zeros its outputs afterwards."""

    drop_rate: DropRate
    generator: torch.Generator | None
    legacy: Collection[str]
    uniform_draws: dict[str, Tensor] = field(default_factory=dict)  # (B,) in [0, 1), by batch key

    def replace(self, encoder: Encoder, samples: Any) -> tuple[Any, Any]:
        """Return the samples for later encoders with the same key, and those for this encoder."""
        rate, replacement = self._get_rate(encoder), self._get_replacement(encoder)
        if not rate or replacement is None:
            return samples, samples
        mask = self._draw_uniform(encoder.key, len(samples)) < rate
        masked = zip(samples, mask, strict=True)
        replaced = [replacement if is_dropped else sample for sample, is_dropped in masked]
        if "mutating-legacy-ucg" not in self.legacy:
            return samples, replaced
        # As in sgm, the next encoder with this key draws again, and may drop replaced samples.
        del self.uniform_draws[encoder.key]
        return replaced, replaced

    def zero(self, encoder: Encoder, cond: Cond) -> Cond:
        """Zero the outputs of dropped samples, unless `replace` has replaced the samples."""
        rate = self._get_rate(encoder)
        if not rate or self._get_replacement(encoder) is not None:
            return cond
        if "independent-dropout" not in self.legacy:
            return cond.zero_samples(self._draw_uniform(encoder.key, len(cond)) < rate)
        keep_probs = torch.full((len(cond),), 1 - rate)  # for torch.bernoulli, which sgm uses
        fields = {
            name: zero_samples(value, torch.bernoulli(keep_probs, generator=self.generator) == 0)
            for name, value in cond.tensors().items()
        }
        return Cond(**fields)

    def _get_rate(self, encoder: Encoder) -> float:
        if self.drop_rate is None:
            return encoder.ucg_rate
        if isinstance(self.drop_rate, Mapping):
            return self.drop_rate.get(encoder.key, 0.0)
        return self.drop_rate if encoder.droppable else 0.0

    def _get_replacement(self, encoder: Encoder) -> object:
        """Return the replacement of dropped samples; None = zeros as output."""
        if self.drop_rate is None or encoder.legacy_ucg_value is not None:
            return encoder.legacy_ucg_value
        return encoder.null

    def _draw_uniform(self, key: str, batch_size: int) -> Tensor:
        if key not in self.uniform_draws:
            # Once per batch key, so that two encoders of a prompt drop the same samples.
            self.uniform_draws[key] = torch.rand(batch_size, generator=self.generator)
        return self.uniform_draws[key]

"""Text encoders of Stable Diffusion: OpenAI's CLIP and OpenCLIP.

Nothing is downloaded: sizes are in tables here, weights come from a checkpoint.

    text --tokenize--> (B, 77) --embed--> (B, 77, D) --blocks--> --final norm--> (B, 77, D)

                SD 1          SD 2                    SDXL
    CLIP        last layer    -                       `hidden` 11, without the norm
    OpenCLIP    -             penultimate and norm    penultimate without it, pooled output

Radford et al. 2021 (arXiv:2103.00020); Cherti et al. 2022 (arXiv:2212.07143).
"""

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ldm.conditioning import (
    Cond,
    Config,
    Encoder,
    EncoderOptions,
    Slot,
    repeat_to_equal_length,
    zero_samples,
)
from ldm.encoders import tokenizer
from ldm.encoders.chunks import Chunk, Splitter
from ldm.encoders.towers import ACTIVATIONS, VOCAB_SIZE, CLIPTower, OpenCLIPTower, select_tokens
from ldm.encoders.weighting import PromptEncoder, split_output
from ldm.prompts.prompt import ParsedPrompt, Prompt
from ldm.runtime.arguments import as_list
from ldm.runtime.errors import ArgumentError, check_name


class TextSize(NamedTuple):
    """The size of a text encoder of open_clip."""

    width: int  # features per token
    heads: int
    layers: int


# Sizes by model name in open_clip, without the suffix `-quickgelu`.
TEXT_SIZES = {
    "ViT-B-32": TextSize(512, 8, 12),
    "ViT-B-16": TextSize(512, 8, 12),
    "ViT-L-14": TextSize(768, 12, 12),
    "ViT-L-14-336": TextSize(768, 12, 12),
    "ViT-H-14": TextSize(1024, 16, 24),
    "ViT-g-14": TextSize(1024, 16, 24),
    "ViT-bigG-14": TextSize(1280, 20, 32),
}

CLIP_LARGE_CONFIG: dict[str, Any] = {  # of transformers
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
CLIP_BASE_CONFIG = CLIP_LARGE_CONFIG | {
    "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8
}  # fmt: skip
CLIP_CONFIGS = {
    "openai/clip-vit-base-patch16": CLIP_BASE_CONFIG,
    "openai/clip-vit-base-patch32": CLIP_BASE_CONFIG,
}
# Keys of transformers' configs that are ignored.
IGNORED_CLIP_KEYS = {
    "projection_dim", "attention_dropout", "dropout", "initializer_factor", "initializer_range",
    "bos_token_id", "eos_token_id", "pad_token_id", "model_type", "architectures", "torch_dtype",
    "dtype", "transformers_version", "_name_or_path",
}  # fmt: skip


_clip_skip: ContextVar[int] = ContextVar("clip_skip", default=1)


@contextmanager
def clip_skip(skip: int) -> Iterator[None]:
    """Skip the last layers of text encoders with `takes_clip_skip` within the `with` block.

    Args:
        skip: 1 runs all layers, 2 all but the last …, as in A1111; then the final norm is applied.
    """
    token = _clip_skip.set(skip)
    try:
        yield
    finally:
        _clip_skip.reset(token)


class ContextCache(Protocol):
    """Outputs by prompt: `context` (N, D), and `pooled` (P,) if there is one."""

    def __contains__(self, text: object) -> bool: ...

    def __getitem__(self, text: str) -> Mapping[str, Tensor]: ...


class TextEncoder(Encoder):
    """Prompts -> context (B, N, D); base class of the text encoders.

    A prompt that is None gives zeros.

    Attributes:
        length: Tokens per prompt, 77.
        always_return_pooled: Whether the output is a `Cond` of the context and a vector (B, P), the
            output of the last block at the first EOS token.
        always_return_mask: Whether it also has a mask, which excludes the tokens after that one.
        token_ids: CLIP's ids of the tokens in a pruned token embedding, (rows - 1,) sorted: row i
            is the embedding of token `token_ids[i - 1]`, row 0 that of all other tokens. None = not
            pruned.
        added_embeddings: Textual inversions, lower-case token -> vectors (n, D); not part of the
            state dict.
        cache: Outputs by prompt, used while the encoder is frozen and has no LoRA; None = no cache.
    """

    slot: Slot = "crossattn"
    key = "txt"
    droppable = True
    null: object = ""
    tokenizer_variant: ClassVar[tokenizer.Variant]
    length: int
    always_return_pooled: bool
    always_return_mask: bool = False
    token_ids: Tensor | None

    def __init__(self, **options: Unpack[EncoderOptions]) -> None:
        super().__init__(**options)
        self.added_embeddings: dict[str, Tensor] = {}
        self.cache: ContextCache | None = None
        self.register_buffer("token_ids", None)

    @property
    def tower(self) -> OpenCLIPTower | CLIPTower:
        """The network that encodes tokens."""
        raise NotImplementedError

    @property
    def embedding_table(self) -> Tensor:
        """Weight of the token embedding, (rows, D)."""
        return self.tower.token_embedding.weight

    @property
    def num_blocks(self) -> int:
        """Number of blocks before the context."""
        raise NotImplementedError

    @property
    def has_final_norm(self) -> bool:
        """Whether the tower's final norm precedes the context."""
        raise NotImplementedError

    @property
    def takes_clip_skip(self) -> bool:
        """Whether CLIP skip applies, as the context is the output of the last layer.

        It does not apply to Stable Diffusion 2 and SDXL, which always use the penultimate layer.
        """
        return False

    @property
    def skipped_blocks(self) -> int:
        """Number of last blocks to skip, see `clip_skip`."""
        return _clip_skip.get() - 1 if self.takes_clip_skip else 0

    @property
    def width(self) -> int:
        """Features per token, D."""
        return self.embedding_table.shape[1]

    def tokenize(self, texts: Sequence[str] | str) -> Tensor:
        """Convert texts to token ids (B, length) int64; ids of added embeddings are negative."""
        return tokenizer.tokenize(
            as_list(texts), self.tokenizer_variant, self.length, self._get_added_tokens()
        )

    def count_tokens(self, prompt: str) -> int:
        """Count the tokens of a prompt, of which the encoder uses `length` - 2."""
        return len(tokenizer.encode(prompt, self.tokenizer_variant, self._get_added_tokens()))

    def find_truncated_text(self, prompt: str) -> str:
        """Return the end of a prompt that exceeds `length` tokens; "" if the prompt fits."""
        return tokenizer.find_truncated_text(
            prompt, self.tokenizer_variant, self.length, self._get_added_tokens()
        )

    def encode(self, texts: Sequence[str] | str) -> Tensor | Cond:
        """Encode texts, or read their outputs from the cache."""
        table, entries = self.embedding_table, self._read_cache(as_list(texts))
        if entries is None:
            output: Tensor | Cond = self(self.tokenize(texts).to(table.device))
            return output
        names = ("context", "pooled") if "pooled" in entries[0] else ("context",)
        return _as_output(
            *(torch.stack([entry[name] for entry in entries]).to(table) for name in names)
        )

    def encode_tokens(self, tokens: Tensor, is_masked: Tensor | None = None) -> Tensor | Cond:
        """Encode token ids (B, N); `is_masked`: see `TextTower.forward`."""
        eos_positions = (tokens == tokenizer.EOS_ID).int().argmax(dim=1)  # of the first
        context, pooled = self.tower(
            self._to_rows(tokens),
            self.num_blocks - self.skipped_blocks,
            self._get_added_table(),
            normalize=self.has_final_norm,
            eos_positions=eos_positions if self.always_return_pooled else None,
            is_masked=is_masked,
        )
        if self.context_length == 1:
            context = select_tokens(context, eos_positions)[:, None]  # (B, 1, D)
        if not self.always_return_mask:
            return _as_output(context, pooled)
        mask = (
            torch.arange(tokens.shape[1], device=eos_positions.device) <= eos_positions[:, None]
        )  # (B, N)
        return Cond(crossattn=context, vector=pooled, context_mask=mask)

    def forward(self, prompts: Tensor | Sequence[str | Prompt | None]) -> Tensor | Cond:
        """Encode texts, parsed prompts, or token ids (B, N); None gives zeros.

        A parsed prompt gives `length` tokens per chunk, repeated to equal length within a batch,
        and the pooled output of its first chunk.
        """
        if isinstance(prompts, Tensor):
            return self.encode_tokens(prompts)
        texts = [prompt for prompt in prompts if not isinstance(prompt, Prompt)]
        if len(texts) < len(prompts):
            return self._encode_parsed(prompts)
        output = self.encode([text or "" for text in texts])
        is_missing = torch.tensor([prompt is None for prompt in prompts])
        if not is_missing.any():
            return output
        return (
            zero_samples(output, is_missing)
            if isinstance(output, Tensor)
            else output.zero_samples(is_missing)
        )

    def split_into_chunks(self, prompt: Prompt) -> list[list[Chunk]]:
        """Return the chunks of each text of a parsed prompt."""
        texts = [text for part in prompt.parts for text in part.texts]
        return [self._splitter.split(text, prompt.syntax) for text in texts]

    def count_chunk_tokens(self, prompt: ParsedPrompt) -> tuple[int, int]:
        """Return the number of tokens of a parsed prompt, and the capacity of its chunks.

        With several texts (prompt editing, AND), both are for the text with the most chunks.
        """
        chunk_size = self.length - 2
        capacity, count = chunk_size, 0
        for subprompt in prompt.subprompts:
            for _, entry in subprompt.entries:
                for chunks in self.split_into_chunks(entry):
                    tokens = sum(len(unit.ids) for chunk in chunks for unit in chunk)
                    candidate = (chunk_size * max(len(chunks), 1), tokens)
                    capacity, count = max((capacity, count), candidate)
        return count, capacity

    def _encode_parsed(self, prompts: Sequence[str | Prompt | None]) -> Tensor | Cond:
        if self.always_return_mask or self.context_length != self.length:
            raise ArgumentError("this text encoder supports the syntax `plain` only", "syntax")
        encoder = PromptEncoder(self.encode_tokens, self._splitter, self.embedding_table.device)
        outputs = [
            encoder.encode(prompt)
            if isinstance(prompt, Prompt)
            else split_output(self.forward([prompt]))
            for prompt in prompts
        ]
        contexts = repeat_to_equal_length([context for context, _ in outputs])
        pooled = [vector for _, vector in outputs if vector is not None]
        return _as_output(torch.cat(contexts), torch.cat(pooled) if pooled else None)

    @property
    def _splitter(self) -> Splitter:
        return Splitter(self.tokenizer_variant, self._get_added_tokens(), self.length)

    @property
    def context_length(self) -> int:
        """Number of tokens in the context of a plain prompt, N."""
        return self.length

    def get_token_embeddings(self, text: str | None = None) -> Tensor:
        """Return the embeddings (n, D) of the n tokens of a text; None = of all tokens."""
        table = self.embedding_table.detach()
        if text is None:
            return table
        ids = tokenizer.encode(text, self.tokenizer_variant)
        return table[self._to_rows(torch.tensor(ids, dtype=torch.int64, device=table.device))]

    def _to_rows(self, tokens: Tensor) -> Tensor:
        """Convert token ids to rows of the token embedding; negative ids are kept."""
        ids = self.token_ids
        if ids is None:
            return tokens
        # For tokens beyond the greatest id, searchsorted returns len(ids), which is out of range:
        # they are compared with the last id instead, differ, and get row 0.
        indices = torch.searchsorted(ids, tokens).clamp(max=len(ids) - 1)
        return torch.where(ids[indices] == tokens, indices + 1, tokens.clamp(max=0))

    def _get_added_tokens(self) -> dict[str, list[int]]:
        """Return the ids of added embeddings: -1, -2, … for the rows of `_get_added_table`."""
        ids = (-1 - row for row in itertools.count())
        return {
            token: list(itertools.islice(ids, len(vectors)))
            for token, vectors in self.added_embeddings.items()
        }

    def _get_added_table(self) -> Tensor | None:
        return torch.cat(list(self.added_embeddings.values())) if self.added_embeddings else None

    def _read_cache(self, texts: Sequence[str]) -> list[Mapping[str, Tensor]] | None:
        """Read the cache, or return None if it is incomplete or the encoder is modified."""
        cache = self.cache
        if cache is None or any(text not in cache for text in texts):
            return None
        # A mask is not cached.
        if self.added_embeddings or self.skipped_blocks or self.always_return_mask:
            return None
        is_trained = any(weight.requires_grad for weight in self.parameters())
        has_lora = any(module._forward_hooks for module in self.modules())
        return None if is_trained or has_lora else [cache[text] for text in texts]


def collect_vocabulary(texts: Iterable[str], encoder: TextEncoder) -> Tensor:
    """Return the sorted ids of all tokens in the texts, for the pruned embedding of `encoder`.

    Spare rows get ids beyond CLIP's vocabulary, which never occur.
    """
    assert encoder.token_ids is not None
    ids = encoder.tokenize(sorted(set(texts))).unique()
    spare_rows = len(encoder.token_ids) - len(ids)
    if spare_rows < 0:
        raise ValueError(f"`compact_vocab` must be at least {len(ids) + 1} for {len(ids)} tokens")
    return torch.cat([ids, torch.arange(spare_rows) + VOCAB_SIZE])


class OpenCLIPText(TextEncoder):
    """Prompts -> context (B, 77, D) by the text encoder of an OpenCLIP model.

    Args:
        arch: Name in TEXT_SIZES, open_clip model config (`embed_dim`, `text_cfg`), or a text_cfg.
        version: "openai" selects quick GELU; any other value is ignored.
        layer: "last", or "penultimate" for the output of the penultimate block.
        compact_vocab: Rows of a pruned token embedding, see `token_ids`; None = not pruned.
        always_return_pooled: Whether to also return a pooled output, projected to `embed_dim`.
        legacy: Whether the final norm follows `layer`, as in Stable Diffusion 2.
    """

    sd_version = 2
    tokenizer_variant = tokenizer.OPEN_CLIP
    LAYERS = ("last", "penultimate")
    IGNORED_PARAMS: ClassVar[frozenset[str]] = frozenset({"device", "max_length"})

    def __init__(
        self,
        *,
        arch: str | Config = "ViT-H-14",
        version: str = "laion2b_s32b_b79k",
        freeze: bool = True,
        layer: Literal["last", "penultimate"] = "last",
        compact_vocab: int | None = None,
        always_return_pooled: bool = False,
        legacy: bool = True,
        **options: Unpack[EncoderOptions],
    ) -> None:
        super().__init__(**options)
        if legacy and always_return_pooled:
            raise ArgumentError("always_return_pooled needs `legacy: false`")
        # Caches of contexts are keyed by the plain attributes: their names, in order of assignment.
        self.layer = _check_choice(layer, self.LAYERS)
        kwargs = get_open_clip_kwargs(arch)
        if version == "openai":
            kwargs["quick_gelu"] = True
        if compact_vocab is not None:
            kwargs["vocab_size"] = compact_vocab
            self.token_ids = torch.arange(compact_vocab - 1)
        self.length = kwargs["context_length"]
        self.always_return_pooled = always_return_pooled
        self.legacy = legacy
        self.model = OpenCLIPTower(**kwargs)
        self.requires_grad_(not freeze)

    @property
    def tower(self) -> OpenCLIPTower:
        return self.model

    @property
    def has_final_norm(self) -> bool:
        return self.legacy

    @property
    def num_blocks(self) -> int:
        return len(self.model.blocks) - (1 if self.layer == "penultimate" else 0)

    @property
    def unused_weights(self) -> tuple[str, ...]:
        if self.always_return_pooled:
            return ("model.logit_scale",)
        indices = range(self.num_blocks, len(self.model.blocks))
        blocks = [f"model.transformer.resblocks.{i}." for i in indices]
        norm = [] if self.legacy else ["model.ln_final."]
        return ("model.text_projection", "model.logit_scale", *norm, *blocks)

    @property
    def takes_clip_skip(self) -> bool:
        return self.layer == "last" and self.legacy


class CLIPText(TextEncoder):
    """Prompts -> context (B, 77, D) by OpenAI's CLIP, with transformers' parameter names.

    Args:
        version: Name in CLIP_CONFIGS; any other selects the config of ViT-L/14.
        layer: "last"; "pooled" for the vector at the first EOS token alone, (B, 1, D); "hidden" for
            the hidden state `layer_idx`, without the final norm.
        layer_idx: Index of the hidden state, -layers - 1 … layers; 0 is the embedding. Only for
            layer "hidden".
        arch: Entries of a transformers config (`hidden_size` …) that replace those of `version`;
            None = no replacements.
        always_return_pooled: Whether to also return a pooled output.
        always_return_mask: Whether to also return a mask of the tokens up to the first EOS token.
    """

    sd_version = 1
    tokenizer_variant = tokenizer.CLIP
    LAYERS = ("last", "pooled", "hidden")
    IGNORED_PARAMS: ClassVar[frozenset[str]] = frozenset({"device"})

    def __init__(
        self,
        *,
        version: str = "openai/clip-vit-large-patch14",
        max_length: int = 77,
        freeze: bool = True,
        layer: Literal["last", "pooled", "hidden"] = "last",
        layer_idx: int | None = None,
        arch: Config | None = None,
        always_return_pooled: bool = False,
        always_return_mask: bool = False,
        **options: Unpack[EncoderOptions],
    ) -> None:
        super().__init__(**options)
        kwargs = _get_clip_kwargs(version, arch or {})
        self.layer = _check_choice(layer, self.LAYERS)  # attributes: see OpenCLIPText
        self.blocks_run = _count_blocks(layer, layer_idx, kwargs["num_hidden_layers"])
        self.length = min(max_length, kwargs["max_position_embeddings"])
        self.always_return_pooled = always_return_pooled
        self.always_return_mask = always_return_mask
        self.transformer = nn.ModuleDict({"text_model": CLIPTower(**kwargs)})
        self.requires_grad_(not freeze)

    @property
    def context_length(self) -> int:
        return 1 if self.layer == "pooled" else self.length

    @property
    def tower(self) -> CLIPTower:
        return cast(CLIPTower, self.transformer["text_model"])

    @property
    def has_final_norm(self) -> bool:
        return self.layer != "hidden"

    @property
    def num_blocks(self) -> int:
        return self.blocks_run

    @property
    def takes_clip_skip(self) -> bool:
        return self.layer == "last"


def get_open_clip_kwargs(arch: str | Config) -> dict[str, Any]:
    """Return the arguments of OpenCLIPTower for a name in TEXT_SIZES or an open_clip config."""
    if isinstance(arch, str):
        name = arch.removesuffix("-quickgelu")
        width, heads, layers = TEXT_SIZES[_check_choice(name, TEXT_SIZES, "arch")]
        kwargs: dict[str, Any] = {"width": width, "heads": heads, "layers": layers}
        return kwargs | {"quick_gelu": name != arch, "embed_dim": width, "context_length": 77}
    config = {key: value for key, value in arch.items() if key not in ("text_cfg", "vision_cfg")}
    # open_clip's defaults of CLIPTextCfg
    kwargs = {"width": 512, "heads": 8, "layers": 12, "context_length": 77}
    allowed = (*kwargs, "vocab_size", "mlp_ratio", "embed_dim", "quick_gelu")
    for key, value in (config | dict(arch.get("text_cfg", {}))).items():
        kwargs[_check_choice(key, allowed, "text_cfg key")] = value
    return {"embed_dim": kwargs["width"]} | kwargs


def _get_clip_kwargs(version: str, arch: Config) -> dict[str, Any]:
    kwargs = dict(CLIP_CONFIGS.get(version, CLIP_LARGE_CONFIG))
    for key in arch.keys() - IGNORED_CLIP_KEYS:
        kwargs[_check_choice(key, kwargs, "arch key")] = arch[key]
    _check_choice(kwargs["hidden_act"], ACTIVATIONS, "hidden_act")
    return kwargs


def _count_blocks(layer: str, layer_idx: int | None, layers: int) -> int:
    if layer != "hidden":
        return layers
    if layer_idx is None or not -layers - 1 <= layer_idx <= layers:
        raise ArgumentError(
            f'layer "hidden" needs a layer_idx from {-layers - 1} to {layers}, got `{layer_idx}`'
        )
    return layer_idx % (layers + 1)


def _check_choice(value: str, allowed: Collection[str], description: str = "layer") -> str:
    check_name(description, value, allowed)
    return value


def _as_output(context: Tensor, pooled: Tensor | None = None) -> Tensor | Cond:
    return context if pooled is None else Cond(crossattn=context, vector=pooled)

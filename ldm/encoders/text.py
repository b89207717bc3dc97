"""The text towers of CLIP: OpenCLIP's (Stable Diffusion 2) and OpenAI's (Stable Diffusion 1).

Both are causal pre-norm transformers over 77 tokens and give one vector per token, for
cross-attention. Weights keep the names of the two libraries they come from (open_clip and
transformers), so checkpoints load without a map. Nothing is downloaded: sizes are tables here,
weights come from a checkpoint or from training.

    text --tokenize--> (B, 77) --embed--> (B, 77, D) --blocks--> --final norm--> (B, 77, D)

Radford et al. 2021 (arXiv:2103.00020); Cherti et al. 2022 (arXiv:2212.07143).
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ldm.encoders import tokenizer
from ldm.encoders.towers import ACTIVATIONS, VOCAB, CLIPTower, OpenCLIPTower

# name: (width, heads, layers) of the text tower; `-quickgelu` may follow the name
ARCHS = {
    "ViT-B-32": (512, 8, 12),
    "ViT-B-16": (512, 8, 12),
    "ViT-L-14": (768, 12, 12),
    "ViT-L-14-336": (768, 12, 12),
    "ViT-H-14": (1024, 16, 24),
    "ViT-g-14": (1024, 16, 24),
    "ViT-bigG-14": (1280, 20, 32),
}

CLIP_LARGE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
CLIP_BASE = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
CLIP_SIZES = {
    "openai/clip-vit-base-patch16": CLIP_LARGE | CLIP_BASE,
    "openai/clip-vit-base-patch32": CLIP_LARGE | CLIP_BASE,
}
# what else a transformers config of a text tower says, without meaning here
CLIP_UNUSED = (
    "projection_dim", "attention_dropout", "dropout", "initializer_factor", "initializer_range",
    "bos_token_id", "eos_token_id", "pad_token_id", "model_type", "architectures", "torch_dtype",
    "dtype", "transformers_version", "_name_or_path",
)  # fmt: skip


class OpenCLIPText(nn.Module):
    """Prompts -> context (B, 77, D) by the text tower of an OpenCLIP model.

        arch: a name in ARCHS, an open_clip model config (`embed_dim`, `text_cfg`), or a text_cfg.
        version: "openai" means quick GELU, as in those weights; otherwise without meaning.
        layer: "last", or "penultimate": all blocks but one; the final norm follows in both cases.
        compact_vocab: rows of a reduced embedding: `token_ids` (rows - 1,) holds the sorted CLIP
            ids of rows 1, 2 …; every other id shares row 0.

    The unused last block, text_projection and logit_scale stay in the state dict, as in published
    checkpoints. `learned` holds words in addition to CLIP's, in lower case, and their vectors
    (n, D): textual inversion. They belong to no file of the model. `known` may hold contexts
    (77, D) of texts that were encoded before; it is asked while the tower is what made them.
    """

    slot: Literal["crossattn"] = "crossattn"
    key = "txt"
    null = ""
    token_ids: Tensor | None
    LAYERS = ("last", "penultimate")
    IGNORED: ClassVar[frozenset[str]] = frozenset({"device", "max_length"})

    def __init__(
        self,
        *,
        arch: str | Mapping[str, Any] = "ViT-H-14",
        version: str = "laion2b_s32b_b79k",
        device: str | None = None,
        max_length: int = 77,
        freeze: bool = True,
        layer: Literal["last", "penultimate"] = "last",
        compact_vocab: int | None = None,
    ) -> None:
        super().__init__()
        self.layer = _chosen(layer, self.LAYERS)
        size = open_clip_size(arch)
        if version == "openai":
            size["quick_gelu"] = True
        if compact_vocab is not None:
            size["vocab_size"] = compact_vocab
        ids = None if compact_vocab is None else torch.arange(compact_vocab - 1)
        self.register_buffer("token_ids", ids)
        self.length = size["context_length"]
        self.learned: dict[str, Tensor] = {}
        self.known: Mapping[str, Tensor] | None = None
        self.model = OpenCLIPTower(**size)
        self.requires_grad_(not freeze)

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of weights, or their beginnings, that no context depends on."""
        blocks: Any = self.model.transformer["resblocks"]
        last = (f"model.transformer.resblocks.{len(blocks) - 1}.",)
        is_run = self.layer == "last"
        return ("model.text_projection", "model.logit_scale", *(() if is_run else last))

    def tokenize(self, texts: Sequence[str] | str) -> Tensor:
        """Ids (B, 77) int64: 49406, words, 49407, zeros."""
        ids = _ids(self.learned)
        return tokenizer.tokenize(_listed(texts), tokenizer.OPEN_CLIP, self.length, ids)

    def encode(self, texts: Sequence[str] | str) -> Tensor:
        """Context (B, 77, D) of the texts."""
        weight = self.model.positional_embedding
        known = _remembered(self, texts)
        return self(self.tokenize(texts).to(weight.device)) if known is None else known.to(weight)

    def forward(self, tokens: Tensor | Sequence[str]) -> Tensor:
        """Context (B, 77, D) of token ids (B, 77), or of texts."""
        if not isinstance(tokens, Tensor):
            return self.encode(tokens)
        if self.token_ids is not None:
            tokens = _rows(tokens, self.token_ids)  # (B, N)
        skip = 1 if self.layer == "penultimate" else 0
        return self.model(tokens, skip, _table(self.learned))  # (B, N, D)

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.model.token_embedding.embedding_dim

    def vectors(self, words: str | None = None) -> Tensor:
        """What stands for the n tokens of some words, or for all tokens there are: (n, D)."""
        table = self.model.token_embedding.weight.detach()
        if words is None:
            return table
        ids = torch.tensor(tokenizer.encode(words, tokenizer.OPEN_CLIP), device=table.device)
        return table[ids if self.token_ids is None else _rows(ids, self.token_ids)]


class CLIPText(nn.Module):
    """Prompts -> context (B, 77, D) by the text tower of OpenAI's CLIP, as transformers names it.

        version: the published model whose size is meant: a name in CLIP_SIZES, all others mean
            ViT-L/14. Nothing is looked up by it.
        arch: sizes that differ from `version`, by transformers' names (`hidden_size` …).
        layer: "last"; "pooled": only the vector at the first end token, (B, 1, D);
            "hidden": output of block `layer_idx` (0 = the embedding), without the final norm.

    Keys are those of SD 1 files, without the constant `position_ids` that older ones hold.
    `learned`, `known`: see OpenCLIPText.
    """

    slot: Literal["crossattn"] = "crossattn"
    key = "txt"
    null = ""
    LAYERS = ("last", "pooled", "hidden")
    IGNORED: ClassVar[frozenset[str]] = frozenset({"device"})

    def __init__(
        self,
        *,
        version: str = "openai/clip-vit-large-patch14",
        device: str | None = None,
        max_length: int = 77,
        freeze: bool = True,
        layer: Literal["last", "pooled", "hidden"] = "last",
        layer_idx: int | None = None,
        arch: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        size = _clip_size(version, arch or {})
        self.layer = _chosen(layer, self.LAYERS)
        self.blocks_run = _blocks_run(layer, layer_idx, size["num_hidden_layers"])
        self.length = min(max_length, size["max_position_embeddings"])
        self.learned: dict[str, Tensor] = {}
        self.known: Mapping[str, Tensor] | None = None
        self.transformer = nn.ModuleDict({"text_model": CLIPTower(**size)})
        self.requires_grad_(not freeze)

    def tokenize(self, texts: Sequence[str] | str) -> Tensor:
        """Ids (B, 77) int64: 49406, words, then 49407 to the end."""
        ids = _ids(self.learned)
        return tokenizer.tokenize(_listed(texts), tokenizer.CLIP, self.length, ids)

    def encode(self, texts: Sequence[str] | str) -> Tensor:
        """Context (B, 77, D) of the texts; (B, 1, D) if pooled."""
        weight = self._tower.final_layer_norm.weight
        known = _remembered(self, texts)
        return self(self.tokenize(texts).to(weight.device)) if known is None else known.to(weight)

    def forward(self, tokens: Tensor | Sequence[str]) -> Tensor:
        """Context (B, 77, D) of token ids (B, 77), or of texts."""
        if not isinstance(tokens, Tensor):
            return self.encode(tokens)
        x = self._tower(tokens, self.blocks_run, _table(self.learned))  # (B, N, D)
        if self.layer == "hidden":
            return x
        x = self._tower.final_layer_norm(x)
        if self.layer == "pooled":
            ends = tokens.argmax(dim=1)  # (B,); 49407 is the greatest id
            x = x[torch.arange(len(x), device=x.device), ends, None]  # (B, 1, D)
        return x

    @property
    def width(self) -> int:
        """Features of a token."""
        return self._tower.final_layer_norm.normalized_shape[0]

    def vectors(self, words: str | None = None) -> Tensor:
        """As OpenCLIPText.vectors."""
        table: Any = self._tower.embeddings["token_embedding"].weight
        ids = slice(None) if words is None else tokenizer.encode(words, tokenizer.CLIP)
        return table.detach()[ids]

    @property
    def _tower(self) -> CLIPTower:
        return self.transformer["text_model"]  # type: ignore[return-value]


def open_clip_size(arch: str | Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of OpenCLIPTower."""
    if isinstance(arch, str):
        name = arch.removesuffix("-quickgelu")
        width, heads, layers = ARCHS[_chosen(name, tuple(ARCHS), "arch")]
        size: dict[str, Any] = {"width": width, "heads": heads, "layers": layers}
        return size | {"quick_gelu": name != arch, "embed_dim": width, "context_length": 77}
    outer = {key: value for key, value in arch.items() if key not in ("text_cfg", "vision_cfg")}
    size = {"width": 512, "heads": 8, "layers": 12, "context_length": 77}
    allowed = (*size, "vocab_size", "mlp_ratio", "embed_dim", "quick_gelu")
    for key, value in (outer | dict(arch.get("text_cfg", {}))).items():
        size[_chosen(key, allowed, "text_cfg key")] = value
    return {"embed_dim": size["width"]} | size


def _clip_size(version: str, arch: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of CLIPTower."""
    size = dict(CLIP_SIZES.get(version, CLIP_LARGE))
    for key in arch.keys() - set(CLIP_UNUSED):
        size[_chosen(key, tuple(size), "arch key")] = arch[key]
    _chosen(size["hidden_act"], tuple(ACTIVATIONS), "hidden_act")
    return size


def _remembered(encoder: Any, texts: Sequence[str] | str) -> Tensor | None:
    """The contexts of texts, if all are known and nothing can have changed the tower since."""
    known, texts = encoder.known, _listed(texts)
    if known is None or encoder.learned or any(text not in known for text in texts):
        return None
    is_trained = any(weight.requires_grad for weight in encoder.parameters())
    if is_trained or any(module._forward_hooks for module in encoder.modules()):  # a LoRA
        return None
    return torch.stack([known[text] for text in texts])


def _rows(tokens: Tensor, ids: Tensor) -> Tensor:
    """CLIP ids -> rows of a reduced embedding: 1 + place among `ids`, or 0; less than 0 stays."""
    places = torch.searchsorted(ids, tokens).clamp(max=len(ids) - 1)
    return torch.where(ids[places] == tokens, places + 1, tokens.clamp(max=0))


def _ids(learned: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """The ids of learned words: -1, -2 …, as many for each as it has vectors."""
    ends = accumulate(len(vectors) for vectors in learned.values())
    return {
        word: [-1 - k for k in range(end - len(vectors), end)]
        for (word, vectors), end in zip(learned.items(), ends, strict=True)
    }


def _table(learned: Mapping[str, Tensor]) -> Tensor | None:
    """The vectors of all learned words, by rows."""
    return torch.cat(list(learned.values())) if learned else None


def _blocks_run(layer: str, layer_idx: int | None, layers: int) -> int:
    """How many blocks lead to hidden state `layer_idx` of layers + 1, counted from either end."""
    if layer != "hidden":
        return layers
    if layer_idx is None or not -layers - 1 <= layer_idx <= layers:
        raise ValueError(
            f'layer "hidden" needs a layer_idx from {-layers - 1} to {layers}, got `{layer_idx}`'
        )
    return layer_idx % (layers + 1)


def _chosen(value: str, allowed: tuple[str, ...], what: str = "layer") -> str:
    if value not in allowed:
        raise ValueError(f"unknown {what} `{value}`, choose one of {', '.join(allowed)}")
    return value


def _listed(texts: Sequence[str] | str) -> Sequence[str]:
    return [texts] if isinstance(texts, str) else texts

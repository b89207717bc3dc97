"""The text encoder of latent-diffusion, called BERT there, and with BERT's vocabulary.

It is a plain transformer encoder, which was trained together with the UNet. All tokens attend to
all others, padding included.

    text --tokenize--> (B, 77) --embed--> (B, 77, D) --blocks--> --final norm--> (B, 77, D)

Rombach et al. 2022 (arXiv:2112.10752), appendix E.2.1.
"""

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from typing_extensions import Unpack

from ldm.conditioning import Encoder, EncoderOptions, Slot
from ldm.encoders import wordpiece
from ldm.nets.attention import attention
from ldm.nets.blocks import Layer, LayerNorm, Linear
from ldm.nets.transformer import FeedForward
from ldm.prompts.prompt import Prompt
from ldm.runtime.errors import ArgumentError

__all__ = ["BERTText", "TokenTransformer"]

HEADS, HEAD_DIM = 8, 64  # at any width


class BERTText(Encoder):
    """Texts, or token ids, -> context (B, N, D) of the hidden states after the final norm.

    A drop rate for all encoders applies to this one only if `null` is set, as it is for texts.

    Args:
        n_embed: D.
        n_layer: Blocks.
        max_seq_len: Tokens per text, N; token ids may have fewer.
        use_tokenizer: Whether the input is texts; else token ids (B, n) int64.
        embedding_dropout: Dropout of the embedded tokens in training.
        key: Batch key of the input.
    """

    IGNORED_PARAMS: ClassVar[frozenset[str]] = frozenset({"device"})
    slot: Slot = "crossattn"

    def __init__(
        self,
        *,
        n_embed: int,
        n_layer: int,
        vocab_size: int = wordpiece.VOCAB_SIZE,
        max_seq_len: int = 77,
        use_tokenizer: bool = True,
        embedding_dropout: float = 0.0,
        key: str = "txt",
        **options: Unpack[EncoderOptions],
    ) -> None:
        super().__init__(**options)
        if use_tokenizer and self.null is None:
            self.null = ""
        self.droppable = self.null is not None
        self.key = key
        self.length = max_seq_len
        self.use_tokenizer = use_tokenizer
        self.transformer = TokenTransformer(
            vocab_size=vocab_size,
            length=max_seq_len,
            width=n_embed,
            layers=n_layer,
            dropout=embedding_dropout,
        )

    def find_truncated_text(self, text: str) -> str:
        """Return the end of a text that exceeds `length` tokens; "" if the text fits."""
        return wordpiece.find_truncated_text(text, self.length)

    def forward(self, prompts: Tensor | Sequence[str | Prompt]) -> Tensor:
        """Encode texts, or token ids (B, n)."""
        tokens = prompts
        if not isinstance(tokens, Tensor):
            texts = [text for text in tokens if not isinstance(text, Prompt)]
            if len(texts) < len(tokens):
                raise ArgumentError("this text encoder supports the syntax `plain` only", "syntax")
            tokens = wordpiece.tokenize(texts, self.length)
        context: Tensor = self.transformer(tokens.to(self.transformer.token_emb.weight.device))
        return context  # (B, N, D)


class TokenTransformer(nn.Module):
    """Embeds tokens and positions, and runs pre-norm blocks of attention and MLP.

    Parameter names are those of the original: in `attn_layers.layers`, attention and MLP alternate,
    each with its norm.
    """

    def __init__(
        self, *, vocab_size: int, length: int, width: int, layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(vocab_size, width)
        self.pos_emb = nn.ModuleDict({"emb": nn.Embedding(length, width)})
        self.emb_dropout = nn.Dropout(dropout)
        blocks = nn.ModuleList()
        for _ in range(layers):
            blocks.append(nn.ModuleList([LayerNorm(width), SelfAttention(width)]))
            blocks.append(nn.ModuleList([LayerNorm(width), FeedForward(dim=width)]))
        self.attn_layers = nn.ModuleDict({"layers": blocks})
        self.norm = LayerNorm(width)
        if not self.token_emb.weight.is_meta:
            for embedding in (self.token_emb, cast(nn.Embedding, self.pos_emb["emb"])):
                nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the hidden states (B, N, D) of tokens (B, N) int64."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.emb_dropout(self.token_emb(tokens) + self.pos_emb["emb"](positions))  # (B, N, D)
        for block in cast(nn.ModuleList, self.attn_layers["layers"]):
            norm, layer = cast(nn.ModuleList, block)
            x = x + layer(norm(x))
        hidden: Tensor = self.norm(x)
        return hidden  # (B, N, D)


class SelfAttention(Layer):
    """Multi-head self-attention of inner width HEADS * HEAD_DIM."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner_dim = HEADS * HEAD_DIM
        self.to_q = Linear(width, inner_dim, bias=False)
        self.to_k = Linear(width, inner_dim, bias=False)
        self.to_v = Linear(width, inner_dim, bias=False)
        self.to_out = Linear(inner_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = (self.to_q(x), self.to_k(x), self.to_v(x))  # (B, N, HEADS * HEAD_DIM) each
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=HEADS) for y in qkv)
        return self.to_out(rearrange(attention(q, k, v), "b h n d -> b n (h d)"))  # (B, N, D)

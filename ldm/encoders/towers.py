"""The transformers behind the text and image encoders, with the parameter names of their libraries.

Pre-norm; attention and MLP in each block. open_clip (and OpenAI's package) keeps queries, keys and
values in one matrix and transformers in three, otherwise the two text towers differ only in names
and in who applies the final norm. Text towers are causal: tokens in, one vector per token out; the
vision tower sees all patches at once and gives one vector per image. What a text or an image is,
and the choice of layer, are the business of `text.py` and `image.py`.

Radford et al. 2021 (arXiv:2103.00020); Dosovitskiy et al. 2021 (arXiv:2010.11929).
"""

import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.nets import cpu
from ldm.nets.attention import attention
from ldm.nets.blocks import Conv2d, Embedding, LayerNorm, Linear, run

VOCAB = 49408


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class OpenCLIPTower(nn.Module):
    """Embedding, causal blocks and final norm, with open_clip's parameter names."""

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        layers: int,
        embed_dim: int,
        context_length: int = 77,
        vocab_size: int = VOCAB,
        mlp_ratio: float = 4.0,
        quick_gelu: bool = False,
    ) -> None:
        super().__init__()
        activation = ACTIVATIONS["quick_gelu" if quick_gelu else "gelu"]
        hidden = int(width * mlp_ratio)
        blocks = [OpenCLIPBlock(width, heads, hidden, activation) for _ in range(layers)]
        self.token_embedding = Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.ln_final = LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, embed_dim))
        self.logit_scale = nn.Parameter(torch.full((), math.log(1 / 0.07)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small normal weights; those that end a residual branch shrink with depth."""
        if self.positional_embedding.is_meta:
            return
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=self.text_projection.shape[0] ** -0.5)
        _init_open_clip_blocks(self.transformer["resblocks"])

    def forward(self, tokens: Tensor, skip: int = 0, learned: Tensor | None = None) -> Tensor:
        """Tokens (B, N) through all blocks but the last `skip`, and the final norm."""
        x = embed(self.token_embedding, tokens, learned)  # (B, N, D)
        x = x + self.positional_embedding[: x.shape[1]]
        blocks: Any = self.transformer["resblocks"]
        mask = _causal(x)  # (N, N)
        for block in islice(blocks, len(blocks) - skip):
            x = block(x, mask)
        return self.ln_final(x)  # (B, N, D)


class VisionTower(nn.Module):
    """Patches, a class token, blocks; the class token's projection is the image's embedding.

    Parameter names are open_clip's, which are OpenAI's.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        embed_dim: int,
        mlp_ratio: float = 4.0,
        quick_gelu: bool = False,
    ) -> None:
        super().__init__()
        activation = ACTIVATIONS["quick_gelu" if quick_gelu else "gelu"]
        hidden = int(width * mlp_ratio)
        blocks = [OpenCLIPBlock(width, heads, hidden, activation) for _ in range(layers)]
        self.image_size = image_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(
            torch.empty((image_size // patch_size) ** 2 + 1, width)
        )
        self.proj = nn.Parameter(torch.empty(width, embed_dim))
        self.conv1 = Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.ln_pre = LayerNorm(width)
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.ln_post = LayerNorm(width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small normal weights, as in OpenCLIPTower."""
        if self.proj.is_meta:
            return
        for weight in (self.class_embedding, self.positional_embedding, self.proj):
            nn.init.normal_(weight, std=len(self.proj) ** -0.5)
        _init_open_clip_blocks(self.transformer["resblocks"])

    def forward(self, image: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S), S = image_size, to embeddings (B, embed_dim)."""
        patches = self.conv1(image.to(self.proj.dtype)).flatten(2).mT  # (B, P, D)
        first = self.class_embedding.expand(len(patches), 1, -1)  # (B, 1, D)
        x = torch.cat([first, patches], dim=1) + self.positional_embedding  # (B, 1 + P, D)
        x = self.ln_pre(x)
        blocks: Any = self.transformer["resblocks"]
        for block in blocks:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj  # (B, embed_dim)


class OpenCLIPBlock(nn.Module):
    """Pre-norm attention and MLP, open_clip's names."""

    def __init__(
        self, width: int, heads: int, hidden: int, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.use_checkpoint = False
        self.ln_1 = LayerNorm(width)
        self.attn = FusedAttention(width, heads)
        self.ln_2 = LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": Linear(width, hidden), "c_proj": Linear(hidden, width)})
        self.activation = activation

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return run(self._forward, x, mask, recompute=self.use_checkpoint)

    def _forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask)  # (B, N, D)
        h = self.activation(self.mlp["c_fc"](self.ln_2(x)))  # (B, N, hidden)
        return x + self.mlp["c_proj"](h)  # (B, N, D)


class FusedAttention(nn.Module):
    """Self-attention with queries, keys and values in one matrix, open_clip's names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.in_proj = Product()
        self.out_proj = Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        qkv = self.in_proj(x, self.in_proj_weight, self.in_proj_bias)  # (B, N, 3 D)
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        y = attention(q, k, v, mask)  # (B, heads, N, d)
        return self.out_proj(rearrange(y, "b h n d -> b n (h d)"))  # (B, N, D)


class Product(nn.Module):
    """x W^T + b, where the parameters are its owner's; a module, so that hooks find it."""

    def __init__(self) -> None:
        super().__init__()
        self.packs = cpu.Packs()

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return cpu.linear(self.packs, x, weight, bias)  # (B, N, D_out)

    def _apply(self, *args: Any, **kwargs: Any) -> "Product":
        self.packs = cpu.Packs()
        return super()._apply(*args, **kwargs)


class CLIPTower(nn.Module):
    """Embeddings, causal blocks and (not applied here) the final norm, transformers' names."""

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        max_position_embeddings: int,
        hidden_act: str,
        layer_norm_eps: float,
    ) -> None:
        super().__init__()
        width, eps = hidden_size, layer_norm_eps
        activation = ACTIVATIONS[hidden_act]
        blocks = [
            CLIPBlock(width, num_attention_heads, intermediate_size, activation, eps)
            for _ in range(num_hidden_layers)
        ]
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": Embedding(vocab_size, width),
                "position_embedding": Embedding(max_position_embeddings, width),
            }
        )
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
        self.final_layer_norm = LayerNorm(width, eps=eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small normal weights, as in OpenCLIPTower."""
        if self.final_layer_norm.weight.is_meta:
            return
        for weight in self.embeddings.parameters():
            nn.init.normal_(weight, std=0.02)
        blocks: Any = self.encoder["layers"]
        for block in blocks:
            attn, mlp = block.self_attn, block.mlp
            inputs = [attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight]
            _init_block(len(blocks), inputs, mlp["fc1"], [attn.out_proj, mlp["fc2"]])

    def forward(self, tokens: Tensor, count: int, learned: Tensor | None = None) -> Tensor:
        """Tokens (B, N) through the first `count` blocks."""
        table: Any = self.embeddings["position_embedding"].weight
        x = embed(self.embeddings["token_embedding"], tokens, learned)  # (B, N, D)
        x = x + table[: x.shape[1]]
        mask = _causal(x)  # (N, N)
        blocks: Any = self.encoder["layers"]
        for block in islice(blocks, count):
            x = block(x, mask)
        return x  # (B, N, D)


class CLIPBlock(nn.Module):
    """Pre-norm causal attention and MLP, transformers' names."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        activation: Callable[[Tensor], Tensor],
        eps: float,
    ) -> None:
        super().__init__()
        self.use_checkpoint = False
        self.layer_norm1 = LayerNorm(width, eps=eps)
        self.self_attn = SplitAttention(width, heads)
        self.layer_norm2 = LayerNorm(width, eps=eps)
        self.mlp = nn.ModuleDict({"fc1": Linear(width, hidden), "fc2": Linear(hidden, width)})
        self.activation = activation

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return run(self._forward, x, mask, recompute=self.use_checkpoint)

    def _forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)  # (B, N, D)
        h = self.activation(self.mlp["fc1"](self.layer_norm2(x)))  # (B, N, hidden)
        return x + self.mlp["fc2"](h)  # (B, N, D)


class SplitAttention(nn.Module):
    """Causal self-attention with three input matrices, transformers' names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = Linear(width, width), Linear(width, width)
        self.v_proj, self.out_proj = Linear(width, width), Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        qkv = (self.q_proj(x), self.k_proj(x), self.v_proj(x))  # (B, N, D) each
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=self.heads) for y in qkv)
        y = attention(q, k, v, mask)  # (B, heads, N, d)
        return self.out_proj(rearrange(y, "b h n d -> b n (h d)"))  # (B, N, D)


def embed(table: nn.Module, tokens: Tensor, learned: Tensor | None) -> Tensor:
    """The vectors of tokens (B, N), where token -1 - k means row k of `learned`."""
    if learned is None:
        return table(tokens)
    x = table(tokens.clamp(min=0))  # (B, N, D)
    new = learned.to(x)[(-1 - tokens).clamp(min=0)]
    return torch.where((tokens < 0)[..., None], new, x)  # (B, N, D)


def _causal(x: Tensor) -> Tensor:
    """Each token sees itself and those before it: (N, N) bool."""
    n = x.shape[1]
    return torch.ones(n, n, dtype=torch.bool, device=x.device).tril()


def _init_open_clip_blocks(blocks: Any) -> None:
    for block in blocks:
        attn, mlp = block.attn, block.mlp
        outputs = [attn.out_proj, mlp["c_proj"]]
        _init_block(len(blocks), [attn.in_proj_weight], mlp["c_fc"], outputs)


def _init_block(
    layers: int, inputs: Sequence[Tensor], hidden: Linear, outputs: Sequence[Linear]
) -> None:
    width = hidden.in_features
    nn.init.normal_(hidden.weight, std=(2 * width) ** -0.5)
    for weight in inputs:
        nn.init.normal_(weight, std=width**-0.5)
    for linear in outputs:
        nn.init.normal_(linear.weight, std=(2 * width * layers) ** -0.5)

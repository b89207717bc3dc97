"""CLIP's transformers, with the parameter names of open_clip and of transformers.

open_clip, like OpenAI's package, has one matrix for queries, keys and values; transformers has
three. Text towers are causal and return a vector per token, the vision tower one per image.

Radford et al. 2021 (arXiv:2103.00020); Dosovitskiy et al. 2021 (arXiv:2010.11929).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.conditioning import Config
from ldm.encoders import tokenizer
from ldm.nets import cpu
from ldm.nets.attention import attention
from ldm.nets.blocks import CheckpointedLayer, Conv2d, Layer, LayerNorm, Linear
from ldm.runtime.errors import ArgumentError

VOCAB_SIZE = 49408  # of CLIP's tokenizer


def quick_gelu(x: Tensor) -> Tensor:
    """Approximate GELU by a sigmoid, as OpenAI's CLIP does."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class TextComponents(NamedTuple):
    """The components of a text tower, which subclasses name differently."""

    token_embedding: nn.Embedding
    positions: Tensor  # (maximum N, D)
    blocks: Sequence[CheckpointedLayer]
    final_norm: LayerNorm


class TextTower(nn.Module, ABC):
    """Base class of text towers: embedding, causal blocks, final norm."""

    @property
    @abstractmethod
    def components(self) -> TextComponents:
        """The components that `forward` runs."""

    def project(self, pooled: Tensor) -> Tensor:
        """Project the pooled output (B, D); this class returns it unchanged."""
        return pooled

    def forward(
        self,
        tokens: Tensor,
        num_blocks: int,
        added_embeddings: Tensor | None = None,
        *,
        normalize: bool = True,
        eos_positions: Tensor | None = None,
        is_masked: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the first `num_blocks` blocks on tokens (B, N).

        Args:
            added_embeddings: Vectors of textual inversions, see `embed_tokens`; None = no vectors.
            normalize: Whether the final norm follows.
            eos_positions: Positions (B,) of the EOS tokens, whose vectors after all blocks, the
                final norm and the projection are the pooled output; None = no pooled output.
            is_masked: Tokens to mask in attention, bool (B, N), never the first of a prompt; None =
                no token is masked.

        Returns:
            Vectors of the tokens (B, N, D), and the pooled output, if any.
        """
        embedding, positions, blocks, final_norm = self.components
        x = embed_tokens(embedding, tokens, added_embeddings)  # (B, N, D)
        x = x + positions[: tokens.shape[1]]
        x = run_causal(blocks[:num_blocks], x, is_masked)
        pooled = None
        if eos_positions is not None:
            final = final_norm(run_causal(blocks[num_blocks:], x, is_masked))
            pooled = self.project(select_tokens(final, eos_positions))
        return final_norm(x) if normalize else x, pooled


class OpenCLIPTower(TextTower):
    """Text tower with open_clip's parameter names.

    Args:
        width: Features per token.
        embed_dim: Features of CLIP's joint embedding space, for `text_projection`.
        mlp_ratio: Hidden features of the MLPs as a multiple of `width`.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        layers: int,
        embed_dim: int,
        context_length: int = 77,
        vocab_size: int = VOCAB_SIZE,
        mlp_ratio: float = 4.0,
        quick_gelu: bool = False,
    ) -> None:
        super().__init__()
        blocks = [OpenCLIPBlock(width, heads, mlp_ratio, quick_gelu) for _ in range(layers)]
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.ln_final = LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, embed_dim))
        self.logit_scale = nn.Parameter(torch.full((), math.log(1 / 0.07)))
        self.reset_parameters()

    @property
    def blocks(self) -> Sequence["OpenCLIPBlock"]:
        return cast("Sequence[OpenCLIPBlock]", self.transformer["resblocks"])

    def reset_parameters(self) -> None:
        """Draw initial weights, unless on the meta device."""
        if self.positional_embedding.is_meta:
            return
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=self.text_projection.shape[0] ** -0.5)
        _init_open_clip_blocks(self.blocks)

    @property
    def components(self) -> TextComponents:
        embedding, positions = self.token_embedding, self.positional_embedding
        return TextComponents(embedding, positions, self.blocks, self.ln_final)

    def project(self, pooled: Tensor) -> Tensor:
        return pooled @ self.text_projection  # (B, embed_dim)


class VisionTower(nn.Module):
    """Vision transformer with the parameter names of open_clip and of OpenAI.

    The embedding of an image is the projection of the class token.
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
        blocks = [OpenCLIPBlock(width, heads, mlp_ratio, quick_gelu) for _ in range(layers)]
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

    @property
    def blocks(self) -> Sequence["OpenCLIPBlock"]:
        return cast("Sequence[OpenCLIPBlock]", self.transformer["resblocks"])

    def reset_parameters(self) -> None:
        """Draw initial weights, unless on the meta device."""
        if self.proj.is_meta:
            return
        for weight in (self.class_embedding, self.positional_embedding, self.proj):
            nn.init.normal_(weight, std=len(self.proj) ** -0.5)
        _init_open_clip_blocks(self.blocks)

    def forward(self, image: Tensor) -> Tensor:
        """Embed normalized images (B, 3, S, S) as (B, embed_dim)."""
        patches = self.conv1(image.to(self.proj.dtype)).flatten(2).mT  # (B, P, D)
        cls = self.class_embedding.expand(len(patches), 1, -1)  # (B, 1, D)
        x = torch.cat([cls, patches], dim=1) + self.positional_embedding  # (B, 1 + P, D)
        x = self.ln_pre(x)
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj


class CLIP(OpenCLIPTower):
    """Text tower and vision tower `visual`, as in OpenAI's and open_clip's files."""

    def __init__(self, text: Config, vision: Config) -> None:
        super().__init__(**text)
        shared = {"embed_dim": text["embed_dim"], "quick_gelu": text.get("quick_gelu", False)}
        self.visual = VisionTower(**vision, **shared)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return embeddings (B, embed_dim), not normalized, of texts truncated to 77 tokens."""
        context_length = len(self.positional_embedding)
        tokens = tokenizer.tokenize(texts, tokenizer.OPEN_CLIP, context_length)
        tokens = tokens.to(self.text_projection.device)
        eos_positions = (tokens == tokenizer.EOS_ID).int().argmax(dim=1)
        _, pooled = self(tokens, len(self.blocks), eos_positions=eos_positions)
        assert isinstance(pooled, Tensor)
        return pooled


class OpenCLIPBlock(CheckpointedLayer):
    """Pre-norm attention and MLP with open_clip's parameter names."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, quick_gelu: bool) -> None:
        super().__init__()
        mlp_width = int(width * mlp_ratio)
        self.ln_1 = LayerNorm(width)
        self.attn = FusedAttention(width, heads)
        self.ln_2 = LayerNorm(width)
        self.mlp = nn.ModuleDict(
            {"c_fc": Linear(width, mlp_width), "c_proj": Linear(mlp_width, width)}
        )
        self.activation = ACTIVATIONS["quick_gelu" if quick_gelu else "gelu"]

    def compute(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask)  # (B, N, D)
        h = self.activation(self.mlp["c_fc"](self.ln_2(x)))  # (B, N, mlp_width)
        x = x + self.mlp["c_proj"](h)
        return x  # (B, N, D)


class FusedAttention(Layer):
    """Self-attention with one matrix for queries, keys and values; open_clip's parameter names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        _check_heads(width, heads)
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.in_proj = FunctionalLinear()
        self.out_proj = Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        qkv = self.in_proj(x, self.in_proj_weight, self.in_proj_bias)  # (B, N, 3 D)
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        y = attention(q, k, v, mask)  # (B, heads, N, d)
        return self.out_proj(rearrange(y, "b h n d -> b n (h d)"))  # (B, N, D)


class FunctionalLinear(nn.Module):
    """x W^T + b with the caller's parameters: a module, so that LoRAs can hook it."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return cpu.linear(x, weight, bias)  # (B, N, D_out)


class CLIPTower(TextTower):
    """Text tower with transformers' parameter names; arguments as in their CLIPTextConfig."""

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
                "token_embedding": nn.Embedding(vocab_size, width),
                "position_embedding": nn.Embedding(max_position_embeddings, width),
            }
        )
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
        self.final_layer_norm = LayerNorm(width, eps=eps)
        self.reset_parameters()

    @property
    def blocks(self) -> Sequence["CLIPBlock"]:
        return cast("Sequence[CLIPBlock]", self.encoder["layers"])

    @property
    def token_embedding(self) -> nn.Embedding:
        return cast(nn.Embedding, self.embeddings["token_embedding"])

    def reset_parameters(self) -> None:
        """Draw initial weights, unless on the meta device."""
        if self.final_layer_norm.weight.is_meta:
            return
        for weight in self.embeddings.parameters():
            nn.init.normal_(weight, std=0.02)
        for block in self.blocks:
            attn, mlp = block.self_attn, block.mlp
            qkv_weights = [attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight]
            _init_block(len(self.blocks), qkv_weights, mlp["fc1"], [attn.out_proj, mlp["fc2"]])

    @property
    def components(self) -> TextComponents:
        positions = cast(nn.Embedding, self.embeddings["position_embedding"]).weight
        return TextComponents(self.token_embedding, positions, self.blocks, self.final_layer_norm)


class CLIPBlock(CheckpointedLayer):
    """Pre-norm attention and MLP with transformers' parameter names."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        activation: Callable[[Tensor], Tensor],
        eps: float,
    ) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(width, eps=eps)
        self.self_attn = SplitAttention(width, heads)
        self.layer_norm2 = LayerNorm(width, eps=eps)
        self.mlp = nn.ModuleDict({"fc1": Linear(width, mlp_width), "fc2": Linear(mlp_width, width)})
        self.activation = activation

    def compute(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)  # (B, N, D)
        h = self.activation(self.mlp["fc1"](self.layer_norm2(x)))  # (B, N, mlp_width)
        x = x + self.mlp["fc2"](h)
        return x  # (B, N, D)


class SplitAttention(Layer):
    """Self-attention with separate input matrices; transformers' parameter names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        _check_heads(width, heads)
        self.heads = heads
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.out_proj = Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        qkv = (self.q_proj(x), self.k_proj(x), self.v_proj(x))  # (B, N, D) each
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=self.heads) for y in qkv)
        y = attention(q, k, v, mask)  # (B, heads, N, d)
        return self.out_proj(rearrange(y, "b h n d -> b n (h d)"))  # (B, N, D)


def embed_tokens(embedding: nn.Module, tokens: Tensor, added_embeddings: Tensor | None) -> Tensor:
    """Embed tokens (B, N) as (B, N, D); token -1 - k has the row k of `added_embeddings` (n, D)."""
    if added_embeddings is None:
        return cast(Tensor, embedding(tokens))
    x: Tensor = embedding(tokens.clamp(min=0))  # (B, N, D)
    added_x = added_embeddings.to(x)[(-1 - tokens).clamp(min=0)]
    return torch.where((tokens < 0)[..., None], added_x, x)  # (B, N, D)


def run_causal(
    blocks: Sequence[CheckpointedLayer], x: Tensor, is_masked: Tensor | None = None
) -> Tensor:
    """Run blocks on x (B, N, D); tokens attend to themselves and earlier ones, unless masked."""
    n = x.shape[1]
    mask = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
    if is_masked is not None:
        mask = mask & ~is_masked[:, None, None, :]  # (B, 1, N, N)
    for block in blocks:
        x = block(x, mask)
    return x  # (B, N, D)


def select_tokens(x: Tensor, positions: Tensor) -> Tensor:
    """Return the vectors (B, D) of x (B, N, D) at one position (B,) of each sample."""
    return x[torch.arange(len(x), device=x.device), positions]


def _check_heads(width: int, heads: int) -> None:
    if heads < 1 or width % heads:
        raise ArgumentError(f"a width of {width} cannot be divided into {heads} heads")


def _init_open_clip_blocks(blocks: Sequence[OpenCLIPBlock]) -> None:
    for block in blocks:
        attn, mlp = block.attn, block.mlp
        output_layers = [attn.out_proj, mlp["c_proj"]]
        _init_block(len(blocks), [attn.in_proj_weight], mlp["c_fc"], output_layers)


def _init_block(
    num_blocks: int,
    qkv_weights: Sequence[Tensor],
    mlp_in: nn.Module,
    output_layers: Sequence[nn.Module],
) -> None:
    """Initialize one of `num_blocks` blocks; `output_layers` are the last ones of both branches."""
    width = qkv_weights[0].shape[1]
    # Standard deviations of OpenAI's CLIP: a deeper tower adds less in each residual branch.
    nn.init.normal_(cast(Linear, mlp_in).weight, std=(2 * width) ** -0.5)
    for weight in qkv_weights:
        nn.init.normal_(weight, std=width**-0.5)
    for linear in output_layers:
        nn.init.normal_(cast(Linear, linear).weight, std=(2 * width * num_blocks) ** -0.5)

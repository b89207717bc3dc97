"""The Karlo prior: predicts a clean CLIP image embedding from a noisy one and a text.

A causal transformer over one sequence; its output for the last token is the prediction.

    [ text tokens … | text embedding | timestep | noisy embedding | a learned query ]
      N               1                1          1                 1

Parameter names are Karlo's. unCLIP: Ramesh et al. 2022 (arXiv:2204.06125), section 2.2.
"""

from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.nets.attention import attention
from ldm.nets.blocks import Layer, LayerNorm, Linear, timestep_embedding

__all__ = ["Prior"]


class Prior(Layer):
    """Predicts x0 of an embedding, with the signature of a UNet: (x, timesteps, context=…, y=…).

    Embeddings are normalized by the mean and standard deviation of CLIP image embeddings.

    Args:
        clip_dim: Features D of embeddings and text tokens.
        text_ctx: Number N of text tokens.
        xf_width: Features W of the transformer's tokens.
        xf_layers, xf_heads: Number of blocks, and of attention heads in each.
        xf_final_ln: Whether a layer norm follows the last block.
    """

    IGNORED_PARAMS: ClassVar[frozenset[str]] = frozenset({"text_drop"})

    def __init__(
        self,
        *,
        clip_dim: int = 768,
        text_ctx: int = 77,
        xf_width: int = 2048,
        xf_layers: int = 20,
        xf_heads: int = 32,
        xf_final_ln: bool = True,
    ) -> None:
        super().__init__()
        width = xf_width
        self.time_embed = nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, width))
        self.text_enc_proj = Linear(clip_dim, width)
        self.text_emb_proj = Linear(clip_dim, width)
        self.clip_img_proj = Linear(clip_dim, width)
        self.out_proj = Linear(width, clip_dim)
        blocks = [PriorBlock(width, xf_heads) for _ in range(xf_layers)]
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.final_ln = LayerNorm(width) if xf_final_ln else nn.Identity()
        self.positional_embedding = nn.Parameter(torch.empty(1, text_ctx + 4, width))
        self.prd_emb = nn.Parameter(torch.empty(1, 1, width))
        nn.init.normal_(self.prd_emb, std=0.01)
        nn.init.normal_(self.positional_embedding, std=0.01)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, in which the prior computes."""
        return self.prd_emb.dtype

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor) -> Tensor:
        """Predict clean embeddings (B, D).

        Args:
            x: Noisy embeddings (B, D).
            timesteps: (B,), of the prior's noise schedule.
            context: Text tokens (B, N, D); all-zero tokens are padding and masked.
            y: Text embeddings (B, D).
        """
        t = timestep_embedding(timesteps, self.prd_emb.shape[-1]).to(self.dtype)
        tokens = [
            self.text_enc_proj(context.to(self.dtype)),  # (B, N, W)
            self.text_emb_proj(y.to(self.dtype))[:, None],  # (B, 1, W)
            self.time_embed(t)[:, None],
            self.clip_img_proj(x.to(self.dtype))[:, None],
            self.prd_emb.expand(len(x), -1, -1),  # the learned query
        ]
        h = torch.cat(tokens, dim=1) + self.positional_embedding  # (B, N + 4, W)
        mask = _build_mask(context, h.shape[1])  # (B, 1, N + 4, N + 4)
        for block in cast(nn.ModuleList, self.transformer["resblocks"]):
            h = block(h, mask)
        return self.out_proj(self.final_ln(h[:, -1])).to(x.dtype)  # (B, D)


class PriorBlock(Layer):
    """Pre-norm attention and MLP, with Karlo's names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attn = nn.ModuleDict(
            {"c_qkv": Linear(width, 3 * width), "c_proj": Linear(width, width)}
        )
        self.ln_1 = LayerNorm(width)
        self.mlp = nn.ModuleDict(
            {"c_fc": Linear(width, 4 * width), "c_proj": Linear(4 * width, width)}
        )
        self.ln_2 = LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        qkv = self.attn["c_qkv"](self.ln_1(x))  # (B, N, 3 W): q, k, v of the first head, …
        q, k, v = rearrange(qkv, "b n (h three d) -> three b h n d", three=3, h=self.heads)
        y = rearrange(attention(q, k, v, mask), "b h n d -> b n (h d)")  # (B, N, W)
        x = x + self.attn["c_proj"](y)
        x = x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))
        return x  # (B, N, W)


def _build_mask(context: Tensor, length: int) -> Tensor:
    """Build a mask (B, 1, N, N): tokens attend to themselves and to earlier non-padding tokens."""
    is_not_padding = F.pad(context.ne(0).any(dim=-1), (0, length - context.shape[1]), value=True)
    ones = torch.ones(length, length, dtype=torch.bool, device=context.device)
    causal, diagonal = ones.tril(), torch.eye(length, dtype=torch.bool, device=context.device)
    return (is_not_padding[:, None, None] & causal) | diagonal

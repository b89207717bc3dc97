"""`ldm.modules.attention` of the original: the transformer of the UNet.

Classes derive from those of `ldm.nets.transformer`, but have torch's own layers. Layers, methods
and functions of this module are looked up at call time, so that they can be monkeypatched.
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from ldm.compat.class_swap import COMPAT_CLASSES, CompatModule, swap_classes
from ldm.compat.diffusion_util import checkpoint as checkpoint, zero_module as zero_module
from ldm.compat.model import Normalize as Normalize
from ldm.compat.util import default as default, exists as exists, to_builtin
from ldm.nets import transformer
from ldm.nets.attention import attention

XFORMERS_IS_AVAILBLE = False  # (sic) no class depends on it: `ldm.nets.attention` chooses kernels


class GEGLU(CompatModule, transformer.GEGLU):
    """value * gelu(gate), both halves of one projection, the value first."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__(dim_in=dim_in, dim_out=dim_out)
        swap_classes(self)


class FeedForward(CompatModule, transformer.FeedForward):
    """MLP with one hidden layer, with GEGLU if `glu`, else GELU."""

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        mult: int = 4,
        glu: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim=dim, dim_out=dim_out, mult=mult, glu=glu, dropout=dropout)
        swap_classes(self)

    def forward(self, x: Tensor) -> Tensor:
        # Not in chunks, unlike in `ldm.nets`: third-party code hooks and replaces layers of `net`.
        out: Tensor = self.net(x)
        return out


class CrossAttention(CompatModule, transformer.CrossAttention):
    """Attention of x to a context, or of x to itself."""

    scale: float

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            query_dim=query_dim,
            context_dim=context_dim,
            heads=heads,
            dim_head=dim_head,
            dropout=dropout,
        )
        swap_classes(self)

    def set_original_attributes(self) -> None:
        self.scale = (self.to_q.out_features // self.heads) ** -0.5

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Attend from x (B, N, query_dim) to the context (B, M, context_dim), or to x.

        Args:
            mask: Tokens of the context to keep, bool (B, M); None keeps all.
        """
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        if mask is not None:
            mask = mask.flatten(1)[:, None, None]
        q, k, v = self._split_heads(q), self._split_heads(k), self._split_heads(v)
        h = attention(q, k, v, mask)  # (B, heads, N, d)
        out: Tensor = self.to_out(h.transpose(1, 2).flatten(2))  # (B, N, query_dim)
        return out


MemoryEfficientCrossAttention = CrossAttention


class BasicTransformerBlock(CompatModule, transformer.TransformerBlock):
    """Self-attention, cross-attention, feed-forward, each with LayerNorm and residual connection.

    Attributes:
        checkpoint: Whether activations are recomputed in the backward pass; callers may set it.
    """

    ATTENTION_MODES: ClassVar[dict[str, type[nn.Module]]] = {
        "softmax": CrossAttention,
        "softmax-xformers": MemoryEfficientCrossAttention,
    }
    checkpoint: bool

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        gated_ff: bool = True,
        checkpoint: bool = True,
        disable_self_attn: bool = False,
    ) -> None:
        super().__init__(
            dim=dim,
            n_heads=n_heads,
            d_head=d_head,
            dropout=dropout,
            context_dim=context_dim,
            gated_ff=gated_ff,
            use_checkpoint=checkpoint,
            disable_self_attn=disable_self_attn,
        )
        swap_classes(self)

    def set_original_attributes(self) -> None:
        self.checkpoint = self.use_checkpoint
        del self.use_checkpoint

    def forward(  # type: ignore[override]
        self, x: Tensor, context: Tensor | None = None
    ) -> Tensor:
        """Transform x (B, N, dim), attending to the context (B, M, context_dim)."""
        out: Tensor = checkpoint(self._forward, (x, context), self.parameters(), self.checkpoint)
        return out

    def _forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        # `context` is passed by keyword, as functions that replace `forward` have this parameter.
        x = self.attn1(self.norm1(x), context=context if self.disable_self_attn else None) + x
        x = self.attn2(self.norm2(x), context=context) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(CompatModule, transformer.SpatialTransformer):
    """Transformer blocks over the positions of a feature map, with a residual connection."""

    in_channels: int

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | Sequence[int] | None = None,
        disable_self_attn: bool = False,
        use_linear: bool = False,
        use_checkpoint: bool = True,
    ) -> None:
        if isinstance(context_dim, Sequence) and len(context_dim) == 1:
            context_dim = context_dim[0]
        super().__init__(
            in_channels=in_channels,
            n_heads=n_heads,
            d_head=d_head,
            depth=depth,
            dropout=dropout,
            context_dim=to_builtin(context_dim),
            disable_self_attn=disable_self_attn,
            use_linear=use_linear,
            use_checkpoint=use_checkpoint,
        )
        swap_classes(self)

    def set_original_attributes(self) -> None:
        self.in_channels = self.norm.num_channels

    def forward(self, x: Tensor, context: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        """Attend over the positions of x (B, C, h, w) and to the context.

        Args:
            context: (B, M, D) for all blocks, or a list of one per block; None = self-attention.
        """
        blocks = self.transformer_blocks
        contexts = context if isinstance(context, (list, tuple)) else [context] * len(blocks)
        h = self.norm(x)  # (B, C, h, w)
        # (B, h w, C)
        h = self.proj_in(_to_tokens(h)) if self.use_linear else _to_tokens(self.proj_in(h))
        for block, block_context in zip(blocks, contexts, strict=True):
            h = block(h, context=block_context)
        # (B, C, h, w)
        if self.use_linear:
            return _to_feature_map(self.proj_out(h), x) + x
        out: Tensor = self.proj_out(_to_feature_map(h, x))
        return out + x


def _to_tokens(x: Tensor) -> Tensor:
    # Contiguous, as third-party code calls `view` on feature maps.
    return x.flatten(2).transpose(1, 2).contiguous()  # (B, h w, C)


def _to_feature_map(tokens: Tensor, x: Tensor) -> Tensor:
    return tokens.transpose(1, 2).reshape(len(x), -1, *x.shape[-2:]).contiguous()  # (B, C, h, w)


COMPAT_CLASSES.update(
    {
        transformer.GEGLU: GEGLU,
        transformer.FeedForward: FeedForward,
        transformer.ContextLinear: nn.Linear,
        transformer.CrossAttention: CrossAttention,
        transformer.TransformerBlock: BasicTransformerBlock,
        transformer.SpatialTransformer: SpatialTransformer,
    }
)

"""The UNet: (noisy latent, timestep, conditions) -> prediction of eps, v or x0.

    x ── input_blocks ──> middle_block ──> output_blocks ──> out
              └── one skip connection per input block ──┘

Ronneberger et al. 2015 (arXiv:1505.04597); Dhariwal and Nichol 2021 (arXiv:2105.05233);
Rombach et al. 2022 (arXiv:2112.10752).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ldm.nets.blocks import (
    Conv2d,
    Downsample,
    GroupNorm,
    Linear,
    ResBlock,
    Upsample,
    timestep_embedding,
    zero_module,
)
from ldm.nets.freeu import FreeU
from ldm.nets.perturbation import find_self_attentions, perturb_self_attention
from ldm.nets.transformer import AttentionBlock, SpatialTransformer

__all__ = ["UNet"]

Context = Tensor | Sequence[Tensor] | None
TransformerDepth = int | Sequence[int] | Sequence[Sequence[int]]

# Settings that may be lists with one entry per level.
PER_LEVEL_SETTINGS = (
    "num_res_blocks",
    "transformer_depth",
    "disable_self_attentions",
    "num_attention_blocks",
)


class UNetBlock(nn.Sequential):
    """An input, middle or output block: layers, each called with the conditions that it takes."""

    def forward(  # type: ignore[override]
        self, x: Tensor, emb: Tensor, context: Context, size: torch.Size | None = None
    ) -> Tensor:
        """Run the layers on x (B, C, h, w).

        Args:
            emb: Embedding of timestep and `y`, (B, 4 model_channels).
            size: (height, width) of the next skip connection, which an Upsample has to match;
                None = twice the size of x.
        """
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x


@dataclass(kw_only=True, eq=False, repr=False)
class UNet(nn.Module):
    """The denoising network. Its arguments are those of `unet_config` in the original's YAML.

    Level i has `channel_mult[i] * model_channels` channels, and feature maps downscaled by
    2 ** i.
    """

    IGNORED_PARAMS: ClassVar[frozenset[str]] = frozenset(
        {"image_size", "use_fp16", "use_bf16", "spatial_transformer_attn_type"}
    )

    in_channels: int  # channels of the latent and of what is concatenated with it
    model_channels: int  # channels of the first level, a multiple of 32
    out_channels: int
    num_res_blocks: int | Sequence[int]  # per level, or a list by level; one more on the way up
    attention_resolutions: Collection[int]  # downscaling factors 2 ** i of levels with attention
    dropout: float = 0.0
    channel_mult: Sequence[int] = (1, 2, 4, 8)
    conv_resample: bool = True  # else average pooling and nearest-neighbor upsampling only
    dims: Literal[2] = 2
    # number of classes, or type of `y`, see `forward`; None = the network takes no `y`
    num_classes: int | Literal["continuous", "sequential", "timestep"] | None = None
    use_checkpoint: bool = False
    num_heads: int = -1  # -1: channels / num_head_channels
    num_head_channels: int = -1
    num_heads_upsample: int = -1  # of AttentionBlocks in output blocks; -1: num_heads
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False  # resample by residual blocks
    use_new_attention_order: bool = False
    # None = whether context_dim is given; "self": without it, all attention is self-attention
    use_spatial_transformer: bool | Literal["self"] | None = None
    # blocks per transformer; a list by level, or by level and block
    transformer_depth: TransformerDepth = 1
    transformer_depth_middle: int | None = None  # None = as in the last level; 0: one ResBlock only
    transformer_depth_output: Sequence[int] | None = None  # of each output block; None = by level
    context_dim: int | Sequence[int] | None = None  # a list if each block has its own context
    n_embed: None = None  # not supported: prediction of codebook entries
    legacy: bool = True  # features per head = channels / heads, not num_head_channels
    disable_self_attentions: Sequence[bool] | None = None  # by level: cross-attention only
    num_attention_blocks: Sequence[int] | None = None  # by level; None = all blocks
    disable_middle_self_attn: bool = False
    disable_middle_transformer: bool = False
    use_linear_in_transformer: bool = False
    adm_in_channels: int | None = None  # features of `y` for num_classes "sequential"
    time_cond_proj_dim: int | None = None  # features of `guidance_embedding`

    def __post_init__(self) -> None:
        super().__init__()
        if self.use_spatial_transformer is None:
            self.use_spatial_transformer = self.context_dim is not None
        if isinstance(self.context_dim, Sequence) and len(set(self.context_dim)) == 1:
            self.context_dim = self.context_dim[0]
        self._check_settings()
        self.emb_channels = 4 * self.model_channels
        self.time_embed = self._build_mlp(self.model_channels)
        if self.time_cond_proj_dim is not None:
            self.time_embed_cond = Linear(self.time_cond_proj_dim, self.model_channels, bias=False)
        if self.num_classes is not None:
            self.label_emb = self._build_label_emb()
        self.input_blocks, skip_channels = self._build_input_blocks()
        self.middle_block = self._build_middle_block()
        self.output_blocks = self._build_output_blocks(skip_channels)
        channels = self._level_channels[0]
        self.out = nn.Sequential(
            GroupNorm(channels),
            nn.SiLU(),
            zero_module(Conv2d(channels, self.out_channels, 3, padding=1)),
        )

    @property
    def _level_channels(self) -> list[int]:
        return [self.model_channels * mult for mult in self.channel_mult]

    @property
    def _level_num_res_blocks(self) -> Sequence[int]:
        """Residual blocks of each level on the way down; there is one more on the way up."""
        counts = self.num_res_blocks
        return [counts] * len(self.channel_mult) if isinstance(counts, int) else counts

    @property
    def has_middle_self_attention(self) -> bool:
        """Whether the middle block has self-attention in a transformer, as `perturbed` needs."""
        return bool(find_self_attentions(self.middle_block))

    @property
    def output_block_inputs(self) -> list[tuple[int, int]]:
        """(resolution index, channels) of each output block's input, without its skip connection.

        The resolution index is 0 at the lowest resolution, as `resolution_idx` in diffusers.
        """
        inputs, in_channels = [], self._level_channels[-1]
        levels = zip(self._level_channels, self._level_num_res_blocks, strict=True)
        for index, (channels, num_blocks) in enumerate(reversed(list(levels))):
            inputs += [(index, in_channels), *[(index, channels)] * num_blocks]
            in_channels = channels
        return inputs

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, in which the network computes."""
        return next(self.parameters()).dtype

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Context = None,
        y: Tensor | None = None,
        guidance_embedding: Tensor | None = None,
        perturbed: Tensor | None = None,
        freeu: FreeU | None = None,
    ) -> Tensor:
        """Predict eps, v or x0 of noisy latents, (B, out_channels, h, w) in the dtype of x.

        Args:
            x: (B, in_channels, h, w); any size if downsampling is by convolution, else multiples
                of 2 ** (levels - 1).
            timesteps: (B,), 0 … 999, may be fractional.
            context: (B, M, context_dim), or a list of one per transformer block; None for networks
                without cross-attention.
            y: Depends on num_classes: labels 0 … n - 1, (B,), for an integer n; (B, 1) for
                "continuous"; (B, adm_in_channels) for "sequential"; (B,) for "timestep".
            guidance_embedding: (B, time_cond_proj_dim), embedding of the guidance scale of a
                distilled network (arXiv:2310.04378); None = zeros.
            perturbed: Samples with identity self-attention in the middle block, bool (B,), for
                perturbed-attention guidance; None = no samples.
            freeu: Rescales the inputs of the output blocks; None leaves them unchanged.
        """
        self._check_input(x, y)
        emb = timestep_embedding(timesteps, self.model_channels).to(self.dtype)
        if guidance_embedding is not None:
            emb = emb + self.time_embed_cond(guidance_embedding.to(self.dtype))
        emb = self.time_embed(emb)  # (B, 4 model_channels)
        if y is not None:
            emb = emb + self._embed_label(y)
        context = self._cast_context(context)
        h, skips = x.to(self.dtype), []
        for block in self.input_blocks:
            h = block(h, emb, context)  # (B, C_i, h / 2^i, w / 2^i)
            skips.append(h)
        if perturbed is None:
            h = self.middle_block(h, emb, context)
        else:
            with perturb_self_attention(self.middle_block, perturbed):
                h = self.middle_block(h, emb, context)
        for i, block in enumerate(self.output_blocks):
            skip = skips.pop()
            if freeu is not None:
                h, skip = freeu(i, h, skip)
            h = torch.cat([h, skip], dim=1)  # (B, C_i + C_skip, h / 2^i, w / 2^i)
            size = skips[-1].shape[-2:] if skips else None
            h = block(h, emb, context, size)  # (B, C_i, h / 2^i, w / 2^i)
        out: Tensor = self.out(h)
        return out.to(x.dtype).contiguous()  # (B, out_channels, h, w)

    def _build_input_blocks(self) -> tuple[nn.ModuleList, list[int]]:
        """Build the input blocks; also return the channels of each, for its skip connection."""
        blocks = [UNetBlock(Conv2d(self.in_channels, self.model_channels, 3, padding=1))]
        skip_channels = [self.model_channels]
        for level, channels in enumerate(self._level_channels):
            for i in range(self._level_num_res_blocks[level]):
                layers: list[nn.Module] = [self._build_res_block(skip_channels[-1], channels)]
                if self._has_attention(level, i):
                    depth = self._get_transformer_depth(level, i)
                    layers.append(self._build_attention(channels, level, depth))
                blocks.append(UNetBlock(*layers))
                skip_channels.append(channels)
            if level < len(self._level_channels) - 1:
                blocks.append(UNetBlock(self._build_resampler(channels, up=False)))
                skip_channels.append(channels)
        return nn.ModuleList(blocks), skip_channels

    def _build_middle_block(self) -> UNetBlock:
        channels, depth = self._level_channels[-1], self.transformer_depth_middle
        if depth == 0:
            return UNetBlock(self._build_res_block(channels, channels))
        attention: nn.Module = nn.Identity()
        # Built before the residual blocks, to draw initial weights in the order of older versions.
        if not self.disable_middle_transformer:
            attention = self._build_attention(
                channels,
                len(self.channel_mult) - 1,
                self._get_transformer_depth(-1, -1) if depth is None else depth,
                disable_self_attn=self.disable_middle_self_attn,
            )
        first = self._build_res_block(channels, channels)
        return UNetBlock(first, attention, self._build_res_block(channels, channels))

    def _build_output_blocks(self, skip_channels: list[int]) -> nn.ModuleList:
        """Build an output block for each skip connection, in reverse order."""
        blocks: list[UNetBlock] = []
        depths, in_channels = self.transformer_depth_output, self._level_channels[-1]
        for level, channels in reversed(list(enumerate(self._level_channels))):
            for i in range(self._level_num_res_blocks[level] + 1):
                res_block = self._build_res_block(in_channels + skip_channels.pop(), channels)
                layers: list[nn.Module] = [res_block]
                in_channels = channels
                if self._has_attention(level, i):
                    depth = depths[len(blocks)] if depths else self._get_transformer_depth(level, i)
                    layers.append(self._build_attention(channels, level, depth, up=True))
                if level and i == self._level_num_res_blocks[level]:
                    layers.append(self._build_resampler(channels, up=True))
                blocks.append(UNetBlock(*layers))
        return nn.ModuleList(blocks)

    def _build_res_block(
        self, channels: int, out_channels: int, *, up: bool = False, down: bool = False
    ) -> ResBlock:
        return ResBlock(
            channels=channels,
            emb_channels=self.emb_channels,
            dropout=self.dropout,
            out_channels=out_channels,
            use_scale_shift_norm=self.use_scale_shift_norm,
            use_checkpoint=self.use_checkpoint,
            up=up,
            down=down,
        )

    def _build_resampler(self, channels: int, *, up: bool) -> nn.Module:
        if self.resblock_updown:
            return self._build_res_block(channels, channels, up=up, down=not up)
        resampler = Upsample if up else Downsample
        return resampler(channels, use_conv=self.conv_resample)

    def _has_attention(self, level: int, block: int) -> bool:
        counts = self.num_attention_blocks
        return 2**level in self.attention_resolutions and (counts is None or block < counts[level])

    def _get_transformer_depth(self, level: int, block: int) -> int:
        depth = self.transformer_depth
        level_depth = depth if isinstance(depth, int) else depth[level]
        return level_depth if isinstance(level_depth, int) else level_depth[block]

    def _build_attention(
        self,
        channels: int,
        level: int,
        depth: int,
        *,
        up: bool = False,
        disable_self_attn: bool | None = None,
    ) -> nn.Module:
        if not self.use_spatial_transformer:
            return self._build_attention_block(channels, up)
        heads, dim_head = self._get_heads_and_dim(channels)
        if disable_self_attn is None and self.disable_self_attentions is not None:
            disable_self_attn = self.disable_self_attentions[level]
        return SpatialTransformer(
            in_channels=channels,
            n_heads=heads,
            d_head=dim_head,
            depth=depth,
            context_dim=self.context_dim,
            disable_self_attn=bool(disable_self_attn),
            use_linear=self.use_linear_in_transformer,
            use_checkpoint=self.use_checkpoint,
        )

    def _build_attention_block(self, channels: int, up: bool) -> AttentionBlock:
        heads, _ = self._get_heads_and_dim(channels)
        if up and self.legacy and self.num_head_channels == -1 and self.num_heads_upsample != -1:
            heads = self.num_heads_upsample
        return AttentionBlock(
            channels=channels,
            num_heads=heads,
            use_checkpoint=self.use_checkpoint,
            use_new_attention_order=self.use_new_attention_order,
        )

    def _get_heads_and_dim(self, channels: int) -> tuple[int, int]:
        """Return the number of heads, and the features per head."""
        if self.num_head_channels == -1:
            return self.num_heads, channels // self.num_heads
        heads = channels // self.num_head_channels
        if not heads:
            raise ValueError(
                f"num_head_channels {self.num_head_channels} exceeds {channels} channels"
            )
        return heads, channels // heads if self.legacy else self.num_head_channels

    def _build_mlp(self, features: int) -> nn.Sequential:
        emb_channels = self.emb_channels
        return nn.Sequential(
            Linear(features, emb_channels), nn.SiLU(), Linear(emb_channels, emb_channels)
        )

    def _build_label_emb(self) -> nn.Module:
        if isinstance(self.num_classes, int):
            return nn.Embedding(self.num_classes, self.emb_channels)
        if self.num_classes == "continuous":
            return Linear(1, self.emb_channels)
        if self.num_classes == "timestep":  # the original begins with a module without weights
            return nn.Sequential(nn.Identity(), self._build_mlp(self.model_channels))
        if self.num_classes == "sequential" and self.adm_in_channels is not None:
            return nn.Sequential(self._build_mlp(self.adm_in_channels))
        raise ValueError(
            "num_classes must be an integer, `continuous`, `timestep`, or `sequential` with "
            f"adm_in_channels, got `{self.num_classes}`"
        )

    def _embed_label(self, y: Tensor) -> Tensor:
        if self.num_classes == "timestep":
            y = timestep_embedding(y, self.model_channels)
        emb: Tensor = self.label_emb(y if isinstance(self.num_classes, int) else y.to(self.dtype))
        return emb  # (B, 4 model_channels)

    def _cast_context(self, context: Context) -> Context:
        if isinstance(context, Sequence):
            return [tokens.to(self.dtype) for tokens in context]
        return None if context is None else context.to(self.dtype)

    def _check_settings(self) -> None:
        num_levels = len(self.channel_mult)
        if self.dims != 2:
            raise ValueError(f"dims `{self.dims}` is not supported, only 2 (images)")
        if self.n_embed is not None:
            raise ValueError("n_embed (prediction of codebook entries) is not supported")
        uses_num_heads = self.num_head_channels == -1
        if (self.num_heads if uses_num_heads else self.num_head_channels) < 1:
            raise ValueError(
                "num_head_channels must be at least 1, or -1 with num_heads at least 1"
            )
        has_context = self.context_dim is not None
        if self.use_spatial_transformer != has_context and self.use_spatial_transformer != "self":
            raise ValueError("use_spatial_transformer and context_dim must be given together")
        depth = self.transformer_depth
        is_by_block = isinstance(depth, Sequence) and any(isinstance(d, Sequence) for d in depth)
        if is_by_block and self.transformer_depth_output is None:
            raise ValueError("transformer_depth by block needs transformer_depth_output")
        for name in PER_LEVEL_SETTINGS:
            value = getattr(self, name)
            if isinstance(value, Sequence) and len(value) != num_levels:
                raise ValueError(f"{name} has {len(value)} entries for {num_levels} levels")
        for level, level_depth in enumerate(depth if isinstance(depth, Sequence) else ()):
            num_blocks = self._level_num_res_blocks[level]
            if (
                isinstance(level_depth, Sequence)
                and self._has_attention(level, 0)
                and len(level_depth) != num_blocks
            ):
                raise ValueError(
                    f"transformer_depth has {len(level_depth)} entries for the {num_blocks} blocks "
                    f"of level {level}"
                )
        output_depths, num_blocks = self.transformer_depth_output, len(self.output_block_inputs)
        if output_depths is not None and len(output_depths) != num_blocks:
            raise ValueError(
                f"transformer_depth_output has {len(output_depths)} entries for {num_blocks} "
                "output blocks"
            )

    def _check_input(self, x: Tensor, y: Tensor | None) -> None:
        # Average pooling rounds odd sides down; after upsampling, they no longer match the skip
        # connection.
        rounds_down = self.resblock_updown or not self.conv_resample
        factor = 2 ** (len(self.channel_mult) - 1)
        if rounds_down and (x.shape[-2] % factor or x.shape[-1] % factor):
            raise ValueError(
                f"a latent of {x.shape[-1]}x{x.shape[-2]} does not fit this UNet: both sides must "
                f"be multiples of {factor}"
            )
        if x.shape[1] != self.in_channels:
            raise ValueError(f"this UNet takes {self.in_channels} channels, got {x.shape[1]}")
        if y is None and self.num_classes is not None:
            raise ValueError(f"this UNet needs `y` (num_classes is `{self.num_classes}`)")
        if y is not None and self.num_classes is None:
            raise ValueError("this UNet takes no `y` (it has no num_classes)")

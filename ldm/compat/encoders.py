"""`ldm.modules.encoders.modules` of the original: conditioning encoders.

Nothing is downloaded: weights come from the checkpoint of the model, or from a local file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.compat.clip import CLIPTextModel, CLIPTokenizer, TextOutput
from ldm.compat.names import MISSING_ENCODERS
from ldm.compat.openaimodel import Timestep
from ldm.compat.upscaling import ImageConcatWithNoiseAugmentation
from ldm.compat.util import disabled_train as disabled_train, to_builtin
from ldm.encoders import tokenizer
from ldm.encoders.image import CLIPImage, CLIPVision, OpenCLIPImage, preprocess
from ldm.loading.files.checkpoint import read_checkpoint
from ldm.loading.files.clip_statistics import read_clip_statistics
from ldm.runtime.errors import make_unknown_name_error
from ldm.runtime.files import find_file

# open_clip always builds a vision tower: this small one is removed afterwards.
UNUSED_VISION_CONFIG = {"layers": 1, "width": 64, "patch_size": 32, "image_size": 32}


def __getattr__(name: str) -> Any:
    if name in MISSING_ENCODERS:
        # `from … import` replaces the message of an AttributeError, but not of an ImportError.
        raise ImportError(f"`{name}` is not available: {MISSING_ENCODERS[name]}", name=name)
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`")


class AbstractEncoder(nn.Module):
    """Base class of encoders; third-party code subclasses it or checks for it."""

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class IdentityEncoder(AbstractEncoder):
    """Returns the condition unchanged."""

    def encode(self, x: Any) -> Any:
        return x

    forward = encode


class ClassEmbedder(nn.Module):
    """Class labels of a batch, (B,) -> one token (B, 1, D).

    Args:
        embed_dim: D.
        key: Batch key of the labels.
        ucg_rate: Probability of replacing a label by the last class, the unconditional one.
    """

    def __init__(
        self, embed_dim: int, n_classes: int = 1000, key: str = "class", ucg_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.key = key
        self.n_classes = n_classes
        self.ucg_rate = ucg_rate
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(
        self, batch: Mapping[str, Tensor], key: str | None = None, disable_dropout: bool = False
    ) -> Tensor:
        """Encode the labels of a batch; `key` overrides the constructor's."""
        labels = batch[key or self.key][:, None]
        if self.ucg_rate > 0 and not disable_dropout:
            is_dropped = torch.bernoulli(torch.ones_like(labels) * self.ucg_rate).bool()
            labels = labels.masked_fill(is_dropped, self.n_classes - 1)
        out: Tensor = self.embedding(labels)
        return out

    def get_unconditional_conditioning(
        self, bs: int, device: str | torch.device | None = None
    ) -> dict[str, Tensor]:
        """Return a batch of `bs` labels of the last class; device None = that of the weights."""
        device = device or self.embedding.weight.device
        return {self.key: torch.full((bs,), self.n_classes - 1, device=device)}


class SpatialRescaler(nn.Module):
    """Resizes a spatial condition (B, C, h, w), such as a segmentation, `n_stages` times.

    Args:
        method: Interpolation mode, as in `torch.nn.functional.interpolate`.
        multiplier: Factor of the size in each stage.
        out_channels: Output channels of a 1x1 convolution at the end; None = no convolution.
    """

    METHODS: ClassVar = ["nearest", "linear", "bilinear", "trilinear", "bicubic", "area"]

    def __init__(
        self,
        n_stages: int = 1,
        method: str = "bilinear",
        multiplier: float = 0.5,
        in_channels: int = 3,
        out_channels: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        assert method in self.METHODS, f"method must be one of {', '.join(self.METHODS)}"
        self.n_stages = n_stages
        self.method = method
        self.multiplier = multiplier
        self.remap_output = out_channels is not None
        if out_channels is not None:
            self.channel_mapper = nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.n_stages):
            x = F.interpolate(x, scale_factor=self.multiplier, mode=self.method)
        return self.channel_mapper(x) if self.remap_output else x

    def encode(self, x: Tensor) -> Any:
        return self(x)


class BaseTextEncoder(AbstractEncoder):
    """Base class of the text encoders, whose `device` is that of their weights."""

    @property
    def device(self) -> torch.device:
        """Device to which inputs are moved. Assigning to it has no effect, but is allowed."""
        return next(p.device for p in self.parameters())

    @device.setter
    def device(self, device: object) -> None: ...

    def encode(self, text: str | Sequence[str], **kwargs: Any) -> Any:
        return self(text, **kwargs)

    def freeze(self) -> None:
        """Set eval mode, and disable gradients of the weights."""
        self.eval()
        self.requires_grad_(False)


class FrozenCLIPEmbedder(BaseTextEncoder):
    """Prompts -> context (B, 77, D) by the text model of OpenAI's CLIP: SD 1.

    Args:
        version: Name of a model, for its config, or a folder with `config.json` and weights.
        device: Ignored, see `device`.
        max_length: Number of tokens of a prompt, at most 77.
        freeze: Whether to freeze the weights.
        layer: "last"; "pooled" for the last hidden state at the first EOS token, (B, 1, D); or
            "hidden" for hidden state `layer_idx` (0 is the embedding), without the final norm.
        layer_idx: Index of a hidden state, -layers … layers; None unless `layer` is "hidden".
        arch: Config with transformers' keys; None = that of `version`. Not in the original.
    """

    LAYERS: ClassVar = ["last", "pooled", "hidden"]

    def __init__(
        self,
        version: str = "openai/clip-vit-large-patch14",
        device: object = None,
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
        layer_idx: int | None = None,
        *,
        arch: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        assert layer in self.LAYERS, f"layer must be one of {', '.join(self.LAYERS)}, got {layer}"
        self.tokenizer = CLIPTokenizer.from_pretrained(version)
        # Third-party code replaces `from_pretrained` while it builds a model.
        self.transformer = (
            CLIPTextModel.from_pretrained(version) if arch is None else CLIPTextModel(arch).eval()
        )
        self.max_length = max_length
        self.layer = layer
        self.layer_idx = layer_idx
        if layer == "hidden":
            assert layer_idx is not None, 'layer "hidden" needs a layer_idx'
            n = len(self.transformer.text_model.encoder.layers)
            assert abs(layer_idx) <= n, f"layer_idx must be -{n} … {n}, got {layer_idx}"
        if freeze:
            self.freeze()

    def forward(self, text: str | Sequence[str], **kwargs: Any) -> Tensor:
        """Encode prompts; `kwargs`, such as `embedding_manager`, are passed to `transformer`."""
        encoding = self.tokenizer(
            text,
            truncation=True,
            max_length=self.max_length,
            return_length=True,
            return_overflowing_tokens=False,
            padding="max_length",
            return_tensors="pt",
        )
        outputs: TextOutput = self.transformer(
            input_ids=encoding["input_ids"].to(self.device),
            output_hidden_states=self.layer == "hidden",
            **kwargs,
        )
        if self.layer == "last":
            return outputs.last_hidden_state
        if self.layer == "pooled":
            return cast(Tensor, outputs.pooler_output)[:, None]
        hidden_states = cast("tuple[Tensor, ...]", outputs.hidden_states)
        return hidden_states[cast(int, self.layer_idx)]


class FrozenOpenCLIPEmbedder(BaseTextEncoder):
    """Prompts -> context (B, 77, D) by the text model of open_clip: SD 2.

    Args:
        arch: Name of a model in open_clip, or its config.
        version: Path of a weights file, or "openai" for quick GELU; any other value is ignored.
        device: Ignored, see `device`.
        freeze: Whether to freeze the weights.
        layer: Layer whose output is returned, after the final norm: "last" or "penultimate".
    """

    LAYERS: ClassVar = ["last", "penultimate"]

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "ViT-H-14",
        version: str = "laion2b_s32b_b79k",
        device: object = None,
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
    ) -> None:
        super().__init__()
        assert layer in self.LAYERS, f"layer must be one of {', '.join(self.LAYERS)}, got {layer}"
        self.model = _build_open_clip(arch, version)
        self.max_length = max_length
        self.layer = layer
        self.layer_idx = self.LAYERS.index(layer)
        if freeze:
            self.freeze()

    def forward(self, text: str | Sequence[str], **kwargs: Any) -> Tensor:
        """Encode prompts; `kwargs` are passed to `encode_with_transformer`."""
        texts = [text] if isinstance(text, str) else text
        tokens = tokenizer.tokenize(texts, tokenizer.OPEN_CLIP, self.max_length)
        return self.encode_with_transformer(tokens.to(self.device), **kwargs)

    def encode_with_transformer(self, text: Tensor, embedding_manager: Any = None) -> Tensor:
        """Encode token ids (B, N); for `embedding_manager` see `CLIPTextEmbeddings.forward`."""
        x: Tensor = self.model.token_embedding(text)  # (B, N, D)
        if embedding_manager is not None:
            x = embedding_manager(text, x)
        n = x.shape[1]
        x = (x + self.model.positional_embedding[:n]).permute(1, 0, 2)  # (N, B, D)
        x = self.text_transformer_forward(x, attn_mask=self.model.attn_mask[:n, :n])
        out: Tensor = self.model.ln_final(x.permute(1, 0, 2))  # (B, N, D)
        return out

    def text_transformer_forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Run all layers up to `layer` on x (N, B, D); `attn_mask` None masks nothing."""
        transformer = self.model.transformer
        for block in transformer.resblocks[: len(transformer.resblocks) - self.layer_idx]:
            if transformer.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, attn_mask=attn_mask, use_reentrant=False)
            else:
                x = block(x, attn_mask=attn_mask)
        return x


class ImageEmbedder(CLIPVision):
    """Base class of the image encoders."""

    device = BaseTextEncoder.device
    freeze = BaseTextEncoder.freeze
    ucg_rate: float

    def preprocess(self, x: Tensor) -> Tensor:
        """Resize images to the network's input size, and normalize them."""
        size = self.model.visual.image_size
        return preprocess(x, size, antialias=self.antialias, blur=self.blur)

    def encode_with_vision_transformer(self, img: Tensor) -> Tensor:
        """Encode images, without the dropout of `ucg_rate`."""
        return self.embed(img).to(img.dtype)

    def forward(self, image: Tensor, no_dropout: bool = False) -> Tensor:
        """Encode images; unless `no_dropout`, set random embeddings to zero."""
        x = self.encode_with_vision_transformer(image)
        if no_dropout or self.ucg_rate <= 0:
            return x
        keep_mask = torch.bernoulli(torch.full((len(x), 1), 1 - self.ucg_rate, device=x.device))
        return keep_mask * x


class FrozenOpenCLIPImageEmbedder(ImageEmbedder, OpenCLIPImage):
    """Images (B, 3, H, W) in [-1, 1] -> embeddings (B, D) by the vision tower of open_clip.

    Args:
        arch, version, freeze: See `ldm.encoders.image.OpenCLIPImage`.
        device, max_length: Ignored.
        layer: Must be "pooled".
        antialias: Whether to blur before downscaling, as kornia 0.6.0 does.
        ucg_rate: Probability of zeroing an embedding, for classifier-free guidance.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "ViT-H-14",
        version: str = "laion2b_s32b_b79k",
        device: object = None,
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "pooled",
        antialias: bool = True,
        ucg_rate: float = 0.0,
    ) -> None:
        if layer != "pooled":
            raise NotImplementedError(f'layer must be "pooled", got "{layer}"')
        super().__init__(arch=arch, version=version, freeze=freeze, antialias=antialias)
        self.max_length = max_length
        self.layer = layer
        self.ucg_rate = ucg_rate

    def encode(self, text: Tensor) -> Any:
        return self(text)


class ClipImageEmbedder(ImageEmbedder, CLIPImage):
    """Images (B, 3, H, W) in [-1, 1] -> embeddings (B, D) by the vision tower of OpenAI's CLIP.

    Args:
        model: Name of the model, or its config in the form of open_clip.
        jit, device: Ignored.
        antialias, ucg_rate: See `FrozenOpenCLIPImageEmbedder`.
    """

    def __init__(
        self,
        model: str | Mapping[str, Any] = "ViT-L/14",
        jit: bool = False,
        device: object = None,
        antialias: bool = True,
        ucg_rate: float = 0.0,
    ) -> None:
        super().__init__(model=model, antialias=antialias, freeze=False)
        self.ucg_rate = ucg_rate

    def forward(self, x: Tensor, no_dropout: bool = False) -> Tensor:  # type: ignore[override]
        return super().forward(x, no_dropout)


class CLIPEmbeddingNoiseAugmentation(ImageConcatWithNoiseAugmentation):
    """Image embeddings (B, D) -> noised embeddings, and embeddings of the noise levels (B, D).

    Args:
        clip_stats_path: File with mean and standard deviation of the embeddings; None = 0 and 1.
        timestep_dim: D. The others: see `ImageConcatWithNoiseAugmentation`.
    """

    data_mean: Tensor
    data_std: Tensor

    def __init__(
        self,
        noise_schedule_config: Mapping[str, Any],
        max_noise_level: int = 1000,
        to_cuda: bool = False,
        *,
        clip_stats_path: str | None = None,
        timestep_dim: int = 256,
    ) -> None:
        super().__init__(noise_schedule_config, max_noise_level, to_cuda)
        with torch.device("cpu"):  # not on the meta device, as no checkpoint has these values
            mean, std = torch.zeros(timestep_dim), torch.ones(timestep_dim)
            if clip_stats_path is not None:
                mean, std = read_clip_statistics(find_file(clip_stats_path))
        self.register_buffer("data_mean", mean[None], persistent=False)
        self.register_buffer("data_std", std[None], persistent=False)
        self.time_embed = Timestep(timestep_dim)

    def scale(self, x: Tensor) -> Tensor:
        """Normalize embeddings to mean 0 and standard deviation 1."""
        return (x - self.data_mean.to(x.device)) / self.data_std.to(x.device)

    def unscale(self, x: Tensor) -> Tensor:
        """Invert `scale`."""
        return x * self.data_std.to(x.device) + self.data_mean.to(x.device)

    def forward(
        self, x: Tensor, noise_level: Tensor | None = None, seed: int | None = None
    ) -> tuple[Tensor, Tensor]:
        z, noise_level = super().forward(self.scale(x), noise_level, seed)
        return self.unscale(z), self.time_embed(noise_level)


def _build_open_clip(arch: str | Mapping[str, Any], version: str) -> Any:
    """Build the text model of open_clip."""
    import open_clip
    from open_clip import factory

    if open_clip.create_model_and_transforms is not factory.create_model_and_transforms:
        # Third-party code has replaced the function to build a model without weights.
        model, *_ = open_clip.create_model_and_transforms(arch, pretrained=version)
    else:
        config = open_clip.get_model_config(arch) if isinstance(arch, str) else to_builtin(arch)
        if config is None:
            raise make_unknown_name_error("arch", arch, open_clip.list_models())
        if version == "openai":
            config["quick_gelu"] = True
        model = open_clip.CLIP(**{**config, "vision_cfg": UNUSED_VISION_CONFIG})
    if "visual" in model._modules:
        del model.visual
    if Path(version).is_file():
        weights = read_checkpoint(version).state_dict
        model.load_state_dict(
            {name: value for name, value in weights.items() if not name.startswith("visual.")}
        )
    # open_clip has the batch first since 2.26, but callers pass (N, B, D) to the blocks.
    model.transformer.batch_first = False
    for block in model.transformer.resblocks:
        block.attn.batch_first = False
    # On the CPU even if weights are on the meta device, as no checkpoint has these values.
    length = model.positional_embedding.shape[0]
    model.attn_mask = torch.full((length, length), -torch.inf, device="cpu").triu(1)
    return model

"""Image encoders: the vision towers of CLIP, and noise augmentation of their embeddings.

    stable unCLIP         noised embedding, embedding of the noise level    vector (B, 2 D)
    SD 1 image variation  the embedding as the only token                   crossattn (B, 1, D)

Radford et al. 2021 (arXiv:2103.00020); unCLIP: Ramesh et al. 2022 (arXiv:2204.06125).
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning import Batch, Config, Encoder, PrepareOptions, Slot
from ldm.encoders.concat_images import register_schedule
from ldm.encoders.text import get_open_clip_kwargs
from ldm.encoders.towers import CLIP
from ldm.nets.blocks import timestep_embedding
from ldm.runtime.errors import ArgumentError, MissingArgument, check_name, check_names

__all__ = [
    "CLIPImage", "EmbeddingNoise", "ImageEmbedding", "OpenCLIPImage", "normalize_pixels",
    "preprocess",
]  # fmt: skip

# Mean and standard deviation, by channel, of pixels in [0, 1] in CLIP's training data.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

# open_clip's `vision_cfg` of the models in `text.TEXT_SIZES`
VISION_CONFIGS: dict[str, dict[str, float]] = {
    "ViT-B-32": {"width": 768, "layers": 12, "patch_size": 32},
    "ViT-B-16": {"width": 768, "layers": 12, "patch_size": 16},
    "ViT-L-14": {"width": 1024, "layers": 24, "patch_size": 14},
    "ViT-L-14-336": {"width": 1024, "layers": 24, "patch_size": 14, "image_size": 336},
    "ViT-H-14": {"width": 1280, "layers": 32, "patch_size": 14, "head_width": 80},
    "ViT-g-14": {
        "width": 1408, "layers": 40, "patch_size": 14, "head_width": 88, "mlp_ratio": 4.3637
    },
    "ViT-bigG-14": {
        "width": 1664, "layers": 48, "patch_size": 14, "head_width": 104, "mlp_ratio": 4.9231
    },
}  # fmt: skip
VISION_DEFAULTS = {
    "width": 768, "layers": 12, "patch_size": 16, "image_size": 224, "head_width": 64,
    "mlp_ratio": 4.0,
}  # fmt: skip

Blur = Literal["wide", "narrow"]  # see `preprocess`
BLURS = ("wide", "narrow")
Images = Tensor | Sequence[Tensor]  # (B, 3, H, W) in [-1, 1], or a list of (3, H, W)


def preprocess(
    image: Tensor, size: int = 224, *, antialias: bool = True, blur: Blur = "wide"
) -> Tensor:
    """Resize images (B, 3, H, W) in [-1, 1] to squares, and normalize them as CLIP's input.

    Args:
        antialias: Whether to blur before downscaling.
        blur: Sigma of the blur when downscaling by `factor`: "wide" = factor, as in kornia 0.6.0,
            which the original pins; "narrow" = (factor - 1) / 2, as in kornia 0.6.4 and later.
    """
    image = image.float()
    factors = [length / size for length in image.shape[-2:]]
    if antialias and max(factors) > 1:
        for dim, factor in zip((-2, -1), factors, strict=True):
            image = _blur_axis(image, dim, *_choose_gaussian(factor, blur))
    # align_corners, as the original passes to kornia.
    image = F.interpolate(image, (size, size), mode="bicubic", align_corners=True)
    return normalize_pixels((image + 1) / 2)


def normalize_pixels(pixels: Tensor) -> Tensor:
    """Normalize pixels (B, 3, H, W) in [0, 1] as CLIP's input."""
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    return (pixels - mean) / std


class CLIPVision(nn.Module):
    """Images -> CLIP embeddings (B, D); base class. For `antialias` and `blur` see `preprocess`."""

    def __init__(self, clip: CLIP, *, freeze: bool, antialias: bool, blur: Blur) -> None:
        super().__init__()
        check_name("blur", blur, BLURS, argument="blur")
        self.model = clip
        self.antialias = antialias
        self.blur: Blur = blur
        self.requires_grad_(not freeze)

    @property
    def embed_dim(self) -> int:
        """Features of an embedding, D."""
        return self.model.visual.proj.shape[1]

    def embed(self, images: Images) -> Tensor:
        """Embed images (B, 3, H, W) in [-1, 1], or a list of (3, H, W), as (B, D) float32."""
        visual = self.model.visual
        # A list may hold images of different sizes, which are resized one by one.
        batches = [images] if isinstance(images, Tensor) else [image[None] for image in images]
        device, size = visual.proj.device, visual.image_size
        pixels = [
            preprocess(batch.to(device), size, antialias=self.antialias, blur=self.blur)
            for batch in batches
        ]
        embedding: Tensor = visual(torch.cat(pixels))
        return embedding.float()


class OpenCLIPImage(CLIPVision):
    """Images -> embeddings (B, D) by the vision tower of an OpenCLIP model.

    The state dict includes the text tower without its blocks, as in published files.

    Args:
        arch: Name in VISION_CONFIGS, or an open_clip model config (`embed_dim`, `vision_cfg`,
            `text_cfg`).
        version: "openai" selects quick GELU; any other value is ignored.
    """

    IGNORED_PARAMS: ClassVar[frozenset[str]] = frozenset(
        {"device", "max_length", "layer", "ucg_rate"}
    )

    def __init__(
        self,
        *,
        arch: str | Config = "ViT-H-14",
        version: str = "laion2b_s32b_b79k",
        freeze: bool = True,
        antialias: bool = True,
        blur: Blur = "wide",
    ) -> None:
        text = get_open_clip_kwargs(arch) | {"layers": 0}
        if version == "openai":
            text["quick_gelu"] = True
        clip = CLIP(text, _get_vision_kwargs(arch))
        super().__init__(clip, freeze=freeze, antialias=antialias, blur=blur)


class CLIPImage(CLIPVision, Encoder):
    """Images -> one token (B, 1, D) by the vision tower of OpenAI's CLIP, with its parameter names.

    Args:
        model: Name of a model in OpenAI's package, or an open_clip model config.
        key: Batch key of the images.
        text_tower: Whether to build the blocks of the text tower, which unCLIP's files contain
            for the Karlo prior.
    """

    slot: Slot = "crossattn"
    droppable = True
    sd_version = 1
    IGNORED_PARAMS: ClassVar[frozenset[str]] = frozenset({"device", "jit", "ucg_rate"})

    def __init__(
        self,
        *,
        model: str | Config = "ViT-L/14",
        antialias: bool = True,
        blur: Blur = "wide",
        freeze: bool = True,
        key: str = "jpg",
        text_tower: bool = True,
    ) -> None:
        if isinstance(model, str):
            model = model.replace("/", "-").replace("@336px", "-336")
        text = get_open_clip_kwargs(model) | {"quick_gelu": True}
        if not text_tower:
            text["layers"] = 0
        clip = CLIP(text, _get_vision_kwargs(model))
        super().__init__(clip, freeze=freeze, antialias=antialias, blur=blur)
        self.key = key
        self.cache_key = key

    def forward(self, images: Tensor | Sequence[Tensor | None]) -> Tensor:
        """Encode images (3, H, W) in [-1, 1] as tokens (B, 1, D), None as zeros."""
        tokens = torch.zeros(len(images), 1, self.embed_dim, device=self.model.visual.proj.device)
        indices = [k for k, image in enumerate(images) if image is not None]
        if indices:
            tokens[indices, 0] = self.embed([image for image in images if image is not None])
        return tokens  # (B, 1, D)


class EmbeddingNoise(nn.Module):
    """Noise augmentation: embedding (B, D) -> noised embedding and its noise level, (B, 2 D).

    Args:
        timestep_dim: Features of an embedding, D.
        noise_schedule_config: See `register_schedule`; None = its defaults.
        max_noise_level: Noise levels are 0 … max_noise_level - 1.
        clip_stats_path: File with mean and standard deviation of the embeddings, read by the
            loader; None = mean 0 and standard deviation 1.

    Attributes:
        statistics: Mean and standard deviation of the embeddings, (1, D) each; None if the file is
            not loaded.
    """

    def __init__(
        self,
        *,
        timestep_dim: int = 256,
        noise_schedule_config: Config | None = None,
        max_noise_level: int = 1000,
        clip_stats_path: str | None = None,
    ) -> None:
        super().__init__()
        self.schedule = register_schedule(self, noise_schedule_config or {})
        self.embed_dim = timestep_dim
        self.max_noise_level = max_noise_level
        self.clip_stats_path = clip_stats_path
        self.statistics: tuple[Tensor, Tensor] | None = None
        if clip_stats_path is None:
            zeros = torch.zeros(timestep_dim, device="cpu")
            self.set_statistics(zeros, zeros + 1)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set mean and standard deviation of the embeddings, D values each."""
        if mean.numel() != self.embed_dim or std.numel() != self.embed_dim:
            raise ArgumentError(
                f"embedding statistics of {mean.numel()} and {std.numel()} values do not fit "
                f"embeddings of {self.embed_dim} features"
            )
        self.statistics = (
            mean.detach().float().reshape(1, -1),
            std.detach().float().reshape(1, -1),
        )

    def get_statistics(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the embeddings, (1, D) each.

        Args:
            device: None = the device that they are on.

        Raises:
            MissingArgument: They are not loaded.
        """
        if self.statistics is None:
            raise MissingArgument(
                f"the statistics of CLIP's embeddings, `{self.clip_stats_path}`, are missing: put "
                "the file beside the checkpoint, or pass its path",
                "clip_stats",
            )
        mean, std = self.statistics
        return mean.to(device=device), std.to(device=device)

    def forward(self, embedding: Tensor, level: Tensor | int, noise: Tensor) -> Tensor:
        """Add noise to embeddings (B, D).

        Args:
            level: Noise level, int or int64 (B,). Even level 0 adds a little noise.
            noise: Standard normal noise (B, D).

        Returns:
            Noised embedding, then the sinusoidal embedding of the level, (B, 2 D) float32.
        """
        level = torch.as_tensor(level, device=embedding.device).expand(len(embedding))  # (B,)
        if len(level) and not 0 <= int(level.min()) <= int(level.max()) < self.max_noise_level:
            last = self.max_noise_level - 1
            raise ArgumentError(f"noise levels are 0 … {last}, got {level.tolist()}")
        noised = self.schedule.add_noise(self.scale(embedding), noise, level)  # (B, D)
        level_embedding = timestep_embedding(level, self.embed_dim)  # (B, D)
        return torch.cat([self.unscale(noised), level_embedding], dim=1)  # (B, 2 D)

    def scale(self, embedding: Tensor) -> Tensor:
        """Normalize CLIP embeddings (B, D) to mean 0 and standard deviation 1, float32."""
        mean, std = self.get_statistics(embedding.device)
        return (embedding.float() - mean) / std

    def unscale(self, x: Tensor) -> Tensor:
        """Invert `scale`."""
        mean, std = self.get_statistics(x.device)
        return x * std + mean


class ImageEmbedding(Encoder):
    """The vector (B, 2 D) of stable unCLIP: a noised image embedding and its noise level.

    `prepare` computes the vectors of a batch; use `embed` and `noise` to mix images.

    Args:
        embedding_key: Batch key of the images.
    """

    slot: Slot = "vector"
    key = "embedding"
    droppable = True

    def __init__(
        self,
        *,
        clip: CLIPVision,
        noise: EmbeddingNoise,
        freeze: bool = True,
        embedding_key: str = "jpg",
    ) -> None:
        super().__init__()
        if clip.embed_dim != noise.embed_dim:
            raise ArgumentError(
                f"timestep_dim must be {clip.embed_dim}, the number of features of the embeddings, "
                f"got {noise.embed_dim}"
            )
        self.clip = clip.requires_grad_(not freeze)
        self.noise = noise
        self.cache_key = embedding_key

    def embed(self, images: Images) -> Tensor:
        """Embed images, see `CLIPVision.embed`."""
        return self.clip.embed(images)

    def forward(self, vectors: Tensor | Sequence[Tensor | None]) -> Tensor:
        """Return vectors of `prepare`, (B, 2 D) float32, with zeros for None."""
        device = self.clip.model.visual.proj.device
        zeros = torch.zeros(2 * self.noise.embed_dim, device=device)
        return torch.stack([zeros if vector is None else vector.to(zeros) for vector in vectors])

    def prepare(self, batch: Batch, options: PrepareOptions) -> dict[str, Tensor]:
        """Make `embedding` from images and `noise_level`, int or (B,); if missing, it is random."""
        if self.key in batch:
            return {}
        assert self.cache_key is not None
        embedding = self.embed(batch[self.cache_key])  # (B, D)
        level = batch.get("noise_level")
        if level is None:
            level = options.randint(self.noise.max_noise_level, len(embedding))
        return {self.key: self.noise(embedding, level, options.randn(embedding.shape))}


def _get_vision_kwargs(arch: str | Config) -> dict[str, Any]:
    """Return arguments of VisionTower for a name in VISION_CONFIGS or an open_clip config."""
    if isinstance(arch, str):
        config: Config = VISION_CONFIGS[arch.removesuffix("-quickgelu")]
    else:
        config = arch.get("vision_cfg") or {}
    check_names("vision_cfg key", config, VISION_DEFAULTS)
    kwargs: dict[str, Any] = {**VISION_DEFAULTS, **config}
    kwargs["heads"] = kwargs["width"] // kwargs.pop("head_width")
    return kwargs


def _choose_gaussian(factor: float, blur: Blur) -> tuple[float, int]:
    """Choose sigma and number of taps of the Gaussian for downscaling by `factor`, as kornia."""
    if blur == "wide":
        sigma = max(factor, 1.0)
        taps = int(4 * sigma)
    else:
        sigma = max((factor - 1) / 2, 0.001)
        taps = int(max(4 * sigma, 3))
    return sigma, taps + 1 - taps % 2


def _blur_axis(image: Tensor, dim: int, sigma: float, taps: int) -> Tensor:
    """Blur along one axis, with reflect padding of any width."""
    half, length = taps // 2, image.shape[dim]
    offsets = torch.arange(-half, half + 1, device=image.device)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    shape = (1, 1, taps, 1) if dim == -2 else (1, 1, 1, taps)
    # Not F.pad, which reflects at most length - 1 pixels: sides may have 1 or 2.
    period = max(2 * (length - 1), 1)
    indices = torch.arange(-half, length + half, device=image.device) % period
    image = image.index_select(dim, torch.minimum(indices, period - indices))
    planes = image.flatten(0, 1)[:, None]  # (B C, 1, H, W)
    blurred = F.conv2d(planes, (kernel / kernel.sum()).reshape(shape))
    return blurred[:, 0].reshape(image.shape[0], image.shape[1], *blurred.shape[2:])

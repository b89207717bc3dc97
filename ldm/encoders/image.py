"""A picture as a condition: the vision towers of CLIP, and the noise put on what they say.

    image --preprocess--> (B, 3, 224, 224) --vision tower--> embedding (B, D)

    stable unCLIP         noise the embedding, join its level    vector (B, 2 D)
    SD 1 image variation  the embedding is the only token        crossattn (B, 1, D)

Weights come from the checkpoint, where they keep the names of the package that they come from;
nothing is downloaded. The file of embedding statistics that some models need is opened by loading.

Radford et al. 2021 (arXiv:2103.00020); unCLIP: Ramesh et al. 2022 (arXiv:2204.06125).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.schedule import Schedule, make_betas
from ldm.encoders.lowres import TABLES
from ldm.encoders.text import open_clip_size
from ldm.encoders.towers import OpenCLIPTower, VisionTower
from ldm.nets.blocks import timestep_embedding

__all__ = ["CLIPImage", "EmbeddingNoise", "ImageEmbedding", "OpenCLIPImage", "preprocess"]

# What CLIP was trained with: mean and standard deviation of pixels in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# open_clip's `vision_cfg` of the models in `text.ARCHS`
VISION: dict[str, dict[str, Any]] = {
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

Blur = Literal["wide", "narrow"]
Images = Tensor | Sequence[Tensor]


def preprocess(
    image: Tensor, size: int = 224, *, antialias: bool = True, blur: Blur = "wide"
) -> Tensor:
    """What CLIP sees of an image: squeezed to a square, in units of CLIP's training pixels.

        image: (B, 3, H, W) in [-1, 1].
        antialias: blur before shrinking.
        blur: how far, for an image `factor` times too large: "wide" is sigma = factor, as kornia
            0.6.0 does, which the original pins; "narrow" is (factor - 1) / 2, since kornia 0.6.4.
        Returns (B, 3, size, size) float32.

    The aspect ratio is not kept.
    """
    image = image.float()
    factors = [length / size for length in image.shape[-2:]]
    if antialias and max(factors) > 1:
        for dim, factor in zip((-2, -1), factors, strict=True):
            image = _blurred(image, dim, *_window(factor, blur))
    image = F.interpolate(image, (size, size), mode="bicubic", align_corners=True)
    mean, std = (image.new_tensor(numbers)[:, None, None] for numbers in (MEAN, STD))
    return ((image + 1) / 2 - mean) / std


class OpenCLIPImage(nn.Module):
    """Images -> embedding (B, D) by the vision tower of an OpenCLIP model.

        arch: a name in VISION or an open_clip model config (`embed_dim`, `vision_cfg`, `text_cfg`).
        version: "openai" means quick GELU, as in those weights; otherwise without meaning.
        antialias, blur: see `preprocess`.

    The state dict also holds what published files keep of the text tower: all but its blocks.
    """

    IGNORED: ClassVar[frozenset[str]] = frozenset({"device", "max_length", "layer", "ucg_rate"})

    def __init__(
        self,
        *,
        arch: str | Mapping[str, Any] = "ViT-H-14",
        version: str = "laion2b_s32b_b79k",
        device: str | None = None,
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "pooled",
        antialias: bool = True,
        ucg_rate: float = 0.0,
        blur: Blur = "wide",
    ) -> None:
        super().__init__()
        size = open_clip_size(arch) | {"layers": 0}
        if version == "openai":
            size["quick_gelu"] = True
        self.model = _with_vision(arch, size)
        self.options = {"antialias": antialias, "blur": _known(blur)}
        self.requires_grad_(not freeze)

    def embed(self, image: Images) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], or a list of (3, H, W) -> embeddings (B, D)."""
        return _embed(self.model.visual, image, **self.options)


class CLIPImage(nn.Module):
    """Images -> one token (B, 1, D) by the vision tower of OpenAI's CLIP, in its package's names.

        model: the package's name of a model, or a config as open_clip writes it.
        slot, key: as a conditioner's encoder; a record None stands for no image and gives zeros.
        antialias, blur: see `preprocess`.

    text_tower: keep the whole of CLIP, as files of unCLIP do; the Karlo prior reads it.
    """

    null = None
    slot: Literal["crossattn"] = "crossattn"
    IGNORED: ClassVar[frozenset[str]] = frozenset({"device", "jit", "ucg_rate"})

    def __init__(
        self,
        *,
        model: str | Mapping[str, Any] = "ViT-L/14",
        jit: bool = False,
        device: str | None = None,
        antialias: bool = True,
        ucg_rate: float = 0.0,
        blur: Blur = "wide",
        freeze: bool = True,
        key: str = "jpg",
        text_tower: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(model, str):
            model = model.replace("/", "-").replace("@336px", "-336")
        size = open_clip_size(model) | {"quick_gelu": True}
        self.model = _with_vision(model, size if text_tower else size | {"layers": 0})
        self.options = {"antialias": antialias, "blur": _known(blur)}
        self.key = self.cached = key
        self.requires_grad_(not freeze)

    def embed(self, image: Images) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], or a list of (3, H, W) -> embeddings (B, D)."""
        return _embed(self.model.visual, image, **self.options)

    def forward(self, images: Tensor | Sequence[Tensor | None]) -> Tensor:
        """Tokens (B, 1, D) of images (3, H, W), each in [-1, 1] or None."""
        proj = self.model.visual.proj
        tokens = proj.new_zeros(len(images), 1, proj.shape[1], dtype=torch.float32)
        seen = [k for k, image in enumerate(images) if image is not None]
        if seen:
            tokens[seen, 0] = self.embed([image for image in images if image is not None])
        return tokens  # (B, 1, D)


class EmbeddingNoise(nn.Module):
    """Embedding (B, D) -> noised embedding and its noise level, side by side (B, 2 D).

        timestep_dim: D.
        noise_schedule_config: keywords of `make_betas`, with `beta_schedule` for its `name`.
        max_noise_level: levels are 0 … max_noise_level - 1.
        clip_stats_path: the file with mean and std of the embeddings that the model was trained
            with; None = mean 0, std 1. It is not opened here: `use_statistics` gives the numbers.

    The tables of the schedule are in the state dict because published files hold them; the numbers
    used are computed here in float64.
    """

    def __init__(
        self,
        *,
        timestep_dim: int = 256,
        noise_schedule_config: Mapping[str, Any] | None = None,
        max_noise_level: int = 1000,
        clip_stats_path: str | None = None,
    ) -> None:
        super().__init__()
        config = dict(noise_schedule_config or {})
        with torch.device("cpu"):  # real numbers, also where weights are on the meta device
            self.schedule = Schedule(make_betas(config.pop("beta_schedule", "linear"), **config))
            tables = self.schedule.buffers()
        for name in TABLES:
            self.register_buffer(name, tables[name])
        self.width = timestep_dim
        self.max_noise_level = max_noise_level
        self.clip_stats_path = clip_stats_path
        self.statistics: tuple[Tensor, Tensor] | None = None
        if clip_stats_path is None:
            zeros = torch.zeros(timestep_dim, device="cpu")
            self.use_statistics(zeros, zeros + 1)

    def use_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Mean and standard deviation of the embeddings, D numbers each."""
        if mean.numel() != self.width or std.numel() != self.width:
            raise ValueError(
                f"embedding statistics of {mean.numel()} and {std.numel()} numbers do not fit "
                f"embeddings of {self.width}"
            )
        self.statistics = (
            mean.detach().float().reshape(1, -1),
            std.detach().float().reshape(1, -1),
        )

    def forward(self, embedding: Tensor, level: Tensor | int, noise: Tensor) -> Tensor:
        """The vector (B, 2 D) float32 that the network listens to.

            embedding: (B, D), as CLIP gives it. noise: like embedding, standard normal.
            level: for all, or one per row (B,). At level 0 there is a little noise.
        Raises ValueError for an impossible level, or if statistics are needed and not known.
        """
        level = torch.as_tensor(level, device=embedding.device).expand(len(embedding))  # (B,)
        if len(level) and not 0 <= int(level.min()) <= int(level.max()) < self.max_noise_level:
            last = self.max_noise_level - 1
            raise ValueError(f"noise levels are 0 … {last}, got {level.tolist()}")
        noised = self.schedule.noised(self.scale(embedding), noise, level)  # (B, D)
        beside = timestep_embedding(level, self.width)  # (B, D)
        return torch.cat([self.unscale(noised), beside], dim=1)  # (B, 2 D)

    def draw_level(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Levels (count,) int64, uniform over all, as in training."""
        device = torch.device("cpu") if generator is None else generator.device
        return torch.randint(self.max_noise_level, (count,), generator=generator, device=device)

    def scale(self, embedding: Tensor) -> Tensor:
        """Embeddings (B, D) as CLIP gives them -> mean 0, std 1, float32."""
        mean, std = self.known_statistics(embedding)
        return (embedding.float() - mean) / std

    def unscale(self, x: Tensor) -> Tensor:
        """The inverse of `scale`."""
        mean, std = self.known_statistics(x)
        return x * std + mean

    def known_statistics(self, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(mean, std), (1, D) each, on the device of `like`; raises ValueError without."""
        if self.statistics is None:
            raise ValueError(
                f"this model needs the statistics of CLIP's embeddings, `{self.clip_stats_path}`: "
                "put the file beside the checkpoint, or say where it is (--clip-stats)"
            )
        mean, std = self.statistics
        return (mean, std) if like is None else (mean.to(like.device), std.to(like.device))


class ImageEmbedding(nn.Module):
    """The vector (B, 2 D) of stable unCLIP: a noised embedding of an image, and its noise level.

        clip: `embed(image)` -> (B, D): an OpenCLIPImage or a CLIPImage.
        noise: an EmbeddingNoise.
        embedding_key: the record of the image.

    Images and noise come in before conditioning, by `prepare`; who mixes pictures or chooses seeds
    makes the vectors with `embed` and `noise`. No image is None, and gives zeros.
    """

    null = None
    slot: Literal["vector"] = "vector"
    key = "embedding"

    def __init__(
        self,
        *,
        clip: OpenCLIPImage | CLIPImage,
        noise: EmbeddingNoise,
        freeze: bool = True,
        embedding_key: str = "jpg",
    ) -> None:
        super().__init__()
        width = clip.model.visual.proj.shape[1]
        if width != noise.width:
            raise ValueError(f"timestep_dim {noise.width} is not the embedding's width {width}")
        self.clip = clip.requires_grad_(not freeze)
        self.noise = noise
        self.embedding_key = self.cached = embedding_key

    def embed(self, image: Images) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], or a list of (3, H, W) -> embeddings (B, D) float32."""
        return self.clip.embed(image)

    def forward(self, vectors: Tensor | Sequence[Tensor | None]) -> Tensor:
        """vectors: (B, 2 D), what `prepare` gave; a row may be None."""
        nothing = self.clip.model.visual.proj.new_zeros(2 * self.noise.width, dtype=torch.float32)
        return torch.stack([nothing if row is None else row.to(nothing) for row in vectors])

    def prepare(
        self,
        batch: Mapping[str, Any],
        *,
        size: tuple[int, int] | None = None,
        encode: Callable[[Tensor], Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The record `embedding`, made from what a batch has.

        batch: `jpg` (or as `embedding_key` says) (B, 3, H, W) in [-1, 1], or a list of (3, H, W);
            `noise_level`, one number or (B,), is drawn if absent.
        size, encode: not needed here.
        generator: of the levels, then of the noise; None = torch's own.
        """
        if self.key in batch:
            return {}
        embedding = self.embed(batch[self.embedding_key])  # (B, D)
        level = batch.get("noise_level")
        if level is None:
            level = self.noise.draw_level(len(embedding), generator)
        device = torch.device("cpu") if generator is None else generator.device
        noise = torch.randn(embedding.shape, generator=generator, device=device)
        return {self.key: self.noise(embedding, level, noise)}


def _embed(visual: VisionTower, image: Images, **options: Any) -> Tensor:
    images = [image] if isinstance(image, Tensor) else [one[None] for one in image]
    device = visual.proj.device
    seen = [preprocess(one.to(device), visual.image_size, **options) for one in images]
    return visual(torch.cat(seen)).float()  # (B, D)


def _with_vision(arch: str | Mapping[str, Any], text: Mapping[str, Any]) -> Any:
    """CLIP: a text tower that has a vision tower `visual`."""
    given = VISION.get(arch.removesuffix("-quickgelu")) if isinstance(arch, str) else None
    if not isinstance(arch, str):
        given = dict(arch.get("vision_cfg") or {})
    size: dict[str, Any] = dict(VISION_DEFAULTS)
    for key, value in (given or {}).items():
        if key not in size:
            allowed = ", ".join(size)
            raise ValueError(f"unknown vision_cfg key `{key}`, choose one of {allowed}")
        size[key] = value
    size["heads"] = size["width"] // size.pop("head_width")
    clip = OpenCLIPTower(**text)
    quick_gelu = text.get("quick_gelu", False)
    clip.add_module(
        "visual", VisionTower(**size, embed_dim=text["embed_dim"], quick_gelu=quick_gelu)
    )
    return clip


def _known(blur: Blur) -> Blur:
    if blur not in ("wide", "narrow"):
        raise ValueError(f"unknown blur `{blur}`, choose one of wide, narrow")
    return blur


def _window(factor: float, blur: Blur) -> tuple[float, int]:
    """(sigma, taps) of the Gaussian for an image `factor` times too large."""
    if blur == "wide":
        sigma, taps = max(factor, 1.0), int(4 * max(factor, 1.0))
    else:
        sigma = max((factor - 1) / 2, 0.001)
        taps = int(max(4 * sigma, 3))
    return sigma, taps + 1 - taps % 2


def _blurred(image: Tensor, dim: int, sigma: float, taps: int) -> Tensor:
    """Gaussian along one axis; the image is mirrored beyond its edges, which are not repeated."""
    half, length = taps // 2, image.shape[dim]
    offsets = torch.arange(-half, half + 1, device=image.device)
    window = torch.exp(-(offsets**2) / (2 * sigma**2))
    shape = (1, 1, taps, 1) if dim == -2 else (1, 1, 1, taps)
    period = max(2 * (length - 1), 1)
    places = torch.arange(-half, length + half, device=image.device) % period
    image = image.index_select(dim, torch.minimum(places, period - places))
    planes = image.flatten(0, 1)[:, None]  # (B C, 1, H, W)
    blurred = F.conv2d(planes, (window / window.sum()).reshape(shape))
    return blurred[:, 0].unflatten(0, image.shape[:2])  # (B, C, H, W)

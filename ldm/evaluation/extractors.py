"""Networks of metrics: Inception for features, CLIP for how well images match prompts.

Any object with the methods of `FeatureExtractor` or `PromptScorer`, such as a classifier trained on
your own dataset, can replace Inception or CLIP.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.encoders.image import normalize_pixels
from ldm.encoders.towers import CLIP
from ldm.evaluation.metrics import cosine_similarity
from ldm.nets.inception import INCEPTION_IMAGE_SIZE, INCEPTION_NUM_FEATURES, Inception
from ldm.runtime.errors import check_name
from ldm.runtime.types import JsonObject

__all__ = [
    "RESIZE_MODES", "CLIPScorer", "FeatureExtractor", "InceptionExtractor", "PromptScorer",
    "preprocess_for_clip", "preprocess_for_inception",
]  # fmt: skip

RESIZE_MODES = ("clean", "pytorch-fid")
Images = Sequence[Image.Image]  # RGB, of any sizes


class FeatureExtractor(Protocol):
    """Computes features of images, whose distributions are compared."""

    @property
    def num_features(self) -> int:
        """Number of features, d."""
        ...

    def describe(self) -> JsonObject:
        """Return name, SHA-256 of the weights file (`sha256`) and settings, for reports.

        It is part of the key under which features are cached, unless `sha256` is None.
        """
        ...

    def extract_features(self, images: Images) -> Tensor:
        """Return the features of images, (N, d)."""
        ...


class PromptScorer(Protocol):
    """Scores how well each image matches its prompt."""

    def describe(self) -> JsonObject:
        """See `FeatureExtractor.describe`."""
        ...

    def score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return the score of each image with its prompt, (N,); higher is better."""
        ...


@dataclass(frozen=True, eq=False)
class InceptionExtractor:
    """The 2,048 features of Inception's last pooling layer, which FID compares.

    Args:
        resize: "clean" or "pytorch-fid", see `preprocess_for_inception`.
        sha256: SHA-256 of the weights file, for reports; None = unknown, features are not cached.
    """

    num_features: ClassVar[int] = INCEPTION_NUM_FEATURES
    net: Inception
    resize: str = "clean"
    sha256: str | None = None

    def __post_init__(self) -> None:
        check_name("resize", self.resize, RESIZE_MODES, argument="resize")

    def describe(self) -> JsonObject:
        return {"name": "Inception", "resize": self.resize, "sha256": self.sha256}

    @torch.inference_mode()
    def extract_features(self, images: Images) -> Tensor:
        pixels = torch.cat([preprocess_for_inception(image, self.resize) for image in images])
        return self.net(pixels.to(next(self.net.parameters()).device)).cpu()


@dataclass(frozen=True, eq=False)
class CLIPScorer:
    """CLIP score: the cosine similarity of the embeddings of image and prompt, -1 … 1.

    Args:
        name: Name of the score, for reports.
        sha256: SHA-256 of the weights file, for reports; None = unknown, scores are not cached.
    """

    clip: CLIP
    name: str = "CLIP"
    sha256: str | None = None

    def describe(self) -> JsonObject:
        activation = self.clip.blocks[0].activation.__name__
        return {"name": self.name, "activation": activation, "sha256": self.sha256}

    def score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        return cosine_similarity(self.embed_images(images), self.embed_texts(prompts))

    @torch.inference_mode()
    def embed_images(self, images: Images) -> Tensor:
        """Return embeddings (N, D), not normalized."""
        side = self.clip.visual.image_size
        pixels = torch.cat([preprocess_for_clip(image, side) for image in images])
        embeddings: Tensor = self.clip.visual(pixels.to(self.clip.text_projection.device))
        return embeddings.cpu()

    @torch.inference_mode()
    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """Return embeddings (N, D), not normalized, of prompts truncated to 77 tokens."""
        return self.clip.embed_texts(prompts).cpu()


def preprocess_for_inception(image: Image.Image, resize: str) -> Tensor:
    """Preprocess an image for Inception: (1, 3, 299, 299) in about [-1, 1].

    Args:
        resize: "clean", as clean-fid: bicubic with antialiasing by Pillow in float, then
            (x - 128) / 128; "pytorch-fid": bilinear without antialiasing, then (x - 127.5) / 127.5.
    """
    side = INCEPTION_IMAGE_SIZE
    if resize == "clean":
        channels = [
            Image.fromarray(np.array(channel, dtype=np.float32)).resize(
                (side, side), Image.Resampling.BICUBIC
            )
            for channel in image.convert("RGB").split()
        ]
        x = torch.from_numpy(np.stack([np.array(channel) for channel in channels]))[None]
        return (x.clamp(0, 255) - 128) / 128
    # Downscaling without antialiasing aliases, which "clean" avoids (arXiv:2104.11222).
    x = torch.from_numpy(np.array(image.convert("RGB"))).movedim(-1, 0)[None] / 255  # in [0, 1]
    return 2 * F.interpolate(x, (side, side), mode="bilinear", align_corners=False) - 1


def preprocess_for_clip(image: Image.Image, side: int = 224) -> Tensor:
    """Resize an image's shorter side, center-crop and normalize it for CLIP: (1, 3, side, side)."""
    shorter_side = min(image.size)
    width, height = (int(side * length / shorter_side) for length in image.size)
    scaled = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2) for length in scaled.size)
    cropped = scaled.crop((left, top, left + side, top + side))
    return normalize_pixels(torch.from_numpy(np.array(cropped)).movedim(-1, 0)[None].float() / 255)

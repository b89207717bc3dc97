"""Convert a decoded sample to a training sample: image to tensor, metadata to caption.

A transform is called with (sample, rng): the metadata of a dataset and `image`. It returns
{"jpg": image (3, H, W) in [-1, 1], "txt": caption}, its conditions (see `ldm.data.conditions`), and
the micro-conditioning of Stable Diffusion XL:

    original_size_as_tuple    (2,)  height, width in the metadata, else of the image file
    crop_coords_top_left      (2,)  top, left of the crop, in pixels of the resized image
    target_size_as_tuple      (2,)  height, width of the crop
    aesthetic_score           (1,)  of the metadata, else DEFAULT_AESTHETIC_SCORE

All randomness comes from `rng`, which the dataset seeds with (seed, epoch, index), so that a
sample does not depend on what was read before it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from ldm.data.buckets import Buckets
from ldm.data.conditions import build_conditions
from ldm.data.former_options import to_former_names
from ldm.imaging.pixels import to_tensor
from ldm.imaging.reading import flatten_on_white
from ldm.runtime.errors import FileFormatError, check_name
from ldm.runtime.types import JsonMapping, JsonObject

__all__ = [
    "CROP_POSITIONS", "SIZE_KEYS", "PhotoTransform", "TagShuffle", "Transform", "get_captions",
    "get_class_label",
]  # fmt: skip

CROP_POSITIONS = ("center", "random")
SIZE_KEYS = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
DEFAULT_AESTHETIC_SCORE = 6.0  # as in sampling


class Transform(ABC):
    """Base class of transforms.

    Args:
        conditions: Options of conditioning images by batch key, see `ldm.data.conditions`.
    Attributes:
        NAME: Name in configs.
        IMAGE_OPTIONS: Attributes that pixels or buckets depend on.
        image_size: Side of the square images, in pixels; of buckets, that of the square one.
        buckets: Aspect-ratio buckets; None = all images have one size.
        variants: Names of the variants of every image, such as background colors.
        original_size_keys: Keys of the original height and width in the metadata.
    """

    NAME: ClassVar[str]
    IMAGE_OPTIONS: ClassVar[Sequence[str]]
    image_size: int
    buckets: Buckets | None = None
    variants: Sequence[str] = ()
    original_size_keys: Sequence[str] = ("original_height", "original_width")

    def __init__(self, conditions: JsonMapping | None) -> None:
        self.conditions = build_conditions(conditions or {})

    def __call__(self, sample: JsonMapping, rng: Random) -> JsonObject:
        """Make a training sample, in one of the variants at random."""
        variant = rng.choice(self.variants) if self.variants else ""
        fields = self.make_image_fields(sample["image"], rng, variant)
        return {**fields, **self.make_row_fields(sample, rng, variant)}

    @abstractmethod
    def make_image_fields(
        self, image: Image.Image, rng: Random, variant: str = ""
    ) -> dict[str, Tensor]:
        """Make `jpg`, the conditioning images and the sizes of a training sample."""

    @abstractmethod
    def make_caption(self, row: JsonMapping, rng: Random, variant: str = "") -> str:
        """Make a caption from a row of metadata."""

    def list_random_options(self) -> list[str]:
        """Return names of options that make images of one variant differ between epochs."""
        return ["mask"] if "mask" in self.conditions else []

    def make_row_fields(self, row: JsonMapping, rng: Random, variant: str = "") -> JsonObject:
        """Make caption, class label, aesthetic score and original size from a row of metadata."""
        fields = {key: torch.tensor(value) for key, value in self.parse_score_and_size(row).items()}
        if (label := get_class_label(row)) is not None:
            fields["class_label"] = torch.tensor(label)
        return {**fields, "txt": self.make_caption(row, rng, variant)}

    def parse_score_and_size(self, row: JsonMapping) -> dict[str, list[float] | list[int]]:
        """Parse aesthetic score and original size of a row; empty cells count as missing.

        Raises:
            FileFormatError: One of them is not a number, or a side is not positive.
        """
        name, numbers = row.get("file_name", "a row"), dict[str, float]()
        for key in ("aesthetic_score", *self.original_size_keys):
            if row.get(key) in (None, ""):
                continue
            try:
                numbers[key] = float(row[key])
            except (TypeError, ValueError):
                numbers[key] = math.nan
            if not math.isfinite(numbers[key]):
                raise FileFormatError(f"`{name}` has `{key}` {row[key]}, which is not a number")
            if key != "aesthetic_score" and numbers[key] < 1:
                raise FileFormatError(f"`{name}` has `{key}` {row[key]}, it must be positive")
        score = [numbers.pop("aesthetic_score", DEFAULT_AESTHETIC_SCORE)]
        sides = [int(side) for side in numbers.values()]
        size = {"original_size_as_tuple": sides} if len(sides) == 2 else {}
        return {"aesthetic_score": score, **size}

    def get_cache_key(self) -> tuple[str, JsonObject]:
        """Return name and IMAGE_OPTIONS for keys of latent caches, with former names and values."""
        options = {name: getattr(self, name) for name in self.IMAGE_OPTIONS}
        conditions = {key: condition.get_cache_key() for key, condition in self.conditions.items()}
        options |= {"conditions": conditions}
        return self.NAME.capitalize(), to_former_names(self.NAME, options)

    def _make_fields(
        self,
        image: Tensor,
        opacity: Tensor,
        rng: Random,
        *,
        original_size: Sequence[int] | None = None,
        crop: Sequence[int] = (0, 0),
    ) -> dict[str, Tensor]:
        """Make the fields of an image: itself, its conditions and its sizes.

        Args:
            original_size: (height, width) of the image file; None = that of `image`.
            crop: (top, left) of the crop.
        """
        conditions = {
            name: condition(image, opacity, rng) for name, condition in self.conditions.items()
        }
        target_size = image.shape[-2:]
        sizes = zip(SIZE_KEYS, (original_size or target_size, crop, target_size), strict=True)
        return {"jpg": image, **conditions} | {key: torch.tensor(size) for key, size in sizes}


class PhotoTransform(Transform):
    """Scale and crop an image to a square or the nearest bucket; its caption is the row's `text`.

    Args:
        crop: Position of the crop if aspect ratios differ, "center" or "random".
        flip: Probability of a mirrored image.
        buckets: Options of `Buckets`, {} for their defaults; None = squares.
        tags: Options of `TagShuffle`, {} for their defaults; None = captions as they are.
        conditions, original_size_keys: See `Transform`.
    """

    NAME = "photo"
    IMAGE_OPTIONS = ("size", "crop", "flip")

    def __init__(
        self,
        *,
        size: int = 512,
        crop: str = "center",
        flip: float = 0.5,
        buckets: Mapping[str, int] | None = None,
        tags: JsonMapping | None = None,
        conditions: JsonMapping | None = None,
        original_size_keys: Sequence[str] = Transform.original_size_keys,
    ) -> None:
        super().__init__(conditions)
        check_name("crop", crop, CROP_POSITIONS)
        self.original_size_keys = original_size_keys
        self.size, self.crop, self.flip = size, crop, flip
        self.image_size = size
        self.buckets = None if buckets is None else Buckets(size, **buckets)
        self.tags = None if tags is None else TagShuffle(**tags)

    def make_image_fields(
        self, image: Image.Image, rng: Random, variant: str = ""
    ) -> dict[str, Tensor]:
        original_size = image.size
        image, factor, (left, top) = self._crop_and_resize(flatten_on_white(image), rng)
        if rng.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            left = original_size[0] / factor - image.width - left  # of the mirrored image
        tensor = to_tensor(image)[0]  # (3, H, W)
        return self._make_fields(
            tensor,
            torch.ones_like(tensor[:1]),
            rng,
            original_size=original_size[::-1],
            crop=(round(top), round(left)),
        )

    def list_random_options(self) -> list[str]:
        is_random = {"crop": self.crop == "random", "flip": 0 < self.flip < 1}
        return [*(name for name in is_random if is_random[name]), *super().list_random_options()]

    def make_caption(self, row: JsonMapping, rng: Random, variant: str = "") -> str:
        captions = get_captions(row)
        text = rng.choice(captions) if len(captions) > 1 else captions[0]
        return self.tags(text, rng) if self.tags else text

    def _crop_and_resize(
        self, image: Image.Image, rng: Random
    ) -> tuple[Image.Image, float, tuple[float, float]]:
        """Crop an image and resize the crop.

        Returns:
            The resized crop, its downscale factor, and its (left, top) in pixels of the resized
            image.
        """
        size = (self.size, self.size)
        if self.buckets is not None:
            size = self.buckets.sizes[self.buckets.find_nearest(*image.size)]
        factor = min(side / target for side, target in zip(image.size, size, strict=True))
        crop_size = [target * factor for target in size]
        left, top = (
            (side - crop_side) * (rng.random() if self.crop == "random" else 0.5)
            for side, crop_side in zip(image.size, crop_size, strict=True)
        )
        box = (left, top, left + crop_size[0], top + crop_size[1])
        resized = image.resize(size, Image.Resampling.LANCZOS, box, reducing_gap=3.0)
        return resized, factor, (left / factor, top / factor)


def get_class_label(row: JsonMapping) -> int | None:
    """Return `class_label` of a row of metadata; None if it has none.

    Raises:
        FileFormatError: It is not a whole number from 0.
    """
    label = row.get("class_label")
    if label in (None, ""):
        return None
    if isinstance(label, bool) or not str(label).isdecimal():
        name = row.get("file_name", "a row")
        raise FileFormatError(f"`{name}` has `class_label` {label}, which is not a number from 0")
    return int(str(label))


def get_captions(row: JsonMapping) -> list[str]:
    """Return the captions of a row, of which a transform uses one; [""] if there are none.

    Raises:
        FileFormatError: Its `text` is neither a text nor a list of texts.
    """
    text = row.get("text")
    captions = text if isinstance(text, (list, tuple)) else [text]
    if any(isinstance(caption, (dict, list, tuple)) for caption in captions):
        name = row.get("file_name", "a row")
        raise FileFormatError(f"`{name}` has a caption that is neither a text nor a list of texts")
    return [str(caption) for caption in captions if caption] or [""]


@dataclass(frozen=True)
class TagShuffle:
    """Shuffle and drop the comma-separated tags of a caption, "1cat, sitting, red hat".

    Args:
        drop: Probability of omitting a tag.
        keep: Number of leading tags that stay in place.
    """

    shuffle: bool = True
    drop: float = 0.0
    keep: int = 1

    def __call__(self, text: str, rng: Random) -> str:
        tags = [tag.strip() for tag in text.split(",") if tag.strip()]
        leading_tags, other_tags = tags[: self.keep], tags[self.keep :]
        if self.shuffle:
            rng.shuffle(other_tags)
        kept_tags = [tag for tag in other_tags if rng.random() >= self.drop]
        return ", ".join(leading_tags + kept_tags)

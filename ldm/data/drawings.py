"""Training samples from drawings with transparency: captioned objects on colored backgrounds."""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.data.transforms import Transform, get_captions
from ldm.imaging.pixels import to_tensor
from ldm.runtime.errors import FileFormatError

__all__ = [
    "BACKGROUND_COLORS", "CAPTION_TEMPLATES", "EmojiTransform", "format_caption",
    "list_vocabulary_texts",
]  # fmt: skip

# Background colors by name; far enough apart to be classified by the nearest color.
BACKGROUND_COLORS = {
    "white": (255, 255, 255),
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 215, 50),
    "green": (60, 160, 70),
    "blue": (40, 80, 200),
    "purple": (130, 60, 170),
    "pink": (250, 150, 190),
    "brown": (130, 80, 45),
    "gray": (150, 150, 150),
    "sky blue": (135, 206, 235),
}
# (probability, caption template); a [group] is dropped if one of its fields is empty. Their words,
# `colour` included, are part of the vocabulary of trained models: see `list_vocabulary_texts`.
CAPTION_TEMPLATES = (
    (0.55, "a [{style} ]emoji[ of {an object}][ on a {colour} background]"),
    (0.20, "{object}[, {style} style][, {colour} background]"),
    (0.15, "[{style} ]{object}[ on {colour}]"),
    (0.10, "a picture of {an object}[ in {style} style][ on a {colour} background]"),
)
BRACKETS_TO_SPACES = str.maketrans(dict.fromkeys("[]{}", " "))


class EmojiTransform(Transform):
    """Place an RGBA drawing on a plain background, randomly scaled and shifted, with a caption.

    The metadata has `object` and `style`, and may have `keywords` of the object.

    Args:
        scale: Smallest and largest side of the drawing as a fraction of `size`.
        shift: Maximum offset from the center, in pixels.
        flip: Probability of a mirrored drawing.
        crop: Side of a random crop, in pixels; None = the full image.
        random_color_probability: Probability of a random background color. Captions still name the
            color of the variant, so this is for autoencoders only.
        drop: Probability of omitting the style, and that of the color, from the caption.
        drop_object: Probability of omitting the object.
        keyword_probability: Probability of replacing the object's name by one of its keywords.
        conditions: See `Transform`.
    """

    NAME = "emoji"
    IMAGE_OPTIONS = ("size", "scale", "shift", "flip", "crop", "random_color_probability")
    variants = tuple(BACKGROUND_COLORS)

    def __init__(
        self,
        *,
        size: int = 128,
        scale: tuple[float, float] = (0.79, 0.83),
        shift: int = 2,
        flip: float = 0.0,
        crop: int | None = None,
        random_color_probability: float = 0.0,
        drop: float = 0.1,
        drop_object: float = 0.02,
        keyword_probability: float = 0.1,
        conditions: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(conditions)
        self.size, self.scale, self.shift = size, tuple(scale), shift
        self.flip, self.crop = flip, crop
        self.image_size = crop or size
        self.random_color_probability = random_color_probability
        self.drop, self.drop_object = drop, drop_object
        self.keyword_probability = keyword_probability

    def make_image_fields(
        self, image: Image.Image, rng: Random, variant: str = ""
    ) -> dict[str, Tensor]:
        rgb = BACKGROUND_COLORS[variant]
        if rng.random() < self.random_color_probability:
            rgb = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        if rng.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        side = round(self.size * rng.uniform(*self.scale))
        shift = (rng.randint(-self.shift, self.shift), rng.randint(-self.shift, self.shift))
        layer = _paste_centered(image, size=self.size, side=side, shift=shift)
        tensor = _fill_background(layer, rgb)  # (3, size, size)
        top, left, length = 0, 0, self.crop or self.size
        if self.crop is not None:
            top, left = (rng.randint(0, self.size - length) for _ in range(2))
            tensor = tensor[:, top : top + length, left : left + length]
        alpha = layer.getchannel("A").crop((left, top, left + length, top + length))
        opacity = torch.from_numpy(np.array(alpha, dtype=np.float32) / 255)[None]  # (1, H, W)
        return self._make_fields(
            tensor, opacity, rng, original_size=(self.size, self.size), crop=(top, left)
        )

    def make_caption(self, row: Mapping[str, Any], rng: Random, variant: str = "") -> str:
        """Make a caption of object, style and color, each omitted at random."""
        if missing := [key for key in ("object", "style") if key not in row]:
            file_name = row.get("file_name", "a row")
            raise FileFormatError(
                f"`{file_name}` has no `{missing[0]}` in its metadata, which the transform `emoji`"
                " needs; `photo` is the transform for images with captions"
            )
        name = row["object"]
        if row.get("keywords") and rng.random() < self.keyword_probability:
            name = rng.choice(row["keywords"])
        weights = [weight for weight, _ in CAPTION_TEMPLATES]
        _, template = rng.choices(CAPTION_TEMPLATES, weights)[0]
        return format_caption(
            "" if rng.random() < self.drop_object else name,
            "" if rng.random() < self.drop else row["style"],
            "" if rng.random() < self.drop else variant,
            template,
        )


def format_caption(
    name: str, style: str, color: str, template: str = CAPTION_TEMPLATES[0][1]
) -> str:
    """Fill in one of CAPTION_TEMPLATES; an empty field is omitted with its [group].

    Example: format_caption("apple", "3d", "blue") = "a 3d emoji of an apple on a blue background".
    """
    if not name and "[ of {an object}]" not in template:
        template = CAPTION_TEMPLATES[0][1]
    values = {"{an object}": _add_article(name), "{object}": name}
    values |= {"{style}": style, "{colour}": color}
    text = ""
    for group in template.replace("]", "[").split("["):
        fields = {key: value for key, value in values.items() if key in group}
        if all(fields.values()):
            for key, value in fields.items():
                group = group.replace(key, value)
            text += group
    words = text.split(" ")
    for i, (article, next_word) in enumerate(pairwise(words)):
        if article == "a" and next_word[:1].lower() in "aeio":
            words[i] = "an"
    return " ".join(words)


def list_vocabulary_texts(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return texts that together contain every word that captions of these rows may have."""
    texts = [*BACKGROUND_COLORS, *(template for _, template in CAPTION_TEMPLATES), "an [ ] { }"]
    for row in rows:
        texts += [*get_captions(row), row.get("object") or "", row.get("style") or ""]
        texts += row.get("keywords") or []
    return [*texts, *(text.translate(BRACKETS_TO_SPACES) for text in texts)]


def _paste_centered(
    image: Image.Image, *, size: int, side: int, shift: tuple[int, int]
) -> Image.Image:
    """Scale an RGBA image to `side` and paste it into a square, shifted (down, right)."""
    # Scaled with premultiplied alpha: colors of transparent pixels must not bleed in at edges.
    small = image.convert("RGBa").resize((side, side), Image.Resampling.LANCZOS).convert("RGBA")
    layer = Image.new("RGBA", (size, size))
    margin = (size - side) // 2
    layer.paste(small, (margin + shift[1], margin + shift[0]))
    return layer


def _fill_background(layer: Image.Image, rgb: tuple[int, int, int]) -> Tensor:
    """Return an RGBA image on a plain background as (3, H, W) in [-1, 1]."""
    image = Image.new("RGBA", layer.size, (*rgb, 255))
    image.alpha_composite(layer)
    return to_tensor(image)[0]


def _add_article(name: str) -> str:
    is_plural = name.endswith("s") and not name.endswith(("ss", "us"))
    return name if is_plural or not name else f"a {name}"

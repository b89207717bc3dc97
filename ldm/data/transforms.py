"""What is done to a record before training: picture to tensor, fields to caption.

A transform is called with (record, rng) and returns {"jpg": image (3, H, W) in [-1, 1], "txt":
caption}, and what else its `records` ask for (see `ldm.data.conditions`). All chance comes from
`rng`, which the data set seeds by (seed, epoch, index), so a sample is the same whatever came
before it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.data import conditions
from ldm.data.buckets import Buckets
from ldm.imaging.reading import on_white

__all__ = ["COLOURS", "CROPS", "Emoji", "Photo", "Tags", "all_words", "caption", "compose"]

# Background colours and their names; far enough apart to be told by their nearest neighbour.
COLOURS = {
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
CROPS = ("centre", "random")
# Shares of captions per form; {object} etc. are filled in, a missing part drops its brackets.
FORMS = (
    (0.55, "a [{style} ]emoji[ of {an object}][ on a {colour} background]"),
    (0.20, "{object}[, {style} style][, {colour} background]"),
    (0.15, "[{style} ]{object}[ on {colour}]"),
    (0.10, "a picture of {an object}[ in {style} style][ on a {colour} background]"),
)
BRACKETS = str.maketrans(dict.fromkeys("[]{}", " "))


class Emoji:
    """An RGBA picture on a background of one of COLOURS, slightly moved and scaled, with a caption.

    size: side of the image, pixels.
    scale: smallest and largest side of the picture as a share of `size`.
    shift: greatest move from the centre, pixels.
    flip: probability of a mirrored picture.
    crop: side of a random crop, pixels, or None for the whole image.
    any_colour: share of backgrounds of a random colour without name.
    drop, drop_object: probability that style and colour, or the object, stay out of the caption.
    keyword: probability that a keyword of this object alone stands for its name.
    records: what else a sample holds, {"mask": options, …}.
    """

    SEEN = ("size", "scale", "shift", "flip", "crop", "any_colour", "records")  # all but captions

    def __init__(
        self,
        *,
        size: int = 128,
        scale: tuple[float, float] = (0.79, 0.83),
        shift: int = 2,
        flip: float = 0.0,
        crop: int | None = None,
        any_colour: float = 0.0,
        drop: float = 0.1,
        drop_object: float = 0.02,
        keyword: float = 0.1,
        records: Mapping[str, Any] | None = None,
    ) -> None:
        self.size, self.scale, self.shift = size, tuple(scale), shift
        self.flip, self.crop, self.any_colour = flip, crop, any_colour
        self.drop, self.drop_object, self.keyword = drop, drop_object, keyword
        self.records = conditions.makers(records or {})

    def __call__(self, record: Mapping[str, Any], rng: Random) -> dict[str, Any]:
        colour = rng.choice(list(COLOURS))
        seen = self.seen(record["picture"], colour, rng)
        return {**seen, "txt": self.caption(record, colour, rng)}

    def seen(self, picture: Image.Image, colour: str, rng: Random) -> dict[str, Tensor]:
        """All of a sample but its caption; `jpg` is the picture on the named background."""
        rgb = COLOURS[colour]
        if rng.random() < self.any_colour:
            rgb = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        if rng.random() < self.flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        side = round(self.size * rng.uniform(*self.scale))
        shift = (rng.randint(-self.shift, self.shift), rng.randint(-self.shift, self.shift))
        layer = placed(picture, size=self.size, side=side, shift=shift)
        image = on_colour(layer, rgb)  # (3, size, size)
        top, left, length = 0, 0, self.crop or self.size
        if self.crop is not None:
            top, left = (rng.randint(0, self.size - length) for _ in range(2))
            image = image[:, top : top + length, left : left + length]
        if not self.records:
            return {"jpg": image}
        cut = layer.getchannel("A").crop((left, top, left + length, top + length))
        opacity = torch.from_numpy(np.array(cut, dtype=np.float32) / 255)[None]  # (1, H, W)
        made = {name: make(image, opacity, rng) for name, make in self.records.items()}
        return {"jpg": image, **made}

    def caption(self, record: Mapping[str, Any], colour: str, rng: Random) -> str:
        """A caption that names object, style and colour, each left out now and then."""
        name = record["object"]
        if record.get("keywords") and rng.random() < self.keyword:
            name = rng.choice(record["keywords"])
        form = rng.choices([text for _, text in FORMS], [share for share, _ in FORMS])[0]
        return caption(
            "" if rng.random() < self.drop_object else name,
            "" if rng.random() < self.drop else record["style"],
            "" if rng.random() < self.drop else colour,
            form,
        )


class Photo:
    """A picture scaled and cut to a square, or to the nearest of several sizes, with its text.

    size: side of the image, pixels.
    crop: what stays of a picture with other proportions: its "centre", or a "random" part.
    flip: probability of a mirrored picture.
    buckets: options of other sizes with the same area (see `Buckets`), {} for their defaults.
    tags: options of captions that are lists (see `Tags`).
    records: as `Emoji`.
    """

    SEEN = ("size", "crop", "flip", "records")  # what pixels depend on, and the bucket

    def __init__(
        self,
        *,
        size: int = 512,
        crop: str = "centre",
        flip: float = 0.5,
        buckets: Mapping[str, int] | None = None,
        tags: Mapping[str, Any] | None = None,
        records: Mapping[str, Any] | None = None,
    ) -> None:
        if crop not in CROPS:
            raise ValueError(f"unknown crop `{crop}`, choose one of {', '.join(CROPS)}")
        self.size, self.crop, self.flip = size, crop, flip
        self.buckets = None if buckets is None else Buckets(size, **buckets)
        self.tags = None if tags is None else Tags(**tags)
        self.records = conditions.makers(records or {})

    def __call__(self, record: Mapping[str, Any], rng: Random) -> dict[str, Any]:
        return {**self.seen(record["picture"], rng), "txt": self.caption(record, rng)}

    def seen(self, picture: Image.Image, rng: Random) -> dict[str, Tensor]:
        """All of a sample but its caption."""
        picture = self.cut(on_white(picture), rng)
        if rng.random() < self.flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = _tensor(picture)  # (3, H, W)
        opacity = torch.ones_like(image[:1])
        made = {name: make(image, opacity, rng) for name, make in self.records.items()}
        return {"jpg": image, **made}

    def cut(self, picture: Image.Image, rng: Random) -> Image.Image:
        """The largest part of the right proportions, scaled."""
        size = (self.size, self.size)
        if self.buckets is not None:
            size = self.buckets.sizes[self.buckets.index(*picture.size)]
        scale = min(side / wanted for side, wanted in zip(picture.size, size, strict=True))
        kept = [wanted * scale for wanted in size]
        left, top = (
            (side - part) * (rng.random() if self.crop == "random" else 0.5)
            for side, part in zip(picture.size, kept, strict=True)
        )
        box = (left, top, left + kept[0], top + kept[1])
        return picture.resize(size, Image.Resampling.LANCZOS, box, reducing_gap=3.0)

    def caption(self, record: Mapping[str, Any], rng: Random) -> str:
        """The text of a record; a list of tags as `tags` says."""
        text = str(record.get("text") or "")
        return self.tags(text, rng) if self.tags else text


@dataclass(frozen=True)
class Tags:
    """What is done to a caption that is a list, "1cat, sitting, red hat".

    shuffle: put them into an order of chance. drop: probability that one is left out.
    keep: how many at the beginning stay as they are.
    """

    shuffle: bool = True
    drop: float = 0.0
    keep: int = 1

    def __call__(self, text: str, rng: Random) -> str:
        tags = [tag.strip() for tag in text.split(",") if tag.strip()]
        fixed, free = tags[: self.keep], tags[self.keep :]
        if self.shuffle:
            rng.shuffle(free)
        return ", ".join(fixed + [tag for tag in free if rng.random() >= self.drop])


def compose(
    picture: Image.Image,
    rgb: tuple[int, int, int],
    *,
    size: int,
    side: int,
    shift: tuple[int, int] = (0, 0),
) -> Tensor:
    """An RGBA picture, scaled to `side`, near the middle of a plain square.

    shift: (down, right) from the middle, pixels.
    Returns (3, size, size) in [-1, 1].
    """
    return on_colour(placed(picture, size=size, side=side, shift=shift), rgb)


def placed(
    picture: Image.Image, *, size: int, side: int, shift: tuple[int, int] = (0, 0)
) -> Image.Image:
    """The picture of `compose` before it gets its background, RGBA."""
    # scaled with premultiplied alpha, so that no hidden colour bleeds in at the edges
    small = picture.convert("RGBa").resize((side, side), Image.Resampling.LANCZOS).convert("RGBA")
    layer = Image.new("RGBA", (size, size))
    middle = (size - side) // 2
    layer.paste(small, (middle + shift[1], middle + shift[0]))
    return layer


def on_colour(layer: Image.Image, rgb: tuple[int, int, int]) -> Tensor:
    """An RGBA picture on a plain background, (3, H, W) in [-1, 1]."""
    image = Image.new("RGBA", layer.size, (*rgb, 255))
    image.alpha_composite(layer)
    return _tensor(image.convert("RGB"))


def caption(name: str, style: str, colour: str, form: str = FORMS[0][1]) -> str:
    """One of FORMS filled in; "" leaves a part out.

    Example: caption("apple", "3d", "blue") = "a 3d emoji of an apple on a blue background".
    """
    if not name and "[ of {an object}]" not in form:
        form = FORMS[0][1]
    parts = {"{an object}": _with_article(name), "{object}": name}
    parts |= {"{style}": style, "{colour}": colour}
    text = ""
    for piece in form.replace("]", "[").split("["):
        fields = {key: value for key, value in parts.items() if key in piece}
        if all(fields.values()):
            for key, value in fields.items():
                piece = piece.replace(key, value)
            text += piece
    words = text.split(" ")
    for i, (article, following) in enumerate(pairwise(words)):
        if article == "a" and following[:1].lower() in "aeio":
            words[i] = "an"
    return " ".join(words)


def all_words(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Texts that together hold every word that a caption of these records may have."""
    texts = [*COLOURS, *(form for _, form in FORMS), "an [ ] { }"]
    for row in rows:
        texts += [row.get("text", ""), row.get("object", ""), row.get("style", "")]
        texts += row.get("keywords", [])
    return [word for text in texts for word in (text, text.translate(BRACKETS))]


def _with_article(name: str) -> str:
    is_plural = name.endswith("s") and not name.endswith(("ss", "us"))
    return name if is_plural or not name else f"a {name}"


def _tensor(picture: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(picture, dtype=np.uint8))  # (H, W, 3)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1

"""Read the prompts of an evaluation, from a prompt file or captions in COCO's format."""

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

from ldm.runtime.errors import ArgumentError, FileFormatError, errors_as
from ldm.runtime.files import read_text

__all__ = ["PromptSource", "draw_prompts", "read_prompts"]


@dataclass(frozen=True)
class PromptSource:
    """A prompt, and the image that it describes.

    Args:
        text: Line of a prompt file, including its options.
        image: File name; None = unknown.
    """

    text: str
    image: str | None = None


def read_prompts(path: str | Path) -> list[PromptSource]:
    """Read a prompt file (one prompt per line), or COCO's captions (`captions_val2017.json`)."""
    path = Path(path).expanduser()
    text = read_text(path)
    sources = _read_coco(text, path) if path.suffix == ".json" else _read_lines(text)
    if not sources:
        raise ArgumentError(f"{path} has no prompts", "prompts")
    return sources


def draw_prompts(sources: list[PromptSource], count: int | None, seed: int) -> list[PromptSource]:
    """Draw prompts without replacement; a larger count starts with those of a smaller one.

    Args:
        count: None = all, in the order of the file.
    """
    if count is None:
        return sources
    if count > len(sources):
        raise ArgumentError(f"{count} prompts requested, there are {len(sources)}", "count")
    drawn = list(sources)
    Random(seed).shuffle(drawn)
    return drawn[:count]


def _read_lines(text: str) -> list[PromptSource]:
    return [PromptSource(line) for line in text.splitlines() if line.strip()]


def _read_coco(text: str, path: Path) -> list[PromptSource]:
    with errors_as(FileFormatError, f"{path} is not captions in COCO's format"):
        content = json.loads(text)
        names = {image["id"]: image["file_name"] for image in content["images"]}
        return [
            PromptSource(" ".join(row["caption"].split()), names[row["image_id"]])
            for row in content["annotations"]
        ]

"""Read the prompts of an evaluation, from a prompt file or captions in COCO's format."""

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

from ldm.runtime.errors import ArgumentError, FileFormatError, errors_as
from ldm.runtime.files import read_text

__all__ = ["EvaluationPrompt", "draw_prompts", "read_prompts"]


@dataclass(frozen=True)
class EvaluationPrompt:
    """A prompt, and the image that it describes.

    Args:
        text: Line of a prompt file, which may include options.
        image_name: File name of the image; None = unknown.
    """

    text: str
    image_name: str | None = None


def read_prompts(path: str | Path) -> list[EvaluationPrompt]:
    """Read a prompt file (one prompt per line), or COCO's captions (`captions_val2017.json`)."""
    path = Path(path).expanduser()
    text = read_text(path)
    prompts = _parse_coco(text, path) if path.suffix == ".json" else _parse_lines(text)
    if not prompts:
        raise ArgumentError(f"{path} has no prompts", "prompts")
    return prompts


def draw_prompts(
    prompts: list[EvaluationPrompt], count: int | None, seed: int
) -> list[EvaluationPrompt]:
    """Draw prompts without replacement; a larger count starts with the prompts of a smaller one.

    Args:
        count: Number of prompts; None = all, in the order of the file.
    """
    if count is None:
        return prompts
    if count > len(prompts):
        raise ArgumentError(f"{count} prompts requested, there are {len(prompts)}", "count")
    shuffled = list(prompts)
    Random(seed).shuffle(shuffled)
    return shuffled[:count]


def _parse_lines(text: str) -> list[EvaluationPrompt]:
    return [EvaluationPrompt(line) for line in text.splitlines() if line.strip()]


def _parse_coco(text: str, path: Path) -> list[EvaluationPrompt]:
    with errors_as(FileFormatError, f"{path} is not captions in COCO's format"):
        dataset = json.loads(text)
        file_names = {image["id"]: image["file_name"] for image in dataset["images"]}
        return [
            EvaluationPrompt(" ".join(item["caption"].split()), file_names[item["image_id"]])
            for item in dataset["annotations"]
        ]

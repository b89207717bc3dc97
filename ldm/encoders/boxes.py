"""Tokens of boxes: the input of latent-diffusion's layout models.

    [category, top left, bottom right] per object, padding, [top left, bottom right] of the image

A corner is a cell of a GRID_SIDE x GRID_SIDE grid. Rombach et al. 2022 (arXiv:2112.10752),
section 4.3.2; the tokens are those of taming-transformers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.runtime.errors import ArgumentError

__all__ = ["NUM_TOKENS", "Box", "check_box", "tokenize_boxes"]

NUM_TOKENS = 8192
GRID_SIDE = 90  # the largest whose cells are among the tokens
PADDING = NUM_TOKENS - 1


class Box(NamedTuple):
    """The box of an object; positions and sizes are fractions of the image's sides.

    Args:
        category: Class of the object, from 0.
        left, top: Position of the top left corner.
    """

    category: int
    left: float
    top: float
    width: float
    height: float


def tokenize_boxes(boxes: Sequence[Sequence[float]], length: int) -> Tensor:
    """Convert boxes to tokens (1, length) int64.

    Args:
        boxes: Fields of `Box`.
    Raises:
        ArgumentError: There are too many boxes, or one is invalid.
    """
    max_boxes = (length - 2) // 3
    if len(boxes) > max_boxes:
        raise ArgumentError(f"at most {max_boxes} boxes are allowed, got {len(boxes)}", "boxes")
    tokens: list[int] = []
    for values in boxes:
        check_box(values)
        box = Box(int(values[0]), *values[1:])
        right, bottom = min(box.left + box.width, 1.0), min(box.top + box.height, 1.0)
        tokens += [box.category, _find_cell(box.left, box.top), _find_cell(right, bottom)]
    tokens += [PADDING] * (length - 2 - len(tokens))
    return torch.tensor([[*tokens, _find_cell(0, 0), _find_cell(1, 1)]], device="cpu")


def check_box(values: Sequence[float]) -> None:
    """Raise ArgumentError for values that are not those of a `Box`."""
    allowed = "category, left, top, width, height, the last four as fractions of the image's sides"
    if len(values) != len(Box._fields):
        raise ArgumentError(f"a box must be {allowed}, got {tuple(values)}", "boxes")
    category, left, top, width, height = values
    if not (0 <= left < 1 and 0 <= top < 1 and 0 < width <= 1 and 0 < height <= 1):
        raise ArgumentError(f"a box must be {allowed}, got {tuple(values)}", "boxes")
    if not (0 <= category < PADDING and category == int(category)):
        message = f"the category of a box must be in 0 … {PADDING - 1}, got {category}"
        raise ArgumentError(message, "boxes")


def _find_cell(x: float, y: float) -> int:
    """Return the token of a point, in fractions of the image's sides."""
    return round(y * (GRID_SIDE - 1)) * GRID_SIDE + round(x * (GRID_SIDE - 1))

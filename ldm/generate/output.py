"""Save images: watermark, PNG, grid, and the lines on stdout."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.generate.provenance import Info, watermark_method
from ldm.generate.request import Request

if TYPE_CHECKING:
    from PIL import Image

    from ldm.imaging.output import OutputFolder

__all__ = [
    "GRID_LIMIT",
    "ProtectedPixels",
    "add_watermark",
    "print_result",
    "save_grid",
    "save_image",
]

GRID_LIMIT = 1024  # images; more would be kept in memory for a grid nobody can look at

ProtectedPixels = tuple["Image.Image", "Image.Image"]  # see `PreparedTask.protected_pixels`


def add_watermark(
    image: "Image.Image", info: Mapping[str, Any], protected: ProtectedPixels | None = None
) -> "Image.Image":
    """Add the watermark that the info names, except to protected pixels."""
    from PIL import Image

    from ldm.imaging.watermark import PAYLOADS, mark

    if info["watermark"] is not None:
        image = mark(image, PAYLOADS[info["payload"]], info["watermark"])
    return image if protected is None else Image.composite(image, *protected)


def save_image(
    folder: "OutputFolder", image: "Image.Image", info: Info, protected: ProtectedPixels | None
) -> str:
    """Save one image with its info; returns its path."""
    from ldm.imaging.metadata import fingerprint

    unmarked = {"sha256_unmarked": fingerprint(image)}
    return str(folder.save_sample(add_watermark(image, info, protected), info | unmarked))


def save_grid(
    folder: "OutputFolder", images: list[tuple["Image.Image", Info]], request: Request
) -> None:
    """Save all images of the run as one grid, with its own watermark."""
    from ldm.imaging.pixels import make_grid

    columns = request.output.n_rows or request.output.n_samples
    grid = make_grid([image for image, _ in images], columns)
    keys = ("prompt", "negative_prompt", "seed")
    cells = [
        {key: info[key] for key in keys} | {"file": info["path"] and Path(info["path"]).name}
        for _, info in images
    ]
    info = {key: value for key, value in images[0][1].items() if key != "path"}
    info |= {
        "task": "grid",
        "watermark": watermark_method(request, (grid.height, grid.width)),
        "images": cells,
    }
    path = folder.save_grid(add_watermark(grid, info), info)
    if not request.output.json:
        _print(str(path))


def print_result(info: Info, as_json: bool) -> None:
    """Print the path of an image, or its info as JSON."""
    if as_json:
        _print(json.dumps(info, ensure_ascii=False))
    elif info["path"] is not None:
        _print(info["path"])


def _print(line: str) -> None:
    """Print a line to stdout without breaking progress bars."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()

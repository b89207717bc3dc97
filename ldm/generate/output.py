"""Save the results of a run: images with watermark and info, and their grid; print their paths."""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.generate.provenance import FLOAT_WATERMARK, Info, watermark_method
from ldm.generate.request import Request
from ldm.imaging.mesh import save_mesh
from ldm.imaging.metadata import fingerprint
from ldm.imaging.output import OutputFolder, depth_path
from ldm.imaging.pixels import make_grid, to_pil
from ldm.imaging.rgbd import split_color
from ldm.imaging.watermark import PAYLOADS, embed_floats, embed_or_warn
from ldm.loading.files.latents import SUFFIX, save_latent
from ldm.model import LatentDiffusion
from ldm.runtime.ranks import rank_and_world_size
from ldm.runtime.types import JsonMapping

__all__ = [
    "Console", "RunListener", "add_watermark", "save_glb", "save_grid", "save_image",
    "save_image_latent", "to_images",
]  # fmt: skip

GRID_LIMIT = 1024  # images in a grid, all of which are kept in memory

log = logging.getLogger(__name__)

ProtectedPixels = tuple[Image.Image, Image.Image]  # see `PreparedTask.protected_pixels`


class RunListener:
    """Callbacks for the progress of a run; the base class ignores them, but logs warnings.

    Attributes:
        stopped_at: the step after which `on_step` raised Stop with a latent; None = it did not.
    """

    stopped_at: int | None = None

    def begin(self, model: LatentDiffusion, total: int) -> None:
        """Handle the start of a run of `total` images."""

    def on_step(self, step: int, steps: int, x: Tensor, denoised: Tensor) -> None:
        """Handle a finished step, with the arguments of `ldm.sample`'s callback."""

    def add_image(self, info: Info) -> None:
        """Handle a finished image; `info["path"]` is None if it was not saved."""

    def warn(self, message: str) -> None:
        """Handle a warning for the user."""
        log.warning("%s", message)


class Console(RunListener):
    """Prints paths or JSON of images to stdout, and shows a progress bar for each batch."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def on_step(self, step: int, steps: int, x: Tensor, denoised: Tensor) -> None:
        if step == 0:
            self._bar = tqdm(desc="Steps", total=steps, leave=False, disable=hides_progress())
        self._bar.update()
        if step + 1 == steps:
            self._bar.close()

    def add_image(self, info: Info) -> None:
        if self.as_json:
            is_unicode = sys.stdout.encoding.lower().startswith("utf")
            _print(json.dumps(info, ensure_ascii=not is_unicode))
        elif info["path"] is not None:
            for key in ("path", "depth_path", "relief_path", "latent_path"):
                if key in info:
                    _print(info[key])


def to_images(images: Tensor, info: JsonMapping, *, truncate: bool) -> list[Image.Image]:
    """Convert images (B, C, H, W) in [-1, 1] to 8 bits, without depth.

    Adds the watermark first if it is FLOAT_WATERMARK.
    """
    images = split_color(images)
    if info["watermark"] == FLOAT_WATERMARK:
        pixels = (images.detach().float().clamp(-1, 1) + 1).movedim(1, -1).cpu().numpy() * 127.5
        marked = [embed_floats(image, PAYLOADS[info["payload"]]) for image in pixels]
        images = torch.from_numpy(np.stack(marked)).movedim(-1, 1) / 127.5 - 1
    return to_pil(images, truncate)


def add_watermark(
    image: Image.Image, info: JsonMapping, protected: ProtectedPixels | None = None
) -> Image.Image:
    """Add the watermark named in the info, except to protected pixels."""
    if info["watermark"] not in (None, FLOAT_WATERMARK):
        image = embed_or_warn(image, PAYLOADS[info["payload"]], info["watermark"])
    return image if protected is None else Image.composite(image, *protected)


def save_image(
    folder: OutputFolder,
    image: Image.Image,
    info: Info,
    protected: ProtectedPixels | None,
    depth: Image.Image | None = None,
) -> Info:
    """Save an image with its info, and its depth; return their paths as entries of the info."""
    unmarked = {"sha256_unmarked": fingerprint(image)}
    path = folder.save_sample(add_watermark(image, info, protected), info | unmarked, depth)
    if depth is None:
        return {"path": str(path)}
    low, high = info["depth_range"]
    log.info("depth of %s: %d … %d of 65535, larger is nearer", path.name, low, high)
    return {"path": str(path), "depth_path": str(depth_path(path))}


def save_glb(path: str, image: Image.Image, depth: Image.Image) -> Info:
    """Save an image with depth as a 3D mesh; return path and triangles as entries of the info.

    Args:
        path: of the image; the mesh gets the same name, with `.glb`.
    """
    target = Path(path).with_suffix(".glb")
    triangles = save_mesh(target, image, depth)
    log.info("relief %s: %d triangles", target, triangles)
    return {"relief_path": str(target), "triangles": triangles}


def save_image_latent(info: Info, z: Tensor, model: LatentDiffusion) -> Info:
    """Save the latent (C, h, w) beside a saved image; return its path as an entry of the info.

    Args:
        info: of the image.
    """
    target = Path(info["path"]).with_suffix(SUFFIX)
    save_latent(target, z, model, info)
    return {"latent_path": str(target)}


def save_grid(
    folder: OutputFolder, images: list[tuple[Image.Image, Info]], request: Request
) -> None:
    """Save the images of a run as one grid, with its own watermark and info."""
    columns = request.output.n_rows or request.output.n_samples
    grid = make_grid(_pad_to_one_size([image for image, _ in images]), columns)
    keys = ("prompt", "negative_prompt", "seed")
    cells = [
        {key: info[key] for key in keys} | {"file": info["path"] and Path(info["path"]).name}
        for _, info in images
    ]
    # What all images share; files that lie beside the first one are not the grid's.
    info = {key: value for key, value in images[0][1].items() if not key.endswith("path")}
    info |= {
        "task": "grid",
        "watermark": watermark_method(request, (grid.height, grid.width), images[0][1]["payload"]),
        "images": cells,
    }
    path = folder.save_grid(add_watermark(grid, info), info)
    if not request.output.json:
        _print(str(path))


def _pad_to_one_size(images: list[Image.Image]) -> list[Image.Image]:
    """Center images on black where they differ in size, as lines of a prompt file may set it."""
    size = max(image.width for image in images), max(image.height for image in images)
    padded = []
    for image in images:
        cell = image
        if image.size != size:
            cell = Image.new("RGB", size)
            cell.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
        padded.append(cell)
    return padded


def hides_progress() -> bool:
    """Return whether stderr is not a terminal, or this is not the first process."""
    return not sys.stderr.isatty() or rank_and_world_size()[0] > 0


def _print(line: str) -> None:
    """Print a line to stdout without breaking progress bars."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()

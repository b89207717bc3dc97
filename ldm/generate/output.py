"""Save the results of a run: images with watermark and info, and their grid."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.generate.info import (
    FLOAT_WATERMARK,
    INTEGER_WATERMARK,
    Info,
    choose_watermark_method,
    make_depth_info,
)
from ldm.generate.listener import PATH_KEYS, RunListener
from ldm.generate.load import Models
from ldm.generate.request import Request
from ldm.generate.safety import hide_flagged, log_safety, make_safety_infos
from ldm.imaging.mesh import save_mesh
from ldm.imaging.metadata import hash_pixels
from ldm.imaging.output import OutputFolder, get_depth_path
from ldm.imaging.pixels import make_grid, to_pil
from ldm.imaging.rgbd import join_side_by_side, split_color, split_depth
from ldm.imaging.watermark import PAYLOADS, embed_floats, embed_or_warn
from ldm.loading.files.latents import LATENT_SUFFIX, save_latent
from ldm.runtime.types import JsonMapping

__all__ = ["ImageWriter", "add_watermark", "to_8_bit_rgb"]

MAX_GRID_IMAGES = 1024  # as they are kept in memory

log = logging.getLogger(__name__)

ProtectedPixels = tuple[Image.Image, Image.Image]  # see `PreparedTask.get_protected_pixels`


def to_8_bit_rgb(images: Tensor, info: JsonMapping, *, truncate: bool) -> list[Image.Image]:
    """Convert images (B, 3 or 4, H, W) in [-1, 1] to 8-bit RGB, without their depth.

    FLOAT_WATERMARK is added before the conversion.
    """
    images = split_color(images)
    if info["watermark"] == FLOAT_WATERMARK:
        pixels = (images.detach().float().clamp(-1, 1) + 1).movedim(1, -1).cpu().numpy() * 127.5
        watermarked = [embed_floats(image, PAYLOADS[info["payload"]]) for image in pixels]
        images = torch.from_numpy(np.stack(watermarked)).movedim(-1, 1) / 127.5 - 1
    return to_pil(images, truncate)


def add_watermark(
    image: Image.Image, info: JsonMapping, protected: ProtectedPixels | None = None
) -> Image.Image:
    """Add the watermark named in the info, except to protected pixels.

    `to_8_bit_rgb` has added FLOAT_WATERMARK already.
    """
    if info["watermark"] not in (None, FLOAT_WATERMARK):
        image = embed_or_warn(image, PAYLOADS[info["payload"]], info["watermark"])
    return image if protected is None else Image.composite(image, *protected)


class ImageWriter:
    """Saves the images of a run with watermark, info, depth and latent, then a grid of them.

    Args:
        models: The safety checker is applied to images; the base model describes saved latents.
        total: Number of images of the run.
    """

    def __init__(self, request: Request, models: Models, listener: RunListener, total: int) -> None:
        self.request = request
        self.models = models
        self.listener = listener
        name = request.inputs.output_name
        self._folder = OutputFolder(request.output.outdir, name)
        self._saves_grid = not request.output.skip_grid and name is None
        self._grid_images: list[tuple[Image.Image, Info]] = []
        if total > MAX_GRID_IMAGES and self._saves_grid:
            log.info("the grid will contain the first %d images", MAX_GRID_IMAGES)

    def save(
        self,
        images: Tensor,
        infos: Sequence[Info],
        protected: ProtectedPixels | None,
        latents: Tensor | None,
    ) -> None:
        """Save the images of a batch; flagged ones are kept, replaced or dropped as requested.

        Args:
            images: (B, 3, H, W) in [-1, 1], or (B, 4, H, W) with depth.
            infos: One for each image.
            latents: (B, C, h, w) to save beside them; None = they are not saved.
        """
        output = self.request.output
        depths = split_depth(images)
        truncate = "truncate" in self.request.sampling.legacy
        generated_images = to_8_bit_rgb(images, infos[0], truncate=truncate)
        safety_infos = make_safety_infos(
            self.models.safety_checker, generated_images, output.unsafe
        )
        for k, generated in enumerate(generated_images):
            info = infos[k] | safety_infos[k]
            image, depth = hide_flagged(generated, depths[k] if depths else None, info)
            if depth is not None:
                info |= make_depth_info(depth)
            info["path"] = None
            if image is not None and not output.skip_save:
                is_hidden = image is not generated
                info |= self._save_image(image, info, None if is_hidden else protected, depth)
                if latents is not None and not is_hidden:
                    path = Path(info["path"]).with_suffix(LATENT_SUFFIX)
                    save_latent(path, latents[k], self.models.base, info)
                    info["latent_path"] = str(path)
            log_safety(info, self.listener)
            self.listener.add_image(info)
            if image is not None and self._saves_grid and len(self._grid_images) < MAX_GRID_IMAGES:
                cell = image if depth is None else join_side_by_side(image, depth)
                self._grid_images.append((cell, info))

    def _save_image(
        self,
        image: Image.Image,
        info: Info,
        protected: ProtectedPixels | None,
        depth: Image.Image | None,
    ) -> Info:
        """Save an image with info, depth and mesh; return the keys of the info about its files."""
        saved_info = info | {"sha256_unmarked": hash_pixels(image)}
        path = self._folder.save_sample(add_watermark(image, info, protected), saved_info, depth)
        if depth is None:
            return {"path": str(path)}
        low, high = info["depth_range"]
        log.info("depth of %s: %d … %d of 65535, larger is nearer", path.name, low, high)
        file_info: Info = {"path": str(path), "depth_path": str(get_depth_path(path))}
        if self.request.output.glb:
            mesh = path.with_suffix(".glb")
            triangles = save_mesh(mesh, image, depth)
            log.info("mesh %s: %d triangles", mesh, triangles)
            file_info |= {"relief_path": str(mesh), "triangles": triangles}
        return file_info

    def save_grid(self) -> None:
        """Save the images so far as a grid, unless the request skips it."""
        if not self._grid_images:
            return
        output, (_, first_info) = self.request.output, self._grid_images[0]
        images = _pad_to_same_size([image for image, _ in self._grid_images])
        # As in the original scripts, `n_rows` is the number of images per row.
        grid = make_grid(images, output.n_rows or output.n_samples)
        keys = ("prompt", "negative_prompt", "seed")
        cells = [
            {key: info[key] for key in keys} | {"file": info["path"] and Path(info["path"]).name}
            for _, info in self._grid_images
        ]
        # The first image's info, as in A1111's grids, without the files of that image.
        info = {key: value for key, value in first_info.items() if key not in PATH_KEYS}
        size, payload = (grid.height, grid.width), first_info["payload"]
        method = choose_watermark_method(self.request, size, payload)
        if method == FLOAT_WATERMARK:  # the pixels of a grid are integers
            method = INTEGER_WATERMARK
        info |= {"task": "grid", "watermark": method, "images": cells}
        self.listener.add_grid(self._folder.save_grid(add_watermark(grid, info), info))


def _pad_to_same_size(images: list[Image.Image]) -> list[Image.Image]:
    """Center smaller images on black: lines of a prompt file may set different sizes."""
    width, height = max(image.width for image in images), max(image.height for image in images)
    padded = []
    for image in images:
        left, top = -((width - image.width) // 2), -((height - image.height) // 2)
        padded.append(image.crop((left, top, left + width, top + height)))  # pads with black
    return padded

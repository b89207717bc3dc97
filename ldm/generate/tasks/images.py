"""Define inputs of tasks with an input image or a folder of them, and read the image."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import Self

from ldm.generate.groups import Inputs
from ldm.generate.options import option
from ldm.generate.request import Request
from ldm.generate.tasks.base import PreparedTask
from ldm.runtime.errors import ArgumentError, MissingArgument, MissingFile, errors_about
from ldm.runtime.ranks import get_rank_and_world_size

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ldm.model import LatentDiffusion

__all__ = [
    "DEPTH_SUFFIX", "FolderInputs", "ImageInputs", "PreparedImageTask", "RGBDInputs", "fit_image",
]  # fmt: skip

DEPTH_SUFFIX = "_depth"  # X.png has the depth X_depth.png


@dataclass(frozen=True)
class ImageInputs(Inputs):
    """The input image."""

    # fmt: off
    init_img: str | None = option(None, "--init-img", "--image", metavar="FILE", is_input_file=True,
        label="Image", help="input image, resized to --H x --W")
    resize_mode: str = option("crop", "--resize-mode", choices=("crop", "stretch", "pad"),
        label="Resize mode", help="for images of another aspect ratio: crop, stretch, or pad by"
        " repeating the edge (default: %(default)s)")
    # fmt: on


@dataclass(frozen=True)
class RGBDInputs(ImageInputs):
    """The input image and, for LDM3D, its depth."""

    # fmt: off
    depth: str | None = option(None, "--depth", metavar="FILE", is_input_file=True,
        label="Depth (for LDM3D)",
        help="for LDM3D: depth of the input image, of the same size, white is near; 8 or 16 bits,"
        " or floats in 0 … 1")
    # fmt: on


@dataclass(frozen=True)
class FolderInputs(RGBDInputs):
    """An input image, or a folder of them; in the folder `depth`, X.png has X_depth.png."""

    # fmt: off
    indir: str | None = option(None, "--indir", metavar="DIR",
        help="process all images in a folder, each to OUTDIR/NAME.png; --depth is then a folder"
        " with NAME_depth.png")
    # fmt: on

    def split_by_image(self) -> Sequence["FolderInputs"]:
        """Return the inputs for each image of the folder that this process works on.

        Raises:
            MissingFile: The folder has no images.
            ArgumentError: There is an input image, too.
        """
        if self.indir is None:
            return [self]
        if self.init_img is not None:
            raise ArgumentError("give an image or a folder of images, not both", "indir")
        rank, world_size = get_rank_and_world_size()
        return self.list_inputs(Path(self.indir).expanduser())[rank::world_size]

    def list_inputs(self, folder: Path) -> list["FolderInputs"]:
        """Return the inputs for each image in a folder."""
        from ldm.imaging.reading import list_images

        paths = list_images(folder, "indir")
        if self.depth is None:
            return [replace(self, init_img=str(path)) for path in paths]
        paths = [path for path in paths if not path.stem.endswith(DEPTH_SUFFIX)]
        return [self.with_image(path) for path in paths]

    def with_image(self, path: Path) -> Self:
        """Return the inputs for one image of the folder, with its depth if `depth` is set.

        Raises:
            MissingFile: The depth of the image is missing.
        """
        depth = Path(self.depth or "") / f"{path.stem}{DEPTH_SUFFIX}.png"
        if self.depth is not None and not depth.is_file():
            raise MissingFile(f"no depth `{depth}` for the image `{path}`", "depth")
        return replace(self, init_img=str(path), depth=self.depth and str(depth))

    @property
    def is_folder(self) -> bool:
        return self.indir is not None

    @property
    def output_name(self) -> str | None:
        return Path(self.init_img).stem if self.is_folder and self.init_img else None


def load_input_image(request: Request) -> "Image.Image":
    """Load the input image, resized to the requested size.

    Raises:
        MissingArgument: No image is given.
        ValueError, FileNotFoundError: The file is missing or not an image.
    """
    from ldm.imaging.reading import load_image

    path = _get_image_path(request)
    with errors_about("indir" if request.inputs.is_folder else "init_img"):
        image = load_image(path)
    return fit_image(request, image)


def load_input_depth(request: Request) -> "Tensor | None":
    """Load the depth of the input image, resized to the requested size: (1, 1, H, W) in [0, 1].

    Raises:
        ArgumentError: It has another size than the image.
    """
    import numpy as np
    import torch

    from ldm.imaging.depth import load_unnormalized_depth
    from ldm.imaging.reading import read_size

    inputs = request.inputs
    if not isinstance(inputs, RGBDInputs) or inputs.depth is None:
        return None
    with errors_about("depth"):
        depth = load_unnormalized_depth(inputs.depth)
    width, height = read_size(_get_image_path(request))
    if depth.size != (width, height):
        message = f"the depth is {depth.width}x{depth.height}, the image {width}x{height}"
        raise ArgumentError(message, "depth")
    return torch.tensor(np.asarray(fit_image(request, depth)))[None, None].clamp(0, 1)


def _get_image_path(request: Request) -> str:
    path = request.get_inputs(ImageInputs).init_img
    if path is None:
        raise MissingArgument("an input image is missing", "init_img")
    return path


def fit_image(request: Request, image: "Image.Image") -> "Image.Image":
    """Resize an image to the requested size; with legacy `size`, to multiples of 64."""
    from ldm.imaging.pixels import resize_to, resize_to_multiple

    if "size" in request.sampling.legacy and not request.task.upscales:
        return resize_to_multiple(image, 64, request.task.legacy_filter)
    mode = request.get_inputs(ImageInputs).resize_mode
    return resize_to(image, request.sampling.size, mode)


class PreparedImageTask(PreparedTask):
    """A prepared task with one input image.

    Attributes:
        image: (1, 3, H, W) in [-1, 1].
        depth: (1, 1, H, W) in [0, 1]; None = not given.
    """

    def __init__(self, request: Request) -> None:
        from ldm.imaging.pixels import to_tensor

        super().__init__(request)
        self.image, self.depth = to_tensor(load_input_image(request)), load_input_depth(request)

    def get_output_size(self, model: "LatentDiffusion") -> tuple[int, int]:
        return self.image.shape[-2], self.image.shape[-1]

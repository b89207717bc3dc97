"""Base classes of tasks: Task describes one, PreparedTask has read its inputs from disk."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import Self

from ldm.generate.groups import SDXL, Inputs, ModelChoice, Output, Prompts, Sampling, UpscalerChoice
from ldm.generate.options import Option, Value, option, options_of
from ldm.generate.request import Request
from ldm.runtime.errors import ArgumentError, MissingArgument, MissingFile
from ldm.runtime.ranks import rank_and_world_size

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ldm.model import LatentDiffusion
    from ldm.pipelines.options import TaskOptions

DEPTH = "_depth"  # suffix of the file name of an image's depth

__all__ = [
    "DEPTH", "FolderInputs", "ImageInputs", "PreparedImageTask", "PreparedTask", "RGBDInputs",
    "Task", "fit_image",
]  # fmt: skip


class PreparedTask:
    """A task with its inputs read, so that invalid files fail before the model is loaded.

    Args:
        request: request with the inputs of one image.
    """

    def __init__(self, request: Request) -> None:
        self.request = request

    def output_size(self, model: "LatentDiffusion") -> tuple[int, int]:
        """Return (height, width) of the images in pixels: as requested, else the model's own."""
        height, width = self.request.sampling.size
        native_height, native_width = (side * model.downscale for side in model.latent_size)
        return height or native_height, width or native_width

    def begin(self, model: "LatentDiffusion") -> None:
        """Do what needs the model before the first batch."""

    def generate(
        self, model: "LatentDiffusion", prompts: list[str], options: "TaskOptions"
    ) -> "Tensor":
        """Make one batch of images, (B, 3, H, W) in [-1, 1]; with depth (B, 4, H, W).

        Args:
            options: keyword arguments of the pipeline.
        """
        raise NotImplementedError

    def protected_pixels(self) -> "tuple[Image.Image, Image.Image] | None":
        """Return (image, mask "1"): where the mask is False, results keep the image's pixels."""
        return None


@dataclass(frozen=True)
class Task:
    """The description of a task, for command line, page and PNG metadata.

    Args:
        name: name of the command and script, and in PNG metadata.
        title: title of its tab on the page.
        summary: description in `--help`, with examples.
        inputs: its group of input options.
        prepare: reads the inputs of a request.
        families: names in `ldm.pipelines.families.FAMILIES` of models that it works with.
        defaults: defaults of options that differ for this task.
        scale: default guidance scale for Stable Diffusion 1 and 2.
        demo_model: path of the demo model for this task; None = the text-to-image demo model.
        example_flags: flags for a published model, as an example.
        noise_from_numpy: whether the original drew the initial noise with numpy.
        enlarges: whether its images are larger than its input.
        takes_upscaler: whether it may be followed by an x2 latent upscaler.
    """

    name: str
    title: str
    summary: str
    inputs: type[Inputs]
    prepare: Callable[[Request], PreparedTask]
    families: tuple[str, ...]
    defaults: Mapping[str, Value] = field(default_factory=dict)
    scale: float = 9.0
    demo_model: str | None = None
    example_flags: str = "--ckpt sd-v2-1 --H 768 --W 768"
    noise_from_numpy: bool = False
    enlarges: bool = False
    takes_upscaler: bool = False

    def groups(self) -> dict[str, type]:
        """Return the groups of options by the names of their fields in `Request`."""
        sdxl = {"sdxl": SDXL} if "text" in self.families else {}
        upscaling = {"upscaling": UpscalerChoice} if self.takes_upscaler else {}
        return {
            "inputs": self.inputs,
            "prompts": Prompts,
            "model": ModelChoice,
            "sampling": Sampling,
            **sdxl,
            **upscaling,
            "output": Output,
        }

    def options(self) -> dict[str, tuple[Option, Value]]:
        """Return (option, default) by name."""
        return _options(tuple(self.groups().values()), tuple(self.defaults.items()))

    def request(self, values: Mapping[str, object] | None = None) -> Request:
        """Build a request for this task; options that are not in `values` have their defaults.

        Raises:
            ArgumentError: see `Request.with_values`.
        """
        return Request(self, self.inputs()).with_values({**self.defaults, **(values or {})})


@cache
def _options(
    groups: tuple[type, ...], defaults: tuple[tuple[str, Value], ...]
) -> dict[str, tuple[Option, Value]]:
    options: dict[str, tuple[Option, Value]] = {}
    for group in groups:
        options |= options_of(group)
    for name, default in defaults:
        options[name] = (options[name][0], default)
    return options


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
    """An input image, or a folder of them; with `depth`, that of X.png is X_depth.png."""

    # fmt: off
    indir: str | None = option(None, "--indir", metavar="DIR",
        help="process all images in a folder, each to OUTDIR/NAME.png; --depth is then a folder"
        " with NAME_depth.png")
    # fmt: on

    def split_by_image(self) -> Sequence["FolderInputs"]:
        """Return the inputs for each image of the folder that this process works on.

        Raises:
            MissingFile: the folder has no images.
        """
        if self.indir is None:
            return [self]
        rank, world_size = rank_and_world_size()
        return self.list_folder(Path(self.indir).expanduser())[rank::world_size]

    def list_folder(self, folder: Path) -> list["FolderInputs"]:
        """Return the inputs for each image in a folder."""
        from ldm.imaging.reading import list_images

        paths = list_images(folder, "indir")
        if self.depth is None:
            return [replace(self, init_img=str(path)) for path in paths]
        paths = [path for path in paths if not path.stem.endswith(DEPTH)]
        return [self.replace_image(path) for path in paths]

    def replace_image(self, path: Path) -> Self:
        """Return the inputs for an image of the folder, with its depth if there is a folder of it.

        Raises:
            MissingFile: the depth of the image is missing.
        """
        depth = Path(self.depth or "") / f"{path.stem}{DEPTH}.png"
        if self.depth is not None and not depth.is_file():
            raise MissingFile(f"no depth `{depth}` for the image `{path}`", "depth")
        return replace(self, init_img=str(path), depth=self.depth and str(depth))

    @property
    def is_folder(self) -> bool:
        return self.indir is not None

    @property
    def output_name(self) -> str | None:
        return Path(self.init_img).stem if self.is_folder and self.init_img else None


def read_image(request: Request) -> "Image.Image":
    """Load the input image at the requested size.

    Raises:
        MissingArgument: no image is given.
        ValueError, FileNotFoundError: the file is missing or not an image.
    """
    from ldm.imaging.reading import load_image

    return fit_image(request, load_image(_image_path(request)))


def read_depth(request: Request) -> "Tensor | None":
    """Load the depth of the input image at the requested size, (1, 1, H, W) in [0, 1].

    Raises:
        ArgumentError: it has another size than the image.
    """
    import numpy as np
    import torch

    from ldm.imaging.depth import load_relative_depth
    from ldm.imaging.reading import read_size

    inputs = request.inputs
    if not isinstance(inputs, RGBDInputs) or inputs.depth is None:
        return None
    depth, size = load_relative_depth(inputs.depth), read_size(_image_path(request))
    if depth.size != size:
        sizes = ("{}x{}".format(*pair) for pair in (depth.size, size))
        raise ArgumentError("the depth is {}, the image {}".format(*sizes), "depth")
    return torch.tensor(np.asarray(fit_image(request, depth)))[None, None].clamp(0, 1)


def _image_path(request: Request) -> str:
    path = request.inputs_as(ImageInputs).init_img
    if path is None:
        raise MissingArgument("an input image is missing", "init_img")
    return path


def fit_image(request: Request, image: "Image.Image") -> "Image.Image":
    """Resize an image to the requested size; with legacy `size` to its own, in multiples of 64."""
    from ldm.imaging.pixels import resize_to, resize_to_multiple

    if "size" in request.sampling.legacy and not request.task.enlarges:
        return resize_to_multiple(image, 64)
    mode = request.inputs_as(ImageInputs).resize_mode
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
        self.image, self.depth = to_tensor(read_image(request)), read_depth(request)

    def output_size(self, model: "LatentDiffusion") -> tuple[int, int]:
        return self.image.shape[-2], self.image.shape[-1]

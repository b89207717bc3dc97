"""Define Task, the description of a task, and PreparedTask, a task that has read its inputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, cast

from ldm.generate.groups import (
    SDXL,
    Inputs,
    ModelOptions,
    Output,
    Prompts,
    Sampling,
    UpscalerOptions,
)
from ldm.generate.options import Option, Value, get_options
from ldm.generate.request import Request
from ldm.runtime.errors import ArgumentError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ldm.model import LatentDiffusion
    from ldm.pipelines.options import TaskOptions, UnguidedOptions

__all__ = ["PreparedTask", "Task", "UnguidedTask", "drop_prompt_options"]


class PreparedTask:
    """A task that has read its inputs, so that invalid files fail before the model is loaded.

    Args:
        request: Request with the inputs of one image.
    """

    def __init__(self, request: Request) -> None:
        self.request = request

    def get_output_size(self, model: "LatentDiffusion") -> tuple[int, int]:
        """Return (height, width) of the images in pixels: as requested, else the model's own."""
        height, width = self.request.sampling.size
        native_height, native_width = (side * model.downscale_factor for side in model.latent_size)
        return height or native_height, width or native_width

    def set_up(self, model: "LatentDiffusion") -> None:
        """Check inputs against the model and load other files, before the first batch."""

    def generate(
        self, model: "LatentDiffusion", prompts: list[str], options: "TaskOptions"
    ) -> "Tensor":
        """Make one batch of images, (B, 3, H, W) in [-1, 1]; with depth (B, 4, H, W).

        Args:
            options: Keyword arguments of the pipeline.
        """
        raise NotImplementedError

    def get_protected_pixels(self) -> "tuple[Image.Image, Image.Image] | None":
        """Return (image, mask of mode "1"); where the mask is False, results keep the image."""
        return None


class UnguidedTask(PreparedTask):
    """A task of models without guidance, which read no prompts."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        if request.sampling.scale not in (None, 1):
            message = f"{request.task.name} has no guidance, leave scale out"
            raise ArgumentError(message, "scale")


def drop_prompt_options(options: "TaskOptions") -> "UnguidedOptions":
    """Return the options without `negative_prompt` and `scale`, of which some tasks take one."""
    dropped = ("negative_prompt", "scale")
    unguided = {name: value for name, value in options.items() if name not in dropped}
    return cast("UnguidedOptions", unguided)  # pipelines reject other keyword arguments


@dataclass(frozen=True)
class Task:
    """The description of a task, for command line, page and PNG metadata.

    Args:
        name: Name of the command and script, and in PNG metadata.
        title: Title of its tab on the page.
        summary: Description in `--help`, with examples.
        inputs: Its group of input options.
        prepare: Reads the inputs of a request.
        families: Names in `ldm.pipelines.families.FAMILIES` of models that it works with.
        defaults: Defaults of options that differ for this task.
        scale: Default guidance scale for Stable Diffusion 1 and 2.
        demo_model: Path of the demo model for this task; None = the text-to-image demo model.
        example_flags: Flags for a published model, as an example.
        uses_numpy_noise: Whether the original draws the initial noise with numpy.
        legacy_filter: Pillow's filter with which the original reduces images to multiples of 64.
        upscales: Whether its images are larger than their input.
        takes_upscaler: Whether it may be followed by an x2 latent upscaler.
        is_on_page: Whether it has a tab on the page.
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
    uses_numpy_noise: bool = False
    legacy_filter: str = "BICUBIC"
    upscales: bool = False
    takes_upscaler: bool = False
    is_on_page: bool = True

    @property
    def groups(self) -> dict[str, type]:
        """Groups of options by the names of their fields in `Request`."""
        sdxl = {"sdxl": SDXL} if "text" in self.families else {}
        upscaling = {"upscaling": UpscalerOptions} if self.takes_upscaler else {}
        return {
            "inputs": self.inputs,
            "prompts": Prompts,
            "model": ModelOptions,
            "sampling": Sampling,
            **sdxl,
            **upscaling,
            "output": Output,
        }

    @property
    def options(self) -> dict[str, Option]:
        """Options by name, with the defaults of this task."""
        return _collect_options(tuple(self.groups.values()), tuple(self.defaults.items()))

    def build_request(self, values: Mapping[str, object] | None = None) -> Request:
        """Build a request for this task; options that are not in `values` have their defaults.

        Raises:
            ArgumentError: See `Request.with_values`.
        """
        return Request(self, self.inputs()).with_values({**self.defaults, **(values or {})})


@cache
def _collect_options(
    groups: tuple[type, ...], defaults: tuple[tuple[str, Value], ...]
) -> dict[str, Option]:
    options: dict[str, Option] = {}
    for group in groups:
        options |= get_options(group)
    return options | {name: replace(options[name], default=value) for name, value in defaults}

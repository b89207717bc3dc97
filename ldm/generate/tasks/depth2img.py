"""Depth to image."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ldm.generate.option_parsers import parse_fraction
from ldm.generate.options import option
from ldm.generate.request import Request
from ldm.generate.tasks.base import Task
from ldm.generate.tasks.images import ImageInputs, PreparedImageTask, fit_image
from ldm.runtime.errors import errors_about
from ldm.runtime.files import check_parent_folder

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.model import LatentDiffusion
    from ldm.pipelines.options import TaskOptions


@dataclass(frozen=True)
class Depth2ImgInputs(ImageInputs):
    """An image, its depth, and how much to change it."""

    # fmt: off
    strength: float = option(0.9, "--strength", parse=parse_fraction, metavar="S",
        label="Denoising strength",
        help="0 keeps the image, 1 keeps only its depth (default: %(default)s)")
    depth_map: str | None = option(None, "--depth-map", metavar="FILE", is_input_file=True,
        label="Depth map (optional)",
        help="depth map of 8 or 16 bits, white is near (default: estimated from the image)")
    depth_inverted: bool = option(False, "--depth-inverted", label="Invert depth",
        help="in the depth map, white is far")
    save_depth: str | None = option(None, "--save-depth", metavar="FILE",
        help="save the estimated depth map, a 16-bit PNG")
    midas: str | None = option(None, "--midas", metavar="FILE", is_input_file=True,
        help="depth network, dpt_hybrid-midas-501f0c75.pt (default: the checkpoint's)")
    # fmt: on


class Depth2ImgTask(PreparedImageTask):
    """Image to image that keeps the depth of the image."""

    def __init__(self, request: Request) -> None:
        from ldm.imaging.depth import load_depth

        super().__init__(request)
        self.inputs = inputs = request.get_inputs(Depth2ImgInputs)
        self._estimated_depth: Tensor | None = None  # not normalized
        if inputs.save_depth is not None:
            check_parent_folder(inputs.save_depth, "save_depth")
        if inputs.depth_map is not None:
            with errors_about("depth_map"):
                depth = load_depth(inputs.depth_map, inverted=inputs.depth_inverted)
            self.depth = self._fit_depth(depth)

    def _fit_depth(self, depth: "Tensor") -> "Tensor":
        """Resize a depth map (1, 1, H, W) in the mode of the image if its aspect ratio differs."""
        import numpy as np
        import torch
        from PIL import Image

        height, width = self.image.shape[-2:]
        if depth.shape[-2] * width == depth.shape[-1] * height:
            return depth
        fitted = fit_image(self.request, Image.fromarray(depth[0, 0].numpy()))
        return torch.tensor(np.asarray(fitted))[None, None].clamp(0, 1)

    def estimate_depth(self, model: "LatentDiffusion") -> "Tensor":
        """Estimate the relative inverse depth (1, 1, H', W'), and save it if requested.

        Raises:
            NonFinite: It is NaN or infinite; in half precision the batch is then retried.
        """
        from ldm import pipelines
        from ldm.imaging.depth import save_depth
        from ldm.pipelines.finite import check_finite

        estimate = check_finite(pipelines.estimate_depth(model, self.image), "the depth network")
        if self.inputs.save_depth is not None:
            save_depth(self.inputs.save_depth, estimate)
        return estimate

    def generate(
        self, model: "LatentDiffusion", prompts: list[str], options: "TaskOptions"
    ) -> "Tensor":
        from ldm import pipelines

        needs_estimate = self.depth is None or self.inputs.save_depth is not None
        if self._estimated_depth is None and needs_estimate:
            self._estimated_depth = self.estimate_depth(model)
        depth = self._estimated_depth if self.depth is None else self.depth
        return pipelines.depth2img(
            model, prompts, self.image, depth=depth, strength=self.inputs.strength,
            **options,
        )  # fmt: skip


TASK = Task(
    name="depth2img",
    title="Depth",
    summary="""Change an image by a prompt, guided by its depth.

    ldm depth2img --ckpt sd-v2-depth --init-img room.png --prompt "a room made of ice"

The depth is estimated by the model's own network, or comes from --depth-map.
""",
    inputs=Depth2ImgInputs,
    prepare=Depth2ImgTask,
    families=("depth",),
    defaults={
        "prompt": "a professional photograph of an astronaut",
        "outdir": "outputs/depth2img-samples",
        "n_samples": 1,
        "n_iter": 1,
    },
    example_flags="--ckpt sd-v2-depth",
)

"""Upscaling by four."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ldm.generate.options import option, parse_natural
from ldm.generate.tasks.base import ImageInputs, PreparedImageTask, Task

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.model import LatentDiffusion
    from ldm.pipelines.common import TaskOptions


@dataclass(frozen=True)
class UpscaleInputs(ImageInputs):
    """A small image and the noise to add to it."""

    # fmt: off
    noise_level: int = option(20, "--noise-level", parse=parse_natural, metavar="N", maximum=349,
        label="Noise level (0 – 349)",
        help="noise on the image, 0 to 349: more noise, more invented detail"
        " (default: %(default)s)")
    # fmt: on


class Upscale(PreparedImageTask):
    """Enlarge an image four times."""

    def output_size(self, model: "LatentDiffusion") -> tuple[int, int]:
        height, width = super().output_size(model)
        return height * model.downscale, width * model.downscale

    def generate(
        self, model: "LatentDiffusion", prompts: list[str], options: "TaskOptions"
    ) -> "Tensor":
        from ldm import pipelines

        level = self.request.inputs_as(UpscaleInputs).noise_level
        return pipelines.upscale(model, prompts, self.image, noise_level=level, **options)


TASK = Task(
    name="upscale",
    title="Upscale",
    summary="""Enlarge an image four times.

    ldm upscale --ckpt x4-upscaler-ema.safetensors --init-img small.png --prompt "a white cat"

Large images are made in overlapping tiles of --vae-tile pixels of the result.
""",
    inputs=UpscaleInputs,
    prepare=Upscale,
    families=("upscaling",),
    defaults={
        "prompt": "a high quality professional photograph",
        "outdir": "outputs/upscale-samples",
        "n_samples": 1,
        "n_iter": 1,
    },
    demo_model="checkpoints/demo-upscaler.safetensors",
    demo_scale=1.0,  # prompts hardly matter for details
    example_flags="--ckpt sd-x4-upscaler",
    noise_from_numpy=True,
    enlarges=True,
)

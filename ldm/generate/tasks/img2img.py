"""Image to image."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ldm.generate.option_parsers import parse_fraction
from ldm.generate.options import option
from ldm.generate.request import Request
from ldm.generate.tasks.base import Task
from ldm.generate.tasks.images import FolderInputs, PreparedImageTask

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.model import LatentDiffusion
    from ldm.pipelines.options import TaskOptions


@dataclass(frozen=True)
class Img2ImgInputs(FolderInputs):
    """An image and how much to change it."""

    # fmt: off
    strength: float = option(0.8, "--strength", parse=parse_fraction, metavar="S",
        label="Denoising strength", help="0 keeps the image, 1 ignores it (default: %(default)s)")
    inversion: bool = option(False, "--ddim-inversion", label="DDIM inversion",
        help="start from DDIM inversion of the image, which keeps its composition")
    source_prompt: str = option("", "--source-prompt", metavar="TEXT", label="Source prompt",
        help="description of the input image, for --ddim-inversion")
    # fmt: on


class Img2ImgTask(PreparedImageTask):
    """Image to image."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self._z: Tensor | None = None

    def generate(
        self, model: "LatentDiffusion", prompts: list[str], options: "TaskOptions"
    ) -> "Tensor":
        from ldm import pipelines

        inputs = self.request.get_inputs(Img2ImgInputs)
        if inputs.inversion:
            options["x_T"] = None  # from `fixed_code`, which is ignored with a warning
        return pipelines.img2img(
            model,
            prompts,
            self.image,
            strength=inputs.strength,
            inversion=inputs.inversion,
            source_prompt=inputs.source_prompt if inputs.inversion else "",
            depth=self.depth,
            z=self._sample_latent_once(model, len(prompts)),
            **options,
        )

    def _sample_latent_once(self, model: "LatentDiffusion", batch_size: int) -> "Tensor | None":
        """With legacy `noise`, sample the image's latent once for all batches; else return None."""
        from ldm.pipelines import add_depth, encode_image, make_noise_source

        legacy = self.request.sampling.legacy
        if "noise" not in legacy:
            return None
        if self._z is None:
            image = add_depth(model, self.image, self.depth)
            noise = make_noise_source(None, batch_size, legacy)
            self._z = encode_image(model, image, batch_size, noise)
        return self._z[:batch_size]


TASK = Task(
    name="img2img",
    title="img2img",
    summary="""Change an image toward a prompt.

    ldm img2img --init-img photo.png --prompt "a watercolor" --strength 0.6
    ldm img2img --indir photos --outdir painted --prompt "a watercolor"
""",
    inputs=Img2ImgInputs,
    prepare=Img2ImgTask,
    families=("text", "refiner"),
    defaults={
        "prompt": "a painting of a virus monster playing guitar",
        "outdir": "outputs/img2img-samples",
        "n_samples": 2,
        "n_iter": 1,
    },
    takes_upscaler=True,
    legacy_filter="LANCZOS",
)

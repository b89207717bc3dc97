"""Images of segmentation maps, by semantic synthesis models of latent-diffusion."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ldm.generate.groups import Inputs
from ldm.generate.options import option
from ldm.generate.request import Request
from ldm.generate.tasks.base import Task, UnguidedTask, drop_prompt_options
from ldm.runtime.errors import ArgumentError, MissingArgument, errors_about

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.model import LatentDiffusion
    from ldm.pipelines.options import TaskOptions


@dataclass(frozen=True)
class SemanticInputs(Inputs):
    """The segmentation map."""

    # fmt: off
    segmentation: str | None = option(None, "--segmentation", metavar="FILE", is_input_file=True,
        label="Segmentation map",
        help="segmentation map: a PNG of one channel, or with a palette, whose values are class"
        " labels; the image gets its size")
    # fmt: on


class Semantic2ImgTask(UnguidedTask):
    """Images of one segmentation map, (1, 1, H, W) int64."""

    def __init__(self, request: Request) -> None:
        from ldm.imaging.segmentation import load_segmentation

        super().__init__(request)
        path = request.get_inputs(SemanticInputs).segmentation
        if path is None:
            raise MissingArgument("a segmentation map is missing", "segmentation")
        if request.sampling.size != (None, None):
            raise ArgumentError("the image has the size of its segmentation map", "height")
        with errors_about("segmentation"):
            self.segmentation = load_segmentation(path)

    def get_output_size(self, model: "LatentDiffusion") -> tuple[int, int]:
        return self.segmentation.shape[-2], self.segmentation.shape[-1]

    def generate(
        self, model: "LatentDiffusion", prompts: list[str], options: "TaskOptions"
    ) -> "Tensor":
        from ldm import pipelines

        return pipelines.semantic2img(
            model, self.segmentation, len(prompts), **drop_prompt_options(options)
        )


TASK = Task(
    name="semantic2img",
    title="semantic2img",
    summary="""Make images of a segmentation map.

    ldm semantic2img --ckpt models/ldm/semantic_synthesis256 --segmentation map.png

The values of the map are the classes of COCO-Stuff, 0 … 181, for the published models.
""",
    inputs=SemanticInputs,
    prepare=Semantic2ImgTask,
    families=("semantic",),
    defaults={"outdir": "outputs/semantic2img-samples", "n_iter": 1},
    scale=1.0,
    example_flags="--ckpt models/ldm/semantic_synthesis256",
    is_on_page=False,
)

"""Text to image."""

from typing import TYPE_CHECKING

from ldm.generate.groups import Inputs
from ldm.generate.tasks.base import PreparedTask, Task

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.model import LatentDiffusion
    from ldm.pipelines.options import TaskOptions


class Txt2ImgTask(PreparedTask):
    """Text to image."""

    def generate(
        self, model: "LatentDiffusion", prompts: list[str], options: "TaskOptions"
    ) -> "Tensor":
        from ldm import pipelines

        size = self.get_output_size(model)
        return pipelines.txt2img(model, prompts, size=size, **options)


TASK = Task(
    name="txt2img",
    title="txt2img",
    summary="""Make images from text.

    ldm txt2img --prompt "a 3d emoji of a red apple on a blue background"
    ldm txt2img --ckpt sd-v2-1 --H 768 --W 768 --prompt "a fox"

    ldm txt2img --ckpt sd-v1-5 --upscaler sd-x2-latent-upscaler --prompt "a fox"

Images are saved as OUTDIR/samples/00000.png …, and all of them as OUTDIR/grid-0000.png; their paths
are written to stdout, everything else to stderr.
""",
    inputs=Inputs,
    prepare=Txt2ImgTask,
    families=("text",),
    defaults={
        "prompt": "a professional photograph of an astronaut riding a triceratops",
        "outdir": "outputs/txt2img-samples",
    },
    takes_upscaler=True,
)

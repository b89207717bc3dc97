"""Images by unconditional models of latent-diffusion."""

from typing import TYPE_CHECKING

from ldm.generate.groups import Inputs
from ldm.generate.tasks.base import Task, UnguidedTask, drop_prompt_options

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.model import LatentDiffusion
    from ldm.pipelines.options import TaskOptions


class Uncond2ImgTask(UnguidedTask):
    """Images of an unconditional model."""

    def generate(
        self, model: "LatentDiffusion", prompts: list[str], options: "TaskOptions"
    ) -> "Tensor":
        from ldm import pipelines

        size = self.get_output_size(model)
        return pipelines.uncond2img(model, len(prompts), size=size, **drop_prompt_options(options))


TASK = Task(
    name="uncond2img",
    title="uncond2img",
    summary="""Make images with an unconditional model.

    ldm uncond2img --ckpt models/ldm/celeba256 --n_samples 4

The defaults are those of latent-diffusion's sample_diffusion.py: 50 steps, eta 1.
""",
    inputs=Inputs,
    prepare=Uncond2ImgTask,
    families=("unconditional",),
    defaults={"outdir": "outputs/uncond2img-samples", "n_iter": 1},
    scale=1.0,
    example_flags="--ckpt models/ldm/celeba256",
    is_on_page=False,
)

"""Images of classes, by class-conditional models of latent-diffusion."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ldm.generate.groups import Inputs
from ldm.generate.option_parsers import parse_natural
from ldm.generate.options import option
from ldm.generate.request import Request
from ldm.generate.tasks.base import PreparedTask, Task, drop_prompt_options
from ldm.runtime.errors import MissingArgument

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.model import LatentDiffusion
    from ldm.pipelines.options import TaskOptions


@dataclass(frozen=True)
class ClassInputs(Inputs):
    """The classes, of each of which all images of a run are made."""

    # fmt: off
    classes: tuple[int, ...] = option((), "--class", "--classes", parse=parse_natural, is_list=True,
        metavar="N", label="Class",
        help="class label, from 0, such as 207 for golden retrievers in ImageNet; may be given"
        " several times")
    unconditional_class: int | None = option(None, "--unconditional-class", parse=parse_natural,
        metavar="N", label="Unconditional class",
        help="class label that stands for any class, for guidance (default: the last of 1,001)")
    # fmt: on

    def split_by_image(self) -> Sequence["ClassInputs"]:
        return [replace(self, classes=(label,)) for label in self.classes] or [self]


class Class2ImgTask(PreparedTask):
    """Images of one class."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.inputs = request.get_inputs(ClassInputs)
        if not self.inputs.classes:
            raise MissingArgument("a class is missing", "classes")

    def generate(
        self, model: "LatentDiffusion", prompts: list[str], options: "TaskOptions"
    ) -> "Tensor":
        from ldm import pipelines

        (label,) = self.inputs.classes
        return pipelines.class2img(
            model,
            [label] * len(prompts),
            unconditional_class=self.inputs.unconditional_class,
            scale=options["scale"],
            size=self.get_output_size(model),
            **drop_prompt_options(options),
        )


TASK = Task(
    name="class2img",
    title="class2img",
    summary="""Make images of classes.

    ldm class2img --ckpt models/ldm/cin256-v2 --class 207 --class 360

Class-conditional models of latent-diffusion read no prompts. Each class has --n_samples images per
iteration.
""",
    inputs=ClassInputs,
    prepare=Class2ImgTask,
    families=("class",),
    defaults={"outdir": "outputs/class2img-samples", "n_iter": 1},
    scale=1.0,
    example_flags="--ckpt models/ldm/cin256-v2",
    is_on_page=False,
)

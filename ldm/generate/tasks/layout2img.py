"""Images with objects in boxes, by layout models of latent-diffusion."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ldm.generate.groups import Inputs
from ldm.generate.options import option
from ldm.generate.request import Request
from ldm.generate.tasks.base import Task, UnguidedTask, drop_prompt_options
from ldm.runtime.errors import ArgumentError, FileFormatError, MissingArgument, errors_about
from ldm.runtime.files import read_text

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.encoders.boxes import Box
    from ldm.model import LatentDiffusion
    from ldm.pipelines.options import TaskOptions


@dataclass(frozen=True)
class LayoutInputs(Inputs):
    """The boxes of objects."""

    # fmt: off
    layout: str | None = option(None, "--layout", metavar="FILE", is_input_file=True,
        label="Layout",
        help='JSON file with a list of {"category": N, "box": [LEFT, TOP, WIDTH, HEIGHT]}; the box'
        " is in fractions of the image's sides")
    # fmt: on


class Layout2ImgTask(UnguidedTask):
    """Images of one layout."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        path = request.get_inputs(LayoutInputs).layout
        if path is None:
            raise MissingArgument("a layout is missing", "layout")
        with errors_about("layout"):
            self.boxes = read_layout(path)

    def generate(
        self, model: "LatentDiffusion", prompts: list[str], options: "TaskOptions"
    ) -> "Tensor":
        from ldm import pipelines

        with errors_about("layout"):
            return pipelines.layout2img(
                model,
                self.boxes,
                len(prompts),
                size=self.get_output_size(model),
                **drop_prompt_options(options),
            )


def read_layout(path: str) -> "list[Box]":
    """Read the boxes of a JSON file.

    Raises:
        FileFormatError: It is not a list of categories and boxes.
    """
    from ldm.encoders.boxes import Box, check_box

    try:
        objects = json.loads(read_text(path))
        boxes = [Box(item["category"], *map(float, item["box"])) for item in objects]
        for box in boxes:
            check_box(box)
    except ArgumentError as error:
        raise FileFormatError(f"`{path}`: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        example = '[{"category": 5, "box": [0.1, 0.2, 0.5, 0.5]}]'
        raise FileFormatError(f"`{path}` is not a layout such as {example}") from error
    return boxes


TASK = Task(
    name="layout2img",
    title="layout2img",
    summary="""Make images with objects in boxes.

    ldm layout2img --ckpt models/ldm/layout2img-openimages256 --layout boxes.json
""",
    inputs=LayoutInputs,
    prepare=Layout2ImgTask,
    families=("layout",),
    defaults={"outdir": "outputs/layout2img-samples", "n_iter": 1},
    scale=1.0,
    example_flags="--ckpt models/ldm/layout2img-openimages256",
    is_on_page=False,
)

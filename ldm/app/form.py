"""Form fields of each task, form values -> options, and HTML of a running job.

Each option with a label is a field, whose kind and bounds follow from the option. Exceptions: the
image and mask of inpainting are one sketch, and some fields have settings of their own.
"""

import base64
import html
import io
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageChops

from ldm.app.limits import Limits
from ldm.app.progress import Progress
from ldm.app.uploads import Uploads
from ldm.diffusion.names import SAMPLERS, SCHEDULERS
from ldm.generate.options import Option, Value, options_of, parse_count, parse_fraction
from ldm.generate.request import Prompts
from ldm.generate.tasks import Task
from ldm.imaging.metadata import parameters_text, read_info
from ldm.imaging.reading import flatten_on_white
from ldm.runtime.errors import ArgumentError, MissingArgument

__all__ = ["CSS", "Field", "TaskForm", "describe_file", "describe_info", "show_progress"]

EXAMPLE = "a 3d emoji of a red apple on a blue background"
CSS = """
.gradio-container { max-width: 1400px !important }
.tab-container button { padding: 0 9px }
#live { min-height: 4.5em }
#live img { width: 100%; max-height: 420px; object-fit: contain; border-radius: 6px }
#live .bar { height: 6px; margin: 8px 0; border-radius: 3px }
#live .bar { background: var(--border-color-primary) }
#live .bar div { height: 100%; border-radius: 3px; background: var(--color-accent) }
#live .failed { color: var(--error-text-color, #b91c1c) }
#report textarea, #facts textarea, #about textarea { font: 12px/1.5 var(--font-mono) }
"""
AUTOMATIC = "Automatic"
MAX_SEED = 1 << 31
# Options of Sampling and Output that are fields, in their order on the page.
SETTINGS = (
    "steps", "scale", "n_samples", "n_iter", "width", "height", "seed", "sampler", "scheduler",
    "eta", "rescale", "guidance_interval", "vae_tile", "unet_tile",
)  # fmt: skip
IMAGE_BOX: dict[str, Any] = {
    "type": "filepath", "height": 260, "image_mode": None, "sources": ["upload", "clipboard"],
}  # fmt: skip
SIDE = {"value": 0, "step": 8, "info": "0: the model's own"}
TILE = {"value": 0, "step": 64, "info": "pixels; 0: off"}
NUMBERS: dict[str, dict[str, Any]] = {
    "width": SIDE, "height": SIDE, "vae_tile": TILE, "unet_tile": TILE,
}  # fmt: skip


@dataclass(frozen=True)
class Field:
    """A field of the page: a gradio component and its settings."""

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)


SKETCH = Field("ImageEditor", {"label": "Image (draw the mask)", "type": "pil", "height": 460,
               "image_mode": "RGBA", "layers": False, "transforms": (),
               "sources": ["upload", "clipboard"]})  # fmt: skip


class TaskForm:
    """The fields of one task.

    Args:
        limits: bounds of numbers.
        loras: choices of the LoRA field, `NAME:WEIGHT`.
    """

    def __init__(self, task: Task, limits: Limits, loras: Sequence[str] = ()) -> None:
        self.task = task
        self.limits = limits
        options = {name: row for name, row in task.options().items() if row[0].label}
        inputs = [name for name in options_of(task.inputs) if name in options]
        self.images = {name: _image_field(options[name][0]) for name in inputs
                       if options[name][0].is_input_file}  # fmt: skip
        if "mask" in self.images:  # drawn on the image
            self.images = {"sketch": SKETCH}
        prompts = [name for name in options_of(Prompts) if name in options]
        self.prompts = {name: self._field(name, *options[name]) for name in prompts}
        self.prompts["lora"] = _lora_field(loras)
        self.options = {name: self._field(name, *options[name]) for name in inputs
                        if not options[name][0].is_path and name != "mask_box"}  # fmt: skip
        self.settings = {name: self._field(name, *options[name]) for name in SETTINGS}

    def fields(self) -> dict[str, Field]:
        """Return all fields by name."""
        return {**self.images, **self.prompts, **self.options, **self.settings}

    def values(self, inputs: Mapping[str, Any], uploads: Uploads) -> dict[str, object]:
        """Convert what a user entered to values of options.

        Raises:
            ValueError, FileNotFoundError: a value or an image is missing or wrong.
        """
        values = dict(inputs)
        if str(values["seed"] or "-").startswith("-"):
            values["seed"] = secrets.randbelow(MAX_SEED)
        if values["scheduler"] == AUTOMATIC:
            values["scheduler"] = None
        for name, (option, default) in self.task.options().items():
            if name in values and default is None:
                values[name] = values[name] or None  # 0 and "" stand for "not given"
            elif name in self.options and option.is_list:
                values[name] = _as_list(values[name])
        for name in self.images:
            if name == "sketch":
                values |= _read_sketch(values.pop("sketch"), uploads)
            elif isinstance(values[name], str):
                values[name] = uploads.add(values[name])
            elif values[name] is not None:
                values[name] = [uploads.add(path) for path, _ in values[name]]
        if not values.get("init_img", True):
            raise MissingArgument('No input image. Upload one or use "Send to" under a result.')
        return values

    def _field(self, name: str, option: Option, default: Value) -> Field:
        settings: dict[str, Any] = {"label": option.label, "value": default}
        if name in NUMBERS:
            return Field("Number", settings | {"precision": 0} | NUMBERS[name])
        if name == "seed":  # as text: the browser would round large numbers
            return Field("Textbox", settings | {"value": "-1", "info": "-1: random"})
        if name == "scale":
            return Field("Slider", settings | {"minimum": 0, "maximum": 30, "step": 0.5,
                         "value": 0, "info": "0: as suits the model"})  # fmt: skip
        if name == "sampler":
            choices = [(sampler.label, key) for key, sampler in SAMPLERS.items()]
            return Field("Dropdown", settings | {"choices": choices, "filterable": False})
        if name == "scheduler":
            labels = [(scheduler.label, key) for key, scheduler in SCHEDULERS.items()]
            choices = [(AUTOMATIC, AUTOMATIC), *labels]
            return Field("Dropdown", settings | {"choices": choices, "value": AUTOMATIC})
        if option.is_switch:
            return Field("Checkbox", settings)
        if option.parse is parse_fraction or name == "eta":
            return Field("Slider", settings | {"minimum": 0, "maximum": 1, "step": 0.01})
        limits = {"steps": self.limits.steps, "n_samples": self.limits.batch,
                  "n_iter": self.limits.batches}  # fmt: skip
        maximum = limits.get(name, option.maximum)
        if maximum is not None:
            value = default if isinstance(default, int | float) else 0
            if name in limits:
                value = min(25, maximum) if name == "steps" else 1
            minimum = 1 if option.parse is parse_count else 0
            return Field("Slider", settings | {"minimum": minimum, "maximum": maximum, "step": 1,
                         "precision": 0, "value": value})  # fmt: skip
        if name == "prompt":
            settings |= {"lines": 2, "placeholder": EXAMPLE, "value": ""}
        elif not isinstance(default, str):
            settings["value"] = ""
        return Field("Textbox", settings | {"max_length": 1000})


def show_progress(progress: Progress) -> str:
    """Render a job as HTML: bar, message and preview."""
    kind = "failed" if progress.has_failed else "message"
    text = f'<div class="bar"><div style="width: {progress.fraction:.1%}"></div></div>'
    text += f'<div class="{kind}">{html.escape(progress.message)}</div>'
    preview = progress.preview
    if preview is None:
        return text
    buffer = io.BytesIO()
    preview.resize((4 * preview.width, 4 * preview.height)).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'{text}<img alt="preview" src="data:image/png;base64,{data}">'


def describe_info(info: Mapping[str, Any]) -> str:
    """Return the info of an image as A1111 writes it."""
    return parameters_text(info) or "No generation parameters found"


def describe_file(path: str | None) -> str:
    """Return the info of an image file as A1111 writes it."""
    try:
        return "" if path is None else describe_info(read_info(path))
    except OSError:
        return "Not an image"
    except (TypeError, ValueError, KeyError, AttributeError):
        return "Damaged generation parameters"


def _image_field(option: Option) -> Field:
    if option.is_list:
        return Field("Gallery", {"label": option.label, "type": "filepath", "height": 260,
                     "interactive": True, "columns": 3})  # fmt: skip
    return Field("Image", {"label": option.label, **IMAGE_BOX})


def _lora_field(loras: Sequence[str]) -> Field:
    return Field("Dropdown", {"label": "LoRA", "choices": list(loras), "value": [],
                 "visible": bool(loras), "multiselect": True, "allow_custom_value": True,
                 "info": "NAME:WEIGHT; other weights can be typed"})  # fmt: skip


def _as_list(value: object) -> list[object]:
    """Split a text such as `2, 1`; make a list of the value of a slider."""
    if isinstance(value, str):
        return [*value.replace(",", " ").split()]
    return [] if value is None else [value]


def _read_sketch(sketch: Mapping[str, Any] | None, uploads: Uploads) -> dict[str, object]:
    """Store image and mask of a sketch; the mask is wherever something is drawn."""
    if sketch is None or sketch["background"] is None:
        return {"init_img": None}
    image: Image.Image = sketch["background"]
    mask = Image.new("L", image.size)
    for layer in sketch["layers"]:
        alpha = layer.getchannel("A").resize(image.size, Image.Resampling.NEAREST)
        mask = ImageChops.lighter(mask, alpha.point(lambda value: 255 * (value > 127)))
    if mask.getbbox() is None:
        raise ArgumentError("The mask is empty. Draw over the area to repaint.", "mask")
    return {"init_img": uploads.add_image(flatten_on_white(image)), "mask": uploads.add_image(mask)}

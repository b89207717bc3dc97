"""Form fields of each task, form values -> options, and HTML of a running job.

Fields follow from the rows of the options: each option with a label is a field, its kind and its
bounds come from the row. Only images that are drawn on or come in numbers have fields of their own.
"""

import base64
import html
import io
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ldm.app.limits import Limits
from ldm.app.progress import Progress
from ldm.app.uploads import Uploads
from ldm.diffusion.names import SAMPLERS, SCHEDULERS
from ldm.generate.options import Option, Value, options_of, parse_count, parse_fraction
from ldm.generate.request import Prompts
from ldm.generate.tasks import Task
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
SEEDS = 1 << 31
# Options of Sampling and Output that are fields, in their order on the page.
SETTINGS = (
    "steps", "scale", "n_samples", "n_iter", "width", "height", "seed", "sampler", "scheduler",
    "eta", "rescale", "guidance_interval", "vae_tile", "unet_tile",
)  # fmt: skip
IMAGE_BOX: dict[str, Any] = {
    "type": "filepath", "height": 260, "image_mode": None, "sources": ["upload", "clipboard"],
}  # fmt: skip


@dataclass(frozen=True)
class Field:
    """A field of the page: a gradio component and its settings."""

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)


class TaskForm:
    """The fields of one task.

    Args:
        limits: bounds of numbers.
        loras: what the LoRA field offers, `NAME:WEIGHT`.
    """

    def __init__(self, task: Task, limits: Limits, loras: Sequence[str] = ()) -> None:
        self.task = task
        self.limits = limits
        rows = task.options()
        inputs = options_of(task.inputs)
        self.images = {name: _image_field(row) for name, (row, _) in inputs.items()
                       if row.is_file and row.label}  # fmt: skip
        if "mask" in self.images:  # drawn on the image
            del self.images["mask"], self.images["init_img"]
            self.images["sketch"] = _sketch_field()
        self.prompts = {name: self._field(name, *rows[name]) for name in options_of(Prompts)
                        if rows[name][0].label}  # fmt: skip
        self.prompts["lora"] = _lora_field(loras)
        self.options = {name: self._field(name, row, default)
                        for name, (row, default) in inputs.items()
                        if row.label and not row.is_path and name != "mask_box"}  # fmt: skip
        self.settings = {name: self._field(name, *rows[name]) for name in SETTINGS}

    def fields(self) -> dict[str, Field]:
        """All fields by name."""
        return {**self.images, **self.prompts, **self.options, **self.settings}

    def values(self, answers: Mapping[str, Any], uploads: Uploads) -> dict[str, object]:
        """The values of options that the answers of a user are.

        Raises:
            ValueError, FileNotFoundError: about an answer or an image.
        """
        values = dict(answers)
        if values["seed"] is None or values["seed"] < 0:
            values["seed"] = secrets.randbelow(SEEDS)
        values["scheduler"] = None if values["scheduler"] == AUTOMATIC else values["scheduler"]
        for name, (_, default) in self.task.options().items():
            if default is None and name in values:
                values[name] = values[name] or None  # 0 and "" stand for "not given"
        for name in self.images:
            if name == "sketch":
                values |= _read_sketch(values.pop("sketch"), uploads)
            elif isinstance(values[name], str):
                values[name] = uploads.add(values[name])
            elif values[name] is not None:
                values[name] = [uploads.add(path) for path, _ in values[name]]
        for name, (row, _) in options_of(self.task.inputs).items():
            if row.is_list and name in self.options:
                values[name] = _as_list(values[name])
        if not values.get("init_img", True):
            raise MissingArgument('No input image. Upload one or use "Send to" under a result.')
        return values

    def _field(self, name: str, row: Option, default: Value) -> Field:
        """The field that suits an option."""
        settings: dict[str, Any] = {"label": row.label, "value": default}
        if name in ("width", "height"):
            return Field("Number", settings | {"precision": 0, "value": 0, "step": 8,
                         "info": "0: the model's own"})  # fmt: skip
        if name in ("vae_tile", "unet_tile"):
            return Field("Number", settings | {"precision": 0, "value": 0, "step": 64,
                         "info": "pixels; 0: off"})  # fmt: skip
        if name == "seed":
            return Field("Number", settings | {"precision": 0, "value": -1, "info": "-1: random"})
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
        if row.is_switch:
            return Field("Checkbox", settings)
        if row.parse is parse_fraction or name == "eta":
            return Field("Slider", settings | {"minimum": 0, "maximum": 1, "step": 0.01})
        maximum = self._maxima().get(name, row.maximum)
        if maximum is not None:
            bounds = {"minimum": int(row.parse is parse_count), "maximum": maximum, "step": 1}
            value = default if isinstance(default, int | float) else 0
            value = {"steps": min(25, maximum), "n_samples": 1, "n_iter": 1}.get(name, value)
            return Field("Slider", settings | bounds | {"precision": 0, "value": value})
        text = {"value": default if isinstance(default, str) and name != "prompt" else ""}
        if name == "prompt":
            settings |= {"lines": 2, "placeholder": EXAMPLE}
        return Field("Textbox", settings | text | {"max_length": 1000})

    def _maxima(self) -> dict[str, float]:
        limits = self.limits
        return {"steps": limits.steps, "n_samples": limits.batch, "n_iter": limits.batches}


def show_progress(progress: Progress) -> str:
    """A job as HTML: how far it is, what is going on, and what the images will look like."""
    kind = "failed" if progress.has_failed else "message"
    shown = f'<div class="bar"><div style="width: {progress.fraction:.1%}"></div></div>'
    shown += f'<div class="{kind}">{html.escape(progress.message)}</div>'
    preview = progress.preview
    if preview is None:
        return shown
    buffer = io.BytesIO()
    preview.resize((4 * preview.width, 4 * preview.height)).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'{shown}<img alt="preview" src="data:image/png;base64,{data}">'


def describe_info(info: Mapping[str, Any]) -> str:
    """The info of an image as A1111 writes it."""
    from ldm.imaging.metadata import parameters_text

    return parameters_text(info) or "No generation parameters found"


def describe_file(path: str | None) -> str:
    """The same of an image in a file."""
    from ldm.imaging.metadata import read_info

    try:
        return "" if path is None else describe_info(read_info(path))
    except OSError:
        return "Not an image"


def _image_field(row: Option) -> Field:
    if row.is_list:
        return Field("Gallery", {"label": row.label, "type": "filepath", "height": 260,
                     "interactive": True, "columns": 3})  # fmt: skip
    return Field("Image", {"label": row.label, **IMAGE_BOX})


def _sketch_field() -> Field:
    return Field("ImageEditor", {"label": "Image (draw the mask)", "type": "pil", "height": 460,
                 "image_mode": "RGBA", "layers": False, "transforms": (),
                 "sources": ["upload", "clipboard"]})  # fmt: skip


def _lora_field(loras: Sequence[str]) -> Field:
    return Field("Dropdown", {"label": "LoRA", "choices": list(loras), "value": [],
                 "visible": bool(loras), "multiselect": True, "allow_custom_value": True,
                 "info": "NAME:WEIGHT; other weights can be typed"})  # fmt: skip


def _as_list(value: object) -> list[object]:
    """The values in a text such as `2, 1`, or the one value of a slider."""
    if isinstance(value, str):
        return list(value.replace(",", " ").split())
    return [] if value is None else [value]


def _read_sketch(sketch: Mapping[str, Any] | None, uploads: Uploads) -> dict[str, object]:
    """Image and mask of a sketch: where anything was painted over the background."""
    from PIL import Image, ImageChops

    if sketch is None or sketch["background"] is None:
        return {"init_img": None}
    image: Image.Image = sketch["background"]
    mask = Image.new("L", image.size)
    for layer in sketch["layers"]:
        alpha = layer.getchannel("A").resize(image.size, Image.Resampling.NEAREST)
        mask = ImageChops.lighter(mask, alpha.point(lambda value: 255 * (value > 127)))
    if mask.getbbox() is None:
        raise ArgumentError("The mask is empty. Draw over the area to repaint.", "mask")
    return {"init_img": uploads.add_image(image.convert("RGB")), "mask": uploads.add_image(mask)}

"""Define the fields of the page, and convert their values to values of options.

Each option with a label is a field; its component and bounds follow from the option. All tasks
share prompts and settings; the tab of a task has its images and own options. Exceptions: image and
mask of inpainting are one sketch, and some fields are defined by hand, in FIELDS. `Limits` checks
bounds, gradio does not.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageChops

from ldm.app.limits import Limits
from ldm.app.uploads import Uploads
from ldm.diffusion.names import (
    FREEU_PRESETS,
    FREEU_VERSIONS,
    SAMPLERS,
    SCHEDULERS,
    SLD_PRESETS,
    TILINGS,
)
from ldm.diffusion.scheduler_options import SCHEDULERS_WITH_RHO
from ldm.diffusion.step_noise import STEP_NOISE_OPTIONS
from ldm.generate.groups import SDXL, Prompts, UpscalerOptions
from ldm.generate.option_parsers import parse_count, parse_fraction
from ldm.generate.options import Option, get_options
from ldm.generate.replay import get_recorded_eta
from ldm.generate.tasks import Task
from ldm.imaging.reading import load_image, open_image
from ldm.prompts import PLAIN, SYNTAXES
from ldm.prompts.a1111 import EMPHASIS_MODES
from ldm.runtime.errors import ArgumentError, MissingArgument

__all__ = [
    "AUTOMATIC", "DEFAULTED_FIELDS", "LORA_SLOTS", "MAX_SLIDER_WEIGHT", "MODEL_VAE", "NO_ADDON",
    "NO_IMAGE", "SETTINGS", "Field", "TaskForm", "get_field_values", "list_step_noise_fields",
]  # fmt: skip

EXAMPLE_PROMPT = "a 3d emoji of a red apple on a blue background"
AUTOMATIC = "Automatic"
NO_IMAGE = 'No input image. Upload one or use "Send to" under a result.'
NO_ADDON = ("None", "")
MODEL_VAE = (AUTOMATIC, "")
LORA_SLOTS = 4  # maximum number of LoRAs
MAX_SLIDER_WEIGHT = 2  # of a LoRA; the minimum is the negative of it
# Fields that are set to the defaults of the selected checkpoint.
DEFAULTED_FIELDS = ("scale", "width", "height", "steps", "sampler")
DEFAULT_SAMPLER = "ddim"
MAX_SEED = 1 << 31
DEFAULT_STEPS = 25  # for models without a default; the 50 of the original scripts are slow
# Options, other than prompts, that are fields of all tasks, in their order on the page.
SETTINGS = (
    "sampler", "steps", "scheduler", "scale", "width", "height", "n_iter", "n_samples", "seed",
    "eta", "s_churn", "s_tmin", "s_tmax", "s_noise", "brownian", "rho", "sigmas",
    "rescale",
    "guidance_interval", "pag", "apg", "perp_neg", "freeu", "freeu_version", "sld",
    "sld_concept", "clip_skip", "dynamic_prompts", "vae_tile", "unet_tile", "tiling",
    "safety_checker", "unsafe",
)  # fmt: skip
IMAGE_KWARGS: dict[str, Any] = {
    "type": "filepath", "height": 240, "image_mode": None, "sources": ["upload", "clipboard"],
}  # fmt: skip


@dataclass(frozen=True)
class Field:
    """A field of the page.

    Args:
        component: Class name of the gradio component.
        kwargs: Its keyword arguments.
    """

    component: str
    kwargs: dict[str, Any] = field(default_factory=dict)


SKETCH = Field("ImageEditor", {"label": "Image (draw the mask)", "height": 460,
               "image_mode": "RGBA", "layers": False, "transforms": (),
               "sources": ["upload", "clipboard"]})  # fmt: skip


def _dropdown(value: str, *choices: tuple[str, str], **kwargs: Any) -> Field:
    return Field("Dropdown", {"choices": choices, "value": value, **kwargs})


def _radio(value: str, *choices: tuple[str, str]) -> Field:
    return Field("Radio", {"choices": choices, "value": value})


def _number(step: float, **kwargs: Any) -> Field:
    return Field("Number", {"step": step, **kwargs})


def _textbox(placeholder: str) -> Field:
    return Field("Textbox", {"value": "", "placeholder": placeholder})


SYNTAX_LABELS = {
    "plain": "Plain", "comfy": "ComfyUI", "compel": "Compel", "a1111": "A1111",
    **{name: f"A1111, emphasis {mode}" for name, mode in EMPHASIS_MODES.items() if name != "a1111"},
}  # fmt: skip
# Option -> options that have no effect without it, and are then left out.
DEPENDENTS = {
    "refiner": ("refiner_start",),
    "freeu": ("freeu_version",),
    "sld": ("sld_concept",),
    "upscaler": ("upscaler_steps", "upscaler_scale"),
}
# Values of fields for images whose info has no such key.
INFO_DEFAULTS = {
    "scheduler": AUTOMATIC, "rho": 0, "tiling": "none", "clip_skip": 1, "syntax": PLAIN, "pag": 0,
    "perp_neg": 0, "freeu_version": "1",
}  # fmt: skip
# Fields with keyword arguments that do not follow from their option.
FIELDS = {
    "prompt": Field("Textbox", {
        "lines": 2, "max_lines": 6, "value": "",
        "placeholder": f"Prompt (Ctrl+Enter to generate), such as: {EXAMPLE_PROMPT}"}),
    "negative_prompt": Field("Textbox", {"lines": 1, "max_lines": 4,
                                         "placeholder": "Negative prompt"}),
    "syntax": _dropdown(PLAIN, *((SYNTAX_LABELS[name], name) for name in SYNTAXES),
                        filterable=False),
    "prompt_2": _textbox("for the second text encoder; empty: the prompt"),
    "negative_prompt_2": _textbox("empty: the negative prompt"),
    "sampler": _dropdown(DEFAULT_SAMPLER,
                         *((sampler.label, name) for name, sampler in SAMPLERS.items()),
                         filterable=False),
    "scheduler": _dropdown(AUTOMATIC, (AUTOMATIC, AUTOMATIC),
                           *((scheduler.label, name) for name, scheduler in SCHEDULERS.items()),
                           filterable=False),
    # As text, since the browser would round large numbers.
    "seed": Field("Textbox", {"value": "-1", "info": "-1 = random"}),
    "width": _number(8),
    "height": _number(8),
    "eta": _textbox("0 … 1; default: by sampler"),
    "s_tmin": _number(0.01),
    "s_tmax": _number(0.01, value=0, info="0: no limit"),
    "s_noise": _number(0.001),
    "rho": _number(0.1, value=0, info="of Karras, Polyexponential and EDM; 0: default"),
    "sigmas": _textbox("such as 14.6,3.9,1.9,0.96,0.4,0; replaces steps and schedule type"),
    "guidance_interval": _textbox("sigmas, such as 0.3,5"),
    "pag": _number(0.1, value=0, info="0: off; usual: 3"),
    "apg": _textbox("off; values of the authors: 0,15,-0.5"),
    "perp_neg": _number(0.1, value=0, info="0: off; usual: 1"),
    "freeu": _dropdown("", ("Off", ""), ("Automatic", "auto"),
                       *((name.upper(), name) for name in FREEU_PRESETS), allow_custom_value=True),
    "freeu_version": _radio("1", *((name.capitalize(), name) for name in FREEU_VERSIONS)),
    "sld": _dropdown("", ("Off", ""),
                     *((f"{name.capitalize()} (after {sld.warmup} evaluations)", name)
                       for name, sld in SLD_PRESETS.items()), allow_custom_value=True),
    "sld_concept": _textbox("original"),
    "vae_tile": _number(64, value=0, info="pixels; 0: off"),
    "unet_tile": _number(64, value=0, info="pixels; 0: off"),
    "tiling": _radio("none", ("None", "none"), ("X", "x"), ("Y", "y"), ("XY", "xy")),
    "safety_checker": _dropdown("", NO_ADDON),
    "unsafe": _radio("", ("Keep, and report", ""), ("Black", "black"), ("Blur", "blur"),
                     ("Drop", "drop")),
    "refiner": _dropdown("", NO_ADDON),
    "refiner_start": Field("Slider", {"minimum": 0.05, "maximum": 0.95, "step": 0.05,
                                      "value": 0.8, "visible": False}),
    "original_size": _textbox("default: size of the image"),
    "target_size": _textbox("default: size of the image"),
    "crop": _textbox("0,0"),
    "aesthetic_score": _textbox("6"),
    "negative_original_size": _textbox("as above"),
    "negative_target_size": _textbox("as above"),
    "negative_crop": _textbox("as above"),
    "negative_aesthetic_score": _textbox("2.5"),
    "upscaler": _dropdown("", NO_ADDON),
    "upscaler_steps": _textbox("20"),
    "upscaler_scale": _textbox("1"),
}  # fmt: skip


class TaskForm:
    """The fields of a task.

    Args:
        limits: Determine the maxima of sliders.
    """

    def __init__(self, task: Task, limits: Limits) -> None:
        self.task = task
        self.limits = limits
        options = {name: option for name, option in task.options.items() if option.label}
        inputs = [name for name in get_options(task.inputs) if name in options]
        self.image_fields = {name: _make_image_field(options[name]) for name in inputs
                             if options[name].is_input_file}  # fmt: skip
        if "mask" in self.image_fields:  # drawn on the image
            self.image_fields = {"sketch": SKETCH}
        prompts = [
            name for name in get_options(Prompts) if name in options and name not in SETTINGS
        ]
        self.prompt_fields = {name: self._make_field(name, options[name]) for name in prompts}
        self.option_fields = {name: self._make_field(name, options[name]) for name in inputs
                              if not options[name].is_path and name != "mask_box"
                              and not (name == "resize_mode" and task.upscales)}  # fmt: skip
        self.setting_fields = {name: self._make_field(name, options[name]) for name in SETTINGS}
        sdxl = get_options(SDXL) if "sdxl" in task.groups else {}
        self.sdxl_fields = {
            name: self._make_field(name, options[name]) for name in sdxl if name in options
        }
        upscaling = get_options(UpscalerOptions) if "upscaling" in task.groups else {}
        self.upscaling_fields = {name: self._make_field(name, options[name]) for name in upscaling}

    @property
    def common_fields(self) -> dict[str, Field]:
        """Fields shared by all tasks, outside of their tabs."""
        return {
            **self.prompt_fields,
            **self.setting_fields,
            **self.sdxl_fields,
            **self.upscaling_fields,
        }

    @property
    def own_fields(self) -> dict[str, Field]:
        """Fields in the task's tab."""
        return {**self.image_fields, **self.option_fields}

    @property
    def fields(self) -> dict[str, Field]:
        """All fields by name."""
        return {**self.own_fields, **self.common_fields}

    def parse(self, inputs: Mapping[str, Any], uploads: Uploads) -> dict[str, object]:
        """Convert the values of fields to values of options.

        Args:
            inputs: Values of all fields by name.
        Raises:
            ValueError, FileNotFoundError: A value or an image is missing or invalid.
        """
        values = dict(inputs)
        if str(values["seed"] or "-").strip().startswith("-"):
            values["seed"] = secrets.randbelow(MAX_SEED)
        if values["scheduler"] == AUTOMATIC:
            values["scheduler"] = None
        options = self.task.options
        supported = list_step_noise_fields(values["sampler"])
        ignored = [name for name in STEP_NOISE_OPTIONS if name not in supported]
        values |= {name: options[name].default for name in ignored}
        if values["scheduler"] not in SCHEDULERS_WITH_RHO:
            values["rho"] = None
        if values["sigmas"]:
            num_sigmas = len(values["sigmas"].replace(",", " ").split())
            values["steps"] = max(1, num_sigmas - 1)  # `Task.build_request` checks the text
            values["scheduler"] = values["rho"] = None
        for name, dependents in DEPENDENTS.items():
            if not values.get(name):
                values = {key: value for key, value in values.items() if key not in dependents}
        if self.task.upscales:  # by a fixed factor
            values["width"] = values["height"] = None
        for name, option in options.items():
            if name in values and option.default is None:
                values[name] = values[name] or None  # 0 and "" stand for None
            elif name in self.option_fields and option.is_list:
                values[name] = _split_values(values[name])
        for name in self.image_fields:
            if name == "sketch":
                values |= _read_sketch(values.pop("sketch"), uploads)
            elif isinstance(values[name], str):
                values[name] = uploads.add(values[name])
            elif values[name] is not None:
                values[name] = [uploads.add(path) for path, _ in values[name]]
        if not values.get("init_img", True):
            raise MissingArgument(NO_IMAGE, "init_img")
        return values

    def _make_field(self, name: str, option: Option) -> Field:
        default = option.default
        kwargs: dict[str, Any] = {"label": option.label, "value": default}
        if name in STEP_NOISE_OPTIONS:
            kwargs["visible"] = name in list_step_noise_fields(DEFAULT_SAMPLER)
        if name in FIELDS:
            return Field(FIELDS[name].component, kwargs | FIELDS[name].kwargs)
        if name == "scale":
            kwargs |= {"minimum": 1, "maximum": 30, "step": 0.5, "value": self.task.scale}
            return Field("Slider", kwargs)
        if option.choices:
            choices = [(choice.capitalize(), choice) for choice in option.choices]
            return Field("Radio", kwargs | {"choices": choices})
        if option.is_switch:
            return Field("Checkbox", kwargs)
        if option.parse is parse_fraction:
            return Field("Slider", kwargs | {"minimum": 0, "maximum": 1, "step": 0.01})
        maxima = {"steps": self.limits.max_steps, "n_samples": self.limits.max_batch_size,
                  "n_iter": self.limits.max_batches}  # fmt: skip
        maximum = maxima.get(name, option.slider_max)
        if maximum is not None:
            value = default if isinstance(default, int | float) else 0
            if name in maxima:
                value = min(DEFAULT_STEPS, maximum) if name == "steps" else 1
            minimum = 1 if option.parse is parse_count else 0
            return Field("Slider", kwargs | {"minimum": minimum, "maximum": maximum, "step": 1,
                         "precision": 0, "value": value})  # fmt: skip
        if not isinstance(default, str):
            kwargs["value"] = ""
        return Field("Textbox", kwargs)


def get_field_values(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the shared fields that the info of an image contains."""
    request = info.get("request")
    request = request if isinstance(request, Mapping) else {}
    names = ("prompt", "negative_prompt", "sampler", "steps", "scale", *STEP_NOISE_OPTIONS)
    values = {name: info[name] for name in names if info.get(name) is not None}
    values |= {name: info.get(name) or value for name, value in INFO_DEFAULTS.items()}
    eta = get_recorded_eta(info)
    values["eta"] = "" if eta is None else f"{eta:g}"
    values |= {name: request[name] for name in ("rescale", "n_samples", "n_iter")
               if request.get(name) is not None}  # fmt: skip
    if info.get("seed") is not None:
        values["seed"] = str(info["seed"])
    names = ("sigmas", "sld", "sld_concept", "apg", "freeu", "upscaler_steps", "upscaler_scale")
    values |= {name: _format_value(info.get(name)) for name in (*names, *get_options(SDXL))}
    values["guidance_interval"] = _format_value(request.get("guidance_interval"))
    strength = info.get("refiner_strength")
    values["refiner_start"] = info.get("refiner_start") or (strength and 1 - strength)
    size = info.get("size")
    if isinstance(size, list) and info.get("task") != "upscale":
        values["height"], values["width"] = size
    choices = {
        "sampler": [*SAMPLERS], "scheduler": [*SCHEDULERS, AUTOMATIC], "tiling": TILINGS,
        "syntax": SYNTAXES,
    }  # fmt: skip
    return {
        name: value for name, value in values.items()
        if value is not None and (name not in choices or value in choices[name])
    }  # fmt: skip


def list_step_noise_fields(sampler: str) -> set[str]:
    """Return the fields for noise before and between steps that a sampler supports."""
    spec = SAMPLERS.get(sampler, SAMPLERS[DEFAULT_SAMPLER])
    churn = {"s_churn", "s_tmin", "s_tmax", "s_noise"} if spec.takes_churn else set()
    noise = {"s_noise"} if spec.takes_noise else set()
    brownian = {"brownian"} if spec.takes_brownian else set()
    return churn | noise | brownian | ({"eta"} if spec.eta is not None else set())


def _format_value(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "" if value is None else str(value)


def _make_image_field(option: Option) -> Field:
    if option.is_list:
        return Field("Gallery", {"label": option.label, "type": "filepath", "height": 240,
                     "interactive": True, "columns": 3})  # fmt: skip
    return Field("Image", {"label": option.label, **IMAGE_KWARGS})


def _split_values(value: object) -> list[object]:
    """Return a text such as `2, 1`, or the value of a slider, as a list."""
    if isinstance(value, str):
        return [*value.replace(",", " ").split()]
    return [] if value is None else [value]


def _read_sketch(
    sketch: Sequence[tuple[str, object]] | None, uploads: Uploads
) -> dict[str, object]:
    """Store the image of a sketch, and what is drawn on it as the mask; return their paths.

    Args:
        sketch: (file, caption) of the image and of each layer drawn on it; None = no image.
    """
    if not sketch:
        return {"init_img": None}
    image, *layers = (path for path, _ in sketch)
    image_path = uploads.add(image)
    size = load_image(image_path).size
    mask = Image.new("L", size)
    for path in layers:
        with open_image(path) as layer:
            alpha = layer.convert("RGBA").getchannel("A").resize(size, Image.Resampling.NEAREST)
        mask = ImageChops.lighter(mask, alpha.point(lambda value: 255 * (value > 127)))
    if mask.getbbox() is None:
        raise ArgumentError("The mask is empty. Draw over the area to repaint.", "mask")
    return {"init_img": image_path, "mask": uploads.add_image(mask)}

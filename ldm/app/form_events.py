"""Handle events of the form: update the options and values of its fields."""

import html
import json
import logging
import secrets
from collections.abc import Sequence
from typing import Any

import gradio as gr

from ldm.app.backend import Backend
from ldm.app.form import (
    DEFAULTED_FIELDS,
    LORA_SLOTS,
    MAX_SLIDER_WEIGHT,
    MODEL_VAE,
    NO_ADDON,
    TaskForm,
    get_field_values,
)
from ldm.app.library import ADDONS
from ldm.app.view import describe_unknown_settings, render_error, render_token_count
from ldm.diffusion.names import SAMPLERS
from ldm.generate.tasks import PAGE_TASKS
from ldm.imaging.metadata import parse_parameters
from ldm.imaging.reading import read_size
from ldm.loading.addons.safety import SAFETY_CHECKER
from ldm.loading.find_variant import supports_variants
from ldm.runtime.types import JsonObject

__all__ = ["FormEvents"]

log = logging.getLogger(__name__)


class FormEvents:
    """Handlers of events, which return updates of fields."""

    def __init__(self, backend: Backend) -> None:
        self.library = backend.library
        self.limits = backend.limits
        self.forms = {name: TaskForm(task, backend.limits) for name, task in PAGE_TASKS.items()}

    def restore_form(self, fields: Sequence[str], stored_form: str, visitor: str) -> list[Any]:
        """Restore the form from the browser's storage; return updates of all fields and lists.

        Args:
            fields: Names of the fields, see `Layout.stored_fields`.
            stored_form: JSON object with the values of fields by name.
        """
        values: JsonObject = {}
        try:
            parsed = json.loads(stored_form or "{}")
            values = parsed if isinstance(parsed, dict) else {}
        except ValueError:
            log.debug("the form in the browser's storage is damaged")
        updates = {k: gr.update(value=values[k]) if k in values else gr.skip() for k in fields}
        names = ("checkpoint", *ADDONS)
        lists = self.refresh_files(*(values.get(name) for name in names))
        updates |= dict(zip(names, lists, strict=False))
        checkpoint = updates["checkpoint"]["value"]
        updates["loras"] = self.update_lora_list(checkpoint, values.get("loras"))
        return [*updates.values(), *lists[len(names) :], visitor or secrets.token_urlsafe(16)]

    def refresh_files(self, checkpoint: str | None, *addons: str | None) -> list[Any]:
        """Read the models folder again; return updates of all file lists.

        Args:
            addons: Name of the selected add-on of each type in ADDONS.
        """
        names, files = self.library.list_models(), self.library.list_checkpoint_names()
        reasons = self.library.list_skip_reasons()
        for reason in reasons:
            log.warning("skipped: %s", reason)
        skipped = "".join(f"\n* skipped: {html.escape(reason)}" for reason in reasons)
        candidates = self.library.list_models("txt2img") or names
        selected = checkpoint if checkpoint in names else next(iter(candidates), None)
        tokens = self.library.list_embedding_tokens()
        return [
            gr.update(choices=names, value=selected),
            *map(self._update_addon_list, ADDONS, addons),
            gr.update(choices=tokens, visible=bool(tokens)),
            gr.update(
                choices=files, value=selected if selected in files else next(iter(files), None)
            ),
            skipped,
        ]

    def _update_addon_list(self, addon_type: str, selected: str | None) -> Any:
        """Return an update of a list of add-ons, whose first entry stands for none."""
        names = self.library.list_addons(addon_type)
        # The other lists are in accordions, which are hidden or closed.
        kwargs: JsonObject = (
            {"visible": bool(names)} if addon_type in ("vae", SAFETY_CHECKER) else {}
        )
        no_addon = MODEL_VAE if addon_type == "vae" else NO_ADDON
        choices = [no_addon, *((name, name) for name in names)]
        return gr.update(choices=choices, value=selected if selected in names else "", **kwargs)

    def update_lora_list(self, checkpoint: str | None, selected: list[str] | None) -> Any:
        """Return an update of the LoRA list with those that fit the checkpoint."""
        names = self.library.list_compatible_loras(checkpoint)
        value = [name for name in selected or () if name in names]
        return gr.update(choices=names, value=value, visible=bool(names))

    def update_weight_sliders(self, loras: list[str]) -> list[Any]:
        """Return updates of the weight sliders: one is visible for each selected LoRA."""
        names = [*(loras or ()), *[""] * LORA_SLOTS][:LORA_SLOTS]
        return [gr.update(label=f"Weight of {name}", visible=bool(name)) for name in names]

    def update_for_checkpoint(self, task: str, checkpoint: str, *fields: Any) -> list[Any]:
        """Return updates of the error, the accordions and the fields of `apply_defaults`."""
        updates = self.apply_defaults(task, checkpoint, *fields)
        if task not in PAGE_TASKS:
            return ["", *[gr.update(visible=False)] * 3, *updates]
        reason = self.library.get_unsupported_reason(PAGE_TASKS[task], checkpoint)
        names = self.library.list_models(task) if reason else []
        suitable = gr.update(choices=names, value=None, visible=bool(names))
        form, is_sdxl = self.forms[task], self.library.is_sdxl(checkpoint)
        has_sdxl = bool(form.sdxl_fields) and is_sdxl
        has_upscaler = bool(
            form.upscaling_fields and not is_sdxl and self.library.list_addons("upscaler")
        )
        accordions = [gr.update(visible=has_sdxl), gr.update(visible=has_upscaler)]
        return [render_error(reason), suitable, *accordions, *updates]

    def apply_defaults(
        self,
        task: str,
        checkpoint: str,
        loras: list[str] | None,
        prompt: str | None,
        last_defaults: JsonObject,
        *values: Any,
    ) -> list[Any]:
        """Return the defaults of a checkpoint, and an update of each of DEFAULTED_FIELDS.

        The defaults of a few-step LoRA, selected or named in the prompt, and the guidance scale of
        a sampler that has a default take precedence.

        Args:
            last_defaults: The defaults that DEFAULTED_FIELDS were set to last.
            values: Current values of DEFAULTED_FIELDS; only unchanged ones are updated.
        """
        if task not in PAGE_TASKS:
            return [last_defaults, *[gr.skip()] * len(values)]
        defaults = self.library.find_defaults(
            PAGE_TASKS[task], checkpoint, loras or (), prompt or ""
        )
        sampler = values[DEFAULTED_FIELDS.index("sampler")]
        if sampler in (None, last_defaults.get("sampler")):
            sampler = defaults["sampler"]
        if sampler in SAMPLERS and (scale := SAMPLERS[sampler].scale) is not None:
            defaults["scale"] = scale
        updates = [
            # An empty number is 0. Fields that already have the value are not updated, as that
            # would discard what is being typed.
            defaults[name]
            if defaults[name]
            and value != defaults[name]
            and value in (None, 0, last_defaults.get(name))
            else gr.skip()
            for name, value in zip(DEFAULTED_FIELDS, values, strict=True)
        ]
        return [defaults, *updates]

    def count_tokens(
        self, checkpoint: str, prompt: str, syntax: str, *, is_negative: bool = False
    ) -> str:
        """Return the token count of a prompt as HTML."""
        count = self.library.count_tokens(checkpoint, prompt or "", syntax, is_negative=is_negative)
        return render_token_count(*count)

    def read_image_size(self, checkpoint: str, path: str | None) -> list[Any]:
        """Return updates of width and height for an input image."""
        try:
            width, height = read_size(path or "")
        except (OSError, ValueError):  # Generate reports the error
            return [gr.skip(), gr.skip()]
        return self.fit_size(checkpoint, f"{width}x{height}")

    def fit_size(self, checkpoint: str, size: str) -> list[Any]:
        """Return width and height with the aspect ratio of an image `WxH`, for the model."""
        width, height = map(int, size.split("x"))
        native_side = self.library.find_defaults(PAGE_TASKS["img2img"], checkpoint)["width"] or 512
        factor = min(1, native_side / min(width, height), self.limits.max_side / max(width, height))
        multiple = 64 if self.library.is_sdxl(checkpoint) else 8
        return [max(round(side * factor / multiple), 1) * multiple for side in (width, height)]

    def fill_fields(
        self,
        info: JsonObject | None,
        checkpoint: str | None,
        defaults: JsonObject,
        task: str = "txt2img",
    ) -> list[Any]:
        """Return updates of shared fields, LoRAs, weights, error and defaults for an image's info.

        LoRAs that do not fit the checkpoint, or whose weights no slider can represent, become tags
        in the prompt. They are left out for tasks whose models support no LoRAs.

        Args:
            defaults: The defaults that DEFAULTED_FIELDS were set to last. Those of filled fields
                are dropped, so that a value of the image that equals one is not mistaken for a
                default, which the image's LoRAs may change.
        """
        values = get_field_values(info) if info else {}
        lora_updates = [gr.skip()] * (1 + LORA_SLOTS)
        if info:
            for addon_type in ("refiner", "upscaler"):
                values[addon_type] = self.library.find_recorded_addon(addon_type, info)
        if info and "loras" in info and any(map(supports_variants, PAGE_TASKS[task].families)):
            loras = self.library.find_recorded_loras(info)
            compatible = self.library.list_compatible_loras(checkpoint)
            weights = {
                name: weight for name, weight in loras if name in compatible
                and not isinstance(weight, str) and abs(weight) <= MAX_SLIDER_WEIGHT
            }  # fmt: skip
            names = [*weights][:LORA_SLOTS]
            tags = [f"<lora:{name}:{weight}>" for name, weight in loras if name not in names]
            values["prompt"] = " ".join([str(values.get("prompt", "")), *tags]).strip()
            lora_updates[: 1 + len(names)] = [names, *(weights[name] for name in names)]
        fields = self.forms["txt2img"].common_fields
        defaults = {name: value for name, value in defaults.items() if name not in values}
        error = render_error(describe_unknown_settings(info or {}))
        return [*(values.get(name, gr.skip()) for name in fields), *lora_updates, error, defaults]

    def paste_parameters(
        self, prompt: str, selected: JsonObject | None, checkpoint: str | None, defaults: JsonObject
    ) -> list[Any]:
        """Fill the form from parameters in the prompt field, or else from the selected image."""
        info = parse_parameters(prompt or "")
        has_parameters = "steps" in info or "seed" in info
        return self.fill_fields(info if has_parameters else selected, checkpoint, defaults)

    def send_image(
        self,
        name: str,
        info: JsonObject | None,
        checkpoint: str | None,
        defaults: JsonObject,
        path: str | None = None,
    ) -> list[Any]:
        """Return updates that send an image to a tab, and its parameters to the form.

        Args:
            name: Name of the tab: a task, or "replay".
        """
        path = path or (info or {}).get("path")
        is_task = name in PAGE_TASKS
        fields = self.fill_fields(
            info if is_task else None, checkpoint, defaults, name if is_task else "txt2img"
        )
        components = ["Image"]
        if is_task:
            components = [field.component for field in self.forms[name].image_fields.values()]
        if not components:
            return fields
        sketch: JsonObject = {"background": path, "layers": [], "composite": None}
        images = {"ImageEditor": sketch, "Gallery": [path]}
        return [*fields, images.get(components[0], path) if path else gr.skip()]

"""Answer events of the form: what its fields offer, and what they are set to."""

import html
import json
import logging
import secrets
from collections.abc import Sequence
from typing import Any

import gradio as gr

from ldm.app.backend import Backend
from ldm.app.form import (
    FOLLOWERS,
    LORA_SLOTS,
    MAX_WEIGHT,
    MODEL_VAE,
    NO_ADDON,
    TaskForm,
    get_field_values,
)
from ldm.app.library import ADDONS
from ldm.app.view import render_error, render_token_count
from ldm.diffusion.names import SAMPLERS
from ldm.generate.tasks import TASKS
from ldm.imaging.metadata import parse_parameters
from ldm.imaging.reading import read_size
from ldm.loading.addons.safety import COMPONENT
from ldm.loading.find_variant import supports_variants
from ldm.runtime.types import JsonObject

__all__ = ["FormEvents"]

log = logging.getLogger(__name__)


class FormEvents:
    """Handlers of events, which return updates of fields."""

    def __init__(self, backend: Backend) -> None:
        self.library = backend.library
        self.limits = backend.limits
        self.forms = {name: TaskForm(task, backend.limits) for name, task in TASKS.items()}

    def restore(self, fields: Sequence[str], stored: str, owner: str) -> list[Any]:
        """Restore the form from the browser's storage; return updates of all fields and lists.

        Args:
            fields: Names of the fields, see `Layout.stored_fields`.
        """
        values: JsonObject = {}
        try:
            form = json.loads(stored or "{}")
            values = form if isinstance(form, dict) else {}
        except ValueError:
            log.debug("the form in the browser's storage is damaged")
        updates = {k: gr.update(value=values[k]) if k in values else gr.skip() for k in fields}
        names = ("checkpoint", *ADDONS)
        updated = self.list_files(*(values.get(name) for name in names))
        listed, lists = dict(zip(names, updated, strict=False)), updated[len(names) :]
        loras = self.offer_loras(listed["checkpoint"]["value"], values.get("loras"))
        updates |= {"loras": loras, **listed}
        return [*updates.values(), *lists, owner or secrets.token_urlsafe(16)]

    def list_files(self, checkpoint: str | None, *addons: str | None) -> list[Any]:
        """Read the models folder again; return updates of all file lists.

        Args:
            addons: Those chosen, in the order of ADDONS.
        """
        names, files = self.library.list_models(), self.library.list_checkpoint_names()
        lines = self.library.list_skipped_files()
        for line in lines:
            log.warning("skipped: %s", line)
        skipped = "".join(f"\n* skipped: {html.escape(line)}" for line in lines)
        text_models = self.library.list_models("txt2img") or names
        first = checkpoint if checkpoint in names else next(iter(text_models), None)
        tokens = self.library.list_tokens()
        return [
            gr.update(choices=names, value=first),
            *map(self._offer_addons, ADDONS, addons),
            gr.update(choices=tokens, visible=bool(tokens)),
            gr.update(choices=files, value=first if first in files else next(iter(files), None)),
            skipped,
        ]

    def _offer_addons(self, kind: str, chosen: str | None) -> Any:
        """Return an update of a list of add-ons, which begins with none."""
        names = self.library.list_addons(kind)
        # Others are in a part of the page that is hidden or closed as a whole.
        settings: JsonObject = {"visible": bool(names)} if kind in ("vae", COMPONENT) else {}
        none = MODEL_VAE if kind == "vae" else NO_ADDON
        choices = [none, *((name, name) for name in names)]
        return gr.update(choices=choices, value=chosen if chosen in names else "", **settings)

    def offer_loras(self, checkpoint: str | None, chosen: list[str] | None) -> Any:
        """Return an update of the LoRA list with those that fit the checkpoint."""
        names = self.library.list_fitting_loras(checkpoint)
        kept = [name for name in chosen or () if name in names]
        return gr.update(choices=names, value=kept, visible=bool(names))

    def name_weights(self, loras: list[str]) -> list[Any]:
        """Return updates of the weight sliders, one for each chosen LoRA."""
        names = [*(loras or ()), *[""] * LORA_SLOTS][:LORA_SLOTS]
        return [gr.update(label=f"Weight of {name}", visible=bool(name)) for name in names]

    def describe_choice(self, task: str, checkpoint: str, *choice: Any) -> list[Any]:
        """Update the page for a checkpoint: whether it suits the tab, and `follow_choice`."""
        updates = self.follow_choice(task, checkpoint, *choice)
        if task not in TASKS:
            return ["", *[gr.update(visible=False)] * 3, *updates]
        misfit = self.library.explain_misfit(TASKS[task], checkpoint)
        names = self.library.list_models(task) if misfit else []
        offers = gr.update(choices=names, value=None, visible=bool(names))
        has_sdxl = bool(self.forms[task].sdxl) and self.library.is_sdxl(checkpoint)
        takes_upscaler = bool(self.forms[task].upscaling) and not self.library.is_sdxl(checkpoint)
        has_upscaler = takes_upscaler and bool(self.library.list_addons("upscaler"))
        shown = [gr.update(visible=has_sdxl), gr.update(visible=has_upscaler)]
        return [render_error(misfit), offers, *shown, *updates]

    def follow_choice(
        self,
        task: str,
        checkpoint: str,
        loras: list[str] | None,
        prompt: str | None,
        defaults: JsonObject,
        *values: Any,
    ) -> list[Any]:
        """Return the defaults of a checkpoint, and an update of each of FOLLOWERS.

        Defaults of a few-step LoRA are preferred, chosen or named in the prompt; the scale follows
        the sampler, too.

        Args:
            defaults: The defaults that FOLLOWERS were set to last.
            values: Current values of FOLLOWERS; only unchanged ones are updated.
        """
        if task not in TASKS:
            return [defaults, *[gr.skip()] * len(values)]
        now = self.library.find_defaults(TASKS[task], checkpoint, loras or (), prompt or "")
        sampler = values[FOLLOWERS.index("sampler")]
        if sampler in (None, defaults.get("sampler")):
            sampler = now["sampler"]
        if sampler in SAMPLERS and (scale := SAMPLERS[sampler].scale) is not None:
            now["scale"] = scale
        updates = [
            # An empty number is 0. Fields that have the value already are not updated, as that
            # would discard what is being typed.
            now[name]
            if now[name] and value != now[name] and value in (None, 0, defaults.get(name))
            else gr.skip()
            for name, value in zip(FOLLOWERS, values, strict=True)
        ]
        return [now, *updates]

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
        native = self.library.find_defaults(TASKS["img2img"], checkpoint)["width"] or 512
        factor = min(1, native / min(width, height), self.limits.side / max(width, height))
        multiple = 64 if self.library.is_sdxl(checkpoint) else 8
        return [max(round(side * factor / multiple), 1) * multiple for side in (width, height)]

    def fill(
        self,
        info: JsonObject | None,
        checkpoint: str | None,
        defaults: JsonObject,
        task: str = "txt2img",
    ) -> list[Any]:
        """Return updates of shared fields, LoRAs, weights and defaults for an image's info.

        LoRAs that do not fit the checkpoint, or whose weights no slider can have, become tags in
        the prompt. Tasks of models that take no LoRA leave them out.

        Args:
            defaults: The defaults that FOLLOWERS were set to last. Those of fields that the info
                fills are dropped, so that a value of the image that happens to equal one of them
                does not follow the image's LoRAs.
        """
        values = get_field_values(info) if info else {}
        slots = [gr.skip()] * (1 + LORA_SLOTS)
        if info:
            for kind in ("refiner", "upscaler"):
                values[kind] = self.library.find_addon(kind, info)
        if info and "loras" in info and any(map(supports_variants, TASKS[task].families)):
            recorded = self.library.find_recorded_loras(info)
            fitting = self.library.list_fitting_loras(checkpoint)
            sliders = {
                name: weight for name, weight in recorded
                if name in fitting and not isinstance(weight, str) and abs(weight) <= MAX_WEIGHT
            }  # fmt: skip
            names = [*sliders][:LORA_SLOTS]
            tags = [f"<lora:{name}:{weight}>" for name, weight in recorded if name not in names]
            values["prompt"] = " ".join([str(values.get("prompt", "")), *tags]).strip()
            slots = [names, *(sliders[name] for name in names), *slots[1 + len(names) :]]
        fields = self.forms["txt2img"].common_fields
        defaults = {name: value for name, value in defaults.items() if name not in values}
        return [*(values.get(name, gr.skip()) for name in fields), *slots, defaults]

    def paste_parameters(
        self, prompt: str, chosen: JsonObject | None, checkpoint: str | None, defaults: JsonObject
    ) -> list[Any]:
        """Parse parameters pasted into the prompt field; without any, use the chosen image's."""
        info = parse_parameters(prompt or "")
        has_parameters = "steps" in info or "seed" in info
        return self.fill(info if has_parameters else chosen, checkpoint, defaults)

    def send(
        self,
        name: str,
        info: JsonObject | None,
        checkpoint: str | None,
        defaults: JsonObject,
        path: str | None = None,
    ) -> list[Any]:
        """Return updates that send an image to a tab, and its parameters to the form."""
        path = path or (info or {}).get("path")
        is_task = name in TASKS
        fields = self.fill(
            info if is_task else None, checkpoint, defaults, name if is_task else "txt2img"
        )
        kinds = ["Image"]
        if name != "replay":
            kinds = [field.kind for field in self.forms[name].images.values()]
        if not kinds:
            return fields
        sketch: JsonObject = {"background": path, "layers": [], "composite": None}
        images = {"ImageEditor": sketch, "Gallery": [path]}
        return [*fields, images.get(kinds[0], path) if path else gr.skip()]

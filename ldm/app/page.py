"""Build and serve the page: a form with a tab for each task, the job queue and the gallery."""

import json
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from ldm.app.backend import Backend
from ldm.app.form import DEFAULTED_FIELDS, list_step_noise_fields
from ldm.app.form_events import FormEvents
from ldm.app.job_events import JOB_OUTPUTS, JobEvents
from ldm.app.jobs import Job, Jobs
from ldm.app.layout import Layout
from ldm.app.library import ADDONS
from ldm.app.view import explain_to_user, read_file_info
from ldm.diffusion.step_noise import STEP_NOISE_OPTIONS
from ldm.runtime.types import JsonObject

__all__ = ["Page"]

FONT = ["system-ui", "sans-serif"]
MONO_FONT = ["ui-monospace", "monospace"]
RESTORE_JS = "(stored, visitor) => [localStorage.getItem('ldm-form') || '', visitor]"
SKETCH_FILES_JS = """(sketch) => [!sketch?.background ? []
    : [sketch.background, ...sketch.layers].map((image) => ({ image, caption: null }))]"""
# Keyword arguments of events that run immediately and show no progress.
QUIET: JsonObject = {"queue": False, "show_progress": "hidden"}

log = logging.getLogger(__name__)


class Page:
    """The page: connects its components with the handlers of their events.

    Args:
        max_queue: Maximum number of waiting jobs.
        is_multi_user: Whether visitors are different people, who see only their own images.
    """

    layout: Layout

    def __init__(self, backend: Backend, max_queue: int = 16, is_multi_user: bool = False) -> None:
        self.backend = backend
        self.jobs = Jobs(
            max_queue, explain_to_user, list if is_multi_user else backend.list_recent_infos
        )
        self.form_events = FormEvents(backend)
        self.job_events = JobEvents(backend, self.jobs, self.form_events.forms)

    def build(self) -> gr.Blocks:
        """Build the page, with all its events."""
        page: gr.Blocks
        hour, day = 3600, 86400  # seconds: every hour, delete visitors' files older than a day
        with gr.Blocks(
            title="ldm", fill_width=True, analytics_enabled=False, delete_cache=(hour, day)
        ) as page:
            self.layout = Layout(self.form_events.forms, self.backend.device)
            self._connect_jobs()
            self._connect_form()
            self._connect_images()
            self._connect_storage(page)
        return page

    def serve(self, port: int, *, listen: bool, auth: str | None) -> None:
        """Serve the page until interrupted.

        Args:
            listen: Whether to accept connections from other machines.
            auth: USER:PASSWORD; None = no login.
        """
        outdir = self.backend.outdir
        os.environ["GRADIO_TEMP_DIR"] = str(outdir / "served")  # instead of /tmp
        # Disables statistics of up to 10,000 events, which are recomputed after each event.
        os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = "1000000000"
        log.info("open http://127.0.0.1:%d", port)
        folder = Path(__file__).parent
        self.build().queue(default_concurrency_limit=None, api_open=False).launch(
            server_name="0.0.0.0" if listen else "127.0.0.1",
            server_port=port,
            auth=tuple(auth.split(":", 1)) if auth else None,  # a password may have colons
            # No other file of this machine is served, whatever path a browser requests.
            allowed_paths=[str(outdir / name) for name in ("samples", "replays", "uploads")],
            max_file_size="64mb",
            show_error=True,
            quiet=True,
            share=False,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            theme=gr.themes.Default(
                font=FONT, font_mono=MONO_FONT, spacing_size="sm", radius_size="sm"
            ),
            css=(folder / "page.css").read_text("utf-8"),
            js=(folder / "page.js").read_text("utf-8"),
        )

    def _connect_jobs(self) -> None:
        """Connect the buttons that submit, stop and remove jobs."""
        ui, events = self.layout, self.job_events
        form = [ui.checkpoint, ui.vae, ui.loras, *ui.weights, *ui.fields.values()]
        triggers = [
            ui.generate_button.click,
            ui.fields["prompt"].submit, ui.fields["negative_prompt"].submit,
        ]  # fmt: skip
        # gradio's editor sends all its layers with each event that has it as an input, and with
        # each answer afterwards. So it is an input of this event only, which runs in the browser.
        sketch = gr.on(
            triggers,
            None,
            ui.tab_image_fields["inpaint"],
            ui.fields["inpaint.sketch"],
            js=SKETCH_FILES_JS,
        )
        field_names = [*ui.fields]
        submit = partial(events.submit_task, field_names)
        self._submit_and_follow(sketch.then, submit, [ui.task, *form])
        submit = partial(events.submit_depth, field_names)
        self._submit_and_follow(ui.estimate_button.click, submit, form).then(
            _get_last_path, ui.job, ui.fields["depth2img.depth_map"], **QUIET
        )
        self._submit_and_follow(
            ui.replay_button.click, events.submit_replay, [ui.tab_image_fields["replay"]]
        )
        ui.stop_button.click(
            events.stop_job, ui.visitor, [ui.progress, ui.stop_button, ui.queue], **QUIET
        )
        ui.clear_button.click(events.clear_queue, ui.visitor, [ui.queue, ui.clear_button], **QUIET)
        ui.inspect_button.click(self.backend.library.inspect, ui.file, ui.report)

    def _submit_and_follow(self, trigger: Any, submit: Any, inputs: list[Any]) -> Any:
        ui = self.layout
        outputs = [ui.job, ui.error, ui.progress, ui.queue, ui.clear_button, ui.stop_button]
        event = trigger(submit, [ui.visitor, *inputs], outputs, **QUIET)
        return event.then(
            self.job_events.follow, [ui.visitor, ui.job], self._job_outputs, show_progress="hidden"
        )

    @property
    def _job_outputs(self) -> list[Any]:
        """The components that show a running job."""
        return [vars(self.layout)[name] for name in JOB_OUTPUTS]

    @property
    def _file_fields(self) -> list[Any]:
        """The fields that select a file of the models folder."""
        ui = self.layout
        addons = {**ui.fields, "vae": ui.vae}
        return [ui.checkpoint, *(addons[addon_type] for addon_type in ADDONS)]

    @property
    def _file_lists(self) -> list[Any]:
        """The other components that `FormEvents.refresh_files` updates."""
        return [self.layout.embedding_tokens, self.layout.file, self.layout.skipped]

    def _connect_form(self) -> None:
        """Connect fields that update each other."""
        ui, events, fields = self.layout, self.form_events, self.layout.fields
        file_fields = self._file_fields
        ui.refresh_button.click(
            events.refresh_files, file_fields, [*file_fields, *self._file_lists], **QUIET
        ).then(events.update_lora_list, [ui.checkpoint, ui.loras], ui.loras, **QUIET)
        defaulted = [fields[name] for name in DEFAULTED_FIELDS]
        inputs = [ui.task, ui.checkpoint, ui.loras, fields["prompt"], ui.defaults, *defaulted]
        gr.on(
            [ui.checkpoint.change, ui.task.change, ui.loras.change],
            events.update_for_checkpoint, inputs,
            [ui.checkpoint_error, ui.suitable_checkpoints, ui.sdxl, ui.upscaling, ui.defaults,
             *defaulted], **QUIET,
        )  # fmt: skip
        gr.on(
            [fields["prompt"].change, fields["sampler"].change], events.apply_defaults, inputs,
            [ui.defaults, *defaulted], trigger_mode="always_last", **QUIET,
        )  # fmt: skip
        fields["refiner"].change(
            lambda name: gr.update(visible=bool(name)),
            fields["refiner"], fields["refiner_start"], **QUIET,
        )  # fmt: skip
        ui.checkpoint.change(events.update_lora_list, [ui.checkpoint, ui.loras], ui.loras, **QUIET)
        ui.suitable_checkpoints.select(  # with all names, as the file may be new
            lambda name: gr.update(choices=self.backend.library.list_models(), value=name),
            ui.suitable_checkpoints, ui.checkpoint, **QUIET,
        )  # fmt: skip
        ui.loras.change(events.update_weight_sliders, ui.loras, ui.weights, **QUIET)
        fields["sampler"].change(
            lambda name: [gr.update(visible=field in list_step_noise_fields(name))
                          for field in STEP_NOISE_OPTIONS],
            fields["sampler"], [fields[name] for name in STEP_NOISE_OPTIONS], **QUIET,
        )  # fmt: skip
        for name, count in ui.token_counts.items():
            prompt_inputs = [ui.checkpoint, fields[name], fields["syntax"]]
            gr.on(
                [field.change for field in prompt_inputs],
                partial(events.count_tokens, is_negative=name == "negative_prompt"),
                prompt_inputs, count, trigger_mode="always_last", **QUIET,
            )  # fmt: skip
        prompt = [fields["prompt"], ui.embedding_tokens]
        add_token = "(text, token) => [token ? (text + ' ' + token).trim() : text, null]"
        ui.embedding_tokens.change(None, prompt, prompt, js=add_token)
        ui.random_seed_button.click(None, None, fields["seed"], js="() => '-1'")
        size = [fields["width"], fields["height"]]
        for name in ("img2img", "depth2img"):
            field = ui.tab_image_fields[name]
            field.upload(events.read_image_size, [ui.checkpoint, field], size, **QUIET)
        # Not the editor's upload event, which is repeated after each answer, with all layers.
        ui.sketch_size.input(events.fit_size, [ui.checkpoint, ui.sketch_size], size, **QUIET)
        image, depth_map = (fields[f"depth2img.{key}"] for key in ("init_img", "depth_map"))
        image.change(None, None, depth_map, js="() => null")

    def _connect_images(self) -> None:
        """Connect the gallery, and the buttons that use an image or its parameters."""
        ui, form, jobs = self.layout, self.form_events, self.job_events
        ui.gallery.select(jobs.select_image, ui.infos, [ui.selected_info, ui.parameters], **QUIET)
        seed = ui.fields["seed"]
        for button in (ui.reuse_seed_icon, ui.reuse_seed_button):
            button.click(_get_seed, [ui.selected_info, seed], seed, **QUIET)
        selected = [ui.selected_info, ui.checkpoint, ui.defaults]
        ui.reuse_all_button.click(form.fill_fields, selected, ui.filled_fields, **QUIET)
        ui.paste_button.click(
            form.paste_parameters, [ui.fields["prompt"], *selected], ui.filled_fields, **QUIET
        )
        ui.download_button.click(
            jobs.pack_images, ui.infos, ui.archive, show_progress="hidden"
        ).success(None, None, None, js="() => document.querySelector('#archive').click()")
        for name, button in ui.send_buttons.items():
            self._connect_send(button, name, ui.selected_info)
        for name, button in ui.file_send_buttons.items():
            self._connect_send(button, name, ui.file_info, ui.tab_image_fields["replay"])
        buttons = [ui.reuse_all_button, ui.reuse_seed_button, ui.download_button]
        self._enable_with(ui.selected_info, [*ui.send_buttons.values(), *buttons])
        self._enable_with(
            ui.tab_image_fields["replay"], [*ui.file_send_buttons.values(), ui.replay_button]
        )
        ui.selected_info.change(jobs.show_relief, ui.selected_info, ui.relief, **QUIET)
        ui.tab_image_fields["replay"].change(
            read_file_info,
            ui.tab_image_fields["replay"],
            [ui.file_info, ui.file_parameters],
            **QUIET,
        )

    def _enable_with(self, image: Any, buttons: list[gr.Button]) -> None:
        """Enable buttons while there is an image."""
        image.change(
            lambda value: [gr.Button(interactive=value is not None)] * len(buttons),
            image, buttons, **QUIET,
        )  # fmt: skip

    def _connect_send(self, button: gr.Button, name: str, info: Any, source: Any = None) -> None:
        """Connect a button that sends an image with its parameters to a tab.

        Args:
            info: State with the info of the image.
            source: Field with the image; None = the path in the info.
        """
        ui = self.layout
        outputs = [
            *ui.filled_fields,
            *([ui.tab_image_fields[name]] if name in ui.tab_image_fields else []),
        ]
        inputs = [info, ui.checkpoint, ui.defaults, *([] if source is None else [source])]
        # Progress is shown on the button, not on the editor, which would send all its layers.
        event = button.click(
            partial(self.form_events.send_image, name),
            inputs,
            outputs,
            show_progress_on=button,
            **QUIET,
        )
        show = f"() => {{ document.querySelector('#tab-{name}-button').click(); scrollTo(0, 0) }}"
        event.then(None, None, None, js=show)

    def _connect_storage(self, page: gr.Blocks) -> None:
        """Keep the form in the browser's storage, and restore it when the page is loaded."""
        ui, stored = self.layout, self.layout.stored_fields
        save = f"""(...values) => {{ if (window.ldmIsRestored) localStorage.setItem('ldm-form',
            JSON.stringify(Object.fromEntries({json.dumps([*stored])}.map(
                (name, k) => [name, values[k]])))) }}"""
        for field in stored.values():
            field.change(None, [*stored.values()], None, js=save)
        event = page.load(
            partial(self.form_events.restore_form, [*stored]), [ui.stored_form, ui.visitor],
            [*stored.values(), *self._file_lists, ui.visitor], js=RESTORE_JS, **QUIET,
        )  # fmt: skip
        event = event.then(None, None, None, js="() => { window.ldmIsRestored = true }")
        event.then(
            self.job_events.follow_all, ui.visitor, self._job_outputs, show_progress="hidden"
        )


def _get_seed(info: JsonObject | None, seed: str) -> str:
    return str(info["seed"]) if info and "seed" in info else seed


def _get_last_path(job: Job | None) -> Any:
    infos = job.progress.infos if job else []
    return infos[-1]["path"] if infos else gr.skip()

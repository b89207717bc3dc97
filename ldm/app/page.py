"""Build and serve the page: one form, with a tab for each task, its jobs and images."""

import asyncio
import html
import json
import logging
import os
import secrets
import zipfile
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from ldm.app.backend import Backend
from ldm.app.form import (
    IMAGE_BOX,
    NO_CHECKER,
    NO_IMAGE,
    NO_REFINER,
    NO_UPSCALER,
    SETTINGS,
    Field,
    TaskForm,
    step_noise_fields,
    values_from_info,
)
from ldm.app.jobs import Job, Jobs
from ldm.app.progress import Progress
from ldm.app.view import (
    describe_info,
    explain_to_user,
    read_file_info,
    show_error,
    show_preview,
    show_progress,
    show_queue,
    show_token_count,
)
from ldm.diffusion.names import SAMPLERS
from ldm.diffusion.step_noise import STEP_NOISE
from ldm.generate.tasks import TASKS
from ldm.imaging.mesh import can_save_meshes
from ldm.imaging.metadata import parse_parameters
from ldm.imaging.output import depth_path
from ldm.imaging.reading import read_size
from ldm.loading.load import supports_variants
from ldm.runtime.errors import MissingArgument
from ldm.runtime.types import JsonObject
from ldm.runtime.version import __version__

__all__ = ["Page"]

FONT = ["system-ui", "sans-serif"]
MONO_FONT = ["ui-monospace", "monospace"]
INTERVAL = 0.2  # seconds between two updates of the page
LORA_SLOTS = 4  # maximum number of LoRAs, each with a slider for its weight
MAX_WEIGHT = 2  # of these sliders; the minimum is -MAX_WEIGHT
MODEL_VAE = ("Automatic", "")
RESTORE = "(stored, owner) => [localStorage.getItem('ldm-form') || '', owner]"
SKETCH_FILES = """(sketch) => [!sketch?.background ? [] : [sketch.background, ...sketch.layers].map(
    (image) => ({ image, caption: null }))]"""
QUIET: JsonObject = {"queue": False, "show_progress": "hidden"}
# Fields that are set to the defaults of the chosen checkpoint.
FOLLOWERS = ("scale", "width", "height", "steps", "sampler")
SDXL_ROWS = (
    ("prompt_2",), ("negative_prompt_2",),
    ("original_size", "target_size"), ("crop", "aesthetic_score"),
    ("negative_original_size", "negative_target_size"),
    ("negative_crop", "negative_aesthetic_score"),
)  # fmt: skip
NO_RELIEF = "No relief: the server needs trimesh (pip install trimesh)"
INFO_TABS = {"replay": "PNG Info", "inspect": "Checkpoint info"}

log = logging.getLogger(__name__)


class Page:
    """The page. Everything that needs a model is a job; one runs at a time.

    Args:
        max_queue: maximum number of waiting jobs.
        is_shared: whether visitors are different people, who see only their own images.
    """

    def __init__(
        self,
        backend: Backend,
        max_queue: int = 16,
        is_shared: bool = False,
    ) -> None:
        self.backend = backend
        self.jobs = Jobs(max_queue, explain_to_user, list if is_shared else backend.recent_images)
        self.forms = {name: TaskForm(task, backend.limits) for name, task in TASKS.items()}
        self.fields: dict[str, Any] = {}  # shared ones by name, those of a task by `task.name`
        self.images: dict[str, Any] = {}  # the first image field of each tab
        self.counts: dict[str, Any] = {}  # of the tokens of each prompt

    def build(self) -> gr.Blocks:
        """Build the page, with all its events."""
        page: gr.Blocks
        hour, day = 3600, 86400  # what visitors sent is looked through, and thrown away
        with gr.Blocks(
            title="ldm", fill_width=True, analytics_enabled=False, delete_cache=(hour, day)
        ) as page:
            self.owner = gr.BrowserState("", storage_key="ldm-visitor", secret="ldm")
            self.stored = gr.Textbox(visible="hidden")  # the form in the browser's storage, JSON
            self.task = gr.Textbox("txt2img", visible="hidden", elem_id="task")
            self.sketch_size = gr.Textbox(visible="hidden", elem_id="sketch-size")
            self.job = gr.State(None)
            self.infos = gr.State([])  # of the images in the gallery
            self.chosen = gr.State(None)  # info of the chosen image
            self.file_info = gr.State({})
            initial = self.forms["txt2img"].settings
            # The defaults to which FOLLOWERS were set last.
            self.defaults = gr.State({n: initial[n].settings["value"] for n in FOLLOWERS})
            self._build_header()
            with gr.Column(elem_id="main"):
                with gr.Tabs(elem_id="tabs"):
                    for name in TASKS:
                        self._build_task(name)
                    self._build_replay()
                    self._build_inspect()
                self._build_prompts()
                self._build_settings()
                self._build_output()
            self._connect(page)
        return page

    def serve(self, port: int, *, listen: bool, auth: str | None) -> None:
        """Serve the page until interrupted.

        Args:
            listen: whether to accept connections from other machines.
            auth: USER:PASSWORD; None = no login.
        """
        outdir = self.backend.outdir
        os.environ["GRADIO_TEMP_DIR"] = str(outdir / "served")  # instead of /tmp
        # Disables statistics of up to 10,000 events, which are recomputed after each event.
        os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = "1000000000"
        log.info("open http://127.0.0.1:%d", port)
        here = Path(__file__).parent
        self.build().queue(default_concurrency_limit=None, api_open=False).launch(
            server_name="0.0.0.0" if listen else "127.0.0.1",
            server_port=port,
            auth=tuple(auth.split(":", 1)) if auth else None,  # a password may have colons
            # Nothing else of this machine is served, whatever path a browser asks for.
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
            css=(here / "page.css").read_text("utf-8"),
            js=(here / "page.js").read_text("utf-8"),
        )

    # Layout.

    def _build_header(self) -> None:
        with gr.Row(elem_id="header"):
            gr.HTML(
                f"<h1>ldm {__version__} <small>on {html.escape(self.backend.device)}</small></h1>",
                elem_classes="title",
            )
            self.checkpoint = gr.Dropdown([], label="Checkpoint", scale=3, elem_id="checkpoint")
            self.refresh = gr.Button("⟳", elem_classes="icon", elem_id="refresh")
            self.vae = gr.Dropdown([MODEL_VAE], value="", label="VAE", scale=1, elem_id="vae")
        for field in (self.checkpoint, self.vae):
            _skip_checks(field)
        self.note = gr.HTML(elem_id="note")
        self.offers = gr.Radio(
            [], label="Checkpoints for this tab", visible=False, elem_id="offers"
        )
        _skip_checks(self.offers)

    def _build_task(self, name: str) -> None:
        form = self.forms[name]
        with gr.Tab(TASKS[name].title, id=name, elem_id=f"tab-{name}") as tab:
            for key, field in form.own_fields.items():
                self.fields[f"{name}.{key}"] = _component(field)
            if form.images:
                self.images[name] = self.fields[f"{name}.{next(iter(form.images))}"]
            if "sketch" in form.images:
                self.fields[f"{name}.sketch"] = gr.Gallery(type="filepath", visible="hidden")
            if "depth_map" in form.images:
                self.estimate = gr.Button("Estimate depth", elem_id="estimate")
        self._follow_tab(tab, name)

    def _build_replay(self) -> None:
        with gr.Tab(INFO_TABS["replay"], id="replay", elem_id="tab-replay") as tab:
            self.images["replay"] = _component(Field("Image", {"label": "Image", **IMAGE_BOX}))
            self.facts = gr.Textbox(
                label="Parameters", lines=4, elem_id="facts", interactive=False, buttons=["copy"]
            )
            with gr.Row(elem_id="file-send"):
                self.file_sends = {name: _send_button(name, "file-send") for name in TASKS}
            self.replay = gr.Button("Reproduce", variant="primary", elem_id="go-replay")
        self._follow_tab(tab, "replay")

    def _build_inspect(self) -> None:
        with gr.Tab(INFO_TABS["inspect"], id="inspect", elem_id="tab-inspect") as tab:
            self.file = _skip_checks(gr.Dropdown([], label="File", elem_id="file"))
            button = gr.Button("Inspect", variant="primary", elem_id="go-inspect")
            report = gr.Textbox(label="Report", lines=18, elem_id="report", buttons=["copy"])
            self.skipped = gr.Markdown()
            button.click(self.backend.inspect, self.file, report)
        self._follow_tab(tab, "inspect")

    def _build_prompts(self) -> None:
        fields = self.forms["txt2img"].prompts
        with gr.Row(elem_id="prompts"):
            with gr.Column(scale=5, min_width=260):
                for name, elem_id in {"prompt": "prompt", "negative_prompt": "negative"}.items():
                    with gr.Column(elem_classes="counted"):
                        self.fields[name] = _component(fields[name], elem_id=elem_id)
                        self.counts[name] = gr.HTML(elem_id=f"{elem_id}-tokens")
            with gr.Column(scale=1, min_width=180):
                self.generate = gr.Button("Generate", variant="primary", elem_id="generate")
                with gr.Row(elem_classes="tools"):
                    self.stop = gr.Button("Stop", size="sm", interactive=False, elem_id="stop")
                    self.paste = gr.Button("↙ Paste", size="sm", elem_id="paste")
                self.fields["syntax"] = _component(fields["syntax"], elem_id="syntax")

    def _build_settings(self) -> None:
        fields = self.forms["txt2img"].settings
        rows = {"steps": ("sampler", "steps"), "scheduler": ("scheduler", "scale"),
                "batch": ("n_iter", "n_samples")}  # fmt: skip
        advanced = SETTINGS[SETTINGS.index("eta") :]
        with (
            gr.Column(elem_id="settings"),
            gr.Accordion("Generation settings", open=True),
        ):
            for names in rows.values():
                with gr.Row():
                    for name in names:
                        self.fields[name] = _component(fields[name], min_width=150)
                if names[0] == "scheduler":
                    self._build_size(fields)
            with gr.Row(elem_classes="tools"):
                self.fields["seed"] = _component(fields["seed"], min_width=120)
                self.any_seed = gr.Button("⚂", elem_classes="icon", elem_id="any-seed")
                self.last_seed = gr.Button("♻", elem_classes="icon", elem_id="reuse-seed")
            with gr.Row():
                self.loras = gr.Dropdown(
                    [], multiselect=True, label="LoRA", elem_id="lora", min_width=150,
                    max_choices=LORA_SLOTS, info="type to search",
                )  # fmt: skip
                self.tokens = gr.Dropdown(
                    [], label="Embedding", elem_id="embedding", value=None, min_width=150,
                    info="is added to the prompt",
                )  # fmt: skip
            self.weights = [
                _skip_checks(gr.Slider(-MAX_WEIGHT, MAX_WEIGHT, 1.0, step=0.05, visible=False))
                for _ in range(LORA_SLOTS)
            ]
            for field in (self.loras, self.tokens):
                _skip_checks(field)
            self._build_sdxl()
            self._build_upscaling()
            with gr.Accordion("Advanced", open=False), gr.Row():
                for name in advanced:
                    self.fields[name] = _component(fields[name], min_width=150)

    def _build_sdxl(self) -> None:
        fields = self.forms["txt2img"].sdxl
        with gr.Accordion("SDXL", open=True, visible=False, elem_id="sdxl") as self.sdxl:
            for name in ("refiner", "refiner_start"):
                self.fields[name] = _component(fields[name])
            with gr.Accordion("Second prompts, sizes and scores", open=False):
                for names in SDXL_ROWS:
                    with gr.Row():
                        for name in names:
                            self.fields[name] = _component(fields[name], min_width=150)

    def _build_upscaling(self) -> None:
        fields = self.forms["txt2img"].upscaling
        accordion = gr.Accordion("Twice the size", open=False, visible=False, elem_id="upscaling")
        with accordion as self.upscaling, gr.Row():
            for name, field in fields.items():
                self.fields[name] = _component(field, min_width=150)

    def _build_size(self, fields: dict[str, Field]) -> None:
        with gr.Row(elem_id="size", elem_classes="tools"):
            self.fields["width"] = _component(fields["width"], min_width=100)
            swap = gr.Button("⇅", elem_classes="icon", elem_id="swap")
            self.fields["height"] = _component(fields["height"], min_width=100)
        size = [self.fields["width"], self.fields["height"]]
        swap.click(None, size, size, js="(width, height) => [height, width]")

    def _build_output(self) -> None:
        with gr.Column(elem_id="output"):
            with gr.Column(elem_id="status"):
                self.error = gr.HTML(elem_id="error")
                gr.HTML('<div id="browser-note" class="failed" role="alert"></div>')
                self.live = gr.HTML(show_progress(None), elem_id="live")
                self.queue = gr.HTML(elem_id="queue")
                self.clear = gr.Button("Clear queue", size="sm", visible=False, elem_id="clear")
            with gr.Column(elem_id="stage"):
                self.gallery = gr.Gallery(
                    label="Output", columns=4, object_fit="contain", interactive=False,
                    buttons=["download", "fullscreen"], elem_id="gallery",
                )  # fmt: skip
                self.preview = gr.HTML(elem_id="preview")
            with gr.Column(elem_id="side"):
                self.relief = gr.Model3D(
                    label="Relief", visible="hidden", height=360, elem_id="relief",
                    camera_position=(75, 75, None),
                )  # fmt: skip
                self.about = gr.Textbox(
                    label="Generation parameters", lines=3, elem_id="about", interactive=False,
                    buttons=["copy"],
                )  # fmt: skip
                with gr.Row(elem_id="send"):
                    self.sends = {name: _send_button(name) for name in self.images}
                with gr.Row(elem_classes="tools"):
                    self.reuse = gr.Button("Reuse all", size="sm", elem_id="reuse-all")
                    self.reuse_seed = gr.Button("Reuse seed", size="sm", elem_id="reuse-seed-2")
                    self.download = gr.Button("Download all", size="sm", elem_id="download-all")
                    self.archive = gr.DownloadButton(visible="hidden", elem_id="archive")

    # Events.

    def _connect(self, page: gr.Blocks) -> None:
        kept = {k: field for k, field in self.fields.items() if field not in self._image_fields()}
        kept |= {"checkpoint": self.checkpoint, "vae": self.vae, "loras": self.loras}
        kept |= {f"weight{k}": slider for k, slider in enumerate(self.weights)}
        self.kept = kept
        names = json.dumps(list(kept))
        save = f"""(...values) => {{ if (window.ldmIsRestored) localStorage.setItem('ldm-form',
            JSON.stringify(Object.fromEntries({names}.map((name, k) => [name, values[k]])))) }}"""
        for field in kept.values():
            field.change(None, [*kept.values()], None, js=save)

        self.followed = [self.live, self.preview, self.gallery, self.infos, self.chosen, self.about,
                         self.queue, self.clear, self.stop, self.error]  # fmt: skip
        form = [self.checkpoint, self.vae, self.loras, *self.weights, *self.fields.values()]
        triggers = [self.generate.click, self.fields["prompt"].submit,
                    self.fields["negative_prompt"].submit]  # fmt: skip
        # gradio's editor sends all its layers with each event that has it as an input, and with
        # each answer afterwards. So it is an input of this event only, which runs in the browser.
        sketch = gr.on(
            triggers, None, self.images["inpaint"], self.fields["inpaint.sketch"], js=SKETCH_FILES
        )
        self._submit_and_follow(sketch.then, self.submit_task, [self.task, *form])
        self._submit_and_follow(self.estimate.click, self.submit_depth, form).then(
            _last_path, self.job, self.fields["depth2img.depth_map"], **QUIET
        )
        self._submit_and_follow(self.replay.click, self.submit_replay, [self.images["replay"]])
        self.stop.click(self.stop_job, self.owner, [self.live, self.stop, self.queue], **QUIET)
        self.clear.click(self.clear_queue, self.owner, [self.queue, self.clear], **QUIET)

        refiner = self.fields["refiner"]
        files = [self.checkpoint, self.vae, refiner, self.fields["safety_checker"],
                 self.fields["upscaler"]]  # fmt: skip
        lists = [*files, self.tokens, self.file, self.skipped]
        self.refresh.click(self.list_files, files, lists, **QUIET).then(
            self.offer_loras, [self.checkpoint, self.loras], self.loras, **QUIET
        )
        choice = [self.task, self.checkpoint, self.loras, self.fields["prompt"]]
        followers = [self.fields[name] for name in FOLLOWERS]
        gr.on(
            [self.checkpoint.change, self.task.change, self.loras.change], self.describe_choice,
            [*choice, self.defaults, *followers],
            [self.note, self.offers, self.sdxl, self.upscaling, self.defaults, *followers], **QUIET,
        )  # fmt: skip
        gr.on(
            [self.fields["prompt"].change, self.fields["sampler"].change], self.follow_choice,
            [*choice, self.defaults, *followers], [self.defaults, *followers],
            trigger_mode="always_last", **QUIET,
        )  # fmt: skip
        start = self.fields["refiner_start"]
        refiner.change(lambda name: gr.update(visible=bool(name)), refiner, start, **QUIET)
        self.checkpoint.change(self.offer_loras, [self.checkpoint, self.loras], self.loras, **QUIET)
        self.offers.select(lambda name: name, self.offers, self.checkpoint, **QUIET)
        self.loras.change(self.name_weights, self.loras, self.weights, **QUIET)
        self.fields["sampler"].change(
            lambda name: [gr.update(visible=field in step_noise_fields(name))
                          for field in STEP_NOISE],
            self.fields["sampler"], [self.fields[name] for name in STEP_NOISE], **QUIET,
        )  # fmt: skip
        for name, count in self.counts.items():
            field = self.fields[name]
            inputs = [self.checkpoint, field, self.fields["syntax"]]
            gr.on(
                [one.change for one in inputs],
                partial(self.count_tokens, is_negative=name == "negative_prompt"),
                inputs, count, trigger_mode="always_last", **QUIET,
            )  # fmt: skip
        prompt = [self.fields["prompt"], self.tokens]
        add = "(text, token) => [token ? (text + ' ' + token).trim() : text, null]"
        self.tokens.change(None, prompt, prompt, js=add)

        self.gallery.select(self.choose, self.infos, [self.chosen, self.about], **QUIET)
        shared = self._shared_fields()
        seed = self.fields["seed"]
        self.any_seed.click(None, None, seed, js="() => '-1'")
        for button in (self.last_seed, self.reuse_seed):
            button.click(_seed_of, [self.chosen, seed], seed, **QUIET)
        self.reuse.click(self.fill, [self.chosen, self.checkpoint, self.defaults], shared, **QUIET)
        self.paste.click(
            self.paste_parameters,
            [self.fields["prompt"], self.chosen, self.checkpoint, self.defaults],
            shared,
            **QUIET,
        )
        self.download.click(
            self.pack_images, self.infos, self.archive, show_progress="hidden"
        ).then(None, None, None, js="() => document.querySelector('#archive').click()")
        for name, button in self.sends.items():
            self._connect_send(button, name, self.chosen, shared)
        for name, button in self.file_sends.items():
            self._connect_send(button, name, self.file_info, shared, self.images["replay"])
        self.chosen.change(self.allow_sends, self.chosen, [*self.sends.values()], **QUIET)
        self.chosen.change(self.show_relief, self.chosen, self.relief, **QUIET)
        self.images["replay"].change(
            read_file_info, self.images["replay"], [self.file_info, self.facts], **QUIET
        )
        size = [self.fields["width"], self.fields["height"]]
        for name in ("img2img", "depth2img"):
            field = self.images[name]
            field.upload(self.read_image_size, [self.checkpoint, field], size, **QUIET)
        # Not the editor's upload event, which is repeated after each answer, with all layers.
        self.sketch_size.input(self.fit_size, [self.checkpoint, self.sketch_size], size, **QUIET)
        image, depth_map = (self.fields[f"depth2img.{key}"] for key in ("init_img", "depth_map"))
        image.change(None, None, depth_map, js="() => null")

        restored = [*kept.values(), *lists[len(files) :], self.owner]
        event = page.load(self.restore, [self.stored, self.owner], restored, js=RESTORE, **QUIET)
        event = event.then(None, None, None, js="() => { window.ldmIsRestored = true }")
        event.then(self.follow_all, self.owner, self.followed, show_progress="hidden")

    def _submit_and_follow(self, listen: Any, submit: Any, inputs: list[Any]) -> Any:
        outputs = [self.job, self.error, self.live, self.queue, self.clear, self.stop]
        event = listen(submit, [self.owner, *inputs], outputs, **QUIET)
        return event.then(
            self.follow, [self.owner, self.job], self.followed, show_progress="hidden"
        )

    def _follow_tab(self, tab: gr.Tab, name: str) -> None:
        data = name if name in TASKS else "info"
        js = f"() => {{ document.body.dataset.tab = '{data}'; return '{name}' }}"
        tab.select(None, None, self.task, js=js)

    def _connect_send(
        self, button: gr.Button, name: str, info: Any, shared: list[Any], source: Any = None
    ) -> None:
        """Connect a button that sends an image with its parameters to a tab."""
        outputs = [*shared, *([self.images[name]] if name in self.images else [])]
        inputs = [info, self.checkpoint, self.defaults, *([] if source is None else [source])]
        # Progress is shown on the button, not on the editor, which would send all its layers.
        event = button.click(
            partial(self.send, name), inputs, outputs, show_progress_on=button, **QUIET
        )
        show = f"() => {{ document.querySelector('#tab-{name}-button').click(); scrollTo(0, 0) }}"
        event.then(None, None, None, js=show)

    def _image_fields(self) -> list[Any]:
        return [
            self.fields[f"{task}.{key}"] for task, form in self.forms.items() for key in form.images
        ]

    def _shared_fields(self) -> list[Any]:
        fields = [self.fields[name] for name in self.forms["txt2img"].common_fields]
        return [*fields, self.loras, *self.weights, self.defaults]

    # Jobs.

    def submit_task(self, owner: str, task: str, *form: Any) -> list[Any]:
        """Queue a run with the current values of the form."""
        if task not in TASKS:
            return self._submit(owner, None)

        def make() -> tuple[str, Callable[[Progress], str]]:
            request = self._make_request(task, *form)
            title = f"{TASKS[task].title}: {request.prompts.prompt or 'no prompt'}"
            return title, partial(self.backend.generate, request)

        return self._submit(owner, make)

    def submit_depth(self, owner: str, *form: Any) -> list[Any]:
        """Queue the estimate of a depth map."""

        def make() -> tuple[str, Callable[[Progress], str]]:
            request = self._make_request("depth2img", *form)
            return "Estimate depth", partial(self.backend.estimate_depth, request)

        return self._submit(owner, make)

    def submit_replay(self, owner: str, path: str | None) -> list[Any]:
        """Queue the reproduction of an image."""

        def make() -> tuple[str, Callable[[Progress], str]]:
            if path is None:
                raise MissingArgument(NO_IMAGE)
            return f"Reproduce {Path(path).name}", partial(self.backend.replay, path)

        return self._submit(owner, make)

    def _submit(
        self, owner: str, make: Callable[[], tuple[str, Callable[[Progress], str]]] | None
    ) -> list[Any]:
        """Queue a job, or show its error; return updates of the page, the job first."""
        job: Job | None = None
        error, live = "", gr.skip()
        try:
            if make is not None:
                job = self.jobs.submit(owner, *make())
                if self.jobs.count_ahead(job) == 0:
                    live = show_progress(job.progress)
        except Exception as failure:  # top level: any error becomes the message
            log.debug("a form was refused", exc_info=True)
            error = explain_to_user(failure)
        return [job, show_error(error), live, *self._show_queue(owner)]

    def _make_request(self, task: str, model: str, vae: str, loras: list[str], *rest: Any) -> Any:
        weights, inputs = rest[:LORA_SLOTS], rest[LORA_SLOTS:]
        by_name = dict(zip(self.fields, inputs, strict=True))
        form = self.forms[task]
        entered = {k: by_name.get(f"{task}.{k}", by_name.get(k)) for k in form.fields()}
        values = form.values(entered, self.backend.uploads)
        values["lora"] = [
            f"{name}:{weight}" for name, weight in zip(loras or (), weights, strict=False)
        ]
        values["vae"] = vae
        return self.backend.make_request(TASKS[task], model, values)

    async def follow(self, owner: str, job: Job | None) -> AsyncIterator[list[Any]]:
        """Yield updates of the page until a job has ended; the job runs without the page, too."""
        if job is None:
            yield [gr.skip()] * len(self.followed)
            return
        count = 0
        shown: str | None = None
        while True:
            is_over, progress = job.is_over, job.progress
            status: str | None = show_progress(progress, self.jobs.count_ahead(job))
            if job.state == "queued" and self.jobs.list_jobs(owner)[:1] != [job]:
                status = shown  # another job of this page has the status
            updates = [gr.skip()] * len(self.followed)
            if len(progress.images) > count:
                count = len(progress.images)
                updates[2:6] = self._show_gallery(owner)
            if job.state == "removed":
                updates[6:9] = self._show_queue(owner)
                if shown is not None and not self.jobs.list_jobs(owner):
                    updates[0] = show_progress(Progress(message="removed from the queue"))
            elif status != shown or is_over:
                updates[0], updates[1] = status, show_preview(progress)
                updates[6:9] = self._show_queue(owner)
                if progress.has_failed:
                    updates[9] = show_error(progress.message)
            if status != shown or is_over:
                yield updates
            if is_over:
                return
            shown = status
            await asyncio.sleep(INTERVAL)

    async def follow_all(self, owner: str) -> AsyncIterator[list[Any]]:
        """Yield updates with the images of a visitor, and of all jobs that have not ended."""
        updates = [gr.skip()] * len(self.followed)
        updates[2:6] = self._show_gallery(owner)
        yield updates
        for job in self.jobs.list_jobs(owner):
            async for updates in self.follow(owner, job):
                yield updates

    def stop_job(self, owner: str) -> list[Any]:
        """Stop the visitor's job, or remove it from the queue."""
        self.jobs.stop(owner)
        running = [job for job in self.jobs.list_jobs(owner) if job.state == "running"]
        live = show_progress(running[0].progress) if running else gr.skip()
        return [live, gr.Button(interactive=False), show_queue(self.jobs.list_jobs(owner))]

    def clear_queue(self, owner: str) -> list[Any]:
        """Remove the visitor's waiting jobs from the queue."""
        self.jobs.clear(owner)
        return self._show_queue(owner)[:2]

    def _show_queue(self, owner: str) -> list[Any]:
        """Return updates of the queue and the buttons Clear and Stop."""
        jobs = self.jobs.list_jobs(owner)
        can_stop = any(not job.progress.stop.is_set() for job in jobs)
        has_waiting = any(job.state == "queued" for job in jobs)
        return [show_queue(jobs), gr.Button(visible=has_waiting), gr.Button(interactive=can_stop)]

    def _show_gallery(self, owner: str) -> list[Any]:
        """Return updates of the gallery, infos, chosen image and its description."""
        files = (info for info in self.jobs.gallery(owner) if Path(info["path"]).is_file())
        infos = [view for info in files for view in _with_depth(info)]
        if not infos:
            return [gr.skip()] * 4
        images = [
            (info["path"], f"{info.get('image', '')} seed {info['seed']}".strip()) for info in infos
        ]
        # With depth the grid of all images is shown, so that image and depth are side by side.
        selected = None if "depth_range" in infos[0] else 0
        gallery = gr.Gallery(images, selected_index=selected)
        return [gallery, infos, infos[0], describe_info(infos[0])]

    # Fields.

    def restore(self, stored: str, owner: str) -> list[Any]:
        """Restore the form from the browser's storage; return updates of all fields and lists."""
        values: JsonObject = {}
        try:
            kept = json.loads(stored or "{}")
            values = kept if isinstance(kept, dict) else {}
        except ValueError:
            log.debug("the form in the browser's storage is damaged")
        updates = {k: gr.update(value=values[k]) if k in values else gr.skip() for k in self.kept}
        names = ("checkpoint", "vae", "refiner", "safety_checker", "upscaler")
        updated = self.list_files(*(values.get(name) for name in names))
        listed, lists = dict(zip(names, updated, strict=False)), updated[len(names) :]
        loras = self.offer_loras(listed["checkpoint"]["value"], values.get("loras"))
        updates |= {"loras": loras, **listed}
        return [*updates.values(), *lists, owner or secrets.token_urlsafe(16)]

    def list_files(
        self,
        checkpoint: str | None,
        vae: str | None,
        refiner: str | None,
        checker: str | None,
        upscaler: str | None,
    ) -> list[Any]:
        """Read the models folder again; return updates of all file lists."""
        names, files = self.backend.model_names(), self.backend.checkpoint_names()
        lines = self.backend.skipped_files()
        for line in lines:
            log.warning("skipped: %s", line)
        skipped = "".join(f"\n* skipped: {html.escape(line)}" for line in lines)
        text_models = self.backend.model_names("txt2img") or names
        first = checkpoint if checkpoint in names else next(iter(text_models), None)
        tokens = self.backend.tokens()
        return [
            gr.update(choices=names, value=first),
            self._offer("vae", vae, MODEL_VAE, is_hidden=True),
            self._offer("refiner", refiner, NO_REFINER),
            self._offer("safety_checker", checker, NO_CHECKER, is_hidden=True),
            self._offer("upscaler", upscaler, NO_UPSCALER),
            gr.update(choices=tokens, visible=bool(tokens)),
            gr.update(choices=files, value=first if first in files else next(iter(files), None)),
            skipped,
        ]

    def _offer(
        self, kind: str, chosen: str | None, none: tuple[str, str], *, is_hidden: bool = False
    ) -> Any:
        """Return an update of a list of add-ons, which begins with none.

        Args:
            is_hidden: whether it is hidden while there are none.
        """
        names = self.backend.addons(kind)
        settings: JsonObject = {"visible": bool(names)} if is_hidden else {}
        choices = [none, *((name, name) for name in names)]
        return gr.update(choices=choices, value=chosen if chosen in names else "", **settings)

    def offer_loras(self, checkpoint: str | None, chosen: list[str] | None) -> Any:
        """Return an update of the LoRA list with those that fit the checkpoint."""
        names = self.backend.fitting_loras(checkpoint)
        kept = [name for name in chosen or () if name in names]
        return gr.update(choices=names, value=kept, visible=bool(names))

    def name_weights(self, loras: list[str]) -> list[Any]:
        """Return updates of the weight sliders, one for each chosen LoRA."""
        names = [*(loras or ()), *[""] * LORA_SLOTS][:LORA_SLOTS]
        return [gr.update(label=f"Weight of {name}", visible=bool(name)) for name in names]

    def describe_choice(
        self,
        task: str,
        checkpoint: str,
        loras: list[str] | None,
        prompt: str | None,
        defaults: JsonObject,
        *values: Any,
    ) -> list[Any]:
        """Update the page for a checkpoint: whether it suits the tab, and `follow_choice`."""
        hidden = gr.update(visible=False)
        if task not in TASKS:
            return ["", hidden, hidden, hidden, defaults, *[gr.skip()] * len(values)]
        misfit = self.backend.explain_misfit(TASKS[task], checkpoint)
        names = self.backend.model_names(task) if misfit else []
        offers = gr.update(choices=names, value=None, visible=bool(names))
        has_sdxl = bool(self.forms[task].sdxl) and self.backend.is_sdxl(checkpoint)
        takes_upscaler = bool(self.forms[task].upscaling) and not self.backend.is_sdxl(checkpoint)
        has_upscaler = takes_upscaler and bool(self.backend.addons("upscaler"))
        shown = [gr.update(visible=has_sdxl), gr.update(visible=has_upscaler)]
        updates = self.follow_choice(task, checkpoint, loras, prompt, defaults, *values)
        return [show_error(misfit), offers, *shown, *updates]

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
            defaults: the defaults that FOLLOWERS were set to last.
            values: current values of FOLLOWERS; only unchanged ones are updated.
        """
        if task not in TASKS:
            return [defaults, *[gr.skip()] * len(values)]
        now = self.backend.defaults(TASKS[task], checkpoint, loras or (), prompt or "")
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
        count = self.backend.count_tokens(checkpoint, prompt or "", syntax, is_negative=is_negative)
        return show_token_count(*count)

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
        native = self.backend.defaults(TASKS["img2img"], checkpoint)["width"] or 512
        factor = min(1, native / min(width, height), self.backend.limits.side / max(width, height))
        multiple = 64 if self.backend.is_sdxl(checkpoint) else 8
        return [max(round(side * factor / multiple), 1) * multiple for side in (width, height)]

    def choose(self, infos: list[JsonObject], event: gr.SelectData) -> list[Any]:
        """Return info and description of the image clicked in the gallery."""
        info = infos[min(int(event.index), len(infos) - 1)]
        return [info, describe_info(info)]

    def show_relief(self, chosen: JsonObject | None) -> Any:
        """Return an update of the 3D view for the chosen image."""
        if chosen is not None and chosen.get("image") == "depth":
            return gr.skip()
        if chosen is not None and "depth_range" in chosen and not can_save_meshes():
            return gr.update(value=None, visible=True, label=NO_RELIEF)
        relief = self.backend.make_relief(chosen) if chosen else None
        if relief is None:
            return gr.update(value=None, visible="hidden")
        path, triangles = relief
        label = f"Relief of {triangles:,} triangles: drag to turn"
        return gr.update(value=path, visible=True, label=label)

    def allow_sends(self, chosen: JsonObject | None) -> list[Any]:
        """Return updates of the "Send to" buttons, enabled if an image is chosen."""
        return [gr.Button(interactive=chosen is not None)] * len(self.sends)

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
            defaults: the defaults that FOLLOWERS were set to last. Those of fields that the info
                fills are dropped, so that a value of the image that happens to equal one of them
                does not follow the image's LoRAs.
        """
        values = values_from_info(info) if info else {}
        slots = [gr.skip()] * (1 + LORA_SLOTS)
        if info:
            for kind in ("refiner", "upscaler"):
                values[kind] = self.backend.find_addon(kind, info)
        if info and "loras" in info and any(map(supports_variants, TASKS[task].families)):
            found, here = self.backend.find_loras(info), self.backend.fitting_loras(checkpoint)
            sliders = {
                name: weight for name, weight in found
                if name in here and not isinstance(weight, str) and abs(weight) <= MAX_WEIGHT
            }  # fmt: skip
            names = [*sliders][:LORA_SLOTS]
            tags = [f"<lora:{name}:{weight}>" for name, weight in found if name not in names]
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
        if name not in self.images:
            return fields
        sketch: JsonObject = {"background": path, "layers": [], "composite": None}
        images = {"ImageEditor": sketch, "Gallery": [path]}
        image = images.get(type(self.images[name]).__name__, path) if path else gr.skip()
        return [*fields, image]

    def pack_images(self, infos: list[JsonObject]) -> str | None:
        """Write the images of the gallery to a ZIP file; return its path."""
        if not infos:
            return None
        folder = self.backend.outdir / "served"
        folder.mkdir(exist_ok=True)
        archive = folder / f"images-{secrets.token_hex(4)}.zip"
        with zipfile.ZipFile(archive, "w") as file:
            for info in infos:
                file.write(info["path"], Path(info["path"]).relative_to(self.backend.outdir))
        return str(archive)


def _component(field: Field, **settings: Any) -> Any:
    brush = {"brush": gr.Brush(colors=["#ff40ff"])} if field.kind == "ImageEditor" else {}
    component = getattr(gr, field.kind)(**field.settings, **brush, **settings)
    if field.kind == "Image":  # pass the path, as errors of our reader are clearer than gradio's
        component.preprocess = lambda data: data and data.path
    return (
        component if field.kind in ("Image", "ImageEditor", "Gallery") else _skip_checks(component)
    )


def _skip_checks(component: Any) -> Any:
    """Disable gradio's checks of a field, as `Limits` and options check values in one line."""
    component.preprocess = lambda value: value
    return component


def _send_button(name: str, prefix: str = "send") -> gr.Button:
    title = TASKS[name].title if name in TASKS else INFO_TABS[name]
    is_enabled = prefix != "send"
    return gr.Button(title, size="sm", interactive=is_enabled, elem_id=f"{prefix}-{name}")


def _with_depth(info: JsonObject) -> list[JsonObject]:
    """Return the info of an image, then that of its depth if it has one."""
    depth = depth_path(info["path"])
    has_depth = "depth_range" in info and depth.is_file()
    return [info, info | {"path": str(depth), "image": "depth"}] if has_depth else [info]


def _seed_of(info: JsonObject | None, seed: str) -> str:
    return str(info["seed"]) if info and "seed" in info else seed


def _last_path(job: Job | None) -> Any:
    images = job.progress.images if job else []
    return images[-1]["path"] if images else gr.skip()

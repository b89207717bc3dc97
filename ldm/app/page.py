"""The page: tabs for the tasks, and next to them the running job and its images."""

import html
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gradio as gr

from ldm.app.backend import Backend
from ldm.app.form import (
    CSS,
    IMAGE_BOX,
    Field,
    TaskForm,
    describe_file,
    describe_info,
    show_progress,
)
from ldm.app.progress import Progress, follow
from ldm.generate.request import Request
from ldm.generate.tasks import TASKS
from ldm.runtime.errors import MissingArgument
from ldm.runtime.types import JsonObject

__all__ = ["Page"]

FONT = ["system-ui", "sans-serif"]
MONO_FONT = ["ui-monospace", "monospace"]
GALLERY_LIMIT = 60  # images

log = logging.getLogger(__name__)

Work = Callable[[Request, Progress], str]


class Page:
    """Builds and serves the page. All that needs a model is a job; one runs at a time.

    Args:
        hint: returns what to append to the message of an error.
    """

    def __init__(self, backend: Backend, hint: Callable[[BaseException], str]) -> None:
        self.backend = backend
        self.hint = hint
        self.forms = {
            name: TaskForm(task, backend.limits, backend.offered_loras)
            for name, task in TASKS.items()
        }
        self.models: dict[str, gr.Dropdown] = {}  # of each task
        self.image_fields: JsonObject = {}  # of each tab, for images that are sent to it
        # (button, work, input fields, field for the result or None = gallery)
        self.jobs: list[tuple[gr.Button, Callable[..., str], list[Any], Any]] = []

    def build(self) -> gr.Blocks:
        """Build the page, with all its events."""
        page: gr.Blocks
        with gr.Blocks(title="ldm", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
            self.progress = gr.State(None)
            self.infos = gr.State([])
            self.chosen = gr.State(0)  # index of the chosen image
            with gr.Row():
                with gr.Column(scale=5, min_width=320), gr.Tabs() as self.tabs:
                    for name in TASKS:
                        self._build_task(name)
                    self._build_inspect()
                    self._build_replay()
                with gr.Column(scale=4, min_width=320):
                    self._build_results()
            for job in self.jobs:
                self._connect_job(*job)
            outputs = [*self.models.values(), self.file, self.skipped]
            page.load(self.refresh_models, None, outputs, show_progress="hidden")
        return page

    def serve(self, port: int, *, listen: bool, auth: str | None, max_queue: int) -> None:
        """Serve the page until interrupted.

        Args:
            listen: accept connections from other machines.
            auth: USER:PASSWORD.
            max_queue: most waiting jobs.
        """
        outdir = self.backend.outdir
        os.environ["GRADIO_TEMP_DIR"] = str(outdir / "served")  # or it would be in /tmp
        log.info("open http://127.0.0.1:%d", port)
        self.build().queue(max_size=max_queue, api_open=False).launch(
            server_name="0.0.0.0" if listen else "127.0.0.1",
            server_port=port,
            auth=tuple(auth.split(":", 1)) if auth else None,
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
            theme=gr.themes.Default(font=FONT, font_mono=MONO_FONT),
            css=CSS,
        )

    def _build_task(self, name: str) -> None:
        task, form = TASKS[name], self.forms[name]
        with gr.Tab(task.title, id=name, elem_id=f"tab-{name}"):
            self.models[name] = model = self._model_choice(name)
            with gr.Row(visible=bool(form.images)):
                fields = {key: _component(field) for key, field in form.images.items()}
            fields |= {key: _component(f) for key, f in (form.prompts | form.options).items()}
            with gr.Accordion("Generation settings", open=False), gr.Row():
                fields |= {key: _component(field) for key, field in form.settings.items()}
            inputs = [model, *fields.values()]
            if "depth_map" in fields:
                button = gr.Button("Estimate depth", elem_id="estimate")
                work = partial(self.run_task, name, self.backend.estimate_depth)
                self.jobs.append((button, work, inputs, fields["depth_map"]))
                fields["init_img"].change(lambda: None, None, fields["depth_map"])
            button = gr.Button("Generate", variant="primary", elem_id=f"go-{name}")
            work = partial(self.run_task, name, self.backend.generate)
            self.jobs.append((button, work, inputs, None))
            if form.images:
                self.image_fields[name] = next(iter(fields.values()))

    def _build_inspect(self) -> None:
        with gr.Tab("Checkpoint info", id="inspect", elem_id="tab-inspect"):
            self.file = self._model_choice(None)
            button = gr.Button("Inspect", variant="primary", elem_id="go-inspect")
            report = gr.Textbox(label="Report", lines=18, elem_id="report", buttons=["copy"])
            self.skipped = gr.Markdown()
            button.click(self.backend.inspect, self.file, report, concurrency_id="model")

    def _build_replay(self) -> None:
        with gr.Tab("PNG info", id="replay", elem_id="tab-replay"):
            box = _component(Field("Image", {"label": "Image", **IMAGE_BOX}))
            self.image_fields["replay"] = box
            self.facts = gr.Textbox(label="Parameters", lines=4, elem_id="facts")
            button = gr.Button("Reproduce", variant="primary", elem_id="go-replay")
            box.upload(describe_file, box, self.facts, queue=False)
            self.jobs.append((button, self.run_replay, [box], None))

    def _build_results(self) -> None:
        self.stop = gr.Button("Stop", size="sm", interactive=False, elem_id="cancel")
        self.live = gr.HTML(show_progress(Progress(message="")), elem_id="live")
        self.gallery = gr.Gallery(
            label="Output", columns=4, height=420, object_fit="contain", interactive=False,
            buttons=["download", "fullscreen"], elem_id="gallery",
        )  # fmt: skip
        self.about = gr.Textbox(label="Generation parameters", lines=3, elem_id="about")
        with gr.Row():
            for name, field in self.image_fields.items():
                title = TASKS[name].title if name in TASKS else "PNG info"
                button = gr.Button(
                    f"Send to {title}", size="sm", min_width=140, elem_id=f"send-{name}"
                )
                send = partial(self.send, name)
                event = button.click(send, [self.infos, self.chosen], [self.tabs, field])
                if name == "replay":
                    event.then(describe_file, field, self.facts, queue=False)

        def choose(infos: list[Any], event: gr.SelectData) -> list[Any]:
            return [event.index, describe_info(infos[event.index])]

        self.gallery.select(choose, self.infos, [self.chosen, self.about], queue=False)
        self.stop.click(self.stop_job, self.progress, queue=False)

    def _connect_job(
        self, button: gr.Button, work: Callable[..., str], inputs: list[Any], target: Any
    ) -> None:
        """Connect a button to its job; while one runs, the buttons of all jobs are disabled."""
        quiet: JsonObject = {"show_progress": "hidden"}
        switches = [self.stop, *(job[0] for job in self.jobs)]
        outputs = [self.live, self.gallery, self.infos, self.chosen, self.about]
        event = button.click(self.begin, None, [self.progress, self.live, *switches], queue=False)
        event = event.then(
            partial(self.run_job, work), [self.progress, self.infos, *inputs], outputs,
            concurrency_id="model", concurrency_limit=1, **quiet,
        )  # fmt: skip
        event = event.then(self.end, None, switches, queue=False, **quiet)
        if target is not None:
            event.then(_last_path, self.progress, target)

    def _model_choice(self, task: str | None) -> gr.Dropdown:
        names = self.backend.model_names(task)
        return gr.Dropdown(names, value=next(iter(names), None), label="Checkpoint")

    def refresh_models(self) -> list[Any]:
        """Read the models folder again; return updates of all drop-downs and skipped files."""
        lines = self.backend.skipped_files()
        for line in lines:
            log.warning("skipped: %s", line)
        text = "".join(f"\n* skipped: {html.escape(line)}" for line in lines)
        return [*map(self._model_choice, self.models), self._model_choice(None), text]

    def begin(self) -> list[Any]:
        """Return a new progress, and updates that enable the stop button only."""
        progress = Progress()
        return [progress, show_progress(progress), *self._set_buttons(is_running=True)]

    def end(self) -> list[Any]:
        """Return updates that enable all buttons but the stop button."""
        return self._set_buttons(is_running=False)

    def _set_buttons(self, is_running: bool) -> list[gr.Button]:
        starts = [gr.Button(interactive=not is_running) for _ in self.jobs]
        return [gr.Button(interactive=is_running), *starts]

    def run_job(
        self,
        work: Callable[..., str],
        progress: Progress | None,
        infos: list[Any],
        *inputs: Any,
    ) -> Iterator[list[Any]]:
        """Run a job; yield updates of the status and, when images are finished, of the gallery."""
        count = 0
        for now in follow(progress or Progress(), lambda job: work(job, *inputs), self.hint):
            updates = [gr.skip()] * 4
            if new := [info for info in now.images[count:] if "seed" in info]:
                infos = [*new[::-1], *infos][:GALLERY_LIMIT]
                images = [(info["path"], f"seed {info['seed']}") for info in infos]
                gallery = gr.Gallery(images, selected_index=0)
                updates = [gallery, infos, 0, describe_info(infos[0])]
            count = len(now.images)
            yield [show_progress(now), *updates]

    def run_task(
        self, name: str, work: Work, progress: Progress, model: str | None, *inputs: Any
    ) -> str:
        """Run the job of a task."""
        form = self.forms[name]
        values_by_field = dict(zip(form.fields(), inputs, strict=True))
        values = form.values(values_by_field, self.backend.uploads)
        return work(self.backend.make_request(TASKS[name], model, values), progress)

    def run_replay(self, progress: Progress, path: str | None) -> str:
        """Run the job of making an image again."""
        if path is None:
            raise MissingArgument('No input image. Upload one or use "Send to" under a result.')
        return self.backend.replay(path, progress)

    def stop_job(self, progress: Progress | None) -> None:
        """Stop the job of this page."""
        if progress is not None:
            progress.stop.set()

    def send(self, name: str, infos: list[Any], chosen: int) -> list[Any]:
        """Put the chosen image into the image field of another tab."""
        if not infos:
            return [gr.skip(), gr.skip()]
        path = infos[min(chosen, len(infos) - 1)]["path"]
        sketch = {"background": path, "layers": [], "composite": None}
        values = {"ImageEditor": sketch, "Gallery": [path]}
        kind = type(self.image_fields[name]).__name__
        return [gr.Tabs(selected=name), values.get(kind, path)]


def _component(field: Field) -> Any:
    brush = {"brush": gr.Brush(colors=["#ff40ff"])} if field.kind == "ImageEditor" else {}
    component = getattr(gr, field.kind)(**field.settings, **brush)
    if field.kind == "Image":  # pass the path: errors of our reader are clearer than gradio's
        component.preprocess = lambda data: data and data.path
    return component


def _last_path(progress: Progress) -> str | None:
    return progress.images[-1]["path"] if progress.images else None

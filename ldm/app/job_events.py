"""Handle events of jobs and images: submit, follow and stop jobs; show, select and pack images."""

import asyncio
import logging
import secrets
import zipfile
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from ldm.app.backend import Backend
from ldm.app.form import LORA_SLOTS, NO_IMAGE, TaskForm
from ldm.app.jobs import Job, Jobs, Work
from ldm.app.progress import Progress
from ldm.app.view import (
    explain_to_user,
    format_info,
    render_error,
    render_preview,
    render_progress,
    render_queue,
)
from ldm.generate.request import Request
from ldm.generate.tasks import PAGE_TASKS
from ldm.imaging.mesh import can_save_meshes
from ldm.imaging.output import get_depth_path
from ldm.runtime.errors import FileFormatError, MissingArgument
from ldm.runtime.files import write_atomically
from ldm.runtime.types import JsonObject

__all__ = ["JOB_OUTPUTS", "JobEvents"]

UPDATE_INTERVAL = 0.2  # seconds between two updates of the page
NO_RELIEF = "No relief: the server needs trimesh (pip install trimesh)"
# Attributes of `Layout`: the components that `JobEvents.follow` updates.
JOB_OUTPUTS = (
    "progress", "preview", "gallery", "infos", "selected_info", "parameters", "queue",
    "clear_button", "stop_button", "error",
)  # fmt: skip

log = logging.getLogger(__name__)


class JobEvents:
    """Handlers of events. Everything that needs a model is a job; one runs at a time.

    Args:
        forms: The form of each task by its name.
    """

    def __init__(self, backend: Backend, jobs: Jobs, forms: dict[str, TaskForm]) -> None:
        self.backend = backend
        self.jobs = jobs
        self.forms = forms

    def submit_task(
        self, field_names: Sequence[str], visitor: str, task: str, *form: Any
    ) -> list[Any]:
        """Queue a run with the current values of the form.

        Args:
            field_names: Keys of `Layout.fields`.
            form: Checkpoint, VAE, LoRAs, their weights, and the value of each field.
        """
        if task not in PAGE_TASKS:
            return self._submit(visitor, None)

        def prepare() -> tuple[str, Work]:
            request = self._build_request(field_names, task, *form)
            title = f"{PAGE_TASKS[task].title}: {request.prompts.prompt or 'no prompt'}"
            return title, partial(self.backend.generate, request)

        return self._submit(visitor, prepare)

    def submit_depth(self, field_names: Sequence[str], visitor: str, *form: Any) -> list[Any]:
        """Queue the estimation of a depth map; arguments as for `submit_task`."""

        def prepare() -> tuple[str, Work]:
            request = self._build_request(field_names, "depth2img", *form)
            return "Estimate depth", partial(self.backend.estimate_depth, request)

        return self._submit(visitor, prepare)

    def submit_replay(self, visitor: str, path: str | None) -> list[Any]:
        """Queue the reproduction of an image."""

        def prepare() -> tuple[str, Work]:
            if path is None:
                raise MissingArgument(NO_IMAGE)
            return f"Reproduce {Path(path).name}", partial(self.backend.replay, path)

        return self._submit(visitor, prepare)

    def _submit(self, visitor: str, prepare: Callable[[], tuple[str, Work]] | None) -> list[Any]:
        """Queue a job, or show the error that prevents it; return the job and updates of the page.

        Args:
            prepare: Returns title and work of the job; None = no job.
        """
        job: Job | None = None
        message, progress = "", gr.skip()
        try:
            if prepare is not None:
                job = self.jobs.submit(visitor, *prepare())
                if self.jobs.count_ahead(job) == 0:
                    progress = render_progress(job.progress)
        except Exception as error:  # top level: any error becomes the message
            log.debug("a form was refused", exc_info=True)
            message = explain_to_user(error)
        return [job, render_error(message), progress, *self._update_queue(visitor).values()]

    def _build_request(
        self,
        field_names: Sequence[str],
        task: str,
        checkpoint: str,
        vae: str,
        loras: list[str] | None,
        *weights_and_fields: Any,
    ) -> Request:
        weights = weights_and_fields[:LORA_SLOTS]
        fields = dict(zip(field_names, weights_and_fields[LORA_SLOTS:], strict=True))
        form = self.forms[task]
        inputs = {name: fields.get(f"{task}.{name}", fields.get(name)) for name in form.fields}
        values = form.parse(inputs, self.backend.uploads)
        values["lora"] = [
            f"{name}:{weight}" for name, weight in zip(loras or (), weights, strict=False)
        ]
        values["vae"] = vae
        return self.backend.build_request(PAGE_TASKS[task], checkpoint, values)

    async def follow(self, visitor: str, job: Job | None) -> AsyncIterator[list[Any]]:
        """Yield updates of JOB_OUTPUTS until a job has ended; it continues without the page."""
        if job is None:
            yield _make_updates()
            return
        num_images = 0
        shown_status: str | None = None
        while True:
            has_ended, progress = job.has_ended, job.progress
            status: str | None = render_progress(progress, self.jobs.count_ahead(job))
            if job.state == "queued" and self.jobs.list_jobs(visitor)[:1] != [job]:
                status = shown_status  # the page shows another job of the visitor
            updates: dict[str, Any] = {}
            if len(progress.infos) > num_images:
                num_images = len(progress.infos)
                updates |= self._update_gallery(visitor)
            if job.state == "removed":
                updates |= self._update_queue(visitor)
                if shown_status is not None and not self.jobs.list_jobs(visitor):
                    updates["progress"] = render_progress(
                        Progress(message="removed from the queue")
                    )
            elif status != shown_status or has_ended:
                updates |= {"progress": status, "preview": render_preview(progress)}
                updates |= self._update_queue(visitor)
                if progress.has_failed:
                    updates["error"] = render_error(progress.message)
            if status != shown_status or has_ended:
                yield _make_updates(**updates)
            if has_ended:
                return
            shown_status = status
            await asyncio.sleep(UPDATE_INTERVAL)

    async def follow_all(self, visitor: str) -> AsyncIterator[list[Any]]:
        """Yield updates with the images of a visitor, and of all jobs that have not ended."""
        yield _make_updates(**self._update_gallery(visitor))
        for job in self.jobs.list_jobs(visitor):
            async for updates in self.follow(visitor, job):
                yield updates

    def stop_job(self, visitor: str) -> list[Any]:
        """Stop the visitor's job, or remove it from the queue."""
        self.jobs.stop(visitor)
        jobs = self.jobs.list_jobs(visitor)
        running = next((job for job in jobs if job.state == "running"), None)
        progress = gr.skip() if running is None else render_progress(running.progress)
        return [progress, gr.Button(interactive=False), render_queue(jobs)]

    def clear_queue(self, visitor: str) -> list[Any]:
        """Remove the visitor's waiting jobs from the queue."""
        self.jobs.clear(visitor)
        updates = self._update_queue(visitor)
        return [updates["queue"], updates["clear_button"]]

    def _update_queue(self, visitor: str) -> dict[str, Any]:
        """Return updates of the queue and the buttons Clear and Stop."""
        jobs = self.jobs.list_jobs(visitor)
        can_stop = any(not job.progress.stop_event.is_set() for job in jobs)
        has_waiting = any(job.state == "queued" for job in jobs)
        return {
            "queue": render_queue(jobs),
            "clear_button": gr.Button(visible=has_waiting),
            "stop_button": gr.Button(interactive=can_stop),
        }

    def _update_gallery(self, visitor: str) -> dict[str, Any]:
        """Return updates of the gallery, its infos, the selected image and its parameters."""
        files = (info for info in self.jobs.list_infos(visitor) if Path(info["path"]).is_file())
        infos = [shown for info in files for shown in _add_depth(info)]
        if not infos:
            return {}
        images = [
            (info["path"], f"{info.get('image', '')} seed {info['seed']}".strip()) for info in infos
        ]
        # With depth the grid of all images is shown, so that image and depth are side by side.
        selected_index = None if "depth_range" in infos[0] else 0
        gallery = gr.Gallery(images, selected_index=selected_index)
        return {
            "gallery": gallery, "infos": infos, "selected_info": infos[0],
            "parameters": format_info(infos[0]),
        }  # fmt: skip

    def select_image(self, infos: list[JsonObject], event: gr.SelectData) -> list[Any]:
        """Return the info of the image clicked in the gallery, as JSON and as text."""
        info = infos[min(int(event.index), len(infos) - 1)]
        return [info, format_info(info)]

    def show_relief(self, selected: JsonObject | None) -> Any:
        """Return an update of the 3D view for the selected image."""
        if selected is not None and selected.get("image") == "depth":
            return gr.skip()
        if selected is not None and "depth_range" in selected and not can_save_meshes():
            return gr.update(value=None, visible=True, label=NO_RELIEF)
        try:
            relief = self.backend.save_relief(selected) if selected else None
        except (OSError, FileFormatError) as error:  # a deleted image, a full disk
            return gr.update(value=None, visible=True, label=explain_to_user(error))
        if relief is None:
            return gr.update(value=None, visible="hidden")
        path, triangles = relief
        label = f"Relief of {triangles:,} triangles: drag to turn"
        return gr.update(value=path, visible=True, label=label)

    def pack_images(self, infos: list[JsonObject]) -> str | None:
        """Write the images of the gallery to a ZIP file; return its path.

        Raises:
            gr.Error: An image was deleted, or the disk is full.
        """
        if not infos:
            return None
        archive = self.backend.outdir / "served" / f"images-{secrets.token_hex(4)}.zip"
        try:
            archive.parent.mkdir(exist_ok=True)
            with write_atomically(archive) as partial, zipfile.ZipFile(partial, "w") as file:
                for info in infos:
                    file.write(info["path"], Path(info["path"]).relative_to(self.backend.outdir))
        except OSError as error:
            raise gr.Error(explain_to_user(error), print_exception=False) from error
        return str(archive)


def _make_updates(**updates: Any) -> list[Any]:
    """Return an update of each of JOB_OUTPUTS."""
    return [updates.get(name, gr.skip()) for name in JOB_OUTPUTS]


def _add_depth(info: JsonObject) -> list[JsonObject]:
    """Return the info of an image, then that of its depth if it has one."""
    depth = get_depth_path(info["path"])
    has_depth = "depth_range" in info and depth.is_file()
    return [info, info | {"path": str(depth), "image": "depth"}] if has_depth else [info]

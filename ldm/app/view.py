"""Render jobs and images as HTML and text for the page."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.app.jobs import Job
from ldm.app.progress import Progress
from ldm.generate.tasks import PAGE_TASKS
from ldm.imaging.metadata import format_parameters, read_info
from ldm.runtime.errors import FileFormatError, LdmError, describe_error, is_out_of_memory
from ldm.runtime.types import JsonObject

__all__ = [
    "describe_unknown_settings", "explain_to_user", "format_info", "read_file_info", "render_error",
    "render_preview", "render_progress", "render_queue", "render_token_count",
]  # fmt: skip

MEMORY_ADVICE = "; these help: batch size 1, a VAE tile size of 512, smaller width and height"
MAX_QUOTED_WORDS = 4  # of the truncated text of a prompt
NO_PARAMETERS = "No generation parameters found"


def render_progress(progress: Progress | None, jobs_ahead: int = 0) -> str:
    """Render progress bar and message of a job; None = no job.

    Args:
        jobs_ahead: Number of jobs before this one in the queue.
    """
    if progress is None:
        return '<div class="bar"></div><div class="message"></div>'
    message = f"queued, {jobs_ahead} ahead" if jobs_ahead else progress.message
    if progress.has_failed:
        message = "failed"
    return (
        f'<div class="bar"><div style="width: {progress.fraction:.1%}"></div></div>'
        f'<div class="message" role="status">{html.escape(message)}</div>'
    )


def render_error(message: str) -> str:
    """Render an error message; "" = no error."""
    return f'<div class="alert" role="alert">{html.escape(message)}</div>' if message else ""


def render_token_count(count: int, limit: int, truncated: str) -> str:
    """Render the token count of a prompt, and the first words of the truncated text."""
    if not limit:  # a model without prompts
        return ""
    if not truncated:
        return f"<span>{count}/{limit}</span>"
    words = html.escape(" ".join(truncated.split()[:MAX_QUOTED_WORDS]))
    return f'<span class="alert">{count}/{limit}, truncated: {words} …</span>'


def explain_to_user(error: BaseException) -> str:
    """Describe an error in one line, with the label of the field that caused it."""
    text = describe_error(error).replace("\n", " — ")
    if is_out_of_memory(error):
        return text + MEMORY_ADVICE
    name = error.argument if isinstance(error, LdmError) else None
    options = (task.options.get(name or "") for task in PAGE_TASKS.values())
    label = next((option.label for option in options if option is not None), "")
    return text if label.lower() in text.lower() else f"{text} ({label})"


def render_preview(progress: Progress) -> str:
    """Render the preview of a running job; "" without one."""
    if progress.preview is None:
        return ""
    buffer = io.BytesIO()
    progress.preview.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="preview" src="data:image/png;base64,{data}">'


def render_queue(jobs: Sequence[Job]) -> str:
    """Render the waiting jobs of a visitor."""
    waiting = [job for job in jobs if job.state == "queued"]
    items = "".join(f"<li>{html.escape(job.title)}</li>" for job in waiting)
    return f"<div>In the queue:</div><ol>{items}</ol>" if waiting else ""


def format_info(info: Mapping[str, Any]) -> str:
    """Format an image's info as A1111 does, with a note if it is unfinished or has no watermark."""
    text = format_parameters(info) or NO_PARAMETERS
    if info.get("unfinished"):
        text += f", Unfinished: stopped at step {info['unfinished']}"
    if "watermark" in info and info["watermark"] is None:
        text += ", Watermark: none"
    return "\n".join(filter(None, [text, describe_unknown_settings(info)]))


def describe_unknown_settings(info: Mapping[str, Any]) -> str:
    """List the settings in another program's parameters that ours does not read; "" = none."""
    other = {name: value for name, value in info.get("other", {}).items()
             if not name.endswith(("hash", "hashes"))}  # fmt: skip
    settings = ", ".join(f"{name}: {value}" for name, value in other.items())
    return f"Not understood: {settings}" if settings else ""


def read_file_info(path: str | None) -> tuple[JsonObject, str]:
    """Return (info, info as text) of an image file; the info is {} if it cannot be read."""
    if path is None:
        return {}, ""
    try:
        info = read_info(path)
        return info, format_info(info)
    except FileFormatError as error:
        return {}, str(error).replace(path, Path(path).name)
    except (OSError, TypeError, ValueError, KeyError, AttributeError):
        return {}, "Damaged generation parameters"

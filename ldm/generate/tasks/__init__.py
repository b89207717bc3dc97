"""The tasks that make images: one module each, with a row `TASK`, and one line here."""

from importlib import import_module

from ldm.generate.tasks.base import Prepared, Task

__all__ = ["TASKS", "Prepared", "Task"]

MODULES = (
    "txt2img",
    "img2img",
    "inpaint",
    "depth2img",
    "upscale",
    "unclip",
)
TASKS: dict[str, Task] = {name: import_module(f"{__name__}.{name}").TASK for name in MODULES}

"""Tasks of the command line and the page: a module with a `TASK` for each, named in MODULES."""

from importlib import import_module

from ldm.generate.tasks.base import PreparedTask, Task

__all__ = ["PAGE_TASKS", "TASKS", "PreparedTask", "Task"]

MODULES = (
    "txt2img", "img2img", "inpaint", "depth2img", "upscale", "unclip", "class2img", "uncond2img",
    "semantic2img", "layout2img", "knn2img",
)  # fmt: skip
TASKS: dict[str, Task] = {name: import_module(f"{__name__}.{name}").TASK for name in MODULES}
PAGE_TASKS = {name: task for name, task in TASKS.items() if task.is_on_page}

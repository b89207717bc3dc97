"""The tasks that make images, one module and one line here for each."""

from ldm.generate.tasks import depth2img, img2img, inpaint, txt2img, unclip, upscale
from ldm.generate.tasks.base import Prepared, Task

__all__ = ["TASKS", "Prepared", "Task"]

TASKS = {
    task.name: task
    for task in (
        txt2img.TASK,
        img2img.TASK,
        inpaint.TASK,
        depth2img.TASK,
        upscale.TASK,
        unclip.TASK,
    )
}

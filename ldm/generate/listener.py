"""Callbacks for the progress of a run, and those of the command line."""

import json
import logging
import sys
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from ldm.model import LatentDiffusion
from ldm.runtime.ranks import get_rank_and_world_size
from ldm.runtime.types import JsonObject

__all__ = ["PATH_KEYS", "ConsoleListener", "RunListener", "is_progress_hidden"]

# Keys of an info that contain the paths of an image's files.
PATH_KEYS = ("path", "depth_path", "relief_path", "latent_path")

log = logging.getLogger(__name__)


class RunListener:
    """Callbacks for the progress of a run; the base class only logs warnings.

    Attributes:
        stopped_at: Step after which `on_step` raised Stop with a latent, which the run decodes to
            images marked as unfinished. None = not stopped.
    """

    stopped_at: int | None = None

    def on_start(self, model: LatentDiffusion, total: int) -> None:
        """Handle the start of a run, which makes `total` images for all its inputs together."""

    def on_step(self, step: int, steps: int, x: Tensor, denoised: Tensor) -> None:
        """Handle a finished step, with the arguments of `ldm.sample`'s callback."""

    def add_image(self, info: JsonObject) -> None:
        """Handle a finished image; `info["path"]` is None if it was not saved."""

    def add_grid(self, path: Path) -> None:
        """Handle the saved grid of a run."""

    def warn(self, message: str) -> None:
        """Handle a warning for the user."""
        log.warning("%s", message)


class ConsoleListener(RunListener):
    """Prints paths or JSON of images to stdout, and shows a progress bar for each batch."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def on_step(self, step: int, steps: int, x: Tensor, denoised: Tensor) -> None:
        if step == 0:
            self._bar = tqdm(desc="Steps", total=steps, leave=False, disable=is_progress_hidden())
        self._bar.update()
        if step + 1 == steps:
            self._bar.close()

    def add_image(self, info: JsonObject) -> None:
        if self.as_json:
            is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
            _print_line(json.dumps(info, ensure_ascii=not is_unicode))
        elif info["path"] is not None:
            for key in PATH_KEYS:
                if key in info:
                    _print_line(info[key])

    def add_grid(self, path: Path) -> None:
        if not self.as_json:
            _print_line(str(path))


def is_progress_hidden() -> bool:
    """Return whether stderr is not a terminal, or this is not the main process."""
    return not sys.stderr.isatty() or get_rank_and_world_size()[0] > 0


def _print_line(line: str) -> None:
    """Print a line to stdout without breaking progress bars."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()

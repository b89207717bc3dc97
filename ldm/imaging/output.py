"""Save images in an output folder: `samples/00000.png` … and `grid-0000.png` …

The depth of an image is saved beside it, as `00000_depth.png`. Nothing is overwritten.

Several processes may share a folder, files may be deleted meanwhile, and a run may be killed at any
moment. So an image is written under a hidden name, `.00007.png.part`, that only one process can
create and that reserves the number; when complete, it is renamed. Every `.png` is complete.
"""

import os
import re
from collections.abc import Callable
from itertools import count
from pathlib import Path

from PIL import Image

from ldm.imaging.metadata import write_png
from ldm.runtime.errors import ArgumentError
from ldm.runtime.types import JsonMapping

__all__ = ["OutputFolder", "check_outdir", "get_depth_path"]


def check_outdir(outdir: str | Path) -> None:
    """Raise ArgumentError if a folder cannot be created or written into."""
    path = Path(outdir).expanduser()
    existing = next(folder for folder in (path, *path.parents) if os.path.exists(folder))
    if not existing.is_dir():
        raise ArgumentError(f"`{existing}` is not a folder", "outdir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ArgumentError(f"no permission to write into `{existing}`", "outdir")


class OutputFolder:
    """The folder of a run's images; created at once, so that errors are raised before sampling.

    Args:
        outdir: The folder. Numbers continue after the highest one in it.
        name: Save images in `outdir` itself, as NAME.png, NAME-1.png …; None = in `samples`,
            numbered.
    """

    def __init__(self, outdir: str | Path, name: str | None = None) -> None:
        self.path = Path(outdir).expanduser()
        self.name = name
        self.samples = self.path if name else self.path / "samples"
        self.samples.mkdir(parents=True, exist_ok=True)
        self._next_numbers: dict[Path, int] = {}  # by folder

    def save_sample(
        self, image: Image.Image, info: JsonMapping, depth: Image.Image | None = None
    ) -> Path:
        """Write the next `samples/NNNNN.png`, or `NAME-N.png`, and return its path.

        Args:
            depth: Depth of the image, saved as `get_depth_path`; None = it has no depth.
        """
        if self.name is None:
            return self._save_numbered(self.samples, "", 5, image, info, depth)

        def make_file_name(number: int) -> str:
            return f"{self.name}-{number}.png" if number else f"{self.name}.png"

        start = self._next_numbers.get(self.path, 0)
        return self._save(self.path, start, make_file_name, image, info, depth)

    def save_grid(self, image: Image.Image, info: JsonMapping) -> Path:
        """Write the next `grid-NNNN.png`, and return its path."""
        return self._save_numbered(self.path, "grid-", 4, image, info)

    def _save_numbered(
        self,
        folder: Path,
        prefix: str,
        digits: int,
        image: Image.Image,
        info: JsonMapping,
        depth: Image.Image | None = None,
    ) -> Path:
        # Numbers of this run are not reused, even if their files are deleted.
        start = max(_find_highest_number(folder, prefix) + 1, self._next_numbers.get(folder, 0))
        return self._save(folder, start, f"{prefix}{{:0{digits}d}}.png".format, image, info, depth)

    def _save(
        self,
        folder: Path,
        start: int,
        make_file_name: Callable[[int], str],
        image: Image.Image,
        info: JsonMapping,
        depth: Image.Image | None,
    ) -> Path:
        """Write the image under the first free name, counting from `start`; return its path."""
        for number in count(start):
            path = folder / make_file_name(number)
            if _write_if_free(path, image, info, depth):
                break
        self._next_numbers[folder] = number + 1
        return path


def _find_highest_number(folder: Path, prefix: str) -> int:
    """Return the highest number of an image or latent in the folder, -1 if there is none."""
    pattern = re.compile(rf"{prefix}(\d+)(?:(?:_depth)?\.png|\.latent)")
    matches = (pattern.fullmatch(name) for name in os.listdir(folder))
    return max((int(match[1]) for match in matches if match), default=-1)


def get_depth_path(path: str | Path) -> Path:
    """Return the path of an image's depth: `00000_depth.png` of `00000.png`."""
    return Path(path).with_name(f"{Path(path).stem}_depth.png")


def _write_if_free(
    path: Path, image: Image.Image, info: JsonMapping, depth: Image.Image | None
) -> bool:
    """Write an image, and its depth, if their paths are free; return whether they were."""
    paths = [path, *([get_depth_path(path)] if depth is not None else [])]
    partial_path = path.with_name(f".{path.name}.part")
    partial_depth_path = path.with_name(f".{get_depth_path(path).name}.part")
    try:
        partial_path.open("xb").close()
    except FileExistsError:
        return False
    try:
        # Checked only now: another process may have finished this number meanwhile.
        if any(map(os.path.lexists, paths)):
            partial_path.unlink()
            return False
        if depth is not None:
            write_png(partial_depth_path, depth, {**info, "image": "depth"})
            os.replace(partial_depth_path, get_depth_path(path))
        write_png(partial_path, image, info)
        os.replace(partial_path, path)
    except BaseException:
        partial_path.unlink(missing_ok=True)
        partial_depth_path.unlink(missing_ok=True)
        raise
    return True

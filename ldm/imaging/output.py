"""An output folder: `samples/00000.png` … and `grid-0000.png` …, never written over.

Several processes may share a folder, files may be deleted in between, and a run may be killed at
any moment. A picture is written under a hidden name, `.00007.png.part`, that only one process can
create and that holds the number for it; when whole, it is renamed. So every `.png` is complete.
"""

import os
import re
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.imaging.metadata import write_png

__all__ = ["OutputFolder"]


class OutputFolder:
    """Where one run puts its pictures; both folders are made at once, so errors come early.

    outdir: created if absent. Numbers go on after the highest that is there.
    name: what pictures are called that lie in outdir itself: NAME.png, NAME-1.png …
    """

    def __init__(self, outdir: str | Path, name: str | None = None) -> None:
        self.path = Path(outdir)
        self.name = name
        self.samples = self.path if name else self.path / "samples"
        self.samples.mkdir(parents=True, exist_ok=True)
        self._following: dict[Path, int] = {}

    def save_sample(self, picture: Image.Image, info: Mapping[str, Any]) -> Path:
        """The picture as the next `samples/NNNNN.png`, or under its name; returns its path."""
        if self.name is not None:
            return self._save_named(picture, info)
        return self._save(self.samples, "", 5, picture, info)

    def save_grid(self, picture: Image.Image, info: Mapping[str, Any]) -> Path:
        """The picture as the next `grid-NNNN.png`; returns its path."""
        return self._save(self.path, "grid-", 4, picture, info)

    def _save(
        self, folder: Path, prefix: str, digits: int, picture: Image.Image, info: Mapping[str, Any]
    ) -> Path:
        # Numbers given out in this run are not used again, even if their files are deleted.
        start = max(_highest(folder, prefix) + 1, self._following.get(folder, 0))
        for number in count(start):
            path = folder / f"{prefix}{number:0{digits}d}.png"
            if _write_new(path, picture, info):
                break
        self._following[folder] = number + 1
        return path

    def _save_named(self, picture: Image.Image, info: Mapping[str, Any]) -> Path:
        for number in count(self._following.get(self.path, 0)):
            path = self.path / (f"{self.name}-{number}.png" if number else f"{self.name}.png")
            if _write_new(path, picture, info):
                break
        self._following[self.path] = number + 1
        return path


def _highest(folder: Path, prefix: str) -> int:
    """The highest number among the pictures of the folder, -1 if there is none."""
    pattern = re.compile(rf"{prefix}(\d+)\.png")
    matches = (pattern.fullmatch(name) for name in os.listdir(folder))
    return max((int(match[1]) for match in matches if match), default=-1)


def _write_new(path: Path, picture: Image.Image, info: Mapping[str, Any]) -> bool:
    """Whether the path was free and now holds the picture."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.open("xb").close()
    except FileExistsError:
        return False
    try:
        # Only now: another process may have finished this number since the folder was listed.
        if os.path.lexists(path):
            part.unlink()
            return False
        write_png(part, picture, info)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return True

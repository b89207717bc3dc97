"""A folder of images and their captions.

DIR/metadata.jsonl        {"file_name": "images/0001.png", "text": "a red apple", …}
DIR/metadata.csv          file_name,text,…
DIR/0001.png, 0001.txt    without metadata: every image, with the .txt or .caption beside it
DIR/10_sks dog/0001.png   a folder of kohya's scripts: ten times in an epoch; without a text
                          beside it, the caption is the name of the folder
"""

import csv
import json
import re
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

from ldm.data.dataset import ImageDataset, UnreadableSample
from ldm.data.transforms import Transform
from ldm.imaging.reading import IMAGE_SUFFIXES, read_size
from ldm.runtime.errors import ArgumentError, FileFormatError, MissingFile
from ldm.runtime.types import JsonMapping, JsonObject

__all__ = ["Folder", "read_metadata"]

CAPTION_SUFFIXES = (".txt", ".caption")
CACHED = 2**28  # bytes of files that are kept in memory


class Folder(ImageDataset):
    """The images of a folder with their metadata.

    Args:
        root: the folder. Rows with `repeats` count as so many samples.
        transform: see `ImageDataset`.
        split: keep the rows with this `split`; None = all.
        where: keep the rows with these values, {"object": "robot"}.
        fields: values that replace the metadata's, {"text": "a photo of a sks dog"}.
        text: which field of the metadata is the caption.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        transform: Transform,
        split: str | None = None,
        where: JsonMapping | None = None,
        fields: JsonMapping | None = None,
        text: str = "text",
        seed: int = 0,
    ) -> None:
        super().__init__(transform, seed)
        self.root = Path(root)
        conditions = {**(where or {}), **({} if split is None else {"split": split})}
        rows, damaged = _read(self.root)
        # Where all have one caption, nobody needs the files that were damaged.
        self.damaged = {} if "text" in (fields or {}) else damaged  # reasons by name of the image
        rows = [row for row in rows if all(row.get(key) == v for key, v in conditions.items())]
        captioned = ({**row, "text": row[text]} if text in row else row for row in rows)
        self.rows = [
            {**row, **(fields or {})}
            for row in captioned
            for _ in range(int(row.get("repeats", 1)))
        ]
        if not self.rows:
            only = ", ".join(f"{key} `{value}`" for key, value in conditions.items())
            raise ArgumentError(f"`{root}` has no images with {only}")
        self._files: dict[str, bytes] = {}  # small data sets are read from disk only once
        self._free = CACHED
        self._assign_groups()

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> JsonMapping:
        if reason := self.damaged.get(self.name(index)):
            raise UnreadableSample(self.name(index), reason)
        return self.rows[index]

    def name(self, index: int) -> str:
        return str(self.rows[index]["file_name"])

    def content(self, index: int) -> bytes:
        name = self.name(index)
        if name not in self._files:
            data = (self.root / name).read_bytes()
            self._free -= len(data)
            if self._free < 0:
                return data
            self._files[name] = data
        return self._files[name]

    def _size(self, index: int) -> tuple[int, int]:
        return read_size(self.root / self.name(index))


def read_metadata(root: Path) -> list[JsonObject]:
    """The rows of metadata.jsonl or metadata.csv, each with `file_name`; else of all images.

    Raises:
        MissingFile: there is no folder, or nothing in it.
        FileFormatError: the metadata cannot be read, or a row has no `file_name`.
    """
    return _read(root)[0]


def _read(root: Path) -> tuple[list[JsonObject], dict[str, str]]:
    """The rows, and the reasons why captions of some cannot be read, by `file_name`."""
    if not root.is_dir():
        raise MissingFile(f"there is no folder `{root}`")
    rows: list[JsonObject]
    damaged: dict[str, str] = {}
    if (root / "metadata.jsonl").exists():
        rows = list(_json_lines(root / "metadata.jsonl"))
    elif (root / "metadata.csv").exists():
        rows = list(csv.DictReader(StringIO(_read_text(root / "metadata.csv"), newline="")))
    else:
        rows = list(_list_images(root, damaged))
        if not rows:
            raise MissingFile(f"`{root}` has no metadata.jsonl, metadata.csv or images")
    for number, row in enumerate(rows, 1):
        if "file_name" not in row:
            raise FileFormatError(f"`{root}`: row {number} of the metadata has no `file_name`")
    return rows, damaged


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"`{path}` is not UTF-8: {error}") from None


def _json_lines(path: Path) -> Iterator[JsonObject]:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield dict(json.loads(line))
            except (TypeError, ValueError) as error:
                raise FileFormatError(f"`{path}`, line {number}: {error}") from None


def _list_images(root: Path, damaged: dict[str, str]) -> Iterator[JsonObject]:
    """Rows of a folder without metadata, with the caption beside each image.

    Args:
        damaged: the reasons why captions cannot be read are added to it, by `file_name`.
    """
    for path in sorted(root.glob("**/*")):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        row: JsonObject = {"file_name": str(path.relative_to(root))}
        kohya = re.fullmatch(r"(\d+)_(.+)", path.parent.name) if path.parent != root else None
        if kohya:
            row |= {"repeats": int(kohya[1]), "text": kohya[2]}
        files = (path.with_suffix(suffix) for suffix in CAPTION_SUFFIXES)
        if file := next((file for file in files if file.is_file()), None):
            try:
                row["text"] = _read_text(file).strip()
            except (OSError, ValueError) as error:
                damaged[row["file_name"]] = str(error)
        yield row

"""A folder of pictures and their captions, however people keep them.

    DIR/metadata.jsonl        {"file_name": "images/0001.png", "text": "a red apple", …}
    DIR/metadata.csv          file_name,text,…
    DIR/0001.png, 0001.txt    without metadata: every picture, with the .txt or .caption beside it
    DIR/10_sks dog/0001.png   a folder as kohya's scripts want it: ten times in an epoch; without a
                              text beside it, the caption is the name of the folder

Chance inside a sample is a pure function of (seed, epoch, index).
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from random import Random
from typing import Any

from torch.utils.data import Dataset
from tqdm import tqdm

from ldm.data.buckets import Buckets
from ldm.data.source import Unreadable
from ldm.imaging.reading import picture_in, size_in

__all__ = ["PICTURES", "Folder", "Transform", "WithPrior", "in_greatest", "read_metadata"]

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
CAPTIONS = (".txt", ".caption")
KEPT = 2**28  # bytes of files that are kept in memory
Transform = Callable[[Mapping[str, Any], Random], dict[str, Any]]


class Folder(Dataset):
    """Pictures with their metadata; `folder[epoch, index]` is a transformed record.

    root: the folder. Rows with `repeats` count as so many records.
    transform: (record, rng) -> sample; the record holds the metadata and `picture`. If it has
        `buckets`, records of one bucket are one of our `groups`.
    split: keep the rows with this `split`, None = all.
    where: keep the rows with these values, {"object": "robot"}.
    fields: values that take the place of the metadata's, {"text": "a photo of a sks dog"}.
    text: which field of the metadata is the caption.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        transform: Transform,
        split: str | None = None,
        where: Mapping[str, Any] | None = None,
        fields: Mapping[str, Any] | None = None,
        text: str = "text",
        seed: int = 0,
    ) -> None:
        self.root, self.transform, self.seed = Path(root), transform, seed
        wanted = {**(where or {}), **({} if split is None else {"split": split})}
        rows, damaged = _read(self.root)
        # Where all have one caption, nobody needs the files that were damaged.
        self.damaged = {} if "text" in (fields or {}) else damaged  # why, by the pictures' names
        rows = [row for row in rows if all(row.get(key) == v for key, v in wanted.items())]
        said = ({**row, "text": row[text]} if text in row else row for row in rows)
        self.rows = [
            {**row, **(fields or {})} for row in said for _ in range(int(row.get("repeats", 1)))
        ]
        if not self.rows:
            only = ", ".join(f"{key} `{value}`" for key, value in wanted.items())
            raise ValueError(f"`{root}` has no pictures of {only}")
        self._files: dict[str, bytes] = {}  # small data sets are read from disk only once
        self._room = KEPT
        buckets = getattr(transform, "buckets", None)
        self.groups = None if buckets is None else self._places(buckets)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        return self.transform(self.record(index), Random(f"{self.seed} {epoch} {index}"))

    def record(self, index: int) -> dict[str, Any]:
        """The metadata of a row and its `picture`, decoded.

        Raises Unreadable for a file that is missing or damaged, the picture's or the caption's.
        """
        try:
            return {
                **self.row(index),
                "picture": picture_in(self.content(index), self.name(index)),
            }
        except (OSError, ValueError) as error:
            raise Unreadable(self.name(index), str(error)) from error

    def row(self, index: int) -> Mapping[str, Any]:
        """The metadata of a record.

        Raises Unreadable if its caption lies in a file that cannot be read.
        """
        if reason := self.damaged.get(self.name(index)):
            raise Unreadable(self.name(index), reason)
        return self.rows[index]

    def name(self, index: int) -> str:
        """What errors call a record."""
        return str(self.rows[index]["file_name"])

    def content(self, index: int) -> bytes:
        """The file of a record."""
        name = self.name(index)
        if name not in self._files:
            data = (self.root / name).read_bytes()
            self._room -= len(data)
            if self._room < 0:
                return data
            self._files[name] = data
        return self._files[name]

    def _places(self, buckets: Buckets) -> list[int]:
        """The bucket of every record; what is no picture will be found broken in the greatest.

        There, and perhaps not elsewhere, are others to take its place.
        """
        places: dict[str, int | None] = {}
        names = [row["file_name"] for row in self.rows]
        for name in tqdm(dict.fromkeys(names), "Measuring", delay=5, dynamic_ncols=True):
            try:
                places[name] = buckets.index(*size_in(self.root / name))
            except ValueError:
                places[name] = None
        return in_greatest([places[name] for name in names])


def in_greatest(groups: Sequence[int | None]) -> list[int]:
    """The groups of records; those that have none get into the greatest."""
    counts = Counter(group for group in groups if group is not None)
    greatest = max(counts, key=lambda group: counts[group], default=0)
    return [greatest if group is None else group for group in groups]


class WithPrior(Dataset):
    """Each sample of one data set, with one of another as its `prior`: DreamBooth.

    Raises ValueError if the others have several sizes, as each of them may meet any sample.
    """

    def __init__(self, dataset: Any, others: Any) -> None:
        if others.groups is not None:
            raise ValueError("pictures of a class must have one size, not `buckets`")
        self.dataset, self.others, self.groups = dataset, others, dataset.groups

    def names_of_others(self) -> Iterator[str]:
        """What errors call the others, whose files may be named as those of the first."""
        return (f"prior/{self.others.name(index)}" for index in range(len(self.others)))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        turn, other = divmod(epoch * len(self) + index, len(self.others))
        sample = self.dataset[key]
        try:
            return {**sample, "prior": self.others[turn, other]}
        except Unreadable as error:
            raise Unreadable(f"prior/{error.name}", str(error)) from error


def read_metadata(root: Path) -> list[dict[str, Any]]:
    """The rows of metadata.jsonl or metadata.csv, each with `file_name`; else all pictures.

    Raises FileNotFoundError, or ValueError for a row without `file_name` and unreadable metadata.
    """
    return _read(root)[0]


def _read(root: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The same, and the reasons why captions of some cannot be read, by `file_name`."""
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder `{root}`")
    rows: list[dict[str, Any]]
    damaged: dict[str, str] = {}
    if (root / "metadata.jsonl").exists():
        rows = list(_json_lines(root / "metadata.jsonl"))
    elif (root / "metadata.csv").exists():
        rows = list(csv.DictReader(StringIO(_text(root / "metadata.csv"), newline="")))
    else:
        rows = list(_listed(root, damaged))
        if not rows:
            raise FileNotFoundError(f"`{root}` has no metadata.jsonl, metadata.csv or pictures")
    for number, row in enumerate(rows, 1):
        if "file_name" not in row:
            raise ValueError(f"`{root}`: row {number} of the metadata has no `file_name`")
    return rows, damaged


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"`{path}` is not UTF-8: {error}") from None


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield dict(json.loads(line))
            except (TypeError, ValueError) as error:
                raise ValueError(f"`{path}`, line {number}: {error}") from None


def _listed(root: Path, damaged: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The pictures of a folder without metadata, and the text that belongs to each.

    damaged: takes the reasons why a text cannot be read, by `file_name`.
    """
    for path in sorted(root.glob("**/*")):
        if path.suffix.lower() not in PICTURES or path.name.startswith("."):
            continue
        row: dict[str, Any] = {"file_name": str(path.relative_to(root))}
        kohya = re.fullmatch(r"(\d+)_(.+)", path.parent.name) if path.parent != root else None
        if kohya:
            row |= {"repeats": int(kohya[1]), "text": kohya[2]}
        for suffix in CAPTIONS:
            if path.with_suffix(suffix).is_file():
                try:
                    row["text"] = _text(path.with_suffix(suffix)).strip()
                except (OSError, ValueError) as error:
                    damaged[row["file_name"]] = str(error)
                break
        yield row

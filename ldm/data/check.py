"""What a folder of pictures, or tar shards, hold, and what of it would be trouble in training.

Every picture is decoded; the report counts those that cannot be, captions that are missing or the
same, pictures that are there twice, sizes, proportions, and the buckets that they would go to.
"""

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm.data.buckets import Buckets
from ldm.data.folder import Folder
from ldm.data.shards import expand, record_of, samples_of
from ldm.data.source import Unreadable

__all__ = ["Report", "check", "folder_of"]

AT_ONCE = 256  # records that are read before the next ones are asked for
SHOWN = 10  # names in the report; --list writes all
SIDES = (0, 256, 512, 768, 1024, 2048)
WIDTH = 40  # of the longest bar, characters


@dataclass
class Report:
    """What was found; `lines` is for people.

    sizes: (width, height) of every picture that can be read, as it is seen.
    broken: (name, reason). no_caption: names. captions, digests: how often each occurs.
    """

    buckets: Buckets
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    broken: list[tuple[str, str]] = field(default_factory=list)
    no_caption: list[str] = field(default_factory=list)
    captions: Counter[str] = field(default_factory=Counter)
    digests: Counter[str] = field(default_factory=Counter)

    def lines(self) -> Iterator[str]:
        """The report, line by line."""
        total = sum(self.sizes.values())
        yield f"{total:,} pictures can be read, {len(self.broken):,} are broken"
        yield from _some(reason for _, reason in self.broken)
        yield f"{_repeats(self.digests):,} pictures are copies of others"
        yield f"{len(self.no_caption):,} have no caption"
        yield from _some(self.no_caption)
        yield f"{_repeats(self.captions):,} captions are copies of others"
        yield from _some(f"{n} x `{text}`" for text, n in self.captions.most_common() if n > 1)
        yield from _bars("shorter side, pixels", self._of_sides())
        yield from _bars("width : height", self._of_proportions())
        yield from _bars(f"buckets of size {self.buckets.size}", self._of_buckets())

    def add(self, name: str, found: "Found | str") -> None:
        """Counts one record, or why it cannot be read."""
        if isinstance(found, str):
            self.broken.append((name, found))
            return
        self.sizes[found.size] += 1
        self.digests[found.digest] += 1
        if found.caption:
            self.captions[found.caption] += 1
        else:
            self.no_caption.append(name)

    def _of_sides(self) -> dict[str, int]:
        counts: Counter[int] = Counter()
        for size, n in self.sizes.items():
            counts[max(side for side in SIDES if side <= min(size))] += n
        ends = [*(str(side - 1) for side in SIDES[1:]), "…"]
        names = (f"{side} – {end}" for side, end in zip(SIDES, ends, strict=True))
        return {name: counts[side] for side, name in zip(SIDES, names, strict=True)}

    def _of_proportions(self) -> dict[str, int]:
        limits = {"1:2 and taller": 0.5, "2:3": 0.7, "3:4": 0.85, "square": 1.18, "4:3": 1.42}
        limits |= {"3:2": 1.7, "16:9": 2.0, "2:1 and wider": float("inf")}
        counts = dict.fromkeys(limits, 0)
        for (width, height), n in self.sizes.items():
            counts[next(name for name, most in limits.items() if width / height <= most)] += n
        return counts

    def _of_buckets(self) -> dict[str, int]:
        counts: Counter[int] = Counter()
        for size, n in self.sizes.items():
            counts[self.buckets.index(*size)] += n
        return {
            f"{width} x {height}": counts[place]
            for place, (width, height) in enumerate(self.buckets.sizes)
            if counts[place]
        }


@dataclass(frozen=True)
class Found:
    """What is counted of a record that can be read."""

    size: tuple[int, int]
    caption: str
    digest: str


def check(where: Sequence[str], *, size: int = 512, step: int = 64, workers: int = 4) -> Report:
    """Reads everything in a folder, or in shards as patterns name them.

        size, step: of the buckets that are counted. workers: threads that decode.
    Raises ValueError or FileNotFoundError if there is nothing to read.
    """
    report = Report(Buckets(size, step))
    folder = folder_of(where)
    records: Iterable[Any] = _in_shards(where) if folder is None else _in_folder(folder)
    total = None if folder is None else len(folder)
    bar = tqdm(total=total, unit="picture", dynamic_ncols=True, mininterval=1)
    # Each picture is opened without warnings; threads would not put their filters back in order.
    with bar, warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        records = iter(records)
        while some := list(islice(records, AT_ONCE)):
            for name, found in pool.map(_found, some):
                report.add(name, found)
                bar.update()
    return report


def folder_of(where: Sequence[str]) -> Folder | None:
    """The folder that is meant, each picture once, or None for shards.

    Raises FileNotFoundError for what is no pattern, no address and not there.
    """
    for name in where:
        if not any(mark in name for mark in "*?[{:") and not Path(name).exists():
            raise FileNotFoundError(f"there is no folder or file `{name}`")
    if len(where) != 1 or not Path(where[0]).is_dir():
        return None
    folder = Folder(root=where[0], transform=lambda record, _: dict(record))
    folder.rows = list({row["file_name"]: row for row in folder.rows}.values())
    return folder


def _in_folder(folder: Folder) -> Iterator[tuple[str, Any, Any]]:
    for index in range(len(folder)):
        yield folder.name(index), folder.record, index


def _in_shards(where: Sequence[str]) -> Iterator[tuple[str, Any, Any]]:
    for url in expand(where):
        for raw in samples_of(url):
            yield f"{Path(url).name}/{raw['__key__']}", record_of, raw


def _found(job: tuple[str, Any, Any]) -> tuple[str, Found | str]:
    name, read, what = job
    try:
        record = read(what)
    except Unreadable as error:
        return name, str(error)
    picture, text = record["picture"], str(record.get("text") or record.get("object") or "")
    same = hashlib.sha256(f"{picture.mode} {picture.size}".encode() + picture.tobytes())
    return name, Found(picture.size, text.strip(), same.hexdigest())


def _repeats(counts: Counter[str]) -> int:
    return sum(counts.values()) - len(counts)


def _some(lines: Iterable[str]) -> Iterator[str]:
    lines = iter(lines)
    yield from (f"  {line}" for line in islice(lines, SHOWN))
    rest = sum(1 for _ in lines)
    if rest:
        yield f"  … and {rest:,} more"


def _bars(title: str, counts: dict[str, int]) -> Iterator[str]:
    yield title
    most = max([1, *counts.values()])
    for name, n in counts.items():
        yield f"  {name:>15} {n:8,} {'#' * round(WIDTH * n / most)}".rstrip()

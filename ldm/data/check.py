"""Check a folder of images, or tar shards, for problems to repair before training."""

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from os.path import splitdrive
from pathlib import Path
from typing import TypeVar

from PIL import Image
from tqdm import tqdm

from ldm.data.buckets import Buckets
from ldm.data.dataset import Sample, UnreadableSample
from ldm.data.folder import ImageFolder
from ldm.data.shards import decode_sample, expand_patterns, get_sample_name, read_shard
from ldm.data.transforms import PhotoTransform, get_captions
from ldm.runtime.errors import MissingFile

__all__ = ["DataReport", "check_data", "open_folder"]

CHUNK_SIZE = 256  # samples handed to the threads at once, to bound memory
MAX_LIST_LINES = 10  # in the report; --list writes the names of all unreadable samples
SIDE_BOUNDS = (0, 256, 512, 768, 1024, 2048)  # lower bounds of the classes of shorter sides
ASPECT_RATIOS = {  # name -> maximum of width / height
    "1:2 and taller": 0.5,
    "2:3": 0.7,
    "3:4": 0.85,
    "square": 1.18,
    "4:3": 1.42,
    "3:2": 1.7,
    "16:9": 2.0,
    "2:1 and wider": float("inf"),
}
BAR_WIDTH = 40  # of the longest bar, in characters

T = TypeVar("T")
LoadSample = Callable[[], Sample]  # raises UnreadableSample


@dataclass
class DataReport:
    """Statistics of a dataset.

    Args:
        buckets: The buckets to count.
        sizes: (width, height) of every readable image, upright.
        unreadable_samples: (name, reason) of each.
        uncaptioned_names: Names of samples without a caption.
        captions: All captions, stripped.
        digests: SHA-256 of the pixels of every readable image.
    """

    buckets: Buckets
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    unreadable_samples: list[tuple[str, str]] = field(default_factory=list)
    uncaptioned_names: list[str] = field(default_factory=list)
    captions: Counter[str] = field(default_factory=Counter)
    digests: Counter[str] = field(default_factory=Counter)

    def format_lines(self) -> Iterator[str]:
        """Format the report, line by line."""
        total = sum(self.sizes.values())
        yield f"{total:,} images can be read, {len(self.unreadable_samples):,} are unreadable"
        yield from _format_first_lines(reason for _, reason in self.unreadable_samples)
        yield f"{_count_repeats(self.digests):,} images are copies of others"
        yield f"{len(self.uncaptioned_names):,} have no caption"
        yield from _format_first_lines(self.uncaptioned_names)
        yield f"{_count_repeats(self.captions):,} captions are copies of others"
        repeated = (f"{n} x `{text}`" for text, n in self.captions.most_common() if n > 1)
        yield from _format_first_lines(repeated)
        last_sides = [*(str(side - 1) for side in SIDE_BOUNDS[1:]), "…"]
        sides = {f"{a} – {b}": a for a, b in zip(SIDE_BOUNDS, last_sides, strict=True)}
        yield from _format_bars("shorter side, pixels", self._count_by(_classify_side, sides))
        ratios = {name: name for name in ASPECT_RATIOS}
        yield from _format_bars("width : height", self._count_by(_classify_aspect_ratio, ratios))
        buckets = {f"{w} x {h}": k for k, (w, h) in enumerate(self.buckets.sizes)}
        counts = self._count_by(self.buckets.find_nearest, buckets)
        used = {name: n for name, n in counts.items() if n}
        yield from _format_bars(f"buckets of size {self.buckets.size}", used)

    def add(self, name: str, size: tuple[int, int], digest: str, captions: Sequence[str]) -> None:
        """Count one readable sample."""
        self.sizes[size] += 1
        self.digests[digest] += 1
        self.captions.update(filter(None, captions))
        if not any(captions):
            self.uncaptioned_names.append(name)

    def _count_by(
        self, classify: Callable[[int, int], T], names: Mapping[str, T]
    ) -> dict[str, int]:
        """Count the images per class, a function of (width, height)."""
        counts: Counter[T] = Counter()
        for size, n in self.sizes.items():
            counts[classify(*size)] += n
        return {name: counts[key] for name, key in names.items()}


def check_data(
    data: ImageFolder | Sequence[str], *, size: int = 512, step: int = 64, workers: int = 4
) -> DataReport:
    """Decode and count all samples of a folder, or of shards given by patterns.

    Args:
        size, step: Arguments of the `Buckets` to count.
        workers: Threads that decode images.
    Raises:
        MissingFile: A folder or file is missing.
    """
    report = DataReport(Buckets(size, step))
    samples = _iter_samples(data)
    total = len(data) if isinstance(data, ImageFolder) else None
    bar = tqdm(total=total, unit="image", dynamic_ncols=True, mininterval=1)
    # Opening an image changes the warning filters; threads would not restore them in order.
    with bar, warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        while chunk := list(islice(samples, CHUNK_SIZE)):
            results = pool.map(_measure_sample, (load for _, load in chunk))
            for (name, _), result in zip(chunk, results, strict=True):
                if isinstance(result, UnreadableSample):
                    report.unreadable_samples.append((name, str(result)))
                else:
                    report.add(name, *result)
                bar.update()
    return report


def open_folder(paths: Sequence[str]) -> ImageFolder | None:
    """Open a single folder, in which each image is listed once; return None for shards.

    Raises:
        MissingFile: A path does not exist; patterns and URLs are not checked.
    """
    for name in paths:
        if (
            not any(character in splitdrive(name)[1] for character in "*?[{:")
            and not Path(name).expanduser().exists()
        ):
            raise MissingFile(f"there is no folder or file `{name}`")
    if len(paths) != 1 or not Path(paths[0]).expanduser().is_dir():
        return None
    folder = ImageFolder(root=paths[0], transform=PhotoTransform())
    # A file may have several rows with different captions, or be repeated in an epoch.
    folder.rows = list({row["file_name"]: row for row in folder.rows}.values())
    return folder


def _iter_samples(data: ImageFolder | Sequence[str]) -> Iterator[tuple[str, LoadSample]]:
    """Yield the name of each sample, and a function that loads it."""
    if isinstance(data, ImageFolder):
        for index in range(len(data)):
            yield data.get_name(index), partial(data.load, index)
    else:
        for raw in chain.from_iterable(map(read_shard, expand_patterns(data))):
            yield get_sample_name(raw), partial(decode_sample, raw)


def _measure_sample(load: LoadSample) -> tuple[tuple[int, int], str, list[str]] | UnreadableSample:
    """Return size, digest and captions of a sample, or the error of reading it."""
    try:
        sample = load()
    except UnreadableSample as error:
        return error
    image: Image.Image = sample["image"]
    digest = hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()
    captions = get_captions({"text": sample.get("text") or sample.get("object")})
    return image.size, digest, [caption.strip() for caption in captions]


def _classify_side(width: int, height: int) -> int:
    return max(side for side in SIDE_BOUNDS if side <= min(width, height))


def _classify_aspect_ratio(width: int, height: int) -> str:
    return next(name for name, limit in ASPECT_RATIOS.items() if width / height <= limit)


def _count_repeats(counts: Counter[str]) -> int:
    return sum(counts.values()) - len(counts)


def _format_first_lines(lines: Iterable[str]) -> Iterator[str]:
    lines = iter(lines)
    yield from (f"  {line}" for line in islice(lines, MAX_LIST_LINES))
    remaining = sum(1 for _ in lines)
    if remaining:
        yield f"  … and {remaining:,} more"


def _format_bars(title: str, counts: Mapping[str, int]) -> Iterator[str]:
    yield title
    max_count = max([1, *counts.values()])
    for name, n in counts.items():
        yield f"  {name:>15} {n:8,} {'#' * round(BAR_WIDTH * n / max_count)}".rstrip()

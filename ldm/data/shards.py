"""An endless sequence of batches of images in tar files (webdataset, img2dataset).

    data-000000.tar     0001.jpg 0001.txt 0001.json   0002.jpg …
    shard    0    1    2    3    4                    shard s belongs to stream s % streams
    stream   0    1    0    1    0
    batch    0    1    2    3    4    5    6   …      from streams in proportion to their shards
    stream   0    1    0    1    0    0    1   …

In every epoch each stream has its own order of shards and a buffer that shuffles undecoded samples,
both functions of (seed, stream, epoch). So batch n is the same on any number of ranks, streams of
unequal length do not wait for each other, and resuming reads the current epoch of a stream again
without decoding it. Within an epoch of a stream no sample repeats; if all shards have the same
size, none does within an epoch of the dataset. If the number of streams is a multiple of the
ranks, and that of shards a multiple of the streams, each shard is read by one rank.
"""

import itertools
import json
import logging
import math
import os
import re
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from fractions import Fraction
from glob import glob, has_magic
from io import BufferedReader, BytesIO
from pathlib import Path
from random import Random
from typing import IO, Any

from tqdm import tqdm

from ldm.data.dataset import Sample, UnreadableSample
from ldm.data.http_stream import HTTPStream
from ldm.data.source import Batch, BatchSource, collate
from ldm.data.transforms import Transform, get_captions
from ldm.imaging.reading import IMAGE_SUFFIXES, decode_srgb, read_size
from ldm.runtime.errors import ArgumentError, FileFormatError, MissingFile
from ldm.runtime.files import decode_text, is_hidden

__all__ = [
    "RawSample", "Shards", "decode_sample", "expand_patterns", "find_image_key", "get_sample_name",
    "parse_metadata", "read_shard",
]  # fmt: skip

log = logging.getLogger(__name__)

MAX_SHARDS = 1_000_000  # per pattern
COMMON_SUFFIXES = ("png", "jpg", "jpeg", "webp", "avif", "bmp", "gif", "tif", "tiff")
# Suffixes of images without the dot, in order of preference.
IMAGE_KEYS = tuple(dict.fromkeys((*COMMON_SUFFIXES, *(suffix[1:] for suffix in IMAGE_SUFFIXES))))

# "__key__", "__url__" and the bytes of each member by suffix; "__error__" if the shard is damaged.
RawSample = dict[str, Any]
MakeSample = Callable[[RawSample, Random], Sample]  # raises UnreadableSample


class Shards(BatchSource):
    """A source of the samples in tar files.

    Args:
        shards: Paths, with `*` or `{000..099}`, or http(s) URLs; one or a list.
        streams: Number of streams that share the shards; must not change during a run.
        shuffle: Size of the shuffle buffer of each stream, in samples.
        minimum, maximum: Bounds of numbers in the .json, {"width": 512}; samples without the number
            are left out. None = no bounds.
        length: Number of samples in an epoch; None = unknown.
        allow_commands: Whether `pipe:COMMAND` is allowed; never taken from a config.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        transform: Transform,
        seed: int = 0,
        *,
        streams: int = 8,
        shuffle: int = 500,
        minimum: Mapping[str, float] | None = None,
        maximum: Mapping[str, float] | None = None,
        length: int | None = None,
        allow_commands: bool = False,
    ) -> None:
        self.urls = expand_patterns(shards, allow_commands=allow_commands)
        self.make_sample: MakeSample = self._decode_and_transform
        self.transform, self.seed, self.length = transform, seed, length
        self.streams, self.shuffle = min(streams, len(self.urls)), shuffle
        minimum, maximum = minimum or {}, maximum or {}
        self.limits = {
            key: (minimum.get(key, -math.inf), maximum.get(key, math.inf))
            for key in {**minimum, **maximum}
        }

    def get_batches_per_epoch(self, batch_size: int) -> Fraction | None:
        return None if self.length is None else Fraction(self.length, batch_size)

    def load_fixed_samples(self, n: int) -> list[Sample]:
        raw_samples = itertools.chain.from_iterable(map(read_shard, self.urls))
        samples_by_bucket: dict[int, list[RawSample]] = {}
        for raw in itertools.islice(filter(self._is_within_limits, raw_samples), 4 * n):
            samples_by_bucket.setdefault(self._find_bucket(raw), []).append(raw)
        samples: list[Sample] = []
        for raw in max(samples_by_bucket.values(), key=len, default=[]):
            if len(samples) < n:
                samples += _make_samples(self._decode_and_transform, [raw], Random(self.seed), [])
        if not samples:
            raise ValueError(f"no image among the first samples of `{self.urls[0]}` … can be read")
        return [samples[k % len(samples)] for k in range(n)]

    def read_raw_samples(self) -> Iterator[RawSample]:
        """Read all samples within the limits, undecoded, in the order of the shards."""
        for url in tqdm(self.urls, "Reading", unit="shard", delay=5, dynamic_ncols=True):
            yield from filter(self._is_within_limits, read_shard(url))

    def iter_metadata(self) -> Iterator[dict[str, Any]]:
        """Read the metadata of all samples whose .json and .txt can be read."""
        for raw in self.read_raw_samples():
            with suppress(ValueError):
                yield parse_metadata(raw)

    def get_bucket_size(self, raw: RawSample) -> tuple[int, int] | None:
        """Return (width, height) of the bucket of a sample, if there are buckets."""
        buckets = self.transform.buckets
        return None if buckets is None else buckets.sizes[self._find_bucket(raw)]

    def with_make_sample(self, make_sample: MakeSample) -> "Shards":
        """Return a copy with another `make_sample`, which `load_fixed_samples` does not use."""
        shards = copy(self)
        shards.make_sample = make_sample
        return shards

    def read_batches(self, batch_size: int, start: int, stride: int) -> Iterator[Batch]:
        # By stream: the position of its reader's next batch, and the reader.
        readers: dict[int, tuple[int, Iterator[tuple[int, list[RawSample]]]]] = {}
        for batch_index in itertools.count(start, stride):
            cycle, shard = divmod(batch_index, len(self.urls))
            stream = shard % self.streams
            position = cycle * len(self._get_shards(stream)) + shard // self.streams
            if stream not in readers:
                readers[stream] = position, self._read_stream(stream, batch_size, position)
            next_position, reader = readers[stream]
            skipped = position - next_position  # batches of other ranks
            epoch, raw_samples = next(itertools.islice(reader, skipped, None))
            readers[stream] = position + 1, reader
            rng, unreadable = Random(f"{self.seed} {batch_index}"), list[str]()
            samples = _make_samples(self.make_sample, raw_samples, rng, unreadable)
            if not samples:  # replaced by the first readable batch of the stream
                substitutes = (
                    _make_samples(self.make_sample, batch, rng, [])
                    for batch in self._read_epoch(stream, epoch, batch_size)
                )
                samples = next(filter(None, substitutes), [])
            if not samples:
                names = ", ".join(unreadable)
                raise ValueError(f"no sample of {len(raw_samples)} can be read: {names}")
            batch = collate([samples[k % len(samples)] for k in range(len(raw_samples))])
            yield {**batch, "unreadable": unreadable} if unreadable else batch

    def _get_shards(self, stream: int) -> list[str]:
        return self.urls[stream :: self.streams]

    def _read_stream(
        self, stream: int, batch_size: int, start: int
    ) -> Iterator[tuple[int, list[RawSample]]]:
        """Read (epoch, undecoded batch) of a stream endlessly, beginning with batch `start`."""
        epoch = 0
        while True:
            num_batches = 0
            for position, batch in enumerate(self._read_epoch(stream, epoch, batch_size)):
                num_batches += 1
                if position >= start:
                    yield epoch, batch
            if not num_batches:
                raise ValueError(f"`{self.urls[stream]}` … have no samples for stream {stream}")
            skipped, start = divmod(max(0, start - num_batches), num_batches)
            epoch += 1 + skipped  # all epochs have `num_batches`

    def _read_epoch(self, stream: int, epoch: int, batch_size: int) -> Iterator[list[RawSample]]:
        """Read the batches of an epoch of a stream, one bucket each; incomplete ones are last."""
        rng = Random(f"{self.seed} {stream} {epoch}")
        urls = self._get_shards(stream)
        rng.shuffle(urls)
        raw_samples = itertools.chain.from_iterable(map(read_shard, urls))
        samples_by_bucket: dict[int, list[RawSample]] = {}
        for raw in _shuffle(filter(self._is_within_limits, raw_samples), self.shuffle, rng):
            bucket = self._find_bucket(raw)
            samples_by_bucket.setdefault(bucket, []).append(raw)
            if len(samples_by_bucket[bucket]) == batch_size:
                yield samples_by_bucket.pop(bucket)
        yield from samples_by_bucket.values()

    def _find_bucket(self, raw: RawSample) -> int:
        buckets = self.transform.buckets
        if buckets is None:
            return 0
        try:
            return buckets.find_nearest(*read_size(BytesIO(raw[find_image_key(raw)])))
        except ValueError:  # unreadable: any bucket will do
            return buckets.find_nearest(1, 1)

    def _is_within_limits(self, raw: RawSample) -> bool:
        if "__error__" in raw or not self.limits:
            return True
        try:
            fields = _parse_json(raw)
        except ValueError:
            return False
        return all(
            isinstance(fields.get(key), (int, float)) and low <= fields[key] <= high
            for key, (low, high) in self.limits.items()
        )

    def _decode_and_transform(self, raw: RawSample, rng: Random) -> Sample:
        return self.transform(decode_sample(raw), rng)


def expand_patterns(shards: str | Sequence[str], *, allow_commands: bool = False) -> list[str]:
    """Expand patterns to paths, URLs and commands.

    Raises:
        ArgumentError: A command is not allowed, or a URL or pattern is not supported.
        MissingFile: A file is missing.
    """
    if not shards:
        raise ArgumentError("`shards` names no files")
    patterns = [shards] if isinstance(shards, str) else shards
    return [url for pattern in patterns for url in _expand_pattern(str(pattern), allow_commands)]


def read_shard(url: str) -> Iterator[RawSample]:
    """Yield undecoded samples: the members of a shard whose names are equal up to the first dot.

    If a shard is damaged or missing, the last sample has an "__error__" and no image.

    Raises:
        OSError: The server does not answer, or the command fails.
    """
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    try:
        with _open_shard(url) as file:
            members = tar_file_iterator(file, select_files=lambda name: not is_hidden(name))
            yield from group_by_keys({**member, "__url__": url} for member in members)
    except (FileNotFoundError, tarfile.TarError, EOFError, ValueError, zlib.error) as error:
        log.warning("the shard `%s` ends early: %s", url, error)
        yield {"__key__": "", "__url__": url, "__error__": f"`{url}`: {error}"}


def decode_sample(raw: RawSample) -> Sample:
    """Decode the metadata and the `image` of a sample.

    Raises:
        UnreadableSample: The image is missing or damaged, or the metadata cannot be read.
    """
    name = get_sample_name(raw)
    try:
        key = find_image_key(raw)
        return {**parse_metadata(raw), "image": decode_srgb(raw[key], f"{name}.{key}")}
    except ValueError as error:
        raise UnreadableSample(name, str(error)) from error


def get_sample_name(raw: RawSample) -> str:
    """Return the name of a sample in messages, SHARD/KEY."""
    return f"{Path(raw['__url__']).name}/{raw['__key__']}".rstrip("/")


def find_image_key(raw: RawSample) -> str:
    """Return the key of the image file in a sample, its suffix without the dot."""
    if "__error__" in raw:
        raise FileFormatError(raw["__error__"])
    for key in IMAGE_KEYS:
        if key in raw:
            return key
    raise FileFormatError(f"`{raw['__key__']}` has no image, only {', '.join(sorted(raw))}")


def parse_metadata(raw: RawSample) -> dict[str, Any]:
    """Return the .json of a sample, with `text` from its .txt or .caption if it has one.

    Raises:
        ValueError: The .json is not an object, or the captions are not texts.
    """
    row = _parse_json(raw)
    row["text"] = row.get("text") or row.get("caption") or ""
    for suffix in ("caption", "txt"):
        if suffix in raw:
            row["text"] = decode_text(raw[suffix], f"{get_sample_name(raw)}.{suffix}")
    captions = [caption.strip() for caption in get_captions(row)]
    return {**row, "text": captions if len(captions) > 1 else captions[0]}


def _expand_pattern(pattern: str, allow_commands: bool) -> list[str]:
    try:
        import braceexpand  # a dependency of webdataset
    except ImportError as error:
        raise ImportError(
            "shards need the package `webdataset`: pip install 'ldm-revived[shards]'"
        ) from error
    if pattern.startswith("pipe:") and not allow_commands:
        raise ArgumentError(
            f"`{pattern}` is a command, which a config may not run: copy the shards, give their"
            " http(s) URLs, or allow it with --allow-commands"
        )
    try:
        names = braceexpand.braceexpand(os.path.expanduser(pattern), escape=os.sep == "/")
        urls = list(itertools.islice(names, MAX_SHARDS + 1))
    except ValueError as error:
        raise ArgumentError(f"`{pattern}`: {error}") from None
    if len(urls) > MAX_SHARDS:
        raise ArgumentError(f"`{pattern}` expands to more than {MAX_SHARDS} shards")
    if pattern.startswith(("pipe:", "http://", "https://")):
        return urls
    if re.match(r"[\w+.-]{2,}://", pattern):  # a single letter is a Windows drive
        raise ArgumentError(f"`{pattern}` cannot be read, only files and http(s) URLs")
    paths = [path for url in urls for path in (sorted(glob(url)) if has_magic(url) else [url])]
    missing = [path for path in paths if not Path(path).is_file()]
    if missing or not paths:
        raise MissingFile(f"no shard `{(missing or [pattern])[0]}`")
    return paths


@contextmanager
def _open_shard(url: str) -> Iterator[IO[bytes]]:
    if url.startswith(("http://", "https://")):
        with BufferedReader(HTTPStream(url), 2**20) as file:
            yield file
    elif url.startswith("pipe:"):
        command = url.removeprefix("pipe:")
        with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            yield process.stdout
        if process.returncode:
            raise OSError(f"`{command}` failed with code {process.returncode}")
    else:
        with Path(url).open("rb") as file:
            yield file


def _shuffle(samples: Iterable[RawSample], buffer_size: int, rng: Random) -> Iterator[RawSample]:
    """Yield the samples, shuffled within a buffer."""
    buffer: list[RawSample] = []
    for raw in samples:
        buffer.append(raw)
        if len(buffer) > buffer_size:
            index = rng.randrange(len(buffer))
            buffer[index], buffer[-1] = buffer[-1], buffer[index]
            yield buffer.pop()
    rng.shuffle(buffer)
    yield from buffer


def _make_samples(
    make_sample: MakeSample, raw_samples: Sequence[RawSample], rng: Random, unreadable: list[str]
) -> list[Sample]:
    """Make the readable samples; add the names of the others to `unreadable`."""
    samples = []
    for raw in raw_samples:
        try:
            samples.append(make_sample(raw, rng))
        except UnreadableSample as error:
            unreadable.append(error.name)
    return samples


def _parse_json(raw: RawSample) -> dict[str, Any]:
    # pandas writes NaN for a missing value.
    fields = json.loads(raw.get("json", b"{}"), parse_constant=lambda _: None)
    if not isinstance(fields, dict):
        raise FileFormatError(f"`{raw['__key__']}.json` is not an object")
    return fields

"""Pictures in tar files, as webdataset and img2dataset write them, read as one endless sequence.

    data-000000.tar     0001.jpg 0001.txt 0001.json   0002.jpg …
    shard    0    1    2    3    4                    shard s belongs to lane s % lanes
    lane     0    1    0    1    0
    batch    0    1    2    3    4    5    6   …      as often from a lane as it has shards
    lane     0    1    0    1    0    0    1   …

Every lane has its own order of shards in every epoch and a buffer that shuffles what is read but
not yet decoded, both functions of (seed, lane, epoch). So batch n is the same on any number of
ranks, lanes of unequal length wait for nobody, and to go on means to read the lane's epoch again
without decoding. Within an epoch of a lane nothing comes twice; if all shards have the same size,
in no epoch at all. Where ranks divide lanes, and lanes shards, no rank reads in vain.
"""

import itertools
import json
import logging
import math
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from fractions import Fraction
from functools import partial
from glob import glob, has_magic
from io import BufferedReader, BytesIO
from pathlib import Path
from random import Random
from typing import IO, Any

from tqdm import tqdm

from ldm.data.download import Download
from ldm.data.folder import PICTURES, Transform
from ldm.data.source import Unreadable, collate, numbered
from ldm.imaging.reading import picture_in, size_in

__all__ = ["Shards", "expand", "name_of", "picture_of", "record_of", "said_of", "samples_of"]

log = logging.getLogger(__name__)

MOST = 1_000_000  # shards that a pattern may stand for
SUFFIXES = tuple(suffix.removeprefix(".") for suffix in PICTURES)
Raw = dict[str, Any]  # "__key__", "__url__", and the bytes of the members by their suffix


class Shards:
    """A source of the samples in tar files.

    shards: paths, with `*` or `{000..099}`, or http(s) addresses; one or a list.
    transform: (record, rng) -> sample; the record holds what the .json says, `text` and `picture`.
    lanes: into how many streams the shards are dealt; as it was when the run began.
    shuffle: samples that each lane keeps to draw from.
    least, most: limits of numbers in the .json, {"width": 512}; what lacks one is left out.
    length: samples in an epoch, if you know it.
    commands: whether `pipe:COMMAND` may be run, which a config must not decide.
    Raises ValueError for what cannot be read so, FileNotFoundError for shards that are not there.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        transform: Transform,
        seed: int = 0,
        *,
        lanes: int = 8,
        shuffle: int = 500,
        least: Mapping[str, float] | None = None,
        most: Mapping[str, float] | None = None,
        length: int | None = None,
        commands: bool = False,
    ) -> None:
        self.urls = expand(shards, commands=commands)
        self.make: Callable[[Raw, Random], dict[str, Any]] = self._transformed
        self.transform, self.seed, self.length = transform, seed, length
        self.lanes, self.shuffle = min(lanes, len(self.urls)), shuffle
        low, high = least or {}, most or {}
        self.limits = {
            key: (low.get(key, -math.inf), high.get(key, math.inf)) for key in {**low, **high}
        }

    def batches(
        self, size: int, *, start: int = 0, rank: int = 0, world: int = 1, workers: int = 0
    ) -> Iterator[dict[str, Any]]:
        return numbered(partial(self._read, size), start + rank, world, workers)

    def epoch(self, size: int) -> Fraction | None:
        return None if self.length is None else Fraction(self.length, size)

    def first(self, n: int) -> list[dict[str, Any]]:
        raws = itertools.chain.from_iterable(map(samples_of, self.urls))
        piles: dict[int, list[Raw]] = {}
        for raw in itertools.islice(filter(self._is_wanted, raws), 4 * n):
            piles.setdefault(self._bucket(raw), []).append(raw)
        found: list[dict[str, Any]] = []
        for raw in max(piles.values(), key=len, default=[]):
            if len(found) < n:
                found += _made(self._transformed, [raw], Random(self.seed), [])
        if not found:
            raise ValueError(f"`{self.urls[0]}` … begin with no pictures that can be read")
        return [found[k % len(found)] for k in range(n)]

    def raws(self) -> Iterator[Raw]:
        """All wanted samples, undecoded, in the order of the shards, which are read once."""
        for url in tqdm(self.urls, "Reading", unit="shard", delay=5, dynamic_ncols=True):
            yield from filter(self._is_wanted, samples_of(url))

    def rows(self) -> Iterator[dict[str, Any]]:
        """What is said of all samples, `text` among it."""
        for raw in self.raws():
            with suppress(ValueError):  # a damaged one will be named when its turn comes
                yield said_of(raw)

    def size(self, raw: Raw) -> tuple[int, int] | None:
        """(width, height) of the bucket of a sample, if there are buckets."""
        buckets = getattr(self.transform, "buckets", None)
        return None if buckets is None else buckets.sizes[self._bucket(raw)]

    def replaced(self, make: Callable[[Raw, Random], dict[str, Any]]) -> "Shards":
        """A source of what `make` makes of the samples; `first` goes on to show pictures.

        make: raises Unreadable for a damaged one.
        """
        other = copy(self)
        other.make = make
        return other

    def _read(self, size: int, first: int, step: int) -> Iterator[dict[str, Any]]:
        streams: dict[int, tuple[int, Iterator[tuple[int, list[Raw]]]]] = {}
        for number in itertools.count(first, step):
            turn, shard = divmod(number, len(self.urls))
            lane, share = shard % self.lanes, len(self.urls[shard % self.lanes :: self.lanes])
            place = turn * share + shard // self.lanes  # among the batches of this lane
            at, stream = streams.get(lane) or (place, self._lane(lane, size, place))
            epoch, raws = next(itertools.islice(stream, place - at, None))
            streams[lane] = place + 1, stream
            rng, broken = Random(f"{self.seed} {number}"), list[str]()
            found = _made(self.make, raws, rng, broken)
            if not found:  # then the first batch of this lane that can be read stands in
                others = (_made(self.make, o, rng, []) for o in self._epoch(lane, epoch, size))
                found = next(filter(None, others), [])
            if not found:
                raise ValueError(f"no sample of {len(raws)} can be read: {', '.join(broken)}")
            batch = collate([found[k % len(found)] for k in range(len(raws))])
            yield {**batch, "broken": broken} if broken else batch

    def _lane(self, lane: int, size: int, start: int) -> Iterator[tuple[int, list[Raw]]]:
        """(epoch, undecoded batch) of a lane without end, from the start-th batch on."""
        epoch = 0
        while True:
            length = 0
            for place, batch in enumerate(self._epoch(lane, epoch, size)):
                length += 1
                if place >= start:
                    yield epoch, batch
            if not length:
                raise ValueError(f"`{self.urls[lane]}` … have no samples for lane {lane}")
            whole, start = divmod(max(0, start - length), length)
            epoch += 1 + whole  # epochs are equally long, so those that are over can be left out

    def _epoch(self, lane: int, epoch: int, size: int) -> Iterator[list[Raw]]:
        """All batches of an epoch of a lane, each of one bucket; incomplete ones at the end."""
        rng = Random(f"{self.seed} {lane} {epoch}")
        urls = self.urls[lane :: self.lanes]
        rng.shuffle(urls)
        raws = filter(self._is_wanted, itertools.chain.from_iterable(map(samples_of, urls)))
        piles: dict[int, list[Raw]] = {}
        for raw in _shuffled(raws, self.shuffle, rng):
            bucket = self._bucket(raw)
            piles.setdefault(bucket, []).append(raw)
            if len(piles[bucket]) == size:
                yield piles.pop(bucket)
        yield from piles.values()

    def _bucket(self, raw: Raw) -> int:
        buckets = getattr(self.transform, "buckets", None)
        if buckets is None:
            return 0
        try:
            return buckets.index(*size_in(BytesIO(picture_of(raw)[1])))
        except ValueError:
            return buckets.index(1, 1)

    def _is_wanted(self, raw: Raw) -> bool:
        if "__error__" in raw or not self.limits:
            return True
        try:
            facts = _facts(raw)
        except ValueError:
            return False
        return all(
            isinstance(facts.get(key), (int, float)) and low <= facts[key] <= high
            for key, (low, high) in self.limits.items()
        )

    def _transformed(self, raw: Raw, rng: Random) -> dict[str, Any]:
        return self.transform(record_of(raw), rng)


def expand(shards: str | Sequence[str], *, commands: bool = False) -> list[str]:
    """The files, addresses and commands that patterns stand for.

    Raises ValueError for a command where none is allowed, and for an unknown kind of address;
    FileNotFoundError for files that are not there.
    """
    if not shards:
        raise ValueError("`shards` names no files")
    return [
        url
        for pattern in ([shards] if isinstance(shards, str) else shards)
        for url in _expanded(str(pattern), commands)
    ]


def samples_of(url: str) -> Iterator[Raw]:
    """The undecoded samples of a shard: its members with the same name up to the first dot.

    A shard that is damaged or not there ends with one sample that has only an "__error__".
    Raises OSError for a server that does not answer any more.
    """
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    try:
        with _opened(url) as file:
            members = ({**member, "__url__": url} for member in tar_file_iterator(file))
            yield from group_by_keys(members)
    except (FileNotFoundError, tarfile.TarError, EOFError, ValueError, zlib.error) as error:
        log.warning("the shard `%s` ends early: %s", url, error)
        yield {"__key__": "", "__url__": url, "__error__": f"`{url}`: {error}"}


def record_of(raw: Raw) -> dict[str, Any]:
    """The record of a sample: what its .json says, `text` (of its .txt, if it has one), `picture`.

    Raises Unreadable if it has no picture or a damaged one.
    """
    name = name_of(raw)
    try:
        suffix, data = picture_of(raw)
        return {**said_of(raw), "picture": picture_in(data, f"{name}.{suffix}")}
    except ValueError as error:
        raise Unreadable(name, str(error)) from error


def name_of(raw: Raw) -> str:
    """What errors call a sample: its shard, and its name there."""
    return f"{Path(raw['__url__']).name}/{raw['__key__']}".rstrip("/")


def picture_of(raw: Raw) -> tuple[str, bytes]:
    """(suffix, bytes) of the picture of a sample.

    Raises ValueError if it has none.
    """
    if "__error__" in raw:
        raise ValueError(raw["__error__"])
    for suffix in SUFFIXES:
        if suffix in raw:
            return suffix, raw[suffix]
    raise ValueError(f"`{raw['__key__']}` has no picture, only {', '.join(sorted(raw))}")


def said_of(raw: Raw) -> dict[str, Any]:
    """What the .json of a sample says, and its `text` (of its .txt, if it has one).

    Raises ValueError for what is no JSON object and no UTF-8.
    """
    facts = _facts(raw)
    text = str(facts.get("text") or facts.get("caption") or "")
    return {**facts, "text": (raw["txt"].decode("utf-8") if "txt" in raw else text).strip()}


def _expanded(pattern: str, commands: bool) -> list[str]:
    try:
        import braceexpand  # webdataset brings it
    except ImportError as error:
        raise ImportError(
            "shards need the package `webdataset`: pip install 'ldm-revived[shards]'"
        ) from error
    if pattern.startswith("pipe:") and not commands:
        raise ValueError(
            f"`{pattern}` is a command, which a config may not run: copy the shards, name their"
            " http(s) addresses, or allow it with --allow-commands"
        )
    try:
        urls = list(itertools.islice(braceexpand.braceexpand(pattern), MOST + 1))
    except ValueError as error:
        raise ValueError(f"`{pattern}`: {error}") from None
    if len(urls) > MOST:
        raise ValueError(f"`{pattern}` stands for more than {MOST} shards")
    if pattern.startswith(("pipe:", "http://", "https://")):
        return urls
    if "://" in pattern:
        raise ValueError(f"`{pattern}` cannot be read, only files and http(s) addresses")
    paths = [path for url in urls for path in (sorted(glob(url)) if has_magic(url) else [url])]
    missing = [path for path in paths if not Path(path).is_file()]
    if missing or not paths:
        raise FileNotFoundError(f"no shard `{(missing or [pattern])[0]}`")
    return paths


@contextmanager
def _opened(url: str) -> Iterator[IO[bytes]]:
    if url.startswith(("http://", "https://")):
        with BufferedReader(Download(url), 2**20) as file:
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


def _shuffled(raws: Iterable[Raw], keep: int, rng: Random) -> Iterator[Raw]:
    """The same samples; each is drawn from `keep` that were read before it."""
    kept: list[Raw] = []
    for raw in raws:
        kept.append(raw)
        if len(kept) > keep:
            place = rng.randrange(len(kept))
            kept[place], kept[-1] = kept[-1], kept[place]
            yield kept.pop()
    rng.shuffle(kept)
    yield from kept


def _made(
    make: Callable[[Raw, Random], dict[str, Any]],
    raws: Sequence[Raw],
    rng: Random,
    broken: list[str],
) -> list[dict[str, Any]]:
    """The samples that can be made; the names of the others are added to `broken`."""
    found = []
    for raw in raws:
        try:
            found.append(make(raw, rng))
        except Unreadable as error:
            broken.append(error.name)
    return found


def _facts(raw: Raw) -> dict[str, Any]:
    """What the .json of a sample says."""
    facts = json.loads(raw.get("json", b"{}"))
    if not isinstance(facts, dict):
        raise ValueError(f"`{raw['__key__']}.json` is no object")
    return facts

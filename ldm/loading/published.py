"""Find and download published weights by name.

They are listed in `published.csv`: `weights_gb` is the size of the weights in half precision, GB;
`size` that of the file in bytes, with a `~` if it is rounded; `sources` are files on the Hugging
Face hub or URLs, in the order to try; `sha256` is empty if none was published. Does not import
torch.
"""

import csv
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ldm.loading.hub import (
    HUB_PREFIX,
    download_file,
    download_url,
    find_cached_file,
    find_or_download,
    get_url_path,
)
from ldm.runtime.errors import DownloadError, MissingFile, check_name, find_nearest_name
from ldm.runtime.hashes import JsonCache, find_cached_sha256, find_paths_by_sha256, get_sha256

__all__ = [
    "PublishedFile", "download_checkpoint", "find_by_sha256", "find_on_disk",
    "read_published_files", "resolve_checkpoint",
]  # fmt: skip

log = logging.getLogger(__name__)

Source = tuple[str, str] | str  # (repository, file) on the hub, or a URL
TABLE_PATH = Path(__file__).with_name("published.csv")
# Name of a file without a published SHA-256 -> SHA-256 of its first download on this machine.
FIRST_DOWNLOADS = JsonCache("first_downloads.json")
SIZE_TOLERANCE = 0.01  # relative error of rounded sizes


@dataclass(frozen=True)
class PublishedFile:
    """A published file, of a row of the table.

    Args:
        name: Name that `ckpt` accepts instead of a path.
        title: Description for lists, such as "SD 1.1, raw and EMA weights".
        weights_gb: Size of the weights in half precision, GB.
        published_size: Size of the file in bytes, with a `~` if it is rounded; "" = unknown.
        sha256: Published SHA-256; None = none was published.
        sources: Sources to download it from, in the order to try; with a URL, `published_size` is
            exact and `sha256` is known.
    """

    name: str
    title: str
    license: str
    weights_gb: float
    published_size: str
    sha256: str | None
    sources: tuple[Source, ...]

    @property
    def size_text(self) -> str:
        """Size of the file for messages, such as "5.21 GB"; "?" if unknown."""
        size = self.published_size.lstrip("~")
        return f"{float(size) / 1e9:.2f} GB" if size else "?"

    def may_have_size(self, size: int) -> bool:
        """Return whether the file may have a size in bytes, as published ones may be rounded."""
        if not self.published_size.startswith("~"):
            return self.published_size in ("", str(size))
        rounded = float(self.published_size[1:])
        return abs(size - rounded) < SIZE_TOLERANCE * rounded

    @property
    def expected_sha256(self) -> str | None:
        """The published SHA-256, else that of the first download on this machine."""
        return self.sha256 or FIRST_DOWNLOADS.read().get(self.name)


@lru_cache(maxsize=1)
def read_published_files() -> dict[str, PublishedFile]:
    """Return the published files by name."""
    with TABLE_PATH.open(encoding="utf-8", newline="") as table:
        files = [_parse_row(row) for row in csv.DictReader(table)]
    return {file.name: file for file in files}


def resolve_checkpoint(
    ckpt: str | Path, *, download: bool = True, file_variant: str | None = None
) -> Path:
    """Return the local path for a path, published name or `hf:` address of a checkpoint.

    A path that exists takes precedence; one that does not exist is returned as it is.

    Args:
        download: Whether to download a `hf:` address that is not in the cache.
        file_variant: See `find_or_download`.
    """
    if not str(ckpt):  # which Path takes for the current folder
        raise MissingFile("the path of a checkpoint is empty")
    path, name = Path(ckpt).expanduser(), ckpt if isinstance(ckpt, str) else ckpt.as_posix()
    if path.exists():
        return path
    if name.startswith(HUB_PREFIX):
        return find_or_download(name, download=download, file_variant=file_variant)
    files = read_published_files()
    if name in files:
        file = files[name]
        if local_path := find_on_disk(file, verify=True):
            return local_path
        message = f"`{name}` ({file.title}, {file.size_text}) is not on this machine"
        raise MissingFile(f"{message}; run `ldm download {name}`")
    nearest = find_nearest_name(name, files)
    if nearest and not path.suffix and len(path.parts) == 1:
        raise MissingFile(f"no checkpoint `{name}`, did you mean `{nearest}`?")
    return path


def find_on_disk(file: PublishedFile, *, verify: bool = False) -> Path | None:
    """Return the path of a published file on this machine, by its hash or in a cache, or None.

    Args:
        verify: Whether to compute the hash of a candidate, if it is not in the cache of hashes.
    """
    for path in _list_candidates(file):
        digest = get_sha256(path) if verify and file.expected_sha256 else find_cached_sha256(path)
        if digest is None or file.expected_sha256 in (None, digest):
            return path
    return None


def find_by_sha256(sha256: str | None) -> PublishedFile | None:
    """Return the published file with this SHA-256; None if there is none."""
    files = read_published_files().values()
    return next((file for file in files if sha256 and file.sha256 == sha256), None)


def download_checkpoint(name: str) -> Path:
    """Download a published file, or a `hf:` address, unless it is on this machine.

    Raises:
        UnknownName: No published file has this name.
        DownloadError: No source has the file; the reason for each is logged.
    """
    if name.startswith(HUB_PREFIX):
        return find_or_download(name)
    files = read_published_files()
    check_name("model", name, files)
    file = files[name]
    if path := find_on_disk(file, verify=True):
        log.info("%s is on this machine already", name)
        return path
    log.info("%s: %s, %s, license %s", name, file.title, file.size_text, file.license)
    for source in file.sources:
        try:
            path = _download_source(file, source)
        except DownloadError as error:
            if error.is_local or len(file.sources) == 1:
                raise
            log.warning("%s", error)
        else:
            _log_and_record_hash(file, get_sha256(path))
            return path
    raise DownloadError(f"{name} cannot be downloaded from any of its {len(file.sources)} sources")


def _download_source(file: PublishedFile, source: Source) -> Path:
    if isinstance(source, str):
        assert file.sha256 is not None
        return download_url(source, int(file.published_size), file.sha256)
    return download_file(*source, file.expected_sha256)


def _log_and_record_hash(file: PublishedFile, digest: str) -> None:
    if file.sha256:
        log.info("SHA-256 %s is the published one", digest)
        return
    log.info("SHA-256 %s; none was published, so the file is unverified", digest)
    FIRST_DOWNLOADS.set(file.name, digest)


def _list_candidates(file: PublishedFile) -> Iterator[Path]:
    if file.expected_sha256:
        yield from find_paths_by_sha256(file.expected_sha256)
    for source in file.sources:
        path = get_url_path(source) if isinstance(source, str) else find_cached_file(*source)
        if path is not None and path.is_file():
            yield path


def _parse_row(row: Mapping[str, str]) -> PublishedFile:
    return PublishedFile(
        name=row["name"],
        title=row["title"],
        license=row["license"],
        weights_gb=float(row["weights_gb"]),
        published_size=row["size"],
        sha256=row["sha256"] or None,
        sources=tuple(map(_parse_source, row["sources"].split())),
    )


def _parse_source(text: str) -> Source:
    if text.startswith("https://"):
        return text
    owner, repo, file = text.split("/", 2)
    return f"{owner}/{repo}", file

"""Download files from the Hugging Face hub into its cache, and verify their SHA-256.

`huggingface_hub` implements protocol, token and cache. It compares only sizes, and its newer
versions do not resume the downloads of another process: this module verifies hashes and resumes
downloads. Does not import torch.
"""

import logging
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from ldm.loading.diffusers.layout import EXTRA_WEIGHTS, MODEL_INDEX, read_json
from ldm.runtime.errors import ArgumentError, DownloadError, MissingFile
from ldm.runtime.files import DISK_FULL_ERRNOS
from ldm.runtime.hashes import JsonCache, cache_sha256, get_cache_folder, get_sha256

__all__ = [
    "HUB_PREFIX", "download_file", "download_url", "find_cached_file", "find_or_download",
    "get_url_path",
]  # fmt: skip

log = logging.getLogger(__name__)

HUB_PREFIX = "hf:"
SHA256_PATTERN = re.compile("[0-9a-f]{64}")
TEXT_SUFFIXES = (".json", ".txt")
WEIGHT_SUFFIXES = (".safetensors", ".ckpt")
UNUSED_COMPONENTS = ("safety_checker",)
# "OWNER/NAME" or "OWNER/NAME:VARIANT" -> path of the complete folder, or of the only checkpoint.
DOWNLOADS = JsonCache("hub_choices.json")


def find_or_download(
    address: str, *, download: bool = True, file_variant: str | None = None
) -> Path:
    """Return the file `hf:OWNER/NAME/FILE`, or the diffusers folder `hf:OWNER/NAME`.

    Nothing is requested from the hub if the cache has it.

    Args:
        download: Whether to download files that are not in the cache.
        file_variant: Variant in the file names of a folder, such as `fp16`, of components that have
            it; None = files without a variant, if there are any.
    """
    owner, _, path_in_owner = address.removeprefix(HUB_PREFIX).partition("/")
    name, _, file = path_in_owner.partition("/")
    if not owner or not name:
        raise ArgumentError(f"`{address}` must be hf:OWNER/NAME/FILE or hf:OWNER/NAME")
    repo = f"{owner}/{name}"
    key = f"{repo}:{file_variant}" if file_variant and not file else repo
    cached_path = find_cached_file(repo, file) if file else DOWNLOADS.read().get(key)
    if cached_path and (path := Path(cached_path)).exists():
        return path
    if not download:
        raise MissingFile(f"`{address}` is not on this machine; run `ldm download {address}`")
    try:
        license_name, commit, sizes = _read_repo_info(repo)
    except DownloadError as error:
        if not file or error.is_local:
            raise
        return download_file(repo, file)  # from a server with files only, or for its error
    if file and file not in sizes:
        raise DownloadError(f"`{repo}` has no file `{file}`{_format_examples(sizes)}")
    names = [file] if file else _list_folder_files(repo, commit, sizes, file_variant)
    size = sum(sizes[name] or 0 for name in names)
    log.info("%s: %.2f GB in %d file(s), license %s", repo, size / 1e9, len(names), license_name)
    paths = [download_file(repo, name, commit=commit) for name in names]
    path = paths[0] if len(paths) == 1 else paths[0].parent
    if not file:
        DOWNLOADS.set(key, str(path))
    return path


def find_cached_file(repo: str, name: str) -> Path | None:
    """Return the path of a file in the hub's cache, unverified; None if it is not in the cache."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo, name)
    return Path(path) if isinstance(path, str) else None


def download_file(
    repo: str, name: str, sha256: str | None = None, *, commit: str | None = None
) -> Path:
    """Download a file from the hub, unless the cache has it; resume a partial download.

    Args:
        sha256: Expected SHA-256; None = the one that the hub reports, if any.
        commit: Commit of the main branch; None = the latest.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import WeakFileLock

    if {"..", ""} & set(re.split(r"[/\\:]", name)):  # the server has sent the name
        raise DownloadError(f"`{repo}`: the file name `{name}` is refused")
    url = hf_hub_url(repo, name, revision=commit)
    with _convert_hub_errors(repo):
        metadata = get_hf_file_metadata(url)
    etag, commit = metadata.etag or "", metadata.commit_hash or ""  # both become file names
    is_valid = re.fullmatch(r"[\w-]+", etag) and re.fullmatch(r"\w+", commit)
    if metadata.size is None or not is_valid:
        raise DownloadError(f"`{repo}`: {constants.ENDPOINT} does not answer as a hub does")
    hub_sha256 = etag if SHA256_PATTERN.fullmatch(etag) else None
    if sha256 and hub_sha256 and sha256 != hub_sha256:
        raise DownloadError(_format_mismatch(f"{repo}/{name}", hub_sha256, sha256))
    expected = sha256 or hub_sha256
    folder = Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}")
    # A file, not a symbolic link: the layout of the hub's cache on systems without such links.
    target = folder / "snapshots" / commit / name
    partial_file = folder / "blobs" / f"{etag}.incomplete"
    lock_path = Path(constants.HF_HUB_CACHE, ".locks", folder.name, f"{etag}.lock")
    ref_path = folder / "refs" / "main"
    for path in (target, partial_file, lock_path, ref_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock_path):
        if not target.is_file() or (expected and get_sha256(target) != expected):
            source, title = metadata.location, f"{repo}/{name}"
            headers = _make_headers(url, source)
            _download(source, target, partial_file, metadata.size, expected, headers, title)
        ref_path.write_text(commit, "utf-8")  # `find_cached_file` looks at this commit
    return target


def get_url_path(url: str) -> Path:
    """Return the path to which `download_url` downloads a URL."""
    return get_cache_folder() / "files" / url.rpartition("/")[2]


def download_url(url: str, size: int, sha256: str) -> Path:
    """Download a file that is not on the hub, unless it exists; resume an interrupted download.

    Args:
        sha256: Expected SHA-256.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import WeakFileLock

    target = get_url_path(url)
    partial_file = target.with_name(f"{target.name}.incomplete")
    target.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(target.with_name(f"{target.name}.lock")):
        if not target.is_file() or get_sha256(target) != sha256:
            if constants.HF_HUB_OFFLINE:
                raise DownloadError("HF_HUB_OFFLINE is set: nothing is downloaded", is_local=True)
            _download(url, target, partial_file, size, sha256, {}, url)
    return target


def _download(
    url: str,
    target: Path,
    partial_file: Path,
    size: int,
    sha256: str | None,
    headers: dict[str, str],
    title: str,
) -> None:
    """Download the rest of a file and verify it; start again if a partial file was damaged.

    Args:
        sha256: Expected SHA-256; None = unknown.
        title: Repository and file, or URL, for messages.
    """
    from huggingface_hub.file_download import http_get

    if partial_file.is_file() and partial_file.stat().st_size > size:  # of another file
        partial_file.unlink()
    is_resumed = partial_file.is_file()
    partial_file.touch()
    downloaded_bytes = partial_file.stat().st_size
    free = shutil.disk_usage(partial_file.parent).free
    if free < size - downloaded_bytes:
        sizes = f"{(size - downloaded_bytes) / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
        raise DownloadError(
            f"the disk is full: {sizes} in `{partial_file.parents[2]}`", is_local=True
        )
    if downloaded_bytes:
        log.info("resuming after %.2f of %.2f GB", downloaded_bytes / 1e9, size / 1e9)
    while downloaded_bytes < size:
        with _convert_hub_errors(title):
            try:
                with partial_file.open("ab") as file:
                    http_get(
                        url,
                        file,
                        resume_size=downloaded_bytes,
                        headers=headers,
                        expected_size=size,
                        displayed_filename=title.rpartition("/")[2],
                    )
            except Exception as error:
                if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
                    message = (
                        f"the disk is full: `{partial_file.parents[2]}`; try again with more space"
                    )
                    raise DownloadError(message, is_local=True) from error
                if partial_file.stat().st_size <= downloaded_bytes:  # try again only after progress
                    raise
        downloaded_bytes = partial_file.stat().st_size
    digest = get_sha256(partial_file)
    if sha256 in (None, digest):
        partial_file.replace(target)
        cache_sha256(digest, target)
        return
    partial_file.unlink()
    if not is_resumed:
        raise DownloadError(_format_mismatch(title, digest, str(sha256)))
    _download(url, target, partial_file, size, sha256, headers, title)


def _make_headers(url: str, location: str) -> dict[str, str]:
    """Return the headers of a download; the token is sent to the hub only, not to its storage."""
    from huggingface_hub.utils import build_hf_headers

    headers: dict[str, str] = build_hf_headers()
    if urlsplit(url).netloc != urlsplit(location).netloc:
        headers.pop("authorization", None)
    return headers


@contextmanager
def _convert_hub_errors(title: str) -> Iterator[None]:
    """Convert errors of the hub into a one-line DownloadError; `title` as in `_download`."""
    from huggingface_hub import constants, errors

    try:
        yield
    except DownloadError:
        raise
    except errors.OfflineModeIsEnabled as error:
        raise DownloadError(
            "HF_HUB_OFFLINE is set: nothing is downloaded", is_local=True
        ) from error
    except errors.GatedRepoError as error:
        remedy = f"accept its license on {constants.ENDPOINT}/{title} and set HF_TOKEN"
        raise DownloadError(f"`{title}` is gated: {remedy}") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise DownloadError(f"`{title}` is not found, or private") from error
    except errors.EntryNotFoundError as error:
        raise DownloadError(f"`{title}` does not have this file") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        problem = f"is refused: the server says {status}"
        if status == 401:  # which the hub also answers for a repository that does not exist
            problem = "is not found, or private"
        raise DownloadError(f"`{title}` {problem}") from error
    except Exception as error:  # of requests or of httpx, by the version of huggingface_hub
        error_type = type(error).__name__
        is_local = "Connect" in error_type or "Timeout" in error_type
        problem = f"no connection to {constants.ENDPOINT}" if is_local else f"`{title}`"
        reason = (str(error) or error_type).splitlines()[0]
        raise DownloadError(f"{problem}: {reason}", is_local=is_local) from error


def _read_repo_info(repo: str) -> tuple[str, str, dict[str, int | None]]:
    """Return (license, commit, size in bytes by file) of a repository; None = size unknown."""
    from huggingface_hub import HfApi

    with _convert_hub_errors(repo):
        model_info = HfApi().model_info(repo, files_metadata=True)
    license_name = model_info.card_data.get("license") if model_info.card_data else None
    sizes = {file.rfilename: file.size for file in model_info.siblings or ()}
    return str(license_name or "not named"), str(model_info.sha), sizes


def _list_folder_files(
    repo: str, commit: str, sizes: Iterable[str], file_variant: str | None
) -> list[str]:
    """List the files to download of a repository.

    These are the files of a diffusers folder that a pipeline reads, its index first, or the only
    checkpoint.
    """
    if "config.json" in sizes and MODEL_INDEX not in sizes:
        return ["config.json", *_choose_weights_files("", sizes, file_variant)]
    if MODEL_INDEX not in sizes:
        files = [name for name in sizes if name.endswith(WEIGHT_SUFFIXES) and "/" not in name]
        files = [name for name in files if name.endswith(WEIGHT_SUFFIXES[0])] or files
        if len(files) != 1:
            raise DownloadError(f"`{repo}` is not a diffusers folder{_format_examples(sizes)}")
        return files
    index = read_json(download_file(repo, MODEL_INDEX, commit=commit))
    names = [MODEL_INDEX, *(name for name in sizes if name == EXTRA_WEIGHTS)]
    for component, value in index.items():
        is_component = isinstance(value, list) and value[-1:] != [None]  # [package, class]
        if is_component and component not in UNUSED_COMPONENTS:
            names += [
                n for n in sizes if n.rpartition("/")[0] == component and n.endswith(TEXT_SUFFIXES)
            ]
            names += _choose_weights_files(f"{component}/", sizes, file_variant)
    return names


def _choose_weights_files(folder: str, sizes: Iterable[str], file_variant: str | None) -> list[str]:
    """List the weights files of a component: of the requested variant, else none, fp16 or any.

    For each variant .safetensors are preferred to .bin.
    """
    names = [name.removeprefix(folder) for name in sizes if name.startswith(folder)]
    requested = [rf"\.{re.escape(file_variant)}"] if file_variant else []
    for variant_pattern in (*requested, "", r"\.fp16", r"\.[\w-]+"):
        for suffix in (r"\.safetensors", r"\.bin"):
            stem = rf"(diffusion_|pytorch_)*model{variant_pattern}(-\d+-of-\d+)?"
            pattern = re.compile(stem + suffix)
            if files := [name for name in names if pattern.fullmatch(name)]:
                return [folder + name for name in files]
    return []


def _format_examples(sizes: Iterable[str]) -> str:
    names = [name for name in sizes if name.endswith(WEIGHT_SUFFIXES)][:6]
    return f"; it has {', '.join(names)}" if names else ", and no checkpoint"


def _format_mismatch(title: str, actual: str, expected: str) -> str:
    return f"SHA-256 mismatch for `{title}`: expected {expected}, got {actual}"

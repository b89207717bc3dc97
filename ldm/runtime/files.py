"""Find and list files, read text files, hash files, and write files atomically."""

import codecs
import errno
import hashlib
import io
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from ldm.runtime.errors import FileFormatError, MissingFile

__all__ = [
    "DISK_FULL_ERRNOS", "check_parent_folder", "compute_sha256", "decode_text",
    "disk_errors_about", "find_file", "flush_to_disk", "is_hidden", "list_files", "read_text",
    "write_atomically",
]  # fmt: skip

PACKAGE_FOLDER = Path(__file__).resolve().parents[1]
BLOCK_BYTES = 1 << 22  # read at once
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)

_digests: dict[tuple[tuple[Path, int, int], ...], str] = {}  # by (path, size, mtime) of the files


def check_parent_folder(path: str | Path, argument: str) -> None:
    """Raise MissingFile unless the folder of a file to be written exists."""
    folder = Path(path).expanduser().parent
    if not folder.is_dir():
        raise MissingFile(f"no folder `{folder}` to save `{Path(path).name}` in", argument)


def find_file(path: str | Path) -> Path:
    """Find a file by its path, or by its path within the project root or the installed package."""
    candidates = [Path(path).expanduser(), PACKAGE_FOLDER.parent / path, PACKAGE_FOLDER / path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    tried = ", ".join(f"`{candidate}`" for candidate in dict.fromkeys(map(str, candidates)))
    raise MissingFile(f"no file `{path}` (tried {tried})")


def is_hidden(path: str) -> bool:
    """Return whether a path has a dot file or dot folder, `__MACOSX` or `@eaDir` in it."""
    parts = path.replace("\\", "/").split("/")
    return any(part[:1] == "." and part.strip(".") for part in parts) or bool(
        {"__MACOSX", "@eaDir"}.intersection(parts)
    )


def list_files(root: str | Path, skipped: Counter[str] | None = None) -> Iterator[Path]:
    """List all files in a folder and its subfolders, those behind symbolic links last.

    Hidden files and folders are skipped, and each folder is listed once.

    Args:
        skipped: Counts hidden folders, and links to folders that are already listed.
    """
    skipped = Counter() if skipped is None else skipped
    start, queue, visited = Path(os.path.realpath(root)), deque([Path(root)]), set[Path]()
    while queue:
        for folder, folders, files in os.walk(queue.popleft()):
            real = Path(os.path.realpath(folder))
            if real in visited or (real != start and start.is_relative_to(real)):
                skipped["links to folders that are read already"] += 1
                folders.clear()
                continue
            visited.add(real)
            visible = sorted(name for name in folders if not is_hidden(name))
            skipped["hidden folders"] += len(folders) - len(visible)
            folders[:] = [name for name in visible if not _is_link(real / name)]
            queue += [Path(folder, name) for name in visible if name not in folders]
            yield from (Path(folder, name) for name in sorted(files) if not is_hidden(name))


def read_text(path: str | Path) -> str:
    """Read a text file in UTF-8, or in UTF-16 with a byte order mark.

    Raises:
        MissingFile: There is no such file.
        FileFormatError: It has another encoding.
    """
    file = Path(path).expanduser()
    if not file.exists() or file.is_dir():  # it may be a pipe
        raise MissingFile(f"no file `{path}`")
    return decode_text(file.read_bytes(), path)


def decode_text(content: bytes, name: str | Path) -> str:
    """Decode a text file in one of the encodings of `read_text`; `name` is for error messages."""
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "utf-16" if is_utf16 else "utf-8-sig"
    try:
        text = content.decode(encoding)
        bad_index = text.find("\0")  # UTF-16 without a mark may be valid UTF-8, with zeros
    except UnicodeDecodeError as error:
        text = error.object[: error.start].decode(encoding)
        bad_index = len(text)
    if bad_index < 0:
        return io.StringIO(text.replace("\ufeff", ""), newline=None).read()
    line = text.count("\n", 0, bad_index) + 1
    message = "neither UTF-8 nor UTF-16 with a byte order mark: save it as UTF-8"
    raise FileFormatError(f"{name}:{line}: {message}")


def compute_sha256(*paths: str | Path, progress: Callable[[int], object] | None = None) -> str:
    """Return the SHA-256 of a file, or of several concatenated, in hexadecimal.

    It is cached in this process as long as the files do not change.

    Args:
        progress: Called with the number of bytes of each block read; None = not called.
    """
    files = [Path(path).expanduser().resolve() for path in paths]
    key = tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    if key not in _digests:
        digest = hashlib.sha256()
        for path in files:
            with path.open("rb") as file:
                while block := file.read(BLOCK_BYTES):
                    digest.update(block)
                    if progress is not None:
                        progress(len(block))
        _digests[key] = digest.hexdigest()
    return _digests[key]


@contextmanager
def disk_errors_about(path: str | Path) -> Iterator[None]:
    """Context manager that adds a path to errors of a full disk, which come without a file name.

    It also replaces the RuntimeError that `torch.save` raises in the context of such an error.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or cause.filename is not None:
            raise
        if cause.errno not in (*DISK_FULL_ERRNOS, errno.EFBIG):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


@contextmanager
def write_atomically(path: str | Path, *, sync: bool = False) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path, which replaces `path` after the block.

    If the block raises, `path` is unchanged; see also `disk_errors_about`.

    Args:
        sync: Whether to wait until the file is on disk, so that it survives a power failure.
    """
    path = Path(path)
    # In the same folder, as a rename is atomic within one file system only.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with disk_errors_about(path):
            yield temporary
            if sync:
                flush_to_disk(temporary)
        try:
            temporary.replace(path)
        except (PermissionError, FileExistsError):
            # On Windows, an open file can be renamed, but not replaced.
            old = path.with_name(f".{path.name}.old")
            with suppress(OSError):
                old.unlink(missing_ok=True)
            path.replace(old)
            temporary.replace(path)
            with suppress(OSError):
                old.unlink()
    finally:
        temporary.unlink(missing_ok=True)
    if sync:
        flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or (not on Windows) the list of files in a folder, is on disk."""
    is_folder = path.is_dir()
    with suppress(OSError) if is_folder else nullcontext():  # Windows cannot open folders
        # Windows flushes only files that are open for writing.
        handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _is_link(path: Path) -> bool:
    """Return whether a folder is a link, or a junction of Windows."""
    return Path(os.path.realpath(path)) != path

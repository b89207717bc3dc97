"""An imitation of Windows on other systems."""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

MISSING_OS_FUNCTIONS = ("fork", "geteuid", "getloadavg", "killpg", "mkfifo", "sched_getaffinity",
           "setsid", "statvfs", "sysconf")  # fmt: skip
MISSING_SIGNALS = ("SIGALRM", "SIGHUP", "SIGKILL", "SIGSTOP", "SIGUSR1", "SIGUSR2")
MISSING_MODULES = ("resource", "pwd", "grp")
MEMORY_MAPS = Path("/proc/self/maps")


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove functions, signals and modules that Windows does not have, and fail where it fails.

    These fail: links; flushing a file that is not open for writing; renaming over a file, as if
    another program had it open; deleting a memory-mapped file, or renaming its folder.
    """
    if os.name == "nt":
        return
    import fcntl

    fsync, replace, rename, unlink = os.fsync, os.replace, os.rename, os.unlink

    def deny_access(path: Any) -> None:
        raise PermissionError(13, "Access is denied", str(path))

    def list_mapped_files() -> list[str]:
        lines = MEMORY_MAPS.read_text("utf-8").splitlines() if MEMORY_MAPS.exists() else []
        return [line.split(maxsplit=5)[-1] for line in lines if " /" in line]

    def sync(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        fsync(descriptor)

    def move(source: Any, target: Any, operation: Any = replace, **options: Any) -> None:
        folder = os.path.realpath(source) + os.sep
        if os.path.lexists(target) or any(path.startswith(folder) for path in list_mapped_files()):
            deny_access(target)
        operation(source, target, **options)

    def delete(path: Any, **options: Any) -> None:
        if os.path.realpath(path) in list_mapped_files():
            deny_access(path)
        unlink(path, **options)

    def link(*args: Any, **options: Any) -> None:
        raise OSError(1314, "A required privilege is not held by the client")

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", move)
    monkeypatch.setattr(os, "rename", lambda *paths, **options: move(*paths, rename, **options))
    for name in ("unlink", "remove"):
        monkeypatch.setattr(os, name, delete)
    for name in ("symlink", "link"):
        monkeypatch.setattr(os, name, link)
    for name in MISSING_OS_FUNCTIONS:
        monkeypatch.delattr(os, name, raising=False)
    for name in MISSING_SIGNALS:
        monkeypatch.delattr(signal, name)
    monkeypatch.setattr(signal, "valid_signals", lambda: {signal.SIGINT, signal.SIGTERM})
    for name in (*MISSING_MODULES, "fcntl"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(logging.getLogger("ldm"), "handlers", [])

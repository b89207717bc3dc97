"""An imitation of Windows on other systems."""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

MISSING = ("fork", "geteuid", "getloadavg", "killpg", "mkfifo", "sched_getaffinity",
           "setsid", "statvfs", "sysconf")  # fmt: skip
SIGNALS = ("SIGALRM", "SIGHUP", "SIGKILL", "SIGSTOP", "SIGUSR1", "SIGUSR2")
MODULES = ("resource", "pwd", "grp")
MAPS = Path("/proc/self/maps")


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove what Windows does not have, and refuse what it refuses.

    It refuses links; to flush a file that is not open for writing; to rename over a file, as if
    another program had it open; to delete a mapped file, or to rename its folder.
    """
    if os.name == "nt":
        return
    import fcntl

    fsync, replace, rename, unlink = os.fsync, os.replace, os.rename, os.unlink

    def refuse(path: Any) -> None:
        raise PermissionError(13, "Access is denied", str(path))

    def mapped_files() -> list[str]:
        lines = MAPS.read_text("utf-8").splitlines() if MAPS.exists() else []
        return [line.split(maxsplit=5)[-1] for line in lines if " /" in line]

    def flush(handle: int) -> None:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        fsync(handle)

    def move(source: Any, target: Any, call: Any = replace, **options: Any) -> None:
        inside = os.path.realpath(source) + os.sep
        if os.path.lexists(target) or any(path.startswith(inside) for path in mapped_files()):
            refuse(target)
        call(source, target, **options)

    def delete(path: Any, **options: Any) -> None:
        if os.path.realpath(path) in mapped_files():
            refuse(path)
        unlink(path, **options)

    def link(*args: Any, **options: Any) -> None:
        raise OSError(1314, "A required privilege is not held by the client")

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", move)
    monkeypatch.setattr(os, "rename", lambda *paths, **options: move(*paths, rename, **options))
    for name in ("unlink", "remove"):
        monkeypatch.setattr(os, name, delete)
    for name in ("symlink", "link"):
        monkeypatch.setattr(os, name, link)
    for name in MISSING:
        monkeypatch.delattr(os, name, raising=False)
    for name in SIGNALS:
        monkeypatch.delattr(signal, name)
    monkeypatch.setattr(signal, "valid_signals", lambda: {signal.SIGINT, signal.SIGTERM})
    for name in (*MODULES, "fcntl"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(logging.getLogger("ldm"), "handlers", [])

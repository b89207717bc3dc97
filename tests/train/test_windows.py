"""A run on a system like Windows, as far as one can be imitated elsewhere."""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from ldm.loading.files.checkpoint import read_checkpoint
from ldm.train.command import main
from tests.train.tinyrun import QUICK, TINY

fcntl = pytest.importorskip("fcntl", reason="this is Windows")


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse links, renames over files, and to flush what is not open for writing."""
    fsync, replace = os.fsync, os.replace

    def flush(handle: int) -> None:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        fsync(handle)

    def rename(source: Any, target: Any, **options: Any) -> None:
        if os.path.exists(target):
            raise PermissionError(5, "Access is denied", str(target))
        replace(source, target, **options)

    def link(*args: Any, **options: Any) -> None:
        raise OSError(1314, "A required privilege is not held by the client")

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    monkeypatch.setattr(os, "symlink", link)
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.setattr(signal, "valid_signals", lambda: {signal.SIGINT, signal.SIGTERM})
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(logging.getLogger("ldm"), "handlers", [])


def test_a_run_is_trained_and_resumed_by_its_name(windows: None, tmp_path: Path) -> None:
    logs = ["-l", str(tmp_path)]
    assert main(["-b", str(TINY), *logs, "-t", "--max_steps", "1", *QUICK]) == 0
    assert not (tmp_path / "tiny").exists()
    name = str(tmp_path / "tiny")
    assert main(["-t", *logs, "--resume", name, "lightning.trainer.max_steps=2"]) == 0
    (folder,) = tmp_path.glob("*_tiny")
    checkpoints = folder / "checkpoints"
    assert read_checkpoint(checkpoints / "last.safetensors").step == 2
    states = ["state-00000001", "state-00000002"]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["last.safetensors", *states]

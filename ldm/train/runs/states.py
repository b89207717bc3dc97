"""The states of a run on disk: checkpoints/state-00001000/, complete or not there.

A state is written into a hidden folder beside its final place, in pieces by every process, flushed,
and then renamed: whenever a process dies or a disk fills up, the states before are untouched and
there is no half of one under a state's name. Any number of processes can go on from it.
"""

import json
import logging
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ldm.loading.files.pickles import pickle_imports
from ldm.train.distributed.parallel import Ranks
from ldm.train.runs.run_folder import list_states
from ldm.train.state import State

__all__ = ["States"]

log = logging.getLogger(__name__)

NUMBERS = "run.json"
METADATA = ".metadata"
# What torch's list of the pieces is pickled from; one that names anything else is not opened.
TRUSTED = re.compile(
    r"torch\.distributed\.checkpoint\.(metadata\.\w+|filesystem\._StorageInfo)"
    r"|torch\.(Size|b?float\d+|u?int\d+|bool|serialization\._get_layout)"
    r"|pathlib(\._local)?\.(Posix|Windows)?Path"
)


class States:
    """The resume states in a folder of checkpoints; the newest `keep` stay."""

    def __init__(self, folder: Path, ranks: Ranks, *, keep: int = 2) -> None:
        self.folder, self.ranks, self.keep = folder, ranks, keep

    def newest(self) -> Path | None:
        """The last complete state, None if there is none."""
        found = list_states(self.folder)
        return found[-1] if found else None

    def has(self, step: int) -> bool:
        """Whether there is a complete state of this step or a later one, on all processes."""
        oldest = self.folder / f"state-{step:08}"
        return self.ranks.told(lambda: any(old >= oldest for old in list_states(self.folder)))

    def save(self, state: State) -> Path:
        """Writes the state of all processes; what was there before stays until that is done.

        Raises OSError, on all processes, if it cannot be written; nothing is lost then.
        """
        path = self.folder / f"state-{state.step:08}"
        part = self.folder / f".{path.name}.part"
        self.ranks.once(lambda: _fresh(part))
        try:
            self._write(state, part)
            self.ranks.once(lambda: self._commit(state, part, path))
        except OSError:
            if self.ranks.is_first:
                shutil.rmtree(part, ignore_errors=True)
            raise
        return path

    def load(self, state: State, path: Path) -> None:
        """Continues from a state of `save`, of any number of processes.

        Raises ValueError if it is not one, or is one of another model.
        """
        saved = _shapes(path)
        tensors = state.room(saved)
        _compare(path, {n: (v.shape, v.dtype) for n, v in tensors.items()}, saved)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(tensors, storage_reader=FileSystemReader(path), no_dist=self.ranks.world == 1)
        state.put_tensors(tensors)
        state.put_numbers(json.loads((path / NUMBERS).read_text()))

    def _write(self, state: State, part: Path) -> None:
        writer = FileSystemWriter(part, sync_files=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp.save(state.tensors(), storage_writer=writer, no_dist=self.ranks.world == 1)
        except CheckpointException as error:
            cause = next((f[0] for f in error.failures.values()), error)
            raise OSError(f"the state could not be written to `{self.folder}`: {cause}") from None
        except RuntimeError as error:  # torch's own writer of files says so when a disk is full
            raise OSError(f"the state could not be written to `{self.folder}`: {error}") from None

    def _commit(self, state: State, part: Path, path: Path) -> None:
        with (part / NUMBERS).open("w") as file:
            json.dump(state.numbers(), file)
            file.flush()
            os.fsync(file.fileno())
        _flush(part)
        if path.exists():  # the same step again, after a change of the time spent
            path.replace(path.with_name(f".{path.name}.old"))
        part.replace(path)
        _flush(self.folder)
        # Later ones are of a branch that was left when an older state was resumed.
        kept = [old for old in list_states(self.folder) if old.name <= path.name][-self.keep :]
        for other in {*list_states(self.folder)} - {*kept}:
            other.replace(other.with_name(f".{other.name}.gone"))
        for gone in (*self.folder.glob(".state-*.old"), *self.folder.glob(".state-*.gone")):
            shutil.rmtree(gone, ignore_errors=True)


def _fresh(part: Path) -> None:
    """An empty folder, and nothing left of earlier attempts."""
    part.parent.mkdir(parents=True, exist_ok=True)
    _restore(part.parent)
    for old in part.parent.glob(".state-*"):
        shutil.rmtree(old, ignore_errors=True)
    part.mkdir()


def _restore(folder: Path) -> None:
    """Puts a state back that was moved aside for its successor, if that did not come."""
    for old in folder.glob(".state-*.old"):
        path = folder / old.name.removeprefix(".").removesuffix(".old")
        if not path.exists():
            old.replace(path)


def _flush(folder: Path) -> None:
    """The names in a folder on the disk, not only in memory (where folders can be flushed)."""
    if hasattr(os, "O_DIRECTORY"):
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _shapes(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name -> shape and dtype of all tensors in a state."""
    listing = path / METADATA
    if not listing.exists() or not (path / NUMBERS).exists():
        raise ValueError(f"`{path}` is no state of a run, it has no {METADATA} or {NUMBERS}")
    for name in pickle_imports(listing, "bare"):
        if not TRUSTED.fullmatch(name):
            raise ValueError(f"`{listing}` is refused: it would call `{name}`")
    entries: dict[str, Any] = FileSystemReader(path).read_metadata().state_dict_metadata
    for name, entry in entries.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"`{listing}` is refused: `{name}` is no tensor")
    return {name: (entry.size, entry.properties.dtype) for name, entry in entries.items()}


def _compare(path: Path, wanted: dict[str, Any], saved: dict[str, Any]) -> None:
    for name, (shape, _) in wanted.items():
        if name not in saved:
            raise ValueError(f"`{path}` is of another model or trainer: it has no `{name}`")
        if saved[name][0] != shape:
            given, ours = list(saved[name][0]), list(shape)
            raise ValueError(
                f"`{path}` is of another model: `{name}` is {given} there, {ours} here"
            )

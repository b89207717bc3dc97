"""Resume states on disk: checkpoints/state-00001000/, written atomically.

Each process writes its shards of a state into a hidden folder, which is flushed and then renamed:
if a process dies or the disk fills up, earlier states are untouched, and no incomplete state has
the name of a complete one. Any number of processes can resume from it.
"""

import json
import logging
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ldm.loading.files.pickles import list_pickle_imports
from ldm.runtime.errors import describe_error
from ldm.runtime.files import flush_to_disk
from ldm.train.distributed.parallel import Ranks
from ldm.train.runs.run_folder import list_states
from ldm.train.state import State, TensorSpecs

__all__ = ["StateFolder"]

log = logging.getLogger(__name__)

NUMBERS_FILE = "run.json"
METADATA_FILE = ".metadata"
# The globals that torch's pickled index of a state may name; any other one is refused.
TRUSTED_GLOBALS = re.compile(
    r"torch\.distributed\.checkpoint\.(metadata\.\w+|filesystem\._StorageInfo)"
    r"|torch\.(Size|b?float\d+|u?int\d+|bool|serialization\._get_layout)"
    r"|pathlib(\._local)?\.(Posix|Windows)?Path"
)


@dataclass(frozen=True)
class StateFolder:
    """The resume states in a folder of checkpoints.

    Args:
        keep_states: Number of newest states that `save` keeps.
    """

    folder: Path
    ranks: Ranks
    keep_states: int = 2

    def save(self, state: State) -> Path:
        """Write the state of all processes, then delete old ones.

        Raises:
            OSError: It cannot be written; raised on all processes. Earlier states are kept.
        """
        path = self.folder / f"state-{state.step:08}"
        temporary = self.folder / f".{path.name}.part"
        self.ranks.run_on_main_process(lambda: _create_temporary_folder(temporary))
        try:
            self._write(state, temporary)
            self.ranks.run_on_main_process(lambda: self._commit(state, temporary, path))
        except OSError:
            if self.ranks.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        state.is_saved = True
        return path

    def load(self, state: State, path: Path) -> None:
        """Load a state that any number of processes have saved.

        Raises:
            ValueError: `path` is not a state, is damaged, or belongs to another model.
        """
        saved_specs = _read_specs(path)
        tensors = state.get_tensors_to_load(saved_specs)
        _check_specs(path, {n: (v.shape, v.dtype) for n, v in tensors.items()}, saved_specs)
        is_single_process = self.ranks.world_size == 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp.load(tensors, storage_reader=FileSystemReader(path), no_dist=is_single_process)
            state.load_numbers(json.loads((path / NUMBERS_FILE).read_text("utf-8")))
        except (CheckpointException, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"`{path}` is damaged, resume from an older state") from error
        state.load_optimizers(tensors)
        state.is_saved = path.parent == self.folder

    def _write(self, state: State, temporary: Path) -> None:
        writer = FileSystemWriter(temporary, sync_files=True)
        is_single_process = self.ranks.world_size == 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp.save(state.get_tensors(), storage_writer=writer, no_dist=is_single_process)
        except (CheckpointException, RuntimeError) as error:  # RuntimeError: a disk is full
            failures = error.failures if isinstance(error, CheckpointException) else {}
            cause = next((exception for exception, _ in failures.values()), error)
            if isinstance(cause.__context__, OSError):  # that of torch.save
                cause = cause.__context__
            message = f"the state could not be written to `{self.folder}`: {describe_error(cause)}"
            raise OSError(message) from None

    def _commit(self, state: State, temporary: Path, path: Path) -> None:
        (temporary / NUMBERS_FILE).write_text(json.dumps(state.get_numbers()), "utf-8")
        flush_to_disk(temporary / NUMBERS_FILE)
        flush_to_disk(temporary)
        if path.exists():  # the same step saved again, with other seconds
            path.replace(path.with_name(f".{path.name}.old"))
        temporary.replace(path)
        flush_to_disk(self.folder)
        # Later states belong to a branch that was abandoned when an older state was resumed.
        states = list_states(self.folder)
        kept = [saved for saved in states if saved.name <= path.name][-self.keep_states :]
        for saved in states:
            if saved not in kept:
                saved.replace(saved.with_name(f".{saved.name}.gone"))
        for obsolete in (*self.folder.glob(".state-*.old"), *self.folder.glob(".state-*.gone")):
            shutil.rmtree(obsolete, ignore_errors=True)


def _create_temporary_folder(temporary: Path) -> None:
    """Create an empty folder for a state, after cleaning up interrupted attempts."""
    folder = temporary.parent
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(".state-*.old"):  # moved aside for a new state, which may be missing
        path = folder / old.name.removeprefix(".").removesuffix(".old")
        if not path.exists():
            old.replace(path)
    for old in folder.glob(".state-*"):
        shutil.rmtree(old, ignore_errors=True)
    temporary.mkdir()


def _read_specs(path: Path) -> TensorSpecs:
    """Read shape and dtype of all tensors in a state."""
    index = path / METADATA_FILE
    if not index.exists() or not (path / NUMBERS_FILE).exists():
        raise ValueError(
            f"`{path}` is not a state of a run, {METADATA_FILE} or {NUMBERS_FILE} is missing"
        )
    for name in list_pickle_imports(index, "bare"):
        if not TRUSTED_GLOBALS.fullmatch(name):
            raise ValueError(f"`{index}` is refused: it would call `{name}`")
    specs: dict[str, tuple[torch.Size, torch.dtype]] = {}
    for name, entry in FileSystemReader(path).read_metadata().state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"`{index}` is refused: `{name}` is not a tensor")
        specs[name] = (entry.size, entry.properties.dtype)
    return specs


def _check_specs(path: Path, expected: TensorSpecs, saved: TensorSpecs) -> None:
    if unexpected := sorted(saved.keys() - expected.keys()):
        raise ValueError(
            f"`{path}` is of another model or optimizer: `{unexpected[0]}` is unexpected"
        )
    for name, (shape, _) in expected.items():
        if name not in saved:
            raise ValueError(f"`{path}` is of another model or optimizer: `{name}` is missing")
        if saved[name][0] != shape:
            raise ValueError(
                f"`{path}` is of another model: `{name}` has the shape {list(saved[name][0])} "
                f"there, {list(shape)} here"
            )

"""Runs of the tiny model as one of several processes, which test_parallel.py starts.

    torchrun --nproc-per-node 2 tests/train/ranks.py FOLDER CASE …

A case is STRATEGY-PRECISION-DATA, such as ddp-32-map: 2 steps in one go, and 1 + 1. The first
process prints "CASE hash hash", of all that was trained. `VERB:CASE` calls `run_verb`.
"""

import csv
import hashlib
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from ldm.train.distributed.parallel import gather
from ldm.train.loop import train
from ldm.train.monitoring.validation import validate
from ldm.train.run import Run
from tests.train.tinyrun import EMOJI, tiny_run

STEPS = 2


def make_run(folder: Path, case: str, steps: int, *overrides: str) -> Run:
    """A run that draws and exports nothing, and logs the loss of every step."""
    strategy, precision, data = case.split("-", 2)
    options = {
        "trainer.max_steps": steps,
        "trainer.strategy": strategy,
        "trainer.shard": 2 if strategy == "hsdp" else "null",
        "trainer.precision": {"bf16": "bf16-mixed"}.get(precision, precision),
        "optimizer.name": "adamw",
        "optimizer.warm_up": 0,
        "callbacks.validate_batches": 1,
        "callbacks.export": "[]",
        "callbacks.log_every": 1,
    }
    return tiny_run(
        folder,
        "data.params.train=" + data_section(data),
        *(f"lightning.{key}={value}" for key, value in options.items()),
        *overrides,
    )


def data_section(data: str) -> str:
    transform = "transform: {name: emoji, size: 32}"
    if data == "map":
        return f"{{root: {EMOJI}, split: train, {transform}}}"
    return f"{{root: null, split: null, shards: '{data}', shuffle: 4, {transform}}}"


def digest(run: Run) -> str:
    """Hash of weights, EMA, moments and numbers; the same for the same values, however sharded."""
    sha256 = hashlib.sha256()
    for name, value in sorted(gather(run.state.tensors()).items()):
        sha256.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    numbers = {k: v for k, v in run.state.numbers().items() if k not in ("seconds", "parts")}
    sha256.update(repr(sorted(numbers.items())).encode())
    return sha256.hexdigest()[:16]


def interrupted(folder: Path, case: str) -> tuple[str, str]:
    straight = make_run(folder / case / "whole", case, STEPS)
    train(straight)
    first = make_run(folder / case / "parts", case, STEPS // 2)
    train(first)
    second = make_run(folder / case / "parts", case, STEPS)
    second.resume()
    assert second.state.step == STEPS // 2
    train(second)
    keep(second, folder / case / "trained.pt")
    check_validation(second)
    return digest(straight), digest(second)


def check_validation(run: Run) -> None:
    """Validation gives the same twice, and leaves everything as it was."""
    run = replace(run, held_out=run.source)
    before = digest(run)
    assert validate(run) == validate(run) != {}
    assert digest(run) == before


def keep(run: Run, path: Path) -> None:
    """Saves losses and weights, for comparisons that are not exact."""
    weights = gather(run.task.trainable.state_dict())
    if run.ranks.is_first:
        with (run.folder / "log.csv").open() as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file)]
        torch.save({"weights": weights, "losses": losses}, path)


def run_verb(folder: Path, case: str, verb: str) -> tuple[str, str]:
    """save: trains a step. go: from what was saved, one more. forever: until it is stopped.

    A step has as many batches as it had at first, on any number of processes. After `go` losses and
    weights are in FOLDER/went-on-WORLD.pt; before `forever` the process id in FOLDER/RANK.pid.
    """
    steps = {"save": STEPS // 2, "go": STEPS, "forever": 10**9}[verb]
    run = make_run(folder, case, steps, "lightning.trainer.timeout=5")
    if verb == "go":
        run.resume(folder / "checkpoints" / f"state-{STEPS // 2:08}")
    if verb == "forever":
        (folder / f"{run.ranks.rank}.pid").write_text(str(os.getpid()))
    before = digest(run)
    train(run)
    if verb == "go":
        keep(run, folder / f"went-on-{run.ranks.world_size}.pt")
    return before, digest(run)


def main() -> None:
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    folder, *words = sys.argv[1:]
    for word in words:
        verb, _, case = word.rpartition(":")
        path = Path(folder)
        before, after = run_verb(path, case, verb) if verb else interrupted(path, case)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            sys.stdout.write(f"{word} {before} {after}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

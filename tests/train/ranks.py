"""Runs of the tiny model as one of several processes, which test_parallel.py starts.

    PYTHONPATH=.:tests torchrun --nproc-per-node 2 tests/train/ranks.py FOLDER CASE …

A case is STRATEGY-PRECISION-DATA, such as ddp-32-map: one run of 2 steps, and one that is resumed
after the first. DATA is `map`, `xl` (the same data for a tiny SDXL) or a pattern of shards. The
result is the hash of the training state of both runs. `ACTION:CASE` calls `run_action`.
"""

import csv
import hashlib
import logging
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ldm.train.distributed.parallel import gather_shards
from ldm.train.loop import train
from ldm.train.monitoring.validation import validate
from ldm.train.run import Run
from loading.tinyfamilies import make_small_config
from train.tinyrun import EMOJI, TRANSFORM, build_run_from, make_tiny_config, resume_newest

STEPS = 2


def make_run(folder: Path, case: str, steps: int, *overrides: str) -> Run:
    """Build a run without sample grids and exports that logs the loss of every step."""
    strategy, precision, data = case.split("-", 2)
    source = f"root: null, split: null, shards: '{data}', shuffle: 4"
    if data in ("map", "xl"):
        source = f"root: {EMOJI}, split: train"
    train_data = f"{{{source}, transform: {TRANSFORM}}}"
    options = {
        "trainer.max_steps": steps,
        "trainer.strategy": strategy,
        "trainer.shard_size": 2 if strategy == "hsdp" else "null",
        "trainer.precision": {"bf16": "bf16-mixed"}.get(precision, precision),
        "optimizer.name": "adamw",
        "optimizer.lr_warmup_steps": 0,
        "callbacks.validate_batches": 1,
        "callbacks.export": "[]",
        "callbacks.log_steps": 1,
    }
    lightning = [f"lightning.{key}={value}" for key, value in options.items()]
    config = make_tiny_config(f"data.params.train={train_data}", *lightning, *overrides)
    if data == "xl":
        config["model"] = make_small_config("xl")["model"] | {"base_learning_rate": 1e-3}
    return build_run_from(config, folder)


def compute_digest(run: Run) -> str:
    """Hash weights, EMA, moments and numbers of the state, independently of sharding."""
    sha256 = hashlib.sha256()
    for name, value in sorted(gather_shards(run.state.get_tensors()).items()):
        sha256.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    numbers = {k: v for k, v in run.state.get_numbers().items() if k not in ("seconds", "parts")}
    sha256.update(repr(sorted(numbers.items())).encode())
    return sha256.hexdigest()[:16]


def interrupt_run(folder: Path, case: str) -> tuple[str, str]:
    """Train without and with an interruption, and validate; return the hashes of both states."""
    uninterrupted = make_run(folder / case / "uninterrupted", case, STEPS)
    train(uninterrupted)
    train(make_run(folder / case / "resumed", case, STEPS // 2))
    resumed = make_run(folder / case / "resumed", case, STEPS)
    resume_newest(resumed)
    assert resumed.state.step == STEPS // 2
    train(resumed)
    digest = compute_digest(resumed)
    validating = replace(resumed, validation_source=resumed.source)
    assert validate(validating) == validate(validating) != {}
    assert compute_digest(resumed) == digest
    return compute_digest(uninterrupted), digest


def run_action(folder: Path, case: str, action: str) -> tuple[str, str]:
    """Train one step (save), resume and train another (resume), or train until killed (endless).

    Returns the hashes of the state before and after training. Any number of processes trains with
    the same batches. `resume` writes losses and weights to FOLDER/resumed-WORLD_SIZE.pt, `endless`
    creates FOLDER/RANK.pid.
    """
    steps = {"save": STEPS // 2, "resume": STEPS, "endless": 10**9}[action]
    timeout = 5 if action == "endless" else 60
    run = make_run(folder, case, steps, f"lightning.trainer.timeout={timeout}")
    if action == "resume":
        run.resume(folder / "checkpoints" / f"state-{STEPS // 2:08}")
    if action == "endless":
        (folder / f"{run.ranks.rank}.pid").touch()
    before = compute_digest(run)
    train(run)
    weights = gather_shards(run.task.trainable.state_dict())
    if action == "resume" and run.ranks.is_main_process:
        with (run.folder / "log.csv").open() as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file)]
        path = folder / f"resumed-{run.ranks.world_size}.pt"
        torch.save({"weights": weights, "losses": losses}, path)
    return before, compute_digest(run)


def run_cases(
    environment: Mapping[str, str], folder: Path, cases: Iterable[str]
) -> dict[str, tuple[str, str]]:
    """Run all cases as the process that the environment names; return the hashes of each."""
    os.environ.update(environment)
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    hashes = {}
    for name in cases:
        action, _, case = name.rpartition(":")
        hashes[name] = run_action(folder, case, action) if action else interrupt_run(folder, case)
    return hashes


if __name__ == "__main__":
    run_cases({}, Path(sys.argv[1]), sys.argv[2:])

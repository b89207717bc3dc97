"""Runs of the tiny model as one of several processes; test_parallel.py starts it by torchrun.

    torchrun --nproc-per-node 2 tests/train/ranks.py FOLDER CASE …

A case is STRATEGY-PRECISION-DATA, such as ddp-32-map: 2 steps in one go, and 1 + 1. The first
process prints "CASE hash hash", of all that was trained. `VERB:CASE` does what
`moved` says.
"""

import hashlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch

from ldm.loading.config import read_yaml
from ldm.train.distributed.parallel import whole
from ldm.train.loop import Run
from ldm.train.monitoring.validation import validate

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs/train/tiny.yaml"
STEPS = 2


class Quiet(Run):
    """A run that draws and exports nothing at its end, and knows its losses."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.losses: list[float] = []

    def step(self, work: Any, lr: float) -> dict[str, torch.Tensor]:
        losses = super().step(work, lr)
        self.losses.append(self.ranks.mean({"loss": float(losses["loss"].detach())})["loss"])
        return losses

    def finish(self) -> None:
        self.save()


def run(folder: Path, case: str, steps: int, *overrides: str, kind: type[Quiet] = Quiet) -> Any:
    strategy, precision, data = case.split("-", 2)
    words = {
        "trainer.max_steps": steps,
        "trainer.strategy": strategy,
        "trainer.shard": 2 if strategy == "hsdp" else "null",
        "trainer.precision": {"bf16": "bf16-mixed"}.get(precision, precision),
        "optimizer.name": "adamw",
        "optimizer.warm_up": 0,
        "callbacks.validate_batches": 1,
    }
    raw = read_yaml(
        TINY,
        [
            "data.params.batch_size=2",
            "data.params.train=" + sources(data),
            *(f"lightning.{key}={value}" for key, value in words.items()),
            *overrides,
        ],
    )
    return kind(raw, folder, device=torch.device("cpu"))


def sources(data: str) -> str:
    transform = "transform: {name: emoji, size: 32}"
    if data == "map":
        return f"{{root: {ROOT / 'tests/data/emoji'}, split: train, {transform}}}"
    return f"{{root: null, split: null, shards: '{data}', shuffle: 4, {transform}}}"


def digest(run: Run) -> str:
    """Of weights, average, moments and numbers; the same for the same values, however split."""
    found = hashlib.sha256()
    for name, value in sorted(whole(run.state.tensors()).items()):
        found.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    numbers = {k: v for k, v in run.state.numbers().items() if k not in ("seconds", "parts")}
    found.update(repr(sorted(numbers.items())).encode())
    return found.hexdigest()[:16]


def interrupted(folder: Path, case: str) -> tuple[str, str]:
    straight = run(folder / case / "whole", case, STEPS)
    straight.train()
    first = run(folder / case / "parts", case, STEPS // 2)
    first.train()
    second = run(folder / case / "parts", case, STEPS)
    second.resume()
    assert second.state.step == STEPS // 2
    second.train()
    keep(second, folder / case / "trained.pt")
    looked_at(second)
    return digest(straight), digest(second)


def looked_at(here: Quiet) -> None:
    """Validation sees the same twice, and leaves everything as it was."""
    before, here.held_out = digest(here), here.source
    assert validate(here) == validate(here) != {}
    assert digest(here) == before


def keep(here: Quiet, path: Path) -> None:
    """Losses and weights, for comparisons that are not exact."""
    weights = whole(here.task.trained.state_dict())
    if here.ranks.is_first:
        torch.save({"weights": weights, "losses": here.losses}, path)


def moved(folder: Path, case: str, verb: str) -> tuple[str, str]:
    """save: trains a step. go: from what was saved, one more. forever: until it is stopped.

    A step has as many batches as it had at first, on any number of processes. After `go` losses and
    weights lie in FOLDER/went-on-WORLD.pt; before `forever` the process number in FOLDER/RANK.pid.
    """
    steps = {"save": STEPS // 2, "go": STEPS, "forever": 10**9}[verb]
    here = run(folder, case, steps, "lightning.trainer.timeout=5")
    if verb == "go":
        here.resume(folder / "checkpoints" / f"state-{STEPS // 2:08}")
    if verb == "forever":
        (folder / f"{here.ranks.rank}.pid").write_text(str(os.getpid()))
    before = digest(here)
    here.train()
    if verb == "go":
        keep(here, folder / f"went-on-{here.ranks.world}.pt")
    return before, digest(here)


def main() -> Any:
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    folder, *words = sys.argv[1:]
    for word in words:
        verb, _, case = word.rpartition(":")
        before, after = moved(Path(folder), case, verb) if verb else interrupted(Path(folder), case)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            sys.stdout.write(f"{word} {before} {after}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

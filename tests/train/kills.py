"""Kills a training run again and again, and checks that nothing is lost.

    PYTHONPATH=.:tests python tests/train/kills.py FOLDER COUNT

Every attempt is a fork that resumes and trains until SIGKILL: two in three at any moment, the third
while a state is being written. In the end the run must have the weights of an undisturbed one, and
no kill may cost more than CADENCE steps. Prints one line; exits with 1 if anything was lost.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from ldm.train.loop import train
from ldm.train.run import Run
from ldm.train.runs.run_folder import list_states
from train.ranks import digest, make_run

CADENCE = 3  # steps between states
SEED = 7


def resume_and_train(folder: Path, steps: int) -> Run:
    """Resume the newest state, and train."""
    run = make_run(folder, "auto-32-map", steps, f"lightning.callbacks.save_steps={CADENCE}")
    if run.states.newest():
        run.resume()
    train(run)
    return run


def kill_attempt(folder: Path, rng: random.Random, *, while_saving: bool) -> None:
    start = time.time()
    child = os.fork()
    if not child:
        try:
            resume_and_train(folder, 10**9)
        finally:
            os._exit(1)
    if while_saving:
        while not list_unfinished_states(folder, start) and time.time() < start + 120:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.15))
    else:
        time.sleep(rng.uniform(0.2, 6))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def list_unfinished_states(folder: Path, start: float) -> list[Path]:
    """The states that are being written, or were when the process died, since a time."""
    try:
        folders = folder.glob("checkpoints/.state-*.part")
        return [path for path in folders if path.stat().st_ctime > start]
    except FileNotFoundError:
        return []


def read_last_steps(folder: Path) -> tuple[int, int]:
    """The last step of log.csv, which has a row for every step, and that of the states."""
    log, states = folder / "log.csv", list_states(folder / "checkpoints")
    rows = log.read_text().splitlines()[1:] if log.exists() else []
    logged = [int(row.split(",")[0]) for row in rows if row.count(",")]
    return max(logged, default=0), int(states[-1].name.removeprefix("state-")) if states else 0


def main() -> int:
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    shutil.rmtree(folder, ignore_errors=True)
    torch.set_num_threads(1)
    rng = random.Random(SEED)
    half_written, most_lost, saved = 0, 0, 0
    for number in range(count):
        start = time.time()
        kill_attempt(folder / "killed", rng, while_saving=number % 3 == 2)
        half_written += bool(list_unfinished_states(folder / "killed", start))
        logged, saved = read_last_steps(folder / "killed")
        most_lost = max(most_lost, logged - saved)
    killed = resume_and_train(folder / "killed", saved + CADENCE)
    is_same = digest(killed) == digest(resume_and_train(folder / "whole", saved + CADENCE))
    sys.stdout.write(
        f"{count} kills, {half_written} with a state half written, {saved + CADENCE} steps: at "
        f"most {most_lost} lost, {'the same' if is_same else 'OTHER'} weights\n"
    )
    return int(most_lost > CADENCE or not is_same)


if __name__ == "__main__":
    sys.exit(main())

"""Kills a training run again and again, and checks that nothing is lost.

    python tests/train/kills.py FOLDER COUNT

Every attempt is a fork that resumes and trains until it is killed with SIGKILL: two in three at any
moment, the third while a state is being written. In the end the run must have the weights of an
undisturbed one. Prints one line; exits with 1 if anything was lost.
"""

import os
import random
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from ldm.train.loop import train
from ldm.train.runs.run_folder import list_states
from tests.train.ranks import digest, make_run

CADENCE = 3  # steps between states
SEED = 7


def attempt(folder: Path, steps: int) -> None:
    """Resumes the newest state, and trains."""
    run = make_run(folder, "auto-32-map", steps, f"lightning.callbacks.save_steps={CADENCE}")
    if run.states.newest():
        run.resume()
    train(run)


def kill_attempt(folder: Path, rng: random.Random, *, while_saving: bool) -> bool:
    """One attempt and its end; whether it was killed while a state was being written."""
    existing, stale = {path.name for path in states(folder)}, parts(folder)
    child = os.fork()
    if not child:
        try:
            attempt(folder, 10**9)
        finally:
            os._exit(1)
    if while_saving:
        nth = rng.randint(1, 3)  # the first save of the session, or a later one
        wait_for_part(folder, existing | stale.keys(), nth)
        time.sleep(rng.uniform(0, 0.15))
    else:
        time.sleep(rng.uniform(0.2, 6))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return bool(parts(folder).items() - stale.items())


def states(folder: Path) -> list[Path]:
    return list_states(folder / "checkpoints")


def parts(folder: Path) -> dict[str, int]:
    """States that are being written, or were when a process died; and when they were begun."""
    found = {}
    for path in (folder / "checkpoints").glob(".state-*"):
        with suppress(FileNotFoundError):
            found[path.name] = path.stat().st_ctime_ns
    return found


def wait_for_part(folder: Path, stale: set[str], nth: int) -> None:
    """Until the nth state of a session is being written."""
    begun: set[str] = set()
    deadline = time.monotonic() + 120
    while len(begun) < nth and time.monotonic() < deadline:
        begun |= parts(folder).keys() - stale
        time.sleep(0.001)


def last_logged_step(folder: Path) -> int:
    """The last step of log.csv, which has a row for every step."""
    path = folder / "log.csv"
    rows = path.read_text().splitlines()[1:] if path.exists() else []
    steps = [row.split(",")[0] for row in rows if row.count(",")]
    return int(steps[-1]) if steps else 0


def main() -> int:
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    shutil.rmtree(folder, ignore_errors=True)
    torch.set_num_threads(1)
    rng = random.Random(SEED)
    is_lost, half_written, most_lost, saved = False, 0, 0, 0
    for number in range(count):
        half_written += kill_attempt(folder / "killed", rng, while_saving=number % 3 == 2)
        newest = states(folder / "killed")[-1:]
        saved = int(newest[0].name.removeprefix("state-")) if newest else 0
        most_lost = max(most_lost, last_logged_step(folder / "killed") - saved)
        is_lost |= most_lost > CADENCE
    steps = saved + CADENCE
    attempt(folder / "killed", steps)
    straight = make_run(folder / "whole", "auto-32-map", steps)
    train(straight)
    again = make_run(folder / "killed", "auto-32-map", steps)
    again.resume()
    is_same = digest(straight) == digest(again)
    sys.stdout.write(
        f"{count} kills, {half_written} with a state half written, {steps} steps, at most "
        f"{most_lost} steps lost (a state every {CADENCE}), {'the same' if is_same else 'OTHER'} "
        "weights\n"
    )
    return int(is_lost or not is_same)


if __name__ == "__main__":
    sys.exit(main())

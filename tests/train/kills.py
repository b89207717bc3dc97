"""Kills a training run again and again, and sees what is left.

    python tests/train/kills.py FOLDER COUNT

Every attempt is a fork that resumes and trains until it is killed with SIGKILL: two in three at any
moment, the third while a state is being written. In the end the run must have the very weights of
one that nobody disturbed. Prints one line of figures; exits with 1 if anything was lost.

TMPDIR may lie on another file system: states are never built there.
"""

import os
import random
import shutil
import signal
import sys
import time
from contextlib import suppress
from mmap import mmap
from pathlib import Path
from struct import pack, unpack

import torch

from ldm.train.runs.states import States
from tests.train.ranks import Quiet, digest, run

CADENCE = 3  # steps between states
SEED = 7


class Watched(Quiet):
    """Tells the number of its steps to whoever watches."""

    def attach(self, shared: mmap) -> "Watched":
        self.shared = shared
        return self

    def _agreed(self, *args: object) -> list[str]:
        self.shared[:8] = pack("q", self.state.step)
        return super()._agreed(*args)  # type: ignore[arg-type]


def attempt(folder: Path, shared: mmap, steps: int) -> None:
    """In a fork: goes on from the newest state, to the end if nobody kills it."""
    here = run(
        folder, "auto-32-map", steps, f"lightning.callbacks.save_steps={CADENCE}", kind=Watched
    )
    here.attach(shared)
    if here.states.newest():
        here.resume()
    here.train()


def killed(folder: Path, shared: mmap, chance: random.Random, *, while_saving: bool) -> bool:
    """One attempt and its end; whether it was killed while a state was being written."""
    seen, stale = {path.name for path in (folder / "checkpoints").glob("state-*")}, parts(folder)
    child = os.fork()
    if not child:
        code = 1
        try:
            attempt(folder, shared, 10**9)
        finally:
            os._exit(code)
    if while_saving:
        chosen = chance.randint(1, 3)  # the first save of the session, or a later one
        wait_for_part(folder, seen | stale.keys(), chosen)
        time.sleep(chance.uniform(0, 0.15))
    else:
        time.sleep(chance.uniform(0.2, 6))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return bool(parts(folder).items() - stale.items())


def parts(folder: Path) -> dict[str, int]:
    """States that are being written, or were when somebody died; and when they were begun."""
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


def main() -> int:
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    shutil.rmtree(folder, ignore_errors=True)
    torch.set_num_threads(1)
    shared, chance = mmap(-1, 8), random.Random(SEED)
    states = States(folder / "killed" / "checkpoints", ranks=None)  # type: ignore[arg-type]
    lost, halves, greatest = 0, 0, 0
    for number in range(count):
        halves += killed(folder / "killed", shared, chance, while_saving=number % 3 == 2)
        (reached,) = unpack("q", shared[:8])
        newest = states.newest()
        kept = int(newest.name.removeprefix("state-")) if newest else 0
        lost += reached - kept > CADENCE
        greatest = max(greatest, reached - kept)
    steps = kept + CADENCE
    attempt(folder / "killed", shared, steps)
    straight = run(folder / "whole", "auto-32-map", steps)
    straight.train()
    again = run(folder / "killed", "auto-32-map", steps)
    again.resume()
    same = digest(straight) == digest(again)
    sys.stdout.write(
        f"{count} kills, {halves} with a state half written, {steps} steps, at most {greatest} "
        f"steps lost (a state every {CADENCE}), {'the same' if same else 'OTHER'} weights\n"
    )
    return int(bool(lost) or not same)


if __name__ == "__main__":
    sys.exit(main())

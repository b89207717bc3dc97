"""Many processes train what one would, go on as more or fewer of them, and end together."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ldm.data.folder import Folder
from ldm.data.pack import pack
from ldm.data.transforms import PhotoTransform
from ldm.loading.files.checkpoint import read_checkpoint
from ldm.train.distributed import parallel
from ldm.train.loop import train
from tests.train.ranks import STEPS, make_run

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests/train/ranks.py"


def started(processes: int, *words: str) -> "list[subprocess.Popen[str]]":
    """The processes, told of each other as torchrun and Slurm do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    shared |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *words],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for rank in range(processes)
    ]  # fmt: skip


def ranks(processes: int, folder: Path, *cases: str) -> dict[str, tuple[str, str]]:
    """{case: (hash, hash)} of tests/train/ranks.py."""
    outputs = [run.communicate(timeout=900) for run in started(processes, str(folder), *cases)]
    lines = [line.split() for line in outputs[0][0].splitlines()]
    found = {line[0]: (line[1], line[2]) for line in lines if line and line[0] in cases}
    assert set(found) == set(cases), outputs[0][1][-3000:]
    return found


def test_two_processes_go_on_bit_by_bit_equal_one_and_end_together(tmp_path: Path) -> None:
    """One test, as starting two processes takes longer than all that they do here."""
    cases = ["ddp-32-map", "fsdp-bf16-map"]
    first, second = started(2, str(tmp_path), *cases, "forever:ddp-32-map")
    while len(list(tmp_path.glob("*.pid"))) < 2 and first.poll() is None:
        time.sleep(0.1)
    second.send_signal(signal.SIGSTOP)  # no connection breaks, but it gives no sign of life
    since = time.monotonic()
    output, errors = first.communicate(timeout=120)
    second.kill()
    second.communicate()
    found = [line.split() for line in output.splitlines() if line.startswith(tuple(cases))]
    assert [line[0] for line in found] == cases, errors[-3000:]
    assert all(straight == interrupted for _, straight, interrupted in found)

    assert first.returncode == 1
    assert time.monotonic() - since < 60
    assert "process 1 has been silent for 5 s" in errors

    one = make_run(
        tmp_path / "one", "auto-32-map", STEPS, "lightning.trainer.accumulate_grad_batches=2"
    )
    train(one)
    two = torch.load(tmp_path / "ddp-32-map" / "trained.pt")
    compare(two["weights"], one.task.trainable.state_dict())


def test_processes_started_again_do_not_take_old_ones_for_new() -> None:
    store = dist.HashStore()
    turns = []
    for _ in range(2):
        with ThreadPoolExecutor() as pool:
            first = pool.submit(
                parallel.agree_on_session, store, 0, 3
            )  # finds the others of last time
            time.sleep(0.2)
            others = [pool.submit(parallel.agree_on_session, store, rank, 3) for rank in (1, 2)]
            said = {place.result(timeout=10) for place in (first, *others)}
        assert len(said) == 1
        turns += said
    assert turns[0] != turns[1]


@pytest.mark.slow
def test_torchrun_starts_a_killed_process_again_and_nothing_is_lost(tmp_path: Path) -> None:
    words = ["lightning.trainer.max_steps=12", "lightning.callbacks.save_steps=3"]
    words += ["lightning.callbacks.images=0", "data.params.batch_size=2"]
    words += ["-b", "configs/train/tiny.yaml", "-t", "-l"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node=2", "--max-restarts=1", "scripts/train.py", *words]
    weights = []
    for name in ("whole", "killed"):
        run = subprocess.Popen([*torchrun, str(tmp_path / name)], cwd=ROOT)
        if name == "killed":
            while not list(tmp_path.glob("killed/*/checkpoints/state-*3")):
                assert run.poll() is None
                time.sleep(0.1)
            workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
            os.kill(int(workers[1]), signal.SIGKILL)
        assert run.wait(timeout=300) == 0
        (last,) = tmp_path.glob(f"{name}/*_tiny/checkpoints/last.safetensors")
        weights.append(read_checkpoint(last).state)
    for name_, value in weights[0].items():
        assert torch.equal(value, weights[1][name_]), name_


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "strategies"), [(1, ["auto"]), (2, ["ddp", "fsdp"]), (4, ["hsdp"])]
)
def test_every_way_of_training_is_resumed_bit_by_bit(
    processes: int, strategies: list[str], tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    folder = Folder(root=ROOT / "tests/data/emoji", transform=PhotoTransform(size=32))
    assert len(list(pack(folder, f"{shards}/%03d.tar", count=5))) == 5
    cases = [
        f"{strategy}-{precision}-{data}"
        for strategy in strategies
        for precision in ("32", "bf16")
        for data in ("map", f"{shards}/*.tar")
    ]
    for case, (straight, interrupted) in ranks(processes, tmp_path, *cases).items():
        assert straight == interrupted, case


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_state_of_four_processes_is_the_same_on_two_and_one(
    strategy: str, tmp_path: Path
) -> None:
    case = f"{strategy}-32-map"
    (_, saved), gone = ranks(4, tmp_path, f"save:{case}", f"go:{case}").values()
    assert gone[0] == saved
    assert [ranks(n, tmp_path, f"go:{case}")[f"go:{case}"][0] for n in (2, 1)] == [saved, saved]
    after = [torch.load(tmp_path / f"went-on-{n}.pt") for n in (4, 2, 1)]
    for other in after[1:]:
        assert other["losses"] == pytest.approx(after[0]["losses"], rel=1e-5)
        compare(after[0]["weights"], other["weights"])


def compare(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    """Gradients are summed in another order, and Adam divides by their size.

    Where they are about nothing, a weight may so go 0.002 (the learning rate) this way or that.
    """
    for name, value in weights.items():
        difference = (value.float() - others[name].float()).abs()
        assert difference.median() < 1e-5, name
        assert difference.max() < 1e-3, name

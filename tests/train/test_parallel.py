"""Several processes train as one does, resume with another number of them, and end together."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from threading import Event

import pytest
import torch
import torch.distributed as dist

from ldm.data.folder import ImageFolder
from ldm.data.pack import write_shards
from ldm.data.transforms import PhotoTransform
from ldm.loading.files.checkpoint import read_checkpoint
from ldm.train.distributed import parallel
from train.ranks import run_cases
from train.tinyrun import EMOJI, ROOT

SCRIPT = ROOT / "tests/train/ranks.py"


def find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def make_environments(processes: int) -> list[dict[str, str]]:
    """Make the variables by which processes find each other, as torchrun and Slurm do."""
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_port()), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
        "WORLD_SIZE": str(processes),
    }  # fmt: skip
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def start_processes(processes: int, *args: str) -> "list[subprocess.Popen[str]]":
    """Start ranks.py in several processes."""
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *args],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for environment in make_environments(processes)
    ]  # fmt: skip


def run_ranks(processes: int, folder: Path, *cases: str) -> dict[str, tuple[str, str]]:
    """Return the two hashes of each case; processes are forked after all imports."""
    context = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["train.ranks", "torch._dynamo"])
    with ProcessPoolExecutor(processes, context) as pool:
        futures = [
            pool.submit(run_cases, env, folder, cases) for env in make_environments(processes)
        ]
        return futures[0].result(timeout=900)


@pytest.mark.slow
def test_a_process_ends_if_another_sends_no_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    port = find_free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    _store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    exits: list[int] = []
    ended = Event()
    monkeypatch.setattr(parallel.os, "_exit", lambda status: (exits.append(status), ended.set()))
    first, second = (parallel.Heartbeat(rank, 2, 1.0, session="now") for rank in range(2))
    first.start()
    second.start()
    assert not ended.wait(2)
    second.stop()
    assert ended.wait(10)
    first.stop()
    assert exits[0] == 1


def test_restarted_processes_agree_on_a_new_session() -> None:
    store = dist.HashStore()
    sessions = []
    for _ in range(2):
        with ThreadPoolExecutor() as pool:
            # It finds the entries of the previous session.
            first = pool.submit(parallel.agree_on_session, store, 0, 3)
            time.sleep(0.2)
            others = [pool.submit(parallel.agree_on_session, store, rank, 3) for rank in (1, 2)]
            names = {future.result(timeout=10) for future in (first, *others)}
        assert len(names) == 1
        sessions += names
    assert sessions[0] != sessions[1]


@pytest.mark.slow
def test_a_stopped_process_ends_the_others(tmp_path: Path) -> None:
    first, second = start_processes(2, str(tmp_path), "endless:ddp-32-map")
    while len(list(tmp_path.glob("*.pid"))) < 2 and first.poll() is None:
        time.sleep(0.1)
    second.send_signal(signal.SIGSTOP)  # no connection breaks, but its heartbeat ends
    start = time.monotonic()
    _, errors = first.communicate(timeout=120)
    second.kill()
    second.communicate()
    assert first.returncode == 1
    assert time.monotonic() - start < 60
    assert "process 1 has been silent for 5 s" in errors


@pytest.mark.slow
def test_a_run_restarted_by_torchrun_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    args = ["lightning.trainer.max_steps=12", "lightning.callbacks.save_steps=3"]
    args += ["lightning.callbacks.max_images=0", "data.params.batch_size=2"]
    args += ["-b", "configs/train/tiny.yaml", "-t", "-l"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node=2", "--max-restarts=1", "scripts/train.py", *args]
    weights = []
    for name in ("uninterrupted", "killed"):
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        run = subprocess.Popen([*torchrun, str(tmp_path / name)], cwd=ROOT, env=env)
        if name == "killed":
            while not list(tmp_path.glob("killed/*/checkpoints/state-*3")):
                assert run.poll() is None
                time.sleep(0.1)
            workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text("utf-8").split()
            os.kill(int(workers[1]), signal.SIGKILL)
        assert run.wait(timeout=300) == 0
        (last,) = tmp_path.glob(f"{name}/*_tiny/checkpoints/last.safetensors")
        weights.append(read_checkpoint(last).state_dict)
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "strategies"), [(1, ["auto"]), (2, ["ddp", "fsdp"]), (4, ["hsdp"])]
)
def test_every_strategy_is_resumed_bit_by_bit(
    processes: int, strategies: list[str], tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    folder = ImageFolder(root=EMOJI, transform=PhotoTransform(size=32))
    assert len(list(write_shards(folder, f"{shards}/%03d.tar", count=5))) == 5
    variants = ("32-map", f"bf16-{shards}/*.tar")
    cases = [f"{strategy}-{variant}" for strategy in strategies for variant in variants]
    for case, (uninterrupted, interrupted) in run_ranks(processes, tmp_path, *cases).items():
        assert uninterrupted == interrupted, case


@pytest.mark.slow
def test_a_sharded_sdxl_is_resumed_by_one_process(tmp_path: Path) -> None:
    """Only the UNet has optimizer states: both text encoders are frozen."""
    save, resume = "save:fsdp-32-xl", "resume:fsdp-32-xl"
    hashes = run_ranks(2, tmp_path, save, resume)
    assert run_ranks(1, tmp_path, resume)[resume][0] == hashes[resume][0] == hashes[save][1]
    weights = [torch.load(tmp_path / f"resumed-{n}.pt")["weights"] for n in (2, 1)]
    assert {name.split(".")[0] for name in weights[0]} == {"unet", "conditioner"}
    assert_close(*weights)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [("ddp", "fsdp"), ("fsdp", "ddp")])
def test_a_state_of_four_processes_is_the_same_on_two_and_one(
    first: str, second: str, tmp_path: Path
) -> None:
    """The second step continues from the state of the first with another strategy."""
    save, resume = f"save:{first}-32-map", f"resume:{second}-32-map"
    hashes = run_ranks(4, tmp_path, save, resume)
    resumed = [hashes[resume][0], *(run_ranks(n, tmp_path, resume)[resume][0] for n in (2, 1))]
    assert resumed == [hashes[save][1]] * 3
    expected, *results = (torch.load(tmp_path / f"resumed-{n}.pt") for n in (4, 2, 1))
    for result in results:
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert_close(expected["weights"], result["weights"])


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compare weights whose gradients were summed in another order.

    Adam divides by the size of gradients: where they are about 0, a weight may change by the
    learning rate, 0.002, in either direction.
    """
    for name, value in actual.items():
        difference = (value.float() - expected[name].float()).abs()
        assert difference.median() < 1e-5, name
        assert difference.max() < 1e-3, name

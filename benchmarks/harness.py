"""Compares the time of two implementations, each in its own process, in alternating order."""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# Appended, so that PYTHONPATH decides which `ldm` a worker measures.
sys.path.append(str(ROOT))

MIN_SECONDS = 0.2  # of a measurement; shorter calls are repeated

WarmUpResult = dict[str, Any]  # reported by a worker after its warm-up


@dataclass(frozen=True)
class Implementation:
    """One of the implementations to compare: "ours" or "diffusers", with a checkout's `ldm`."""

    name: str
    root: Path = ROOT


def make_plain_parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser without flags that shows a docstring verbatim."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def make_parser(doc: str, *, dtypes: Iterable[str], threads: int) -> argparse.ArgumentParser:
    """Return a parser with the flags of all comparisons of two processes."""
    parser = make_plain_parser(doc)
    add = parser.add_argument
    add("--against", default="diffusers", metavar="CHECKOUT", help="another revision of this code")
    add("--dtype", nargs="+", choices=list(dtypes), default=["float32"])
    add("--device", type=torch.device, default=torch.device("cpu"), help="cpu, cuda, cuda:1 …")
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=threads)
    add("--json", type=Path, metavar="FILE", help="write all measurements to this file")
    add("--worker", choices=["ours", "diffusers"], help=argparse.SUPPRESS)
    return parser


def get_implementations(args: argparse.Namespace) -> tuple[Implementation, Implementation]:
    """Return our implementation and the baseline, which `--against` selects."""
    if args.against == "diffusers":
        return Implementation("ours"), Implementation("diffusers")
    root = Path(args.against).resolve()
    if not (root / "ldm").is_dir():
        raise SystemExit(f"--against: `{root}` is not a checkout of this project")
    return Implementation("ours"), Implementation("ours", root)


def configure_torch(args: argparse.Namespace) -> None:
    """Set the number of threads, and disable TF32, so that outputs can be compared."""
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False


class Worker:
    """A process that runs `serve` for an implementation: `script --worker … FLAGS`.

    Attributes:
        peak: Peak memory of the process so far, in GiB.
    """

    def __init__(
        self,
        implementation: Implementation,
        script: Path,
        args: argparse.Namespace,
        *flags: object,
    ) -> None:
        command = [sys.executable, script, "--worker", implementation.name]
        command += ["--device", args.device, "--threads", args.threads, *flags]
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  # lives as long as the worker
        self.process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=make_environment(implementation.root),
        )
        self.peak = 0.0

    @cached_property
    def warm_up_result(self) -> WarmUpResult:
        """The worker's report after its warm-up, for which this waits."""
        return self._read_line()

    def measure(self) -> float:
        """Measure the seconds of one call."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        measurement = self._read_line()
        self.peak = measurement["peak"]
        return float(measurement["seconds"])

    def measure_cpu_seconds(self) -> float:
        """Return the CPU time so far of the process and its finished children."""
        fields = (
            Path(f"/proc/{self.process.pid}/stat").read_text("utf-8").rpartition(")")[2].split()
        )
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read_line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            self.log.seek(0)
            raise SystemExit(f"{self.log.read()}\na worker ended with status {status}")
        result: dict[str, Any] = json.loads(line)
        return result


def serve(warm_up_result: WarmUpResult, call: Callable[[], object], device: torch.device) -> None:
    """In the worker: report the warm-up, then time `call` for each line of standard input."""
    print(json.dumps(warm_up_result), flush=True)
    now = choose_clock(device)
    for _ in sys.stdin:
        num_calls, seconds, start = 0, 0.0, now()
        while seconds < MIN_SECONDS:
            call()
            num_calls, seconds = num_calls + 1, now() - start
        measurement = {"seconds": seconds / num_calls, "peak": measure_peak(device)}
        print(json.dumps(measurement), flush=True)


def compare(
    start_worker: Callable[[Implementation], Worker],
    implementations: tuple[Implementation, Implementation],
    compare_results: Callable[[WarmUpResult, WarmUpResult], dict[str, Any]],
    *,
    rounds: int,
    both_fit: bool = True,
    measure_rate: Callable[[], float] | None = None,
) -> dict[str, Any]:
    """Measure both implementations in the order A B, B A, A B …

    Args:
        start_worker: Starts the worker of an implementation.
        compare_results: Compares the warm-up results of both workers; exits if they disagree.
        both_fit: Whether both workers fit into memory; if not, each turn starts a worker, measures
            three times and ends it.
        measure_rate: Measures a rate of this machine, before and after each measurement of ours.

    Returns:
        The result of `compare_results`, with `seconds` and `peaks` (GiB) of both, `ratios`
        (baseline / ours), `rates` (means of before and after), and `others`, the fraction of the
        CPUs that other processes used.
    """
    # Both workers are warmed up before any measurement.
    workers = [start_worker(each) if both_fit else None for each in implementations]
    results = [worker.warm_up_result if worker else {} for worker in workers]
    row: dict[str, Any] = {}
    seconds: tuple[list[float], list[float]] = ([], [])
    rates: list[float] = []
    peaks, other_seconds, available_seconds = [0.0, 0.0], 0.0, 0.0
    for index in range(rounds):
        for i in (0, 1) if index % 2 == 0 else (1, 0):
            worker = workers[i] or start_worker(implementations[i])
            results[i] = worker.warm_up_result
            if index == 0 and i == 1:
                row |= compare_results(results[0], results[1])
            for _ in range(1 if both_fit else 3):
                rate_before = measure_rate() if measure_rate and i == 0 else 0.0
                others_before = measure_busy_seconds() - worker.measure_cpu_seconds()
                start = time.perf_counter()
                seconds[i].append(worker.measure())
                others_after = measure_busy_seconds() - worker.measure_cpu_seconds()
                other_seconds += others_after - others_before
                available_seconds += (time.perf_counter() - start) * (os.cpu_count() or 1)
                if measure_rate and i == 0:
                    rates.append((rate_before + measure_rate()) / 2)
            peaks[i] = max(peaks[i], worker.peak)
            if not both_fit:
                worker.close()
    for worker in filter(None, workers):
        worker.close()
    ratios = [baseline / ours for ours, baseline in zip(*seconds, strict=True)]
    row |= {"seconds": seconds, "ratios": ratios, "ratio": statistics.median(ratios)}
    others = max(0.0, other_seconds / available_seconds)
    return row | {"rates": rates, "peaks": peaks, "others": others}


def measure_alternating(
    functions: Sequence[Callable[[], object]], rounds: int, device: torch.device
) -> list[list[float]]:
    """Call functions in turn, in this process; return a list of seconds for each function."""
    now = choose_clock(device)
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for times, function in zip(seconds, functions, strict=True):
            start = now()
            function()
            times.append(now() - start)
    return seconds


def format_row(row: dict[str, Any]) -> str:
    """Format the result of a comparison in one line."""
    ours, baseline = map(statistics.median, row["seconds"])
    low, high = min(row["ratios"]), max(row["ratios"])
    return (
        f"baseline {baseline:.4g} s  ours {ours:.4g} s  ratio {row['ratio']:.2f} "
        f"[{low:.2f}-{high:.2f}]  peak GiB {row['peaks'][1]:.2f} and {row['peaks'][0]:.2f}  "
        f"others {row['others']:.0%}"
    )


def report(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Print the lowest ratio, and write all rows to `--json`."""
    lowest = min(rows, key=lambda row: row["ratio"])
    print(f"lowest ratio {lowest['ratio']:.2f}: {lowest['stage']} {lowest['dtype']}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


def run_python(
    root: Path, *command: object, folder: Path | None = None
) -> tuple[float, float, float]:
    """Run a Python script with the `ldm` of a checkout.

    Args:
        root: Folder of the checkout.
        command: Path of the script, and its arguments.
        folder: Working directory; None = `root`.

    Returns:
        Seconds, CPU seconds, and peak resident memory in GiB.

    Raises:
        SystemExit: The script failed; the message contains its output.
    """
    argv, start = [sys.executable, *map(str, command)], time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            argv, cwd=folder or root, stdout=log, stderr=log, env=make_environment(root)
        )
        _, process.returncode, usage = os.wait4(process.pid, 0)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(argv)}\n{log.read()}")
    seconds = time.perf_counter() - start
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def make_environment(root: Path) -> dict[str, str]:
    """Return the environment of a process that imports the `ldm` of a checkout.

    glibc keeps freed memory for both implementations, as it does for the command `ldm`.
    """
    malloc = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    python_path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return {**os.environ, **malloc, "HF_HUB_OFFLINE": "1", "PYTHONPATH": python_path}


def choose_clock(device: torch.device) -> Callable[[], float]:
    """Return a clock: CPU time for one thread, else wall time; a GPU is synchronized first."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return measure_cpu_seconds
    if device.type == "cpu":
        return time.perf_counter

    def synchronize_and_read() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronize_and_read


def measure_cpu_seconds() -> float:
    """Return the CPU time of this process and its finished children."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure_peak(device: torch.device) -> float:
    """Return the peak memory so far in GiB: resident memory, or torch's allocations on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    match = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text("utf-8"))
    return int(match[1]) / 2**20 if match else float("nan")


def describe_machine(args: argparse.Namespace) -> str:
    """Describe the processor, number of threads, version of torch, and baseline."""
    if args.device.type == "cuda":
        name = torch.cuda.get_device_name(args.device)
    else:
        match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text("utf-8"))
        name = match[1] if match else "unknown CPU"
    return f"{name}, {args.threads} threads, torch {torch.__version__}, baseline {args.against}"


def measure_busy_seconds() -> float:
    """Return the CPU time of all processes since the machine started."""
    fields = Path("/proc/stat").read_text("utf-8").split("\n")[0].split()[1:]
    user, nice, system, _, _, irq, soft_irq = map(int, fields[:7])
    return (user + nice + system + irq + soft_irq) / os.sysconf("SC_CLK_TCK")

"""Our modules beside diffusers': same weights, same inputs, one process, interleaved.

python benchmarks/run.py --quick                       # UNet 32x32, decoding 256: about a minute
python benchmarks/run.py --dtype float32 bfloat16      # UNet 64x64, decoding 512
python benchmarks/run.py --stage load start            # fresh processes
python benchmarks/run.py --device cuda --dtype float16 bfloat16

Weights are random, of Stable Diffusion 2's sizes. Before anything is timed outputs must agree: in
float32 within 1e-5 of each other (relative, L2), in 16 bits ours may be at most 1.2 times as far
from float32 as diffusers'. Then rounds of ours, theirs, theirs, ours …; a ratio is diffusers' time
by ours of neighbours, the median of all rounds with its range. With one thread time is the CPU's.
`others` is the share of the CPUs that other processes took: above 5 % do not trust wall times.
Both sides run with the allocator set as our scripts set it (`ldm.nets.cpu.keep_memory`). On a GPU
time is the wall's, nothing else being under way there, memory is torch's, and float32 is exact (no
TF32), so that the outputs can agree.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from make_checkpoint import original_layout  # noqa: E402

from ldm.loading.build import build_on_meta  # noqa: E402
from ldm.loading.config import read_yaml  # noqa: E402
from ldm.loading.legacy import rename_weights, translate_config  # noqa: E402
from ldm.nets import cpu  # noqa: E402

MODULES = ("unet", "vae", "text")
CONFIG = "configs/stable-diffusion/v2-inference.yaml"
FP32_GATE, HALF_GATE = 1e-5, 1.2

Run = Callable[[], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--stage", nargs="+", choices=[*MODULES, "load", "start"], default=list(MODULES))
    add("--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32"])
    add("--device", type=torch.device, default=torch.device("cpu"), help="cpu, cuda, cuda:1 …")
    add("--quick", action="store_true", help="small pictures, at most 2 rounds")
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--json", type=Path, metavar="FILE", help="write all samples there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cpu.keep_memory()
    torch.backends.cudnn.allow_tf32 = False
    print(f"{processor(args.device)}, {args.threads} threads, torch {torch.__version__}")
    if args.quick:
        args.rounds = min(args.rounds, 2)
    rows = []
    for dtype in args.dtype if any(stage in MODULES for stage in args.stage) else []:
        rows += compare_modules(args, getattr(torch, dtype))
    if rows:
        print(f"peak of this process, both sides in it: {peak(args.device):.1f} GiB")
    for stage in args.stage:
        if stage not in MODULES:
            rows += {"load": load, "start": start}[stage](args)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


@torch.no_grad()
def compare_modules(args: argparse.Namespace, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One row per stage, printed as soon as it is known."""
    import opponents

    model: Any = build_on_meta(translate_config(read_yaml(CONFIG)), where=CONFIG)
    state = rename_weights(original_layout(model))
    names = model.state_dict()
    model.load_state_dict({k: v for k, v in state.items() if k in names}, assign=True)
    model.eval()
    del state
    rows = []
    for stage in [stage for stage in MODULES if stage in args.stage]:
        ours = {"unet": model.unet, "vae": model.autoencoder, "text": model.conditioner.text}[stage]
        inputs = [x.to(args.device) for x in _inputs(stage, quick=args.quick)]
        ours.to(args.device)
        exact = _exact(ours, stage, inputs) if dtype != torch.float32 else None
        ours.to(dtype)
        theirs = getattr(opponents, stage)(ours).to(args.device)
        inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
        runs = _ours(ours, stage, inputs), _theirs(theirs, stage, inputs)
        row: dict[str, Any] = {"stage": stage, "dtype": str(dtype), "size": list(inputs[0].shape)}
        row |= _agreement(runs, exact)
        row["packs_gib"] = _packs(ours)
        row |= _interleaved(runs, args.rounds, clock(args.device))
        print(_line(row), flush=True)
        rows.append(row)
        ours.to("meta")
        del theirs, runs
    return rows


def _inputs(stage: str, *, quick: bool) -> list[Tensor]:
    torch.manual_seed(0)
    if stage == "unet":
        side = 32 if quick else 64
        return [torch.randn(2, 4, side, side), torch.tensor([500, 500]), torch.randn(2, 77, 1024)]
    if stage == "vae":
        side = 32 if quick else 64
        return [torch.randn(1, 4, side, side)]
    return [torch.randint(1, 49405, (2, 77))]


def _ours(module: Any, stage: str, inputs: list[Tensor]) -> Run:
    return lambda: (module.decode if stage == "vae" else module)(*inputs)


def _theirs(module: Any, stage: str, inputs: list[Tensor]) -> Run:
    if stage == "unet":
        return lambda: module(*inputs, return_dict=False)[0]
    if stage == "vae":
        return lambda: module.decode(*inputs, return_dict=False)[0]
    return lambda: module(*inputs).last_hidden_state


def _exact(module: nn.Module, stage: str, inputs: list[Tensor]) -> Tensor:
    """Ours in float32, by torch's own kernels."""
    cpu.enable(False)
    out = _ours(module, stage, inputs)()
    cpu.enable(True)
    return out


def _agreement(runs: tuple[Run, Run], exact: Tensor | None) -> dict[str, float]:
    """Also the warm-up: weights are packed at the second use at the latest."""
    ours, _, theirs = runs[0](), runs[1](), runs[1]()
    ours = runs[0]()
    if exact is None:
        error = _distance(ours, theirs)
        if not error <= FP32_GATE:
            raise SystemExit(f"outputs differ by {error:.1e}, allowed are {FP32_GATE}")
        return {"difference": error}
    errors = _distance(ours, exact), _distance(theirs, exact)
    if not errors[0] <= HALF_GATE * errors[1]:
        raise SystemExit(f"our error is {errors[0]:.1e}, theirs {errors[1]:.1e}")
    return {"difference": errors[0], "their_error": errors[1]}


def _distance(x: Tensor, y: Tensor) -> float:
    x, y = x.double(), y.double()
    return ((x - y).norm() / y.norm()).item()


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds: of the CPU if one thread works there, else of the wall, when a GPU has ended."""
    if device.type == "cpu":
        return time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def ended() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return ended


def _interleaved(runs: tuple[Run, Run], rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    seconds: tuple[list[float], list[float]] = ([], [])
    busy, own, wall = _busy(), time.process_time(), time.perf_counter()
    for round in range(rounds):
        for side in (0, 1) if round % 2 == 0 else (1, 0):
            start = clock()
            runs[side]()
            seconds[side].append(clock() - start)
    wall = (time.perf_counter() - wall) * (os.cpu_count() or 1)
    others = max(0.0, (_busy() - busy - (time.process_time() - own)) / wall)
    ratios = [theirs / ours for ours, theirs in zip(*seconds, strict=True)]
    return {"ours": seconds[0], "theirs": seconds[1], "ratios": ratios, "others": others}


def _line(row: dict[str, Any]) -> str:
    ours, theirs = (statistics.median(row[side]) for side in ("ours", "theirs"))
    their_error = f" (theirs {row['their_error']:.1e})" if "their_error" in row else ""
    ratios = f"{statistics.median(row['ratios']):.2f}"
    return (
        f"{row['stage']:5} {row['dtype'][6:]:9} {'x'.join(map(str, row['size'])):10} "
        f"diffusers {theirs:7.3f} s  ours {ours:7.3f} s  ratio {ratios}"
        f" [{min(row['ratios']):.2f}-{max(row['ratios']):.2f}]  error {row['difference']:.1e}"
        f"{their_error}  packs {row['packs_gib']:.2f} GiB  others {row['others']:.0%}"
    )


def load(args: argparse.Namespace) -> list[dict[str, Any]]:
    """An fp16 single file, as it is."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sd2.safetensors"
        _python("benchmarks/make_checkpoint.py", str(file), "--dtype", "float16")
        command = ["benchmarks/load_checkpoint.py", str(file), "--dtype", "float16", "--diffusers"]
        print(_python(*command, "--rounds", str(args.rounds)), end="")
    return []


def start(args: argparse.Namespace) -> list[dict[str, Any]]:
    """How long until a program is ready to read its arguments, and until its modules are there."""
    ways = {
        "txt2img.py --help": ["-m", "scripts.txt2img", "--help"],
        "import ldm, its parts": ["-c", "import ldm; ldm.load; ldm.txt2img"],
        "import diffusers' parts": ["-c", "from diffusers import StableDiffusionPipeline"],
    }
    rows: list[dict[str, Any]] = [{"stage": way, "seconds": []} for way in ways]
    for _ in range(args.rounds):
        for row in rows:
            begin = time.perf_counter()
            _python(*ways[row["stage"]])
            row["seconds"].append(time.perf_counter() - begin)
    for row in rows:
        print(f"{row['stage']:24} {statistics.median(row['seconds']):6.2f} s")
    return rows


def _python(*command: str) -> str:
    run = [sys.executable, *command]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def _packs(module: nn.Module) -> float:
    """GiB of rearranged weights."""
    made = [pack for part in module.modules() if hasattr(part, "packs") for pack in _made(part)]
    return sum(torch.ops.mkldnn._nbytes(pack) for pack in made) / 2**30


def _made(layer: Any) -> list[Tensor]:
    packs = layer.packs.made.values()
    return [pack for entry in packs for pack in (entry if isinstance(entry, list) else [entry])]


def peak(device: torch.device) -> float:
    """GiB: the largest resident size, or what torch held of a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) / 2**20 if found else float("nan")


def _busy() -> float:
    """Seconds of all CPUs that were not idle since the machine started."""
    user, nice, system, _, _, irq, soft, *_ = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else "an unknown CPU"


if __name__ == "__main__":
    main()

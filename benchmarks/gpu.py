"""Runs all checks that need a GPU, in about ten minutes, and prints a table of the results.

    pip install -e '.[test,benchmarks,train]' && pip install xformers
    python benchmarks/gpu.py                       # exit code 1 if a check fails
    python benchmarks/gpu.py --only nccl attention
    python benchmarks/gpu.py --device cpu          # tests this script: tiny sizes, no GPU code

tests      pytest -m gpu
networks   run.py in float16 and bfloat16 against diffusers: the lowest ratio
training   train.py, SD 2 in bfloat16 against diffusers
attention  xformers against SDPA on the shapes of SD 2: the lowest and highest ratio
           (their outputs are compared by the tests)
offload    an image of SDXL at 1024 x 1024 in 8 GB of the GPU's memory: peak and estimate
nccl       one step of the demo's UNet with DistributedDataParallel: its gradients are compared with
           those of a step without; it runs on one GPU, too, where it initializes NCCL
trainer    scripts/train.py by torchrun on all GPUs

A check that exceeds its time limit is stopped; the others still run. Nothing is installed: a check
whose package is missing is skipped, and the table says so. With --device cpu, gloo replaces NCCL,
SDPA is compared with the formula in plain torch, and the tests are only collected.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import harness
import torch
import torch.distributed as dist
from harness import ROOT
from torch import nn
from torch.utils.benchmark import Timer

# (heads, queries, keys, features per head): attention of SD 2's UNet at 64x64, and of its VAE
ATTENTION_SHAPES = [
    (5, 4096, 4096, 64), (10, 1024, 1024, 64), (20, 256, 256, 64), (5, 4096, 77, 64),
    (1, 4096, 4096, 512),
]  # fmt: skip
TINY_ATTENTION_SHAPES = [(2, 64, 64, 16), (2, 64, 77, 16)]
MEMORY_LIMIT = 8e9  # bytes of the GPU, for the offloaded model
STEPS = 4  # sampling steps of the offloaded model
MAX_GRADIENT_ERROR = 1e-4  # relative L2, float32; kernels may sum in another order


def list_checks(device: str, folder: str) -> dict[str, tuple[list[str], int]]:
    """Return the command of each check, whose last line is its result, and its limit in seconds."""
    is_cpu = device == "cpu"
    torchrun = ["-m", "torch.distributed.run", "--standalone"]
    torchrun += [f"--nproc-per-node={2 if is_cpu else torch.cuda.device_count()}"]
    this_script = ["benchmarks/gpu.py", "--device", device, "--check"]
    networks = ["benchmarks/run.py", "--device", device]
    training = ["benchmarks/train.py", "--device", device]
    tests = ["-m", "pytest", "-q", "-m", "gpu", "tests"]
    trainer = ["scripts/train.py", "-t", "-l", folder, "--base", "configs/train/tiny.yaml"]
    trainer += ["lightning.trainer.max_steps=2", "lightning.callbacks.max_images=0"]
    if is_cpu:
        tests += ["--collect-only"]
        networks += ["--stage", "text", "--quick", "--rounds", "1", "--dtype", "bfloat16"]
        training += ["--size", "tiny", "--rounds", "1"]
    else:
        networks += ["--dtype", "float16", "bfloat16"]
        training += ["--size", "sd2", "--side", "64", "--dtype", "bfloat16"]
    return {
        "tests": (tests, 90),
        "networks": (networks, 200),
        "training": (training, 90),
        "attention": ([*this_script, "attention"], 60),
        "offload": ([*this_script, "offload"], 240),
        "nccl": ([*torchrun, *this_script, "nccl"], 60),
        "trainer": ([*torchrun, *trainer], 60),
    }


def main() -> None:
    parser = harness.make_plain_parser(__doc__)
    names = list(list_checks("cpu", ""))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="CHECK")
    parser.add_argument("--check", choices=list(CHECK_FUNCTIONS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.check:
        return CHECK_FUNCTIONS[args.check](device)
    is_cpu = args.device == "cpu"
    if not is_cpu and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --device cpu runs the checks at tiny sizes")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            print(f"== {name}", flush=True)
            rows.append((name, *run_check(*list_checks(args.device, folder)[name])))
    print(f"\n{'CPU: no GPU was tested' if is_cpu else torch.cuda.get_device_name()}")
    print(f"{'check':10} {'status':8} {'seconds':>7}  result")
    for name, status, seconds, last_line in rows:
        print(f"{name:10} {status:8} {seconds:7.0f}  {last_line}")
    if any(status == "FAILED" for _, status, *_ in rows):
        raise SystemExit(1)


def run_check(command: list[str], time_limit: int) -> tuple[str, float, str]:
    """Run a check and print its output; return its status, seconds and last line."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=harness.make_environment(ROOT),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=time_limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # including its workers
        output, _ = process.communicate()
        output += f"\nstopped after {time_limit} s"
    print(output, flush=True)
    seconds, last_line = time.perf_counter() - start, ["", *output.strip().splitlines()][-1]
    status = "skipped" if last_line.startswith("skipped") else "ok"
    return "FAILED" if process.returncode else status, seconds, last_line


@torch.no_grad()
def compare_attention(device: torch.device) -> None:
    """Time xformers against SDPA; on a CPU SDPA against the formula in plain torch."""
    from ldm.nets.attention import attention

    is_cpu = device.type == "cpu"
    backend, baseline = ("sdpa", "math") if is_cpu else ("xformers", "sdpa")
    if backend == "xformers" and not find_spec("xformers"):
        print("skipped: xformers is not installed")
        return
    ratios = []
    for dtype in [torch.float32] if is_cpu else [torch.float16, torch.bfloat16]:
        for heads, n, m, d in TINY_ATTENTION_SHAPES if is_cpu else ATTENTION_SHAPES:
            shapes = [(2, heads, n, d), (2, heads, m, d), (2, heads, m, d)]
            q, k, v = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
            seconds = {}
            for name in (backend, baseline):
                variables = {"attention": attention, "q": q, "k": k, "v": v, "name": name}
                timer = Timer("attention(q, k, v, backend=name)", globals=variables)
                seconds[name] = timer.blocked_autorange(min_run_time=0.5).median
            ratios.append(seconds[baseline] / seconds[backend])
            print(f"{dtype} {heads} x {n} x {m} x {d}: {ratios[-1]:.2f}")
    print(f"{baseline} / {backend} {min(ratios):.2f} to {max(ratios):.2f}")


def offload_model(device: torch.device) -> None:
    """Make an image with SDXL in 8 GB of GPU memory; on a CPU, with the demo model."""
    import ldm
    from ldm.pipelines.memory import estimate_memory

    is_cpu, size = device.type == "cpu", (1024, 1024)
    if is_cpu:
        model, size = ldm.load(), (64, 64)
    else:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(MEMORY_LIMIT / total, device)
        model = build_random_model(ROOT / "configs/stable-diffusion-xl/sd_xl_base.yaml")
    estimate = estimate_memory(model, size).with_offload / 2**30
    model.offload(device)
    for _ in range(2):  # the first run includes the initialization of CUDA
        start = time.perf_counter()
        ldm.txt2img(model, ["a"], size=size, steps=STEPS, seeds=0, scale=5.0)
        seconds = time.perf_counter() - start
    peak = 0.0 if is_cpu else torch.cuda.max_memory_allocated(device) / 2**30
    print(f"{seconds:.1f} s for {STEPS} steps, peak {peak:.2f} GiB, estimated {estimate:.2f}")


def build_random_model(config: Path) -> Any:
    """Build a model with random weights in float16, its autoencoder in bfloat16, on the CPU."""
    from make_checkpoint import draw_weights

    from ldm.loading.build import build_on_meta, fill_weights
    from ldm.loading.config import read_yaml
    from ldm.loading.legacy import translate_config

    model = build_on_meta(translate_config(read_yaml(config)), where=str(config))
    weights = draw_weights(model.state_dict(), torch.float16)
    fill_weights(model, weights, dtype=torch.float16, autoencoder_dtype=torch.bfloat16)
    return model.eval()


def train_distributed(device: torch.device) -> None:
    """Train one step on two samples per process; compare gradients with those of the full batch."""
    import ldm

    dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False
    unet: Any = ldm.load(device=device).unet.train().requires_grad_(True)
    torch.manual_seed(0)
    x, target = torch.randn(2, 2 * world_size, 4, 16, 16, device=device)
    t = torch.linspace(50, 950, len(x), device=device).long()
    context = torch.randn(len(x), 16, unet.context_dim, device=device)
    (unet(x, t, context) - target).square().mean().backward()
    expected_grads = [p.grad for p in unet.parameters()]
    unet.zero_grad()
    samples = slice(2 * rank, 2 * rank + 2)
    replica = nn.parallel.DistributedDataParallel(unet)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    output = replica(x[samples], t[samples], context[samples])
    (output - target[samples]).square().mean().backward()
    pairs = zip(unet.parameters(), expected_grads, strict=True)
    error_norm = nn.utils.get_total_norm([p.grad - grad for p, grad in pairs])
    error = (error_norm / nn.utils.get_total_norm(expected_grads)).item()
    optimizer.step()
    backend = dist.get_backend()
    dist.destroy_process_group()
    if not error <= MAX_GRADIENT_ERROR:
        raise SystemExit(f"gradients differ by {error:.1e}")
    if rank == 0:
        print(f"{backend}, {world_size} processes, gradients differ by {error:.1e}")


CHECK_FUNCTIONS = {
    "attention": compare_attention,
    "offload": offload_model,
    "nccl": train_distributed,
}


if __name__ == "__main__":
    main()

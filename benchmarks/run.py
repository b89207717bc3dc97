"""Time of our networks against diffusers' or another revision: same weights, same inputs.

    python benchmarks/run.py --quick                       # latents of 32x32: a minute
    python benchmarks/run.py --dtype float32 bfloat16      # latents of 64x64
    python benchmarks/run.py --stage load load-ckpt load-xl import --dtype float16
    python benchmarks/run.py --device cuda --dtype float16 bfloat16
    git worktree add /tmp/before main && python benchmarks/run.py --against /tmp/before

Networks have the sizes of Stable Diffusion 2 and random weights. Each implementation runs in its
own process. Outputs must agree: in float32 their difference is at most 1e-5 (relative L2); in 16
bits our error, relative to the baseline in float32, is at most 1.2 times the baseline's.
Measurements alternate: ours, the baseline, the baseline, ours …; `ratio` is the baseline's time
divided by ours, the median of pairs of measurements with its range.

Stages that end in -xl are networks of SDXL. In bfloat16 they need 20 GB: both processes hold the
UNet's weights, ours also in packed form. With `--one-at-a-time` they need half of that, or in
float32 as much: each turn starts a worker and makes three measurements.

`share` is our rate, the FLOP of a stage divided by its time, relative to that of the fastest large
matrix product of this machine in the same dtype, torch's or oneDNN's, which is printed first: the
median of all measurements with its range. The product's rate is measured for 1.5 s just before and
after each. It makes processors comparable, and may exceed 100 %, as Winograd convolution saves
multiplications.

A UNet runs as in sampling: ours transforms its weights and projects its context in the first call.
Text encoders run a prompt and its negative; `--prompts 64` as `ldm train` fills its caches.

With one thread, times are CPU times. `others` is the fraction of the CPUs that other processes use:
above 5 %, wall times are unreliable. On a GPU, memory is what torch allocated, and float32 is exact
(no TF32).
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import sdxl
import torch
import torch.nn.functional as F
from harness import ROOT, Implementation, Result, Worker
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

XL = "-xl"  # ends the stages of Stable Diffusion XL
SD2_NETWORKS = ("unet", "vae", "text")
NETWORKS = (*SD2_NETWORKS, *(f"{network}{XL}" for network in SD2_NETWORKS))
# The other stages -> the file that they load
FILES = {
    "load": "sd2.safetensors",
    "load-ckpt": "sd2.ckpt",
    f"load{XL}": "sdxl.safetensors",  # 6.9 GB
    "import": "",
}
CONFIG = ROOT / "configs/stable-diffusion/v2-inference.yaml"
# (worker, stage) of the networks that sampling calls many times, with cached weights
UNETS = [("ours", "unet"), ("ours", f"unet{XL}")]
# A processor may run a single call at a clock that it cannot sustain; networks run for seconds.
RATE_SECONDS = 1.5
MAX_DIFFERENCE = 1e-5  # in float32, relative L2
MAX_ERROR_RATIO = 1.2  # of our error to the baseline's, in 16 bits

Call = Callable[..., Any]


@dataclass(frozen=True)
class Product:
    """A matrix product on this machine."""

    name: str
    flop: int
    call: Call
    device: torch.device

    def measure_rate(self) -> float:
        """Return the FLOP per second, the median of the calls within RATE_SECONDS."""
        now = harness.choose_clock(self.device)
        seconds = list[float]()
        with torch.no_grad():
            self.call()
            while sum(seconds) < RATE_SECONDS:
                start = now()
                self.call()
                seconds.append(now() - start)
        return self.flop / statistics.median(seconds)


def main() -> None:
    dtypes = ["float32", "bfloat16", "float16"]
    parser = harness.make_parser(__doc__, dtypes=dtypes, threads=torch.get_num_threads())
    add = parser.add_argument
    add("--stage", nargs="+", choices=[*NETWORKS, *FILES], default=list(SD2_NETWORKS))
    add("--one-at-a-time", action="store_true", help="never hold both in memory")
    add("--prompts", type=int, default=2, help="prompts that a text encoder takes at once")
    add("--quick", action="store_true", help="small images, at most 2 rounds")
    add("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    harness.configure_torch(args)
    if args.worker:
        return run_worker(args)
    if args.quick:
        args.rounds = min(args.rounds, 2)
    print(harness.describe_machine(args), flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        for name in {"sd2.safetensors", *(FILES.get(stage) for stage in args.stage)} - {"", None}:
            file, config = args.folder / name, sdxl.CONFIG if "sdxl" in name else CONFIG
            options = ["--dtype", "float16", "--config", config]
            harness.run(ROOT, "benchmarks/make_checkpoint.py", file, *options)
            if "sdxl" in name:
                sdxl.write_configs(file)
        if args.against == "diffusers":
            harness.run(
                ROOT, "scripts/convert.py", args.folder / "sd2.safetensors", args.folder / "sd2"
            )
        for dtype in args.dtype:
            product = find_fastest_product(getattr(torch, dtype), args.device)
            rate = product.measure_rate()
            print(f"{dtype}: fastest matrix product {rate / 1e9:.0f} GFLOP/s ({product.name})")
            rows += [compare(args, stage, dtype, product) for stage in args.stage]
    harness.report(args, rows)


def compare(args: argparse.Namespace, stage: str, dtype: str, product: Product) -> dict[str, Any]:
    """Compare one stage in one dtype; print and return the row."""
    is_network, is_half = stage in NETWORKS, dtype != "float32"
    ours, baseline = harness.get_implementations(args)

    def start(implementation: Implementation, dtype: str = dtype) -> Worker:
        options = ["--stage", stage, "--dtype", dtype, "--folder", args.folder]
        options += ["--prompts", args.prompts]
        options += ["--quick"] if args.quick else []
        return Worker(implementation, Path(__file__), args, *options)

    def check(result: Result, other: Result) -> dict[str, float]:
        if not is_network:
            return {}
        x, y = read_output(result), read_output(other)
        if not is_half:
            errors, limit = {"error": measure_error(x, y)}, MAX_DIFFERENCE
        else:
            errors = {"error": measure_error(x, exact), "baseline_error": measure_error(y, exact)}
            limit = MAX_ERROR_RATIO * errors["baseline_error"]
        if not errors["error"] <= limit:
            raise SystemExit(f"{stage} {dtype}: error {errors['error']:.1e}, limit {limit:.1e}")
        return errors

    if is_network and is_half:
        worker = start(baseline, "float32")
        exact = read_output(worker.warm_up_result)
        worker.close()
    row: dict[str, Any] = {"stage": stage, "dtype": dtype}
    row |= harness.compare(
        start,
        (ours, baseline),
        check,
        rounds=args.rounds,
        both_fit=not args.one_at_a_time,
        measure_rate=product.measure_rate if is_network else None,
    )
    line = f"{stage:9} {dtype:8}  {harness.format_row(row)}"
    if is_network:
        row["flop"] = count_flop(stage, args)
        measurements = zip(row["seconds"][0], row["rates"], strict=True)
        row["shares"] = [row["flop"] / seconds / rate for seconds, rate in measurements]
        share, low, high = (f(row["shares"]) for f in (statistics.median, min, max))
        baseline_error = f" (baseline {row['baseline_error']:.1e})" if is_half else ""
        line += f"  error {row['error']:.1e}{baseline_error}"
        line += f"  {row['flop'] / 1e9:.0f} GFLOP  share {share:.0%} [{low:.0%}-{high:.0%}]"
    print(line, flush=True)
    return row


@torch.no_grad()
def run_worker(args: argparse.Namespace) -> None:
    """In the worker: call twice as a warm-up, write a network's output, serve timed calls."""
    (stage,), (name,), device = args.stage, args.dtype, args.device
    dtype, inputs, result = getattr(torch, name), list[Tensor](), Result()
    network, call = LOADERS[args.worker](stage, args.folder, dtype)
    if network is not None:
        network.to(device, dtype)
        inputs = [x.to(device) for x in make_example_inputs(stage, args)]
        inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    with cache_weights() if (args.worker, stage) in UNETS else nullcontext():
        call(*inputs)
        output = call(*inputs)
        if network is not None:
            with tempfile.NamedTemporaryFile(dir=args.folder, delete=False) as file:
                torch.save(output.double().cpu(), file)
            result["output"] = file.name
        del output
        harness.serve(result, lambda: call(*inputs), device)


def cache_weights() -> AbstractContextManager[None]:
    """Return the context in which sampling runs a UNet; older revisions have none."""
    from ldm.nets import cpu

    block: AbstractContextManager[None] = getattr(cpu, "cache_weights", nullcontext)()
    return block


def load_ours(stage: str, folder: Path, dtype: torch.dtype) -> tuple[nn.Module | None, Call]:
    """Return our network, if any, and the call to time."""
    import ldm  # public names only, as another revision may have no others

    if stage in NETWORKS and stage.endswith(XL):
        return sdxl.build_ours(stage.removesuffix(XL))
    if stage == "import":
        return None, lambda: run_python("import ldm; ldm.load; ldm.txt2img")
    file = folder / FILES.get(stage, "sd2.safetensors")
    if stage not in NETWORKS:
        config = sdxl.CONFIG if stage.endswith(XL) else CONFIG
        return None, lambda: ldm.load(config, file, dtype=dtype)
    model: Any = ldm.load(CONFIG, file, dtype=torch.float16)
    if stage == "vae":
        return model.autoencoder, model.autoencoder.decode
    network = model.unet if stage == "unet" else model.conditioner.text
    return network, network


def load_diffusers(stage: str, folder: Path, dtype: torch.dtype) -> tuple[nn.Module | None, Call]:
    """Return the network of diffusers or transformers, if any, and the call to time."""
    from diffusers import (
        AutoencoderKL,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel

    if stage in NETWORKS and stage.endswith(XL):
        return sdxl.build_diffusers(stage.removesuffix(XL))
    if stage == "import":
        return None, lambda: run_python("from diffusers import StableDiffusionPipeline")
    if stage not in NETWORKS:
        file = folder / FILES[stage]
        options: dict[str, Any] = {"config": str(file.with_suffix("")), "local_files_only": True}
        pipeline_class: Any = StableDiffusionXLPipeline
        if not stage.endswith(XL):
            pipeline_class, options["safety_checker"] = StableDiffusionPipeline, None
        from_file: Call = pipeline_class.from_single_file
        return None, lambda: from_file(str(file), torch_dtype=dtype, **options)
    component, network_class = {
        "unet": ("unet", UNet2DConditionModel),
        "vae": ("vae", AutoencoderKL),
        "text": ("text_encoder", CLIPTextModel),
    }[stage]
    network: Any = network_class.from_pretrained(
        folder / "sd2", subfolder=component, torch_dtype=torch.float16
    )
    if stage == "text":
        return network, lambda tokens: network(tokens).last_hidden_state
    call = network.decode if stage == "vae" else network
    return network, lambda *inputs: call(*inputs, return_dict=False)[0]


LOADERS = {"ours": load_ours, "diffusers": load_diffusers}


def run_python(code: str) -> None:
    """Run Python code in a new process."""
    subprocess.run([sys.executable, "-c", code], check=True)


def read_output(result: Result) -> Tensor:
    """Read the output that a worker wrote."""
    output: Tensor = torch.load(result["output"], weights_only=True)
    return output


def make_example_inputs(stage: str, args: argparse.Namespace) -> list[Tensor]:
    """Return the inputs of a stage; a UNet's batch of 2 is one image with guidance."""
    torch.manual_seed(0)
    side = 32 if args.quick else 64
    if stage.endswith(XL):
        name = stage.removesuffix(XL)
        return sdxl.make_example_inputs(name, 2 * side if name == "vae" else side, args.prompts)
    if stage == "unet":
        return [torch.randn(2, 4, side, side), torch.tensor([500, 500]), torch.randn(2, 77, 1024)]
    if stage == "vae":
        return [torch.randn(1, 4, side, side)]
    return [torch.randint(1, 49405, (args.prompts, 77))]


def count_flop(stage: str, args: argparse.Namespace) -> int:
    """Count the floating point operations of a stage, on the meta device: nothing is computed."""
    network, call = load_ours(stage, args.folder, torch.float32)
    assert network is not None
    network.to("meta", torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(*(x.to("meta") for x in make_example_inputs(stage, args)))
    return counter.get_total_flops()


@torch.no_grad()
def find_fastest_product(dtype: torch.dtype, device: torch.device) -> Product:
    """Measure large matrix products, and return the fastest.

    On a CPU these are torch's product (MKL or another BLAS), and oneDNN's as a 1x1 convolution.
    """
    is_cpu = device.type == "cpu"
    products = []
    for m, n, k in [(2048, 2048, 2048), (8192, 1024, 1024)] if is_cpu else [(8192, 8192, 8192)]:
        x = torch.randn(m, k, device=device, dtype=dtype)
        weight = torch.randn(n, k, device=device, dtype=dtype)
        image, kernel = x.view(1, 1, m, k).permute(0, 3, 1, 2), weight[:, :, None, None]
        calls: dict[str, Call] = {"torch's": lambda x=x, w=weight: F.linear(x, w)}
        if is_cpu:
            calls["oneDNN's"] = lambda x=image, w=kernel: F.conv2d(x, w)
        products += [
            Product(f"{name}, {m} x {k} by {k} x {n}", 2 * m * n * k, call, device)
            for name, call in calls.items()
        ]
    return max(products, key=lambda product: product.measure_rate())


def measure_error(x: Tensor, y: Tensor) -> float:
    """Compute the relative L2 error of x against y."""
    return ((x - y).norm() / y.norm()).item()


if __name__ == "__main__":
    main()

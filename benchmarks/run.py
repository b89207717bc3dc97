"""Time of our networks against diffusers' or another revision's: same weights, same inputs.

    python benchmarks/run.py --quick                       # latents of 32x32: a minute
    python benchmarks/run.py --dtype float32 bfloat16      # latents of 64x64
    python benchmarks/run.py --stage load load-ckpt load-xl import --dtype float16
    python benchmarks/run.py --device cuda --dtype float16 bfloat16
    git worktree add /tmp/before main && python benchmarks/run.py --against /tmp/before

Networks have the sizes of Stable Diffusion 2 and random weights. Each implementation runs in its
own process. Outputs must agree: in float32 they differ by at most 1e-5 (relative L2); in 16 bits
our error, relative to the baseline in float32, is at most 1.2 times that of the baseline in 16
bits. Measurements alternate: ours, the baseline, the baseline, ours …; `ratio` is the baseline's
time divided by ours: the median over pairs of measurements, and the range.

Stages that end with -xl are networks of SDXL. In bfloat16 they need 20 GB: both processes hold the
UNet's weights, ours also in packed form. `--one-at-a-time` halves that, so that float32 needs 20
GB: each turn then starts a worker and makes three measurements.

`share` compares processors: it is our rate, the FLOP of a stage divided by its time, relative to
the rate of the machine's fastest large matrix product in the same dtype, torch's or oneDNN's, which
is printed first. It is the median of all measurements, followed by the range. The product's rate is
measured for 1.5 s before and after each measurement. `share` may exceed 100 %, as Winograd
convolution saves multiplications.

A UNet runs as in sampling: ours transforms its weights and projects its context in the first call.
Text encoders encode a prompt and a negative prompt, or with `--prompts 64` a batch as large as that
of `ldm train` when it fills its caches.

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
from harness import ROOT, Implementation, WarmUpResult, Worker
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

SDXL_SUFFIX = "-xl"  # of the stages of Stable Diffusion XL
SD2_NETWORKS = ("unet", "vae", "text")
NETWORKS = (*SD2_NETWORKS, *(f"{network}{SDXL_SUFFIX}" for network in SD2_NETWORKS))
# Stage that is not a network -> the file that it loads
FILES = {
    "load": "sd2.safetensors",
    "load-ckpt": "sd2.ckpt",
    f"load{SDXL_SUFFIX}": "sdxl.safetensors",  # 6.9 GB
    "import": "",
}
SD2_CONFIG = ROOT / "configs/stable-diffusion/v2-inference.yaml"
# (worker, stage) of the networks that are run with cached weights, as in sampling
CACHED_UNETS = [("ours", "unet"), ("ours", f"unet{SDXL_SUFFIX}")]
# Networks run for seconds, but a processor may run a short call at a clock that it cannot sustain.
MIN_RATE_SECONDS = 1.5
MAX_DIFFERENCE = 1e-5  # in float32, relative L2
MAX_ERROR_RATIO = 1.2  # our error divided by the baseline's, in 16 bits

Call = Callable[..., Any]


@dataclass(frozen=True)
class MatrixProduct:
    """A matrix product on this machine."""

    name: str
    flop: int
    call: Call
    device: torch.device

    def measure_rate(self) -> float:
        """Return the FLOP per second: the median over calls during MIN_RATE_SECONDS."""
        now = harness.choose_clock(self.device)
        seconds: list[float] = []
        with torch.no_grad():
            self.call()
            while sum(seconds) < MIN_RATE_SECONDS:
                start = now()
                self.call()
                seconds.append(now() - start)
        return self.flop / statistics.median(seconds)


def main() -> None:
    dtypes = ["float32", "bfloat16", "float16"]
    parser = harness.make_parser(__doc__, dtypes=dtypes, threads=torch.get_num_threads())
    add = parser.add_argument
    add("--stage", nargs="+", choices=[*NETWORKS, *FILES], default=list(SD2_NETWORKS))
    add("--one-at-a-time", action="store_true", help="never hold both networks in memory")
    add("--prompts", type=int, default=2, help="batch size of text encoders")
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
            path, config = args.folder / name, sdxl.CONFIG if "sdxl" in name else SD2_CONFIG
            flags = ["--dtype", "float16", "--config", config]
            harness.run_python(ROOT, "benchmarks/make_checkpoint.py", path, *flags)
            if "sdxl" in name:
                sdxl.write_configs(path)
        if args.against == "diffusers":
            paths = args.folder / "sd2.safetensors", args.folder / "sd2"
            harness.run_python(ROOT, "scripts/convert.py", *paths)
        for dtype in args.dtype:
            product = find_fastest_product(getattr(torch, dtype), args.device)
            rate = product.measure_rate()
            print(f"{dtype}: fastest matrix product {rate / 1e9:.0f} GFLOP/s ({product.name})")
            rows += [compare(args, stage, dtype, product) for stage in args.stage]
    harness.report(args, rows)


def compare(
    args: argparse.Namespace, stage: str, dtype: str, product: MatrixProduct
) -> dict[str, Any]:
    """Compare one stage in one dtype; print and return its row."""
    is_network, is_16_bit = stage in NETWORKS, dtype != "float32"
    implementations = harness.get_implementations(args)

    def start_worker(implementation: Implementation, dtype: str = dtype) -> Worker:
        flags = ["--stage", stage, "--dtype", dtype, "--folder", args.folder]
        flags += ["--prompts", args.prompts, *(["--quick"] if args.quick else [])]
        return Worker(implementation, Path(__file__), args, *flags)

    def compare_results(ours: WarmUpResult, baseline: WarmUpResult) -> dict[str, float]:
        if not is_network:
            return {}
        x, y = read_output(ours), read_output(baseline)
        if not is_16_bit:
            errors, limit = {"error": measure_error(x, y)}, MAX_DIFFERENCE
        else:
            errors = {
                "error": measure_error(x, float32_output),
                "baseline_error": measure_error(y, float32_output),
            }
            limit = MAX_ERROR_RATIO * errors["baseline_error"]
        if not errors["error"] <= limit:
            raise SystemExit(f"{stage} {dtype}: error {errors['error']:.1e}, limit {limit:.1e}")
        return errors

    if is_network and is_16_bit:
        worker = start_worker(implementations[1], "float32")
        float32_output = read_output(worker.warm_up_result)
        worker.close()
    row: dict[str, Any] = {"stage": stage, "dtype": dtype}
    row |= harness.compare(
        start_worker,
        implementations,
        compare_results,
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
        baseline_error = f" (baseline {row['baseline_error']:.1e})" if is_16_bit else ""
        line += f"  error {row['error']:.1e}{baseline_error}"
        line += f"  {row['flop'] / 1e9:.0f} GFLOP  share {share:.0%} [{low:.0%}-{high:.0%}]"
    print(line, flush=True)
    return row


@torch.no_grad()
def run_worker(args: argparse.Namespace) -> None:
    """In the worker process: call twice as a warm-up, write a network's output, serve calls."""
    (stage,), (dtype_name,), device = args.stage, args.dtype, args.device
    dtype, inputs, result = getattr(torch, dtype_name), list[Tensor](), WarmUpResult()
    network, call = LOADERS[args.worker](stage, args.folder, dtype)
    if network is not None:
        network.to(device, dtype)
        inputs = [x.to(device) for x in make_example_inputs(stage, args)]
        inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    with cache_weights() if (args.worker, stage) in CACHED_UNETS else nullcontext():
        call(*inputs)
        output = call(*inputs)
        if network is not None:
            with tempfile.NamedTemporaryFile(dir=args.folder, delete=False) as file:
                torch.save(output.double().cpu(), file)
            result["output"] = file.name
        del output
        harness.serve(result, lambda: call(*inputs), device)


def cache_weights() -> AbstractContextManager[None]:
    """Return the context in which sampling runs a UNet, which older revisions do not have."""
    from ldm.nets import cpu

    context: AbstractContextManager[None] = getattr(cpu, "cache_weights", nullcontext)()
    return context


def load_ours(stage: str, folder: Path, dtype: torch.dtype) -> tuple[nn.Module | None, Call]:
    """Return our network, if the stage is one, and the call to time."""
    import ldm  # only public names, as another revision may not have the others

    if stage in NETWORKS and stage.endswith(SDXL_SUFFIX):
        return sdxl.build_ours(stage.removesuffix(SDXL_SUFFIX))
    if stage == "import":
        return None, lambda: run_code("import ldm; ldm.load; ldm.txt2img")
    path = folder / FILES.get(stage, "sd2.safetensors")
    if stage not in NETWORKS:
        config = sdxl.CONFIG if stage.endswith(SDXL_SUFFIX) else SD2_CONFIG
        return None, lambda: ldm.load(config, path, dtype=dtype)
    model: Any = ldm.load(SD2_CONFIG, path, dtype=torch.float16)
    if stage == "vae":
        return model.autoencoder, model.autoencoder.decode
    network = model.unet if stage == "unet" else model.conditioner.text
    return network, network


def load_diffusers(stage: str, folder: Path, dtype: torch.dtype) -> tuple[nn.Module | None, Call]:
    """Return the network of diffusers or transformers, as `load_ours`, and the call to time."""
    from diffusers import (
        AutoencoderKL,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel

    if stage in NETWORKS and stage.endswith(SDXL_SUFFIX):
        return sdxl.build_diffusers(stage.removesuffix(SDXL_SUFFIX))
    if stage == "import":
        return None, lambda: run_code("from diffusers import StableDiffusionPipeline")
    if stage not in NETWORKS:
        path = folder / FILES[stage]
        options: dict[str, Any] = {"config": str(path.with_suffix("")), "local_files_only": True}
        pipeline_class: Any = StableDiffusionXLPipeline
        if not stage.endswith(SDXL_SUFFIX):
            pipeline_class, options["safety_checker"] = StableDiffusionPipeline, None
        load_pipeline: Call = pipeline_class.from_single_file
        return None, lambda: load_pipeline(str(path), torch_dtype=dtype, **options)
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


def run_code(code: str) -> None:
    """Run Python code in a new process."""
    subprocess.run([sys.executable, "-c", code], check=True)


def read_output(result: WarmUpResult) -> Tensor:
    """Read the output that a worker has written."""
    output: Tensor = torch.load(result["output"], weights_only=True)
    return output


def make_example_inputs(stage: str, args: argparse.Namespace) -> list[Tensor]:
    """Return the inputs of a stage; a UNet's batch of 2 is one image with guidance."""
    torch.manual_seed(0)
    side = 32 if args.quick else 64
    if stage.endswith(SDXL_SUFFIX):
        name = stage.removesuffix(SDXL_SUFFIX)
        return sdxl.make_example_inputs(name, 2 * side if name == "vae" else side, args.prompts)
    if stage == "unet":
        return [torch.randn(2, 4, side, side), torch.tensor([500, 500]), torch.randn(2, 77, 1024)]
    if stage == "vae":
        return [torch.randn(1, 4, side, side)]
    return [torch.randint(1, 49405, (args.prompts, 77))]


def count_flop(stage: str, args: argparse.Namespace) -> int:
    """Count the floating-point operations of a stage, on the meta device: nothing is computed."""
    network, call = load_ours(stage, args.folder, torch.float32)
    assert network is not None
    network.to("meta", torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(*(x.to("meta") for x in make_example_inputs(stage, args)))
    return counter.get_total_flops()


@torch.no_grad()
def find_fastest_product(dtype: torch.dtype, device: torch.device) -> MatrixProduct:
    """Measure large matrix products, and return the fastest.

    On a CPU these are torch's (MKL or another BLAS), and oneDNN's as 1x1 convolutions.
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
            MatrixProduct(f"{name}, {m} x {k} by {k} x {n}", 2 * m * n * k, call, device)
            for name, call in calls.items()
        ]
    return max(products, key=lambda product: product.measure_rate())


def measure_error(x: Tensor, y: Tensor) -> float:
    """Compute the L2 error of x relative to y."""
    return ((x - y).norm() / y.norm()).item()


if __name__ == "__main__":
    main()

"""Time of a Stable Diffusion 1.5 image in 25 steps, in 4, and in 4 with TAESD, against diffusers.

    python benchmarks/few_steps.py                        # 512 x 512, float32, two threads
    python benchmarks/few_steps.py --dtype bfloat16 --rounds 2

Networks have their published sizes and random weights: both implementations read one temporary
diffusers folder (4.3 GB in float32), and take turns in one process. Times include the text encoder,
decoding and conversion to 8 bits, but not loading. `ratio` is the median time of diffusers divided
by ours, followed by the range over the rounds.
"""

import argparse
import gc
import statistics
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from harness import ROOT

PROMPT = "a fox in the snow, oil painting"


@dataclass(frozen=True)
class Case:
    """A row of the table: the settings of an image.

    Args:
        uses_taesd: Whether TAESD decodes the latent, instead of the VAE.
    """

    title: str
    sampler: str
    scheduler: str
    steps: int
    scale: float
    uses_taesd: bool = False


CASES = (
    Case("25 steps DPM++ 2M Karras, scale 7.5", "dpmpp_2m", "karras", 25, 7.5),
    Case("4 steps LCM, scale 1", "lcm", "lcm", 4, 1.0),
    Case("4 steps LCM, scale 1, TAESD", "lcm", "lcm", 4, 1.0, uses_taesd=True),
)


def main() -> None:
    parser = harness.make_plain_parser(__doc__)
    add = parser.add_argument
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--side", type=int, default=512, help="height and width in pixels (%(default)s)")
    add("--rounds", type=int, default=3, help="images of each implementation (%(default)s)")
    add("--threads", type=int, default=2)
    indices = range(len(CASES))
    add("--rows", type=int, nargs="+", choices=indices, default=indices, help="table rows (all)")
    add("--config", default=ROOT / "configs/stable-diffusion/v1-inference.yaml")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {args.threads} threads, {args.dtype}, side {args.side}")
    print(f"{'':38} {'ours':>8} {'diffusers':>10}   ratio")
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), args)
        for index in args.rows:
            print(run_case(CASES[index], Path(folder), args), flush=True)
            gc.collect()  # frees both models before the next ones are loaded


def write_models(folder: Path, args: argparse.Namespace) -> None:
    """Write a diffusers folder `sd1` and one of TAESD, `taesd`."""
    from diffusers import AutoencoderTiny

    path, flags = folder / "sd1.safetensors", ("--config", args.config, "--dtype", args.dtype)
    harness.run_python(ROOT, "benchmarks/make_checkpoint.py", path, *flags)
    command = ["scripts/convert.py", path, folder / "sd1", "--config", args.config]
    harness.run_python(ROOT, *command)
    path.unlink()
    torch.manual_seed(0)
    AutoencoderTiny().save_pretrained(folder / "taesd")


@torch.inference_mode()
def run_case(case: Case, folder: Path, args: argparse.Namespace) -> str:
    """Return the table row of a case: both median times, their ratio and its range."""
    image_functions = [load(case, folder, args) for load in (load_ours, load_diffusers)]
    for make_image in image_functions:
        make_image(1)  # warm-up
    functions = [partial(make_image, case.steps) for make_image in image_functions]
    times = harness.measure_alternating(functions, args.rounds, torch.device("cpu"))
    ours, baseline = map(statistics.median, times)
    ratios = sorted(theirs / our_time for our_time, theirs in zip(*times, strict=True))
    ratio_range = f"{ratios[0]:.2f} … {ratios[-1]:.2f}"
    return f"{case.title:38} {ours:7.1f}s {baseline:9.1f}s   {baseline / ours:.2f} ({ratio_range})"


def load_ours(case: Case, folder: Path, args: argparse.Namespace) -> Callable[[int], object]:
    """Load the model; return a function (number of steps) -> image."""
    import ldm
    from ldm.imaging.pixels import to_pil

    vae = folder / "taesd" if case.uses_taesd else None
    model = ldm.load(ckpt=folder / "sd1", dtype=getattr(torch, args.dtype), vae=vae)
    options: dict[str, Any] = {
        "size": (args.side, args.side), "sampler": case.sampler, "scheduler": case.scheduler,
        "scale": case.scale, "seeds": 0,
    }  # fmt: skip
    return lambda steps: to_pil(ldm.txt2img(model, [PROMPT], steps=steps, **options))


def load_diffusers(case: Case, folder: Path, args: argparse.Namespace) -> Callable[[int], object]:
    """Load the pipeline of diffusers; return a function (number of steps) -> image."""
    from diffusers import (
        AutoencoderTiny,
        DPMSolverMultistepScheduler,
        LCMScheduler,
        StableDiffusionPipeline,
    )
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype = getattr(torch, args.dtype)
    pipeline_class: Any = StableDiffusionPipeline
    pipe = pipeline_class.from_pretrained(folder / "sd1", torch_dtype=dtype, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    if case.sampler == "lcm":
        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    else:
        config = pipe.scheduler.config
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True)
    if case.uses_taesd:
        pipe.vae = AutoencoderTiny.from_pretrained(folder / "taesd", torch_dtype=dtype)
    options = {"height": args.side, "width": args.side, "guidance_scale": case.scale}
    return lambda steps: pipe(PROMPT, num_inference_steps=steps, **options).images


if __name__ == "__main__":
    main()

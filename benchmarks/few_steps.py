"""Times an image of Stable Diffusion 1.5 by 25 steps, by 4, and by 4 with TAESD, beside diffusers.

    python benchmarks/few_steps.py                        # 512 x 512, float32, two threads
    python benchmarks/few_steps.py --dtype bfloat16 --rounds 2

Weights are random, of the true sizes: both sides read one temporary diffusers folder (float32:
4.3 GB), and take turns in one process. Text encoder, decoding and conversion to 8 bits
are in the time, loading is not. The ratio is that of the medians, with its range over the rounds.
"""

import argparse
import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from harness import ROOT

PROMPT = "a fox in the snow, oil painting"


@dataclass(frozen=True)
class Row:
    """A way to make an image."""

    title: str
    sampler: str
    scheduler: str
    steps: int
    scale: float
    tiny: bool = False


ROWS = (
    Row("25 steps DPM++ 2M Karras, scale 7.5", "dpmpp_2m", "karras", 25, 7.5),
    Row("4 steps LCM, scale 1", "lcm", "lcm", 4, 1.0),
    Row("4 steps LCM, scale 1, TAESD", "lcm", "lcm", 4, 1.0, tiny=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--side", type=int, default=512, help="of the image, in pixels (%(default)s)")
    add("--rounds", type=int, default=3, help="images of each side and row (%(default)s)")
    add("--threads", type=int, default=2)
    add("--rows", type=int, nargs="+", default=list(range(len(ROWS))), help="which: 0 … 2 (all)")
    add("--config", default=ROOT / "configs/stable-diffusion/v1-inference.yaml")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {args.threads} threads, {args.dtype}, side {args.side}")
    print(f"{'':38} {'ours':>8} {'diffusers':>10}   ratio")
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), args)
        for index in args.rows:
            print(compare(ROWS[index], Path(folder), args), flush=True)


def write_models(folder: Path, args: argparse.Namespace) -> None:
    """Writes a diffusers folder `sd1` and one of TAESD, `taesd`."""
    from diffusers import AutoencoderTiny

    file, options = folder / "sd1.safetensors", ("--config", args.config, "--dtype", args.dtype)
    harness.run(ROOT, "benchmarks/make_checkpoint.py", file, *options)
    convert = ["scripts/convert.py", file, folder / "sd1", "--config", args.config]
    harness.run(ROOT, *convert)
    file.unlink()
    torch.manual_seed(0)
    AutoencoderTiny().save_pretrained(folder / "taesd")


@torch.inference_mode()
def compare(row: Row, folder: Path, args: argparse.Namespace) -> str:
    """Returns the line of a row: medians of both sides, and their ratio with its range."""
    makers = [make(row, folder, args) for make in (ours, diffusers)]
    for make_image in makers:
        make_image(1)  # warm-up
    times: list[list[float]] = [[], []]
    for _ in range(args.rounds):
        for samples, make_image in zip(times, makers, strict=True):
            start = time.perf_counter()
            make_image(row.steps)
            samples.append(time.perf_counter() - start)
    makers.clear()
    gc.collect()
    own, other = map(statistics.median, times)
    ratios = sorted(theirs / mine for mine, theirs in zip(*times, strict=True))
    spread = f"{ratios[0]:.2f} … {ratios[-1]:.2f}"
    return f"{row.title:38} {own:7.1f}s {other:9.1f}s   {other / own:.2f} ({spread})"


def ours(row: Row, folder: Path, args: argparse.Namespace) -> Callable[[int], object]:
    """Returns what makes an image in a number of steps by this package."""
    import ldm
    from ldm.imaging.pixels import to_pil

    vae = folder / "taesd" if row.tiny else None
    model = ldm.load(ckpt=folder / "sd1", dtype=getattr(torch, args.dtype), vae=vae)
    options: dict[str, Any] = {
        "size": (args.side, args.side), "sampler": row.sampler, "scheduler": row.scheduler,
        "scale": row.scale, "seeds": 0,
    }  # fmt: skip
    return lambda steps: to_pil(ldm.txt2img(model, [PROMPT], steps=steps, **options))


def diffusers(row: Row, folder: Path, args: argparse.Namespace) -> Callable[[int], object]:
    """Returns what makes an image in a number of steps by diffusers."""
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
    kind: Any = StableDiffusionPipeline
    pipe: Any = kind.from_pretrained(folder / "sd1", torch_dtype=dtype, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    if row.sampler == "lcm":
        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    else:
        config = pipe.scheduler.config
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True)
    if row.tiny:
        pipe.vae = AutoencoderTiny.from_pretrained(folder / "taesd", torch_dtype=dtype)
    options = {"height": args.side, "width": args.side, "guidance_scale": row.scale}
    return lambda steps: pipe(PROMPT, num_inference_steps=steps, **options).images


if __name__ == "__main__":
    main()

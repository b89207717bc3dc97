"""Runs every model family at its published size on the CPU, from checkpoint to image.

    python benchmarks/full_size.py                         # all families, fp16 files
    python benchmarks/full_size.py depth unclip-l --precision full --steps 4
    python benchmarks/full_size.py upscaler --side 512     # 512 to 2048, in tiles
    python benchmarks/full_size.py sdxl --side 256 --precision fp16    # base and refiner

Random weights are written to temporary files (2 to 7 GB) in the original's layout; then the
family's script reads them in a new process, and its image must have the expected size and not be
blank. `peak` is the peak resident memory of that process, including memory-mapped files: of the
13.1 GiB for base and refiner of SDXL in fp16, only 1.4 GiB are allocated by the process. Unknown
flags are passed to the script.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import harness
import numpy as np
from harness import ROOT
from make_checkpoint import KARLO_PRIOR
from PIL import Image

INPUT, DEPTH = "input.png", "depth.png"
REFINER, UPSCALER = "refiner.safetensors", "x2.safetensors"
INIT_IMAGE_FLAGS = ("--init-img", INPUT)
MASK_FLAGS = (*INIT_IMAGE_FLAGS, "--mask-box", "128,128,384,384")
REFINER_FLAGS = ("--refiner", REFINER)
UPSCALER_FLAGS = ("--upscaler", UPSCALER)
KARLO_FLAGS = (*INIT_IMAGE_FLAGS, "--prior", KARLO_PRIOR)


@dataclass(frozen=True)
class Case:
    """A run of one family.

    Args:
        input_side: Height and width in pixels of the input image; of the base image for txt2img.
        upscaling: Factor between the output's and the input's side.
    """

    script: str
    config: str
    flags: tuple[str, ...] = ()
    input_side: int = 512
    upscaling: int = 1


CASES = {
    "sd2": Case("txt2img", "v2-inference"),
    "sd2-v": Case("txt2img", "v2-inference-v", input_side=768),
    "img2img": Case("img2img", "v2-inference", INIT_IMAGE_FLAGS),
    "inpainting": Case("inpaint", "v2-inpainting-inference", MASK_FLAGS),
    "depth": Case("depth2img", "v2-midas-inference", INIT_IMAGE_FLAGS),
    "upscaler": Case("upscale", "x4-upscaling", INIT_IMAGE_FLAGS, 128, 4),
    "x2": Case("upscale", "x2-latent-upscaler", INIT_IMAGE_FLAGS, 512, 2),
    "sd1-x2": Case("txt2img", "v1-inference", UPSCALER_FLAGS, 512, 2),
    "unclip-h": Case("unclip", "v2-1-stable-unclip-h-inference", INIT_IMAGE_FLAGS, 768),
    "unclip-l": Case("unclip", "v2-1-stable-unclip-l-inference", KARLO_FLAGS, 768),
    "sdxl": Case("txt2img", "sd_xl_base", REFINER_FLAGS, 1024),
    "sd1": Case("txt2img", "v1-inference"),
    "ldm3d": Case("txt2img", "ldm3d"),
    "ldm3d-4c": Case("txt2img", "ldm3d-4c"),
    "ldm3d-sr": Case("upscale", "ldm3d-sr", (*INIT_IMAGE_FLAGS, "--depth", DEPTH), 256, 2),
    "sd1-inpainting": Case("inpaint", "v1-inpainting-inference", MASK_FLAGS),
    "sd1-variation": Case("unclip", "v1-image-variation-inference", INIT_IMAGE_FLAGS),
}


def main() -> None:
    parser = harness.make_plain_parser(__doc__)
    add = parser.add_argument
    add("family", nargs="*", help=f"{', '.join(CASES)} (default: all)")
    add("--steps", type=int, default=2, help="sampling steps (%(default)s)")
    add("--precision", default="autocast", help="the scripts' flag (%(default)s)")
    add("--side", type=int, help="height and width of the input image (by family)")
    args, script_flags = parser.parse_known_args()
    args.script_flags = script_flags
    for name in args.family:
        if name not in CASES:
            parser.error(f"unknown family `{name}`, choose among {', '.join(CASES)}")
    print(f"{'family':15} {'file GB':>8} {'side':>5} {'seconds':>8} {'CPU s':>7} {'peak GiB':>9}")
    for name in args.family or CASES:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{name:15} {run_family(name, args, Path(folder))}", flush=True)


def run_family(name: str, args: argparse.Namespace, folder: Path) -> str:
    """Run one family; return its table row.

    Raises:
        SystemExit: The script fails, or its image has another size or is blank.
    """
    case, checkpoint = CASES[name], folder / "model.safetensors"
    config = find_config(case.config)
    write_checkpoint(checkpoint, config, *(["--karlo"] if case.flags == KARLO_FLAGS else []))
    if case.flags == REFINER_FLAGS:
        write_checkpoint(folder / REFINER, find_config("sd_xl_refiner"))
    if case.flags == UPSCALER_FLAGS:
        write_checkpoint(folder / UPSCALER, find_config("x2-latent-upscaler"))
    input_side = args.side or case.input_side
    side = input_side * case.upscaling
    noise = np.random.default_rng(0).integers(0, 256, (input_side, input_side, 3), np.uint8)
    Image.fromarray(noise).save(folder / INPUT)
    Image.fromarray(noise[..., 0]).save(folder / DEPTH)
    flags = ["--config", config, "--ckpt", checkpoint, "--outdir", folder, "--n_samples", 1]
    flags += ["--n_iter", 1, "--steps", args.steps, "--precision", args.precision, *case.flags]
    if case.script in ("txt2img", "unclip"):
        flags += ["--H", input_side, "--W", input_side]
    command = [ROOT / f"scripts/{case.script}.py", *flags, "--skip_grid", *args.script_flags]
    seconds, cpu_seconds, peak = harness.run_python(ROOT, *command, folder=folder)
    with Image.open(folder / "samples/00000.png") as image:
        pixels = np.asarray(image.convert("RGB"), np.float32)
    if pixels.shape != (side, side, 3) or not pixels.std():
        raise SystemExit(f"{name}: image of {pixels.shape}, std {pixels.std()}; expected {side}")
    gigabytes = checkpoint.stat().st_size / 1e9
    return f"{gigabytes:8.2f} {side:5} {seconds:8.0f} {cpu_seconds:7.0f} {peak:9.2f}"


def find_config(name: str) -> Path:
    (path,) = ROOT.glob(f"configs/stable-diffusion*/{name}.yaml")
    return path


def write_checkpoint(path: Path, config: Path, *flags: str) -> None:
    """Write a checkpoint of random weights in float16."""
    command = ["benchmarks/make_checkpoint.py", path, "--dtype", "float16", "--config", config]
    harness.run_python(ROOT, *command, *flags)


if __name__ == "__main__":
    main()

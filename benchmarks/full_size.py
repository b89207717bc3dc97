"""Every model family at its published size on the CPU: checkpoint, script, image.

    python benchmarks/full_size.py                         # all families, fp16 files
    python benchmarks/full_size.py depth unclip-l --precision full --steps 4
    python benchmarks/full_size.py upscaler --side 512     # 512 to 2048, in tiles
    python benchmarks/full_size.py sdxl --side 256 --precision fp16    # base and refiner

Random weights are written to temporary files (2 to 7 GB) in the original's layout; then the
family's script runs on them in a new process, and its image must have the expected size and not be
blank. `peak` is the largest resident size of that process, memory-mapped files included: of the
13.1 GiB for base and refiner of SDXL in fp16, 1.4 GiB are memory of the process. Unknown flags are
passed to the script.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import harness
import numpy as np
from harness import ROOT
from PIL import Image

INPUT, DEPTH = "input.png", "depth.png"
INIT_IMAGE = ("--init-img", INPUT)
MASK = (*INIT_IMAGE, "--mask-box", "128,128,384,384")
REFINER = ("--refiner", "refiner.safetensors")
UPSCALER = ("--upscaler", "x2.safetensors")
KARLO = ("--prior", "prior-ckpt-step=01000000-of-01000000.ckpt")


@dataclass(frozen=True)
class Case:
    """A run of one family.

    Args:
        input_side: Height and width of the input or, without one, of the output, in pixels.
        scale: Size of the output relative to the input.
    """

    script: str
    config: str
    flags: tuple[str, ...] = ()
    input_side: int = 512
    scale: int = 1


CASES = {
    "sd2": Case("txt2img", "v2-inference"),
    "sd2-v": Case("txt2img", "v2-inference-v", input_side=768),
    "img2img": Case("img2img", "v2-inference", INIT_IMAGE),
    "inpainting": Case("inpaint", "v2-inpainting-inference", MASK),
    "depth": Case("depth2img", "v2-midas-inference", INIT_IMAGE),
    "upscaler": Case("upscale", "x4-upscaling", INIT_IMAGE, 128, 4),
    "x2": Case("upscale", "x2-latent-upscaler", INIT_IMAGE, 512, 2),
    "sd1-x2": Case("txt2img", "v1-inference", UPSCALER, 512, 2),
    "unclip-h": Case("unclip", "v2-1-stable-unclip-h-inference", INIT_IMAGE, 768),
    "unclip-l": Case("unclip", "v2-1-stable-unclip-l-inference", (*INIT_IMAGE, *KARLO), 768),
    "sdxl": Case("txt2img", "sd_xl_base", REFINER, 1024),
    "sd1": Case("txt2img", "v1-inference"),
    "ldm3d": Case("txt2img", "ldm3d"),
    "ldm3d-4c": Case("txt2img", "ldm3d-4c"),
    "ldm3d-sr": Case("upscale", "ldm3d-sr", (*INIT_IMAGE, "--depth", DEPTH), 256, 2),
    "sd1-inpainting": Case("inpaint", "v1-inpainting-inference", MASK),
    "sd1-variation": Case("unclip", "v1-image-variation-inference", INIT_IMAGE),
}


def main() -> None:
    parser = harness.make_plain_parser(__doc__)
    add = parser.add_argument
    add("family", nargs="*", help=f"among {', '.join(CASES)} (all)")
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
    """Run one family; return its row.

    Raises:
        SystemExit: if the script fails, or its image has another size or is blank.
    """
    case, file = CASES[name], folder / "model.safetensors"
    config = find_config(case.config)
    write_checkpoint(file, config, *(["--karlo"] if KARLO[0] in case.flags else []))
    if REFINER[0] in case.flags:
        write_checkpoint(folder / REFINER[1], find_config("sd_xl_refiner"))
    if UPSCALER[0] in case.flags:
        write_checkpoint(folder / UPSCALER[1], find_config("x2-latent-upscaler"))
    input_side = args.side or case.input_side
    side = input_side * case.scale
    noise = np.random.default_rng(0).integers(0, 256, (input_side, input_side, 3), np.uint8)
    Image.fromarray(noise).save(folder / INPUT)
    Image.fromarray(noise[..., 0]).save(folder / DEPTH)
    flags = ["--config", config, "--ckpt", file, "--outdir", folder, "--n_samples", 1]
    flags += ["--n_iter", 1, "--steps", args.steps, "--precision", args.precision, *case.flags]
    if case.script in ("txt2img", "unclip"):
        flags += ["--H", input_side, "--W", input_side]
    script = [ROOT / f"scripts/{case.script}.py", *flags, "--skip_grid", *args.script_flags]
    seconds, cpu, peak = harness.run(ROOT, *script, folder=folder)
    with Image.open(folder / "samples/00000.png") as image:
        pixels = np.asarray(image.convert("RGB"), np.float32)
    if pixels.shape != (side, side, 3) or not pixels.std():
        raise SystemExit(f"{name}: image of {pixels.shape}, std {pixels.std()}; expected {side}")
    return f"{file.stat().st_size / 1e9:8.2f} {side:5} {seconds:8.0f} {cpu:7.0f} {peak:9.2f}"


def find_config(name: str) -> Path:
    (path,) = ROOT.glob(f"configs/stable-diffusion*/{name}.yaml")
    return path


def write_checkpoint(file: Path, config: Path, *flags: str) -> None:
    """Write a checkpoint of random weights in float16."""
    command = ["benchmarks/make_checkpoint.py", file, "--dtype", "float16", "--config", config]
    harness.run(ROOT, *command, *flags)


if __name__ == "__main__":
    main()

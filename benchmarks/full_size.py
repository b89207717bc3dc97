"""Every family at its true size, from a file of the original's layout to a picture, on this CPU.

    python benchmarks/full_size.py                         # all of them, fp16 files
    python benchmarks/full_size.py depth unclip-l --precision full --steps 4
    python benchmarks/full_size.py upscaler --side 512    # 512 to 2048, in tiles

Other flags are the script's.

Random weights are written to a temporary file (2 to 7 GB), the family's script is run on it in a
process of its own, and the picture it leaves is looked at: its size, and that it shows anything.
Peak is the largest resident size of that process, the mapped file included.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PICTURE = "picture.png"
KARLO = ("--prior", "prior-ckpt-step=01000000-of-01000000.ckpt")


@dataclass(frozen=True)
class Case:
    """One run. size: of the given picture and of the result."""

    script: str
    config: str
    flags: tuple[str, ...] = ()
    size: tuple[int, int] = (512, 512)


SEEN = ("--init-img", PICTURE)
HOLED = (*SEEN, "--mask-box", "128,128,384,384")
# fmt: off
CASES = {
    "sd2": Case("txt2img", "v2-inference"),
    "sd2-v": Case("txt2img", "v2-inference-v", size=(768, 768)),
    "img2img": Case("img2img", "v2-inference", SEEN),
    "inpainting": Case("inpaint", "v2-inpainting-inference", HOLED),
    "depth": Case("depth2img", "v2-midas-inference", SEEN),
    "upscaler": Case("upscale", "x4-upscaling", SEEN, (128, 512)),
    "unclip-h": Case("unclip", "v2-1-stable-unclip-h-inference", SEEN, (768, 768)),
    "unclip-l": Case("unclip", "v2-1-stable-unclip-l-inference", (*SEEN, *KARLO), (768, 768)),
    "sd1": Case("txt2img", "v1-inference"),
    "sd1-inpainting": Case("inpaint", "v1-inpainting-inference", HOLED),
    "sd1-variation": Case("unclip", "v1-image-variation-inference", SEEN),
}
# fmt: on


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("family", nargs="*", help=f"out of {', '.join(CASES)} (all)")
    add("--steps", type=int, default=2, help="sampling steps (%(default)s)")
    add("--precision", default="autocast", help="as the scripts take it (%(default)s)")
    add("--side", type=int, help="of the given picture (the family's own)")
    add("--keep", type=Path, metavar="DIR", help="put the pictures there")
    args, args.rest = parser.parse_known_args()
    for name in args.family:
        if name not in CASES:
            parser.error(f"unknown family `{name}`, choose among {', '.join(CASES)}")
    print(f"{'family':15} {'file GB':>8} {'size':>10} {'seconds':>8} {'CPU s':>7} {'peak GiB':>9}")
    for name in args.family or CASES:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{name:15} {measured(name, args, Path(folder))}", flush=True)


def measured(name: str, args: argparse.Namespace, folder: Path) -> str:
    """The row of one family."""
    case = CASES[name]
    config, file = f"configs/stable-diffusion/{case.config}.yaml", folder / "model.safetensors"
    made = ["--karlo"] if KARLO[0] in case.flags else []
    write = [ROOT / "benchmarks/make_checkpoint.py", file, "--dtype", "float16", *made]
    _python(folder, *write, "--config", config)
    given = args.side or case.size[0]
    side = given * case.size[1] // case.size[0]
    _photo(given).save(folder / PICTURE)
    flags = ["--config", config, "--ckpt", file, "--outdir", folder, "--n_samples", "1"]
    flags += ["--n_iter", "1", "--steps", args.steps, "--precision", args.precision, *case.flags]
    if PICTURE not in case.flags or case.script == "unclip":
        flags += ["--H", side, "--W", side]
    flags += ["--skip_grid", *args.rest]
    seconds, cpu, peak = _python(folder, ROOT / f"scripts/{case.script}.py", *flags)
    with Image.open(folder / "samples/00000.png") as picture:
        pixels = np.asarray(picture.convert("RGB"), np.float32)
        if args.keep is not None:
            args.keep.mkdir(parents=True, exist_ok=True)
            picture.save(args.keep / f"{name}.png")
    if pixels.shape != (side, side, 3) or not pixels.std():
        raise SystemExit(f"{name}: a picture of {pixels.shape} came, {side} was asked for")
    size = f"{side}x{side}"
    gigabytes = file.stat().st_size / 1e9
    return f"{gigabytes:8.2f} {size:>10} {seconds:8.0f} {cpu:7.0f} {peak:9.2f}"


def _python(folder: Path, *command: object) -> tuple[float, float, float]:
    """Runs a script in a new process; (seconds, CPU seconds, GiB of its largest resident size)."""
    environment = {"PYTHONPATH": str(ROOT), **os.environ}
    start = time.perf_counter()
    words = [sys.executable, *map(str, command)]
    words = [str(ROOT / word) if word.startswith("configs/") else word for word in words]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(words, cwd=folder, stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        process.returncode = status
        raise SystemExit(f"{' '.join(words)}\n{(folder / 'log').read_text()}")
    seconds, cpu = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
    return seconds, cpu, usage.ru_maxrss / 2**20


def _photo(side: int) -> Image.Image:
    """Something with edges, gradients and colours."""
    ramp = np.linspace(0, 1, side)
    rows, columns = np.meshgrid(ramp, ramp, indexing="ij")
    disc = (rows - 0.5) ** 2 + (columns - 0.4) ** 2 < 0.06
    pixels = np.stack([rows, np.sin(columns * 12) / 2 + 0.5, np.where(disc, 0.9, 0.3)], axis=-1)
    return Image.fromarray((pixels * 255).astype(np.uint8))


if __name__ == "__main__":
    main()

"""Convert models between original .ckpt or .safetensors files, diffusers folders and run folders.

    ldm convert v2-1_768-ema-pruned.ckpt sd21              # a diffusers folder
    ldm convert sd21 sd21.safetensors                      # and back, bit for bit
    ldm convert v1-5-pruned.ckpt v1-5.safetensors --ema --dtype float16
    ldm convert logs/my-run mine --file-variant fp16
    ldm convert v1-5.safetensors new.safetensors --vae logs/autoencoder-decoder
    ldm convert x2.pth x2-upscaler --text-encoder v1-5.safetensors
    ldm convert v1-5.safetensors styled.safetensors --lora style.safetensors:0.8

Weights that diffusers' layout does not have are saved in `original.safetensors` in the folder. An
existing target is replaced only with --force; targets are written atomically.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from os.path import expanduser
from typing import TYPE_CHECKING

from ldm.generate.command_line import add_options
from ldm.generate.groups import ModelOptions
from ldm.generate.options import get_options
from ldm.runtime.command import CommandParser

if TYPE_CHECKING:
    from ldm.loading.convert import Conversion

__all__ = ["DTYPES", "SOURCE_HELP", "main", "write_with_progress"]

DTYPES = ("float32", "float16", "bfloat16")
SOURCE_HELP = "a file, a diffusers folder, or the folder of a training run"


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = CommandParser(prog=prog, description=__doc__, usage="%(prog)s [flags] SOURCE TARGET")
    add = parser.add_argument
    # fmt: off
    add("source", type=expanduser, help=SOURCE_HELP)
    add("target", type=expanduser,
        help="*.safetensors or *.ckpt: a file in the original's layout; *.pth: the x2 latent"
        " upscaler in k-diffusion's; else a diffusers folder")
    add("--config", metavar="FILE",
        help="YAML of the source (default: recognized from the weights)")
    add("--dtype", choices=DTYPES, help="dtype of the weights (default: unchanged)")
    add("--ema", action="store_true", help="use the EMA weights instead of the raw ones")
    add("--prune", action="store_true", help="leave the EMA weights out of a file")
    add("--file-variant", "--variant", dest="variant", metavar="NAME",
        help="variant in the file names of a diffusers folder: fp16")
    add("--clip-stats", metavar="FILE",
        help="file with mean and standard deviation of CLIP's embeddings, for unCLIP-L")
    add("--force", action="store_true", help="replace an existing target")
    # fmt: on
    options = get_options(ModelOptions)
    add_options(add, {name: options[name] for name in ("lora", "vae", "text_encoder")})
    return parser.run(_convert, argv)


def _convert(args: Namespace) -> None:
    import torch

    from ldm.loading.convert import check_overwrite, plan_conversion

    check_overwrite(args.target, force=args.force)
    plan = plan_conversion(
        args.source,
        args.target,
        config=args.config,
        ema=args.ema,
        prune=args.prune,
        variant=args.variant,
        vae=args.vae,
        text_encoder=args.text_encoder,
        dtype=args.dtype and getattr(torch, args.dtype),
        loras=args.lora,
        clip_stats=args.clip_stats,
    )
    write_with_progress(plan, args.force)


def write_with_progress(plan: "Conversion", force: bool) -> None:
    """Print the summary of a conversion, write it with a progress bar, and print its path."""
    from tqdm import tqdm

    from ldm.loading.convert import convert

    print("\n".join(plan.summary), file=sys.stderr)
    with tqdm(total=plan.num_bytes, unit="B", unit_scale=True, disable=None) as bar:
        path = convert(plan, force=force, progress=bar.update)
    print(path)

"""Converts models: original .ckpt and .safetensors, diffusers folders, folders of training runs.

    python scripts/convert.py v2-1_768-ema-pruned.ckpt sd21              # a diffusers folder
    python scripts/convert.py sd21 sd21.safetensors                      # and back, bit for bit
    python scripts/convert.py v1-5-pruned.ckpt v1-5.safetensors --ema --dtype float16
    python scripts/convert.py logs/my-run mine --variant fp16
    python scripts/convert.py v1-5.safetensors new.safetensors --vae logs/autoencoder-decoder
    python scripts/convert.py v1-5.safetensors styled.safetensors --lora style.safetensors:0.8

What diffusers has no place for is kept in the folder's `original.safetensors`. Nothing that exists
is replaced without --force, and nothing is left half written.
"""

import argparse
import sys

from ldm.generate import flags, load


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = flags.parser(__doc__)
    parser.usage = "%(prog)s [flags] SOURCE TARGET"
    add = parser.add_argument
    add("source", help="a file, a diffusers folder, or the folder of a training run")
    add("target", help="*.safetensors or *.ckpt: a file in the original's layout; else a folder")
    add("--config", metavar="FILE", help="YAML of the source (recognised from the weights)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="of all weights (as they are)")
    add("--ema", action="store_true", help="averaged (EMA) weights in place of the raw ones")
    add("--prune", action="store_true", help="single files: leave the averaged weights out")
    add("--variant", metavar="NAME", help="in file names of diffusers folders: fp16")
    add("--clip-stats", metavar="FILE", help="statistics of CLIP's embeddings (unCLIP-L)")
    flags.lora_flag(add)
    add("--vae", metavar="FILE", help="take the autoencoder from there")
    add("--force", action="store_true", help="replace the target")
    add("--verbose", action="store_true", help="show where an error comes from")
    return load.run(work, parser, argv)


def work(args: argparse.Namespace) -> None:
    """Says what will be written, writes it, prints where it is."""
    import torch
    from tqdm import tqdm

    from ldm.loading.convert import convert, plan_conversion

    if args.overrides:
        raise ValueError(f"`{args.overrides[0]}` is one word too many: a source and a target")
    options = {key: getattr(args, key) for key in ("config", "ema", "prune", "variant", "vae")}
    options |= {"dtype": args.dtype and getattr(torch, args.dtype), "loras": args.lora}
    what = plan_conversion(args.source, args.target, clip_stats=args.clip_stats, **options)
    print("\n".join(what.notes), file=sys.stderr)
    with tqdm(total=what.bytes, unit="B", unit_scale=True, disable=None) as bar:
        path = convert(what, force=args.force, progress=bar.update)
    print(path)


if __name__ == "__main__":
    sys.exit(main())

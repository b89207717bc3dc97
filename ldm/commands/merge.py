"""Merge checkpoints of one family: weighted sum or added difference, with block weights.

    ldm merge a.safetensors b.safetensors mixed.safetensors --weight 0.3      # 0.7 a + 0.3 b
    ldm merge a.safetensors tuned.safetensors new.safetensors --subtract base.safetensors
    ldm merge sd-v1-5-inpainting.ckpt custom.safetensors custom-inpainting.safetensors \\
        --subtract v1-5.safetensors --dtype float16       # an inpainting model of any other
    ldm merge a.ckpt b.ckpt new.safetensors --block-weights IN00=0,OUT11=1

UNets and text encoders are merged in float32. Noise schedule, autoencoder (unless --merge-vae) and
additional input channels come from the first model. EMA weights are left out.
"""

from argparse import Namespace
from collections.abc import Sequence
from os.path import expanduser

from ldm.commands.convert import DTYPES, SOURCE_HELP, write_with_progress
from ldm.runtime.command import CommandParser

__all__ = ["main"]


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = CommandParser(
        prog=prog, description=__doc__, usage="%(prog)s [flags] MODEL OTHER TARGET"
    )
    add = parser.add_argument
    # fmt: off
    add("model", type=expanduser, help=SOURCE_HELP)
    add("other", type=expanduser, help="another model of the same family")
    add("target", type=expanduser, help="*.safetensors or *.ckpt, in the original's layout")
    add("--subtract", metavar="FILE",
        help="add the difference OTHER - FILE to MODEL; FILE is the model OTHER was tuned from")
    add("--weight", type=float,
        help="weight of OTHER (default: 0.5), or of the difference (default: 1)")
    add("--block-weights", metavar="NUMBERS",
        help="a weight for each block, separated by commas: BASE (text encoders, VAE; may be left"
        " out), IN00 … IN11, M00, OUT00 … OUT11; or NAME=NUMBER for some, --weight for the others")
    add("--merge-vae", action="store_true", help="merge the autoencoders, too")
    add("--ema", action="store_true", help="use EMA weights instead of the raw ones, if any")
    add("--dtype", choices=DTYPES, help="dtype of the merged file (default: as in MODEL)")
    add("--config", metavar="FILE", help="YAML of the models")
    add("--force", action="store_true", help="replace an existing target")
    # fmt: on
    return parser.run(_merge, argv)


def _merge(args: Namespace) -> None:
    import torch

    from ldm.loading.convert import check_overwrite
    from ldm.loading.merge import plan_merge

    check_overwrite(args.target, force=args.force)
    plan = plan_merge(
        args.model,
        args.other,
        args.target,
        subtract=args.subtract,
        weight=args.weight,
        block_weights=args.block_weights,
        merge_vae=args.merge_vae,
        ema=args.ema,
        dtype=args.dtype and getattr(torch, args.dtype),
        config=args.config,
    )
    write_with_progress(plan, args.force)

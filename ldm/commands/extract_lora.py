"""Extract a LoRA from the difference of two models of one family.

    ldm extract-lora tuned.safetensors base.safetensors style.safetensors --rank 64
    ldm extract-lora tuned.safetensors base.safetensors style.safetensors --rank 32 --conv-rank 8
    ldm extract-lora tuned.ckpt base.ckpt small.safetensors --rank 128 --keep-squares 0.9

The difference of each layer is decomposed into singular values, of which the largest are kept.
Differences that a LoRA cannot contain, such as norms and biases, are counted.
"""

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.commands.convert import DTYPES, SOURCE_HELP
from ldm.runtime.command import CommandParser
from ldm.runtime.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.loading.addons.lora_tools import RankLimits
    from ldm.model import LatentDiffusion
    from ldm.nets.lora import LoRA

__all__ = ["add_rank_options", "check_target", "main", "make_rank_limits", "save_lora"]


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = CommandParser(
        prog=prog, description=__doc__, usage="%(prog)s [flags] TUNED BASE TARGET"
    )
    add = parser.add_argument
    # fmt: off
    add("tuned", type=expanduser, help=SOURCE_HELP)
    add("base", type=expanduser, help="the model that it was fine-tuned from")
    add("target", type=expanduser, help="*.safetensors, in kohya's format")
    add_rank_options(parser)
    add("--conv-rank", type=int, metavar="N",
        help="rank of 3 x 3 convolutions (default: leave them out)")
    add("--clamp-quantile", type=float, default=0.99, metavar="Q",
        help="clamp each layer's weights to their quantile Q, 1 = do not (default: 0.99)")
    add("--ema", action="store_true", help="use EMA weights instead of the raw ones, if any")
    add("--config", metavar="FILE", help="YAML of both models")
    # fmt: on
    return parser.run(_extract, argv)


def add_rank_options(parser: CommandParser) -> None:
    """Add the flags that `make_rank_limits` and `save_lora` read."""
    add = parser.add_argument
    # fmt: off
    add("--rank", type=int, metavar="N", help="keep at most N singular values of each layer")
    add("--keep-sum", dest="sum_fraction", type=float, metavar="FRACTION",
        help="keep this fraction of the singular values' sum, such as 0.9")
    add("--keep-squares", dest="square_fraction", type=float, metavar="FRACTION",
        help="keep this fraction of the sum of their squares")
    add("--ratio", type=float, metavar="R",
        help="keep singular values of at least the largest divided by R")
    add("--dtype", choices=DTYPES, default="float16",
        help="dtype of the weights (default: float16)")
    add("--force", action="store_true", help="replace an existing target")
    # fmt: on


def make_rank_limits(args: Namespace) -> "RankLimits":
    """Return the rank limits set by the flags."""
    from ldm.loading.addons.lora_tools import RankLimits

    return RankLimits(args.rank, args.sum_fraction, args.square_fraction, args.ratio)


def save_lora(
    args: Namespace,
    lora: "LoRA",
    model: "LatentDiffusion",
    merged_from: Sequence[str],
    other_tensors: Mapping[str, "Tensor"] | None = None,
) -> None:
    """Write a LoRA and other tensors to the target, and print its path."""
    import torch

    from ldm.loading.addons.lora_files import write_lora
    from ldm.loading.modelspec import MERGED_FROM_KEY

    dtype = getattr(torch, args.dtype)
    others = {name: tensor.to(dtype) for name, tensor in (other_tensors or {}).items()}
    metadata: dict[str, str | int] = {MERGED_FROM_KEY: ", ".join(merged_from)}
    write_lora(lora.to(dtype), args.target, model, metadata=metadata, other_tensors=others)
    print(args.target)


def check_target(args: Namespace) -> None:
    """Raise ArgumentError if the target has another suffix, ExistingFile if it exists."""
    from ldm.loading.convert import check_overwrite

    if not args.target.endswith(".safetensors"):
        raise ArgumentError(f"`{args.target}`: must end in .safetensors", "target")
    check_overwrite(args.target, force=args.force)


def _extract(args: Namespace) -> None:
    from tqdm import tqdm

    from ldm.loading.addons.lora_tools import RankLimits, extract_lora

    check_target(args)
    if args.conv_rank is not None and args.conv_rank < 1:
        raise ArgumentError(f"rank {args.conv_rank}: must be at least 1", "conv_rank")
    with tqdm(unit="layer", disable=None) as bar:
        result = extract_lora(
            args.tuned,
            args.base,
            make_rank_limits(args),
            conv_limits=None if args.conv_rank is None else RankLimits(args.conv_rank),
            clamp_quantile=args.clamp_quantile,
            ema=args.ema,
            config=args.config,
            progress=bar.update,
        )
    fraction = f"{result.retained_fraction:.1%} of their squared difference"
    print(f"{len(result.lora.layers)} layers, {fraction}", file=sys.stderr)
    if result.other_weights:
        examples = ", ".join(result.other_weights[:2])
        count = len(result.other_weights)
        print(f"{count} other weights differ, not in the LoRA: {examples}", file=sys.stderr)
    names = [Path(path).name for path in (args.tuned, args.base)]
    save_lora(args, result.lora, result.model, names)

"""Join LoRAs into one, or reduce the rank of one.

    ldm merge-lora style.safetensors:0.8 detail.safetensors:0.5 both.safetensors
    ldm merge-lora loha.safetensors:0.5:1 plain.safetensors --rank 32
    ldm merge-lora style.safetensors small.safetensors --rank 8          # or:
    ldm merge-lora style.safetensors small.safetensors --keep-squares 0.9

The joined LoRA has exactly the effect of all together, each with its weight; its rank is the sum of
theirs. If the rank is limited, the smallest singular values of each layer are dropped. LoHa, LoKr
and other methods of LyCORIS are decomposed, to full rank unless it is limited.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path

from ldm.commands.extract_lora import add_rank_options, check_target, make_rank_limits, save_lora
from ldm.generate.option_parsers import parse_lora
from ldm.runtime.command import CommandParser

__all__ = ["main"]


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = CommandParser(
        prog=prog, description=__doc__, usage="%(prog)s [flags] FILE[:WEIGHT] … TARGET"
    )
    add = parser.add_argument
    # fmt: off
    add("files", nargs="+", metavar="FILE[:WEIGHT]",
        help="LoRAs in any format, with their weights (default: 1)")
    add("target", type=expanduser, help="*.safetensors, in kohya's format")
    add_rank_options(parser)
    add("--model", metavar="FILE",
        help="checkpoint of their model (default: recognized from the first LoRA)")
    # fmt: on
    return parser.run(_merge, argv)


def _merge(args: Namespace) -> None:
    from tqdm import tqdm

    from ldm.loading.addons.lora_tools import NO_LIMITS, build_model_for_lora, join_loras

    check_target(args)
    limits = make_rank_limits(args)
    files = [parse_lora(text) for text in args.files]
    first_file, _ = files[0]
    model = build_model_for_lora(first_file, args.model)
    with tqdm(unit="layer", disable=None) as bar:
        joined = join_loras(files, model, limits, progress=bar.update)
    layers = joined.lora.layers.values()
    ranks = sum(layer.rank for layer in layers)
    summary = f"{ranks} ranks in {len(layers)} layers"
    if limits != NO_LIMITS:
        retained = f"{joined.retained_fraction:.1%} of the squared singular values"
        summary = f"{ranks} of {joined.total_rank} ranks in {len(layers)} layers, {retained}"
    print(summary, file=sys.stderr)
    save_lora(
        args, joined.lora, model, [Path(path).name for path, _ in files], joined.other_tensors
    )

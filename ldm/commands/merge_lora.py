"""Join LoRAs to one, or cut the rank of one.

    ldm merge-lora style.safetensors:0.8 detail.safetensors:0.5 both.safetensors
    ldm merge-lora style.safetensors small.safetensors --rank 8          # or:
    ldm merge-lora style.safetensors small.safetensors --keep-squares 0.9

Joined, they do at strength 1 what they do together at theirs, exactly: their ranks add up. With a
rule for the rank the smaller singular values of each layer are left out.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path

from ldm.commands.extract_lora import add_rank_options, check_target, make_rank_rule, save_lora
from ldm.generate.command_line import hint
from ldm.generate.options import parse_weighted_file
from ldm.runtime.command import CommandParser, run_command
from ldm.runtime.errors import ArgumentError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = CommandParser(
        prog=prog, description=__doc__, usage="%(prog)s [flags] FILE[:STRENGTH] … TARGET"
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE[:STRENGTH]", help="LoRAs of any format, default: 1")
    add("target", type=expanduser, help="*.safetensors, in kohya's format")
    add_rank_options(parser)
    add(
        "--model",
        type=expanduser,
        metavar="FILE",
        help="a model that they fit (default: recognised from the first one)",
    )
    args = parser.parse(argv)
    return run_command(lambda: _merge(args), parser.prog, verbose=args.verbose, hint=hint)


def _parse_file(text: str) -> tuple[str, float]:
    path, strength = parse_weighted_file(text)
    if isinstance(strength, str):
        raise ArgumentError(f"`{path}`: a LoRA is joined by one number, got `{strength}`", "files")
    return path, strength


def _merge(args: Namespace) -> None:
    from tqdm import tqdm

    from ldm.loading.addons.lora import read_lora
    from ldm.loading.addons.lora_tools import join_loras, model_of_lora, resize_lora

    check_target(args)
    rule = make_rank_rule(args)
    files = [_parse_file(text) for text in args.files]
    model = model_of_lora(files[0][0], args.model)
    lora = join_loras([(read_lora(path, model), strength) for path, strength in files])
    ranks = sum(layer.rank for layer in lora.layers.values())
    if rule.is_limited:
        with tqdm(total=len(lora.layers), unit="layer", disable=None) as bar:
            lora, retained = resize_lora(lora, rule, progress=bar.update)
        now = sum(layer.rank for layer in lora.layers.values())
        text = f"{now} of {ranks} ranks in {len(lora.layers)} layers, {retained:.1%} of the squares"
        print(text, file=sys.stderr)
    save_lora(args, lora, model, [Path(path).name for path, _ in files])

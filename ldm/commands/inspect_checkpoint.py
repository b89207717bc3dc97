"""Describe a checkpoint, without executing pickled code.

    ldm inspect-checkpoint v2-1_768-ema-pruned.ckpt
    ldm inspect-checkpoint model.safetensors --config my.yaml --json

Prints which published file it is, its family and config, the prediction type and how it was found,
components and their parameter counts, EMA, names in its pickle, missing and unexpected weights.
Exit status: 0 for weights that can be loaded, 1 otherwise.
"""

import json
from argparse import Namespace
from collections.abc import Sequence
from os.path import expanduser

from ldm.runtime.command import COMMANDS_BY_FUNCTION, CommandParser

__all__ = ["main"]


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = CommandParser(prog=prog, description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("checkpoint", type=expanduser,
        help="a .ckpt or .safetensors file, or a name of `ldm download`")
    add("--config", metavar="FILE", help="compare with this YAML instead of the family's")
    add("--json", action="store_true", help="print a JSON object instead of text")
    add("--no-probe", action="store_true",
        help="do not run the UNet to find the prediction type (eps or v)")
    # fmt: on
    return parser.run(_inspect, argv)


def _inspect(args: Namespace) -> int:
    from ldm.loading.inspection import inspect_checkpoint

    report = inspect_checkpoint(args.checkpoint, args.config, probe=not args.no_probe)
    if args.json:
        command = report.task and COMMANDS_BY_FUNCTION.get(report.task, report.task)
        script = f"scripts/{command}.py" if command else None
        print(json.dumps({**report.as_dict(), "script": script}, indent=2))
    else:
        print("\n".join(report.format_lines()))
    return 1 if report.refused or report.missing or report.unexpected else 0

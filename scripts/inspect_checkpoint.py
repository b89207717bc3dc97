"""Says what is in a checkpoint, without running anything in it.

    python scripts/inspect_checkpoint.py v2-1_768-ema-pruned.ckpt
    python scripts/inspect_checkpoint.py model.safetensors --config my.yaml --json

Family, fitting config, whether the network predicts eps or v and how that is known, parts with
their parameters, EMA, the names that its pickle mentions, what is missing or unexpected.
Exit code: 0 for weights that can be loaded, 1 otherwise.
"""

import argparse
import json
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a .ckpt or .safetensors file")
    parser.add_argument("--config", help="compare with this YAML, not with the family's own")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument(
        "--no-probe",
        action="store_true",
        help="never run the UNet, even where only one method says eps or v",
    )
    args = parser.parse_args(argv)

    from ldm.loading.report import inspect_checkpoint

    try:
        report = inspect_checkpoint(args.checkpoint, args.config, probe=not args.no_probe)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        print("\n".join(report.lines()))
    return 1 if report.refused or report.missing or report.unexpected else 0


if __name__ == "__main__":
    sys.exit(main())

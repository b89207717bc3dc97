"""Print the invisible watermarks in images, their method, and how intact they are."""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ldm.imaging.reading import open_image
from ldm.imaging.watermark import Finding, can_hold_watermark, detect_watermarks
from ldm.runtime.command import CommandParser

__all__ = ["main"]


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line; return 0 if all images have a known watermark, else 1."""
    parser = CommandParser(prog=prog, description=__doc__)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image file")
    parser.add_argument("--json", action="store_true", help="one JSON object per image")
    parser.add_argument("--all", action="store_true", help="list absent watermarks too")
    return parser.run(_read, argv)


def _read(args: Namespace) -> int:
    found = [_print_findings(path, args.json, args.all) for path in args.images]
    return 0 if all(found) else 1


def _print_findings(path: Path, as_json: bool, with_absent: bool) -> bool:
    """Print the watermarks of a file; return whether there are any."""
    try:
        with open_image(path) as image:
            is_too_small, findings = not can_hold_watermark(image.size), detect_watermarks(image)
    except (OSError, ValueError) as error:  # missing, or not an image
        print(f"{path}: {error}", file=sys.stderr)
        return False
    present = [finding for finding in findings if finding.verdict != "absent"]
    shown = findings if with_absent else present
    if as_json:
        print(json.dumps({"path": str(path), "findings": list(map(asdict, shown))}))
    else:
        for finding in shown:
            print(f"{path}: {_format(finding)}")
        if not shown:
            reason = " (too small for one: fewer than 256x256 pixels)" if is_too_small else ""
            print(f"{path}: no known watermark{reason}")
    return bool(present)


def _format(finding: Finding) -> str:
    return (
        f"{finding.payload} by {finding.method}, {finding.verdict}: "
        f"{finding.agreement:.1%} of the bits, {finding.votes:.1%} of the blocks"
    )

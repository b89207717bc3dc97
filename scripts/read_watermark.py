"""Say which invisible watermark a picture carries, written by which method, and how intact."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from ldm.imaging.watermark import Finding, can_hold, identify


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 if every picture carries a known watermark, 1 if one does not."""
    args = _parser().parse_args(argv)
    carries = [_report(path, args.json, args.all) for path in args.images]
    return 0 if all(carries) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="picture file")
    parser.add_argument("--json", action="store_true", help="one JSON object per picture")
    parser.add_argument("--all", action="store_true", help="list absent watermarks too")
    return parser


def _report(path: Path, as_json: bool, absent_too: bool) -> bool:
    try:
        with Image.open(path) as picture:
            small, findings = not can_hold(picture), identify(picture)
    except OSError as error:  # missing, or no picture
        print(f"{path}: {error}", file=sys.stderr)
        return False
    shown = [f for f in findings if absent_too or f.verdict != "absent"]
    if as_json:
        print(json.dumps({"path": str(path), "findings": [asdict(f) for f in shown]}))
    else:
        for finding in shown:
            print(f"{path}: {_sentence(finding)}")
        if not shown:
            note = " (too small for one: fewer than 256x256 pixels)" if small else ""
            print(f"{path}: no known watermark{note}")
    return any(f.verdict != "absent" for f in findings)


def _sentence(finding: Finding) -> str:
    return (
        f"{finding.payload} by {finding.method}, {finding.verdict}: "
        f"{finding.agreement:.1%} of the bits, {finding.votes:.1%} of the blocks"
    )


if __name__ == "__main__":
    sys.exit(main())

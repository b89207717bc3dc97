"""Says what a folder of pictures, or tar shards, hold, and packs a folder into shards.

    python scripts/check_data.py data/photos
    python scripts/check_data.py "data/{00000..00099}.tar" --size 768
    python scripts/check_data.py data/photos --pack "shards/photos-%06d.tar"

Counts, broken files, captions that are missing or the same, sizes, proportions, buckets.
Exit code: 0, or 1 if something is broken or there is nothing to read.
"""

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("where", nargs="+", metavar="DIR|SHARDS", help="a folder, or files, patterns, addresses")
    add("--size", type=int, default=512, help="side of square pictures in training (%(default)s)")
    add("--step", type=int, default=64, help="what sides in buckets are multiples of (%(default)s)")
    add("--workers", type=int, default=4, help="threads that decode (%(default)s)")
    add("--list", type=Path, metavar="FILE", help="write the names of all broken files")
    add("--pack", metavar="PATTERN", help="write a folder as shards, `DIR/name-%%06d.tar`")
    add("--count", type=int, default=1000, help="pictures in each shard (%(default)s)")
    args = parser.parse_args(argv)

    from ldm.data.check import check, folder_of
    from ldm.data.pack import pack

    try:
        folder = folder_of(args.where)
        if args.pack and folder is None:
            raise ValueError("only a folder can be packed")
        report = check(args.where, size=args.size, step=args.step, workers=args.workers)
        print("\n".join(report.lines()))
        if args.list:
            names = "".join(f"{name}\n" for name, _ in report.broken)
            args.list.write_text(names, "utf-8", errors="surrogateescape")
        if args.pack and folder is not None:
            for path in pack(folder, args.pack, count=args.count):
                print(path)
    except (OSError, ValueError, ImportError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 1 if report.broken else 0


if __name__ == "__main__":
    sys.exit(main())

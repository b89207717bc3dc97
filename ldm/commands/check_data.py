"""Check a folder of images, or tar shards; pack a folder into shards.

    ldm check-data data/photos
    ldm check-data "data/{00000..00099}.tar" --size 768
    ldm check-data data/photos --pack "shards/photos-%06d.tar"

Prints counts, unreadable files, missing and repeated captions, sizes, aspect ratios, buckets.
Exit status: 0, or 1 if a file is unreadable or there are no images.
"""

from argparse import Namespace
from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path

from ldm.generate.option_parsers import parse_count
from ldm.runtime.command import CommandParser
from ldm.runtime.errors import ArgumentError
from ldm.runtime.files import check_parent_folder

__all__ = ["main"]


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = CommandParser(prog=prog, description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("data", nargs="+", type=expanduser, metavar="DIR|SHARDS",
        help="a folder of images, or files, patterns or URLs of tar shards")
    add("--size", type=parse_count, default=512,
        help="training resolution in pixels (default: %(default)s)")
    add("--step", type=parse_count, default=64,
        help="sides of buckets are multiples of this (default: %(default)s)")
    add("--workers", type=parse_count, default=4, help="decoding threads (default: %(default)s)")
    add("--list", metavar="FILE", help="write the names of unreadable files to FILE")
    add("--pack", type=expanduser, metavar="PATTERN",
        help="write the images of the folder to shards with names such as `DIR/name-%%06d.tar`")
    add("--count", type=parse_count, default=1000,
        help="images in each shard (default: %(default)s)")
    # fmt: on
    return parser.run(_check, argv)


def _check(args: Namespace) -> int:
    from ldm.data.check import check_data, open_folder
    from ldm.data.pack import write_shards

    if args.list:
        check_parent_folder(args.list, "list")
    folder = open_folder(args.data)
    if args.pack and folder is None:
        raise ArgumentError(f"only a folder of images can be packed, not `{args.data[0]}`", "pack")
    report = check_data(folder or args.data, size=args.size, step=args.step, workers=args.workers)
    print("\n".join(report.format_lines()))
    if args.list:
        names = "".join(f"{name}\n" for name, _ in report.unreadable_samples)
        Path(args.list).write_text(names, "utf-8", errors="surrogateescape")
    if args.pack and folder is not None:
        for path in write_shards(folder, args.pack, count=args.count):
            print(path)
    return 0 if report.sizes and not report.unreadable_samples else 1

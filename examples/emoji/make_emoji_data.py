"""Build the emoji data set that the demo model is trained on.

Fetches the pictures from npm packages (Apache-2.0, MIT and CC-BY-4.0 only) into a cache folder,
rasterises them and writes OUT/images/<style>/<id>.png, OUT/metadata.jsonl and OUT/NOTICE. Needs npm
and `pip install resvg-py`.

    python scripts/make_emoji_data.py data/emoji --objects 300
"""

import argparse
import logging
from pathlib import Path

from emoji_data import build, install


def main() -> None:
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=form)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--packages", type=Path, default=Path("data/npm"), help="npm cache folder")
    parser.add_argument(
        "--objects", type=int, help="keep the first N of the ranking (all: about 1000)"
    )
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in pixels")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pictures = build(install(args.packages), args.out, objects=args.objects, size=args.size)
    objects = {picture.id for picture in pictures}
    held_out = [picture for picture in pictures if picture.split == "heldout"]
    print(f"{args.out}: {len(pictures)} pictures, {len(objects)} objects, {len(held_out)} held out")


if __name__ == "__main__":
    main()

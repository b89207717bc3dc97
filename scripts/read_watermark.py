"""The same as `ldm read-watermark`; see `python scripts/read_watermark.py --help`."""

import sys

from ldm.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["read-watermark", *sys.argv[1:]]))

"""The same as `ldm convert`; see `python scripts/convert.py --help`."""

import sys

from ldm.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))

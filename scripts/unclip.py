"""The same as `ldm unclip`; see `python scripts/unclip.py --help`."""

import sys

from ldm.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["unclip", *sys.argv[1:]]))

"""The same as `ldm replay`; see `python scripts/replay.py --help`."""

import sys

from ldm.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["replay", *sys.argv[1:]]))

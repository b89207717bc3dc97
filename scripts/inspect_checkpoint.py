"""The same as `ldm inspect-checkpoint`; see `python scripts/inspect_checkpoint.py --help`."""

import sys

from ldm.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["inspect-checkpoint", *sys.argv[1:]]))

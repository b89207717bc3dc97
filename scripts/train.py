"""The same as `ldm train`; see `python scripts/train.py --help`."""

import sys

from ldm.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

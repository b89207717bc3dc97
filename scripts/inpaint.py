"""The same as `ldm inpaint`; see `python scripts/inpaint.py --help`."""

import sys

from ldm.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["inpaint", *sys.argv[1:]]))

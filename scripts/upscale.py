"""The same as `ldm upscale`; see `python scripts/upscale.py --help`."""

import sys

from ldm.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["upscale", *sys.argv[1:]]))

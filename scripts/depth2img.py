"""The same as `ldm depth2img`; see `python scripts/depth2img.py --help`."""

import sys

from ldm.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["depth2img", *sys.argv[1:]]))

"""The same as `ldm img2img`; see `python scripts/img2img.py --help`."""

import sys

from ldm.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["img2img", *sys.argv[1:]]))

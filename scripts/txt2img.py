"""The same as `ldm txt2img`; see `python scripts/txt2img.py --help`."""

import sys

from ldm.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["txt2img", *sys.argv[1:]]))

"""The same as `ldm app`; see `python scripts/app.py --help`."""

import sys

from ldm.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["app", *sys.argv[1:]]))

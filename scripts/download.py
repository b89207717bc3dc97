"""The same as `ldm download`; see `python scripts/download.py --help`."""

import sys

from ldm.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["download", *sys.argv[1:]]))

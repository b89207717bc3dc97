"""The same as `ldm check-data`; see `python scripts/check_data.py --help`."""

import sys

from ldm.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["check-data", *sys.argv[1:]]))

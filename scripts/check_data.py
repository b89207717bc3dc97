"""Print what a folder of images, or tar shards, hold: see `ldm.commands.check_data`."""

import sys

from ldm.commands.check_data import main

if __name__ == "__main__":
    sys.exit(main())

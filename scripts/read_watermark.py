"""Print which invisible watermark an image carries: see `ldm.commands.read_watermark`."""

import sys

from ldm.commands.read_watermark import main

if __name__ == "__main__":
    sys.exit(main())

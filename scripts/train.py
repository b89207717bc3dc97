"""Train a model from a config in the original's format; see `ldm.train.command`."""

import sys

from ldm.train.command import main

if __name__ == "__main__":
    sys.exit(main())

"""Version of this package, also written into images and checkpoints."""

__version__ = "0.1.0"

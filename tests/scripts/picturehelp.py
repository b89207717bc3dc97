"""What tests of the scripts of pictures share."""

import numpy as np
from PIL import Image

QUICK = ["--steps", "2", "--precision", "full", "--skip_grid"]
# Tiny models, and the recording that their config is from.
MODELS = {"inpaint": "inpaint", "depth": "depth2img", "upscale": "upscale", "unclip": "unclip",
          "base_v": "img2img", "base_eps": "img2img"}  # fmt: skip


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)

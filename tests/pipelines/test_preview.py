"""Previews by a linear map, against downscaled images."""

from pathlib import Path

import torch
import torch.nn.functional as F

import ldm
from ldm.imaging.pixels import to_tensor
from ldm.imaging.reading import load_image
from ldm.pipelines.preview import fit_preview

EMOJI = Path(__file__).parents[1] / "data/emoji/images"


def test_previews_of_real_images_explain_most_of_their_variance():
    model = ldm.load()
    paths = sorted(EMOJI.glob("*/*.png"))[::3]
    image = torch.cat([to_tensor(load_image(path)) for path in paths])  # (8, 3, 64, 64)
    with torch.no_grad():
        z = model.autoencoder.encode(image).mode() * model.scale_factor
    preview = fit_preview(model)(z)
    small = F.adaptive_avg_pool2d(image, z.shape[-2:])
    unexplained = (preview - small).square().mean() / (small - small.mean()).square().mean()
    assert preview.shape == small.shape
    assert unexplained < 0.15  # observed: 0.09; 0.08 for a map fitted to these images

"""Latents made once and read many times, so that a step costs only what is trained.

Several variants of each record are encoded (on different colours and places); captions are still
drawn anew for every sample. The cache is named after what it depends on, so an old one is never
taken for a new one.
"""

import hashlib
import json
import logging
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from ldm.data.folder import Folder, Latents
from ldm.data.transforms import COLOURS, Emoji
from ldm.model import LatentDiffusion

__all__ = ["cached_latents"]

log = logging.getLogger(__name__)


def cached_latents(
    model: LatentDiffusion, folder: Folder, cache: Path, *, variants: int = 11, batch: int = 32
) -> Latents:
    """The latents of a folder of emoji, from the cache if it is there.

    cache: folder of the cache files.
    variants: how many colours (and places) of each picture.
    """
    path = cache / f"latents-{_key(model, folder, variants)}.pt"
    if not path.exists():
        log.info("encoding %d x %d pictures into `%s`", len(folder), variants, path)
        cache.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        torch.save(_encode(model, folder, variants, batch), part)
        part.replace(path)
    z = torch.load(path, weights_only=True)  # (N, variants, C, h, w), half precision
    return Latents(z, _Captions(folder), seed=folder.seed)


class _Captions:
    """(record, variant, rng) -> caption."""

    def __init__(self, folder: Folder) -> None:
        assert isinstance(folder.transform, Emoji), "only emoji have variants"
        self.rows, self.transform = folder.rows, folder.transform

    def __call__(self, record: int, variant: int, rng: Random) -> str:
        colour = _colour(record, variant)
        return self.transform.caption(self.rows[record], colour, rng)


def _colour(record: int, variant: int) -> str:
    """The colours of a record come in an order of its own; after all of them they come again."""
    return Random(record).sample(list(COLOURS), len(COLOURS))[variant % len(COLOURS)]


@torch.inference_mode()
def _encode(model: LatentDiffusion, folder: Folder, variants: int, batch: int) -> Tensor:
    transform: Any = folder.transform
    z = []
    images: list[Tensor] = []
    for index in range(len(folder)):
        picture = folder.record(index)["picture"]
        for variant in range(variants):
            chance = Random(f"{index} {variant}")
            images.append(transform.image(picture, _colour(index, variant), chance))
        while len(images) >= batch or (images and index == len(folder) - 1):
            image = torch.stack(images[:batch]).to(model.device)
            with torch.autocast(image.device.type, torch.bfloat16):
                mode = model.autoencoder.encode(image).mode()
            z.append((mode.float() * model.scale_factor).half().cpu())
            images = images[batch:]
    joined = torch.cat(z)
    return joined.reshape(len(folder), variants, *joined.shape[1:])


def _key(model: LatentDiffusion, folder: Folder, variants: int) -> str:
    """A name for the cache: data, transform and the weights of the encoder."""
    digest = hashlib.sha256()
    for text in (folder.rows, vars(folder.transform), variants, model.scale_factor):
        digest.update(json.dumps(text, sort_keys=True).encode())
    first_stage: Any = model.autoencoder
    for value in [*first_stage.encoder.state_dict().values(), first_stage.quant_conv.weight]:
        digest.update(value.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()[:12]

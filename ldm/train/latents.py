"""Latents made once and read many times, so that a step costs only what is trained.

Several variants of each record are encoded (on different colours and places), and with them what
the encoders of the model see beside the picture (`cached` names it: a mask with the latent around
it, a depth map, a small copy). Captions and noise are still drawn anew for every sample. The cache
is named after what it depends on, so an old one is never taken for a new one.
"""

import hashlib
import json
import logging
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.data.folder import Folder, Latents, collate
from ldm.data.transforms import COLOURS, Emoji
from ldm.model import LatentDiffusion
from ldm.train.objective import on_device

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
    kept = torch.load(path, weights_only=True)  # {"z": (N, variants, C, h, w), …}, half precision
    return Latents(kept, _Captions(folder), seed=folder.seed)


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
def _encode(model: LatentDiffusion, folder: Folder, variants: int, batch: int) -> dict[str, Tensor]:
    transform: Any = folder.transform
    parts: list[dict[str, Tensor]] = []
    samples: list[dict[str, Tensor]] = []
    for index in tqdm(range(len(folder)), unit="picture", dynamic_ncols=True, mininterval=5):
        picture = folder.record(index)["picture"]
        for variant in range(variants):
            chance = Random(f"{index} {variant}")
            samples.append(transform.seen(picture, _colour(index, variant), chance))
        while len(samples) >= batch or (samples and index == len(folder) - 1):
            parts.append(_kept(model, collate(samples[:batch])))
            samples = samples[batch:]
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {n: v.reshape(len(folder), variants, *v.shape[1:]) for n, v in joined.items()}


def _kept(model: LatentDiffusion, batch: dict[str, Any]) -> dict[str, Tensor]:
    """The latents of a batch of samples, and what the encoders say they make of the picture."""
    names = _seen(model)
    batch = on_device(batch, model.device)
    with torch.autocast(model.device.type, torch.bfloat16):
        z = model.autoencoder.encode(batch["jpg"]).mode() * model.scale_factor  # (B, C, h, w)
        if names:
            batch = model.prepare(batch, (z.shape[-2], z.shape[-1]))
    kept: dict[str, Tensor] = {"z": z, **{name: batch[name] for name in names}}
    return {name: value.half().cpu() for name, value in kept.items()}


def _seen(model: LatentDiffusion) -> list[str]:
    """The records that the model's encoders want kept beside the latents."""
    encoders: Any = model.conditioner.children()
    return sorted({e.cached for e in encoders if getattr(e, "cached", None)})


def _key(model: LatentDiffusion, folder: Folder, variants: int) -> str:
    """A name for the cache: data, transform and the weights of the encoder."""
    digest = hashlib.sha256()
    seen = (_seen(model), variants, model.scale_factor)
    for text in (folder.rows, vars(folder.transform), *seen):
        digest.update(json.dumps(text, sort_keys=True, default=repr).encode())
    first_stage: Any = model.autoencoder
    for value in [*first_stage.encoder.state_dict().values(), first_stage.quant_conv.weight]:
        digest.update(value.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()[:12]

"""Pictures of a class, made by the model before it is taught one of that class: DreamBooth.

While the model learns what `a sks dog` is, its own pictures of `a dog` keep it from forgetting what
dogs are. Ruiz et al. 2022 (arXiv:2208.12242).
"""

import itertools
import logging
from pathlib import Path

import torch
from tqdm import tqdm

from ldm.data.folder import IMAGE_SUFFIXES
from ldm.imaging.metadata import write_png
from ldm.imaging.pixels import to_pil
from ldm.model import LatentDiffusion
from ldm.pipelines import txt2img

__all__ = ["make_pictures"]

log = logging.getLogger(__name__)


def make_pictures(
    model: LatentDiffusion,
    folder: Path,
    prompt: str,
    count: int,
    *,
    steps: int = 30,
    scale: float = 5.0,
    batch: int = 8,
) -> None:
    """Fills a folder up to `count` pictures with those of a prompt; 00007.png has seed 7.

    What is there stays: pictures of one's own, and those of an interrupted making.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = sum(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir())
    free = (seed for seed in itertools.count() if not (folder / f"{seed:05}.png").exists())
    lacking = list(itertools.islice(free, max(0, count - there)))
    if not lacking:
        return
    log.info("making %d pictures of `%s` in `%s`", len(lacking), prompt, folder)
    was_training, side = model.training, model.image_size * model.downscale
    model.eval()
    for first in tqdm(range(0, len(lacking), batch), unit="batch", dynamic_ncols=True):
        seeds = lacking[first : first + batch]
        with torch.inference_mode():
            image = txt2img(
                model,
                [prompt] * len(seeds),
                size=(side, side),
                steps=steps,
                scale=scale,
                seeds=seeds,
            )
        for seed, picture in zip(seeds, to_pil(image), strict=True):
            part = folder / f".{seed:05}.part"
            write_png(part, picture, {"prompt": prompt, "seed": seed, "steps": steps})
            part.replace(folder / f"{seed:05}.png")
    model.train(was_training)

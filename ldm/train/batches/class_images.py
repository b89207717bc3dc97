"""Class images for DreamBooth, sampled from the model before it is trained on a subject.

Training on images of the class (`a dog`) preserves the model's prior while it learns the subject
(`a sks dog`). Ruiz et al. 2022 (arXiv:2208.12242).
"""

import itertools
import logging
import math
from pathlib import Path

from tqdm import tqdm

from ldm.data.folder import ImageFolder
from ldm.imaging.metadata import write_png
from ldm.imaging.pixels import to_pil
from ldm.imaging.reading import IMAGE_SUFFIXES
from ldm.model import LatentDiffusion
from ldm.pipelines import txt2img
from ldm.pipelines.families import FAMILIES, find_family
from ldm.runtime.errors import ArgumentError
from ldm.runtime.files import write_atomically
from ldm.train.batches.images import open_images
from ldm.train.config.schema import ClassImageOptions
from ldm.train.distributed.parallel import eval_mode

__all__ = ["open_class_images", "sample_class_images"]

log = logging.getLogger(__name__)

GUIDANCE_SCALE = 5.0


def open_class_images(model: LatentDiffusion, options: ClassImageOptions, seed: int) -> ImageFolder:
    """Open the class images; missing ones are sampled from the model first."""
    sample_class_images(model, options.root, options.prompt, options.count)
    fields = {"text": options.prompt}
    spec = {"root": options.root, "transform": options.transform, "fields": fields}
    images = open_images(spec, seed, "data.params.prior")
    assert isinstance(images, ImageFolder)  # as `root` is given
    return images


def sample_class_images(
    model: LatentDiffusion, folder: Path, prompt: str, count: int, *, steps: int = 30
) -> None:
    """Fill a folder up to `count` images with samples of a prompt; 00007.png has seed 7.

    Existing images are kept and counted.

    Raises:
        ArgumentError: Images are missing, and the model is not a text-to-image model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    existing_count = sum(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir())
    free_seeds = (seed for seed in itertools.count() if not (folder / f"{seed:05}.png").exists())
    missing_seeds = list(itertools.islice(free_seeds, max(0, count - existing_count)))
    if not missing_seeds:
        return
    family = find_family(model.conditioner)
    if family not in (None, "text"):  # None: unknown, `txt2img` raises if it cannot use it
        raise ArgumentError(
            f"{len(missing_seeds)} class images are missing in `{folder}`, and "
            f"{FAMILIES[family].title} cannot make them from text alone: put class images there"
        )
    log.info("sampling %d images of `%s` into `%s`", len(missing_seeds), prompt, folder)
    # As many latent pixels at once as in 8 images of 512x512, whose latents have 64x64.
    batch_size = max(1, 8 * 64**2 // math.prod(model.latent_size))
    for start in tqdm(range(0, len(missing_seeds), batch_size), unit="batch", dynamic_ncols=True):
        seeds = missing_seeds[start : start + batch_size]
        with eval_mode(model):
            images = txt2img(
                model, [prompt] * len(seeds), steps=steps, scale=GUIDANCE_SCALE, seeds=seeds
            )
        for seed, image in zip(seeds, to_pil(images), strict=True):
            with write_atomically(folder / f"{seed:05}.png") as temporary:
                write_png(temporary, image, {"prompt": prompt, "seed": seed, "steps": steps})

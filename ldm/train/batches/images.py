"""Open the images of a run: a folder, a Hugging Face data set or tar shards."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from ldm.data.dataset import ImageDataset
from ldm.data.drawings import EmojiTransform, caption_texts
from ldm.data.folder import Folder, read_metadata
from ldm.data.hub import Hub
from ldm.data.shards import Shards
from ldm.data.transforms import PhotoTransform, Transform
from ldm.encoders.text import TextEncoder, collect_vocabulary
from ldm.model import LatentDiffusion
from ldm.runtime.errors import MissingFile
from ldm.runtime.types import JsonMapping

__all__ = [
    "check_images",
    "fill_vocabulary",
    "open_images",
    "warn_of_missing_captions",
]

log = logging.getLogger(__name__)

TRANSFORMS: dict[str, Callable[..., Transform]] = {
    transform.NAME: transform for transform in (EmojiTransform, PhotoTransform)
}
DATASETS: dict[str, type[Folder | Hub | Shards]] = {"root": Folder, "hub": Hub, "shards": Shards}


def check_images(spec: JsonMapping, where: str) -> None:
    """Raise MissingFile if the folder of images does not exist."""
    if "root" in spec and not Path(spec["root"]).expanduser().is_dir():
        raise MissingFile(f"{where}.root: there is no folder `{spec['root']}`")


def open_images(
    spec: JsonMapping, seed: int, where: str, *, commands: bool = False
) -> Folder | Hub | Shards:
    """Open images with their transform.

    Args:
        spec: Keywords of `Folder` (with `root`), `Hub` (`hub`) or `Shards` (`shards`); `transform`
            is a mapping of `name` and the keywords of that transform.
        where: Section of the config, for messages.
        commands: Whether to run `pipe:COMMAND` addresses of shards.
    """
    check_images(spec, where)
    transform = dict(spec["transform"])
    location = next(key for key in DATASETS if key in spec)
    name = transform.pop("name")
    try:
        options = {**spec, "transform": TRANSFORMS[name](**transform), "seed": seed}
        if location == "shards":
            options["commands"] = commands
        return DATASETS[location](**options)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where}.{location}: {error}") from error
    except TypeError as error:
        raise ValueError(f"{where}: {str(error).replace('.__init__()', '')}") from error


def fill_vocabulary(model: LatentDiffusion, images: ImageDataset | Shards) -> None:
    """Set the tokens of pruned vocabularies that are not set, from all captions."""
    for encoder in model.conditioner.find_all(TextEncoder):
        ids = encoder.token_ids
        if ids is not None and ids.equal(torch.arange(len(ids))):  # the initial placeholder
            # A folder's metadata has the rows of all splits.
            rows = read_metadata(images.root) if isinstance(images, Folder) else images.metadata()
            ids.copy_(collect_vocabulary(caption_texts(rows), encoder))


def warn_of_missing_captions(model: LatentDiffusion, images: ImageDataset | Shards) -> None:
    """Log how many photos of a folder have no caption, if the model reads captions."""
    if model.conditioner.text is None or not isinstance(images, Folder):
        return
    if isinstance(images.transform, PhotoTransform):
        missing = sum(not row.get("text") for row in images.metadata())
        if missing:
            log.warning(
                "%d of %d images of `%s` have no caption", missing, len(images), images.root
            )

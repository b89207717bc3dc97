"""Open the images of a run: a folder, a Hugging Face dataset or tar shards."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch

from ldm.data.dataset import ImageDataset
from ldm.data.drawings import EmojiTransform, list_vocabulary_texts
from ldm.data.folder import ImageFolder, read_metadata
from ldm.data.hub import HubDataset
from ldm.data.shards import Shards, expand_patterns
from ldm.data.transforms import PhotoTransform, Transform, get_class_label
from ldm.encoders.labels import ClassEmbedder
from ldm.encoders.text import TextEncoder, collect_vocabulary
from ldm.model import LatentDiffusion
from ldm.runtime.errors import ArgumentError, ConfigError, FileFormatError, MissingFile
from ldm.runtime.types import JsonMapping

__all__ = [
    "build_transform", "check_class_labels", "check_images", "fill_vocabulary", "open_images",
    "warn_of_missing_captions",
]  # fmt: skip

log = logging.getLogger(__name__)

TRANSFORMS: dict[str, Callable[..., Transform]] = {
    transform.NAME: transform for transform in (EmojiTransform, PhotoTransform)
}
Images: TypeAlias = ImageFolder | HubDataset | Shards
DATASETS: dict[str, type[Images]] = {"root": ImageFolder, "hub": HubDataset, "shards": Shards}


def build_transform(options: JsonMapping) -> Transform:
    """Build a transform from its `name` and keyword arguments."""
    kwargs = dict(options)
    return TRANSFORMS[kwargs.pop("name")](**kwargs)


def check_images(spec: JsonMapping, where: str, *, allow_commands: bool = False) -> None:
    """Raise the errors of `open_images` that can be detected before images are read.

    Raises:
        ConfigError: The options of the transform cannot be combined.
        ArgumentError: Shards may not be read from a command, or their pattern is not supported.
        MissingFile: A folder, its metadata file or a shard does not exist.
    """
    try:
        build_transform(spec["transform"])
    except ArgumentError as error:
        raise ConfigError(f"{where}.transform: {error}") from None
    if "root" in spec and not Path(spec["root"]).expanduser().is_dir():
        raise MissingFile(f"{where}.root: there is no folder `{spec['root']}`")
    if "metadata" in spec and not Path(spec["metadata"]).expanduser().is_file():
        raise MissingFile(f"{where}.metadata: no file `{spec['metadata']}`")
    if "shards" in spec:
        try:
            expand_patterns(spec["shards"], allow_commands=allow_commands)
        except MissingFile as error:
            raise MissingFile(f"{where}.shards: {error}") from None


def open_images(
    spec: JsonMapping, seed: int, where: str, *, allow_commands: bool = False
) -> Images:
    """Open images with their transform.

    Args:
        spec: Keywords of `ImageFolder` (with `root`), `HubDataset` (`hub`) or `Shards` (`shards`);
            `transform` is a mapping of `name` and the keywords of that transform.
        where: Section of the config, for messages.
        allow_commands: Whether to run `pipe:COMMAND` URLs of shards.
    """
    key = next(key for key in DATASETS if key in spec)
    options = {**spec, "transform": build_transform(spec["transform"]), "seed": seed}
    if key == "shards":
        options["allow_commands"] = allow_commands
    try:
        return DATASETS[key](**options)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where}.{key}: {error}") from error


def fill_vocabulary(model: LatentDiffusion, images: ImageDataset | Shards) -> None:
    """Set the token ids of pruned vocabularies from all captions, unless they are set."""
    for encoder in model.conditioner.find_all(TextEncoder):
        ids = encoder.token_ids
        if ids is not None and ids.equal(torch.arange(len(ids))):  # the initial placeholder
            # A folder's metadata has the rows of all splits.
            rows = (
                read_metadata(images.root, images.metadata_file)
                if isinstance(images, ImageFolder)
                else images.iter_metadata()
            )
            ids.copy_(collect_vocabulary(list_vocabulary_texts(rows), encoder))


def check_class_labels(model: LatentDiffusion, images: ImageDataset | Shards) -> None:
    """Raise FileFormatError for an image in a folder whose class the model does not have."""
    embedder = model.conditioner.find(ClassEmbedder)
    if embedder is None or embedder.key != "class_label" or not isinstance(images, ImageFolder):
        return
    num_classes = embedder.embedding.num_embeddings
    for row in images.iter_metadata():
        label = get_class_label(row)
        where = f"`{images.root}`: `{row['file_name']}`"
        if label is None:
            raise FileFormatError(
                f"{where} has no `class_label`, which the model reads; `class_folders: true` takes "
                "it from the folders"
            )
        if label >= num_classes:
            raise FileFormatError(
                f"{where} has the `class_label` {label}, but the model's are 0 … {num_classes - 1}"
            )


def warn_of_missing_captions(model: LatentDiffusion, images: ImageDataset | Shards) -> None:
    """Log how many photos of a folder have no caption, if the model is conditioned on text."""
    if "txt" not in model.conditioner.keys or not isinstance(images, ImageFolder):
        return
    if isinstance(images.transform, PhotoTransform):
        missing = sum(not row.get("text") for row in images.iter_metadata())
        if missing:
            log.warning(
                "%d of %d images of `%s` have no caption", missing, len(images), images.root
            )

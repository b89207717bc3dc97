"""Open the training and validation data of a run, from the `data` section of its config.

params:
    train: {root: DIR, split: train, transform: {name: photo, size: 512}}   a folder
    validation: …                                                           as `train`
    latents: {cache_dir: DIR, variants_per_image: 5}    encode images once, before training
    texts: {cache_dir: DIR}                             encode captions once, before training
    prior: {root: DIR, prompt: a dog, count: 200, …}    class images of DreamBooth
"""

from torch import nn

from ldm.data.dataset import DreamBoothDataset, SampleDataset
from ldm.data.shards import Shards
from ldm.data.source import BatchSource, DatasetSource
from ldm.model import LatentDiffusion
from ldm.runtime.errors import ConfigError
from ldm.train.batches.class_images import open_class_images
from ldm.train.batches.contexts import cache_contexts
from ldm.train.batches.images import (
    check_class_labels,
    check_images,
    fill_vocabulary,
    open_images,
    warn_of_missing_captions,
)
from ldm.train.batches.latents import cache_latents
from ldm.train.config.schema import DataOptions

__all__ = ["check_data", "open_batches"]

# Inputs of models of latent-diffusion that no data has.
UNSUPPORTED_KEYS = ("segmentation", "coordinates_bbox")


def check_data(data: DataOptions, *, allow_commands: bool = False) -> None:
    """Raise errors that can be detected before a model is built, see `check_images`."""
    specs = {"train": data.train, "validation": data.validation}
    if data.prior:
        specs["prior"] = {"transform": data.prior.transform}  # its folder may be created
        if "buckets" in data.prior.transform:
            raise ConfigError("data.params.prior: class images must have one size, not `buckets`")
    for name, spec in specs.items():
        if spec:
            check_images(spec, f"data.params.{name}", allow_commands=allow_commands)


def open_batches(
    model: nn.Module, data: DataOptions, seed: int, *, allow_commands: bool = False
) -> tuple[BatchSource, BatchSource | None]:
    """Open the training data, and the validation data if there is any, as sources of batches.

    The token ids of a model with a pruned vocabulary are set from the captions.

    Args:
        model: The model to train, which computes cached latents and contexts and samples class
            images.
        seed: Seed of the order and the augmentation of the samples.
        allow_commands: Whether to run `pipe:COMMAND` URLs of shards; never taken from the config.
    """
    specs = {"train": data.train, "validation": data.validation}
    if isinstance(model, LatentDiffusion):
        _check_conditions(model, data)
    images_by_split = {
        split: open_images(spec, seed, f"data.params.{split}", allow_commands=allow_commands)
        for split, spec in specs.items()
        if spec
    }
    images, validation = images_by_split["train"], images_by_split.get("validation")
    samples: SampleDataset | Shards = images
    if isinstance(model, LatentDiffusion):
        for split_images in images_by_split.values():
            check_class_labels(model, split_images)
        fill_vocabulary(model, images)
        warn_of_missing_captions(model, images)
        captioned_images = [images]
        if data.latents:
            samples = cache_latents(model, images, **data.latents.model_dump())
        if data.prior and not isinstance(samples, Shards):
            class_images = open_class_images(model, data.prior, seed)
            samples = DreamBoothDataset(samples, class_images)
            captioned_images.append(class_images)
        if data.texts:
            cache_contexts(model, captioned_images, **data.texts.model_dump())
    else:
        options = {"latents": data.latents, "texts": data.texts, "prior": data.prior}
        names = [f"`{name}`" for name, option in options.items() if option]
        if names:
            raise ValueError(f"data.params: {', '.join(names)} are for diffusion models only")
    source = _to_source(samples, seed, None if isinstance(images, Shards) else images)
    return source, None if validation is None else _to_source(validation, seed)


def _check_conditions(model: LatentDiffusion, data: DataOptions) -> None:
    """Raise ConfigError if the model reads what no data has, or a transform does not make."""
    transforms = {
        "train": data.train["transform"],
        "validation": data.validation and data.validation["transform"],
        "prior": data.prior and data.prior.transform,
    }
    for key in UNSUPPORTED_KEYS:
        if key in model.conditioner.keys:
            raise ConfigError(f"model: the model reads `{key}`, training on it is not supported")
    for encoder in model.conditioner.encoders.values():
        image_key = encoder.source_key
        for name, transform in transforms.items():
            if image_key and transform and image_key not in (transform.get("conditions") or {}):
                where = f"data.params.{name}.transform"
                condition = f"`conditions: {{{image_key}: {{}}}}`"
                raise ConfigError(f"{where}: the model reads `{image_key}`, add {condition}")


def _to_source(
    samples: SampleDataset | Shards, seed: int, images: SampleDataset | None = None
) -> BatchSource:
    return samples if isinstance(samples, Shards) else DatasetSource(samples, seed, images=images)

"""Sources of a run, from the `data` section of its config.

params:
    train: {root: DIR, split: train, transform: {name: photo, size: 512}}   a folder
    validation: …                                                           as `train`
    latents: {cache: DIR, variants: 5}            encode images once, before training
    texts: {cache: DIR}                           encode captions once, before training
    prior: {root, prompt, count, transform}       class images of DreamBooth
"""

import logging
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ldm.data.dataset import ImageDataset, SampleDataset, WithClassImages
from ldm.data.drawings import caption_texts
from ldm.data.folder import Folder, read_metadata
from ldm.data.shards import Shards
from ldm.data.source import DatasetSource, Source
from ldm.data.transforms import PhotoTransform
from ldm.encoders.text import TextEncoder
from ldm.model import LatentDiffusion
from ldm.train.batches.class_images import open_class_images
from ldm.train.batches.contexts import cache_contexts
from ldm.train.batches.images import open_images
from ldm.train.batches.latents import cache_latents
from ldm.train.config.schema import Data

__all__ = ["collect_vocabulary", "open_sources"]

log = logging.getLogger(__name__)


def open_sources(
    model: nn.Module, data: Data, seed: int, *, commands: bool = False
) -> tuple[Source, Source | None]:
    """Open the training data, and the held-out data if there is any.

    Args:
        model: what is trained. It computes cached latents and contexts and samples class images;
            a pruned token embedding without tokens gets those of the captions.
        seed: of the order and of all random numbers in the samples.
        commands: whether shards may come from `pipe:COMMAND`; never what a config says.
    Raises:
        ValueError: options are unknown or do not fit the model.
        FileNotFoundError: files are missing.
    """
    images = open_images(data.train, seed, "data.params.train", commands=commands)
    held_out: Source | None = None
    if data.validation:
        others = open_images(data.validation, seed, "data.params.validation", commands=commands)
        held_out = others if isinstance(others, Shards) else DatasetSource(others, seed)
    samples: SampleDataset | Shards = images
    if isinstance(model, LatentDiffusion):
        _fill_vocabulary(model, images)
        _warn_of_missing_captions(model, images)
        captioned = [images]
        if data.latents:
            samples = cache_latents(model, images, **data.latents.model_dump())
        if data.prior and not isinstance(samples, Shards):
            class_images = open_class_images(model, data.prior, seed)
            samples = WithClassImages(samples, class_images)
            captioned.append(class_images)
        if data.texts:
            cache_contexts(model, captioned, **data.texts.model_dump())
    if isinstance(samples, Shards):
        return samples, held_out
    shown = None if isinstance(images, Shards) else images
    return DatasetSource(samples, seed, shown=shown), held_out


def _fill_vocabulary(model: LatentDiffusion, images: ImageDataset | Shards) -> None:
    """Give a pruned token embedding that still has no tokens those of all captions."""
    text = model.conditioner.find(TextEncoder)
    if text is None or text.token_ids is None:
        return
    if text.token_ids.equal(torch.arange(len(text.token_ids))):
        # A folder's metadata has the rows of all splits.
        rows = read_metadata(images.root) if isinstance(images, Folder) else images.metadata()
        text.token_ids.copy_(collect_vocabulary(caption_texts(rows), text))


def collect_vocabulary(texts: Iterable[str], encoder: TextEncoder) -> Tensor:
    """Collect the sorted ids of all tokens in the texts, for the pruned embedding of `encoder`.

    Rows that are left over get ids beyond CLIP's, which never occur.

    Raises:
        ValueError: there are more tokens than rows.
    """
    assert encoder.token_ids is not None
    ids = encoder.tokenize(sorted(set(texts))).unique()
    rows = len(encoder.token_ids)
    if len(ids) > rows:
        raise ValueError(f"`compact_vocab` is too small: {len(ids)} tokens occur, plus one row")
    spare = torch.arange(rows - len(ids)) + 49408
    return torch.cat([ids, spare])


def _warn_of_missing_captions(model: LatentDiffusion, images: ImageDataset | Shards) -> None:
    if model.conditioner.text is None or not isinstance(images, Folder):
        return
    if isinstance(images.transform, PhotoTransform):
        missing = sum(not row.get("text") for row in images.metadata())
        if missing:
            log.warning(
                "%d of %d images of `%s` have no caption", missing, len(images), images.root
            )

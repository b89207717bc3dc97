"""Cached contexts of captions, computed once by a frozen text encoder (see `TensorStore`)."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ldm.conditioning import EncoderOptions
from ldm.data.dataset import ImageDataset
from ldm.data.shards import Shards
from ldm.data.transforms import PhotoTransform, get_captions
from ldm.encoders.text import TextEncoder
from ldm.model import LatentDiffusion
from ldm.train.batches.store import Entry, TensorStore, digest, digest_weights, fill_from_shards

__all__ = ["CachedContexts", "cache_contexts"]

# Options that were added to encoders after the first caches, with their defaults: keys leave these
# out, so that old caches stay valid.
LATER_OPTIONS = {
    ("always_return_pooled", False), ("always_return_mask", False), ("legacy", True)
}  # fmt: skip
# Class -> its former name, which keys retain for the same reason.
FORMER_CLASSES = {"FunctionalLinear": "Product"}


class CachedContexts:
    """Cached outputs of a text encoder by caption; a `ContextCache` for `TextEncoder.cache`."""

    def __init__(self, encoder: TextEncoder, cache_dir: Path) -> None:
        self.store = TensorStore(cache_dir, "contexts")
        self.encoder_digest = digest_encoder(encoder)

    def __contains__(self, caption: object) -> bool:
        return self._make_key(caption) in self.store

    def __getitem__(self, caption: str) -> Entry:
        return self.store[self._make_key(caption)]

    @torch.inference_mode()
    def fill(self, encoder: TextEncoder, captions: Iterable[str], batch_size: int) -> int:
        """Compute missing contexts of the captions and of "", `batch_size` at once."""

        def encode(texts: Sequence[str]) -> list[Entry]:
            cond = encoder.condition(texts)
            outputs = {"context": cond.crossattn, "pooled": cond.vector}
            tensors = {k: v.half().cpu() for k, v in outputs.items() if v is not None}
            return [{k: v[index] for k, v in tensors.items()} for index in range(len(texts))]

        items = [(self._make_key(caption), caption) for caption in dict.fromkeys(["", *captions])]
        return self.store.fill(items, encode, batch_size=batch_size, unit="caption")

    def _make_key(self, caption: object) -> str:
        return digest(self.encoder_digest, caption)


def cache_contexts(
    model: LatentDiffusion,
    datasets: Iterable[ImageDataset | Shards],
    cache_dir: Path,
    *,
    batch_size: int = 64,
) -> None:
    """Set each text encoder's cache to its outputs for all captions; compute missing ones.

    Raises:
        ValueError: The model has no text encoder, or one is trained, or captions are random.
    """
    encoders, datasets = model.conditioner.find_all(TextEncoder), list(datasets)
    if not encoders or any(p.requires_grad for encoder in encoders for p in encoder.parameters()):
        raise ValueError("data.params.texts: only contexts of a frozen text encoder can be cached")
    for encoder in encoders:
        contexts = CachedContexts(encoder, cache_dir)
        for dataset in datasets:
            transform = dataset.transform
            if not isinstance(transform, PhotoTransform) or transform.tags is not None:
                message = "data.params.texts: only photos without `tags` have fixed captions"
                raise ValueError(message)
            captions = (text for row in dataset.iter_metadata() for text in get_captions(row))
            fill = partial(contexts.fill, encoder, captions, batch_size)
            if isinstance(dataset, Shards):
                fill_from_shards(contexts.store, dataset, [contexts.encoder_digest], fill)
            else:
                fill()
        encoder.cache = contexts


def digest_encoder(encoder: TextEncoder) -> str:
    """Return the digest of the weights and options of an encoder."""
    options = [_get_plain_options(module) for module in encoder.modules()]
    return digest(digest_weights(encoder), options)


def _get_plain_options(module: nn.Module) -> dict[str, object]:
    """Return the class of a module, and its attributes with plain values."""
    plain_types = (str, int, float, bool, tuple)
    options = {
        k: v
        for k, v in vars(module).items()
        if isinstance(v, plain_types)
        and k[0] != "_"
        and k not in EncoderOptions.__annotations__
        and (k, v) not in LATER_OPTIONS
    }
    name = type(module).__name__
    return {"class": FORMER_CLASSES.get(name, name), **options, "training": False}

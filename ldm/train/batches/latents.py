"""Cached latents of images, so that a training step does not encode.

Some variants of each image are encoded (emoji on different backgrounds, photos cropped and mirrored
differently), and with them the inputs of the model's encoders that are slow to compute (each
encoder's `cache_key`: a mask with its masked latent, a depth map, a low-resolution image). Mean and
standard deviation are stored: each sample draws its latent from the posterior anew. Keys depend on
the bytes of an image, on the transform and on the weights (see `Store`), so that the images of a
folder find their latents when they are packed into shards.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ldm.data.dataset import ImageDataset, Sample, SampleDataset, UnreadableSample
from ldm.data.shards import RawSample, Shards, image_bytes, metadata_of, name_of
from ldm.data.source import collate, to_device
from ldm.data.transforms import Transform
from ldm.imaging.reading import decode_image
from ldm.model import LatentDiffusion
from ldm.nets.autoencoder import AutoencoderKL
from ldm.runtime.errors import unknown_name
from ldm.train.batches.store import Store, digest, digest_of_weights

__all__ = ["LatentDataset", "cache_latents", "cache_latents_of_shards"]

log = logging.getLogger(__name__)

VERSION = 2  # of the entries; raise it also if the same options give other pixels
PRECISIONS = {"16": torch.float16, "32": torch.float32}
Size = tuple[int, int]
Metadata = Mapping[str, Any]


class LatentInput(NamedTuple):
    """An image whose latent is computed.

    load: decodes the image; raises UnreadableSample for a damaged file.
    content: digest of the file.
    size: (width, height) of its bucket, if there are buckets.
    """

    load: Callable[[], Image.Image]
    content: str
    size: Size | None
    variant: int


@dataclass(frozen=True)
class LatentCache:
    """Latents of some variants of each image, in a store.

    Attributes:
        transform: of images and captions.
        model_digest: of all else that the latents depend on.
        variants: of each image.
    """

    store: Store
    transform: Transform
    model_digest: str
    variants: int

    def key(self, content: str, size: Size | None, variant: int) -> str:
        """Key of a latent in the store."""
        return digest(self.model_digest, content, size, variant)

    def variant_name(self, content: str, variant: int) -> str:
        """Which of the transform's named variants an image has: each in turn, in its own order."""
        names = self.transform.variants
        if not names:
            return ""
        return Random(content).sample(names, len(names))[variant % len(names)]

    def sample(
        self, name: str, content: str, size: Size | None, row: Metadata, rng: Random
    ) -> Sample:
        """Returns {"z", "z_std", "txt", …} of an image in a random variant.

        Args:
            name: of the sample in errors.
            row: its metadata.
        Raises:
            UnreadableSample: there is no latent, as the image is damaged.
        """
        variant = rng.randrange(self.variants)
        key = self.key(content, size, variant)
        if key not in self.store:
            raise UnreadableSample(name, "its latent could not be computed")
        tensors = {name: value.float() for name, value in self.store[key].items()}
        caption = self.transform.caption(row, rng, self.variant_name(content, variant))
        return {**tensors, "txt": caption}

    def inputs(
        self, load: Callable[[], Image.Image], content: str, size: Size | None
    ) -> Iterator[tuple[str, LatentInput]]:
        """(key, input) of all variants of an image."""
        for variant in range(self.variants):
            yield self.key(content, size, variant), LatentInput(load, content, size, variant)

    def fill(
        self,
        inputs: Iterable[tuple[str, LatentInput]],
        model: LatentDiffusion,
        batch_size: int,
        precision: str,
    ) -> int:
        """Computes the missing latents; returns the number of those that failed."""
        # Each image is opened without warnings; threads would not restore the filters.
        with warnings.catch_warnings(), ThreadPoolExecutor() as pool:

            def encode(batch: Sequence[LatentInput]) -> tuple[list[int], dict[str, Tensor]]:
                samples = list(pool.map(self._transform_image, batch))
                readable = [index for index, sample in enumerate(samples) if sample is not None]
                if not readable:
                    return [], {}
                key = self.key(batch[0].content, batch[0].size, batch[0].variant)
                generator = torch.Generator().manual_seed(int(key[:15], 16))
                images = collate([sample for sample in samples if sample is not None])
                return readable, _encode(model, images, precision, generator)

            return self.store.fill(
                inputs, encode, batch_size=batch_size, group=lambda one: one.size
            )

    def _transform_image(self, one: LatentInput) -> dict[str, Tensor] | None:
        """All of a sample but its caption; None for a damaged file."""
        try:
            image = one.load()
        except UnreadableSample:  # reported when its latent is asked for
            return None
        rng = Random(f"{one.content} {one.variant}")
        return self.transform.image_fields(image, rng, self.variant_name(one.content, one.variant))


class LatentDataset(SampleDataset):
    """Latents in the place of images, as {"z", "z_std", "txt", …}.

    Args:
        dataset: of the images.
        digests: of the file of every sample, "" where it cannot be read.
    """

    def __init__(self, dataset: ImageDataset, cache: LatentCache, digests: Sequence[str]) -> None:
        self.dataset = dataset
        self.cache = cache
        self.digests = digests
        self.groups = dataset.groups

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        rng = Random(f"{self.dataset.seed} {epoch} {index}")
        row, name = self.dataset.row(index), self.dataset.name(index)
        return self.cache.sample(name, self.digests[index], self.bucket_size(index), row, rng)

    def names(self) -> Iterator[str]:
        return self.dataset.names()

    def bucket_size(self, index: int) -> Size | None:
        """(width, height) of the bucket of an image, if there are buckets."""
        buckets = self.cache.transform.buckets
        if self.groups is None or buckets is None:
            return None
        return buckets.sizes[self.groups[index]]

    def load_image(self, index: int) -> Image.Image:
        image: Image.Image = self.dataset.load(index)["image"]
        return image

    def missing_inputs(self) -> Iterator[tuple[str, LatentInput]]:
        """All latents that are not in the cache, one group after the other."""
        groups = self.groups or [0] * len(self)
        for index in sorted(range(len(self)), key=lambda index: groups[index]):
            if content := self.digests[index]:
                load = partial(self.load_image, index)
                for key, one in self.cache.inputs(load, content, self.bucket_size(index)):
                    if key not in self.cache.store:
                        yield key, one


def cache_latents(
    model: LatentDiffusion,
    dataset: ImageDataset,
    cache: Path,
    *,
    variants: int | None = None,
    batch: int = 32,
    precision: str = "16",
) -> LatentDataset:
    """Computes the latents of a data set that the cache does not have.

    Args:
        cache: folder of the cache files.
        variants: of each image; default: all named variants of the transform, or one.
        batch: images encoded at once.
        precision: "16" (encoded under bfloat16, stored as float16) or "32".
    Raises:
        UnknownName: another precision.
    """
    latent_cache = _open_cache(model, dataset.transform, cache, variants, precision)
    digests = list(_content_digests(dataset))
    latents = LatentDataset(dataset, latent_cache, digests)
    latent_cache.fill(list(latents.missing_inputs()), model, batch, str(precision))
    return latents


def cache_latents_of_shards(
    model: LatentDiffusion,
    shards: Shards,
    cache: Path,
    *,
    variants: int | None = None,
    batch: int = 32,
    precision: str = "16",
) -> Shards:
    """Computes the latents of shards, as `cache_latents`; returns shards of latents.

    The shards are read for it only if one of them has changed.
    """
    latents = _open_cache(model, shards.transform, cache, variants, precision)
    states = [(url, _file_state(url)) for url in shards.urls]
    sizes = None if shards.transform.buckets is None else shards.transform.buckets.sizes
    facts = (latents.model_digest, latents.variants, sizes, sorted(shards.limits.items()), states)
    path = latents.store.folder / f"shards-{digest(*facts)[:16]}.json"
    summary = None
    if all(state is not None for _, state in states):
        summary = _read_summary(path, latents.store.files)
    if summary is None:
        log.info("reading %d shards for their latents", len(shards.urls))
        damaged = latents.fill(_inputs_of_shards(shards, latents), model, batch, str(precision))
        summary = {"damaged": damaged, "files": sorted(latents.store.files)}
        path.write_text(json.dumps(summary), "utf-8")
    if summary["damaged"]:
        log.warning(
            "%d latents could not be computed; they are tried again without `%s`",
            summary["damaged"],
            path,
        )
    return shards.with_samples(partial(_sample_of_shard, latents, shards))


def _open_cache(
    model: LatentDiffusion,
    transform: Transform,
    cache: Path,
    variants: int | None,
    precision: str,
) -> LatentCache:
    precision = str(precision)
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS, "data.params.latents")
    variants = len(transform.variants) or 1 if variants is None else variants
    model_digest = digest_model(model, transform, precision)
    return LatentCache(Store(cache, "latents"), transform, model_digest, variants)


def _inputs_of_shards(shards: Shards, cache: LatentCache) -> Iterator[tuple[str, LatentInput]]:
    """All latents of the samples in shards."""
    for raw in shards.raw_samples():
        with suppress(ValueError):  # reported when the sample is asked for
            content = digest(image_bytes(raw)[1])
            yield from cache.inputs(partial(_decode_image, raw), content, shards.bucket_size(raw))


def _decode_image(raw: RawSample) -> Image.Image:
    suffix, data = image_bytes(raw)
    try:
        return decode_image(data, f"{name_of(raw)}.{suffix}")
    except ValueError as error:
        raise UnreadableSample(name_of(raw), str(error)) from error


def _sample_of_shard(cache: LatentCache, shards: Shards, raw: RawSample, rng: Random) -> Sample:
    name = name_of(raw)
    try:
        content, row = digest(image_bytes(raw)[1]), metadata_of(raw)
    except ValueError as error:
        raise UnreadableSample(name, str(error)) from error
    return cache.sample(name, content, shards.bucket_size(raw), row, rng)


def _file_state(url: str) -> tuple[int, ...] | None:
    """Size and times of a file; None for what is not on this machine, and may always change."""
    if not Path(url).is_file():
        return None
    status = Path(url).stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read_summary(path: Path, files: set[str]) -> dict[str, Any] | None:
    """What was written after shards were read, if all files of that time are still there."""
    try:
        summary: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return summary if files.issuperset(summary["files"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@torch.inference_mode()
def _encode(
    model: LatentDiffusion, batch: Sample, precision: str, generator: torch.Generator
) -> dict[str, Tensor]:
    """Latents of a batch of images, and what the encoders compute from them."""
    names = sorted({e.cache_key for e in model.conditioner.encoders.values() if e.cache_key})
    batch = to_device(batch, model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "16"):
        posterior = model.autoencoder.encode(batch["jpg"])
        z = posterior.mean * model.scale_factor
        z_std = posterior.std * model.scale_factor
        if names:
            batch = model.prepare(batch, (z.shape[-2], z.shape[-1]), generator)
    tensors = {"z": z, "z_std": z_std, **{name: batch[name] for name in names}}
    return {name: value.to("cpu", PRECISIONS[precision]) for name, value in tensors.items()}


def digest_model(model: LatentDiffusion, transform: Transform, precision: str) -> str:
    """Digest of all that latents depend on besides the images."""
    modules: list[nn.Module] = []
    if isinstance(model.autoencoder, AutoencoderKL):
        modules += [model.autoencoder.encoder, model.autoencoder.quant_conv]
    modules += [encoder for encoder in model.conditioner.encoders.values() if encoder.cache_key]
    weights = digest_of_weights(*modules)
    name, options = transform.cache_key()
    return digest(VERSION, name, options, weights, model.scale_factor, precision)


def _content_digests(dataset: ImageDataset) -> Iterator[str]:
    for index in tqdm(range(len(dataset)), "Reading", delay=5, dynamic_ncols=True):
        try:
            yield digest(dataset.content(index))
        except OSError:
            yield ""

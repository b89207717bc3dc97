"""Cached latents of images, so that training steps need not encode.

An entry is one variant of an image (an emoji on a background, a photo with a random crop and flip):
mean and standard deviation of the posterior, from which latents are sampled in each epoch; inputs
of the model's encoders that are slow to compute (their `cache_key`s: a mask with its masked latent,
a depth map, a low-resolution image); and sizes for micro-conditioning. Keys depend on the bytes of
the image, on the transform and on the weights (see `TensorStore`), so that entries of a folder
remain valid when it is packed into shards.
"""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ldm.data.dataset import ImageDataset, Sample, SampleDataset, UnreadableSample
from ldm.data.shards import RawSample, Shards, find_image_key, get_sample_name, parse_metadata
from ldm.data.source import collate, to_device
from ldm.data.transforms import SIZE_KEYS, Transform
from ldm.imaging.reading import decode_srgb
from ldm.model import LatentDiffusion
from ldm.nets.autoencoder import Autoencoder
from ldm.runtime.types import JsonMapping
from ldm.train.batches.store import Entry, TensorStore, digest, digest_weights, fill_from_shards

__all__ = ["LatentDataset", "cache_latents"]

VERSION = 2  # of the entries; increment it if a transform with the same options changes pixels
DTYPES = {"16": torch.float16, "32": torch.float32}
Size = tuple[int, int]  # (width, height) of a bucket
log = logging.getLogger(__name__)


class LatentInput(NamedTuple):
    """One variant of an image to encode.

    Args:
        load: Decodes the image; raises UnreadableSample for a damaged file.
        file_digest: Digest of the file's bytes.
        bucket_size: None without buckets.
    """

    load: Callable[[], Image.Image]
    file_digest: str
    bucket_size: Size | None
    variant: int


@dataclass(frozen=True)
class LatentCache:
    """Latents of some variants of each image, in a store.

    Args:
        model_digest: Digest of everything but the image that latents depend on.
        num_variants: Number of variants of each image.
        precision: "16" (encoded under bfloat16, stored as float16) or "32".
    """

    store: TensorStore
    transform: Transform
    model_digest: str
    num_variants: int
    precision: str

    def make_key(self, file_digest: str, bucket_size: Size | None, variant: int) -> str:
        """Make the key of a latent in the store; variants are counted from 0."""
        return digest(self.model_digest, file_digest, bucket_size, variant)

    def get_variant_name(self, file_digest: str, variant: int) -> str:
        """Return the name of a variant; the order of the transform's names depends on the image."""
        names = self.transform.variants
        if not names:
            return ""
        return Random(file_digest).sample(names, len(names))[variant % len(names)]

    def load_sample(
        self, name: str, file_digest: str, bucket_size: Size | None, row: JsonMapping, rng: Random
    ) -> Sample:
        """Return {"z", "z_std", "txt", …} of an image in a random variant.

        Raises:
            UnreadableSample: The image was damaged, so that there is no latent.
        """
        variant = rng.randrange(self.num_variants)
        key = self.make_key(file_digest, bucket_size, variant)
        if key not in self.store:
            raise UnreadableSample(name, "its latent could not be computed")
        tensors = {
            name: value.float() if value.is_floating_point() else value
            for name, value in self.store[key].items()
        }
        fields = self.transform.make_row_fields(
            row, rng, self.get_variant_name(file_digest, variant)
        )
        # Sizes depend on the crop: only cached ones, those of the model's conditioning, are valid.
        fields = {k: v for k, v in fields.items() if k in tensors or k not in SIZE_KEYS}
        return {**tensors, **fields}

    def iter_inputs(
        self, load: Callable[[], Image.Image], file_digest: str, bucket_size: Size | None
    ) -> Iterator[tuple[str, LatentInput]]:
        """Yield (key, input) of all variants of an image."""
        for variant in range(self.num_variants):
            key = self.make_key(file_digest, bucket_size, variant)
            yield key, LatentInput(load, file_digest, bucket_size, variant)

    def fill(
        self, inputs: Iterable[tuple[str, LatentInput]], model: LatentDiffusion, batch_size: int
    ) -> int:
        """Compute the missing latents; return the number of failures."""
        # `catch_warnings` restores the filters, which the threads that decode images change.
        with warnings.catch_warnings(), ThreadPoolExecutor() as pool:

            def encode(batch: Sequence[LatentInput]) -> Iterator[Entry | None]:
                samples = list(pool.map(self._transform_image, batch))
                readable = [sample for sample in samples if sample is not None]
                # Random numbers of `prepare` must depend on the batch only, not on earlier ones.
                _, file_digest, bucket_size, variant = batch[0]
                key = self.make_key(file_digest, bucket_size, variant)
                generator = torch.Generator().manual_seed(int(key[:15], 16))
                entries = iter(_encode(model, readable, self.precision, generator))
                return (None if sample is None else next(entries) for sample in samples)

            return self.store.fill(
                inputs,
                encode,
                batch_size=batch_size,
                group=lambda latent_input: latent_input.bucket_size,
            )

    def _transform_image(self, latent_input: LatentInput) -> dict[str, Tensor] | None:
        """Return a sample without caption; None for a damaged file."""
        load, file_digest, _, variant = latent_input
        try:
            image = load()
        except UnreadableSample:  # reported when the sample is read
            return None
        rng = Random(f"{file_digest} {variant}")
        return self.transform.make_image_fields(
            image, rng, self.get_variant_name(file_digest, variant)
        )


class LatentDataset(SampleDataset):
    """A dataset with latents instead of images: {"z", "z_std", "txt", …}."""

    def __init__(self, dataset: ImageDataset, cache: LatentCache) -> None:
        self.dataset = dataset
        self.cache = cache
        self.bucket_ids = dataset.bucket_ids
        indices = tqdm(range(len(dataset)), "Reading", delay=5, dynamic_ncols=True)
        self.digests = [self._digest_file(index) for index in indices]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        rng = Random(f"{self.dataset.seed} {epoch} {index}")
        row, name = self.dataset.read_row(index), self.dataset.get_name(index)
        return self.cache.load_sample(
            name, self.digests[index], self._get_bucket_size(index), row, rng
        )

    def iter_names(self) -> Iterator[str]:
        return self.dataset.iter_names()

    def iter_missing_inputs(self) -> Iterator[tuple[str, LatentInput]]:
        """Yield the inputs of all latents that are not in the cache."""
        for index, file_digest in enumerate(self.digests):
            if file_digest:
                load = partial(self._load_image, index)
                inputs = self.cache.iter_inputs(load, file_digest, self._get_bucket_size(index))
                yield from ((k, v) for k, v in inputs if k not in self.cache.store)

    def _digest_file(self, index: int) -> str:
        """Return the digest of the file of a sample, "" if it cannot be read."""
        try:
            return digest(self.dataset.read_bytes(index))
        except OSError:
            return ""

    def _get_bucket_size(self, index: int) -> Size | None:
        buckets = self.cache.transform.buckets
        if self.bucket_ids is None or buckets is None:
            return None
        return buckets.sizes[self.bucket_ids[index]]

    def _load_image(self, index: int) -> Image.Image:
        image: Image.Image = self.dataset.load(index)["image"]
        return image


def cache_latents(
    model: LatentDiffusion,
    images: ImageDataset | Shards,
    cache_dir: Path,
    *,
    variants_per_image: int | None = None,
    batch_size: int = 32,
    precision: str = "16",
) -> LatentDataset | Shards:
    """Compute latents that are not in the cache; return the samples with latents.

    Shards are read only if they have changed since they were cached.

    Args:
        cache_dir: Folder of the cache files.
        variants_per_image: None = all named variants of the transform, else one.
        precision: See `LatentCache`.
    """
    transform = images.transform
    num_variants = variants_per_image or len(transform.variants) or 1
    if num_variants == 1 and transform.list_random_options():
        log.warning(
            "%s: drawn only once for each image, as latents are cached; `variants_per_image` "
            "caches more variants",
            ", ".join(f"`{name}`" for name in transform.list_random_options()),
        )
    latents = LatentCache(
        TensorStore(cache_dir, "latents"),
        transform,
        digest_model(model, transform, precision),
        num_variants,
        precision,
    )
    if isinstance(images, Shards):
        inputs = _iter_shard_inputs(images, latents)
        sizes = None if transform.buckets is None else transform.buckets.sizes
        dependencies = (latents.model_digest, latents.num_variants, sizes)
        fill = partial(latents.fill, inputs, model, batch_size)
        fill_from_shards(latents.store, images, dependencies, fill)
        return images.with_make_sample(partial(_make_shard_sample, latents, images))
    dataset = LatentDataset(images, latents)
    latents.fill(list(dataset.iter_missing_inputs()), model, batch_size)
    return dataset


def _iter_shard_inputs(shards: Shards, cache: LatentCache) -> Iterator[tuple[str, LatentInput]]:
    """Yield (key, input) of all variants of the samples in shards."""
    for raw in shards.read_raw_samples():
        with suppress(ValueError):  # reported when the sample is read
            file_digest = digest(raw[find_image_key(raw)])
            load = partial(_decode_image, raw)
            yield from cache.iter_inputs(load, file_digest, shards.get_bucket_size(raw))


def _decode_image(raw: RawSample) -> Image.Image:
    key = find_image_key(raw)
    try:
        return decode_srgb(raw[key], f"{get_sample_name(raw)}.{key}")
    except ValueError as error:
        raise UnreadableSample(get_sample_name(raw), str(error)) from error


def _make_shard_sample(cache: LatentCache, shards: Shards, raw: RawSample, rng: Random) -> Sample:
    name = get_sample_name(raw)
    try:
        file_digest, row = digest(raw[find_image_key(raw)]), parse_metadata(raw)
    except ValueError as error:
        raise UnreadableSample(name, str(error)) from error
    return cache.load_sample(name, file_digest, shards.get_bucket_size(raw), row, rng)


@torch.inference_mode()
def _encode(
    model: LatentDiffusion,
    samples: Sequence[Sample],
    precision: str,
    generator: torch.Generator,
) -> list[Entry]:
    """Return entries of samples: latents, slow inputs of the encoders, and sizes."""
    if not samples:
        return []
    encoders = model.conditioner.encoders.values()
    cache_keys = sorted({encoder.cache_key for encoder in encoders if encoder.cache_key})
    batch = to_device(collate(samples), model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "16"):
        posterior = model.autoencoder.encode(batch["jpg"])
        z = model.normalize(posterior.mean)
        z_std = posterior.std * model.scale_factor
        if model.latent_std is not None:
            z_std = z_std / model.latent_std.to(z_std)
        if cache_keys:
            batch = model.prepare(batch, (z.shape[-2], z.shape[-1]), generator)
    tensors = {"z": z, "z_std": z_std, **{key: batch[key] for key in cache_keys}}
    tensors = {name: value.to("cpu", DTYPES[precision]) for name, value in tensors.items()}
    tensors |= {name: batch[name].cpu() for name in _list_size_keys(model)}
    return [{name: v[index] for name, v in tensors.items()} for index in range(len(samples))]


def digest_model(model: LatentDiffusion, transform: Transform, precision: str) -> str:
    """Return the digest of everything but the images that latents depend on."""
    modules: list[nn.Module] = []
    if isinstance(model.autoencoder, Autoencoder):
        modules += [model.autoencoder.encoder, model.autoencoder.quant_conv]
    modules += [encoder for encoder in model.conditioner.encoders.values() if encoder.cache_key]
    name, options = transform.get_cache_key()
    weights = digest_weights(*modules)
    dependencies: list[object] = [VERSION, name, options, weights, model.scale_factor, precision]
    dependencies += _list_size_keys(model)
    dependencies += [v.tolist() for v in (model.latent_mean, model.latent_std) if v is not None]
    return digest(*dependencies)


def _list_size_keys(model: LatentDiffusion) -> list[str]:
    """Return the batch keys of a model's micro-conditioning; its sizes depend on the crop."""
    return [key for key in SIZE_KEYS if key in model.conditioner.keys]

"""Latents made once and read many times, so that a step costs only what is trained.

Some variants of each picture are encoded (emoji on different colours and places, photos cut and
mirrored differently), and with them what the encoders of the model see beside the picture (`cached`
names it: a mask with the latent around it, a depth map, a small copy). Kept are mean and deviation:
latents are drawn from their posterior anew for every sample, as captions and noise are. Keys: what
was done to which bytes, and by which weights (see `Store`). So the pictures of a folder find their
latents when they are packed into shards.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.data.dataset import ImageDataset, SampleDataset, UnreadableSample
from ldm.data.shards import Shards, image_bytes, metadata_of, name_of
from ldm.data.source import collate, to_device
from ldm.data.transforms import Transform
from ldm.imaging.reading import decode_image
from ldm.model import LatentDiffusion
from ldm.train.batches.store import Store, digest, digest_of_weights

__all__ = ["Latents", "cached_latents"]

log = logging.getLogger(__name__)

VERSION = 2  # of what is kept; raise it too when the same options give other pixels
PRECISIONS = {"16": torch.float16, "32": torch.float32}


class Wanted(NamedTuple):
    """A latent that is wanted.

    picture: opens what it is of; raises UnreadableSample for a damaged file.
    content: digest of that file. size: (width, height) of its bucket, if there are buckets.
    """

    picture: Callable[[], Image.Image]
    content: str
    size: tuple[int, int] | None
    variant: int


class Looks:
    """Some variants of each picture, as latents in a store.

    transform: what is done to pictures and captions. recipe: what else the latents depend on.
    """

    def __init__(self, store: Store, transform: Transform, recipe: str, variants: int) -> None:
        self.store, self.transform, self.recipe, self.variants = store, transform, recipe, variants

    def key(self, content: str, size: tuple[int, int] | None, variant: int) -> str:
        """The name of a latent in the store."""
        return digest(self.recipe, content, size, variant)

    def look(self, content: str, variant: int) -> str:
        """What tells the variants of a picture apart, besides chance: the colour behind an emoji.

        They come in an order of its own, and again after all of them.
        """
        names = self.transform.variants
        if not names:
            return ""
        return Random(content).sample(names, len(names))[variant % len(names)]

    def seen(self, wanted: Wanted) -> dict[str, Tensor] | None:
        """All of a sample but its caption; None for a damaged file."""
        try:
            picture = wanted.picture()
        except UnreadableSample:  # whoever asks for its latent will be told
            return None
        rng = Random(f"{wanted.content} {wanted.variant}")
        look = self.look(wanted.content, wanted.variant)
        return self.transform.image_fields(picture, rng, look)

    def sample(
        self, name: str, content: str, size: tuple[int, int] | None, row: Any, rng: Random
    ) -> dict[str, Any]:
        """{"z", "z_std", "txt", …} of a picture in a variant of chance.

            name: what errors call it. row: its metadata.
        Raises UnreadableSample if no latent could be made of it.
        """
        variant = rng.randrange(self.variants)
        key = self.key(content, size, variant)
        if key not in self.store:
            raise UnreadableSample(name, "no latent could be made of it")
        kept = {name: value.float() for name, value in self.store[key].items()}
        return {**kept, "txt": self.transform.caption(row, rng, self.look(content, variant))}

    def all_of(
        self, picture: Callable[[], Image.Image], content: str, size: tuple[int, int] | None
    ) -> Iterator[tuple[str, Wanted]]:
        """(key, latent) of all variants of a picture."""
        for variant in range(self.variants):
            key = self.key(content, size, variant)
            yield key, Wanted(picture, content, size, variant)

    def fill(
        self,
        wanted: Iterable[tuple[str, Wanted]],
        model: LatentDiffusion,
        batch: int,
        precision: str,
    ) -> int:
        """Makes the latents that lack; how many could not be made."""
        # Each picture is opened without warnings; threads would not put their filters back.
        with warnings.catch_warnings(), ThreadPoolExecutor() as pool:

            def make(some: Sequence[Wanted]) -> tuple[list[int], dict[str, Tensor]]:
                samples = list(pool.map(self.seen, some))
                kept = [place for place, sample in enumerate(samples) if sample is not None]
                if not kept:
                    return [], {}
                key = self.key(some[0].content, some[0].size, some[0].variant)
                chance = torch.Generator().manual_seed(int(key[:15], 16))
                batch = collate([sample for sample in samples if sample is not None])
                return kept, _encoded(model, batch, precision, chance)

            return self.store.fill(wanted, make, batch=batch, kind=lambda one: one.size)


class Latents(SampleDataset):
    """Latents in the place of pictures, as {"z", "z_std", "txt", …}; `groups` as the pictures have.

    dataset: a Folder or a Hub.
    digests: of the file of every record, "" where it cannot be read.
    """

    def __init__(self, dataset: ImageDataset, looks: Looks, digests: Sequence[str]) -> None:
        self.dataset, self.looks, self.digests = dataset, looks, digests
        self.groups = dataset.groups

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        rng = Random(f"{self.dataset.seed} {epoch} {index}")
        row, name = self.dataset.row(index), self.dataset.name(index)
        return self.looks.sample(name, self.digests[index], self.size(index), row, rng)

    def names(self) -> Iterator[str]:
        return self.dataset.names()

    def size(self, index: int) -> tuple[int, int] | None:
        """(width, height) of the bucket of a picture, if there are buckets."""
        if self.groups is None:
            return None
        buckets = self.dataset.transform.buckets
        return None if buckets is None else buckets.sizes[self.groups[index]]

    def picture(self, index: int) -> Image.Image:
        picture: Image.Image = self.dataset.load(index)["image"]
        return picture

    def wanted(self) -> Iterator[tuple[str, Wanted]]:
        """All latents and their keys, one group after the other."""
        groups = self.groups or [0] * len(self)
        for index in sorted(range(len(self)), key=lambda index: groups[index]):
            if content := self.digests[index]:
                open_ = partial(self.picture, index)
                yield from self.looks.all_of(open_, content, self.size(index))


def cached_latents(
    model: LatentDiffusion,
    dataset: Any,
    cache: Path,
    *,
    variants: int | None = None,
    batch: int = 32,
    precision: str = "16",
) -> Any:
    """The latents of pictures, those from the cache that are there.

        dataset: a Folder or a Hub, which become Latents, or Shards, which become other Shards.
        cache: folder of the cache files.
        variants: of each picture; by default all colours of an emoji, or one of a photo.
        batch: pictures encoded at once.
        precision: "16" (encoded under bfloat16, kept as float16) or "32".
    Raises ValueError for an unknown precision.
    """
    precision = str(precision)
    if precision not in PRECISIONS:
        allowed = ", ".join(PRECISIONS)
        raise ValueError(f"data.params.latents: precision `{precision}`, choose one of {allowed}")
    if variants is None:
        variants = len(dataset.transform.variants) or 1
    recipe = _recipe(model, dataset.transform, precision)
    looks = Looks(Store(cache, "latents"), dataset.transform, recipe, variants)
    if isinstance(dataset, Shards):
        return _of_shards(dataset, looks, model, batch, precision)
    latents = Latents(dataset, looks, list(_digests(dataset)))
    lacking = [(key, one) for key, one in latents.wanted() if key not in looks.store]
    looks.fill(lacking, model, batch, precision)
    return latents


def _of_shards(
    shards: Shards, looks: Looks, model: LatentDiffusion, batch: int, precision: str
) -> Shards:
    """The same of shards, which are read for it only if one of them is not as it was."""
    states = [(url, _state(url)) for url in shards.urls]
    buckets = shards.transform.buckets
    sizes = None if buckets is None else buckets.sizes
    facts = (looks.recipe, looks.variants, sizes, sorted(shards.limits.items()), states)
    path = looks.store.folder / f"shards-{digest(*facts)[:16]}.json"
    done = _done(path, looks.store.files) if all(state for _, state in states) else None
    if done is None:
        log.info("reading %d shards for their latents", len(shards.urls))
        damaged = looks.fill(_wanted_of(shards, looks), model, batch, precision)
        done = {"damaged": damaged, "files": sorted(looks.store.files)}
        path.write_text(json.dumps(done), "utf-8")
    if done["damaged"]:
        log.warning("%d latents could not be made; they are tried again without `%s`",
                    done["damaged"], path)  # fmt: skip
    return shards.with_samples(partial(_latent_of, looks, shards))


def _wanted_of(shards: Shards, looks: Looks) -> Iterator[tuple[str, Wanted]]:
    """All latents of the samples in shards, and their keys."""
    for raw in shards.raw_samples():
        with suppress(ValueError):  # whoever asks for its latent will be told
            content = digest(image_bytes(raw)[1])
            yield from looks.all_of(partial(_opened, raw), content, shards.bucket_size(raw))


def _opened(raw: Any) -> Image.Image:
    suffix, data = image_bytes(raw)
    try:
        return decode_image(data, f"{name_of(raw)}.{suffix}")
    except ValueError as error:
        raise UnreadableSample(name_of(raw), str(error)) from error


def _latent_of(looks: Looks, shards: Shards, raw: Any, rng: Random) -> dict[str, Any]:
    """The sample of an undecoded one."""
    name = name_of(raw)
    try:
        content, row = digest(image_bytes(raw)[1]), metadata_of(raw)
    except ValueError as error:
        raise UnreadableSample(name, str(error)) from error
    return looks.sample(name, content, shards.bucket_size(raw), row, rng)


def _state(url: str) -> tuple[int, ...] | None:
    """Size and times of a file; None for what is not on this machine, which may always change."""
    if not Path(url).is_file():
        return None
    status = Path(url).stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _done(path: Path, files: set[str]) -> dict[str, Any] | None:
    """What was written after shards were read, if all files that were there then still are."""
    try:
        done: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return done if files.issuperset(done["files"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@torch.inference_mode()
def _encoded(
    model: LatentDiffusion, batch: dict[str, Any], precision: str, chance: torch.Generator
) -> dict[str, Tensor]:
    """The latents of a batch of pictures, and what the encoders say they make of them."""
    names, batch = _seen(model), to_device(batch, model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "16"):
        posterior = model.autoencoder.encode(batch["jpg"])
        z, std = (part * model.scale_factor for part in (posterior.mean, posterior.std))
        if names:
            batch = model.prepare(batch, (z.shape[-2], z.shape[-1]), chance)
    made = {"z": z, "z_std": std, **{name: batch[name] for name in names}}
    return {name: value.to("cpu", PRECISIONS[precision]) for name, value in made.items()}


def _seen(model: LatentDiffusion) -> list[str]:
    """The records that the model's encoders want kept beside the latents."""
    encoders = model.conditioner.encoders.values()
    return sorted({e.cache_key for e in encoders if e.cache_key})


def _recipe(model: LatentDiffusion, transform: Transform, precision: str) -> str:
    """A name for all that latents depend on besides the pictures."""
    first_stage, encoders = model.autoencoder, model.conditioner.encoders.values()
    parts: list[Any] = [getattr(first_stage, name, None) for name in ("encoder", "quant_conv")]
    parts += [encoder for encoder in encoders if encoder.cache_key]
    weights = digest_of_weights(*(part for part in parts if part is not None))
    name, done = transform.cache_key()
    return digest(VERSION, name, done, weights, model.scale_factor, precision)


def _digests(dataset: Any) -> Iterator[str]:
    for index in tqdm(range(len(dataset)), "Reading", delay=5, dynamic_ncols=True):
        try:
            yield digest(dataset.content(index))
        except OSError:
            yield ""

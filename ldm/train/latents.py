"""Latents and contexts made once and read many times, so that a step costs only what is trained.

Some variants of each picture are encoded (emoji on different colours and places, photos cut and
mirrored differently), and with them what the encoders of the model see beside the picture (`cached`
names it: a mask with the latent around it, a depth map, a small copy). Captions and noise are still
drawn anew for every sample. Keys: what was done to which bytes, and by which weights (see `Store`).
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ldm.data.source import Unreadable, collate
from ldm.data.transforms import COLOURS, Emoji
from ldm.model import LatentDiffusion
from ldm.train.objective import on_device
from ldm.train.store import Store, digest, digest_of_weights

__all__ = ["Contexts", "Latents", "cached_contexts", "cached_latents"]

VERSION = 1  # of what transforms do; raise it when the same options give other pixels
PRECISIONS = {"16": torch.float16, "32": torch.float32}


class Latents(Dataset):
    """Latents in the place of pictures, as {"z", "txt", …}; `groups` as the pictures have.

    dataset: a Folder or a Hub.
    digests: of the file of every record, "" where it cannot be read.
    recipe: what else the latents depend on.
    variants: how many there are of each picture.
    """

    def __init__(
        self, dataset: Any, store: Store, digests: Sequence[str], recipe: str, variants: int
    ) -> None:
        self.dataset, self.store, self.digests = dataset, store, digests
        self.recipe, self.variants = recipe, variants
        self.groups = dataset.groups

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        rng = Random(f"{self.dataset.seed} {epoch} {index}")
        variant = rng.randrange(self.variants)
        name = self.key(index, variant)
        if name not in self.store:
            raise Unreadable(self.dataset.name(index), "no latent could be made of it")
        sample = {name: value.float() for name, value in self.store[name].items()}
        look = self.look(index, variant)
        return {
            **sample,
            "txt": self.dataset.transform.caption(self.dataset.row(index), *look, rng),
        }

    def key(self, index: int, variant: int) -> str:
        """The name of a latent in the store."""
        return digest(self.recipe, self.digests[index], self.size(index), variant)

    def size(self, index: int) -> tuple[int, int] | None:
        """(width, height) of the bucket of a picture, if there are buckets."""
        if self.groups is None:
            return None
        size: tuple[int, int] = self.dataset.transform.buckets.sizes[self.groups[index]]
        return size

    def look(self, index: int, variant: int) -> tuple[str, ...]:
        """What tells the variants of a picture apart, besides chance: the colour behind an emoji.

        They come in an order of its own, and again after all of them.
        """
        if not isinstance(self.dataset.transform, Emoji):
            return ()
        order = Random(self.digests[index]).sample(list(COLOURS), len(COLOURS))
        return (order[variant % len(COLOURS)],)

    def seen(self, at: tuple[int, int]) -> dict[str, Tensor] | None:
        """All of a sample but its caption, of (index, variant); None for a damaged file."""
        index, variant = at
        try:
            picture = self.dataset.record(index)["picture"]
        except Unreadable:  # whoever asks for its latent will be told
            return None
        rng = Random(f"{self.digests[index]} {variant}")
        seen: dict[str, Tensor]
        seen = self.dataset.transform.seen(picture, *self.look(index, variant), rng)
        return seen

    def wanted(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """(key, (index, variant)) of all latents, one group after the other."""
        groups = self.groups or [0] * len(self)
        for index in sorted(range(len(self)), key=lambda index: groups[index]):
            if self.digests[index]:
                for variant in range(self.variants):
                    yield self.key(index, variant), (index, variant)


def cached_latents(
    model: LatentDiffusion,
    dataset: Any,
    cache: Path,
    *,
    variants: int | None = None,
    batch: int = 32,
    precision: str = "16",
) -> Latents:
    """The latents of pictures (a Folder or a Hub), those from the cache that are there.

    cache: folder of the cache files.
    variants: of each picture; by default all colours of an emoji, or one of a photo.
    batch: pictures encoded at once.
    precision: "16" (encoded under bfloat16, kept as float16) or "32".
    Raises ValueError for an unknown precision.
    """
    if str(precision) not in PRECISIONS:
        allowed = ", ".join(PRECISIONS)
        raise ValueError(f"data.params.latents: precision `{precision}`, choose one of {allowed}")
    if variants is None:
        variants = len(COLOURS) if isinstance(dataset.transform, Emoji) else 1
    digests = list(_digests(dataset))
    recipe = _recipe(model, dataset.transform, str(precision))
    latents = Latents(dataset, Store(cache, "latents"), digests, recipe, variants)

    # Each picture is opened without warnings; threads would not put their filters back in order.
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:

        def make(places: Sequence[tuple[int, int]]) -> tuple[list[int], dict[str, Tensor]]:
            samples = list(pool.map(latents.seen, places))
            kept = [place for place, sample in enumerate(samples) if sample is not None]
            if not kept:
                return [], {}
            chance = torch.Generator().manual_seed(int(latents.key(*places[0])[:15], 16))
            batch = collate([sample for sample in samples if sample is not None])
            return kept, _encoded(model, batch, str(precision), chance)

        sizes = latents.size
        latents.store.fill(latents.wanted(), make, batch=batch, kind=lambda at: sizes(at[0]))
    return latents


@torch.inference_mode()
def _encoded(
    model: LatentDiffusion, batch: dict[str, Any], precision: str, chance: torch.Generator
) -> dict[str, Tensor]:
    """The latents of a batch of pictures, and what the encoders say they make of them."""
    names, batch = _seen(model), on_device(batch, model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "16"):
        z = model.autoencoder.encode(batch["jpg"]).mode() * model.scale_factor  # (B, C, h, w)
        if names:
            batch = model.prepare(batch, (z.shape[-2], z.shape[-1]), chance)
    made = {"z": z, **{name: batch[name] for name in names}}
    return {name: value.to("cpu", PRECISIONS[precision]) for name, value in made.items()}


def _seen(model: LatentDiffusion) -> list[str]:
    """The records that the model's encoders want kept beside the latents."""
    encoders: Any = model.conditioner.children()
    return sorted({e.cached for e in encoders if getattr(e, "cached", None)})


def _recipe(model: LatentDiffusion, transform: Any, precision: str) -> str:
    """A name for all that latents depend on besides the pictures."""
    first_stage, encoders = model.autoencoder, list(model.conditioner.children())
    parts: list[Any] = [getattr(first_stage, name, None) for name in ("encoder", "quant_conv")]
    parts += [encoder for encoder in encoders if getattr(encoder, "cached", None)]
    weights = digest_of_weights(*(part for part in parts if part is not None))
    done = {name: getattr(transform, name) for name in transform.SEEN}
    name = type(transform).__name__
    return digest(VERSION, name, done, weights, model.scale_factor, precision)


def _digests(dataset: Any) -> Iterator[str]:
    for index in tqdm(range(len(dataset)), "Reading", delay=5, dynamic_ncols=True):
        try:
            yield digest(dataset.content(index))
        except OSError:
            yield ""


class Contexts(Mapping[str, Tensor]):
    """What a text tower makes of captions, (N, D) by text; only what is kept is in it."""

    def __init__(self, store: Store, recipe: str, texts: Iterable[str]) -> None:
        self.store = store
        self.keys_of = {text: digest(recipe, text) for text in texts}

    def __getitem__(self, text: str) -> Tensor:
        return self.store[self.keys_of[text]]["context"]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_of)

    def __len__(self) -> int:
        return len(self.keys_of)


@torch.inference_mode()
def cached_contexts(
    model: LatentDiffusion, texts: Iterable[str], cache: Path, *, batch: int = 64
) -> Contexts:
    """The contexts of all texts by the model's text tower, those from the cache that are there.

    Raises ValueError if the tower is trained, so that contexts would be out of date.
    """
    tower: Any = getattr(model.conditioner, "text", None)
    if tower is None or any(p.requires_grad for p in tower.parameters()):
        raise ValueError("data.params.texts: contexts can be kept only of a frozen text tower")
    recipe = digest(digest_of_weights(tower), [_options(module) for module in tower.modules()])
    contexts = Contexts(Store(cache, "contexts"), recipe, dict.fromkeys(["", *texts]))

    def make(some: Sequence[str]) -> tuple[list[int], dict[str, Tensor]]:
        context = tower.encode(list(some))  # (B, N, D)
        return list(range(len(some))), {"context": context.half()}

    wanted = ((key, text) for text, key in contexts.keys_of.items())
    contexts.store.fill(wanted, make, batch=batch, unit="text")
    return contexts


def _options(module: Any) -> dict[str, Any]:
    """What a module was told, as far as it keeps it in plain values."""
    plain = (str, int, float, bool, tuple)
    told = {k: v for k, v in vars(module).items() if isinstance(v, plain) and k[0] != "_"}
    return {"class": type(module).__name__, **told, "training": False}

"""The `data:` section of a config -> what a run reads.

data:
  params:
    batch_size: 8
    num_workers: 2
    train: {root: DIR, split: train, transform: {name: photo, size: 512}}   a folder
    validation: …                                                           as `train`
    latents: {cache: DIR, variants: 5}            encode pictures once, before training
    prior: {root, prompt, count, transform}       DreamBooth's pictures of a class

train, validation = open_sources(model, raw["data"], seed)
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from torch import nn

from ldm.data.dataset import WithClassImages
from ldm.data.drawings import EmojiTransform, caption_texts
from ldm.data.folder import Folder, read_metadata
from ldm.data.hub import Hub
from ldm.data.options import rename_options
from ldm.data.shards import Shards
from ldm.data.source import DatasetSource, Source
from ldm.data.transforms import PhotoTransform, Transform
from ldm.encoders.text import TextEncoder
from ldm.model import LatentDiffusion
from ldm.runtime.errors import unknown_name
from ldm.train.batches.class_images import make_pictures
from ldm.train.batches.contexts import cached_contexts
from ldm.train.batches.latents import cached_latents
from ldm.train.config import datamodules
from ldm.train.tasks.diffusion import vocabulary

__all__ = ["open_sources"]

log = logging.getLogger(__name__)

TRANSFORMS: dict[str, Callable[..., Transform]] = {
    kind.NAME: kind for kind in (EmojiTransform, PhotoTransform)
}


def open_sources(
    model: nn.Module, data: Mapping[str, Any], seed: int, *, commands: bool = False
) -> tuple[Source, Source | None]:
    """What is trained on, and what is held out, if anything is.

        model: what is trained; it makes cached latents and pictures of a class, and a vocabulary
            that has no words yet gets those of the data.
        data: the section as read, {"params": …}, also in the original's words.
        seed: of the order and of all chance in the samples.
        commands: whether shards may come from `pipe:COMMAND`; never what a config says.
    Raises ValueError for what is unknown or missing.
    """
    params, notes = datamodules.translate(data)
    for note in notes:
        log.info("%s", note)
    train = _opened(params["train"], seed, "data.params.train", commands)
    _learn_words(model, train)
    _warn_of_silence(model, train)
    held_out = None
    if params.get("validation"):
        held_out = _opened(params["validation"], seed, "data.params.validation", commands)
    return _with_extras(model, train, params), held_out


def _with_extras(
    model: nn.Module, train: DatasetSource | Shards, params: Mapping[str, Any]
) -> Source:
    """The pictures, or their latents, with those of a class beside them if the config says so."""
    wanted = [key for key in ("latents", "texts", "prior") if params.get(key)]
    if not isinstance(model, LatentDiffusion) or not wanted:
        return train
    if isinstance(train, Shards) and params.get("prior"):
        raise ValueError("data.params: `prior` needs a folder or a hub, not `shards`")
    pictures: Any = train if isinstance(train, Shards) else train.dataset
    dataset = pictures
    if params.get("latents"):
        with _named("data.params.latents"):
            cache, options = _cache(params, "latents")
            dataset = cached_latents(model, pictures, cache, **options)
    prior = None
    if params.get("prior"):
        prior = _prior(model, dict(params["prior"]), train.seed)
        dataset = WithClassImages(dataset, prior)
    if params.get("texts"):
        texts = [*_captions(pictures), *(_captions(prior) if prior else ())]
        with _named("data.params.texts"):
            cache, options = _cache(params, "texts")
            model.conditioner.get(TextEncoder).cache = cached_contexts(
                model, texts, cache, **options
            )
    if isinstance(train, Shards):
        return cast(Source, dataset)
    return DatasetSource(dataset, train.seed, shown=pictures)


def _opened(
    spec: Mapping[str, Any], seed: int, where: str, commands: bool = False
) -> DatasetSource | Shards:
    if "shards" not in spec:
        return DatasetSource(_dataset(spec, seed, where), seed)
    with _named(where, ".shards"):
        options = {**rename_options("shards", spec), "transform": _transform(spec, where)}
        return Shards(**options, seed=seed, commands=commands)


def _dataset(spec: Mapping[str, Any], seed: int, where: str) -> Folder | Hub:
    kind: Any = Folder if "root" in spec else Hub
    with _named(where, ".root" if kind is Folder else ".hub"):
        dataset: Folder | Hub = kind(**{**spec, "transform": _transform(spec, where)}, seed=seed)
    return dataset


def _transform(spec: Mapping[str, Any], where: str) -> Transform:
    options = dict(spec["transform"])
    name = options.pop("name", None)
    if name not in TRANSFORMS:
        raise unknown_name("transform", name, TRANSFORMS, where)
    return TRANSFORMS[name](**rename_options(name, options))


def _cache(params: Mapping[str, Any], key: str) -> tuple[Path, dict[str, Any]]:
    """The folder and the other options of a cache."""
    options = dict(params[key])
    if "cache" not in options:
        raise ValueError(f"data.params.{key} needs `cache`, a folder")
    return Path(options.pop("cache")), options


@contextmanager
def _named(where: str, files: str = "") -> Iterator[None]:
    """Options that nothing has are the config's mistake, so it is said where they are.

    files: the option that names files, of which the same is true if there are none.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where}{files}: {error}") from error
    except TypeError as error:
        raise ValueError(f"{where}: {str(error).replace('.__init__()', '')}") from error


def _prior(model: LatentDiffusion, spec: dict[str, Any], seed: int) -> Folder | Hub:
    """The pictures of a class; those that lack are made by the model as it is now."""
    for key in ("root", "prompt", "count", "transform"):
        if key not in spec:
            raise ValueError(f"data.params.prior needs `{key}`")
    prompt = spec.pop("prompt")
    make_pictures(model, Path(spec["root"]), prompt, spec.pop("count"))
    return _dataset({**spec, "fields": {"text": prompt}}, seed, "data.params.prior")


def _warn_of_silence(model: nn.Module, train: DatasetSource | Shards) -> None:
    """Says how many pictures have no caption, where they are known and a model listens to them."""
    data = None if isinstance(train, Shards) else train.dataset
    listens = isinstance(model, LatentDiffusion) and model.conditioner.text is not None
    if listens and isinstance(data, Folder) and isinstance(data.transform, PhotoTransform):
        lacking = sum(not row.get("text") for row in data.metadata())
        if lacking:
            log.warning("%d of %d pictures of `%s` have no caption", lacking, len(data), data.root)


def _captions(dataset: Folder | Hub | Shards) -> Iterator[str]:
    """All captions, where each record has one and keeps it."""
    photo = dataset.transform
    if not isinstance(photo, PhotoTransform) or photo.tags is not None:
        raise ValueError("data.params.texts: only photos without `tags` have captions that stay")
    return (photo.caption(row, Random(0)) for row in dataset.metadata())


def _learn_words(model: nn.Module, train: DatasetSource | Shards) -> None:
    """Gives a compact vocabulary that is still empty the words of all captions."""
    text = model.conditioner.find(TextEncoder) if isinstance(model, LatentDiffusion) else None
    ids = None if text is None else text.token_ids
    if text is not None and ids is not None and ids.equal(torch.arange(len(ids))):
        data: Any = train if isinstance(train, Shards) else train.dataset
        rows = read_metadata(data.root) if isinstance(data, Folder) else data.metadata()
        ids.copy_(vocabulary(caption_texts(rows), text))

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

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.data import transforms
from ldm.data.folder import Folder, WithPrior, read_metadata
from ldm.data.source import Records, Source
from ldm.loading import legacy
from ldm.model import LatentDiffusion
from ldm.train.latents import cached_latents
from ldm.train.objective import vocabulary
from ldm.train.prior import make_pictures

__all__ = ["open_sources"]

KEYS = ("batch_size", "num_workers", "train", "validation", "latents", "prior")
TRANSFORMS = {"emoji": transforms.Emoji, "photo": transforms.Photo}


def open_sources(
    model: nn.Module, data: Mapping[str, Any], seed: int
) -> tuple[Source, Source | None]:
    """What is trained on, and what is held out, if anything is.

        model: what is trained; it makes cached latents and pictures of a class, and a vocabulary
            that has no words yet gets those of the data.
        data: the section as read, {"params": …}.
        seed: of the order and of all chance in the samples.
    Raises ValueError for what is unknown or missing.
    """
    params = data.get("params") or {}
    for key in params:
        if key not in KEYS:
            raise legacy.unknown("key", key, KEYS, "data.params")
    for key in ("batch_size", "train"):
        if key not in params:
            raise ValueError(f"data.params needs `{key}`")
    train = _folder(params["train"], seed, "data.params.train")
    _learn_words(model, train)
    held_out = None
    if params.get("validation"):
        held_out = Records(_folder(params["validation"], seed, "data.params.validation"), seed)
    return Records(_with_extras(model, train, params), seed, shown=train), held_out


def _with_extras(model: nn.Module, train: Folder, params: Mapping[str, Any]) -> Any:
    """The folder, or its latents, with pictures of the class beside them if the config says so."""
    dataset: Any = train
    if not isinstance(model, LatentDiffusion):
        return dataset
    if params.get("latents"):
        options = dict(params["latents"])
        dataset = cached_latents(model, train, Path(options.pop("cache")), **options)
    if params.get("prior"):
        return WithPrior(dataset, _prior(model, dict(params["prior"]), train.seed))
    return dataset


def _folder(spec: Mapping[str, Any], seed: int, where: str) -> Folder:
    spec = dict(spec)
    if "transform" not in spec:
        raise ValueError(f"{where} needs `transform`, {{name: {' | '.join(TRANSFORMS)}, …}}")
    options = dict(spec.pop("transform"))
    name = options.pop("name", None)
    if name not in TRANSFORMS:
        raise legacy.unknown("transform", name, TRANSFORMS, where)
    return Folder(**spec, transform=TRANSFORMS[name](**options), seed=seed)


def _prior(model: LatentDiffusion, spec: dict[str, Any], seed: int) -> Folder:
    """The pictures of a class; those that lack are made by the model as it is now."""
    for key in ("root", "prompt", "count", "transform"):
        if key not in spec:
            raise ValueError(f"data.params.prior needs `{key}`")
    prompt = spec.pop("prompt")
    make_pictures(model, Path(spec["root"]), prompt, spec.pop("count"))
    return _folder({**spec, "fields": {"text": prompt}}, seed, "data.params.prior")


def _learn_words(model: nn.Module, train: Folder) -> None:
    """Gives a compact vocabulary that is still empty the words of all captions."""
    text = getattr(getattr(model, "conditioner", None), "text", None)
    ids = getattr(text, "token_ids", None)
    if text is not None and ids is not None and ids.equal(torch.arange(len(ids))):
        ids.copy_(vocabulary(transforms.all_words(read_metadata(train.root)), text))

"""The `data:` section of a config -> the sources of a run.

data:
  params:
    batch_size: 8
    num_workers: 2
    train: {root: DIR, split: train, transform: {name: photo, size: 512}}   a folder
    validation: …                                                           as `train`
    latents: {cache: DIR, variants: 5}            encode images once, before training
    texts: {cache: DIR}                           encode captions once, before training
    prior: {root, prompt, count, transform}       class images of DreamBooth

train, validation = open_sources(model, raw["data"], seed)
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn

from ldm.data.dataset import ImageDataset, SampleDataset, WithClassImages
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
from ldm.runtime.types import JsonMapping, JsonObject
from ldm.train.batches.class_images import sample_class_images
from ldm.train.batches.contexts import cache_contexts
from ldm.train.batches.latents import cache_latents, cache_latents_of_shards
from ldm.train.config import datamodules

__all__ = ["collect_vocabulary", "open_sources"]

log = logging.getLogger(__name__)

Section = JsonMapping

TRANSFORMS: dict[str, Callable[..., Transform]] = {
    kind.NAME: kind for kind in (EmojiTransform, PhotoTransform)
}


def open_sources(
    model: nn.Module, data: Section, seed: int, *, commands: bool = False
) -> tuple[Source, Source | None]:
    """Opens the training data, and the held-out data if there is any.

    Args:
        model: what is trained. It computes cached latents and contexts and samples class images;
            a pruned token embedding without tokens gets those of the captions.
        data: the section as read, {"params": …}, also in the original's words.
        seed: of the order and of all random numbers in the samples.
        commands: whether shards may come from `pipe:COMMAND`; never what a config says.
    Raises:
        ValueError: unknown or missing options.
        FileNotFoundError: missing files.
    """
    params, notes = datamodules.translate(data)
    for note in notes:
        log.info("%s", note)
    images: ImageDataset | Shards  # the training data
    held_out: Source | None = None
    if "shards" in params["train"]:
        images = _open_shards(params["train"], seed, "data.params.train", commands)
    else:
        images = _open_dataset(params["train"], seed, "data.params.train")
    if isinstance(model, LatentDiffusion):
        _fill_vocabulary(model, images)
        _warn_of_missing_captions(model, images)
    if spec := params.get("validation"):
        if "shards" in spec:
            held_out = _open_shards(spec, seed, "data.params.validation", commands)
        else:
            dataset = _open_dataset(spec, seed, "data.params.validation")
            held_out = DatasetSource(dataset, seed)
    if isinstance(images, Shards):
        return _cache_shards(model, images, params), held_out
    return _cache_dataset(model, images, params, seed), held_out


def _cache_shards(model: nn.Module, shards: Shards, params: Section) -> Shards:
    """The shards, with cached latents and contexts if the config asks for them."""
    if not isinstance(model, LatentDiffusion):
        return shards
    if params.get("prior"):
        raise ValueError("data.params: `prior` needs a folder or a hub, not `shards`")
    source = shards
    if params.get("latents"):
        with _naming_section("data.params.latents"):
            source = cache_latents_of_shards(model, shards, **_cache_options(params, "latents"))
    if params.get("texts"):
        _cache_contexts(model, [shards], params)
    return source


def _cache_dataset(
    model: nn.Module, images: ImageDataset, params: Section, seed: int
) -> DatasetSource:
    """The data set, with cached latents and contexts and class images if the config says so."""
    if not isinstance(model, LatentDiffusion):
        return DatasetSource(images, seed)
    dataset: SampleDataset = images
    captioned = [images]
    if params.get("latents"):
        with _naming_section("data.params.latents"):
            dataset = cache_latents(model, images, **_cache_options(params, "latents"))
    if params.get("prior"):
        class_images = _open_class_images(model, dict(params["prior"]), seed)
        dataset = WithClassImages(dataset, class_images)
        captioned.append(class_images)
    if params.get("texts"):
        _cache_contexts(model, captioned, params)
    return DatasetSource(dataset, seed, shown=images)


def _open_shards(spec: Section, seed: int, where: str, commands: bool) -> Shards:
    with _naming_section(where, ".shards"):
        options = {**rename_options("shards", spec), "transform": _build_transform(spec, where)}
        return Shards(**options, seed=seed, commands=commands)


def _open_dataset(spec: Section, seed: int, where: str) -> Folder | Hub:
    options = {**spec, "transform": _build_transform(spec, where), "seed": seed}
    with _naming_section(where, ".root" if "root" in spec else ".hub"):
        return Folder(**options) if "root" in spec else Hub(**options)


def _build_transform(spec: Section, where: str) -> Transform:
    options = dict(spec["transform"])
    name = options.pop("name", None)
    if name not in TRANSFORMS:
        raise unknown_name("transform", name, TRANSFORMS, where)
    with _naming_section(where):
        return TRANSFORMS[name](**rename_options(name, options))


def _open_class_images(model: LatentDiffusion, spec: JsonObject, seed: int) -> Folder | Hub:
    """The class images; missing ones are sampled from the model as it is now."""
    for key in ("root", "prompt", "count", "transform"):
        if key not in spec:
            raise ValueError(f"data.params.prior needs `{key}`")
    prompt = spec.pop("prompt")
    sample_class_images(model, Path(spec["root"]), prompt, spec.pop("count"))
    return _open_dataset({**spec, "fields": {"text": prompt}}, seed, "data.params.prior")


def _cache_contexts(
    model: LatentDiffusion, data: Iterable[ImageDataset | Shards], params: Section
) -> None:
    captions = [caption for images in data for caption in _fixed_captions(images)]
    with _naming_section("data.params.texts"):
        contexts = cache_contexts(model, captions, **_cache_options(params, "texts"))
    model.conditioner.get(TextEncoder).cache = contexts


def _cache_options(params: Section, key: str) -> JsonObject:
    """The folder `cache` and the other options of a cache."""
    options = dict(params[key])
    if "cache" not in options:
        raise ValueError(f"data.params.{key} needs `cache`, a folder")
    return {**options, "cache": Path(options["cache"])}


@contextmanager
def _naming_section(where: str, files: str = "") -> Iterator[None]:
    """Adds the section of the config to errors of unknown options and missing files.

    files: the option that names files.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where}{files}: {error}") from error
    except TypeError as error:
        raise ValueError(f"{where}: {str(error).replace('.__init__()', '')}") from error


def _warn_of_missing_captions(model: LatentDiffusion, images: ImageDataset | Shards) -> None:
    if model.conditioner.text is None or not isinstance(images, Folder):
        return
    if isinstance(images.transform, PhotoTransform):
        missing = sum(not row.get("text") for row in images.metadata())
        if missing:
            log.warning(
                "%d of %d images of `%s` have no caption", missing, len(images), images.root
            )


def _fixed_captions(images: ImageDataset | Shards) -> Iterator[str]:
    """All captions, if each sample always has the same."""
    transform = images.transform
    if not isinstance(transform, PhotoTransform) or transform.tags is not None:
        raise ValueError("data.params.texts: only photos without `tags` have fixed captions")
    return (transform.caption(row, Random(0)) for row in images.metadata())


def _fill_vocabulary(model: LatentDiffusion, images: ImageDataset | Shards) -> None:
    """Gives a pruned token embedding that still has no tokens those of all captions."""
    text = model.conditioner.find(TextEncoder)
    if text is None or text.token_ids is None:
        return
    if text.token_ids.equal(torch.arange(len(text.token_ids))):
        # A folder's metadata has the rows of all splits.
        rows = read_metadata(images.root) if isinstance(images, Folder) else images.metadata()
        text.token_ids.copy_(collect_vocabulary(caption_texts(rows), text))


def collect_vocabulary(texts: Iterable[str], encoder: TextEncoder) -> Tensor:
    """Collects the sorted ids of all tokens in the texts, for the pruned embedding of `encoder`.

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

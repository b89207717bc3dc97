"""Read the `data` section of a config, with our keys or the original's.

    main.DataModuleFromConfig                train: {target: …, params}   validation: …
    ldm.data.laion.WebDataModuleFromConfig   train: {shards, image_transforms, postprocess, …}
    ldm.data.simple.FolderData, hf_dataset   -> {root: DIR, …}, {hub: NAME, …}
    ldm.data.simple.TextOnly                 as `validation`: prompts of the image grids
    sgm.data.dataset.StableDataModuleFromConfig    train: {datapipeline: {urls, …}, loader}

The datasets of the published configs were never published; errors name the keys to use instead.
"""

import logging
from collections.abc import Mapping

from ldm.data.former_options import rename_options
from ldm.runtime.errors import check_name, check_names
from ldm.runtime.types import JsonMapping, JsonObject
from ldm.train.config.schema import (
    DataOptions,
    EmojiOptions,
    FolderOptions,
    HubOptions,
    PhotoOptions,
    WebDatasetOptions,
    validate_section,
)
from ldm.train.config.specs import SPEC_KEYS, drop_nulls, get_section, read_spec

__all__ = ["extract_sample_prompts", "read_data", "translate_data_module"]

log = logging.getLogger(__name__)

WEB_MODULE = "ldm.data.laion.WebDataModuleFromConfig"
SGM_MODULE = "sgm.data.dataset.StableDataModuleFromConfig"
TRANSFORM_OPTIONS: dict[str, type] = {"emoji": EmojiOptions, "photo": PhotoOptions}
SPLITS = ("train", "validation")
DATASET_OPTIONS: dict[str, type] = {
    "root": FolderOptions,
    "shards": WebDatasetOptions,
    "hub": HubOptions,
}
# Ignored arguments of the original's data modules, and why.
IGNORED_PARAMS = {
    **dict.fromkeys(("test", "predict", "shuffle_test_loader"), "there is no test loop"),
    **dict.fromkeys(("wrap", "use_worker_init_fn"), "samples depend on their index only"),
    "shuffle_val_dataloader": "validation data is always read in the same order",
    **dict.fromkeys(("multinode", "n_nodes"), "ranks share one sequence of samples"),
    **dict.fromkeys(("val_num_workers", "num_val_workers"), "`num_workers` applies to both"),
    "filter_word_list": "captions are NOT filtered: leave such samples out of the shards",
}
IGNORED_IN_DATASETS = {
    "ext": "images of all formats are read",
    "return_paths": "the names of unreadable images are logged",
    "default_caption": "images without a caption in `caption_file` have none",
    **dict.fromkeys(("image_key", "caption_key"), "images are `jpg`, captions `txt`"),
}
IGNORED_IN_TEXT_ONLY = {
    "output_size": "grids have the size of the training data",
    "n_gpus": "rank 0 samples the grids",
    **dict.fromkeys(("image_key", "caption_key"), "images are `jpg`, captions `txt`"),
}
# Only the first four have an effect: our transform does what the others do anyway.
IMAGE_TRANSFORMS = (
    "Resize", "RandomCrop", "CenterCrop", "RandomHorizontalFlip",
    "ToTensor", "Normalize", "Rearrange", "Lambda", "ToPILImage",
)  # fmt: skip
POSTPROCESSORS = (
    "TorchVisionImageTransforms", "AddOriginalImageSizeAsTupleAndCropToSquare", "Rescaler",
)  # fmt: skip
ORIGINAL_DATASETS = {  # class -> {argument: our key}
    "ldm.data.simple.FolderData": {"root_dir": "root", "caption_file": "metadata"},
    "ldm.data.simple.hf_dataset": {
        "name": "hub", "split": "split", "image_column": "image", "text_column": "text",
    },
}  # fmt: skip


def read_data(section: JsonMapping) -> DataOptions:
    """Read a data section; ignored keys are logged."""
    target = section.get("target", "main.DataModuleFromConfig")
    items = (section.get("params") or {}).items()
    params = {k: v for k, v in items if v is not None and v is not False and v != {}}
    _pop_ignored(params, IGNORED_PARAMS, "data.params")
    if target == WEB_MODULE:
        params = _translate_web_module(params)
    elif target != "main.DataModuleFromConfig":
        raise _unsupported_target("data", target)
    data = validate_section(DataOptions, params, "data.params")
    if data.prior and "shards" in data.train:
        raise ValueError("data.params: `prior` needs a folder or a hub, not `shards`")
    splits: JsonObject = {
        split: _translate_split(params[split], f"data.params.{split}")
        for split in SPLITS
        if split in params
    }
    if data.prior:
        transform = _read_transform(data.prior.transform, "data.params.prior")
        splits["prior"] = data.prior.model_copy(update={"transform": transform})
    return data.model_copy(update=splits)


def extract_sample_prompts(config: JsonMapping) -> tuple[JsonMapping, object]:
    """Split a config into one without `TextOnly` validation data, and the captions of that data.

    The captions are None if the validation data has another class.
    """
    where = "data.params.validation"
    spec = get_section(config, where)
    if spec.get("target") != "ldm.data.simple.TextOnly":
        return config, None
    _, options = read_spec(spec, ("TextOnly",), where)
    _pop_ignored(options, IGNORED_IN_TEXT_ONLY, where)
    check_names("key", options, ("captions",), where)
    if not options:
        raise ValueError(f"{where}: TextOnly needs `captions`")
    params = {k: v for k, v in config["data"]["params"].items() if k != "validation"}
    return {**config, "data": {**config["data"], "params": params}}, options["captions"]


def translate_data_module(section: JsonMapping) -> JsonMapping:
    """Translate the data module of `sgm`, which reads tar files; return others unchanged."""
    if section.get("target") != SGM_MODULE:
        return section
    params: JsonObject = {}
    for split in section.get("params") or {}:
        where = f"data.params.{split}"
        spec = get_section({"data": section}, where) if split in SPLITS else None
        if not spec:
            log.info("%s is ignored", where)
            continue
        loader = get_section({"data": section}, f"{where}.loader")
        if split == "train":
            params |= {key: loader[key] for key in ("batch_size", "num_workers") if key in loader}
        pipeline, options = (
            get_section({"data": section}, f"{where}.datapipeline{key}")
            for key in ("", ".pipeline_config")
        )
        params[split] = _translate_pipeline(pipeline, options, where)
    return {"params": params}


def _translate_pipeline(pipeline: JsonMapping, options: JsonMapping, where: str) -> JsonObject:
    """Translate a pipeline of the package `sdata`, whose crops are random.

    Args:
        options: Its `pipeline_config`.
    """
    urls = pipeline.get("urls") or []
    transform: JsonObject = {"name": "photo", "flip": 0.0}
    for mapper in pipeline.get("postprocessors") or []:
        name, params = read_spec(mapper, POSTPROCESSORS, where, kind="postprocessor")
        if name == "TorchVisionImageTransforms":
            transform |= _pop_transform({"image_transforms": params.get("transforms")}, where)
        elif name == "AddOriginalImageSizeAsTupleAndCropToSquare":
            # the parameters `h_key` and `w_key`
            keys = [
                params.get(f"{side[0]}_key", f"original_{side}") for side in ("height", "width")
            ]
            transform |= {"crop": "random", "original_size_keys": keys}
    return {
        "shards": [urls] if isinstance(urls, str) else list(urls),
        "shuffle": _divide_shuffle(options.get("sample_shuffle")),
        "transform": transform,
    }


def _divide_shuffle(size: object) -> object:
    """Return the size of each shuffle buffer: the originals have one, `Shards` has 8 streams.

    Anything but an integer is returned unchanged: validation names it.
    """
    return size // 8 if isinstance(size, int) else size or 0


def _translate_split(spec: JsonMapping, where: str) -> JsonObject:
    if "target" in spec and all(spec.get(key) is None for key in DATASET_OPTIONS):
        spec = _translate_dataset(spec["target"], dict(spec.get("params") or {}), where)
    # Our keys replace a dataset of the original, which another config file may have set.
    spec = {k: v for k, v in drop_nulls(spec).items() if k not in SPEC_KEYS}
    keys = [key for key in DATASET_OPTIONS if key in spec]
    if len(keys) > 1:
        names = " and ".join(f"`{key}`" for key in keys)
        raise ValueError(f"{where} has {names}: set all but one, and its options, to null")
    if not keys:
        raise ValueError(f"{where} needs one of `root` (a folder), `shards` or `hub`")
    if not isinstance(spec.get("transform"), Mapping):
        raise ValueError(f"{where} needs `transform`, {{name: photo, size: 512, …}}")
    spec = rename_options(keys[0], spec)
    options: JsonObject = validate_section(DATASET_OPTIONS[keys[0]], spec, where)
    return {**options, "transform": _read_transform(spec["transform"], where)}


def _read_transform(options: JsonMapping, where: str) -> JsonObject:
    name = str(options.get("name"))
    check_name("transform", name, TRANSFORM_OPTIONS, where)
    # Null removes a key that another config file has set for another transform.
    options = drop_nulls(rename_options(name, options))
    if options.get("flip") is True:  # as in the configs of older versions
        log.warning("%s.transform.flip: `true` mirrors every image, 0.5 every second one", where)
        options["flip"] = 1.0
    result: JsonObject = validate_section(TRANSFORM_OPTIONS[name], options, f"{where}.transform")
    return result


def _translate_dataset(target: object, params: JsonObject, where: str) -> JsonObject:
    our_keys = ORIGINAL_DATASETS.get(str(target))
    if our_keys is None:
        raise _unsupported_target(where, target, params.get("size", 512))
    options: JsonObject = {}
    if params.get("caption_file") is None and (caption := params.pop("default_caption", None)):
        options["fields"] = {"text": caption}  # of all images, as in the original
    _pop_ignored(params, IGNORED_IN_DATASETS, where)
    options["transform"] = _pop_transform(params, where)
    check_names("key", params, our_keys, where)
    return {our_keys[key]: value for key, value in params.items()} | options


def _translate_web_module(params: JsonObject) -> JsonObject:
    """Translate `WebDataModuleFromConfig`; its limits apply to img2dataset's metadata."""
    size, base = params.pop("min_size", None), params.pop("tar_base", None)
    minimum = {"original_width": size, "original_height": size} if size else None
    limits = {"max_pwatermark": "pwatermark", "p_unsafe_threshold": "punsafe"}
    maximum = {key: params.pop(name) for name, key in limits.items() if name in params}
    for split in SPLITS:
        if split in params:
            where = f"data.params.{split}"
            spec = dict(get_section({"data": {"params": params}}, where))
            shards = spec.pop("shards", None) or []
            shards = shards if isinstance(shards, list) else [shards]
            translated = {
                "shards": [f"{base}/{shard}" for shard in shards] if base else shards,
                "shuffle": _divide_shuffle(spec.pop("shuffle", None)),
                "length": spec.pop("n_examples", None),
                "transform": _pop_transform(spec, where),
                "minimum": minimum,
                "maximum": maximum or None,
            }
            spec.pop("image_key", None)  # `Shards` finds the image by its suffix
            check_names("key", spec, translated, where)
            params[split] = translated
    return params


def _pop_transform(params: JsonObject, where: str) -> JsonObject:
    """Remove `image_transforms` and `postprocess`; return them as options of our `photo`."""
    transform: JsonObject = {"name": "photo", "flip": 0.0}
    for spec in params.pop("image_transforms", None) or []:
        name, options = read_spec(spec, IMAGE_TRANSFORMS, where, kind="transform")
        if name in ("Resize", "RandomCrop", "CenterCrop"):
            if "size" not in options:
                raise ValueError(f"{where}: {name} needs `size`")
            size = options["size"]
            transform["size"] = size if isinstance(size, int) else min(size)
            if name != "Resize":
                transform["crop"] = "random" if name == "RandomCrop" else "center"
        elif name == "RandomHorizontalFlip":
            transform["flip"] = options.get("p", 0.5)
    postprocess = params.pop("postprocess", None)
    if postprocess:
        name, options = read_spec(postprocess, ("AddMask", "AddLR"), where, kind="postprocess")
        if name == "AddMask":
            transform["conditions"] = {"mask": {"full_probability": options.pop("p_drop", 0.0)}}
        elif "factor" in options:
            transform["conditions"] = {"lr": {"factor": options.pop("factor")}}
        else:
            raise ValueError(f"{where}.postprocess: AddLR needs `factor`")
        for key in options:
            log.info("%s.postprocess.%s is ignored", where, key)
    return transform


def _pop_ignored(params: JsonObject, reasons: Mapping[str, str], where: str) -> None:
    """Remove ignored keys, and log why they are ignored."""
    for key, reason in reasons.items():
        if params.pop(key, None):
            log.info("%s.%s is ignored: %s", where, key, reason)


def _unsupported_target(where: str, target: object, size: object = 512) -> ValueError:
    return ValueError(
        f"{where}: `{target}` is not supported (only {', '.join(ORIGINAL_DATASETS)}); write"
        f" {{root: DIR, transform: {{name: photo, size: {size}}}}} with a folder of images"
    )

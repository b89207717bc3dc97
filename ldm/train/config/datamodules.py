"""Translates the original's data sections into ours.

    main.DataModuleFromConfig                train: {target: …, params}   validation: …
    ldm.data.laion.WebDataModuleFromConfig   train: {shards, image_transforms, postprocess, …}
    ldm.data.simple.FolderData, hf_dataset   -> {root: DIR, …}, {hub: NAME, …}

The data sets of the published configs were never published; the error says what to write instead.
"""

from collections.abc import Callable

from ldm.runtime.errors import unknown_name
from ldm.runtime.types import JsonMapping, JsonObject

__all__ = ["KEYS", "translate"]

Spec = JsonObject

KEYS = ("batch_size", "num_workers", "train", "validation", "latents", "texts", "prior")
SPLITS = ("train", "validation")
KINDS = ("root", "shards", "hub")
# Arguments of the originals' data modules without meaning here, and why.
MEANINGLESS = {
    **dict.fromkeys(("test", "predict", "shuffle_test_loader"), "there is no test loop"),
    **dict.fromkeys(("wrap", "use_worker_init_fn"), "samples depend on their index only"),
    "shuffle_val_dataloader": "validation data is always read in the same order",
    **dict.fromkeys(("multinode", "n_nodes"), "ranks share one sequence of samples"),
    **dict.fromkeys(("val_num_workers", "num_val_workers"), "`num_workers` holds for both"),
    "filter_word_list": "captions are NOT filtered: leave such samples out of the shards",
}
TO_TENSOR = ("ToTensor", "Normalize", "Rearrange", "Lambda", "ToPILImage")  # always done


def translate(data: JsonMapping) -> tuple[Spec, list[str]]:
    """Returns the `params` of a data section in our words, and notes on what has no meaning here.

    Raises:
        ValueError: a key or data set is unknown, or a key is missing.
    """
    target, params = data.get("target", "main.DataModuleFromConfig"), dict(data.get("params") or {})
    notes = [f"data.params.{k}: {why}" for k, why in MEANINGLESS.items() if params.pop(k, None)]
    if target == "ldm.data.laion.WebDataModuleFromConfig":
        params = _translate_web_module(params)
    elif target != "main.DataModuleFromConfig":
        raise _cannot_read("data", target)
    for key in params:
        if key not in KEYS:
            raise unknown_name("key", key, KEYS, "data.params")
    for key in ("batch_size", "train"):
        if key not in params:
            raise ValueError(f"data.params needs `{key}`")
    for split in SPLITS:
        if params.get(split):
            params[split] = _translate_split(params[split], f"data.params.{split}", notes)
    return params, notes


def _translate_split(spec: JsonMapping, where: str, notes: list[str]) -> Spec:
    spec = {key: value for key, value in spec.items() if value is not None}
    kinds = [f"`{kind}`" for kind in KINDS if kind in spec]
    if "target" in spec and not kinds:
        params = dict(spec.get("params") or {})
        if spec["target"] not in DATASETS:
            raise _cannot_read(where, spec["target"], params.get("size", 512))
        return DATASETS[spec["target"]](params, where, notes)
    if len(kinds) > 1:
        both = " and ".join(kinds)
        raise ValueError(f"{where} has {both}: set all but one to null, and their options")
    if not kinds:
        raise ValueError(f"{where} needs one of `root` (a folder), `shards` or `hub`")
    if "transform" not in spec:
        raise ValueError(f"{where} needs `transform`, {{name: photo, size: 512, …}}")
    # Keys laid over a data set of the original replace it.
    return {key: value for key, value in spec.items() if key not in ("target", "params")}


def _translate_folder(params: Spec, where: str, notes: list[str]) -> Spec:
    for key in ("ext", "return_paths", "caption_file", "default_caption"):
        if params.pop(key, None):
            notes.append(f"{where}.{key}: captions are in metadata.jsonl or beside the images")
    spec = {"root": params.pop("root_dir", None), "transform": _pop_transform(params, where)}
    return _finish(spec, params, where)


def _translate_hub(params: Spec, where: str, notes: list[str]) -> Spec:
    for key in ("image_key", "caption_key"):
        if params.pop(key, None):
            notes.append(f"{where}.{key}: images are `jpg`, captions `txt`")
    spec = {
        "hub": params.pop("name", None),
        "split": params.pop("split", "train"),
        "image": params.pop("image_column", "image"),
        "text": params.pop("text_column", "text"),
        "transform": _pop_transform(params, where),
    }
    return _finish(spec, params, where)


DATASETS: dict[str, Callable[[Spec, str, list[str]], Spec]] = {
    "ldm.data.simple.FolderData": _translate_folder,
    "ldm.data.simple.hf_dataset": _translate_hub,
}


def _translate_web_module(params: Spec) -> Spec:
    """The data module of tar files; its limits refer to the .json files of img2dataset."""
    size, base = params.pop("min_size", None), params.pop("tar_base", None)
    maximum = {
        "pwatermark": params.pop("max_pwatermark", None),
        "punsafe": params.pop("p_unsafe_threshold", None),
    }
    maximum = {key: value for key, value in maximum.items() if value is not None}
    for split in SPLITS:
        if params.get(split):
            where, spec = f"data.params.{split}", dict(params[split])
            shards = spec.pop("shards", None) or []
            shards = [shards] if isinstance(shards, str) else list(shards)
            spec.pop("image_key", None)  # any image of a sample is read
            web = {
                "shards": [f"{base}/{shard}" for shard in shards] if base else shards,
                "shuffle": spec.pop("shuffle", 0) // 8,  # one buffer there, one per reader here
                "length": spec.pop("n_examples", None),
                "transform": _pop_transform(spec, where),
                "minimum": {"original_width": size, "original_height": size} if size else None,
                "maximum": maximum or None,
            }
            params[split] = _finish(web, spec, where)
    return params


def _pop_transform(params: Spec, where: str) -> Spec:
    """Takes `image_transforms` and `postprocess` out of `params`, as options of our `photo`."""
    photo: Spec = {"name": "photo", "flip": 0.0}
    for spec in params.pop("image_transforms", None) or []:
        name, options = spec["target"].rpartition(".")[2], spec.get("params") or {}
        if name in ("Resize", "RandomCrop", "CenterCrop"):
            size = options["size"]
            photo["size"] = size if isinstance(size, int) else min(size)
            if name != "Resize":
                photo["crop"] = "random" if name == "RandomCrop" else "centre"
        elif name == "RandomHorizontalFlip":
            photo["flip"] = options.get("p", 0.5)
        elif name not in TO_TENSOR:
            raise unknown_name("transform", spec["target"], (), where)
    after = params.pop("postprocess", None)
    if after:
        photo["conditions"] = _translate_postprocess(after, where)
    return photo


def _translate_postprocess(spec: JsonMapping, where: str) -> Spec:
    name, options = spec["target"].rpartition(".")[2], spec.get("params") or {}
    if name == "AddMask":
        return {"mask": {"full_probability": options.get("p_drop", 0.0)}}
    if name == "AddLR":
        return {"lr": {"factor": options["factor"]}}
    raise unknown_name("postprocess", spec["target"], ("AddMask", "AddLR"), where)


def _finish(spec: Spec, rest: Spec, where: str) -> Spec:
    """The keys that have a value; whatever was not read is an error."""
    if rest:
        raise unknown_name("key", next(iter(rest)), spec, where)
    return {key: value for key, value in spec.items() if value is not None}


def _cannot_read(where: str, target: object, size: object = 512) -> ValueError:
    return ValueError(
        f"{where}: `{target}` cannot be read here (only {', '.join(DATASETS)}); write"
        f" {{root: DIR, transform: {{name: photo, size: {size}}}}} with a folder of images"
    )

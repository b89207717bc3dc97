"""The original's words for data sets -> ours.

    main.DataModuleFromConfig                train: {target: …, params}   validation: …
    ldm.data.laion.WebDataModuleFromConfig   train: {shards, image_transforms, postprocess, …}
    ldm.data.simple.FolderData, hf_dataset   -> {root: DIR, …}, {hub: NAME, …}

The data sets of the published configs themselves were never published; for them the error says what
to write instead.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ldm.runtime.errors import unknown_name

__all__ = ["KEYS", "translate"]

Spec = dict[str, Any]

KEYS = ("batch_size", "num_workers", "train", "validation", "latents", "texts", "prior")
SPLITS = ("train", "validation")
KINDS = ("root", "shards", "hub")
# What the originals' data modules could be told, and why it means nothing here.
MEANINGLESS = {
    **dict.fromkeys(("test", "predict", "shuffle_test_loader"), "there is no test loop"),
    **dict.fromkeys(("wrap", "use_worker_init_fn"), "samples depend on their number alone"),
    "shuffle_val_dataloader": "what is held out is always read in the same order",
    **dict.fromkeys(("multinode", "n_nodes"), "ranks share one sequence by themselves"),
    **dict.fromkeys(("val_num_workers", "num_val_workers"), "`num_workers` holds for both"),
    "filter_word_list": "captions are NOT filtered: leave such samples out of the shards",
}
OF_PIXELS = ("ToTensor", "Normalize", "Rearrange", "Lambda", "ToPILImage")  # always done


def translate(data: Mapping[str, Any]) -> tuple[Spec, list[str]]:
    """The `params` of a data section in our words, and notes on what has no meaning here.

    Raises ValueError for unknown keys and data sets.
    """
    target, params = data.get("target", "main.DataModuleFromConfig"), dict(data.get("params") or {})
    notes = [f"data.params.{k}: {why}" for k, why in MEANINGLESS.items() if params.pop(k, None)]
    if target == "ldm.data.laion.WebDataModuleFromConfig":
        params = _web(params)
    elif target != "main.DataModuleFromConfig":
        raise ValueError(f"data: {_instead(target, {})}")
    for key in params:
        if key not in KEYS:
            raise unknown_name("key", key, KEYS, "data.params")
    for key in ("batch_size", "train"):
        if key not in params:
            raise ValueError(f"data.params needs `{key}`")
    for split in SPLITS:
        if params.get(split):
            params[split] = _split(params[split], f"data.params.{split}", notes)
    return params, notes


def _split(spec: Mapping[str, Any], where: str, notes: list[str]) -> Spec:
    spec = {key: value for key, value in spec.items() if value is not None}
    kinds = [kind for kind in KINDS if kind in spec]
    if "target" in spec and not kinds:
        params = dict(spec.get("params") or {})
        if spec["target"] not in DATASETS:
            raise ValueError(f"{where}: {_instead(spec['target'], params)}")
        return DATASETS[spec["target"]](params, where, notes)
    if len(kinds) > 1:
        both = " and ".join(f"`{kind}`" for kind in kinds)
        raise ValueError(f"{where} has {both}: set all but one to null, and their options")
    if not kinds:
        raise ValueError(f"{where} needs one of `root` (a folder), `shards` or `hub`")
    if "transform" not in spec:
        raise ValueError(f"{where} needs `transform`, {{name: photo, size: 512, …}}")
    # What was laid over a data set of the original takes its place.
    return {key: value for key, value in spec.items() if key not in ("target", "params")}


def _folder(params: Spec, where: str, notes: list[str]) -> Spec:
    for key in ("ext", "return_paths", "caption_file", "default_caption"):
        if params.pop(key, None):
            notes.append(f"{where}.{key}: captions are those of metadata.jsonl or beside pictures")
    made = {"root": params.pop("root_dir", None), "transform": _photo(params, where)}
    return _nothing_left(params, made, where)


def _hub(params: Spec, where: str, notes: list[str]) -> Spec:
    for key in ("image_key", "caption_key"):
        if params.pop(key, None):
            notes.append(f"{where}.{key}: pictures are `jpg`, captions `txt`")
    made = {
        "hub": params.pop("name", None),
        "split": params.pop("split", "train"),
        "image": params.pop("image_column", "image"),
        "text": params.pop("text_column", "text"),
        "transform": _photo(params, where),
    }
    return _nothing_left(params, made, where)


DATASETS: dict[str, Callable[[Spec, str, list[str]], Spec]] = {
    "ldm.data.simple.FolderData": _folder,
    "ldm.data.simple.hf_dataset": _hub,
}


def _web(params: Spec) -> Spec:
    """The data module of tar files; its limits are those of img2dataset's .json files."""
    size, watermark = params.pop("min_size", None), params.pop("max_pwatermark", None)
    unsafe, base = params.pop("p_unsafe_threshold", None), params.pop("tar_base", None)
    limits: Spec = {}
    if size:
        limits["minimum"] = {"original_width": size, "original_height": size}
    most = {"pwatermark": watermark, "punsafe": unsafe}
    if any(value is not None for value in most.values()):
        limits["maximum"] = {key: value for key, value in most.items() if value is not None}
    for split in SPLITS:
        if params.get(split):
            where, spec = f"data.params.{split}", dict(params[split])
            shards = spec.pop("shards", None) or []
            shards = [shards] if isinstance(shards, str) else list(shards)
            spec.pop("image_key", None)  # whatever pictures there are
            made = {
                "shards": [f"{base}/{shard}" for shard in shards] if base else shards,
                "shuffle": spec.pop("shuffle", 0) // 8,  # it was one buffer, now each lane has one
                "length": spec.pop("n_examples", None),
                "transform": _photo(spec, where),
            }
            params[split] = _nothing_left(spec, made | limits, where)
    return params


def _photo(params: Spec, where: str) -> Spec:
    """`image_transforms` and `postprocess` as options of our photo; taken out of `params`."""
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
        elif name not in OF_PIXELS:
            raise unknown_name("transform", spec["target"], (), where)
    after = params.pop("postprocess", None)
    if after:
        photo["conditions"] = _record(after, where)
    return photo


def _record(spec: Mapping[str, Any], where: str) -> Spec:
    name, options = spec["target"].rpartition(".")[2], spec.get("params") or {}
    if name == "AddMask":
        return {"mask": {"full_probability": options.get("p_drop", 0.0)}}
    if name == "AddLR":
        return {"lr": {"factor": options["factor"]}}
    raise unknown_name("postprocess", spec["target"], ("AddMask", "AddLR"), where)


def _nothing_left(params: Spec, made: Spec, where: str) -> Spec:
    if params:
        raise unknown_name("key", next(iter(params)), made, where)
    return {key: value for key, value in made.items() if value is not None}


def _instead(target: Any, params: Mapping[str, Any]) -> str:
    size: Any = params.get("size", 512)
    known: Sequence[str] = list(DATASETS)
    return (
        f"`{target}` cannot be read here (only {', '.join(known)}); write"
        f" {{root: DIR, transform: {{name: photo, size: {size}}}}} with a folder of pictures"
    )

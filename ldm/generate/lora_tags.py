"""Parse A1111's `<lora:NAME:WEIGHT>` tags, which add LoRAs and are removed from the prompt."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath

from ldm.generate.groups import ModelOptions
from ldm.loading.addons.lora_weights import LoRAWeight, split_weight
from ldm.loading.hub import HUB_PREFIX
from ldm.loading.load import DEMO_CHECKPOINT
from ldm.loading.published import resolve_checkpoint
from ldm.runtime.errors import ArgumentError, MissingFile, make_unknown_name_error
from ldm.runtime.files import find_file, list_files

__all__ = ["Loras", "add_tagged_loras", "list_local_loras", "remove_tags", "split_tags"]

TAG_PATTERN = re.compile(r"<(lora|lyco|hypernet):([^<>]+)>")
LORA_FOLDERS = ("lora", "loras")  # in lower case
LORA_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".bin")

Loras = tuple[tuple[str, float | str], ...]  # (file, weight), a weight as in `LoRAWeight.to_json`


def split_tags(prompt: str) -> tuple[str, list[tuple[str, float | str]]]:
    """Split a prompt into (text without tags, names and weights of LoRAs).

    Raises:
        ArgumentError: A weight is invalid, or a tag names a hypernetwork.
    """
    loras = []
    for match in TAG_PATTERN.finditer(prompt):
        if match[1] == "hypernet":
            raise ArgumentError(f"`{match[0]}`: hypernetworks are not supported", "prompt")
        name, weight = split_weight(match[2])
        if ":" in name:
            reason = f"`{name.partition(':')[2]}` is not a weight, such as 0.8 or 0.5:1"
            raise ArgumentError(f"`{match[0]}`: {reason}", "prompt")
        loras.append((name, LoRAWeight.parse(weight or 1.0).to_json()))
    return remove_tags(prompt), loras


def remove_tags(prompt: str) -> str:
    """Return a prompt without tags; if it has any, surrounding whitespace is removed, too."""
    return TAG_PATTERN.sub("", prompt).strip() if TAG_PATTERN.search(prompt) else prompt


def add_tagged_loras(
    prompt: str, loras: Loras, list_loras: Callable[[], Mapping[str, str]]
) -> Loras:
    """Return the LoRAs of an image: those of the run, and those named in its prompt.

    Args:
        list_loras: Returns files by name as `list_local_loras`; only called if there are tags.
    Raises:
        ArgumentError: A LoRA is unknown, ambiguous or given twice, or a weight is invalid.
    """
    _, tags = split_tags(prompt)
    if not tags:
        return loras
    files = list_loras()
    combined = list(loras)
    for name, weight in tags:
        file = _match_name(name, files)
        if any(Path(file).resolve() == Path(other).resolve() for other, _ in combined):
            raise ArgumentError(f"the LoRA `{name}` is given twice", "prompt")
        combined.append((file, weight))
    return tuple(combined)


def list_local_loras(options: ModelOptions) -> dict[str, str]:
    """Return the LoRA files that prompts may name: relative POSIX path without suffix -> file.

    They are in `lora_dir`, else in each folder `lora` or `loras` beside the checkpoint, beside its
    folder, and in the current folder, in this order of precedence. For a checkpoint `hf:…`, or a
    config without checkpoint, only the current folder is searched.

    Raises:
        MissingFile: `lora_dir` does not exist.
    """
    if options.lora_dir is not None:
        folder = Path(options.lora_dir)
        if not folder.is_dir():
            raise MissingFile(f"no folder `{folder}`", "lora_dir")
        return _list_lora_files(folder)
    files: dict[str, str] = {}
    for parent in dict.fromkeys([Path(), *_find_checkpoint_folders(options)]):
        for folder in sorted(parent.iterdir()) if parent.is_dir() else ():
            if folder.name.lower() in LORA_FOLDERS and folder.is_dir():
                files |= _list_lora_files(folder)
    return files


def _find_checkpoint_folders(options: ModelOptions) -> list[Path]:
    """Return the parent of the checkpoint's folder, then its folder, which takes precedence."""
    if options.ckpt is not None and options.ckpt.startswith(HUB_PREFIX):
        return []  # it is in the hub's cache, which has no LoRA folders, or not downloaded yet
    if options.ckpt is not None:
        path = resolve_checkpoint(options.ckpt, download=False)
    elif options.config is None:
        path = find_file(DEMO_CHECKPOINT)
    else:
        return []
    folder = path.absolute().parent
    return [folder.parent, folder]


def _list_lora_files(folder: Path) -> dict[str, str]:
    files = filter(Path.is_file, list_files(folder))
    paths = sorted(path for path in files if path.suffix.lower() in LORA_SUFFIXES)
    return {path.relative_to(folder).with_suffix("").as_posix(): str(path) for path in paths}


def _match_name(name: str, files: Mapping[str, str]) -> str:
    """Return the file with this name, else the only one with its base name, ignoring case."""
    if name in files:
        return files[name]
    base_name = PurePath(name).name.lower()
    matches = [key for key in files if PurePath(key).name.lower() == base_name]
    if len(matches) > 1:
        names = ", ".join(f"`{key}`" for key in matches)
        raise ArgumentError(f"the LoRA `{name}` could be any of {names}", "lora_dir")
    if not files:
        message = f"unknown LoRA `{name}`: no LoRA files found, pass the folder that contains it"
        raise ArgumentError(message, "lora_dir")
    if not matches:
        raise make_unknown_name_error("LoRA", name, files, argument="lora_dir")
    return files[matches[0]]

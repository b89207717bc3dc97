"""`<lora:NAME:WEIGHT>` in prompts, as in A1111: tags are taken out, and name files to add."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath

from ldm.generate.options import Value
from ldm.generate.request import ModelChoice
from ldm.loading.addons.lora_weights import LoRAWeight, split_weight
from ldm.loading.load import DEMO
from ldm.loading.published import find_checkpoint
from ldm.runtime.errors import ArgumentError, MissingFile, unknown_name
from ldm.runtime.files import find_file

__all__ = ["find_loras", "list_loras", "split_tags", "without_tags"]

TAG = re.compile(r"<(lora|lyco|hypernet):([^<>]+)>")
FOLDERS = ("lora", "loras")  # in small letters
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".bin")

Loras = tuple[tuple[str, float | str], ...]  # files and weights


def split_tags(prompt: str) -> tuple[str, list[tuple[str, float | str]]]:
    """Split a prompt into its text, and names and weights of LoRAs.

    Raises:
        ArgumentError: a weight is none, or a tag asks for a hypernetwork.
    """
    loras = []
    for kind, content in TAG.findall(prompt):
        if kind == "hypernet":
            raise ArgumentError(f"`<{kind}:{content}>`: hypernetworks are not supported", "prompt")
        name, weight = split_weight(content)
        if ":" in name:
            wrong = f"`{name.partition(':')[2]}` is not a weight, such as 0.8 or 0.5:1"
            raise ArgumentError(f"`<{kind}:{content}>`: {wrong}", "prompt")
        loras.append((name, LoRAWeight.of(weight or 1.0).to_json()))
    return without_tags(prompt), loras


def without_tags(prompt: str) -> str:
    """Return a prompt without the names of LoRAs, and without space around it if there were any."""
    return TAG.sub("", prompt).strip() if TAG.search(prompt) else prompt


def find_loras(prompt: str, loras: Loras, list_files: Callable[[], Mapping[str, str]]) -> Loras:
    """Return the LoRAs of an image: those of the run, and those that its prompt names.

    Args:
        list_files: returns the file of each name; called only if there are tags.
    Raises:
        ArgumentError: there is no such LoRA, or one is given twice.
    """
    _, tags = split_tags(prompt)
    if not tags:
        return loras
    files = list_files()
    found: list[tuple[str, Value]] = list(loras)
    for name, weight in tags:
        file = _find_file(name, files)
        if any(Path(file).resolve() == Path(other).resolve() for other, _ in found):
            raise ArgumentError(f"the LoRA `{name}` is given twice", "lora")
        found.append((file, weight))
    return tuple(found)


def list_loras(choice: ModelChoice) -> dict[str, str]:
    """Return the files that prompts may name, by their paths in their folder, without suffix.

    The folder is the one given, else each `lora` or `loras` beside the checkpoint, beside its
    folder, and in the current one.

    Raises:
        MissingFile: the folder that is given does not exist.
    """
    if choice.lora_dir is not None:
        folder = Path(choice.lora_dir)
        if not folder.is_dir():
            raise MissingFile(f"no folder `{folder}`", "lora_dir")
        return _files_in(folder)
    files: dict[str, str] = {}
    for place in dict.fromkeys([Path(), *_places_of(choice)]):
        for folder in sorted(place.iterdir()) if place.is_dir() else ():
            if folder.name.lower() in FOLDERS and folder.is_dir():
                files |= _files_in(folder)
    return files


def _places_of(choice: ModelChoice) -> list[Path]:
    """Return the folder of the checkpoint, and the one around it, the nearest last."""
    if choice.ckpt is not None:
        path = find_checkpoint(choice.ckpt, fetch=False)
    elif choice.config is None:
        path = find_file(DEMO[1])
    else:
        return []
    folder = path.absolute().parent
    return [folder.parent, folder]


def _files_in(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return {path.relative_to(folder).with_suffix("").as_posix(): str(path) for path in paths}


def _find_file(name: str, files: Mapping[str, str]) -> str:
    """Return the file with this name, or the only one whose name ends so."""
    if name in files:
        return files[name]
    wanted = PurePath(name).name.lower()
    matches = [key for key in files if PurePath(key).name.lower() == wanted]
    if len(matches) > 1:
        names = ", ".join(f"`{key}`" for key in matches)
        raise ArgumentError(f"the LoRA `{name}` could be any of {names}", "lora_dir")
    if not files:
        message = f"unknown LoRA `{name}`: no folder of LoRAs has files, give one that has it"
        raise ArgumentError(message, "lora_dir")
    if not matches:
        raise unknown_name("LoRA", name, files, argument="lora_dir")
    return files[matches[0]]

"""Read a YAML file into plain dicts, and build the objects that it describes.

A config file is untrusted data, so nothing in it is executed: a `target` must be in the tables of
`legacy`, or a class of a package that the caller allows (nothing else is imported), `${…}` may
only refer to another value of the same file (no resolvers, so no environment variables), and the
size is limited. Numbers are read as by OmegaConf (`1.e-6` is a float, unlike in plain YAML 1.1).
"""

import inspect
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import lru_cache, reduce
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ldm.loading import legacy
from ldm.loading.legacy import list_targets, translate_config
from ldm.runtime.arguments import as_list
from ldm.runtime.errors import (
    MALFORMED_DATA_ERRORS,
    ArgumentError,
    ConfigError,
    MissingFile,
    check_name,
    check_names,
    make_unknown_name_error,
)
from ldm.runtime.files import find_file, read_text
from ldm.runtime.types import JsonMapping, JsonObject

__all__ = [
    "check_overrides", "format_yaml", "instantiate", "parse_yaml", "read_config_text", "read_yaml",
]  # fmt: skip

log = logging.getLogger(__name__)

MAX_BYTES = 1 << 20
MAX_DEPTH = 64  # of nested mappings, lists and references
MAX_NODES = 10_000  # values in a file after aliases and references are resolved
SPEC_KEYS = ("target", "params", "base_learning_rate")  # the last is used by training
KeyRenamer = Callable[[JsonObject], JsonObject]
REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*(?:\.\w+)*)\}")


def read_yaml(path: str | Path, overrides: Iterable[str] = ()) -> JsonObject:
    """Read a YAML file as plain dicts, lists and values, with references resolved.

    Args:
        overrides: Such as `model.params.linear_end=0.02`; values are parsed as YAML.
    """
    return parse_yaml(read_config_text(path), overrides, where=str(path))


def read_config_text(path: str | Path) -> str:
    """Read the text of a YAML file, unless it is too long to be a config."""
    try:
        full_path = find_file(path)
    except MissingFile:
        alias = legacy.CONFIG_ALIASES.get(Path(path).as_posix())
        if alias is None:
            raise
        full_path = find_file(alias)
    size = full_path.stat().st_size
    if size > MAX_BYTES:
        raise ConfigError(f"{path}: {size} bytes is too much for a config")
    return read_text(full_path)


def parse_yaml(
    text: str | Sequence[str],
    overrides: Iterable[str] = (),
    *,
    where: str = "config",
    sections: Sequence[str] = (),
    rename: KeyRenamer | None = None,
) -> JsonObject:
    """Parse the text of a YAML file as `read_yaml` does, or merge several: later ones win.

    Args:
        sections: Top-level keys that overrides may set even if no file has them.
        rename: Replaces former names of keys in each text, and in the overrides, before they are
            merged; None = keys are not renamed.
    """
    texts = (text,) if isinstance(text, str) else tuple(text)
    return deepcopy(_parse(texts, tuple(overrides), where, tuple(sections), rename))


@lru_cache(maxsize=32)  # loading a model parses its config several times
def _parse(
    texts: tuple[str, ...],
    overrides: tuple[str, ...],
    where: str,
    sections: tuple[str, ...],
    rename: KeyRenamer | None,
) -> JsonObject:
    try:
        configs = [OmegaConf.create(text, max_yaml_expanded_nodes=MAX_NODES) for text in texts]
        if not all(map(OmegaConf.is_dict, configs)):
            raise ConfigError(f"{where}: expected a YAML mapping at the top level")
        configs = [_rename_keys(config, rename) for config in configs]
        config = OmegaConf.merge(*configs) if len(configs) > 1 else configs[0]
        for section in sections:
            config.setdefault(section, {})
        for override in overrides:
            section = re.split(r"[.=\[]", override)[0]
            if "=" not in override or section not in config:
                raise ArgumentError(
                    f"invalid override `{override}` of {where}: expected `section.key=value` with "
                    f"one of the sections {', '.join(map(str, config))}",
                    "overrides",
                )
        if overrides:
            changes = _rename_keys(OmegaConf.from_dotlist(list(overrides)), rename)
            config = OmegaConf.merge(config, changes)
        config_dict: Any = OmegaConf.to_container(config, resolve=False)
    except (OmegaConfBaseException, YAMLError, RecursionError, TypeError) as error:
        text = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"{where}: {text}") from error
    resolved: JsonObject = _Resolver(config_dict, where, rename).resolve(config_dict)
    return resolved


def _rename_keys(config: Any, rename: KeyRenamer | None) -> Any:
    if rename is None:
        return config
    config_dict: Any = OmegaConf.to_container(config, resolve=False)
    return OmegaConf.create(rename(config_dict))


def _rename_path(keys: list[str], rename: KeyRenamer | None) -> list[str]:
    """Rename the keys of a reference `${section.key}`, as if a config had this one value."""
    if rename is None:
        return keys
    node = rename(reduce(lambda inner, key: {key: inner}, reversed(keys), {}))
    renamed_keys = []
    while node:
        [(key, node)] = node.items()
        renamed_keys.append(key)
    return renamed_keys


def check_overrides(config_dict: JsonMapping, overrides: Iterable[str], where: str) -> None:
    """Raise UnknownName for an override that no component reads, such as `model.param.x=1`.

    Parameters of classes are checked by `instantiate`.

    Args:
        config_dict: The config with the overrides applied.
    """
    for override in overrides:
        node: Any = config_dict
        prefix = ""
        for key in override.partition("=")[0].split("."):
            if not isinstance(node, Mapping):
                break
            if "target" in node:
                allowed = [prefix + name for name in SPEC_KEYS]
                check_name("override", prefix + key, allowed, where, "overrides")
            node, prefix = node.get(key), f"{prefix}{key}."


def format_yaml(config_dict: JsonMapping) -> str:
    """Return a config as YAML, which `parse_yaml` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(config_dict)))


class _Resolver:
    """Resolves references `${section.key}`, which must be whole values, in MAX_NODES at most."""

    def __init__(self, root: Any, where: str, rename: KeyRenamer | None) -> None:
        self.root = root
        self.where = where
        self.rename = rename
        self.remaining_nodes = MAX_NODES

    def resolve(self, node: Any, depth: int = 0) -> Any:
        self.remaining_nodes -= 1
        if self.remaining_nodes < 0 or depth > MAX_DEPTH:
            raise ConfigError(
                f"{self.where}: nested too deeply (perhaps a circular reference), or too large "
                "once references are followed"
            )
        if isinstance(node, dict):
            return {str(key): self.resolve(value, depth + 1) for key, value in node.items()}
        if isinstance(node, list):
            return [self.resolve(value, depth + 1) for value in node]
        if isinstance(node, str) and "${" in node:
            return self.resolve(self.look_up(node), depth + 1)
        return node

    def look_up(self, text: str) -> Any:
        match = REFERENCE.fullmatch(text)
        if match is None:
            raise ConfigError(
                f"{self.where}: `{text}` is not supported, a reference must be the whole value, "
                "such as `${model.params.channels}`"
            )
        node = self.root
        for key in _rename_path(match[1].split("."), self.rename):
            if isinstance(node, list) and key.isdigit() and int(key) < len(node):
                node = node[int(key)]
            elif isinstance(node, dict) and key in node:
                node = node[key]
            else:
                raise ConfigError(f"{self.where}: `{text}` refers to nothing in this file")
        return node


def instantiate(
    spec: JsonMapping,
    *,
    allow: str | Sequence[str] = (),
    where: str = "config",
    skipped: list[str] | None = None,
) -> Any:
    """Build the object that a `{"target": …, "params": {…}}` describes, with nested objects.

    Args:
        allow: Packages whose classes may be named, in addition to the known classes.
        where: File, or file and key, for messages.
        skipped: List to which ignored parameters are appended, as `file.key`; None = no list.

    Raises:
        UnknownName: A target or parameter is unknown; the message suggests the nearest known name.
        ConfigError: Parameters are missing or invalid.
    """
    spec = translate_config(spec, where=where, skipped=skipped)
    where, params = spec["where"], dict(spec["params"])
    factory = _find_class(spec["target"], as_list(allow), where)
    for key in sorted(params.keys() & getattr(factory, "IGNORED_PARAMS", frozenset())):
        log.debug("%s.%s is ignored by %s", where, key, factory.__name__)
        if skipped is not None:
            skipped.append(f"{where}.{key}")
        del params[key]
    _check_params(factory, params, where)
    for key, value in params.items():
        if isinstance(value, Mapping) and "target" in value:
            # `where` in the value, from `translate_config`, has precedence over this one.
            inner_where = f"{where}.{key}"
            params[key] = instantiate(value, allow=allow, where=inner_where, skipped=skipped)
    try:
        return factory(**params)
    except MALFORMED_DATA_ERRORS as error:
        if str(error).startswith(where):  # a nested `instantiate` has added `where` already
            raise
        message = f"{where}: invalid parameters of {factory.__name__}: {error}"
        raise ConfigError(message) from error


def _find_class(target: Any, allow: Sequence[str], where: str) -> Callable[..., Any]:
    """Return the class (or function of ours) that a target names; import no other package."""
    if target in legacy.OUR_CLASSES:
        module, _, name = target.rpartition(".")
        factory: Callable[..., Any] = getattr(import_module(module), name)
        return factory
    package = next((p for p in allow if str(target).startswith(p + ".")), None)
    if package is None:
        raise make_unknown_name_error("target", target, list_targets(), where)
    names = target.split(".")
    if not all(name.isidentifier() and not name.startswith("__") for name in names):
        raise ConfigError(f"{where}: `{target}` is not the name of a class")
    module, _, name = target.rpartition(".")
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{where}: target `{target}` cannot be found: {error}") from error
    defining_module = getattr(cls, "__module__", "")  # another one if `module` imports the class
    if not inspect.isclass(cls) or not f"{defining_module}.".startswith(package + "."):
        raise ConfigError(f"{where}: target `{target}` is not a class of the package `{package}`")
    return cls


def _check_params(factory: Callable[..., Any], params: JsonMapping, where: str) -> None:
    signature = dict(inspect.signature(factory).parameters)
    allowed = list(signature)
    var_keyword = next((n for n, p in signature.items() if p.kind is p.VAR_KEYWORD), None)
    if var_keyword is not None:
        typed_dicts = get_args(signature.pop(var_keyword).annotation)  # Unpack[a TypedDict]
        if not typed_dicts:
            return
        allowed = [*signature, *typed_dicts[0].__annotations__]
    check_names(f"parameter of {factory.__name__}", params, allowed, where)
    required = (name for name, p in signature.items() if p.default is p.empty)
    if missing := [f"`{name}`" for name in required if name not in params]:
        raise ConfigError(f"{where}: {factory.__name__} needs {', '.join(missing)}")

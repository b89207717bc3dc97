"""Sections of a config, and the specs in it: {target: an original class, params: its arguments}."""

from collections.abc import Collection, Mapping

from ldm.runtime.errors import check_names, make_unknown_name_error
from ldm.runtime.types import JsonMapping, JsonObject

__all__ = ["SPEC_KEYS", "check_specs", "drop_nulls", "get_section", "read_spec"]

SPEC_KEYS = ("target", "params")


def get_section(config: JsonMapping, where: str) -> JsonMapping:
    """Return the section of a config at `where`, such as "model.params"; {} if it is missing."""
    node = config
    names = where.split(".")
    for depth, name in enumerate(names, 1):
        value = node.get(name)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            full_key = ".".join(names[:depth])
            raise ValueError(f"{full_key}: `{value}` should be a mapping of keys")
        node = value
    return node


def read_spec(
    spec: object, classes: Collection[str], where: str, *, kind: str = "target"
) -> tuple[str, JsonObject]:
    """Return the class name in `target`, without its module, and `params` without nulls.

    Args:
        classes: Names that are allowed.
        kind: What the class is called in messages.
    """
    if not isinstance(spec, Mapping):
        raise ValueError(f"{where}: `{spec}` should be a mapping with a `target`")
    name = str(spec.get("target")).rpartition(".")[2]
    if name not in classes:
        raise make_unknown_name_error(kind, spec.get("target"), classes, where)
    check_names("key", spec, SPEC_KEYS, where)
    params = spec.get("params") or {}
    if not isinstance(params, Mapping):
        raise ValueError(f"{where}: `params` of {name} should be a mapping of keys, got `{params}`")
    return name, drop_nulls(params)


def drop_nulls(section: JsonMapping) -> JsonObject:
    """Return a section without nulls, which count as missing."""
    return {key: value for key, value in section.items() if value is not None}


def check_specs(section: JsonMapping, where: str) -> None:
    """Raise for keys other than `target` and `params` in specs, as nothing reads them."""
    if "target" in section:
        check_names("key", section, SPEC_KEYS, where)
    for key, value in section.items():
        if isinstance(value, Mapping):
            check_specs(value, f"{where}.{key}")

"""Former names and values of options in the `data:` section, which are still accepted."""

from collections.abc import Mapping

from ldm.runtime.types import JsonMapping, JsonObject

__all__ = ["RENAMED_OPTIONS", "rename_options", "to_former_names"]

# NAME of the class with the options -> {former name: name}; of several former names, the oldest,
# which keys of latent caches have, is the last.
RENAMED_OPTIONS: dict[str, dict[str, str]] = {
    "emoji": {
        "random_colour_probability": "random_color_probability",
        "any_colour": "random_color_probability",
        "keyword": "keyword_probability",
        "records": "conditions",
    },
    "photo": {"records": "conditions"},
    "mask": {"whole": "full_probability", "boxes": "box_probability"},
    "depth": {"depth": "ramp_width"},
    "hub": {"cache": "cache_dir"},
    "shards": {"least": "minimum", "most": "maximum", "lanes": "streams"},
}
RENAMED_VALUES = {"photo": {"centre": "center"}}  # former value -> value


def rename_options(owner: str, options: JsonMapping) -> JsonObject:
    """Return options with present names and values; the last of duplicates is used.

    Args:
        owner: Key of RENAMED_OPTIONS.
    """
    return _rename(options, RENAMED_OPTIONS.get(owner, {}), RENAMED_VALUES.get(owner, {}))


def to_former_names(owner: str, options: JsonMapping) -> JsonObject:
    """Return options with former names and values, as keys of latent caches have them."""
    names, values = (
        {new: former for former, new in renamed.get(owner, {}).items()}
        for renamed in (RENAMED_OPTIONS, RENAMED_VALUES)
    )
    return _rename(options, names, values)


def _rename(
    options: JsonMapping, names: Mapping[str, str], values: Mapping[str, str]
) -> JsonObject:
    return {
        names.get(name, name): values.get(value, value) if isinstance(value, str) else value
        for name, value in options.items()
    }

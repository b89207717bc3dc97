"""Former names of options in the `data:` section of configs, which are still accepted."""

from ldm.runtime.types import JsonMapping, JsonObject

__all__ = ["rename_options", "to_former_names"]

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
    "shards": {"least": "minimum", "most": "maximum", "lanes": "streams"},
}


def rename_options(owner: str, options: JsonMapping) -> JsonObject:
    """Return the options under their present names; the last of duplicates is used.

    Args:
        owner: Key of RENAMED_OPTIONS.
    """
    names = RENAMED_OPTIONS.get(owner, {})
    return {names.get(name, name): value for name, value in options.items()}


def to_former_names(owner: str, options: JsonMapping) -> JsonObject:
    """Return the options under their former names, as keys of latent caches have them."""
    names = {name: former for former, name in RENAMED_OPTIONS.get(owner, {}).items()}
    return {names.get(name, name): value for name, value in options.items()}

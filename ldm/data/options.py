"""Names that options of a config's `data:` section had before, which are still read."""

from ldm.runtime.types import JsonMapping, JsonObject

__all__ = ["former_options", "rename_options"]

# kind of object -> {former name: name}
RENAMED_OPTIONS: dict[str, dict[str, str]] = {
    "emoji": {
        "any_colour": "random_colour_probability",
        "keyword": "keyword_probability",
        "records": "conditions",
    },
    "photo": {"records": "conditions"},
    "mask": {"whole": "full_probability", "boxes": "box_probability"},
    "depth": {"depth": "ramp_width"},
    "shards": {"least": "minimum", "most": "maximum", "lanes": "streams"},
}


def rename_options(kind: str, options: JsonMapping) -> JsonObject:
    """Return the options under their present names; of one under both names the later counts.

    Args:
        kind: of the object that takes them, a key of RENAMED_OPTIONS.
    """
    names = RENAMED_OPTIONS.get(kind, {})
    return {names.get(name, name): value for name, value in options.items()}


def former_options(kind: str, options: JsonMapping) -> JsonObject:
    """Return the options under their first names, which the keys of latent caches keep."""
    names = {name: former for former, name in RENAMED_OPTIONS.get(kind, {}).items()}
    return {names.get(name, name): value for name, value in options.items()}

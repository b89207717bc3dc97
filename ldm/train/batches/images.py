"""Images of a run: a folder, a table of Hugging Face or tar shards, as a config describes them."""

from collections.abc import Callable

from ldm.data.drawings import EmojiTransform
from ldm.data.folder import Folder
from ldm.data.hub import Hub
from ldm.data.options import rename_options
from ldm.data.shards import Shards
from ldm.data.transforms import PhotoTransform, Transform
from ldm.runtime.errors import unknown_name
from ldm.runtime.types import JsonMapping

__all__ = ["open_images"]

TRANSFORMS: dict[str, Callable[..., Transform]] = {
    kind.NAME: kind for kind in (EmojiTransform, PhotoTransform)
}


def open_images(
    spec: JsonMapping, seed: int, where: str, *, commands: bool = False
) -> Folder | Hub | Shards:
    """Open images with the transform that makes samples of them.

    Args:
        spec: `root`, `hub` or `shards`, with the keywords of `Folder`, `Hub` or `Shards`;
            `transform` has a `name` and the keywords of that transform.
        where: section of the config, for messages.
        commands: whether shards may come from `pipe:COMMAND`.
    Raises:
        ValueError: a transform or keyword is unknown.
        FileNotFoundError: files are missing.
    """
    transform = dict(spec["transform"])
    name = transform.pop("name", None)
    if name not in TRANSFORMS:
        raise unknown_name("transform", name, TRANSFORMS, where)
    kind = next(kind for kind in ("root", "hub", "shards") if kind in spec)
    try:
        make = TRANSFORMS[name](**rename_options(name, transform))
        if kind == "shards":
            options = {**rename_options(kind, spec), "transform": make}
            return Shards(**options, seed=seed, commands=commands)
        options = {**spec, "transform": make, "seed": seed}
        return Folder(**options) if kind == "root" else Hub(**options)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where}.{kind}: {error}") from error
    except TypeError as error:
        raise ValueError(f"{where}: {str(error).replace('.__init__()', '')}") from error

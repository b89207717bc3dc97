"""Pack a folder of images into tar files, which `ldm.data.shards` reads."""

import itertools
import json
import logging
import re
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from ldm.data.dataset import UnreadableSample
from ldm.data.folder import ImageFolder
from ldm.data.transforms import get_captions
from ldm.runtime.errors import ArgumentError
from ldm.runtime.files import write_atomically

__all__ = ["write_shards"]

log = logging.getLogger(__name__)


def write_shards(folder: ImageFolder, pattern: str, *, count: int = 1000) -> Iterator[Path]:
    """Write the images of a folder into shards; yield the path of each when it is complete.

    Unreadable images are left out. The output is deterministic.

    Args:
        pattern: Pattern of the paths, "data-%06d.tar".
        count: Samples per shard.
    Raises:
        ArgumentError: The pattern has no placeholder for a number, or the count is below 1.
    """
    if not re.fullmatch(r"[^%]*%0?\d*d[^%]*", pattern):
        raise ArgumentError(f"`{pattern}` has no placeholder for a number, such as `data-%06d.tar`")
    if count < 1:
        raise ArgumentError(f"count must be 1 or more, got {count}", "count")
    indices = iter({name: index for index, name in enumerate(folder.iter_names())}.values())
    for number in itertools.count():
        shard = list(itertools.islice(indices, count))
        if not shard:
            return
        path = Path(pattern % number).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as partial, tarfile.open(partial, "w") as tar:
            for index in shard:
                _add_sample(tar, folder, index)
        yield path


def _add_sample(tar: tarfile.TarFile, folder: ImageFolder, index: int) -> None:
    """Add the image, the metadata and the caption of a row, unless the image is unreadable."""
    try:
        folder.load(index)
    except UnreadableSample as error:
        log.warning("left out: %s", error)
        return
    row = {key: value for key, value in folder.rows[index].items() if key != "repeats"}
    suffix = Path(row.pop("file_name")).suffix.lower()
    suffix = ".jpg" if suffix in (".jpeg", ".jpe", ".jfif") else suffix
    members = {suffix: folder.read_bytes(index), ".json": json.dumps(row).encode()}
    captions = get_captions(row)
    if captions != [""] and len(captions) == 1:  # several captions are in the .json
        members[".txt"] = captions[0].encode()
    for suffix, data in members.items():
        member = tarfile.TarInfo(f"{index:09}{suffix}")
        member.size = len(data)
        tar.addfile(member, BytesIO(data))

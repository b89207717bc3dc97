"""A folder of pictures -> tar files, as `shards` reads them."""

import itertools
import json
import logging
import re
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from ldm.data.folder import Folder
from ldm.data.source import Unreadable

__all__ = ["pack"]

log = logging.getLogger(__name__)


def pack(folder: Folder, pattern: str, *, count: int = 1000) -> Iterator[Path]:
    """Writes the pictures of a folder into shards; yields each when it is complete.

        pattern: of their names, "data-%06d.tar". count: samples in each.
    Pictures that cannot be read are left out. The same folder gives the same bytes.
    Raises ValueError for a pattern without a place for the number.
    """
    if not re.fullmatch(r"[^%]*%0?\d*d[^%]*", pattern):
        raise ValueError(f"`{pattern}` has no place for a number, such as `data-%06d.tar`")
    names = {row["file_name"]: index for index, row in enumerate(folder.rows)}
    indices = iter(names.values())
    for number in itertools.count():
        some = list(itertools.islice(indices, count))
        if not some:
            return
        path = Path(pattern % number)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        with tarfile.open(part, "w") as tar:
            for index in some:
                _add(tar, folder, index)
        part.replace(path)
        yield path


def _add(tar: tarfile.TarFile, folder: Folder, index: int) -> None:
    try:
        folder.record(index)
    except Unreadable as error:
        log.warning("left out: %s", error)
        return
    row = {key: value for key, value in folder.rows[index].items() if key != "repeats"}
    suffix = Path(row.pop("file_name")).suffix.lower().replace(".jpeg", ".jpg")
    members = {suffix: folder.content(index), ".json": json.dumps(row).encode()}
    if row.get("text"):
        members[".txt"] = str(row["text"]).encode()
    for ending, data in members.items():
        member = tarfile.TarInfo(f"{index:09}{ending}")
        member.size = len(data)
        tar.addfile(member, BytesIO(data))

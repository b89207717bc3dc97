"""Records of a Hugging Face data set: on disk, in parquet files, or on the hub.

{hub: DIR}                        what `save_to_disk` wrote, a folder of parquet or of pictures
{hub: FILE.parquet}
{hub: lambdalabs/naruto-blip-captions, split: train}
"""

from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

from torch.utils.data import Dataset
from tqdm import tqdm

from ldm.data.folder import Transform, in_greatest
from ldm.data.source import Unreadable
from ldm.imaging.reading import picture_in, size_in

__all__ = ["Hub"]


class Hub(Dataset):
    """Pictures with the other columns as their metadata; `data[epoch, index]` is transformed.

    hub: path, or name on the hub; name: which configuration of it; split: which part.
    transform: as `ldm.data.folder.Folder` has it, with `groups` if it has buckets.
    image, text: the columns of pictures and captions.
    cache: where downloads are kept, by default where all of that package are.
    Raises ImportError if the package `datasets` is not there, ValueError for a missing column.
    """

    def __init__(
        self,
        *,
        hub: str | Path,
        transform: Transform,
        name: str | None = None,
        split: str | None = "train",
        image: str = "image",
        text: str = "text",
        fields: Mapping[str, Any] | None = None,
        cache: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        self.source, self.transform, self.seed = Path(hub).name, transform, seed
        self.image, self.text, self.fields = image, text, dict(fields or {})
        self.table = _table(str(hub), name, split, image, cache)
        self.facts = self.table.remove_columns(image)
        if text not in self.table.column_names and "text" not in self.fields:
            columns = ", ".join(f"`{column}`" for column in self.table.column_names)
            raise ValueError(f"`{hub}` has no column `{text}`, only {columns}")
        buckets = getattr(transform, "buckets", None)
        self.groups = None
        if buckets is not None:
            self.groups = in_greatest([self._place(i, buckets) for i in self._all()])

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        return self.transform(self.record(index), Random(f"{self.seed} {epoch} {index}"))

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """All metadata; `text` is the caption."""
        return map(self._row, self.facts)

    def record(self, index: int) -> dict[str, Any]:
        """The columns of a row and its `picture`, decoded.

        Raises Unreadable for a picture that is missing or damaged.
        """
        try:
            picture = picture_in(self.content(index), self.name(index))
        except (OSError, ValueError) as error:
            raise Unreadable(self.name(index), str(error)) from error
        return {**self.row(index), "picture": picture}

    def row(self, index: int) -> Mapping[str, Any]:
        """The metadata of a record."""
        return self._row(self.facts[index])

    def name(self, index: int) -> str:
        """What errors call a record."""
        return f"{self.source}/{index}"

    def content(self, index: int) -> bytes:
        """The file of a record; empty where there is none.

        Raises OSError if the table names a file that cannot be read.
        """
        kept = self.table[index][self.image] or {}
        if kept.get("bytes") is None and kept.get("path"):
            return Path(kept["path"]).read_bytes()
        return kept.get("bytes") or b""

    def _row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {**row, "text": row.get(self.text) or "", **self.fields}

    def _all(self) -> Any:
        return tqdm(range(len(self)), "Measuring", delay=5, dynamic_ncols=True)

    def _place(self, index: int, buckets: Any) -> int | None:
        """The bucket of a record, if that is a picture; else it will be found broken."""
        try:
            return int(buckets.index(*size_in(BytesIO(self.content(index)))))
        except (OSError, ValueError):
            return None


def _table(
    hub: str, name: str | None, split: str | None, image: str, cache: str | Path | None
) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"`{hub}` needs the package `datasets`: pip install 'ldm-revived[hub]'"
        ) from error
    path, options = Path(hub), {"cache_dir": None if cache is None else str(cache)}
    if any((path / mark).exists() for mark in ("dataset_dict.json", "dataset_info.json")):
        table: Any = datasets.load_from_disk(hub)
    elif path.is_file():
        table = datasets.load_dataset("parquet", data_files=hub, **options)
    else:
        table = datasets.load_dataset(hub, name, **options)
    if isinstance(table, dict):
        if split not in table:
            parts = ", ".join(f"`{part}`" for part in table)
            raise ValueError(f"`{hub}` has no split `{split}`, only {parts}")
        table = table[split]
    if image not in table.column_names:
        columns = ", ".join(f"`{column}`" for column in table.column_names)
        raise ValueError(f"`{hub}` has no column `{image}` of pictures, only {columns}")
    return table.cast_column(image, datasets.Image(decode=False))

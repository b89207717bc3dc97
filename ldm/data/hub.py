"""Hugging Face datasets: on disk, in parquet files, or on the hub.

{hub: DIR}                        what `save_to_disk` wrote, a folder of parquet or of images
{hub: FILE.parquet}
{hub: lambdalabs/naruto-blip-captions, split: train}
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm.data.dataset import ImageDataset
from ldm.data.transforms import Transform
from ldm.runtime.errors import ArgumentError

__all__ = ["HubDataset"]


class HubDataset(ImageDataset):
    """A Hugging Face image dataset, with its other columns as metadata.

    Args:
        hub: Path, or name on the hub.
        name: Configuration of the dataset; None = its default.
        split: Name of the split; ignored for datasets without splits.
        image: The column of images.
        text: The column of captions.
        fields: Values that override the metadata, {"text": "a photo of a sks dog"}.
        cache_dir: Folder for downloads; None = the default of `datasets`.
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
        cache_dir: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(transform, seed)
        hub = str(Path(hub).expanduser()) if str(hub).startswith("~") else str(hub)
        self.dataset_name, self.image, self.text = Path(hub).name, image, text
        self.fields = dict(fields or {})
        self.table = _load_table(hub, name, split, image, cache_dir)
        self.metadata = self.table.remove_columns(image)
        if text not in self.table.column_names and "text" not in self.fields:
            raise _make_missing_error(hub, f"column `{text}`", self.table.column_names)
        self._assign_buckets()

    def __len__(self) -> int:
        return len(self.table)

    def iter_metadata(self) -> Iterator[Mapping[str, Any]]:
        return map(self._to_row, self.metadata)

    def read_row(self, index: int) -> Mapping[str, Any]:
        return self._to_row(self.metadata[index])

    def get_name(self, index: int) -> str:
        return f"{self.dataset_name}/{index}"

    def read_bytes(self, index: int) -> bytes:
        cell = self.table[index][self.image] or {}
        if cell.get("bytes") is None and cell.get("path"):
            return Path(cell["path"]).read_bytes()
        return cell.get("bytes") or b""

    def _to_row(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        return {**metadata, "text": metadata.get(self.text) or "", **self.fields}


def _load_table(
    hub: str, name: str | None, split: str | None, image: str, cache_dir: str | Path | None
) -> Any:
    """Load a table with the package `datasets`; its images stay encoded."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"`{hub}` needs the package `datasets`: pip install 'ldm-revived[hub]'"
        ) from error
    path = Path(hub)
    options = {"cache_dir": None if cache_dir is None else str(Path(cache_dir).expanduser())}
    table: Any
    if any((path / file).exists() for file in ("dataset_dict.json", "dataset_info.json")):
        table = datasets.load_from_disk(hub)
    elif path.is_file():
        table = datasets.load_dataset("parquet", data_files=hub, **options)
    else:
        table = datasets.load_dataset(hub, name, **options)
    if isinstance(table, dict):
        if split not in table:
            raise _make_missing_error(hub, f"split `{split}`", table)
        table = table[split]
    if image not in table.column_names:
        raise _make_missing_error(hub, f"column `{image}` of images", table.column_names)
    return table.cast_column(image, datasets.Image(decode=False))


def _make_missing_error(hub: str, item: str, available: Any) -> ArgumentError:
    return ArgumentError(
        f"`{hub}` has no {item}, only {', '.join(f'`{name}`' for name in available)}"
    )

"""Data sets of Hugging Face's package, from disk."""

import gc
import sys
import warnings
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from ldm.data.hub import Hub
from ldm.data.source import Records
from ldm.data.transforms import Photo

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def table():
    pictures = []
    for number in range(6):
        file = BytesIO()
        Image.new("RGB", (32, 8) if number % 2 else (16, 16), "red").save(file, "PNG")
        pictures.append({"bytes": file.getvalue()[: 40 if number == 4 else None], "path": None})
    columns = {"image": pictures, "text": [str(number) for number in range(6)]}
    features = {"image": datasets.Image(), "text": datasets.Value("string")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def test_what_was_saved_to_disk_is_read(table, tmp_path: Path) -> None:
    table.save_to_disk(tmp_path)
    hub = Hub(hub=tmp_path, transform=Photo(size=16))
    batch = next(Records(hub).batches(6))
    assert batch["jpg"].shape == (6, 3, 16, 16)
    assert set(batch["txt"]) == set("01235")
    assert batch["broken"] == [f"{tmp_path.name}/4"]
    assert [row["text"] for row in hub.rows()] == list("012345")


def test_parquet_is_read_into_buckets_ahead(table, tmp_path: Path) -> None:
    table.to_parquet(tmp_path / "a.parquet")
    photo = Photo(size=16, buckets={"step": 8})
    hub = Hub(hub=tmp_path / "a.parquet", transform=photo, cache=tmp_path / "cache")
    batches = Records(hub).batches(4, workers=1)
    shapes = {batch["jpg"].shape for batch in (next(batches), next(batches))}
    assert shapes == {(2, 3, 16, 16), (4, 3, 8, 32)}  # the damaged one is among the most


def test_a_folder_of_pictures_is_read(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for name in "ab":
        Image.new("RGB", (8, 8), "red").save(tmp_path / "pictures" / f"{name}.png")
    lines = "".join(f"{name}.png,{name}\n" for name in "ab")
    (tmp_path / "pictures" / "metadata.csv").write_text(f"file_name,text\n{lines}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # that package leaves the .csv open
        hub = Hub(hub=tmp_path / "pictures", transform=Photo(size=8), cache=tmp_path / "cache")
        gc.collect()
    assert [hub[0, index]["txt"] for index in range(2)] == ["a", "b"]


def test_a_missing_column_is_named(table, tmp_path: Path) -> None:
    table.save_to_disk(tmp_path)
    with pytest.raises(ValueError, match="no column `caption`, only `image`, `text`"):
        Hub(hub=tmp_path, transform=Photo(), text="caption")
    with pytest.raises(ValueError, match="no column `jpg` of pictures"):
        Hub(hub=tmp_path, transform=Photo(), image="jpg")


def test_the_package_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'ldm-revived\[hub\]'"):
        Hub(hub="someone/something", transform=Photo())

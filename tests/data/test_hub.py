"""Hugging Face datasets, read from disk."""

import gc
import sys
import warnings
from importlib.util import find_spec
from io import BytesIO

import pytest
from PIL import Image

from ldm.data.hub import HubDataset
from ldm.data.source import DatasetSource
from ldm.data.transforms import PhotoTransform

pytestmark = [
    pytest.mark.skipif(find_spec("datasets") is None, reason="needs datasets"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def dataset():
    import datasets

    images = []
    for number in range(6):
        file = BytesIO()
        Image.new("RGB", (32, 8) if number % 2 else (16, 16), "red").save(file, "PNG")
        images.append({"bytes": file.getvalue()[: 40 if number == 4 else None], "path": None})
    columns = {"image": images, "text": [str(number) for number in range(6)]}
    features = {"image": datasets.Image(), "text": datasets.Value("string")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def test_a_dataset_saved_to_disk_is_read(dataset, tmp_path):
    dataset.save_to_disk(tmp_path)
    hub = HubDataset(hub=tmp_path, transform=PhotoTransform(size=16))
    batch = next(DatasetSource(hub).iter_batches(6))
    assert batch["jpg"].shape == (6, 3, 16, 16)
    assert set(batch["txt"]) == set("01235")
    assert batch["unreadable"] == [f"{tmp_path.name}/4"]
    assert [row["text"] for row in hub.iter_metadata()] == list("012345")


def test_parquet_is_read_into_buckets_by_a_worker(dataset, tmp_path):
    dataset.to_parquet(tmp_path / "a.parquet")
    transform = PhotoTransform(size=16, buckets={"step": 8})
    hub = HubDataset(hub=tmp_path / "a.parquet", transform=transform, cache_dir=tmp_path / "cache")
    batches = DatasetSource(hub).iter_batches(4, workers=1)
    shapes = {batch["jpg"].shape for batch in (next(batches), next(batches))}
    assert shapes == {(2, 3, 16, 16), (4, 3, 8, 32)}  # the damaged one is in the larger bucket


def test_a_folder_of_images_is_read(tmp_path):
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / f"{name}.png")
    lines = "".join(f"{name}.png,{name}\n" for name in "ab")
    (tmp_path / "images" / "metadata.csv").write_text(f"file_name,text\n{lines}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # `datasets` leaves the .csv open
        transform, cache = PhotoTransform(size=8), tmp_path / "cache"
        hub = HubDataset(hub=tmp_path / "images", transform=transform, cache_dir=cache)
        gc.collect()
    assert [hub[0, index]["txt"] for index in range(2)] == ["a", "b"]


def test_a_missing_column_is_named(dataset, tmp_path):
    dataset.save_to_disk(tmp_path)
    with pytest.raises(ValueError, match="no column `caption`, only `image`, `text`"):
        HubDataset(hub=tmp_path, transform=PhotoTransform(), text="caption")
    with pytest.raises(ValueError, match="no column `jpg` of images"):
        HubDataset(hub=tmp_path, transform=PhotoTransform(), image="jpg")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'ldm-revived\[hub\]'"):
        HubDataset(hub="someone/something", transform=PhotoTransform())

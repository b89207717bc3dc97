"""Folders of images, in the forms that people have."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from imaging.badimages import REFUSED
from ldm.data.dataset import UnreadableSample, WithClassImages
from ldm.data.drawings import EmojiTransform
from ldm.data.folder import Folder, read_metadata
from ldm.data.source import DatasetSource
from ldm.data.transforms import PhotoTransform

EMOJI = Path(__file__).parent / "emoji"
PHOTO = PhotoTransform(size=8)
BUCKETS = PhotoTransform(size=16, buckets={"step": 8})


def draw(path, size=(8, 8), text="", suffix=".txt"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    if text:
        path.with_suffix(suffix).write_text(text)


def test_rows_are_selected_by_split():
    rows = read_metadata(EMOJI)
    assert [row["object"] for row in rows if row["split"] == "heldout"] == ["red apple"]
    assert len(Folder(root=EMOJI, transform=EmojiTransform(), split="train")) == len(rows) - 1 == 23
    with pytest.raises(ValueError, match="no images with split `test`"):
        Folder(root=EMOJI, transform=EmojiTransform(), split="test")


def test_a_folder_without_metadata_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metadata\.jsonl"):
        read_metadata(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder `.*/nope`"):
        read_metadata(tmp_path / "nope")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", b'{"file_name": "a.png"}\n{"file', r"metadata\.jsonl`, line 2: "),
        ("metadata.jsonl", b'["a.png"]', r"line 1: "),
        ("metadata.csv", b"file,text\na.png,b", "row 1 of the metadata has no `file_name`"),
        ("metadata.csv", b"file_name,text\na.png,caf\xe9", r"metadata\.csv` is not UTF-8"),
    ],
)
def test_metadata_that_cannot_be_read_is_named(name, content, message, tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_metadata(tmp_path)


def test_any_field_of_a_csv_may_be_the_caption(tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,prompt\na.png,one\n", "utf-8-sig")
    assert Folder(root=tmp_path, transform=PHOTO, text="prompt")[0, 0]["txt"] == "one"


def test_captions_lie_beside_the_images(tmp_path):
    draw(tmp_path / "a.png", text="one\n")
    draw(tmp_path / "b" / "b.jpg", text="two", suffix=".caption")
    draw(tmp_path / "c.webp")
    rows = [(row["file_name"], row.get("text")) for row in read_metadata(tmp_path)]
    assert rows == [("a.png", "one"), ("b/b.jpg", "two"), ("c.webp", None)]


def test_a_folder_of_kohyas_scripts_is_repeated_as_its_name_says(tmp_path):
    draw(tmp_path / "3_sks dog" / "a.png")
    draw(tmp_path / "3_sks dog" / "b.png", text="a sks dog in snow")
    draw(tmp_path / "1_dog" / "c.png")
    batch = next(DatasetSource(Folder(root=tmp_path, transform=PHOTO)).batches(7))
    assert sorted(batch["txt"]) == ["a sks dog in snow"] * 3 + ["dog"] + ["sks dog"] * 3


def test_files_that_are_not_images_are_named_and_replaced(tmp_path):
    for name, (write, _) in REFUSED.items():
        write(tmp_path / f"{name}.png")
    names = [f"{name}.png" for name in REFUSED]
    draw(tmp_path / "good.png")
    lines = "".join(f"{name},x\n" for name in [*names, "good.png"])
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{lines}")
    for buckets in (None, {"step": 8}):
        folder = Folder(root=tmp_path, transform=PhotoTransform(size=8, buckets=buckets))
        batch = next(DatasetSource(folder).batches(len(folder)))
        assert set(batch["broken"]) == set(names)
        assert batch["jpg"].shape == (len(folder), 3, 8, 8)


@pytest.mark.parametrize("place", ["", "3_sks dog"])
def test_a_caption_that_cannot_be_read_makes_its_image_unreadable(place, tmp_path):
    for name in ("a", "b"):
        draw(tmp_path / place / f"{name}.png", text=name)
    (tmp_path / place / "b.txt").write_bytes(b"caf\xe9")
    folder = Folder(root=tmp_path, transform=PHOTO)
    batch = next(DatasetSource(folder).batches(len(folder)))
    assert set(batch["txt"]) == {"a"}
    assert set(batch["broken"]) == {str(Path(place) / "b.png")}
    with pytest.raises(UnreadableSample, match=r"b\.txt` is not UTF-8"):
        folder.row(len(folder) - 1)
    uncaptioned = Folder(root=tmp_path, transform=PHOTO, fields={"text": "a dog"})
    assert uncaptioned[0, len(uncaptioned) - 1]["txt"] == "a dog"  # needs no captions


def test_a_damaged_class_image_has_a_name_of_its_own(tmp_path):
    for name in ("a.png", "b.png"):
        draw(tmp_path / "one" / name, text="x")
        draw(tmp_path / "class" / name, text="x")
    (tmp_path / "class" / "a.png").write_bytes(b"")
    data, others = (Folder(root=tmp_path / name, transform=PHOTO) for name in ("one", "class"))
    source = DatasetSource(WithClassImages(data, others), shown=data)
    broken = {name for batch in islice(source.batches(2), 2) for name in batch.get("broken", [])}
    assert broken == {"prior/a.png"}
    assert sorted(source.counts_by_name()) == ["a.png", "b.png", "prior/a.png", "prior/b.png"]


def test_batches_of_buckets_have_one_size_and_hold_everything_once(tmp_path):
    sizes = [(16, 16)] * 3 + [(32, 8)] * 4 + [(8, 32)] * 2 + [(20, 16)]
    for number, size in enumerate(sizes):
        draw(tmp_path / f"{number}.png", size, text=str(number))
    folder = Folder(root=tmp_path, transform=BUCKETS)
    batches = list(islice(DatasetSource(folder, 1).batches(2), 5))
    shapes = {number: batch["jpg"].shape[2:] for batch in batches for number in batch["txt"]}
    assert sorted(shapes) == sorted(map(str, range(10)))
    assert shapes["0"] == shapes["9"] == (16, 16)
    assert (shapes["3"], shapes["7"]) == ((8, 32), (32, 8))
    assert len({sample["jpg"].shape for sample in DatasetSource(folder).first_samples(6)}) == 1
    resumed = next(DatasetSource(folder, 1).batches(2, start=3))
    assert torch.equal(resumed["jpg"], batches[3]["jpg"])


def test_buckets_are_of_upright_images_and_unreadable_ones_join_the_largest(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    for name in "ab":
        Image.new("RGB", (32, 8), "red").save(tmp_path / f"{name}.jpg", exif=exif)
    draw(tmp_path / "c.png", (32, 8))
    (tmp_path / "d.png").write_bytes(b"")
    folder = Folder(root=tmp_path, transform=BUCKETS)
    assert folder[0, 0]["jpg"].shape == (3, 32, 8)
    assert folder[0, 2]["jpg"].shape == (3, 8, 32)
    assert folder.groups[0] == folder.groups[1] == folder.groups[3] != folder.groups[2]

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


def test_the_fixture_holds_eight_styles_of_three_objects():
    rows = read_metadata(EMOJI)
    assert len({row["style"] for row in rows}) == 8
    assert len({row["object"] for row in rows}) == 3
    assert [row["object"] for row in rows if row["split"] == "heldout"] == ["red apple"]


def test_a_split_is_kept_apart():
    assert len(Folder(root=EMOJI, transform=EmojiTransform(), split="train")) == 23


def test_csv_metadata_is_read(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,one\n")
    assert read_metadata(tmp_path) == [{"file_name": "a.png", "text": "one"}]


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
def test_text_that_cannot_be_read_is_named(name, content, message, tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_metadata(tmp_path)


def test_another_field_may_be_the_caption(tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,prompt\na.png,one\n", "utf-8-sig")
    folder = Folder(root=tmp_path, transform=PhotoTransform(size=8), text="prompt")
    assert folder[0, 0]["txt"] == "one"


def test_an_empty_split_is_refused():
    with pytest.raises(ValueError, match="no images with split `test`"):
        Folder(root=EMOJI, transform=EmojiTransform(), split="test")


def draw(path: Path, size: tuple[int, int] = (8, 8), text: str = "", suffix: str = ".txt") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    if text:
        path.with_suffix(suffix).write_text(text)


def test_captions_lie_beside_the_pictures(tmp_path):
    draw(tmp_path / "a.png", text="one\n")
    draw(tmp_path / "b" / "b.jpg", text="two", suffix=".caption")
    draw(tmp_path / "c.webp")
    rows = read_metadata(tmp_path)
    assert [(row["file_name"], row.get("text")) for row in rows] == [
        ("a.png", "one"),
        ("b/b.jpg", "two"),
        ("c.webp", None),
    ]


def test_a_folder_for_kohyas_scripts_is_read_so_often_as_its_name_says(tmp_path):
    draw(tmp_path / "3_sks dog" / "a.png")
    draw(tmp_path / "3_sks dog" / "b.png", text="a sks dog in snow")
    draw(tmp_path / "1_dog" / "c.png")
    folder = Folder(root=tmp_path, transform=PhotoTransform(size=8))
    texts = [text for batch in islice(DatasetSource(folder).batches(7), 1) for text in batch["txt"]]
    assert sorted(texts) == ["a sks dog in snow"] * 3 + ["dog"] + ["sks dog"] * 3


def test_what_is_no_picture_is_named_and_the_run_goes_on(tmp_path):
    for name, (write, _) in REFUSED.items():
        if name != "absent":
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
def test_a_caption_that_cannot_be_read_makes_its_picture_unreadable(place, tmp_path):
    for name in ("a", "b"):
        draw(tmp_path / place / f"{name}.png", text=name)
    (tmp_path / place / "b.txt").write_bytes(b"caf\xe9")
    folder = Folder(root=tmp_path, transform=PhotoTransform(size=8))
    batch = next(DatasetSource(folder).batches(len(folder)))
    assert set(batch["txt"]) == {"a"}
    assert set(batch["broken"]) == {str(Path(place) / "b.png")}
    with pytest.raises(UnreadableSample, match=r"b\.txt` is not UTF-8"):
        folder.row(len(folder) - 1)
    alike = Folder(root=tmp_path, transform=PhotoTransform(size=8), fields={"text": "a dog"})
    assert alike[0, len(alike) - 1]["txt"] == "a dog"  # needs no captions


def test_a_damaged_picture_of_a_class_is_told_from_one_of_the_same_name(tmp_path):
    for name in ("a.png", "b.png"):
        draw(tmp_path / "one" / name, text="x")
        draw(tmp_path / "class" / name, text="x")
    (tmp_path / "class" / "a.png").write_bytes(b"")
    data, others = (
        Folder(root=tmp_path / k, transform=PhotoTransform(size=8)) for k in ("one", "class")
    )
    source = DatasetSource(WithClassImages(data, others), shown=data)
    broken = {name for batch in islice(source.batches(2), 2) for name in batch.get("broken", [])}
    assert broken == {"prior/a.png"}
    assert source.counts_by_name() == dict.fromkeys(
        ["a.png", "b.png", "prior/a.png", "prior/b.png"], 1
    )


def test_batches_of_buckets_have_one_size_and_hold_everything_once(tmp_path):
    sizes = [(16, 16)] * 3 + [(32, 8)] * 4 + [(8, 32)] * 2 + [(20, 16)]
    for number, size in enumerate(sizes):
        draw(tmp_path / f"{number}.png", size, text=str(number))
    folder = Folder(root=tmp_path, transform=PhotoTransform(size=16, buckets={"step": 8}))
    batches = list(islice(DatasetSource(folder, 1).batches(2), 5))
    shapes = {number: batch["jpg"].shape[2:] for batch in batches for number in batch["txt"]}
    assert sorted(shapes) == sorted(map(str, range(10)))
    assert shapes["0"] == shapes["9"] == (16, 16)
    assert (shapes["3"], shapes["7"]) == ((8, 32), (32, 8))
    assert len({sample["jpg"].shape for sample in DatasetSource(folder).first_samples(6)}) == 1
    resumed = next(DatasetSource(folder, 1).batches(2, start=3))
    assert resumed["txt"] == batches[3]["txt"]
    assert torch.equal(resumed["jpg"], batches[3]["jpg"])


def test_what_is_no_picture_is_among_the_most(tmp_path):
    for number in range(3):
        draw(tmp_path / f"{number}.png", (32, 8))
    (tmp_path / "3.png").write_bytes(b"")
    folder = Folder(root=tmp_path, transform=PhotoTransform(size=16, buckets={"step": 8}))
    assert folder.groups is not None
    assert len(set(folder.groups)) == 1


def test_a_turned_photo_is_put_into_the_bucket_of_how_it_is_seen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (32, 8), "red").save(tmp_path / "a.jpg", exif=exif)
    folder = Folder(root=tmp_path, transform=PhotoTransform(size=16, buckets={"step": 8}))
    assert folder[0, 0]["jpg"].shape == (3, 32, 8)
    assert folder.groups == [0]

"""Folders of images, in the layouts that people use."""

import json
import os
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image

from imaging.badimages import UNREADABLE_FILES
from ldm.data.dataset import DreamBoothDataset, UnreadableSample
from ldm.data.drawings import EmojiTransform, list_vocabulary_texts
from ldm.data.folder import ImageFolder, read_metadata
from ldm.data.pack import write_shards
from ldm.data.shards import decode_sample, read_shard
from ldm.data.source import DatasetSource
from ldm.data.transforms import PhotoTransform

EMOJI = Path(__file__).parent / "emoji"
PHOTO = PhotoTransform(size=8)
BUCKETS = PhotoTransform(size=16, buckets={"step": 8})


def write_image(path, size=(8, 8), text="", suffix=".txt"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    if text:
        path.with_suffix(suffix).write_text(text)


def test_rows_are_selected_by_split():
    rows = read_metadata(EMOJI)
    assert [row["object"] for row in rows if row["split"] == "heldout"] == ["red apple"]
    train_images = ImageFolder(root=EMOJI, transform=EmojiTransform(), split="train")
    assert len(train_images) == len(rows) - 1 == 23
    with pytest.raises(ValueError, match="no images with split `test`"):
        ImageFolder(root=EMOJI, transform=EmojiTransform(), split="test")


def test_a_folder_without_metadata_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metadata\.jsonl"):
        read_metadata(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder `.*/nope`"):
        read_metadata(tmp_path / "nope")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", b'{"file_name": "a.png"}\n{"file', r"metadata\.jsonl`, line 2: "),
        ("metadata.jsonl", b'{"file_name": "a.png"}\n["a.png"]', "line 2: `a.png` is not a row"),
        ("metadata.jsonl", b'{"file_name": "a.png"} x', r"line 1: "),
        ("metadata.csv", b"file,text\na.png,b", "row 1 of the metadata has no `file_name`"),
        ("metadata.jsonl", b'{"file_name": ["a.png"]}', "row 1 of the metadata has no `file_name`"),
        ("metadata.csv", b"file_name,text\na.png,caf\xe9", r"metadata\.csv:2: neither UTF-8"),
        ("metadata.csv", b"file_name,repeats\na.png,often", "row 1 .* `repeats` often, which is"),
        ("metadata.jsonl", b'{"file_name": "a.png", "repeats": -1}', "`repeats` -1, which is not"),
        ("metadata.jsonl", b'{"image": "a.png", "text": "b"}', "`file_name`, only `image`, `text`"),
        ("metadata.csv", b"file_name,text\na.png,b, c\n", r"csv`, line 2: more fields than the fi"),
        ("metadata.csv", b'file_name,text\na.png,"b\nc.png,d', r"csv`, line 2: a quote is not clo"),
        ("metadata.csv", b'file_name,text\na.png,b\n\na.png,"b\nc.png,"d"\n', "line 4: a quote is"),
        ("metadata.csv", b"file_name,text\na.png," + 131073 * b"x", "after line 1: field larger"),
    ],
)
def test_metadata_that_cannot_be_read_is_named(name, content, message, tmp_path):
    write_image(tmp_path / "a.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_metadata(tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"aesthetic_score": "high"}, "`aesthetic_score` high, which is not a number"),
        ({"aesthetic_score": "nan"}, "`aesthetic_score` nan, which is not a number"),
        ({"original_width": [8]}, r"`original_width` \[8\], which is not a number"),
        ({"original_width": -8}, "`original_width` -8, it must be positive"),
        ({"original_height": "0"}, "`original_height` 0, it must be positive"),
    ],
)
def test_a_score_or_size_that_is_not_a_number_is_named_before_training(row, message, tmp_path):
    write_image(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", **row}))
    with pytest.raises(ValueError, match=f"`a.png` has {message}"):
        ImageFolder(root=tmp_path, transform=PHOTO)


@pytest.mark.parametrize("subfolder", ["", "train/"])
def test_images_without_a_row_are_counted(subfolder, tmp_path, caplog):
    for name in ("a.png", "b.png", "c/d.png"):
        write_image(tmp_path / subfolder / name)
    metadata = tmp_path / subfolder / "metadata.csv"
    metadata.write_text('file_name,text\n./a.png,"two\nlines"\n')
    assert len(read_metadata(tmp_path)) == 1
    assert "2 images without a row" in caplog.text
    caplog.clear()
    metadata.write_text("file_name,text\na.png,a\nb.png,b\nc\\d.png,d\n")
    assert len(read_metadata(tmp_path)) == 3
    assert "left out" not in caplog.text


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        ("jsonl", '{"file_name": "b/a.png", "text": "one", "repeats": null}'),
        ("jsonl", '{"file_name": "b/a.png", "text": NaN, "caption": "one", "repeats": NaN}'),
        ("jsonl", '{"file_name": "b/a.png", "text": "one"}\r\n\r\n'),
        ("jsonl", '[{"file_name": "b/a.png", "text": "one"}]'),
        ("jsonl", '[\n  {\n    "file_name": "b/a.png",\n    "text": "one"\n  }\n]\n'),
        ("jsonl", '{\n  "file_name": "b/a.png", "text": "one"\n}'),
        ("jsonl", '{"file_name": "b/a.png", "text": ["one"], "repeats": 1.0}'),
        ("jsonl", '{"file_name": "b/a.png", "text": [null, "one", ""], "repeats": "1"}'),
        ("jsonl", '{"file_name": "b\\\\a.png", "text": "one"}'),
        ("jsonl", '{"file_name": "b/a.png", "caption": "one"}'),
        ("json", '[{"file_name": "b/a.png", "text": "one"}]'),
        ("json", '{"b/a.png": "one"}'),
        ("CSV", "file_name,text,repeats\nb/a.png,one,\n"),
        ("csv", "file_name; text; repeats\nb/a.png; one; 1\n"),
        ("csv", "file_name\ttext\n\nb/a.png\tone\n"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_rows_of_any_format_are_read(suffix, content, encoding, tmp_path):
    write_image(tmp_path / "b/a.png")
    (tmp_path / f"metadata.{suffix}").write_text(content, encoding)
    folder = ImageFolder(root=tmp_path, transform=PHOTO)
    assert [folder[0, k]["txt"] for k in range(len(folder))] == ["one"]


def test_one_of_several_captions_is_drawn_at_random(tmp_path):
    write_image(tmp_path / "a.png")
    row = '{"file_name": "a.png", "text": ["one", "two", null], "repeats": 30}\n'
    (tmp_path / "metadata.jsonl").write_text(row)
    folder = ImageFolder(root=tmp_path, transform=PHOTO)
    texts = [folder[0, k]["txt"] for k in range(30)]
    assert set(texts) == {"one", "two"}
    assert texts == [folder[0, k]["txt"] for k in range(30)]
    assert {"one", "two"} < set(list_vocabulary_texts(read_metadata(tmp_path)))
    (shard,) = write_shards(folder, str(tmp_path / "%d.tar"))
    (sample,) = map(decode_sample, read_shard(str(shard)))
    assert sample["text"] == ["one", "two"]
    (tmp_path / "metadata.jsonl").write_text(row.replace('"two"', '{"en": "two"}'))
    with pytest.raises(ValueError, match=r"`a\.png` has a caption that is neither a text"):
        ImageFolder(root=tmp_path, transform=PHOTO)


def test_any_field_of_a_csv_may_be_the_caption(tmp_path):
    write_image(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,prompt\na.png,one\n", "utf-8-sig")
    assert ImageFolder(root=tmp_path, transform=PHOTO, text="prompt")[0, 0]["txt"] == "one"
    with pytest.raises(ValueError, match="no image has a `promt`"):
        ImageFolder(root=tmp_path, transform=PHOTO, text="promt")


def test_captions_are_read_from_files_next_to_the_images(tmp_path):
    write_image(tmp_path / "a.png", text="one\n")
    write_image(tmp_path / "b" / "b.jpg", text="two", suffix=".caption")
    write_image(tmp_path / "c.webp")
    write_image(tmp_path / "d.PNG", text="three", suffix=".TXT")
    write_image(tmp_path / "e.JFIF", text="four", suffix=".Caption")
    write_image(tmp_path / "f.png", text='{"width": 8, "caption": "five"}', suffix=".json")
    write_image(tmp_path / "g.png", text="six", suffix=".png.txt")
    write_image(tmp_path / "h.png", text="seven")
    write_image(tmp_path / "h.png", text='{"text": "eight"}', suffix=".json")
    rows = [(row["file_name"], row.get("text")) for row in read_metadata(tmp_path)]
    assert rows == [("a.png", "one"), ("b/b.jpg", "two"), ("c.webp", None), ("d.PNG", "three"),
                    ("e.JFIF", "four"), ("f.png", "five"), ("g.png", "six"),
                    ("h.png", "seven")]  # fmt: skip


def test_a_metadata_file_of_any_name_replaces_that_of_the_folder(tmp_path):
    for name in ("a.png", "b.png"):
        write_image(tmp_path / "images" / name)
    (tmp_path / "images/metadata.jsonl").write_text('{"file_name": "b.png", "text": "two"}')
    file = tmp_path / "captions.json"
    file.write_text('[{"file_name": "a.png", "text": "one"}]')
    folder = ImageFolder(root=tmp_path / "images", transform=PHOTO, metadata=file)
    assert [folder[0, k]["txt"] for k in range(len(folder))] == ["one"]
    assert read_metadata(folder.root, folder.metadata_file) == folder.rows


def test_a_subfolder_may_have_metadata_of_its_own(tmp_path):
    for name in ("train/a.png", "train/b.png", "c.png"):
        write_image(tmp_path / name)
    row = '{"file_name": "a.png", "text": "one"}'
    (tmp_path / "train" / "metadata.jsonl").write_text(row)
    rows = read_metadata(tmp_path)
    assert rows == [{"file_name": "train/a.png", "text": "one"}, {"file_name": "c.png"}]


def test_all_images_are_found_and_skipped_files_are_logged(tmp_path, caplog):
    names = ["0.png", "1.jpe", "2.TIF", "3.ppm", "4.tga", "5.jp2", "deep/er/6.bmp"]
    hidden = [".thumbnails/0.png", "deep/.ipynb_checkpoints/1.png", "__MACOSX/2.png",
              "@eaDir/0.png/3.jpg", "._0.png"]  # fmt: skip
    for name in names + hidden:
        write_image(tmp_path / name)
    for name in ("a.heic", "b.HEIC", "c.mp4", "lonely.txt", "Makefile", "0.txt", "0.caption"):
        (tmp_path / name).touch()
    assert [row["file_name"] for row in read_metadata(tmp_path)] == names
    message = "left out 4 hidden folders, 2 .heic, 1 Makefile, 1 .mp4, 1 captions of images that"
    assert f"{message} have another, 1 captions without an image" in caplog.text


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege")
def test_links_are_followed_and_each_folder_is_read_once(tmp_path, caplog):
    for name in ("data/0.png", "elsewhere/1.png", "elsewhere/deep/2.png", "data/b/3.png"):
        write_image(tmp_path / name, text="text")
    links = {"data/a": "b", "data/more": "../elsewhere", "data/same": "../elsewhere",
             "data/loop": ".", "data/up": "..", "elsewhere/back": "../data",
             "elsewhere/deep/round": "..", "data/gone": "nowhere"}  # fmt: skip
    for name, target in links.items():
        (tmp_path / name).symlink_to(target, target_is_directory=True)
    (tmp_path / "data/4.png").symlink_to("../elsewhere/1.png")
    rows = read_metadata(tmp_path / "data")
    names = ["0.png", "4.png", "b/3.png", "more/1.png", "more/deep/2.png"]
    assert [row["file_name"] for row in rows] == names
    assert "6 links to folders that are read already" in caplog.text


def test_a_folder_of_kohyas_scripts_is_repeated_by_the_number_in_its_name(tmp_path):
    write_image(tmp_path / "3_sks dog" / "a.png")
    write_image(tmp_path / "3_sks dog" / "b.png", text="a sks dog in snow")
    write_image(tmp_path / "1_dog" / "c.png")
    batch = next(DatasetSource(ImageFolder(root=tmp_path, transform=PHOTO)).iter_batches(7))
    assert sorted(batch["txt"]) == ["a sks dog in snow"] * 3 + ["dog"] + ["sks dog"] * 3


def test_files_that_are_not_images_are_named_and_replaced(tmp_path):
    for name, (write, _) in UNREADABLE_FILES.items():
        write(tmp_path / f"{name}.png")
    names = [f"{name}.png" for name in UNREADABLE_FILES]
    write_image(tmp_path / "good.png")
    lines = "".join(f"{name},x\n" for name in [*names, "good.png"])
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{lines}")
    for buckets in (None, {"step": 8}):
        folder = ImageFolder(root=tmp_path, transform=PhotoTransform(size=8, buckets=buckets))
        batch = next(DatasetSource(folder).iter_batches(len(folder)))
        assert set(batch["unreadable"]) == set(names)
        assert batch["jpg"].shape == (len(folder), 3, 8, 8)


@pytest.mark.parametrize("subfolder", ["", "3_sks dog"])
def test_a_caption_that_cannot_be_read_makes_its_image_unreadable(subfolder, tmp_path):
    for name in ("a", "b"):
        write_image(tmp_path / subfolder / f"{name}.png", text=name)
    (tmp_path / subfolder / "b.txt").write_bytes(b"caf\xe9")
    folder = ImageFolder(root=tmp_path, transform=PHOTO)
    batch = next(DatasetSource(folder).iter_batches(len(folder)))
    assert set(batch["txt"]) == {"a"}
    assert set(batch["unreadable"]) == {str(Path(subfolder) / "b.png")}
    with pytest.raises(UnreadableSample, match=r"b\.txt:1: neither UTF-8"):
        folder.read_row(len(folder) - 1)
    uncaptioned = ImageFolder(root=tmp_path, transform=PHOTO, fields={"text": "a dog"})
    assert uncaptioned[0, len(uncaptioned) - 1]["txt"] == "a dog"  # captions are not read


def test_a_damaged_class_image_has_a_name_of_its_own(tmp_path):
    for name in ("a.png", "b.png"):
        write_image(tmp_path / "one" / name, text="x")
        write_image(tmp_path / "class" / name, text="x")
    (tmp_path / "class" / "a.png").write_bytes(b"")
    data, others = (ImageFolder(root=tmp_path / name, transform=PHOTO) for name in ("one", "class"))
    source = DatasetSource(DreamBoothDataset(data, others), images=data)
    unreadable = {
        name for batch in islice(source.iter_batches(2), 2) for name in batch.get("unreadable", [])
    }
    assert unreadable == {"prior/a.png"}
    assert sorted(source.count_names()) == ["a.png", "b.png", "prior/a.png", "prior/b.png"]


def test_buckets_are_of_upright_images_and_the_largest_has_the_unreadable_ones(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    for name in "ab":
        Image.new("RGB", (32, 8), "red").save(tmp_path / f"{name}.jpg", exif=exif)
    write_image(tmp_path / "c.png", (32, 8))
    (tmp_path / "d.png").write_bytes(b"")
    folder = ImageFolder(root=tmp_path, transform=BUCKETS)
    assert folder[0, 0]["jpg"].shape == (3, 32, 8)
    assert folder[0, 2]["jpg"].shape == (3, 8, 32)
    a, b, c, d = folder.bucket_ids
    assert a == b == d != c


def test_folders_of_classes_have_the_ranks_of_their_names_as_labels(tmp_path):
    for name in ("n02/b.png", "n02/deep/a.png", "n01/c.png", "n10/d.png"):
        write_image(tmp_path / name)
    images = ImageFolder(root=tmp_path, transform=PHOTO, class_folders=True)
    labels = {images.get_name(k): int(images[0, k]["class_label"]) for k in range(len(images))}
    assert labels == {"n01/c.png": 0, "n02/b.png": 1, "n02/deep/a.png": 1, "n10/d.png": 2}
    write_image(tmp_path / "e.png")
    with pytest.raises(ValueError, match=r"`e\.png` is not in the folder of a class"):
        ImageFolder(root=tmp_path, transform=PHOTO, class_folders=True)


def test_metadata_may_have_class_labels(tmp_path):
    write_image(tmp_path / "a.png")
    metadata = tmp_path / "metadata.csv"
    metadata.write_text("file_name,class_label\na.png,7\n")
    assert ImageFolder(root=tmp_path, transform=PHOTO)[0, 0]["class_label"].tolist() == 7
    metadata.write_text("file_name,class_label\na.png,cat\n")
    with pytest.raises(ValueError, match=r"`a\.png` has `class_label` cat, which is not a number"):
        ImageFolder(root=tmp_path, transform=PHOTO)

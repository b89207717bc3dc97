"""The folder of pictures, and the order in which it is read."""

from pathlib import Path

import pytest
import torch

from ldm.data.folder import Folder, Order, batches, read_metadata
from ldm.data.transforms import Emoji

EMOJI = Path(__file__).parent / "emoji"


def test_the_fixture_holds_eight_styles_of_three_objects() -> None:
    rows = read_metadata(EMOJI)
    assert len({row["style"] for row in rows}) == 8
    assert len({row["object"] for row in rows}) == 3
    assert [row["object"] for row in rows if row["split"] == "heldout"] == ["red apple"]


def test_a_split_is_kept_apart() -> None:
    assert len(Folder(root=EMOJI, transform=Emoji(), split="train")) == 23


def test_an_epoch_sees_every_record_once() -> None:
    order = Order(10, seed=3)
    first, second = ([order[k][1] for k in range(e * 10, e * 10 + 10)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_two_processes_share_the_order_of_one() -> None:
    alone = [Order(7)[k] for k in range(12)]
    shared = [Order(7, rank=k % 2, world=2)[k // 2] for k in range(12)]
    assert shared == alone


def test_batches_go_on_where_they_were_stopped() -> None:
    folder = Folder(root=EMOJI, transform=Emoji(size=32))
    whole = batches(folder, Order(len(folder)), 4)
    skipped = [next(whole) for _ in range(4)][-1]
    resumed = next(batches(folder, Order(len(folder)), 4, start=12))
    assert torch.equal(skipped["jpg"], resumed["jpg"])
    assert skipped["txt"] == resumed["txt"]


def test_csv_metadata_is_read(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,one\n")
    assert read_metadata(tmp_path) == [{"file_name": "a.png", "text": "one"}]


def test_a_folder_without_metadata_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metadata\.jsonl"):
        read_metadata(tmp_path)


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(ValueError, match="no pictures of split `test`"):
        Folder(root=EMOJI, transform=Emoji(), split="test")

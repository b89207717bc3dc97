"""The endless numbered sequence of batches, whoever reads it."""

from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.data.source import Broken, Records, Unreadable


class Numbers:
    """Records that are their own index; those in `damaged` cannot be read."""

    def __init__(self, length: int, groups: list[int] | None = None, damaged: Any = ()) -> None:
        self.length, self.damaged = length, damaged
        if groups is not None:
            self.groups = groups

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        if index in self.damaged:
            raise Unreadable(f"{index}.png", f"`{index}.png` is damaged")
        return {"index": index, "value": torch.tensor(1000 * epoch + index)}


def read(source: Records, size: int, count: int, **options: int) -> list[dict[str, Any]]:
    return list(islice(source.batches(size, **options), count))


def indices(batches: list[dict[str, Any]]) -> list[list[int]]:
    return [batch["index"] for batch in batches]


GROUPS = [0, 0, 0, 0, 0, 1, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_four_ranks_read_together_what_one_reads(groups: list[int] | None) -> None:
    alone = indices(read(Records(Numbers(11, groups), 3), 2, 24))
    for world in (2, 4):
        parts = [
            indices(read(Records(Numbers(11, groups), 3), 2, 24 // world, rank=r, world=world))
            for r in range(world)
        ]
        assert [batch for turn in zip(*parts, strict=True) for batch in turn] == alone


@pytest.mark.parametrize(("groups", "epoch"), [(None, Fraction(11, 3)), (GROUPS, 4)])
def test_an_epoch_is_as_many_batches_as_show_everything_once(groups: Any, epoch: Any) -> None:
    source = Records(Numbers(11, groups), 3)
    assert source.epoch(3) == epoch
    seen = chain.from_iterable(indices(read(source, 3, int(3 * epoch))))
    assert sorted(seen) == sorted(3 * [*range(11)])


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_workers_change_nothing(groups: list[int] | None) -> None:
    source = Records(Numbers(11, groups), 3)
    alone = read(source, 2, 7, start=3, rank=1, world=2)
    ahead = read(source, 2, 7, start=3, rank=1, world=2, workers=2)
    assert indices(ahead) == indices(alone)
    assert all(torch.equal(a["value"], b["value"]) for a, b in zip(ahead, alone, strict=True))


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_a_run_goes_on_where_it_was_stopped(groups: list[int] | None) -> None:
    source = Records(Numbers(11, groups), 3)
    whole = read(source, 3, 20)
    for start in (1, 5, 13):
        again = Records(Numbers(11, groups), 3)
        assert indices(read(again, 3, 20 - start, start=start)) == indices(whole[start:])


def test_nothing_is_seen_twice_in_an_epoch() -> None:
    seen = [i for batch in indices(read(Records(Numbers(12), 5), 4, 9)) for i in batch]
    epochs = [seen[start : start + 12] for start in (0, 12, 24)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_grouped_epoch_holds_everything_once_in_batches_of_one_group() -> None:
    batches = indices(read(Records(Numbers(11, GROUPS), 5), 2, 12))
    assert all(len({GROUPS[i] for i in batch}) == 1 for batch in batches)
    epochs = batches[:6], batches[6:]  # of 6, 3 and 2 records: 3 + 2 + 1 batches
    assert all(sorted(chain(*epoch)) == list(range(11)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_broken_record_is_named_and_replaced_by_the_next() -> None:
    source = Records(Numbers(6, damaged=(2, 3)), 0)
    whole, mended = read(Records(Numbers(6), 0), 6, 1)[0], read(source, 6, 1)[0]
    assert mended["index"] == [4 if i in (2, 3) else i for i in whole["index"]]
    assert sorted(mended["broken"]) == ["2.png", "3.png", "3.png"]
    assert "broken" not in whole


def test_a_broken_record_is_replaced_by_one_of_its_group() -> None:
    source = Records(Numbers(11, GROUPS, damaged=(8,)), 0)
    batches = read(source, 2, 6)
    (broken,) = [batch for batch in batches if "broken" in batch]
    assert {GROUPS[i] for i in broken["index"]} == {0}
    assert 8 not in broken["index"]


def test_reading_stops_where_nothing_can_be_read() -> None:
    with pytest.raises(ValueError, match=r"4 records in a row cannot be read.*`\d.png` is damaged"):
        read(Records(Numbers(4, damaged=range(4))), 2, 1)


def test_broken_files_are_listed_once_and_stop_the_run_above_a_share(tmp_path: Path) -> None:
    broken = Broken(tmp_path / "run" / "broken.txt", 0.02)
    broken.add([], 50)
    broken.add(["a.png", "a.png"], 10)
    Broken(broken.path, 0.02).add(["a.png", "b.png"], 10)
    assert broken.path.read_text() == "a.png\nb.png\n"
    broken.add([], 50)
    with pytest.raises(ValueError, match=r"3 of 120 records cannot be read.*broken\.txt"):
        broken.add(["a.png"], 10)


def test_fixed_samples_are_spread_over_the_pictures_that_can_be_read() -> None:
    source = Records(Numbers(3), shown=Numbers(8, damaged=(4,)))
    assert [sample["index"] for sample in source.first(4)] == [0, 2, 5, 6]

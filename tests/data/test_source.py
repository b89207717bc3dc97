"""The endless numbered sequence of batches, whoever reads it."""

import subprocess
import sys
import textwrap
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.data.broken import BrokenFiles
from ldm.data.dataset import SampleDataset, UnreadableSample
from ldm.data.source import DatasetSource


class Numbers(SampleDataset):
    """Samples that are their own index, of files shown so many times; some are `damaged`."""

    def __init__(
        self, length: int, groups: list[int] | None = None, damaged: Any = (), times: int = 1
    ) -> None:
        self.length, self.damaged, self.times = length, damaged, times
        self.groups = groups

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return f"{index // self.times}.png"

    def names(self):
        return map(self.name, range(self.length))

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        if index // self.times in self.damaged:
            raise UnreadableSample(self.name(index), f"`{self.name(index)}` is damaged")
        return {"index": index, "value": torch.tensor(1000 * epoch + index)}


def read(source: DatasetSource, size: int, count: int, **options: int) -> list[dict[str, Any]]:
    return list(islice(source.batches(size, **options), count))


def indices(batches: list[dict[str, Any]]) -> list[list[int]]:
    return [batch["index"] for batch in batches]


GROUPS = [0, 0, 0, 0, 0, 1, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_four_ranks_read_together_what_one_reads(groups):
    alone = indices(read(DatasetSource(Numbers(11, groups), 3), 2, 24))
    for world_size in (2, 4):
        parts = [
            indices(
                read(
                    DatasetSource(Numbers(11, groups), 3),
                    2,
                    24 // world_size,
                    rank=r,
                    world_size=world_size,
                )
            )
            for r in range(world_size)
        ]
        assert [batch for turn in zip(*parts, strict=True) for batch in turn] == alone


@pytest.mark.parametrize(("groups", "epoch"), [(None, Fraction(11, 3)), (GROUPS, 4)])
def test_an_epoch_is_as_many_batches_as_show_everything_once(groups, epoch):
    source = DatasetSource(Numbers(11, groups), 3)
    assert source.batches_per_epoch(3) == epoch
    seen = chain.from_iterable(indices(read(source, 3, int(3 * epoch))))
    assert sorted(seen) == sorted(3 * [*range(11)])


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_workers_change_nothing(groups):
    source = DatasetSource(Numbers(11, groups), 3)
    alone = read(source, 2, 7, start=3, rank=1, world_size=2)
    ahead = read(source, 2, 7, start=3, rank=1, world_size=2, workers=2)
    assert indices(ahead) == indices(alone)
    assert all(torch.equal(a["value"], b["value"]) for a, b in zip(ahead, alone, strict=True))


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_a_run_goes_on_where_it_was_stopped(groups):
    source = DatasetSource(Numbers(11, groups), 3)
    whole = read(source, 3, 20)
    for start in (1, 5, 13):
        again = DatasetSource(Numbers(11, groups), 3)
        assert indices(read(again, 3, 20 - start, start=start)) == indices(whole[start:])


def test_nothing_is_seen_twice_in_an_epoch():
    seen = [i for batch in indices(read(DatasetSource(Numbers(12), 5), 4, 9)) for i in batch]
    epochs = [seen[start : start + 12] for start in (0, 12, 24)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_grouped_epoch_holds_everything_once_in_batches_of_one_group():
    batches = indices(read(DatasetSource(Numbers(11, GROUPS), 5), 2, 12))
    assert all(len({GROUPS[i] for i in batch}) == 1 for batch in batches)
    epochs = batches[:6], batches[6:]  # of 6, 3 and 2 records: 3 + 2 + 1 batches
    assert all(sorted(chain(*epoch)) == list(range(11)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_broken_record_is_named_and_replaced_by_the_next():
    source = DatasetSource(Numbers(6, damaged=(2, 3)), 0)
    whole, mended = read(DatasetSource(Numbers(6), 0), 6, 1)[0], read(source, 6, 1)[0]
    assert mended["index"] == [4 if i in (2, 3) else i for i in whole["index"]]
    assert sorted(mended["broken"]) == ["2.png", "3.png", "3.png"]
    assert "broken" not in whole


def test_a_broken_record_is_replaced_by_one_of_its_group():
    source = DatasetSource(Numbers(11, GROUPS, damaged=(8,)), 0)
    batches = read(source, 2, 6)
    (broken,) = [batch for batch in batches if "broken" in batch]
    assert {GROUPS[i] for i in broken["index"]} == {0}
    assert 8 not in broken["index"]


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_stops_where_nothing_can_be_read(workers):
    message = r"^4 samples in a row cannot be read.*`\d.png` is damaged$"
    with pytest.raises(ValueError, match=message):
        read(DatasetSource(Numbers(4, damaged=range(4))), 2, 1, workers=workers)


def test_a_process_ends_though_its_workers_still_read():
    code = """
        import itertools, sys
        from ldm.data.source import read_ahead

        def numbers(first, step):
            for number in itertools.count(first, step):
                yield {"number": number}

        kept = read_ahead(numbers, 0, 1, 1), read_ahead(numbers, 0, 1, 1)
        sys.exit(next(kept[0])["number"])"""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    assert subprocess.run(command, cwd=Path(__file__).parents[2], timeout=60).returncode == 0


def test_many_damaged_neighbours_are_still_few_of_all():
    source = DatasetSource(Numbers(1000, damaged=range(300, 600)), 0)
    assert not {*range(300, 600)} & {*chain(*indices(read(source, 100, 10)))}


@pytest.mark.parametrize("groups", [[0] * 6 + [1, 1], [0] * 6 + [1] * 2 + [2]])
def test_a_group_of_damaged_records_alone_is_replaced_by_another(groups):
    batches = read(DatasetSource(Numbers(len(groups), groups, damaged=(6, 7)), 0), 2, len(groups))
    seen = {frozenset(groups[index] for index in batch) for batch in indices(batches)}
    assert seen == {frozenset([group]) for group in groups if group != 1}


def started(path: Path, share: float, dataset: Any) -> tuple[BrokenFiles, Any]:
    """The list of a run, and its batches of 50."""
    source = DatasetSource(dataset, 0)
    return BrokenFiles(path / "broken.txt", share, source), source.batches(50)


@pytest.mark.parametrize(
    ("dataset", "share", "message"),
    [
        (Numbers(1000, damaged=range(400, 410)), 0.01, None),
        (Numbers(1000, damaged=range(400, 411)), 0.01, "11 of 1000 samples"),
        (Numbers(1000, damaged=range(7, 1000, 91)), 0.01, "11 of 1000 samples"),
        (Numbers(100, damaged=range(29)), 0.29, None),  # 0.29 * 100 is less than 29
        (Numbers(1000, damaged=(3,), times=10), 0.01, None),
        (Numbers(1000, damaged=(3, 4), times=10), 0.01, "20 of 1000 samples"),
    ],
)
def test_more_damaged_records_than_a_share_of_all_end_the_run(dataset, share, message, tmp_path):
    broken, batches = started(tmp_path, share, dataset)

    def two_epochs() -> None:
        for batch in islice(batches, 2 * len(dataset) // 50):
            broken.add(batch.get("broken", []), 50)

    if message is None:
        two_epochs()
    else:
        with pytest.raises(ValueError, match=rf"{message} .*{share} \(trainer.broken_share.*txt`"):
            two_epochs()
    listed = broken.path.read_text().splitlines()
    assert sorted(listed) == sorted(f"{index}.png" for index in dataset.damaged)


def test_processes_count_together_what_each_has_found(tmp_path):
    one, other = (started(tmp_path, 0.02, Numbers(100))[0] for _ in range(2))
    one.add(["1.png", "1.png"], 50)
    other.add(["1.png", "2.png"], 50)
    assert one.path.read_text() == "1.png\n2.png\n"
    with pytest.raises(ValueError, match="3 of 100 samples"):
        one.add(["3.png"], 50)


def test_what_was_listed_before_counts_when_it_is_found_again(tmp_path):
    (tmp_path / "broken.txt").write_text("".join(f"{index}.png\n" for index in range(50)))
    broken = started(tmp_path, 0.01, Numbers(100))[0]
    broken.add(["7.png"], 50)  # all others have been mended since
    with pytest.raises(ValueError, match="2 of 100 samples"):
        broken.add(["8.png"], 50)
    assert len(broken.path.read_text().splitlines()) == 50


def test_records_that_nobody_counted_are_judged_by_many_and_not_by_chance(tmp_path):
    broken = BrokenFiles(tmp_path / "broken.txt", 0.01)
    broken.add([f"a.tar/{index}" for index in range(19)], 999)
    broken.add([], 1)  # 10 are expected, 3.2 is a standard deviation
    with pytest.raises(ValueError, match="20 of the 1001 samples read cannot be read"):
        broken.add(["b.tar"], 1)


def test_fixed_samples_are_spread_over_the_pictures_that_can_be_read():
    source = DatasetSource(Numbers(3), shown=Numbers(8, damaged=(4,)))
    assert [sample["index"] for sample in source.first_samples(4)] == [0, 2, 5, 6]

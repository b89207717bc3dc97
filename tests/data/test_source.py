"""The endless sequence of batches, of which every rank and worker reads its share."""

import subprocess
import sys
import textwrap
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path

import pytest
import torch

from ldm.data.dataset import SampleDataset, UnreadableSample
from ldm.data.source import DatasetSource

BUCKET_IDS = [0, 0, 0, 0, 0, 1, 1, 2, 0, 1, 2]


class IndexDataset(SampleDataset):
    """Samples that hold their index; those at the indices `damaged` cannot be read."""

    def __init__(self, length, bucket_ids=None, damaged=()):
        self.length, self.bucket_ids, self.damaged = length, bucket_ids, damaged

    def __len__(self):
        return self.length

    def __getitem__(self, key):
        epoch, index = key
        if index in self.damaged:
            raise UnreadableSample(f"{index}.png", f"`{index}.png` is damaged")
        return {"index": index, "value": torch.tensor(1000 * epoch + index)}

    def iter_names(self):
        return (f"{index}.png" for index in range(self.length))


def read(source, size, count, **options):
    return list(islice(source.iter_batches(size, **options), count))


def read_indices(source, size, count, **options):
    return [batch["index"] for batch in read(source, size, count, **options)]


@pytest.mark.parametrize("bucket_ids", [None, BUCKET_IDS])
@pytest.mark.parametrize(
    ("start", "rank", "world_size", "workers"),
    [(0, 0, 2, 0), (0, 1, 2, 0), (5, 3, 4, 0), (13, 0, 1, 0), (3, 1, 2, 2)],
)
def test_ranks_and_workers_share_a_sequence(bucket_ids, start, rank, world_size, workers):
    expected = read(DatasetSource(IndexDataset(11, bucket_ids), 3), 2, 30)
    expected = expected[start + rank :: world_size]
    options = {"start": start, "rank": rank, "world_size": world_size, "workers": workers}
    batches = read(DatasetSource(IndexDataset(11, bucket_ids), 3), 2, len(expected), **options)
    assert all(torch.equal(b["value"], e["value"]) for b, e in zip(batches, expected, strict=True))


@pytest.mark.parametrize(
    ("bucket_ids", "batches_per_epoch"), [(None, Fraction(11, 3)), (BUCKET_IDS, 4)]
)
def test_an_epoch_is_as_many_batches_as_hold_each_sample_once(bucket_ids, batches_per_epoch):
    source = DatasetSource(IndexDataset(11, bucket_ids), 3)
    assert source.get_batches_per_epoch(3) == batches_per_epoch
    indices = [*chain.from_iterable(read_indices(source, 3, int(3 * batches_per_epoch)))]
    epochs = [indices[start : start + 11] for start in (0, 11, 22)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_an_epoch_with_buckets_holds_each_sample_once_in_batches_of_one_bucket():
    batches = read_indices(DatasetSource(IndexDataset(11, BUCKET_IDS), 5), 2, 12)
    assert all(len({BUCKET_IDS[i] for i in batch}) == 1 for batch in batches)
    epochs = batches[:6], batches[6:]  # of 6, 3 and 2 samples: 3 + 2 + 1 batches
    assert all(sorted(chain(*epoch)) == list(range(11)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_damaged_sample_is_named_and_replaced_by_the_next():
    (intact,) = read(DatasetSource(IndexDataset(6)), 6, 1)
    (batch,) = read(DatasetSource(IndexDataset(6, damaged=(2, 3))), 6, 1)
    assert batch["index"] == [4 if i in (2, 3) else i for i in intact["index"]]
    assert sorted(batch["unreadable"]) == ["2.png", "3.png", "3.png"]
    assert "unreadable" not in intact


def test_a_damaged_sample_is_replaced_by_one_of_its_bucket():
    batches = read(DatasetSource(IndexDataset(11, BUCKET_IDS, damaged=(8,))), 2, 6)
    (batch,) = [batch for batch in batches if "unreadable" in batch]
    assert {BUCKET_IDS[i] for i in batch["index"]} == {0}
    assert 8 not in batch["index"]


@pytest.mark.parametrize("bucket_ids", [[0] * 6 + [1, 1], [0] * 6 + [1] * 2 + [2]])
def test_a_bucket_of_damaged_samples_only_is_replaced_by_another(bucket_ids):
    source = DatasetSource(IndexDataset(len(bucket_ids), bucket_ids, damaged=(6, 7)))
    batches = read_indices(source, 2, len(bucket_ids))
    buckets = {frozenset(bucket_ids[index] for index in batch) for batch in batches}
    assert buckets == {frozenset([bucket]) for bucket in bucket_ids if bucket != 1}


def test_hundreds_of_damaged_neighbors_are_replaced():
    batches = read_indices(DatasetSource(IndexDataset(1000, damaged=range(300, 600))), 100, 10)
    assert not {*range(300, 600)} & {*chain(*batches)}


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_fails_if_no_sample_can_be_read(workers):
    message = r"^none of 4 samples that were tried can be read.*`\d.png` is damaged$"
    with pytest.raises(ValueError, match=message):
        read(DatasetSource(IndexDataset(4, damaged=range(4))), 2, 1, workers=workers)


@pytest.mark.slow
def test_a_process_that_fails_does_not_wait_for_its_workers():
    code = """
        import itertools
        from ldm.data.source import prefetch

        def count(first, step):
            for number in itertools.count(first, step):
                yield {"number": number}

        readers = prefetch(count, 0, 1, 1), prefetch(count, 0, 1, 1)
        raise RuntimeError(f"failed at {next(readers[0])}")"""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    root = Path(__file__).parents[2]
    process = subprocess.run(command, cwd=root, timeout=60, capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr.endswith("failed at {'number': 0}\n")


def test_fixed_samples_are_spread_over_the_readable_images():
    source = DatasetSource(IndexDataset(3), images=IndexDataset(8, damaged=(4,)))
    assert [sample["index"] for sample in source.load_fixed_samples(4)] == [0, 2, 5, 6]
    bucketed = DatasetSource(IndexDataset(11, BUCKET_IDS)).load_fixed_samples(6)
    assert [sample["index"] for sample in bucketed] == [0, 1, 2, 3, 4, 8]

"""The list of unreadable files of a run, and the limit on their number."""

from collections import Counter
from fractions import Fraction

import pytest

from ldm.data.unreadable import UnreadableFiles


class CountedSource:
    """A source of `total` samples, in which every file is repeated."""

    def __init__(self, total, repeats=1):
        self.total, self.repeats = total, repeats

    def get_batches_per_epoch(self, size):
        return Fraction(self.total, size)

    def count_names(self):
        return Counter({str(k): self.repeats for k in range(self.total // self.repeats)})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "broken.txt"


@pytest.mark.parametrize(
    ("source", "limit", "damaged", "message"),
    [
        (CountedSource(1000), 0.01, 10, None),
        (CountedSource(1000), 0.01, 11, "11 of 1000 samples"),
        (CountedSource(100), 0.29, 29, None),  # 0.29 * 100 is less than 29
        (CountedSource(1000, repeats=10), 0.01, 1, None),
        (CountedSource(1000, repeats=10), 0.01, 2, "20 of 1000 samples"),
    ],
)
def test_too_many_unreadable_samples_end_the_run(source, limit, damaged, message, path):
    unreadable = UnreadableFiles(path, limit, source)
    names = [str(k) for k in range(damaged)]
    for _ in range(2):  # two epochs: a file that is found again counts once
        for name in names[:-1]:
            unreadable.add([name, name], 50)
    if message is None:
        unreadable.add(names[-1:], 50)
    else:
        pattern = rf"{message} .*{limit} \(trainer.max_unreadable_fraction.*txt`"
        with pytest.raises(ValueError, match=pattern):
            unreadable.add(names[-1:], 50)
    assert sorted(path.read_text().splitlines()) == sorted(names)


def test_processes_count_together(path):
    first, second = (UnreadableFiles(path, 0.02, CountedSource(100)) for _ in range(2))
    first.add(["1", "1"], 50)
    second.add(["1", "2"], 50)
    assert path.read_text() == "1\n2\n"
    with pytest.raises(ValueError, match="3 of 100 samples"):
        first.add(["3"], 50)


def test_files_of_an_earlier_run_count_only_when_they_are_found_again(path):
    path.parent.mkdir()
    path.write_text("".join(f"{index}\n" for index in range(50)))
    unreadable = UnreadableFiles(path, 0.01, CountedSource(100))
    unreadable.add(["7"], 50)  # all others have been repaired since
    with pytest.raises(ValueError, match="2 of 100 samples"):
        unreadable.add(["8"], 50)
    assert len(path.read_text().splitlines()) == 50


def test_without_a_known_total_the_limit_applies_once_the_fraction_is_significant(path):
    unreadable = UnreadableFiles(path, 0.01)
    unreadable.add([f"a.tar/{index}" for index in range(19)], 999)
    unreadable.add([], 1)  # 10 are expected, 3.2 is a standard deviation
    with pytest.raises(ValueError, match="20 of the 1001 samples read cannot be read"):
        unreadable.add(["b.tar"], 1)

"""Placement of labels in the figure."""

import itertools
import random

import pytest

from ldm.evaluation.figure_labels import place_labels

RADIUS = 4.0


def make_boxes(centers, sizes):
    pairs = zip(centers, sizes, strict=True)
    return [(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for (x, y), (w, h) in pairs]


def have_overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@pytest.mark.parametrize("spread", [0, 6, 200])
@pytest.mark.parametrize("corner", [0, 150])
def test_labels_cover_neither_each_other_nor_a_point(spread, corner):
    rng = random.Random(0)
    points = [(corner + spread * rng.random(), corner + spread * rng.random()) for _ in range(24)]
    sizes = [(rng.choice([8, 18]), 10) for _ in points]
    lines = [*itertools.pairwise(points)]
    labels = make_boxes(place_labels(points, sizes, (0, 0, 400, 400), RADIUS, lines), sizes)
    markers = make_boxes(points, [(2 * RADIUS, 2 * RADIUS)] * len(points))
    pairs = [*itertools.combinations(labels, 2), *itertools.product(labels, markers)]
    assert not any(have_overlap(a, b) for a, b in pairs)
    assert all(min(box) >= 0 and max(box) <= 400 for box in labels)


def test_a_label_avoids_a_line_where_there_is_room():
    sizes, line = [(8, 10)], ((0, 0), (100, 100))
    (label,) = make_boxes(place_labels([(50, 50)], sizes, (0, 0, 100, 100), RADIUS, [line]), sizes)
    assert not any(have_overlap(label, (x, x, x, x)) for x in range(100))

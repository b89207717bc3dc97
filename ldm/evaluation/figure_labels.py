"""Place labels beside the points of a figure, without overlaps."""

import math
from collections.abc import Iterator, Sequence
from itertools import count

__all__ = ["Point", "place_labels"]

# All lengths of this module are in pixels.
Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, bottom, right, top

DIRECTIONS = (45, 135, 315, 225, 90, 270, 0, 180)  # degrees, in order of preference
MARGIN = 1.0  # between labels
NUM_EXTRA_DISTANCES = 3  # tried after the first with a free position, to avoid crossing lines


def place_labels(
    points: Sequence[Point],
    sizes: Sequence[tuple[float, float]],
    area: Box,
    radius: float,
    lines: Sequence[tuple[Point, Point]] = (),
) -> list[Point]:
    """Return the center of each label, near its point and within the area if possible.

    Labels overlap neither each other nor the points.

    Args:
        sizes: (width, height) of each label.
        radius: Radius of the markers at the points.
        lines: Lines that labels should not cross, if possible.
    """
    occupied = [(x - radius, y - radius, x + radius, y + radius) for x, y in points]
    line_points = [point for line in lines for point in _sample_line(*line)]
    diagonal = math.hypot(area[2] - area[0], area[3] - area[1])
    centers = []
    for point, (width, height) in zip(points, sizes, strict=True):
        candidates: list[tuple[int, Point, Box]] = []  # (number of covered points, center, box)
        last_step = None
        for step in count():
            gap = radius * (1 + step)
            for center in _iter_centers(point, width / 2 + gap, height / 2 + gap):
                box = _to_box(center, width + MARGIN, height + MARGIN)
                is_allowed = _contains(area, box) or gap > diagonal
                if is_allowed and not any(_overlaps(box, taken) for taken in occupied):
                    num_covered = sum(_overlaps(box, (*p, *p)) for p in line_points)
                    candidates.append((num_covered, center, box))
            if candidates and last_step is None:
                last_step = step + NUM_EXTRA_DISTANCES
            if step == last_step or any(num_covered == 0 for num_covered, *_ in candidates):
                break
        _, center, box = min(candidates, key=lambda candidate: candidate[0])  # the first of equals
        centers.append(center)
        occupied.append(box)
    return centers


def _iter_centers(point: Point, dx: float, dy: float) -> Iterator[Point]:
    for degrees in DIRECTIONS:
        angle = math.radians(degrees)
        yield point[0] + math.cos(angle) * dx, point[1] + math.sin(angle) * dy


def _sample_line(start: Point, end: Point) -> list[Point]:
    """Return points of a line, at most two pixels apart."""
    n = math.ceil(math.dist(start, end) / 2) or 1
    (x0, y0), (x1, y1) = start, end
    return [(x0 + (x1 - x0) * k / n, y0 + (y1 - y0) * k / n) for k in range(n + 1)]


def _to_box(center: Point, width: float, height: float) -> Box:
    x, y = center
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlaps(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _contains(area: Box, box: Box) -> bool:
    return area[0] <= box[0] and area[1] <= box[1] and box[2] <= area[2] and box[3] <= area[3]

"""Place labels of points in a figure, overlapping neither each other nor the points."""

import math
from collections.abc import Iterator, Sequence
from itertools import count

__all__ = ["XY", "place_labels"]

XY = tuple[float, float]
Box = tuple[float, float, float, float]  # left, bottom, right, top

DIRECTIONS = (45, 135, 315, 225, 90, 270, 0, 180)  # degrees, in order of preference
MARGIN = 1.0  # around labels, in pixels
EXTRA_DISTANCES = 3  # to try after the first free one, for a position that crosses no line


def place_labels(
    points: Sequence[XY],
    sizes: Sequence[XY],
    area: Box,
    radius: float,
    lines: Sequence[tuple[XY, XY]] = (),
) -> list[XY]:
    """Return a free center for each label near its point, within the area if possible.

    Args:
        points: (x, y) in pixels, as everything here.
        sizes: (width, height) of each label.
        radius: Radius of the markers at the points.
        lines: Lines that labels should not cross, if possible.
    """
    taken = [(x - radius, y - radius, x + radius, y + radius) for x, y in points]
    line_points = [point for line in lines for point in _sample_line(*line)]
    reach = math.hypot(area[2] - area[0], area[3] - area[1])
    centers = []
    for point, (width, height) in zip(points, sizes, strict=True):
        free: list[tuple[int, XY, Box]] = []  # (line points under it, center, box)
        last_step = None
        for step in count():
            gap = radius * (1 + step)
            for center in _iter_centers(point, width / 2 + gap, height / 2 + gap):
                box = _to_box(center, width + MARGIN, height + MARGIN)
                is_inside = _contains(area, box) or gap > reach
                if is_inside and not any(_overlaps(box, other) for other in taken):
                    crossed = sum(_overlaps(box, (*p, *p)) for p in line_points)
                    free.append((crossed, center, box))
            last_step = step + EXTRA_DISTANCES if free and last_step is None else last_step
            if step == last_step or any(crossed == 0 for crossed, *_ in free):
                break
        _, center, box = min(free, key=lambda position: position[0])  # the first of the best
        centers.append(center)
        taken.append(box)
    return centers


def _iter_centers(point: XY, dx: float, dy: float) -> Iterator[XY]:
    for degrees in DIRECTIONS:
        angle = math.radians(degrees)
        yield point[0] + math.cos(angle) * dx, point[1] + math.sin(angle) * dy


def _sample_line(start: XY, end: XY) -> list[XY]:
    """Return points of a line, at most two pixels apart."""
    n = math.ceil(math.dist(start, end) / 2) or 1
    (x0, y0), (x1, y1) = start, end
    return [(x0 + (x1 - x0) * k / n, y0 + (y1 - y0) * k / n) for k in range(n + 1)]


def _to_box(center: XY, width: float, height: float) -> Box:
    x, y = center
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlaps(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _contains(area: Box, box: Box) -> bool:
    return area[0] <= box[0] and area[1] <= box[1] and box[2] <= area[2] and box[3] <= area[3]

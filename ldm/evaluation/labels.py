"""Labels of points that overlap neither each other nor the points."""

import math
from collections.abc import Iterator, Sequence
from itertools import count

__all__ = ["XY", "place_labels"]

XY = tuple[float, float]
Box = tuple[float, float, float, float]  # left, bottom, right, top

DIRECTIONS = (45, 135, 315, 225, 90, 270, 0, 180)  # degrees, the preferred first
MARGIN = 1.0  # around labels, in pixels
MORE = 3  # distances beyond the first free one, to look for a place without lines


def place_labels(
    points: Sequence[XY],
    sizes: Sequence[XY],
    area: Box,
    radius: float,
    lines: Sequence[tuple[XY, XY]] = (),
) -> list[XY]:
    """Return the centre of each label: near its point and free, within the area if it has room.

    Args:
        points: in pixels.
        sizes: (width, height) of each label.
        radius: of the marks at the points.
        lines: that labels cross only if there is no other place nearby.
    """
    taken = [(x - radius, y - radius, x + radius, y + radius) for x, y in points]
    inked = [point for line in lines for point in _sample(*line)]
    reach = math.hypot(area[2] - area[0], area[3] - area[1])
    centres = []
    for point, (width, height) in zip(points, sizes, strict=True):
        free: list[tuple[int, XY, Box]] = []  # (points of lines below it, centre, box)
        last = None
        for step in count():
            gap = radius * (1 + step)
            for centre in _around(point, width / 2 + gap, height / 2 + gap):
                box = _box(centre, width + MARGIN, height + MARGIN)
                is_inside = _holds(area, box) or gap > reach
                if is_inside and not any(_overlap(box, other) for other in taken):
                    crossed = sum(_overlap(box, (*ink, *ink)) for ink in inked)
                    free.append((crossed, centre, box))
            last = step + MORE if free and last is None else last
            if step == last or any(crossed == 0 for crossed, *_ in free):
                break
        _, centre, box = min(free, key=lambda place: place[0])  # the first of the best
        centres.append(centre)
        taken.append(box)
    return centres


def _around(point: XY, dx: float, dy: float) -> Iterator[XY]:
    for degrees in DIRECTIONS:
        angle = math.radians(degrees)
        yield point[0] + math.cos(angle) * dx, point[1] + math.sin(angle) * dy


def _sample(start: XY, end: XY) -> list[XY]:
    """Return points of a line, at most two pixels apart."""
    n = math.ceil(math.dist(start, end) / 2) or 1
    (x0, y0), (x1, y1) = start, end
    return [(x0 + (x1 - x0) * k / n, y0 + (y1 - y0) * k / n) for k in range(n + 1)]


def _box(centre: XY, width: float, height: float) -> Box:
    x, y = centre
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _holds(area: Box, box: Box) -> bool:
    return area[0] <= box[0] and area[1] <= box[1] and box[2] <= area[2] and box[3] <= area[3]

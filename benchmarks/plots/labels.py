"""Where labels stand so that they cover neither each other nor what is drawn: beside points, and beside the ends of lines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

NEAREST = 11
OFFSETS = [(radius, 45 * turn) for radius in (NEAREST, 19, 28, 38, 50) for turn in (2, 1, 3, 0, 4, 7, 5, 6)]
"""Where a label may stand from its point, in points and degrees: near places first, above before below."""


class Box(NamedTuple):
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    @classmethod
    def around(cls, middle: Iterable[float], half_width: float, half_height: float) -> Box:
        x, y = middle
        return cls(x - half_width, y - half_height, x + half_width, y + half_height)

    def overlap(self, other: Box) -> float:
        """Pixels that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)


class Place(NamedTuple):
    """Where a label stands: what it covers, its middle in points from its point, and whether that is as near as can be."""

    box: Box
    offset: tuple[float, float]
    near: bool


def free_place(point: Iterable[float], half_size: tuple[float, float], taken: Sequence[Box], frame: Box, scale: float) -> Place:
    """The place beside a point where a label covers least of what is taken, the nearest such.

    Args:
        point: in pixels, as all other lengths.
        half_size: half the label's width and height.
        frame: where the label should stay.
        scale: pixels a point.
    """
    x, y = point
    half_width, half_height = half_size
    places = []
    for radius, angle in OFFSETS:
        across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        dx, dy = across * (radius * scale + half_width * abs(across) * 0.8), up * radius * scale
        box = Box.around((x + dx, y + dy), half_width, half_height)
        place = Place(box, (dx / scale, dy / scale), radius == NEAREST)
        places.append((_cost(box, taken, frame) + 1e-3 * radius, place))
    return min(places, key=lambda place: place[0])[1]


def _cost(box: Box, taken: Sequence[Box], frame: Box) -> float:
    """Square pixels of ``box`` that lie on what is taken, and twice those outside ``frame``."""
    area = (box.right - box.left) * (box.top - box.bottom)
    return sum(box.overlap(other) for other in taken) + 2 * (area - box.overlap(frame))


def spread_apart(places: Sequence[float], gap: float) -> list[float]:
    """Sorted places moved, by the least sum of squares, to be ``gap`` or more above the one before, all in [0, 1].

    Where [0, 1] is too short they start at 0 and pass 1.
    """
    clusters: list[tuple[float, int]] = []  # of each: the mean of where its places would have its first, and its size
    for number, place in enumerate(places):
        mean, size = place - number * gap, 1
        while clusters and clusters[-1][0] > mean:
            before, count = clusters.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        clusters.append((mean, size))
    highest = 1 - (len(places) - 1) * gap
    means = [max(0.0, min(mean, highest)) for mean, size in clusters for _ in range(size)]
    return [mean + number * gap for number, mean in enumerate(means)]

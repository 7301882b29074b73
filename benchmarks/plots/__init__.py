"""The report's charts of one result, a file each: what they need of it and how they are drawn.

What is drawn comes from a chart's ``*_panels`` function, which reads a result and nothing else; a chart without panels is not
drawn. This package is blue, everybody else grey.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.plots.batch import batch_panels, draw_batch
from benchmarks.plots.roofline import draw_roofline, roofline_panels
from benchmarks.plots.speedup import draw_speedup, speedup_panels
from benchmarks.reading import Result


class Chart(NamedTuple):
    """A kind of chart: what it shows, what of a result it needs, and how it is drawn."""

    name: str
    caption: str
    panels: Callable[[Result], Sequence[object]]
    draw: Callable[[Result, Path], Path]


CHARTS = (
    Chart("speedup", "Speed of the nine modules against PyTorch", speedup_panels, draw_speedup),
    Chart("roofline", "Roofline of the modules and of the networks", roofline_panels, draw_roofline),
    Chart("batch", "Time an image of the networks against the batch", batch_panels, draw_batch),
)


def charts_of(result: Result) -> list[Chart]:
    """The charts that a result has figures for."""
    return [chart for chart in CHARTS if chart.panels(result)]


def file_name(result: Result, chart: Chart) -> str:
    return f"{result.stem}-{chart.name}.png"

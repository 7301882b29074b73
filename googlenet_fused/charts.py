"""Charts as PNG files: latencies of a benchmark, and the demonstration's photographs with both networks' answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

PLAIN_COLOUR = "#9aa5b1"
FUSED_COLOUR = "#1f77b4"
LOWER = "lower is better"
WHISKERS = "bars: median; whiskers: 20th to 80th percentile"


class ChartError(Exception):
    """A chart cannot be drawn here; the message says what to install."""


@dataclass(frozen=True)
class Bar:
    """One measured bar: the median in ms, whiskers from ``low`` to ``high``, and the text at its end."""

    label: str
    median: float
    low: float
    high: float
    note: str
    highlight: bool = False


@dataclass(frozen=True)
class Panel:
    """One set of axes of a latency chart."""

    title: str
    bars: Sequence[Bar]


@dataclass(frozen=True)
class PhotographResult:
    """One photograph of the demonstration: ``rows`` of (label, plain, fused probability), the most probable first."""

    name: str
    image: Image
    rows: Sequence[tuple[str, float, float]]


def latency_chart(panels: Sequence[Panel], path: Path, title: str, *, metadata: Mapping[str, str] | None = None) -> Path:
    """Draws panels of latency bars, two in a line, into a PNG file.

    Args:
        metadata: text stored in the PNG file.

    Raises:
        ChartError: matplotlib is not installed.
        ValueError: there is nothing to draw.
    """
    if not panels or not all(panel.bars for panel in panels):
        raise ValueError("latency_chart: panels must hold at least one, each with at least one bar")
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    tallest = max(len(panel.bars) for panel in panels)
    figure = new_figure((7.0 * columns, (1.0 + 0.42 * tallest) * lines + 0.6))
    places = figure.subfigures(lines, columns, squeeze=False).flat  # a title is centred on its subfigure, not on its axes
    for place, panel in zip(places, panels, strict=False):
        axes = place.add_subplot()
        _bars(axes, panel.bars)
        place.suptitle(panel.title, fontsize=11)
        axes.set_xlabel(f"ms a call, {LOWER} ({WHISKERS})", fontsize=9)
    figure.suptitle(title)
    return save_figure(figure, path, metadata)


def _bars(axes: Axes, bars: Sequence[Bar]) -> None:
    whiskers = ([bar.median - bar.low for bar in bars], [bar.high - bar.median for bar in bars])
    colours = [FUSED_COLOUR if bar.highlight else PLAIN_COLOUR for bar in bars]
    places = range(len(bars))
    axes.barh(places, [bar.median for bar in bars], xerr=whiskers, color=colours, ecolor="#333333", capsize=3, height=0.65)
    for place, bar in zip(places, bars, strict=True):
        axes.annotate(bar.note, (bar.high, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(places, labels=[bar.label for bar in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, max(bar.high for bar in bars) * 1.35)
    axes.spines[["top", "right"]].set_visible(False)


def demo_chart(photographs: Sequence[PhotographResult], latencies: Sequence[Bar], path: Path, *, subtitle: str) -> Path:
    """Draws each photograph beside both networks' most probable classes, all on one scale, and the latencies below.

    Raises:
        ChartError: matplotlib is not installed.
    """
    lines = len(photographs)
    figure = new_figure((10.5, 2.5 * lines + 2.3))
    grid = figure.add_gridspec(lines + 1, 2, width_ratios=(1, 1.5), height_ratios=[2.5] * lines + [1.7])
    first: Axes | None = None
    for line, photograph in enumerate(photographs):
        picture = figure.add_subplot(grid[line, 0])
        picture.imshow(photograph.image)
        picture.set_title(photograph.name, fontsize=11)
        picture.set_axis_off()
        panel = figure.add_subplot(grid[line, 1], sharex=first)
        _probability_panel(panel, photograph, legend=first is None)
        first = first or panel
    axes = figure.add_subplot(grid[lines, :])
    _bars(axes, latencies)
    axes.set_title(f"Time an image at batch 1: {LOWER}", fontsize=11)
    axes.set_xlabel(f"ms ({WHISKERS})", fontsize=9)
    figure.suptitle(f"GoogLeNet, plain and fused, on the same photographs\n{subtitle}", fontsize=12)
    return save_figure(figure, path)


def _probability_panel(axes: Axes, photograph: PhotographResult, *, legend: bool) -> None:
    places = range(len(photograph.rows))
    labels, plain, fused = zip(*photograph.rows, strict=True)
    height = 0.38
    axes.barh([p - height / 2 for p in places], [100 * v for v in plain], height, color=PLAIN_COLOUR, label="plain")
    axes.barh([p + height / 2 for p in places], [100 * v for v in fused], height, color=FUSED_COLOUR, label="fused")
    axes.set_yticks(places, labels=labels)
    axes.invert_yaxis()
    axes.set_xlabel("probability, %", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=9)


def new_figure(size: tuple[float, float]) -> Figure:
    """A figure drawn off-screen, whatever display or matplotlib settings the user has."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ChartError(f"charts need matplotlib, which does not import here ({error}): pip install matplotlib") from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path, metadata: Mapping[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {} if metadata is None else {"metadata": dict(metadata)}
    figure.savefig(path, dpi=120, format="png", **options)
    return path

"""How all charts look: a provider's colour and line, the grid of panels, ticks, and the file that is saved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.reading import Result, is_ours
from googlenet_fused.bench import BASELINE
from googlenet_fused.charts import FUSED_COLOUR, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS_COLOUR = FUSED_COLOUR
OTHER_OURS_COLOURS = ("#a6cbe8", "#6ba9d8")
BASELINE_COLOUR = "#4a545e"
GREYS = ("#cfd5da", "#7d8891", "#b0b9c1", "#5d6872", "#dfe3e6", "#949ea7")
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("^", "D", "v", "P", "X", "*", "o", "s")
INK = "#333333"
GRID_COLOUR = "#e6e9ec"
PALETTE = 32


class Style(NamedTuple):
    """How a provider's bars and lines are drawn; a higher ``order`` is further in front."""

    colour: str
    hatch: str
    line: Any
    marker: str
    weight: float
    order: int


def styles_of(providers: Sequence[str], ours: str | None) -> dict[str, Style]:
    """How each provider is drawn: the chosen one of ours in blue and on top, other ones of ours pale, everybody else grey."""
    pale = zip(cycle(OTHER_OURS_COLOURS), cycle(LINES))
    greys = zip(cycle(GREYS), cycle(HATCHES), cycle(LINES), cycle(MARKERS))
    styles = {}
    for provider in providers:
        if provider == ours:
            styles[provider] = Style(OURS_COLOUR, "", "-", "o", 2.4, 4)
        elif is_ours(provider):
            colour, line = next(pale)
            styles[provider] = Style(colour, "", line, "o", 1.6, 3)
        elif provider == BASELINE:
            styles[provider] = Style(BASELINE_COLOUR, "", "-", "s", 1.8, 3)
        else:
            styles[provider] = Style(*next(greys), 1.3, 2)
    return styles


def time_words(result: Result) -> str:
    """Which time a chart of headline metrics shows."""
    return "device time of a CUDA graph where the provider has one, else wall time" if result.device == "cuda" else "wall time"


def panel_grid(
    count: int, columns: int, size: tuple[float, float], rest: float, least_width: float = 0.0
) -> tuple[Figure, Any]:
    """A figure and its array of axes, those beyond ``count`` switched off.

    Args:
        size: width and height of a panel in inches.
        rest: height in inches of what is no panel.
    """
    lines = -(-count // columns)
    width, height = size
    figure = new_figure((max(least_width, width * columns), height * lines + rest))
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    return figure, grid


def plain_ticks(axis: Any) -> None:
    """Ticks of a logarithmic axis as plain numbers, the more in a decade the fewer of them it spans."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low)
    subs = (1, 2, 3, 4, 6, 8) if decades < 1 else (1, 2, 5) if decades < 3 else (1,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=30))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def save_small(figure: Figure, path: Path, result: Result) -> Path:
    """A PNG with a palette, a quarter of the size, that carries the digest of the result it was drawn from."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    save_figure(figure, path)
    source = PngInfo()
    source.add_text("Source", result.digest)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(PALETTE, dither=Image.Dither.NONE)
    small.save(path, optimize=True, pnginfo=source)
    return path

"""The chart of the networks' latency: time an image against the batch, one line a provider, named at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.plots.drawing import (
    GRID_COLOUR,
    INK,
    OURS_COLOUR,
    Style,
    panel_grid,
    plain_ticks,
    save_small,
    styles_of,
    time_words,
)
from benchmarks.plots.labels import spread_apart
from benchmarks.plots.series import Series, Spread, timed, title_of
from benchmarks.reading import Result, Row, case_of, cases_of, headline, is_ours, our_provider

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEADER = {"arrowstyle": "-", "color": "#b6bfc7", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4, "relpos": (0, 0.5)}


@dataclass(frozen=True)
class BatchPanel:
    """ms an image of each provider against the batches, for one network and dtype."""

    subject: str
    dtype: str
    batches: Sequence[int]
    series: Sequence[Series]


def batch_panels(result: Result) -> list[BatchPanel]:
    """One panel for each network and dtype that was measured at two batches or more."""
    rows = [row for row in timed(result.rows) if not case_of(row).is_module]
    panels = []
    for group in dict.fromkeys(replace(case, batch=1) for case in cases_of(rows)):
        here = [row for row in rows if replace(case_of(row), batch=1) == group]
        batches = sorted({case_of(row).batch for row in here})
        if len(batches) < 2:
            continue
        best = "graph" if any(headline(row) == "graph" for row in here) else "wall"
        series = []
        for provider in dict.fromkeys(row["provider"] for row in here):
            own = {case_of(row).batch: row for row in here if row["provider"] == provider}
            metric = best if all(best in row["timings"] for row in own.values()) else "wall"
            values = [_per_image(own.get(batch), metric) for batch in batches]
            title = title_of(own.values()) + ("" if metric == best else " (wall)")
            if any(value is not None for value in values):
                series.append(Series(provider, title, values))
        panels.append(BatchPanel(group.subject, group.dtype, batches, series))
    return panels


def _per_image(row: Row | None, metric: str) -> Spread | None:
    if row is None or metric not in row["timings"]:
        return None
    timing, batch = row["timings"][metric], case_of(row).batch
    return Spread(timing["median"] / batch, timing["p20"] / batch, timing["p80"] / batch)


def draw_batch(result: Result, path: Path) -> Path:
    """Time an image against the batch, one line a provider, named at its end.

    Raises:
        ChartError: matplotlib is not installed.
    """
    panels = batch_panels(result)
    figure, grid = panel_grid(len(panels), min(2, len(panels)), (7.4, 3.0), 0.7)
    providers = list(dict.fromkeys(series.provider for panel in panels for series in panel.series))
    styles = styles_of(providers, our_provider(result))
    for axes, panel in zip(grid.flat, panels, strict=False):
        _lines(axes, panel, styles)
        _name_lines(axes, panel, styles)
    words = f"lower is better; {time_words(result)}; line: median; band: 20th to 80th percentile"
    figure.suptitle(f"GoogLeNet on {result.machine}\n{words}", fontsize=12)
    return save_small(figure, path, result)


def _known(panel: BatchPanel, series: Series) -> list[tuple[int, Spread]]:
    """The batches at which a provider has a time."""
    return [(batch, value) for batch, value in zip(panel.batches, series.values, strict=True) if value is not None]


def _lines(axes: Axes, panel: BatchPanel, styles: dict[str, Style]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for series in panel.series:
        style = styles[series.provider]
        known = _known(panel, series)
        batches, values = [batch for batch, _ in known], [value for _, value in known]
        colour = style.colour if is_ours(series.provider) else _darker(style.colour)
        axes.plot(
            batches,
            [value.value for value in values],
            color=colour,
            linestyle=style.line,
            marker=style.marker,
            markersize=4,
            linewidth=style.weight,
            zorder=style.order,
        )
        lows, highs = [value.low for value in values], [value.high for value in values]
        axes.fill_between(batches, lows, highs, color=colour, alpha=0.16, linewidth=0, zorder=1)
    axes.set_title(f"{panel.subject}, {panel.dtype}", fontsize=11)
    axes.set_xlabel("batch", fontsize=9)
    axes.set_ylabel("ms an image", fontsize=9)
    axes.set_xticks(list(panel.batches), labels=[str(batch) for batch in panel.batches])
    axes.minorticks_off()
    axes.set_xlim(panel.batches[0] / 1.12, panel.batches[-1] * 1.06)
    plain_ticks(axes.yaxis)
    axes.grid(axis="y", color=GRID_COLOUR, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _darker(colour: str) -> str:
    """A grey that still shows as a thin line on white."""
    channels = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    return "#" + "".join(f"{min(channel, 150):02x}" for channel in channels)


def _name_lines(axes: Axes, panel: BatchPanel, styles: dict[str, Style]) -> None:
    """Writes each provider's title beside the end of its line, moved apart so that none covers another."""
    low, high = (math.log(value) for value in axes.get_ylim())
    ends = []
    for series in panel.series:
        batch, last = _known(panel, series)[-1]
        ends.append(((math.log(last.value) - low) / (high - low), batch, last.value, series))
    ends.sort(key=lambda end: end[0])
    for (_, batch, ms, series), at in zip(ends, spread_apart([end[0] for end in ends], 0.08), strict=True):
        axes.annotate(
            series.title,
            (batch, ms),
            xytext=(1.045, at),
            textcoords="axes fraction",
            va="center",
            fontsize=8.5,
            color=OURS_COLOUR if is_ours(series.provider) else INK,
            fontweight="bold" if styles[series.provider].colour == OURS_COLOUR else "normal",
            arrowprops=LEADER,
            annotation_clip=False,
        )

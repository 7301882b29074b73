"""The chart of speed-ups: bars of all providers on the nine modules, against PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.plots.drawing import BASELINE_COLOUR, INK, OURS_COLOUR, Style, panel_grid, save_small, styles_of, time_words
from benchmarks.plots.series import Series, Spread, by_dtype_and_batch, ends, timed, title_of
from benchmarks.reading import MODULES, Result, Row, case_of, geometric_mean, headline, our_provider
from googlenet_fused.bench import BASELINE
from googlenet_fused.charts import WHISKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEAN = "mean"
"""The label of the geometric mean over the modules."""


@dataclass(frozen=True)
class SpeedupPanel:
    """Speed-ups against PyTorch of the providers on the modules of one dtype and batch; the last place is `MEAN`."""

    dtype: str
    batch: int
    places: Sequence[str]
    series: Sequence[Series]


def speedup_panels(result: Result) -> list[SpeedupPanel]:
    """One panel for each dtype at the smallest and at the largest batch, of those with half of the modules or more; without
    the baseline itself.

    The spread of a speed-up is that of the provider's own time.
    """
    groups = by_dtype_and_batch(row for row in timed(result.rows) if case_of(row).is_module)
    subjects = {key: len({case_of(row).subject for row in rows}) for key, rows in groups.items()}
    batches = ends(batch for (_, batch), count in subjects.items() if 2 * count >= max(subjects.values()))
    panels = []
    for (dtype, batch), rows in groups.items():
        if batch not in batches:
            continue
        measured = {case_of(row).subject for row in rows}
        modules = [name for name in MODULES if name in measured]
        series = []
        for provider in dict.fromkeys(row["provider"] for row in rows if row["provider"] != BASELINE):
            own = {case_of(row).subject: row for row in rows if row["provider"] == provider}
            values = [_speedup(own[name]) if name in own else None for name in modules]
            series.append(Series(provider, title_of(own.values()), [*values, _mean(values)]))
        if series:
            panels.append(SpeedupPanel(dtype, batch, [*modules, MEAN], series))
    return panels


def _speedup(row: Row) -> Spread | None:
    metric = headline(row)
    if metric is None or metric not in row["speedup"]:
        return None
    value, timing = row["speedup"][metric], row["timings"][metric]
    return Spread(value, value * timing["median"] / timing["p80"], value * timing["median"] / timing["p20"])


def _mean(values: Sequence[Spread | None]) -> Spread | None:
    """The geometric mean of all the values; none if one is missing."""
    known = [value.value for value in values if value is not None]
    if len(known) < len(values):
        return None
    mean = geometric_mean(known)
    return Spread(mean, mean, mean)


def draw_speedup(result: Result, path: Path) -> Path:
    """Bars of the modules' speed-ups against PyTorch.

    Raises:
        ChartError: matplotlib is not installed.
    """
    panels = speedup_panels(result)
    columns = len({panel.batch for panel in panels})
    figure, grid = panel_grid(len(panels), columns, (8.0, 2.7), 1.2, least_width=9.0)
    titles = {series.provider: series.title for panel in panels for series in panel.series}
    styles = styles_of(list(titles), our_provider(result))
    for axes, panel in zip(grid.flat, panels, strict=False):
        _bars(axes, panel, styles)
    for axes in grid[:, 0]:
        axes.set_ylabel("speed against PyTorch", fontsize=9)
    from matplotlib.patches import Patch

    handles = [Patch(label=title, **_bar_style(styles[provider])) for provider, title in titles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=9, frameon=False)
    words = f"higher is better; {time_words(result)}; {WHISKERS}; {MEAN}: geometric mean"
    figure.suptitle(f"The nine Inception modules on {result.machine}\n{words}", fontsize=12)
    return save_small(figure, path, result)


def _bar_style(style: Style) -> dict[str, Any]:
    return {
        "facecolor": style.colour,
        "hatch": style.hatch,
        "edgecolor": "white" if not style.hatch else "#6b7680",
        "linewidth": 0,
    }


def _bars(axes: Axes, panel: SpeedupPanel, styles: dict[str, Style]) -> None:
    width = 0.84 / len(panel.series)
    for number, series in enumerate(panel.series):
        style = styles[series.provider]
        left = (number + 0.5) * width - 0.42
        known = [(place, place + left, value) for place, value in enumerate(series.values) if value is not None]
        axes.bar([x for _, x, _ in known], [value.value for *_, value in known], width * 0.94, zorder=2, **_bar_style(style))
        measured = [(x, value) for place, x, value in known if panel.places[place] != MEAN]
        if measured:
            axes.errorbar(
                [x for x, _ in measured],
                [value.value for _, value in measured],
                yerr=([value.value - value.low for _, value in measured], [value.high - value.value for _, value in measured]),
                fmt="none",
                ecolor=INK,
                elinewidth=0.7,
                capsize=width * 10,
                zorder=3,
            )
        if style.colour == OURS_COLOUR:
            for _, x, value in known:
                axes.annotate(
                    f"{value.value:.2f}",
                    (x, value.high),
                    xytext=(0, 3),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    fontsize=8,
                    color=OURS_COLOUR,
                )
    axes.set_title(f"{panel.dtype}, batch {panel.batch}", fontsize=11)
    axes.axhline(1.0, color=BASELINE_COLOUR, linewidth=1.2, zorder=4)
    axes.set_xticks(range(len(panel.places)), labels=list(panel.places))
    axes.axvline(len(panel.places) - 1.5, color="#dddddd", linewidth=0.8, zorder=1)
    axes.set_xlim(-0.6, len(panel.places) - 0.4)
    axes.margins(y=0.12)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)

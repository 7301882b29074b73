"""The report's three charts of one result: speed-ups of the modules, the roofline, and the networks' latency against batch.

What is drawn comes from ``*_panels`` functions, which read a result and nothing else; a chart without panels is not drawn. This
package is blue, everybody else grey.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.reading import MODULES, Result, Row, case_of, cases_of, geometric_mean, headline, is_ours, our_provider
from googlenet_fused.bench import BASELINE, DTYPES, NETWORKS, Case
from googlenet_fused.charts import FUSED_COLOUR, WHISKERS, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS_COLOUR = FUSED_COLOUR
OTHER_OURS_COLOURS = ("#a6cbe8", "#6ba9d8")
BASELINE_COLOUR = "#4a545e"
GREYS = ("#cfd5da", "#7d8891", "#b0b9c1", "#5d6872", "#dfe3e6", "#949ea7")
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK = "#333333"
WORDS = {
    "graph": "device time of a CUDA graph where the provider has one, else wall time",
    "wall": "wall time",
}
COLOURS = 32
MEAN = "mean"
"""The label of the geometric mean over the modules."""


class Spread(NamedTuple):
    """A value and what it would be at the ends of the measured spread."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """One provider: a value for each place on the horizontal axis, or none."""

    provider: str
    title: str
    values: Sequence[Spread | None]


@dataclass(frozen=True)
class SpeedupPanel:
    """Speed-ups against PyTorch of the providers on the modules of one dtype and batch; the last place is `MEAN`."""

    dtype: str
    batch: int
    places: Sequence[str]
    series: Sequence[Series]


@dataclass(frozen=True)
class Point:
    """A measured case on the roofline chart: FLOPs a byte, and TFLOP/s of ours and of PyTorch."""

    label: str
    intensity: float
    ours: float | None
    baseline: float | None


@dataclass(frozen=True)
class RooflinePanel:
    """The ceilings of one dtype, GB/s and TFLOP/s, and what was reached at one batch below them."""

    dtype: str
    batch: int
    copy: float
    matmul: float | None
    points: Sequence[Point]


@dataclass(frozen=True)
class BatchPanel:
    """ms an image of each provider against the batches, for one network and dtype."""

    subject: str
    dtype: str
    batches: Sequence[int]
    series: Sequence[Series]


def _timed(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if headline(row) is not None and case_of(row).mode == "inference"]


def _ends(batches: Iterable[int]) -> list[int]:
    """The smallest and the largest: what a chart has room for."""
    found = sorted(set(batches))
    return found if len(found) <= 2 else [found[0], found[-1]]


def speedup_panels(result: Result) -> list[SpeedupPanel]:
    """One panel for each dtype at the smallest and at the largest batch of the modules, without the baseline itself.

    The spread of a speed-up is that of the provider's own time.
    """
    rows = [row for row in _timed(result.rows) if case_of(row).is_module]
    batches = _ends(case_of(row).batch for row in rows)
    panels = []
    for dtype, batch in dict.fromkeys((case.dtype, case.batch) for case in cases_of(rows)):
        here = [row for row in rows if case_of(row).dtype == dtype and case_of(row).batch == batch]
        if batch not in batches:
            continue
        modules = [name for name in MODULES if any(case_of(row).subject == name for row in here)]
        series = []
        for provider in dict.fromkeys(row["provider"] for row in here if row["provider"] != BASELINE):
            own = {case_of(row).subject: row for row in here if row["provider"] == provider}
            values = [_speedup(own[name]) if name in own else None for name in modules]
            series.append(Series(provider, _title(own.values()), [*values, _mean(values)]))
        panels.append(SpeedupPanel(dtype, batch, [*modules, MEAN], series))
    return [panel for panel in panels if panel.series]


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


def _title(rows: Iterable[Row]) -> str:
    return str(next(iter(rows))["title"])


def roofline_panels(result: Result) -> list[RooflinePanel]:
    """One panel for each dtype at the smallest and at the largest batch: a point for each module and each network."""
    ours = our_provider(result)
    rows = [row for row in _timed(result.rows) if row["roofline"] is not None and row["provider"] in (ours, BASELINE)]
    batches = _ends(case_of(row).batch for row in rows)
    ceilings = result.data["ceilings"]
    panels = []
    for dtype, batch in dict.fromkeys((case.dtype, case.batch) for case in sorted(cases_of(rows), key=_by_dtype)):
        if batch not in batches:
            continue
        here = [row for row in rows if case_of(row).dtype == dtype and case_of(row).batch == batch]
        points = []
        for subject in (*NETWORKS, *MODULES):
            of_subject = {row["provider"]: row for row in here if case_of(row).subject == subject}
            if of_subject:
                roofline = next(iter(of_subject.values()))["roofline"]
                speeds = (_rate(of_subject.get(ours or "")), _rate(of_subject.get(BASELINE)))
                points.append(Point(subject, roofline["flops"] / roofline["bytes"], *speeds))
        matmul = ceilings["matmul_tflop_per_s"].get(dtype)
        copy = ceilings["copy_gb_per_s"]["median"]
        panels.append(RooflinePanel(dtype, batch, copy, None if matmul is None else matmul["median"], points))
    return panels


def _by_dtype(case: Case) -> tuple[int, int]:
    return list(DTYPES).index(case.dtype), case.batch


def _rate(row: Row | None) -> float | None:
    """TFLOP/s of a row's headline median."""
    metric = None if row is None else headline(row)
    if row is None or metric is None:
        return None
    return float(row["roofline"]["flops"] / row["timings"][metric]["median"] / 1e9)


def batch_panels(result: Result) -> list[BatchPanel]:
    """One panel for each network and dtype that was measured at two batches or more."""
    rows = [row for row in _timed(result.rows) if not case_of(row).is_module]
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
            title = _title(own.values()) + ("" if metric == best else " (wall)")
            if any(value is not None for value in values):
                series.append(Series(provider, title, values))
        panels.append(BatchPanel(group.subject, group.dtype, batches, series))
    return panels


def _per_image(row: Row | None, metric: str) -> Spread | None:
    if row is None or metric not in row["timings"]:
        return None
    timing, batch = row["timings"][metric], case_of(row).batch
    return Spread(timing["median"] / batch, timing["p20"] / batch, timing["p80"] / batch)


def draw_speedup(result: Result, path: Path) -> Path:
    """Bars of the modules' speed-ups against PyTorch.

    Raises:
        ChartError: matplotlib is not installed.
    """
    panels = speedup_panels(result)
    columns = len({panel.batch for panel in panels})
    lines = -(-len(panels) // columns)
    figure = new_figure((max(9.0, 8.0 * columns), 2.7 * lines + 1.2))
    grid = figure.subplots(lines, columns, squeeze=False)
    providers = list(dict.fromkeys((s.provider, s.title) for panel in panels for s in panel.series))
    styles = _styles([provider for provider, _ in providers], our_provider(result))
    for axes, panel in zip(grid.flat, panels, strict=False):
        _speedup_bars(axes, panel, styles)
        axes.set_title(f"{panel.dtype}, batch {panel.batch}", fontsize=11)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel("speed against PyTorch", fontsize=9)
    from matplotlib.patches import Patch

    handles = [Patch(label=title, **_bar_style(styles[provider])) for provider, title in providers]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=9, frameon=False)
    words = f"higher is better; {_words(result)}; {WHISKERS}; {MEAN}: geometric mean"
    figure.suptitle(f"The nine Inception modules on {result.machine}\n{words}", fontsize=12)
    return _save_small(figure, path, result)


class _Style(NamedTuple):
    colour: str
    hatch: str
    line: Any
    marker: str
    weight: float
    order: int


def _styles(providers: Sequence[str], ours: str | None) -> dict[str, _Style]:
    """How each provider is drawn: the chosen one of ours in blue and on top, other ones of ours pale, everybody else grey."""
    styles = {}
    pale = greys = 0
    for provider in providers:
        if provider == ours:
            styles[provider] = _Style(OURS_COLOUR, "", "-", "o", 2.4, 4)
        elif is_ours(provider):
            styles[provider] = _Style(OTHER_OURS_COLOURS[pale % 2], "", LINES[pale % len(LINES)], "o", 1.6, 3)
            pale += 1
        elif provider == BASELINE:
            styles[provider] = _Style(BASELINE_COLOUR, "", "-", "s", 1.8, 3)
        else:
            hatch, line = HATCHES[greys % len(HATCHES)], LINES[greys % len(LINES)]
            styles[provider] = _Style(GREYS[greys % len(GREYS)], hatch, line, MARKERS[(greys + 2) % len(MARKERS)], 1.3, 2)
            greys += 1
    return styles


def _bar_style(style: _Style) -> dict[str, Any]:
    return {
        "facecolor": style.colour,
        "hatch": style.hatch,
        "edgecolor": "white" if not style.hatch else "#6b7680",
        "linewidth": 0,
    }


def _speedup_bars(axes: Axes, panel: SpeedupPanel, styles: dict[str, _Style]) -> None:
    width = 0.84 / len(panel.series)
    for number, series in enumerate(panel.series):
        style = styles[series.provider]
        known = [(place, value) for place, value in enumerate(series.values) if value is not None]
        at = [place - 0.42 + (number + 0.5) * width for place, _ in known]
        heights = [value.value for _, value in known]
        axes.bar(at, heights, width * 0.94, zorder=2, **_bar_style(style))
        measured = [(x, value) for x, (place, value) in zip(at, known, strict=True) if panel.places[place] != MEAN]
        low, high = ([value.value - value.low for _, value in measured], [value.high - value.value for _, value in measured])
        if measured:
            axes.errorbar(
                [x for x, _ in measured],
                [value.value for _, value in measured],
                yerr=(low, high),
                fmt="none",
                ecolor=INK,
                elinewidth=0.7,
                capsize=width * 10,
                zorder=3,
            )
        if style.colour == OURS_COLOUR:
            for x, (_, value) in zip(at, known, strict=True):
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
    axes.axhline(1.0, color=BASELINE_COLOUR, linewidth=1.2, zorder=4)
    axes.set_xticks(range(len(panel.places)), labels=list(panel.places))
    axes.axvline(len(panel.places) - 1.5, color="#dddddd", linewidth=0.8, zorder=1)
    axes.set_xlim(-0.6, len(panel.places) - 0.4)
    axes.margins(y=0.12)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)


def _words(result: Result) -> str:
    return WORDS["graph" if result.device == "cuda" else "wall"]


def draw_roofline(result: Result, path: Path) -> Path:
    """What ours and plain PyTorch attain, below the ceilings of the same run.

    Raises:
        ChartError: matplotlib is not installed.
    """
    panels = roofline_panels(result)
    columns = len({panel.batch for panel in panels})
    lines = -(-len(panels) // columns)
    figure = new_figure((max(7.5, 6.6 * columns), 4.3 * lines + 1.0))
    grid = figure.subplots(lines, columns, squeeze=False)
    limits = _intensities(panels)
    ours = next((row["title"] for row in result.rows if row["provider"] == our_provider(result)), "")
    for axes, panel in zip(grid.flat, panels, strict=False):
        _roofline_lines(axes, panel, limits, ours)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[-1]:
        axes.set_xlabel("FLOPs a byte of least traffic", fontsize=9)
    for axes in grid[:, 0]:
        axes.set_ylabel("TFLOP/s", fontsize=9)
    handles = {label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.suptitle(f"Roofline of {result.machine}\nceilings measured in the same run; {_words(result)}", fontsize=12)
    _lay_out(figure)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _label_points(axes, panel, figure.dpi / 72)
    return _save_small(figure, path, result)


def _intensities(panels: Sequence[RooflinePanel]) -> tuple[float, float]:
    """Where the horizontal axes begin and end: all the points and the ridges of all panels lie well inside."""
    found = [point.intensity for panel in panels for point in panel.points]
    found += [1e3 * panel.matmul / panel.copy for panel in panels if panel.matmul is not None]
    return min(found) / 2.2, max(found) * 1.8


def _roofline_lines(axes: Axes, panel: RooflinePanel, limits: tuple[float, float], ours: str) -> None:
    left, right = limits
    slope = panel.copy / 1e3
    ridge = right if panel.matmul is None else panel.matmul / slope
    xs = [left, ridge] if panel.matmul is None else [left, ridge, right]
    axes.plot(xs, [slope * min(x, ridge) for x in xs], color=INK, linewidth=1.6, label="roofline")
    for point in panel.points:
        if point.ours is not None and point.baseline is not None:
            axes.plot([point.intensity] * 2, [point.baseline, point.ours], color="#c3cad1", linewidth=0.9, zorder=1)
    looks: tuple[tuple[str, list[tuple[float, float]], dict[str, Any]], ...] = (
        (
            "PyTorch",
            [(point.intensity, point.baseline) for point in panel.points if point.baseline is not None],
            {"facecolor": "white", "edgecolor": BASELINE_COLOUR, "linewidth": 1.3, "marker": "s", "s": 26},
        ),
        (
            ours,
            [(point.intensity, point.ours) for point in panel.points if point.ours is not None],
            {"facecolor": OURS_COLOUR, "edgecolor": "white", "linewidth": 0.5, "marker": "o", "s": 44},
        ),
    )
    for label, known, look in looks:
        if known:
            axes.scatter([x for x, _ in known], [y for _, y in known], label=label, zorder=3, **look)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    speeds = [speed for point in panel.points for speed in (point.ours, point.baseline) if speed is not None]
    axes.set_ylim(min(min(speeds) / 2.2, slope * ridge / 8), max(*speeds, slope * ridge) * 1.8)
    axes.set_title(f"{panel.dtype}, batch {panel.batch}", fontsize=11)
    _plain_ticks(axes.xaxis)
    _plain_ticks(axes.yaxis)
    axes.grid(color="#e6e9ec", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    start = max(left, axes.get_ylim()[0] / slope)
    middle = math.sqrt(start * ridge)
    _note(axes, f"copy\n{_number(panel.copy)} GB/s", (middle, middle * slope), ha="left", va="top", offset=(6, 0))
    if panel.matmul is not None:
        text = f"matrix product {_number(panel.matmul)} TFLOP/s"
        _note(axes, text, (right, panel.matmul), ha="right", va="bottom", offset=(-4, 2))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _note(axes: Axes, text: str, at: tuple[float, float], *, ha: str, va: str, offset: tuple[float, float]) -> None:
    note = axes.annotate(text, at, xytext=offset, textcoords="offset points", ha=ha, va=va, fontsize=8, color=INK)
    note.set_in_layout(False)


def _plain_ticks(axis: Any) -> None:
    """Ticks of a logarithmic axis as plain numbers, the more in a decade the fewer of them it spans."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low)
    subs = (1, 2, 3, 4, 6, 8) if decades < 1 else (1, 2, 5) if decades < 2.5 else (1,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=30))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _lay_out(figure: Figure) -> None:
    """Fixes where all axes are, so that labels can be placed by what they would overlap."""
    figure.canvas.draw()
    figure.set_layout_engine("none")


class _Box(NamedTuple):
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: _Box) -> float:
        """Pixels that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)


LABEL_SIZE = 8.0
LEADER = {"arrowstyle": "-", "color": "#9aa5b1", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
OFFSETS = [(radius, 45 * turn) for radius in (11, 19, 28, 38, 50) for turn in (2, 1, 3, 0, 4, 7, 5, 6)]
"""Where a label may stand from its point, in points and degrees: near places first, above before below."""


def _label_points(axes: Axes, panel: RooflinePanel, scale: float) -> None:
    """Names every point once, beside ours where there is one, where it covers no other label and no point.

    Args:
        scale: pixels a point.
    """
    marks = [
        _around(axes.transData.transform((point.intensity, speed)), 5 * scale, 5 * scale)
        for point in panel.points
        for speed in (point.ours, point.baseline)
        if speed is not None
    ]
    frame = _Box(*axes.get_window_extent().extents)
    taken = marks + [_Box(*note.get_window_extent().extents) for note in axes.texts]
    for point in sorted(panel.points, key=lambda point: point.intensity):
        speed = point.ours if point.ours is not None else point.baseline
        if speed is None:
            continue
        x, y = axes.transData.transform((point.intensity, speed))
        half_width, half_height = 0.31 * LABEL_SIZE * len(point.label) * scale, 0.62 * LABEL_SIZE * scale
        places = []
        for radius, angle in OFFSETS:
            across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            aside = across * (radius * scale + half_width * abs(across) * 0.8)
            places.append((radius, _around((x + aside, y + up * radius * scale), half_width, half_height)))
        radius, box = min(places, key=lambda place: _cost(place[1], taken, frame) + 1e-3 * place[0])
        taken.append(box)
        axes.annotate(
            point.label,
            (point.intensity, speed),
            xytext=(((box.left + box.right) / 2 - x) / scale, ((box.bottom + box.top) / 2 - y) / scale),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=LABEL_SIZE,
            color=INK,
            arrowprops=LEADER if radius > OFFSETS[0][0] else None,
            zorder=5,
        )


def _cost(box: _Box, taken: Sequence[_Box], frame: _Box) -> float:
    """Square pixels of ``box`` that lie on what is taken, and twice those outside ``frame``."""
    area = (box.right - box.left) * (box.top - box.bottom)
    return sum(box.overlap(other) for other in taken) + 2 * (area - box.overlap(frame))


def _around(middle: Iterable[float], half_width: float, half_height: float) -> _Box:
    x, y = middle
    return _Box(x - half_width, y - half_height, x + half_width, y + half_height)


def draw_batch(result: Result, path: Path) -> Path:
    """Time an image against the batch, one line a provider, named at its end.

    Raises:
        ChartError: matplotlib is not installed.
    """
    panels = batch_panels(result)
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = new_figure((7.4 * columns, 3.0 * lines + 0.7))
    grid = figure.subplots(lines, columns, squeeze=False)
    providers = list(dict.fromkeys(s.provider for panel in panels for s in panel.series))
    styles = _styles(providers, our_provider(result))
    for axes, panel in zip(grid.flat, panels, strict=False):
        _batch_lines(axes, panel, styles)
        axes.set_title(f"{panel.subject}, {panel.dtype}", fontsize=11)
        axes.set_xlabel("batch", fontsize=9)
        axes.set_ylabel("ms an image", fontsize=9)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    words = f"lower is better; {_words(result)}; line: median; band: 20th to 80th percentile"
    figure.suptitle(f"GoogLeNet on {result.machine}\n{words}", fontsize=12)
    return _save_small(figure, path, result)


def _batch_lines(axes: Axes, panel: BatchPanel, styles: dict[str, _Style]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for series in panel.series:
        style = styles[series.provider]
        known = [(batch, v) for batch, v in zip(panel.batches, series.values, strict=True) if v is not None]
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
    axes.set_xticks(list(panel.batches), labels=[str(batch) for batch in panel.batches])
    axes.minorticks_off()
    axes.set_xlim(panel.batches[0] / 1.12, panel.batches[-1] * 1.06)
    _plain_ticks(axes.yaxis)
    axes.grid(axis="y", color="#e6e9ec", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    _name_lines(axes, panel, styles)


def _darker(colour: str) -> str:
    """A grey that still shows as a thin line on white."""
    channels = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    return "#" + "".join(f"{min(channel, 150):02x}" for channel in channels)


def _name_lines(axes: Axes, panel: BatchPanel, styles: dict[str, _Style]) -> None:
    """Writes each provider's title beside the end of its line, moved apart so that none covers another."""
    low, high = (math.log(value) for value in axes.get_ylim())
    ends = []
    for series in panel.series:
        known = [(batch, value.value) for batch, value in zip(panel.batches, series.values, strict=True) if value is not None]
        batch, last = known[-1]
        ends.append(((math.log(last) - low) / (high - low), batch, last, series))
    ends.sort(key=lambda end: end[0])
    for (_, batch, last, series), at in zip(ends, spread_apart([end[0] for end in ends], 0.08), strict=True):
        style = styles[series.provider]
        axes.annotate(
            series.title,
            (batch, last),
            xytext=(1.045, at),
            textcoords="axes fraction",
            va="center",
            fontsize=8.5,
            color=OURS_COLOUR if is_ours(series.provider) else INK,
            fontweight="bold" if style.colour == OURS_COLOUR else "normal",
            arrowprops={
                "arrowstyle": "-",
                "color": "#b6bfc7",
                "linewidth": 0.6,
                "shrinkA": 0,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )


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


def _save_small(figure: Figure, path: Path, result: Result) -> Path:
    """A PNG with a palette, a quarter of the size, that carries the digest of the result it was drawn from."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    save_figure(figure, path)
    source = PngInfo()
    source.add_text("Source", result.digest)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    small.save(path, optimize=True, pnginfo=source)
    return path


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

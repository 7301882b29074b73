"""The roofline chart: what ours and plain PyTorch attain, below the ceilings of the same run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.plots.drawing import (
    BASELINE_COLOUR,
    GRID_COLOUR,
    INK,
    OURS_COLOUR,
    panel_grid,
    plain_ticks,
    save_small,
    time_words,
)
from benchmarks.plots.labels import Box, free_place
from benchmarks.plots.series import by_dtype_and_batch, ends, timed
from benchmarks.reading import MODULES, Result, Row, case_of, headline, our_provider
from googlenet_fused.bench import BASELINE, NETWORKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEWEST_POINTS = 3
"""A panel with fewer shows nothing that a table does not, unless there is no other."""
LABEL_SIZE = 8.0
LEADER = {"arrowstyle": "-", "color": "#9aa5b1", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}


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
    arithmetic: float | None
    points: Sequence[Point]


def roofline_panels(result: Result) -> list[RooflinePanel]:
    """One panel for each dtype at the smallest and at the largest batch: a point for each module and each network.

    Only panels with `FEWEST_POINTS` count; all do where none has that many.
    """
    ours = our_provider(result)
    rows = [row for row in timed(result.rows) if row["roofline"] is not None and row["provider"] in (ours, BASELINE)]
    copy, rates = (result.data["ceilings"][name] for name in ("copy_gb_per_s", "arithmetic_tflop_per_s"))
    panels = []
    for (dtype, batch), of_panel in by_dtype_and_batch(rows).items():
        arithmetic = rates[dtype]["median"] if dtype in rates else None
        panels.append(RooflinePanel(dtype, batch, copy["median"], arithmetic, _points(of_panel, ours)))
    panels = [panel for panel in panels if len(panel.points) >= FEWEST_POINTS] or panels
    batches = ends(panel.batch for panel in panels)
    return [panel for panel in panels if panel.batch in batches]


def _points(rows: Sequence[Row], ours: str | None) -> list[Point]:
    """Points of rows of one dtype and batch: networks before modules."""
    points = []
    for subject in (*NETWORKS, *MODULES):
        by_provider = {row["provider"]: row for row in rows if case_of(row).subject == subject}
        if by_provider:
            roofline = next(iter(by_provider.values()))["roofline"]
            speeds = (_rate(by_provider.get(ours or "")), _rate(by_provider.get(BASELINE)))
            points.append(Point(subject, roofline["flops"] / roofline["bytes"], *speeds))
    return points


def _rate(row: Row | None) -> float | None:
    """TFLOP/s of a row's headline median."""
    metric = None if row is None else headline(row)
    if row is None or metric is None:
        return None
    return float(row["roofline"]["flops"] / row["timings"][metric]["median"] / 1e9)


def draw_roofline(result: Result, path: Path) -> Path:
    """What ours and plain PyTorch attain, below the ceilings of the same run.

    Raises:
        ChartError: matplotlib is not installed.
    """
    panels = roofline_panels(result)
    columns = len({panel.batch for panel in panels})
    figure, grid = panel_grid(len(panels), columns, (6.6, 4.3), 1.0, least_width=7.5)
    limits = _intensities(panels)
    ours = next((row["title"] for row in result.rows if row["provider"] == our_provider(result)), "")
    for axes, panel in zip(grid.flat, panels, strict=False):
        _lines_and_points(axes, panel, limits, ours)
    for axes in grid[-1]:
        axes.set_xlabel("FLOPs a byte of least traffic", fontsize=9)
    for axes in grid[:, 0]:
        axes.set_ylabel("TFLOP/s", fontsize=9)
    handles = {label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.suptitle(f"Roofline of {result.machine}\nceilings measured in the same run; {time_words(result)}", fontsize=12)
    # Labels are placed by what they would overlap, so all axes must be where they will stay.
    figure.canvas.draw()
    figure.set_layout_engine("none")
    for axes, panel in zip(grid.flat, panels, strict=False):
        _label_points(axes, panel, figure.dpi / 72)
    return save_small(figure, path, result)


def _intensities(panels: Sequence[RooflinePanel]) -> tuple[float, float]:
    """Where the horizontal axes begin and end: all the points and the ridges of all panels lie well inside."""
    found = [point.intensity for panel in panels for point in panel.points]
    found += [1e3 * panel.arithmetic / panel.copy for panel in panels if panel.arithmetic is not None]
    return min(found) / 2.2, max(found) * 1.8


def _lines_and_points(axes: Axes, panel: RooflinePanel, limits: tuple[float, float], ours: str) -> None:
    left, right = limits
    slope = panel.copy / 1e3
    ridge = right if panel.arithmetic is None else panel.arithmetic / slope
    xs = [left, ridge] if panel.arithmetic is None else [left, ridge, right]
    axes.plot(xs, [slope * min(x, ridge) for x in xs], color=INK, linewidth=1.6, label="roofline")
    for point in panel.points:
        if point.ours is not None and point.baseline is not None:
            axes.plot([point.intensity] * 2, [point.baseline, point.ours], color="#c3cad1", linewidth=0.9, zorder=1)
    baseline_look = {"facecolor": "white", "edgecolor": BASELINE_COLOUR, "linewidth": 1.3, "marker": "s", "s": 26}
    our_look = {"facecolor": OURS_COLOUR, "edgecolor": "white", "linewidth": 0.5, "marker": "o", "s": 44}
    looks: tuple[tuple[str, list[tuple[float, float]], dict[str, Any]], ...] = (
        ("PyTorch", [(p.intensity, p.baseline) for p in panel.points if p.baseline is not None], baseline_look),
        (ours, [(p.intensity, p.ours) for p in panel.points if p.ours is not None], our_look),
    )
    for label, known, look in looks:
        if known:
            axes.scatter([x for x, _ in known], [y for _, y in known], label=label, zorder=3, **look)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    speeds = [speed for _, known, _ in looks for _, speed in known]
    axes.set_ylim(min(min(speeds) / 2.2, slope * ridge / 8), max(*speeds, slope * ridge) * 1.8)
    axes.set_title(f"{panel.dtype}, batch {panel.batch}", fontsize=11)
    plain_ticks(axes.xaxis)
    plain_ticks(axes.yaxis)
    axes.grid(color=GRID_COLOUR, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    start = max(left, axes.get_ylim()[0] / slope)
    middle = math.sqrt(start * ridge)
    _note(axes, f"copy\n{_number(panel.copy)} GB/s", (middle, middle * slope), ha="left", va="top", offset=(6, 0))
    if panel.arithmetic is not None:
        text = f"arithmetic {_number(panel.arithmetic)} TFLOP/s"
        # At the end of its line where points leave it more room.
        first = min((point.intensity for point in panel.points if point.intensity > ridge), default=right)
        if first / ridge > right / max(point.intensity for point in panel.points):
            _note(axes, text, (ridge, panel.arithmetic), ha="left", va="bottom", offset=(4, 2))
        else:
            _note(axes, text, (right, panel.arithmetic), ha="right", va="bottom", offset=(-4, 2))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _note(axes: Axes, text: str, at: tuple[float, float], *, ha: str, va: str, offset: tuple[float, float]) -> None:
    note = axes.annotate(text, at, xytext=offset, textcoords="offset points", ha=ha, va=va, fontsize=8, color=INK)
    note.set_in_layout(False)


def _label_points(axes: Axes, panel: RooflinePanel, scale: float) -> None:
    """Names every point once, beside ours where there is one, where it covers no other label and no point.

    Args:
        scale: pixels a point.
    """
    frame = Box(*axes.get_window_extent().extents)
    taken = [
        Box.around(axes.transData.transform((point.intensity, speed)), 5 * scale, 5 * scale)
        for point in panel.points
        for speed in (point.ours, point.baseline)
        if speed is not None
    ]
    taken += [Box(*note.get_window_extent().extents) for note in axes.texts]
    for point in sorted(panel.points, key=lambda point: point.intensity):
        speed = point.ours if point.ours is not None else point.baseline
        if speed is None:
            continue
        half_size = 0.31 * LABEL_SIZE * len(point.label) * scale, 0.62 * LABEL_SIZE * scale
        place = free_place(axes.transData.transform((point.intensity, speed)), half_size, taken, frame, scale)
        taken.append(place.box)
        axes.annotate(
            point.label,
            (point.intensity, speed),
            xytext=place.offset,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=LABEL_SIZE,
            color=INK,
            arrowprops=None if place.near else LEADER,
            zorder=5,
        )

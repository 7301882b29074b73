"""Tables and chart panels of measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from googlenet_fused.bench.case import Case
from googlenet_fused.bench.measure import Row
from googlenet_fused.bench.provider import OURS
from googlenet_fused.charts import Bar, Panel

if TYPE_CHECKING:
    from rich.console import Console


def latency_panels(rows: Sequence[Row]) -> list[Panel]:
    """One chart panel for each case that has timings, with a bar for each provider that has one."""
    panels: dict[Case, list[Bar]] = {}
    for row in rows:
        if (timing := row.timing) is not None:
            note = f"{timing.median:.3g} ms  ({_speedup(row)})"
            bar = Bar(row.title, timing.median, timing.p20, timing.p80, note, row.provider.startswith(OURS))
            panels.setdefault(row.case, []).append(bar)
    return [Panel(str(case), bars) for case, bars in panels.items()]


def _speedup(row: Row) -> str:
    """Of the headline metric."""
    metric = next(name for name, timing in row.timings.items() if timing is row.timing)
    return f"{row.speedup[metric]:.2f}x" if metric in row.speedup else "–"


def print_results(rows: Sequence[Row], where: str, console: Console) -> None:
    """Prints a table for each case, under it why a provider has no time, and last ``where`` it all ran."""
    from rich import box
    from rich.table import Table

    for case in dict.fromkeys(row.case for row in rows):
        of_case = [row for row in rows if row.case == case]
        calls = max((row.timing.n for row in of_case if row.timing is not None), default=0)
        title = f"{case}: ms a call, {calls} calls each"
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, min_width=76)
        table.add_column("", ratio=1)
        for column in ("median", "p20", "p80", "speed-up", "error"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in of_case:
            timing = row.timing
            if timing is None:
                table.add_row(f"{row.title} ({row.status})")
                continue
            cells = (f"{timing.median:.2f}", f"{timing.p20:.2f}", f"{timing.p80:.2f}")
            table.add_row(row.title, *cells, _speedup(row), f"{row.max_error:.1e}")
        console.print(table)
        for row in of_case:
            if row.reason is not None:
                console.print(f"{row.title}, {row.status}: {row.reason}\n", markup=False)
    console.print(
        f"{where}. Speed-up: median against PyTorch in the same run. "
        "Error: the largest of the logits, against an fp64 run and relative to the largest logit."
    )

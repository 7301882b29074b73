"""The page in docs/ with every figure of one machine: a table for each subject, dtype and mode, and one of the rooflines."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.reading import HEADLINES, Result, Row, case_of, cases_of, headline, one, our_provider, row_percent
from benchmarks.tables.markdown import bold_if, number, per_cent, plain, spread, table
from benchmarks.tables.remarks import NOTE, captions, ceilings, facts, not_run, reasons, what_is_bold
from benchmarks.tables.rows import group_name, grouped
from googlenet_fused.bench import BASELINE, METRICS

READING = (
    "Times are in ms a call: median (20th to 80th percentile), speed against PyTorch in the same run. `graph`: device time in "
    "a replayed CUDA graph. `wall`: eager wall time. `graph_cold`, `wall_cold`: the same with inputs and outputs rotated "
    "beyond the last cache, medians. `host`: time until the call returns, median. n: timed calls of the first of these that a "
    "row has, `graph` before `wall`; % of the roofline is of the same. The roofline is the time that the arithmetic or the "
    "least traffic of a case needs at the ceilings above, whichever is longer. Above 100 %, a problem stayed in a cache, an "
    "algorithm needed fewer operations than are counted, or arithmetic ran faster than that of the ceiling. Errors are "
    "against fp64, relative to the largest value and to the root mean square of the output; of a training step, the largest "
    "and the mean of its parameters' gradients, each relative to its own root mean square. The CSV file holds every "
    "percentile."
)


def page_name(result: Result) -> str:
    return f"benchmarks-{result.stem}.md"


def page(results: Sequence[Result]) -> str:
    """The page in docs/ with every figure of one machine.

    Raises:
        ReportError: the results are of two machines; the message names both.
    """
    result = one(results)
    ours = our_provider(result)
    parts = [
        f"{NOTE}\n\n# Benchmarks on {plain(result.machine)}",
        facts(result),
        ceilings(result),
        READING + what_is_bold(ours),
        "Settings: " + "; ".join(f"{key} {plain(str(value))}" for key, value in result.data["settings"].items()) + ".",
        *(f"![{caption}]({name})" for name, caption in captions(result).items()),
    ]
    for group in grouped(cases_of(result.rows)):
        rows = [row for case in group for row in result.rows if case_of(row) == case]
        parts.append(f"## {group_name(group[0])}\n\n{_full_table(rows, ours)}")
    parts.append(f"## What the rooflines are\n\n{_roofline_table(result)}")
    return "\n\n".join([*parts, *reasons(result.rows), *not_run(result, name_all=True)]) + "\n"


def _full_table(rows: Sequence[Row], ours: str | None) -> str:
    """Every figure of rows of one subject, dtype and mode; a line for each row."""
    metrics = [metric for metric in METRICS if any(metric in row["timings"] for row in rows)]
    if not metrics:
        return "No provider has a time."
    lines = []
    for row in rows:
        named = [str(case_of(row).batch), bold_if(row["provider"] == ours, plain(row["title"]))]
        best = headline(row)
        if best is None:
            lines.append([*named, row["status"], *[""] * (len(metrics) + 4)])
            continue
        times = [_time(row, metric) if metric in row["timings"] else "–" for metric in metrics]
        percent = row_percent(row)
        errors = ["–" if row[name] is None else f"{row[name]:.1e}" for name in ("max_error", "rms_error")]
        peak = "–" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        counted = str(row["timings"][best]["n"])
        lines.append([*named, *times, counted, "no ceiling" if percent is None else per_cent(percent), *errors, peak])
    return table(["batch", "", *metrics, "n", "% of roofline", "max error", "rms error", "peak MiB"], lines)


def _time(row: Row, metric: str) -> str:
    timing = row["timings"][metric]
    said = spread(timing) if metric in HEADLINES else number(timing["median"])
    return f"{said} {row['speedup'][metric]:.2f}x" if metric in row["speedup"] and row["provider"] != BASELINE else said


def _roofline_table(result: Result) -> str:
    found = {case_of(row): row["roofline"] for row in result.rows if row["roofline"] is not None}
    lines = []
    for case in cases_of(result.rows):
        if case in found:
            flops, moved, floor = (found[case][name] for name in ("flops", "bytes", "floor_ms"))
            numbers = [number(value) for value in (flops / 1e9, moved / 1e6, flops / moved)]
            lines.append([str(case), *numbers, "no ceiling" if floor is None else number(floor)])
    return table(["case", "GFLOP", "least MB", "FLOPs a byte", "floor, ms"], lines)

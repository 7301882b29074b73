"""The README's tables of whole networks, providers down and batches across: their times, and their memory and host time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.reading import Result, Row, case_of, cases_of, headline, our_provider, row_percent
from benchmarks.tables.markdown import bold_if, folded, number, partly_folded, per_cent, plain, spread, table
from benchmarks.tables.remarks import what_is_bold
from benchmarks.tables.rows import OPEN_DTYPES, all_cases, group_name, grouped, no_time
from googlenet_fused.bench import BASELINE, Case, Mode

TITLES: dict[Mode, str] = {
    "inference": "**Whole network, inference**, ms a call",
    "training": "**Whole network, training step** (forward, loss, backward, SGD with momentum), ms a step",
}


def network_tables(result: Result, mode: Mode) -> list[str]:
    """A table for each variant and dtype, with a line before them on how to read them."""
    cases = [case for case in all_cases(result) if case.mode == mode and not case.is_module]
    rows = [row for row in result.rows if case_of(row) in cases]
    if not rows:
        return []
    ours = our_provider(result)
    with_graph = any(headline(row) == "graph" for row in rows)
    found = []
    for group in grouped(cases):
        of_table = [row for row in rows if case_of(row) in group]
        if of_table:
            first = group[0]
            name = f"{first.subject}, {first.dtype}, {first.side}x{first.side}"
            text = _provider_table(name, group, of_table, ours, lambda row, bold: _times_cell(row, bold, with_graph))
            found.append((first.subject == cases[0].subject and first.dtype in OPEN_DTYPES, name, text))
    graph = " Device time in a replayed CUDA graph; below, eager wall time." if with_graph else ""
    return [
        f"{TITLES[mode]}: median (20th to 80th percentile), speed against PyTorch in the same run, % of the roofline."
        f"{graph}{what_is_bold(ours)}",
        *partly_folded(found),
    ]


def _provider_table(
    name: str, cases: Sequence[Case], rows: Sequence[Row], ours: str | None, cell: Callable[[Row, bool], str]
) -> str:
    """Providers down, batches across; ``cell`` gets rows that have a time, and whether they are ours."""
    run = {case_of(row) for row in rows}
    lines = []
    for provider, title in {row["provider"]: row["title"] for row in rows}.items():
        by_case = {case_of(row): row for row in rows if row["provider"] == provider}
        if all(row["status"] == "unavailable" for row in by_case.values()):
            continue
        bold = provider == ours
        cells = [bold_if(bold, plain(title))]
        for case in cases:
            row = by_case.get(case)
            if row is None:
                cells.append("–" if case in run else "not run")
            else:
                cells.append(cell(row, bold) if headline(row) is not None else no_time(row))
        lines.append(cells)
    return table([name, *(f"batch {case.batch}" for case in cases)], lines)


def _times_cell(row: Row, bold: bool, with_graph: bool) -> str:
    if not with_graph:
        return _time(row, "wall", bold)
    if "graph" not in row["timings"]:
        return f"no graph<br>wall {_time(row, 'wall', bold)}"
    graph = _time(row, "graph", bold)
    return f"{graph}<br>wall {number(row['timings']['wall']['median'])}" if "wall" in row["timings"] else graph


def _time(row: Row, metric: str, bold: bool) -> str:
    """Median (spread), speed against the baseline, and where the metric is the headline % of the roofline."""
    median, _, rest = spread(row["timings"][metric]).partition(" ")
    said = f"{bold_if(bold, median)} {rest}"
    if row["provider"] != BASELINE and metric in row["speedup"]:
        said += " " + bold_if(bold, f"{row['speedup'][metric]:.2f}x")
    percent = row_percent(row)
    return f"{said}, {per_cent(percent)}" if metric == headline(row) and percent is not None else said


def memory_and_host(result: Result) -> list[str]:
    """Peak memory and host time, folded; nothing if neither was measured."""
    found = []
    for group in grouped([case for case in cases_of(result.rows) if not case.is_module]):
        rows = [row for row in result.rows if case_of(row) in group]
        if any(row["peak_mib"] is not None or "host" in row["timings"] for row in rows):
            found.append(_provider_table(group_name(group[0]), group, rows, our_provider(result), _memory_cell))
    words = "Whole networks: peak memory in MiB, and where it was measured the time in ms until a call returns to the host"
    return [folded(words, found)] if found else []


def _memory_cell(row: Row, bold: bool) -> str:
    said = []
    if row["peak_mib"] is not None:
        said.append(f"{row['peak_mib']:.0f} MiB")
    if "host" in row["timings"]:
        said.append(f"host {number(row['timings']['host']['median'])}")
    return bold_if(bold, ", ".join(said)) if said else "–"

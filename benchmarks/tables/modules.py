"""The README's tables of the nine modules on our backend, modules down and batches across, with what it is compared to."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.reading import (
    MODULES,
    Against,
    Result,
    Row,
    against_fastest,
    case_of,
    geometric_mean,
    headline,
    is_other_runtime,
    is_pytorch_peer,
    our_provider,
    row_percent,
)
from benchmarks.tables.markdown import bold_if, number, partly_folded, per_cent, plain, table
from benchmarks.tables.rows import OPEN_DTYPES, all_cases, no_time
from googlenet_fused.bench import Case

PEERS = {"its fastest way": is_pytorch_peer, "the fastest runtime": is_other_runtime}
"""Whom ours is compared with besides plain PyTorch, by what they are called in the line of means."""


def module_tables(result: Result) -> list[str]:
    """A table for each dtype, with a line before them on how to read them."""
    cases = [case for case in all_cases(result) if case.is_module]
    rows = [row for row in result.rows if case_of(row).is_module]
    ours = our_provider(result)
    title = next((row["title"] for row in rows if row["provider"] == ours), None)
    if title is None:
        return []
    found = []
    for dtype in dict.fromkeys(case.dtype for case in cases):
        of_dtype = [row for row in rows if case_of(row).dtype == dtype]
        if of_dtype:
            text = _module_table(dtype, [case for case in cases if case.dtype == dtype], of_dtype, str(ours))
            found.append((dtype in OPEN_DTYPES, dtype, text))
    with_graph = any(headline(row) == "graph" for row in rows)
    graph = "device time in a replayed CUDA graph" if with_graph else "wall time"
    by_wall = " Where the other has no CUDA graph both are compared by wall time." if with_graph else ""
    return [
        f"**The nine modules, inference**, the paper's form (5x5, biases): {plain(title)}, median ms a call ({graph}), speed "
        "against PyTorch, % of the roofline; below, speed against the fastest other way of running PyTorch and, where one was "
        f"measured, against the fastest other runtime.{by_wall}",
        *partly_folded(found),
    ]


def _module_table(dtype: str, cases: Sequence[Case], rows: Sequence[Row], ours: str) -> str:
    own = {case_of(row): row for row in rows if row["provider"] == ours}
    run = {case_of(row) for row in rows}
    batches = sorted({case.batch for case in cases})
    modules = [name for name in MODULES if any(case.subject == name for case in cases)]
    lines = []
    for name in modules:
        cells = [name]
        for batch in batches:
            case = next((case for case in cases if (case.subject, case.batch) == (name, batch)), None)
            row = None if case is None else own.get(case)
            if row is None:
                cells.append("not run" if case is not None and case not in run else "–")
            else:
                cells.append(_module_cell(row, rows) if headline(row) is not None else no_time(row))
        lines.append(cells)
    means = [_mean_cell([row for case, row in own.items() if case.batch == batch], rows, len(modules)) for batch in batches]
    return table([dtype, *(f"batch {batch}" for batch in batches)], [*lines, ["geometric mean", *means]])


def _module_cell(row: Row, rows: Sequence[Row]) -> str:
    metric = str(headline(row))
    said = f"**{number(row['timings'][metric]['median'])}**"
    if metric in row["speedup"]:
        said += f" **{row['speedup'][metric]:.2f}x**"
    percent = row_percent(row)
    if percent is not None:
        said += f", {per_cent(percent)}"
    compared = [against_fastest(row, rows, which) for which in PEERS.values()]
    return "<br>".join([said, *(_against(comparison, metric) for comparison in compared if comparison is not None)])


def _against(comparison: Against, metric: str) -> str:
    by = "" if comparison.metric == metric else f" ({comparison.metric})"
    return f"{comparison.ratio:.2f}x {plain(comparison.title)}{by}"


def _mean_cell(own: Sequence[Row], rows: Sequence[Row], modules: int) -> str:
    """Geometric means of the speeds, each over the modules that have one; how many those are is said where some lack it."""
    timed = [row for row in own if headline(row) is not None]
    ratios = {"PyTorch": [row["speedup"][headline(row)] for row in timed if headline(row) in row["speedup"]]}
    for words, which in PEERS.items():
        compared = [against_fastest(row, rows, which) for row in timed]
        ratios[words] = [comparison.ratio for comparison in compared if comparison is not None]
    said = []
    for words, values in ratios.items():
        if values:
            of = "" if len(values) == modules else f" (of {len(values)})"
            said.append(f"{bold_if(words == 'PyTorch', f'{geometric_mean(values):.2f}x')} {words}{of}")
    return "<br>".join(said) or "–"

"""An audit on the terminal: a table for each kernel, by architecture or with every variant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from benchmarks.audit.limits import KIB, LIMITS
from benchmarks.audit.rows import Row, name_of

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = ("registers", "spilled", "shared, KiB", "matrix units", "loads", "stores", "cp.async", "TMA", "PDL", "findings")
"""Bytes a thread: spilled, and the widths of global accesses, narrowest to widest."""


def print_audit(rows: Sequence[Row], found: Sequence[Row], details: bool, console: Console) -> None:
    """Prints a table for each kernel: the worst of all variants on an architecture a line, or with ``details`` each variant."""
    from rich import box
    from rich.table import Table

    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        table = Table(title=kernel, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for column in ("", *COLUMNS):
            left = column in ("", "matrix units")
            table.add_column(column, justify="left" if left else "right", no_wrap=column == "", overflow="fold")
        groups: dict[str, list[Row]] = {}
        for row in rows:
            if row["kernel"] == kernel:
                groups.setdefault(f"{row['label']}, {row['dtype']}, {row['arch']}" if details else row["arch"], []).append(row)
        for name, group in groups.items():
            names = {name_of(row) for row in group}
            count = sum(name_of(finding) in names for finding in found)
            table.add_row(name if details else f"{name} ({len(group)})", *_cells(group), str(count or ""))
        console.print(table)


def _cells(rows: Sequence[Row]) -> list[str]:
    """All columns but the last, of rows of one kernel and architecture."""
    compiled = [row for row in rows if "registers" in row]
    if not compiled:
        return [""] * (len(COLUMNS) - 1)
    shared = max(row["shared"] + row["dynamic_shared"] for row in compiled)
    limit = LIMITS[compiled[0]["arch"]].shared
    matrix = dict.fromkeys(name for row in compiled for name in row["matrix"] or ["FMA"])
    return [
        str(max(row["registers"] for row in compiled)),
        str(max(row["spill_stores"] + row["spill_loads"] for row in compiled) or ""),
        f"{shared / KIB:.4g} of {limit // KIB}",
        ", ".join(matrix),
        *(_range(row[f"{way}_bytes"] for row in compiled) for way in ("load", "store", "copy")),
        *("yes" if any(row[field] for row in compiled) else "" for field in ("tma", "griddepcontrol")),
    ]


def _range(widths: Iterable[dict[str, int]]) -> str:
    """From the narrowest to the widest access."""
    sizes = sorted({int(size) for counts in widths for size in counts})
    return "–".join(map(str, dict.fromkeys([*sizes[:1], *sizes[-1:]])))

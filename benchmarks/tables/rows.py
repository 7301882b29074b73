"""What tables ask of rows: in which groups they stand, and what is in the place of a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.reading import Result, Row, cases_of
from googlenet_fused.bench import Case

OPEN_DTYPES = ("fp32", "bf16")
"""The tables of other dtypes are folded away in the README."""


def all_cases(result: Result) -> list[Case]:
    """Also those that were not run."""
    return cases_of([*result.rows, *result.data["not_run"]])


def grouped(cases: Sequence[Case]) -> list[list[Case]]:
    """Cases that differ in their batch only, together."""
    groups: dict[Case, list[Case]] = {}
    for case in cases:
        groups.setdefault(replace(case, batch=1), []).append(case)
    return list(groups.values())


def group_name(case: Case) -> str:
    side = "" if case.is_module else f", {case.side}x{case.side}"
    return f"{case.subject}, {case.dtype}, {case.mode}{' step' if case.mode == 'training' else ''}{side}"


def no_time(row: Row) -> str:
    return "–" if row["status"] == "unavailable" else str(row["status"])

"""What charts take from a result's rows: which of them, in which groups, and a provider's values along an axis."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.reading import Row, case_of, headline
from googlenet_fused.bench import DTYPES


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


def timed(rows: Iterable[Row]) -> list[Row]:
    """The rows of inference that have a time."""
    return [row for row in rows if headline(row) is not None and case_of(row).mode == "inference"]


def by_dtype_and_batch(rows: Iterable[Row]) -> dict[tuple[str, int], list[Row]]:
    """Rows in groups: dtypes in the order of `DTYPES`, the smallest batch first."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        case = case_of(row)
        groups.setdefault((case.dtype, case.batch), []).append(row)
    return {key: groups[key] for key in sorted(groups, key=lambda key: (list(DTYPES).index(key[0]), key[1]))}


def ends(batches: Iterable[int]) -> set[int]:
    """The smallest and the largest: what a chart has room for."""
    found = set(batches)
    return {min(found), max(found)} if found else found


def title_of(rows: Iterable[Row]) -> str:
    return str(next(iter(rows))["title"])

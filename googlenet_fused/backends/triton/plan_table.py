"""The user's own table of plans, which ``googlenet-fused tune`` writes: one file in the user's cache folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from googlenet_fused.backends.triton import plans
from googlenet_fused.backends.triton.plans import Entry
from googlenet_fused.user_files import ANOTHER, cache_folder, read_json, write_json

logger = logging.getLogger("googlenet_fused")

FORMAT = 1
"""Of the file: ``{"format": 1, "entries": [...]}``, the entries as ``Entry.to_json`` has them."""

FORGET = "googlenet-fused tune --forget removes it"
"""The remedy where the user's own table is damaged."""


def user_table() -> Path:
    """The file of the user's own table.

    Raises:
        OSError: nobody knows the user's home folder.
    """
    return cache_folder() / "triton-plans.json"


@cache
def user_entries() -> tuple[Entry, ...]:
    """The user's own table, read once; of one that cannot be read or trusted a warning is given, and nothing is taken."""
    try:
        return read_table(user_table())
    except (OSError, ValueError) as error:
        logger.warning("the user's table of plans is not used: %s", error)
        return ()


def forget_user_entries() -> None:
    """Has the user's table read again, because it was written or removed."""
    user_entries.cache_clear()
    plans._plan_for.cache_clear()


def read_table(path: Path, *, named: bool = False) -> tuple[Entry, ...]:
    """The entries of a table: none if there is no such file.

    Args:
        named: it is not the user's own table but a file that they named, whoever may write to it (``user_files.read_json``).

    Raises:
        OSError: the file cannot be read, or others may have written it (``user_files.UnsafeFile``).
        ValueError: it is no table; names the file, the entry and the field.
    """
    try:
        table = read_json(path, remedy=FORGET, named=named)
    except ValueError as error:
        if named:
            raise ValueError(f"{path} is no table of plans: {ANOTHER}") from error
        raise
    if table is None:
        return ()
    try:
        return _entries(table)
    except ValueError as error:
        raise ValueError(
            f"{path} is no table of plans: {error}: {ANOTHER}" if named else f"{path}: {error}: {FORGET}"
        ) from error


def _entries(table: Any) -> tuple[Entry, ...]:
    if not isinstance(table, Mapping) or table.keys() != {"format", "entries"} or not isinstance(table["entries"], list):
        raise ValueError("it must hold a format and a list of entries")
    if type(table["format"]) is not int or table["format"] != FORMAT:
        raise ValueError(f"it has format {table['format']!r}, and only {FORMAT} is known here")
    entries = []
    for index, data in enumerate(table["entries"]):
        try:
            entries.append(Entry.from_json(data))
        except ValueError as error:
            raise ValueError(f"entry {index}: {error}") from error
    return tuple(entries)


def add_to_table(path: Path, entries: Sequence[Entry], *, named: bool = False) -> None:
    """Adds entries to a table, in place of those that it has of the same problems.

    Args:
        named: as for ``read_table``.

    Raises:
        OSError: the file cannot be read or written, or others may write to it or to its folder (``user_files.UnsafeFile``).
        ValueError: it is no table; names the file, the entry and the field.
    """
    merged = {entry.key: entry for entry in (*read_table(path, named=named), *entries)}
    write_json(path, {"format": FORMAT, "entries": [merged[key].to_json() for key in sorted(merged)]}, named=named)

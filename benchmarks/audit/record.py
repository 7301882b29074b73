"""The audit's file: one run for each version of each compiler, a row a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.audit.compile import AuditError
from benchmarks.audit.rows import NAME, Row, name_of

KIND = "audit"
LISTS = ("rows", "findings", "simulated")
COMPILERS = ("triton", "nvcc")
Run = Mapping[str, Any]
"""The compiler and its version, ``nvcc`` say; ``ptxas``, ``commit``, ``dirty``, ``date``, ``rows`` and ``findings``, each of
these a row's name and a text; of nvcc's kernels also what was counted when they were ``simulated``."""


def read(path: Path) -> list[Run]:
    """The runs in a file; none if there is no file.

    Raises:
        AuditError: it is not an audit's.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        runs = data["runs"] if data["kind"] == KIND else None
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise AuditError(f"{path} cannot be read as an audit ({error}): remove it or name another --output") from error
    if runs is None:
        raise AuditError(f"{path} is of kind {data['kind']!r}, not {KIND!r}: name another --output")
    return list(runs)


def write(path: Path, run: Run) -> None:
    """Puts a run into a file, in place of one by the same version of its compiler; the file is written whole or not at all.

    Raises:
        AuditError: the file holds something else.
    """
    runs = sorted([run, *(other for other in read(path) if compiler_of(other) != compiler_of(run))], key=_version)
    beside = path.with_name(path.name + ".new")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text(_text(runs), encoding="utf-8")
    os.replace(beside, path)


def compiler_of(run: Run) -> tuple[str, str]:
    """Its name and version."""
    return next((name, run[name]) for name in COMPILERS if name in run)


def _version(run: Run) -> tuple[int, list[int]]:
    name, version = compiler_of(run)
    return COMPILERS.index(name), [int(part) for part in version.split("+")[0].split(".") if part.isdigit()]


def _text(runs: Sequence[Run]) -> str:
    return f'{{"kind": "{KIND}", "runs": {_lines(map(_run_text, runs))}}}\n'


def _run_text(run: Run) -> str:
    head = json.dumps({name: value for name, value in run.items() if name not in LISTS})
    lists = (f'"{name}": {_lines(map(json.dumps, run[name]))}' for name in LISTS if name in run)
    return f"{head[:-1]}, {', '.join(lists)}}}"


def _lines(entries: Iterable[str]) -> str:
    """A JSON array with an entry a line."""
    return "[\n" + ",\n".join(entries) + "\n]"


def differences(old: Run, new: Run, whole: bool) -> Iterator[str]:
    """How the rows and findings of two runs differ; unless the new one is ``whole``, those that it lacks are passed over."""
    before, after = _by_name(old), _by_name(new)
    for name in {**after, **(before if whole else {})}:
        if name not in before:
            yield f"{name}: not recorded"
        elif name not in after:
            yield f"{name}: recorded, but not there any more"
        elif before[name] != after[name]:
            yield f"{name}: {_change(before[name], after[name])}"


def _by_name(run: Run) -> dict[str, Row]:
    rows = {name_of(row): {**row, "findings": []} for row in run["rows"]}
    for finding in run["findings"]:
        rows[name_of(finding)]["findings"].append(finding["finding"])
    return rows


def _change(before: Row, after: Row) -> str:
    fields = [field for field in {**before, **after} if field not in NAME and before.get(field) != after.get(field)]
    return ", ".join(f"{field} {before.get(field)} -> {after.get(field)}" for field in fields)

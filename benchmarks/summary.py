"""What a run of ``gpu.sh`` found, in a few lines, from the files it wrote: ``python -m benchmarks.summary FOLDER``.

Nothing here imports torch or this package, so that a summary can be had where they do not work, and in no time.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

OURS = "fused_"
"""What the names of this package's providers begin with."""

NETWORKS = ("torchvision", "bvlc")
"""The subjects that are whole networks; all others are modules."""

HEADLINES = ("graph", "wall")
"""The metrics that rows are compared by, ms a call: the first that both have."""

WIDTH = 128
LINES = 26
NAMED = 3
"""How many failures, of a kind, are named one by one."""

OF_THE_MACHINE = ("probe", "device", "arch", "multiprocessors", "max_sm_clock_mhz", "triton")
"""Fields of a probe's line that are left out: its name, which comes first, and what the machine's own line says."""

Key = tuple[str, int, str, str, int]


class Duel(NamedTuple):
    """The fastest of ours against the fastest other provider on one case, by ``metric``, in ms a call."""

    subject: str
    batch: int
    dtype: str
    mode: str
    metric: str
    ours: str
    ours_ms: float
    other: str
    other_ms: float

    @property
    def ratio(self) -> float:
        """How often faster ours is; below 1 it is slower."""
        return self.other_ms / self.ours_ms

    @property
    def is_network(self) -> bool:
        return self.subject in NETWORKS


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive values, of which there must be one."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def _median(row: Mapping[str, Any], metric: str) -> float | None:
    """The row's median in ms, if it is a time."""
    timing = (row.get("timings") or {}).get(metric) or {}
    median = timing.get("median")
    return float(median) if isinstance(median, int | float) and math.isfinite(median) and median > 0 else None


def _key(case: Mapping[str, Any]) -> Key:
    return str(case["subject"]), int(case["batch"]), str(case["dtype"]), str(case["mode"]), int(case["side"])


def duels(results: Mapping[str, Any]) -> list[Duel]:
    """Every case of a result file in which both sides have a time by one metric, in the file's order.

    Only rows that are ok take part, whatever times they carry.
    """
    cases: dict[Key, list[Mapping[str, Any]]] = {}
    for row in results["rows"]:
        cases.setdefault(_key(row["case"]), []).append(row)
    found = []
    for (subject, batch, dtype, mode, _), rows in cases.items():
        for metric in HEADLINES:
            timed = [(_median(row, metric), str(row["provider"])) for row in rows if row["status"] == "ok"]
            times = [(median, name) for median, name in timed if median is not None]
            ours = [time for time in times if time[1].startswith(OURS)]
            others = [time for time in times if not time[1].startswith(OURS)]
            if ours and others:
                (ours_ms, our_name), (other_ms, other_name) = min(ours), min(others)
                found.append(Duel(subject, batch, dtype, mode, metric, our_name, ours_ms, other_name, other_ms))
                break
    return found


def _names(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _cells(contests: Sequence[Duel], *, times: bool) -> Iterator[str]:
    for batch in sorted({duel.batch for duel in contests}):
        here = [duel for duel in contests if duel.batch == batch]
        mean = f"b{batch} {geometric_mean(duel.ratio for duel in here):.2f}x"
        yield f"{mean} {here[0].ours_ms:.3g}" if times else f"{mean} ({len(here)})"


def _table(contests: Sequence[Duel]) -> Iterator[str]:
    """A line for each network, dtype and mode; one for all modules of a dtype and mode together."""
    groups: dict[tuple[str, str, str], list[Duel]] = {}
    for duel in contests:
        groups.setdefault((duel.subject if duel.is_network else "modules", duel.dtype, duel.mode), []).append(duel)
    for (subject, dtype, mode), group in sorted(groups.items(), key=lambda item: (item[0][2], item[0][0] == "modules")):
        label = f"{subject} {dtype}{'' if mode == 'inference' else ' ' + mode}"
        cells = "  ".join(_cells(group, times=subject != "modules"))
        yield f"  {label:<22} {cells}   {_names(d.ours for d in group)} against {_names(d.other for d in group)}"
    for title, of in (("networks", True), ("modules", False)):
        for mode in sorted({duel.mode for duel in contests}):
            ratios = [duel.ratio for duel in contests if duel.is_network is of and duel.mode == mode]
            if ratios:
                cases = "1 case" if len(ratios) == 1 else f"{len(ratios)} cases"
                yield f"  geometric mean, {title}, {mode}: {geometric_mean(ratios):.2f}x over {cases}"


def result_lines(results: Mapping[str, Any]) -> list[str]:
    """Ours against the fastest other provider, what was wrong or failed, what was not there and what was not run."""
    rows: Sequence[Mapping[str, Any]] = results["rows"]
    cases = len({_key(row["case"]) for row in rows})
    git = results.get("git") or {}
    commit = f", commit {str(git['commit'])[:9]}{', changed since' if git.get('dirty') else ''}" if git.get("commit") else ""
    lines = [f"results: {cases} {'case' if cases == 1 else 'cases'}, {len(rows)} rows{commit}"]
    for status in ("wrong", "failed"):
        bad = [row for row in rows if row["status"] == status]
        for row in bad[:NAMED]:
            subject, batch, dtype, mode, _ = _key(row["case"])
            where = f"{row['provider']} on {subject}, batch {batch}, {dtype}, {mode}"
            lines.append(f"  {status.upper()}: {where}: {row.get('reason')}")
        if len(bad) > NAMED:
            lines.append(f"  {status.upper()}: {len(bad) - NAMED} more rows")
    contests = duels(results)
    if contests:
        metrics = _names(duel.metric for duel in contests)
        lines.append(
            f"  our fastest against the fastest other: speed-up (above 1x ours is faster), and ms of networks, {metrics}"
        )
        lines += _table(contests)
    else:
        lines.append("  no case has a time of ours and one of another provider")
    missing: dict[str, str] = {}
    for row in rows:
        if row["status"] == "unavailable":
            missing.setdefault(str(row["provider"]), str(row.get("reason")))
    lines += [f"  unavailable: {name}: {reason}" for name, reason in list(missing.items())[:NAMED]]
    if len(missing) > NAMED:
        lines.append(f"  unavailable, too: {_names(list(missing)[NAMED:])}")
    not_run = results.get("not_run") or []
    if not_run:
        lines.append(f"  not run: {len(not_run)} {'case' if len(not_run) == 1 else 'cases'}: {not_run[0].get('reason')}")
    return lines


def count_lines(report: str) -> list[str]:
    """The counts of a JUnit report (its text), and the names of the first tests that failed."""
    cases = list(ElementTree.fromstring(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None and case not in failed]
    passed = len(cases) - len(failed) - len(skipped)
    lines = [f"tests: {passed} passed, {len(failed)} failed, {len(skipped)} skipped"]
    lines += [f"  FAILED: {case.get('classname')}.{case.get('name')}" for case in failed[:NAMED]]
    if len(failed) > NAMED:
        lines.append(f"  FAILED: {len(failed) - NAMED} more")
    return lines


def _digest(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many rows of a probe there are and are right, and the best of those by the first figure they have."""
    text = f"{len(rows)}"
    if "right" in rows[0]:
        right = [row for row in rows if row.get("right")]
        text = f"{len(right)} of {len(rows)} right"
        rows = right
    figures = [name for name in (rows[0] if rows else {}) if name.endswith(("_per_s", "_ns", "_ns_per_kernel"))]
    if not figures:
        return text
    (figure, *_), pick = figures, max if figures[0].endswith("_per_s") else min
    best = pick(rows, key=lambda row: float(row[figure]))
    apart = [
        f"{key} {value}"
        for key, value in best.items()
        if isinstance(value, int | str) and len({str(row.get(key)) for row in rows}) > 1
    ]
    return f"{text}, best {figure} {float(best[figure]):.4g}{' at ' + ' '.join(apart) if apart else ''}"


def probe_lines(report: str) -> list[str]:
    """At most two lines for each probe of ``probes.jsonl`` (its text): its words and figures, and the best of each list."""
    lines: list[str] = []
    for text in filter(str.strip, report.splitlines()):
        try:
            found = json.loads(text)
        except json.JSONDecodeError:
            found = None
        if not isinstance(found, dict):
            lines.append(f"probe: not a line of JSON: {text}")
            continue
        parts = []
        for name, value in found.items():
            if name in OF_THE_MACHINE or (name, value) in (("ok", True), ("quick", False)):
                continue
            if isinstance(value, list):
                parts += [f"{name}: {_digest(value)}"] if value and all(isinstance(row, dict) for row in value) else []
            elif not isinstance(value, dict):
                parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
        words = f"probe {found.get('probe', '?')}: {', '.join(parts)}"
        lines += textwrap.wrap(words, WIDTH, subsequent_indent="  ", max_lines=2, placeholder="...", break_on_hyphens=False)
    return lines


def summarize(folder: Path) -> list[str]:
    """All that is to be said of the files in ``folder``; a file that is missing or broken gets a line that says so."""
    lines: list[str] = []
    for name, read in (
        ("tests.xml", count_lines),
        ("results.json", lambda text: result_lines(json.loads(text))),
        ("probes.jsonl", probe_lines),
    ):
        try:
            lines += read((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            if name == "results.json":
                lines.append("results: none, nothing was measured")
        except (OSError, ValueError, SyntaxError, KeyError, TypeError, AttributeError) as error:
            lines.append(f"{name} cannot be read: {type(error).__name__}: {error}")
    return lines


def fit(lines: Sequence[str], most: int) -> list[str]:
    """At most ``most`` lines, each cut to `WIDTH` columns; says how many were left out."""
    one_line = [" ".join(line.split()) if "\n" in line else line for line in lines]
    short = [line if len(line) <= WIDTH else line[: WIDTH - 3] + "..." for line in one_line]
    return short if len(short) <= most else [*short[: most - 1], f"and {len(short) - most + 1} lines more"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the summary of a folder; 0, whatever it holds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.summary", description=__doc__)
    parser.add_argument("folder", type=Path, help="gpu.sh's output folder")
    parser.add_argument("--lines", type=int, default=LINES, help="print at most so many lines (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    print(*fit(summarize(chosen.folder), max(chosen.lines, 1)), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Probe E3: the best PyTorch peer of every case that `python -m benchmarks.run` measured.

Measures nothing: it reads a result file (schema 3) and prints one JSON line with, for every case (module or network, batch,
dtype, mode, side), the fastest provider that is plain PyTorch, its ms a call, and its percent of the roofline. Providers are
compared by the same metric: "graph" (device time of a replayed CUDA graph) where any of them has it, else "wall". Rows that
are not "ok" do not count.

Exit status: 0, or 2 with one line on stderr when the file cannot be read as a result file.
Run: python benchmarks/probes/e3_peers.py benchmarks/results/FILE.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

SCHEMA = 3
CASE_KEYS = ("subject", "batch", "dtype", "mode", "side")
METRICS = ("graph", "wall")


def is_pytorch(provider: str) -> bool:
    """Whether `provider` is PyTorch alone: not this project's code, and no other runtime."""
    return provider in {"eager", "channels_last", "merged_cudnn"} or provider.startswith("compile_")


def read_rows(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The result file at `path` and its rows. Raises ValueError with the reason when it is not a result file of schema 3."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give a file of benchmarks/results") from error
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error}); give a file that `python -m benchmarks.run` wrote") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{path}: schema is {found!r}, expected {SCHEMA}; give a file that `python -m benchmarks.run` wrote")
    rows = data.get("rows")
    if not isinstance(rows, list):
        raise ValueError(f"{path}: has no list of rows; give a file that `python -m benchmarks.run` wrote")
    for index, row in enumerate(rows):
        case = row.get("case") if isinstance(row, dict) else None
        if not isinstance(case, dict) or any(key not in case for key in CASE_KEYS) or not isinstance(row.get("provider"), str):
            raise ValueError(
                f"{path}: row {index} lacks a provider or a case with {', '.join(CASE_KEYS)}; run the benchmark again"
            )
    return data, rows


def median(row: dict[str, Any], metric: str) -> float | None:
    """The median of `metric` in ms in this row, or None where it was not measured."""
    value = ((row.get("timings") or {}).get(metric) or {}).get("median")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) and value > 0 else None


def best_peer(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest PyTorch provider among the rows of one case; its fields are None where there is none."""
    peers = [row for row in rows if is_pytorch(row["provider"]) and row.get("status") == "ok"]
    for metric in METRICS:
        timed = [(ms, row) for row in peers if (ms := median(row, metric)) is not None]
        if timed:
            ms, row = min(timed, key=lambda pair: pair[0])
            percent = (row.get("roofline") or {}).get("percent")
            return {"provider": row["provider"], "metric": metric, "ms": ms, "percent_of_roofline": percent}
    return {"provider": None, "metric": None, "ms": None, "percent_of_roofline": None}


def main(arguments: list[str] | None = None) -> int:
    """Prints the JSON line and returns the exit status."""
    parser = argparse.ArgumentParser(description="The best PyTorch peer of every case in a result file, as one JSON line.")
    parser.add_argument("file", type=Path, help="a JSON file that `python -m benchmarks.run` wrote")
    path = parser.parse_args(arguments).file
    try:
        data, rows = read_rows(path)
    except ValueError as error:
        print(f"e3_peers: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(tuple(row["case"][key] for key in CASE_KEYS), []).append(row)
    peers = [dict(zip(CASE_KEYS, case, strict=True)) | best_peer(case_rows) for case, case_rows in cases.items()]
    machine = data.get("machine") or {}
    name = (machine.get("gpu") or {}).get("name") or machine.get("cpu")
    print(json.dumps({"probe": "E3", "ok": True, "device": name, "git": data.get("git"), "peers": peers}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

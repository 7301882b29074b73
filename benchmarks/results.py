"""Result files: what one holds besides its rows, how it is written, and when two may become one."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.reading import KIND, SCHEMA
from benchmarks.roofline import Ceilings, counts, floor_ms, percent
from googlenet_fused import __version__, bench, info
from googlenet_fused.bench import Case

FOLDER = Path(__file__).parent / "results"
RUNTIMES = ("torch", "torchvision", "triton", "numpy", "onnx", "onnxruntime", "openvino", "tensorrt", "torch_tensorrt")
GENERATED = ("benchmarks/results", "docs", "README.md")
ONE_RUN = ("device", "machine", "versions", "git")
"""The fields that must be the same for rows to stand in one file."""


def new_result(device: str, git: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A result without rows, of this machine."""
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "device": device,
        "created": now(),
        "machine": bench.machine_description(),
        "versions": versions(),
        "git": git,
        "settings": dict(settings),
        "clocks": [],
        "ceilings": {"copy_gb_per_s": None, "arithmetic_tflop_per_s": {}},
        "rows": [],
        "not_run": [],
    }


def versions() -> dict[str, str | None]:
    """Of everything that a timing may depend on; ``None`` for what is not here."""
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {
        "googlenet_fused": __version__,
        **{name: info.distribution_version(name) for name in RUNTIMES},
        "cuda_runtime": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
    }


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit and whether files differ from it, those apart that a measurement itself writes.

    ``None`` outside a git checkout, without git, or before the first commit.
    """
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--", ":/", *(f":(top,exclude){path}" for path in GENERATED))
        return {"commit": commit.strip(), "dirty": bool(changes.strip())}
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True).stdout


def read_clocks() -> dict[str, Any] | None:
    """The GPU's clocks, temperature and power as nvidia-smi reads them now; ``None`` where it does not."""
    fields = {
        "sm_mhz": "clocks.sm",
        "memory_mhz": "clocks.mem",
        "temperature_c": "temperature.gpu",
        "power_w": "power.draw",
    }
    command = ["nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    values = [_number(value) for value in text.splitlines()[0].split(",")] if text.strip() else []
    return {"time": now(), **dict(zip(fields, values, strict=True))} if len(values) == len(fields) else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None


def file_name(result: Mapping[str, Any]) -> str:
    """``cpu-amd-epyc-2-threads.json`` or ``cuda-nvidia-h100-80gb-hbm3.json``: a file for each machine."""
    machine = result["machine"]
    if result["device"] == "cuda":
        return f"cuda-{_slug(machine['gpu']['name'])}.json"
    name = re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b|@.*", " ", machine["cpu"], flags=re.IGNORECASE)
    return f"cpu-{_slug(name)}-{machine['threads']}-threads.json"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def check_writable(path: Path) -> None:
    """Makes sure that ``path`` can be written before anything is measured for it.

    Raises:
        ValueError: it cannot.
    """
    beside = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.touch()
        beside.unlink()
    except OSError as error:
        raise ValueError(f"--output: {path} cannot be written: {error.strerror}; name another") from error


def write(result: Mapping[str, Any], path: Path) -> None:
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def check_same_run(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Whether rows of both may stand in one file or table.

    Raises:
        ValueError: they were measured on different machines, with different versions or at different commits.
    """
    for name in ONE_RUN:
        if first[name] != second[name]:
            raise ValueError(f"results of different runs must not be mixed: {name} is {_differing(first[name], second[name])}")
    trial, other = (result["settings"].get("quick", False) for result in (first, second))
    if trial != other:
        raise ValueError("results of different runs must not be mixed: one is a trial (--quick) and the other is not")


def _differing(first: Any, second: Any) -> str:
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        name = next(key for key in [*first, *second] if first.get(key) != second.get(key))
        return f"{name}: {_differing(first.get(name), second.get(name))}"
    return f"{first!r} in one and {second!r} in the other"


def add_rows(result: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds rows; a case measured again replaces all rows that it had."""
    again = [row["case"] for row in rows]
    result["rows"] = [row for row in result["rows"] if row["case"] not in again] + list(rows)
    result["not_run"] = [entry for entry in result["not_run"] if entry["case"] not in again]


def add_not_run(result: dict[str, Any], cases: Sequence[Case], reason: str) -> None:
    """Records why cases have no rows, in place of any earlier reason; a case that has rows is left as it is."""
    left = [asdict(case) for case in cases]
    done = [row["case"] for row in result["rows"]]
    result["not_run"] = [entry for entry in result["not_run"] if entry["case"] not in left]
    result["not_run"] += [{"case": case, "reason": reason} for case in left if case not in done]


def merge(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several results of one run as one, later ones over earlier ones.

    Raises:
        ValueError: there are none, or they are of different runs.
    """
    if not results:
        raise ValueError("merge: results must hold at least one, got none")
    merged = json.loads(json.dumps(results[0]))
    for result in results[1:]:
        check_same_run(merged, result)
        add_rows(merged, result["rows"])
        for entry in result["not_run"]:
            add_not_run(merged, [Case(**entry["case"])], entry["reason"])
        merged["settings"] = both_settings(merged["settings"], result["settings"])
        merged["clocks"] = [*merged["clocks"], *result["clocks"]]
        add_ceilings(merged, Ceilings.from_json(result["ceilings"]))
    return merged


def both_settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The first's, with the providers of both."""
    names = dict.fromkeys([*first.get("providers", ()), *second.get("providers", ())])
    return {**first, "providers": list(names)} if names else dict(first)


def add_ceilings(result: dict[str, Any], measured: Ceilings) -> None:
    """Raises a result's ceilings to those measured, where these are higher, and sets its rows' rooflines by them."""
    known = result["ceilings"]
    ceilings = measured.or_better(Ceilings.from_json(known)) if known["copy_gb_per_s"] else measured
    result["ceilings"] = ceilings.to_json()
    result["rows"] = [{**row, "roofline": roofline(row, ceilings)} for row in result["rows"]]


def roofline(row: Mapping[str, Any], ceilings: Ceilings) -> dict[str, Any]:
    """What a row's case needs at least, in how long, and how many per cent of that its headline time reaches."""
    case, timings = bench.Case(**row["case"]), row["timings"]
    needed = counts(case)
    floor = floor_ms(needed, ceilings, case.dtype)
    reached = percent(timings[bench.headline(list(timings))]["median"], floor) if timings else None
    return {**asdict(needed), "floor_ms": None if floor is None else floor.ms, "percent": reached}

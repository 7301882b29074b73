"""What a result file says, checked, and how its rows compare: the report and its charts read results through this module only.

Rows are the JSON's own objects, after every field that the report uses has been checked. Times are ms a call.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

from googlenet_fused import bench
from googlenet_fused.bench import BASELINE, DTYPES, METRICS, NETWORKS, OURS, Case, Mode, Status
from googlenet_fused.spec import GOOGLENET_SPECS

SCHEMA = 3
KIND = "benchmark"
PYTORCH_PEERS = ("channels_last", "compile_", "merged_cudnn")
"""What the names of the other ways of running PyTorch begin with; all further providers are other runtimes."""

DEVICES = ("cpu", "cuda")
UNFINISHED = ".partial.json"
"""What the name of a run's file ends with until all is measured."""
MODULES = tuple(GOOGLENET_SPECS)
MODES = get_args(Mode)
STATUSES = get_args(Status)
HEADLINES = ("graph", "wall")
"""The metrics that a row can be judged by."""

Row = Mapping[str, Any]

KINDS: Mapping[type, str] = {dict: "object", list: "array", str: "string", float: "number", int: "number", type(None): "null"}
"""JSON's words for Python's types."""


class ReportError(Exception):
    """The report cannot be made; the message is one line."""


@dataclass(frozen=True)
class Result:
    """One run on one machine. ``digest`` is of the file's bytes, so that a chart can be told from a stale one."""

    path: Path
    digest: str
    data: Mapping[str, Any]
    rows: Sequence[Row]

    @property
    def stem(self) -> str:
        return self.path.stem

    @property
    def device(self) -> str:
        return str(self.data["device"])

    @property
    def machine(self) -> str:
        """The machine in a few words: what tables and charts are headed with."""
        return machine_name(self.data)


class Against(NamedTuple):
    """How often faster a row is than that of ``title``, by ``metric``; below 1 it is slower."""

    ratio: float
    title: str
    metric: str


def read(folder: Path) -> list[Result]:
    """All benchmark results in a folder, by name; JSON files that say to be of another kind are passed over.

    Raises:
        ReportError: a file is not a result, or not named like one; the message names the file and the fault.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith(UNFINISHED) or _is_of_another_kind(path):
            continue
        result = read_file(path)
        if not path.name.startswith(f"{result.device}-"):
            raise ReportError(f"{path} must be named {result.device}-*.json: rename it, or take it in with --add")
        found.append(result)
    return found


def _is_of_another_kind(path: Path) -> bool:
    if path.name.startswith(tuple(f"{device}-" for device in DEVICES)):
        return False
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and data.get("kind", KIND) != KIND


def read_file(path: Path) -> Result:
    """One result file.

    Raises:
        ReportError: it cannot be read or is not a result; the message names the file and the fault.
    """
    try:
        content = path.read_bytes()
        data = json.loads(content)
        _check(data)
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ReportError(f"{path} is not JSON: {error}") from error
    except _Fault as fault:
        raise ReportError(f"{path} is not a result of benchmarks.run: {fault}") from fault
    return Result(path, hashlib.sha256(content).hexdigest(), data, data["rows"])


class _Fault(Exception):
    """What is wrong with a result file, and where in it."""


def _field(of: Any, name: str, kind: type | tuple[type, ...], where: str = "") -> Any:
    """``of[name]``, which must be of ``kind``; ``where`` is the path of ``of``, with a dot at its end."""
    if not isinstance(of, dict):
        raise _Fault(f"{where.rstrip('.') or 'the file'} must be an object, got {type(of).__name__}")
    if name not in of:
        raise _Fault(f"{where}{name} is missing")
    value = of[name]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join(dict.fromkeys(KINDS.get(k, k.__name__) for k in kinds))
        raise _Fault(f"{where}{name} must be {names}, got {value!r:.60}")
    return value


def _choice(of: Any, name: str, choices: Sequence[str], where: str) -> str:
    value = _field(of, name, str, where)
    if value not in choices:
        raise _Fault(f"{where}{name} must be one of {', '.join(choices)}, got {value!r}")
    return str(value)


def _positive(of: Any, name: str, where: str) -> float:
    value = _field(of, name, (int, float), where)
    if not (math.isfinite(value) and value > 0):
        raise _Fault(f"{where}{name} must be positive and finite, got {value!r}")
    return float(value)


def _spread(of: Any, name: str, where: str) -> None:
    """A median with its percentiles, in order."""
    _field(of, name, dict, where)
    inner = f"{where}{name}."
    low, median, high = (_positive(of[name], key, inner) for key in ("p20", "median", "p80"))
    _positive(of[name], "n", inner)
    if not low <= median <= high:
        raise _Fault(f"{inner}median must lie between p20 and p80, got {low:g}, {median:g}, {high:g}")


def _check(data: Any) -> None:
    schema = _field(data, "schema", int)
    if schema != SCHEMA:
        raise _Fault(f"schema {schema} is not {SCHEMA}: measure again with python -m benchmarks.run --replace")
    _choice(data, "kind", (KIND,), "")
    device = _choice(data, "device", DEVICES, "")
    _field(data, "created", str)
    machine = _field(data, "machine", dict)
    for name in ("cpu", "isa", "os", "python"):
        _field(machine, name, str, "machine.")
    _positive(machine, "threads", "machine.")
    gpu = _field(machine, "gpu", dict if device == "cuda" else (dict, type(None)), "machine.")
    if device == "cuda":
        for name in ("name", "arch"):
            _field(gpu, name, str, "machine.gpu.")
        _field(gpu, "driver", (str, type(None)), "machine.gpu.")
    _field(data, "versions", dict)
    git = _field(data, "git", (dict, type(None)))
    if git is not None:
        _field(git, "commit", str, "git.")
        _field(git, "dirty", (bool, type(None)), "git.")
    _field(data, "settings", dict)
    _field(data, "clocks", list)
    ceilings = _field(data, "ceilings", dict)
    _spread(ceilings, "copy_gb_per_s", "ceilings.")
    for dtype in _field(ceilings, "arithmetic_tflop_per_s", dict, "ceilings."):
        _spread(ceilings["arithmetic_tflop_per_s"], dtype, "ceilings.arithmetic_tflop_per_s.")
    seen: dict[tuple[Case, str], int] = {}
    for index, row in enumerate(_field(data, "rows", list)):
        where = f"rows[{index}]."
        _check_row(row, where)
        key = (case_of(row), row["provider"])
        if key in seen:
            raise _Fault(f"rows[{seen[key]}] and rows[{index}] are both {row['provider']} on {key[0]}")
        seen[key] = index
    for index, entry in enumerate(_field(data, "not_run", list)):
        _check_case(entry, f"not_run[{index}].")
        _field(entry, "reason", str, f"not_run[{index}].")


def _check_case(of: Any, where: str) -> None:
    case = _field(of, "case", dict, where)
    where += "case."
    _choice(case, "subject", (*NETWORKS, *MODULES), where)
    _choice(case, "dtype", list(DTYPES), where)
    _choice(case, "mode", MODES, where)
    for name in ("batch", "side"):
        _field(case, name, int, where)
        _positive(case, name, where)


def _check_row(row: Any, where: str) -> None:
    _check_case(row, where)
    for name in ("provider", "title"):
        _field(row, name, str, where)
    status = _choice(row, "status", STATUSES, where)
    reason = _field(row, "reason", (str, type(None)), where)
    timings = _field(row, "timings", dict, where)
    for metric in timings:
        if metric not in METRICS:
            raise _Fault(f"{where}timings.{metric} is none of {', '.join(METRICS)}")
        _spread(timings, metric, f"{where}timings.")
    if status == "ok" and headline(row) is None:
        raise _Fault(
            f"{where}timings must hold {' or '.join(HEADLINES)} where status is ok, got {', '.join(timings) or 'none'}"
        )
    if status != "ok" and (timings or not reason):
        raise _Fault(f"{where}status {status} needs a reason and no timings")
    speedup = _field(row, "speedup", dict, where)
    for metric in speedup:
        if metric not in timings:
            raise _Fault(f"{where}speedup.{metric} has no timing")
        _positive(speedup, metric, f"{where}speedup.")
    for name in ("peak_mib", "max_error", "rms_error"):
        _field(row, name, (int, float, type(None)), where)
    roofline = _field(row, "roofline", (dict, type(None)), where)
    if roofline is not None:
        for name in ("flops", "bytes"):
            _positive(roofline, name, f"{where}roofline.")
        for name in ("floor_ms", "percent"):
            if _field(roofline, name, (int, float, type(None)), f"{where}roofline.") is not None:
                _positive(roofline, name, f"{where}roofline.")


def case_of(row: Row) -> Case:
    """The case of a row, or of an entry of ``not_run``."""
    case = row["case"]
    return Case(case["subject"], case["batch"], case["dtype"], case["mode"], case["side"])


def lost(old: Iterable[Row], new: Iterable[tuple[Case, str]]) -> list[str]:
    """The rows of ``old``, each in words, whose case and provider are not among ``new``."""
    kept = set(new)
    return [f"{row['provider']} on {case_of(row)}" for row in old if (case_of(row), row["provider"]) not in kept]


def cases_of(rows: Iterable[Row]) -> list[Case]:
    """The cases of rows, each once: networks before modules, then by batch, in the order of `DTYPES`."""
    subjects = (*NETWORKS, *MODULES)
    return sorted(
        {case_of(row) for row in rows},
        key=lambda case: (
            MODES.index(case.mode),
            subjects.index(case.subject),
            list(DTYPES).index(case.dtype),
            case.batch,
            case.side,
        ),
    )


def machine_name(data: Mapping[str, Any]) -> str:
    """The GPU; or the processor and its threads."""
    machine = data["machine"]
    if data["device"] == "cuda":
        return str(machine["gpu"]["name"])
    threads = int(machine["threads"])
    return f"{machine['cpu']}, {threads} thread{'s' if threads > 1 else ''}"


def machine_key(data: Mapping[str, Any]) -> tuple[object, ...]:
    """What must be equal for figures to stand in one table."""
    machine = data["machine"]
    gpu = machine["gpu"] if data["device"] == "cuda" else {}
    return (
        data["device"],
        *(machine[name] for name in ("cpu", "isa", "threads", "os")),
        *(gpu.get(name) for name in ("name", "arch", "driver")),
    )


def headline(row: Row) -> str | None:
    """The metric that a row is judged by; ``None`` if it has no time."""
    metric = bench.headline(list(row["timings"]))
    return metric if metric in row["timings"] else None


def row_percent(row: Row) -> float | None:
    """% of the roofline."""
    return None if row["roofline"] is None else row["roofline"]["percent"]


def is_ours(provider: str) -> bool:
    return provider.startswith(OURS)


def is_pytorch_peer(provider: str) -> bool:
    return provider.startswith(PYTORCH_PEERS)


def is_other_runtime(provider: str) -> bool:
    return provider != BASELINE and not is_ours(provider) and not is_pytorch_peer(provider)


def our_provider(result: Result) -> str | None:
    """The provider that stands for this package: what ``auto`` chooses here, never whichever came out fastest.

    A file that does not say what ``auto`` chooses gets its last ``fused_*`` provider, as automatic choice prefers the backend
    registered last.
    """
    auto = result.data["settings"].get("auto_backend")
    if auto is not None:
        return f"{OURS}{auto}"
    return next((row["provider"] for row in reversed(result.rows) if is_ours(row["provider"])), None)


def against(ours: Row, other: Row) -> Against | None:
    """Our row against another of the same case, by our headline metric or, if the other lacks it, by wall time."""
    for metric in dict.fromkeys((headline(ours), "wall")):
        if metric in ours["timings"] and metric in other["timings"]:
            ratio = other["timings"][metric]["median"] / ours["timings"][metric]["median"]
            return Against(ratio, other["title"], str(metric))
    return None


def against_fastest(ours: Row, others: Iterable[Row], which: Callable[[str], bool]) -> Against | None:
    """Our row against the provider it compares worst with, among those of the same case that ``which`` admits by name."""
    found = [against(ours, row) for row in others if case_of(row) == case_of(ours) and which(row["provider"])]
    return min((comparison for comparison in found if comparison is not None), default=None)


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean of positive numbers, at least one."""
    return math.exp(math.fsum(math.log(value) for value in values) / len(values))


def one(results: Sequence[Result]) -> Result:
    """Results of one machine as one, so that they can stand in one table.

    Raises:
        ReportError: they are of two machines, or cannot be merged for another reason; the message names both.
    """
    first, *others = results
    for other in others:
        if machine_key(other.data) != machine_key(first.data):
            raise ReportError(
                f"{first.path.name} is of {_identity(first)} and {other.path.name} of {_identity(other)}: "
                "figures of two machines do not go into one table"
            )
    if not others:
        return first
    data = _merged(results)
    digest = hashlib.sha256("".join(result.digest for result in results).encode()).hexdigest()
    return Result(first.path, digest, data, data["rows"])


def _identity(result: Result) -> str:
    return ", ".join(str(part) for part in machine_key(result.data) if part is not None)


def _merged(results: Sequence[Result]) -> Mapping[str, Any]:
    from benchmarks.results import merge

    try:
        merged: Mapping[str, Any] = merge([result.data for result in results])
    except ValueError as error:
        raise ReportError(f"{' and '.join(str(result.path) for result in results)} do not merge: {error}") from error
    return merged


def by_machine(results: Iterable[Result]) -> list[Result]:
    """One result for each machine, in the order of the files.

    Raises:
        ReportError: two files of one machine cannot be merged.
    """
    groups: dict[tuple[object, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(machine_key(result.data), []).append(result)
    return [one(group) for group in groups.values()]

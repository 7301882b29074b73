"""Measures providers on a workload: built, judged, then timed in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from googlenet_fused.bench.case import Case, Workload, numerics
from googlenet_fused.bench.gate import judge_all
from googlenet_fused.bench.meters import METRICS, Meter, failure, headline, meter_for
from googlenet_fused.bench.provider import BASELINE, Bind, Provider, Unavailable, WrongResult
from googlenet_fused.bench.timing import Schedule, Timing, Turn, take_turns
from googlenet_fused.messages import first_line

Status = Literal["ok", "wrong", "failed", "unavailable"]
"""Timed; off the true result; ended in an error; cannot run here."""
Progress = Callable[[str, float], None]
"""Told what is being done and how much of the case is done, from 0 to 1."""


@dataclass(frozen=True)
class Row:
    """One provider on one case.

    Attributes:
        reason: why there is no time, or why some metric is missing.
        timings: by metric (`bench.meters`).
        speedup: by metric, the baseline's median over this one's in the same run.
        peak_mib: memory at a call's peak over what was held before the provider was built: its own copies of the parameters,
            what it made of them, and the call's activations, but not the plain model.
        max_error: the largest against the fp64 truth, relative to its largest value; ``rms_error`` likewise root mean square.
    """

    case: Case
    provider: str
    title: str
    status: Status
    reason: str | None = None
    timings: Mapping[str, Timing] = field(default_factory=dict)
    speedup: Mapping[str, float] = field(default_factory=dict)
    peak_mib: float | None = None
    max_error: float | None = None
    rms_error: float | None = None

    @property
    def timing(self) -> Timing | None:
        """Of the headline metric."""
        return self.timings.get(headline(list(self.timings)))

    def to_json(self) -> dict[str, Any]:
        return {
            "case": asdict(self.case),
            "provider": self.provider,
            "title": self.title,
            "status": self.status,
            "reason": self.reason,
            "timings": {metric: timing.to_json() for metric, timing in self.timings.items()},
            "speedup": dict(self.speedup),
            "peak_mib": self.peak_mib,
            "max_error": self.max_error,
            "rms_error": self.rms_error,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        timings = {metric: Timing.from_json(timing) for metric, timing in data["timings"].items()}
        rest = {name: data[name] for name in ("provider", "title", "status", "reason", "peak_mib", "max_error", "rms_error")}
        return cls(case=Case(**data["case"]), timings=timings, speedup=data["speedup"], **rest)


@dataclass
class _Entry:
    """A provider on its way through `measure`."""

    provider: Provider
    status: Status = "ok"
    reason: str | None = None
    bind: Bind | None = None
    peak_mib: float | None = None

    def failed(self, status: Status, reason: str) -> None:
        self.status, self.reason, self.bind = status, reason, None


def measure(
    workload: Workload,
    providers: Sequence[Provider],
    schedule: Schedule,
    *,
    meter: Meter | None = None,
    progress: Progress = lambda what, done: None,
) -> list[Row]:
    """Builds, judges and times providers on one workload; rows come in the order of ``providers``.

    A provider that fails has its failure for a row, and no time.

    Args:
        providers: the one named `BASELINE` must be among them.
        meter: of the workload's device, unless another is given.
        progress: told what is going on.

    Raises:
        ValueError: the baseline is missing.
        Unavailable: the baseline cannot run the case, so there is nothing to compare with.
        DeviceBroken: a provider left the device unusable.
    """
    if BASELINE not in [provider.name for provider in providers]:
        raise ValueError(f"measure: providers must include the baseline {BASELINE!r}, got {[p.name for p in providers]}")
    meter = meter or meter_for(workload.device)
    entries = [_Entry(provider) for provider in providers]
    inference = workload.case.mode == "inference"
    mode: AbstractContextManager[object] = torch.inference_mode() if inference else nullcontext()
    with mode, numerics(workload.case.dtype):
        for at, entry in enumerate(entries):
            progress(f"building {entry.provider.title}", 0.3 * at / len(entries))
            _build(entry, workload, meter)
        progress("checking against fp64", 0.3)
        verdicts = judge_all(workload, [(entry.provider, entry.bind) for entry in entries if entry.bind], meter)
        for entry in entries:
            if entry.provider.name in verdicts.failures:
                entry.failed(*verdicts.failures[entry.provider.name])
        timings = _time(entries, workload, schedule, meter, progress)
    rows = []
    baseline = timings.get(BASELINE, {})
    for entry in entries:
        provider, judged = entry.provider, verdicts.worst.get(entry.provider.name)
        row = Row(workload.case, provider.name, provider.title, entry.status, entry.reason)
        if entry.status == "ok" and judged is not None:
            own = timings[provider.name]
            speedup = {metric: baseline[metric].median / own[metric].median for metric in own if metric in baseline}
            row = Row(
                workload.case,
                provider.name,
                provider.title,
                "ok",
                entry.reason,
                own,
                speedup,
                entry.peak_mib,
                judged.max_error,
                judged.rms_error,
            )
        rows.append(row)
    return rows


def _build(entry: _Entry, workload: Workload, meter: Meter) -> None:
    """Builds, makes the first calls, and sees how much memory one takes."""
    try:
        before = meter.memory.held()
        with entry.provider.settings():
            entry.bind = entry.provider.build(workload)
            run = entry.bind(workload.input(seed=0))
            run()
            peak = meter.memory.peak(run)
        entry.peak_mib = None if before is None or peak is None else max(0.0, (peak - before) / 2**20)
    except Unavailable as reason:
        if entry.provider.name == BASELINE:
            raise
        entry.failed("unavailable", str(reason))
    except WrongResult as fault:
        entry.failed("wrong", str(fault))
    except Exception as error:  # a provider that breaks is its own result, and the others go on
        if entry.provider.name == BASELINE:
            raise Unavailable(f"plain PyTorch cannot run {workload.case} here: {first_line(error)}") from error
        entry.failed("failed", failure(error))
        meter.check(entry.provider.title)


def _time(
    entries: Sequence[_Entry], workload: Workload, schedule: Schedule, meter: Meter, progress: Progress
) -> dict[str, dict[str, Timing]]:
    """By provider and metric."""
    turns: dict[tuple[str, str], Turn] = {}
    lasted = 0.0
    for entry in entries:
        if entry.bind is None:
            continue
        progress(f"warming up {entry.provider.title}", 0.4)
        provider = entry.provider
        try:
            with provider.settings():
                own, missing = meter.turns(entry.bind, workload.input, schedule, own_graph=provider.own_graph)
        except Exception as error:  # it was right and broke all the same: the others go on
            entry.failed("failed", failure(error))
            meter.check(provider.title)
            continue
        entry.reason = "; ".join(missing) or None
        for metric, turn in own.items():
            within = _within(entry, turn, meter)
            start = time.perf_counter()
            if schedule.seconds is not None:
                within()
            lasted += time.perf_counter() - start
            turns[provider.name, metric] = within
    rounds = schedule.rounds_within(lasted)
    total, done = rounds * len(turns), 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress("timing", 0.5 + 0.5 * done / total)

    samples = take_turns(turns, rounds, advance=advance)
    names = [entry.provider.name for entry in entries if entry.bind is not None]
    return {name: {m: Timing.of(samples[name, m]) for m in METRICS if (name, m) in samples} for name in names}


def _within(entry: _Entry, turn: Turn, meter: Meter) -> Turn:
    """A turn in its provider's settings; one that breaks ends the provider's part."""

    def run() -> Sequence[float]:
        if entry.bind is None:
            return []
        try:
            with entry.provider.settings():
                return turn()
        except Exception as error:
            entry.failed("failed", failure(error))
            meter.check(entry.provider.title)
            return []

    return run

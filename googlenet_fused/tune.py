"""Finds the fastest plan of the Triton backend for a problem by trying: every candidate is judged, then timed against the best.

Coordinate descent from the plan that is in use: along one field of the plan after another, round after round until one gains
nothing. In the end the plan found and the one in use are timed against each other once more, and that decides.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from googlenet_fused.backends import registry
from googlenet_fused.backends.registry import Backend
from googlenet_fused.backends.triton.backend import device_facts
from googlenet_fused.backends.triton.plans import (
    ARITHMETICS,
    DTYPES,
    FORMS,
    SPATIAL,
    Arithmetic,
    Entry,
    Plan,
    Request,
    configurations_for,
    hopper_or_later,
    plan_for,
    use_plan,
)
from googlenet_fused.bench import Schedule, meter_for, numerics, take_turns
from googlenet_fused.bench.gate import FRESH_INPUTS
from googlenet_fused.bench.meters import Meter
from googlenet_fused.bench.timing import Turn
from googlenet_fused.blocks import Inception
from googlenet_fused.messages import first_line
from googlenet_fused.packing import ConvParams, pack_inception
from googlenet_fused.randomize import randomize_
from googlenet_fused.spec import GOOGLENET_SIDES, GOOGLENET_SPECS, InceptionSpec
from googlenet_fused.tolerance import compare, references

logger = logging.getLogger("googlenet_fused")

SPREAD = 0.02
"""How much less time a plan must take than another to replace it: differences below that come and go."""

SCHEDULES = {"cuda": Schedule(rounds=200, calls=5), "cpu": Schedule(rounds=1, calls=1)}
"""The most that is timed of a plan, by the device; an interpreter's times mean nothing."""

COORDINATES = ("pointwise", "spatial", "form", "pointwise_tma", "spatial_tma", "pdl")
"""The fields of a plan in the order in which they are tried."""

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Problem:
    """A module with the batch and the side of its square images, and what is multiplied.

    Raises:
        ValueError: ``batch``, ``side`` or ``arithmetic`` is out of range.
    """

    spec: InceptionSpec
    batch: int
    side: int
    arithmetic: Arithmetic

    def __post_init__(self) -> None:
        for name in ("batch", "side"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if self.arithmetic not in ARITHMETICS:
            raise ValueError(f"arithmetic must be one of {', '.join(ARITHMETICS)}, got {self.arithmetic!r}")

    @classmethod
    def of_googlenet(cls, name: str, batch: int, arithmetic: Arithmetic, large_kernel: int = 5) -> Self:
        """One of the nine modules, with the side that its images have in a network of 224x224.

        Raises:
            ValueError: there is no such module; or as the class.
        """
        if name not in GOOGLENET_SPECS:
            raise ValueError(f"name must be one of {', '.join(GOOGLENET_SPECS)}, got {name!r}")
        return cls(replace(GOOGLENET_SPECS[name], large_kernel=large_kernel), batch, GOOGLENET_SIDES[name], arithmetic)

    def __str__(self) -> str:
        return f"{_name(self.spec)} {self.side}x{self.side}, batch {self.batch}, {self.arithmetic}"


def _name(spec: InceptionSpec) -> str:
    """GoogLeNet's name for a module, or its widths; and the third branch's kernel if that is not the paper's."""
    kernel = "" if spec.large_kernel == 5 else f" with {spec.large_kernel}x{spec.large_kernel}"
    of_paper = replace(spec, large_kernel=5)
    names = [name for name, known in GOOGLENET_SPECS.items() if known == of_paper]
    return (names[0] if names else "-".join(map(str, [*spec][:-1]))) + kernel


@dataclass(frozen=True)
class Outcome:
    """What came of a problem.

    Attributes:
        entry: for the table; None if no plan runs, for ``reason``.
        before_ms: a call by the plan that was in use, which is None if that does not run; ``after_ms`` by the entry's.
        skipped: how many candidates do not compile, or take more of the device than there is.
        wrong: the candidates whose results were wrong, with how they were. Each is a defect of the kernels or of Triton.
    """

    problem: Problem
    entry: Entry | None = None
    before_ms: float | None = None
    after_ms: float | None = None
    skipped: int = 0
    wrong: tuple[str, ...] = ()
    reason: str | None = None

    @property
    def gain(self) -> float | None:
        """How many times as fast the module has become."""
        return None if self.before_ms is None or self.after_ms is None else self.before_ms / self.after_ms

    def __str__(self) -> str:
        if self.entry is None:
            return f"{self.problem}: {self.reason}"
        return f"{self.problem}: {_ms(self.before_ms)} -> {_ms(self.after_ms)} ms"

    def to_json(self) -> dict[str, Any]:
        return {
            "problem": str(self.problem),
            "entry": self.entry and self.entry.to_json(),
            "before_ms": self.before_ms,
            "after_ms": self.after_ms,
            "gain": self.gain,
            "skipped": self.skipped,
            "wrong": list(self.wrong),
            "reason": self.reason,
        }


@dataclass(frozen=True, eq=False)
class Candidate:
    """A call of a module by one plan, which writes to the same ``out [n, out_channels, h, w]`` each time."""

    plan: Plan
    call: Callable[[Tensor], None]
    out: Tensor

    def __call__(self) -> Tensor:
        with use_plan(self.plan):
            self.call(self.out)
        return self.out


def tune(
    problems: Sequence[Problem],
    device: torch.device,
    *,
    seconds_each: float = 0.5,
    progress: Callable[[str, float], None] = lambda what, done: None,
    say: Callable[[str], None] = lambda message: None,
    done: Callable[[Outcome], None] = lambda outcome: None,
    meter: Meter | None = None,
) -> list[Entry]:
    """Finds the fastest plan for each problem. The plans in use are those from before the call, whatever ``done`` does.

    Args:
        device: a CUDA device; the CPU where Triton interprets kernels, whose times mean nothing.
        seconds_each: how long each candidate is timed against the best one before it.
        progress: told what is being done and how much of all is done, from 0 to 1.
        say: told, in one line, of each candidate that gives wrong results or does not run.
        done: given what came of a problem as soon as it is known.
        meter: of the device, unless another is given.

    Returns:
        An entry for each problem that some plan runs.

    Raises:
        BackendError: the backend cannot run one of the problems; nothing has been tried then.
        ValueError: ``seconds_each`` is negative.
        DeviceBroken: a candidate left the device unusable.
    """
    import triton

    for problem in problems:
        registry.select("triton", registry.Problem(device, DTYPES[problem.arithmetic], problem.spec))
    logger.info("%d problem%s to tune", len(problems), "" if len(problems) == 1 else "s")
    on_cuda = device.type == "cuda"
    if not on_cuda:
        say("the kernels are interpreted on the CPU (TRITON_INTERPRET=1): these times mean nothing")
    facts, gpu = device_facts(device), torch.cuda.get_device_properties(device).name if on_cuda else None
    requests = [Request(*facts, one.arithmetic, one.spec, one.batch, height=one.side, width=one.side) for one in problems]
    in_use = list(map(plan_for, requests))
    meter = meter or meter_for(device)
    schedule = replace(SCHEDULES[device.type], seconds=seconds_each)
    entries: list[Entry] = []
    for at, (problem, request, plan) in enumerate(zip(problems, requests, in_use, strict=True)):

        def within(what: str, part: float, at: int = at, problem: Problem = problem) -> None:
            progress(f"{problem}: {what}", (at + part) / len(problems))

        with torch.cuda.device(device) if on_cuda else nullcontext(), torch.no_grad(), numerics(problem.arithmetic):
            within("plain PyTorch", 0.0)
            try:
                module = _Module(problem, device)
            except RuntimeError as error:
                meter.check("plain PyTorch")
                outcome = Outcome(problem, reason=f"plain PyTorch cannot run it here: {first_line(error)}")
            else:
                search = _Search(problem, request, module, meter, schedule, within, say)
                outcome = search.outcome(plan, gpu, triton.__version__)
        if outcome.entry is not None:
            entries.append(outcome.entry)
        done(outcome)
    return entries


class _Module:
    """A problem's module with random parameters, and what its results are judged by."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        dtype, shape = DTYPES[problem.arithmetic], (problem.batch, problem.spec.in_channels, problem.side, problem.side)
        plain = randomize_(Inception.from_spec(problem.spec, norm=None)).eval().to(device, dtype)
        layers = [layer for layer in plain.modules() if isinstance(layer, nn.Conv2d)]
        self.backend: Backend = registry.get("triton")
        self.packed = pack_inception([ConvParams(layer.weight, layer.bias) for layer in layers], dtype)
        self.prepared = self.backend.prepare(self.packed, shape)
        self.judged_by = []
        for seed in range(FRESH_INPUTS):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
            x = x.contiguous(memory_format=torch.channels_last)
            self.judged_by.append((x, references(plain, x)))

    def candidate(self, plan: Plan, x: Tensor) -> Candidate:
        """A call on ``x``, whose output is full of NaN."""
        shape = (x.shape[0], self.packed.spec.out_channels, *x.shape[2:])
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last).fill_(torch.nan)
        return Candidate(plan, lambda out: self.backend.inception(x, self.packed, self.prepared, out), out)

    def judged(self, plan: Plan, meter: Meter) -> tuple[Candidate, str | None]:
        """A call by a plan, and how its results are wrong, or None: on each input, and as a CUDA graph on the last."""
        for x, truth in self.judged_by:
            candidate = self.candidate(plan, x)
            if not (comparison := compare(candidate(), *truth)).ok:
                return candidate, str(comparison)
        if (replay := meter.replayed(candidate)) is not None:
            candidate.out.fill_(torch.nan)
            if not (comparison := compare(replay(), *truth)).ok:
                return candidate, f"in a CUDA graph it {comparison}"
        return candidate, None


@dataclass
class _Search:
    """The search for one problem's plan."""

    problem: Problem
    request: Request
    module: _Module
    meter: Meter
    schedule: Schedule
    progress: Callable[[str, float], None]
    say: Callable[[str], None]
    tried: set[Plan] = field(default_factory=set)
    skipped: int = 0
    wrong: list[str] = field(default_factory=list)

    def outcome(self, before: Plan, gpu: str | None, triton: str) -> Outcome:
        """What comes of a search that starts from the plan in use."""
        from triton import TritonError

        before_turn = self.better(before, None)
        best, turn = self.descended(before, before_turn)
        found = Outcome(self.problem, skipped=self.skipped, wrong=tuple(self.wrong))
        if turn is None:
            return replace(found, reason="no plan runs here and gives right results")
        self.progress("once more", 1.0)
        try:
            ms = self.timed({best: turn} if before_turn is None else {before: before_turn, best: turn})
        except (TritonError, RuntimeError) as error:
            self.meter.check("the last timing")
            return replace(found, reason=f"the last timing failed: {_in_short(error)}")
        if before in ms and not _faster(ms[best], ms[before]):
            best = before
        asked = {name: value for name, value in vars(self.request).items() if name != "multiprocessors"}
        entry = Entry(**asked, plan=best, gpu=gpu, triton=triton)
        return replace(found, entry=entry, before_ms=ms.get(before), after_ms=ms[best])

    def descended(self, best: Plan, turn: Turn | None) -> tuple[Plan, Turn | None]:
        """The fastest plan to which steps along one coordinate at a time lead, and its turn; None if no plan runs."""
        expected = 2 * sum(len(_along(coordinate, best, self.request)) for coordinate in COORDINATES)
        improved = True
        while improved:
            improved = False
            for coordinate in COORDINATES:
                for plan in _along(coordinate, best, self.request):
                    if plan in self.tried:
                        continue
                    self.progress(str(plan), min(1.0, len(self.tried) / expected))
                    if (faster := self.better(plan, turn)) is not None:
                        best, turn, improved = plan, faster, True
        return best, turn

    def better(self, plan: Plan, best: Turn | None) -> Turn | None:
        """The turn of a plan that runs, is right and is faster than the best so far, if there is one; else None."""
        from triton import TritonError

        self.tried.add(plan)
        try:
            candidate, fault = self.module.judged(plan, self.meter)
            if fault is not None:
                self.wrong.append(f"{plan}: {fault}")
                self.say(f"{self.problem}: WRONG RESULTS by the plan {plan}: {fault}")
                return None
            turn = self.meter.turn(candidate, self.schedule.calls)
            ms = self.timed({"plan": turn, "best": best}) if best is not None else None
        except (TritonError, RuntimeError) as error:  # the latter from the compiler's passes and from the driver
            self.skipped += 1
            self.say(f"{self.problem}: skipped the plan {plan}: {type(error).__name__}: {_in_short(error)}")
            self.meter.check(f"the plan {plan}")
            return None
        return turn if ms is None or _faster(ms["plan"], ms["best"]) else None

    def timed(self, turns: Mapping[K, Turn]) -> dict[K, float]:
        """Median milliseconds of each, in turns for as long as the schedule says."""
        start = time.perf_counter()
        first = take_turns(turns, 1)
        rounds = self.schedule.rounds_within(time.perf_counter() - start)
        rest = take_turns(turns, rounds - 1)
        return {key: statistics.median(first[key] + rest[key]) for key in turns}


def _along(coordinate: str, plan: Plan, request: Request) -> list[Plan]:
    """The plans to which a step along one coordinate leads. The fused form has no descriptors in its spatial kernels."""
    configs, flags = configurations_for(request), (False, True) if hopper_or_later(request.arch) else ()
    values: dict[str, Any] = {
        "pointwise": configs["pointwise"],
        "spatial": configs[SPATIAL[plan.form]],
        "pointwise_tma": flags,
        "spatial_tma": flags,
        "pdl": flags,
    }
    if coordinate == "form":
        steps = [replace(plan, form=form, spatial=config) for form in FORMS for config in configs[SPATIAL[form]]]
    else:
        steps = [replace(plan, **{coordinate: value}) for value in values[coordinate]]
    return [step if step.form == "merged" else replace(step, spatial_tma=False) for step in steps]


def _faster(ms: float, than: float) -> bool:
    return ms < (1 - SPREAD) * than


def _in_short(error: Exception) -> str:
    """What Triton's compiler says of the place in a kernel that stopped it, or an error's first line."""
    said = getattr(error, "error_message", None)
    return first_line(RuntimeError(said)) if said else first_line(error)


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def outcomes_as_text(outcomes: Sequence[Outcome]) -> str:
    """A table for people: milliseconds a call, how many times as fast each module has become, and its plan."""
    rows: list[Sequence[str]] = [("problem", "before ms", "after ms", "gain", "plan")]
    for outcome in outcomes:
        plan = f"none: {outcome.reason}" if outcome.entry is None else str(outcome.entry.plan)
        ms = map(_ms, (outcome.before_ms, outcome.after_ms))
        rows.append((str(outcome.problem), *ms, "–" if outcome.gain is None else f"{outcome.gain:.2f}x", plan))
    return _aligned(rows, right=(1, 2, 3))


def entries_as_text(entries: Sequence[Entry]) -> str:
    """A table for people: problems, their plans, and where these were measured."""
    rows = [("problem", "arch", "plan", "measured on")]
    for entry in entries:
        problem = f"{_name(entry.spec)} {entry.height}x{entry.width}, batch {entry.batch}, {entry.arithmetic}"
        measured_on = [*filter(None, [entry.gpu, entry.triton and f"triton {entry.triton}"])]
        rows.append((problem, entry.arch, str(entry.plan), ", ".join(measured_on) or "–"))
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows as lines, in columns that are as wide as they must be; those numbered in ``right`` end flush."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = (
        [text.rjust(w) if at in right else text.ljust(w) for at, (text, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    )
    return "\n".join("  ".join(line).rstrip() for line in cells)

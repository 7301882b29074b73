"""Tuning: the search over plans with times that are made up, what candidates are judged by, and the command."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import TINY
from torch import Tensor

from googlenet_fused import tune as tuning
from googlenet_fused.backends import registry
from googlenet_fused.backends.triton import backend, plan_table, plans
from googlenet_fused.backends.triton.backend import arithmetic_of, interpreting
from googlenet_fused.backends.triton.plans import (
    FORMS,
    INTERPRETER,
    Config,
    Entry,
    Plan,
    Request,
    plan_for,
)
from googlenet_fused.bench import DeviceBroken, Schedule, numerics
from googlenet_fused.bench.meters import CpuMeter
from googlenet_fused.cli import main
from googlenet_fused.cli import tune as command
from googlenet_fused.spec import GOOGLENET_SIDES, GOOGLENET_SPECS
from googlenet_fused.tune import Outcome, Problem, _Module, _Search, entries_as_text, outcomes_as_text, tune

pytest.importorskip("triton")

import triton

interpreted = pytest.mark.skipif(not interpreting(), reason="Triton was not told to interpret")

CPU = torch.device("cpu")
PROBLEM = Problem.of_googlenet("4a", 8, "fp16")
REQUEST = Request("sm_90", 132, "fp16", PROBLEM.spec, 8, 14, 14)
CONFIGS = (
    *(Config(128, 128, 64, 8, 3), Config(128, 64, 64, 4, 3)),
    *(Config(64, 64, 64, 4, 3), Config(32, 32, 64, 4, 4)),
)
TODAY = Plan("merged", CONFIGS[3], CONFIGS[0], pointwise_tma=True, pdl=True)
SMALL = Problem(TINY, 2, 4, "fp32")


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of a user who has no table yet."""
    monkeypatch.setenv("GOOGLENET_FUSED_CACHE", str(tmp_path / "cache"))
    plan_table.forget_user_entries()
    yield tmp_path / "cache/triton-plans.json"
    plan_table.forget_user_entries()


# The search.


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The configurations that exist are ``CONFIGS``."""
    monkeypatch.setattr(plans, "configurations", lambda arithmetic: dict.fromkeys(plans.KERNELS, CONFIGS))


searching = pytest.mark.usefixtures("shipped")


@dataclass
class MadeUp:
    """Times and faults of plans, in place of a module and of a meter."""

    ms: Callable[[Plan], float]
    faults: Callable[[Plan], str | None] = lambda plan: None
    errors: Callable[[Plan], Exception | None] = lambda plan: None
    schedule: Schedule = field(default_factory=lambda: Schedule(rounds=3, calls=1))
    judged_plans: list[Plan] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    progress: list[tuple[str, float]] = field(default_factory=list)

    def judged(self, plan: Plan, meter: object) -> tuple[Any, str | None]:
        assert meter is self
        self.judged_plans.append(plan)
        if (error := self.errors(plan)) is not None:
            raise error
        return SimpleNamespace(plan=plan), self.faults(plan)

    def turn(self, candidate: Any, calls: int) -> Callable[[], list[float]]:
        return lambda: [self.ms(candidate.plan)] * calls

    def check(self, who: str) -> None:
        self.checked.append(who)

    def search(self, today: Plan = TODAY, request: Request = REQUEST) -> Outcome:
        module: Any = self
        search = _Search(
            PROBLEM, request, module, module, self.schedule, lambda *step: self.progress.append(step), self.said.append
        )
        return search.outcome(today, "a GPU", "3.8.0")


def every_plan(request: Request = REQUEST) -> list[Plan]:
    flags = (False, True) if request.arch == "sm_90" else (False,)
    product = itertools.product(FORMS, CONFIGS, CONFIGS, flags, flags, flags)
    return [Plan(*fields) for fields in product if fields[0] == "merged" or not fields[4]]


def separable(plan: Plan) -> float:
    """A time in which every field has a part of its own; that of ``FASTEST`` is 1."""
    parts = (
        1 + 0.1 * abs(CONFIGS.index(plan.pointwise) - 1),
        1 + 0.1 * abs(CONFIGS.index(plan.spatial) - 2),
        1.0 if plan.form == "fused" else 1.1,
        1.1 if plan.pointwise_tma else 1.0,
        1.1 if plan.pdl else 1.0,
    )
    return math.prod(parts)


FASTEST = Plan("fused", CONFIGS[1], CONFIGS[2])


@searching
def test_the_fastest_plan_is_found() -> None:
    made_up = MadeUp(separable)
    outcome = made_up.search()
    assert min(every_plan(), key=separable) == FASTEST
    assert outcome.entry == Entry("sm_90", "fp16", PROBLEM.spec, 8, 14, 14, FASTEST, "a GPU", "3.8.0")
    assert outcome.before_ms == separable(TODAY)
    assert outcome.after_ms == 1.0
    assert outcome.gain == separable(TODAY)
    assert (outcome.skipped, outcome.wrong, outcome.reason, made_up.said) == (0, (), None, [])
    assert len(made_up.judged_plans) == len(set(made_up.judged_plans)) < len(every_plan()) / 2
    shares = [share for _, share in made_up.progress]
    assert shares == sorted(shares)
    assert 0 <= shares[0] < shares[-1] == 1


@searching
@pytest.mark.parametrize("name", ["pointwise", "spatial", "form", "pointwise_tma", "spatial_tma", "pdl"])
def test_each_field_is_searched(name: str) -> None:
    """All plans but those with one value of one field are slow."""
    for value in {getattr(plan, name) for plan in every_plan()}:
        outcome = MadeUp(lambda plan, value=value: 0.5 if getattr(plan, name) == value else 1.0).search()  # type: ignore[misc]
        assert outcome.entry is not None
        assert getattr(outcome.entry.plan, name) == value
        expected = replace(TODAY, **{name: value})  # nothing that makes no difference is changed
        assert outcome.entry.plan == expected


@searching
def test_what_pays_only_together_with_a_later_field_is_found_in_another_round() -> None:
    ms = {("fused", CONFIGS[3]): 0.5, ("fused", CONFIGS[0]): 0.8, ("merged", CONFIGS[0]): 1.0}
    outcome = MadeUp(lambda plan: ms.get((plan.form, plan.spatial), 2.0)).search()
    assert outcome.entry is not None
    assert outcome.entry.plan == replace(TODAY, form="fused", spatial=CONFIGS[3])


@searching
@pytest.mark.parametrize(("arch", "at"), [("sm_80", 1), ("gfx942", 2)])
def test_before_hopper_there_are_no_descriptors_and_no_dependent_launches(arch: str, at: int) -> None:
    """And on the second arch the larger tiles do not fit."""
    request = replace(REQUEST, arch=arch)
    made_up = MadeUp(separable)
    outcome = made_up.search(Plan("merged", CONFIGS[3], CONFIGS[3]), request)
    assert outcome.entry is not None
    assert (outcome.entry.arch, outcome.entry.plan) == (arch, replace(FASTEST, pointwise=CONFIGS[at]))
    assert not any(plan.pointwise_tma or plan.spatial_tma or plan.pdl for plan in made_up.judged_plans)


@searching
def test_the_fused_form_is_not_tried_with_descriptors_that_it_does_not_have() -> None:
    made_up = MadeUp(lambda plan: (0.5 if plan.form == "fused" else 1.0) * (0.9 if plan.spatial_tma else 1.0))
    outcome = made_up.search(replace(TODAY, spatial_tma=True))
    assert outcome.entry is not None
    assert outcome.entry.plan == replace(TODAY, form="fused")
    assert not any(plan.form == "fused" and plan.spatial_tma for plan in made_up.judged_plans)


@searching
@pytest.mark.parametrize(("ms", "replaced"), [(0.985, False), (0.975, True)])
def test_a_gain_within_the_spread_is_none(ms: float, replaced: bool) -> None:
    outcome = MadeUp(lambda plan: ms if plan.form == "fused" else 1.0).search()
    assert outcome.entry is not None
    assert (outcome.entry.plan.form == "fused") is replaced
    assert (outcome.before_ms, outcome.after_ms) == (1.0, ms if replaced else 1.0)


@searching
def test_the_last_comparison_decides() -> None:
    """A plan that was fast only while it was first timed does not replace the one in use."""
    calls = itertools.count()

    def ms(plan: Plan) -> float:
        return 0.5 if plan.form == "fused" and next(calls) < 3 else 1.0

    made_up = MadeUp(ms)
    outcome = made_up.search()
    assert outcome.entry is not None
    assert outcome.entry.plan == TODAY
    assert outcome.before_ms == outcome.after_ms == 1.0
    assert any(plan.form == "fused" for plan in made_up.judged_plans)


@searching
def test_times_are_medians() -> None:
    calls = itertools.count()

    def ms(plan: Plan) -> float:
        if plan.form == "merged":
            return 1.0
        return 100.0 if next(calls) % 3 == 0 else 0.5

    outcome = MadeUp(ms).search()
    assert (outcome.before_ms, outcome.after_ms) == (1.0, 0.5)


@searching
def test_the_plans_take_turns_for_as_long_as_there_is_time() -> None:
    order: list[str] = []

    def ms(plan: Plan) -> float:
        order.append(plan.form)
        time.sleep(1e-3)
        return 1.0

    made_up = MadeUp(ms, schedule=Schedule(rounds=1000, calls=1, seconds=0.05))
    made_up.errors = lambda plan: None if plan in (TODAY, replace(TODAY, form="fused")) else RuntimeError("no")
    made_up.search()
    duel = order[: 2 * order.count("fused")]
    assert Schedule.FEWEST_ROUNDS <= duel.count("fused") == duel.count("merged") <= 25
    assert all(set(pair) == {"merged", "fused"} for pair in zip(duel[::2], duel[1::2], strict=True))
    assert len(set(zip(duel[::2], duel[1::2], strict=True))) == 2, "in an order drawn anew each time"


@searching
def test_what_does_not_compile_or_fit_is_skipped_and_counted() -> None:
    node: Any = SimpleNamespace(lineno=1, col_offset=0)
    errors = {
        CONFIGS[1]: triton.OutOfResources(300_000, 232_448, "shared memory"),
        CONFIGS[2]: triton.CompilationError("def kernel():", node, "no such\nthing"),
        CONFIGS[3]: RuntimeError("PassManager::run failed\nand more"),
    }
    made_up = MadeUp(separable, errors=lambda plan: errors.get(plan.spatial) if plan.pointwise == CONFIGS[1] else None)
    outcome = made_up.search()
    assert outcome.entry is not None
    assert outcome.entry.plan == replace(FASTEST, spatial=CONFIGS[0])
    # Three along the configurations and three in the other form, in each of two rounds.
    assert (outcome.skipped, outcome.wrong, outcome.reason) == (12, (), None)
    assert len(made_up.said) == len(made_up.checked) == 12
    words = itertools.cycle(
        [
            "OutOfResources: out of resource: shared memory, Required: 300000, Hardware limit: 232448. Reducing block sizes or "
            "`num_stages` may help.",
            "CompilationError: no such",
            "RuntimeError: PassManager::run failed",
        ]
    )
    for said, checked, why in zip(made_up.said, made_up.checked, words, strict=False):
        assert said == f"{PROBLEM}: skipped {checked}: {why}"


@searching
def test_a_plan_that_breaks_while_it_is_timed_is_skipped() -> None:
    def ms(plan: Plan) -> float:
        if plan.form == "fused":
            raise RuntimeError("Triton Error [CUDA]: out of memory")
        return 1.0

    outcome = MadeUp(ms).search()
    assert outcome.entry is not None
    assert outcome.entry.plan == TODAY
    assert outcome.skipped == len(CONFIGS)


@searching
@pytest.mark.parametrize("error", [RuntimeError("the launch timed out\nand more"), triton.OutOfResources(3, 2, "threads")])
def test_a_last_timing_that_breaks_is_the_reason_for_no_entry(error: Exception) -> None:
    def ms(plan: Plan) -> float:
        if made_up.progress[-1][0] == "once more":
            raise error
        return 1.0

    made_up = MadeUp(ms)
    outcome = made_up.search()
    assert outcome.entry is None
    assert outcome.reason == f"the last timing failed: {str(error).splitlines()[0]}"
    assert made_up.checked == ["the last timing"]


@searching
def test_a_plan_in_use_that_does_not_run_is_replaced_by_any_that_does() -> None:
    made_up = MadeUp(separable, errors=lambda plan: RuntimeError("no") if plan == TODAY else None)
    outcome = made_up.search()
    assert outcome.entry is not None
    assert outcome.entry.plan == FASTEST
    assert (outcome.before_ms, outcome.gain, outcome.skipped) == (None, None, 1)


@searching
def test_where_no_plan_runs_there_is_no_entry() -> None:
    outcome = MadeUp(separable, errors=lambda plan: RuntimeError("no")).search()
    assert outcome.entry is None
    assert outcome.reason == "no plan runs here and gives right results"
    assert outcome.skipped > 3


@searching
def test_a_wrong_plan_is_said_loudly_and_never_chosen() -> None:
    made_up = MadeUp(separable, faults=lambda plan: "disagrees: at 0" if plan.form == "fused" else None)
    outcome = made_up.search()
    assert outcome.entry is not None
    assert outcome.entry.plan.form == "merged"
    assert len(outcome.wrong) == len(made_up.said) == sum(plan.form == "fused" for plan in made_up.judged_plans) > 0
    for said, wrong in zip(made_up.said, outcome.wrong, strict=True):
        assert wrong.startswith("fused; ")
        assert wrong.endswith(": disagrees: at 0")
        assert said == f"{PROBLEM}: WRONG RESULTS by the plan {wrong}"
    assert made_up.checked == []
    assert outcome.skipped == 0


@searching
def test_a_defect_is_not_skipped() -> None:
    with pytest.raises(TypeError, match="a defect"):
        MadeUp(separable, errors=lambda plan: TypeError("a defect")).search()


@searching
def test_a_broken_device_ends_the_search() -> None:
    made_up = MadeUp(separable, errors=lambda plan: RuntimeError("illegal memory access") if plan != TODAY else None)

    def check(who: str) -> None:
        raise DeviceBroken(f"{who} broke the device")

    made_up.check = check  # type: ignore[method-assign]
    with pytest.raises(DeviceBroken, match=r"the plan merged; .* broke the device"):
        made_up.search()


# Problems.


def test_problems_in_words() -> None:
    assert str(PROBLEM) == "4a 14x14, batch 8, fp16"
    assert str(Problem.of_googlenet("5b", 1, "tf32", large_kernel=3)) == "5b with 3x3 7x7, batch 1, tf32"
    assert str(SMALL) == "5-3-4-6-2-3-5 4x4, batch 2, fp32"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Problem.of_googlenet("6a", 1, "fp16"), "name must be one of 3a, .*, 5b, got '6a'"),
        (lambda: replace(SMALL, batch=0), "batch must be at least 1, got 0"),
        (lambda: replace(SMALL, side=-1), "side must be at least 1, got -1"),
        (lambda: replace(SMALL, arithmetic="fp8"), "arithmetic must be one of fp16, bf16, tf32, fp32, got 'fp8'"),
        (lambda: Problem.of_googlenet("3a", 1, "fp16", large_kernel=4), "large_kernel must be 3 or 5, got 4"),
    ],
)
def test_a_problem_out_of_range_is_refused(make: Callable[[], Problem], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


# What candidates are judged by, and timed.


class Replays:
    """A meter without graphs, or with ``replay`` in the place of one."""

    def __init__(self, replay: Callable[[Any], Callable[[], Tensor]] | None = None) -> None:
        self.replay = replay

    def replayed(self, candidate: Any) -> Callable[[], Tensor] | None:
        return None if self.replay is None else self.replay(candidate)


def judged(module: _Module, plan: Plan, meter: Any = None) -> str | None:
    return module.judged(plan, meter or Replays())[1]


@interpreted
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arithmetic", ["fp16", "fp32"])
def test_a_right_candidate_passes(form: Any, arithmetic: Any) -> None:
    module = _Module(replace(SMALL, arithmetic=arithmetic), CPU)
    tile = Config(16, 16, 16, 4, 1)
    candidate, fault = module.judged(Plan(form, tile, tile), Replays())  # type: ignore[arg-type]
    assert fault is None
    out = candidate.out.clone()
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.shape == (2, TINY.out_channels, 4, 4)
    assert candidate.out.fill_(torch.nan) is candidate()
    assert torch.equal(candidate.out, out)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> _Module:
    """A module whose backend, in place of kernels, is torch's own operators."""
    module = _Module(SMALL, CPU)
    reference = registry.get("reference")
    monkeypatch.setattr(module, "backend", reference)
    monkeypatch.setattr(module, "prepared", reference.prepare(module.packed, (2, 5, 4, 4)))
    return module


def test_inputs_and_the_poisoned_output_are_fresh(module: _Module, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    right = module.backend.inception

    def inception(x: Tensor, packed: Any, prepared: Any, out: Tensor) -> None:
        assert out.isnan().all()
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert plan_for(REQUEST) == TODAY
        seen.append(x)
        right(x, packed, prepared, out)

    monkeypatch.setattr(module.backend, "inception", inception)
    assert judged(module, TODAY) is None
    assert len(seen) == 2
    assert not torch.equal(*seen)


def skips_an_element(right: Any) -> Any:
    def inception(x: Tensor, packed: Any, prepared: Any, out: Tensor) -> None:
        copy = torch.empty_like(out)
        right(x, packed, prepared, copy)
        out[:, :-1], out[:, -1, :-1], out[:, -1, -1, :-1] = copy[:, :-1], copy[:, -1, :-1], copy[:, -1, -1, :-1]

    return inception


def repeats_itself(right: Any) -> Any:
    first: list[Tensor] = []

    def inception(x: Tensor, packed: Any, prepared: Any, out: Tensor) -> None:
        right(x, packed, prepared, out)
        first.append(out.clone())
        out.copy_(first[0])

    return inception


@pytest.mark.parametrize(("wrong", "said"), [(skips_an_element, "it is nan where"), (repeats_itself, "where the truth is")])
def test_a_wrong_candidate_does_not_pass(
    wrong: Callable[[Any], Any], said: str, module: _Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.backend, "inception", wrong(module.backend.inception))
    fault = judged(module, TODAY)
    assert fault is not None
    assert fault.startswith("disagrees: ")
    assert said in fault


def test_the_replay_of_a_graph_is_judged_too(module: _Module) -> None:
    assert judged(module, TODAY, Replays(lambda candidate: candidate)) is None
    for wrong in (lambda candidate: lambda: candidate.out, lambda candidate: lambda: candidate() * 1.01):
        fault = judged(module, TODAY, Replays(wrong))
        assert fault is not None
        assert fault.startswith("in a CUDA graph it disagrees: ")


# All of it.


class MadeUpModule:
    """In place of a problem's module: nothing is run, and every plan is right."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem = problem

    def judged(self, plan: Plan, meter: object) -> tuple[Any, str | None]:
        return SimpleNamespace(plan=plan, problem=self.problem), None


@pytest.fixture
def ms(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Milliseconds of each form for each image, made up as the modules are."""
    ms = {"merged": 2.0, "fused": 1.0}
    monkeypatch.setattr(tuning, "_Module", MadeUpModule)
    monkeypatch.setattr(CpuMeter, "turn", lambda self, run, calls: lambda: [run.problem.batch * ms[run.plan.form]] * calls)
    return ms


@interpreted
@pytest.mark.usefixtures("ms")
@pytest.mark.parametrize(("arithmetic", "other"), [("tf32", "fp32"), ("fp32", "tf32")])
def test_tf32_is_as_asked_while_measuring_and_as_before_afterwards(
    arithmetic: Any, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, bool]] = []
    precisions = {"tf32": "tf32", "fp32": "ieee"}

    def precision() -> str:
        return str(torch.backends.cudnn.conv.fp32_precision)  # type: ignore[attr-defined]

    class Module(MadeUpModule):
        def __init__(self, problem: Problem, device: torch.device) -> None:
            super().__init__(problem, device)
            self.look()

        def judged(self, plan: Plan, meter: object) -> tuple[Any, str | None]:
            self.look()
            return super().judged(plan, meter)

        def look(self) -> None:
            seen.append((precision(), torch.is_grad_enabled()))

    monkeypatch.setattr(tuning, "_Module", Module)
    with numerics(other):
        (entry,) = tune([replace(SMALL, arithmetic=arithmetic)], CPU, seconds_each=0.0)
        assert precision() == precisions[other]
    assert len(seen) > 2
    assert set(seen) == {(precisions[arithmetic], False)}
    assert entry.arithmetic == arithmetic


@interpreted
@pytest.mark.usefixtures("ms")
def test_each_problem_starts_from_the_plan_that_was_in_use_before_all(table: Path) -> None:
    outcomes: list[Outcome] = []
    progress: list[tuple[str, float]] = []

    def done(outcome: Outcome) -> None:
        assert outcome.entry is not None
        outcomes.append(outcome)
        plan_table.add_to_table(table, [outcome.entry])
        plan_table.forget_user_entries()

    problems = [SMALL, replace(SMALL, batch=1)]
    entries = tune(problems, CPU, done=done, progress=lambda *step: progress.append(step))
    assert entries == [outcome.entry for outcome in outcomes] == list(reversed(plan_table.read_table(table)))
    assert [(outcome.before_ms, outcome.after_ms) for outcome in outcomes] == [(4.0, 2.0), (2.0, 1.0)]
    assert [share for _, share in progress] == sorted(share for _, share in progress)
    for at, problem in enumerate(problems):
        own = [share for what, share in progress if what.startswith(f"{problem}: ")]
        assert (own[0], own[-1]) == (at / 2, (at + 1) / 2)


@interpreted
@pytest.mark.usefixtures("ms")
@pytest.mark.parametrize(("seconds", "least", "most"), [(0.0, 8, 8), (0.04, 8, 20)])
def test_each_plan_is_timed_for_as_long_as_was_asked(
    seconds: float, least: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(CpuMeter):
        """Takes 1 ms for each turn."""

        taken = 0

        def turn(self, run: Any, calls: int, settle: float = 0.0) -> Any:
            def turn() -> list[float]:
                time.sleep(1e-3)
                self.taken += 1
                return [1.0 if run.plan.form == "fused" else 2.0]

            return turn

    meter = Slow()
    monkeypatch.setitem(tuning.SCHEDULES, "cpu", Schedule(rounds=1000, calls=1))
    tune([SMALL], CPU, seconds_each=seconds, meter=meter)
    assert 4 * least <= meter.taken <= 4 * most


@interpreted
def test_what_cannot_run_is_refused_before_anything_is_tried() -> None:
    with pytest.raises(registry.BackendError, match="interpreter computes bfloat16 wrongly"):
        tune([SMALL, replace(SMALL, arithmetic="bf16")], CPU, done=lambda outcome: pytest.fail("it was tried"))


@interpreted
@pytest.mark.usefixtures("ms")
def test_a_problem_that_is_too_large_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def module(problem: Problem, device: torch.device) -> MadeUpModule:
        if problem.batch == 64:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return MadeUpModule(problem, device)

    monkeypatch.setattr(tuning, "_Module", module)
    outcomes: list[Outcome] = []
    entries = tune([replace(SMALL, batch=64), SMALL], CPU, done=outcomes.append)
    assert [outcome.entry for outcome in outcomes] == [None, *entries]
    assert outcomes[0].reason == "plain PyTorch cannot run it here: CUDA out of memory."
    assert [entry.batch for entry in entries] == [2]


@pytest.fixture
def small_5a(monkeypatch: pytest.MonkeyPatch) -> None:
    """GoogLeNet's 5a as small as can be."""
    monkeypatch.setitem(GOOGLENET_SPECS, "5a", TINY)
    monkeypatch.setitem(GOOGLENET_SIDES, "5a", 4)


COMMAND = ["tune", "--modules", "5a", "--large-kernel", "5", "--dtype", "fp32", "--seconds-each", "0.1"]


@interpreted
@pytest.mark.usefixtures("small_5a")
def test_the_command(table: Path, capsys: pytest.CaptureFixture[str], ms: dict[str, float]) -> None:
    assert main([*COMMAND, "--output", str(table), "--batch", "1", "2", "1"]) == 0
    captured = capsys.readouterr()
    said = "the kernels are interpreted on the CPU (TRITON_INTERPRET=1): these times mean nothing"
    assert captured.err.splitlines() == [
        "googlenet-fused: 2 problems to tune",
        f"googlenet-fused: warning: {said}",
        "googlenet-fused: 1/2 5a 4x4, batch 1, fp32: 2 -> 1 ms",
        "googlenet-fused: 2/2 5a 4x4, batch 2, fp32: 4 -> 2 ms",
    ]
    plan = "fused; pointwise 128x128x64 4w 1s; spatial 128x128x64 4w 1s"
    assert captured.out.splitlines() == [
        "problem                before ms  after ms   gain  plan",
        f"5a 4x4, batch 1, fp32          2         1  2.00x  {plan}",
        f"5a 4x4, batch 2, fp32          4         2  2.00x  {plan}",
        f"wrote {table}",
    ]
    entries = plan_table.read_table(table)
    assert [(entry.batch, entry.plan.form, entry.arch, entry.gpu) for entry in entries] == [
        (1, "fused", INTERPRETER, None),
        (2, "fused", INTERPRETER, None),
    ]
    assert {entry.triton for entry in entries} == {triton.__version__}
    assert plan_for(Request(INTERPRETER, 1, "fp32", TINY, 1, 4, 4)).form == "fused", "it is used from now on"

    ms.update(merged=1.0, fused=2.0)
    assert main([*COMMAND, "--output", str(table), "--batch", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["table"] == str(table)
    (outcome,) = document["outcomes"]
    assert (outcome["before_ms"], outcome["after_ms"], outcome["gain"]) == (4.0, 2.0, 2.0), "before: by the user's table"
    assert outcome["problem"] == "5a 4x4, batch 2, fp32"
    assert (outcome["skipped"], outcome["wrong"], outcome["reason"]) == (0, [], None)
    kept = plan_table.read_table(table)
    assert [(entry.batch, entry.plan.form) for entry in kept] == [(1, "fused"), (2, "merged")]
    assert outcome["entry"] == kept[1].to_json()


@interpreted
@pytest.mark.usefixtures("small_5a")
def test_the_command_with_real_kernels_and_another_table(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = table.parent / "other.json"
    assert main([*COMMAND, "--batch", "3", "--output", str(other), "--large-kernel", "3"]) == 0
    assert capsys.readouterr().out.endswith(f"wrote {other}\n")
    assert not table.exists()
    (entry,) = plan_table.read_table(other)
    assert (entry.batch, entry.spec) == (3, replace(TINY, large_kernel=3))


@interpreted
@pytest.mark.usefixtures("small_5a", "ms")
def test_every_problem_is_kept_when_it_is_done(
    table: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    search = _Search.outcome

    def interrupted(self: _Search, *arguments: Any) -> Outcome:
        kept = [entry.batch for entry in plan_table.read_table(table)]
        assert kept == list(range(1, self.problem.batch))
        if self.problem.batch == 3:
            raise KeyboardInterrupt
        return search(self, *arguments)

    monkeypatch.setattr(_Search, "outcome", interrupted)
    assert main([*COMMAND, "--output", str(table), "--batch", "1", "2", "3", "4"]) == 130
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-2:] == [
        f"googlenet-fused: 2 of 4 problems are done; their plans are kept in {table}",
        "googlenet-fused: interrupted",
    ]
    assert [entry.batch for entry in plan_table.read_table(table)] == [1, 2]


@interpreted
@pytest.mark.usefixtures("small_5a", "ms")
def test_a_wrong_plan_ends_in_failure_and_the_right_ones_are_kept(
    table: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = MadeUpModule.judged
    monkeypatch.setattr(
        MadeUpModule,
        "judged",
        lambda self, plan, meter: (right(self, plan, meter)[0], "disagrees" if plan.form == "fused" else None),
    )
    assert main([*COMMAND, "--output", str(table), "--batch", "1"]) == 1
    lines = capsys.readouterr().err.splitlines()
    plan = "fused; pointwise 128x128x64 4w 1s; spatial 128x128x64 4w 1s"
    assert f"googlenet-fused: warning: 5a 4x4, batch 1, fp32: WRONG RESULTS by the plan {plan}: disagrees" in lines
    assert lines[-1] == f"googlenet-fused: error: 5a 4x4, batch 1, fp32: wrong results by the plan {plan}: disagrees"
    (entry,) = plan_table.read_table(table)
    assert entry.plan.form == "merged"


@interpreted
@pytest.mark.usefixtures("small_5a", "ms")
def test_skipped_plans_and_a_problem_without_a_plan(
    table: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def judged(self: MadeUpModule, plan: Plan, meter: object) -> Any:
        if self.problem.batch == 2 or plan.form == "fused":
            raise triton.OutOfResources(3, 2, "shared memory")
        return right(self, plan, meter)

    right = MadeUpModule.judged
    monkeypatch.setattr(MadeUpModule, "judged", judged)
    assert main([*COMMAND, "--output", str(table), "--batch", "1", "2"]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[2].endswith("  –  none: no plan runs here and gives right results")
    lines = captured.err.splitlines()
    assert "googlenet-fused: warning: 3 plans were skipped, since they do not compile or do not fit on the device" in lines
    assert lines[-1] == "googlenet-fused: error: 5a 4x4, batch 2, fp32: no plan runs here and gives right results"
    assert [entry.batch for entry in plan_table.read_table(table)] == [1]


@interpreted
@pytest.mark.usefixtures("small_5a", "ms")
def test_a_broken_device_ends_in_failure_and_what_was_found_is_kept(
    table: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    search = _Search.outcome

    def outcome(self: _Search, *arguments: Any) -> Outcome:
        if self.problem.batch == 2:
            raise DeviceBroken("the plan x broke the device: why")
        return search(self, *arguments)

    monkeypatch.setattr(_Search, "outcome", outcome)
    assert main([*COMMAND, "--output", str(table), "--batch", "1", "2", "3"]) == 1
    captured = capsys.readouterr()
    assert "batch 1" in captured.out
    assert captured.err.splitlines()[-1] == "googlenet-fused: error: the plan x broke the device: why"
    assert [entry.batch for entry in plan_table.read_table(table)] == [1]


def nothing_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "tune", lambda *_, **__: pytest.fail("something was tried"))


def test_show_and_forget(table: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_tried(monkeypatch)
    assert main(["tune", "--show"]) == 0
    assert capsys.readouterr().out == f"there are no plans in {table}\n"
    assert not table.parent.exists(), "looking makes nothing"
    entry = Entry("sm_90", "fp16", PROBLEM.spec, 8, 14, 15, TODAY, "NVIDIA H100", "3.8.0")
    plan_table.add_to_table(table, [entry, replace(entry, batch=64, gpu=None, triton=None)])
    assert main(["tune", "--show"]) == 0
    plan = str(TODAY)
    assert capsys.readouterr().out.splitlines() == [
        f"problem                   arch   {'plan':{len(plan)}}  measured on",
        f"4a 14x15, batch 8, fp16   sm_90  {plan}  NVIDIA H100, triton 3.8.0",
        f"4a 14x15, batch 64, fp16  sm_90  {plan}  –",
        f"in {table}",
    ]
    assert main(["tune", "--show", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["table"] == str(table)
    assert [Entry.from_json(data) for data in document["entries"]] == list(plan_table.read_table(table))

    request = Request("sm_90", 132, "fp16", PROBLEM.spec, 8, 14, 15)
    assert plan_for(request) == TODAY
    assert plan_table.user_entries()
    assert main(["tune", "--forget"]) == 0
    assert capsys.readouterr().out == f"removed {table}\n"
    assert not table.exists()
    assert plan_table.user_entries() == ()
    assert main(["tune", "--forget"]) == 0
    assert capsys.readouterr().out == f"there is no table at {table}\n"
    assert main(["tune", "--forget", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"table": str(table), "removed": False}


def test_without_a_gpu_the_reason_is_the_backends_own(
    table: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_tried(monkeypatch)
    monkeypatch.setattr(type(registry.get("triton")), "probe", lambda self: "its reason")
    assert main(["tune"]) == 1
    assert capsys.readouterr().err == (
        "googlenet-fused: error: backend 'triton' is not available on this machine: its reason\n"
    )
    assert not table.exists()


@interpreted
@pytest.mark.parametrize("output", [False, True])
@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs user ids")
def test_an_unsafe_folder_is_refused_before_anything_is_tried(
    output: bool, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_tried(monkeypatch)
    monkeypatch.setattr(backend, "interpreting", lambda: output)
    monkeypatch.setattr(type(registry.get("triton")), "probe", lambda self: None)
    folder = table.parent
    folder.mkdir()
    folder.chmod(0o777)
    assert main(["tune", *(["--output", str(table)] if output else [])]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("googlenet-fused: error: ")
    assert f"is not safe: its group or others may write to {folder}; chmod go-w {folder}" in line
    assert list(folder.iterdir()) == []


@interpreted
@pytest.mark.usefixtures("small_5a", "ms")
def test_a_file_that_the_user_named_may_lie_in_a_folder_for_everybody(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o1777)
    assert main([*COMMAND, "--batch", "1", "--output", str(tmp_path / "plans.json")]) == 0
    assert capsys.readouterr().out.endswith(f"wrote {tmp_path / 'plans.json'}\n")
    assert len(plan_table.read_table(tmp_path / "plans.json", named=True)) == 1
    assert not table.exists()


@interpreted
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("# Read me", "is no table of plans: name another file"),
        ('{"a": 1}', "is no table of plans: it must hold a format and a list of entries: name another file"),
        ('{"format": 1, "entries": [3]}', "is no table of plans: entry 0: an entry has the fields"),
        (None, "is not a regular file: name another file"),
    ],
)
def test_a_named_file_that_is_no_table_is_left_as_it_is(
    content: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_tried(monkeypatch)
    file = tmp_path / "README.md"
    if content is None:
        file.mkdir()
    else:
        file.write_text(content)
    assert main(["tune", "--output", str(file)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"googlenet-fused: error: {file} {said}")
    assert line.endswith("name another file")
    assert content is None or file.read_text() == content


@interpreted
@pytest.mark.usefixtures("small_5a", "ms")
def test_without_a_named_file_interpreted_plans_are_not_kept(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--batch", "1"]) == 0
    captured = capsys.readouterr()
    said = "with TRITON_INTERPRET=1 no plan is kept; --output FILE keeps them in a file that is not used"
    assert f"googlenet-fused: warning: {said}" in captured.err.splitlines()
    assert captured.out.splitlines()[-1] == "nothing is written: the times of interpreted kernels mean nothing"
    assert not table.parent.exists()
    assert main([*COMMAND, "--batch", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["table"] is None


@interpreted
@pytest.mark.usefixtures("small_5a", "ms")
def test_where_no_plan_was_found_nothing_is_written(
    table: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def judged(self: MadeUpModule, plan: Plan, meter: object) -> Any:
        raise triton.OutOfResources(3, 2, "shared memory")

    monkeypatch.setattr(MadeUpModule, "judged", judged)
    assert main([*COMMAND, "--output", str(table), "--batch", "1"]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == "nothing is written: no plan was found"
    progress = "googlenet-fused: 1/1 5a 4x4, batch 1, fp32: no plan runs here and gives right results"
    assert progress in captured.err.splitlines()
    assert list(table.parent.iterdir()) == []


@interpreted
@pytest.mark.usefixtures("small_5a", "ms")
def test_an_interrupt_before_any_plan_says_nothing_of_plans(
    table: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: _Search, *arguments: Any) -> Outcome:
        raise KeyboardInterrupt

    monkeypatch.setattr(_Search, "outcome", interrupted)
    assert main([*COMMAND, "--output", str(table), "--batch", "1"]) == 130
    assert "googlenet-fused: 0 of 1 problems are done" in capsys.readouterr().err.splitlines()


@interpreted
@pytest.mark.usefixtures("small_5a", "ms")
def test_on_a_terminal_the_bar_is_enough(
    table: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main([*COMMAND, "--output", str(table), "--batch", "1"]) == 0
    err = capsys.readouterr().err
    assert "1 problem to tune" in err
    assert "1/1" not in err


def test_a_folder_in_the_tables_place_is_not_removed(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table.mkdir(parents=True)
    assert main(["tune", "--forget"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"googlenet-fused: error: cannot remove {table}: ")
    assert line.endswith("; name a folder of your own with GOOGLENET_FUSED_CACHE")
    assert table.is_dir()


@interpreted
@pytest.mark.parametrize("options", [[], ["--show"]])
def test_a_broken_table_is_refused_before_anything_is_tried(
    options: list[str], table: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_tried(monkeypatch)
    plan_table.add_to_table(table, [])
    table.write_text('{"format": 1, "entries": [{}]}')
    assert main(["tune", *(options or ["--output", str(table)])]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"googlenet-fused: error: {table}: entry 0: an entry has the fields")


@interpreted
def test_a_dtype_that_cannot_be_had_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--modules", "5a", "--dtype", "bf16"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("googlenet-fused: error: ")
    assert "Triton's interpreter computes bfloat16 wrongly" in line


def test_the_defaults(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(type(registry.get("triton")), "probe", lambda self: None)
    monkeypatch.setattr(type(registry.get("triton")), "supports", lambda self, problem: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tuning, "tune", lambda problems, device, **options: asked.append((problems, options["seconds_each"])))
    assert main(["tune"]) == 0
    assert main(["tune", "--modules", "3a", "all", "--batch", "128", "--dtype", "tf32", "bf16", "--seconds-each", "2.5"]) == 0
    capsys.readouterr()
    assert command.ARITHMETICS == plans.ARITHMETICS
    (problems, seconds), (others, other_seconds) = asked
    modules = list(itertools.product(GOOGLENET_SPECS, (3, 5)))
    assert problems == [
        Problem.of_googlenet(name, batch, dtype, kernel)
        for name, kernel in modules
        for dtype in ("fp16", "bf16", "tf32")
        for batch in (1, 8, 32, 128)
    ]
    assert seconds == 0.5
    assert others == [Problem.of_googlenet(name, 128, dtype, kernel) for name, kernel in modules for dtype in ("tf32", "bf16")]
    assert other_seconds == 2.5


@interpreted
def test_of_the_default_dtypes_those_are_tuned_that_run_here() -> None:
    assert command._tuned(CPU) == ["fp16", "tf32"]


@interpreted
@pytest.mark.parametrize(("arch", "fp32"), [("sm_80", "tf32"), ("gfx942", "tf32"), ("gfx90a", "fp32")])
def test_fp32_is_tuned_as_models_run_it(arch: str, fp32: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "device_facts", lambda device: (arch, 100))
    assert command._tuned(CPU) == ["fp16", fp32]
    with numerics("tf32"):
        assert arithmetic_of(torch.float32, arch) == fp32


def test_help_says_what_fp32_models_run_as(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "fp32 models run as tf32 by torch's default flags" in said
    assert "(default: fp16 bf16 tf32, those that run here)" in said


def test_tables_of_nothing() -> None:
    assert outcomes_as_text([]) == "problem  before ms  after ms  gain  plan"
    assert entries_as_text([]) == "problem  arch  plan  measured on"


def test_as_a_process(tmp_path: Path) -> None:
    """Without a GPU and without the interpreter: the reason in one line, and nothing left behind."""
    environment: Mapping[str, str] = {
        **os.environ,
        **{"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "GOOGLENET_FUSED_CACHE": str(tmp_path / "cache")},
    }
    run = subprocess.run(
        [sys.executable, "-m", "googlenet_fused", "tune"],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith(
        "googlenet-fused: error: backend 'triton' is not available on this machine: torch sees no CUDA"
    )
    assert run.stderr.count("\n") == 1
    assert not (tmp_path / "cache").exists()

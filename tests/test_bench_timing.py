"""Samples, schedules, turns and cases of the benchmark harness."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from googlenet_fused import bench
from googlenet_fused.bench import Case, Schedule, Timing, Workload
from googlenet_fused.info import usable_cpus


def test_timing_summarises_samples() -> None:
    timing = Timing.of([float(ms) for ms in range(11)])
    assert (timing.median, timing.p20, timing.p80, timing.n) == (5.0, 2.0, 8.0, 11)
    assert Timing.of([3.0]) == Timing(3.0, 3.0, 3.0, 1)
    with pytest.raises(ValueError, match=r"Timing\.of: there must be at least one sample"):
        Timing.of([])


@pytest.mark.parametrize(("name", "value"), [("rounds", 0), ("calls", 0), ("warmup", -1), ("settle", -0.1), ("seconds", -1.0)])
def test_schedule_refuses_impossible_counts(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        Schedule(**{name: value})


@pytest.mark.parametrize(
    ("field", "value"), [("dtype", "fp8"), ("batch", 0), ("subject", "6a"), ("mode", "serving"), ("side", 0)]
)
def test_case_names_the_wrong_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"Case: {field} must be"):
        Case(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("mode", "training"), ("side", 96)])
def test_a_module_runs_forward_at_its_own_side_only(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"Case: {field} must be .* for a module"):
        Case("3a", **{field: value})


def test_interleaved_takes_turns_in_blocks() -> None:
    made: list[str] = []
    advanced: list[int] = []
    times = iter(range(1000))
    timings = bench.interleaved(
        {name: lambda name=name: made.append(name) for name in "abc"},
        rounds=8,
        warmup=2,
        calls=3,
        settle=0.0,
        clock=lambda call: (call(), float(next(times)))[1],
        advance=lambda: advanced.append(1),
    )
    assert made[:6] == ["a", "a", "b", "b", "c", "c"]
    blocks = ["".join(made[start : start + 4]) for start in range(6, len(made), 4)]
    rounds = [blocks[start : start + 3] for start in range(0, len(blocks), 3)]
    assert all(sorted(turns) == ["aaaa", "bbbb", "cccc"] for turns in rounds)
    assert len({tuple(turns) for turns in rounds}) > 1, "the order within a round never changed"
    assert {name: timing.n for name, timing in timings.items()} == {"a": 24, "b": 24, "c": 24}
    assert len(advanced) == 24


def test_wall_clock_counts_milliseconds() -> None:
    import time

    assert 20 <= bench.wall_clock(lambda: time.sleep(0.02)) < 2000


def test_rounds_fit_into_the_seconds_but_are_never_too_few() -> None:
    assert Schedule(rounds=30).rounds_within(100.0) == 30
    timed = Schedule(rounds=30, seconds=10.0)
    assert [timed.rounds_within(seconds) for seconds in (0.1, 0.5, 100.0)] == [30, 20, Schedule.FEWEST_ROUNDS]
    assert Schedule(rounds=2, seconds=10.0).rounds_within(100.0) == 2


def test_inputs_are_seeded_and_in_the_dtype_of_the_case() -> None:
    half = Workload(Case(batch=2, dtype="bf16", side=8), nn.Identity())
    assert half.input(3).shape == (2, 3, 8, 8)
    assert half.input(3).dtype == torch.bfloat16
    assert torch.equal(half.input(3), half.input(3))
    assert not torch.equal(half.input(3), half.input(4))
    step = Workload(Case(batch=2, dtype="bf16", mode="training", side=8), nn.Identity())
    assert step.input(3).dtype == torch.float32, "autocast rounds it, as it does a user's"
    assert step.labels(0).shape == (2,)
    assert Workload(Case("4e", batch=2), nn.Identity()).input(0).shape == (2, 528, 14, 14)


def test_a_module_case_is_the_papers_form() -> None:
    model = bench.build_workload(Case("3a", dtype="bf16")).model
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes["branch3.1.conv.weight"] == [32, 16, 5, 5]
    assert shapes["branch3.1.conv.bias"] == [32]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())


BACKENDS: Any = torch.backends
CUDNN, MATMUL, MKLDNN = BACKENDS.cudnn, BACKENDS.cuda.matmul, BACKENDS.mkldnn


@pytest.fixture
def flags() -> Iterator[None]:
    """Those for TF32 are afterwards as torch has them from the start."""
    yield
    BACKENDS.fp32_precision = CUDNN.fp32_precision = "none"
    CUDNN.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")
    MATMUL.fp32_precision = MKLDNN.matmul.fp32_precision = "none"


def newer_flags() -> list[str]:
    flags = (CUDNN.conv, CUDNN.rnn, MATMUL, MKLDNN.matmul, MKLDNN.conv, CUDNN, BACKENDS)
    return [flag.fp32_precision for flag in flags]


def older_flags() -> list[Any]:
    return [CUDNN.allow_tf32, MATMUL.allow_tf32, torch.get_float32_matmul_precision()]


@pytest.mark.usefixtures("flags")
@pytest.mark.parametrize(
    ("flag", "name", "value"),
    [
        (CUDNN, "allow_tf32", True),
        (CUDNN, "allow_tf32", False),
        (MATMUL, "allow_tf32", True),
        (torch, "float32_matmul_precision", "medium"),
        *((flag, "fp32_precision", "ieee") for flag in (BACKENDS, CUDNN, CUDNN.conv, CUDNN.rnn, MATMUL)),
        *((flag, "fp32_precision", "tf32") for flag in (BACKENDS, CUDNN, CUDNN.conv, MATMUL, MKLDNN.matmul)),
        (MKLDNN.matmul, "fp32_precision", "bf16"),
    ],
)
def test_numerics_sets_tf32_and_puts_it_back(flag: Any, name: str, value: Any) -> None:
    """Whichever flag was set before. Where that was a newer one, the older ones may have raised."""
    if flag is torch:
        torch.set_float32_matmul_precision(value)
    else:
        setattr(flag, name, value)
    before = newer_flags()
    older = None if name == "fp32_precision" else older_flags()
    for dtype, allowed, products in (("tf32", True, "high"), ("fp32", False, "highest"), ("bf16", False, "highest")):
        with bench.numerics(dtype):
            assert older_flags() == [allowed, allowed, products]
            assert newer_flags()[:4] == ["tf32" if allowed else "ieee"] * 4
        assert newer_flags() == before
        assert older is None or older == older_flags()


@pytest.mark.usefixtures("flags")
def test_numerics_within_numerics() -> None:
    before = newer_flags()
    with bench.numerics("tf32"):
        with bench.numerics("fp32"):
            assert not CUDNN.allow_tf32
        assert older_flags() == [True, True, "high"]
    assert newer_flags() == before


@pytest.mark.usefixtures("flags")
@pytest.mark.parametrize(
    ("flag", "precision"), [(BACKENDS, "tf32"), (CUDNN.conv, "ieee"), (MATMUL, "tf32"), (MKLDNN.matmul, "bf16")]
)
def test_the_machine_is_described_whichever_flag_was_set(flag: Any, precision: str) -> None:
    flag.fp32_precision = precision
    described = bench.machine_description()["flags"]
    named = {"cudnn_conv": CUDNN.conv, "cuda_matmul": MATMUL, "mkldnn_conv": MKLDNN.conv, "mkldnn_matmul": MKLDNN.matmul}
    assert {name: described[f"{name}_fp32_precision"] for name in named} == {
        name: flag.fp32_precision for name, flag in named.items()
    }


def test_torch_threads_puts_the_number_back() -> None:
    before, most = torch.get_num_threads(), usable_cpus()
    for count in range(1, most + 1):
        with bench.torch_threads(count) as threads:
            assert threads == torch.get_num_threads() == count
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match=f"threads must be from 1 to {most}, .* got 0"), bench.torch_threads(0):
        pass

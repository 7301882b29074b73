"""The benchmark harness: who passes its gate, what it times, and how it counts memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from googlenet_fused import FusionMismatch, bench
from googlenet_fused.bench import (
    BASELINE,
    Bind,
    Case,
    DeviceBroken,
    Provider,
    Run,
    Schedule,
    Unavailable,
    Workload,
    build_workload,
    gate,
    meters,
)
from googlenet_fused.bench.gate import judge_all
from googlenet_fused.bench.memory import CpuMemory
from googlenet_fused.bench.meters import CpuMeter, CudaMeter, Rotation, rotated

QUICK = Schedule(rounds=1, calls=2, warmup=0, settle=0.0)


@pytest.fixture
def workload() -> Workload:
    """A network of one convolution in place of GoogLeNet."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 5)).eval()
    return Workload(Case(side=8), model)


@pytest.fixture
def training() -> Workload:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 1000))
    return Workload(Case(batch=3, mode="training", side=8), model)


def provider(name: str, run: Callable[[Tensor], Tensor]) -> Provider:
    def build(_: Workload) -> Bind:
        return lambda x: lambda: run(x)

    return Provider(name, name.title(), build)


def eager(workload: Workload) -> Provider:
    return provider(BASELINE, workload.model)


def step_provider(name: str, change: Callable[[nn.Module], nn.Module]) -> Provider:
    """Trains a copy of the plain model after ``change``."""

    def build(workload: Workload) -> Bind:
        model = change(copy.deepcopy(workload.model))
        return lambda x: bench.run_of(workload, model, x)

    return Provider(name, name.title(), build)


def test_only_providers_that_agree_get_a_time(workload: Workload) -> None:
    def missing(_: Workload) -> Bind:
        raise Unavailable("not on this machine")

    def broken(_: Workload) -> Bind:
        raise RuntimeError("cannot be built\nsecond line")

    def crashing(x: Tensor) -> Tensor:
        raise RuntimeError("cannot run")

    first: list[Tensor] = []

    def stale(x: Tensor) -> Tensor:
        first.append(workload.model(x))
        return first[0].clone()

    rows = bench.measure(
        workload,
        [
            eager(workload),
            provider("same", lambda x: workload.model(x.contiguous(memory_format=torch.channels_last))),
            provider("off", lambda x: workload.model(x) * 1.001),
            provider("stale", stale),
            provider("nan", lambda x: workload.model(x) * float("nan")),
            provider("crashing", crashing),
            Provider("missing", "Missing", missing),
            Provider("broken", "Broken", broken),
        ],
        QUICK,
    )
    assert {row.provider: row.status for row in rows} == {
        BASELINE: "ok",
        "same": "ok",
        "off": "wrong",
        "stale": "wrong",
        "nan": "wrong",
        "crashing": "failed",
        "missing": "unavailable",
        "broken": "failed",
    }
    by_name = {row.provider: row for row in rows}
    assert by_name[BASELINE].speedup == {"wall": 1.0, "wall_cold": 1.0}
    assert all((row.timing is not None) == (row.status == "ok") for row in rows)
    assert all((row.reason is None) == (row.status == "ok") for row in rows)
    assert by_name["missing"].reason == "not on this machine"
    assert by_name["broken"].reason == "cannot be built"
    assert by_name["crashing"].reason == "cannot run"


def test_a_provider_that_breaks_while_it_is_timed_costs_nobody_else(workload: Workload) -> None:
    calls = 0

    def tiring(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 9:
            raise torch.OutOfMemoryError("no more")
        return workload.model(x)

    right, broken = bench.measure(workload, [eager(workload), provider("tiring", tiring)], Schedule(3, 3, 0, 0.0))
    assert right.status == "ok"
    assert right.timing is not None
    assert right.timing.n == 9
    assert (broken.status, broken.reason, broken.timings) == ("failed", "out of memory: no more", {})


class _Meter(CpuMeter):
    """A CPU's meter whose device breaks with the first error."""

    def check(self, who: str) -> None:
        raise DeviceBroken(f"{who} broke the device: an illegal memory access")


@pytest.mark.parametrize("good_calls", [0, 3, 7])  # it breaks while it is built, while it is judged, while it is timed
def test_a_broken_device_ends_the_case_and_names_who_broke_it(workload: Workload, good_calls: int) -> None:
    calls = 0

    def breaking(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > good_calls:
            raise RuntimeError("an illegal memory access")
        return workload.model(x)

    providers = [eager(workload), provider("breaking", breaking), provider("innocent", workload.model)]
    with pytest.raises(DeviceBroken, match="Breaking broke the device: an illegal memory access"):
        bench.measure(workload, providers, QUICK, meter=_Meter())


def test_a_fusion_that_disagrees_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def mismatch(*_: Any, **__: Any) -> nn.Module:
        raise FusionMismatch("inception3a disagrees")

    monkeypatch.setattr("googlenet_fused.bench.provider.fuse", mismatch)
    rows = bench.measure(build_workload(Case("5b")), bench.package_providers(), QUICK)
    assert [(row.status, row.reason) for row in rows[2:]] == [("wrong", "inception3a disagrees")]


def test_an_element_that_is_never_written_shows(workload: Workload) -> None:
    """A buffer that happens to hold the right value is poisoned between calls."""
    last = workload.model[-1]  # type: ignore[index]
    with torch.no_grad():
        last.weight[-1] = 0
        last.bias[-1] = 0
    buffer = torch.zeros(1, 5)

    def lucky(x: Tensor) -> Tensor:
        buffer[:, :-1] = workload.model(x)[:, :-1]
        return buffer

    _, row = bench.measure(workload, [eager(workload), provider("lucky", lucky)], QUICK)
    assert row.status == "wrong"
    assert "nan" in str(row.reason)


class _Graphs(CpuMeter):
    """A CPU's meter that pretends to replay graphs: ``replay`` gets the call and the captured output."""

    def __init__(self, replay: Callable[[Run, Tensor], None]) -> None:
        super().__init__()
        self.replay = replay

    def replayed(self, run: Run) -> Callable[[], Tensor]:
        output = run()

        def again() -> Tensor:
            self.replay(run, output)
            return output

        return again


@pytest.mark.parametrize(("works", "failures"), [(True, []), (False, ["other"])])
def test_a_graph_that_writes_nothing_is_wrong(workload: Workload, works: bool, failures: list[str]) -> None:
    meter = _Graphs(lambda run, output: output.copy_(run()) if works else None)  # type: ignore[func-returns-value]
    others = [
        provider("other", workload.model),
        Provider("own", "Own", lambda _: lambda x: lambda: workload.model(x), own_graph=True),
    ]
    with torch.inference_mode():
        verdicts = judge_all(workload, [(other, other.build(workload)) for other in others], meter)
    assert list(verdicts.failures) == failures, verdicts.failures

    def breaks(run: Run, output: Tensor) -> None:
        raise RuntimeError("not captured")

    calls = iter([1.0, 1.01, 1.01])  # right on the first input, wrong on the second
    off = provider("off", lambda x: workload.model(x) * next(calls))
    with torch.inference_mode():
        judged = judge_all(workload, [(off, off.build(workload))], _Graphs(breaks))
    assert judged.failures["off"].status == "wrong", "what a replay does then says no more"

    for status, reason in verdicts.failures.values():
        assert status == "wrong"
        assert reason.startswith("in a CUDA graph it disagrees")


def test_nothing_is_measured_without_the_baseline(workload: Workload) -> None:
    with pytest.raises(ValueError, match="must include the baseline 'eager'"):
        bench.measure(workload, [provider("other", workload.model)], QUICK)

    def refusing(x: Tensor) -> Tensor:
        raise NotImplementedError("no kernel")

    failing = nn.Module()
    failing.forward = refusing  # type: ignore[method-assign]
    with pytest.raises(Unavailable, match="plain PyTorch cannot run torchvision, batch 1, fp32 here: no kernel"):
        bench.measure(Workload(workload.case, failing), [provider(BASELINE, failing)], QUICK)


@pytest.mark.parametrize("case", [Case(side=64), Case("bvlc", side=64), Case("5b", batch=2)], ids=str)
def test_networks_and_modules_run_through_the_gate(case: Case) -> None:
    told: list[float] = []
    rows = bench.measure(
        bench.build_workload(case), bench.package_providers(), QUICK, progress=lambda what, done: told.append(done)
    )
    assert [row.status for row in rows] == ["ok"] * 3, [row.reason for row in rows]
    assert all(row.case == case and row.max_error is not None and row.max_error < 1e-5 for row in rows)
    assert all({"wall", "wall_cold"} == row.timings.keys() == row.speedup.keys() for row in rows)
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1.0)


@pytest.mark.extra
@pytest.mark.parametrize(("variant", "dtype"), [("torchvision", "fp32"), ("bvlc", "bf16")])
def test_training_steps_run_through_the_gate(variant: str, dtype: str) -> None:
    case = Case(variant, batch=2, dtype=dtype, mode="training", side=64)
    rows = bench.measure(bench.build_workload(case), bench.package_providers(), QUICK)
    assert [row.status for row in rows] == ["ok"] * 3, [row.reason for row in rows]
    assert all(row.timings.keys() == {"wall"} for row in rows)


def test_a_wrong_gradient_is_found(training: Workload) -> None:
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 1.01

    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Scaled.apply(x)  # type: ignore[no-any-return]

    def with_wrong_backward(model: nn.Module) -> nn.Module:
        assert isinstance(model, nn.Sequential)
        model[1] = nn.Sequential(model[1], Wrong())
        return model

    def frozen(model: nn.Module) -> nn.Module:
        next(model.parameters()).requires_grad_(False)
        return model

    providers = [
        step_provider(BASELINE, lambda m: m),
        step_provider("wrong", with_wrong_backward),
        step_provider("frozen", frozen),
    ]
    right, wrong, without = bench.measure(training, providers, QUICK)
    assert right.status == "ok", right.reason
    assert (wrong.status, without.status) == ("wrong", "wrong")
    assert "disagrees: the gradient of 0." in str(wrong.reason)
    assert without.reason == "the step left no gradient for 0.weight"


@pytest.mark.extra
@pytest.mark.parametrize(
    ("variant", "names"),
    [
        ("torchvision", ("conv1.conv.weight", "inception3a.branch4.1.bn.bias", "inception5b.branch3.1.bn.weight", "fc.bias")),
        ("bvlc", ("conv1.conv.bias", "inception3a.branch3.0.conv.bias", "inception5b.branch3.1.conv.weight", "fc.weight")),
    ],
)
def test_one_wrong_gradient_of_a_whole_network_is_found(variant: str, names: tuple[str, ...]) -> None:
    workload = build_workload(Case(variant, batch=2, mode="training", side=64))
    x = workload.input(1)
    truth = gate._TrueStep.of(workload, x)
    assert truth.peer_error < gate.MOST_PEER_ERROR
    step = bench.run_of(workload, copy.deepcopy(workload.model), x)
    assert isinstance(step, bench.TrainingStep)
    right = step.gradients()
    assert truth.compare(right).ok
    for name in names:
        for factor in (0.0, 0.5, -1.0, float("nan")):
            wrong = {**right, name: right[name] * factor}
            judged = truth.compare(wrong)
            assert not judged.ok, (name, factor)
            assert name in judged.detail


def test_a_loss_that_is_off_is_found(training: Workload) -> None:
    x = training.input(1)
    truth = gate._TrueStep.of(training, x)
    step = bench.run_of(training, copy.deepcopy(training.model), x)
    assert truth.judge(step).ok
    assert not truth.judge(step, lambda: step() * 1.01).ok
    silent = truth.judge(step, lambda: truth.losses.peers[0])
    assert not silent.ok, "a replay that writes no gradients leaves the poison"
    assert "is not finite" in silent.detail


def test_a_step_moves_no_parameter(training: Workload) -> None:
    before = copy.deepcopy(training.model.state_dict())
    run = bench.run_of(training, training.model, training.input(0))
    losses = [run().item() for _ in range(3)]
    assert losses[0] == losses[1] == losses[2]
    assert all(torch.equal(before[name], value) for name, value in training.model.state_dict().items())
    assert isinstance(run, bench.TrainingStep)
    assert all(gradient.abs().max() > 0 for gradient in run.held_gradients().values())


def test_calls_rotate_through_inputs_beyond_the_cache() -> None:
    called: list[int] = []

    def bind(x: Tensor) -> Run:
        return lambda: called.append(int(x[0])) or x * 2  # type: ignore[func-returns-value]

    def inputs(seed: int) -> Tensor:
        return torch.full((1000,), float(seed))

    rotation = rotated(bind, inputs, bind(inputs(0)), cache=40_000)
    called.clear()
    count = len(rotation.runs)
    assert count * 2 * 4000 >= meters.BEYOND * 40_000
    for _ in range(count + 2):
        rotation()
    assert called == [*range(count), 0, 1]
    kept = [float(output[0]) for output in rotation.kept if output is not None]
    assert kept == [2.0 * seed for seed in range(count)], "outputs rotate too"
    without = Rotation(rotation.runs, keep=False)
    without()
    assert without.kept == []


def test_settings_hold_while_a_provider_runs(workload: Workload) -> None:
    inside = False
    seen: list[bool] = []

    @contextmanager
    def settings() -> Iterator[None]:
        nonlocal inside
        inside = True
        yield
        inside = False

    def run(x: Tensor) -> Tensor:
        seen.append(inside)
        return workload.model(x)

    other = Provider("other", "Other", lambda _: lambda x: lambda: run(x), settings)
    bench.measure(workload, [eager(workload), other], QUICK)
    assert seen
    assert all(seen)
    assert not inside


@pytest.mark.skipif(CpuMemory().held() is None, reason="no /proc/self/status with RssAnon")
def test_memory_of_a_call_is_counted(workload: Workload) -> None:
    size = 64 * 2**20

    def hungry(x: Tensor) -> Tensor:
        torch.ones(size // 4).sum()
        return workload.model(x)

    def holding(_: Workload) -> Bind:
        held = torch.ones(size // 4)
        return lambda x: lambda: workload.model(x) + 0 * held[0]

    rows = bench.measure(
        workload, [eager(workload), provider("hungry", hungry), Provider("holding", "Holding", holding)], QUICK
    )
    peaks = [row.peak_mib for row in rows]
    assert all(peak is not None for peak in peaks)
    plain, needed, held = (float(peak or 0) for peak in peaks)
    assert plain < 16
    assert 60 < needed < 96
    assert 60 < held < 96


class _FakeCuda:
    """Stands in for ``torch.cuda``: its clock moves by 3 ms a call, and by 2 ms for each call in a replayed graph."""

    def __init__(self) -> None:
        self.ms, self.capturing, self.captured = 0.0, False, 0

    def call(self) -> Tensor:
        if self.capturing:
            self.captured += 1
        else:
            self.ms += 3.0
        return torch.zeros(4)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = self

        class Graph:
            calls = 0

            def replay(self) -> None:
                fake.ms += 2.0 * self.calls

        class Event:
            at = 0.0

            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = fake.ms

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        @contextmanager
        def graph(graph: Graph, stream: object) -> Iterator[None]:
            fake.capturing, fake.captured = True, 0
            yield
            fake.capturing, graph.calls = False, fake.captured

        @contextmanager
        def on(stream: object) -> Iterator[None]:
            yield

        stream = SimpleNamespace(wait_stream=lambda other: None)
        properties = SimpleNamespace(L2_cache_size=1000)
        for name, value in {
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": on,
            "graph": graph,
            "CUDAGraph": Graph,
            "Event": Event,
            "set_stream": lambda stream: None,
            "synchronize": lambda: None,
            "current_device": lambda: 0,
            "get_device_properties": lambda index: properties,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_device_times_are_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = _FakeCuda()
    fake.install(monkeypatch)
    turns, missing = CudaMeter().turns(lambda x: fake.call, lambda seed: torch.zeros(4), Schedule(calls=3))
    assert missing == []
    assert turns.keys() == {"wall", "wall_cold", "graph", "graph_cold", "host"}
    assert list(turns["graph"]()) == [2.0] * 3
    assert list(turns["graph_cold"]()) == [2.0] * 3
    assert len(turns["wall"]()) == len(turns["host"]()) == 3


@pytest.mark.parametrize(("graph_ms", "calls"), [(1.0, 1), (7.0, 3), (1e3, meters.MOST_REPEATS)])
def test_a_graph_holds_as_many_calls_as_take_some_time(graph_ms: float, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = _FakeCuda()
    fake.install(monkeypatch)
    monkeypatch.setattr(meters, "GRAPH_MS", graph_ms)
    turn = CudaMeter().turn(fake.call, 5)
    before = fake.ms
    assert list(turn()) == [2.0] * 5
    assert fake.ms - before == 2 * calls * 2.0 * 5, "each sample follows a graph that keeps the device busy"


def test_a_turn_of_a_cpu_is_wall_time() -> None:
    called: list[int] = []
    turn = CpuMeter().turn(lambda: called.append(1), 3)
    assert all(0 <= ms < 1000 for ms in turn())
    assert len(called) == 4, "the first is not counted"


def test_a_provider_with_graphs_of_its_own_has_no_graph_time(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = _FakeCuda()
    fake.install(monkeypatch)
    turns, missing = CudaMeter().turns(lambda x: fake.call, lambda seed: torch.zeros(4), Schedule(calls=3), own_graph=True)
    assert turns.keys() == {"wall", "wall_cold", "host"}
    assert missing == ["no graph metric: it replays CUDA graphs of its own"]


def test_a_call_that_cannot_be_captured_keeps_its_wall_time(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = _FakeCuda()
    fake.install(monkeypatch)

    def call() -> Tensor:
        if fake.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        return fake.call()

    turns, missing = CudaMeter().turns(lambda x: call, lambda seed: torch.zeros(4), Schedule(calls=3))
    assert turns.keys() == {"wall", "wall_cold", "host"}
    assert missing == ["no CUDA graph: operation not permitted when stream is capturing"]


def test_only_cpus_and_cuda_devices_have_a_meter() -> None:
    assert isinstance(bench.meter_for(torch.device("cpu")), CpuMeter)
    with pytest.raises(ValueError, match="device must be a CPU or a CUDA device, got 'meta'"):
        bench.meter_for(torch.device("meta"))

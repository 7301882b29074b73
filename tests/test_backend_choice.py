"""Which backend runs: names, preferences, refusals, what is said of them, and a machine without oneDNN."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from cases import TINY, assert_same, fused_inception, integer_convs, integer_input, plain_inception, random_input
from torch import Tensor, nn

import googlenet_fused
from googlenet_fused import BackendError, FusedInception, fuse, use_backend
from googlenet_fused.backends import cpu, registry
from googlenet_fused.backends.reference import ReferenceBackend
from googlenet_fused.backends.registry import Problem
from googlenet_fused.backends.triton import backend as triton_backend
from googlenet_fused.blocks import BasicConv2d
from googlenet_fused.modules import FusedConv2d
from googlenet_fused.packing import PackedInception

CPU = torch.device("cpu")


class FakeBackend(ReferenceBackend):
    """The reference under another name, which counts its calls and refuses what it is told to."""

    description = "made up by a test"
    last_resort = False

    def __init__(self, name: str, refusal: str | None = None, doubts: str | None = None) -> None:
        self.name = name
        self.refusal = refusal
        self.doubts = doubts
        self.calls = 0

    def probe(self) -> str | None:
        return self.refusal

    def supports(self, problem: Problem) -> str | None:
        return self.refusal

    def doubt(self, problem: Problem) -> str | None:
        assert self.refusal is None, "it was asked in vain"
        return self.doubts

    def inception(self, x: Tensor, packed: PackedInception, prepared: tuple[Tensor, ...], out: Tensor) -> None:
        self.calls += 1
        super().inception(x, packed, prepared, out)


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends registered by the test are gone after it, and nothing has been announced yet."""
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
    monkeypatch.setattr(registry, "_announced", set())


@pytest.fixture
def fakes(own_registry: None) -> tuple[FakeBackend, FakeBackend]:
    """Two more backends, ``"first"`` and the more preferred ``"second"``."""
    pair = FakeBackend("first"), FakeBackend("second")
    for backend in pair:
        registry.register(backend)
    return pair


@pytest.fixture
def unprobed_cpu(own_registry: None) -> Iterator[None]:
    """The cpu backend looks at the machine anew, in this test and after it."""
    caches = (cpu._probe, cpu._refuse_dtype)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def run(backend: str = "auto", dtype: torch.dtype = torch.float32) -> Tensor:
    """One small module through the public function."""
    return googlenet_fused.inception(integer_input(TINY, 1, 4, 3, dtype), integer_convs(TINY, dtype), backend=backend)


# Choice of a backend.


def test_the_reference_is_the_last_resort() -> None:
    candidates = [name for name in registry.names() if not registry.get(name).for_tests]
    assert candidates[-1] == "reference"
    assert [name for name in candidates if registry.get(name).last_resort] == ["reference"]
    assert set(candidates) >= {"cpu", "reference"}
    assert registry.get("reference").probe() is None


@pytest.mark.parametrize("error", [AttributeError("no such thing\nand more"), SystemExit("no such thing")])
def test_a_probe_that_fails_is_a_reason(
    error: BaseException, fakes: tuple[FakeBackend, FakeBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe() -> str | None:
        raise error

    monkeypatch.setattr(fakes[0], "probe", probe)
    monkeypatch.setattr(fakes[0], "needs_verification", True)
    status = registry.status()
    assert status["first"]["available"] is False
    assert status["first"]["reason"] == f"its probe failed: {type(error).__name__}: no such thing"
    assert status["second"]["available"] is True


def test_cpu_tensors_without_a_gpu_are_refused_with_the_way_to_try_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "_probe", lambda: None)
    monkeypatch.setattr(triton_backend, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match=r"sees no CUDA device \(TRITON_INTERPRET=1 runs its kernels on CPU tensors"):
        run("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(BackendError, match="it runs on CUDA tensors, not on cpu"):
        run("triton")


def ask_fuse(name: str) -> None:
    fuse(nn.Identity(), backend=name)


def ask_use_backend(name: str) -> None:
    with use_backend(name):
        pass


ASKS: dict[str, Callable[[str], object]] = {
    "get": registry.get,
    "check_name": registry.check_name,
    "use_backend": ask_use_backend,
    "select": lambda name: registry.select(name, Problem(CPU, torch.float32, TINY)),
    "inception": run,
    "FusedInception": lambda name: FusedInception(*list(TINY)[:7], backend=name),
    "FusedInception.from_module": lambda name: FusedInception.from_module(plain_inception(TINY), backend=name),
    "FusedConv2d.from_module": lambda name: FusedConv2d.from_module(BasicConv2d(1, 1, kernel_size=1), backend=name),
    "fuse": ask_fuse,
}


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
def test_unknown_name_lists_the_choices(ask: Callable[[str], object], own_registry: None) -> None:
    registry.register(FakeBackend("extra"))
    with pytest.raises(ValueError, match=r"unknown backend 'tpu': choose one of 'auto', 'extra', .*'cpu', 'reference'"):
        ask("tpu")


@pytest.mark.parametrize("name", ["auto", "reference", "cpu"])
def test_taken_name(name: str, own_registry: None) -> None:
    with pytest.raises(ValueError, match=f"the backend name '{name}' is taken"):
        registry.register(FakeBackend(name))


def test_status_says_why_a_backend_is_not_available(own_registry: None) -> None:
    registry.register(FakeBackend("absent", refusal="its hardware is on order"))
    registry.register(FakeBackend("present"))
    status = registry.status()
    assert list(status) == registry.names()
    common = {"description": "made up by a test", "needs_verification": False, "verified_on": [], "here": {}}
    assert status["absent"] == {"available": False, "reason": "its hardware is on order", **common}
    assert status["present"] == {"available": True, "reason": None, **common}
    assert status["reference"]["available"]
    for entry in status.values():
        assert entry["available"] == (entry["reason"] is None)
        assert entry["description"]


def test_use_backend_nests(fakes: tuple[FakeBackend, FakeBackend]) -> None:
    first, second = fakes
    with use_backend("first"):
        run()
        assert (first.calls, second.calls) == (1, 0)
        with use_backend("second"):
            run()
            assert (first.calls, second.calls) == (1, 1)
        run()
        assert (first.calls, second.calls) == (2, 1)
        with use_backend("auto"):
            run()
            assert (first.calls, second.calls) == (2, 2)
    run()
    assert (first.calls, second.calls) == (2, 3)


def test_use_backend_ends_with_an_exception(fakes: tuple[FakeBackend, FakeBackend]) -> None:
    first, second = fakes
    with pytest.raises(KeyError), use_backend("first"):
        raise KeyError
    run()
    assert (first.calls, second.calls) == (0, 1)


def test_use_backend_belongs_to_its_thread(fakes: tuple[FakeBackend, FakeBackend]) -> None:
    first, second = fakes
    entered, done = threading.Event(), threading.Event()

    def other() -> None:
        with use_backend("first"):
            entered.set()
            done.wait(30)
            run()

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(30)
    run()
    assert (first.calls, second.calls) == (0, 1)
    done.set()
    thread.join()
    assert (first.calls, second.calls) == (1, 1)


def test_a_modules_own_backend_wins(fakes: tuple[FakeBackend, FakeBackend]) -> None:
    first, second = fakes
    module, x = fused_inception(TINY, backend="first"), random_input(TINY, 1, 4, 3)
    with use_backend("second"), torch.no_grad():
        module(x)
        assert (first.calls, second.calls) == (1, 0)
        module.backend = "auto"
        module(x)
        assert (first.calls, second.calls) == (1, 1)


def test_automatic_choice_takes_the_one_registered_last(fakes: tuple[FakeBackend, FakeBackend]) -> None:
    first, second = fakes
    run()
    assert (first.calls, second.calls) == (0, 1)
    second.refusal = "not today"
    run()
    assert (first.calls, second.calls) == (1, 1)


def test_automatic_choice_passes_over_a_doubtful_backend(fakes: tuple[FakeBackend, FakeBackend]) -> None:
    first, second = fakes
    second.doubts = "nobody has seen it run"
    run()
    assert (first.calls, second.calls) == (1, 0)
    second.doubts = None
    run()
    assert (first.calls, second.calls) == (1, 1)


def test_a_named_backend_runs_in_spite_of_doubts(fakes: tuple[FakeBackend, FakeBackend]) -> None:
    first, second = fakes
    second.doubts = "nobody has seen it run"
    run("second")
    with use_backend("second"):
        run()
    with torch.no_grad():
        fused_inception(TINY, backend="second")(random_input(TINY, 1, 4, 3))
    assert (first.calls, second.calls) == (0, 3)


def test_a_doubtful_backend_is_one_that_can(fakes: tuple[FakeBackend, FakeBackend]) -> None:
    first, second = fakes
    first.doubts, second.refusal = "nobody has seen it run", "not today"
    with pytest.raises(BackendError, match="Backends that can: 'first', "):
        run("second")


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_backends_of_a_cpu_are_not_doubted(name: str) -> None:
    backend = registry.get(name)
    assert not backend.needs_verification
    for device in ("cpu", "cuda"):
        assert backend.doubt(Problem(torch.device(device), torch.float32, TINY)) is None


@pytest.mark.parametrize("how", ["argument", "module", "use_backend"])
def test_a_named_backend_that_refuses_is_an_error(how: str, fakes: tuple[FakeBackend, FakeBackend]) -> None:
    first, second = fakes
    second.refusal = "the moon is in the wrong phase"
    module = fused_inception(TINY, backend="second" if how == "module" else "auto")
    # The problem, the reason and the way out.
    message = (
        r"'second' cannot run InceptionSpec\(.*\) in float32 on cpu: the moon is in the wrong phase\. .*'first'.*'reference'"
    )
    with torch.no_grad(), use_backend("second" if how == "use_backend" else "auto"), pytest.raises(BackendError, match=message):
        run("second") if how == "argument" else module(random_input(TINY, 1, 4, 3))
    assert (first.calls, second.calls) == (0, 0), "something ran in its place"


def test_a_named_backend_that_refuses_a_convolution_is_an_error(fakes: tuple[FakeBackend, FakeBackend]) -> None:
    fakes[1].refusal = "no convolutions on Sundays"
    block = FusedConv2d.from_module(BasicConv2d(2, 3, kernel_size=3).eval(), backend="second")
    message = "backend 'second' cannot run a convolution with ReLU in float32 on cpu: no convolutions on Sundays"
    with torch.no_grad(), pytest.raises(BackendError, match=message):
        block(torch.randn(1, 2, 5, 5))


@pytest.mark.parametrize("grad", [False, True])
def test_the_cpu_backend_refuses_fp64(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReferenceBackend, "inception", lambda *_: pytest.fail("fell back silently"))
    module = fused_inception(TINY, backend="cpu").double()
    message = r"backend 'cpu' cannot run .* in float64 on cpu: .*not float64\. Backends that can: 'reference'"
    with torch.set_grad_enabled(grad), pytest.raises(BackendError, match=message):
        module(random_input(TINY, 1, 4, 3, torch.float64))


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_the_cpu_backend_refuses_other_devices(device: str) -> None:
    with pytest.raises(BackendError, match=rf"'cpu' cannot run .* on {device}: it runs on CPU tensors, not on {device}"):
        registry.select("cpu", Problem(torch.device(device), torch.float32, TINY))
    assert registry.select("reference", Problem(torch.device(device), torch.float32, TINY)).name == "reference"


@pytest.mark.parametrize("backend", registry.names())
def test_no_backend_runs_integers(backend: str) -> None:
    with pytest.raises(BackendError, match=rf"backend '{backend}' cannot run .* in int32 on cpu: .+\. Backends that can: none"):
        registry.select(backend, Problem(CPU, torch.int32, TINY))


def test_automatic_choice_without_a_candidate_gives_every_doubt(own_registry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_backends", {})
    registry.register(FakeBackend("one", doubts="nobody has seen it run"))
    with pytest.raises(BackendError, match=r"no backend can run .*: one: nobody has seen it run"):
        registry.select("auto", Problem(CPU, torch.float32, TINY))


def test_automatic_choice_without_a_candidate_gives_every_reason() -> None:
    every_reason = r"(?=.*cpu: .+int32)(?=.*reference: .+int32)"
    with pytest.raises(BackendError, match=rf"no backend can run .* in int32 on cpu: {every_reason}"):
        registry.select("auto", Problem(CPU, torch.int32, TINY))


def test_nothing_is_asked_of_a_backend_for_an_empty_batch(fakes: tuple[FakeBackend, FakeBackend]) -> None:
    out = googlenet_fused.inception(integer_input(TINY, 0, 4, 3), integer_convs(TINY), backend="first")
    assert out.shape == (0, TINY.out_channels, 4, 3)
    assert fakes[0].calls == 0
    fakes[0].refusal = "not even that"
    with pytest.raises(BackendError, match="not even that"):
        googlenet_fused.inception(integer_input(TINY, 0, 4, 3), integer_convs(TINY), backend="first")


# What automatic choice says.


def test_automatic_choice_says_once_what_and_why(own_registry: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "googlenet_fused")
    registry.register(FakeBackend("fast"))
    run()
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("googlenet_fused", logging.INFO)
    message = record.getMessage()
    assert "'fast'" in message
    assert "float32 on cpu" in message
    assert "most preferred" in message
    run()
    assert len(caplog.records) == 1
    run(dtype=torch.float64)
    assert "float64 on cpu" in caplog.records[1].getMessage()
    assert len(caplog.records) == 2


def test_automatic_choice_says_who_refused(own_registry: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "googlenet_fused")
    registry.register(FakeBackend("fast"))
    registry.register(FakeBackend("faster", refusal="it is asleep"))
    registry.register(FakeBackend("fastest", doubts="nobody has seen it run"))
    run()
    (record,) = caplog.records
    assert "chose backend 'fast'" in record.getMessage()
    assert "faster: it is asleep" in record.getMessage()
    assert "fastest: nobody has seen it run" in record.getMessage()
    assert record.levelno == logging.INFO, "the last resort was not needed"


def test_ending_at_the_last_resort_is_a_warning(own_registry: None, caplog: pytest.LogCaptureFixture) -> None:
    run(dtype=torch.float64)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "chose backend 'reference'" in record.getMessage()
    assert "cpu: oneDNN" in record.getMessage()
    assert "not float64" in record.getMessage()


def test_a_named_backend_says_nothing(own_registry: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "googlenet_fused")
    run("reference")
    with use_backend("cpu"):
        run()
    assert caplog.records == []


# A machine on which the cpu backend cannot run.


def other_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cpu._ARGUMENTS, "_convolution_pointwise", ("X", "W", "surprise"))


def missing_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cpu._ARGUMENTS, "_convolution_of_the_future", ("X",))


def no_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (other_arguments, "has another mkldnn::_convolution_pointwise than the one known here: arguments X, W, B, padding"),
        (missing_operator, "has no operator mkldnn::_convolution_of_the_future"),
        (no_onednn, "this build of torch has no oneDNN"),
    ],
)
def test_without_onednn_as_it_is_known(
    spoil: Callable[[pytest.MonkeyPatch], None],
    reason: str,
    unprobed_cpu: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = run("reference")
    spoil(monkeypatch)
    assert reason in (registry.get("cpu").probe() or "")
    status = registry.status()["cpu"]
    assert not status["available"]
    assert reason in (status["reason"] or "")
    with pytest.raises(BackendError, match=reason):
        run("cpu")
    assert caplog.records == []
    assert_same(run(), expected)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "chose backend 'reference'" in record.getMessage()
    assert reason in record.getMessage()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_a_cpu_without_instructions_for_a_dtype(
    dtype: torch.dtype, unprobed_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = f"_is_mkldnn_{'bf16' if dtype == torch.bfloat16 else 'fp16'}_supported"
    backend, problem = registry.get("cpu"), Problem(CPU, dtype, TINY)
    monkeypatch.setattr(torch.ops.mkldnn, operator, lambda: False)
    assert "this CPU has no instructions" in (backend.supports(problem) or "")
    assert backend.probe() is None
    assert backend.supports(Problem(CPU, torch.float32, TINY)) is None
    cpu._refuse_dtype.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, operator, lambda: True)
    assert backend.supports(problem) is None

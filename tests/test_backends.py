"""The registry's rules of choice, and every backend against exact integers, every layout, poison, NaN and infinity."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from cases import (
    GOOGLENET_MODULES,
    LAYOUTS,
    ODD_SPECS,
    SENTINEL,
    SMALL_SIZES,
    TINY,
    both_kernels,
    check_guards,
    fused_inception,
    guarded_buffer,
    integer_convs,
    integer_input,
    plain_inception,
    random_input,
)
from torch import Tensor, nn

import googlenet_fused
from googlenet_fused import BackendError, FusedInception, fuse, ops, use_backend
from googlenet_fused.backends import cpu, registry
from googlenet_fused.backends.reference import ReferenceBackend
from googlenet_fused.backends.registry import Problem
from googlenet_fused.blocks import BasicConv2d, Norm
from googlenet_fused.modules import FusedConv2d
from googlenet_fused.packing import ConvParams, PackedInception, pack_inception
from googlenet_fused.spec import InceptionSpec

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


def can_run(dtype: torch.dtype) -> list[str]:
    """The backends that run Inception modules of this dtype on this machine's CPU."""
    return [name for name in registry.names() if registry.get(name).supports(Problem(CPU, dtype, TINY)) is None]


every_backend = pytest.mark.parametrize("backend", can_run(torch.float32))
every_backend_and_dtype = pytest.mark.parametrize(
    ("backend", "dtype"),
    [(name, dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16) for name in can_run(dtype)],
    ids=lambda value: str(value).removeprefix("torch."),
)
both_large_kernels = pytest.mark.parametrize("large_kernel", [3, 5])
every_odd_spec = pytest.mark.parametrize(
    "spec",
    [pytest.param(spec, id=f"{name}-{spec.large_kernel}") for name, odd in ODD_SPECS.items() for spec in both_kernels(odd)],
)


class FakeBackend(ReferenceBackend):
    """The reference under another name, which counts its calls and refuses what it is told to."""

    description = "made up by a test"

    def __init__(self, name: str, refusal: str | None = None) -> None:
        self.name = name
        self.refusal = refusal
        self.calls = 0

    def probe(self) -> str | None:
        return self.refusal

    def supports(self, problem: Problem) -> str | None:
        return self.refusal

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


def run_packed(backend: str, x: Tensor, packed: PackedInception, out: Tensor) -> None:
    """One small module through the backend itself."""
    chosen = registry.get(backend)
    chosen.inception(x, packed, chosen.prepare(packed, x.shape), out)


def plain_result(x: Tensor, convs: Sequence[ConvParams]) -> Tensor:
    """The module by its definition (the paper, Fig. 2b), in fp64: ``[n, out_channels, h, w]``."""
    ch1x1, ch3x3red, ch3x3, ch5x5red, ch5x5, pool_proj = convs

    def conv(x: Tensor, params: ConvParams) -> Tensor:
        assert params.bias is not None
        assert params.norm is None
        return F.conv2d(x, params.weight.double(), params.bias.double(), padding=params.weight.shape[-1] // 2).relu()

    x = x.double()
    pooled = F.max_pool2d(x, 3, stride=1, padding=1)
    branches = [conv(x, ch1x1), conv(conv(x, ch3x3red), ch3x3), conv(conv(x, ch5x5red), ch5x5), conv(pooled, pool_proj)]
    return torch.cat(branches, 1)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Bit for bit, NaN equal to NaN and -0 to 0."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# Choice of a backend.


def test_the_reference_is_the_last_resort() -> None:
    assert registry.names()[-1] == "reference"
    assert set(registry.names()) >= {"cpu", "reference"}
    assert registry.get("reference").probe() is None


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
    assert status["absent"] == {"available": False, "reason": "its hardware is on order", "description": "made up by a test"}
    assert status["present"] == {"available": True, "reason": None, "description": "made up by a test"}
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


def test_automatic_choice_without_a_candidate_gives_every_reason() -> None:
    every_reason = r"(?=.*cpu: .+int32)(?=.*reference: .+int32)"
    with pytest.raises(BackendError, match=rf"no backend can run .* in int32 on cpu: {every_reason}"):
        registry.select("auto", Problem(CPU, torch.int32, TINY))


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
    run()
    (record,) = caplog.records
    assert "chose backend 'fast'" in record.getMessage()
    assert "faster: it is asleep" in record.getMessage()
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
    assert_equal(run(), expected)
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


# Exact integers: the fp32 result must equal the fp64 one bit for bit.


@every_odd_spec
@every_backend
def test_exact_integers(backend: str, spec: InceptionSpec) -> None:
    convs = integer_convs(spec)
    for batch, height, width in SMALL_SIZES:
        x = integer_input(spec, batch, height, width)
        assert_equal(googlenet_fused.inception(x, convs, backend=backend), plain_result(x, convs).float())


@both_large_kernels
@pytest.mark.parametrize("name", GOOGLENET_MODULES)
@every_backend
def test_exact_integers_on_the_nine_modules(backend: str, name: str, large_kernel: int) -> None:
    spec, side = GOOGLENET_MODULES[name]
    spec = replace(spec, large_kernel=large_kernel)
    convs, x = integer_convs(spec), integer_input(spec, 2 if side < 20 else 1, side, side)
    assert_equal(googlenet_fused.inception(x, convs, backend=backend), plain_result(x, convs).float())


@every_odd_spec
@pytest.mark.parametrize("backend", can_run(torch.float64))
def test_exact_integers_in_fp64(backend: str, spec: InceptionSpec) -> None:
    convs = integer_convs(spec, torch.float64)
    x = integer_input(spec, 2, 5, 6, torch.float64)
    assert_equal(googlenet_fused.inception(x, convs, backend=backend), plain_result(x, convs))


@pytest.mark.parametrize("name", ["3a", "4e", "5b"])
@both_large_kernels
@pytest.mark.parametrize("backend", can_run(torch.bfloat16))
def test_bf16_rounds_once(backend: str, large_kernel: int, name: str) -> None:
    """Integers up to 256 are exact in bf16, so with reduced channels below that the output is the exact sum rounded once."""
    spec = replace(GOOGLENET_MODULES[name][0], large_kernel=large_kernel)
    convs, x = integer_convs(spec, torch.bfloat16), integer_input(spec, 1, 7, 7, torch.bfloat16)
    for reduction in (convs[1], convs[3]):
        assert F.conv2d(x.double(), reduction.weight.double(), reduction.bias.double()).abs().max() <= 256  # type: ignore[union-attr]
    expected = plain_result(x, convs)
    assert (expected.bfloat16() != expected).any(), "nothing was rounded"
    assert_equal(googlenet_fused.inception(x, convs, backend=backend), expected.bfloat16())


@every_backend
def test_one_packing_serves_every_size(backend: str) -> None:
    """oneDNN lays weights out for the first input it sees."""
    spec = replace(GOOGLENET_MODULES["3a"][0], large_kernel=5)
    convs = integer_convs(spec)
    for batch, height, width in [(1, 28, 28), (8, 7, 7), (1, 1, 1), (3, 2, 30), (1, 28, 28)]:
        x = integer_input(spec, batch, height, width)
        assert_equal(googlenet_fused.inception(x, convs, backend=backend), plain_result(x, convs).float())


@every_backend
def test_pool_pads_with_minus_infinity(backend: str) -> None:
    """On a negative constant a pool padded with zeros would differ at the border only."""
    spec = TINY
    convs = [ConvParams(-conv.weight.abs(), torch.zeros_like(conv.bias)) for conv in integer_convs(spec)]
    for value in (-3.0, -(2.0**60)):
        x = torch.full((1, spec.in_channels, 4, 5), value)
        expected = plain_result(x, convs)
        border = expected[:, spec.slices.pool_proj, 0, 0]
        assert (border > 0).any()
        assert_equal(border, expected[:, spec.slices.pool_proj, 1, 1])
        assert_equal(googlenet_fused.inception(x, convs, backend=backend), expected.float())


@every_backend
def test_negative_zero(backend: str) -> None:
    convs, x = integer_convs(TINY), integer_input(TINY, 2, 4, 5)
    signed = x.where(x != 0, -0.0)
    assert (signed.signbit() & (signed == 0)).any()
    assert_equal(googlenet_fused.inception(signed, convs, backend=backend), plain_result(x, convs).float())

    without_bias = [ConvParams(conv.weight, torch.zeros_like(conv.bias)) for conv in convs]
    empty = torch.full_like(x, -0.0)
    assert_equal(googlenet_fused.inception(empty, without_bias, backend=backend), torch.zeros(2, TINY.out_channels, 4, 5))


# Layouts, poison and guard bands.


EXPANDED: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded_batch": lambda x: x[:1].expand_as(x),
    "expanded_channels": lambda x: x[:, :1].expand_as(x),
    "expanded_pixels": lambda x: x[:, :, :1, :1].expand_as(x),
}
"""Strides of 0, which change the values too."""


@both_large_kernels
@pytest.mark.parametrize("layout", [*LAYOUTS, *EXPANDED])
@every_backend_and_dtype
def test_every_layout_of_input(backend: str, dtype: torch.dtype, layout: str, large_kernel: int) -> None:
    spec = replace(ODD_SPECS["primes"], large_kernel=large_kernel)
    convs = integer_convs(spec, dtype)
    for batch, height, width in [(2, 6, 5), (1, 7, 7), (3, 1, 4)]:
        x = ({**LAYOUTS, **EXPANDED})[layout](integer_input(spec, batch, height, width, dtype))
        before = x.clone()
        out = googlenet_fused.inception(x, convs, backend=backend)
        assert_equal(out, plain_result(before, convs).to(dtype))
        assert_equal(x, before)


@every_odd_spec
@pytest.mark.parametrize("channels_last", [False, True])
@every_backend_and_dtype
def test_every_output_element_is_written_and_nothing_else(
    backend: str, dtype: torch.dtype, channels_last: bool, spec: InceptionSpec
) -> None:
    packed = pack_inception(integer_convs(spec, dtype), dtype)
    for batch, height, width in SMALL_SIZES:
        x = integer_input(spec, batch, height, width, dtype)
        expected = plain_result(x, integer_convs(spec, dtype)).to(dtype)
        for layout in ("contiguous", "channels_last", "slice_of_wider"):
            out, buffer = guarded_buffer((batch, spec.out_channels, height, width), dtype, channels_last=channels_last)
            run_packed(backend, LAYOUTS[layout](x), packed, out)
            check_guards(out, buffer)
            assert_equal(out, expected)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("stride", [1, 2])
@every_backend
def test_a_convolution_in_every_layout(backend: str, stride: int, padding: int) -> None:
    chosen, geometry = registry.get(backend), ((stride, stride), (padding, padding))
    weight, bias = torch.randint(-3, 4, (7, 3, 3, 3)).float(), torch.randint(-3, 4, (7,)).float()
    for layout in LAYOUTS.values():
        x = layout(torch.randint(-3, 4, (2, 3, 9, 6)).float())
        before = x.clone()
        expected = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding).relu().float()
        out = chosen.conv2d_relu(x, weight, bias, chosen.prepare_conv2d(weight, *geometry, x.shape), *geometry)
        assert_equal(out, expected)
        assert out.stride() == torch.empty_like(expected, memory_format=torch.channels_last).stride()
        assert_equal(x, before)


@every_backend
def test_what_a_backend_prepares_serves_inputs_of_every_shape(backend: str) -> None:
    spec = ODD_SPECS["primes"]
    chosen, convs = registry.get(backend), integer_convs(spec)
    packed = pack_inception(convs, torch.float32)
    prepared = chosen.prepare(packed, (2, spec.in_channels, 6, 5))
    for batch, height, width in SMALL_SIZES:
        x = integer_input(spec, batch, height, width)
        out, buffer = guarded_buffer((batch, spec.out_channels, height, width), torch.float32)
        chosen.inception(x, packed, prepared, out)
        check_guards(out, buffer)
        assert_equal(out, plain_result(x, convs).float())


def test_guards_are_seen_when_they_are_written_over() -> None:
    out, buffer = guarded_buffer((1, 2, 3, 4), torch.float32)
    with pytest.raises(AssertionError, match="24 output elements were never written"):
        check_guards(out, buffer)
    out.zero_()
    check_guards(out, buffer)
    buffer[0, 0, 0, 0] = SENTINEL + 1
    with pytest.raises(AssertionError, match="outside the output"):
        check_guards(out, buffer)


@every_odd_spec
@every_backend
def test_memory_that_held_nan_before(backend: str, spec: InceptionSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    convs, x = integer_convs(spec), integer_input(spec, 2, 5, 6)
    expected = plain_result(x, convs).float()
    allocate, allocated = torch.empty, []

    def poisoned(*arguments: object, **options: object) -> Tensor:
        allocated.append(allocate(*arguments, **options).fill_(NAN))
        return allocated[-1]

    monkeypatch.setattr(ops.torch, "empty", poisoned)
    out = googlenet_fused.inception(x, convs, backend=backend)
    assert any(out.data_ptr() == buffer.data_ptr() for buffer in allocated), "the output was not poisoned"
    assert_equal(out, expected)


@every_backend_and_dtype
def test_inputs_and_weights_are_not_modified(backend: str, dtype: torch.dtype) -> None:
    spec = ODD_SPECS["primes"]
    packed = pack_inception(integer_convs(spec, dtype), dtype)
    for make in LAYOUTS.values():
        x = make(integer_input(spec, 2, 5, 6, dtype))
        tensors = [x, *packed]
        before = [(tensor.clone(), tensor._version) for tensor in tensors]
        run_packed(backend, x, packed, torch.empty(2, spec.out_channels, 5, 6, dtype=dtype))
        for tensor, (value, version) in zip(tensors, before, strict=True):
            assert_equal(tensor, value)
            assert tensor._version == version


@every_backend_and_dtype
def test_the_output_is_new_memory_in_every_call(backend: str, dtype: torch.dtype) -> None:
    spec = InceptionSpec(4, 1, 1, 1, 1, 1, 1)  # as many channels out as in
    convs = integer_convs(spec, dtype)
    for make in LAYOUTS.values():
        x = make(integer_input(spec, 2, 5, 6, dtype))
        first = googlenet_fused.inception(x, convs, backend=backend)
        second = googlenet_fused.inception(x, convs, backend=backend)
        storages = {tensor.untyped_storage().data_ptr() for tensor in (x, first, second, *(conv.weight for conv in convs))}
        assert len(storages) == 3 + len(convs)
        assert first._base is None
        first.fill_(NAN)
        assert_equal(second, plain_result(x, convs).to(dtype))


def test_nothing_is_asked_of_a_backend_for_an_empty_batch(fakes: tuple[FakeBackend, FakeBackend]) -> None:
    out = googlenet_fused.inception(integer_input(TINY, 0, 4, 3), integer_convs(TINY), backend="first")
    assert out.shape == (0, TINY.out_channels, 4, 3)
    assert fakes[0].calls == 0
    fakes[0].refusal = "not even that"
    with pytest.raises(BackendError, match="not even that"):
        googlenet_fused.inception(integer_input(TINY, 0, 4, 3), integer_convs(TINY), backend="first")


@every_backend_and_dtype
def test_reruns_are_bit_equal(backend: str, dtype: torch.dtype) -> None:
    module, x = fused_inception(ODD_SPECS["wide"], backend=backend).to(dtype), random_input(ODD_SPECS["wide"], 3, 9, 8, dtype)
    with torch.no_grad():
        first = module(x)
        for _ in range(3):
            assert torch.equal(module(x), first)


# NaN and infinity.

POSITIONS = [(0, 0, 0, 0), (0, 5, 4, 3), (1, 12, 8, 6), (0, 3, 0, 6), (1, 7, 4, 0)]
"""In an input [2, 13, 9, 7]: corners, edges, the middle; first, last and middle channels."""


def torch_results(plain: nn.Module, x: Tensor) -> list[Tensor]:
    """The plain module's results in the kernels that torch may choose: by layout, by batch, and in fp64."""
    twice = torch.cat([x, x])
    results = [plain(layout(x)) for layout in (LAYOUTS["contiguous"], LAYOUTS["channels_last"])]
    results += [plain(layout(twice))[: len(x)] for layout in (LAYOUTS["contiguous"], LAYOUTS["channels_last"])]
    results.append(copy.deepcopy(plain).double()(x.double()))
    return results


def kinds(result: Tensor) -> Tensor:
    """0 where finite, 1 at NaN, 2 at infinity, 3 at minus infinity."""
    kind = result.isnan().to(torch.uint8)
    kind[result == INF] = 2
    kind[result == -INF] = 3
    return kind


def assert_placed_as_torch_does(actual: Tensor, expected: Sequence[Tensor], label: object, *, must_reach: bool = True) -> None:
    """NaN and infinity stand where torch has them.

    Torch's own kernels differ at the borders, where zero padding is multiplied with NaN or infinity or skipped, and where
    oneDNN pads an odd number of bf16 channels with the next pixel's. There a finite result is wrong only if none of torch's is.
    """
    all_kinds = torch.stack([kinds(result) for result in expected])
    agreed = (all_kinds == all_kinds[0]).all(0)
    if must_reach:
        assert (all_kinds[0][agreed] != 0).any(), f"{label}: torch's results agree on no NaN or infinity"
    assert torch.equal(kinds(actual)[agreed], all_kinds[0][agreed]), label
    always_special = (all_kinds != 0).all(0)
    assert not (always_special & actual.isfinite()).any(), label


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@both_large_kernels
@every_backend_and_dtype
def test_nan_and_infinity_in_the_input(backend: str, dtype: torch.dtype, large_kernel: int, value: float) -> None:
    spec = replace(ODD_SPECS["primes"], large_kernel=large_kernel)
    plain = plain_inception(spec).to(dtype)
    fused = FusedInception.from_module(plain, backend=backend)
    for position, layout in product(POSITIONS, ("contiguous", "channels_last")):
        x = random_input(spec, 2, 9, 7, dtype)
        x[position] = value
        with torch.no_grad():
            assert_placed_as_torch_does(fused(LAYOUTS[layout](x)), torch_results(plain, x), (position, layout))


@every_backend_and_dtype
def test_nan_reaches_its_neighbourhood_and_no_further(backend: str, dtype: torch.dtype) -> None:
    """One NaN pixel: alone in the 1x1 branch, 3x3 in the second and pooled ones, 5x5 in the third.

    All widths are even: of an odd number of bf16 channels oneDNN spreads NaN a pixel further, in torch's convolutions too.
    """
    spec = InceptionSpec(16, 8, 12, 18, 4, 6, 10, large_kernel=5)
    x = random_input(spec, 2, 9, 7, dtype)
    x[1, 4, 4, 3] = NAN
    with torch.no_grad():
        nan = fused_inception(spec, backend=backend).to(dtype)(x).isnan()
    assert not nan[0].any()
    for channels, reach in zip(spec.slices, (0, 1, 2, 1), strict=True):
        expected = torch.zeros(9, 7, dtype=torch.bool)
        expected[4 - reach : 5 + reach, 3 - reach : 4 + reach] = True
        assert torch.equal(nan[1, channels], expected.expand(nan[1, channels].shape))


CONVS = ["branch1", "branch2.0", "branch2.1", "branch3.0", "branch3.1", "branch4.1"]


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@both_large_kernels
@every_backend_and_dtype
def test_nan_and_infinity_in_convolution_weights(backend: str, dtype: torch.dtype, large_kernel: int, value: float) -> None:
    check_special_value(backend, dtype, "batch", large_kernel, ["conv.weight"], value)


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@every_backend_and_dtype
def test_nan_and_infinity_in_biases(backend: str, dtype: torch.dtype, value: float) -> None:
    check_special_value(backend, dtype, None, 5, ["conv.weight", "conv.bias"], value)


@every_backend_and_dtype
def test_nan_in_batch_norm(backend: str, dtype: torch.dtype) -> None:
    """NaN only: folded, an infinite statistic meets other numbers than in the plain order of computation."""
    check_special_value(backend, dtype, "batch", 3, ["bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"], NAN)


def check_special_value(
    backend: str, dtype: torch.dtype, norm: Norm, large_kernel: int, names: Sequence[str], value: float
) -> None:
    """Put ``value`` at the first, middle and last place of each named tensor of each convolution, one after the other."""
    spec = replace(ODD_SPECS["primes"], large_kernel=large_kernel)
    plain = plain_inception(spec, norm).to(dtype)
    fused = FusedInception.from_module(plain, backend=backend)
    state = plain.state_dict()
    x = random_input(spec, 2, 5, 6, dtype)
    for conv, name in product(CONVS, names):
        flat = state[f"{conv}.{name}"].view(-1)
        for index in {0, len(flat) // 2, len(flat) - 1}:
            kept = flat[index].item()
            with torch.no_grad():
                flat[index] = value
                # ReLU turns a bias of minus infinity into zeros.
                must_reach = (name, value) != ("conv.bias", -INF)
                assert_placed_as_torch_does(fused(x), torch_results(plain, x), (conv, name, index), must_reach=must_reach)
                flat[index] = kept

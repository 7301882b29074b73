"""Fused modules on a CUDA device. What has a meaning on a CPU too also runs there, so that the tests themselves are tried out.

Those marked ``sanitizer`` are small: compute-sanitizer runs them, a hundred times slower.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import pytest
import torch
import torch.nn.functional as F
from cases import (
    ALIGNED,
    GOOGLENET_MODULES,
    LAYOUTS,
    ODD_SPECS,
    TINY,
    assert_agrees,
    assert_same,
    by_definition,
    can_run,
    check_guards,
    cotangent,
    guarded_buffer,
    inception_arguments,
    integer_convs,
    integer_input,
    plain_googlenet,
    plain_inception,
    plain_result,
    random_input,
    report_of,
)
from torch import Tensor, nn

from googlenet_fused import FusedInception, bench, fuse
from googlenet_fused.backends import registry
from googlenet_fused.models.googlenet import VariantName
from googlenet_fused.modules import FusedConv2d
from googlenet_fused.packing import ConvParams, pack_inception
from googlenet_fused.spec import InceptionSpec
from googlenet_fused.tolerance import check_close, judge

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SPECS = {**ODD_SPECS, **{name: GOOGLENET_MODULES[name][0] for name in ("3a", "4e", "5b")}}
PRIMES = ODD_SPECS["primes"]

on_every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def runs_itself(dtype: torch.dtype, device: str) -> list[str]:
    """The backends that run this dtype there, fp32 as such: the tests but for those of TF32 do without that."""
    able = can_run(dtype, device, interpreted=True)
    return [name for name in able if dtype != torch.float32 or "float32" in registry.get(name).arithmetics]


def grid(*dtypes: torch.dtype, devices: Sequence[str] = ("cpu", "cuda"), automatic: bool = True) -> pytest.MarkDecorator:
    """Every backend, and the automatic choice, with every dtype that it runs on a device; those on CUDA have the marker."""
    return pytest.mark.parametrize(
        ("device", "backend", "dtype"),
        [
            pytest.param(
                *(device, backend, dtype),
                id=f"{device}-{backend}-{str(dtype).removeprefix('torch.')}",
                marks=[pytest.mark.gpu] if device == "cuda" else [],
            )
            for device in devices
            for dtype in dtypes
            for backend in [*([registry.AUTO] if automatic else []), *runs_itself(dtype, device)]
        ],
    )


@pytest.fixture(autouse=True)
def _determined(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Convolutions in fp32 as such, not TF32, and by deterministic algorithms of cuDNN, chosen by rule and not by timing."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # a fault that is still on its way belongs to this test


def pair(
    spec: InceptionSpec, device: str, dtype: torch.dtype, backend: str = registry.AUTO, seed: int = 0
) -> tuple[FusedInception, nn.Module]:
    """A fused module and the plain one with the same parameters, on the device."""
    plain = plain_inception(spec, seed=seed).to(device, dtype)
    return FusedInception.from_module(plain, backend=backend), plain


def on(device: str, spec: InceptionSpec, batch: int, side: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return random_input(spec, batch, side, side, dtype, seed).to(device)


def in_every_form(backend: str, device: str, dtype: torch.dtype, spec: InceptionSpec, check: Callable[[], None]) -> None:
    """``check`` as the backend runs a module by itself, and in one of each kind of ways that it has besides."""
    check()
    ways = ways_of(backend, device, dtype, spec)
    kinds = {name.partition(";")[0]: name for name in ways} if device == "cuda" else {}
    for name in {*kinds.values(), *list(ways)[-1:]}:  # the last one has all tensor descriptors
        by(name, ways[name], check)


def ways_of(backend: str, device: str, dtype: torch.dtype, spec: InceptionSpec) -> Mapping[str, AbstractContextManager[None]]:
    if backend == registry.AUTO:
        return {}
    return registry.get(backend).ways(registry.Problem(torch.empty(0, device=device).device, dtype, spec))


def by(name: str, way: AbstractContextManager[None], check: Callable[[], None]) -> None:
    try:
        with way:
            check()
    except Exception as error:
        error.add_note(f"by {name}")
        raise


def side_on(device: str, name: str) -> int:
    """Of a module's input: its own on a GPU; a CPU, which is slow at half precision, gets a few pixels."""
    return GOOGLENET_MODULES[name][1] if device == "cuda" and name in GOOGLENET_MODULES else 7


# The numbers.


@pytest.mark.parametrize("name", SPECS)
@grid(*DTYPES, devices=["cuda"])
def test_modules_agree(device: str, backend: str, dtype: torch.dtype, name: str) -> None:
    assert_modules_agree(device, backend, dtype, name)


@pytest.mark.parametrize("name", ["primes", "3a"])
@grid(*DTYPES, devices=["cpu"])
def test_modules_agree_on_a_cpu(device: str, backend: str, dtype: torch.dtype, name: str) -> None:
    assert_modules_agree(device, backend, dtype, name)


def assert_modules_agree(device: str, backend: str, dtype: torch.dtype, name: str) -> None:
    spec = SPECS[name]
    fused, plain = pair(spec, device, dtype, backend)
    x = on(device, spec, 2, side_on(device, name), dtype)
    assert fused(x).device.type == device

    def check() -> None:
        assert_agrees(fused, plain, x)
        with torch.inference_mode():
            assert_same(fused(x), fused(x))  # past the operator

    in_every_form(backend, device, dtype, spec, check)


def with_ways(*dtypes: torch.dtype) -> list[str]:
    """The backends on CUDA that have more than one way to run a module."""
    able = (name for dtype in dtypes for name in can_run(dtype, "cuda"))
    return list(dict.fromkeys(name for name in able if type(registry.get(name)).ways is not registry.Backend.ways))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*map(repr, DTYPES), "tf32"], ids=lambda name: name.removeprefix("torch."))
@pytest.mark.parametrize("backend", with_ways(*DTYPES), ids=lambda name: f"cuda-{name}")
def test_every_shipped_configuration(backend: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On images enough for every persistent grid to go round more than once."""
    if dtype.removeprefix("torch.") not in registry.get(backend).arithmetics:
        pytest.skip(f"{backend} does not multiply {dtype}")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", dtype == "tf32")
    exact = torch.float32 if dtype == "tf32" else getattr(torch, dtype.removeprefix("torch."))
    spec = GOOGLENET_MODULES["4e"][0]
    fused, plain = pair(spec, "cuda", exact, backend)
    x = on("cuda", spec, 400, 12, exact).contiguous(memory_format=torch.channels_last)
    ways = ways_of(backend, "cuda", exact, spec)
    assert len(ways) > 1
    for name, way in ways.items():
        by(name, way, lambda: assert_agrees(fused, plain, x))


@pytest.mark.parametrize("layout", LAYOUTS)
@grid(torch.float16)
def test_layouts(device: str, backend: str, dtype: torch.dtype, layout: str) -> None:
    fused, plain = pair(PRIMES, device, dtype, backend)
    x = LAYOUTS[layout](on(device, PRIMES, 3, 9, dtype))
    assert_agrees(fused, plain, x)


@pytest.mark.sanitizer
@pytest.mark.parametrize(
    "spec", [pytest.param(spec, id=name) for name, spec in (("tiny", TINY), ("primes", PRIMES), ("aligned", ALIGNED))]
)
@grid(torch.float16, automatic=False)
def test_small_modules_agree(device: str, backend: str, dtype: torch.dtype, spec: InceptionSpec) -> None:
    fused, plain = pair(spec, device, dtype, backend)
    x = on(device, spec, 2, 7, dtype).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        in_every_form(backend, device, dtype, spec, lambda: assert_agrees(fused, plain, x))


@pytest.mark.sanitizer
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@grid(torch.float16, torch.float32, automatic=False)
def test_every_element_is_written_and_nothing_else(device: str, backend: str, dtype: torch.dtype, channels_last: bool) -> None:
    weights, biases, *_ = inception_arguments(ALIGNED, norm=False, bias=True, dtype=dtype)
    convs = [ConvParams(weight.to(device), bias.to(device)) for weight, bias in zip(weights, biases, strict=True)]
    x = LAYOUTS["channels_last" if channels_last else "contiguous"](on(device, ALIGNED, 2, 7, dtype))
    chosen, packed = registry.get(backend), pack_inception(convs, dtype)
    peer = by_definition(x, convs, lambda x, conv: F.conv2d(x, *conv[:2], padding=conv.weight.shape[2] // 2).relu())

    def check() -> None:
        buffer = guarded_buffer((2, ALIGNED.out_channels, 7, 7), dtype, channels_last=channels_last)[1].to(device)
        out = buffer[1:-1, 8:-8, 1:-1, 1:-1]
        chosen.inception(x, packed, chosen.prepare(packed, x.shape), out)
        check_guards(out, buffer)
        check_close(out, [peer], plain_result(x, convs), terms=packed.shared_weight.shape[1])

    in_every_form(backend, device, dtype, ALIGNED, check)


@pytest.mark.sanitizer
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("spec", [pytest.param(PRIMES, id="primes"), pytest.param(ALIGNED, id="aligned")])
@pytest.mark.parametrize(
    ("device", "backend"),
    [
        pytest.param(device, backend, id=f"{device}-{backend}-tf32", marks=[pytest.mark.gpu] if device == "cuda" else [])
        for device in ("cpu", "cuda")
        for backend in can_run(torch.float32, device, interpreted=True)
        if device == "cpu" or registry.get(backend).needs_verification  # algorithms of cuDNN need not be exact
    ],
)
def test_integers_are_exact_in_tf32(
    device: str, backend: str, spec: InceptionSpec, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every element is written and nothing else, in each of many runs. TF32 holds integers up to 2048."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    convs = [ConvParams(weight.to(device), bias.to(device)) for weight, bias, *_ in integer_convs(spec)]
    x = LAYOUTS["channels_last" if channels_last else "contiguous"](integer_input(spec, 3, 7, 7)).to(device)
    chosen, packed, expected = registry.get(backend), pack_inception(convs, x.dtype), plain_result(x, convs).float()

    def check() -> None:
        for _ in range(20 if device == "cuda" else 1):
            buffer = guarded_buffer((3, spec.out_channels, 7, 7), x.dtype, channels_last=channels_last)[1].to(device)
            out = buffer[1:-1, 8:-8, 1:-1, 1:-1]
            chosen.inception(x, packed, chosen.prepare(packed, x.shape), out)
            check_guards(out, buffer)
            assert_same(out, expected)

    in_every_form(backend, device, x.dtype, spec, check)


@on_every_device
def test_gradients(device: str) -> None:
    """Without batch norm, so that training runs fused, too."""
    plain = plain_inception(PRIMES, None).to(device)
    fused = FusedInception.from_module(plain)
    x = on(device, PRIMES, 2, 6, torch.float32)
    grad = cotangent(PRIMES, x.cpu()).to(device)

    def gradients(model: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        return list(torch.autograd.grad(model(leaf), [leaf, *model.parameters()], grad))

    truth = gradients(copy.deepcopy(plain).double(), x.double(), grad.double())
    for ours, theirs, true in zip(gradients(fused, x, grad), gradients(plain, x, grad), truth, strict=True):
        check_close(ours, [theirs], true, terms=x.numel())


@on_every_device
def test_weights_follow_the_module_to_the_device_and_back(device: str) -> None:
    x = on("cpu", PRIMES, 2, 6, torch.float32)
    fused, plain = pair(PRIMES, "cpu", torch.float32)
    with torch.inference_mode():
        before = fused(x)
        assert_agrees(fused.to(device), plain.to(device), x.to(device))
        assert_same(fused.cpu()(x), before)


# The whole network.


@pytest.mark.parametrize("variant", ["torchvision", "bvlc"])
@grid(*DTYPES, devices=["cuda"])
def test_networks_agree(device: str, backend: str, dtype: torch.dtype, variant: VariantName) -> None:
    assert_network_agrees(device, backend, dtype, variant)


def test_the_same_on_a_cpu() -> None:
    """One of many: tests/test_parity.py has the others."""
    assert_network_agrees("cpu", registry.AUTO, torch.bfloat16, "bvlc")


def assert_network_agrees(device: str, backend: str, dtype: torch.dtype, variant: VariantName) -> None:
    plain = plain_googlenet(variant, num_classes=1000, aux_logits=False).to(device, dtype)
    fused = fuse(plain, backend=backend)
    assert sum(isinstance(module, FusedInception) for module in fused.modules()) == 9
    assert sum(isinstance(module, FusedConv2d) for module in fused.modules()) == 3
    norms = [] if variant == "torchvision" or device == "cpu" else ["norm1", "norm2"]
    assert [block.name for block in report_of(fused).skipped] == norms
    assert {parameter.device.type for parameter in fused.parameters()} == {device}
    side = 224 if device == "cuda" else 48
    assert_agrees(fused, plain, torch.randn(2, 3, side, side).to(device, dtype))


in_tf32 = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(backend, id=f"cuda-{backend}-tf32", marks=pytest.mark.gpu)
        for backend in (registry.AUTO, *can_run(torch.float32, "cuda"))
    ],
)
"""fp32 as torch runs its convolutions unless told otherwise."""


@in_tf32
def test_network_in_tf32(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert_network_agrees("cuda", backend, torch.float32, "torchvision")


@pytest.mark.parametrize("name", SPECS)
@in_tf32
def test_modules_agree_in_tf32(backend: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert_modules_agree("cuda", backend, torch.float32, name)


@pytest.mark.gpu
def test_input_on_another_device_is_refused() -> None:
    fused, _ = pair(TINY, "cuda", torch.float32)
    with pytest.raises(ValueError, match=r"x is on cpu but the weights are on cuda:0: move one"):
        fused(on("cpu", TINY, 1, 5, torch.float32))


# The benchmark.


@on_every_device
def test_the_benchmark_judges_and_times(device: str) -> None:
    workload = bench.build_workload(bench.Case("5b", batch=2), torch.device(device))

    def other(name: str, change: Callable[[Tensor], Tensor]) -> bench.Provider:
        return bench.Provider(name, name, lambda _: lambda x: lambda: change(workload.model(x)))

    def synchronising(out: Tensor) -> Tensor:
        out[0, 0, 0, 0].item()  # no CUDA graph captures this
        return out

    eager, channels_last, fused = bench.package_providers()
    providers = [eager, other("off", lambda out: out * 1.01), other("synchronising", synchronising), channels_last, fused]
    rows = {row.provider: row for row in bench.measure(workload, providers, bench.Schedule(2, 3, 1, 0.0))}
    assert [row.status for row in rows.values()] == ["ok", "wrong", "ok", "ok", "ok"], rows
    graphs = {"graph", "graph_cold"} if device == "cuda" else set()
    metrics = graphs | {"wall", "wall_cold"} | ({"host"} if device == "cuda" else set())
    for name in (eager.name, channels_last.name, fused.name):
        assert rows[name].timings.keys() == metrics, "a capture that failed before leaves the next ones whole"
        assert rows[name].peak_mib is not None
        assert all(timing.n == 6 and timing.p20 > 0 for timing in rows[name].timings.values())
    assert rows["synchronising"].timings.keys() == metrics - graphs
    if device == "cuda":
        assert str(rows["synchronising"].reason).startswith("no CUDA graph: ")
        own = rows[fused.name].timings
        assert own["graph"].median <= own["wall"].median, "the device's time is a part of the whole call's"


@pytest.mark.gpu
def test_the_benchmark_times_training() -> None:
    case = bench.Case("torchvision", batch=4, mode="training", side=64)
    rows = bench.measure(
        bench.build_workload(case, torch.device("cuda")), bench.package_providers(), bench.Schedule(2, 3, 1, 0.0)
    )
    assert [row.status for row in rows] == ["ok"] * 3, rows
    assert all({"wall", "host"} <= row.timings.keys() for row in rows)


# Streams, graphs and races.


@grid(torch.float16, torch.float32)
def test_runs_of_one_input_are_bit_equal(device: str, backend: str, dtype: torch.dtype) -> None:
    """A race shows as a difference; an element that is not written, as the poison left in freed memory."""
    spec = GOOGLENET_MODULES["4e"][0] if device == "cuda" else PRIMES
    fused, _ = pair(spec, device, dtype, backend)
    x = on(device, spec, 2, 7, dtype).contiguous(memory_format=torch.channels_last)

    def check() -> None:
        fused(x)
        first = fused(x)
        for _ in range(200 if device == "cuda" else 2):
            poison = torch.full_like(first, float("nan"))
            del poison
            assert_same(fused(x), first)
        assert first.isfinite().all()

    with torch.inference_mode():
        in_every_form(backend, device, dtype, spec, check)


@grid(torch.float16, devices=["cuda"])
def test_the_current_stream_is_the_one_used(device: str, backend: str, dtype: torch.dtype) -> None:
    """On a busy stream the input becomes what it shall be late; a kernel on any other stream would find NaN there."""
    fused, _ = pair(PRIMES, device, dtype, backend)
    x = on(device, PRIMES, 2, 14, dtype)
    busy = torch.randn(4096, 4096).to(device, dtype) / 64
    late = torch.full_like(x, float("nan"))
    stream, arrives = torch.cuda.Stream(), torch.cuda.Event()
    with torch.inference_mode():
        expected = fused(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            assert_same(fused(x), expected)  # what a stream needs the first time is made
            busy = busy @ busy
            for _ in range(200):
                busy = busy @ busy
            late.copy_(x)
            arrives.record()
            actual = fused(late)
            assert not arrives.query(), "the stream was not busy for long enough to tell"
        stream.synchronize()
    assert_same(actual, expected)


def captured(model: nn.Module, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
    """A CUDA graph of ``model`` with its static input and output, captured as torch's documentation says."""
    static = x.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(static)
    return graph, static, out


def replay(graph: torch.cuda.CUDAGraph, static: Tensor, out: Tensor, x: Tensor) -> Tensor:
    out.fill_(float("nan"))
    static.copy_(x)
    graph.replay()
    return out.clone()


@grid(*DTYPES, devices=["cuda"])
def test_cuda_graph_of_a_module(device: str, backend: str, dtype: torch.dtype) -> None:
    fused, plain = pair(ALIGNED, device, dtype, backend)

    def image(seed: int) -> Tensor:
        return on(device, ALIGNED, 2, 9, dtype, seed).contiguous(memory_format=torch.channels_last)

    def check() -> None:
        graph, static, out = captured(fused, image(1))
        results = []
        for seed in (2, 3):
            x = image(seed)
            results.append(replay(graph, static, out, x))
            comparison = judge(lambda x: replay(graph, static, out, x), plain, x)
            assert comparison.ok, comparison
        assert not torch.equal(*results)

    with torch.inference_mode():
        in_every_form(backend, device, dtype, ALIGNED, check)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["torchvision", "bvlc"])
def test_cuda_graph_of_the_network(variant: VariantName) -> None:
    plain = plain_googlenet(variant, num_classes=1000, aux_logits=False).to("cuda", torch.float16)
    fused = fuse(plain)
    x = torch.randn(2, 3, 224, 224).to("cuda", torch.float16)
    with torch.inference_mode():
        graph, static, out = captured(fused, torch.randn_like(x))
        comparison = judge(lambda x: replay(graph, static, out, x), plain, x)
    assert comparison.ok, comparison


@grid(torch.float16, devices=["cuda"])
def test_a_first_call_by_inductors_cuda_graphs(device: str, backend: str, dtype: torch.dtype) -> None:
    """Inductor's call before its capture allocates in the graph's memory; the weights kept of it must lie elsewhere."""
    fused, plain = pair(PRIMES, device, dtype, backend)
    compiled = torch.compile(fused, mode="reduce-overhead", fullgraph=True)
    try:
        with torch.inference_mode():
            for seed in (2, 3, 4, 5):
                x = on(device, PRIMES, 2, 9, dtype, seed)
                torch.compiler.cudagraph_mark_step_begin()
                comparison = judge(lambda x: compiled(x).clone(), plain, x)
                assert comparison.ok, comparison
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    finally:
        torch.compiler.reset()


# Weights kept from one call to the next, on other streams and in graphs.


both_ways = pytest.mark.parametrize("way", ["operator", "direct"])


def frozen_modules_by(way: str) -> torch.set_grad_enabled:
    """The mode in which all their calls go through the operator, or all but the first directly to the backend."""
    return torch.set_grad_enabled(way == "operator")


def keep_busy() -> torch.cuda.Event:
    """A tenth of a second's work or more for the current stream, and the event of its end."""
    busy = torch.full((8192, 8192), 1 / 8192, device="cuda", dtype=torch.float16)
    done = torch.cuda.Event()
    for _ in range(200):
        torch.mm(busy, busy, out=torch.empty_like(busy))
    done.record()
    return done


def poison() -> list[Tensor]:
    """NaN, in every dtype, in what small tensors have left free of the current stream's memory."""
    taken = [torch.empty(128, device="cuda") for _ in range(4096)]
    torch._foreach_add_(taken, float("nan"))
    return taken


@grid(torch.float16, torch.float32, devices=["cuda"])
def test_a_first_call_may_be_captured(device: str, backend: str, dtype: torch.dtype) -> None:
    """Nothing is packed before a replay: a call outside of the graph finds nothing to use, and a replay follows a change."""
    (fused, plain), (other, _) = pair(PRIMES, device, dtype, backend), pair(PRIMES, device, dtype, backend)
    x = on(device, PRIMES, 2, 9, dtype)
    static = torch.empty_like(x)
    with torch.no_grad():
        other(x), other(x)  # what a process or a device needs the first time
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fused(static)
        assert_agrees(fused, plain, x)
        for _ in range(2):
            comparison = judge(lambda x: replay(graph, static, out, x), plain, x)
            assert comparison.ok, comparison
            for parameter in plain.parameters():
                parameter.mul_(-1.5)


@both_ways
@grid(torch.float16, torch.float32, devices=["cuda"])
def test_a_graph_reads_the_weights_of_its_capture(device: str, backend: str, dtype: torch.dtype, way: str) -> None:
    """Also when they are no longer those of the module, whose memory would go to the next who wants some."""
    torch.cuda.empty_cache()
    fused, _ = pair(PRIMES, device, dtype, backend)
    fused.requires_grad_(False)
    x = on(device, PRIMES, 2, 9, dtype)
    with frozen_modules_by(way):
        fused(x)  # packed on the stream that asks for the memory below
        graph, static, out = captured(fused, x)
        before = replay(graph, static, out, x)
        for parameter in fused.parameters():
            parameter.mul_(-1.5)
        changed = fused(x)
        fused.repack()
        poisoned = poison()
        assert_same(replay(graph, static, out, x), before)
        del poisoned
        assert_same(fused(x), changed)
    assert before.isfinite().all()
    assert not torch.equal(changed, before)


@grid(torch.float16, torch.float32, devices=["cuda"])
def test_weights_packed_on_a_busy_stream_serve_another_at_once(device: str, backend: str, dtype: torch.dtype) -> None:
    (fused, _), (other, _) = pair(PRIMES, device, dtype, backend), pair(PRIMES, device, dtype, backend)
    x = on(device, PRIMES, 2, 9, dtype)
    stream = torch.cuda.Stream()
    with torch.inference_mode():
        expected = other(x)
        with torch.cuda.stream(stream):
            assert_same(other(x), expected)  # what a stream needs the first time is made
            poisoned = poison()
            torch.cuda.synchronize()
            del poisoned  # what the weights are packed into is not theirs yet
            done = keep_busy()
            assert not done.query(), "the stream was not busy for long enough to tell"
            fused(x)
        actual = fused(x)
        torch.cuda.synchronize()
    assert_same(actual, expected)


@both_ways
@grid(torch.float16, torch.float32, devices=["cuda"])
def test_weights_dropped_while_another_stream_reads_them(device: str, backend: str, dtype: torch.dtype, way: str) -> None:
    """They were packed on the stream that gets their memory next, which knows nothing of the other one's work."""
    torch.cuda.empty_cache()
    fused, _ = pair(PRIMES, device, dtype, backend)
    fused.requires_grad_(False)
    x = on(device, PRIMES, 2, 9, dtype)
    stream = torch.cuda.Stream()
    with frozen_modules_by(way):
        expected = fused(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            assert_same(fused(x), expected)
            done = keep_busy()
            actual = fused(x)
        fused.repack()
        poisoned = poison()
        assert not done.query(), "the stream was not busy for long enough to tell"
        stream.synchronize()
        del poisoned
    assert_same(actual, expected)

"""The forward pass past the operator: taken only where nothing can tell the difference, and right while it is taken."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import cases
import pytest
import torch
from pretended_cuda import PretendedCuda
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, prune
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from googlenet_fused import CannotFuse, FusedInception, direct, modules, use_backend
from googlenet_fused.backends import registry
from googlenet_fused.blocks import BasicConv2d, Norm
from googlenet_fused.modules import FusedConv2d
from googlenet_fused.randomize import randomize_

both_kinds = pytest.mark.parametrize("kind", ["inception", "stem"])


def make(kind: str, backend: str = "auto", norm: Norm = "batch") -> FusedInception | FusedConv2d:
    """A fused module of 5 input channels."""
    if kind == "inception":
        return cases.fused_inception(cases.TINY, norm, backend=backend)
    plain = randomize_(BasicConv2d(5, 4, norm=norm, kernel_size=3, stride=2, padding=1)).eval()
    return FusedConv2d.from_module(plain, backend=backend)


def image(batch: int = 2, height: int = 7, width: int = 6) -> Tensor:
    return cases.random_input(cases.TINY, batch, height, width)


@pytest.fixture
def operator_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Filled with a name for each call of a fused module that goes through its operator."""
    calls: list[str] = []
    for name in ("inception", "conv2d_relu"):
        face = getattr(modules, name)
        monkeypatch.setattr(modules, name, lambda *a, _face=face, _name=name, **k: (calls.append(_name), _face(*a, **k))[1])
    return calls


@both_kinds
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_only_the_first_call_needs_the_operator(
    kind: str, mode: Callable[[], AbstractContextManager[None]], operator_calls: list[str]
) -> None:
    module = make(kind)
    with mode():
        first = module(image())
        for _ in range(3):
            assert torch.equal(module(image()), first)
        for shape in ((1, 7, 6), (3, 4, 9)):
            assert torch.equal(module(image(*shape)), copy.deepcopy(module)(image(*shape)))
    assert len(operator_calls) == 3


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@both_kinds
def test_a_dispatch_mode_sees_the_operator(kind: str) -> None:
    module = make(kind)
    with torch.no_grad():
        expected = module(image())
        module(image())
        with Seen() as seen:
            assert torch.equal(module(image()), expected)
    assert any(name.startswith("googlenet_fused.") for name in seen.names)


@both_kinds
def test_a_profile_names_the_operator(kind: str) -> None:
    module = make(kind)
    with torch.no_grad():
        module(image())
        with torch.autograd.profiler.profile() as profile:
            module(image())
    assert any(event.key.startswith("googlenet_fused::") for event in profile.key_averages())


@contextmanager
def _in_forward_mode() -> Iterator[None]:
    with torch.autograd.forward_ad.dual_level():
        yield


OBSERVERS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "forward mode": _in_forward_mode,
    "dispatch mode": Seen,
    "function mode": lambda: BaseTorchFunctionMode(),
    "profiler": torch.autograd.profiler.profile,
}


@both_kinds
@pytest.mark.parametrize("observer", OBSERVERS)
def test_what_observes_gets_the_operator(kind: str, observer: str, operator_calls: list[str]) -> None:
    module = make(kind)
    with torch.no_grad():
        module(image())
        module(image())
        assert len(operator_calls) == 1
        with OBSERVERS[observer]():
            module(image())
        assert len(operator_calls) == 2
        module(image())
        assert len(operator_calls) == 2


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_gets_the_operator(operator_calls: list[str]) -> None:
    module = make("inception")
    with torch.no_grad():
        module(image())
        images = image()[:, None]
        expected = torch.stack([module(one) for one in images])
        assert len(operator_calls) == 1
        assert torch.equal(torch.func.vmap(module)(images), expected)
    assert len(operator_calls) == 2


@both_kinds
@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_a_trace_records_the_operator(kind: str, operator_calls: list[str]) -> None:
    module = make(kind)
    with torch.no_grad():
        expected = module(image())
        traced = torch.jit.trace(module, image(), check_trace=False)
        assert len(operator_calls) == 2
        assert "googlenet_fused::" in str(traced.inlined_graph)
        assert torch.equal(traced(image()), expected)


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_records_the_operator(pre_dispatch: bool) -> None:
    module = make("inception")
    with torch.no_grad():
        module(image()), module(image())
        graph = make_fx(module, pre_dispatch=pre_dispatch)(image()).graph
    assert [str(node.target) for node in graph.nodes if "mkldnn" in str(node.target)] == []
    assert any("googlenet_fused." in str(node.target) for node in graph.nodes)


class Marked(Tensor):
    """A tensor of a subclass, which every operator hands on."""


@both_kinds
def test_a_tensor_subclass_gets_the_operator(kind: str, operator_calls: list[str]) -> None:
    module = make(kind)
    with torch.no_grad():
        expected = module(image())
        module(image().as_subclass(Marked))
        assert len(operator_calls) == 2
        assert torch.equal(module(image()), expected)


# Changes of the module.


def _replace_weight(module: nn.Module) -> None:
    conv = next(child for child in module.modules() if isinstance(child, nn.Conv2d))
    conv.weight = nn.Parameter(conv.weight.detach() * -1)


def _replace_block(module: nn.Module) -> None:
    owner = module.get_submodule("branch2") if isinstance(module, FusedInception) else module
    name = "1" if isinstance(module, FusedInception) else "conv"
    owner._modules[name] = randomize_(copy.deepcopy(owner._modules[name]), seed=9).eval()  # type: ignore[arg-type]


def _last_norm(module: nn.Module) -> nn.BatchNorm2d:
    return [child for child in module.modules() if isinstance(child, nn.BatchNorm2d)][-1]


def _step(module: nn.Module, fused: bool) -> None:
    with torch.enable_grad():
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, fused=fused)
        module(image()).square().sum().backward()
        optimizer.step()


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "weight written": lambda module: next(module.parameters()).mul_(-1),
    "weight given other data": lambda module: setattr(next(module.parameters()), "data", next(module.parameters()).data * -1),
    "weight replaced": _replace_weight,
    "statistics written": lambda module: _last_norm(module).running_mean.add_(1),  # type: ignore[union-attr]
    "statistics replaced": lambda module: setattr(_last_norm(module), "running_var", _last_norm(module).running_var * 3),  # type: ignore[operator]
    "eps": lambda module: setattr(_last_norm(module), "eps", 2.0),
    "child replaced": _replace_block,
    "optimizer": lambda module: _step(module, fused=False),
    "fused optimizer": lambda module: _step(module, fused=True),
    "loaded": lambda module: module.load_state_dict({k: v * 2 for k, v in module.state_dict().items()}),
    "moved through half": lambda module: module.bfloat16().float(),
    "one norm in training": lambda module: _last_norm(module).train(),
}


@both_kinds
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_followed(kind: str, change: str) -> None:
    module = make(kind)
    with torch.no_grad():
        for _ in range(2):
            before = module(image())
        CHANGES[change](module)
        fresh = copy.deepcopy(module)
        after = module(image())
        assert torch.equal(after, fresh(image()))
        assert not torch.equal(after, before)


class OwnNorm(nn.BatchNorm2d):
    """A norm that someone puts into a fused module, which looks at the classes only when it is made."""


@both_kinds
def test_the_eps_of_a_derived_norm_is_followed(kind: str) -> None:
    module = make(kind)
    owner = module.branch1 if isinstance(module, FusedInception) else module
    norm = OwnNorm(owner.bn.num_features)
    norm.load_state_dict(owner.bn.state_dict())
    owner.bn = norm.eval()
    with torch.no_grad():
        before = module(image()), module(image())
        norm.eps = 2.0
        assert not torch.equal(module(image()), before[0])
        assert torch.equal(module(image()), copy.deepcopy(module)(image()))


@both_kinds
def test_statistics_that_a_plain_twin_has_updated_are_followed(kind: str) -> None:
    module = make(kind)
    twin = module.to_plain()
    with torch.no_grad():
        before = module(image()), module(image())
        twin.train()(image() * 3)
        twin.eval()
        after = module(image())
        assert not torch.equal(after, before[0])
        assert torch.equal(after, copy.deepcopy(module)(image()))


@both_kinds
def test_parameters_assigned_during_the_first_call_are_followed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make(kind)
    name = "inception" if kind == "inception" else "conv2d_relu"
    face = getattr(modules, name)

    def assigning(*args: object, **options: object) -> Tensor:
        out = face(*args, **options)
        _replace_weight(module)
        return out

    with torch.no_grad():
        monkeypatch.setattr(modules, name, assigning)
        module(image())
        monkeypatch.undo()
        expected = copy.deepcopy(module)(image())
        for _ in range(3):
            assert torch.equal(module(image()), expected)


@both_kinds
def test_a_step_of_an_unrelated_optimizer_changes_nothing(kind: str, packs: list[object], folds: list[object]) -> None:
    module, other = make(kind), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), fused=True)
    for _ in range(3):
        with torch.no_grad():
            module(image()), module(image())
        other(torch.ones(2)).sum().backward()
        optimizer.step()
    assert len(packs) + len(folds) in (1, 6 + 1), "packed once; an Inception module folds its six convolutions doing so"


@both_kinds
def test_a_module_that_has_run_is_freed_without_the_collector(kind: str) -> None:
    module = make(kind)
    with torch.no_grad():
        module(image()), module(image())
    alive = weakref.ref(next(module.parameters()))
    gc.disable()
    try:
        del module
        assert alive() is None
    finally:
        gc.enable()


PRUNERS: dict[str, Callable[[nn.Module], object]] = {
    "pruned": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    "parametrised": lambda conv: parametrizations.weight_norm(conv),
}


@both_kinds
@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_weight_taken_away_is_named(kind: str, pruner: str) -> None:
    module = make(kind)
    with torch.no_grad():
        module(image())
        PRUNERS[pruner](module.branch1.conv if isinstance(module, FusedInception) else module.conv)
        module.train().eval()
        with pytest.raises(CannotFuse, match=r"no parameter or buffer 'weight' any more .*googlenet_fused\.unfuse\(model\)"):
            module(image())
        assert module.to_plain()(image()).isfinite().all()


@pytest.mark.parametrize(("name", "value"), [("stride", (1, 1)), ("padding", (0, 0))])
def test_a_stems_other_geometry_is_followed(name: str, value: tuple[int, int]) -> None:
    stem = make("stem")
    with torch.no_grad():
        stem(image()), stem(image())
        setattr(stem.conv, name, value)
        assert torch.equal(stem(image()), copy.deepcopy(stem)(image()))


@both_kinds
def test_a_functional_call_runs_with_its_own_parameters(kind: str) -> None:
    module = make(kind)
    other = {name: parameter.detach() * -1 for name, parameter in module.named_parameters()}
    with torch.no_grad():
        before = module(image())
        module(image())
        assert not torch.equal(torch.func.functional_call(module, other, (image(),)), before)
        assert torch.equal(module(image()), before)


@both_kinds
def test_repack_of_one_module_is_seen_by_another_with_the_same_parameters(kind: str) -> None:
    module = make(kind)
    twin = type(module).from_module(module.to_plain())
    with torch.no_grad():
        before = module(image()), module(image()), twin(image()), twin(image())
        next(module.parameters()).data.mul_(-1)
        twin.repack()
        assert not torch.equal(module(image()), before[0])
        assert torch.equal(module(image()), twin(image()))


# Other modules and other requests.


@both_kinds
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "replica", "round trip"])
def test_a_copy_looks_after_its_own_parameters(kind: str, way: str) -> None:
    module = make(kind)
    with torch.no_grad():
        before = module(image())
        module(image())
        ways: dict[str, Callable[[], nn.Module]] = {
            "deepcopy": lambda: copy.deepcopy(module),
            "pickle": lambda: pickle.loads(pickle.dumps(module)),
            "replica": lambda: _replica(module),
            "round trip": lambda: type(module).from_module(copy.deepcopy(module.to_plain())),
        }
        other = ways[way]()
        assert torch.equal(other(image()), before)
        _replace_weight(other)
        assert not torch.equal(other(image()), before)
        if way != "replica":
            assert torch.equal(module(image()), before)


def _replica(module: nn.Module) -> nn.Module:
    """As ``torch.nn.parallel.replicate`` makes one: attributes copied, registries its own."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else _replica(child)
    for name, parameter in module._parameters.items():
        replica._parameters[name] = parameter
    for name, buffer in module._buffers.items():
        replica._buffers[name] = buffer
    return replica


@both_kinds
def test_the_backend_asked_for_is_the_one_that_runs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name in ("cpu", "reference"):
        backend = registry.get(name)
        for method in ("inception", "conv2d_relu"):
            run = getattr(backend, method)
            monkeypatch.setattr(backend, method, lambda *a, _run=run, _name=name: (ran.append(_name), _run(*a))[1])
    module = make(kind)
    with torch.no_grad():
        for name in ("reference", "cpu", "reference"):
            with use_backend(name):
                module(image()), module(image())
            assert ran == [name, name]
            ran.clear()
        module.backend = "reference"
        module(image()), module(image())
        assert ran == ["reference", "reference"]


@both_kinds
def test_autocast_and_plain_calls_alternate(kind: str) -> None:
    module = make(kind)
    with torch.no_grad():
        for enabled in (False, True, False, True):
            with torch.autocast("cpu", torch.bfloat16) if enabled else nullcontext():
                assert module(image()).dtype == (torch.bfloat16 if enabled else torch.float32)
        with pytest.raises(TypeError, match=r"x is torch\.bfloat16 but the weights are torch\.float32"):
            module(image().bfloat16())


WRONG = {
    "channels": lambda: image()[:, :4],
    "three dimensions": lambda: image()[0],
    "dtype": lambda: image().double(),
    "no height": lambda: image()[:, :, :0],
}


@both_kinds
@pytest.mark.parametrize("what", WRONG)
def test_wrong_inputs_raise_what_the_operator_raises(kind: str, what: str) -> None:
    module = make(kind)
    with torch.no_grad():
        with pytest.raises((ValueError, TypeError)) as first:
            module(WRONG[what]())
        module(image()), module(image())
        with pytest.raises(type(first.value)) as later:
            module(WRONG[what]())
    assert str(later.value) == str(first.value)


def test_an_image_too_small_for_the_stem_raises_what_the_operator_raises() -> None:
    stem = FusedConv2d.from_module(BasicConv2d(5, 4, kernel_size=7, stride=2, padding=1).eval())
    with torch.no_grad():
        stem(image()), stem(image())
        assert stem(image(1, 5, 5)).shape == (1, 4, 1, 1)
        with pytest.raises(ValueError, match="too small for a 7x7 convolution"):
            stem(image(1, 5, 4))


@both_kinds
def test_an_empty_batch_after_a_full_one(kind: str) -> None:
    module = make(kind)
    with torch.no_grad():
        full = module(image())
        module(image())
        assert module(image(0)).shape == (0, *full.shape[1:])


@both_kinds
def test_fp32_on_cuda_is_chosen_for_anew_in_another_arithmetic(
    kind: str, cuda: PretendedCuda, operator_calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend that is right in fp32 may be wrong in TF32."""
    flags = ["float32"]
    doubts = {"float32": None, "tf32": "its self-check failed"}
    monkeypatch.setattr(registry.get("cpu"), "doubt", lambda problem: doubts[flags[-1]])
    monkeypatch.setattr(direct, "arithmetic", lambda dtype: flags[-1])
    ran: list[str] = []
    for name in ("cpu", "reference"):
        for method in ("inception", "conv2d_relu"):
            run = getattr(registry.get(name), method)
            monkeypatch.setattr(registry.get(name), method, lambda *a, _run=run, _name=name: (ran.append(_name), _run(*a))[1])
    module = make(kind)
    with torch.no_grad():
        for arithmetic, name in (("float32", "cpu"), ("tf32", "reference"), ("float32", "cpu")):
            flags.append(arithmetic)
            module(image()), module(image()), module(image())
            assert ran == [name] * 3
            ran.clear()
    assert len(operator_calls) == 3, "the first in each arithmetic"


@both_kinds
def test_a_choice_that_was_hindered_is_not_kept(kind: str, operator_calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    doubts: list[str | None] = [registry.Hindrance("no memory")]
    monkeypatch.setattr(registry.get("cpu"), "doubt", lambda problem: doubts[-1])
    module = make(kind)
    with torch.no_grad():
        for _ in range(3):
            module(image())
        assert len(operator_calls) == 3
        for doubt in (None, "it is wrong"):
            doubts.append(doubt)
            module.repack()
            operator_calls.clear()
            for _ in range(3):
                module(image())
            assert len(operator_calls) == 1


# What a later conversion of the parameters may need.


@both_kinds
@pytest.mark.parametrize("conversion", ["double", "load_state_dict"])
@pytest.mark.parametrize("captured", [False, True])
def test_parameters_that_torch_swaps(kind: str, conversion: str, captured: bool, cuda: PretendedCuda) -> None:
    module = nn.Sequential(make(kind))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with torch.no_grad():
            module(image()), module(image())
            cuda.capturing = captured
            module(image())
            cuda.capturing = False
            if conversion == "double":
                assert module.double()(image().double()).dtype == torch.float64
            else:
                module.load_state_dict({name: tensor * 2 for name, tensor in module.state_dict().items()})
            x = image().to(next(module.parameters()).dtype)
            assert torch.equal(module(x), copy.deepcopy(module)(x))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@both_kinds
def test_a_compiled_plain_block_does_not_run_in_place_of_the_fused_one(kind: str, operator_calls: list[str]) -> None:
    plain = make(kind).to_plain()
    expected = plain(image())
    plain.compile(backend="eager")
    fused = (FusedInception if kind == "inception" else FusedConv2d).from_module(plain)
    torch.testing.assert_close(fused(image()), expected, rtol=1e-4, atol=1e-4)
    assert len(operator_calls) == 1


# On a CUDA device.


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> PretendedCuda:
    return PretendedCuda(monkeypatch)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """The weights that the cpu backend ran on, for each of its calls."""
    calls: list[list[Tensor]] = []
    backend = registry.get("cpu")
    inception, conv2d_relu = backend.inception, backend.conv2d_relu

    def read_inception(x: Tensor, packed: Sequence[Tensor], prepared: Sequence[Tensor], out: Tensor) -> None:
        calls.append([*packed, *prepared])
        inception(x, packed, prepared, out)

    def read_conv2d_relu(x: Tensor, weight: Tensor, bias: Tensor, prepared: Sequence[Tensor], *geometry: object) -> Tensor:
        calls.append([weight, bias, *prepared])
        return conv2d_relu(x, weight, bias, prepared, *geometry)

    monkeypatch.setattr(backend, "inception", read_inception)
    monkeypatch.setattr(backend, "conv2d_relu", read_conv2d_relu)
    return calls


def still_alive(references: list[weakref.ref[Tensor]]) -> list[bool]:
    return [reference() is not None for reference in references]


@both_kinds
def test_a_first_call_in_a_capture_leaves_nothing_to_later_ones(
    kind: str, cuda: PretendedCuda, operator_calls: list[str], reads: list[list[Tensor]]
) -> None:
    module = make(kind, backend="cpu")
    with torch.no_grad():
        cuda.capturing = True
        expected = module(image())
        assert torch.equal(module(image()), expected)
        in_graph = [weakref.ref(tensor) for call in reads for tensor in call]
        reads.clear()
        assert not any(still_alive(in_graph))
        cuda.capturing = False
        for _ in range(3):
            assert torch.equal(module(image()), expected)
    assert len(operator_calls) == 3
    assert [list(map(id, call)) for call in reads] == [list(map(id, reads[0]))] * 3


@both_kinds
@pytest.mark.parametrize("way", ["operator", "direct"])
@pytest.mark.parametrize(
    "change", ["weight written", "weight given other data", "loaded", "moved through half", "one norm in training"]
)
def test_what_a_graph_reads_lives_as_long_as_the_weight(
    kind: str, way: str, change: str, cuda: PretendedCuda, operator_calls: list[str], reads: list[list[Tensor]]
) -> None:
    module = make(kind, backend="cpu").requires_grad_(False)
    with torch.no_grad():
        module(image()), module(image())
    cuda.capturing = True
    with torch.set_grad_enabled(way == "operator"):
        module(image())
    cuda.capturing = False
    assert len(operator_calls) == (2 if way == "operator" else 1)
    in_graph = [weakref.ref(tensor) for tensor in reads[-1]]
    with torch.no_grad():
        CHANGES[change](module)
        module(image()), module(image())
        module.repack()
    reads.clear()
    gc.collect()
    assert all(still_alive(in_graph))
    del module
    gc.collect()
    assert not any(still_alive(in_graph))


@both_kinds
def test_weights_that_no_graph_reads_are_freed(kind: str, cuda: PretendedCuda, reads: list[list[Tensor]]) -> None:
    module = make(kind, backend="cpu")
    with torch.no_grad():
        module(image()), module(image())
        read = [weakref.ref(tensor) for tensor in reads[-1]]
        reads.clear()
        _replace_weight(module)
        module(image())
    assert not any(still_alive(read))


@both_kinds
@pytest.mark.parametrize("norm", ["batch", None])
def test_a_replay_reads_the_weights_of_its_capture(kind: str, norm: Norm, cuda: PretendedCuda) -> None:
    module = make(kind, norm=norm)
    with torch.no_grad():
        before = module(image())
        watch = module._watch
        assert watch is not None
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.mul_(3)
        assert torch.equal(watch.value.run(image()), before)
        assert not torch.equal(module(image()), before)


@both_kinds
def test_the_allocator_is_told_once_of_each_other_stream(kind: str, cuda: PretendedCuda, reads: list[list[Tensor]]) -> None:
    module = make(kind, backend="cpu")
    with torch.no_grad():
        module(image()), module(image())
        cuda.default.recorded.clear()
        for stream in (cuda.default, cuda.side, cuda.default, cuda.side):
            cuda.stream = stream
            module(image())
        assert cuda.side.recorded == list(map(id, reads[-1]))
        assert cuda.default.recorded == []

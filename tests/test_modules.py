"""FusedInception and FusedConv2d as modules: interface, training, changes of parameters, copies, hooks, refusals."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import logging
import pickle
import threading
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from cases import LAYOUTS, ODD_SPECS, TINY, both_kernels, fused_inception, plain_inception, random_input
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torchvision.models.googlenet import BasicConv2d as TorchvisionConv
from torchvision.models.googlenet import GoogLeNet as TorchvisionGoogLeNet
from torchvision.models.googlenet import Inception as TorchvisionInception
from torchvision.models.googlenet import InceptionAux as TorchvisionAux

from googlenet_fused import CannotFuse, FusedInception, ops, parameter_cache
from googlenet_fused.backends import cpu, registry
from googlenet_fused.backends.registry import Problem
from googlenet_fused.blocks import BasicConv2d, Inception, Norm
from googlenet_fused.models import GoogLeNet
from googlenet_fused.modules import FusedConv2d
from googlenet_fused.randomize import randomize_
from googlenet_fused.spec import InceptionSpec
from googlenet_fused.tolerance import check_close, judge

PRIMES = ODD_SPECS["primes"]


def can_run(dtype: torch.dtype) -> list[str]:
    """The backends that run Inception modules of this dtype on this machine's CPU."""
    return [name for name in registry.names() if registry.get(name).supports(Problem(torch.device("cpu"), dtype, TINY)) is None]


every_backend = pytest.mark.parametrize("backend", can_run(torch.float32))
both_norms = pytest.mark.parametrize("norm", ["batch", None])


def assert_same(actual: Tensor, expected: Tensor, label: str = "") -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, msg=lambda text: f"{label}: {text}")


def assert_agrees(fused: nn.Module, plain: nn.Module, x: Tensor) -> None:
    comparison = judge(fused, plain, x)
    assert comparison.ok, comparison


def torchvision_inception(spec: InceptionSpec = PRIMES, seed: int = 0) -> TorchvisionInception:
    return randomize_(TorchvisionInception(*list(spec)[:7]), seed).eval()


# The constructor.


def test_signature_is_torchvisions() -> None:
    theirs = list(inspect.signature(TorchvisionInception.__init__).parameters.values())
    ours = list(inspect.signature(FusedInception.__init__).parameters.values())
    described = [[(p.name, p.kind, p.default) for p in parameters] for parameters in (theirs, ours)]
    assert described[1][: len(theirs)] == described[0]
    for extra in ours[len(theirs) :]:
        assert extra.kind is inspect.Parameter.KEYWORD_ONLY
        assert extra.default is not inspect.Parameter.empty


@pytest.mark.parametrize("spec", ODD_SPECS.values(), ids=ODD_SPECS)
def test_state_dict_is_torchvisions(spec: InceptionSpec) -> None:
    theirs, ours = torchvision_inception(spec), FusedInception(*list(spec)[:7])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for name, value in theirs.state_dict().items():
        assert_same(ours.state_dict()[name], value, name)
    back = TorchvisionInception(*list(spec)[:7]).eval()
    back.load_state_dict(ours.state_dict(), strict=True)
    assert_agrees(ours.eval(), back, random_input(spec, 2, 5, 4))


def test_random_draws_are_torchvisions() -> None:
    torch.manual_seed(3)
    theirs = TorchvisionInception(*list(PRIMES)[:7])
    state = torch.get_rng_state()
    torch.manual_seed(3)
    ours = FusedInception(*list(PRIMES)[:7])
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in theirs.state_dict().items():
        assert_same(ours.state_dict()[name], value, name)


@pytest.mark.parametrize("large_kernel", [3, 5])
@both_norms
def test_constructor_arguments(norm: Norm, large_kernel: int) -> None:
    spec = replace(PRIMES, large_kernel=large_kernel)
    module = FusedInception(*list(spec)[:7], large_kernel=large_kernel, norm=norm, backend="reference")
    assert module.spec == spec
    assert module.backend == "reference"
    assert module.training
    plain = Inception(*list(spec)[:7], large_kernel=large_kernel, norm=norm)
    assert {k: v.shape for k, v in module.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    defaults = FusedInception(*list(spec)[:7])
    assert (defaults.spec.large_kernel, defaults.backend, defaults.branch1.bn is None) == (3, "auto", False)


@pytest.mark.parametrize("conv_block", [TorchvisionConv, BasicConv2d, partial(BasicConv2d, norm="batch")])
def test_conv_block_is_used(conv_block: Callable[..., nn.Module]) -> None:
    module = randomize_(FusedInception(*list(TINY)[:7], conv_block)).eval()
    made = conv_block.func if isinstance(conv_block, partial) else conv_block
    assert {type(block) for block in module.modules() if isinstance(block, BasicConv2d | TorchvisionConv)} == {made}
    assert_agrees(module, module.to_plain(), random_input(TINY, 1, 4, 5))


class WithoutReLU(TorchvisionConv):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


@pytest.mark.parametrize(
    ("conv_block", "message"),
    [
        (nn.Conv2d, "branch1: Conv2d is not a BasicConv2d of torchvision's or googlenet_fused's GoogLeNet"),
        (WithoutReLU, "branch1: WithoutReLU is not a BasicConv2d"),
        (partial(TorchvisionConv, dilation=2), "branch1: its convolution is grouped, dilated or not padded"),
        (partial(TorchvisionConv, padding_mode="reflect"), "branch1: its convolution is grouped, dilated or not padded"),
        (partial(BasicConv2d, stride=2), r"branch1 has stride \(2, 2\) and padding \(0, 0\), not 1 and 0"),
    ],
)
def test_conv_block_that_cannot_be_fused(conv_block: Callable[..., nn.Module], message: str) -> None:
    with pytest.raises(CannotFuse, match=message):
        FusedInception(*list(TINY)[:7], conv_block)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ch3x3": 0}, "ch3x3 must be a positive integer, got 0"),
        ({"large_kernel": 7}, "large_kernel must be 3 or 5, got 7"),
        ({"norm": "layer"}, "norm must be 'batch' or None, got 'layer'"),
        ({"backend": "tpu"}, "unknown backend 'tpu': choose one of 'auto'"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    widths = dict(zip(("in_channels", "ch1x1", "ch3x3red", "ch3x3", "ch5x5red", "ch5x5", "pool_proj"), TINY, strict=False))
    with pytest.raises(ValueError, match=message):
        FusedInception(**{**widths, **arguments})  # type: ignore[arg-type]


def test_wrong_input() -> None:
    module = fused_inception(TINY)
    with pytest.raises(ValueError, match=r"x must be \[n, 5, h, w\] .*, got \[1, 4, 3, 3\]"):
        module(torch.randn(1, 4, 3, 3))
    with pytest.raises(ValueError, match=r"got \[5, 3, 3\]"):
        module(torch.randn(5, 3, 3))
    with pytest.raises(TypeError, match=r"x is torch.bfloat16 but the weights are torch.float32"):
        module(random_input(TINY, 1, 3, 3, torch.bfloat16))


# In torchvision's network.


def hosts() -> tuple[nn.Module, nn.Module]:
    """torchvision's GoogLeNet with its own blocks and with FusedInception, of one randomised state."""
    plain = randomize_(TorchvisionGoogLeNet(init_weights=False, num_classes=10))
    fused = TorchvisionGoogLeNet(init_weights=False, num_classes=10, blocks=[TorchvisionConv, FusedInception, TorchvisionAux])
    assert sum(isinstance(module, FusedInception) for module in fused.modules()) == 9
    fused.load_state_dict(plain.state_dict(), strict=True)
    return plain, fused


def test_as_a_block_of_torchvisions_network() -> None:
    plain, fused = hosts()
    assert_agrees(fused.eval(), plain.eval(), torch.randn(2, 3, 64, 48))


def test_as_a_block_of_torchvisions_network_in_training() -> None:
    plain, fused = hosts()
    x, results = torch.randn(2, 3, 48, 48), []
    for model in (plain, fused):
        torch.manual_seed(1)
        outputs = model(x)
        sum(output.square().mean() for output in outputs).backward()
        results.append([*outputs, *(p.grad for p in model.parameters()), *model.buffers()])
    for theirs, ours in zip(*results, strict=True):
        assert_same(ours, theirs)
    assert_agrees(fused.eval(), plain.eval(), x)


def test_torchvisions_initial_weights_under_one_seed() -> None:
    states = []
    for inception in (TorchvisionInception, FusedInception):
        torch.manual_seed(5)
        states.append(TorchvisionGoogLeNet(init_weights=True, blocks=[TorchvisionConv, inception, TorchvisionAux]).state_dict())
    for name, value in states[0].items():
        assert_same(states[1][name], value, name)


def test_as_a_block_of_our_network() -> None:
    fused = GoogLeNet(
        10, variant="bvlc", aux_logits=False, init_weights=False, blocks=[
            partial(BasicConv2d, norm=None), partial(FusedInception, norm=None, large_kernel=5), TorchvisionAux,
        ],
    )  # fmt: skip
    plain = GoogLeNet(10, variant="bvlc", aux_logits=False, init_weights=False)
    fused.load_state_dict(randomize_(plain).state_dict(), strict=True)
    assert_agrees(fused.eval(), plain.eval(), torch.randn(1, 3, 64, 64))


# Training.


def step(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and batch norm statistics of one training step."""
    x = x.clone().requires_grad_()
    out = module(x)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert x.grad is not None
    gradients = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    return {"out": out.detach(), "x": x.grad, **gradients, **{k: v.clone() for k, v in module.named_buffers()}}


def assert_step_agrees(actual: dict[str, Tensor], plain: nn.Module, x: Tensor) -> None:
    """The step of a fused module against the plain one's, which is judged in torch's two layouts."""
    peers = []
    for layout in (LAYOUTS["contiguous"], LAYOUTS["channels_last"]):
        host = copy.deepcopy(plain)
        host.zero_grad()
        peers.append(step(host, layout(x)))
    truth = step(copy.deepcopy(plain).double(), x.double())
    terms = max(parameter[0].numel() for parameter in plain.parameters())
    assert list(actual) == list(truth)
    for name, value in actual.items():
        if value.is_floating_point():
            check_close(value, [peer[name] for peer in peers], truth[name], terms, label=name)


def frozen(module: nn.Module, which: Callable[[str], bool]) -> nn.Module:
    """In training mode, but for the batch norms that ``which`` picks by name."""
    module.train()
    for name, norm in module.named_modules():
        if isinstance(norm, nn.BatchNorm2d) and which(name):
            norm.eval()
    return module


@pytest.mark.parametrize("spec", both_kernels(PRIMES), ids=["3", "5"])
@pytest.mark.parametrize("some_frozen", [False, True])
def test_training_is_the_plain_modules(spec: InceptionSpec, some_frozen: bool) -> None:
    modules = plain_inception(spec), fused_inception(spec)
    x = random_input(spec, 4, 5, 6)
    for module in modules:
        frozen(module, lambda name: some_frozen and "branch3" in name)
    for _ in range(2):
        expected, actual = (step(module, x) for module in modules)
        assert list(actual) == list(expected)
        for name, value in expected.items():
            assert_same(actual[name], value, name)
    tracked = [value.item() for name, value in modules[1].named_buffers() if name.endswith("num_batches_tracked")]
    assert tracked == ([2, 2, 2, 0, 0, 2] if some_frozen else [2] * 6)
    assert_agrees(modules[1].eval(), modules[0].eval(), x)


@every_backend
@pytest.mark.parametrize("frozen_norm", ["batch", None])
def test_training_without_live_batch_norm_runs_fused(frozen_norm: Norm, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(PRIMES, large_kernel=5)
    plain, fused = plain_inception(spec, frozen_norm), fused_inception(spec, frozen_norm, backend=backend)
    for module in (plain, fused):
        frozen(module, lambda name: True)
    monkeypatch.setattr(Inception, "forward", lambda *_: pytest.fail("FusedInception ran the plain sequence"))
    x = random_input(spec, 2, 5, 6)
    actual = step(fused, x)
    monkeypatch.undo()
    assert_step_agrees(actual, plain, x)
    assert_agrees(fused, plain, x)


# Following the parameters.


def same_class(block: nn.Module, seed: int) -> nn.Module:
    """Another block like this one, with other weights."""
    return randomize_(copy.deepcopy(block), seed)


def in_place(module: FusedInception) -> None:
    with torch.no_grad():
        module.branch3[1].conv.weight.mul_(1.5)


def in_place_under_inference_mode(module: FusedInception) -> None:
    with torch.inference_mode():
        module.branch2[0].conv.weight.mul_(1.5)


def one_element(module: FusedInception) -> None:
    with torch.no_grad():
        module.branch4[1].conv.weight[0, 0, 0, 0] = 9


def through_detach(module: FusedInception) -> None:
    module.branch1.bn.bias.detach().add_(1)


def optimizer_step(module: FusedInception, make: Callable[..., torch.optim.Optimizer], **options: object) -> None:
    optimizer = make(module.parameters(), lr=0.1, **options)
    with torch.enable_grad():
        module(random_input(module.spec, 2, 4, 4, next(module.parameters()).dtype)).square().sum().backward()
    optimizer.step()
    module.zero_grad()


def training_step(module: FusedInception) -> None:
    """Moves the running statistics alone."""
    module.train()
    with torch.no_grad():
        module(random_input(module.spec, 4, 4, 4) + 1)
    module.eval()


def load(module: FusedInception, assign: bool) -> None:
    state = same_class(module, 9).state_dict()
    module.load_state_dict(state, assign=assign)


def load_one_tensor(module: FusedInception) -> None:
    module.load_state_dict({"branch3.0.bn.running_var": module.branch3[0].bn.running_var * 3}, strict=False)


def replaced_parameter(module: FusedInception) -> None:
    module.branch2[1].conv.weight = nn.Parameter(module.branch2[1].conv.weight.detach() * 1.5)


def replaced_buffer(module: FusedInception) -> None:
    module.branch2[1].bn.running_mean = module.branch2[1].bn.running_mean + 1


def replaced_block(module: FusedInception) -> None:
    module.branch3[1] = same_class(module.branch3[1], 9)


def data_swap(module: FusedInception) -> None:
    module.branch4[1].conv.weight.data = module.branch4[1].conv.weight.detach() * 1.5


def replaced_parameter_in_the_same_place(module: FusedInception) -> None:
    """Another tensor with the old one's address and version."""
    conv = module.branch3[1].conv
    memory = conv.weight.data
    memory.mul_(1.5)
    while memory._version < conv.weight._version:
        memory.add_(0)
    state = conv.weight._version, conv.weight.data_ptr()
    conv.weight = nn.Parameter(memory)
    assert (conv.weight._version, conv.weight.data_ptr()) == state


def statistics_in_place(module: FusedInception) -> None:
    module.branch1.bn.running_var.mul_(2)


def other_eps(module: FusedInception) -> None:
    module.branch2[1].bn.eps = 0.5


def parameters_to_vector(module: FusedInception) -> None:
    vector = torch.nn.utils.parameters_to_vector(module.parameters()).detach() * 1.5
    torch.nn.utils.vector_to_parameters(vector, module.parameters())


CHANGES: dict[str, Change] = {
    "in place": in_place,
    "in place under inference_mode": in_place_under_inference_mode,
    "one element": one_element,
    "through detach": through_detach,
    "SGD": partial(optimizer_step, make=torch.optim.SGD),
    "SGD, momentum, foreach": partial(optimizer_step, make=torch.optim.SGD, momentum=0.9, foreach=True),
    "Adam, fused": partial(optimizer_step, make=torch.optim.Adam, fused=True),
    "training step": training_step,
    "load_state_dict": partial(load, assign=False),
    "load_state_dict, assign": partial(load, assign=True),
    "load one tensor": load_one_tensor,
    "replaced parameter": replaced_parameter,
    "replaced parameter in the same place": replaced_parameter_in_the_same_place,
    "replaced buffer": replaced_buffer,
    "replaced block": replaced_block,
    "data swap": data_swap,
    "vector_to_parameters": parameters_to_vector,
    "statistics in place": statistics_in_place,
    "eps": other_eps,
    "randomize_": partial(randomize_, seed=9),
}


Change = Callable[[FusedInception], object]


def assert_follows(module: FusedInception, change: Change, dtype: torch.dtype = torch.float32) -> None:
    """Run, change, run: the second result is that of a copy which never ran before the change."""
    before_x, x = random_input(module.spec, 2, 4, 5), random_input(module.spec, 2, 4, 5, dtype)
    with torch.no_grad():
        before = module(before_x)
        assert torch.equal(module(before_x), before)
    change(module)
    with torch.no_grad():
        after = module(x)
        assert after.dtype == dtype
        assert not torch.equal(after, before.to(dtype)), "the change has no effect on the output"
        assert_same(after, copy.deepcopy(module)(x))
    assert_agrees(module, module.to_plain(), x)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@every_backend
def test_changes_of_parameters_are_followed(backend: str, change: Change) -> None:
    assert_follows(fused_inception(replace(PRIMES, large_kernel=5), backend=backend), change)


OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.01),
    "SGD, fused": partial(torch.optim.SGD, lr=0.01, fused=True),
    "Adam": partial(torch.optim.Adam, lr=0.01),
    "Adam, foreach": partial(torch.optim.Adam, lr=0.01, foreach=True),
    "AdamW, fused": partial(torch.optim.AdamW, lr=0.01, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@every_backend
def test_training_without_norm_follows_every_step(
    backend: str, optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer]
) -> None:
    """A fused optimizer writes to the parameters without counting a version of them, and no change of mode comes between."""
    module = fused_inception(PRIMES, norm=None, backend=backend).train()
    steps, x = optimizer(module.parameters()), random_input(PRIMES, 2, 4, 5)
    for _ in range(3):
        out = module(x)
        assert_same(out, copy.deepcopy(module)(x))
        steps.zero_grad()
        out.square().mean().backward()
        steps.step()
    with torch.no_grad():
        assert_same(module(x), copy.deepcopy(module)(x))


@pytest.mark.parametrize(
    "change",
    ["in place", "SGD", "Adam, fused", "load_state_dict", "load_state_dict, assign", "replaced parameter", "data swap"],
)
@every_backend
def test_changes_of_parameters_are_followed_without_norm(backend: str, change: str) -> None:
    assert_follows(fused_inception(PRIMES, norm=None, backend=backend), CHANGES[change])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("how", ["method", "to"])
@both_norms
def test_changes_of_dtype_are_followed(norm: Norm, how: str, dtype: torch.dtype) -> None:
    methods = {torch.bfloat16: "bfloat16", torch.float16: "half", torch.float64: "double"}
    change = (lambda m: getattr(m, methods[dtype])()) if how == "method" else (lambda m: m.to(dtype))
    assert_follows(fused_inception(PRIMES, norm), change, dtype)


@every_backend
def test_memory_format_of_the_parameters_may_change(backend: str) -> None:
    module, x = fused_inception(PRIMES, backend=backend), random_input(PRIMES, 2, 4, 5)
    with torch.no_grad():
        before = module(x)
        assert_same(module.to(memory_format=torch.channels_last)(x), before)  # type: ignore[call-overload]


@every_backend
@both_norms
def test_a_round_trip_through_another_dtype_is_followed(norm: Norm, backend: str) -> None:
    """Rounded to bf16 and back, each tensor in the memory it had at first, as an allocator likes to place it."""
    module, x = fused_inception(PRIMES, norm, backend=backend), random_input(PRIMES, 2, 4, 5)
    with torch.no_grad():
        module(x)
        memory = [tensor.data for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
        module.bfloat16()
        rounded = [tensor.data for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
        back = {tensor.data_ptr(): home for tensor, home in zip(rounded, memory, strict=True)}
        module._apply(lambda tensor: back[tensor.data_ptr()].copy_(tensor) if tensor.is_floating_point() else tensor)
        assert_same(module(x), copy.deepcopy(module)(x))


@pytest.mark.parametrize("notice", ["repack", "train", "eval", "parent"])
@every_backend
def test_a_write_through_data_is_followed_after_notice(backend: str, notice: str) -> None:
    def change(module: FusedInception) -> None:
        module.branch3[1].conv.weight.data.mul_(1.5)
        if notice == "parent":
            nn.Sequential(module).eval()
        else:
            getattr(module, notice)()
        module.eval()

    assert_follows(fused_inception(PRIMES, backend=backend), change)


@pytest.mark.parametrize("notice", ["repack", "train"])
@every_backend
def test_a_write_through_data_into_a_bias_is_followed_after_notice(backend: str, notice: str) -> None:
    def change(module: FusedInception) -> None:
        module.branch3[1].conv.bias.data.add_(1)
        module.branch3[1].conv.weight.data.mul_(2)
        getattr(module, notice)()

    assert_follows(fused_inception(PRIMES, norm=None, backend=backend), change)


@every_backend
def test_weights_are_packed_once(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[torch.dtype] = []
    pack = ops.pack_inception
    monkeypatch.setattr(ops, "pack_inception", lambda convs, dtype: (packed.append(dtype), pack(convs, dtype))[1])
    module = fused_inception(PRIMES, backend=backend)
    with torch.no_grad():
        for size in ((1, 4, 4), (3, 5, 2), (1, 4, 4)):
            module(random_input(PRIMES, *size))
        assert packed == [torch.float32]
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                module(random_input(PRIMES, 1, 4, 4))
            module(random_input(PRIMES, 1, 4, 4))
        assert packed == [torch.float32, torch.bfloat16]
    with torch.inference_mode():
        module(random_input(PRIMES, 1, 4, 4))
    assert len(packed) == 2
    module.repack()
    with torch.no_grad():
        module(random_input(PRIMES, 1, 4, 4))
    assert len(packed) == 3


@every_backend
@both_norms
def test_parameters_are_freed_with_the_module(norm: Norm, backend: str) -> None:
    modules = [
        (fused_inception(TINY, norm, backend=backend), random_input(TINY, 1, 4, 4)),
        (fused_conv(norm, backend=backend), torch.randn(1, 3, 8, 8)),
    ]
    while modules:
        module, x = modules.pop()
        with torch.no_grad():
            module(x)
        alive = {name: weakref.ref(parameter) for name, parameter in module.named_parameters()}
        del module
        gc.collect()
        assert [name for name, parameter in alive.items() if parameter() is not None] == []


@every_backend
@both_norms
def test_weights_packed_under_inference_mode_are_kept(
    norm: Norm, backend: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[str] = []
    for owner, name in ((ops, "pack_inception"), (cpu, "_prepack")):
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, _f=original, _n=name, **kwargs: (made.append(_n), _f(*args, **kwargs))[1]
        )
    module, x = fused_inception(PRIMES, norm, backend=backend), random_input(PRIMES, 2, 4, 5)
    with torch.inference_mode():
        module(x)
    once = list(made)
    assert once.count("pack_inception") == 1
    assert (backend == "cpu") == ("_prepack" in once)
    with torch.inference_mode():
        expected = module(x)
    with torch.no_grad():
        assert_same(module(x), expected)
    assert made == once
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@every_backend
def test_parameters_made_under_inference_mode_are_warned_of_once(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    parameter_cache._warn_of_inference_tensors.cache_clear()
    with torch.inference_mode():
        module, x = fused_inception(TINY, backend=backend), random_input(TINY, 2, 4, 5)
        for _ in range(2):
            module(x)
    (record,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
    assert "created under torch.inference_mode()" in record.getMessage()


# Copies and files.


def through_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def through_a_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_a_file])
@pytest.mark.parametrize("origin", ["constructor", "constructor, no norm", "torchvision", "ours", "ours, no norm"])
def test_copies(origin: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    norm: Norm = None if "no norm" in origin else "batch"
    if origin == "torchvision":
        module = FusedInception.from_module(torchvision_inception(), backend="reference")
    elif "ours" in origin:
        module = fused_inception(PRIMES, norm, backend="reference")
    else:
        widths = list(PRIMES)[:7]
        module = randomize_(FusedInception(*widths, large_kernel=5, norm=norm, backend="reference")).eval()
    x = random_input(PRIMES, 2, 4, 5)
    with torch.no_grad():
        expected = module(x)  # packs, so that what is packed is there to be copied
        twin = duplicate(module)
        assert isinstance(twin, FusedInception)
        assert (twin.backend, twin.spec, twin.plain_class) == ("reference", module.spec, module.plain_class)
        assert not twin.training
        assert_same(twin(x), expected)
        assert {p.data_ptr() for p in twin.parameters()}.isdisjoint({p.data_ptr() for p in module.parameters()})
        in_place(twin)  # type: ignore[arg-type]
        assert not torch.equal(twin(x), expected)
        assert_same(module(x), expected)
        in_place(module)
        assert_same(module(x), twin(x))


@pytest.mark.parametrize("weights_only", [True, False])
def test_state_dict_through_a_file(weights_only: bool) -> None:
    module, x, file = fused_inception(PRIMES), random_input(PRIMES, 2, 4, 5), io.BytesIO()
    with torch.no_grad():
        expected = module(x)
        torch.save(module.state_dict(), file)
        file.seek(0)
        other = fused_inception(PRIMES, seed=7)
        assert not torch.equal(other(x), expected)
        other.load_state_dict(torch.load(file, weights_only=weights_only), strict=True)
        assert_same(other(x), expected)


# Precision, memory format, gradient modes.


@every_backend
@pytest.mark.parametrize("amp_dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@both_norms
def test_autocast(norm: Norm, amp_dtype: torch.dtype, backend: str) -> None:
    if backend not in can_run(amp_dtype):
        pytest.skip(f"{backend} cannot run {amp_dtype} here")
    spec = replace(PRIMES, large_kernel=5)
    plain, fused, x = plain_inception(spec, norm), fused_inception(spec, norm, backend=backend), random_input(spec, 2, 9, 8)
    twice = torch.cat([x, x])
    for grad in (False, True):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", amp_dtype):
            actual = fused(x)
            peers = [plain(x), plain(twice)[:2], plain(LAYOUTS["channels_last"](twice))[:2]]
        assert actual.dtype == peers[0].dtype == amp_dtype
        check_close(actual, peers, copy.deepcopy(plain).double()(x.double()))
    with torch.no_grad():
        with torch.autocast("cpu", amp_dtype), torch.autocast("cpu", enabled=False):
            assert fused(x).dtype == torch.float32
        with torch.autocast("cpu", amp_dtype):
            assert_same(fused(x.to(amp_dtype)), fused(x))
        assert fused(x).dtype == torch.float32


def test_autocast_leaves_fp64_alone() -> None:
    plain, fused = plain_inception(PRIMES).double(), fused_inception(PRIMES).double()
    x = random_input(PRIMES, 2, 4, 5, torch.float64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, actual = plain(x), fused(x)
    assert actual.dtype == expected.dtype == torch.float64
    check_close(actual, [expected], expected)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_memory_format_follows_the_input(dtype: torch.dtype, backend: str) -> None:
    if backend not in can_run(dtype):
        pytest.skip(f"{backend} cannot run {dtype} here")
    plain, fused = plain_inception(PRIMES).to(dtype), fused_inception(PRIMES, backend=backend).to(dtype)
    x = random_input(PRIMES, 3, 6, 5, dtype)
    channels_last = {"channels_last", "slice_of_wider"}
    for name, layout in LAYOUTS.items():
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                out = fused(layout(x))
            assert out.is_contiguous(memory_format=torch.channels_last) == (name in channels_last), name
            assert out.is_contiguous() == (name not in channels_last), name
            if name in ("contiguous", "channels_last"):
                assert out.stride() == plain(layout(x)).stride(), name


@every_backend
@both_norms
def test_gradient_modes_give_the_same_numbers(norm: Norm, backend: str) -> None:
    module, x = fused_inception(PRIMES, norm, backend=backend), random_input(PRIMES, 2, 6, 5)
    with torch.no_grad():
        expected = module(x)
    assert not expected.requires_grad
    with torch.inference_mode():
        inferred = module(x)
        assert inferred.is_inference()
    with_parameters = module(x)
    assert with_parameters.requires_grad
    module.requires_grad_(False)
    assert not module(x).requires_grad
    with_input = module(x.clone().requires_grad_())
    assert with_input.requires_grad
    for result in (inferred, with_parameters, module(x), with_input):
        assert_same(result.detach(), expected)


@every_backend
def test_a_module_made_under_inference_mode(backend: str) -> None:
    with torch.inference_mode():
        module = fused_inception(TINY, backend=backend)
        x = random_input(TINY, 2, 4, 5)
        first = module(x)
        assert_same(first, fused_inception(TINY, backend=backend)(x))
        module.branch1.conv.weight.mul_(2)
        assert_same(module(x), copy.deepcopy(module)(x))
        assert not torch.equal(module(x), first)


@every_backend
@both_norms
def test_functional_call(norm: Norm, backend: str) -> None:
    plain, module = plain_inception(PRIMES, norm, seed=9), fused_inception(PRIMES, norm, backend=backend)
    x = random_input(PRIMES, 2, 4, 5)
    other = fused_inception(PRIMES, norm, seed=9, backend=backend)
    with torch.no_grad():
        own, expected = module(x), other(x)
        assert not torch.equal(own, expected)
        for _ in range(2):
            assert_same(torch.func.functional_call(module, other.state_dict(), (x,)), expected)
            assert_same(module(x), own)
        assert_same(torch.func.functional_call(module, {k: v.clone() for k, v in other.state_dict().items()}, (x,)), expected)

    def gradients(host: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        state = {k: v.detach().to(dtype).requires_grad_() for k, v in plain.named_parameters()}
        buffers = {k: v.to(dtype) if v.is_floating_point() else v for k, v in plain.named_buffers()}
        torch.func.functional_call(host, {**state, **buffers}, (x.to(dtype),)).square().sum().backward()
        return {name: value.grad for name, value in state.items() if value.grad is not None}

    peers, truth = gradients(copy.deepcopy(plain), torch.float32), gradients(copy.deepcopy(plain).double(), torch.float64)
    for name, gradient in gradients(module, torch.float32).items():
        check_close(gradient, [peers[name]], truth[name], label=name)
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("norm", ["batch", None])
def test_meta_device(norm: Norm) -> None:
    module = fused_inception(PRIMES, norm).to("meta")
    for name in ("contiguous", "channels_last"):
        x = LAYOUTS[name](random_input(PRIMES, 2, 6, 5)).to("meta")
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                out = module(x)
            assert out.is_meta
            assert out.shape == (2, PRIMES.out_channels, 6, 5)
            assert out.is_contiguous(memory_format=torch.channels_last) == (name == "channels_last")


@every_backend
@both_norms
def test_empty_batch(norm: Norm, backend: str) -> None:
    module = fused_inception(PRIMES, norm, backend=backend)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert module(torch.empty(0, PRIMES.in_channels, 6, 5)).shape == (0, PRIMES.out_channels, 6, 5)


@every_backend
def test_shared_between_threads(backend: str) -> None:
    module = fused_inception(PRIMES, backend=backend)
    inputs = [random_input(PRIMES, 2, 6, 5, seed=seed) for seed in range(4)]
    with torch.no_grad():
        expected = [copy.deepcopy(module)(x) for x in inputs]
    start = threading.Barrier(len(inputs))

    def work(index: int) -> bool:
        start.wait(30)
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(module(inputs[index]), expected[index]):
                    return False
                if index == 0:
                    module.repack()
        return True

    with ThreadPoolExecutor(len(inputs)) as pool:
        assert all(pool.map(work, range(len(inputs))))


# Hooks.


@pytest.mark.parametrize("before", [False, True], ids=["on the fused module", "on the plain module"])
def test_hooks_on_the_block_fire(before: bool) -> None:
    plain = torchvision_inception()
    module = plain if before else FusedInception.from_module(plain)
    x = random_input(PRIMES, 2, 4, 5)
    fired: dict[str, list[object]] = {"pre": [], "forward": [], "always": [], "backward": [], "backward_pre": []}

    def double(block: nn.Module, args: tuple[Tensor], kwargs: dict[str, object]) -> tuple[tuple[Tensor], dict[str, object]]:
        fired["pre"].append(block)
        return (args[0] * 2,), kwargs

    def negate(block: nn.Module, args: object, out: Tensor) -> Tensor:
        fired["forward"].append(block)
        return -out

    module.register_forward_pre_hook(double, with_kwargs=True)
    module.register_forward_hook(negate)
    module.register_forward_hook(lambda *_: fired["always"].append(None), always_call=True)
    module.register_full_backward_pre_hook(lambda *_: fired["backward_pre"].append(None))
    module.register_full_backward_hook(lambda _, into, out_of: fired["backward"].append((into[0].shape, out_of[0].shape)))
    fused = FusedInception.from_module(plain) if before else module

    out = fused(x.requires_grad_())
    assert fired["pre"] == fired["forward"] == [fused]
    assert fired["always"] == [None]
    without_hooks = FusedInception.from_module(torchvision_inception())
    assert_same(out.detach(), -without_hooks(x * 2).detach())
    out.sum().backward()
    assert fired["backward_pre"] == [None]
    assert fired["backward"] == [(x.shape, out.shape)]


def test_hooks_set_later_are_the_modules_own() -> None:
    plain = plain_inception(TINY)
    fused = FusedInception.from_module(plain)
    back = fused.to_plain()
    fired: list[nn.Module] = []
    for module in (plain, fused, back):
        module.register_forward_hook(lambda block, *_: fired.append(block))
        module(random_input(TINY, 1, 4, 5))
    assert [id(module) for module in fired] == [id(plain), id(fused), id(back)]


# from_module and back.

HOSTS: dict[str, Callable[[], nn.Module]] = {
    "torchvision": torchvision_inception,
    "ours, 3x3": lambda: plain_inception(replace(PRIMES, large_kernel=3)),
    "ours, 5x5": lambda: plain_inception(replace(PRIMES, large_kernel=5)),
    "ours, no norm": lambda: plain_inception(PRIMES, norm=None),
}
every_host = pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)


@every_host
@every_backend
def test_from_module_and_back(backend: str, host: Callable[[], nn.Module]) -> None:
    plain, x = host(), random_input(PRIMES, 2, 6, 5)
    state = torch.get_rng_state()
    fused = FusedInception.from_module(plain, backend=backend)
    assert torch.equal(torch.get_rng_state(), state)
    assert fused.backend == backend
    assert fused.spec.large_kernel == plain.branch3[1].conv.kernel_size[0]
    assert_agrees(fused, plain, x)

    back = fused.to_plain()
    assert type(back) is type(plain)
    assert_same(back(x), plain(x))
    for module in (fused, back):
        assert not module.training
        assert [(k, id(v)) for k, v in module.named_parameters()] == [(k, id(v)) for k, v in plain.named_parameters()]
        assert list(module.state_dict()) == list(plain.state_dict())
    assert FusedInception.from_module(plain.train()).training
    assert FusedInception.from_module(plain).to_plain().training


@every_backend
def test_bias_and_batch_norm_together(backend: str) -> None:
    plain = TorchvisionInception(*list(PRIMES)[:7])
    for block in plain.modules():
        if isinstance(block, TorchvisionConv):
            block.conv.bias = nn.Parameter(torch.zeros(block.conv.out_channels))
    randomize_(plain).eval()
    assert_agrees(FusedInception.from_module(plain, backend=backend), plain, random_input(PRIMES, 2, 6, 5))


def test_repr_names_kernel_and_backend() -> None:
    text = repr(fused_inception(replace(TINY, large_kernel=5), backend="reference"))
    assert text.startswith("FusedInception(\n  large_kernel=5, backend='reference'\n")
    assert "large_kernel=3, backend='auto'" in repr(fused_inception(replace(TINY, large_kernel=3)))
    assert repr(fused_conv()).startswith("FusedConv2d(\n  backend='auto'\n")


def set_on(path: str, **values: object) -> Callable[[nn.Module], None]:
    def spoil(block: nn.Module) -> None:
        for name, value in values.items():
            setattr(block.get_submodule(path), name, value)

    return spoil


def put(path: str, make: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], None]:
    """Replaces the submodule at ``path`` by what ``make`` makes of it."""

    def spoil(block: nn.Module) -> None:
        block.set_submodule(path, make(block.get_submodule(path)))

    return spoil


def hook(path: str, method: str) -> Callable[[nn.Module], None]:
    def spoil(block: nn.Module) -> None:
        getattr(block.get_submodule(path), method)(lambda *_: None)

    return spoil


def own_forward(path: str) -> Callable[[nn.Module], None]:
    return lambda block: setattr(block.get_submodule(path), "forward", block.get_submodule(path).forward)


def conv(out_channels: int, in_channels: int, kernel: int | tuple[int, int], **options: Any) -> nn.Conv2d:
    """Without bias, padded to keep height and width."""
    padding = kernel // 2 if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2)
    return nn.Conv2d(in_channels, out_channels, kernel, padding=padding, bias=False, **options)


def sync_batch_norm(block: nn.Module) -> None:
    for name, child in list(block.named_children()):
        setattr(block, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))


class OwnInception(TorchvisionInception):
    pass


class OwnConv(TorchvisionConv):
    pass


class OwnBatchNorm(nn.BatchNorm2d):
    pass


def of_class(path: str, cls: type[nn.Module]) -> Callable[[nn.Module], None]:
    return lambda block: setattr(block.get_submodule(path), "__class__", cls)


NOT_PLAIN = "its convolution is grouped, dilated or not padded with a number of zeros"
POOL = "branch4.0 is .*, not a max pool of kernel 3, stride 1 and padding 1"

REFUSALS: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    # PRIMES: 13 channels in, ch3x3 17 of 11, ch5x5 5 of 3, pool_proj 19.
    "dilation": (set_on("branch2.1.conv", dilation=(2, 2), padding=(2, 2)), f"branch2.1: {NOT_PLAIN}: Conv2d"),
    "groups": (put("branch2.1.conv", lambda _: nn.Conv2d(11, 11, 3, padding=1, groups=11)), f"branch2.1: {NOT_PLAIN}"),
    "padding mode": (put("branch3.1.conv", lambda _: conv(5, 3, 3, padding_mode="circular")), f"branch3.1: {NOT_PLAIN}"),
    "padding in words": (put("branch3.1.conv", lambda _: nn.Conv2d(3, 5, 3, padding="same")), f"branch3.1: {NOT_PLAIN}"),
    "padding": (set_on("branch2.1.conv", padding=(0, 0)), r"branch2.1 has stride \(1, 1\) and padding \(0, 0\), not 1 and 1"),
    "padding of a 1x1": (
        set_on("branch4.1.conv", padding=(1, 1)),
        r"branch4.1 has stride \(1, 1\) and padding \(1, 1\), not 1 and 0",
    ),
    "stride": (set_on("branch1.conv", stride=(2, 2)), r"branch1 has stride \(2, 2\) and padding \(0, 0\), not 1 and 0"),
    "other convolution": (
        put("branch1.conv", lambda _: nn.ConvTranspose2d(13, 7, 1)),
        "branch1: its convolution is a ConvTranspose2d",
    ),
    "SyncBatchNorm": (sync_batch_norm, "branch1: its norm is a SyncBatchNorm, not an nn.BatchNorm2d"),
    "GroupNorm": (put("branch3.0.bn", lambda _: nn.GroupNorm(1, 3)), "branch3.0: its norm is a GroupNorm"),
    "subclass of the norm": (of_class("branch3.0.bn", OwnBatchNorm), "branch3.0: its norm is a OwnBatchNorm"),
    "no running statistics": (
        put("branch3.0.bn", lambda _: nn.BatchNorm2d(3, track_running_stats=False)),
        "branch3.0: its batch norm has no running statistics or no weight and bias",
    ),
    "no weight and bias": (
        put("branch2.1.bn", lambda _: nn.BatchNorm2d(17, affine=False)),
        "branch2.1: its batch norm has no running statistics or no weight and bias",
    ),
    "forward hook on a block": (
        hook("branch4.1", "register_forward_hook"),
        "branch4.1: the block has hooks, which would not fire",
    ),
    "pre-hook on a block": (hook("branch1", "register_forward_pre_hook"), "branch1: the block has hooks"),
    "hook on a convolution": (hook("branch2.0.conv", "register_forward_hook"), "branch2.0: its convolution has hooks"),
    "backward hook": (hook("branch2.0.conv", "register_full_backward_hook"), "branch2.0: its convolution has hooks"),
    "backward pre-hook": (hook("branch3.1", "register_full_backward_pre_hook"), "branch3.1: the block has hooks"),
    "hook on a norm": (hook("branch3.1.bn", "register_forward_hook"), "branch3.1: its batch norm has hooks"),
    "hook on a branch": (hook("branch2", "register_forward_hook"), "branch2 has hooks"),
    "hook on the pool": (hook("branch4.0", "register_forward_pre_hook"), "branch4.0 has hooks"),
    "own forward": (own_forward(""), "the module has a forward of its own on the instance"),
    "own forward of a branch": (own_forward("branch3"), "branch3 has a forward of its own on the instance"),
    "own forward of the pool": (own_forward("branch4.0"), "branch4.0 has a forward of its own on the instance"),
    "own forward of a block": (own_forward("branch1"), "branch1: the block has a forward of its own on the instance"),
    "own forward of a convolution": (own_forward("branch2.1.conv"), "branch2.1: its convolution has a forward of its own"),
    "own forward of a norm": (own_forward("branch3.0.bn"), "branch3.0: its batch norm has a forward of its own"),
    "subclass": (
        of_class("", OwnInception),
        "OwnInception is not an Inception module of torchvision's or googlenet_fused's GoogLeNet",
    ),
    "subclass of a block": (of_class("branch3.0", OwnConv), "branch3.0: OwnConv is not a BasicConv2d"),
    "weight_norm": (
        lambda block: parametrizations.weight_norm(block.branch2[1].conv),
        "branch2.1: its convolution is a ParametrizedConv2d, not an nn.Conv2d",
    ),
    "spectral_norm": (
        lambda block: parametrizations.spectral_norm(block.branch1.conv),
        "branch1: its convolution is a Parametrized",
    ),
    "pruning": (lambda block: prune.l1_unstructured(block.branch1.conv, "weight", 0.5), "branch1: its convolution has hooks"),
    "average pool": (put("branch4.0", lambda _: nn.AvgPool2d(3, 1, 1)), POOL),
    "pool's kernel": (put("branch4.0", lambda _: nn.MaxPool2d(5, 1, 2)), POOL),
    "pool's stride": (put("branch4.0", lambda _: nn.MaxPool2d(3, 2, 1)), POOL),
    "pool's padding": (put("branch4.0", lambda _: nn.MaxPool2d(3, 1, 0)), POOL),
    "pool's dilation": (put("branch4.0", lambda _: nn.MaxPool2d(3, 1, 1, dilation=2)), POOL),
    "pool's indices": (put("branch4.0", lambda _: nn.MaxPool2d(3, 1, 1, return_indices=True)), POOL),
    "three blocks": (put("branch2", lambda old: nn.Sequential(*old, nn.Identity())), "branch2 is not a sequence of two blocks"),
    "no sequence": (put("branch3", lambda _: nn.Identity()), "branch3 is not a sequence of two blocks"),
    "one block": (put("branch4", lambda old: nn.Sequential(old[1])), "branch4 is not a sequence of two blocks"),
    "no block": (put("branch1", lambda _: nn.Identity()), "branch1: Identity is not a BasicConv2d"),
    "mixed dtypes": (lambda block: block.branch3.double(), "its convolutions differ in dtype"),
    "7x7": (put("branch3.1.conv", lambda _: conv(5, 3, 7)), "InceptionSpec: large_kernel must be 3 or 5, got 7"),
    "1x1 in the third branch": (
        put("branch3.1.conv", lambda _: conv(5, 3, 1)),
        "InceptionSpec: large_kernel must be 3 or 5, got 1",
    ),
    "5x5 in the second branch": (put("branch2.1.conv", lambda _: conv(17, 11, 5)), r"ch3x3 weight has shape \[17, 11, 5, 5\]"),
    "3x5": (put("branch3.1.conv", lambda _: conv(5, 3, (3, 5))), r"ch5x5 weight has shape \[5, 3, 3, 5\]"),
    "widths": (
        put("branch2.0.conv", lambda _: conv(10, 13, 1)),
        r"ch3x3 weight has shape \[17, 11, 3, 3\], expected \[17, 10, 3, 3\]",
    ),
    "bias here and there": (put("branch1.conv", lambda _: nn.Conv2d(13, 7, 1)), "some of its convolutions have a bias"),
    "norm here and there": (
        put("branch4.1", lambda _: BasicConv2d(13, 19, norm=None, kernel_size=1)),
        "some of its convolutions have a bias or a batch norm and others have not",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("host", ["torchvision", "ours, 3x3"])
def test_refusals_name_the_part(host: str, spoil: Callable[[nn.Module], object], message: str) -> None:
    plain = HOSTS[host]()
    spoil(plain)
    with pytest.raises(CannotFuse, match="^" + message):
        FusedInception.from_module(plain)


@pytest.mark.parametrize("cls", [nn.Identity, nn.Sequential, partial(BasicConv2d, 1, 1, kernel_size=1)])
def test_other_modules_are_refused(cls: Callable[[], nn.Module]) -> None:
    module = cls()
    with pytest.raises(CannotFuse, match=f"{type(module).__name__} is not an Inception module of torchvision's"):
        FusedInception.from_module(module)


HARMLESS: dict[str, Callable[[nn.Module], object]] = {
    "ceil mode": set_on("branch4.0", ceil_mode=False),
    "pool in pairs": put("branch4.0", lambda _: nn.MaxPool2d((3, 3), (1, 1), (1, 1))),
    "momentum": set_on("branch1.bn", momentum=None),
    "eps": set_on("branch3.1.bn", eps=0.1),
    "frozen": lambda block: block.requires_grad_(False),
    "channels_last": lambda block: block.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_harmless_changes_are_fused(change: Callable[[nn.Module], object]) -> None:
    plain = torchvision_inception()
    change(plain)
    assert_agrees(FusedInception.from_module(plain), plain, random_input(PRIMES, 2, 6, 5))


# FusedConv2d.


def plain_conv(norm: Norm = "batch", in_channels: int = 3, out_channels: int = 11, **options: object) -> BasicConv2d:
    return randomize_(BasicConv2d(in_channels, out_channels, norm=norm, **{"kernel_size": 3, **options})).eval()


def fused_conv(norm: Norm = "batch", backend: str = "auto", **options: object) -> FusedConv2d:
    return FusedConv2d.from_module(plain_conv(norm, **options), backend=backend)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 7, "stride": 2, "padding": 3},
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 5), "stride": (1, 2), "padding": (0, 1)},
    ],
    ids=str,
)
@both_norms
@every_backend
def test_fused_convolution(backend: str, norm: Norm, options: dict[str, object]) -> None:
    plain, fused = plain_conv(norm, **options), fused_conv(norm, backend, **options)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        if backend not in can_run(dtype):
            continue
        plain, fused = plain.to(dtype), fused.to(dtype)
        for layout in LAYOUTS.values():
            x = layout(torch.randn(2, 3, 11, 10).to(dtype))
            kept = x.clone()
            assert_agrees(fused, plain, x)
            with torch.no_grad():
                out = fused(x)
            assert_same(x, kept)
            assert out.is_contiguous(memory_format=torch.channels_last)
            assert_same(fused(x).detach(), out) if dtype == torch.float64 else None
        with torch.no_grad():
            assert fused(x[:0]).shape == (0, *out.shape[1:])


@torch.enable_grad()
def adam_step(module: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.Adam(module.parameters(), fused=True)
    module(x).square().sum().backward()
    optimizer.step()


@both_norms
@every_backend
def test_fused_convolution_follows_its_parameters(backend: str, norm: Norm) -> None:
    module, x = fused_conv(norm, backend), torch.randn(2, 3, 6, 5)
    changes: list[Callable[[], object]] = [
        lambda: module.conv.weight.mul_(1.5),
        lambda: setattr(module.conv, "weight", nn.Parameter(module.conv.weight * 1.5)),
        lambda: setattr(module.conv.weight, "data", module.conv.weight.detach() * 1.5),
        lambda: module.load_state_dict(same_class(module, 9).state_dict()),
        lambda: (module.conv.weight.data.mul_(2), module.eval()),
        lambda: adam_step(module, x),
    ]
    with torch.no_grad():
        for change in changes:
            before = module(x)
            change()
            assert not torch.equal(module(x), before)
            assert_same(module(x), copy.deepcopy(module)(x))
            assert_agrees(module, module.to_plain(), x)


@both_norms
def test_fused_convolution_in_training(norm: Norm) -> None:
    plain, fused = plain_conv(norm).train(), fused_conv(norm).train()
    x = torch.randn(4, 3, 6, 5)
    actual = step(fused, x)
    if norm is None:
        assert_step_agrees(actual, plain, x)
        return
    expected = step(plain, x)
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert_same(actual[name], value, name)


@both_norms
def test_fused_convolution_with_gradients_in_evaluation_mode(norm: Norm) -> None:
    x = torch.randn(4, 3, 6, 5)
    assert_step_agrees(step(fused_conv(norm), x), plain_conv(norm), x)


@both_norms
@every_backend
def test_fused_convolution_under_autocast(backend: str, norm: Norm) -> None:
    plain, fused, x = plain_conv(norm, padding=1), fused_conv(norm, backend, padding=1), torch.randn(2, 3, 11, 10)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
            actual, expected = fused(x), plain(x)
        assert actual.dtype == expected.dtype == torch.bfloat16
        check_close(actual, [expected], copy.deepcopy(plain).double()(x.double()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@both_norms
@every_backend
def test_fused_convolution_keeps_nan(backend: str, norm: Norm, value: float) -> None:
    plain, fused, x = plain_conv(norm, padding=1), fused_conv(norm, backend, padding=1), torch.randn(2, 3, 6, 5)
    x[1, 2, 3, 4] = value
    with torch.no_grad():
        actual, expected = fused(x), plain(x)
    assert not expected.isfinite().all()
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_a_file])
@both_norms
def test_fused_convolution_is_copied(norm: Norm, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    module, x = fused_conv(norm, backend="reference"), torch.randn(2, 3, 6, 5)
    with torch.no_grad():
        expected = module(x)
        twin = duplicate(module)
        assert isinstance(twin, FusedConv2d)
        assert twin.backend == "reference"
        assert_same(twin(x), expected)
        twin.conv.weight.mul_(2)
        assert not torch.equal(twin(x), expected)
        assert_same(module(x), expected)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (lambda: nn.Conv2d(1, 1, 1), "Conv2d is not a BasicConv2d"),
        (lambda: plain_conv(dilation=2), NOT_PLAIN),
        (lambda: plain_conv(in_channels=4, out_channels=4, groups=2), NOT_PLAIN),
        (lambda: plain_conv(padding="same"), NOT_PLAIN),
        (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(plain_conv()), "its norm is a SyncBatchNorm"),
        (lambda: (block := plain_conv(), own_forward("")(block))[0], "the block has a forward of its own on the instance"),
    ],
)
def test_fused_convolution_refuses(block: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(CannotFuse, match=f"^{message}"):
        FusedConv2d.from_module(block())


@pytest.mark.parametrize("cls", [BasicConv2d, TorchvisionConv])
def test_fused_convolution_and_back(cls: type[nn.Module]) -> None:
    plain = randomize_(cls(3, 5, kernel_size=3)).eval()
    back = FusedConv2d.from_module(plain).to_plain()
    assert type(back) is cls
    assert [id(parameter) for parameter in back.parameters()] == [id(parameter) for parameter in plain.parameters()]
    x = torch.randn(2, 3, 6, 5)
    assert_same(back(x), plain(x))


def test_every_backend_of_this_machine_is_tested() -> None:
    """The lists above are not empty, and hold what status() calls available."""
    assert "cpu" in can_run(torch.float32) or not registry.status()["cpu"]["available"]
    assert "reference" in can_run(torch.float64)
    assert registry.names()[-1] == "reference"

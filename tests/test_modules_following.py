"""FusedInception follows every change of its parameters, however it is made, and packs them only then."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import ODD_SPECS, TINY, assert_agrees, assert_same, can_run, fused_conv, fused_inception, random_input
from torch import Tensor, nn

from googlenet_fused import FusedInception, kept_weights, parameter_cache
from googlenet_fused.backends import cpu
from googlenet_fused.blocks import Norm
from googlenet_fused.randomize import randomize_

PRIMES = ODD_SPECS["primes"]
every_backend = pytest.mark.parametrize("backend", can_run(torch.float32))
both_norms = pytest.mark.parametrize("norm", ["batch", None])


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
    pack = kept_weights.pack_inception
    monkeypatch.setattr(kept_weights, "pack_inception", lambda convs, dtype: (packed.append(dtype), pack(convs, dtype))[1])
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
    for owner, name in ((kept_weights, "pack_inception"), (cpu, "_prepack")):
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

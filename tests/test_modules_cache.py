"""The weights that fused modules keep packed: made once, following every change, and gone with the module."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import TINY, fused_inception, image, plain_inception, random_input
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from googlenet_fused import FusedInception, ops
from googlenet_fused.backends import cpu
from googlenet_fused.blocks import Inception
from googlenet_fused.modules import FusedConv2d


def pair(norm: str | None = "batch") -> tuple[FusedInception, Inception]:
    """A fused module and the plain one whose parameters it shares."""
    plain = plain_inception(TINY, norm)
    return FusedInception.from_module(plain), plain


def assert_follows(fused: nn.Module, plain: nn.Module) -> None:
    x = image(dtype=next(plain.parameters()).dtype)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)


def test_a_module_is_packed_once(packs: list[object]) -> None:
    fused, _ = pair()
    with torch.no_grad():
        outputs = [fused(image()) for _ in range(4)]
    with torch.inference_mode():
        outputs += [fused(image()) for _ in range(2)]
    assert len(packs) == 1
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_a_frozen_module_is_packed_once_with_gradients_enabled(packs: list[object]) -> None:
    fused, _ = pair()
    fused.requires_grad_(False)
    for _ in range(3):
        fused(image())
    assert len(packs) == 1


def test_the_function_packs_in_every_call_unless_told(packs: list[object]) -> None:
    weights = [parameter for name, parameter in pair(None)[1].named_parameters() if name.endswith("weight")]
    convs = [ops.ConvParams(weight, torch.zeros(len(weight))) for weight in weights]
    with torch.no_grad():
        for _ in range(3):
            before = ops.inception(image(), convs)
        assert len(packs) == 3
        for _ in range(3):
            assert torch.equal(ops.inception(image(), convs, cache=True), before)
        assert len(packs) == 4
        weights[0].data.mul_(2)  # not to be seen
        assert not torch.equal(ops.inception(image(), convs), before)
        assert torch.equal(ops.inception(image(), convs, cache=True), before)


def test_nothing_is_kept_in_training_mode(packs: list[object]) -> None:
    fused, plain = pair(None)
    fused.train()
    for _ in range(3):
        fused(image()).sum().backward()
        for parameter in plain.parameters():
            parameter.data.sub_(0.1 * parameter.grad)  # type: ignore[operator]
        assert_follows(fused, plain)
    assert len(packs) == 6


def test_the_stem_is_folded_once(folds: list[object]) -> None:
    stem = FusedConv2d.from_module(plain_inception(TINY).branch1)
    with torch.no_grad():
        for _ in range(4):
            stem(image())
    assert len(folds) == 1


@pytest.mark.parametrize("norm", ["batch", None])
def test_the_cpu_backends_layout_is_made_once(norm: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    prepack = cpu._prepack
    monkeypatch.setattr(cpu, "_prepack", lambda *args, **kwargs: made.append(args) or prepack(*args, **kwargs))
    fused = fused_inception(TINY, norm, backend="cpu")
    with torch.no_grad():
        for batch in (1, 2, 3):
            fused(random_input(TINY, batch, 4 + batch, 5))
    assert len(made) == 4


def test_dtypes_do_not_drive_each_other_out(packs: list[object]) -> None:
    fused, _ = pair()
    for _ in range(3):
        with torch.no_grad():
            assert fused(image()).dtype == torch.float32
            with torch.autocast("cpu", torch.bfloat16):
                assert fused(image()).dtype == torch.bfloat16
    assert len(packs) == 2


def test_packed_inside_inference_mode_and_used_outside() -> None:
    fused, plain = pair()
    with torch.inference_mode():
        first = fused(image())
    assert_follows(fused, plain)
    fused.requires_grad_(False)
    x = image().requires_grad_()
    fused(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(fused(image()), first)


def _optimizer_step(module: nn.Module, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> None:
    parameters = list(module.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    make(parameters).step()


def _load(module: nn.Module, *, assign: bool) -> None:
    state = plain_inception(TINY, seed=8).state_dict()
    module.load_state_dict(state, assign=assign)


def _replace_norm(module: nn.Module) -> None:
    module.branch1.bn = plain_inception(TINY, seed=8).branch1.bn


MODULE_CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "weight in place": torch.no_grad()(lambda m: m.branch3[1].conv.weight.mul_(2)),
    "bias of a norm in place": torch.no_grad()(lambda m: m.branch2[0].bn.bias.add_(1)),
    "running mean in place": lambda m: m.branch4[1].bn.running_mean.add_(1),
    "running variance in place": lambda m: m.branch1.bn.running_var.mul_(4),
    "eps": lambda m: setattr(m.branch1.bn, "eps", 3.0),
    "init": lambda m: nn.init.normal_(m.branch3[0].conv.weight),
    "inference_mode": torch.inference_mode()(lambda m: m.branch2[1].conv.weight.mul_(2)),
    "load_state_dict": lambda m: _load(m, assign=False),
    "load_state_dict with assign": lambda m: _load(m, assign=True),
    "sgd": lambda m: _optimizer_step(m, lambda p: torch.optim.SGD(p, lr=0.1)),
    "sgd foreach": lambda m: _optimizer_step(m, lambda p: torch.optim.SGD(p, lr=0.1, foreach=True)),
    "sgd fused": lambda m: _optimizer_step(m, lambda p: torch.optim.SGD(p, lr=0.1, fused=True)),
    "adamw": lambda m: _optimizer_step(m, lambda p: torch.optim.AdamW(p, lr=0.1)),
    "adamw fused": lambda m: _optimizer_step(m, lambda p: torch.optim.AdamW(p, lr=0.1, fused=True)),
    "parameter replaced": lambda m: setattr(m.branch2[0].conv, "weight", nn.Parameter(torch.randn(4, 5, 1, 1))),
    "buffer replaced": lambda m: setattr(m.branch2[0].bn, "running_mean", torch.randn(4)),
    "norm replaced": _replace_norm,
    "convolution replaced": lambda m: setattr(m.branch4[1], "conv", nn.Conv2d(5, 5, 1, bias=False)),
    "to another dtype": lambda m: m.double(),
    "to another dtype and back": lambda m: m.bfloat16().float(),
    ".data swapped": lambda m: setattr(m.branch3[0].conv.weight, "data", torch.randn(2, 5, 1, 1)),
    "vector_to_parameters": lambda m: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(m.parameters()).detach() * 2, m.parameters()
    ),
    "memory format": lambda m: m.to(memory_format=torch.channels_last).branch1.conv.weight.data.mul_(2),
    "shared memory": lambda m: (m.share_memory(), m.get_parameter("branch1.conv.weight").detach().mul_(2)),
}


@pytest.mark.parametrize("change", MODULE_CHANGES)
def test_a_module_follows(change: str) -> None:
    fused, plain = pair()
    with torch.no_grad():
        before = plain(image())
    assert_follows(fused, plain)
    MODULE_CHANGES[change](plain)
    assert_follows(fused, plain)
    if change != "to another dtype":
        with torch.no_grad():
            assert (plain(image()) - before).abs().max() > 1e-3, "the change makes no difference"


@pytest.mark.parametrize(
    "change", ["weight in place", "load_state_dict", "sgd", "sgd fused", ".data swapped", "parameter replaced", "eps"]
)
def test_the_stem_follows(change: str) -> None:
    plain = plain_inception(TINY)
    names = {"weight in place": "branch3.1", ".data swapped": "branch3.0", "parameter replaced": "branch2.0"}
    block = plain.get_submodule(names.get(change, "branch1"))
    fused = FusedConv2d.from_module(block)
    x = torch.randn(2, block.conv.in_channels, 5, 6)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(fused(x), block(x), rtol=1e-4, atol=1e-4)
        MODULE_CHANGES[change](plain)


def test_a_write_that_cannot_be_seen_is_followed_after_repack_train_or_eval() -> None:
    fused, plain = pair()
    for refresh in (fused.repack, fused.train, fused.eval):
        assert_follows(fused.eval(), plain)
        plain.branch1.conv.weight.data.mul_(2)
        refresh()
        assert_follows(fused.eval(), plain)


def test_statistics_adapted_through_the_fused_module_are_followed() -> None:
    # Batch norm in training mode writes its statistics without a new version.
    plain = plain_inception(TINY)
    for module, fused in ((plain, FusedInception.from_module(plain)), (plain.branch1, FusedConv2d.from_module(plain.branch1))):
        norms = [child for child in module.modules() if isinstance(child, nn.BatchNorm2d)]
        for _ in range(2):
            for norm in norms:
                norm.eval()
            assert_follows(fused, module)
            for norm in norms:
                norm.train()
            with torch.no_grad():
                fused(image() + 2)


def test_modules_that_share_a_weight_do_not_mix_up() -> None:
    first, second = plain_inception(TINY, seed=1), plain_inception(TINY, seed=2)
    second.branch1.conv.weight = first.branch1.conv.weight
    fused = [FusedInception.from_module(first), FusedInception.from_module(second)]
    for _ in range(2):
        assert_follows(fused[0], first)
        assert_follows(fused[1], second)
    with torch.no_grad():
        first.branch1.conv.weight.mul_(2)
    assert_follows(fused[1], second)
    assert_follows(fused[0], first)


@pytest.mark.parametrize("norm", ["batch", None])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_module_is_not_kept_alive(grad: bool, channels_last: bool, norm: str | None) -> None:
    fused, plain = pair(norm)
    if channels_last:
        plain.to(memory_format=torch.channels_last)
    stem = FusedConv2d.from_module(plain.branch1)
    with torch.set_grad_enabled(grad):
        fused(image()), stem(image())
    alive = [weakref.ref(tensor) for tensor in (*plain.parameters(), *plain.buffers())]
    del fused, plain, stem
    gc.collect()
    assert not any(reference() is not None for reference in alive)


def test_parameters_made_in_inference_mode(packs: list[object], warnings_of_inference_tensors: Callable[[], int]) -> None:
    with torch.inference_mode():
        fused, plain = pair()
        for factor in (1, 2, 3):
            plain.branch1.conv.weight.mul_(factor)
            torch.testing.assert_close(fused(image()), plain(image()), rtol=1e-4, atol=1e-4)
    assert len(packs) == 3
    assert warnings_of_inference_tensors() == 1


def test_a_fake_mode_leaves_a_real_module_alone() -> None:
    fused, plain = pair()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert fused(mode.from_tensor(image())).shape == (2, TINY.out_channels, 7, 6)
    assert type(fused(image())) is Tensor
    assert_follows(fused, plain)


def test_threads() -> None:
    plain = plain_inception(TINY)
    fused = FusedInception.from_module(plain)
    with torch.no_grad():
        expected = plain(image())
    start = threading.Barrier(4)

    def work(_: int) -> None:
        start.wait()
        with torch.no_grad():
            for i in range(30):
                own = fused_inception(TINY, None if i % 2 else "batch")
                own(image())
                fused.repack()
                torch.testing.assert_close(fused(image()), expected, rtol=1e-4, atol=1e-4)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))

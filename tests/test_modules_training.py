"""One training step of FusedInception and FusedConv2d beside the plain module's: output, gradients and statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import (
    LAYOUTS,
    ODD_SPECS,
    assert_agrees,
    assert_same,
    both_kernels,
    can_run,
    fused_conv,
    fused_inception,
    plain_conv,
    plain_inception,
    random_input,
)
from torch import Tensor, nn

from googlenet_fused.blocks import Inception, Norm
from googlenet_fused.spec import InceptionSpec
from googlenet_fused.tolerance import check_close

PRIMES = ODD_SPECS["primes"]


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


@pytest.mark.parametrize("backend", can_run(torch.float32))
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


@pytest.mark.parametrize("norm", ["batch", None])
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


@pytest.mark.parametrize("norm", ["batch", None])
def test_fused_convolution_with_gradients_in_evaluation_mode(norm: Norm) -> None:
    x = torch.randn(4, 3, 6, 5)
    assert_step_agrees(step(fused_conv(norm), x), plain_conv(norm), x)

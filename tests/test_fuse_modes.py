"""``fuse`` under torch's modes and defaults: inference mode, autocast, another default dtype or device, meta."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import assert_agrees, assert_same, can_run, outcome, report_of, small_model
from torchvision.models.googlenet import GoogLeNet as TorchvisionGoogLeNet

from googlenet_fused import fuse

every_backend = pytest.mark.parametrize("backend", can_run(torch.float32))


@every_backend
def test_under_inference_mode(backend: str) -> None:
    plain, x = small_model(), torch.randn(1, 3, 9, 8)
    with torch.inference_mode():
        fused = fuse(plain, backend=backend)
        first = fused(x)
    assert not any(parameter.is_inference() for parameter in fused.parameters())
    assert_agrees(fused, plain, x)
    with torch.no_grad():
        assert_same(fused(x), first)
        fused[1].branch1.conv.weight.mul_(2)
        assert not torch.equal(fused(x), first)
        assert_same(fused(x), copy.deepcopy(fused)(x))


@every_backend
def test_a_model_made_under_inference_mode(backend: str) -> None:
    with torch.inference_mode():
        plain = small_model()
    fused, x = fuse(plain, backend=backend), torch.randn(1, 3, 9, 8)
    with torch.inference_mode():
        expected = plain(x)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), expected)
        fused[1].branch1.conv.weight.mul_(2)
        assert_same(fused(x), copy.deepcopy(fused)(x))


def test_under_autocast() -> None:
    plain = small_model()
    with torch.autocast("cpu", torch.bfloat16):
        fused = fuse(plain)
    assert {block.name: block.max_error < 1e-5 for block in report_of(fused).blocks} == {"0": True, "1": True}  # type: ignore[operator]


def test_under_another_default_dtype() -> None:
    plain = small_model()
    torch.set_default_dtype(torch.float64)
    try:
        fused = fuse(plain)
    finally:
        torch.set_default_dtype(torch.float32)
    assert outcome(fused) == {"0": True, "1": True}
    assert {parameter.dtype for parameter in fused.parameters()} == {torch.float32}


def test_under_another_default_device() -> None:
    """As after ``torch.set_default_device("cuda")``, with a model on the CPU."""
    plain = small_model()
    with torch.device("meta"):
        fused = fuse(plain)
    assert outcome(fused) == {"0": True, "1": True}
    assert not any(parameter.is_meta for parameter in fused.parameters())


@every_backend
def test_meta_device(backend: str) -> None:
    with torch.device("meta"):
        plain = TorchvisionGoogLeNet(init_weights=False)
    fused = fuse(plain.eval(), backend=backend)
    assert len(report_of(fused).fused) == 14
    assert {block.reason for block in report_of(fused).fused} == {"its parameters are on the meta device"}
    assert {block.max_error for block in report_of(fused).fused} == {None}
    assert "fused, not checked: its parameters are on the meta device" in str(report_of(fused))
    assert all(parameter.is_meta for parameter in fused.parameters())
    assert fused(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 1000)


def test_a_model_built_on_meta_and_then_loaded() -> None:
    with torch.device("meta"):
        skeleton = small_model()
    plain = small_model()
    fused = fuse(skeleton)
    fused.load_state_dict(plain.state_dict(), assign=True)
    assert_agrees(fused.eval(), plain, torch.randn(1, 3, 9, 8))

"""FusedConv2d: numbers, parameters that change, autocast, NaN, copies, what is refused, and the way back."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from cases import LAYOUTS, assert_agrees, assert_same, can_run, fused_conv, plain_conv, through_a_file, through_pickle
from torch import Tensor, nn
from torchvision.models.googlenet import BasicConv2d as TorchvisionConv

from googlenet_fused import CannotFuse
from googlenet_fused.blocks import BasicConv2d, Norm
from googlenet_fused.modules import FusedConv2d
from googlenet_fused.randomize import randomize_
from googlenet_fused.tolerance import check_close

every_backend = pytest.mark.parametrize("backend", can_run(torch.float32))
both_norms = pytest.mark.parametrize("norm", ["batch", None])


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
        lambda: module.load_state_dict(randomize_(copy.deepcopy(module), 9).state_dict()),
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


NOT_PLAIN = "its convolution is grouped, dilated or not padded with a number of zeros"


def own_forward(block: BasicConv2d) -> BasicConv2d:
    block.forward = block.forward  # type: ignore[method-assign]
    return block


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (lambda: nn.Conv2d(1, 1, 1), "Conv2d is not a BasicConv2d"),
        (lambda: plain_conv(dilation=2), NOT_PLAIN),
        (lambda: plain_conv(in_channels=4, out_channels=4, groups=2), NOT_PLAIN),
        (lambda: plain_conv(padding="same"), NOT_PLAIN),
        (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(plain_conv()), "its norm is a SyncBatchNorm"),
        (lambda: own_forward(plain_conv()), "the block has a forward of its own on the instance"),
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

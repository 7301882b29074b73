"""What ``fuse`` leaves plain, with the reason, and calls that it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import TINY, fused_conv, outcome, report_of, small_model
from torch import Tensor, nn
from torchvision.models.googlenet import GoogLeNet as TorchvisionGoogLeNet
from torchvision.models.googlenet import Inception as TorchvisionInception

from googlenet_fused import BackendError, CannotFuse, FusedInception, fuse, unfuse, use_backend
from googlenet_fused.randomize import randomize_


@pytest.mark.parametrize("on_mismatch", ["raise", "keep"])
def test_a_named_backend_that_cannot_run_is_an_error(on_mismatch: str) -> None:
    message = r"backend 'cpu' cannot run .* in float64 on cpu: .*not float64"
    with pytest.raises(BackendError, match=message):
        fuse(small_model().double(), backend="cpu", on_mismatch=on_mismatch)  # type: ignore[arg-type]
    with use_backend("cpu"), pytest.raises(BackendError, match=message):
        fuse(small_model().double())


@pytest.mark.parametrize("model", [None, 3, "googlenet", torch.zeros(1), TorchvisionGoogLeNet])
def test_not_a_module(model: object) -> None:
    for function in (fuse, unfuse):
        with pytest.raises(TypeError, match=f"model must be an nn.Module, got {type(model).__name__}"):
            function(model)  # type: ignore[operator]


@pytest.mark.parametrize("on_mismatch", ["ignore", None, True])
def test_wrong_on_mismatch(on_mismatch: object) -> None:
    with pytest.raises(ValueError, match=f"on_mismatch must be 'raise' or 'keep', got {on_mismatch!r}"):
        fuse(small_model(), on_mismatch=on_mismatch)  # type: ignore[arg-type]


@pytest.mark.parametrize("filter_fn", ["inception4", True, [1]])
def test_a_filter_that_is_no_function(filter_fn: object) -> None:
    with pytest.raises(TypeError, match=r"filter_fn must be a function of \(module, name\)"):
        fuse(small_model(), filter_fn)  # type: ignore[arg-type]


@pytest.mark.parametrize("answer", [None, "yes", torch.zeros(2)])
def test_a_filter_that_answers_neither_true_nor_false(answer: object) -> None:
    with pytest.raises(TypeError, match=r"filter_fn must return True or False, got .* for 0"):
        fuse(small_model(), lambda module, name: answer)  # type: ignore[arg-type, return-value]


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_torchscript_is_named() -> None:
    with torch.no_grad():
        traced = torch.jit.trace(small_model(), torch.randn(1, 3, 9, 8))
    with pytest.raises(TypeError, match=r"model is TorchScript, .*fuse the eager model"):
        fuse(traced)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="unknown backend 'gpu': choose one of 'auto'"):
        fuse(small_model(), backend="gpu")


class Gated(TorchvisionInception):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid()


def test_a_subclass_is_left_alone_whole() -> None:
    plain = randomize_(nn.Sequential(Gated(*list(TINY)[:7]), nn.Identity())).eval()
    fused = fuse(plain)
    assert outcome(fused) == {"0": False}
    assert "Gated is not an Inception module" in (report_of(fused).blocks[0].reason or "")
    assert [type(module) for module in fused.modules()] == [type(module) for module in plain.modules()]


class OwnFused(FusedInception):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid()


def test_a_class_derived_from_a_fused_one_is_left_alone_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(randomize_(OwnFused.from_spec(TINY)).eval())
    fused = fuse(model)
    assert report_of(fused).blocks[0].reason == "OwnFused is fused already, by a class of its own that is left as it is"
    caplog.clear()
    assert type(unfuse(fused)[0]) is OwnFused
    (record,) = caplog.records
    assert record.getMessage() == "unfuse: 0 is a OwnFused, a class of its own, and stays fused"
    assert record.levelname == "WARNING"


@pytest.mark.parametrize("make", [lambda: FusedInception.from_spec(TINY), fused_conv], ids=["inception", "stem"])
def test_from_module_of_a_fused_block_says_that_it_is_fused(make: Callable[[], nn.Module]) -> None:
    block = make()
    with pytest.raises(CannotFuse, match=f"^{type(block).__name__} is fused already$"):
        type(block).from_module(block)  # type: ignore[attr-defined]


class Lookalike(nn.Module):
    """Another Inception: the name alone does not make a block."""

    def __init__(self) -> None:
        super().__init__()
        self.branch1 = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.branch1(x)


Lookalike.__name__ = Lookalike.__qualname__ = "Inception"


def test_another_class_called_inception_is_no_block() -> None:
    assert report_of(fuse(nn.Sequential(Lookalike()))).blocks == []


def test_sync_batch_norm_is_left_alone_with_the_reason() -> None:
    plain = nn.SyncBatchNorm.convert_sync_batchnorm(small_model())
    fused = fuse(plain)
    assert outcome(fused) == {"0": False, "1": False}
    assert report_of(fused).blocks[0].reason == "its norm is a SyncBatchNorm, not an nn.BatchNorm2d"
    assert report_of(fused).blocks[1].reason == "branch1: its norm is a SyncBatchNorm, not an nn.BatchNorm2d"

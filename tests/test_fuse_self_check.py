"""The self-check of ``fuse``: backends wrong in one way each are found, and right ones are fused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import (
    ODD_SPECS,
    TINY,
    assert_agrees,
    assert_same,
    outcome,
    plain_googlenet,
    plain_inception,
    random_input,
    report_of,
    small_model,
)
from torch import Tensor

from googlenet_fused import FusionMismatch, fuse, use_backend
from googlenet_fused.backends import registry
from googlenet_fused.backends.reference import ReferenceBackend
from googlenet_fused.blocks import BasicConv2d, Inception
from googlenet_fused.packing import PackedInception
from googlenet_fused.spec import InceptionSpec

PRIMES = ODD_SPECS["primes"]


class WrongBackend(ReferenceBackend):
    """Computes what the reference does and then spoils it."""

    description = "wrong on purpose"

    def __init__(self, spoil: Callable[[Tensor, Tensor, PackedInception], object]) -> None:
        self.name = "wrong"
        self.spoil = spoil

    def inception(self, x: Tensor, packed: PackedInception, prepared: tuple[Tensor, ...], out: Tensor) -> None:
        super().inception(x, packed, prepared, out)
        self.spoil(out, x, packed)


def all_zero(out: Tensor, x: Tensor, packed: PackedInception) -> None:
    out.zero_()


def shifted_channel(out: Tensor, x: Tensor, packed: PackedInception) -> None:
    out[:, packed.spec.slices.ch3x3] = out[:, packed.spec.slices.ch3x3].roll(1, dims=1)


def swapped_branches(out: Tensor, x: Tensor, packed: PackedInception) -> None:
    ch5x5, pool_proj = out[:, packed.spec.slices.ch5x5].clone(), out[:, packed.spec.slices.pool_proj].clone()
    start = packed.spec.slices.ch5x5.start
    out[:, start : start + pool_proj.shape[1]] = pool_proj
    out[:, start + pool_proj.shape[1] :] = ch5x5


def last_column(out: Tensor, x: Tensor, packed: PackedInception) -> None:
    channel = int(out[0, :, -1, -1].argmax())
    out[0, channel, -1, -1] *= 1.001


def border(out: Tensor, x: Tensor, packed: PackedInception) -> None:
    """The third branch without its padding at the top."""
    out[:, packed.spec.slices.ch5x5, 0] = 0


def zero_padded_pool(out: Tensor, x: Tensor, packed: PackedInception) -> None:
    pooled = F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, stride=1)
    out[:, packed.spec.slices.pool_proj] = F.conv2d(pooled, packed.pool_proj_weight, packed.pool_proj_bias).relu()


def no_relu(out: Tensor, x: Tensor, packed: PackedInception) -> None:
    pooled = F.max_pool2d(x, 3, stride=1, padding=1)
    out[:, packed.spec.slices.pool_proj] = F.conv2d(pooled, packed.pool_proj_weight, packed.pool_proj_bias)


def no_inner_relu(out: Tensor, x: Tensor, packed: PackedInception) -> None:
    spec = packed.spec
    reduced = F.conv2d(x, packed.shared_weight, packed.shared_bias)[:, spec.ch1x1 : spec.ch1x1 + spec.ch3x3red]
    out[:, spec.slices.ch3x3] = F.conv2d(reduced, packed.ch3x3_weight, packed.ch3x3_bias, padding=1).relu()


def no_bias(out: Tensor, x: Tensor, packed: PackedInception) -> None:
    out[:, packed.spec.slices.ch1x1] = F.conv2d(x, packed.shared_weight).relu()[:, packed.spec.slices.ch1x1]


def one_bf16_branch(out: Tensor, x: Tensor, packed: PackedInception) -> None:
    out[:, packed.spec.slices.ch5x5] = out[:, packed.spec.slices.ch5x5].bfloat16().to(out.dtype)


def one_nan(out: Tensor, x: Tensor, packed: PackedInception) -> None:
    out[0, 3, 2, 1] = float("nan")


def slightly_off(out: Tensor, x: Tensor, packed: PackedInception) -> None:
    out *= 1.00001


WRONGS = [
    *(all_zero, shifted_channel, swapped_branches, last_column, border, zero_padded_pool),
    *(no_relu, no_inner_relu, no_bias, one_bf16_branch, one_nan, slightly_off),
]


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
    monkeypatch.setattr(registry, "_announced", set())


@pytest.mark.parametrize("spoil", WRONGS)
@pytest.mark.parametrize("spec", [PRIMES, replace(PRIMES, large_kernel=3)], ids=["5", "3"])
def test_a_wrong_backend_is_found(spec: InceptionSpec, spoil: Callable[..., object], own_registry: None) -> None:
    registry.register(WrongBackend(spoil))
    plain = small_model(spec)
    with pytest.raises(FusionMismatch, match=r"^1: with backend 'wrong' the fused block disagrees: .*on_mismatch='keep'"):
        fuse(plain, backend="wrong")

    fused = fuse(plain, backend="wrong", on_mismatch="keep")
    assert outcome(fused) == {"0": True, "1": False}
    (block,) = report_of(fused).skipped
    assert block.backend == "wrong"
    assert "with backend 'wrong' the fused block disagrees" in (block.reason or "")
    assert "left plain: with backend 'wrong'" in str(report_of(fused))
    assert type(fused[1]) is Inception
    x = random_input(spec, 1, 6, 5)
    assert_same(fused[1](x), plain[1](x))


def test_a_right_backend_by_the_same_means_is_fused(own_registry: None) -> None:
    registry.register(WrongBackend(lambda *_: None))
    fused = fuse(small_model(), backend="wrong")
    assert [(block.fused, block.backend) for block in report_of(fused).blocks] == [(True, "wrong")] * 2


def test_a_wrong_backend_that_was_chosen_automatically_is_found(own_registry: None) -> None:
    registry.register(WrongBackend(shifted_channel))
    with pytest.raises(FusionMismatch, match="inception3a: with backend 'wrong'"):
        fuse(plain_googlenet(aux_logits=False))
    with use_backend("reference"):
        fused = fuse(plain_googlenet(aux_logits=False))
    assert {block.backend for block in report_of(fused).blocks} == {"reference"}


def test_a_model_in_training_mode_is_checked_as_it_will_run_in_evaluation(own_registry: None) -> None:
    registry.register(WrongBackend(shifted_channel))
    with pytest.raises(FusionMismatch, match=r"^1: with backend 'wrong'"):
        fuse(small_model().train(), backend="wrong")


def test_a_mismatch_in_the_root_names_its_class(own_registry: None) -> None:
    registry.register(WrongBackend(all_zero))
    with pytest.raises(FusionMismatch, match=r"^Inception: with backend 'wrong'"):
        fuse(plain_inception(TINY), backend="wrong")


class WrongConvolution(ReferenceBackend):
    name = "wrong"

    def conv2d_relu(self, x: Tensor, weight: Tensor, bias: Tensor, prepared: object, stride: object, padding: object) -> Tensor:
        return F.conv2d(x, weight, bias, stride, padding)  # type: ignore[arg-type]


def test_a_wrong_convolution_is_found(own_registry: None) -> None:
    registry.register(WrongConvolution())
    plain = small_model()
    with pytest.raises(FusionMismatch, match=r"^0: with backend 'wrong' the fused block disagrees"):
        fuse(plain, backend="wrong")
    fused = fuse(plain, backend="wrong", on_mismatch="keep")
    assert outcome(fused) == {"0": False, "1": True}
    assert type(fused[0]) is BasicConv2d


def test_a_model_with_several_wrong_blocks_keeps_the_right_ones(own_registry: None) -> None:
    def spoil(out: Tensor, x: Tensor, packed: PackedInception) -> None:
        if packed.spec.in_channels == 512:
            out.zero_()

    registry.register(WrongBackend(spoil))
    plain = plain_googlenet(aux_logits=False)
    fused = fuse(plain, backend="wrong", on_mismatch="keep")
    assert [block.name for block in report_of(fused).skipped] == ["inception4b", "inception4c", "inception4d"]
    assert_agrees(fused, plain, torch.randn(1, 3, 32, 32))


def test_a_network_whose_weights_are_zero() -> None:
    plain = small_model()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    fused = fuse(plain)
    assert outcome(fused) == {"0": True, "1": True}
    assert "nan" not in str(report_of(fused))


def test_a_network_whose_weights_are_nan() -> None:
    plain = small_model()
    with torch.no_grad():
        plain[1].branch1.conv.weight[0] = float("nan")
    fused = fuse(plain)
    assert outcome(fused) == {"0": True, "1": True}
    with torch.no_grad():
        x = random_input(PRIMES, 1, 6, 5)
        assert torch.equal(fused[1](x).isnan(), plain[1](x).isnan())

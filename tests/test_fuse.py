"""``fuse`` on GoogLeNets and on models of the user's own: what is found and fused, the filter, and the report."""

from __future__ import annotations

import copy
import logging
import warnings
from dataclasses import replace

import pytest
import torch
import torchvision
from cases import (
    ODD_SPECS,
    TINY,
    assert_agrees,
    assert_same,
    can_run,
    outcome,
    plain_googlenet,
    plain_inception,
    random_input,
    report_of,
    small_model,
    through_pickle,
)
from torch import Tensor, nn
from torchvision.models.googlenet import BasicConv2d as TorchvisionConv
from torchvision.models.googlenet import GoogLeNet as TorchvisionGoogLeNet
from torchvision.models.googlenet import Inception as TorchvisionInception

from googlenet_fused import FusedInception, FusionReport, fuse, unfuse
from googlenet_fused.blocks import BasicConv2d, Inception
from googlenet_fused.convert import BlockReport
from googlenet_fused.models import VARIANTS, VariantName
from googlenet_fused.modules import FusedConv2d
from googlenet_fused.randomize import randomize_

PRIMES = ODD_SPECS["primes"]
INCEPTIONS = [f"inception{name}" for name in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")]
STEM, HEADS = ["conv1", "conv2", "conv3"], ["aux1.conv", "aux2.conv"]
STEM_WITH_NORMS = ["conv1", "norm1", "conv2", "conv3", "norm2"]

every_backend = pytest.mark.parametrize("backend", can_run(torch.float32))
both_variants = pytest.mark.parametrize("variant", ["torchvision", "bvlc"])


def only_block(model: nn.Module) -> BlockReport:
    (block,) = report_of(model).blocks
    return block


# The networks.


@pytest.mark.parametrize("aux_logits", [False, True])
@pytest.mark.parametrize("transform_input", [False, True])
@every_backend
def test_torchvisions_network(backend: str, transform_input: bool, aux_logits: bool) -> None:
    plain = plain_googlenet(aux_logits=aux_logits, transform_input=transform_input)
    fused = fuse(plain, backend=backend)
    assert type(fused) is TorchvisionGoogLeNet
    assert outcome(fused) == dict.fromkeys([*STEM, *INCEPTIONS, *(HEADS if aux_logits else [])], True)
    for block in report_of(fused).blocks:
        assert block.kind == ("inception" if block.name.startswith("inception") else "conv")
        assert (block.backend, block.reason) == (backend, None)
        assert 0 < block.max_error <= 1e-5  # type: ignore[operator]
        assert 0 < block.plain_error <= 1e-5  # type: ignore[operator]
    for name in INCEPTIONS:
        module = fused.get_submodule(name)
        assert isinstance(module, FusedInception)
        assert module.spec.large_kernel == 3
        assert module.backend == backend
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert_agrees(fused, plain, torch.randn(1, 3, 48, 64))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("aux_logits", [False, True])
@every_backend
def test_our_networks(backend: str, aux_logits: bool, variant: VariantName) -> None:
    plain = plain_googlenet(variant, aux_logits=aux_logits)
    fused = fuse(plain, backend=backend)
    stem = STEM_WITH_NORMS if variant == "bvlc" else STEM
    expected = dict.fromkeys([*stem, *INCEPTIONS, *(HEADS if aux_logits else [])], True)
    if variant == "bvlc" and backend != "cpu":
        expected |= {"norm1": False, "norm2": False}
    assert outcome(fused) == expected
    kernels = {module.spec.large_kernel for module in fused.modules() if isinstance(module, FusedInception)}
    assert kernels == {5 if variant == "bvlc" else 3}
    assert_agrees(fused, plain, torch.randn(2, 3, 48, 64))


def test_the_factory_as_users_call_it() -> None:
    plain = torchvision.models.googlenet(weights=None).eval()
    fused = fuse(plain)
    assert len(report_of(fused).fused) == 14
    assert report_of(fused).skipped == []
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x))


def test_training_mode_is_kept_and_trains_as_the_plain_network() -> None:
    plain = plain_googlenet(dropout=0.0, dropout_aux=0.0).train()
    fused = fuse(plain)
    assert all(module.training for module in fused.modules())
    assert len(report_of(fused).fused) == 14
    outputs = []
    for model in (plain, fused):
        torch.manual_seed(1)
        result = model(x := torch.linspace(-1, 1, 2 * 3 * 48 * 48).view(2, 3, 48, 48))
        sum(output.square().mean() for output in result).backward()
        outputs.append([*result, *(parameter.grad for parameter in model.parameters()), *model.buffers()])
    for theirs, ours in zip(*outputs, strict=True):
        assert_same(ours, theirs)
    assert_agrees(fused.eval(), plain.eval(), x)
    assert_same(unfuse(fused)(x), plain(x))


@both_variants
def test_bf16_network(variant: VariantName) -> None:
    plain = plain_googlenet(variant, aux_logits=False).bfloat16()
    fused = fuse(plain)
    assert all(block.fused and 0 < block.plain_error < 0.05 for block in report_of(fused).blocks)  # type: ignore[operator]
    assert {parameter.dtype for parameter in fused.parameters()} == {torch.bfloat16}
    assert_agrees(fused, plain, torch.randn(1, 3, 48, 64).bfloat16())


def test_fp64_network() -> None:
    plain = small_model().double()
    fused = fuse(plain)
    assert {block.backend for block in report_of(fused).fused} == {"reference"}
    assert_agrees(fused, plain, torch.randn(1, 3, 9, 8, dtype=torch.float64))


def test_half_precision_network() -> None:
    plain = small_model().half()
    fused = fuse(plain)
    assert len(report_of(fused).fused) == 2
    assert_agrees(fused, plain, torch.randn(1, 3, 9, 8).half())


def test_torchvisions_quantizable_network_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = torchvision.models.quantization.googlenet(weights=None, quantize=False, init_weights=False)
    randomize_(plain).eval()
    fused = fuse(plain)
    blocks = report_of(fused).blocks
    assert [block.name for block in blocks] == [*STEM, *INCEPTIONS, *HEADS]
    assert not any(block.fused for block in blocks)
    for block in blocks:
        name = "QuantizableInception" if block.kind == "inception" else "QuantizableBasicConv2d"
        assert (block.reason or "").startswith(f"{name} is not a")
    assert any("nothing was fused" in record.getMessage() for record in caplog.records)
    x = torch.randn(1, 3, 32, 32)
    assert_same(fused(x), plain(x))


# Models of the user's own.


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Identity(), plain_inception(TINY, seed=1)])
        self.heads = nn.ModuleDict({"a": nn.Sequential(nn.ReLU(), nn.ModuleDict({"b": plain_inception(TINY, seed=2)})["b"])})
        self.stem = TorchvisionConv(3, TINY.in_channels, kernel_size=1)
        self.shared = plain_inception(TINY, seed=3)
        self.again = self.shared
        self.nothing: nn.Module | None = None
        self.register_module("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.stages[1](x) + self.heads["a"](x) + self.shared(x) * self.again(x)


def test_blocks_at_any_depth_and_shared_ones() -> None:
    plain = randomize_(Tower()).eval()
    fused = fuse(plain)
    # The order is the model's; a shared module is fused once and stays shared.
    assert outcome(fused) == dict.fromkeys(["stages.1", "heads.a.1", "stem", "shared"], True)
    assert fused.shared is fused.again
    assert isinstance(fused.shared, FusedInception)
    assert fused.absent is None
    assert fused.nothing is None
    assert type(fused.stages) is nn.ModuleList
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert_agrees(fused, plain, torch.randn(2, 3, 5, 4))

    back = unfuse(fused)
    assert back.shared is back.again
    assert [type(module) for module in back.modules()] == [type(module) for module in plain.modules()]
    x = torch.randn(2, 3, 5, 4)
    assert_same(back(x), plain(x))


def test_a_convolution_shared_with_an_inception_block() -> None:
    inception = plain_inception(TINY)
    plain = nn.Sequential(inception.branch1, nn.Conv2d(TINY.ch1x1, TINY.in_channels, 1), inception).eval()
    for model in (plain, nn.Sequential(plain[2], nn.Conv2d(TINY.out_channels, TINY.in_channels, 1), plain[0]).eval()):
        fused = fuse(model)
        assert len(report_of(fused).fused) == 2
        x = random_input(TINY, 2, 4, 5)
        assert_agrees(fused, model, x)
        assert_same(unfuse(fused)(x), model(x))
        assert len(list(fused.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("norm", ["batch", None])
def test_an_inception_block_as_the_root(norm: str | None) -> None:
    plain = plain_inception(PRIMES, norm)  # type: ignore[arg-type]
    fused = fuse(plain)
    assert type(fused) is FusedInception
    assert type(plain) is Inception
    block = only_block(fused)
    assert (block.name, block.kind, block.fused) == ("", "inception", True)
    assert "fused 1 of 1 blocks" in str(report_of(fused))
    x = random_input(PRIMES, 2, 5, 4)
    assert_agrees(fused, plain, x)
    back = unfuse(fused)
    assert type(back) is Inception
    assert not hasattr(back, "fusion_report")
    assert_same(back(x), plain(x))


def test_a_convolution_block_as_the_root() -> None:
    plain = randomize_(BasicConv2d(3, 5, kernel_size=3)).eval()
    fused = fuse(plain)
    assert type(fused) is FusedConv2d
    assert only_block(fused).kind == "conv"
    assert type(unfuse(fused)) is BasicConv2d


@pytest.mark.parametrize("large_kernel", [3, 5])
def test_kernel_size_is_the_modules(large_kernel: int) -> None:
    plain = small_model(replace(PRIMES, large_kernel=large_kernel))
    fused = fuse(plain)
    assert fused[1].spec.large_kernel == large_kernel
    assert_agrees(fused, plain, torch.randn(1, 3, 11, 9))


def test_a_model_without_blocks_says_so(caplog: pytest.LogCaptureFixture) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    fused = fuse(plain)
    assert report_of(fused).blocks == []
    assert str(report_of(fused)) == "no Inception block was found"
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("googlenet_fused", logging.WARNING)
    assert "nothing was fused" in record.getMessage()
    assert "no Inception block was found" in record.getMessage()
    x = torch.randn(1, 3, 4, 4)
    assert_same(fused(x), plain(x))


def test_all_blocks_skipped_says_why(caplog: pytest.LogCaptureFixture) -> None:
    fused = fuse(small_model(), lambda *_: False)
    assert outcome(fused) == {"0": False, "1": False}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "nothing was fused" in record.getMessage()
    assert "filter_fn said no" in record.getMessage()


def test_a_fused_model_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    fuse(small_model())
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


# filter_fn.


def test_filter_by_name() -> None:
    plain, asked = plain_googlenet(), []

    def only_stage_4(module: nn.Module, name: str) -> bool:
        asked.append(name)
        return name.startswith("inception4")

    fused = fuse(plain, only_stage_4)
    assert asked == [*STEM, *INCEPTIONS, *HEADS]
    assert outcome(fused) == {name: name.startswith("inception4") for name in asked}
    assert {block.reason for block in report_of(fused).skipped} == {"filter_fn said no"}
    assert type(fused.inception3a) is TorchvisionInception
    assert type(fused.conv1) is TorchvisionConv
    assert_agrees(fused, plain, torch.randn(1, 3, 32, 48))


@pytest.mark.parametrize("kind", ["inception", "conv"])
def test_filter_by_type(kind: str) -> None:
    classes = (Inception, TorchvisionInception) if kind == "inception" else (BasicConv2d, TorchvisionConv)
    for plain in (plain_googlenet(), plain_googlenet("bvlc")):
        fused = fuse(plain, lambda module, name: isinstance(module, classes))
        assert {block.kind for block in report_of(fused).fused} == {kind}
        norms = {"lrn"} if any(isinstance(module, nn.LocalResponseNorm) for module in plain.modules()) else set()
        assert {block.kind for block in report_of(fused).skipped} == {"inception", "conv", *norms} - {kind}
        assert len(report_of(fused).fused) == (9 if kind == "inception" else 5)


def test_filter_sees_a_fused_block_as_the_plain_one() -> None:
    seen: list[type] = []
    fuse(fuse(small_model()), lambda module, name: seen.append(type(module)) or True)
    assert seen == [BasicConv2d, Inception]


# The report.


def test_report_as_text() -> None:
    report = FusionReport(
        [
            BlockReport("stem", "conv", True, backend="cpu", max_error=1.25e-7, plain_error=2.5e-7),
            BlockReport("body.inception", "inception", False, reason="it is haunted"),
            BlockReport("meta", "inception", True, reason="its parameters are on the meta device"),
        ]
    )
    assert [block.name for block in report.fused] == ["stem", "meta"]
    assert [block.name for block in report.skipped] == ["body.inception"]
    first, stem, body, meta = str(report).splitlines()
    assert first == "fused 2 of 3 blocks"
    assert stem == "  stem            conv       fused, cpu backend, error 1.2e-07 (plain 2.5e-07)"
    assert body == "  body.inception  inception  left plain: it is haunted"
    assert meta == "  meta            inception  fused, not checked: its parameters are on the meta device"


def test_report_has_a_line_for_each_block() -> None:
    report = report_of(fuse(plain_googlenet(), lambda module, name: name != "inception3b"))
    first, *lines = str(report).splitlines()
    assert first == "fused 13 of 14 blocks"
    assert [line.split()[0] for line in lines] == [*STEM, *INCEPTIONS, *HEADS]
    assert "inception3b  inception  left plain: filter_fn said no" in lines[4]
    assert "backend, error" in lines[3]


def test_report_is_of_the_copy_and_travels_with_it() -> None:
    plain = small_model()
    fused = fuse(plain)
    assert not hasattr(plain, "fusion_report")
    for twin in (copy.deepcopy(fused), through_pickle(fused)):
        assert twin.fusion_report == fused.fusion_report
    assert not hasattr(unfuse(fused), "fusion_report")
    assert hasattr(fused, "fusion_report")


def test_error_in_the_report_is_of_this_run() -> None:
    block = only_block(fuse(plain_inception(PRIMES)))
    reduced = only_block(fuse(plain_inception(PRIMES).bfloat16()))
    assert block.max_error < 1e-6 < 1e-4 < reduced.max_error < 0.05  # type: ignore[operator]


def test_blocks_on_several_backends_are_all_named() -> None:
    blocks = [BlockReport(f"block{i}", "inception", True, backend=name) for i, name in enumerate(["a", "b", None, "a"])]
    assert FusionReport([BlockReport("plain", "conv", False, backend="c"), *blocks]).backends == "a, b"

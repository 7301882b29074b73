"""``fuse`` and ``unfuse``: what is found, what is left alone and why, the self-check, and the untouched original."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from cases import ODD_SPECS, TINY, plain_inception, random_input
from torch import Tensor, nn
from torchvision.models.googlenet import BasicConv2d as TorchvisionConv
from torchvision.models.googlenet import GoogLeNet as TorchvisionGoogLeNet
from torchvision.models.googlenet import Inception as TorchvisionInception

import googlenet_fused
from googlenet_fused import BackendError, FusedInception, FusionMismatch, FusionReport, fuse, unfuse, use_backend
from googlenet_fused.backends import registry
from googlenet_fused.backends.reference import ReferenceBackend
from googlenet_fused.blocks import BasicConv2d, Inception
from googlenet_fused.convert import BlockReport
from googlenet_fused.models import VariantName
from googlenet_fused.modules import FusedConv2d
from googlenet_fused.packing import PackedInception
from googlenet_fused.randomize import randomize_
from googlenet_fused.spec import InceptionSpec
from googlenet_fused.tolerance import judge

PRIMES = ODD_SPECS["primes"]
CPU = torch.device("cpu")
INCEPTIONS = [f"inception{name}" for name in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")]
STEM, HEADS = ["conv1", "conv2", "conv3"], ["aux1.conv", "aux2.conv"]


def can_run(dtype: torch.dtype) -> list[str]:
    """The backends that run Inception modules of this dtype on this machine's CPU."""
    return [name for name in registry.names() if registry.get(name).supports(registry.Problem(CPU, dtype, TINY)) is None]


every_backend = pytest.mark.parametrize("backend", can_run(torch.float32))
both_variants = pytest.mark.parametrize("variant", ["torchvision", "bvlc"])


def torchvision_googlenet(**options: object) -> TorchvisionGoogLeNet:
    return randomize_(TorchvisionGoogLeNet(**{"num_classes": 10, "init_weights": False, **options})).eval()


def our_googlenet(variant: VariantName, **options: object) -> nn.Module:
    return randomize_(googlenet_fused.googlenet(variant, **{"num_classes": 10, "init_weights": False, **options})).eval()


def small_model(spec: InceptionSpec = PRIMES) -> nn.Module:
    """A stem and an Inception module: quick, with both kinds of blocks."""
    *widths, large_kernel = spec
    stem = BasicConv2d(3, spec.in_channels, kernel_size=3, stride=2, padding=1)
    return randomize_(nn.Sequential(stem, Inception(*widths, large_kernel=large_kernel), nn.AdaptiveAvgPool2d(1))).eval()


def assert_agrees(fused: nn.Module, plain: nn.Module, x: Tensor) -> None:
    comparison = judge(fused, plain, x)
    assert comparison.ok, comparison


def assert_same(actual: Tensor, expected: Tensor, label: str = "") -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{label}: {text}")


def outcome(model: nn.Module) -> dict[str, bool]:
    return {block.name: block.fused for block in report_of(model).blocks}


def report_of(model: nn.Module) -> FusionReport:
    report = model.fusion_report
    assert isinstance(report, FusionReport)
    return report


def only_block(model: nn.Module) -> BlockReport:
    (block,) = report_of(model).blocks
    return block


# The networks.


@pytest.mark.parametrize("aux_logits", [False, True])
@pytest.mark.parametrize("transform_input", [False, True])
@every_backend
def test_torchvisions_network(backend: str, transform_input: bool, aux_logits: bool) -> None:
    plain = torchvision_googlenet(aux_logits=aux_logits, transform_input=transform_input)
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


@both_variants
@pytest.mark.parametrize("aux_logits", [False, True])
@every_backend
def test_our_networks(backend: str, aux_logits: bool, variant: VariantName) -> None:
    plain = our_googlenet(variant, aux_logits=aux_logits)
    fused = fuse(plain, backend=backend)
    assert outcome(fused) == dict.fromkeys([*STEM, *INCEPTIONS, *(HEADS if aux_logits else [])], True)
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
    plain = torchvision_googlenet(dropout=0.0, dropout_aux=0.0).train()
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
    plain = our_googlenet(variant, aux_logits=False).bfloat16()
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
    plain, asked = torchvision_googlenet(), []

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
    for plain in (torchvision_googlenet(), our_googlenet("bvlc")):
        fused = fuse(plain, lambda module, name: isinstance(module, classes))
        assert {block.kind for block in report_of(fused).fused} == {kind}
        assert {block.kind for block in report_of(fused).skipped} == {"inception", "conv"} - {kind}
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
    report = report_of(fuse(torchvision_googlenet(), lambda module, name: name != "inception3b"))
    first, *lines = str(report).splitlines()
    assert first == "fused 13 of 14 blocks"
    assert [line.split()[0] for line in lines] == [*STEM, *INCEPTIONS, *HEADS]
    assert "inception3b  inception  left plain: filter_fn said no" in lines[4]
    assert "backend, error" in lines[3]


def test_report_is_of_the_copy_and_travels_with_it() -> None:
    plain = small_model()
    fused = fuse(plain)
    assert not hasattr(plain, "fusion_report")
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert twin.fusion_report == fused.fusion_report
    assert not hasattr(unfuse(fused), "fusion_report")
    assert hasattr(fused, "fusion_report")


def test_error_in_the_report_is_of_this_run() -> None:
    block = only_block(fuse(plain_inception(PRIMES)))
    reduced = only_block(fuse(plain_inception(PRIMES).bfloat16()))
    assert block.max_error < 1e-6 < 1e-4 < reduced.max_error < 0.05  # type: ignore[operator]


# The original.


def everything(model: nn.Module) -> dict[str, object]:
    """What must not change in a model, compared by identity where that matters."""
    return {
        "modules": [(name, id(module), type(module), module.training) for name, module in model.named_modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [sorted(module._forward_hooks) + sorted(module._forward_pre_hooks) for module in model.modules()],
        "tensors": [(name, id(value), value._version) for name, value in model.state_dict(keep_vars=True).items()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [id(parameter.grad) for parameter in model.parameters()],
        "extra": repr(model),
    }


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("do", [fuse, unfuse], ids=["fuse", "unfuse"])
def test_the_original_is_left_untouched(do: Callable[[nn.Module], nn.Module], training: bool) -> None:
    plain = torchvision_googlenet() if do is fuse else fuse(torchvision_googlenet())
    plain.train(training)
    plain.inception3b.eval()
    plain.inception4a.requires_grad_(False)
    fired: list[nn.Module] = []
    for module in (plain, plain.inception3a, plain.conv1, plain.fc):
        module.register_forward_hook(lambda block, *_: fired.append(block))
    before, state = everything(plain), {name: value.clone() for name, value in plain.state_dict().items()}
    generator, mode = torch.get_rng_state(), torch.is_grad_enabled()
    done = do(plain)
    assert fired == [], "a hook of the user's fired"
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.is_grad_enabled() == mode
    assert everything(plain) == before
    for name, value in plain.state_dict().items():
        assert_same(value, state[name], name)

    assert [(name, p.requires_grad) for name, p in done.named_parameters()] == [
        (name, p.requires_grad) for name, p in plain.named_parameters()
    ]
    assert done.training == training
    modes = {name: module.training for name, module in plain.named_modules()}
    assert {name: module.training for name, module in done.named_modules()} == modes
    with torch.no_grad():
        for parameter in done.parameters():
            parameter.add_(1)
    for name, value in plain.state_dict().items():
        assert_same(value, state[name], name)


def test_hooks_on_blocks_come_along() -> None:
    plain, fired = small_model(), []
    for block in plain:
        block.register_forward_hook(lambda module, *_: fired.append(type(module)))
    fused = fuse(plain)
    x = torch.randn(1, 3, 9, 8)
    fused(x)
    assert fired == [FusedConv2d, FusedInception, nn.AdaptiveAvgPool2d]
    fired.clear()
    unfuse(fused)(x)
    assert fired == [BasicConv2d, Inception, nn.AdaptiveAvgPool2d]


def test_backward_hooks_on_blocks_come_along() -> None:
    plain, fired = small_model(), []
    plain[1].register_full_backward_hook(lambda module, grad_in, grad_out: fired.append(grad_in[0].shape))
    for model in (plain, fuse(plain), unfuse(fuse(plain))):
        model(torch.randn(1, 3, 9, 8)).sum().backward()
    assert fired == [(1, PRIMES.in_channels, 5, 4)] * 3


def test_a_hook_that_changes_the_output_does_not_disturb_the_check() -> None:
    plain = small_model()
    plain[1].register_forward_hook(lambda module, args, out: out * torch.rand(()))
    assert outcome(fuse(plain)) == {"0": True, "1": True}


def test_a_block_with_hooks_inside_stays_plain() -> None:
    plain = small_model()
    plain[1].branch2[0].register_forward_hook(lambda *_: None)
    fused = fuse(plain)
    assert outcome(fused) == {"0": True, "1": False}
    assert report_of(fused).skipped[0].reason == "branch2.0: the block has hooks, which would not fire"
    assert type(fused[1]) is Inception


# Fused and back.


@pytest.mark.parametrize("build", [torchvision_googlenet, lambda: our_googlenet("bvlc")], ids=["torchvision", "bvlc"])
def test_unfuse_restores_classes_and_outputs(build: Callable[[], nn.Module]) -> None:
    plain = build()
    back = unfuse(fuse(plain))
    assert [(name, type(module)) for name, module in back.named_modules()] == [
        (name, type(module)) for name, module in plain.named_modules()
    ]
    assert list(back.state_dict()) == list(plain.state_dict())
    assert repr(back) == repr(plain)
    x = torch.randn(2, 3, 32, 48)
    assert_same(back(x), plain(x))


def test_fuse_twice() -> None:
    plain = torchvision_googlenet()
    once = fuse(plain)
    twice = fuse(once)
    assert outcome(twice) == outcome(once)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert_same(twice(x), once(x))
    assert {id(p) for p in twice.parameters()}.isdisjoint(id(p) for p in once.parameters())
    assert_same(unfuse(twice)(x), plain(x))
    assert type(unfuse(twice).inception3a) is TorchvisionInception


def test_fuse_again_with_another_backend_or_filter() -> None:
    once = fuse(small_model(), backend="reference")
    assert fuse(once)[1].backend == "auto"
    fewer = fuse(once, lambda module, name: name == "0")
    assert outcome(fewer) == {"0": True, "1": False}
    assert type(fewer[1]) is Inception


def test_unfuse_of_a_plain_model_is_a_copy() -> None:
    plain = small_model()
    back = unfuse(plain)
    assert back is not plain
    assert repr(back) == repr(plain)
    assert {id(p) for p in back.parameters()}.isdisjoint(id(p) for p in plain.parameters())


def test_a_fused_inception_of_the_users_own_is_unfused() -> None:
    model = randomize_(nn.Sequential(FusedInception(*list(TINY)[:7]))).eval()
    back = unfuse(model)
    assert type(back[0]) is Inception
    assert_agrees(model, back, random_input(TINY, 1, 4, 5))


class Doubled(FusedInception):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize("do", [fuse, unfuse], ids=["fuse", "unfuse"])
def test_a_subclass_of_the_fused_module_keeps_what_it_computes(do: Callable[[nn.Module], nn.Module]) -> None:
    model = randomize_(nn.Sequential(Doubled(*list(TINY)[:7]), nn.Identity())).eval()
    x = random_input(TINY, 1, 4, 5)
    with torch.no_grad():
        torch.testing.assert_close(do(model)(x), model(x))


def test_what_hangs_on_a_block_comes_along() -> None:
    """A buffer or a submodule that forward does not use still belongs to the state_dict."""
    plain = small_model()
    plain[1].register_buffer("seen", torch.tensor(3))
    plain[1].remark = "the user's own"
    fused = fuse(plain)
    assert set(fused.state_dict()) == set(plain.state_dict())
    back = unfuse(fused)
    assert set(back.state_dict()) == set(plain.state_dict())
    assert back[1].remark == "the user's own"


def test_a_fused_model_through_a_file() -> None:
    fused, file = fuse(small_model()), io.BytesIO()
    x = torch.randn(1, 3, 9, 8)
    with torch.no_grad():
        expected = fused(x)
        torch.save(fused, file)
        file.seek(0)
        assert_same(torch.load(file, weights_only=False)(x), expected)


def test_a_state_dict_goes_both_ways() -> None:
    plain, fused = small_model(), fuse(randomize_(small_model(), seed=5))
    x = torch.randn(1, 3, 9, 8)
    fused(x)
    fused.load_state_dict(plain.state_dict(), strict=True)
    assert_agrees(fused, plain, x)
    other = randomize_(small_model(), seed=6)
    other.load_state_dict(fused.state_dict(), strict=True)
    assert_same(other(x), plain(x))


# The self-check.


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
        fuse(torchvision_googlenet(aux_logits=False))
    with use_backend("reference"):
        fused = fuse(torchvision_googlenet(aux_logits=False))
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
    plain = torchvision_googlenet(aux_logits=False)
    fused = fuse(plain, backend="wrong", on_mismatch="keep")
    assert [block.name for block in report_of(fused).skipped] == ["inception4b", "inception4c", "inception4d"]
    assert_agrees(fused, plain, torch.randn(1, 3, 32, 32))


# What cannot be fused, and wrong calls.


@pytest.mark.parametrize("on_mismatch", ["raise", "keep"])
def test_a_named_backend_that_cannot_run_is_an_error(on_mismatch: str) -> None:
    message = r"backend 'cpu' cannot run .* in float64 on cpu: .*not float64"
    with pytest.raises(BackendError, match=message):
        fuse(small_model().double(), backend="cpu", on_mismatch=on_mismatch)  # type: ignore[arg-type]
    with use_backend("cpu"), pytest.raises(BackendError, match=message):
        fuse(small_model().double())


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


@pytest.mark.parametrize("model", [None, 3, "googlenet", torch.zeros(1), TorchvisionGoogLeNet])
def test_not_a_module(model: object) -> None:
    for function in (fuse, unfuse):
        with pytest.raises(TypeError, match=f"model must be an nn.Module, got {type(model).__name__}"):
            function(model)  # type: ignore[operator]


@pytest.mark.parametrize("on_mismatch", ["ignore", None, True])
def test_wrong_on_mismatch(on_mismatch: object) -> None:
    with pytest.raises(ValueError, match=f"on_mismatch must be 'raise' or 'keep', got {on_mismatch!r}"):
        fuse(small_model(), on_mismatch=on_mismatch)  # type: ignore[arg-type]


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="unknown backend 'gpu': choose one of 'auto'"):
        fuse(small_model(), backend="gpu")


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


class Gated(TorchvisionInception):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid()


def test_a_subclass_is_left_alone_whole() -> None:
    plain = randomize_(nn.Sequential(Gated(*list(TINY)[:7]), nn.Identity())).eval()
    fused = fuse(plain)
    assert outcome(fused) == {"0": False}
    assert "Gated is not an Inception module" in (only_block(fused).reason or "")
    assert [type(module) for module in fused.modules()] == [type(module) for module in plain.modules()]


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


# Modes of torch around fuse.


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

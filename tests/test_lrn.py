"""Local response norms: the arithmetic, its gradients, what ``fuse`` makes of them, and when torch's operators run instead."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from cases import (
    LAYOUTS,
    assert_agrees,
    assert_same,
    can_run,
    message_of,
    outcome,
    plain_conv,
    report_of,
    through_a_file,
    through_pickle,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from googlenet_fused import CannotFuse, FusionMismatch, fuse, response_norm, unfuse, use_backend
from googlenet_fused.backends import registry
from googlenet_fused.backends.cpu import CpuBackend
from googlenet_fused.blocks import LocalResponseNorm
from googlenet_fused.lrn import FusedLocalResponseNorm, _Differentiable
from googlenet_fused.response_norm import ResponseNorm, local_response_norm, local_response_norm_backward

pytestmark = pytest.mark.skipif("cpu" not in can_run(torch.float32), reason="the cpu backend does not run here")

USUAL = ResponseNorm(5, 1e-4, 0.75, 1.0)
PARAMETERS = [
    USUAL,
    ResponseNorm(1, 0.5, 0.75, 2.0),
    ResponseNorm(2, 1.0, 0.75, 1.0),
    ResponseNorm(4, 0.3, 0.5, 0.1),
    ResponseNorm(5, 2.0, 1.3, 0.7),
    ResponseNorm(8, 1e-2, 0.75, 0.0),
    ResponseNorm(40, 1e-2, 0.75, 1.0),
    ResponseNorm(3, -1e-6, 0.75, 1.0),
    ResponseNorm(3, 1.0, -0.5, 1.0),
    ResponseNorm(3, 1.0, 0.0, 1.0),
]
HALVES = [dtype for dtype in (torch.bfloat16, torch.float16) if "cpu" in can_run(dtype)]

every_norm = pytest.mark.parametrize("norm", PARAMETERS, ids=lambda norm: "-".join(map(str, norm)))
both_classes = pytest.mark.parametrize("cls", [nn.LocalResponseNorm, LocalResponseNorm], ids=["torch's", "ours"])


def pixels(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """As large as pixels minus their mean: of ones, the usual norm would do next to nothing."""
    return (60 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def by_definition(x: Tensor, norm: ResponseNorm) -> Tensor:
    channels = x.shape[1]
    out = torch.empty_like(x)
    for c in range(channels):
        window = x[:, max(c - norm.size // 2, 0) : c + (norm.size - 1) // 2 + 1]
        out[:, c] = x[:, c] / (norm.k + norm.alpha / norm.size * window.square().sum(1)) ** norm.beta
    return out


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """One entry for each time that the backend's own norm runs."""
    found: list[Tensor] = []
    own = CpuBackend.local_response_norm
    monkeypatch.setattr(CpuBackend, "local_response_norm", lambda self, x, norm: found.append(x) or own(self, x, norm))
    return found


# The arithmetic.


@every_norm
def test_the_definition(norm: ResponseNorm) -> None:
    x = pixels(2, 11, 3, 4, dtype=torch.float64)
    expected = by_definition(x, norm)
    torch.testing.assert_close(local_response_norm(x, norm), expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(LocalResponseNorm(*norm)(x), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@every_norm
def test_every_layout_and_dtype(norm: ResponseNorm, dtype: torch.dtype) -> None:
    plain = LocalResponseNorm(*norm)
    fused = FusedLocalResponseNorm.from_module(plain)
    for channels in (1, 2, 7, 64):
        for layout in LAYOUTS.values():
            x = layout(pixels(2, channels, 5, 6, dtype=dtype))
            kept = x.clone()
            assert_agrees(fused, plain, x)
            assert_same(x, kept)
            out = fused(x)
            assert out.is_contiguous() or out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_layout_is_kept(layout: str) -> None:
    x = LAYOUTS[layout](pixels(2, 7, 5, 6))
    assert FusedLocalResponseNorm.from_module(LocalResponseNorm(5))(x).stride() == x.stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("block", [1, 20, 100, 10**9])
def test_blocks_change_no_bit(block: int, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, grad = (LAYOUTS[layout](pixels(3, 7, 5, 6, seed=seed)) for seed in (1, 2))
    expected = local_response_norm(x, USUAL), local_response_norm_backward(grad, x, USUAL)
    monkeypatch.setattr(response_norm, "BLOCK_ELEMENTS", block)
    assert_same(local_response_norm(x, USUAL), expected[0])
    assert_same(local_response_norm_backward(grad, x, USUAL), expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("norm", [USUAL, ResponseNorm(4, 1.0, 0.6, 0.0)], ids=["usual", "even"])
def test_nan_and_infinities_stand_where_torch_has_them(norm: ResponseNorm, value: float, dtype: torch.dtype) -> None:
    plain = LocalResponseNorm(*norm)
    for layout in LAYOUTS.values():
        x = pixels(2, 9, 3, 4, dtype=dtype)
        x[1, 4, 2, 3] = x[0, 0, 0, 0] = x[0, 8, 1, 1] = value
        x = layout(x)
        assert not plain(x).isfinite().all()
        assert_agrees(FusedLocalResponseNorm.from_module(plain), plain, x)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-20, 1e18, 3e19, 1e38])
@pytest.mark.parametrize("k", [0.0, 1.0])
def test_squares_that_overflow_or_vanish(k: float, scale: float) -> None:
    plain = LocalResponseNorm(5, k=k)
    x = scale * torch.randn(2, 9, 3, 4)
    fused = FusedLocalResponseNorm.from_module(plain)
    assert torch.equal(fused(x).isnan(), plain(x).isnan())
    assert torch.equal(fused(x).isinf(), plain(x).isinf())
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-6, atol=0, equal_nan=True)


# Gradients.


def differentiable(x: Tensor, norm: ResponseNorm) -> Tensor:
    return _Differentiable.apply(x, norm, registry.get("cpu"))


@every_norm
def test_gradients_are_those_of_the_function(norm: ResponseNorm) -> None:
    x = torch.randn(2, 6, 2, 3, dtype=torch.float64).requires_grad_()
    if norm.k == 0 or norm.beta < 0:
        with torch.no_grad():
            x += x.sign()  # away from where it is not smooth
    assert torch.autograd.gradcheck(lambda x: differentiable(x, norm), x)
    assert torch.autograd.gradgradcheck(lambda x: differentiable(x, norm), x)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last", "every_other_pixel"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_the_module(layout: str, grad_layout: str, dtype: torch.dtype, calls: list[Tensor]) -> None:
    plain = LocalResponseNorm(5)
    x, grad = LAYOUTS[layout](pixels(2, 9, 3, 4, dtype=dtype)), LAYOUTS[grad_layout](torch.randn(2, 9, 3, 4).to(dtype))
    found = []
    for module in (FusedLocalResponseNorm.from_module(plain), plain):
        leaf = x.detach().requires_grad_()
        out = module(leaf)
        out.backward(grad)
        found.append((out.detach(), leaf.grad))
    assert len(calls) == 1
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    for actual, expected in zip(*found, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def test_a_training_step_in_a_network() -> None:
    plain = nn.Sequential(plain_conv(None), nn.LocalResponseNorm(5), plain_conv(None, in_channels=11)).train()
    fused = fuse(plain)
    assert outcome(fused) == {"0": True, "1": True, "2": True}
    x = pixels(2, 3, 9, 8)
    for model in (plain, fused):
        model(x).square().mean().backward()
    for theirs, ours in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4 * theirs.grad.abs().max().item())


def test_without_gradients_nothing_is_kept(calls: list[Tensor]) -> None:
    module, x = FusedLocalResponseNorm.from_module(LocalResponseNorm(5)), pixels(1, 6, 2, 3)
    assert module(x).grad_fn is None
    with torch.no_grad():
        assert module(x.requires_grad_()).grad_fn is None
    with torch.inference_mode():
        assert module(x).is_inference()
    assert len(calls) == 3


# Where torch's operators run.


@both_classes
def test_where_torchs_operators_run_the_result_is_the_plain_modules(
    cls: type[nn.LocalResponseNorm], calls: list[Tensor]
) -> None:
    plain = cls(5)
    fused, x = FusedLocalResponseNorm.from_module(plain), pixels(2, 6, 3, 4)
    for other in (x[0], x[:, :, :, 0], x[..., None], x[:0], x.double(), x.to("meta")):
        assert fused(other).shape == other.shape
        if not other.is_meta:
            assert_same(fused(other), plain(other))
    with use_backend("reference"):
        assert_same(fused(x), plain(x))
    with pytest.raises(ValueError, match="3D or higher"):
        fused(x[0, 0])
    with torch.autocast("cpu", torch.bfloat16):
        for input in (x, x.bfloat16()):
            expected = plain(input)
            assert fused(input).dtype == expected.dtype
            assert_same(fused(input), expected)
    assert calls == []
    fused(x)
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
def test_under_tracing_and_transforms(calls: list[Tensor]) -> None:
    plain = LocalResponseNorm(5)
    fused, x = FusedLocalResponseNorm.from_module(plain), pixels(2, 6, 3, 4)
    assert_same(torch.jit.trace(fused, x, check_trace=False)(x[:1]), plain(x[:1]))
    assert_same(torch.func.vmap(fused)(x[None]), plain(x)[None])
    assert_same(torch.func.jvp(fused, (x,), (x,)), torch.func.jvp(plain, (x,), (x,)))
    grads = [torch.func.grad(lambda x, module=module: module(x).sum())(x) for module in (fused, plain)]
    assert_same(*grads)
    batch = torch.export.Dim("batch", min=1, max=8)
    exported = torch.export.export(fused, (x,), dynamic_shapes=({0: batch},)).module()
    assert_same(exported(x[:1]), plain(x[:1]))
    assert calls == []


@pytest.mark.parametrize("grad", [False, True])
@both_classes
def test_compiled_into_one_graph_whatever_the_batch(cls: type[nn.LocalResponseNorm], grad: bool, calls: list[Tensor]) -> None:
    plain = cls(5)
    counting = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(FusedLocalResponseNorm.from_module(plain), fullgraph=True, backend=counting)
    for batch in (3, 2, 5):
        x = pixels(batch, 6, 3, 4).requires_grad_(grad)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), plain(x))
    assert counting.frame_count == 1
    assert calls == []


def test_a_profile_is_of_what_runs_without_one(calls: list[Tensor]) -> None:
    module, x = FusedLocalResponseNorm.from_module(LocalResponseNorm(5)), pixels(2, 6, 3, 4)
    with torch.profiler.profile():
        module(x)
    assert len(calls) == 1


def test_a_named_backend_that_cannot_run_it_is_an_error() -> None:
    module = FusedLocalResponseNorm.from_module(LocalResponseNorm(5), backend="cpu")
    with pytest.raises(registry.BackendError, match=r"backend 'cpu' cannot run .* float64"):
        module(pixels(2, 6, 3, 4, dtype=torch.float64))


# What ``fuse`` makes of them.


def network(cls: type[nn.LocalResponseNorm] = LocalResponseNorm, **options: float) -> nn.Module:
    return nn.Sequential(plain_conv(None, out_channels=6), cls(5, **options), nn.ReLU()).eval()


@both_classes
def test_fused_and_back(cls: type[nn.LocalResponseNorm]) -> None:
    plain = network(cls, alpha=2e-3)
    fused = fuse(plain)
    block = report_of(fused).blocks[1]
    assert (block.name, block.kind, block.fused, block.backend, block.reason) == ("1", "lrn", True, "cpu", None)
    assert 0 < block.max_error < 1e-6  # type: ignore[operator]
    assert 0 < block.plain_error < 1e-6  # type: ignore[operator]
    assert "lrn        fused, cpu backend, error" in str(report_of(fused))
    assert type(fused[1]) is FusedLocalResponseNorm
    assert repr(fused[1]) == "FusedLocalResponseNorm(5, alpha=0.002, beta=0.75, k=1.0, backend='auto')"
    assert_agrees(fused, plain, pixels(2, 3, 9, 8))
    assert fused.state_dict().keys() == plain.state_dict().keys()
    again = fuse(fused)
    assert report_of(again) == report_of(fused)
    for back in (unfuse(fused), unfuse(again)):
        assert repr(back) == repr(plain)
        assert [type(module) for module in back.modules()] == [type(module) for module in plain.modules()]
        assert vars(back[1]).keys() == vars(plain[1]).keys()


@pytest.mark.parametrize("dtype", HALVES)
@both_classes
def test_in_half_precision(cls: type[nn.LocalResponseNorm], dtype: torch.dtype) -> None:
    """torch's own has no kernel for those on a CPU: it is fused, and judged by this package's."""
    fused = fuse(network(cls).to(dtype))
    assert outcome(fused) == {"0": True, "1": True}
    assert 1e-5 < report_of(fused).blocks[1].max_error < 1e-2  # type: ignore[operator]
    assert_agrees(fused, network(LocalResponseNorm).to(dtype), pixels(2, 3, 9, 8, dtype=dtype))


def test_where_the_backend_has_none_it_stays_plain() -> None:
    plain = network()
    fused = fuse(plain, backend="reference")
    assert outcome(fused) == {"0": True, "1": False}
    expected = "the reference backend has no local response norm of its own, so torch's operators run"
    assert report_of(fused).blocks[1].reason == expected
    assert f"left plain: {expected}" in str(report_of(fused))
    assert type(fused[1]) is LocalResponseNorm
    assert outcome(fuse(plain.double())) == {"0": True, "1": False}


def test_by_filter() -> None:
    fused = fuse(network(), lambda module, name: not isinstance(module, nn.LocalResponseNorm))
    assert outcome(fused) == {"0": True, "1": False}
    assert report_of(fused).blocks[1].reason == "filter_fn said no"


def test_as_the_root_and_without_parameters() -> None:
    fused = fuse(nn.LocalResponseNorm(5))
    assert type(fused) is FusedLocalResponseNorm
    assert outcome(fused) == {"": True}
    assert type(unfuse(fused)) is nn.LocalResponseNorm
    with torch.device("meta"):
        assert outcome(fuse(nn.LocalResponseNorm(5))) == {"": True}


def test_on_meta() -> None:
    fused = fuse(network().to("meta"))
    assert report_of(fused).blocks[1].reason == "its parameters are on the meta device"
    assert fused(torch.empty(2, 3, 9, 8, device="meta")).shape == (2, 6, 7, 6)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out, x: out.mul_(1.0001),
        lambda out, x: out.copy_(x),
        lambda out, x: out.copy_(out.flip(1)),
        lambda out, x: out[:, 0].copy_(x[:, 0]),
    ],
    ids=["scaled", "not at all", "reversed", "first channel"],
)
@pytest.mark.parametrize("options", [{}, {"alpha": 1.0}], ids=str)
def test_a_wrong_norm_is_found(
    options: dict[str, float], spoil: Callable[[Tensor, Tensor], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(self: CpuBackend, x: Tensor, norm: ResponseNorm) -> Tensor:
        out = local_response_norm(x, norm)
        spoil(out, x)
        return out

    monkeypatch.setattr(CpuBackend, "local_response_norm", wrong)
    plain = network(**options)
    with pytest.raises(FusionMismatch, match=r"^1: with backend 'cpu' the fused block disagrees"):
        fuse(plain)
    kept = fuse(plain, on_mismatch="keep")
    assert outcome(kept) == {"0": True, "1": False}
    assert type(kept[1]) is LocalResponseNorm


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_a_file])
def test_copies(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    fused, x = FusedLocalResponseNorm.from_module(nn.LocalResponseNorm(3, beta=0.5), backend="cpu"), pixels(2, 6, 3, 4)
    twin = duplicate(fused)
    assert repr(twin) == repr(fused)
    assert_same(twin(x), fused(x))
    assert type(twin.to_plain()) is nn.LocalResponseNorm  # type: ignore[operator]


def test_hooks_come_along() -> None:
    plain, fired = network(), []
    plain[1].register_forward_hook(lambda module, *_: fired.append(type(module)))
    fused = fuse(plain)
    assert fired == []
    fused(pixels(2, 3, 9, 8))
    unfuse(fused)(pixels(2, 3, 9, 8))
    assert fired == [FusedLocalResponseNorm, LocalResponseNorm]


def test_parameters_that_change_are_followed() -> None:
    fused, x = FusedLocalResponseNorm.from_module(LocalResponseNorm(5)), pixels(2, 6, 3, 4)
    fused(x)
    fused.alpha, fused.size = 0.1, 3
    assert_agrees(fused, LocalResponseNorm(3, 0.1), x)


class OwnNorm(nn.LocalResponseNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class OwnFused(FusedLocalResponseNorm):
    pass


def own_forward() -> nn.Module:
    norm = nn.LocalResponseNorm(5)
    norm.forward = norm.forward  # type: ignore[method-assign]
    return norm


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.ReLU(), "ReLU is not torch's or googlenet_fused's LocalResponseNorm"),
        (lambda: OwnNorm(5), "OwnNorm is not torch's or googlenet_fused's LocalResponseNorm"),
        (own_forward, "the norm has a forward of its own on the instance"),
        (lambda: nn.LocalResponseNorm(0), "its size is 0, not a positive integer"),
        (lambda: nn.LocalResponseNorm(5.0), "its size is 5.0, not a positive integer"),  # type: ignore[arg-type]
        (lambda: FusedLocalResponseNorm.from_module(nn.LocalResponseNorm(5)), "FusedLocalResponseNorm is fused already"),
        (
            lambda: OwnFused.from_module(nn.LocalResponseNorm(5)),
            "OwnFused is fused already, by a class of its own that is left as it is",
        ),
    ],
)
def test_refused(make: Callable[[], nn.Module], message: str) -> None:
    block = make()
    with pytest.raises(CannotFuse) as error:
        FusedLocalResponseNorm.from_module(block)
    assert message_of(error) == message
    if isinstance(block, nn.LocalResponseNorm) and type(block) is not FusedLocalResponseNorm:
        fused = fuse(nn.Sequential(block))
        assert report_of(fused).blocks[0].reason == message
        assert type(fused[0]) is type(block)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        FusedLocalResponseNorm.from_module(nn.LocalResponseNorm(5), backend="gpu")

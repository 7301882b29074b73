"""Gradients of the fused module: numerically, against the plain block's autograd, and in every layout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import (
    EPS,
    FP64_TOLERANCE,
    GOOGLENET_MODULES,
    LAYOUTS,
    ODD_SPECS,
    SMALL_SIZES,
    TINY,
    Arguments,
    as_convs,
    before_relu,
    both_large_kernels,
    by_definition,
    conv_blocks,
    cotangent,
    fused_inception,
    inception_arguments,
    integer_convs,
    integer_input,
    plain_inception,
    random_input,
    run_face,
    run_operator,
)
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from googlenet_fused import FusedInception, InceptionSpec
from googlenet_fused.modules import FusedConv2d
from googlenet_fused.ops import conv2d_relu
from googlenet_fused.packing import BatchNormParams, ConvParams
from googlenet_fused.tolerance import check_close

SMALL = InceptionSpec(2, 1, 2, 1, 1, 2, 1, large_kernel=5)
MIDDLING = InceptionSpec(19, 8, 12, 16, 5, 7, 9, large_kernel=5)
KINK_MARGIN = 1e-4

GRAD_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    **LAYOUTS,
    "expanded": lambda grad: grad.mean().expand(grad.shape),
    "expanded_pixels": lambda grad: grad.mean((2, 3), keepdim=True).expand(grad.shape),
}
"""Layouts in which a gradient arrives; the last two are stride-0 views, as ``sum`` and ``mean`` hand back, of other values."""


def kink_distance(x: Tensor, convs: list[ConvParams]) -> float:
    """Distance to a point without a derivative: the least argument of a ReLU, or lead of a maximum over the second largest.

    Negative if a ReLU is closed at every pixel of every channel: behind it all gradients are zero and nothing is compared.
    """
    distances = []

    def conv(x: Tensor, params: ConvParams) -> Tensor:
        x = before_relu(x, params)
        distances.append(x.abs().min().item() if (x > 0).any() else -1.0)
        return x.relu()

    by_definition(x, convs, conv)
    windows = F.unfold(F.pad(x, (1, 1, 1, 1), value=-1e6), 3).unflatten(1, (x.shape[1], 9))
    first, second = windows.topk(2, dim=2).values.unbind(2)
    return min(*distances, (first - second).min().item())


def away_from_kinks(spec: InceptionSpec, height: int, width: int, *, norm: bool, bias: bool) -> tuple[Tensor, Arguments]:
    for seed in range(200):
        x = random_input(spec, 2, height, width, torch.float64, seed=seed)
        arguments = inception_arguments(spec, norm=norm, bias=bias, dtype=torch.float64, requires_grad=True, seed=seed)
        with torch.no_grad():
            if kink_distance(x, as_convs(*arguments)) > KINK_MARGIN:
                return x.requires_grad_(), arguments
    raise AssertionError("every input tried is near a kink")


def of_tensors(way: Callable[[Tensor, Arguments], Tensor], like: Arguments) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """``way`` as a function of ``x`` and the tensors of its arguments one by one, and these tensors."""
    counts = [len(group) for group in like[:3]]

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        remaining = iter(tensors)
        weights, biases, norms = ([next(remaining) for _ in range(count)] for count in counts)
        return way(x, (weights, biases, norms, like[3]))

    return run, [tensor for group in like[:3] for tensor in group]


def run_copies(x: Tensor, arguments: Arguments) -> Tensor:
    """``inception`` on new tensors in every call, because gradcheck writes to its inputs through .data."""
    weights, biases, norms = ([tensor * 1 for tensor in group] for group in arguments[:3])
    return run_face(x, (weights, biases, norms, arguments[3]))


# Numerically.


@pytest.mark.parametrize(("norm", "bias"), [(True, False), (False, True), (True, True)], ids=["norm", "bias", "both"])
@both_large_kernels
def test_gradcheck(large_kernel: int, norm: bool, bias: bool) -> None:
    x, arguments = away_from_kinks(replace(SMALL, large_kernel=large_kernel), 5, 3, norm=norm, bias=bias)
    run, tensors = of_tensors(run_copies, arguments)
    assert gradcheck(run, (x, *tensors))


@both_large_kernels
def test_gradgradcheck(large_kernel: int) -> None:
    x, arguments = away_from_kinks(replace(SMALL, large_kernel=large_kernel), 5, 3, norm=True, bias=False)
    run, tensors = of_tensors(run_copies, arguments)
    assert gradgradcheck(run, (x, *tensors))


@pytest.mark.parametrize(("norm", "bias"), [(True, False), (False, True), (True, True)], ids=["norm", "bias", "both"])
@both_large_kernels
def test_fast_gradcheck_and_gradgradcheck_of_a_wider_module(large_kernel: int, norm: bool, bias: bool) -> None:
    x, arguments = away_from_kinks(replace(TINY, large_kernel=large_kernel), 3, 5, norm=norm, bias=bias)
    run, tensors = of_tensors(run_copies, arguments)
    assert gradcheck(run, (x, *tensors), fast_mode=True)
    assert gradgradcheck(run, (x, *tensors), fast_mode=True)


STEM_GEOMETRY = {"3x3": (3, 1, 1), "7x7 stride 2": (7, 2, 3), "1x1": (1, 1, 0)}


def stem_case(
    kernel_size: int, stride: int, padding: int
) -> tuple[Tensor, list[Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    """Input, leaves, and the stem's convolution fused and out of torch's functions, in fp64 and away from every kink."""
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        shapes = [(2, 3, 7, 5), (4, 3, kernel_size, kernel_size), (4,), (4,), (4,)]
        x, *leaves = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)
        mean, variance = torch.randn(4, dtype=torch.float64) * 0.1, torch.rand(4, dtype=torch.float64) + 0.5

        def conv(weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> ConvParams:
            return ConvParams(weight * 1, bias, BatchNormParams(gamma, beta, mean, variance), EPS)  # noqa: B023

        def fused(x: Tensor, *leaves: Tensor) -> Tensor:
            return conv2d_relu(x, conv(*leaves), stride=(stride, stride), padding=(padding, padding))

        def plain(x: Tensor, *leaves: Tensor) -> Tensor:
            return before_relu(x, conv(*leaves), stride, padding).relu()

        if before_relu(x, conv(*leaves), stride, padding).abs().min() > KINK_MARGIN:
            return x, leaves, fused, plain
    raise AssertionError("every input tried is near a kink")


@pytest.mark.parametrize("geometry", STEM_GEOMETRY)
def test_gradcheck_and_gradgradcheck_of_the_stem(geometry: str) -> None:
    x, leaves, fused, _ = stem_case(*STEM_GEOMETRY[geometry])
    assert gradcheck(fused, (x, *leaves))
    assert gradgradcheck(fused, (x, *leaves), fast_mode=True)


@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
@pytest.mark.parametrize("geometry", STEM_GEOMETRY)
def test_gradients_of_the_stem_arrive_in_any_layout(geometry: str, layout: str) -> None:
    x, leaves, fused, plain = stem_case(*STEM_GEOMETRY[geometry])
    out = fused(x, *leaves)
    grad = GRAD_LAYOUTS[layout](torch.randn(out.shape, dtype=torch.float64))
    found = torch.autograd.grad(out, (x, *leaves), grad)
    expected = torch.autograd.grad(plain(x, *leaves), (x, *leaves), grad)
    torch.testing.assert_close(found, expected, **FP64_TOLERANCE)


@pytest.mark.parametrize("of", ["face", "operator"])
def test_gradcheck_on_the_parameters_themselves(of: str) -> None:
    # As a user writes it. gradcheck writes to its inputs through .data, which no version counter shows.
    x, arguments = away_from_kinks(SMALL, 5, 3, norm=False, bias=True)
    run, tensors = of_tensors({"face": run_face, "operator": run_operator}[of], arguments)
    assert gradcheck(run, (x, *tensors))


# Against the plain block's autograd.


class Folded(nn.Module):
    """The plain block with batch norm folded in fp64, out of torch's functions: what folding costs in a dtype."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        def conv(x: Tensor, block: nn.Module) -> Tensor:
            weight, bias, norm = block.conv.weight, block.conv.bias, block.bn
            if norm is not None:
                scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
                weight = (weight.double() * scale[:, None, None, None]).to(x.dtype)
                bias = (norm.bias.double() - norm.running_mean.double() * scale).to(x.dtype)
            return F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding=weight.shape[2] // 2).relu()

        return by_definition(x, conv_blocks(self.plain), conv)


def clear_of_zero(module: nn.Module) -> nn.Module:
    """Shift every other channel far above zero and the rest far below, so that no rounding moves a value across ReLU's kink."""
    with torch.no_grad():
        for block in conv_blocks(module):
            bias = block.conv.bias if block.bn is None else block.bn.bias
            bias.copy_(torch.where(torch.arange(len(bias)) % 3 == 1, -30.0, 10.0))
    return module


def gradients(module: nn.Module, x: Tensor, grad_output: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    named = {name.removeprefix("plain."): parameter for name, parameter in module.named_parameters()}
    found = torch.autograd.grad(module(x), [x, *named.values()], grad_output)
    return dict(zip(["x", *named], found, strict=True))


def check_gradients(fused: nn.Module, plain: nn.Module, x: Tensor, grad_output: Tensor) -> None:
    """Every gradient of ``fused`` by the tolerance law, against those of ``plain``."""
    actual = gradients(fused, x, grad_output)
    truth = gradients(copy.deepcopy(plain).double(), x.double(), grad_output.double())
    peers = [gradients(plain, x, grad_output), gradients(Folded(plain), x, grad_output)]
    for layout in ("contiguous", "channels_last"):
        peers.append(gradients(plain, LAYOUTS[layout](x), LAYOUTS[layout](grad_output)))
    assert list(actual) == list(truth)
    for name, gradient in actual.items():
        check_close(gradient, [peer[name] for peer in peers], truth[name], label=f"gradient of {name}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
@both_large_kernels
def test_layouts_of_the_incoming_gradient(large_kernel: int, layout: str, dtype: torch.dtype) -> None:
    spec = replace(MIDDLING, large_kernel=large_kernel)
    x = random_input(spec, 2, 7, 9, dtype)
    grad = GRAD_LAYOUTS[layout](cotangent(spec, x))
    check_gradients(fused_inception(spec).to(dtype), plain_inception(spec).to(dtype), x, grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["batch", None])
def test_layouts_of_the_input(norm: str | None, layout: str, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout](random_input(MIDDLING, 3, 7, 6, dtype))
    plain = clear_of_zero(plain_inception(MIDDLING, norm)).to(dtype)
    check_gradients(FusedInception.from_module(plain), plain, x, cotangent(MIDDLING, x))


@pytest.mark.parametrize("name", ["3a", "5b"])
def test_a_module_of_the_network(name: str) -> None:
    spec, side = GOOGLENET_MODULES[name]
    x = random_input(spec, 1, side, side)
    check_gradients(fused_inception(spec), plain_inception(spec), x, cotangent(spec, x))


@pytest.mark.parametrize("shape", SMALL_SIZES)
@pytest.mark.parametrize("name", ODD_SPECS)
def test_odd_shapes(name: str, shape: tuple[int, int, int]) -> None:
    spec = ODD_SPECS[name]
    x = random_input(spec, *shape, torch.float64)
    fused, plain = fused_inception(spec).double(), plain_inception(spec).double()
    check_gradients(fused, plain, x, cotangent(spec, x))


@pytest.mark.parametrize("layout", LAYOUTS)
@both_large_kernels
def test_exact_integers(large_kernel: int, layout: str) -> None:
    # Full of ties: zeros under ReLU and equal values under the maximum, where torch's choice of subgradient is to be met.
    spec = replace(ODD_SPECS["primes"], large_kernel=large_kernel)
    plain = plain_inception(spec, norm=None).double()
    with torch.no_grad():
        for block, conv in zip(conv_blocks(plain), integer_convs(spec, torch.float64), strict=True):
            block.conv.weight.copy_(conv.weight)
            block.conv.bias.copy_(conv.bias)
    x = LAYOUTS[layout](integer_input(spec, 2, 6, 7, torch.float64))
    grad = torch.randint(-3, 4, (2, spec.out_channels, 6, 7), dtype=torch.float64)
    expected = gradients(plain, x, grad)
    actual = gradients(FusedInception.from_module(plain), x, grad)
    for name, gradient in actual.items():
        assert torch.equal(gradient, expected[name]), name


def test_empty_batch() -> None:
    fused, plain = fused_inception(TINY), plain_inception(TINY)
    x = random_input(TINY, 0, 5, 4)
    grad = x.new_zeros(0, TINY.out_channels, 5, 4)
    expected = gradients(plain, x, grad)
    for name, gradient in gradients(fused, x, grad).items():
        assert torch.equal(gradient, expected[name]), name


def test_gradients_through_sum_and_mean_and_cat() -> None:
    # Consumers whose backward hands on stride-0 views and slices.
    plain = plain_inception(TINY).double()
    fused = FusedInception.from_module(plain)
    x = random_input(TINY, 2, 5, 6, torch.float64)

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        out = module(x)
        both = torch.cat([out, 2 * out, x], dim=1)
        return both.sum() + out.mean((2, 3)).square().sum() + out.transpose(2, 3).flatten(1).cumsum(1).sum()

    found = []
    for module in (fused, plain):
        leaf = x.clone().requires_grad_()
        found.append(torch.autograd.grad(loss(module, leaf), [leaf, *module.parameters()]))
    torch.testing.assert_close(*found, **FP64_TOLERANCE)


def test_two_consumers_of_one_module() -> None:
    plain = plain_inception(InceptionSpec(17, 3, 4, 6, 2, 3, 5), norm=None).double()
    fused = FusedInception.from_module(plain)
    x = random_input(fused.spec, 1, 4, 5, torch.float64)
    found = []
    for module in (fused, plain):
        leaf = x.clone().requires_grad_()
        out = module(module(leaf)) + module(leaf).flip(2)
        found.append(torch.autograd.grad(out.square().sum(), [leaf, *module.parameters()]))
    torch.testing.assert_close(*found, **FP64_TOLERANCE)


def test_double_backward_is_the_plain_blocks() -> None:
    plain = plain_inception(TINY).double()
    fused = FusedInception.from_module(plain)
    x = random_input(TINY, 2, 5, 7, torch.float64)
    found = []
    for module in (fused, plain):
        leaf = x.clone().requires_grad_()
        (grad_x,) = torch.autograd.grad(module(leaf).square().sum(), leaf, create_graph=True)
        penalty = (grad_x.flatten(1).norm(dim=1) - 1).square().sum()
        found.append(torch.autograd.grad(penalty, [leaf, *module.parameters()], allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(*found, **FP64_TOLERANCE)


def test_nan_and_infinity_reach_the_gradients_as_in_the_plain_block() -> None:
    plain = plain_inception(TINY, norm=None)
    x = random_input(TINY, 2, 5, 6)
    x[0, 1, 2, 3], x[1, 0, 0, 0] = float("nan"), float("inf")
    grad = cotangent(TINY, x)
    expected = gradients(plain, x, grad)
    for name, gradient in gradients(FusedInception.from_module(plain), x, grad).items():
        assert torch.equal(gradient.isfinite(), expected[name].isfinite()), name


def test_an_output_changed_in_place_is_right_or_an_error() -> None:
    plain = plain_inception(TINY).double()
    x = random_input(TINY, 1, 4, 5, torch.float64)
    expected = gradients(nn.Sequential(plain, nn.Hardtanh(inplace=True)), x, cotangent(TINY, x))
    try:
        actual = gradients(nn.Sequential(FusedInception.from_module(plain), nn.Hardtanh(inplace=True)), x, cotangent(TINY, x))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
        return
    torch.testing.assert_close(actual, expected, **FP64_TOLERANCE)


# Only some of the gradients.


def partly_frozen(module: nn.Module, what: str) -> nn.Module:
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(
            {
                "x only": False,
                "weights only": name.endswith("conv.weight"),
                "norms only": ".bn." in name,
                "all but a reduction": not name.startswith("branch2.0."),
                "one convolution": name == "branch3.1.conv.weight",
                "x and a norm's bias": name == "branch4.1.bn.bias",
            }[what]
        )
    return module


@pytest.mark.parametrize(
    "what", ["x only", "weights only", "norms only", "all but a reduction", "one convolution", "x and a norm's bias"]
)
def test_frozen_parts_get_no_gradient(what: str) -> None:
    x = random_input(TINY, 2, 5, 6, torch.float64)
    grad = cotangent(TINY, x)
    found: list[dict[str, Tensor | None]] = []
    for make in (fused_inception, plain_inception):
        module = partly_frozen(make(TINY).double(), what)
        leaf = x.clone().requires_grad_(what.startswith("x"))
        module(leaf).backward(grad)
        tensors = {"x": leaf, **dict(module.named_parameters()), **dict(module.named_buffers())}
        found.append({name: tensor.grad for name, tensor in tensors.items()})
    actual, expected = found
    assert [name for name in actual if actual[name] is None] == [name for name in expected if expected[name] is None]
    for name, gradient in actual.items():
        if gradient is not None:
            torch.testing.assert_close(
                gradient, expected[name], **FP64_TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_running_statistics_get_no_gradient() -> None:
    x, arguments = away_from_kinks(SMALL, 4, 5, norm=True, bias=False)
    weights, _, norms, _ = arguments
    statistics, leaves = norms[2::4] + norms[3::4], weights + norms[0::4] + norms[1::4]
    for statistic in statistics:
        statistic.requires_grad_()
    run_face(x, arguments).sum().backward()
    assert all(statistic.grad is None for statistic in statistics)
    assert all(leaf.grad is not None for leaf in leaves)


def test_frozen_module_without_gradients_keeps_no_graph() -> None:
    module = fused_inception(TINY)
    x = random_input(TINY, 1, 4, 5)
    assert module(x).grad_fn is not None
    with torch.no_grad():
        assert module(x.clone().requires_grad_()).grad_fn is None
    assert module.requires_grad_(False)(x).grad_fn is None


def test_the_stems_block_has_gradients() -> None:
    plain = plain_inception(TINY).double().branch2[1]
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    grad = torch.randn(2, 6, 5, 6, dtype=torch.float64)
    actual, expected = gradients(FusedConv2d.from_module(plain), x, grad), gradients(plain, x, grad)
    torch.testing.assert_close(actual, expected, **FP64_TOLERANCE)


# Autocast around the backward pass, as in a training loop that wraps both.


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("forward_inside", [False, True])
def test_autocast(forward_inside: bool, backward_inside: bool) -> None:
    spec = MIDDLING
    x = random_input(spec, 2, 7, 9)
    grad = cotangent(spec, x)

    def run(module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
        x = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=forward_inside):
            out = module(x)
        assert out.dtype == (torch.bfloat16 if forward_inside else torch.float32)
        named = {"x": x, **dict(module.named_parameters())}
        with torch.autocast("cpu", torch.bfloat16, enabled=backward_inside):
            found = torch.autograd.grad(out, list(named.values()), grad.to(out.dtype))
        return dict(zip(named, found, strict=True))

    plain = clear_of_zero(plain_inception(spec))
    actual = run(FusedInception.from_module(plain), x, grad)
    truth = gradients(copy.deepcopy(plain).double(), x.double(), grad.double())
    peers = [run(plain, LAYOUTS[layout](x), grad) for layout in ("contiguous", "channels_last")]
    if forward_inside:
        in_bf16 = gradients(Folded(plain), x.bfloat16(), grad.bfloat16())
        peers.append({name: gradient.float() for name, gradient in in_bf16.items()})
    for name, gradient in actual.items():
        check_close(gradient, [peer[name] for peer in peers], truth[name], label=f"gradient of {name}")


class Masks(TorchDispatchMode):
    """Which of the gradients of x, weight and bias each convolution's backward pass computes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[list[bool]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function is torch.ops.aten.convolution_backward.default:
            self.found.append(list(args[-1]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("wanted", ["x", "parameters"])
@pytest.mark.parametrize("kind", ["inception", "stem"])
def test_gradients_that_nobody_wants_are_not_computed(kind: str, wanted: str) -> None:
    module = fused_inception(TINY) if kind == "inception" else FusedConv2d.from_module(plain_inception(TINY).branch1)
    module.requires_grad_(wanted == "parameters")
    out = module(random_input(TINY, 2, 4, 5).requires_grad_(wanted == "x"))
    with Masks() as masks:
        out.sum().backward()
    unwanted = [mask for mask in masks.found if (mask[1] or mask[2] if wanted == "x" else mask[0])]
    through_the_large_kernels = 2 if kind == "inception" and wanted == "parameters" else 0
    assert len(masks.found) == (6 if kind == "inception" else 1)
    assert len(unwanted) == through_the_large_kernels

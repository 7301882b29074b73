"""Folding batch norm and its gradient, and the layout of packed weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import cases
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from googlenet_fused import GOOGLENET_SPECS, InceptionSpec
from googlenet_fused.packing import (
    BatchNormParams,
    ConvParams,
    PackedInception,
    fold_batch_norm,
    fold_batch_norm_backward,
    pack_inception,
    spec_of_weights,
)

KINDS = {"norm": (True, False), "bias": (False, True), "norm and bias": (True, True), "neither": (False, False)}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def conv_params(
    out_channels: int = 6,
    in_channels: int = 5,
    kernel_size: int = 3,
    *,
    norm: bool = True,
    bias: bool = False,
    dtype: torch.dtype = torch.float64,
    eps: float = 1e-3,
    seed: int = 0,
) -> ConvParams:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    params = None
    if norm:
        variance = (torch.rand(out_channels, generator=generator) * 2 + 1e-4).to(dtype)
        params = BatchNormParams(normal(out_channels), normal(out_channels), normal(out_channels), variance)
    weight = normal(out_channels, in_channels, kernel_size, kernel_size)
    return ConvParams(weight, normal(out_channels) if bias else None, params, eps if norm else 0.0)


def convs_of(spec: InceptionSpec, **arguments: object) -> list[ConvParams]:
    return [
        conv_params(conv.out_channels, conv.in_channels, conv.kernel_size, seed=i, **arguments)  # type: ignore[arg-type]
        for i, conv in enumerate(spec.convs)
    ]


def unfolded(x: Tensor, conv: ConvParams) -> Tensor:
    x = F.conv2d(x, conv.weight, conv.bias, padding=conv.weight.shape[2] // 2)
    if conv.norm is None:
        return x
    weight, bias, mean, variance = conv.norm
    return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=conv.eps)


# Folding.


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_folded_convolution_equals_convolution_and_norm(kind: str, kernel_size: int) -> None:
    norm, has_bias = KINDS[kind]
    conv = conv_params(kernel_size=kernel_size, norm=norm, bias=has_bias)
    x = torch.randn(2, 5, 7, 6, dtype=torch.float64)
    weight, bias = fold_batch_norm(conv, torch.float64)
    torch.testing.assert_close(F.conv2d(x, weight, bias, padding=kernel_size // 2), unfolded(x, conv), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-3, 1.0])
def test_eps_is_the_convs_own(eps: float) -> None:
    conv = conv_params(eps=eps)
    x = torch.randn(1, 5, 4, 4, dtype=torch.float64)
    weight, bias = fold_batch_norm(conv, torch.float64)
    torch.testing.assert_close(F.conv2d(x, weight, bias, padding=1), unfolded(x, conv), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_folding_rounds_once(dtype: torch.dtype, to: torch.dtype) -> None:
    conv = conv_params(norm=True, bias=True, dtype=dtype)
    assert conv.norm is not None
    in_fp64 = ConvParams(conv.weight.double(), conv.bias.double(), BatchNormParams(*(t.double() for t in conv.norm)), conv.eps)
    folded, exact = fold_batch_norm(conv, to), fold_batch_norm(in_fp64, torch.float64)
    for tensor, truth in zip(folded, exact, strict=True):
        assert tensor.dtype == to
        assert torch.equal(tensor, truth.to(to))


@pytest.mark.parametrize("to", DTYPES)
def test_without_a_norm_nothing_but_the_dtype_changes(to: torch.dtype) -> None:
    conv = conv_params(norm=False, bias=True, dtype=torch.float32)
    weight, bias = fold_batch_norm(conv, to)
    assert torch.equal(weight, conv.weight.to(to))
    assert torch.equal(bias, conv.bias.to(to))
    _, zeros = fold_batch_norm(conv._replace(bias=None), to)
    assert torch.equal(zeros, torch.zeros(6, dtype=to))


def test_folding_leaves_the_parameters_alone() -> None:
    conv = conv_params(norm=True, bias=True)
    assert conv.norm is not None
    tensors = [conv.weight, conv.bias, *conv.norm]
    before = [tensor.clone() for tensor in tensors]
    fold_batch_norm(conv, torch.float32)
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))


# Its gradient.


def leaves_of(conv: ConvParams) -> list[Tensor]:
    return [tensor for tensor in (conv.weight, conv.bias, *(conv.norm or ())[:2]) if tensor is not None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_fold_backward_is_autograds(kind: str, dtype: torch.dtype) -> None:
    norm, bias = KINDS[kind]
    conv = conv_params(norm=norm, bias=bias, dtype=dtype)
    leaves = leaves_of(conv)
    for leaf in leaves:
        leaf.requires_grad_()
    folded = fold_batch_norm(conv, dtype)
    cotangents = [torch.randn(tensor.shape).to(dtype) for tensor in folded]
    differentiable = [(tensor, grad) for tensor, grad in zip(folded, cotangents, strict=True) if tensor.requires_grad]
    expected = torch.autograd.grad([tensor for tensor, _ in differentiable], leaves, [grad for _, grad in differentiable])

    actual = fold_batch_norm_backward(conv, *cotangents)
    assert (actual.bias is None) == (conv.bias is None)
    assert (actual.norm is None) == (conv.norm is None)
    for gradient, leaf, autograds in zip(leaves_of(actual), leaves, expected, strict=True):
        assert gradient.dtype == leaf.dtype
        assert gradient.shape == leaf.shape
        tolerance = 1e-12 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(gradient, autograds, rtol=tolerance, atol=tolerance)
    if actual.norm is not None:
        assert actual.norm[2:] == (None, None)


@pytest.mark.parametrize("kind", KINDS)
def test_fold_backward_can_be_differentiated(kind: str) -> None:
    norm, bias = KINDS[kind]
    conv = conv_params(3, 2, norm=norm, bias=bias)
    cotangents = [tensor.clone().requires_grad_() for tensor in (conv.weight + 1, conv.weight.sum((1, 2, 3)))]
    leaves = [leaf.requires_grad_() for leaf in leaves_of(conv)]

    def backward(grad_weight: Tensor, grad_bias: Tensor, *_: Tensor) -> list[Tensor]:
        return leaves_of(fold_batch_norm_backward(conv, grad_weight, grad_bias))

    assert torch.autograd.gradcheck(backward, (*cotangents, *leaves))


# Packing.


@pytest.mark.parametrize("large_kernel", [3, 5])
@pytest.mark.parametrize("name", [*cases.ODD_SPECS, "4d"])
def test_packed_layout(name: str, large_kernel: int) -> None:
    spec = replace({**cases.ODD_SPECS, **GOOGLENET_SPECS}[name], large_kernel=large_kernel)
    convs = convs_of(spec, dtype=torch.float32)
    packed = pack_inception(convs, torch.float32)
    (w1, b1), (w3r, b3r), (w3, b3), (w5r, b5r), (w5, b5), (wp, bp) = (fold_batch_norm(conv, torch.float32) for conv in convs)
    ends = (spec.ch1x1, spec.ch1x1 + spec.ch3x3red)
    for found, parts in ((packed.shared_weight, (w1, w3r, w5r)), (packed.shared_bias, (b1, b3r, b5r))):
        for part, expected in zip(found.tensor_split(ends), parts, strict=True):
            assert torch.equal(part, expected)
    assert torch.equal(packed.ch3x3_weight, w3)
    assert torch.equal(packed.ch3x3_bias, b3)
    assert torch.equal(packed.ch5x5_weight, w5)
    assert torch.equal(packed.ch5x5_bias, b5)
    assert torch.equal(packed.pool_proj_weight, wp)
    assert torch.equal(packed.pool_proj_bias, bp)
    for weight in packed[::2]:
        assert weight.is_contiguous(memory_format=torch.channels_last)
    assert all(bias.is_contiguous() for bias in packed[1::2])
    assert packed.spec == spec


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_dtype(dtype: torch.dtype, kind: str) -> None:
    norm, bias = KINDS[kind]
    packed = pack_inception(convs_of(cases.TINY, norm=norm, bias=bias, dtype=torch.float32), dtype)
    assert {tensor.dtype for tensor in packed} == {dtype}
    assert packed.spec == cases.TINY


def test_packed_on_meta() -> None:
    convs = [
        ConvParams(conv.weight.to("meta"), None, BatchNormParams(*(tensor.to("meta") for tensor in conv.norm or ())), conv.eps)
        for conv in convs_of(cases.TINY)
    ]
    packed = pack_inception(convs, torch.bfloat16)
    assert all(tensor.is_meta for tensor in packed)
    assert packed.spec == cases.TINY


def packed_zeros(spec: InceptionSpec = cases.TINY) -> PackedInception:
    return pack_inception(convs_of(spec, norm=False, bias=True), torch.float32)


WRONG_SHAPES: dict[str, tuple[str, tuple[int, ...], str]] = {
    "5x5 bias": ("ch5x5_bias", (4,), "ch5x5_bias has shape 4, expected 3 for"),
    "merged bias": ("shared_bias", (8,), "shared_bias has shape 8, expected 9 for"),
    "merged weight": ("shared_weight", (9, 5, 3, 3), "shared_weight has shape 9, 5, 3, 3, expected 9, 5, 1, 1 for"),
    "3x3 as 5x5": ("ch3x3_weight", (6, 4, 5, 5), "ch3x3_weight has shape 6, 4, 5, 5, expected 6, 4, 3, 3 for"),
    "no square": ("ch5x5_weight", (3, 2, 5, 3), "ch5x5_weight has shape 3, 2, 5, 3, expected 3, 2, 5, 5 for"),
    "projection's input": ("pool_proj_weight", (5, 6, 1, 1), "pool_proj_weight has shape 5, 6, 1, 1, expected 5, 5, 1, 1 for"),
    "no first branch": ("shared_weight", (6, 5, 1, 1), "ch1x1 must be a positive integer, got 0"),
    "kernel of 4": ("ch5x5_weight", (3, 2, 4, 4), "large_kernel must be 3 or 5, got 4"),
    "flat weight": ("ch3x3_weight", (6, 4), "weights must be 4-D and biases 1-D"),
    "square bias": ("pool_proj_bias", (5, 1), "weights must be 4-D and biases 1-D"),
}


@pytest.mark.parametrize("wrong", WRONG_SHAPES)
def test_packed_shapes_that_do_not_fit(wrong: str) -> None:
    name, shape, message = WRONG_SHAPES[wrong]
    packed = packed_zeros()._replace(**{name: torch.zeros(shape)})
    for _ in range(2):
        with pytest.raises(ValueError, match=r"must be|has shape") as error:
            _ = packed.spec
        assert message in re.sub(r"torch\.Size|,?[\[\]()]", "", str(error.value))


@pytest.mark.parametrize(
    "way", [spec_of_weights, lambda weights: pack_inception([ConvParams(w) for w in weights], torch.float32)]
)
@pytest.mark.parametrize("index", range(6), ids=[conv.name for conv in cases.TINY.convs])
def test_weights_that_do_not_fit(index: int, way: Callable[[list[Tensor]], object]) -> None:
    weights = [conv.weight for conv in convs_of(cases.TINY)]
    shape = list(weights[index].shape)
    shape[1] += 1
    weights[index] = torch.zeros(shape)
    name = cases.TINY.convs[max(index, 1)].name  # the first weight sets the number of input channels
    with pytest.raises(ValueError, match=rf"^{name} weight has shape \[.*\], expected \[.*\] for InceptionSpec"):
        way(weights)


@pytest.mark.parametrize(
    "way", [spec_of_weights, lambda weights: pack_inception([ConvParams(w) for w in weights], torch.float32)]
)
def test_wrong_number_or_rank_of_weights(way: Callable[[list[Tensor]], object]) -> None:
    weights = [conv.weight for conv in convs_of(cases.TINY)]
    with pytest.raises(ValueError, match="expected six 4-D convolution weights"):
        way(weights[:5])
    with pytest.raises(ValueError, match="expected six 4-D convolution weights"):
        way([*weights[:5], weights[5][:, :, 0, 0]])


@pytest.mark.parametrize("large_kernel", [3, 5])
@pytest.mark.parametrize("name", GOOGLENET_SPECS)
def test_spec_of_weights(name: str, large_kernel: int) -> None:
    spec = replace(GOOGLENET_SPECS[name], large_kernel=large_kernel)
    weights = [torch.empty(c.out_channels, c.in_channels, c.kernel_size, c.kernel_size, device="meta") for c in spec.convs]
    assert spec_of_weights(weights) == spec

"""The operators as torch sees them: schema, fake kernels, strides, and the plain functions' results."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import (
    EPS,
    LAYOUTS,
    PARTS,
    TINY,
    as_convs,
    before_relu,
    both_kernels,
    image,
    inception_arguments,
    packed_inception,
    plain_result,
    stem_arguments,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from googlenet_fused import FusedInception, InceptionSpec, inception
from googlenet_fused.ops import conv2d_relu
from googlenet_fused.packing import BatchNormParams, ConvParams

ops = torch.ops.googlenet_fused
SPECS = both_kernels(TINY)
STEM = {"1x1": (1, 1, 0), "3x3": (3, 1, 1), "7x7 stride 2": (7, 2, 3)}


# What every operator must be to torch.


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice_of_wider"])
@pytest.mark.parametrize("spec", SPECS, ids=["3x3", "5x5"])
def test_opcheck_inception(spec: InceptionSpec, layout: str) -> None:
    x = LAYOUTS[layout](image(spec=spec)).requires_grad_()
    opcheck(ops.inception, (x, *inception_arguments(spec, requires_grad=True)))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("parts", PARTS)
def test_opcheck_inception_parts(parts: str, requires_grad: bool) -> None:
    norm, bias = PARTS[parts]
    x = image().requires_grad_(requires_grad)
    parameters = inception_arguments(norm=norm, bias=bias, requires_grad=requires_grad)
    for backend_and_cache in ((), ("reference", True)):
        opcheck(ops.inception, (x, *parameters, *backend_and_cache))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice_of_wider"])
@pytest.mark.parametrize("spec", SPECS, ids=["3x3", "5x5"])
def test_opcheck_inception_packed(spec: InceptionSpec, layout: str) -> None:
    opcheck(ops.inception_packed, (LAYOUTS[layout](image(spec=spec)), *packed_inception(spec)))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice_of_wider"])
@pytest.mark.parametrize("stem", STEM)
def test_opcheck_conv2d_relu(stem: str, layout: str, requires_grad: bool) -> None:
    x = LAYOUTS[layout](image()).requires_grad_(requires_grad)
    opcheck(ops.conv2d_relu, (x, *stem_arguments(*STEM[stem], requires_grad=requires_grad)))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("parts", PARTS)
def test_opcheck_conv2d_relu_parts(parts: str, requires_grad: bool) -> None:
    for backend_and_cache in ((), ("reference", True)):
        parameters = stem_arguments(parts=parts, requires_grad=requires_grad)
        opcheck(ops.conv2d_relu, (image().requires_grad_(requires_grad), *parameters, *backend_and_cache))


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("spec", SPECS, ids=["3x3", "5x5"])
def test_operator_and_face_are_the_plain_functions(spec: InceptionSpec, parts: str) -> None:
    norm, bias = PARTS[parts]
    convs = inception_arguments(spec, norm=norm, bias=bias, dtype=torch.float64)
    x = image(dtype=torch.float64, spec=spec)
    expected = plain_result(x, as_convs(*convs))
    torch.testing.assert_close(inception(x, as_convs(*convs)), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ops.inception(x, *convs), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("stem", STEM)
def test_stem_is_the_plain_functions(stem: str, parts: str) -> None:
    x = image().double()
    weight, bias, norm, *geometry = stem_arguments(*STEM[stem], parts=parts)
    parameters = (weight.double(), None if bias is None else bias.double(), [tensor.double() for tensor in norm], *geometry)
    conv = ConvParams(parameters[0], parameters[1], BatchNormParams(*parameters[2]) if norm else None, EPS)
    expected = before_relu(x, conv, *STEM[stem][1:]).relu()
    torch.testing.assert_close(ops.conv2d_relu(x, *parameters), expected, rtol=1e-12, atol=1e-12)
    for x_or_leaf in (x, x.clone().requires_grad_()):
        out = conv2d_relu(x_or_leaf, conv, stride=geometry[1], padding=geometry[2])
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_face_takes_the_first_fields_of_a_conv() -> None:
    weights, biases, _, _ = inception_arguments(norm=False, bias=True)
    convs = [ConvParams(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    assert torch.equal(inception(image(), list(zip(weights, biases, strict=True))), inception(image(), convs))


# Strides: what the fake kernel promises is what the real one returns.


def _inception_call(x: Tensor, on: Callable[[Tensor], Tensor], spec: InceptionSpec) -> Tensor:
    weights, biases, norms, eps = inception_arguments(spec)
    return ops.inception(x, [on(w) for w in weights], [on(b) for b in biases], [on(t) for t in norms], eps)


def _packed_call(x: Tensor, on: Callable[[Tensor], Tensor], spec: InceptionSpec) -> Tensor:
    return ops.inception_packed(x, *(on(tensor) for tensor in packed_inception(spec)))


def _face_call(x: Tensor, on: Callable[[Tensor], Tensor], spec: InceptionSpec) -> Tensor:
    weights, biases, norms, eps = inception_arguments(spec)
    return inception(x, as_convs([on(w) for w in weights], [on(b) for b in biases], [on(t) for t in norms], eps))


def _conv_call(x: Tensor, on: Callable[[Tensor], Tensor], spec: InceptionSpec) -> Tensor:
    weight, bias, norm, *rest = stem_arguments(3, 2, 1, parts="norm and bias")
    return ops.conv2d_relu(x, on(weight), on(bias), [on(tensor) for tensor in norm], *rest)


CALLS = {"inception": _inception_call, "inception_packed": _packed_call, "conv2d_relu": _conv_call, "face": _face_call}
SHAPES = [(2, 7, 6), (1, 5, 3), (1, 1, 1), (3, 1, 4), (0, 4, 3)]


def assert_same_frame(fake: Tensor, real: Tensor) -> None:
    assert fake.shape == real.shape
    assert fake.dtype == real.dtype
    assert fake.stride() == real.stride()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("call", CALLS)
def test_meta_strides_are_the_real_ones(call: str, layout: str, shape: tuple[int, int, int]) -> None:
    for spec in SPECS:
        x = LAYOUTS[layout](image(*shape, spec=spec))
        on_meta = torch.empty_strided(x.shape, x.stride(), device="meta")
        fake = CALLS[call](on_meta, lambda tensor: tensor.to("meta"), spec)
        assert fake.is_meta
        assert_same_frame(fake, CALLS[call](x, lambda tensor: tensor, spec))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("call", CALLS)
def test_fake_tensor_strides_are_the_real_ones(call: str, layout: str) -> None:
    x = LAYOUTS[layout](image())
    mode = FakeTensorMode()
    fake = CALLS[call](mode.from_tensor(x), mode.from_tensor, TINY)
    assert_same_frame(fake, CALLS[call](x, lambda tensor: tensor, TINY))
    assert fake.fake_mode is mode


def test_modules_made_and_called_in_a_fake_mode() -> None:
    with FakeTensorMode():
        module = FusedInception(*list(TINY)[:7]).eval()
        x = torch.empty(2, 5, 7, 6).contiguous(memory_format=torch.channels_last)
        out = module(x)
        with torch.no_grad():
            assert_same_frame(module(x), out)
    assert out.shape == (2, TINY.out_channels, 7, 6)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_follows_the_layout_of_the_input(layout: str) -> None:
    x = LAYOUTS[layout](image())
    channels_last = layout in ("channels_last", "slice_of_wider")
    expected = torch.channels_last if channels_last else torch.contiguous_format
    out = ops.inception(x, *inception_arguments())
    assert out.is_contiguous(memory_format=expected)
    assert torch.equal(out, ops.inception(x.clone(memory_format=expected), *inception_arguments()))


@pytest.mark.parametrize("call", CALLS)
def test_empty_batch(call: str) -> None:
    out = CALLS[call](image(batch=0), lambda tensor: tensor, TINY)
    channels, *size = (4, 4, 3) if call == "conv2d_relu" else (TINY.out_channels, 7, 6)
    assert list(out.shape) == [0, channels, *size]


def test_operators_leave_their_arguments_alone() -> None:
    x, parameters = image(), inception_arguments(bias=True)
    copies = x.clone(), [[tensor.clone() for tensor in group] for group in parameters[:3]]
    ops.inception(x, *parameters)
    inception(x, as_convs(*parameters))
    assert torch.equal(x, copies[0])
    for group, before in zip(parameters[:3], copies[1], strict=True):
        assert all(torch.equal(tensor, old) for tensor, old in zip(group, before, strict=True))

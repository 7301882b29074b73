"""Every backend on exact integers, in every layout, on poisoned memory and between guard bands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import (
    GOOGLENET_MODULES,
    LAYOUTS,
    ODD_SPECS,
    SENTINEL,
    SMALL_SIZES,
    TINY,
    assert_same,
    both_kernels,
    both_large_kernels,
    can_run,
    check_guards,
    every_backend_and_dtype,
    fused_inception,
    guarded_buffer,
    integer_convs,
    integer_input,
    plain_result,
    random_input,
)
from torch import Tensor

import googlenet_fused
from googlenet_fused import ops
from googlenet_fused.backends import registry
from googlenet_fused.packing import ConvParams, PackedInception, pack_inception
from googlenet_fused.spec import InceptionSpec

every_backend = pytest.mark.parametrize("backend", can_run(torch.float32, interpreted=True))
every_odd_spec = pytest.mark.parametrize(
    "spec",
    [pytest.param(spec, id=f"{name}-{spec.large_kernel}") for name, odd in ODD_SPECS.items() for spec in both_kernels(odd)],
)


def run_packed(backend: str, x: Tensor, packed: PackedInception, out: Tensor) -> None:
    """One small module through the backend itself."""
    chosen = registry.get(backend)
    chosen.inception(x, packed, chosen.prepare(packed, x.shape), out)


# Exact integers: the fp32 result must equal the fp64 one bit for bit.


@every_odd_spec
@every_backend
def test_exact_integers(backend: str, spec: InceptionSpec) -> None:
    convs = integer_convs(spec)
    for batch, height, width in SMALL_SIZES:
        x = integer_input(spec, batch, height, width)
        assert_same(googlenet_fused.inception(x, convs, backend=backend), plain_result(x, convs).float())


@both_large_kernels
@pytest.mark.parametrize("name", GOOGLENET_MODULES)
@every_backend
def test_exact_integers_on_the_nine_modules(backend: str, name: str, large_kernel: int) -> None:
    spec, side = GOOGLENET_MODULES[name]
    spec = replace(spec, large_kernel=large_kernel)
    convs, x = integer_convs(spec), integer_input(spec, 2 if side < 20 else 1, side, side)
    assert_same(googlenet_fused.inception(x, convs, backend=backend), plain_result(x, convs).float())


@every_odd_spec
@pytest.mark.parametrize("backend", can_run(torch.float64))
def test_exact_integers_in_fp64(backend: str, spec: InceptionSpec) -> None:
    convs = integer_convs(spec, torch.float64)
    x = integer_input(spec, 2, 5, 6, torch.float64)
    assert_same(googlenet_fused.inception(x, convs, backend=backend), plain_result(x, convs))


@pytest.mark.parametrize("name", ["3a", "4e", "5b"])
@both_large_kernels
@pytest.mark.parametrize("backend", can_run(torch.bfloat16))
def test_bf16_rounds_once(backend: str, large_kernel: int, name: str) -> None:
    """Integers up to 256 are exact in bf16, so with reduced channels below that the output is the exact sum rounded once."""
    spec = replace(GOOGLENET_MODULES[name][0], large_kernel=large_kernel)
    convs, x = integer_convs(spec, torch.bfloat16), integer_input(spec, 1, 7, 7, torch.bfloat16)
    for reduction in (convs[1], convs[3]):
        assert F.conv2d(x.double(), reduction.weight.double(), reduction.bias.double()).abs().max() <= 256  # type: ignore[union-attr]
    expected = plain_result(x, convs)
    assert (expected.bfloat16() != expected).any(), "nothing was rounded"
    assert_same(googlenet_fused.inception(x, convs, backend=backend), expected.bfloat16())


@pytest.mark.parametrize("backend", can_run(torch.float32))
def test_one_packing_serves_every_size(backend: str) -> None:
    """oneDNN lays weights out for the first input it sees."""
    spec = replace(GOOGLENET_MODULES["3a"][0], large_kernel=5)
    convs = integer_convs(spec)
    for batch, height, width in [(1, 28, 28), (8, 7, 7), (1, 1, 1), (3, 2, 30), (1, 28, 28)]:
        x = integer_input(spec, batch, height, width)
        assert_same(googlenet_fused.inception(x, convs, backend=backend), plain_result(x, convs).float())


@every_backend
def test_pool_pads_with_minus_infinity(backend: str) -> None:
    """On a negative constant a pool padded with zeros would differ at the border only."""
    spec = TINY
    convs = [ConvParams(-conv.weight.abs(), torch.zeros_like(conv.bias)) for conv in integer_convs(spec)]
    for value in (-3.0, -(2.0**60)):
        x = torch.full((1, spec.in_channels, 4, 5), value)
        expected = plain_result(x, convs)
        border = expected[:, spec.slices.pool_proj, 0, 0]
        assert (border > 0).any()
        assert_same(border, expected[:, spec.slices.pool_proj, 1, 1])
        assert_same(googlenet_fused.inception(x, convs, backend=backend), expected.float())


@every_backend
def test_negative_zero(backend: str) -> None:
    convs, x = integer_convs(TINY), integer_input(TINY, 2, 4, 5)
    signed = x.where(x != 0, -0.0)
    assert (signed.signbit() & (signed == 0)).any()
    assert_same(googlenet_fused.inception(signed, convs, backend=backend), plain_result(x, convs).float())

    without_bias = [ConvParams(conv.weight, torch.zeros_like(conv.bias)) for conv in convs]
    empty = torch.full_like(x, -0.0)
    assert_same(googlenet_fused.inception(empty, without_bias, backend=backend), torch.zeros(2, TINY.out_channels, 4, 5))


# Layouts, poison and guard bands.


EXPANDED: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded_batch": lambda x: x[:1].expand_as(x),
    "expanded_channels": lambda x: x[:, :1].expand_as(x),
    "expanded_pixels": lambda x: x[:, :, :1, :1].expand_as(x),
}
"""Strides of 0, which change the values too."""


@both_large_kernels
@pytest.mark.parametrize("layout", [*LAYOUTS, *EXPANDED])
@every_backend_and_dtype
def test_every_layout_of_input(backend: str, dtype: torch.dtype, layout: str, large_kernel: int) -> None:
    spec = replace(ODD_SPECS["primes"], large_kernel=large_kernel)
    convs = integer_convs(spec, dtype)
    for batch, height, width in [(2, 6, 5), (1, 7, 7), (3, 1, 4)]:
        x = ({**LAYOUTS, **EXPANDED})[layout](integer_input(spec, batch, height, width, dtype))
        before = x.clone()
        out = googlenet_fused.inception(x, convs, backend=backend)
        assert_same(out, plain_result(before, convs).to(dtype))
        assert_same(x, before)


@every_odd_spec
@pytest.mark.parametrize("channels_last", [False, True])
@every_backend_and_dtype
def test_every_output_element_is_written_and_nothing_else(
    backend: str, dtype: torch.dtype, channels_last: bool, spec: InceptionSpec
) -> None:
    packed = pack_inception(integer_convs(spec, dtype), dtype)
    for batch, height, width in SMALL_SIZES:
        x = integer_input(spec, batch, height, width, dtype)
        expected = plain_result(x, integer_convs(spec, dtype)).to(dtype)
        for layout in ("contiguous", "channels_last", "slice_of_wider"):
            out, buffer = guarded_buffer((batch, spec.out_channels, height, width), dtype, channels_last=channels_last)
            run_packed(backend, LAYOUTS[layout](x), packed, out)
            check_guards(out, buffer)
            assert_same(out, expected)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("stride", [1, 2])
@every_backend
def test_a_convolution_in_every_layout(backend: str, stride: int, padding: int) -> None:
    chosen, geometry = registry.get(backend), ((stride, stride), (padding, padding))
    weight, bias = torch.randint(-3, 4, (7, 3, 3, 3)).float(), torch.randint(-3, 4, (7,)).float()
    for layout in LAYOUTS.values():
        x = layout(torch.randint(-3, 4, (2, 3, 9, 6)).float())
        before = x.clone()
        expected = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding).relu().float()
        out = chosen.conv2d_relu(x, weight, bias, chosen.prepare_conv2d(weight, *geometry, x.shape), *geometry)
        assert_same(out, expected)
        assert out.stride() == torch.empty_like(expected, memory_format=torch.channels_last).stride()
        assert_same(x, before)


@every_backend
def test_what_a_backend_prepares_serves_inputs_of_every_shape(backend: str) -> None:
    spec = ODD_SPECS["primes"]
    chosen, convs = registry.get(backend), integer_convs(spec)
    packed = pack_inception(convs, torch.float32)
    prepared = chosen.prepare(packed, (2, spec.in_channels, 6, 5))
    for batch, height, width in SMALL_SIZES:
        x = integer_input(spec, batch, height, width)
        out, buffer = guarded_buffer((batch, spec.out_channels, height, width), torch.float32)
        chosen.inception(x, packed, prepared, out)
        check_guards(out, buffer)
        assert_same(out, plain_result(x, convs).float())


def test_guards_are_seen_when_they_are_written_over() -> None:
    out, buffer = guarded_buffer((1, 2, 3, 4), torch.float32)
    with pytest.raises(AssertionError, match="24 output elements were never written"):
        check_guards(out, buffer)
    out.zero_()
    check_guards(out, buffer)
    buffer[0, 0, 0, 0] = SENTINEL + 1
    with pytest.raises(AssertionError, match="outside the output"):
        check_guards(out, buffer)


@every_odd_spec
@every_backend
def test_memory_that_held_nan_before(backend: str, spec: InceptionSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    convs, x = integer_convs(spec), integer_input(spec, 2, 5, 6)
    expected = plain_result(x, convs).float()
    allocate, allocated = torch.empty, []

    def poisoned(*arguments: object, **options: object) -> Tensor:
        allocated.append(allocate(*arguments, **options).fill_(float("nan")))
        return allocated[-1]

    monkeypatch.setattr(ops.torch, "empty", poisoned)
    out = googlenet_fused.inception(x, convs, backend=backend)
    assert any(out.data_ptr() == buffer.data_ptr() for buffer in allocated), "the output was not poisoned"
    assert_same(out, expected)


@every_backend_and_dtype
def test_inputs_and_weights_are_not_modified(backend: str, dtype: torch.dtype) -> None:
    spec = ODD_SPECS["primes"]
    packed = pack_inception(integer_convs(spec, dtype), dtype)
    for make in LAYOUTS.values():
        x = make(integer_input(spec, 2, 5, 6, dtype))
        tensors = [x, *packed]
        before = [(tensor.clone(), tensor._version) for tensor in tensors]
        run_packed(backend, x, packed, torch.empty(2, spec.out_channels, 5, 6, dtype=dtype))
        for tensor, (value, version) in zip(tensors, before, strict=True):
            assert_same(tensor, value)
            assert tensor._version == version


@every_backend_and_dtype
def test_the_output_is_new_memory_in_every_call(backend: str, dtype: torch.dtype) -> None:
    spec = InceptionSpec(4, 1, 1, 1, 1, 1, 1)  # as many channels out as in
    convs = integer_convs(spec, dtype)
    for make in LAYOUTS.values():
        x = make(integer_input(spec, 2, 5, 6, dtype))
        first = googlenet_fused.inception(x, convs, backend=backend)
        second = googlenet_fused.inception(x, convs, backend=backend)
        storages = {tensor.untyped_storage().data_ptr() for tensor in (x, first, second, *(conv.weight for conv in convs))}
        assert len(storages) == 3 + len(convs)
        assert first._base is None
        first.fill_(float("nan"))
        assert_same(second, plain_result(x, convs).to(dtype))


@every_backend_and_dtype
def test_reruns_are_bit_equal(backend: str, dtype: torch.dtype) -> None:
    module, x = fused_inception(ODD_SPECS["wide"], backend=backend).to(dtype), random_input(ODD_SPECS["wide"], 3, 9, 8, dtype)
    with torch.no_grad():
        first = module(x)
        for _ in range(3):
            assert torch.equal(module(x), first)

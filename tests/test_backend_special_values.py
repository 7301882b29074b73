"""NaN and infinity in inputs and parameters: every backend has them where torch's own convolutions have."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import pytest
import torch
from cases import (
    CONV_BLOCKS,
    LAYOUTS,
    ODD_SPECS,
    backends_and_dtypes,
    both_large_kernels,
    every_backend_and_dtype,
    fused_inception,
    plain_inception,
    random_input,
)
from torch import Tensor, nn

from googlenet_fused import FusedInception
from googlenet_fused.blocks import Norm
from googlenet_fused.spec import InceptionSpec

NAN, INF = float("nan"), float("inf")

POSITIONS = [(0, 0, 0, 0), (0, 5, 4, 3), (1, 12, 8, 6), (0, 3, 0, 6), (1, 7, 4, 0)]
"""In an input [2, 13, 9, 7]: corners, edges, the middle; first, last and middle channels."""


def torch_results(plain: nn.Module, x: Tensor) -> list[Tensor]:
    """The plain module's results in the kernels that torch may choose: by layout, by batch, and in fp64."""
    twice = torch.cat([x, x])
    results = [plain(layout(x)) for layout in (LAYOUTS["contiguous"], LAYOUTS["channels_last"])]
    results += [plain(layout(twice))[: len(x)] for layout in (LAYOUTS["contiguous"], LAYOUTS["channels_last"])]
    results.append(copy.deepcopy(plain).double()(x.double()))
    return results


def kinds(result: Tensor) -> Tensor:
    """0 where finite, 1 at NaN, 2 at infinity, 3 at minus infinity."""
    kind = result.isnan().to(torch.uint8)
    kind[result == INF] = 2
    kind[result == -INF] = 3
    return kind


def assert_placed_as_torch_does(actual: Tensor, expected: Sequence[Tensor], label: object, *, must_reach: bool = True) -> None:
    """NaN and infinity stand where torch has them.

    Torch's own kernels differ at the borders, where zero padding is multiplied with NaN or infinity or skipped, and where
    oneDNN pads an odd number of bf16 channels with the next pixel's. There a finite result is wrong only if none of torch's is.
    """
    all_kinds = torch.stack([kinds(result) for result in expected])
    agreed = (all_kinds == all_kinds[0]).all(0)
    if must_reach:
        assert (all_kinds[0][agreed] != 0).any(), f"{label}: torch's results agree on no NaN or infinity"
    assert torch.equal(kinds(actual)[agreed], all_kinds[0][agreed]), label
    always_special = (all_kinds != 0).all(0)
    assert not (always_special & actual.isfinite()).any(), label


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@both_large_kernels
@every_backend_and_dtype
def test_nan_and_infinity_in_the_input(backend: str, dtype: torch.dtype, large_kernel: int, value: float) -> None:
    spec = replace(ODD_SPECS["primes"], large_kernel=large_kernel)
    plain = plain_inception(spec).to(dtype)
    fused = FusedInception.from_module(plain, backend=backend)
    for position, layout in product(POSITIONS, ("contiguous", "channels_last")):
        x = random_input(spec, 2, 9, 7, dtype)
        x[position] = value
        with torch.no_grad():
            assert_placed_as_torch_does(fused(LAYOUTS[layout](x)), torch_results(plain, x), (position, layout))


@every_backend_and_dtype
def test_nan_reaches_its_neighbourhood_and_no_further(backend: str, dtype: torch.dtype) -> None:
    """One NaN pixel: alone in the 1x1 branch, 3x3 in the second and pooled ones, 5x5 in the third.

    oneDNN spreads NaN a pixel further, in torch's convolutions too, of bf16 channels whose number is odd, or with AMX no
    multiple of 16: there the widths are such multiples.
    """
    spec = InceptionSpec(16, 8, 12, 18, 4, 6, 10, large_kernel=5)
    if dtype == torch.bfloat16 and backend in ("cpu", "reference") and torch.cpu._is_amx_tile_supported():
        spec = InceptionSpec(16, 16, 16, 32, 16, 16, 16, large_kernel=5)
    x = random_input(spec, 2, 9, 7, dtype)
    x[1, 4, 4, 3] = NAN
    with torch.no_grad():
        nan = fused_inception(spec, backend=backend).to(dtype)(x).isnan()
    assert not nan[0].any()
    for channels, reach in zip(spec.slices, (0, 1, 2, 1), strict=True):
        expected = torch.zeros(9, 7, dtype=torch.bool)
        expected[4 - reach : 5 + reach, 3 - reach : 4 + reach] = True
        assert torch.equal(nan[1, channels], expected.expand(nan[1, channels].shape))


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@both_large_kernels
@every_backend_and_dtype
def test_nan_and_infinity_in_convolution_weights(backend: str, dtype: torch.dtype, large_kernel: int, value: float) -> None:
    check_special_value(backend, dtype, "batch", large_kernel, ["conv.weight"], value)


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@every_backend_and_dtype
def test_nan_and_infinity_in_biases(backend: str, dtype: torch.dtype, value: float) -> None:
    check_special_value(backend, dtype, None, 5, ["conv.weight", "conv.bias"], value)


@backends_and_dtypes(interpreted=False)
def test_nan_in_batch_norm(backend: str, dtype: torch.dtype) -> None:
    """NaN only: folded, an infinite statistic meets other numbers than in the plain order of computation."""
    check_special_value(backend, dtype, "batch", 3, ["bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"], NAN)


def check_special_value(
    backend: str, dtype: torch.dtype, norm: Norm, large_kernel: int, names: Sequence[str], value: float
) -> None:
    """Put ``value`` at the first, middle and last place of each named tensor of each convolution, one after the other."""
    spec = replace(ODD_SPECS["primes"], large_kernel=large_kernel)
    plain = plain_inception(spec, norm).to(dtype)
    fused = FusedInception.from_module(plain, backend=backend)
    state = plain.state_dict()
    x = random_input(spec, 2, 5, 6, dtype)
    for conv, name in product(CONV_BLOCKS, names):
        flat = state[f"{conv}.{name}"].view(-1)
        for index in {0, len(flat) // 2, len(flat) - 1}:
            kept = flat[index].item()
            with torch.no_grad():
                flat[index] = value
                # ReLU turns a bias of minus infinity into zeros.
                must_reach = (name, value) != ("conv.bias", -INF)
                assert_placed_as_torch_does(fused(x), torch_results(plain, x), (conv, name, index), must_reach=must_reach)
                flat[index] = kept

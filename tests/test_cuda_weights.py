"""The weights as the CUDA kernel reads them, against a slow, plain unpacking."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import GOOGLENET_MODULES, ODD_SPECS, as_convs, both_large_kernels, inception_arguments
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from googlenet_fused.backends.cuda import weights as layout
from googlenet_fused.backends.cuda.simulation import problem_of
from googlenet_fused.backends.cuda.weights import pack, round_to_tf32
from googlenet_fused.packing import PackedInception, pack_inception
from googlenet_fused.spec import InceptionSpec

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SPECS = {**ODD_SPECS, "3a": GOOGLENET_MODULES["3a"][0], "4b": GOOGLENET_MODULES["4b"][0]}


def test_sizes_are_those_of_the_kernel() -> None:
    header = (Path(__file__).parents[1] / "csrc" / "inception" / "params.h").read_text()
    for name in ("UnitBytes", "StepBytes", "StageBytes", "UnitColumns"):
        (value,) = re.findall(rf"constexpr int k{name} = (\d+);", header)
        assert getattr(layout, re.sub("(?<=[a-z])(?=[A-Z])", "_", name).upper()) == int(value)


def packed_weights(spec: InceptionSpec, dtype: torch.dtype) -> PackedInception:
    return pack_inception(as_convs(*inception_arguments(spec)), dtype)


def up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def unpacked(weights: Tensor, begin: int, columns: int, k: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """A product's matrix ``[columns, k]``, read unit by unit, and where the next one begins."""
    size = torch.empty((), dtype=dtype).element_size()
    stages = up(k * size, 64) // 64
    rows = weights[begin : begin + stages * columns * 64].view(stages, columns, 4, 16)
    matrix = torch.empty(columns, stages, 4, 16, dtype=torch.uint8)
    for column in range(columns):
        for unit in range(4):
            matrix[column, :, unit] = rows[:, column, unit ^ (column >> 1 & 3)]
    return matrix.reshape(columns, -1).view(dtype), begin + stages * columns * 64


@both_large_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_every_weight_lies_where_the_kernel_looks(name: str, dtype: torch.dtype, large_kernel: int) -> None:
    spec = replace(SPECS[name], large_kernel=large_kernel)
    packed = packed_weights(spec, dtype)
    weights, biases = pack(packed)
    step = 32 // dtype.itemsize
    expected = [round_to_tf32(one) if dtype == torch.float32 else one for one in packed[::2]]
    shared, ch3x3, ch5x5, pool_proj = expected

    ends = [up(spec.ch1x1, 8)]
    ends += [ends[0] + up(spec.ch3x3red, step)]
    ends += [ends[1] + up(spec.ch5x5red, step)]
    place = 0
    found, place = unpacked(weights, place, up(spec.pool_proj, 8), spec.in_channels, dtype)
    assert torch.equal(found[: spec.pool_proj, : spec.in_channels], pool_proj[:, :, 0, 0])
    assert found.count_nonzero() == pool_proj.count_nonzero()

    found, place = unpacked(weights, place, ends[2], spec.in_channels, dtype)
    for begin, columns in zip([0, *ends[:2]], spec.shared_slices, strict=True):
        part = shared[columns, :, 0, 0]
        assert torch.equal(found[begin : begin + len(part), : spec.in_channels], part)
    assert found.count_nonzero() == shared.count_nonzero()

    for weight in (ch3x3, ch5x5):
        out, channels, kernel, _ = weight.shape
        found, place = unpacked(weights, place, up(out, 8), kernel * kernel * up(channels, step), dtype)
        taps = found[:out, : kernel * kernel * up(channels, step)].view(out, kernel, kernel, -1)
        assert torch.equal(taps[..., :channels], weight.permute(0, 2, 3, 1))
        assert found.count_nonzero() == weight.count_nonzero()
    assert place == weights.numel()

    rows = [packed.pool_proj_bias, *(packed.shared_bias[columns] for columns in spec.shared_slices)]
    rows += [packed.ch3x3_bias, packed.ch5x5_bias]
    widths = [up(spec.pool_proj, 8), ends[0], ends[1] - ends[0], ends[2] - ends[1], up(spec.ch3x3, 8), up(spec.ch5x5, 8)]
    assert biases.dtype == torch.float32
    for row, part in zip(rows, biases.split(widths), strict=True):
        assert torch.equal(part[: len(row)], row.float())
        assert not part[len(row) :].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*ODD_SPECS, *GOOGLENET_MODULES])
def test_sizes_are_those_that_the_kernel_expects(name: str, dtype: torch.dtype) -> None:
    host_sim = pytest.importorskip("googlenet_fused.backends.cuda._host_sim", reason="the simulation is not built")
    spec = {**ODD_SPECS, **{key: value for key, (value, _) in GOOGLENET_MODULES.items()}}[name]
    weights, biases = pack(packed_weights(spec, dtype))
    assert (weights.numel(), biases.numel()) == host_sim.packed_sizes(problem_of(spec, dtype, 1, 7, 7))


def test_a_device_without_memory_gives_the_shapes() -> None:
    packed = packed_weights(ODD_SPECS["wide"], torch.float16)
    weights, biases = pack(packed)
    on_meta = pack(PackedInception(*(tensor.to("meta") for tensor in packed)))
    assert [tensor.shape for tensor in on_meta] == [weights.shape, biases.shape]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packing_takes_nothing_from_the_host(dtype: torch.dtype) -> None:
    """No tensor of another device, not even a number as one: a CUDA graph that is captured would not take it."""
    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            found = operator(*args, **(kwargs or {}))
            tensors += [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
            seen.extend((str(operator), tensor.device.type) for tensor in tensors)
            return found

    packed = PackedInception(*(tensor.to("meta") for tensor in packed_weights(ODD_SPECS["wide"], dtype)))
    with Watching():
        pack(packed)
    assert seen
    assert {name for name, device in seen if device != "meta"} == set()


def test_rounding_to_tf32() -> None:
    values = torch.tensor([1 + 2**-11, -1 - 2**-11, 1 + 2**-12, float("inf"), -float("inf"), float("nan"), 0.0, -0.0])
    expected = torch.tensor([1 + 2**-10, -1 - 2**-10, 1.0, float("inf"), -float("inf"), float("nan"), 0.0, -0.0])
    assert torch.equal(round_to_tf32(values).nan_to_num(7), expected.nan_to_num(7))
    assert round_to_tf32(values)[-1].signbit()


def test_a_nan_whose_upper_bits_are_infinitys_stays_nan_in_tf32() -> None:
    nan = torch.tensor([0x7F800001, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    assert nan.isnan().all()
    assert (round_to_tf32(nan).view(torch.int32) & -0x2000).view(torch.float32).isnan().all()

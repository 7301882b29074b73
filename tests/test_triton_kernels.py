"""The Triton kernels, interpreted, in every form: exact on integers, within their buffers, any layout, past 32-bit offsets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import (
    ALIGNED,
    LAYOUTS,
    ODD_SPECS,
    SENTINEL,
    TINY,
    assert_agrees,
    assert_same,
    check_guards,
    guarded_buffer,
    integer_convs,
    integer_input,
    plain_inception,
    plain_result,
    random_input,
)
from test_backend_special_values import NAN, assert_placed_as_torch_does, torch_results
from torch import Tensor

from googlenet_fused import FusedInception
from googlenet_fused.packing import ConvParams, PackedInception, pack_inception
from googlenet_fused.spec import GOOGLENET_SIDES, GOOGLENET_SPECS, InceptionSpec

pytest.importorskip("triton")

from triton.runtime.errors import InterpreterError

from googlenet_fused.backends.triton import backend as triton_backend
from googlenet_fused.backends.triton import launch
from googlenet_fused.backends.triton.plans import INTERPRETER, Config, Plan, configurations, use_plan

pytestmark = pytest.mark.skipif(not triton_backend.interpreting(), reason="Triton was not told to interpret")

SMALL = Config(16, 16, 16, 4, 1)
OBLONG = Config(32, 16, 64, 4, 1)

PLANS = {
    "merged": Plan("merged", SMALL, SMALL),
    "merged, descriptors": Plan("merged", OBLONG, OBLONG, pointwise_tma=True, spatial_tma=True),
    "fused": Plan("fused", SMALL, SMALL),
    "fused, oblong": Plan("fused", OBLONG, OBLONG),
}

every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
both_large_kernels = pytest.mark.parametrize("large_kernel", [3, 5])
SPECS = {"aligned": ALIGNED, "primes": ODD_SPECS["primes"], "tiny": TINY}


@contextmanager
def guarded_workspaces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workspaces are full of NaN and lie between sentinels, which are whole in the end."""
    whole: list[Tensor] = []

    def workspace(module: Any, rows: int, columns: int) -> Tensor:
        around = torch.full((rows * columns + 2 * 64,), SENTINEL, dtype=module.x.tensor.dtype)
        whole.append(around)
        return around[64:-64].fill_(NAN).view(rows, columns)

    with monkeypatch.context() as patch:
        patch.setattr(launch._Module, "workspace", workspace)
        yield
    assert whole, "no workspace was used"
    for around in whole:
        assert (around[:64] == SENTINEL).all(), "something before a workspace was written"
        assert (around[-64:] == SENTINEL).all(), "something after a workspace was written"


def between_nan(packed: PackedInception) -> PackedInception:
    """The same weights with NaN before and after each."""

    def moved(tensor: Tensor) -> Tensor:
        storage = torch.full((tensor.numel() + 2 * 64,), NAN, dtype=tensor.dtype)
        return storage.as_strided(tensor.shape, tensor.stride(), 64).copy_(tensor)

    return PackedInception(*map(moved, packed))


def run(x: Tensor, packed: PackedInception, out: Tensor, plan: Plan, processors: int = 1) -> None:
    """On a device of so many multiprocessors."""
    arithmetic = triton_backend.arithmetic_of(x.dtype, INTERPRETER)
    for each in launch.launches(x, packed.spec, launch.Weights.of(packed), out, plan, arithmetic, processors):
        each.run()


def assert_exact(
    x: Tensor,
    spec: InceptionSpec,
    plan: Plan,
    monkeypatch: pytest.MonkeyPatch,
    processors: int = 1,
    convs: Sequence[ConvParams] = (),
    channels_last: bool = True,
) -> None:
    """Small integers come out as they must, every element of the output is written and nothing else, nothing else is read."""
    convs = convs or integer_convs(spec, x.dtype)
    shape = (x.shape[0], spec.out_channels, x.shape[2], x.shape[3])
    out, buffer = guarded_buffer(shape, x.dtype, channels_last=channels_last)
    with guarded_workspaces(monkeypatch):
        run(x, between_nan(pack_inception(convs, x.dtype)), out, plan, processors)
    check_guards(out, buffer)
    assert_same(out, plain_result(x, convs).to(x.dtype))


@every_plan
@both_large_kernels
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("size", [(2, 7, 7), (1, 2, 19)], ids=str)
def test_exact(name: str, large_kernel: int, size: tuple[int, int, int], plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(SPECS[name], large_kernel=large_kernel)
    x = LAYOUTS["slice_of_wider" if name == "primes" else "channels_last"](integer_input(spec, *size))
    assert_exact(x, spec, plan, monkeypatch)


TILES = {
    (1, 17, 17): {1: (1, 9, 1), 3: (1, 9, 1), 132: (1, 9, 3)},
    (2, 20, 14): {1: (1, 10, 1), 3: (1, 10, 1), 132: (1, 10, 3)},
    (9, 5, 6): {1: (8, 5, 1), 3: (3, 5, 1), 132: (1, 5, 3)},
}
"""By batch, height and width, by multiprocessors: the images, rows and parts of the columns of a branch tile."""


@pytest.mark.parametrize(("size", "processors"), [(size, of) for size, tiles in TILES.items() for of in tiles], ids=str)
def test_exact_in_every_kind_of_branch_tile(
    size: tuple[int, int, int], processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of fewer rows than an image has, of several images, and more of them than programs."""
    spec, config = replace(TINY, ch3x3=40, ch5x5=33), Config(128, 16, 64, 4, 1)
    (batch, height, width), tile = size, TILES[size][processors]
    for kernel in (3, spec.large_kernel):
        shape = {"batch": batch, "height": height, "width": width, "kernel": kernel}
        assert launch.branch_tile(**shape, column_tiles=3, multiprocessors=processors)[:3] == tile
    x = LAYOUTS["channels_last"](integer_input(spec, *size))
    assert_exact(x, spec, Plan("fused", config, config), monkeypatch, processors)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", GOOGLENET_SPECS)
def test_modules_agree_in_the_fused_form(name: str, dtype: torch.dtype) -> None:
    """Those of the network, at their sizes; tests/test_parity.py has the merged form."""
    (config,), side = configurations(INTERPRETER)["branch"], GOOGLENET_SIDES[name]
    plain = plain_inception(GOOGLENET_SPECS[name], None).to(dtype)
    x = random_input(GOOGLENET_SPECS[name], 1, side, side, dtype).contiguous(memory_format=torch.channels_last)
    with use_plan(Plan("fused", config, config)):
        assert_agrees(FusedInception.from_module(plain, backend="triton"), plain, x)


@every_plan
def test_exact_in_half_precision(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few channels with few values: every one is an integer that float16 holds."""
    spec = InceptionSpec(8, 8, 8, 5, 8, 4, 3)
    x = LAYOUTS["channels_last"](integer_input(spec, 2, 5, 6, torch.float16).clamp(-1, 1))
    convs = [ConvParams(conv.weight.sign(), conv.bias) for conv in integer_convs(spec, x.dtype)]
    assert plain_result(x, convs).max() < 2048
    if plan.spatial_tma:
        weights = launch.Weights.of(pack_inception(convs, x.dtype))
        assert len(descriptors(launch.launches(x, spec, weights, plain_result(x, convs), plan, "fp16", 1))) == 6
    assert_exact(x, spec, plan, monkeypatch, convs=convs)


@every_plan
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the input; of the output channels_last, or contiguous as the input is."""
    x = LAYOUTS[layout](integer_input(TINY, 2, 5, 4))
    assert_exact(x, TINY, plan, monkeypatch, channels_last=layout != "contiguous")


@every_plan
def test_64_bit_indices(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INT32_LIMIT", 0)
    (first, *_) = launch.launches(*operands(TINY), PLANS["fused"], "fp32", 1)
    assert first.arguments["WIDE"]
    assert_exact(LAYOUTS["channels_last"](integer_input(TINY, 2, 6, 5)), TINY, plan, monkeypatch)


def operands(spec: InceptionSpec) -> tuple[Tensor, InceptionSpec, launch.Weights, Tensor]:
    x = integer_input(spec, 2, 6, 5)
    return x, spec, launch.Weights.of(pack_inception(integer_convs(spec), x.dtype)), torch.empty(2, spec.out_channels, 6, 5)


FAR = 2**31 + 24


def spread(tensor: Tensor, axis: int, distance: int) -> Tensor:
    """The same values, ``distance`` elements from one index of ``axis`` to the next; what lies between is never touched."""
    strides = list(torch.empty(tensor.shape, memory_format=torch.channels_last).stride())
    strides[axis] = distance
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    return torch.empty(length, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)


@pytest.fixture
def overflow_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sums and products of integers in an interpreted kernel."""
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=True))


FAR_AXES = {"images": (0, FAR), "channels": (1, FAR // 4), "rows": (2, FAR // 2)}
"""Which axis of input and output is spread, and how far."""

both_forms = pytest.mark.parametrize("form", ["merged", "fused"])


def run_far_apart(axis: str, form: str) -> tuple[Tensor, Tensor]:
    """The output and what it should be, for an input and an output of several GB, of which a few KB are used."""
    which, distance = FAR_AXES[axis]
    spec = InceptionSpec(5, 3, 4, 2, 2, 3, 2)
    x = integer_input(spec, 2, 3, 2, torch.float16)
    convs = integer_convs(spec, x.dtype)
    out = spread(torch.full((2, spec.out_channels, 3, 2), NAN, dtype=x.dtype), which, distance)
    run(spread(x, which, distance), pack_inception(convs, x.dtype), out, PLANS[form])
    return out, plain_result(x, convs).to(x.dtype)


@both_forms
@pytest.mark.parametrize("axis", FAR_AXES)
def test_offsets_past_32_bits(axis: str, form: str, overflow_is_an_error: None) -> None:
    assert_same(*run_far_apart(axis, form))


@both_forms
def test_offsets_that_overflow_are_noticed(form: str, overflow_is_an_error: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of channels; those of images and rows have 64 bits always."""
    monkeypatch.setattr(launch, "INT32_LIMIT", 2**62)
    with pytest.raises(InterpreterError, match="int32 overflow detected"):
        run_far_apart("channels", form)


@every_plan
@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")], ids=str)
def test_special_values(value: float, plan: Plan) -> None:
    plain = plain_inception(ALIGNED, None)
    fused = FusedInception.from_module(plain, backend="triton")
    for position in ((0, 0, 0, 0), (1, 23, 4, 5), (0, 9, 2, 3)):
        x = random_input(ALIGNED, 2, 5, 6)
        x[position] = value
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), use_plan(plan):
            assert_placed_as_torch_does(fused(x), torch_results(plain, x), position)


# What is launched.


def launched(
    plan: Plan, spec: InceptionSpec = ALIGNED, size: Sequence[int] = (2, 7, 7), processors: int = 1
) -> list[launch.Launch]:
    """Launches on tensors without memory."""
    n, h, w = size
    x, out = (
        torch.empty(n, channels, h, w, device="meta", dtype=torch.float16, memory_format=torch.channels_last)
        for channels in (spec.in_channels, spec.out_channels)
    )
    weights = launch.Weights.of(pack_inception(integer_convs(spec, torch.float16), torch.float16))
    return launch.launches(x, spec, weights, out, plan, "fp16", processors)


def test_every_kernels_name_has_the_packages() -> None:
    for plan in PLANS.values():
        for each in launched(plan):
            assert each.kernel.fn.__name__.startswith("googlenet_fused_"), "profilers and sanitizers filter by it"


def test_launches_of_the_forms() -> None:
    names = {name: [each.kernel.fn.__name__ for each in launched(plan)] for name, plan in PLANS.items()}
    assert names["merged"] == ["googlenet_fused_pointwise", "googlenet_fused_spatial"]
    assert names["fused"] == ["googlenet_fused_pointwise", "googlenet_fused_branch", "googlenet_fused_branch"]


def descriptors(launches: Sequence[launch.Launch]) -> list[str]:
    return [name for each in launches for name, value in each.arguments.items() if name.endswith("_desc") and value is not None]


def test_descriptors_where_tensors_permit_them() -> None:
    plan = PLANS["merged, descriptors"]
    every = ["x_desc", "shared_weight_desc", "reduced3_desc", "weight3_desc", "reduced5_desc", "weight5_desc"]
    assert descriptors(launched(plan)) == every
    assert descriptors(launched(plan, replace(ALIGNED, in_channels=20))) == every[2:]
    assert descriptors(launched(plan, replace(ALIGNED, ch3x3red=12))) == [*every[:2], *every[4:]]
    assert descriptors(launched(plan, replace(ALIGNED, ch5x5red=3))) == every[:4]
    assert descriptors(launched(PLANS["merged"])) == []


def test_no_copy_of_a_channels_last_input() -> None:
    x, *rest = operands(ALIGNED)
    x = x.contiguous(memory_format=torch.channels_last)
    for plan in PLANS.values():
        for each in launch.launches(x, *rest, plan, "fp32", 1):
            assert each.arguments.get("x", x).data_ptr() == x.data_ptr()


def test_no_descriptor_where_pixels_overlap() -> None:
    plan, spec = PLANS["merged, descriptors"], ALIGNED
    weights = launch.Weights.of(pack_inception(integer_convs(spec, torch.float16), torch.float16))
    out = torch.empty(2, spec.out_channels, 7, 7, device="meta")
    pixel = torch.empty(1, spec.in_channels, 1, 1, device="meta", dtype=torch.float16)
    x = torch.empty(2, spec.in_channels, 7, 7, device="meta", dtype=torch.float16, memory_format=torch.channels_last)
    for overlapping in (pixel.expand(2, -1, 7, 7), x.as_strided(x.shape, (49 * 8, 1, 7 * 8, 8))):
        assert launch.Image.of(overlapping).dense
        assert "x_desc" not in descriptors(launch.launches(overlapping, spec, weights, out, plan, "fp16", 1))
    assert "x_desc" in descriptors(launch.launches(x, spec, weights, out, plan, "fp16", 1))


@pytest.mark.parametrize(("warps", "registers"), [(4, 255), (8, 255), (16, 128)])
def test_a_block_asks_for_no_more_registers_than_it_may_have(warps: int, registers: int) -> None:
    config = replace(SMALL, warps=warps)
    for each in launched(Plan("merged", config, config)):
        assert each.options["maxnreg"] == registers


def test_a_persistent_grid_is_no_larger_than_the_device() -> None:
    large = (64, 28, 28)
    for plan in (PLANS["merged"], PLANS["fused"]):
        for each in launched(plan, size=large, processors=7)[1:]:
            assert each.programs == 7 * launch.RESIDENT
        for each in launched(plan, size=(1, 2, 2), processors=132)[1:]:
            tiles = each.arguments["tiles"] if plan.form == "fused" else each.arguments["tiles3"] + each.arguments["tiles5"]
            assert each.programs == tiles < 132


@pytest.mark.parametrize("batch", [1, 2, 7, 300])
@pytest.mark.parametrize("side", [(1, 1), (7, 7), (14, 14), (28, 28), (3, 400), (200, 1)], ids=str)
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("processors", [1, 132])
def test_branch_tiles_cover_the_problem(batch: int, side: tuple[int, int], kernel: int, processors: int) -> None:
    height, width = side
    for column_tiles in (1, 2, 3, 5):
        tile = launch.branch_tile(
            batch=batch, height=height, width=width, kernel=kernel, column_tiles=column_tiles, multiprocessors=processors
        )
        row_tiles, image_tiles = -(-height // tile.rows), -(-batch // tile.images)
        assert tile.tiles == row_tiles * image_tiles * tile.splits
        assert 1 <= tile.splits <= column_tiles
        assert tile.images == 1 or tile.rows == height, "several images only whole"
        each = -(-column_tiles // tile.splits)
        assert (tile.splits - 1) * each < column_tiles, "no split is empty"
        assert tile.images * tile.rows * width <= 2 * max(256, kernel * width)


def test_a_module_of_one_large_image_fits_32_bits_or_says_so() -> None:
    for size, wide in (((1, 1000, 1000), False), ((1, 50_000, 50_000), True), ((1, 2, 100_000_000), True)):
        for plan in (PLANS["merged"], PLANS["fused"]):
            assert {each.arguments["WIDE"] for each in launched(plan, size=size)} == {wide}


def test_programmatic_dependent_launch_is_asked_of_the_launcher() -> None:
    plan = replace(PLANS["merged"], pdl=True)
    assert all(each.options["launch_pdl"] and each.arguments["PDL"] for each in launched(plan))
    assert not any("launch_pdl" in each.options or each.arguments["PDL"] for each in launched(PLANS["merged"]))


def test_weights_are_views_of_what_is_packed() -> None:
    packed = pack_inception(integer_convs(TINY), torch.float32)
    weights = launch.Weights.of(packed)
    for name, matrix, tensor in zip(PackedInception._fields, weights, packed, strict=True):
        assert matrix.data_ptr() == tensor.data_ptr(), name
        assert matrix._base is not tensor, "it would keep the packed weights alive"
        assert matrix.is_contiguous()
    strided = PackedInception(*(tensor.repeat_interleave(2, 0)[::2].contiguous() for tensor in packed))
    for matrix, expected in zip(launch.Weights.of(strided), weights, strict=True):
        assert_same(matrix, expected)

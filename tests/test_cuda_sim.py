"""The CUDA kernel, simulated on a CPU: its own source, under every order of threads, and with faults put into it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import (
    GOOGLENET_MODULES,
    LAYOUTS,
    ODD_SPECS,
    assert_same,
    by_definition,
    check_guards,
    guarded_buffer,
    integer_convs,
    integer_input,
    plain_inception,
    plain_result,
    random_input,
    small_model,
)
from simulated_kernel import MODES, SHAPE, TILES
from torch import Tensor

import googlenet_fused
from benchmarks.audit.cuda import load_build
from benchmarks.audit.simulated import CASES, Case, conflicts, simulated
from googlenet_fused.backends import registry
from googlenet_fused.backends.cuda import tiles
from googlenet_fused.backends.cuda.simulation import simulate
from googlenet_fused.backends.cuda.tiles import Tile, readable, use_tile
from googlenet_fused.backends.cuda.weights import round_to_tf32
from googlenet_fused.packing import ConvParams, pack_inception
from googlenet_fused.spec import InceptionSpec
from googlenet_fused.tolerance import check_close, judge

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    (reason := registry.unavailable("cuda_sim")) is not None, reason=f"cuda_sim cannot run here: {reason}"
)

every_module = pytest.mark.parametrize("name", GOOGLENET_MODULES)


def run(x: Tensor, convs: list[ConvParams], tile: Tile | None = None, **modes: object) -> Tensor:
    with ExitStack() as stack:
        stack.enter_context(simulate(**modes))
        stack.enter_context(use_tile(tile))
        return googlenet_fused.inception(x, convs, backend="cuda_sim")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_order_of_threads_in_every_kind_of_tile(dtype: torch.dtype, tile: str, mode: str) -> None:
    spec = ODD_SPECS["wide"]
    convs, x = integer_convs(spec, dtype), integer_input(spec, *SHAPE, dtype)
    assert_same(run(x, convs, TILES[tile], **MODES[mode]), plain_result(x, convs).to(dtype))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["3a", "4b", "5b"])
def test_shuffled_threads_in_modules_of_googlenet(name: str, seed: int) -> None:
    spec, side = GOOGLENET_MODULES[name]
    convs, x = integer_convs(spec, torch.float16), integer_input(spec, 1, side, side, torch.float16)
    out = run(x, convs, order="shuffled", seed=seed, eager=seed % 2 == 1, multiprocessors=132)
    assert_same(out, plain_result(x, convs).half())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float16) for name in GOOGLENET_MODULES), *((name, torch.bfloat16) for name in ("3a", "4d", "5b"))],
)
def test_the_nine_modules_by_the_tolerance_law(name: str, dtype: torch.dtype) -> None:
    spec, side = GOOGLENET_MODULES[name]
    plain = plain_inception(spec, norm=None).to(dtype)
    fused = googlenet_fused.FusedInception.from_module(plain, backend="cuda_sim")
    comparison = judge(fused, plain, random_input(spec, 1, side, side, dtype).contiguous(memory_format=torch.channels_last))
    assert comparison.ok, comparison


@every_module
def test_the_nine_modules_in_tf32(name: str) -> None:
    """Judged beside fp32 with every factor rounded to TF32, which is what TF32 costs and what no CPU computes by itself."""
    spec, side = GOOGLENET_MODULES[name]
    plain = plain_inception(spec, norm=None)
    convs = [ConvParams(block.conv.weight.detach(), block.conv.bias.detach()) for block in convs_of(plain)]
    x = random_input(spec, 1, side, side)

    def rounded(x: Tensor, conv: ConvParams) -> Tensor:
        weight = round_to_tf32(conv.weight)
        return F.conv2d(round_to_tf32(x), weight, conv.bias, padding=weight.shape[2] // 2).relu()

    with torch.no_grad():
        check_close(run(x, convs), [by_definition(x, convs, rounded)], plain_result(x, convs))


def convs_of(plain: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in plain.modules() if hasattr(module, "conv")]


def test_tf32_is_told_from_fp32() -> None:
    spec, side = GOOGLENET_MODULES["5a"]
    plain = plain_inception(spec, norm=None)
    fused = googlenet_fused.FusedInception.from_module(plain, backend="cuda_sim")
    assert not judge(fused, plain, random_input(spec, 1, side, side)).ok


def test_fp32_without_tf32_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "arithmetic", lambda dtype: str(dtype).removeprefix("torch."))
    spec = ODD_SPECS["tiny"]
    with pytest.raises(googlenet_fused.BackendError, match="fp32_precision does not allow"):
        run(integer_input(spec, 1, 4, 4), integer_convs(spec))


@pytest.mark.parametrize("tile", [None, *TILES.values()], ids=str)
def test_a_network(tile: Tile | None) -> None:
    model = small_model(ODD_SPECS["primes"]).half()
    x = torch.randn(2, 3, 17, 13).half()
    fused = googlenet_fused.fuse(model, backend="cuda_sim")
    with use_tile(tile):
        comparison = judge(fused, model, x)
    assert comparison.ok, comparison


@pytest.mark.parametrize("batch", [1, 2, 7, 33])
def test_batches_of_several_images_a_tile(batch: int) -> None:
    spec = replace(ODD_SPECS["primes"], large_kernel=5)
    convs, x = integer_convs(spec, torch.float16), integer_input(spec, batch, 3, 4, torch.float16)
    for images in {1, 3, min(batch, 16)}:
        if images <= batch:
            assert_same(run(x, convs, Tile(images, 3, 4, 1, 2)), plain_result(x, convs).half())


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 300), (300, 1), (2, 257), (40, 40), (5, 65)])
def test_images_of_every_shape(height: int, width: int) -> None:
    spec = replace(ODD_SPECS["tiny"], large_kernel=5)
    convs, x = integer_convs(spec, torch.bfloat16), integer_input(spec, 2, height, width, torch.bfloat16)
    assert_same(run(x, convs), plain_result(x, convs).bfloat16())


@pytest.mark.parametrize("tile", TILES)
def test_nothing_outside_of_the_output_is_written(tile: str) -> None:
    spec = ODD_SPECS["wide"]
    packed = pack_inception(integer_convs(spec, torch.float16), torch.float16)
    chosen, x = registry.get("cuda_sim"), integer_input(spec, *SHAPE, torch.float16)
    for channels_last in (True, False):
        shape = (SHAPE[0], spec.out_channels, *SHAPE[1:])
        out, buffer = guarded_buffer(shape, torch.float16, channels_last=channels_last)
        with use_tile(TILES[tile]):
            chosen.inception(x, packed, chosen.prepare(packed, x.shape), out)
        check_guards(out, buffer)
        assert_same(out, plain_result(x, integer_convs(spec, torch.float16)).half())


FAR = 2**31 + 16


def spread(tensor: Tensor, axis: int) -> Tensor:
    """The same values, ``FAR`` elements from one index of ``axis`` to the next; what lies between is never touched."""
    _, c, h, w = tensor.shape
    strides = [8 * -(-c // 8) * h * w, 1, 8 * -(-c // 8) * w, 8 * -(-c // 8)]
    strides[axis] = FAR
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    return torch.empty(length, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)


@pytest.mark.parametrize("axis", [0, 2, 3], ids=["images", "rows", "pixels"])
def test_offsets_past_32_bits(axis: int) -> None:
    """Input and output of several GB, of which a few KB are used."""
    spec = InceptionSpec(8, 3, 4, 2, 2, 3, 2)
    convs, x = integer_convs(spec, torch.float16), integer_input(spec, 2, 2, 2, torch.float16)
    far = spread(x, axis)
    assert readable(far) is far
    out = spread(torch.full((2, spec.out_channels, 2, 2), float("nan"), dtype=x.dtype), axis)
    chosen, packed = registry.get("cuda_sim"), pack_inception(convs, x.dtype)
    chosen.inception(far, packed, chosen.prepare(packed, x.shape), out)
    assert_same(out, plain_result(x, convs).half())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_input_is_copied_only_if_it_must_be(layout: str) -> None:
    spec = InceptionSpec(16, 3, 4, 2, 2, 3, 2)
    x = LAYOUTS[layout](integer_input(spec, 2, 6, 5, torch.float16))
    assert (readable(x) is x) == (layout == "channels_last")
    assert_same(readable(x), x)
    wider = torch.randn(2, 48, 6, 5).half().contiguous(memory_format=torch.channels_last)
    assert readable(part := wider[:, 16:32]) is part
    assert readable(expanded := x[:1].contiguous(memory_format=torch.channels_last).expand(3, -1, -1, -1)) is expanded


@every_module
def test_the_main_loop_meets_no_bank_conflicts_and_global_accesses_are_whole_sectors(name: str) -> None:
    """With one image, whose channels are split, and with whole images a tile."""
    cases = (Case(name, "fp16", 132, 1), Case(name, "fp16", 1, 4))
    assert set(cases) <= set(CASES)
    for counters in simulated(cases):
        assert counters["products"] > 0
        assert list(conflicts(counters)) == []


# Faults put into the source are found.


class Mutant(NamedTuple):
    file: str
    text: str
    becomes: str


KERNEL = "inception/kernel.cuh"
MUTANTS = {
    "no barrier before a stage is read": Mutant(
        KERNEL, "    wait_for_stage(ring);\n    sync_block();\n", "    wait_for_stage(ring);\n"
    ),
    "no wait for a stage": Mutant(KERNEL, "    wait_for_stage(ring);\n    sync_block();\n", "    sync_block();\n"),
    "no barrier after pooling": Mutant(KERNEL, "memory + plan.pooled);\n      sync_block();\n", "memory + plan.pooled);\n"),
    "no barrier before the ring is filled anew": Mutant(
        KERNEL, "  sync_block();\n}\n\nDEVICE float relu", "}\n\nDEVICE float relu"
    ),
    "no wait for the odd last step": Mutant(KERNEL, "      copy_wait<0>();\n      sync_block();\n", ""),
    "a wait that leaves one stage too many": Mutant(KERNEL, "    copy_wait<1>();", "    copy_wait<2>();"),
    "a stage copied to the slot that is read": Mutant(KERNEL, "write = ring - 1;", "write = 0;"),
    "a halo too small by one": Mutant(KERNEL, "most(block.y - halo, 0)", "most(block.y - halo + 1, 0)"),
    "a halo too large by one": Mutant(
        KERNEL, "least(block.x + block.columns + halo,", "least(block.x + block.columns + halo + 1,"
    ),
    "a halo stored outside of its bottleneck": Mutant(
        KERNEL,
        "  if (pixel.y < -halo || pixel.y >= block.rows + halo || pixel.x < -halo || pixel.x >= block.columns + halo) return;",
        "",
    ),
    "a wrong output channel": Mutant(KERNEL, "p.out_offsets[product] + column,", "p.out_offsets[product] + column + 8,"),
    "a wrong channel of a bottleneck": Mutant(
        KERNEL, "const int channel = column - plan.shared_ends[branch];", "const int channel = column - plan.shared_ends[0];"
    ),
    "the branches' offsets exchanged": Mutant(
        "inception/fill_params.cpp", "spatial = problem.ch1x1 + problem.ch3x3;", "spatial = problem.ch1x1 + problem.ch5x5;"
    ),
    "no zeros around the third branch": Mutant(KERNEL, "      fill_with_zeros(plan.bottlenecks[1], memory);\n", ""),
    "a pool that reads above the image": Mutant(KERNEL, "if (region_y > 0)", "if (true)"),
    "a pool that leaves out the right neighbour": Mutant(
        KERNEL, "region_x + x + 1 < region.width ? column(x + 1) : here", "here"
    ),
    "pixels of a stage in another order": Mutant(
        KERNEL, "copy_async(rows + unit_in_stage(row, unit),", "copy_async(rows + unit_in_stage(row, unit ^ 1),"
    ),
    "a tap row too far": Mutant(
        KERNEL, "(bottleneck.row_pixels - bottleneck.kernel)", "(bottleneck.row_pixels - bottleneck.kernel + 1)"
    ),
    "padding channels not zeroed": Mutant(KERNEL, "  octet.keep(to.count);", "  "),
    "a ReLU that loses NaN": Mutant(KERNEL, "value <= 0.0f ? 0.0f : value", "value > 0.0f ? value : 0.0f"),
    "wide stores of few channels": Mutant(KERNEL, "if (wide && to.count == kUnitColumns) {", "if (wide) {"),
    "a pass that goes on into the next one's columns": Mutant(KERNEL, "if (column >= pass.end)", "if (false)"),
    "rows stored that are cut off": Mutant(
        KERNEL, "to.count > 0 && pixel.y >= 0 && pixel.x >= 0 && holds(block, pixel)", "true"
    ),
    "the order of pixels forgotten when stored": Mutant(
        KERNEL, "row = plan.order[pass.product == kSpatial5][row];", "row = row;"
    ),
    "a tile's images mistaken": Mutant(KERNEL, "p.batch - block.image;", "p.batch;"),
}


def caught(module: Path, *options: str, environment: dict[str, str] | None = None) -> str | None:
    """What running this build of the simulation finds wrong, or None."""
    command = [sys.executable, str(ROOT / "tests" / "simulated_kernel.py"), str(module), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    if done.returncode == 0:
        return None
    return done.stdout.strip() or done.stderr.strip() or f"exit status {done.returncode}"


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, to be changed and built again and again, its objects beside it."""
    folder = tmp_path_factory.mktemp("mutants")
    shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def build_changed(folder: Path) -> Path:
    build = load_build()
    return build.build_simulation(csrc=folder / "csrc", folder=folder / "build", defines=["HOST_SIM_ELEMENTS=1"], show=False)


@pytest.mark.extra
def test_a_copy_of_the_source_is_sound(changed: Path) -> None:
    assert caught(build_changed(changed)) is None


@pytest.mark.extra
@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_in_the_source_is_caught(name: str, changed: Path) -> None:
    mutant = MUTANTS[name]
    path = changed / "csrc" / mutant.file
    source = path.read_text()
    assert source.count(mutant.text) == 1, f"{mutant.file} holds {source.count(mutant.text)} of {mutant.text!r}"
    try:
        path.write_text(source.replace(mutant.text, mutant.becomes))
        found = caught(build_changed(changed))
    finally:
        path.write_text(source)
    assert found is not None, "nothing was found"


@pytest.mark.extra
def test_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    build = load_build()
    module = build.build_simulation(sanitized=True, show=False)
    environment = {**os.environ, **build.toolchain.sanitizer_environment()}
    assert caught(module, "--whole", environment=environment) is None

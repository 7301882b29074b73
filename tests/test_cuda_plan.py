"""How the CUDA kernel's planner cuts modules into blocks and passes: what the kernel relies on, whatever the module."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import astuple, fields
from typing import Any

import pytest
from cases import BATCHES, GOOGLENET_MODULES, ODD_SPECS, TINY, message_of

from googlenet_fused.spec import InceptionSpec

sim: Any = pytest.importorskip(
    "googlenet_fused.backends.cuda._host_sim", reason="the simulation is not built: `make native` builds it"
)

Plan = dict[str, Any]
Problem = dict[str, Any]
Device = dict[str, int]

ELEMENT_BYTES = {"fp16": 2, "bf16": 2, "tf32": 4}
DEVICES: dict[str, Device] = {
    "H100": {"multiprocessors": 132, "shared_memory": 227 * 1024},
    "A100": {"multiprocessors": 108, "shared_memory": 163 * 1024},
    "A10": {"multiprocessors": 84, "shared_memory": 99 * 1024},
}
H100 = DEVICES["H100"]

POOL_PROJ, SHARED, SPATIAL3, SPATIAL5 = range(4)
MOST_PIXELS, MOST_SPLITS, MOST_PASSES = 256, 16, 160
FRAGMENT_ROWS, WARP_COLUMNS, WARPS, STAGE_BYTES = 16, 32, 8, 64

MOST_CONFLICTS = 1.1
"""Wavefronts in which ldmatrix reads a tile's pixels, over the fewest."""

MOST_PADDING = {"3a": 1.25, "3b": 1.25, "4a": 1.35, "4b": 1.35, "4c": 1.25, "4d": 1.25, "4e": 1.25, "5a": 1.55, "5b": 1.5}
"""Products computed over those wanted, fp16 at batch 128 on an H100. At 7x7 the reductions are computed by four splits each."""


def problem(spec: InceptionSpec, batch: int, height: int, width: int, element: str = "fp16") -> Problem:
    widths = {one.name: getattr(spec, one.name) for one in fields(spec)}
    return {"element": element, "batch": batch, "height": height, "width": width, **widths}


def googlenet_problem(name: str, batch: int, element: str = "fp16") -> Problem:
    spec, side = GOOGLENET_MODULES[name]
    return problem(spec, batch, side, side, element)


def tile(images: int, rows: int, columns: int, splits: int = 1, stages: int = 2) -> dict[str, int]:
    return {"images": images, "rows": rows, "columns": columns, "splits": splits, "stages": stages}


def padded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def rows_of(one: Plan) -> int:
    return one["row_fragments"] * FRAGMENT_ROWS * one["warp_rows"]


def columns_of(one: Plan) -> int:
    return WARPS // one["warp_rows"] * WARP_COLUMNS


def pixels_of(plan: Plan) -> int:
    return plan["tile"]["images"] * plan["tile"]["rows"] * plan["tile"]["columns"]


def blocks_of(plan: Plan) -> int:
    return plan["image_tiles"] * plan["row_tiles"] * plan["column_tiles"] * plan["tile"]["splits"]


def passes_of(plan: Plan, split: int) -> list[Plan]:
    return plan["passes"][plan["pass_begin"][split] : plan["pass_begin"][split + 1]]


def region_rows(asked: Problem, plan: Plan, halo: int) -> int:
    """Pixels of a tile and ``halo`` around it, cut off at the image's borders, of the tile that has the most."""

    def longest(length: int, side: int) -> int:
        begins = range(0, side, length)
        few = [*begins[:4], *begins[-4:]]
        return max(min(begin + length + halo, side) - max(begin - halo, 0) for begin in few)

    cut = plan["tile"]
    return cut["images"] * longest(cut["rows"], asked["height"]) * longest(cut["columns"], asked["width"])


def check_tiles(asked: Problem, plan: Plan) -> None:
    cut = plan["tile"]
    assert pixels_of(plan) <= MOST_PIXELS
    assert cut["images"] == 1 or (cut["rows"], cut["columns"]) == (asked["height"], asked["width"])
    assert plan["image_tiles"] == -(-asked["batch"] // cut["images"])
    assert plan["row_tiles"] == -(-asked["height"] // cut["rows"])
    assert plan["column_tiles"] == -(-asked["width"] // cut["columns"])
    assert blocks_of(plan) < 2**31
    assert 1 <= cut["splits"] <= MOST_SPLITS
    assert 2 <= cut["stages"] <= 4
    assert plan["pass_begin"][0] == 0
    assert plan["pass_begin"][cut["splits"]] <= MOST_PASSES


def check_products(asked: Problem, plan: Plan) -> None:
    """Columns, steps and places in the packed weights and biases."""
    element_bytes = ELEMENT_BYTES[asked["element"]]
    step = 32 // element_bytes
    reduced = [padded(asked["ch3x3red"], step), padded(asked["ch5x5red"], step)]
    ch1x1, kernel = padded(asked["ch1x1"], 8), asked["large_kernel"]
    assert list(plan["shared_ends"]) == [ch1x1, ch1x1 + reduced[0], ch1x1 + sum(reduced)]
    input_steps = padded(-(-asked["in_channels"] // step), 2)
    columns = [padded(asked["pool_proj"], 8), ch1x1 + sum(reduced), padded(asked["ch3x3"], 8), padded(asked["ch5x5"], 8)]
    steps = [input_steps, input_steps, 9 * reduced[0] // step, kernel**2 * reduced[1] // step]
    weights = bias = 0
    for product, width, depth in zip(plan["products"], columns, steps, strict=True):
        assert product == {"weights": weights, "bias": bias, "columns": width, "steps": depth}
        weights += -(-depth // 2) * width * STAGE_BYTES
        bias += width
    assert tuple(sim.packed_sizes(asked)) == (weights, bias)
    for branch, (bottleneck, name) in enumerate(zip(plan["bottlenecks"], ("ch3x3red", "ch5x5red"), strict=True)):
        assert (bottleneck["channels"], bottleneck["padded_channels"]) == (asked[name], reduced[branch])
        assert bottleneck["kernel"] == (3, kernel)[branch]
        assert bottleneck["halo"] == bottleneck["kernel"] // 2
        assert bottleneck["pixel_bytes"] == reduced[branch] * element_bytes + 16


def check_covered(passes: list[Plan], rows: int) -> None:
    """These passes are one column's: one below another, from the first row to the last."""
    end = 0
    for one in sorted(passes, key=lambda one: one["row"]):
        assert one["row"] == end < rows
        end += rows_of(one)
    assert end >= rows


def check_passes(asked: Problem, plan: Plan) -> None:
    """Each output column is some split's, once; each reduced channel is computed once in the splits that need it."""
    owners: dict[tuple[int, int], list[int]] = defaultdict(list)
    ends = plan["shared_ends"]
    for split in range(plan["tile"]["splits"]):
        passes = passes_of(plan, split)
        order = [one["product"] for one in passes]
        assert passes, f"split {split} has nothing to do"
        assert order == sorted(order)
        columns: dict[tuple[int, int], list[Plan]] = defaultdict(list)
        for one in passes:
            assert one["row_fragments"] in (1, 2, 4, 7)
            assert one["warp_rows"] in (2, 4, 8)
            assert one["column"] % 8 == 0
            assert one["end"] % 8 == 0
            assert one["column"] < one["end"] <= plan["products"][one["product"]]["columns"]
            assert one["end"] - one["column"] <= columns_of(one)
            for column in range(one["column"], one["end"], 8):
                columns[one["product"], column].append(one)
        needed = [SPATIAL3 in order, SPATIAL5 in order]
        for column in range(ends[0], ends[2], 8):
            assert ((SHARED, column) in columns) == needed[column >= ends[1]]
        for (product, column), those in columns.items():
            rows = pixels_of(plan)
            if product == SHARED:
                halos = {one["halo"] for one in those}
                assert len(halos) == 1
                rows = region_rows(asked, plan, *halos)
            if product == SHARED and column >= ends[0]:
                assert halos.pop() >= plan["bottlenecks"][column >= ends[1]]["halo"]
            else:
                owners[product, column].append(split)
            check_covered(those, rows)
    widths = {POOL_PROJ: "pool_proj", SHARED: "ch1x1", SPATIAL3: "ch3x3", SPATIAL5: "ch5x5"}
    wanted = {(product, column) for product, name in widths.items() for column in range(0, asked[name], 8)}
    assert owners.keys() == wanted
    assert all(len(splits) == 1 for splits in owners.values())


def check_memory(asked: Problem, device: Device, plan: Plan) -> None:
    """The ring, then the bottlenecks; while pooling a ring of its own, then the pooled rows."""
    slots, pool_slots, pooled = [0], [0], pixels_of(plan)
    for one in plan["passes"]:
        if one["product"] == POOL_PROJ:
            pool_slots.append((columns_of(one) + region_rows(asked, plan, 1)) * STAGE_BYTES)
            pooled = max(pooled, one["row"] + rows_of(one))
        else:
            slots.append((columns_of(one) + (rows_of(one) if one["product"] == SHARED else 0)) * STAGE_BYTES)
    stages = plan["tile"]["stages"]
    assert plan["slot_bytes"] >= max(slots)
    assert plan["pool_slot_bytes"] >= max(pool_slots)
    end = stages * plan["slot_bytes"]
    cut = plan["tile"]
    for bottleneck in plan["bottlenecks"]:
        assert bottleneck["begin"] >= end
        assert bottleneck["begin"] % 128 == 0
        halo = bottleneck["halo"]
        borders = halo if plan["column_tiles"] == 1 else 2 * halo
        assert bottleneck["row_pixels"] >= cut["columns"] + borders
        assert bottleneck["row_pixels"] % 8 != 0
        assert bottleneck["image_pixels"] >= (cut["rows"] + halo) * bottleneck["row_pixels"]
        assert bottleneck["pixel_bytes"] // 16 % 2 == 1
        last = (cut["images"] - 1) * bottleneck["image_pixels"] + (cut["rows"] - 1 + 2 * halo) * bottleneck["row_pixels"]
        assert bottleneck["bytes"] >= (last + cut["columns"] + 2 * halo) * bottleneck["pixel_bytes"]
        end = bottleneck["begin"] + bottleneck["bytes"]
    assert plan["pooled"] >= stages * plan["pool_slot_bytes"]
    assert plan["pooled"] % 128 == 0
    assert device["shared_memory"] >= plan["shared_bytes"] >= max(end, plan["pooled"] + pooled * STAGE_BYTES)


def check_order(plan: Plan) -> float:
    """A permutation of the tile's pixels. Returns the wavefronts in which ldmatrix reads them, over the fewest."""
    pixels, cut = pixels_of(plan), plan["tile"]
    ratios = []
    for order, bottleneck in zip(plan["order"], plan["bottlenecks"], strict=True):
        assert sorted(order[:pixels]) == list(range(pixels))
        assert not any(order[pixels:])

        def place(pixel: int, bottleneck: Plan = bottleneck) -> int:
            line, x = divmod(pixel, cut["columns"])
            image, y = divmod(line, cut["rows"])
            return image * bottleneck["image_pixels"] + y * bottleneck["row_pixels"] + x

        read = [place(pixel) for pixel in order[:pixels]] + [0] * (-pixels % 8)  # rows past the last read the first pixel
        wavefronts = 0
        for begin in range(0, len(read), 8):
            banks = [one % 8 for one in set(read[begin : begin + 8])]
            wavefronts += max(banks.count(bank) for bank in banks)
        ratios.append(wavefronts / (len(read) // 8))
    return max(ratios)


def check_cost(asked: Problem, device: Device, plan: Plan) -> None:
    cost = plan["cost"]
    depth = 32 // ELEMENT_BYTES[asked["element"]]
    computed = sum(rows_of(one) * columns_of(one) * plan["products"][one["product"]]["steps"] for one in plan["passes"]) * depth
    spec = InceptionSpec(*(asked[one.name] for one in fields(InceptionSpec)))
    wanted = spec.macs(asked["height"], asked["width"], asked["batch"])
    tiles = blocks_of(plan) // plan["tile"]["splits"]
    assert cost["padding"] == pytest.approx(computed * tiles / wanted)
    assert cost["padding"] >= 1
    assert cost["waves"] == -(-blocks_of(plan) // device["multiprocessors"])
    assert cost["cycles"] > cost["waves"] * cost["block_cycles"]
    assert cost["block_cycles"] > max(cost["mma"], cost["shared"], cost["l2"])
    assert min(cost["mma"], cost["shared"], cost["l2"]) > 0


def check(asked: Problem, device: Device, plan: Plan) -> float:
    """Everything that the kernel relies on. Returns the bank conflicts of ``check_order``."""
    check_tiles(asked, plan)
    check_products(asked, plan)
    check_passes(asked, plan)
    check_memory(asked, device, plan)
    check_cost(asked, device, plan)
    return check_order(plan)


def refusal(asked: Problem, device: Device = H100, cut: dict[str, int] | None = None) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        sim.plan(asked, device, cut)
    return message_of(error)


def plan_or_refusal(asked: Problem, device: Device) -> Plan | str:
    try:
        return sim.plan(asked, device)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", GOOGLENET_MODULES)
def test_plans_of_googlenet(name: str, device: str) -> None:
    for element in ELEMENT_BYTES:
        for batch in (*BATCHES, 2):
            asked = googlenet_problem(name, batch, element)
            plan = sim.plan(asked, DEVICES[device])
            assert check(asked, DEVICES[device], plan) <= MOST_CONFLICTS, (batch, element, plan["tile"])


@pytest.mark.parametrize("large_kernel", [3, 5])
@pytest.mark.parametrize(
    ("height", "width"),
    [(1, 1), (1, 300), (300, 1), (5, 513), (64, 64), (224, 224), (2, 2), (3, 100)],
    ids=lambda side: str(side),
)
def test_odd_sizes_and_widths(height: int, width: int, large_kernel: int) -> None:
    specs = [InceptionSpec(*[size] * 7, large_kernel) for size in (1, 13, 33, 300)]
    specs += [InceptionSpec(*astuple(spec)[:7], large_kernel) for spec in ODD_SPECS.values()]
    for spec in specs:
        for batch in (1, 3, 1000):
            asked = problem(spec, batch, height, width)
            check(asked, H100, sim.plan(asked, H100))


def test_widths_of_a_thousand() -> None:
    asked = problem(InceptionSpec(*[1000] * 7), 2, 9, 9)
    check(asked, H100, sim.plan(asked, H100))


def random_questions(seed: int, count: int) -> Iterator[tuple[Problem, Device]]:
    """Problems and devices that no GPU may have."""
    draw = random.Random(seed)
    for _ in range(count):
        widths = [draw.choice([1, 3, 8, 13, 33, 64, draw.randint(1, 300)]) for _ in range(7)]
        sides = [draw.choice([1, 2, 5, 7, 14, 28, draw.randint(1, 600)]) for _ in range(2)]
        batch = draw.choice([1, 2, 7, 300, 10**6, 2**31 - 1])
        asked = problem(InceptionSpec(*widths, draw.choice([3, 5])), batch, *sides, draw.choice(list(ELEMENT_BYTES)))
        memory = draw.choice([227, 163, 99, 64, 48]) * 1024
        yield asked, {"multiprocessors": draw.choice([1, 20, 132, 148]), "shared_memory": memory}


def test_random_problems() -> None:
    refused: list[str] = []
    for asked, device in random_questions(seed=1, count=400):
        plan = plan_or_refusal(asked, device)
        if isinstance(plan, str):
            refused.append(plan)
        else:
            check(asked, device, plan)
    assert len(refused) < 150
    assert all("blocks or more, at most" in message or "bytes of shared memory" in message for message in refused)


def test_any_tile_that_is_weighed_can_be_forced() -> None:
    draw = random.Random(2)
    for asked, device in random_questions(seed=3, count=40):
        tiles = sim.tiles(asked, device)
        for cut in draw.sample(tiles, min(6, len(tiles))):
            plan = sim.plan(asked, device, cut)
            assert plan["tile"] == cut
            check(asked, device, plan)


def test_tiles_that_the_planner_would_not_choose() -> None:
    asked = problem(ODD_SPECS["primes"], 5, 7, 9, "tf32")
    for cut in (tile(4, 7, 9), tile(1, 2, 4, 2, 4), tile(1, 7, 1, 3, 3), tile(1, 1, 9), tile(1, 5, 5)):
        plan = sim.plan(asked, H100, cut)
        assert plan["tile"] == cut
        check(asked, H100, plan)


def assert_costs_least(asked: Problem, device: Device) -> None:
    best = sim.plan(asked, device)
    costs = {tuple(cut.values()): sim.plan(asked, device, cut)["cost"]["cycles"] for cut in sim.tiles(asked, device)}
    assert min(costs.values()) == best["cost"]["cycles"] == costs[tuple(best["tile"].values())]


@pytest.mark.parametrize(("name", "batch"), [("3a", 1), ("4a", 1), ("5b", 2), ("4e", 32), ("3b", 128)])
def test_the_plan_costs_least(name: str, batch: int) -> None:
    assert_costs_least(googlenet_problem(name, batch), H100)


def test_the_plan_of_a_random_problem_costs_least() -> None:
    for asked, device in random_questions(seed=5, count=60):
        if sim.tiles(asked, device):
            assert_costs_least(asked, device)


def test_the_same_question_has_the_same_answer() -> None:
    for asked, device in random_questions(seed=4, count=20):
        assert plan_or_refusal(dict(asked), dict(device)) == plan_or_refusal(asked, device)


@pytest.mark.parametrize("name", GOOGLENET_MODULES)
def test_little_is_computed_in_vain_at_large_batches(name: str) -> None:
    padding = sim.plan(googlenet_problem(name, 128), H100)["cost"]["padding"]
    assert 1 < padding <= MOST_PADDING[name]


@pytest.mark.parametrize("name", GOOGLENET_MODULES)
def test_one_image_is_spread_over_the_device(name: str) -> None:
    plan = sim.plan(googlenet_problem(name, 1), H100)
    assert plan["cost"]["waves"] == 1
    assert blocks_of(plan) >= H100["multiprocessors"] // 3


@pytest.mark.parametrize("name", GOOGLENET_MODULES)
def test_more_images_take_longer_but_less_each(name: str) -> None:
    cycles = [sim.plan(googlenet_problem(name, batch), H100)["cost"]["cycles"] for batch in BATCHES]
    each = [total / batch for total, batch in zip(cycles, BATCHES, strict=True)]
    assert cycles == sorted(cycles)
    assert each[:4] == sorted(each[:4], reverse=True)


def test_more_shared_memory_is_never_worse() -> None:
    asked = googlenet_problem("4e", 128)
    cycles = []
    for kilobytes in (64, 99, 163, 227):
        plan = sim.plan(asked, {"multiprocessors": 132, "shared_memory": kilobytes * 1024})
        cycles.append(plan["cost"]["cycles"])
    assert cycles == sorted(cycles, reverse=True)


def test_splits_without_a_branch_compute_nothing_for_it() -> None:
    plan = sim.plan(googlenet_problem("5b", 4), H100)
    reducing = [
        sum(one["end"] > plan["shared_ends"][0] for one in passes_of(plan, split) if one["product"] == SHARED)
        for split in range(plan["tile"]["splits"])
    ]
    assert 0 in reducing
    assert any(reducing)


def test_reductions_of_a_3x3_take_a_narrower_halo_where_that_is_cheaper() -> None:
    plan = sim.plan(googlenet_problem("3b", 8), H100, tile(1, 4, 28))
    halos = {(one["column"], one["end"], one["halo"]) for one in plan["passes"] if one["product"] == SHARED}
    assert halos == {(0, 128, 0), (128, 256, 1), (256, 288, 2)}


def test_planning_is_quick() -> None:
    def seconds(asked: Problem, cut: dict[str, int] | None = None) -> float:
        begin = time.perf_counter()
        sim.plan(asked, H100, cut)
        return time.perf_counter() - begin

    asked = googlenet_problem("4e", 1)
    assert min(seconds(asked) for _ in range(5)) < 0.04
    assert min(seconds(asked, tile(1, 14, 14)) for _ in range(5)) < 0.004


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"batch": 0}, "batch is 0, must be 1 to 2147483647"),
        ({"height": 0}, "height is 0, must be 1 to 1073741824"),
        ({"width": -1}, "width is -1, must be 1 to 1073741824"),
        ({"in_channels": 0}, "in_channels is 0, must be 1 to 16777216"),
        ({"ch1x1": 0}, "ch1x1 is 0, must be 1 to 16777216"),
        ({"ch3x3red": 2**24 + 1}, "ch3x3red is 16777217, must be 1 to 16777216"),
        ({"large_kernel": 7}, "large_kernel is 7, must be 3 or 5"),
        ({"ch3x3": 30000}, "the passes of these widths are at least 238, at most 160"),
        (
            {"ch3x3red": 20000},
            "the bottlenecks of a tile of 1x1 pixels need 361392 bytes of shared memory, of which a block may have 232448",
        ),
        (
            {"batch": 2**31 - 1, "height": 224, "width": 224},
            "2147483647 images of 224x224 pixels are 420906794812 blocks or more, at most 2147483647",
        ),
    ],
)
def test_problems_that_are_refused(changes: dict[str, int], expected: str) -> None:
    assert refusal({**problem(TINY, 2, 7, 6), **changes}) == expected


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        (tile(0, 14, 14), "a tile of 0 images, must be 1 to 256"),
        (tile(1, 15, 14), "a tile of 15 rows, must be 1 to the image's 14"),
        (tile(1, 14, 0), "a tile of 0 columns, must be 1 to the image's 14"),
        (tile(2, 7, 14), "a tile of 2 images of 7x14 pixels is not made of whole images of 14x14"),
        (tile(2, 14, 14), "a tile of 2 images of 14x14 pixels has 392 pixels, at most 256"),
        (tile(1, 14, 14, splits=17), "17 splits, must be 1 to 16"),
        (tile(1, 14, 14, splits=0), "0 splits, must be 1 to 16"),
        (tile(1, 14, 14, stages=1), "1 stages, must be 2 to 4"),
        (tile(1, 14, 14, stages=5), "5 stages, must be 2 to 4"),
    ],
)
def test_tiles_that_are_refused(cut: dict[str, int], expected: str) -> None:
    assert refusal(googlenet_problem("4a", 8), H100, cut) == expected


def test_splits_of_fewer_columns_than_there_are() -> None:
    assert refusal(problem(TINY, 2, 7, 6), H100, tile(1, 7, 6, splits=5)) == "5 splits of 4 groups of columns"


def test_what_does_not_fit_in_shared_memory() -> None:
    def with_memory(asked: Problem, kilobytes: int, cut: dict[str, int] | None = None) -> str:
        return refusal(asked, {"multiprocessors": 132, "shared_memory": kilobytes * 1024}, cut)

    wide = googlenet_problem("4e", 8)
    need = "the bottlenecks of a tile of 14x14 pixels need 105584 bytes of shared memory"
    beside = "and beside them 2 stages of 8192 or more, of which a block may have"
    assert with_memory(wide, 99, tile(1, 14, 14)) == f"{need}, of which a block may have 101376"
    assert with_memory(wide, 110, tile(1, 14, 14)) == f"{need}, {beside} 112640"
    assert with_memory(wide, 20) == f"{need.replace('14x14', '1x1').replace('105584', '5072')}, {beside} 20480"
    thin = problem(InceptionSpec(*[8] * 7), 8, 14, 14)
    assert with_memory(thin, 42, tile(1, 14, 14)) == (
        "pooling a tile of 14x14 pixels needs 2 stages of 14592 bytes of shared memory and 16384 more, "
        "of which a block may have 43008"
    )


def test_more_passes_than_a_plan_holds() -> None:
    asked = problem(InceptionSpec(64, 4000, 64, 4000, 64, 4000, 4000), 1, 28, 28)
    assert refusal(asked, H100, tile(1, 9, 28)) == "the passes of a tile of 9x28 pixels in 1 split are 254, at most 160"
    plan = sim.plan(asked, H100)
    assert len(plan["passes"]) > 120
    check(asked, H100, plan)


def test_more_blocks_than_a_grid_holds() -> None:
    asked = problem(TINY, 2**31 - 1, 7, 6)
    assert (
        refusal(asked, H100, tile(1, 7, 6, splits=2))
        == "tiles of 7x6 pixels in 2 splits are 4294967294 blocks, at most 2147483647"
    )
    check(asked, H100, sim.plan(asked, H100))


def test_description() -> None:
    asked = googlenet_problem("3b", 8, "bf16")
    plan = sim.plan(asked, H100)
    text = sim.describe(asked, H100)
    lines = text.splitlines()
    assert lines[0] == (
        "bf16, batch 8, 28x28, 256 channels to ch1x1 128, ch3x3red 128, ch3x3 192, ch5x5red 32, ch5x5 96 (5x5), pool_proj 64"
    )
    assert f"{blocks_of(plan)} blocks, 1 wave" in text
    assert f"shared memory: {plan['shared_bytes']} bytes" in lines
    head = next(i for i, line in enumerate(lines) if line.startswith("split"))
    table = lines[head + 1 : -1]
    assert len(table) == len(plan["passes"])
    names = ["pool_proj", "shared", "ch3x3", "ch5x5"]
    assert [line.split()[1] for line in table] == [names[one["product"]] for one in plan["passes"]]
    assert "products computed for each wanted" in lines[-1]
    assert all(len(line) <= 180 for line in lines)
    assert sim.describe(asked, H100, plan["tile"]) == text

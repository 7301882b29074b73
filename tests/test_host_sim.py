"""The simulation itself: its instructions against numpy and PTX's tables, and that it sees what it is there to see."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

_host_sim = pytest.importorskip("googlenet_fused.backends.cuda._host_sim", reason="the simulation is not built: make native")

K = {"fp16": 16, "bf16": 16, "tf32": 8}


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """Of numbers that bf16 holds exactly."""
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def bits(element: str, values: np.ndarray) -> np.ndarray:
    if element == "fp16":
        return values.astype(np.float16).view(np.uint16)
    return bf16_bits(values) if element == "bf16" else values.astype(np.float32)


@pytest.mark.parametrize("element", K)
def test_a_product_of_fragments(element: str) -> None:
    """Every place of a, b and the sums, through ldmatrix, mma and the sums' layout."""
    generator = np.random.default_rng(3)
    a, b = generator.integers(-9, 10, (16, K[element])), generator.integers(-9, 10, (K[element], 32))
    found = _host_sim.multiply_fragments(element, bits(element, a), np.ascontiguousarray(bits(element, b).T))
    assert np.array_equal(found, a @ b)


# The PTX manual's formulas for mma.m16n8k16 (halves) and m16n8k8 (TF32): where the i-th element of a lane's registers stands.


def place_in_a(element: str, lane: int, i: int) -> tuple[int, int]:
    group, member = lane >> 2, lane % 4
    if element == "tf32":
        return group if i in (0, 2) else group + 8, member if i < 2 else member + 4
    return group if i < 2 or 4 <= i < 6 else group + 8, member * 2 + (i & 1) + (8 if i >= 4 else 0)


def place_in_b(element: str, lane: int, i: int) -> tuple[int, int]:
    group, member = lane >> 2, lane % 4
    if element == "tf32":
        return member if i == 0 else member + 4, group
    return member * 2 + (i & 1) + (8 if i >= 2 else 0), group


def place_in_sums(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2) + (8 if i >= 2 else 0), (lane % 4) * 2 + (i & 1)


Place = Callable[[str, int, int], tuple[int, int]]


def registers(element: str, matrix: np.ndarray, place: Place, words: int) -> np.ndarray:
    """[32, words] of a warp that holds the matrix."""
    count = words if element == "tf32" else 2 * words
    lanes = [[matrix[place(element, lane, i)] for i in range(count)] for lane in range(32)]
    return np.array(lanes, matrix.dtype).view(np.uint32)


@pytest.mark.parametrize("element", K)
def test_mma_has_the_manuals_registers(element: str) -> None:
    """Apart from ldmatrix: in a product through both, one wrong permutation of K could make up for another."""
    generator = np.random.default_rng(4)
    a, b = generator.integers(-9, 10, (16, K[element])), generator.integers(-9, 10, (K[element], 32))
    b_words = [registers(element, bits(element, b[:, begin : begin + 8]), place_in_b, 2) for begin in range(0, 32, 8)]
    a_words = registers(element, bits(element, a), place_in_a, 4)
    found = _host_sim.multiply_words(element, a_words.ravel().tolist(), np.hstack(b_words).ravel().tolist())
    sums, expected = np.array(found).reshape(32, 4, 4), a @ b
    for lane in range(32):
        for i in range(4):
            row, column = place_in_sums(lane, i)
            assert np.array_equal(sums[lane, :, i], expected[row, column::8]), (lane, i)


def test_ldmatrix_gives_each_row_to_four_lanes() -> None:
    rows = np.arange(128, dtype=np.uint32).reshape(32, 4)
    found = np.array(_host_sim.load_matrices(rows.ravel().tolist())).reshape(32, 4)
    for lane in range(32):
        for matrix in range(4):
            assert found[lane, matrix] == rows[matrix * 8 + lane // 4, lane % 4]


@pytest.mark.parametrize("element", K)
def test_nan_infinity_and_subnormal_factors(element: str) -> None:
    tiny = {"fp16": 2.0**-24, "bf16": 2.0**-133, "tf32": 2.0**-136}[element]
    a, b = np.zeros((16, K[element])), np.zeros((K[element], 32))
    a[0, 0], a[1, 1], a[2, 2] = np.nan, np.inf, tiny
    b[:3] = np.array([[1], [-2], [1024]])
    b[1, 3] = 0
    found = _host_sim.multiply_fragments(element, bits(element, a), np.ascontiguousarray(bits(element, b).T))
    assert np.isnan(found[0]).all()
    assert np.isnan(found[1, 3])
    assert (np.delete(found[1], 3) == -np.inf).all()
    assert (found[2] == np.float32(tiny * 1024)).all()
    assert not found[3:].any()


@pytest.mark.parametrize("element", K)
def test_each_factor_reaches_its_place(element: str) -> None:
    for row, k, column in [(0, 0, 0), (15, K[element] - 1, 31), (3, 5, 17), (9, 2, 8)]:
        a, b = np.zeros((16, K[element])), np.zeros((K[element], 32))
        a[row, k], b[k, column] = 2, 3
        found = _host_sim.multiply_fragments(element, bits(element, a), np.ascontiguousarray(bits(element, b).T))
        expected = np.zeros((16, 32))
        expected[row, column] = 6
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("operand", [0, 1])
def test_tf32_factors_are_cut_to_19_bits(operand: int) -> None:
    factors = np.zeros((16, 8), np.float32), np.zeros((32, 8), np.float32)
    factors[0][0, 0] = factors[1][0, 0] = 1
    factors[operand][0, 0] = 1 + 2**-10 + 2**-11 + 2**-23  # more than half of the last bit, but nothing is rounded
    assert _host_sim.multiply_fragments("tf32", *factors)[0, 0] == 1 + 2**-10


@pytest.mark.parametrize("element", ["fp16", "bf16"])
def test_pairs_are_rounded_to_the_nearest_even(element: str) -> None:
    random = np.random.default_rng(0).integers(0, 2**32, 2000, dtype=np.uint32)
    # Ties, too, of which random numbers have few, and what overflows.
    numbers = np.concatenate([random, random & 0xFFFF8000, random & 0xFFFFF000, [0x7F7FFFFF, 0x477FF000, 0x477FEFFF]])
    numbers = numbers.astype(np.uint32).view(np.float32)
    numbers = numbers[~np.isnan(numbers)]
    dtype = torch.float16 if element == "fp16" else torch.bfloat16
    expected = torch.from_numpy(numbers).to(dtype).view(torch.uint16).numpy().astype(np.uint32)
    found = [_host_sim.pack_pair(element, low, high) for low, high in zip(numbers, numbers[::-1], strict=True)]
    assert np.array_equal(np.array(found, np.uint32), expected | expected[::-1] << 16)


@pytest.mark.parametrize("element", ["fp16", "bf16"])
def test_packed_nan_is_the_one_that_a_gpu_makes(element: str) -> None:
    assert _host_sim.pack_pair(element, -np.nan, 1.0) & 0xFFFF == 0x7FFF


@pytest.mark.parametrize(("element", "minus"), [("fp16", 0x8000), ("bf16", 0x8000), ("tf32", 0x80000000)])
def test_zero_is_larger_than_minus_zero(element: str, minus: int) -> None:
    larger = _host_sim.larger
    assert [larger(element, 0, minus), larger(element, minus, 0), larger(element, minus, minus)] == [0, 0, minus]


def test_words_are_transposed_among_four_lanes() -> None:
    words = np.arange(128, dtype=np.uint32)
    found = np.array(_host_sim.transpose_words(words.tolist())).reshape(8, 4, 4)
    assert np.array_equal(found, words.reshape(8, 4, 4).transpose(0, 2, 1))


@pytest.mark.parametrize(
    ("number", "rounded"),
    [
        (1.0, 1.0),
        (1 + 2**-11, 1 + 2**-10),  # a tie, away from zero
        (-1 - 2**-11, -1 - 2**-10),
        (1 + 2**-12, 1.0),
        (1 + 2**-11 + 2**-20, 1 + 2**-10),
        (np.inf, np.inf),
        (-np.inf, -np.inf),
        (0.0, 0.0),
    ],
)
def test_rounding_to_tf32(number: float, rounded: float) -> None:
    found = np.uint32(_host_sim.round_to_tf32(int(np.float32(number).view(np.uint32)))).view(np.float32)
    assert found == np.float32(rounded)


def test_nan_stays_nan_in_tf32() -> None:
    assert np.isnan(np.uint32(_host_sim.round_to_tf32(0x7F800001)).view(np.float32))


@pytest.mark.parametrize("element", K)
def test_the_larger_of_two_is_nan_if_one_is(element: str) -> None:
    def word(low: float, high: float) -> int:
        if element == "tf32":
            return int(np.float32(low).view(np.uint32))
        pair = bits(element, np.array([low, high]))
        return int(pair[0]) | int(pair[1]) << 16

    assert _host_sim.larger(element, word(1, -2), word(-3, 4)) == word(1, 4)
    assert _host_sim.larger(element, word(-np.inf, 5), word(-7, 5)) == word(-7, 5)
    nan = int(bits(element, np.array([np.nan]))[0]) if element != "tf32" else 0x7FC00000
    for one, other in ((nan, word(1, 0)), (word(1, 0), nan)):
        found = _host_sim.larger(element, one, other)
        number = np.uint32(found << 16 if element == "bf16" else found).view(np.float32)
        if element == "fp16":
            number = np.uint16(found & 0xFFFF).view(np.float16)
        assert np.isnan(number)


@pytest.mark.parametrize(("pitch", "conflicts"), [(16, 1), (32, 2), (48, 1), (64, 4), (80, 1), (128, 8), (144, 1), (208, 1)])
def test_bank_conflicts_are_counted(pitch: int, conflicts: int) -> None:
    counters = _host_sim.touch_rows(pitch)
    for kind in ("ldmatrix_a", "shared_loads", "shared_stores", "copy_writes"):
        assert counters[kind] == (4 * conflicts, 4), kind
    assert counters["ldmatrix_b"] == (4, 4)  # one row for all lanes


@pytest.mark.parametrize(("pitch", "sectors"), [(16, 16), (32, 32), (48, 32), (128, 32)])
def test_sectors_are_counted(pitch: int, sectors: int) -> None:
    counters = _host_sim.touch_rows(pitch)
    assert counters["global_reads"] == (sectors, 16)
    assert counters["global_writes"] == (16, 16)


def test_what_is_counted_always() -> None:
    counters = _host_sim.touch_rows(16)
    assert (counters["products"], counters["barriers"], counters["copied_bytes"]) == (4, 2, 512)


def test_orders_of_threads() -> None:
    def turns(order: str, seed: int = 0) -> tuple[list[int], list[int]]:
        found: list[int] = _host_sim.turns(order=order, seed=seed)
        return found[:64], found[64:]

    threads = list(range(64))
    assert turns("forward")[0] == threads
    assert turns("reversed")[0] == threads[::-1]
    shuffled = [turns("shuffled", seed) for seed in range(32)]
    for begun, gone_on in [*shuffled, turns("forward"), turns("reversed")]:
        assert sorted(begun) == sorted(gone_on) == threads
    assert shuffled[0] == turns("shuffled", 0)
    assert len({str(one) for one in shuffled}) == 32
    first_warps = {(begun[0] // 32, gone_on[0] // 32) for begun, gone_on in shuffled}
    assert first_warps == {(0, 0), (0, 1), (1, 0), (1, 1)}  # who comes last to a barrier need not go on first
    assert any(begun[-1] % 32 != gone_on[0] % 32 for begun, gone_on in shuffled)


SOUND = [name for name in _host_sim.faults() if name.startswith("sound")]
FAULTS = [name for name in _host_sim.faults() if name not in SOUND]

OF_RACES = [
    "missing barrier",
    "wait for too few",
    "missing barrier after the wait",
    "early overwrite",
    "write over a copy that landed",
    "missing barrier in a warp",
    "missing barrier after the wait in a warp",
    "early overwrite in a warp",
    "ldmatrix without a barrier in a warp",
]
"""Faults that the shadow of races is there for. Without it they need the order that shows them."""


@pytest.mark.parametrize("order", ["forward", "reversed", "shuffled"])
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_seen_in_every_order(name: str, eager: bool, order: str) -> None:
    for seed in range(3):
        with pytest.raises(_host_sim.SimulationError, match=r"block 0|output element"):
            _host_sim.provoke(name, order=order, seed=seed, eager=eager)


@pytest.mark.parametrize("order", ["forward", "reversed", "shuffled"])
@pytest.mark.parametrize("name", SOUND)
def test_a_sound_kernel_passes(name: str, order: str) -> None:
    for seed in range(5):
        _host_sim.provoke(name, order=order, seed=seed)
        _host_sim.provoke(name, order=order, seed=seed, eager=True)


def test_the_shadow_can_be_turned_off() -> None:
    for name in OF_RACES:
        _host_sim.provoke(name, races=False)


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(_host_sim.SimulationError, match=r"a race at \d+: .*no barrier between \(block 0, thread \d+, after 0"):
        _host_sim.provoke("missing barrier")
    with pytest.raises(_host_sim.SimulationError, match="an access outside of shared memory, at 1024 of 1024"):
        _host_sim.provoke("shared memory out of range")
    with pytest.raises(_host_sim.SimulationError, match=r"a race at \d+: .* another thread's (read|write)"):
        _host_sim.provoke("early overwrite in a warp")
    with pytest.raises(_host_sim.SimulationError, match=r"a copy to \d+ is not waited for at the end"):
        _host_sim.provoke("copy not waited for")
    with pytest.raises(_host_sim.SimulationError, match="a read of 4 bytes outside of every input, 4 bytes beyond input"):
        _host_sim.provoke("stray number")
    with pytest.raises(_host_sim.SimulationError, match="8 output elements are never written, the first of them 56"):
        _host_sim.provoke("never written")


def arrays() -> dict[str, object]:
    problem = {"element": "fp16", "batch": 1, "height": 3, "width": 4, "in_channels": 8, "ch1x1": 1, "ch3x3red": 2}
    problem |= {"ch3x3": 3, "ch5x5red": 4, "ch5x5": 5, "pool_proj": 6, "large_kernel": 5}
    weights, biases = _host_sim.packed_sizes(problem)
    x = np.zeros((1, 3, 4, 8), np.uint16).transpose(0, 3, 1, 2)
    return {
        "problem": problem,
        "device": {"multiprocessors": 2, "shared_memory": 227 * 1024},
        "tile": None,
        "x": x,
        "weights": np.zeros(weights, np.uint8),
        "bias": np.zeros(biases, np.float32),
        "out": np.ones((1, 15, 3, 4), np.uint16),
    }


def test_arrays_in_and_out() -> None:
    given = arrays()
    assert _host_sim.simulate(**given)["products"] > 0
    assert not given["out"].any()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((1, 8, 3, 4), np.float32)}, "x is float32; it is to be uint16"),
        ({"x": np.zeros((1, 8, 3, 5), np.uint16)}, r"x is \(1, 8, 3, 5\); it is to be \(1, 8, 3, 4\)"),
        ({"x": np.zeros((1, 8, 3, 4), np.uint16)}, "channels"),
        ({"out": np.zeros((1, 16, 3, 4), np.uint16)}, r"out is .* it is to be \(1, 15, 3, 4\)"),
        ({"out": np.lib.stride_tricks.as_strided(np.zeros(400, np.uint16), (1, 15, 3, 4), (0, 2, 0, 30))}, "elements overlap"),
        ({"out": np.lib.stride_tricks.as_strided(np.zeros(400, np.uint16), (1, 15, 3, 4), (0, 2, 88, 30))}, "elements overlap"),
        ({"weights": np.zeros(3, np.uint8)}, r"weights is \(3,\); packed for these widths"),
        ({"bias": np.zeros(3, np.float32)}, r"bias is \(3,\); packed for these widths"),
        ({"order": "sideways"}, "order is 'sideways'; it is to be forward, reversed or shuffled"),
        ({"threads": 0}, "threads are 0"),
        ({"device": {"multiprocessors": 2}}, "device lacks shared_memory"),
        ({"device": {"multiprocessors": 2, "shared_memory": 100}}, "shared memory"),
    ],
)
def test_wrong_arguments(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _host_sim.simulate(**{**arrays(), **change})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch", 1.5, r"problem's batch is 1\.5; it is to be an integer of 32 bits"),
        ("ch1x1", 2**31, r"problem's ch1x1 is 2147483648; it is to be an integer of 32 bits"),
        ("element", None, "problem's element is None; it is to be fp16, bf16 or tf32"),
        ("element", "fp8", "element is 'fp8'; it is to be fp16, bf16 or tf32"),
    ],
)
def test_wrong_problems(field: str, value: object, message: str) -> None:
    given = arrays()
    with pytest.raises(ValueError, match=message):
        _host_sim.simulate(**{**given, "problem": {**given["problem"], field: value}})  # type: ignore[dict-item]


def test_wrong_sizes_of_what_is_for_tests() -> None:
    for call in (lambda: _host_sim.transpose_words([1, 2, 3]), lambda: _host_sim.load_matrices([1])):
        with pytest.raises(ValueError, match=r"words are \d; they are to be 128"):
            call()
    with pytest.raises(ValueError, match="b's words are 0; they are to be 256"):
        _host_sim.multiply_words("fp16", [0] * 128, [])
    with pytest.raises(ValueError, match="pitch is 8"):
        _host_sim.touch_rows(8)


def test_a_strided_output_is_written_in_its_places_alone() -> None:
    given = arrays()
    memory = np.full((1, 20, 5, 9), 7, np.uint16)
    given["out"] = memory[:, 2:17, 1:4, ::2][..., :4]
    _host_sim.simulate(**given)
    assert not given["out"].any()
    memory[:, 2:17, 1:4, ::2][..., :4] = 7
    assert (memory == 7).all()

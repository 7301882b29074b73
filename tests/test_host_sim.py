"""The simulation itself: its instructions against numpy and PTX's tables, and that it sees what it is there to see."""

from __future__ import annotations

import numpy as np
import pytest

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


@pytest.mark.parametrize("element", K)
def test_each_factor_reaches_its_place(element: str) -> None:
    for row, k, column in [(0, 0, 0), (15, K[element] - 1, 31), (3, 5, 17), (9, 2, 8)]:
        a, b = np.zeros((16, K[element])), np.zeros((K[element], 32))
        a[row, k], b[k, column] = 2, 3
        found = _host_sim.multiply_fragments(element, bits(element, a), np.ascontiguousarray(bits(element, b).T))
        expected = np.zeros((16, 32))
        expected[row, column] = 6
        assert np.array_equal(found, expected)


def test_tf32_factors_are_cut_to_19_bits() -> None:
    a, b = np.zeros((16, 8), np.float32), np.zeros((32, 8), np.float32)
    a[0, 0], b[0, 0] = 1 + 2**-10 + 2**-12, 1
    assert _host_sim.multiply_fragments("tf32", a, b)[0, 0] == 1 + 2**-10


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
    counters = _host_sim.read_rows(pitch)
    for kind in ("ldmatrix_a", "ldmatrix_b", "shared_loads"):
        assert counters[kind] == (4 * conflicts, 4), kind


SOUND = [name for name in _host_sim.faults() if name.startswith("sound")]
FAULTS = [name for name in _host_sim.faults() if name not in SOUND]

OF_RACES = [
    "missing barrier",
    "missing wait",
    "missing barrier after the wait",
    "early overwrite",
    "write over a copy that landed",
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


def test_a_strided_output_is_written_in_its_places_alone() -> None:
    given = arrays()
    memory = np.full((1, 20, 5, 9), 7, np.uint16)
    given["out"] = memory[:, 2:17, 1:4, ::2][..., :4]
    _host_sim.simulate(**given)
    assert not given["out"].any()
    memory[:, 2:17, 1:4, ::2][..., :4] = 7
    assert (memory == 7).all()

"""Samples in milliseconds, and how providers take turns to give them.

Runtimes disturb each other: the threads of one keep spinning for a while after its call returned, and a oneDNN call that starts
while another runtime's threads still hold a core can take several times as long. So providers take turns in small blocks, not
single calls: on a CPU each block waits for ``settle`` seconds, makes one call that is not counted (caches and threads are then
its own) and times the next ``calls``. The order of the blocks is drawn anew in every round.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

Call = Callable[[], object]
Clock = Callable[[Call], float]
Turn = Callable[[], Sequence[float]]
"""One block of one provider: runs it and returns its samples, milliseconds a call."""

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Summary:
    """Of ``n`` samples: the median and the 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float
    n: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Self:
        """Summarises samples.

        Raises:
            ValueError: there are none.
        """
        if not samples:
            raise ValueError(f"{cls.__name__}.of: there must be at least one sample, got none")
        deciles = statistics.quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else [samples[0]] * 9
        return cls(statistics.median(samples), deciles[1], deciles[7], len(samples))

    def to_json(self) -> dict[str, float]:
        """The summary without the samples."""
        return {"median": self.median, "p20": self.p20, "p80": self.p80, "n": self.n}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(data["median"], data["p20"], data["p80"], data["n"])


@dataclass(frozen=True)
class Timing(Summary):
    """Milliseconds of ``n`` calls; ``ms`` holds them."""

    ms: tuple[float, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def of(cls, samples: Sequence[float]) -> Self:
        """Summarises samples in milliseconds.

        Raises:
            ValueError: there are none.
        """
        return replace(super().of(samples), ms=tuple(samples))


@dataclass(frozen=True)
class Schedule:
    """How long to measure: for each provider ``warmup`` untimed calls, then ``rounds`` blocks of ``calls`` timed ones.

    ``seconds`` bounds the rounds of one case together, where it is given: there are then fewer of them, but never fewer than
    ``FEWEST_ROUNDS`` (or ``rounds``, if that is less).
    """

    rounds: int = 20
    calls: int = 5
    warmup: int = 3
    settle: float = 0.05
    seconds: float | None = None

    FEWEST_ROUNDS = 8

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("calls", 1), ("warmup", 0), ("settle", 0), ("seconds", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"Schedule: {name} must be at least {least}, got {value!r}")

    def rounds_within(self, seconds_a_round: float) -> int:
        """How many rounds of this length fit."""
        if self.seconds is None:
            return self.rounds
        fitting = int(self.seconds / max(seconds_a_round, 1e-9))
        return min(self.rounds, max(fitting, self.FEWEST_ROUNDS))


def wall_clock(call: Call) -> float:
    """Milliseconds that one call takes by the wall clock."""
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e6


def wall_turn(call: Call, calls: int, settle: float, clock: Clock = wall_clock) -> Turn:
    """A block as the module's docstring says."""

    def turn() -> list[float]:
        time.sleep(settle)
        call()
        return [clock(call) for _ in range(calls)]

    return turn


def take_turns(turns: Mapping[K, Turn], rounds: int, *, seed: int = 0, advance: Call = lambda: None) -> dict[K, list[float]]:
    """The samples of ``rounds`` rounds in which everyone has one turn, in an order drawn anew each time.

    Args:
        advance: called after each turn, ``rounds * len(turns)`` times: for a progress bar.
    """
    samples: dict[K, list[float]] = {key: [] for key in turns}
    order, draw = list(turns), random.Random(seed)
    for _ in range(rounds):
        draw.shuffle(order)
        for key in order:
            samples[key].extend(turns[key]())
            advance()
    return samples


def interleaved(
    providers: Mapping[str, Call],
    rounds: int = 20,
    warmup: int = 3,
    *,
    calls: int = 5,
    settle: float = 0.05,
    clock: Clock = wall_clock,
    seed: int = 0,
    advance: Call = lambda: None,
) -> dict[str, Timing]:
    """Times providers against each other in one run.

    Args:
        providers: a call of no arguments for each name.
        clock: takes a call and returns its milliseconds.
        advance: called after each block, ``rounds * len(providers)`` times: for a progress bar.

    Raises:
        ValueError: a count is out of range.
    """
    Schedule(rounds, calls, warmup, settle)
    for call in providers.values():
        for _ in range(warmup):
            call()
    turns = {name: wall_turn(call, calls, settle, clock) for name, call in providers.items()}
    samples = take_turns(turns, rounds, seed=seed, advance=advance)
    return {name: Timing.of(ms) for name, ms in samples.items()}

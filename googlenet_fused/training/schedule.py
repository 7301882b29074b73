"""Learning rates over a run, as multiples of the recipe's own."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class StepDecay:
    """Multiplied by ``factor`` after every ``epochs`` epochs (the paper, section 6: 0.96 every 8)."""

    factor: float
    epochs: int

    def __call__(self, step: int, steps_per_epoch: int, steps: int) -> float:
        return self.factor ** (step // (self.epochs * steps_per_epoch))


@dataclass(frozen=True)
class Polynomial:
    """``(1 - step / steps) ** power`` (BVLC/caffe, models/bvlc_googlenet/quick_solver.prototxt: 0.5)."""

    power: float

    def __call__(self, step: int, steps_per_epoch: int, steps: int) -> float:
        return (1 - step / steps) ** self.power


@dataclass(frozen=True)
class Cosine:
    """A linear rise over the first ``warmup`` of the steps, then half a cosine down to 0 (Loshchilov and Hutter, 2017)."""

    warmup: float

    def __call__(self, step: int, steps_per_epoch: int, steps: int) -> float:
        rise = round(self.warmup * steps)
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


Schedule = StepDecay | Polynomial | Cosine
"""Called with the step from 0, the steps of an epoch and those of the run."""

"""Timing that can be believed: a correctness gate first, then all providers interleaved in one run.

A *provider* is one way of running a model. It is built for a `Workload` (a seeded module or network, its dtype and batch),
bound to an input, and then called. Before anything is timed every provider runs on fresh random inputs and is judged
against an fp64 run of the same model by the package's tolerance law; one that fails gets the failure recorded and no time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from googlenet_fused.backends.triton.plans import DTYPES
from googlenet_fused.bench.case import NETWORKS, Case, Mode, Workload, build_workload, numerics
from googlenet_fused.bench.measure import Row, Status, measure
from googlenet_fused.bench.meters import METRICS, DeviceBroken, headline, meter_for
from googlenet_fused.bench.provider import (
    BASELINE,
    OURS,
    Bind,
    Provider,
    Run,
    TrainingStep,
    Unavailable,
    channels_last,
    cudnn_benchmark,
    fused_provider,
    package_providers,
    run_of,
)
from googlenet_fused.bench.show import latency_panels, print_results
from googlenet_fused.bench.timing import Schedule, Timing, interleaved, take_turns, wall_clock
from googlenet_fused.info import machine_description, usable_cpus
from googlenet_fused.messages import first_line

__all__ = [
    "BASELINE",
    "DTYPES",
    "METRICS",
    "NETWORKS",
    "OURS",
    "Bind",
    "Case",
    "DeviceBroken",
    "Mode",
    "Provider",
    "Row",
    "Run",
    "Schedule",
    "Status",
    "Timing",
    "TrainingStep",
    "Unavailable",
    "Workload",
    "build_workload",
    "channels_last",
    "cudnn_benchmark",
    "first_line",
    "fused_provider",
    "headline",
    "interleaved",
    "latency_panels",
    "machine_description",
    "measure",
    "meter_for",
    "numerics",
    "package_providers",
    "print_results",
    "run_of",
    "take_turns",
    "torch_threads",
    "wall_clock",
]


@contextmanager
def torch_threads(count: int | None) -> Iterator[int]:
    """Runs a block with ``count`` torch threads (``None``: as they are) and puts the number back afterwards.

    Raises:
        ValueError: ``count`` is below 1 or above the number of usable processors.
    """
    before, most = torch.get_num_threads(), usable_cpus()
    if count is not None:
        if not 1 <= count <= most:
            raise ValueError(f"threads must be from 1 to {most}, the processors that may be used here, got {count}")
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)

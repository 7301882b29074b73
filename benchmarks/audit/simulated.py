"""What the simulated CUDA kernel does in GoogLeNet's modules: wavefronts of shared memory and sectors of global memory."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.audit.compile import AuditError, MissingTool
from googlenet_fused.backends.cuda import native
from googlenet_fused.backends.cuda.simulation import MODULE, simulate
from googlenet_fused.backends.cuda.tiles import DTYPES
from googlenet_fused.ops import inception
from googlenet_fused.packing import ConvParams
from googlenet_fused.spec import GOOGLENET_SIDES, GOOGLENET_SPECS

Counters = dict[str, Any]
"""The names of ``Case``, and of each kind how many were taken and the least that would have done."""


class Case(NamedTuple):
    """A module's call, and the device that is played."""

    module: str
    dtype: str
    multiprocessors: int
    batch: int


CASES = tuple(
    Case(module, dtype, multiprocessors, batch)
    for dtype in ("fp16", "tf32")
    for multiprocessors, batch in ((132, 1), (132, 4), (1, 4))
    for module in GOOGLENET_SPECS
)
"""An H100 with one image, where tiles are smallest, and with four, where those of 5a and 5b are cut off; and a device so
small that tiles are whole images: in 5a and 5b several, in 3a, 3b and TF32's 4e a part of one. The addresses of bf16 are those
of fp16."""

KINDS = ("ldmatrix_a", "ldmatrix_b", "copy_writes", "shared_loads", "shared_stores", "global_reads", "global_writes")

MOST = {"ldmatrix_a": 1.03, "ldmatrix_b": 1.0, "copy_writes": 1.01, "global_reads": 1.0, "global_writes": 1.0}
"""How many times the least of these kinds may be taken. Measured: 1.024 for ``ldmatrix_a`` in 4d, on one multiprocessor, whose
196 pixels are not as many of each index mod 8; 1.001 for ``copy_writes``, of which the last are of a few lanes."""

MOST_OF = {("global_writes", "tf32"): 2.0}
"""In a dtype, in place of ``MOST``: in TF32 a thread stores 8 channels, a sector, in two halves, each an access of that
sector."""


def simulation() -> Any:
    """The simulation's module.

    Raises:
        MissingTool: it is not built.
        AuditError: it was built, and is damaged or of other sources.
    """
    if (fault := native.simulation_fault()) is not None:
        raise AuditError(fault)
    try:
        return importlib.import_module(MODULE)
    except ModuleNotFoundError as error:
        raise MissingTool(f"the simulation, which has the planner, is not built ({error}): make native") from error
    except ImportError as error:
        raise AuditError(f"the simulation cannot be imported ({error}): make native") from error


def simulated(cases: Iterable[Case], advance: Callable[[], None] = lambda: None) -> Iterator[Counters]:
    """What is counted in each case, ready for JSON; ``advance`` is called after each.

    Raises:
        MissingTool: the simulation is not built.
    """
    simulation()
    for case in cases:
        spec, side, dtype = GOOGLENET_SPECS[case.module], GOOGLENET_SIDES[case.module], DTYPES[case.dtype]
        convs = [  # of zeros: no address depends on a number
            ConvParams(
                torch.zeros(conv.out_channels, conv.in_channels, conv.kernel_size, conv.kernel_size, dtype=dtype),
                torch.zeros(conv.out_channels, dtype=dtype),
            )
            for conv in spec.convs
        ]
        x = torch.zeros(case.batch, side, side, spec.in_channels, dtype=dtype).permute(0, 3, 1, 2)
        with simulate(count=True, multiprocessors=case.multiprocessors) as found:
            inception(x, convs, backend="cuda_sim")
        (counters,) = found.counters
        yield {
            **case._asdict(),
            **{name: list(value) if isinstance(value, tuple) else value for name, value in counters.items()},
        }
        advance()


def case_of(counters: Counters) -> Case:
    return Case(*(counters[name] for name in Case._fields))


def conflicts(counters: Counters) -> Iterator[str]:
    """What is wrong with a case's counters."""
    case = case_of(counters)
    for kind, usual in MOST.items():
        most = MOST_OF.get((kind, case.dtype), usual)
        taken, least = counters[kind]
        if least and taken / least > most:
            yield f"{described(case)}: {kind} takes {taken / least:.3f} times the least, at most {most}"


def described(case: Case) -> str:
    images = "1 image" if case.batch == 1 else f"{case.batch} images"
    return f"{case.module}, {case.dtype}, {images} on {case.multiprocessors} SM"


def table(counted: Sequence[Counters]) -> str:
    """A line a case: times the least number of wavefronts and sectors."""
    lines = [f"{'simulated, times the least':32}{''.join(f'{kind:>15}' for kind in KINDS)}"]
    for counters in counted:
        factors = (taken / max(1, least) for taken, least in map(counters.__getitem__, KINDS))
        lines.append(f"{described(case_of(counters)):32}{''.join(f'{factor:15.3f}' for factor in factors)}")
    return "\n".join(lines)

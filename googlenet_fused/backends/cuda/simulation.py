"""The CUDA kernel's own source, compiled for a CPU and simulated: ``csrc/host_sim``. For tests."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from googlenet_fused.arithmetic import arithmetic
from googlenet_fused.backends.cuda import native
from googlenet_fused.backends.cuda.tiles import ELEMENTS, forced_tile, readable, refuse_dtype
from googlenet_fused.backends.cuda.weights import pack
from googlenet_fused.backends.registry import Backend, Problem
from googlenet_fused.messages import first_line
from googlenet_fused.packing import PackedInception
from googlenet_fused.spec import InceptionSpec

MODULE = "googlenet_fused.backends.cuda._host_sim"


@dataclass(frozen=True)
class Simulation:
    """What is simulated and how; ``csrc/host_sim/module.cpp`` says what each of the modes checks.

    ``multiprocessors`` and ``shared_memory``, bytes a block, are those of the GPU that is played.
    """

    multiprocessors: int = 4
    shared_memory: int = 227 * 1024
    order: str = "forward"
    seed: int = 0
    eager: bool = False
    races: bool = True
    poison: bool = True
    count: bool = False
    counters: list[dict[str, Any]] = field(default_factory=list, compare=False)
    """What was counted, a module after the other."""

    @property
    def device(self) -> dict[str, int]:
        return {"multiprocessors": self.multiprocessors, "shared_memory": self.shared_memory}

    @property
    def modes(self) -> dict[str, Any]:
        apart = ("multiprocessors", "shared_memory", "counters")
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name not in apart}


_simulation: ContextVar[Simulation | None] = ContextVar("googlenet_fused_cuda_simulation", default=None)


@contextmanager
def simulate(**changes: Any) -> Iterator[Simulation]:
    """Within the block, simulate with these fields of ``Simulation`` in place of those in force; gives it, with counters."""
    simulation = replace(_simulation.get() or Simulation(), **{"counters": [], **changes})
    token = _simulation.set(simulation)
    try:
        yield simulation
    finally:
        _simulation.reset(token)


def problem_of(spec: InceptionSpec, dtype: torch.dtype, batch: int, height: int, width: int) -> dict[str, Any]:
    """``struct Problem`` as the simulation's functions take it."""
    sizes = {"element": ELEMENTS[arithmetic(dtype)], "batch": batch, "height": height, "width": width}
    return {**sizes, **vars_of(spec)}


def vars_of(spec: InceptionSpec) -> dict[str, int]:
    return {one.name: getattr(spec, one.name) for one in fields(spec)}


class CudaSimulationBackend(Backend):
    name = "cuda_sim"
    description = "the CUDA kernel simulated on CPU tensors, for tests; fp16, bf16, fp32 as TF32, only if asked for by name"
    for_tests = True
    arithmetics = tuple(ELEMENTS)

    def probe(self) -> str | None:
        return _probe()

    def supports(self, problem: Problem) -> str | None:
        if problem.device.type != "cpu":
            return f"it simulates on CPU tensors, not on {problem.device.type}"
        return _probe() or refuse_dtype(problem.dtype) or (_refuse_here(problem) if problem.spec else None)

    def doubt(self, problem: Problem) -> str | None:
        return "it simulates the CUDA kernel on a CPU, which is for tests: ask for it by name"

    def prepare(self, packed: PackedInception, input_shape: Sequence[int]) -> tuple[Tensor, ...]:
        return pack(packed)

    def inception(self, x: Tensor, packed: PackedInception, prepared: tuple[Tensor, ...], out: Tensor) -> None:
        if (refusal := refuse_dtype(x.dtype)) is not None:  # torch's flags may have changed since it was chosen
            raise RuntimeError(refusal)
        weights, bias = prepared
        simulation, tile = _simulation.get() or Simulation(), forced_tile(x)
        n, _, h, w = x.shape
        counters = _module().simulate(
            problem_of(packed.spec, x.dtype, n, h, w),
            simulation.device,
            None if tile is None else tile._asdict(),
            _as_numpy(readable(x)),
            weights.numpy(),
            bias.numpy(),
            _as_numpy(out),
            threads=torch.get_num_threads(),
            **simulation.modes,
        )
        simulation.counters.append(counters)


def _as_numpy(tensor: Tensor) -> Any:
    """The same memory; half precisions, of which numpy has but one, as their bits."""
    return tensor.detach().view(torch.uint16).numpy() if tensor.element_size() == 2 else tensor.detach().numpy()


def _module() -> Any:
    return importlib.import_module(MODULE)


@cache
def _probe() -> str | None:
    if MODULE not in sys.modules and (fault := native.simulation_fault()) is not None:
        return fault
    try:
        _module()
    except ModuleNotFoundError:
        return "the simulation is not built: `make native` builds it in a checkout of the project, with g++"
    except ImportError as error:
        return f"the simulation does not import ({first_line(error)}): `make native` builds it anew"
    return None


def _refuse_here(problem: Problem) -> str | None:
    simulation = _simulation.get() or Simulation()
    assert problem.spec is not None
    return _refuse_spec(problem.spec, problem.dtype, simulation.multiprocessors, simulation.shared_memory)


@cache
def _refuse_spec(spec: InceptionSpec, dtype: torch.dtype, multiprocessors: int, shared_memory: int) -> str | None:
    device = Simulation(multiprocessors, shared_memory).device
    try:
        _module().plan(problem_of(spec, dtype, 1, 64, 64), device)
    except ValueError as error:
        return first_line(error)
    return None

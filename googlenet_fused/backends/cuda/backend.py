"""What the CUDA backend can run, and a module's way from tensors to the launch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from googlenet_fused.arithmetic import arithmetic
from googlenet_fused.backends import trust
from googlenet_fused.backends.cuda import native
from googlenet_fused.backends.cuda.tiles import ELEMENTS, Tile, forced_tile, readable, refuse_dtype, use_tile
from googlenet_fused.backends.cuda.weights import pack
from googlenet_fused.backends.registry import Backend, Problem
from googlenet_fused.messages import first_line
from googlenet_fused.packing import PackedInception
from googlenet_fused.spec import InceptionSpec

MINIMUM_CAPABILITY = (8, 0)
NO_CUDA = "torch sees no CUDA device"

_SIDE = 64
"""Of an image that is larger than any tile: what fits with it fits always."""

_WAYS = {
    "several images": Tile(2, 11, 11, 1, 2),
    "whole images": Tile(1, 11, 11, 1, 3),
    "some rows": Tile(1, 4, 11, 1, 2),
    "some rows and columns": Tile(1, 4, 4, 1, 4),
    "output channels split": Tile(1, 11, 11, 3, 2),
}
"""Tiles of every kind, of images of 11x11."""

_WAY_SIDES = (11, _SIDE)
"""Of images on which a way must fit to be one."""


class CudaBackend(Backend):
    name = "cuda"
    description = "CUDA C++ kernel, a module in one launch, straight into the concat buffer; fp16, bf16, fp32 as TF32"
    needs_verification = True
    arithmetics = tuple(ELEMENTS)

    def probe(self) -> str | None:
        return _refuse_library() or _refuse_machine()

    def facts(self) -> dict[str, Any]:
        found = native.build_facts()
        return {"built": found["built"], "archs": found.get("archs", [])}

    def sources(self) -> str:
        found = native.loaded_facts()
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
        return f"{found.get('source')} {found.get('nvcc')} {_code_for(capability, found.get('archs', []))}"

    def supports(self, problem: Problem) -> str | None:
        return (
            _refuse_device(problem.device)
            or _refuse_library()
            or _refuse_gpu(_indexed(problem.device))
            or refuse_dtype(problem.dtype)
            or (_refuse_spec(_indexed(problem.device), problem.dtype, problem.spec) if problem.spec else None)
        )

    def doubt(self, problem: Problem) -> str | None:
        return trust.doubt(self, problem)

    def ways(self, problem: Problem) -> Mapping[str, AbstractContextManager[None]]:
        if problem.spec is None:
            return {}
        one = (_indexed(problem.device), problem.dtype, problem.spec)
        fitting = {name: tile for name, tile in _WAYS.items() if not any(_refuse_tile(*one, side, tile) for side in _WAY_SIDES)}
        return {name: use_tile(tile) for name, tile in fitting.items()}

    def prepare(self, packed: PackedInception, input_shape: Sequence[int]) -> tuple[Tensor, ...]:
        return pack(packed)

    def inception(self, x: Tensor, packed: PackedInception, prepared: tuple[Tensor, ...], out: Tensor) -> None:
        weights, bias = prepared
        tile = forced_tile(x) or ()
        torch.ops.googlenet_fused_cuda.inception.default(readable(x), weights, bias, [*packed.spec], [*tile], out)


@cache
def _refuse_library() -> str | None:
    """Asked in every call of an operator; where the library is not loaded an answer takes reading its sources."""
    return native.load()


def _refuse_machine() -> str | None:
    device = torch.device("cuda")
    return _refuse_device(device) or _refuse_gpu(_indexed(device))


def _refuse_device(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "it runs on NVIDIA GPUs, and this torch is built for AMD's"
    if device.type in ("cpu", "cuda") and not torch.cuda.is_available():
        return NO_CUDA
    return None if device.type == "cuda" else f"it runs on CUDA tensors, not on {device.type}"


def _indexed(device: torch.device) -> torch.device:
    """The device itself and not "the current one"."""
    return device if device.index is not None else torch.device(device.type, torch.cuda.current_device())


@cache
def _refuse_gpu(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    here = f"sm_{capability[0]}{capability[1]}"
    if capability < MINIMUM_CAPABILITY:
        return f"it needs sm_{MINIMUM_CAPABILITY[0]}{MINIMUM_CAPABILITY[1]} or later, this is {here}"
    archs = native.loaded_facts().get("archs", [])
    if _code_for(capability, archs) is not None:
        return torch.ops.googlenet_fused_cuda.driver_fault.default() or None
    fix = f'TORCH_CUDA_ARCH_LIST="{capability[0]}.{capability[1]}"'
    return f"its library is built for {', '.join(archs)}, none of which runs on this {here}: build it anew with {fix}"


def _code_for(capability: tuple[int, int], archs: Sequence[str]) -> str | None:
    """Which of what nvcc built runs there, or None: machine code within its major version, else PTX of any earlier one."""
    able = []
    for arch in archs:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
        if found is None:
            continue
        machine, built, only = found[1] == "sm", (int(found[2]), int(found[3])), found[4] != ""
        if built == capability or (not only and built <= capability and (not machine or built[0] == capability[0])):
            able.append((machine, built, arch))
    return max(able)[2] if able else None


@cache
def _refuse_spec(device: torch.device, dtype: torch.dtype, spec: InceptionSpec) -> str | None:
    """What the planner says of widths that it has no tile for, however small, on this device."""
    return _refuse_tile(device, dtype, spec, _SIDE, None)


@cache
def _refuse_tile(device: torch.device, dtype: torch.dtype, spec: InceptionSpec, side: int, tile: Tile | None) -> str | None:
    """What the planner says against a tile of two images of this side, or None; without a tile, against all."""
    properties: Any = torch.cuda.get_device_properties(device)
    problem = [[*ELEMENTS].index(arithmetic(dtype)), 2, side, side, *spec]
    facts = [properties.multi_processor_count, properties.shared_memory_per_block_optin]
    try:
        torch.ops.googlenet_fused_cuda.plan.default(problem, facts, [*(tile.within(2, side, side) if tile else ())])
    except RuntimeError as error:
        return first_line(error)
    return None

"""What the Triton backend can run, and a module's way from tensors to launches."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import sysconfig
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from googlenet_fused.arithmetic import arithmetic
from googlenet_fused.backends import trust
from googlenet_fused.backends.registry import Backend, Problem
from googlenet_fused.backends.triton.plans import (
    DTYPES,
    FORMS,
    INTERPRETER,
    SPATIAL,
    Arithmetic,
    Plan,
    Request,
    configurations_for,
    hopper_or_later,
    plan_for,
    rule,
    use_plan,
)
from googlenet_fused.messages import first_line
from googlenet_fused.packing import PackedInception

MINIMUM_TRITON = (3, 6)
MINIMUM_CAPABILITY = (8, 0)
NO_CUDA = "torch sees no CUDA device (TRITON_INTERPRET=1 runs its kernels on CPU tensors, slowly)"
HIP_WITH_TF32 = ("gfx942",)
INTERPRETER_PROCESSORS = 1
"""Of the device that the interpreter plays: the largest tiles fill it, and persistent grids go round more than once."""


class TritonBackend(Backend):
    name = "triton"
    description = "Triton kernels, fused branches straight into the concat buffer; fp16, bf16, fp32 (TF32 as torch's flag says)"
    needs_verification = True

    def probe(self) -> str | None:
        return _probe() or _refuse_machine()

    def described(self) -> str:
        if interpreting():
            return "Triton kernels, interpreted on CPU tensors (TRITON_INTERPRET=1): fp32 and fp16, only if asked for by name"
        return self.description

    def supports(self, problem: Problem) -> str | None:
        return _probe() or _refuse_device(problem.device) or _refuse_dtype(problem)

    def doubt(self, problem: Problem) -> str | None:
        if problem.device.type == "cpu":
            return "its kernels are interpreted here (TRITON_INTERPRET=1), which is for tests: ask for it by name"
        return trust.doubt(self, problem)

    def ways(self, problem: Problem) -> Mapping[str, AbstractContextManager[None]]:
        if problem.spec is None:
            return {}
        arch, multiprocessors = device_facts(problem.device)
        request = Request(arch, multiprocessors, arithmetic_of(problem.dtype, arch), problem.spec, 1, 1, 1)
        return {str(plan): use_plan(plan) for plan in shipped_plans(request)}

    def prepare(self, packed: PackedInception, input_shape: Sequence[int]) -> tuple[Tensor, ...]:
        from googlenet_fused.backends.triton.launch import Weights

        return Weights.of(packed)

    def inception(self, x: Tensor, packed: PackedInception, prepared: tuple[Tensor, ...], out: Tensor) -> None:
        from googlenet_fused.backends.triton.launch import Weights, launches

        spec, (n, _, h, w), device = packed.spec, x.shape, x.device
        arch, multiprocessors = device_facts(device)
        products = arithmetic_of(x.dtype, arch)
        plan = plan_for(Request(arch, multiprocessors, products, spec, n, h, w))
        # Triton launches on the current device, whatever the tensors'.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            for launch in launches(x, spec, Weights(*prepared), out, plan, products, multiprocessors):
                launch.run()


_ARITHMETICS: dict[str, Arithmetic] = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "tf32": "tf32"}


def arithmetic_of(dtype: torch.dtype, arch: str) -> Arithmetic:
    """How the kernels multiply tensors of this dtype: fp32 as torch's flag for convolutions allows and the arch can."""
    found = _ARITHMETICS[arithmetic(dtype)]
    return found if found != "tf32" or has_tf32(arch) else "fp32"


def has_tf32(arch: str) -> bool:
    return not arch.startswith("gfx") or arch in HIP_WITH_TF32


def shipped_plans(request: Request) -> list[Plan]:
    """Plans that hold every shipped configuration which runs on the request's arch, in both forms, with the flags of the rule;
    where there are tensor descriptors, a last one has them in every kernel that can."""
    configs, chosen = configurations_for(request), rule(request)
    found = []
    for form in FORMS:
        pointwise, spatial = configs["pointwise"], configs[SPATIAL[form]]
        for one, other in zip_longest(pointwise, spatial):
            found.append(replace(chosen, form=form, pointwise=one or pointwise[-1], spatial=other or spatial[-1]))
    if hopper_or_later(request.arch):
        found.append(replace(found[0], form="merged", pointwise_tma=True, spatial_tma=True, pdl=True))
    return found


@cache
def interpreting() -> bool:
    """Whether Triton interprets kernels: it decides when they are defined, so the first answer holds. Raises whatever a broken
    Triton raises: to be asked where the backend's ``probe`` finds nothing amiss."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


@cache
def _probe() -> str | None:
    try:
        triton: Any = importlib.import_module("triton")
    except (Exception, SystemExit) as error:  # an import can fail in any way
        return f"triton does not import: {type(error).__name__}: {first_line(error)}"
    file = getattr(triton, "__file__", None) or next(iter(getattr(triton, "__path__", ())), "no file")
    version = getattr(triton, "__version__", None)
    found = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    if found is not None and tuple(map(int, found.groups())) < MINIMUM_TRITON:
        oldest = ".".join(map(str, MINIMUM_TRITON))
        return f"triton {version} ({file}) is older than {oldest}: upgrade torch, which brings its own"
    try:
        interpreting()
    except (Exception, SystemExit):
        found = None
    return None if found is not None else f"triton is incomplete or of an unknown version ({file})"


def _refuse_machine() -> str | None:
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return NO_CUDA
    return _refuse_device(torch.device("cuda", torch.cuda.current_device()))


def _refuse_device(device: torch.device) -> str | None:
    if interpreting():
        return None if device.type == "cpu" else f"with TRITON_INTERPRET=1 it runs on CPU tensors, not on {device.type}"
    if device.type in ("cpu", "cuda") and not torch.cuda.is_available():
        return NO_CUDA
    return _refuse_gpu(device) if device.type == "cuda" else f"it runs on CUDA tensors, not on {device.type}"


@cache
def _refuse_gpu(device: torch.device) -> str | None:
    if torch.version.hip is None and (capability := torch.cuda.get_device_capability(device)) < MINIMUM_CAPABILITY:
        return f"it needs sm_{MINIMUM_CAPABILITY[0]}{MINIMUM_CAPABILITY[1]} or later, this is sm_{capability[0]}{capability[1]}"
    return next(iter(missing_tools()), None)


def missing_tools() -> list[str]:
    """What Triton builds its launchers with at run time and this machine lacks, each with its remedy."""
    found = []
    if (named := os.environ.get("CC")) is not None and shutil.which(named) is None:
        found.append(f"Triton builds its launcher with the C compiler that CC names, and {named!r} is none: unset CC")
    elif named is None and not any(map(shutil.which, ("gcc", "clang"))):
        found.append("Triton builds its launcher with a C compiler and neither gcc nor clang is on PATH: install gcc")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        found.append("Triton builds its launcher with Python.h, which is missing: install the Python development headers")
    return found


def _refuse_dtype(problem: Problem) -> str | None:
    name = str(problem.dtype).removeprefix("torch.")
    if problem.dtype not in DTYPES.values():
        return f"its kernels take float16, bfloat16 and float32, not {name}"
    if problem.dtype == torch.bfloat16 and problem.device.type == "cpu":
        return "Triton's interpreter computes bfloat16 wrongly"
    return None


@cache
def device_facts(device: torch.device) -> tuple[str, int]:
    """The arch, as plans name it, and the number of multiprocessors."""
    if device.type == "cpu":
        return INTERPRETER, INTERPRETER_PROCESSORS
    properties: Any = torch.cuda.get_device_properties(device)
    return trust.architecture(properties), properties.multi_processor_count

"""Every kernel in every shipped configuration, as launches of GoogLeNet's modules specialise it, to compile without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from googlenet_fused.backends.triton.launch import Launch, Weights, launches
from googlenet_fused.backends.triton.plans import (
    DTYPES,
    FORMS,
    SPATIAL,
    Arithmetic,
    Kernel,
    Plan,
    configurations,
    hopper_or_later,
    misfit,
)
from googlenet_fused.packing import PackedInception
from googlenet_fused.spec import GOOGLENET_SIDES, GOOGLENET_SPECS, InceptionSpec

CUDA_ARCHES = ("sm_80", "sm_90", "sm_100", "sm_120")
HIP_ARCHES = ("gfx942",)

MODULES: dict[Arithmetic, tuple[str, ...]] = {"fp16": ("3a", "4b", "5b"), "bf16": ("4e",), "tf32": ("4e",), "fp32": ("4e",)}
"""Few and unlike: 3a is the largest image, 4b has the bottleneck of 24 channels, 5b is the widest."""

OTHER_LAYOUTS_IN: Arithmetic = "bf16"
"""In which arithmetic other layouts than channels_last are compiled as well."""

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda tensor: tensor.to(memory_format=torch.channels_last),
    "contiguous": lambda tensor: tensor,
    "64-bit": lambda tensor: tensor.new_empty_strided(tensor.shape, (2**31 * tensor.shape[2], 1, 2**31, tensor.shape[1])),
}
"""Of input and output; in the last one rows are so far apart that offsets and indices need 64 bits."""

_TRITON_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


class Variant(NamedTuple):
    """A kernel as Triton compiles it for one launch; ``signature``, ``constexprs`` and ``attrs`` are ASTSource's arguments."""

    kernel: str
    fn: Any
    label: str
    dtype: Arithmetic
    arches: tuple[str, ...]
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, Any]
    matrix: bool  # must use the matrix units
    aligned: bool  # all its accesses to global memory can be of 16 bytes


def variants() -> Iterator[Variant]:
    for arithmetic, names in MODULES.items():
        seen = set()
        cases = [(plan, name, "channels_last") for plan in _plans(arithmetic) for name in names]
        if arithmetic == OTHER_LAYOUTS_IN:
            cases += [(plan, names[0], layout) for plan in _smallest_plans(arithmetic) for layout in LAYOUTS]
        for plan, name, layout in cases:
            for launch in launches_of(name, arithmetic, plan, layout):
                variant = _variant(launch, name, arithmetic, plan, layout)
                key = (variant.kernel, variant.label)
                if key not in seen:
                    seen.add(key)
                    yield variant


def _plans(arithmetic: Arithmetic) -> Iterator[Plan]:
    """Every configuration of each kernel in every form: as any GPU runs it, as the rule has it on Hopper and later, and with
    all descriptors."""
    configs = configurations(arithmetic)
    for form in FORMS:
        for pointwise, spatial in zip_longest(configs["pointwise"], configs[SPATIAL[form]]):
            plan = Plan(form, pointwise or configs["pointwise"][-1], spatial or configs[SPATIAL[form]][-1])
            yield plan
            yield replace(plan, pointwise_tma=True, pdl=True)
            if form == "merged":
                yield replace(plan, pointwise_tma=True, spatial_tma=True, pdl=True)


def _smallest_plans(arithmetic: Arithmetic) -> Iterator[Plan]:
    for form in FORMS:
        configs = configurations(arithmetic)
        yield Plan(form, configs["pointwise"][-1], configs[SPATIAL[form]][-1])


def launches_of(name: str, arithmetic: Arithmetic, plan: Plan, layout: str = "channels_last") -> list[Launch]:
    """The launches of one of GoogLeNet's modules at batch 8, on tensors without memory."""
    spec, side = GOOGLENET_SPECS[name], GOOGLENET_SIDES[name]

    def tensor(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=DTYPES[arithmetic], device="meta")

    x, out = (LAYOUTS[layout](tensor(8, channels, side, side)) for channels in (spec.in_channels, spec.out_channels))
    return launches(x, spec, _weights(spec, tensor), out, plan, arithmetic, multiprocessors=132)


def _weights(spec: InceptionSpec, tensor: Any) -> Weights:
    shapes = (
        (spec.shared_channels, spec.in_channels, 1),
        (spec.ch3x3, spec.ch3x3red, 3),
        (spec.ch5x5, spec.ch5x5red, spec.large_kernel),
        (spec.pool_proj, spec.in_channels, 1),
    )
    pairs = ((tensor(o, i, k, k), tensor(o)) for o, i, k in shapes)
    return Weights.of(PackedInception(*(operand for pair in pairs for operand in pair)))


def _variant(launch: Launch, name: str, arithmetic: Arithmetic, plan: Plan, layout: str) -> Variant:
    """A launch as ``JITFunction.run`` would specialise it."""
    fn = launch.kernel
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(fn.params):
        value = launch.arguments[parameter.name]
        specialised = type(value) is int and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and value == 1):
            signature[parameter.name], constexprs[(index,)] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{_TRITON_TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, Tensor):
            signature[parameter.name] = f"*{_TRITON_TYPES[value.dtype]}"
            attrs[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if specialised and value % 16 == 0:
                attrs[(index,)] = [["tt.divisibility", 16]]
    kernel: Kernel = "pointwise" if fn.__name__.endswith("pointwise") else SPATIAL[plan.form]
    config = plan.pointwise if kernel == "pointwise" else plan.spatial
    arches = [arch for arch in CUDA_ARCHES + HIP_ARCHES if misfit(config, arithmetic, arch, kernel) is None]
    if plan.pdl:
        arches = [arch for arch in arches if hopper_or_later(arch)]
    size = f"-{launch.arguments['KERNEL']}x{launch.arguments['KERNEL']}" if "KERNEL" in launch.arguments else ""
    descriptors = any(isinstance(value, TensorDescriptor) for value in launch.arguments.values())
    how = f"{plan.form}{size}{', TMA' * descriptors}{', PDL' * plan.pdl}"
    how += "" if layout == "channels_last" else f", {layout}"
    label = f"{name} {how} {'x'.join(map(str, astuple(config)))}"
    return Variant(
        *(fn.__name__, fn, label, arithmetic, tuple(arches), signature, constexprs, attrs, launch.options),
        matrix=arithmetic != "fp32",
        aligned=layout != "contiguous",
    )

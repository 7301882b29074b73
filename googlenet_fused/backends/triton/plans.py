"""How a module is run: which form, and the tile, warps and pipeline stages of each kernel.

``plans.json`` holds what is shipped: for each kind of arithmetic the configurations that exist, the largest first, and the
problems for which a choice among them was measured. For any other problem a rule chooses: merged, with the largest tiles of
which there are enough to occupy the device. The user's own table (``plan_table``) goes before what is shipped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import astuple, dataclass, fields
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from googlenet_fused.spec import InceptionSpec

Form = Literal["merged", "fused"]
Arithmetic = Literal["fp16", "bf16", "tf32", "fp32"]
"""What is multiplied: half precision, or fp32 rounded to TF32 or as it is ("ieee" in Triton's terms)."""

Kernel = Literal["pointwise", "spatial", "branch"]
"""The kernels, which each have their own configurations."""

MOST_RATIO = 4
"""How many times as large or small as its own an entry's batches may be. Beyond that tiles that fill the device for the one are
too small or too few for the other, and the rule knows better."""

LIMIT = 2**31
"""What sizes and widths in a table are below: no tensor is larger."""

ARCHES = r"sm_[0-9]{2,4}|(?!sm_)[A-Za-z0-9_-]+"
"""The names that an arch may have in a table."""

FORMS: tuple[Form, ...] = get_args(Form)
KERNELS: tuple[Kernel, ...] = get_args(Kernel)
SPATIAL: dict[Form, Kernel] = {"merged": "spatial", "fused": "branch"}
"""The kernel of the 3x3 and the 5x5 in each form."""

INTERPRETER: Literal["interpreter"] = "interpreter"
"""The arch of a CPU on which kernels are interpreted."""

ARITHMETICS: tuple[Arithmetic, ...] = get_args(Arithmetic)
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of the tensors, by arithmetic, in the order in which reports name them."""

SHARED_MEMORY = {
    **{"sm_80": 163, "sm_86": 99, "sm_89": 99},
    **{"sm_90": 227, "sm_100": 227, "sm_103": 227, "sm_120": 99},
    "gfx942": 64,
}
"""KiB that a block may have, by arch."""

LEAST_SHARED_MEMORY = {"sm": 99, "gfx": 64}
"""KiB of an arch that is not in ``SHARED_MEMORY``, by its maker."""


@dataclass(frozen=True, order=True)
class Config:
    """One kernel's tile, ``rows`` pixels by ``columns`` output channels, ``depth`` products at a time, and its schedule."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.depth} {self.warps}w {self.stages}s"


@dataclass(frozen=True)
class Plan:
    """How a module runs.

    ``spatial`` is the configuration of the 3x3 and the 5x5: of ``googlenet_fused_spatial`` in the merged form, of
    ``googlenet_fused_branch`` in the fused one. ``pointwise_tma`` and ``spatial_tma``: tensor descriptors where tensors permit
    them (the branch kernel has none). ``pdl``: programmatic dependent launch.
    """

    form: Form
    pointwise: Config
    spatial: Config
    pointwise_tma: bool = False
    spatial_tma: bool = False
    pdl: bool = False

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """The plan that ``to_json`` wrote.

        Raises:
            ValueError: it is none; names the field.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(data, Mapping) or sorted(data) != sorted(names):
            raise ValueError(f"a plan has the fields {', '.join(names)}, got {data!r}")
        if data["form"] not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {data['form']!r}")
        for name in HOPPERS:
            if not isinstance(data[name], bool):
                raise ValueError(f"{name} must be true or false, got {data[name]!r}")
        return cls(**{**data, **{kernel: _config(data[kernel], kernel) for kernel in ("pointwise", "spatial")}})

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "pointwise": list(astuple(self.pointwise)), "spatial": list(astuple(self.spatial))}

    def __str__(self) -> str:
        kernels = [f"pointwise {self.pointwise}", f"spatial {self.spatial}"]
        kernels = [text + ", tma" * tma for text, tma in zip(kernels, (self.pointwise_tma, self.spatial_tma), strict=True)]
        return "; ".join([self.form, *kernels, *["pdl"] * self.pdl])


def _config(values: Any, kernel: str) -> Config:
    names = [field.name for field in fields(Config)]
    if not isinstance(values, list) or len(values) != 5 or not all(type(value) is int for value in values):
        raise ValueError(f"{kernel} must be five integers, {', '.join(names)}, got {values!r}")
    least = dict(zip(names, (16, 16, 16, 1, 1), strict=True))
    most = dict(zip(names, (256, 256, 256, 16, 8), strict=True))
    for name, value in zip(names, values, strict=True):
        if not least[name] <= value <= most[name] or (name != "stages" and value & (value - 1)):
            power = "" if name == "stages" else "a power of 2 "
            raise ValueError(f"{kernel}: {name} must be {power}from {least[name]} to {most[name]}, got {value} in {values}")
    return Config(*values)


def misfit(config: Config, arithmetic: Arithmetic, arch: str, kernel: Kernel) -> str | None:
    """Why a kernel of this configuration would not run on this arch, or None: tiles in flight must fit in shared memory.

    Those of the spatial kernel's two convolutions lie beside one another, as ``make audit`` shows, though one runs at a time.
    """
    limit = SHARED_MEMORY.get(arch, LEAST_SHARED_MEMORY["gfx" if arch.startswith("gfx") else "sm"])
    needed = (config.rows + config.columns) * config.depth * DTYPES[arithmetic].itemsize * config.stages
    needed *= 2 if kernel == "spatial" else 1
    if arch == INTERPRETER or needed <= 1024 * limit:
        return None
    return f"{config} needs {needed / 1024:g} KiB of shared memory, of which a block on {arch} may have {limit}"


@dataclass(frozen=True)
class Request:
    """What a plan is wanted for. ``arch`` is "sm_90" or the like, "gfx942", or "interpreter"."""

    arch: str
    multiprocessors: int
    arithmetic: Arithmetic
    spec: InceptionSpec
    batch: int
    height: int
    width: int


HOPPERS = ("pointwise_tma", "spatial_tma", "pdl")
"""The fields of a plan that need Hopper or later."""


def hopper_or_later(arch: str) -> bool:
    """Whether this arch has TMA and programmatic dependent launch."""
    return arch.startswith("sm_") and int(arch.removeprefix("sm_")) >= 90


_forced: ContextVar[Plan | None] = ContextVar("googlenet_fused_triton_plan", default=None)


@contextmanager
def use_plan(plan: Plan) -> Iterator[None]:
    """Within the block every module that the Triton backend runs is run by this plan."""
    token = _forced.set(plan)
    try:
        yield
    finally:
        _forced.reset(token)


def plan_for(request: Request) -> Plan:
    """The plan for a request: that of ``use_plan``, else the user's table's, else the shipped table's, else the rule's."""
    return _forced.get() or _plan_for(request)


@lru_cache(maxsize=4096)
def _plan_for(request: Request) -> Plan:
    from googlenet_fused.backends.triton.plan_table import user_entries  # which needs this module

    return nearest(user_entries(), request) or nearest(shipped_entries(), request) or rule(request)


def rule(request: Request) -> Plan:
    """The plan for what nobody has measured: merged, the largest tiles that fit and occupy the device, else the smallest."""
    spec = request.spec
    pixels = request.batch * request.height * request.width
    configs = configurations_for(request)
    hopper = hopper_or_later(request.arch)

    def first_that_fills(configs: Sequence[Config], widths: Sequence[int]) -> Config:
        for config in configs:
            if tiles(pixels, config, widths) >= request.multiprocessors:
                return config
        return configs[-1]

    return Plan(
        form="merged",
        pointwise=first_that_fills(configs["pointwise"], (spec.shared_channels, spec.pool_proj)),
        spatial=first_that_fills(configs["spatial"], (spec.ch3x3, spec.ch5x5)),
        pointwise_tma=hopper,
        pdl=hopper,
    )


def tiles(pixels: int, config: Config, widths: Sequence[int]) -> int:
    """How many tiles products of these widths over so many pixels make."""
    return -(-pixels // config.rows) * sum(-(-width // config.columns) for width in widths)


@dataclass(frozen=True)
class Entry:
    """A line of a table: the plan that was fastest for a problem on an arch, and the GPU and the version of Triton it was on.

    It serves every GPU of its arch and every version of Triton. A plan is right wherever it runs; measured elsewhere it may not
    be the fastest, but is a better guess than the rule's. Another arch has other limits and instructions.
    """

    arch: str
    arithmetic: Arithmetic
    spec: InceptionSpec
    batch: int
    height: int
    width: int
    plan: Plan
    gpu: str | None = None
    triton: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What a table has one entry for."""
        return self.arch, self.arithmetic, tuple(self.spec), self.batch, self.height, self.width

    @classmethod
    def from_json(cls, data: Any) -> Entry:
        """The entry that ``to_json`` wrote; ``gpu`` and ``triton`` may be missing.

        Raises:
            ValueError: it is none, or its plan would not run on its arch; names the field.
        """
        required = ("arch", "arithmetic", "widths", "batch", "height", "width", "plan")
        if not isinstance(data, Mapping) or not {*required} <= data.keys() <= {*required, "gpu", "triton"}:
            raise ValueError(f"an entry has the fields {', '.join(required)}, and perhaps gpu and triton, got {data!r}")
        if not isinstance(data["arch"], str) or not re.fullmatch(ARCHES, data["arch"]):
            raise ValueError(f"arch must be a name such as 'sm_90', got {data['arch']!r}")
        if data["arithmetic"] not in ARITHMETICS:
            raise ValueError(f"arithmetic must be one of {', '.join(ARITHMETICS)}, got {data['arithmetic']!r}")
        for name in ("batch", "height", "width"):
            if type(data[name]) is not int or data[name] < 1:
                raise ValueError(f"{name} must be a positive integer, got {data[name]!r}")
            if data[name] >= LIMIT:
                raise ValueError(f"{name} must be less than 2^31")
        for name in ("gpu", "triton"):
            if not isinstance(data.get(name), str | None):
                raise ValueError(f"{name} must be a text or null, got {data[name]!r}")
            if not (data.get(name) or "").isprintable():
                raise ValueError(f"{name} must be printable, got {data[name]!r}")
        widths, names = data["widths"], [field.name for field in fields(InceptionSpec)]
        if not isinstance(widths, list) or len(widths) != len(names) or not all(type(width) is int for width in widths):
            raise ValueError(f"widths must be {len(names)} integers, {', '.join(names)}, got {widths!r}")
        if max(widths) >= LIMIT:
            raise ValueError("widths must be less than 2^31")
        try:
            spec = InceptionSpec(*widths)
        except ValueError as error:
            raise ValueError(f"widths: {error}") from error
        try:
            plan = Plan.from_json(data["plan"])
        except ValueError as error:
            raise ValueError(f"plan: {error}") from error
        if not hopper_or_later(data["arch"]) and (asked := [name for name in HOPPERS if getattr(plan, name)]):
            raise ValueError(f"plan: {asked[0]} must be false on {data['arch']}: it needs sm_90 or later")
        kernels: dict[str, Kernel] = {"pointwise": "pointwise", "spatial": SPATIAL[plan.form]}
        for name, kernel in kernels.items():
            if (reason := misfit(getattr(plan, name), data["arithmetic"], data["arch"], kernel)) is not None:
                raise ValueError(f"plan: {name}: {reason}")
        return cls(**{**{name: value for name, value in data.items() if name != "widths"}, "spec": spec, "plan": plan})

    def to_json(self) -> dict[str, Any]:
        rest = {name: value for name, value in vars(self).items() if name != "spec"}
        return {**rest, "widths": list(self.spec), "plan": self.plan.to_json()}


def nearest(entries: Sequence[Entry], request: Request) -> Plan | None:
    """The plan of the entry for this arch, arithmetic, module and image size whose batch is nearest by ratio, up to
    ``MOST_RATIO``, or None."""
    wanted = (request.arch, request.arithmetic, request.spec, request.height, request.width)

    def ratio(entry: Entry) -> float:
        return max(entry.batch, request.batch) / min(entry.batch, request.batch)

    found = [entry for entry in entries if (entry.arch, entry.arithmetic, entry.spec, entry.height, entry.width) == wanted]
    near = [entry for entry in found if ratio(entry) <= MOST_RATIO]
    return min(near, key=ratio).plan if near else None


@cache
def _shipped() -> Any:
    return json.loads(Path(__file__).with_name("plans.json").read_text(encoding="utf-8"))


@cache
def configurations(arithmetic: Arithmetic | Literal["interpreter"]) -> dict[Kernel, tuple[Config, ...]]:
    """The shipped configurations of each kernel, the largest tiles first. The interpreter, whose time goes by operations, has
    its own."""
    shipped = _shipped()["configurations"]["half" if arithmetic in ("fp16", "bf16") else arithmetic]
    return {kernel: tuple(_config(values, kernel) for values in shipped[kernel]) for kernel in KERNELS}


def configurations_for(request: Request) -> dict[Kernel, tuple[Config, ...]]:
    """Those of ``configurations`` that run on the request's arch."""
    found = configurations(INTERPRETER if request.arch == INTERPRETER else request.arithmetic)
    return {
        kernel: tuple(config for config in configs if misfit(config, request.arithmetic, request.arch, kernel) is None)
        for kernel, configs in found.items()
    }


@cache
def shipped_entries() -> tuple[Entry, ...]:
    return tuple(map(Entry.from_json, _shipped()["tuned"]))

"""Whether automatic choice may use a GPU backend on the device at hand: only where it was seen to be right.

Either a record that comes with the package (``verified.json``) says that the backend's tests passed on such a GPU, or a
self-check against the plain modules has passed on the device itself, which is remembered in the user's cache for as long as
GPU, driver, versions and the backend's sources stay as they are.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from threading import RLock
from types import UnionType
from typing import Any

import torch
from torch import Tensor, nn

from googlenet_fused.arithmetic import arithmetic
from googlenet_fused.backends import registry
from googlenet_fused.backends.registry import Backend, Hindrance, Problem, VerifiedOn
from googlenet_fused.blocks import BasicConv2d, Inception
from googlenet_fused.messages import first_line
from googlenet_fused.packing import ConvParams, PackedInception, fold_batch_norm, pack_inception
from googlenet_fused.randomize import randomize_
from googlenet_fused.spec import GOOGLENET_SPECS, InceptionSpec
from googlenet_fused.tolerance import compare, references
from googlenet_fused.user_files import cache_folder, read_json, write_json

logger = logging.getLogger("googlenet_fused")

VERIFIED = Path(__file__).with_name("verified.json")
REMEMBERED = "self-checks.json"
"""The file in the user's cache that holds the self-checks that passed."""

BUILT = "build.json"
"""A file in a backend's package that its build writes, which has an hour and a machine in it and is none of its sources."""

KEPT = 200
"""Self-checks that are remembered at most, the latest ones."""

ARITHMETICS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}
"""What verdicts are on, and the dtype of its tensors: kernels for TF32 are others than those for fp32."""

_COMMON = ("arithmetic.py", "packing.py", "spec.py", "tolerance.py", "backends/registry.py", "backends/trust.py")
"""Sources in the package that a verdict on any backend depends on: what one is handed, what is asked of it, and who judges."""


@dataclass(frozen=True)
class Identity:
    """All that a verdict on a backend depends on."""

    gpu: str
    arch: str
    driver: str | None
    torch: str
    triton: str | None
    fingerprint: str


@dataclass(frozen=True)
class Verification(Identity):
    """A run of the tests in which this backend failed none: an entry of ``verified.json``."""

    backend: str
    commit: str
    date: str
    tests: dict[str, int]
    """How many passed in each arithmetic."""

    def covers(self, here: Identity, arithmetic: str) -> bool:
        """Whether what was found there holds here, too, in this arithmetic. Drivers are meant to be exchangeable."""
        same = all(getattr(self, name) == getattr(here, name) for name in ("gpu", "torch", "triton", "fingerprint"))
        return same and self.tests.get(arithmetic, 0) > 0

    @property
    def key(self) -> tuple[str, ...]:
        """What ``verified.json`` has one entry for, and the order of its entries."""
        return self.backend, self.gpu, self.torch, self.triton or ""


# What is here.


def fingerprint(backend: Backend) -> str:
    """16 hex digits that change with the sources of a backend: its file, or all code and tables of the package it is in, and
    what it names itself; and with what every verdict depends on.
    """
    return _fingerprint(type(backend), backend.sources())


@cache
def _fingerprint(cls: type[Backend], besides: str) -> str:
    digest = hashlib.sha256(besides.encode())
    own, sources = _sources(Path(inspect.getfile(cls)).resolve())
    package = Path(__file__).resolve().parents[1]
    for root, path in [*((own, path) for path in sources), *((package, package / name) for name in _COMMON)]:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def _sources(file: Path) -> tuple[Path, list[Path]]:
    """The folder and the files that belong to ``file``: alone if it stands beside this one or in no package."""
    own, root = Path(__file__).resolve().parent, file.parent
    if root == own or not (root / "__init__.py").exists():
        return root, [file]
    while root.parent != own and (root.parent / "__init__.py").exists():
        root = root.parent
    files = sorted(path for path in root.rglob("*") if path.suffix in (".py", ".json") and path.is_file())
    return root, [path for path in files if path.name != BUILT]


def identity(backend: Backend, device_index: int) -> Identity:
    """The backend with the CUDA device of that index and the versions that run."""
    properties = torch.cuda.get_device_properties(device_index)
    return Identity(
        gpu=properties.name,
        arch=architecture(properties),
        driver=nvidia_driver_version(),
        torch=str(torch.__version__),
        triton=_triton_version(),
        fingerprint=fingerprint(backend),
    )


def architecture(properties: Any) -> str:
    """``sm_90`` or ``gfx942``, from ``torch.cuda.get_device_properties``."""
    if torch.version.hip is not None:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def nvidia_driver_version() -> str | None:
    """The loaded NVIDIA driver's version, as Linux's ``/proc`` gives it; ``None`` where it does not."""
    try:
        found = re.search(r"\d+\.\d+(\.\d+)?", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return found.group() if found else None


@cache
def _triton_version() -> str | None:
    try:
        return str(importlib.import_module("triton").__version__)
    except Exception:  # an import can fail in any way
        return None


# What was verified before.


def read_verifications(path: Path) -> list[Verification]:
    """The entries of a file like ``verified.json``.

    Raises:
        ValueError: the file is none; the message names it and the entry.
    """
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, list):
        raise ValueError(f"{path} must hold a list of entries, got {type(found).__name__}")
    for index, entry in enumerate(found):
        if (fault := _fault_of_entry(entry)) is not None:
            raise ValueError(f"{path}: entry {index} {fault}")
    return [Verification(**entry) for entry in found]


def _fault_of_entry(entry: Any) -> str | None:
    kinds: dict[str, type | UnionType] = {field.name: str for field in fields(Verification)}
    kinds |= {"driver": str | None, "triton": str | None, "tests": dict}
    if not isinstance(entry, dict) or entry.keys() != kinds.keys():
        return f"must have the fields {', '.join(kinds)}, got {', '.join(entry) if isinstance(entry, dict) else repr(entry)}"
    wrong = next((name for name, kind in kinds.items() if not isinstance(entry[name], kind)), None)
    if wrong is None and not all(name in ARITHMETICS and isinstance(count, int) for name, count in entry["tests"].items()):
        wrong = "tests"
    return None if wrong is None else f"has {entry[wrong]!r} for {wrong}"


@cache
def _verified() -> list[Verification]:
    return read_verifications(VERIFIED)


def verifications(backend_name: str) -> list[Verification]:
    """The GPUs on which the tests of this backend passed, by the record that comes with the package.

    Raises:
        ValueError: that record is damaged.
    """
    return [entry for entry in _verified() if entry.backend == backend_name]


def verified_on(backend: Backend) -> list[VerifiedOn]:
    """``verifications`` as ``doctor`` tells them."""
    here = str(torch.__version__), _triton_version(), fingerprint(backend)
    return [
        {
            "gpu": entry.gpu,
            "arch": entry.arch,
            "torch": entry.torch,
            "triton": entry.triton,
            "commit": entry.commit,
            "date": entry.date,
            "current": (entry.torch, entry.triton, entry.fingerprint) == here,
        }
        for entry in verifications(backend.name)
    ]


def record(commit: str, date: str, tests: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    """New entries for ``verified.json``, of the current CUDA device.

    Args:
        commit: that of the code that was tested.
        date: when.
        tests: how many tests of a backend passed on the device, by its name and by arithmetic; none may have failed.
    """
    found = []
    for backend in map(registry.get, registry.names()):
        counts = {name: count for name, count in tests.get(backend.name, {}).items() if count}
        if backend.needs_verification and backend.probe() is None and counts:
            here = identity(backend, torch.cuda.current_device())
            found.append(Verification(**asdict(here), backend=backend.name, commit=commit, date=date, tests=counts))
    return [asdict(entry) for entry in found]


# What automatic choice asks.

_answers: dict[tuple[str, int | None, str], str | None] = {}
_answering = RLock()  # so that a check runs once, whichever thread asks


def _renew_lock() -> None:
    """In a forked process nobody is left to release the lock if another thread held it."""
    global _answering
    _answering = RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def doubt(backend: Backend, problem: Problem) -> str | None:
    """Why automatic choice is not to use ``backend`` for problems of this device and arithmetic, or None.

    For ``Backend.doubt``. Runs a self-check if nothing is known yet, and says so; where none can run now, that is a
    ``Hindrance``.
    """
    device = problem.device
    if device.type != "cuda":
        return None
    key = backend.name, device.index, arithmetic(problem.dtype)
    if key in _answers:
        return _answers[key]
    if not torch.cuda.is_available():
        return None
    if device.index is None:
        return doubt(backend, replace(problem, device=torch.device("cuda", torch.cuda.current_device())))
    with _answering:
        if key in _answers:
            return _answers[key]
        here = identity(backend, device.index)
        if _known(backend, here, key[-1]) is not None:
            _answers[key] = None
        elif (hindrance := _hindrance(device)) is not None:
            return Hindrance(hindrance)
        else:
            try:
                _answers[key] = _check(backend, problem, here)
            except torch.OutOfMemoryError as error:
                said = f"its self-check on this device ran out of memory and is to be run again: {first_line(error)}"
                return Hindrance(said)
        return _answers[key]


def standing(backend: Backend) -> dict[str, str]:
    """What automatic choice makes of ``backend`` on the current CUDA device, by arithmetic. Checks nothing.

    Of each arithmetic that the backend supports: "verified by record", "self-check passed", "self-check failed" or "to be
    checked at first use". Empty without a device.
    """
    if backend.probe() is not None or not torch.cuda.is_available():
        return {}
    device = torch.device("cuda", torch.cuda.current_device())
    here = identity(backend, device.index)
    found = {}
    for name, dtype in ARITHMETICS.items():
        if name in backend.arithmetics and _runs(backend, Problem(device, dtype, None)):
            failed = _answers.get((backend.name, device.index, name)) is not None
            known = "self-check failed" if failed else _known(backend, here, name)
            found[name] = known or "to be checked at first use"
    return found


def _known(backend: Backend, here: Identity, arithmetic: str) -> str | None:
    """How it is known that ``backend`` is right here, in the words of ``standing``, or None if it is not."""
    if any(entry.covers(here, arithmetic) for entry in verifications(backend.name)):
        return "verified by record"
    return "self-check passed" if _remembered(backend, here, arithmetic) in _passed() else None


def _remembered(backend: Backend, here: Identity, arithmetic: str) -> dict[str, str | None]:
    """A self-check that passed as the user's cache has it."""
    return {"backend": backend.name, "arithmetic": arithmetic, **asdict(here)}


def _hindrance(device: torch.device) -> str | None:
    """Why no self-check can run just now, or None."""
    with nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            return "its self-check on this device cannot run while a CUDA graph is captured: call the model once before"
    # Not a documented interface. A dispatch mode, such as that of fake tensors, would see all that a self-check does. Inside
    # our operators none is left, but ``fuse`` asks outside of them.
    if torch.compiler.is_compiling() or getattr(torch._C, "_len_torch_dispatch_stack", int)():
        return "its self-check on this device cannot run while the model is traced: call the model once before"
    return None


def _check(backend: Backend, problem: Problem, here: Identity) -> str | None:
    """Runs the self-check, says so before and after and, if it passed, remembers it.

    Raises:
        torch.OutOfMemoryError: as ``self_check``.
    """
    name = arithmetic(problem.dtype)
    _warn(
        f"backend {backend.name!r} has not been verified on {here.gpu} in {name}: checking it once, which takes as long as "
        "compiling some kernels"
    )
    began = time.perf_counter()
    fault = self_check(backend, problem)
    seconds = time.perf_counter() - began
    what = f"the self-check of backend {backend.name!r} on {here.gpu} in {name}"
    if fault is not None:
        logger.warning("%s failed: %s: automatic choice passes it over", what, fault)
        return f"its self-check on this device failed: {fault}"
    logger.warning("%s passed in %.1f s: automatic choice uses it", what, seconds)
    _remember(_remembered(backend, here, name))
    return None


def _passed() -> list[Any]:
    """The self-checks that passed, as the user's cache has them: none where it cannot be trusted or read."""
    try:
        path = cache_folder() / REMEMBERED
        found = read_json(path)
        if found is not None and not isinstance(found, list):
            raise ValueError(f"{path} holds no list: remove it")
    except (OSError, ValueError) as error:
        _warn(f"self-checks that passed before are not known and run anew: {error}")
        return []
    return found or []


def _remember(check: Mapping[str, str | None]) -> None:
    try:
        write_json(cache_folder() / REMEMBERED, [*_passed(), check][-KEPT:])
    except (OSError, ValueError) as error:
        _warn(f"a self-check that passed is not remembered and will run anew: {error}")


@cache
def _warn(message: str) -> None:
    logger.warning(message)


# The self-check.

_ODD = InceptionSpec(13, 7, 11, 17, 3, 5, 19)
_RUNS: tuple[tuple[InceptionSpec | None, tuple[int, int, int]], ...] = (
    (None, (2, 15, 11)),
    (replace(_ODD, large_kernel=3), (3, 6, 9)),
    (_ODD, (3, 6, 9)),
    (replace(GOOGLENET_SPECS["4a"], large_kernel=3), (1, 14, 14)),
    (GOOGLENET_SPECS["5a"], (2, 7, 7)),
)
"""Widths that no kernel likes and GoogLeNet's, with batch, height and width; None is the stem's convolution."""

_IN_ALL_WAYS: tuple[InceptionSpec, tuple[int, int, int]] = (InceptionSpec(64, 32, 32, 64, 16, 32, 32, 3), (801, 11, 11))
"""What runs in every way of the backend, channels_last. Its widths are aligned, so that descriptors apply; two images fit in a
tile of Triton's branch kernel and of the CUDA kernel, which leaves a last one with half as many; and its tiles are more than
the two for each of up to 200 multiprocessors that a persistent grid takes at once."""

_FENCE = 256
"""Elements on either side of an output; a multiple of what any kernel aligns to."""


def self_check(backend: Backend, problem: Problem) -> str | None:
    """Why ``backend`` is not to be trusted on the problem's device and in its dtype, or None.

    A few small modules, contiguous and channels_last, are judged by ``tolerance`` against the plain ones, which run under the
    flags of torch that are in force; one of them in all ``Backend.ways``. No random state of the caller's moves.

    Raises:
        torch.OutOfMemoryError: the device has too little memory left to tell.
    """
    runs = _runs(backend, problem)
    for one, shape in runs:
        for layout in (torch.contiguous_format, torch.channels_last):
            fault = _fault(backend, one, shape, layout, lambda _: {"": nullcontext()})
            if fault is not None:
                return fault
    spec, shape = _IN_ALL_WAYS
    if backend.supports(one := replace(problem, spec=spec)) is None:
        return _fault(backend, one, shape, torch.channels_last, backend.ways)
    return None if runs else "it supports none of the modules of the self-check"


def _runs(backend: Backend, problem: Problem) -> list[tuple[Problem, tuple[int, int, int]]]:
    """The modules of a self-check that the backend supports, with the batch, height and width of their inputs."""
    runs = [(replace(problem, spec=spec), shape) for spec, shape in _RUNS]
    return [(one, shape) for one, shape in runs if backend.supports(one) is None]


def _fault(
    backend: Backend,
    problem: Problem,
    shape: tuple[int, int, int],
    layout: torch.memory_format,
    ways: Callable[[Problem], Mapping[str, AbstractContextManager[None]]],
) -> str | None:
    """What is wrong with one module in the first of ``ways`` in which something is, or None."""
    where = what = f"{problem}, {str(layout).removeprefix('torch.')}"
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(problem.device.type, enabled=False):
            found = ways(problem)
            if not found:
                return None
            plain = _plain(problem.spec).to(problem.device, problem.dtype)
            x = _input(plain, shape).to(problem.device, problem.dtype).contiguous(memory_format=layout)
            run, plain_results = _fused(backend, plain, x, problem.spec), references(plain, x)
            for way, context in found.items():
                where = f"{what}, {way}" if way else what
                with context:
                    first = run()
                    comparison, same = compare(first, *plain_results), torch.equal(first, run())
                    if problem.device.type == "cuda":
                        torch.cuda.synchronize(problem.device)
                if not comparison.ok or not same:
                    return f"{where}: {'two runs on one input differ' if comparison.ok else comparison}"
    except Exception as error:  # whatever a backend, its compiler or the device raises
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            raise torch.OutOfMemoryError(first_line(error)) from error
        return f"{where}: {type(error).__name__}: {first_line(error)}"
    return None


def _input(plain: nn.Module, shape: tuple[int, int, int]) -> Tensor:
    """A random input of this batch, height and width for a module, in fp32 on the CPU."""
    channels = next(module.in_channels for module in plain.modules() if isinstance(module, nn.Conv2d))
    n, h, w = shape
    generator = torch.Generator("cpu").manual_seed(1)
    return torch.randn(n, channels, h, w, generator=generator, device="cpu", dtype=torch.float32)


def _plain(spec: InceptionSpec | None) -> nn.Module:
    """A module with random parameters on the CPU."""
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        if spec is None:
            plain: nn.Module = BasicConv2d(3, 11, norm=None, kernel_size=7, stride=2, padding=3)
        else:
            plain = Inception.from_spec(spec, norm=None)
    return randomize_(plain).eval()


def _fused(backend: Backend, plain: nn.Module, x: Tensor, spec: InceptionSpec | None) -> Callable[[], Tensor]:
    """What runs the parameters of ``plain`` on ``x`` by the backend, into a new output each time."""
    layers = [module for module in plain.modules() if isinstance(module, nn.Conv2d)]
    convs = [ConvParams(layer.weight, layer.bias) for layer in layers]
    if spec is None:
        (layer,), (conv,) = layers, convs
        weight, bias = map(Tensor.detach, fold_batch_norm(conv, x.dtype))
        stride, padding = layer.stride, [int(side) for side in layer.padding]
        prepared = backend.prepare_conv2d(weight, stride, padding, x.shape)
        return lambda: backend.conv2d_relu(x, weight, bias, prepared, stride, padding)

    packed = PackedInception(*map(Tensor.detach, pack_inception(convs, x.dtype)))
    prepared = backend.prepare(packed, x.shape)

    def run() -> Tensor:
        out, fences = _poisoned(x, spec.out_channels)
        backend.inception(x, packed, prepared, out)
        if not all(fence.isnan().all() for fence in fences):
            raise RuntimeError("it wrote outside its output")
        return out

    return run


def _poisoned(x: Tensor, channels: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """An output for ``x`` in its memory format, and what lies before and behind it in memory, all of it NaN."""
    n, _, h, w = x.shape
    memory = x.new_full((n * channels * h * w + 2 * _FENCE,), float("nan"))
    inner = memory[_FENCE:-_FENCE]
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    out = inner.view(n, h, w, channels).permute(0, 3, 1, 2) if channels_last else inner.view(n, channels, h, w)
    return out, (memory[:_FENCE], memory[-_FENCE:])

"""Triton kernels compiled ahead of time, for architectures that need not be here."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import inspect
import io
import os
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple, Protocol

from benchmarks.audit.limits import LIMITS

CACHE = "TRITON_CACHE_DIR"


def source_key(variant: Variant) -> str:
    """A short name for what decides, but for the compiler, what a variant compiles to: its module's code, its launch.

    Of the code neither comments and docstrings nor the places of lines count.
    """
    specialised = (variant.signature, variant.constexprs, variant.attrs, variant.options)
    return hashlib.sha256(f"{_code_of(variant.fn.__module__)}{specialised}".encode()).hexdigest()[:16]


@cache
def _code_of(module: str) -> str:
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body[0] = ast.Pass()
    return ast.unparse(tree)


class AuditError(Exception):
    """The audit cannot be made; the message says why and what to do."""


class MissingTool(AuditError):
    """Something that it needs is not on this machine."""


class Variant(Protocol):
    """A kernel as it is launched: what a list of kernels to audit is made of.

    ``signature``, ``constexprs`` and ``attrs`` are those of Triton's ``ASTSource``. ``matrix`` says that it must use the matrix
    units. A variant may say ``aligned = True`` as well: then no access to global memory may be narrower than its architecture
    likes it (``limits.py``), but for those on lines of source with a comment ``narrow: why``.
    """

    kernel: str
    fn: Any
    label: str
    dtype: str
    arches: Iterable[str]
    signature: Mapping[str, str]
    constexprs: Mapping[Any, Any]
    attrs: Mapping[tuple[int, ...], list[list[Any]]]
    options: Mapping[str, Any]
    matrix: bool


class Binary(NamedTuple):
    """A compiled kernel: its name in the machine code, and that code as Triton holds it (``ptx`` and ``cubin``, or ``amdgcn``).

    ``shared`` is the dynamic shared memory of its launch in bytes, ``tensor_memory`` in columns.
    """

    name: str
    code: Mapping[str, Any]
    threads: int
    shared: int
    tensor_memory: int


def load(source: str) -> list[Variant]:
    """The variants of ``MODULE:FUNCTION``, a function without arguments.

    Raises:
        AuditError: Triton is missing or interprets, the function cannot be had, or what it gives cannot be audited.
    """
    try:
        triton: Any = importlib.import_module("triton")
    except ImportError as error:
        raise AuditError(f"triton cannot be imported ({error}): pip install triton") from error
    if triton.knobs.runtime.interpret:
        raise AuditError("TRITON_INTERPRET is set, and an interpreted kernel is not compiled: unset it")
    module, _, function = source.partition(":")
    try:
        list_them = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise AuditError(f"--variants: there is no {source} ({error}): name a MODULE:FUNCTION") from error
    try:
        variants = list(list_them())
        names = [f"{variant.kernel}, {variant.label}, {variant.dtype}" for variant in variants]
    except (TypeError, AttributeError) as error:
        raise AuditError(
            f"--variants: {source} gives no variants ({error}): name a function without arguments that does"
        ) from error
    seen = set()
    for variant, name in zip(variants, names, strict=True):
        if not isinstance(variant.fn, triton.JITFunction):
            raise AuditError(f"{source}: {name}: fn must be a triton.JITFunction, got {type(variant.fn).__name__}")
        if unknown := [arch for arch in variant.arches if arch not in LIMITS]:
            raise AuditError(f"{source}: {name}: arches must be among {', '.join(LIMITS)}, got {unknown[0]!r}")
        if name in seen:
            raise AuditError(f"{source}: there are two {name}: give them labels that tell them apart")
        seen.add(name)
    return variants


def compile_variant(variant: Variant, arch: str) -> Binary:
    """The variant's machine code for an architecture. Whatever Triton's compiler raises, it raises."""
    compiler: Any = importlib.import_module("triton.compiler")
    gpu = importlib.import_module("triton.backends.compiler").GPUTarget
    target = gpu("hip", arch, 64) if arch.startswith("gfx") else gpu("cuda", int(arch.removeprefix("sm_")), 32)
    source = compiler.ASTSource(variant.fn, dict(variant.signature), dict(variant.constexprs), dict(variant.attrs))
    with contextlib.redirect_stdout(io.StringIO()):  # a kernel that ptxas refuses is printed whole
        compiled = compiler.compile(source, target=target, options=dict(variant.options))
    metadata = compiled.metadata
    threads = metadata.num_warps * target.warp_size
    return Binary(metadata.name, compiled.asm, threads, metadata.shared, getattr(metadata, "tmem_size", None) or 0)


def versions() -> dict[str, Any]:
    """Of Triton and of the assemblers it brings; from sm_100 on it is ptxas-blackwell."""
    triton: Any = importlib.import_module("triton")
    tools = {"ptxas": triton.knobs.nvidia.ptxas, "ptxas-blackwell": triton.knobs.nvidia.ptxas_blackwell}
    return {"triton": triton.__version__, "ptxas": {name: tool.version for name, tool in tools.items()}}


def keep_cache_in(folder: str) -> None:
    """Lets Triton keep what it compiled in ``folder``, unless the environment says where."""
    os.environ.setdefault(CACHE, folder)

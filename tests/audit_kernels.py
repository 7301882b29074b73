"""Small Triton kernels, good ones and one for each thing that an audit finds. Imported by the audit itself, never by a test."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

NVIDIA = ("sm_80", "sm_90")


class Variant(NamedTuple):
    kernel: str
    fn: Any
    label: str
    dtype: str
    arches: tuple[str, ...]
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, Any]
    matrix: bool
    aligned: bool = False


@triton.jit
def dot(x, w, bias, out, channels, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """out [M, N] = x [M, channels] @ w [N, channels].T + bias [N]."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    sums = tl.zeros((M, N), tl.float32)
    for c in range(0, channels, K):
        a = tl.load(x + m[:, None] * channels + c + k[None, :])
        b = tl.load(w + n[None, :] * channels + c + k[:, None])
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    sums += tl.load(bias + n)[None, :]  # narrow: a bias a thread
    tl.store(out + m[:, None] * N + n[None, :], sums.to(out.dtype.element_ty))


@triton.jit
def tensor_dot(x, w, out, channels, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """As ``dot`` without bias, through tensor descriptors."""
    sums = tl.zeros((M, N), tl.float32)
    for c in range(0, channels, K):
        sums = tl.dot(x.load([0, c]), w.load([0, c]).T, sums)
    out.store([0, 0], sums.to(tl.float16))


@triton.jit
def _masked(pointer, i, n):
    return tl.load(pointer + i, mask=i < n)


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out [n] = x [n] + y [n]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    tl.store(out + i, _masked(x, i, n) + _masked(y, i, n), mask=i < n)


@triton.jit
def mismatched(out, K: tl.constexpr):
    sums = tl.dot(tl.zeros((16, 16), tl.float16), tl.zeros((K, 16), tl.float16))
    tl.store(out + tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :], sums)


@triton.jit
def refused(out):
    tl.store(out, tl.inline_asm_elementwise("no such $0, $1;", "=r,r", [1], dtype=tl.int32, is_pure=True, pack=1))


def _aligned(signature: dict[str, str]) -> dict[tuple[int, ...], list[list[Any]]]:
    """All pointers and numbers are multiples of 16."""
    return {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] in "*i"}


def _dot(label: str, dtype: str = "fp16", *, tile: tuple[int, int, int] = (64, 64, 32), **changes: Any) -> Variant:
    kind = {"tf32": "fp32"}.get(dtype, dtype)
    numbers = {**dict(zip("MNK", tile, strict=True)), "PRECISION": "ieee" if dtype == "fp32" else "tf32"}
    pointers = {name: f"*{kind}" for name in ("x", "w", "bias", "out")}
    signature = {**pointers, "channels": "i32", **dict.fromkeys(numbers, "constexpr")}
    options = {"num_warps": 4, "num_stages": 3}
    arches = (*NVIDIA, "gfx942")
    variant = Variant("dot", dot, label, dtype, arches, signature, numbers, _aligned(signature), options, dtype != "fp32", True)
    return variant._replace(**changes)


def _add(label: str, **changes: Any) -> Variant:
    numbers = {"BLOCK": 1024, "PDL": False}
    signature = {"x": "*fp16", "y": "*fp16", "out": "*fp16", "n": "i32", **dict.fromkeys(numbers, "constexpr")}
    variant = Variant("add", add, label, "fp16", NVIDIA, signature, numbers, _aligned(signature), {"num_warps": 4}, False, True)
    return variant._replace(**changes)


def variants() -> Iterator[Any]:
    yield _dot("good", arches=(*NVIDIA, "sm_100", "sm_120", "gfx942"))
    yield _dot("good", "tf32", arches=NVIDIA)
    yield _dot("good", "fp32", arches=("sm_80",))
    numbers = {"M": 64, "N": 64, "K": 32}
    descriptors = {"x": "tensordesc<fp16[64, 32]>", "w": "tensordesc<fp16[64, 32]>", "out": "tensordesc<fp16[64, 64]>"}
    signature = {**descriptors, "channels": "i32", **dict.fromkeys(numbers, "constexpr")}
    arches = ("sm_90", "sm_100")
    yield Variant("tensor_dot", tensor_dot, "good", "fp16", arches, signature, numbers, _aligned(signature), {}, True, True)
    yield _add("good", constexprs={"BLOCK": 1024, "PDL": True}, arches=("sm_90",), options={"launch_pdl": True})

    yield _dot("spilling", tile=(64, 256, 16), options={"num_warps": 2}, arches=NVIDIA)
    yield _dot("too much shared memory", tile=(64, 64, 128), options={"num_stages": 9})
    yield _add("no matrix units", matrix=True)
    yield _dot("unaligned", attrs={})
    yield _dot("unaligned and not said to be", attrs={}, aligned=False, arches=("sm_80",))
    yield _add("unaligned", attrs={}, arches=("sm_90",))
    numbers = {"K": 32}
    signature = {"out": "*fp32", "K": "constexpr"}
    yield Variant("mismatched", mismatched, "16 by 32", "fp16", ("sm_80",), signature, numbers, {}, {}, True)
    yield Variant("refused", refused, "by ptxas", "fp16", ("sm_80",), {"out": "*i32"}, {}, {}, {}, False)
    yield _Crashing(_add("crashing", arches=("sm_80",)))
    yield _add("after a crash", arches=("sm_80",))


class _Crashing:
    """Takes down the process that compiles it."""

    def __init__(self, variant: Variant) -> None:
        self._variant = variant

    def __getattr__(self, name: str) -> Any:
        if name == "signature" and multiprocessing.parent_process() is not None:
            os._exit(3)
        return getattr(self._variant, name)

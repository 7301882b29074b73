"""Probe E4: does Triton keep a 4-D tile that the copy engine loaded in shared memory on its way to wgmma?

Compiles small kernels for sm_90 (no GPU is needed) that load a [1, TH, TW, BC] tile of an NHWC tensor through a tensor
descriptor, reshape it to [TH * TW, BC] and hand it to `tl.dot`, and reads the TTGIR and the PTX of the loop. Cases: the pixels
as the first operand (M) and as the second (N, transposed), each from a 4-D tile and, as a control, from a 2-D tile of the same
size that needs no reshape; 4 and 8 warps.

Verdict of a case, from the PTX of the basic blocks that hold wgmma and from the loads of the tile in the TTGIR:
  "shared"      wgmma reads the pixels through a shared-memory descriptor, where the copy engine put them
  "registers"   the tile is read from shared memory into registers (ldmatrix), where wgmma takes it; nothing is written back
  "round_trip"  the loop writes shared memory (st.shared or stmatrix): the tile goes to registers and back before wgmma

Prints one JSON line. Exit status: 0 when every case compiled, 1 when one did not, 2 when Triton cannot be imported.
Run: python benchmarks/probes/e4_triton_tma.py
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

try:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ImportError as error:
    print(json.dumps({"probe": "E4", "ok": False, "skipped": f"triton cannot be imported: {error}"}))
    sys.exit(2)

ARCH = 90
TILE_ROWS, TILE_COLUMNS, TILE_CHANNELS, OUTPUT_CHANNELS = 8, 16, 64, 64
TILE_PIXELS = TILE_ROWS * TILE_COLUMNS


@triton.jit
def pixels_first(
    x, w, out, channels, TH: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, FLAT: tl.constexpr
):
    """out[TH * TW, BN] = pixels x weights; `w` is [channels, BN]."""
    acc = tl.zeros([TH * TW, BN], dtype=tl.float32)
    for c in range(0, channels, BC):
        if FLAT:
            tile = x.load([tl.program_id(0) * TH * TW, c])
        else:
            tile = x.load([0, tl.program_id(0) * TH, 0, c]).reshape(TH * TW, BC)
        acc = tl.dot(tile, w.load([c, 0]), acc)
    tl.store(out + tl.arange(0, TH * TW)[:, None] * BN + tl.arange(0, BN)[None, :], acc)


@triton.jit
def pixels_second(
    x, w, out, channels, TH: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, FLAT: tl.constexpr
):
    """out[BN, TH * TW] = weights x pixels transposed; `w` is [BN, channels]."""
    acc = tl.zeros([BN, TH * TW], dtype=tl.float32)
    for c in range(0, channels, BC):
        if FLAT:
            tile = x.load([tl.program_id(0) * TH * TW, c])
        else:
            tile = x.load([0, tl.program_id(0) * TH, 0, c]).reshape(TH * TW, BC)
        acc = tl.dot(w.load([0, c]), tile.T, acc)
    tl.store(out + tl.arange(0, BN)[:, None] * (TH * TW) + tl.arange(0, TH * TW)[None, :], acc)


def loop_blocks(ptx: str) -> list[str]:
    """The basic blocks of `ptx` (split at labels and at branches) that hold a wgmma."""
    blocks = re.split(r"^\s*\$L\w+:|^\s*(?:@!?%p\d+\s+)?bra[^;]*;", ptx, flags=re.MULTILINE)
    return [block for block in blocks if "wgmma.mma_async" in block]


def ptx_counts(ptx: str) -> dict[str, int]:
    """How often the loop of `ptx` reads and writes shared memory outside wgmma, and where wgmma's first operand is."""
    text = "\n".join(loop_blocks(ptx))
    calls = re.findall(r"wgmma\.mma_async\S*\s*\{[^}]*\}\s*,\s*(\{|%rd)", text)
    return {
        "wgmma": len(re.findall(r"wgmma\.mma_async", text)),
        "wgmma_first_operand_registers": calls.count("{"),
        "wgmma_first_operand_descriptor": calls.count("%rd"),
        "ldmatrix": len(re.findall(r"\bldmatrix\.", text)),
        "ld_shared": len(re.findall(r"\bld\.shared", text)),
        "st_shared": len(re.findall(r"\bst\.shared", text)),
        "stmatrix": len(re.findall(r"\bstmatrix\.", text)),
    }


def ttgir_counts(ttgir: str, tile: str) -> dict[str, int]:
    """Operations of `ttgir` on shared memory; `tile` is the pixel tile's shape as types spell it, such as "1x8x16x64"."""
    return {
        "tile_local_load": len(re.findall(rf"ttg\.local_load [^\n]*memdesc<{tile}xbf16", ttgir)),
        "tile_memdesc_reshape": len(re.findall(rf"ttg\.memdesc_reshape [^\n]*memdesc<{tile}xbf16", ttgir)),
        "operand_local_alloc": len(re.findall(r"ttg\.local_alloc %[^\n]*tensor<[^\n]*xbf16", ttgir)),
    }


def verdict(counts: dict[str, int], second: bool) -> str:
    """See the module's docstring; `second` says that the pixels are wgmma's second operand, which is always in shared memory.

    Raises ValueError when the loop holds no wgmma or its operands could not be read.
    """
    found = counts["wgmma_first_operand_registers"] + counts["wgmma_first_operand_descriptor"]
    if not counts["wgmma"] or found != counts["wgmma"]:
        raise ValueError(f"expected wgmma with a readable first operand in the loop, found {counts}")
    if counts["st_shared"] or counts["stmatrix"]:
        return "round_trip"
    if counts["tile_local_load"] or (not second and counts["wgmma_first_operand_registers"]):
        return "registers"
    return "shared"


def compile_case(second: bool, flat: bool, warps: int) -> dict[str, Any]:
    """Compiles one case and returns its counts and its verdict.

    Raises whatever triton.compile raises, and ValueError when the code is not what the probe can read.
    """
    tile = [TILE_PIXELS, TILE_CHANNELS] if flat else [1, TILE_ROWS, TILE_COLUMNS, TILE_CHANNELS]
    weights = [OUTPUT_CHANNELS, TILE_CHANNELS] if second else [TILE_CHANNELS, OUTPUT_CHANNELS]
    constants = {"TH": TILE_ROWS, "TW": TILE_COLUMNS, "BC": TILE_CHANNELS, "BN": OUTPUT_CHANNELS, "FLAT": flat}
    signature = {
        "x": f"tensordesc<bf16{tile}>",
        "w": f"tensordesc<bf16{weights}>",
        "out": "*fp32",
        "channels": "i32",
        **dict.fromkeys(constants, "constexpr"),
    }
    source = ASTSource(fn=pixels_second if second else pixels_first, signature=signature, constexprs=constants)
    options = {"num_warps": warps, "num_stages": 3, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", ARCH, 32), options=options)
    ptx = compiled.asm["ptx"]
    shape = "x".join(map(str, tile))
    counts = ptx_counts(ptx) | ttgir_counts(compiled.asm["ttgir"], shape)
    return {
        "pixels": "second (N)" if second else "first (M)",
        "tile": shape,
        "warps": warps,
        "verdict": verdict(counts, second),
        **counts,
        "tma_loads": len(re.findall(r"\bcp\.async\.bulk\.tensor\.", ptx)),
        "shared_bytes": compiled.metadata.shared,
    }


def main() -> int:
    """Compiles the cases, prints the JSON line and returns the exit status."""
    cases: list[dict[str, Any]] = []
    errors: list[str] = []
    for second in (False, True):
        for flat in (False, True):
            for warps in (4, 8):
                try:
                    cases.append(compile_case(second, flat, warps))
                except Exception as error:  # a compiler's errors have no common base but this
                    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                    errors.append(f"second={second} flat={flat} warps={warps}: {reason}")

    def worst(second: bool, flat: bool) -> str:
        """The farthest from "shared" that the cases of this kind came, or "unknown"."""
        order = ["shared", "registers", "round_trip"]
        operand = "second (N)" if second else "first (M)"
        found = [c["verdict"] for c in cases if c["pixels"] == operand and (c["tile"].count("x") == 1) == flat]
        return max(found, key=order.index) if found else "unknown"

    answers = {
        "tile_4d_as_first_operand": worst(False, False),
        "tile_4d_as_second_operand": worst(True, False),
        "tile_2d_as_first_operand": worst(False, True),
        "tile_2d_as_second_operand": worst(True, True),
    }
    stays = answers["tile_4d_as_first_operand"] == answers["tile_4d_as_second_operand"] == "shared"
    result = {
        "probe": "E4",
        "ok": not errors,
        "arch": f"sm_{ARCH}",
        "triton": triton.__version__,
        "stays_in_shared_memory": stays if cases else None,
        **answers,
        "cases": cases,
        "errors": errors,
    }
    print(json.dumps(result))
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())

"""The audit of the GPU kernels: it reads machine code right, and finds what it is for, in kernels that are compiled here."""

from __future__ import annotations

import fcntl
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from benchmarks import reading
from benchmarks.audit import __main__ as command
from benchmarks.audit import record, rows, tools
from benchmarks.audit.compile import AuditError, Binary, load
from benchmarks.audit.limits import LIMITS
from benchmarks.audit.machine_code import (
    Access,
    Listing,
    Resources,
    amd_resources,
    read_amdgcn,
    read_ptx,
    read_sass,
    resources_of,
    sass_of,
)
from benchmarks.audit.rows import Row, findings, name_of, narrow_accesses
from benchmarks.audit.show import print_audit

ROOT = Path(__file__).resolve().parents[1]
KERNELS = Path(__file__).with_name("audit_kernels.py")

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def compiles(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test of ``audited``."""
    return pytest.mark.slow(needs_triton(test))


def line_of(text: str) -> str:
    """Where the one line of the test's kernels that holds the text is, as findings say it."""
    (found,) = (number for number, line in enumerate(KERNELS.read_text().splitlines(), 1) if text in line)
    return f"tests/audit_kernels.py:{found}"


def row(**changes: Any) -> Row:
    """A row without fault."""
    facts = {"threads": 128, "registers": 255, "stack": 0, "shared": 0, "dynamic_shared": 0, "tensor_memory": 0}
    facts |= {"spill_stores": 0, "spill_loads": 0, "matrix": {"mma": 1}, "machine_matrix": {"HMMA": 1}}
    facts |= {"load_bytes": {"4": 1, "8": 1, "16": 3}, "store_bytes": {"16": 1}, "copy_bytes": {}}
    facts |= {"tma": 0, "griddepcontrol": 0}
    return {"kernel": "dot", "label": "3a", "dtype": "fp16", "arch": "sm_80", **facts, **changes}


PTX = """
	.visible .entry dot(.param .u64 .ptr .global .align 1 dot_param_0)
	ld.param.b64 	%rd1, [dot_param_0];
	.loc	1 12 9                          // dot.py:12:9
	mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %r1 }, { %r2 }, { %r3 }, { %r4 };
	mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %r1 }, { %r2 }, { %r3 }, { %r4 };
	mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 { %r1 }, { %r2 }, { %r3 }, { %r4 };
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r1,%r2}, %rd1, %rd2, %p4, 1, 1, 0, 0;
	@%p14 tcgen05.mma.cta_group::1.kind::f16 [ %r133 + 0 ], %rd19, %rd20, %r34, %p13;
	tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%rd1];
	.loc	2 7 20, function_name $L__info_string0, inlined_at 1 12 9
	// begin inline asm
	.loc	2 7 20, function_name $L__info_string0, inlined_at 1 12 9
	mov.u32 %r2, 0x0;
	.loc	2 8 20, function_name $L__info_string0, inlined_at 1 12 9
	@%p1 ld.global.L1::evict_last.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd1 + 0 ];
	// end inline asm
	ld.global.nc.b16 %rs1, [%rd1];
	ld.v2.u64 {%rd1, %rd2}, [%rd3];
	ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r9];
	st.shared::cta.b32 [%r9], %r1;
	.loc	1 20 5
	{ .reg .pred p; setp.ne.b32 p, %r1, 0; @p st.global.v2.f32 [%rd1], {%f1, %f2}; }
	cp.async.cg.shared.global [ %r30 + 0 ], [ %rd2 + 0 ], 0x10, %r31;
	cp.async.cg.shared.global [%r30], [%rd2], 16;
	cp.async.ca.shared.global [%r30], [%rd2], 4;
	cp.async.commit_group;
	cp.async.wait_group 	0x2;
	cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2, %r3}], [%r4];
	cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {%r2, %r3}], [%r1];
	cp.async.bulk.commit_group;
	griddepcontrol.wait; // dummy %r1
	.file	1 "/src/dot.py"
	.file	2 "/src/helper.py", 1700000000, 4096
"""


def test_ptx_is_read() -> None:
    found = read_ptx(PTX)
    assert found.matrix == {
        "mma.m16n8k16.f32.f16": 2,
        "mma.m16n8k8.f32.tf32": 1,
        "wgmma.m64n64k16.f32.bf16": 1,
        "tcgen05.mma.f16": 1,
    }
    # A place within inline assembly is LLVM's count of its lines, not the source's.
    assert found.accesses == [
        Access("load", 16, ("/src/helper.py", 7)),
        Access("load", 2, ("/src/helper.py", 7)),
        Access("load", 16, ("/src/helper.py", 7)),
        Access("store", 8, ("/src/dot.py", 20)),
        Access("copy", 16, ("/src/dot.py", 20)),
        Access("copy", 16, ("/src/dot.py", 20)),
        Access("copy", 4, ("/src/dot.py", 20)),
    ]
    assert (found.tma, found.griddepcontrol) == (2, 1)


SASS = """
//--------------------- .text.other                  --------------------------
.text.other:
        /*0000*/                   LDG.E.U8 R1, desc[UR4][R2.64] ;
.L_x_0:
//--------------------- .text.dot                  --------------------------
	.section	.text.dot,"ax",@progbits
dot:
.text.dot:
	//## File "/src/dot.py", line 9
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0040*/                   HFMA2.MMA R4, R4, 1, 1, R8 ;
        /*0050*/                   HMMA.16816.F32 R4, R4, R1, R8 ;
        /*0050*/                   HMMA.16816.F32 R4, R4, R1, R8 ;
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/              @UP0 UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11] ;
        /*0120*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0120*/              @!P0 LDG.E.LTC128B.64.CONSTANT R4, desc[UR4][R2.64] ;
        /*0130*/               @P2 LDG.E.U16 R94, [R28.64]             &rd=0x2          ?trans1;
        /*0140*/                   LD.E R0, [R2.64] ;
        /*0150*/                   STG.E.ENL2.256 desc[UR4][R2.64], R4, R8 ;
        /*0150*/                   ST.E.S8 [R2.64], R4 ;
        /*0160*/                   LDGSTS.E.BYPASS.LTC128B.128 [R5], desc[UR8][R64.64], P0 ;
        /*0160*/                   LDGSTS.E [R5], desc[UR8][R64.64] ;
        /*0170*/                   LDGDEPBAR ;
        /*0180*/                   LDS.128 R4, [R5] ;
        /*0190*/                   STL.64 [R1+0x8], R4 ;
        /*0190*/                   STL [R1], R4 ;
        /*01a0*/                   LDL.LU.S16 R4, [R1] ;
        /*01b0*/                   UTMALDG.2D [UR8], [UR4] ;
        /*01b0*/                   UTMASTG.2D [UR8], [UR4] ;
        /*01c0*/                   UTMACMDFLUSH ;
        /*01d0*/                   ACQBULK ;
        /*01e0*/                   PREEXIT ;
        /*01f0*/               @P0 EXIT ;
"""


def test_sass_is_read() -> None:
    found = read_sass(sass_of(SASS, "dot"))
    assert found.matrix == {"HMMA.16816.F32": 2, "HGMMA.64x64x16.F32.BF16": 1, "UTCHMMA": 1}
    sizes = [("load", 16), ("load", 8), ("load", 2), ("load", 4), ("store", 32), ("store", 1), ("copy", 16), ("copy", 4)]
    assert [access[:2] for access in found.accesses] == sizes
    assert (found.local_stores, found.local_loads) == (12, 2)
    assert (found.tma, found.griddepcontrol) == (2, 2)


def test_a_kernel_is_found_among_others() -> None:
    assert read_sass(sass_of(SASS, "other")).accesses == [Access("load", 1)]
    with pytest.raises(ValueError, match="no kernel 'do', but other, dot"):
        sass_of(SASS, "do")


RESOURCES = """
Resource usage:
 Common:
  GLOBAL:0
 Function other:
  REG:10 STACK:0 SHARED:6024 LOCAL:0 CONSTANT[0]:536 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function dot:
  REG:255 STACK:272 SHARED:0 LOCAL:0 CONSTANT[0]:576 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_resources_are_read_without_the_systems_shared_memory() -> None:
    assert resources_of(RESOURCES, "dot", 1024) == Resources(255, 272, 0)
    assert resources_of(RESOURCES, "other", 1024) == Resources(10, 0, 5000)
    assert resources_of(RESOURCES, "other", 0) == Resources(10, 0, 6024)
    with pytest.raises(ValueError, match="no resources of 'third'"):
        resources_of(RESOURCES, "third", 0)


AMDGCN = """
	.file	1 "/src" "dot.py"
	.loc	1 9 11 prologue_end             ; dot.py:9:11
	global_load_dwordx4 v[2:5], v[0:1], off
	global_load_ushort v2, v[0:1], off offset:16
	buffer_load_dwordx2 v[2:3], v0, s[0:3], 0 offen
	buffer_load_dword v0, s[0:3], 0 offen lds
	.loc	1 12 5 is_stmt 0                ; dot.py:12:5
	global_store_short_d16_hi v[0:1], v2, off
	flat_store_dwordx3 v[0:1], v[2:4]
	global_load_lds_dword v[0:1], off
	scratch_store_dwordx4 off, v[0:3], off offset:16 ; 16-byte Folded Spill
	scratch_load_dword v0, off, off                  ; 4-byte Folded Reload
	v_mfma_f32_32x32x8_f16 a[0:15], v[0:1], v[2:3], a[0:15]
	v_mfma_f32_32x32x8_f16 a[0:15], v[0:1], v[2:3], a[0:15]
	v_fma_f32 v0, v1, v2, v3
	s_waitcnt vmcnt(0)                      ; global_load_dword
amdhsa.kernels:
  - .agpr_count:     16
    .group_segment_fixed_size: 512
    .private_segment_fixed_size: 132
    .sgpr_count:     20
    .vgpr_count:     56
"""


def test_amdgcn_is_read() -> None:
    found = read_amdgcn(AMDGCN)
    assert found.matrix == {"v_mfma_f32_32x32x8_f16": 2}
    first, second = ("/src/dot.py", 9), ("/src/dot.py", 12)
    loads = [Access("load", 16, first), Access("load", 2, first), Access("load", 8, first), Access("copy", 4, first)]
    assert found.accesses == [*loads, Access("store", 2, second), Access("store", 12, second), Access("copy", 4, second)]
    assert (found.local_stores, found.local_loads) == (16, 4)
    assert amd_resources(AMDGCN) == Resources(56, 132, 512)
    with pytest.raises(ValueError, match=r"no \.vgpr_count"):
        amd_resources(AMDGCN.replace(".vgpr_count", ".other"))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"spill_stores": 8, "spill_loads": 4, "stack": 16}, "spills: 8 bytes stored and 4 loaded a thread, 16 of stack"),
        ({"matrix": {}, "machine_matrix": {}}, "no matrix instruction"),
        ({"machine_matrix": {}}, "no matrix instruction in the machine code, though the PTX has mma"),
        ({"shared": 1, "dynamic_shared": 163 * 1024}, "166913 bytes of shared memory a block, of which there are 166912"),
        ({"threads": 512, "registers": 129}, "69632 registers a block of 512 threads, of which there are 65536"),
        ({"tensor_memory": 1}, "1 columns of tensor memory, of which there are 0"),
    ],
)
def test_a_fault_is_found(fault: Row, said: str) -> None:
    assert list(findings(row(**fault), matrix=True)) == [said]


@pytest.mark.parametrize(
    "harmless",
    [
        {},
        {"spill_stores": 8, "stack": 8},  # ptxas's own, for sm_120: nothing reads it
        {"dynamic_shared": 163 * 1024},
        {"arch": "sm_90", "shared": 1024, "dynamic_shared": 226 * 1024},
        {"threads": 512, "registers": 128},
        {"arch": "sm_100", "tensor_memory": 512},
    ],
    ids=str,
)
def test_what_is_within_the_limits_passes(harmless: Row) -> None:
    assert list(findings(row(**harmless), matrix=True)) == []


def test_only_who_must_use_the_matrix_units_is_asked_for_them() -> None:
    assert list(findings(row(matrix={}, machine_matrix={}), matrix=False)) == []


def test_accesses_are_narrow_below_a_width_unless_their_line_says_so(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel.cu"
    kernel.write_text("a = x[i];\nb = bias[i];  // float4 is too wide. narrow: a bias a thread\n")
    loads = [Access("load", size, (str(kernel), line)) for size, line in ((16, 1), (8, 1), (8, 1), (4, 2))]
    source = Listing(accesses=[*loads, Access("copy", 4), Access("store", 8)])
    machine = Listing(accesses=[Access("load", 8), Access("load", 4), Access("store", 2), Access("store", 16)])
    said = [
        "narrow: 2 loads of 8 bytes at kernel.cu:1",
        "narrow: 1 copies of 4 bytes",
        "narrow: 1 stores of 8 bytes",
        "narrow: 1 stores of 2 bytes",
    ]
    assert list(narrow_accesses(source, machine, 16)) == said
    assert list(narrow_accesses(source, machine, 8)) == [said[1], said[3]]


def test_machine_code_that_cannot_be_read_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    binary = Binary("dot", {"ptx": "", "cubin": b"no cubin"}, 128, 0, 0)
    monkeypatch.setattr(rows, "compile_variant", lambda variant, arch: binary)
    found, (text,) = rows.audited(SimpleNamespace(kernel="dot", label="3a", dtype="fp16"), "sm_80")
    assert found == {"kernel": "dot", "label": "3a", "dtype": "fp16", "arch": "sm_80"}
    assert text.startswith("compiles, and cannot be read: ToolError: ")


@dataclass(frozen=True)
class Audited:
    """What the command did with the kernels of ``audit_kernels``."""

    output: Path
    status: int
    text: str
    run: Any

    def row(self, *name: str) -> Row:
        (found,) = (row for row in self.run["rows"] if name_of(row) == ", ".join(name))
        return found

    def findings(self, *name: str) -> list[str]:
        return [entry["finding"] for entry in self.run["findings"] if name_of(entry) == ", ".join(name)]


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Audited:
    """Once for all test processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "audit"
    output, outcome = folder / "audit.json", folder / "outcome"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not outcome.exists():
            environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
            environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(KERNELS.parent)])}
            environment |= {"TRITON_CACHE_DIR": str(folder / "cache")}
            arguments = ["--variants", "audit_kernels:variants", "--output", str(output), "--jobs", "2"]
            command_line = [sys.executable, "-m", "benchmarks.audit", *arguments]
            done = subprocess.run(command_line, cwd=ROOT, env=environment, capture_output=True, text=True)
            assert output.is_file(), done.stderr
            outcome.write_text(json.dumps([done.returncode, done.stdout]))
    status, text = json.loads(outcome.read_text())
    (run,) = json.loads(output.read_text())["runs"]
    return Audited(output, status, text, run)


@compiles
def test_every_fault_is_found_and_nothing_else(audited: Audited) -> None:
    faulty = {
        "dot, spilling, fp16": ["sm_80", "sm_90"],
        "dot, too much shared memory, fp16": ["sm_80", "sm_90", "gfx942"],
        "add, no matrix units, fp16": ["sm_80", "sm_90"],
        "dot, unaligned, fp16": ["sm_80", "sm_90", "gfx942"],
        "add, unaligned, fp16": ["sm_90"],
        "mismatched, 16 by 32, fp16": ["sm_80"],
        "refused, by ptxas, fp16": ["sm_80"],
        "add, crashing, fp16": ["sm_80"],
    }
    names = [f"{name}, {arch}" for name, arches in faulty.items() for arch in arches]
    assert list(dict.fromkeys(name_of(finding) for finding in audited.run["findings"])) == names
    assert audited.status == 1
    for finding in audited.run["findings"]:
        assert f"{name_of(finding)}: {finding['finding']}" in audited.text.splitlines()


@compiles
@pytest.mark.parametrize(
    ("dtype", "arch", "matrix", "machine_matrix"),
    [
        ("fp16", "sm_80", "mma.m16n8k16.f32.f16", "HMMA.16816.F32"),
        ("fp16", "sm_90", "wgmma.m64n64k16.f32.f16", "HGMMA.64x64x16.F32"),
        ("fp16", "sm_100", "tcgen05.mma.f16", "UTCHMMA"),
        ("fp16", "sm_120", "mma.m16n8k16.f32.f16", "HMMA.16816.F32"),
        ("fp16", "gfx942", "v_mfma_f32_32x32x8_f16", "v_mfma_f32_32x32x8_f16"),
        ("tf32", "sm_80", "mma.m16n8k8.f32.tf32", "HMMA.1688.F32.TF32"),
        ("tf32", "sm_90", "wgmma.m64n64k8.f32.tf32", "HGMMA.64x64x8.F32.TF32"),
        ("fp32", "sm_80", None, None),
    ],
)
def test_the_matrix_instructions_are_named(
    audited: Audited, dtype: str, arch: str, matrix: str | None, machine_matrix: str | None
) -> None:
    found = audited.row("dot", "good", dtype, arch)
    assert list(found["matrix"]) == ([matrix] if matrix else [])
    assert list(found["machine_matrix"]) == ([machine_matrix] if machine_matrix else [])


@compiles
def test_a_good_kernel_has_the_facts_of_its_machine_code(audited: Audited) -> None:
    found = audited.row("dot", "good", "fp16", "sm_80")
    assert (found["threads"], found["shared"]) == (128, 0)
    assert found["dynamic_shared"] == 2 * 2 * 64 * 32 * 2  # two stages of both operands in flight, 64 x 32 values each
    assert 32 < found["registers"] < 255
    assert (found["stack"], found["spill_stores"], found["spill_loads"]) == (0, 0, 0)
    assert found["matrix"] == {"mma.m16n8k16.f32.f16": 64 * 64 * 32 // (16 * 8 * 16) // 4}  # in four warps
    assert list(found["copy_bytes"]) == list(found["store_bytes"]) == ["16"]
    assert list(found["load_bytes"]) == ["4"]  # of the bias, whose line says so
    assert (found["tma"], found["griddepcontrol"]) == (0, 0)
    assert audited.row("dot", "good", "fp16", "gfx942")["threads"] == 256


@compiles
def test_the_copy_engine_and_programmatic_launches_are_seen(audited: Audited) -> None:
    for arch in ("sm_90", "sm_100"):
        found = audited.row("tensor_dot", "good", "fp16", arch)
        assert found["tma"] >= 3
        assert found["load_bytes"] == found["store_bytes"] == found["copy_bytes"] == {}
        assert found["shared"] == 0  # cuobjdump counts the system's as the kernel's
    assert audited.row("add", "good", "fp16", "sm_90")["griddepcontrol"] == 2
    assert audited.row("add", "no matrix units", "fp16", "sm_90")["griddepcontrol"] == 0


@compiles
def test_tensor_memory_is_counted(audited: Audited) -> None:
    assert audited.row("tensor_dot", "good", "fp16", "sm_100")["tensor_memory"] == 64
    assert audited.row("tensor_dot", "good", "fp16", "sm_90")["tensor_memory"] == 0


@compiles
def test_a_spill_is_found(audited: Audited) -> None:
    for arch in ("sm_80", "sm_90"):
        found = audited.row("dot", "spilling", "fp16", arch)
        assert found["stack"] > 0
        assert found["spill_stores"] >= found["stack"]
        stores, loads, stack = (found[name] for name in ("spill_stores", "spill_loads", "stack"))
        said = f"spills: {stores} bytes stored and {loads} loaded a thread, {stack} of stack"
        assert audited.findings("dot", "spilling", "fp16", arch) == [said]


@compiles
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_too_much_shared_memory_is_found(audited: Audited, arch: str) -> None:
    found = audited.row("dot", "too much shared memory", "fp16", arch)
    said = f"{found['dynamic_shared']} bytes of shared memory a block, of which there are {LIMITS[arch].shared}"
    assert audited.findings("dot", "too much shared memory", "fp16", arch) == [said]


@compiles
def test_narrow_accesses_are_found_where_they_are(audited: Audited) -> None:
    x, w, out = line_of("a = tl.load(x"), line_of("b = tl.load(w"), line_of("tl.store(out + m[")
    loads = [f"narrow: 16 loads of 2 bytes at {place}" for place in (x, w)]
    assert audited.findings("dot", "unaligned", "fp16", "sm_80") == [*loads, f"narrow: 32 stores of 2 bytes at {out}"]
    # On AMD the results of an MFMA are stored as they lie, in fours.
    on_amd = [f"narrow: 8 loads of 2 bytes at {place}" for place in (x, w)]
    assert audited.findings("dot", "unaligned", "fp16", "gfx942") == on_amd
    helper, store = line_of("return tl.load(pointer"), line_of("tl.store(out + i")
    assert audited.findings("add", "unaligned", "fp16", "sm_90") == [
        f"narrow: 16 loads of 2 bytes at {helper}",
        f"narrow: 8 stores of 2 bytes at {store}",
    ]
    assert "2" in audited.row("dot", "unaligned and not said to be", "fp16", "sm_80")["load_bytes"]


@compiles
def test_a_kernel_that_does_not_compile_costs_no_other_its_row(audited: Audited) -> None:
    (text,) = audited.findings("mismatched", "16 by 32", "fp16", "sm_80")
    assert text.startswith("does not compile: CompilationError: at 2:11: def mismatched(out, K: tl.constexpr)")
    assert text.endswith("input and other must have equal reduction dimensions")
    assert list(audited.row("mismatched", "16 by 32", "fp16", "sm_80")) == ["kernel", "label", "dtype", "arch"]
    (text,) = audited.findings("refused", "by ptxas", "fp16", "sm_80")
    assert text.startswith("does not compile: PTXASError: ")
    assert text.endswith("error ptxas fatal : Ptx assembly aborted due to errors")
    assert ".visible .entry" not in audited.text  # Triton prints the whole of it
    assert audited.findings("add", "crashing", "fp16", "sm_80") == ["does not compile: the compiler crashed"]
    assert list(audited.row("add", "crashing", "fp16", "sm_80")) == ["kernel", "label", "dtype", "arch"]
    assert audited.row("add", "after a crash", "fp16", "sm_80")["load_bytes"] == {"16": 2}


@compiles
def test_the_file_says_what_compiled_and_is_no_benchmark(audited: Audited) -> None:
    assert set(audited.run) == {"triton", "ptxas", "commit", "dirty", "date", "rows", "findings"}
    assert set(audited.run["ptxas"]) == {"ptxas", "ptxas-blackwell"}
    assert reading.read(audited.output.parent) == []
    assert f"wrote {audited.output}" in audited.text


@compiles
def test_the_table_shows_the_worst_of_each_architecture(audited: Audited) -> None:
    assert [line.strip() for line in audited.text.splitlines()].count("dot") == 1
    assert re.search(r"^ *sm_80 \(7\) +\d+ +\d+ +256 of 163  ", audited.text, re.MULTILINE)


def shown(rows: list[Row], found: list[Row], details: bool) -> list[list[str]]:
    """The cells of the tables' lines, without empty ones."""
    text = io.StringIO()
    print_audit(rows, found, details, Console(file=text, width=200))
    return [
        [cell.strip() for cell in line.split("   ") if cell.strip()] for line in text.getvalue().splitlines() if line.strip()
    ]


def test_a_line_of_the_table_is_the_worst_of_its_rows() -> None:
    bare = {name: row()[name] for name in ("kernel", "label", "dtype")}
    table = [
        row(registers=80, dynamic_shared=2048),
        row(label="3b", spill_stores=8, spill_loads=4, matrix={}, store_bytes={"2": 1}, copy_bytes={"16": 1}),
        row(arch="sm_90", tma=3, griddepcontrol=1),
        {**bare, "arch": "sm_120"},
        row(kernel="pool"),
    ]
    found = [{**table[1], "finding": "one"}, {**table[1], "finding": "two"}, {**table[3], "finding": "three"}]
    lines = shown(table, found, details=False)
    assert [line for line in lines if len(line) == 1 and line[0].isalpha()] == [["dot"], ["pool"]]
    assert ["sm_80 (2)", "255", "12", "2 of 163", "mma, FMA", "4–16", "2–16", "16", "2"] in lines
    assert ["sm_90 (1)", "255", "0 of 227", "mma", "4–16", "16", "yes", "yes"] in lines
    assert ["sm_120 (1)", "1"] in lines
    detailed = shown(table, found, details=True)
    assert ["3a, fp16, sm_80", "80", "2 of 163", "mma", "4–16", "16"] in detailed
    assert ["3b, fp16, sm_80", "255", "12", "0 of 163", "FMA", "4–16", "2", "16", "2"] in detailed


def run_of(version: str, *rows: Row, findings: tuple[Row, ...] = ()) -> record.Run:
    return {"triton": version, "ptxas": {}, "commit": None, "dirty": None, "date": "", "rows": rows, "findings": findings}


def test_a_run_replaces_its_own_versions_only(tmp_path: Path) -> None:
    path = tmp_path / "results" / "audit.json"
    for run in (run_of("3.10.0", row()), run_of("3.8.0", row()), run_of("3.8.0", row(registers=8), row(label="3b"))):
        record.write(path, run)
    old, new = record.read(path)
    assert (old["triton"], new["triton"]) == ("3.8.0", "3.10.0")
    assert old["rows"] == [row(registers=8), row(label="3b")]
    assert new["rows"] == [row()]
    assert [line for line in path.read_text().splitlines() if '"3b"' in line] == [json.dumps(row(label="3b"))]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("content", ['{"kind": "benchmark", "runs": []}', "[]", "{", '{"kind": "audit"}'])
def test_a_file_of_another_kind_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "audit.json"
    path.write_text(content)
    with pytest.raises(AuditError, match=r"audit\.json .*name another --output"):
        record.write(path, run_of("3.8.0"))
    assert path.read_text() == content


def test_differences_are_named() -> None:
    finding = {name: row()[name] for name in ("kernel", "label", "dtype", "arch")} | {"finding": "spills"}
    old = run_of("3.8.0", row(), row(label="3b"), row(label="3c"))
    new = run_of("3.8.0", row(registers=80), row(label="3b"), row(label="3d"), findings=(finding,))
    here = [
        "dot, 3a, fp16, sm_80: registers 255 -> 80, findings [] -> ['spills']",
        "dot, 3d, fp16, sm_80: not recorded",
    ]
    assert list(record.differences(old, new, whole=False)) == here
    assert list(record.differences(old, new, whole=True)) == [*here, "dot, 3c, fp16, sm_80: recorded, but not there any more"]


def listed(*variants: Any) -> Callable[[], list[Any]]:
    return lambda: list(variants)


def variant(**changes: Any) -> SimpleNamespace:
    """One of which nothing is compiled."""
    import triton

    fn = object.__new__(triton.JITFunction)
    facts = {"kernel": "dot", "fn": fn, "label": "3a", "dtype": "fp16", "arches": ("sm_80", "gfx942")}
    return SimpleNamespace(**{**facts, **changes})


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the variants of ``given:variants``."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    module = SimpleNamespace(variants=listed())
    monkeypatch.setitem(sys.modules, "given", module)
    return lambda *variants: setattr(module, "variants", listed(*variants))


@needs_triton
def test_variants_that_cannot_be_audited_are_refused(give: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    give(variant(), variant(dtype="bf16"))
    assert len(load("given:variants")) == 2
    give(variant(), variant())
    with pytest.raises(AuditError, match="there are two dot, 3a, fp16: give them labels that tell them apart"):
        load("given:variants")
    give(variant(arches=("sm_21",)))
    with pytest.raises(AuditError, match=r"dot, 3a, fp16: arches must be among sm_80, .*, got 'sm_21'"):
        load("given:variants")
    give(variant(fn=len))
    with pytest.raises(AuditError, match=r"fn must be a triton\.JITFunction, got builtin_function_or_method"):
        load("given:variants")
    for name in ("math:sin", "os:getcwd"):
        with pytest.raises(AuditError, match=f"--variants: {name} gives no variants "):
            load(name)
    for name in ("given", "given:others", "no_such_module:variants", ":variants"):
        with pytest.raises(AuditError, match=f"--variants: there is no {name} "):
            load(name)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(AuditError, match=r"TRITON_INTERPRET is set, .*: unset it"):
        load("given:variants")


def test_without_triton_the_audit_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setenv("TRITON_CACHE_DIR", "unused")
    assert command.main([]) == 1
    assert "benchmarks.audit: error: triton cannot be imported" in capsys.readouterr().err


@needs_triton
def test_a_selection_is_of_all_that_is_named(give: Callable[..., None]) -> None:
    variants: list[Any] = [variant(), variant(dtype="bf16"), variant(kernel="pool")]

    def tasks(*arguments: str) -> list[tuple[int, str]]:
        return command.selected(variants, command.parser().parse_args(arguments))

    assert tasks() == [(0, "sm_80"), (0, "gfx942"), (1, "sm_80"), (1, "gfx942"), (2, "sm_80"), (2, "gfx942")]
    assert tasks("--arches", "gfx942", "--kernels", "dot") == [(0, "gfx942"), (1, "gfx942")]
    assert tasks("--dtypes", "bf16") == [(1, "sm_80"), (1, "gfx942")]
    assert tasks("--dtypes", "fp16", "--kernels", "pool") == [(2, "sm_80"), (2, "gfx942")]
    with pytest.raises(AuditError, match="--kernels must be among dot, pool, got 'dots'"):
        tasks("--kernels", "dots")
    with pytest.raises(AuditError, match="--dtypes must be among fp16, bf16, got 'fp8'"):
        tasks("--dtypes", "fp8")
    with pytest.raises(AuditError, match="nothing to audit"):
        tasks("--arches", "sm_120")


@pytest.fixture
def done(give: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Runs the command on one variant whose audit is given; its own file is in ``tmp_path``."""
    monkeypatch.setattr(command, "VARIANTS", "given:variants")
    monkeypatch.setattr(command, "OUTPUT", tmp_path / "audit.json")
    monkeypatch.setattr(command, "CACHE", tmp_path / "cache")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "elsewhere"))

    def run(new: record.Run, *arguments: str) -> int:
        def audit(variants: object, tasks: object, arguments: Namespace) -> record.Run:
            return new

        give(variant())
        monkeypatch.setattr(command, "audit", audit)
        monkeypatch.setattr(command, "versions", lambda: {"triton": new["triton"] if new else "3.8.0"})
        return command.main(list(arguments))

    return run


@needs_triton
def test_what_is_written_and_what_is_not(done: Callable[..., int], tmp_path: Path) -> None:
    own, other = tmp_path / "audit.json", tmp_path / "other.json"
    assert done(run_of("3.8.0", row()), "--arches", "sm_80") == 0
    assert not own.exists()
    assert done(run_of("3.8.0", row()), "--arches", "sm_80", "--output", str(other)) == 0
    assert record.read(other)[0]["rows"] == [row()]
    assert done(run_of("3.8.0", row())) == 0
    assert record.read(own)[0]["rows"] == [row()]
    finding = {name: row()[name] for name in ("kernel", "label", "dtype", "arch")} | {"finding": "spills"}
    assert done(run_of("3.8.0", row(), findings=(finding,))) == 1
    assert record.read(own)[0]["findings"] == [finding]


@needs_triton
def test_a_record_that_says_the_same_is_left_as_it_is(
    done: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert done({**run_of("3.8.0", row()), "commit": "of the first"}) == 0
    written = (tmp_path / "audit.json").read_bytes()
    for arguments in ([], ["--check"]):
        assert done({**run_of("3.8.0", row()), "commit": "of another"}, *arguments) == 0
        assert f"as in {tmp_path / 'audit.json'}" in capsys.readouterr().out
    assert (tmp_path / "audit.json").read_bytes() == written
    assert done({**run_of("3.8.0"), "commit": "of the last"}) == 0
    assert record.read(tmp_path / "audit.json")[0]["commit"] == "of the last"


@needs_triton
def test_a_file_that_cannot_be_written_is_said_before_anything_is_compiled(
    done: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "audit.json.new").mkdir()
    (tmp_path / "audit.json.new" / "file").touch()
    assert done(None) == 1
    assert f"--output: {tmp_path / 'audit.json'} cannot be written: " in capsys.readouterr().err


@needs_triton
def test_a_check_compares_and_writes_nothing(
    done: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert done(run_of("3.8.0", row()), "--check") == 1
    assert "audit.json has no run of Triton 3.8.0" in capsys.readouterr().err
    finding = {name: row()[name] for name in ("kernel", "label", "dtype", "arch")} | {"finding": "spills"}
    record.write(tmp_path / "audit.json", run_of("3.8.0", row(), row(label="3b")))
    written = (tmp_path / "audit.json").read_bytes()
    assert done(run_of("3.8.0", row(), row(label="3b")), "--check") == 0
    assert done(run_of("3.8.0", row()), "--check", "--arches", "sm_80") == 0
    assert done(run_of("3.8.0", row()), "--check") == 1
    assert "not as in audit.json: dot, 3b, fp16, sm_80: recorded, but not there any more" in capsys.readouterr().out
    assert done(run_of("3.6.0", row()), "--check") == 1
    assert (tmp_path / "audit.json").read_bytes() == written
    record.write(tmp_path / "audit.json", run_of("3.8.0", row(), findings=(finding,)))
    assert done(run_of("3.8.0", row(), findings=(finding,)), "--check") == 1


@needs_triton
def test_the_compilers_cache_is_kept_where_the_environment_says_or_in_build(
    done: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(run_of("3.8.0", row()))
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "elsewhere")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    done(run_of("3.8.0", row()))
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "cache")


def test_jobs_must_be_some(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--jobs", "0"]) == 1
    assert "--jobs must be at least 1, got 0" in capsys.readouterr().err


def test_a_disassembler_that_fails_or_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "nvdisasm").write_text("#!/bin/sh\necho no  cubin >&2\nexit 3\n")
    (tmp_path / "nvdisasm").chmod(0o755)
    monkeypatch.setattr(tools.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(tools.ToolError, match="nvdisasm failed with exit status 3: no cubin"):
        tools.disassembly(b"")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(tools.ToolError, match="cuobjdump is neither in Triton's wheel nor on PATH"):
        tools.resource_usage(b"")

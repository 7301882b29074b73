"""Compiles the CUDA C++ kernel for every architecture, without a GPU, and checks what it became and what it does, simulated.

    python -m benchmarks.audit.cuda       # the second half of make audit

Findings are those of ``benchmarks.audit``, any local memory at all, and accesses in the simulation that conflict in shared
memory's banks or use parts of global memory's sectors.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import results
from benchmarks.audit import record, tools
from benchmarks.audit.__main__ import OUTPUT, check_writable, show
from benchmarks.audit.compile import AuditError, Binary, MissingTool
from benchmarks.audit.limits import LIMITS
from benchmarks.audit.rows import NAME, ROOT, Row, audit_of
from benchmarks.audit.simulated import CASES, Case, case_of, conflicts, described, simulated, simulation, table
from googlenet_fused.backends.cuda.simulation import problem_of
from googlenet_fused.backends.cuda.tiles import DTYPES
from googlenet_fused.info import usable_cpus
from googlenet_fused.progress import progress_bar
from googlenet_fused.spec import GOOGLENET_SIDES, GOOGLENET_SPECS

KERNEL = "googlenet_fused_inception"
ARCHES = tuple(arch for arch in LIMITS if arch.startswith("sm_"))
BATCHES = (1, 8, 32, 128)
MULTIPROCESSORS = 132


class NvccError(Exception):
    """nvcc refused a kernel, or made something else of it than one kernel."""


@dataclass(frozen=True)
class Variant:
    """An instantiation of the kernel."""

    dtype: str
    kernel: str = KERNEL
    label: str = "one launch a module"
    folder: Path = ROOT / "csrc" / "inception" / "instantiations"
    matrix: bool = True
    aligned: bool = True

    @property
    def source(self) -> Path:
        return self.folder / f"{self.dtype}.cu"


def load_build() -> ModuleType:
    """``csrc/build.py``, which has the compiler's flags, and finds the compiler by its ``toolchain``."""
    spec = importlib.util.spec_from_file_location("native_build", ROOT / "csrc" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def nvcc() -> Any:
    """The compiler, a ``toolchain.Nvcc``.

    Raises:
        MissingTool: there is none, or it is too old.
    """
    toolchain = load_build().toolchain
    try:
        return toolchain.find_nvcc()
    except toolchain.MissingTool as error:
        raise MissingTool(str(error)) from error


@cache
def source_key() -> str:
    """A short name for what decides, but for the compiler, what the kernel compiles to: its code without comments, flags."""
    digest = hashlib.sha256(" ".join(load_build().NVCC_FLAGS).encode())
    for path in sorted((ROOT / "csrc" / "inception").rglob("*")):
        if path.suffix in (".cuh", ".cu") or path.name in ("params.h", "traits.h", "launch.h"):
            code = re.sub(r"//[^\n]*", "", path.read_text(encoding="utf-8"))
            digest.update(f"{path.name}\0{' '.join(code.split())}\0".encode())
    return digest.hexdigest()[:16]


def compile_variant(variant: Variant, arch: str) -> Binary:
    """The instantiation's PTX and machine code, with the shared memory of the largest launch.

    Raises:
        NvccError: it does not compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        kept = ("--keep", "--keep-dir", folder, "-o", str(cubin))
        command = [nvcc().path, *load_build().NVCC_FLAGS, "-lineinfo", "-cubin", f"-arch={arch}", *kept, str(variant.source)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if done.returncode:
            raise NvccError(done.stderr or done.stdout)
        (path,) = Path(folder).glob("*.ptx")
        ptx, machine = path.read_text(), cubin.read_bytes()
    names = re.findall(r"\.entry (\w+)", ptx)
    threads = re.findall(r"\.maxntid (\d+)", ptx)
    if len(names) != 1 or len(threads) != 1 or KERNEL not in names[0]:
        raise NvccError(f"{variant.source.name} must hold one kernel, {KERNEL}, with launch bounds; it has {names}")
    return Binary(names[0], {"ptx": ptx, "cubin": machine}, int(threads[0]), most_shared_memory(variant.dtype, arch), 0)


@cache
def most_shared_memory(dtype: str, arch: str) -> int:
    """Bytes that the largest plan of GoogLeNet's modules asks for, at ``BATCHES`` on an H100's number of multiprocessors.

    Raises:
        MissingTool: the planner is not built.
    """
    device = {"multiprocessors": MULTIPROCESSORS, "shared_memory": LIMITS[arch].shared}
    planner = simulation()
    plans = (
        planner.plan(problem_of(spec, DTYPES[dtype], batch, GOOGLENET_SIDES[name], GOOGLENET_SIDES[name]), device)
        for name, spec in GOOGLENET_SPECS.items()
        for batch in BATCHES
    )
    return max(plan["shared_bytes"] for plan in plans)


def audited(variant: Variant, arch: str) -> tuple[Row, list[str]]:
    """The row of an instantiation on an architecture, and its findings, of which any local memory is one."""
    row, found = audit_of(variant, arch, compile_variant, lambda _: source_key())
    local = [f"{row['stack']} bytes of local memory a thread"] if row.get("stack") else []
    return row, [*found, *local]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit.cuda", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arches", nargs="+", default=list(ARCHES), choices=ARCHES, metavar="ARCH", help=", ".join(ARCHES))
    parser.add_argument("--kernels", nargs="+", choices=[KERNEL], metavar="NAME", help=f"{KERNEL}, there is no other")
    parser.add_argument(
        "--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES), metavar="DTYPE", help=", ".join(DTYPES)
    )
    parser.add_argument("--jobs", type=int, default=usable_cpus(), metavar="N", help="compilers (default: the usable CPUs)")
    parser.add_argument(
        "--details", action="store_true", help="show every instantiation, not only the worst on an architecture"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the file says otherwise")
    parser.add_argument(
        "--if-possible", action="store_true", help="where nvcc or the simulation is missing say so, and succeed"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"default: {OUTPUT.name} in results/; for a selection, none"
    )
    return parser


def audit(tasks: Sequence[tuple[Variant, str]], cases: Sequence[Case], jobs: int) -> record.Run:
    """Compiles and simulates all."""
    rows: list[Row] = []
    found: list[Row] = []
    with progress_bar(len(tasks), "compiling") as advance:
        for row, texts in _each(audited, tasks, jobs, advance):
            rows.append(row)
            found += [{**{field: row[field] for field in NAME}, "finding": text} for text in texts]
    with progress_bar(len(cases), "simulating") as advance:
        counted = list(simulated(cases, advance))
    git = results.git_state(ROOT) or {"commit": None, "dirty": None}
    return {
        **{"nvcc": nvcc().version, **git, "date": results.now()},
        **{"rows": rows, "findings": found, "simulated": counted},
    }


def _each(function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], jobs: int, advance: Callable[[], None]) -> list[Any]:
    """What it gives for each, in their order; an interrupt waits only for what is begun."""
    with ThreadPoolExecutor(jobs) as pool:
        try:
            futures = [pool.submit(function, *task) for task in tasks]
            found = []
            for future in futures:
                found.append(future.result())
                advance()
            return found
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run(arguments: argparse.Namespace) -> int:
    if arguments.jobs < 1:
        raise AuditError(f"--jobs must be at least 1, got {arguments.jobs}")
    version, served = nvcc().version, nvcc().codes
    simulation()
    tools.check()
    if unknown := [arch for arch in arguments.arches if arch not in served]:
        print(f"nvcc {version} does not compile for {', '.join(unknown)}")
    tasks = [(Variant(dtype), arch) for dtype in arguments.dtypes for arch in arguments.arches if arch in served]
    if not tasks:
        raise AuditError(f"nothing to audit: nvcc {version} compiles for {', '.join(served)}")
    whole = set(arguments.arches) == set(ARCHES) and set(arguments.dtypes) == set(DTYPES)
    output = arguments.output or (OUTPUT if whole or arguments.check else None)
    old = next((run for run in record.read(output) if record.compiler_of(run) == ("nvcc", version)), None) if output else None
    if arguments.check and old is None:
        raise AuditError(f"{output} has no run of nvcc {version}: make one without --check")
    if output and not arguments.check:
        check_writable(output)
    new = audit(tasks, [case for case in CASES if case.dtype in arguments.dtypes], arguments.jobs)
    show(new, arguments.details)
    conflicting = [text for counters in new["simulated"] for text in conflicts(counters)]
    for text in [*([table(new["simulated"])] if new["simulated"] else []), *conflicting]:
        print(text)
    changes = [*record.differences(old, new, whole), *recounted(old, new, whole)] if old else ["all of it"]
    if output and not changes:
        print(f"as in {output}")
    elif arguments.check:
        for change in changes:
            print(f"not as in {output.name if output else None}: {change}")
    elif output:
        record.write(output, new)
        print(f"wrote {output}")
    return 1 if new["findings"] or conflicting or (arguments.check and changes) else 0


def recounted(old: record.Run, new: record.Run, whole: bool) -> list[str]:
    """Where the simulation counts otherwise; unless the new run is ``whole``, cases that it lacks are passed over."""
    before, after = (
        {case_of(counters): counters for counters in run["simulated"] if counters.keys() >= set(Case._fields)}
        for run in (old, new)
    )
    cases = {**after, **(before if whole else {})}
    return [f"{described(case)}: simulated, it counts otherwise" for case in cases if before.get(case) != after.get(case)]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        return run(arguments)
    except MissingTool as error:
        if arguments.if_possible:
            print(f"==> the CUDA kernel is not audited: {error}")
            return 0
        print(f"benchmarks.audit.cuda: error: {error}", file=sys.stderr)
        return 1
    except (AuditError, tools.ToolError) as error:
        print(f"benchmarks.audit.cuda: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

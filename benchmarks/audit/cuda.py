"""Compiles the CUDA C++ kernel for every architecture, without a GPU, and checks what it became and what it does, simulated.

    python -m benchmarks.audit.cuda       # the second half of make audit

Findings are those of ``benchmarks.audit``, any local memory at all, and accesses in the simulation that conflict in shared
memory's banks or use parts of global memory's sectors.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import results
from benchmarks.audit import machine_code, record, tools
from benchmarks.audit.__main__ import OUTPUT, check_writable, show
from benchmarks.audit.compile import AuditError, Binary
from benchmarks.audit.limits import LIMITS
from benchmarks.audit.rows import ROOT, Row, findings, narrow_accesses, row_of
from googlenet_fused import bench
from googlenet_fused.backends.cuda.simulation import MODULE, problem_of, simulate
from googlenet_fused.backends.cuda.tiles import DTYPES
from googlenet_fused.info import usable_cpus
from googlenet_fused.spec import GOOGLENET_SIDES, GOOGLENET_SPECS

KERNEL = "googlenet_fused_inception"
ARCHES = tuple(arch for arch in LIMITS if arch.startswith("sm_"))
BATCHES = (1, 8, 32, 128)
MULTIPROCESSORS = (1, 132)
"""Of the devices that are simulated, with one image: where a block has whole images, and where channels are split."""

MOST_CONFLICTS = {"ldmatrix_a": 1.08, "ldmatrix_b": 1.0, "copy_writes": 1.01, "global_reads": 1.0, "global_writes": 1.0}
"""How many times the least number of wavefronts or sectors these may take. Measured: 1.077 for ``ldmatrix_a`` in 5b on 132
multiprocessors, at most 1.04 in the others; ``copy_writes`` end in warps of few lanes."""


@dataclass(frozen=True)
class Variant:
    """An instantiation of the kernel."""

    dtype: str
    kernel: str = KERNEL
    label: str = "one launch a module"
    folder: Path = ROOT / "csrc" / "inception" / "instantiations"

    @property
    def source(self) -> Path:
        return self.folder / f"{self.dtype}.cu"


def load_build() -> ModuleType:
    """``csrc/build.py``, which knows the compiler and its flags."""
    spec = importlib.util.spec_from_file_location("native_build", ROOT / "csrc" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def nvcc() -> Any:
    """Raises AuditError: there is none."""
    build = load_build()
    try:
        return build.find_nvcc()
    except build.MissingTool as error:
        raise AuditError(str(error)) from error


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
    """Raises RuntimeError: what nvcc says."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        command = [
            nvcc().path,
            *load_build().NVCC_FLAGS,
            "-lineinfo",
            "-cubin",
            f"-arch={arch}",
            "--keep",
            "--keep-dir",
            folder,
        ]
        done = subprocess.run([*command, "-o", str(cubin), str(variant.source)], capture_output=True, text=True, cwd=folder)
        if done.returncode:
            raise RuntimeError(" ".join((done.stderr or done.stdout).split()))
        (kept,) = Path(folder).glob("*.ptx")
        ptx, machine = kept.read_text(), cubin.read_bytes()
    (name,) = set(re.findall(rf"\.entry (\w*{KERNEL}\w*)", ptx))
    return Binary(name, {"ptx": ptx, "cubin": machine}, 256, most_shared_memory(variant.dtype, arch), 0)


@cache
def most_shared_memory(dtype: str, arch: str) -> int:
    """Bytes that the largest plan of GoogLeNet's modules asks for on an H100's number of multiprocessors."""
    device = {"multiprocessors": 132, "shared_memory": LIMITS[arch].shared}
    host_sim = simulation()
    return max(
        host_sim.plan(problem_of(spec, DTYPES[dtype], batch, GOOGLENET_SIDES[name], GOOGLENET_SIDES[name]), device)[
            "shared_bytes"
        ]
        for name, spec in GOOGLENET_SPECS.items()
        for batch in BATCHES
    )


def simulation() -> Any:
    """Raises AuditError: it is not built."""
    try:
        return importlib.import_module(MODULE)
    except ImportError as error:
        raise AuditError(f"the simulation, which has the planner, cannot be imported ({error}): make native") from error


def audited(variant: Variant, arch: str) -> tuple[Row, list[str]]:
    """The row of an instantiation on an architecture, and its findings."""
    name: Row = {"kernel": variant.kernel, "label": variant.label, "dtype": variant.dtype, "arch": arch}
    try:
        binary = compile_variant(variant, arch)
    except RuntimeError as error:
        return name, [f"does not compile: {str(error)[:300]}"]
    source = machine_code.read_ptx(binary.code["ptx"])
    machine = machine_code.read_sass(machine_code.sass_of(tools.disassembly(binary.code["cubin"]), binary.name))
    usage = tools.resource_usage(binary.code["cubin"])
    resources = machine_code.resources_of(usage, binary.name, LIMITS[arch].reserved)
    row = {**name, "source": source_key(), **row_of(binary, source, machine, resources)}
    local = [f"{resources.stack} bytes of local memory a thread"] if resources.stack else []
    narrow = narrow_accesses(source, machine, LIMITS[arch].access)
    return row, [*findings(row, matrix=True), *local, *narrow]


def simulated() -> Iterator[dict[str, Any]]:
    """What the simulation counts of each module, fp16, one image."""
    import torch  # with numbers of its own, which decide nothing

    from googlenet_fused.ops import inception
    from googlenet_fused.packing import ConvParams

    simulation()
    for name, spec in GOOGLENET_SPECS.items():
        convs = [
            ConvParams(
                torch.zeros(conv.out_channels, conv.in_channels, conv.kernel_size, conv.kernel_size).half(),
                torch.zeros(conv.out_channels).half(),
            )
            for conv in spec.convs
        ]
        x = torch.zeros(1, spec.in_channels, GOOGLENET_SIDES[name], GOOGLENET_SIDES[name]).half()
        for multiprocessors in MULTIPROCESSORS:
            with simulate(count=True, multiprocessors=multiprocessors) as found:
                inception(x.contiguous(memory_format=torch.channels_last), convs, backend="cuda_sim")
            yield {"module": name, "multiprocessors": multiprocessors, **found.counters[0]}


def conflicts(counters: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the counters of a module."""
    for kind, most in MOST_CONFLICTS.items():
        taken, least = counters[kind]
        if taken > most * least:
            yield (
                f"{counters['module']} on {counters['multiprocessors']} multiprocessors: "
                f"{kind} takes {taken / least:.3f} times the least, at most {most}"
            )


def print_simulated(counted: Sequence[dict[str, Any]]) -> None:
    """A line a module: times the least number of wavefronts and sectors."""
    kinds = ("ldmatrix_a", "ldmatrix_b", "copy_writes", "shared_loads", "shared_stores", "global_reads", "global_writes")
    print(f"simulated, one image, times the least\n{'':22}{''.join(f'{kind:>15}' for kind in kinds)}")
    for counters in counted:
        name = f"{counters['module']}, {counters['multiprocessors']} SM"
        factors = (counters[kind][0] / max(1, counters[kind][1]) for kind in kinds)
        print(f"{name:22}{''.join(f'{factor:15.3f}' for factor in factors)}")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit.cuda", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arches", nargs="+", default=list(ARCHES), choices=ARCHES, metavar="ARCH", help=", ".join(ARCHES))
    parser.add_argument(
        "--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES), metavar="DTYPE", help=", ".join(DTYPES)
    )
    parser.add_argument("--jobs", type=int, default=usable_cpus(), metavar="N", help="compilers (default: the usable CPUs)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the file says otherwise")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"default: {OUTPUT.name} in results/; for a selection, none"
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    if arguments.jobs < 1:
        raise AuditError(f"--jobs must be at least 1, got {arguments.jobs}")
    whole = set(arguments.arches) == set(ARCHES) and set(arguments.dtypes) == set(DTYPES)
    output = arguments.output or (OUTPUT if whole or arguments.check else None)
    version = nvcc().version
    old = next((run for run in record.read(output) if record.compiler_of(run) == ("nvcc", version)), None) if output else None
    if arguments.check and old is None:
        raise AuditError(f"{output} has no run of nvcc {version}: make one without --check")
    if output and not arguments.check:
        check_writable(output)
    tasks = [(Variant(dtype), arch) for dtype in arguments.dtypes for arch in arguments.arches]
    rows: list[Row] = []
    found: list[Row] = []
    with bench.progress_bar(len(tasks), "compiling") as advance, ThreadPoolExecutor(arguments.jobs) as pool:
        for row, texts in pool.map(lambda task: audited(*task), tasks):
            rows.append(row)
            name = {field: row[field] for field in ("kernel", "label", "dtype", "arch")}
            found += [{**name, "finding": text} for text in texts]
            advance()
    counted = list(simulated())
    in_simulation = [text for counters in counted for text in conflicts(counters)]
    git = results.git_state(ROOT) or {"commit": None, "dirty": None}
    new: record.Run = {
        **{"nvcc": version, **git, "date": results.now()},
        **{"rows": rows, "findings": found, "simulated": [as_json(counters) for counters in counted]},
    }
    show(new, details=False)
    print_simulated(counted)
    for text in in_simulation:
        print(text)
    changes = list(record.differences(old, new, whole)) if old else ["all of it"]
    if old and whole and old["simulated"] != new["simulated"]:
        changes.append("what the simulation counts")
    if output and not changes:
        print(f"as in {output}")
    elif arguments.check:
        for change in changes:
            print(f"not as in {output.name if output else None}: {change}")
    elif output:
        record.write(output, new)
        print(f"wrote {output}")
    return 1 if found or in_simulation or (arguments.check and changes) else 0


def as_json(counters: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in counters.items()}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        return run(arguments)
    except AuditError as error:
        print(f"benchmarks.audit.cuda: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

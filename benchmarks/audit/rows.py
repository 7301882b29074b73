"""One compiled kernel as a row of facts, and what is wrong with it."""

from __future__ import annotations

import linecache
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.audit import machine_code, tools
from benchmarks.audit.compile import Binary, Variant, compile_variant, source_key
from benchmarks.audit.limits import LIMITS
from benchmarks.audit.machine_code import Access, Listing

ROOT = Path(__file__).resolve().parents[2]
NAME = ("kernel", "label", "dtype", "arch")
"""The fields that tell rows apart."""

Row = dict[str, Any]

_NARROW = re.compile(r"(#|//).*\bnarrow:")


def name_of(row: Row) -> str:
    return ", ".join(row[field] for field in NAME)


def audited(variant: Variant, arch: str) -> tuple[Row, list[str]]:
    """The row of a variant on an architecture, and its findings; of a kernel that does not compile its name alone, and why."""
    return audit_of(variant, arch, compile_variant, source_key)


def audit_of(
    variant: Any, arch: str, compile_it: Callable[[Any, str], Binary], key_of: Callable[[Any], str]
) -> tuple[Row, list[str]]:
    """As ``audited``, of any compiler's kernel.

    Args:
        variant: says ``kernel``, ``label``, ``dtype`` and ``matrix``, and may say ``aligned``, as ``Variant`` has them.
        arch: one of ``LIMITS``.
        compile_it: of the variant and the architecture; it may raise anything.
        key_of: the row's ``source``.
    """
    row: Row = {"kernel": variant.kernel, "label": variant.label, "dtype": variant.dtype, "arch": arch}
    step = "does not compile"
    try:
        binary = compile_it(variant, arch)
        step = "compiles, and cannot be read"
        source, machine, resources = _read(binary, arch)
    except Exception as error:  # compilers' errors have no common base but this
        return row, [f"{step}: {type(error).__name__}: {_in_short(error)}"]
    row |= {"source": key_of(variant), **_facts(binary, source, machine, resources)}
    narrow = narrow_accesses(source, machine, LIMITS[arch].access) if getattr(variant, "aligned", False) else ()
    return row, [*findings(row, variant.matrix), *narrow]


def _facts(binary: Binary, source: Listing, machine: Listing, resources: machine_code.Resources) -> Row:
    """What a row says of a kernel's code besides its name."""
    return {
        "threads": binary.threads,
        **resources._asdict(),
        "dynamic_shared": binary.shared,
        "tensor_memory": binary.tensor_memory,
        "spill_stores": machine.local_stores,
        "spill_loads": machine.local_loads,
        "matrix": dict(source.matrix),
        "machine_matrix": dict(machine.matrix),
        **{f"{way}_bytes": _widths(machine.accesses, way) for way in ("load", "store", "copy")},
        "tma": machine.tma,
        "griddepcontrol": machine.griddepcontrol,
    }


def _read(binary: Binary, arch: str) -> tuple[Listing, Listing, machine_code.Resources]:
    """What it compiled from (PTX) and to (SASS), which on AMD is the same text, and what that needs."""
    if "amdgcn" in binary.code:
        text = binary.code["amdgcn"]
        listing = machine_code.read_amdgcn(text)
        return listing, listing, machine_code.amd_resources(text)
    cubin = binary.code["cubin"]
    sass = machine_code.sass_of(tools.disassembly(cubin), binary.name)
    resources = machine_code.resources_of(tools.resource_usage(cubin), binary.name, LIMITS[arch].reserved)
    return machine_code.read_ptx(binary.code["ptx"]), machine_code.read_sass(sass), resources


def _in_short(error: Exception) -> str:
    """How a compiler's long message begins, which may be a place, and how it ends, but for Triton's command to repeat it."""
    text = " ".join(str(error).partition("Repro command:")[0].split())
    return text if len(text) <= 300 else f"{text[:60]} ... {text[-240:]}"


def _widths(accesses: Iterable[Access], way: str) -> dict[str, int]:
    """How many accesses of each width, as JSON has its keys."""
    counts = Counter(access.bytes for access in accesses if access.way == way)
    return {str(size): counts[size] for size in sorted(counts)}


def findings(row: Row, matrix: bool) -> Iterator[str]:
    """What is wrong with a row of a kernel that compiled; ``matrix`` says that it must use the matrix units."""
    limits = LIMITS[row["arch"]]
    if row["spill_loads"]:  # ptxas reserves a little stack for purposes of its own too, which nothing reads
        yield f"spills: {row['spill_stores']} bytes stored and {row['spill_loads']} loaded a thread, {row['stack']} of stack"
    if matrix and not row["matrix"]:
        yield "no matrix instruction"
    elif matrix and not row["machine_matrix"]:
        yield f"no matrix instruction in the machine code, though the PTX has {', '.join(row['matrix'])}"
    if (shared := row["shared"] + row["dynamic_shared"]) > limits.shared:
        yield f"{shared} bytes of shared memory a block, of which there are {limits.shared}"
    if (registers := -(-row["registers"] // 8) * 8 * row["threads"]) > limits.registers:
        yield f"{registers} registers a block of {row['threads']} threads, of which there are {limits.registers}"
    if row["tensor_memory"] > limits.tensor_memory:
        yield f"{row['tensor_memory']} columns of tensor memory, of which there are {limits.tensor_memory}"


def narrow_accesses(source: Listing, machine: Listing, wide: int) -> Iterator[str]:
    """Accesses of fewer bytes than ``wide``, but those that the source says are meant so.

    Those of the machine code have no places: of them only a width that its source (PTX) does not have is told.
    """
    known = {access[:2] for access in source.accesses}
    accesses = [*source.accesses, *(access for access in machine.accesses if access[:2] not in known)]
    counts = Counter(access for access in accesses if access.bytes < wide and not _meant_narrow(access))
    for (way, size, place), count in counts.items():
        where = f" at {_shown(place[0])}:{place[1]}" if place else ""
        yield f"narrow: {count} {'copies' if way == 'copy' else f'{way}s'} of {size} bytes{where}"


def _meant_narrow(access: Access) -> bool:
    return access.place is not None and _NARROW.search(linecache.getline(*access.place)) is not None


def _shown(path: str) -> str:
    """Within the repository relative to it, so that it reads the same on every machine."""
    return str(Path(path).relative_to(ROOT)) if Path(path).is_relative_to(ROOT) else Path(path).name

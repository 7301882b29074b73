"""What a kernel's machine code holds, read from its text: PTX, SASS as nvdisasm prints it, and AMD's assembly."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Place = tuple[str, int]
"""A file and a line of it, from 1."""
Way = Literal["load", "store", "copy"]


class Access(NamedTuple):
    """An instruction that takes so many bytes a thread from or to global memory; a copy puts them into shared memory."""

    way: Way
    bytes: int
    place: Place | None = None


class Resources(NamedTuple):
    """``stack`` and ``shared`` are bytes: of local memory a thread, and of static shared memory a block."""

    registers: int
    stack: int
    shared: int


@dataclass
class Listing:
    """The instructions of one kernel that an audit is about, each counted as often as it stands in the text.

    ``local_loads`` and ``local_stores`` are the bytes a thread that they move from and to local memory, as ptxas counts spills.
    """

    matrix: Counter[str] = field(default_factory=Counter)
    accesses: list[Access] = field(default_factory=list)
    local_loads: int = 0
    local_stores: int = 0
    tma: int = 0
    griddepcontrol: int = 0


_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"(?:[ \t]+"([^"]*)")?', re.MULTILINE)
_LOC = re.compile(r"\s*\.loc\s+(\d+)\s+(\d+)")
_PTX = re.compile(r"[\s{]*(?:@!?%?\w+\s+)?([a-z]\w*(?:[.:]+\w+)*)(.*)")
_PTX_ELSEWHERE = ("param", "const", "local", "shared", "shared::cta", "shared::cluster")
_PTX_TMA = ("cp.async.bulk.tensor.", "cp.async.bulk.shared", "cp.async.bulk.global", "cp.reduce.async.bulk.")
_PTX_UNNAMED = ("sync", "aligned", "row", "col", "mma_async", "cta_group::1")
_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_SASS_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_SASS_WAYS: dict[str, Way] = {"LDG": "load", "LD": "load", "STG": "store", "ST": "store", "LDGSTS": "copy"}
_SASS_TMA = ("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "UBLKRED")
_AMD = re.compile(r"\s+(?:(v_(?:s?mfma|smfmac|wmma)_\w+)|(global|buffer|flat|scratch)_(load|store)_(lds_)?([a-z0-9]+)\w*)(.*)")
_AMD_BYTES = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


def read_ptx(text: str) -> Listing:
    """PTX, with the places of its accesses where ``.loc`` says them. Local memory is ptxas's to use, so none is counted."""
    found = Listing()
    for statement, place in _ptx_statements(text):
        if (match := _PTX.match(statement)) is None:
            continue
        opcode, operands = match.groups()
        head, *rest = opcode.split(".")
        if head == "mma" or rest[:1] in (["mma"], ["mma_async"]):
            found.matrix[_ptx_matrix_name(head, rest)] += 1
        elif head in ("ld", "st") and not set(rest) & set(_PTX_ELSEWHERE):
            found.accesses.append(Access("load" if head == "ld" else "store", _ptx_bytes(rest), place))
        elif opcode.startswith(("cp.async.ca", "cp.async.cg")):
            found.accesses.append(Access("copy", int(operands.split(",")[2], 0), place))
        elif opcode.startswith(_PTX_TMA):
            found.tma += 1
        elif head == "griddepcontrol":
            found.griddepcontrol += 1
    return found


def _ptx_statements(text: str) -> Iterator[tuple[str, Place | None]]:
    for line, place in _lines(text):
        for statement in line.partition("//")[0].split(";"):
            yield statement, place


def _lines(text: str) -> Iterator[tuple[str, Place | None]]:
    """The lines of PTX or AMD's assembly, each with its place in the source.

    Within inline assembly LLVM moves the line on with each line of the assembly, so there the place before it holds.
    """
    files = {number: f"{folder}/{name}" if name else folder for number, folder, name in _FILE.findall(text)}
    place, inline = None, False
    for line in text.splitlines():
        if "inline asm" in line:
            inline = "begin" in line
        elif (match := _LOC.match(line)) is not None:
            if not inline:
                place = (files.get(match[1], ""), int(match[2]))
        else:
            yield line, place


def _ptx_matrix_name(head: str, rest: list[str]) -> str:
    """``mma.m16n8k16.f32.f16``: the shape, the type of the sum and that of the first factor."""
    named = [head, *(word.removeprefix("kind::") for word in rest if word not in _PTX_UNNAMED)]
    return ".".join(named[:4])


def _ptx_bytes(rest: list[str]) -> int:
    """Of ``ld.global.v4.b32``: 16."""
    vector = next((int(word[1:]) for word in rest if re.fullmatch(r"v\d", word)), 1)
    return vector * next(int(word[1:]) // 8 for word in rest if re.fullmatch(r"[bsuf]\d+", word))


def read_sass(text: str) -> Listing:
    """SASS of one kernel. Accesses through generic addresses count as global ones."""
    found = Listing()
    for opcode in _SASS.findall(text):
        head, *rest = opcode.split(".")
        size = next((_SASS_BYTES[word] for word in rest if word in _SASS_BYTES), 4)
        if head.endswith("MMA"):
            found.matrix[opcode] += 1
        elif head in _SASS_WAYS:
            found.accesses.append(Access(_SASS_WAYS[head], size))
        elif head == "LDL":
            found.local_loads += size
        elif head == "STL":
            found.local_stores += size
        elif head in _SASS_TMA:
            found.tma += 1
        elif head in ("ACQBULK", "PREEXIT"):
            found.griddepcontrol += 1
    return found


def sass_of(text: str, kernel: str) -> str:
    """The part of nvdisasm's output that is the kernel's own code.

    Raises:
        ValueError: there is none.
    """
    match = re.search(rf"^\.text\.{re.escape(kernel)}:$(.*?)(?=^//-{{5,}}|\Z)", text, re.MULTILINE | re.DOTALL)
    if match is None:
        names = re.findall(r"^\.text\.(.*):$", text, re.MULTILINE)
        raise ValueError(f"nvdisasm printed no kernel {kernel!r}, but {', '.join(names) or 'none'}")
    return match[1]


def resources_of(text: str, kernel: str, reserved: int) -> Resources:
    """From the output of ``cuobjdump --dump-resource-usage``; ``reserved`` bytes of shared memory are not the kernel's.

    Raises:
        ValueError: it does not hold the kernel.
    """
    match = re.search(rf"Function {re.escape(kernel)}:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    if match is None:
        raise ValueError(f"cuobjdump printed no resources of {kernel!r}: {text.strip()}")
    registers, stack, shared = map(int, match.groups())
    return Resources(registers, stack, max(0, shared - reserved))


def read_amdgcn(text: str) -> Listing:
    """AMD's assembly of one kernel, with the places of its accesses. Scratch is its local memory."""
    found = Listing()
    for line, place in _lines(text):
        if (match := _AMD.match(line)) is None:
            continue
        matrix, space, direction, lds, unit, operands = match.groups()
        if matrix:
            found.matrix[matrix] += 1
            continue
        size = _AMD_BYTES[re.sub("^[us](?=byte|short)", "", unit)]
        if space != "scratch":
            way: Way = (
                "copy"
                if lds or operands.partition(";")[0].rstrip().endswith(" lds")
                else "load"
                if direction == "load"
                else "store"
            )
            found.accesses.append(Access(way, size, place))
        elif direction == "load":
            found.local_loads += size
        else:
            found.local_stores += size
    return found


def amd_resources(text: str) -> Resources:
    """From the metadata in AMD's assembly. Vector registers; those of the matrix units are among them.

    Raises:
        ValueError: it lacks an entry.
    """
    names = ("vgpr_count", "private_segment_fixed_size", "group_segment_fixed_size")
    found = [re.search(rf"^\s*(?:- )?\.{name}:\s+(\d+)", text, re.MULTILINE) for name in names]
    if None in found:
        raise ValueError(f"the assembly's metadata has no .{names[found.index(None)]}")
    return Resources(*(int(match[1]) for match in found if match is not None))

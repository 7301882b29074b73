"""The native library of the cuda backend: whether this installation has it, from which sources, and loading it.

Of the standard library alone, torch is imported to load; ``csrc/build.py`` runs this file for the names and for the hash.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NotRequired, TypedDict

FOLDER = Path(__file__).resolve().parent
LIBRARY = "libgooglenet_fused_cuda.so"
FACTS = "build.json"
SIMULATION = f"_host_sim{sysconfig.get_config_var('EXT_SUFFIX')}"
SIMULATION_FACTS = "_host_sim.json"
LIBRARY_SOURCES = ("inception", "binding.cpp", "build.py", "toolchain.py")
SIMULATION_SOURCES = ("inception", "host_sim", "build.py", "toolchain.py")
"""In ``csrc``: all that the library and the simulation are made from, and how."""

SOURCES = FOLDER.parents[2] / "csrc"
"""The library's sources, where this is a checkout."""

_OF_CPP = (".h", ".cuh", ".cpp", ".cu")
_REMEDY = "with nvcc on the PATH, `GOOGLENET_FUSED_BUILD=cuda pip install --no-build-isolation .` in its sources builds it"
_REMEDY_IN_CHECKOUT = "`make native` builds it"


class BuildFacts(TypedDict):
    """What is known of the library here. ``reason`` is there when it is not ``built``, the others when it once was."""

    built: bool
    reason: NotRequired[str]
    archs: NotRequired[list[str]]
    """As nvcc names them: sm_90 is machine code for 9.0, compute_90 PTX for 9.0 and all later ones."""
    nvcc: NotRequired[str]
    torch: NotRequired[str]
    source: NotRequired[str]
    bytes: NotRequired[int]
    """Of the library's file."""
    seconds: NotRequired[float]


def source_files(csrc: Path, names: Sequence[str]) -> Iterator[Path]:
    """Files of these names in ``csrc``, and in the folders among them all of C++ and CUDA."""
    for path in (csrc / name for name in names):
        if path.is_dir():
            yield from sorted(one for one in path.rglob("*") if one.suffix in _OF_CPP and one.is_file())
        else:
            yield path


def source_hash(csrc: Path, names: Sequence[str]) -> str:
    """Of what ``source_files`` finds."""
    digest = hashlib.sha256()
    for path in source_files(csrc, names):
        digest.update(f"{path.relative_to(csrc).as_posix()}\0".encode())
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def in_checkout() -> bool:
    """Whether the library's sources lie beside the package."""
    return (SOURCES / "inception" / "params.h").is_file() and (SOURCES / "binding.cpp").is_file()


def build_facts() -> BuildFacts:
    """What is known of the library. It counts as built only if it is there and, in a checkout, is made from its sources."""
    remedy = _REMEDY_IN_CHECKOUT if in_checkout() else _REMEDY
    path = FOLDER / FACTS
    try:
        facts: BuildFacts = json.loads(path.read_text())
        if not isinstance(facts, dict) or not isinstance(facts.get("built"), bool):
            raise ValueError("it says not whether the library was built")
        archs = facts.get("archs", [])
        if not isinstance(archs, list) or not all(isinstance(arch, str) for arch in archs):
            raise ValueError("its archs are not names")
    except FileNotFoundError:
        return {"built": False, "reason": f"this installation was made without the native library: {remedy}"}
    except (OSError, ValueError) as error:
        return {"built": False, "reason": f"{path} cannot be read ({error}): {remedy} anew"}
    if not facts["built"]:
        reason = str(facts.get("reason") or "it was not built")
        return {"built": False, "reason": reason if remedy in reason else f"{reason}; {remedy}"}
    if (fault := _fault_of(FOLDER / LIBRARY, facts, LIBRARY_SOURCES, f"{remedy} anew")) is not None:
        return {**facts, "built": False, "reason": fault}
    return facts


def simulation_fault() -> str | None:
    """Why the simulation that lies here is not to be imported, or None. What was not noted when it was built is not known."""
    try:
        facts = json.loads((FOLDER / SIMULATION_FACTS).read_text())
    except (OSError, ValueError):
        return None
    path = FOLDER / SIMULATION
    if not isinstance(facts, dict) or facts.get("file") != path.name or not path.is_file():
        return None
    return _fault_of(path, facts, SIMULATION_SOURCES, f"{_REMEDY_IN_CHECKOUT} anew")


def _fault_of(path: Path, facts: Mapping[str, Any], names: Sequence[str], remedy: str) -> str | None:
    """Why what was built is not to be loaded: a damaged file can end the process."""
    if not path.is_file():
        return f"{path} is missing: {remedy}"
    size, built = path.stat().st_size, facts.get("bytes")
    if isinstance(built, int) and size != built:
        return f"{path} is damaged, it has {size} bytes of {built}: {remedy}"
    try:
        changed = in_checkout() and source_hash(SOURCES, names) != facts.get("source")
    except OSError:  # of a checkout that is not whole
        changed = True
    if changed:
        return f"csrc/ has changed since {path.name} was built: `make native` builds it anew"
    return None


_lock = Lock()
_loaded: BuildFacts | None = None


def loaded_facts() -> BuildFacts:
    """What is known of the library that this process runs, whatever was built since; of that on the disk if none is loaded."""
    return _loaded or build_facts()


def load() -> str | None:
    """Load the library, once, so that ``torch.ops.googlenet_fused_cuda`` has its ops; no CUDA context is made.

    Returns:
        Why it cannot be loaded, or None.
    """
    global _loaded
    with _lock:
        if _loaded is not None:
            return None
        facts = build_facts()
        if not facts["built"]:
            return facts["reason"]

        import torch

        try:
            torch.ops.load_library(FOLDER / LIBRARY)
        except (OSError, RuntimeError) as error:  # of the dynamic linker and of the registration
            said = ": ".join(" ".join(str(one).split()) for one in (error, error.__cause__) if one)
            other = facts.get("torch") != torch.__version__
            why = f" (it was built with torch {facts.get('torch')}, here is {torch.__version__})" if other else ""
            remedy = _REMEDY_IN_CHECKOUT if in_checkout() else _REMEDY
            return f"the native library does not load: {said}{why}; {remedy} anew"
        _loaded = facts
        return None

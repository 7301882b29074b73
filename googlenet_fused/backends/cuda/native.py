"""The native library of the cuda backend: whether this installation has it, from which sources, and loading it.

Of the standard library alone, torch is imported to load; ``csrc/build.py`` runs this file for the names and for the hash.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from threading import Lock
from typing import NotRequired, TypedDict

FOLDER = Path(__file__).resolve().parent
LIBRARY = "libgooglenet_fused_cuda.so"
FACTS = "build.json"
SOURCES = FOLDER.parents[2] / "csrc"
"""The library's sources, where this is a checkout."""

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
    seconds: NotRequired[float]


def source_hash(csrc: Path) -> str:
    """Of all that the library is made from: ``csrc/inception``, the binding, and the build with its flags and architectures."""
    folder = csrc / "inception"
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu"))
    digest = hashlib.sha256()
    for path in [*files, *(csrc / name for name in ("binding.cpp", "build.py", "toolchain.py"))]:
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
    except FileNotFoundError:
        return {"built": False, "reason": f"this installation was made without the native library: {remedy}"}
    except (OSError, ValueError) as error:
        return {"built": False, "reason": f"{path} cannot be read ({error}): {remedy} anew"}
    if not facts["built"]:
        reason = str(facts.get("reason") or "it was not built")
        return {"built": False, "reason": reason if remedy in reason else f"{reason}; {remedy}"}
    if not (FOLDER / LIBRARY).is_file():
        return {**facts, "built": False, "reason": f"{FOLDER / LIBRARY} is missing: {remedy} anew"}
    if in_checkout() and source_hash(SOURCES) != facts.get("source"):
        return {
            **facts,
            "built": False,
            "reason": "csrc/ has changed since the library was built: `make native` builds it anew",
        }
    return facts


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
            built_with = f"it was built with torch {facts.get('torch')}, here is {torch.__version__}"
            return f"the native library does not load: {' '.join(str(error).split())} ({built_with})"
        _loaded = facts
        return None

"""NVIDIA's disassemblers, run on one cubin: those that Triton's wheel brings, else those on PATH."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path


class ToolError(Exception):
    """A disassembler is missing or failed."""


def disassembly(cubin: bytes) -> str:
    """The SASS of all kernels in it, as nvdisasm prints it.

    Raises:
        ToolError: there is no nvdisasm, or it cannot read this.
    """
    return _run(["nvdisasm", "--print-code", "--no-dataflow"], cubin)


def resource_usage(cubin: bytes) -> str:
    """Registers, stack and shared memory of all kernels in it, as cuobjdump prints them.

    Raises:
        ToolError: there is no cuobjdump, or it cannot read this.
    """
    return _run(["cuobjdump", "--dump-resource-usage"], cubin)


def check() -> None:
    """Raises ToolError: there is no nvdisasm or no cuobjdump."""
    for name in ("nvdisasm", "cuobjdump"):
        _tool(name)


def _run(command: list[str], cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([_tool(command[0]), *command[1:], str(path)], capture_output=True, text=True)
    if done.returncode:
        raise ToolError(f"{command[0]} failed with exit status {done.returncode}: {' '.join(done.stderr.split())}")
    return done.stdout


def _tool(name: str) -> str:
    spec = importlib.util.find_spec("triton")
    places = [str(Path(folder) / "backends" / "nvidia" / "bin") for folder in (spec and spec.submodule_search_locations) or ()]
    path = shutil.which(name, path=os.pathsep.join([*places, os.environ.get("PATH", "")]))
    if path is None:
        raise ToolError(f"{name} is neither in Triton's wheel nor on PATH: install Triton's own wheel or CUDA's toolkit")
    return path

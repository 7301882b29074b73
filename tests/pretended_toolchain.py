"""The build's modules, and machines that are not there for them to look at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.audit.cuda import load_build

build = load_build()
toolchain = build.toolchain


def machine(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def fake_nvcc(folder: Path, version: str = "13.1.4") -> Path:
    """A CUDA toolkit whose compiler only says what it is."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    said = f"Cuda compilation tools, release {version.rpartition('.')[0]}, V{version}"
    dry = f'#$ TOP={folder}\n#$ INCLUDES="-I{folder}/some include" \n#$ LIBRARIES= "-L{folder}/stubs" "-L{folder}/lib"'
    nvcc.write_text(
        f"#!/bin/sh\ncase $1 in\n--version) echo '{said}';;\n--list-gpu-code) printf 'sm_80\\nsm_90\\n';;\n"
        f"*) cat >&2 <<'END'\n{dry}\nEND\n;;\nesac\n"
    )
    nvcc.chmod(0o755)
    return folder

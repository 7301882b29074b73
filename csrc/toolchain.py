"""What the native parts are built with: architectures, jobs, compilers, torch and the processor, as this machine has them.

Nothing beyond the standard library is imported here, torch neither.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

DEFAULT_ARCHS = "8.0;9.0+PTX"
"""Where neither TORCH_CUDA_ARCH_LIST nor a GPU says otherwise."""

WHEEL_ARCHS = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
"""What ``--archs all`` builds."""

NAMED_ARCHS = {"Ampere": "8.0;8.6+PTX", "Ada": "8.9+PTX", "Hopper": "9.0+PTX", "Blackwell": "10.0;12.0+PTX"}
MINIMUM_CAPABILITY = (8, 0)
MINIMUM_NVCC = (12, 0)
"""The first with C++20."""

BYTES_A_JOB = 3 * 2**30
"""What nvcc may take for one architecture."""


class BuildError(RuntimeError):
    """The build failed, or what was asked for is wrong."""


class MissingTool(BuildError):
    """Something that the build needs is not on this machine."""


def parse_archs(text: str, source: str = "--archs") -> list[str]:
    """The architectures of a list as TORCH_CUDA_ARCH_LIST holds them, as nvcc names them: ``8.0;9.0+PTX`` gives
    ``sm_80``, ``sm_90`` and ``compute_90``. Those below 8.0, which the kernels cannot run on, are left out.

    Raises:
        BuildError: an entry is no architecture, or none is left; the message begins with ``source``.
    """
    codes: list[str] = []
    entries = [one for one in re.split(r"[;\s]+", text.strip()) if one]
    for entry, part in [(one, part) for one in entries for part in _spelled_out(one).split(";")]:
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", part)
        if found is None:
            names = ", ".join(NAMED_ARCHS)
            raise BuildError(f'{source}: {entry!r} is no architecture; write for example "{DEFAULT_ARCHS}", or a name: {names}')
        major, minor, suffix, ptx = found.groups()
        if (int(major), int(minor)) >= MINIMUM_CAPABILITY:
            codes += [f"sm_{major}{minor}{suffix}", *([f"compute_{major}{minor}{suffix}"] if ptx else [])]
    if not codes:
        raise BuildError(f"{source}: {text!r} holds no architecture that the kernels run on, which is 8.0 and later")
    return list(dict.fromkeys(codes))


def _spelled_out(entry: str) -> str:
    name, plus, rest = entry.partition("+")
    listed = NAMED_ARCHS.get(name, name)
    return f"{listed.removesuffix('+PTX')}+{rest}" if plus else listed


def archs_of(capabilities: Iterable[str]) -> str:
    """A list for the GPUs of these compute capabilities: machine code for each, PTX of the newest. Empty if none will do."""
    parsed = {tuple(map(int, one.split("."))) for one in capabilities if re.fullmatch(r"\d+\.\d", one)}
    usable = sorted(one for one in parsed if one >= MINIMUM_CAPABILITY)
    return ";".join(f"{major}.{minor}" for major, minor in usable) + ("+PTX" if usable else "")


def visible_capabilities() -> list[str]:
    """Compute capabilities of the GPUs that the driver knows."""
    try:
        asked = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return answer.stdout.split() if answer.returncode == 0 else []


def choose_archs(asked: str | None, environment: Mapping[str, str] = os.environ) -> list[str]:
    """What to build for: ``asked`` ("all": as the wheels), else TORCH_CUDA_ARCH_LIST, else the GPUs here, else the default.

    Raises:
        BuildError: as ``parse_archs``.
    """
    if asked is not None:
        return parse_archs(WHEEL_ARCHS if asked == "all" else asked)
    if listed := environment.get("TORCH_CUDA_ARCH_LIST", "").strip():
        return parse_archs(listed, "TORCH_CUDA_ARCH_LIST")
    return parse_archs(archs_of(visible_capabilities()) or DEFAULT_ARCHS)


def job_limit(cpus: int, memory: int | None) -> int:
    """Compilers to run at a time on this many processors and bytes of free memory (None: unknown). At least one."""
    return max(1, cpus if memory is None else min(cpus, memory // BYTES_A_JOB))


def usable_cpus() -> int:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cpus if quota == "max" else max(1, min(cpus, int(quota) // int(period)))
    except (OSError, ValueError):
        return cpus


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can be had without swapping: MemAvailable, or what the control group leaves if that is less."""
    found = []
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError, IndexError):
        pass
    for folder, limit, used in (
        ("sys/fs/cgroup", "memory.max", "memory.current"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            group = root / folder
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            reclaimable = int(statistics.get("inactive_file", 0))
            found.append(max(0, int((group / limit).read_text()) - int((group / used).read_text()) + reclaimable))
        except (OSError, ValueError):  # also of "max": no limit
            continue
    return min(found, default=None)


def choose_jobs(asked: int | None, environment: Mapping[str, str] = os.environ) -> int:
    """``asked``, else MAX_JOBS, else what processors and memory allow.

    Raises:
        BuildError: the number is not positive.
    """
    source, value = ("--jobs", str(asked)) if asked is not None else ("MAX_JOBS", environment.get("MAX_JOBS", "").strip())
    if not value:
        return job_limit(usable_cpus(), free_memory())
    if not re.fullmatch(r"0*[1-9]\d*", value):
        raise BuildError(f"{source}: {value!r} is no number of jobs; it is to be 1 or more")
    return int(value)


def find_ninja() -> str:
    """The ninja of this environment, else the one on the PATH."""
    ours = Path(sysconfig.get_path("scripts")) / "ninja"
    found = str(ours) if os.access(ours, os.X_OK) else shutil.which("ninja")
    if found is None:
        raise MissingTool(f"no ninja in {ours.parent} nor on the PATH: pip install ninja")
    return found


def find_cxx(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The C++ compiler: CXX, else g++ or c++ on the PATH."""
    asked = shlex.split(environment.get("CXX", ""))
    for command in [asked] if asked else [["g++"], ["c++"]]:
        if shutil.which(command[0], path=environment.get("PATH", "")):
            return command
    looked = f"CXX is {asked[0]!r}, which is not there" if asked else "neither g++ nor c++ is on the PATH"
    raise MissingTool(f"no C++ compiler: {looked}; install one (Debian, Ubuntu: apt install g++)")


class Nvcc(NamedTuple):
    """A CUDA compiler, with where its own headers and libraries are."""

    path: str
    version: str
    includes: list[str]
    libraries: list[str]
    codes: list[str]


def nvcc_candidates(
    environment: Mapping[str, str] = os.environ, fallback: Path = Path("/usr/local/cuda")
) -> list[tuple[str, str | None]]:
    """Where nvcc is looked for, in this order, and what is there."""

    def under(folder: str | Path | None) -> str | None:
        path = Path(folder) / "bin" / "nvcc" if folder else None
        return str(path) if path and os.access(path, os.X_OK) else None

    homes = [(name, environment.get(name)) for name in ("CUDA_HOME", "CUDA_PATH")]
    return [
        *((f"{name} ({home or 'not set'})", under(home)) for name, home in homes),
        ("the PATH", shutil.which("nvcc", path=environment.get("PATH", ""))),
        (str(fallback), under(fallback)),
    ]


def find_nvcc(environment: Mapping[str, str] = os.environ, fallback: Path = Path("/usr/local/cuda")) -> Nvcc:
    """The first nvcc of ``nvcc_candidates``.

    Raises:
        MissingTool: there is none, or it is too old.
    """
    candidates = nvcc_candidates(environment, fallback)
    path = next((found for _, found in candidates if found), None)
    if path is None:
        looked = ", ".join(where for where, _ in candidates)
        raise MissingTool(f"no nvcc: looked in {looked}. Install the CUDA toolkit {MINIMUM_NVCC[0]} or later, or set CUDA_HOME")
    said = _output([path, "--version"])
    found = re.search(r"\bV(\d+)\.(\d+)\.(\d+)", said)
    if found is None:
        raise MissingTool(f"{path} --version does not say its version: {' '.join(said.split()) or 'nothing'}")
    version = ".".join(found.groups())
    if (int(found[1]), int(found[2])) < MINIMUM_NVCC:
        needed = ".".join(map(str, MINIMUM_NVCC))
        raise MissingTool(
            f"{path} is version {version}, which is too old: {needed} or later is needed. Set CUDA_HOME to a newer one"
        )
    # Where it has its headers nvcc alone knows: what is on the PATH may be a script that calls the real one.
    dry = _output([path, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull])
    return Nvcc(
        path,
        version,
        [flag[2:] for flag in _flags(dry, "INCLUDES") if flag.startswith("-I")],
        [flag[2:] for flag in _flags(dry, "LIBRARIES") if flag.startswith("-L")],
        _output([path, "--list-gpu-code"]).split(),
    )


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingTool(f"{command[0]} does not run: {error}") from error
    return done.stdout + done.stderr


def _flags(dry_run: str, name: str) -> list[str]:
    found = re.search(rf"^#\$ {name}=(.*)$", dry_run, re.MULTILINE)
    return shlex.split(found[1]) if found else []


class Torch(NamedTuple):
    """A torch to build for; ``cuda`` is the version of CUDA that it was built with, None if it was without."""

    folder: Path
    version: str
    cuda: str | None


def find_torch() -> Torch:
    """The torch of this environment, not imported.

    Raises:
        MissingTool: there is none, or one without headers.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise MissingTool("no torch in this environment (build isolation hides it: pip install --no-build-isolation .)")
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not (folder / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        raise MissingTool(f"the torch in {folder} has no headers of the stable ABI: torch 2.11 or later is needed")
    facts = dict(re.findall(r"^(__version__|cuda)\b.*= *'(.*)'", (folder / "version.py").read_text(), re.MULTILINE))
    return Torch(folder, facts.get("__version__", "unknown"), facts.get("cuda"))


def pybind11_include() -> Path:
    spec = importlib.util.find_spec("pybind11")
    if spec is None or not spec.submodule_search_locations:
        raise MissingTool("no pybind11 in this environment: pip install pybind11")
    return Path(next(iter(spec.submodule_search_locations))) / "include"


def cpu_flags() -> set[str]:
    """What Linux says that this CPU has."""
    try:
        found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return set()
    return set(found[1].split()) if found else set()


def sanitizer_environment() -> dict[str, str]:
    """Variables under which a Python that was built without sanitizers can import a ``sanitized`` simulation.

    Raises:
        MissingTool: the compiler does not have the sanitizers' libraries.
    """
    libraries = [_output([*find_cxx(), f"-print-file-name={name}"]).strip() for name in ("libasan.so", "libubsan.so")]
    missing = [path for path in libraries if not os.path.isabs(path)]
    if missing:
        raise MissingTool(f"the C++ compiler has no {' nor '.join(missing)}")
    # Python itself never frees all that it has.
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    return {"LD_PRELOAD": ":".join(libraries), "ASAN_OPTIONS": options, "UBSAN_OPTIONS": "print_stacktrace=1"}

"""What this machine is and what can run on it: the facts behind ``doctor`` and every benchmark's description."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from googlenet_fused import __version__
from googlenet_fused.backends import registry, trust
from googlenet_fused.backends.triton.backend import missing_tools
from googlenet_fused.messages import first_line

MINIMUM_TORCH = (2, 11)
PACKAGES = ("torch", "torchvision", "triton", "numpy", "pillow", "safetensors", "rich", "matplotlib", "scikit-image")
"""Distributions whose versions decide what works here, by the name the package index knows them under."""

FLAG_PREFIXES = (
    *("OMP_", "KMP_", "GOMP_", "MKL_", "DNNL_", "ONEDNN_", "ATEN_CPU_"),
    *("NVIDIA_TF32_", "PYTORCH_", "TORCHINDUCTOR_", "TRITON_", "CUDNN_", "CUBLAS_", "CUDA_"),
)
"""Environment variables that a timing may depend on begin with these."""

PLACE_SUFFIXES = ("_DIR", "_HOME", "_PATH")
"""Those that end with these say where files are. No timing depends on that, and Inductor sets such a one while it runs."""

_IMPORT_NAMES = {"pillow": "PIL", "scikit-image": "skimage"}


@dataclass(frozen=True)
class PackageState:
    """A package as found here: ``version`` is ``None`` when it is not installed, ``problem`` says why it does not import."""

    version: str | None
    problem: str | None = None

    def __str__(self) -> str:
        if self.version is None:
            return "not installed"
        return self.version if self.problem is None else f"{self.version}, but it does not import: {self.problem}"


def distribution_version(name: str) -> str | None:
    """The installed version of a distribution, without importing it; ``None`` when it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def package_state(name: str) -> PackageState:
    """Looks a distribution up and imports it, so that one that is installed but broken is told from one that works."""
    version = distribution_version(name)
    if version is None:
        return PackageState(None)
    try:
        importlib.import_module(_IMPORT_NAMES.get(name, name))
    # An import can fail in any way: a missing symbol, an unregistered operator, a version check, an exit.
    except (Exception, SystemExit) as error:
        return PackageState(version, f"{type(error).__name__}: {first_line(error)}")
    return PackageState(version)


@cache
def cpu_model() -> str:
    """The processor's name as the operating system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def usable_cpus() -> int:
    """Logical processors this process may run on: its affinity mask, cut to the control group's quota where there is one."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cpus = min(cpus, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cpus


def physical_cores() -> int:
    """Cores behind the usable processors, hyper-threads counted once (Linux; elsewhere the usable processors)."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    cores = set()
    for cpu in usable:
        try:
            topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
            cores.add(((topology / "physical_package_id").read_text(), (topology / "core_id").read_text()))
        except OSError:
            return usable_cpus()
    return min(len(cores), usable_cpus()) or usable_cpus()


@cache
def onednn_version() -> str | None:
    """The oneDNN that torch was built with, from its build description; ``None`` when there is none."""
    found = re.search(r"(?:MKL-DNN|oneDNN)\s+v([\d.]+)", torch.__config__.show())
    return found.group(1) if found else None


def machine_description() -> dict[str, Any]:
    """What a timing taken here depends on, ready for JSON: processor, threads, operating system, torch and its flags."""
    backends: Any = torch.backends
    precisions = {  # torch's older flags raise once one of these was set alone
        **{"cudnn_conv": backends.cudnn.conv, "cuda_matmul": backends.cuda.matmul},
        **{"mkldnn_conv": backends.mkldnn.conv, "mkldnn_matmul": backends.mkldnn.matmul},
    }
    flags: dict[str, Any] = {
        "cudnn_benchmark": backends.cudnn.benchmark,
        **{f"{name}_fp32_precision": flags.fp32_precision for name, flags in precisions.items()},
        "mkldnn": backends.mkldnn.is_available() and backends.mkldnn.enabled,
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(FLAG_PREFIXES) and not name.endswith(PLACE_SUFFIXES)
        },
    }
    return {
        "cpu": cpu_model(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "physical_cores": physical_cores(),
        "usable_cpus": usable_cpus(),
        "threads": torch.get_num_threads(),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "onednn": onednn_version(),
        "flags": flags,
        "gpu": gpu_description(),
    }


def gpu_description() -> dict[str, Any] | None:
    """Name, architecture, memory, L2 cache and driver of the current CUDA device; ``None`` on a machine without one."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "arch": trust.architecture(properties),
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "driver": trust.nvidia_driver_version(),
    }


def warnings(packages: Mapping[str, PackageState]) -> list[str]:
    """The known traps that this machine is in, each with its remedy."""
    found: list[str] = []
    torch_version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if torch_version < MINIMUM_TORCH:
        found.append(
            f"torch {torch.__version__} is older than {'.'.join(map(str, MINIMUM_TORCH))}, the oldest supported: upgrade torch"
        )
    torchvision = packages.get("torchvision", PackageState(None))
    if torchvision.problem is not None:
        build = "a CPU-only build" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        found.append(
            f"torchvision {torchvision.version} does not import beside torch {torch.__version__} ({build}): "
            "install both from the same index and for the same torch release. This package itself does not need torchvision"
        )
    if torch.version.cuda is not None and not torch.cuda.is_available() and Path("/proc/driver/nvidia/version").exists():
        found.append("an NVIDIA driver is loaded but torch sees no CUDA device: check nvidia-smi and CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None and Path("/proc/driver/nvidia/version").exists():
        found.append("this machine has an NVIDIA driver, but torch is a CPU-only build: install a CUDA build to use the GPU")
    if torch.cuda.is_available() and packages.get("triton", PackageState(None)).version is not None:
        found += missing_tools()
    if torch.get_num_threads() > usable_cpus():
        found.append(
            f"torch uses {torch.get_num_threads()} threads on {usable_cpus()} usable processors, which slows oneDNN down "
            f"badly: set OMP_NUM_THREADS={physical_cores()}"
        )
    if not torch.backends.mkldnn.is_available():
        found.append("this torch has no oneDNN, so the cpu backend has nothing to be fast with")
    return found


def backends() -> dict[str, dict[str, Any]]:
    """What ``registry.status`` and its ``facts`` say of every known backend, by name; ``reason`` says why one is not available.

    Raises:
        DamagedInstallation: as ``registry.status``.
    """
    return {name: {**state, **registry.get(name).facts()} for name, state in registry.status().items()}


def report() -> dict[str, Any]:
    """Everything ``doctor`` knows, ready for JSON. Missing or broken optional packages are reported, never raised.

    Raises:
        DamagedInstallation: as ``registry.status``.
    """
    packages = {name: package_state(name) for name in PACKAGES}
    return {
        "versions": {
            "googlenet_fused": __version__,
            "python": platform.python_version(),
            "cuda_runtime": torch.version.cuda,
            **{name.replace("-", "_"): state.version for name, state in packages.items()},
        },
        "packages": {name: asdict(state) for name, state in packages.items()},
        "machine": machine_description(),
        "backends": backends(),
        "warnings": warnings(packages),
    }


def as_text(facts: Mapping[str, Any]) -> str:
    """What `report` returns, for people. Plain text, so that ``doctor`` needs no package beyond torch."""
    versions, machine, gpu = facts["versions"], facts["machine"], facts["machine"]["gpu"]
    lines = [f"googlenet_fused {versions['googlenet_fused']}", "", "Versions"]
    lines += _aligned(
        {
            "python": versions["python"],
            **{name: str(PackageState(**state)) for name, state in facts["packages"].items()},
            "CUDA runtime": versions["cuda_runtime"] or "none: torch is a CPU-only build",
        }
    )
    lines += ["", "Machine"]
    lines += _aligned(
        {
            "processor": f"{machine['cpu']}, {machine['physical_cores']} cores, {machine['usable_cpus']} usable processors",
            "instructions": f"{machine['isa']}; oneDNN {machine['onednn'] or 'is not in this torch'}",
            "torch threads": str(machine["threads"]),
            "GPU": f"{gpu['name']}, {gpu['arch']}, {gpu['memory_gib']} GiB" if gpu else "none that torch can use",
            "system": machine["os"],
        }
    )
    lines += ["", "Backends"]
    lines += _aligned({name: _backend_text(state) for name, state in facts["backends"].items()})
    if facts["warnings"]:
        lines += ["", "Warnings", *(f"  {text}" for text in facts["warnings"])]
    return "\n".join(lines)


def _backend_text(state: Mapping[str, Any]) -> str:
    text = f"available: {state['description']}" if state["available"] else f"not available: {state['reason']}"
    if not state["needs_verification"]:
        return text
    built = [f"built for {', '.join(state['archs'])}"] if state.get("archs") else []
    parts = [text, *built, *(_verified_text(entry) for entry in state["verified_on"])]
    if not state["verified_on"]:
        unknown = "" if state["here"] else ": automatic choice uses it on one only after a self-check there"
        parts.append(f"its tests have not run on a GPU yet{unknown}")
    if state["here"]:
        parts.append(f"here {_here_text(state['here'])}")
    return "; ".join(parts)


def _verified_text(entry: Mapping[str, Any]) -> str:
    triton = f", triton {entry['triton']}" if entry["triton"] else ""
    other = "" if entry["current"] else " with other versions or sources than these"
    return f"verified on {entry['gpu']} (torch {entry['torch']}{triton}, commit {entry['commit'][:9]}){other}"


def _here_text(here: Mapping[str, str]) -> str:
    said = dict.fromkeys(here.values())
    return ", ".join(f"{how} in {' and '.join(name for name in here if here[name] == how)}" for how in said)


def _aligned(rows: Mapping[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"  {name:<{width}}  {value}" for name, value in rows.items()]

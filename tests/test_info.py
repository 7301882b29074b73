"""What doctor knows: versions, backends with reasons, and the known traps."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from googlenet_fused import __version__, info
from googlenet_fused.backends import registry, trust
from googlenet_fused.backends.cuda import backend as cuda_backend
from googlenet_fused.backends.cuda import native
from googlenet_fused.backends.triton import backend
from googlenet_fused.info import PackageState


@pytest.fixture(scope="module")
def facts() -> dict[str, object]:
    return info.report()


def test_the_report_is_json(facts: dict[str, object]) -> None:
    assert json.loads(json.dumps(facts)) == facts


def test_versions_are_those_that_run(facts: dict[str, object]) -> None:
    versions = facts["versions"]
    assert isinstance(versions, dict)
    assert versions["googlenet_fused"] == __version__
    assert versions["python"] == platform.python_version()
    assert versions["cuda_runtime"] == torch.version.cuda
    assert torch.__version__.startswith(versions["torch"])
    assert {"torchvision", "triton", "scikit_image"} <= set(versions)


def test_every_backend_says_why_it_is_not_available(facts: dict[str, object]) -> None:
    backends = facts["backends"]
    assert isinstance(backends, dict)
    assert {"cpu", "reference"} <= set(backends)
    for name, state in backends.items():
        fields = {"available", "reason", "description", "needs_verification", "verified_on", "here"}
        assert set(state) == (fields | {"built", "archs"} if name == "cuda" else fields)
        assert state["available"] == (state["reason"] is None)
        assert state["description"]
        assert state["needs_verification"] or (state["verified_on"], state["here"]) == ([], {})


def test_the_cuda_backend_says_whether_it_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "build_facts", lambda: {"built": True, "archs": ["sm_80", "compute_90"]})
    state = info.backends()["cuda"]
    assert (state["built"], state["archs"]) == (True, ["sm_80", "compute_90"])
    assert "; built for sm_80, compute_90; its tests" in info.as_text({**info.report(), "backends": {"cuda": state}})
    monkeypatch.setattr(native, "build_facts", lambda: {"built": False, "reason": "there is no nvcc"})
    monkeypatch.setattr(native, "_loaded", None)
    cuda_backend._refuse_library.cache_clear()
    state = info.backends()["cuda"]
    assert (state["built"], state["archs"], state["available"], state["reason"]) == (False, [], False, "there is no nvcc")
    text = info.as_text({**info.report(), "backends": {"cuda": state}})
    assert "not available: there is no nvcc; its tests have not run on a GPU yet" in text
    cuda_backend._refuse_library.cache_clear()


def test_the_machine_is_described(facts: dict[str, object]) -> None:
    machine = facts["machine"]
    assert isinstance(machine, dict)
    assert machine["isa"] == torch.backends.cpu.get_cpu_capability()
    assert 1 <= machine["physical_cores"] <= machine["usable_cpus"] <= (os.cpu_count() or 1)
    assert machine["threads"] == torch.get_num_threads()
    assert machine["cpu"] != "unknown"


def backend_state(**changes: Any) -> dict[str, Any]:
    """Of a backend that is available, as the report has it."""
    facts = {"available": True, "reason": None, "description": "d", "needs_verification": False}
    return {**facts, "verified_on": [], "here": {}, **changes}


BROKEN: dict[str, tuple[str, str]] = {
    "no version": ("from . import knobs", "is incomplete or of an unknown version"),
    "no version known": ("from . import knobs\n__version__ = None", "is incomplete or of an unknown version"),
    "a version in words": ("from . import knobs\n__version__ = 'dev'", "is incomplete or of an unknown version"),
    "no knobs": ("__version__ = '3.8.0'", "is incomplete or of an unknown version"),
    "too old": ("__version__ = '3.5.1+git'", "is older than 3.6: upgrade torch"),
    "exits": ("import sys; sys.exit('no driver')", "triton does not import: SystemExit: no driver"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_triton_is_a_reason_and_costs_nothing_else(name: str, tmp_path: Path) -> None:
    content, reason = BROKEN[name]
    folder = tmp_path / "triton"
    folder.mkdir()
    (folder / "__init__.py").write_text(content)
    if name != "no knobs":
        (folder / "knobs.py").write_text("class runtime:\n    interpret = False\n")
    program = (
        "import torch, googlenet_fused\n"
        "from googlenet_fused.backends import registry\n"
        "from googlenet_fused.cli import main\n"
        "block = googlenet_fused.FusedInception(4, 2, 2, 2, 2, 2, 2).eval()\n"
        "with torch.inference_mode(): assert block(torch.ones(1, 4, 3, 3)).shape[1] == 8\n"
        "assert main(['doctor']) == 0\n"
        "print('REASON', registry.status()['triton']['reason'])\n"
    )
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    (line,) = (line for line in run.stdout.splitlines() if line.startswith("REASON"))
    assert reason in line
    assert name == "exits" or str(folder) in line


def test_a_folder_that_happens_to_be_called_triton_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("triton")
    module.__path__ = ["/home/someone/triton"]
    monkeypatch.setitem(sys.modules, "triton", module)
    assert backend._probe.__wrapped__() == "triton is incomplete or of an unknown version (/home/someone/triton)"


def test_triton_says_that_it_is_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = registry.get("triton")
    monkeypatch.setattr(type(triton), "probe", lambda self: None)
    said = "interpreted on CPU tensors (TRITON_INTERPRET=1): fp32 and fp16, only if asked for by name"
    for interprets in (True, False):
        monkeypatch.setattr(backend, "interpreting", lambda interprets=interprets: interprets)
        assert (said in info.backends()["triton"]["description"]) is interprets


def verified_entry(**changes: Any) -> dict[str, Any]:
    facts = {"gpu": "NVIDIA H100", "arch": "sm_90", "torch": "2.11.0", "triton": "3.6.0", "commit": "0123456789abcdef"}
    return {**facts, "date": "2026-01-02", "current": True, **changes}


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"verified_on": [], "needs_verification": False}, "available: d"),
        (
            {"verified_on": []},
            "available: d; its tests have not run on a GPU yet: automatic choice uses it on one only after a self-check there",
        ),
        (
            {"available": False, "reason": "none"},
            "not available: none; its tests have not run on a GPU yet: automatic choice uses it on one only after a "
            "self-check there",
        ),
        (
            {"here": {"float16": "self-check passed", "float32": "to be checked at first use", "tf32": "self-check passed"}},
            "available: d; its tests have not run on a GPU yet; here self-check passed in float16 and tf32, to be checked "
            "at first use in float32",
        ),
        (
            {"verified_on": [verified_entry()]},
            "available: d; verified on NVIDIA H100 (torch 2.11.0, triton 3.6.0, commit 012345678)",
        ),
        (
            {"verified_on": [verified_entry(gpu="NVIDIA L4", triton=None, current=False), verified_entry(commit="abc1")]},
            "available: d; verified on NVIDIA L4 (torch 2.11.0, commit 012345678) with other versions or sources than these; "
            "verified on NVIDIA H100 (torch 2.11.0, triton 3.6.0, commit abc1)",
        ),
    ],
)
def test_text_says_where_a_backend_was_verified(facts: dict[str, object], state: dict[str, Any], text: str) -> None:
    state = backend_state(**{"needs_verification": True, **state})
    lines = info.as_text({**facts, "backends": {"some": state}}).splitlines()
    assert lines[lines.index("Backends") + 1] == f"  some  {text}"


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        name="NVIDIA Test", major=9, minor=0, multi_processor_count=132, total_memory=2**36, L2_cache_size=2**25
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(trust, "nvidia_driver_version", lambda: "580.1")
    assert info.gpu_description() == {
        "name": "NVIDIA Test",
        "arch": "sm_90",
        "multiprocessors": 132,
        "memory_gib": 64.0,
        "l2_mib": 32.0,
        "driver": "580.1",
    }


def test_text_names_every_backend_and_reason(facts: dict[str, object]) -> None:
    changed = {**facts, "backends": {"nope": backend_state(available=False, reason="no such device")}}
    text = info.as_text({**changed, "warnings": ["look out"]})
    assert "nope  not available: no such device\n" in text
    assert "look out" in text
    assert f"googlenet_fused {__version__}" in text
    assert "GPU" in text


def test_a_package_that_is_not_installed_is_told_from_one_that_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert info.package_state("no-such-distribution-here") == PackageState(None)
    assert str(PackageState(None)) == "not installed"

    def refuse(name: str) -> ModuleType:
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(importlib, "import_module", refuse)
    state = info.package_state("torch")
    assert state.version == info.distribution_version("torch")
    assert state.problem == "RuntimeError: operator torchvision::nms does not exist"
    assert "but it does not import" in str(state)


def test_a_torchvision_that_does_not_fit_is_a_warning_with_the_remedy() -> None:
    (warning,) = [
        text for text in info.warnings({"torchvision": PackageState("0.1", "RuntimeError: nms")}) if "torchvision" in text
    ]
    assert "install both from the same index" in warning
    assert not [text for text in info.warnings({"torchvision": PackageState(None)}) if "torchvision" in text]


def test_an_old_torch_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.0+cpu")
    assert any("older than 2.11" in text for text in info.warnings({}))
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    assert not any("older than" in text for text in info.warnings({}))


def test_more_threads_than_processors_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1 + info.usable_cpus())
    assert any("set OMP_NUM_THREADS=" in text for text in info.warnings({}))


def test_triton_on_a_gpu_machine_wants_a_compiler_and_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    found = info.warnings({"triton": PackageState("3.6.0")})
    assert any("install gcc" in text for text in found)
    assert any("Python.h" in text for text in found)
    assert backend.missing_tools() == [text for text in found if text.startswith("Triton builds its launcher with ")]
    assert not any("gcc" in text for text in info.warnings({"triton": PackageState(None)}))


@pytest.mark.parametrize(
    ("cc", "there", "said"),
    [
        (None, {"gcc"}, None),
        (None, {"clang"}, None),
        (None, {"cc"}, "neither gcc nor clang is on PATH"),
        ("/opt/cc", {"/opt/cc"}, None),
        ("/opt/cc", {"gcc"}, "the C compiler that CC names, and '/opt/cc' is none: unset CC"),
        ("", {"gcc"}, "the C compiler that CC names, and '' is none"),
    ],
)
def test_the_compiler_that_triton_takes(
    cc: str | None, there: set[str], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """$CC whatever it is, else gcc or clang, and never cc."""
    monkeypatch.delenv("CC", raising=False)
    if cc is not None:
        monkeypatch.setenv("CC", cc)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    found = [text for text in backend.missing_tools() if "C compiler" in text]
    assert (found == []) if said is None else (len(found) == 1 and said in found[0])


def test_the_report_does_without_optional_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchvision", "matplotlib", "rich", "PIL", "skimage"):
        monkeypatch.setitem(sys.modules, name, None)
    facts = info.report()
    if facts["versions"]["matplotlib"] is not None:
        assert facts["packages"]["matplotlib"]["problem"].startswith("ModuleNotFoundError")
    assert facts["backends"]
    assert info.as_text(facts)


def test_places_are_no_flags_of_a_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor sets its cache's folder by itself: two runs in one process would otherwise be on different machines."""
    before = info.machine_description()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/elsewhere")
    assert info.machine_description() == before
    monkeypatch.setenv("OMP_PROC_BIND", "close")
    assert info.machine_description()["flags"]["environment"]["OMP_PROC_BIND"] == "close"

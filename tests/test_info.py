"""What doctor knows: versions, backends with reasons, and the known traps."""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from googlenet_fused import __version__, info
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
    for state in backends.values():
        assert set(state) == {"available", "reason", "description"}
        assert state["available"] == (state["reason"] is None)
        assert state["description"]


def test_the_machine_is_described(facts: dict[str, object]) -> None:
    machine = facts["machine"]
    assert isinstance(machine, dict)
    assert machine["isa"] == torch.backends.cpu.get_cpu_capability()
    assert 1 <= machine["physical_cores"] <= machine["usable_cpus"] <= (os.cpu_count() or 1)
    assert machine["threads"] == torch.get_num_threads()
    assert machine["cpu"] != "unknown"


def test_text_names_every_backend_and_reason(facts: dict[str, object]) -> None:
    changed = {**facts, "backends": {"nope": {"available": False, "reason": "no such device", "description": "d"}}}
    text = info.as_text({**changed, "warnings": ["look out"]})
    assert "nope  not available: no such device" in text
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
    monkeypatch.setattr(info.shutil, "which", lambda _: None)
    monkeypatch.setattr(info.sysconfig, "get_path", lambda _: str(tmp_path))
    found = info.warnings({"triton": PackageState("3.6.0")})
    assert any("install gcc" in text for text in found)
    assert any("Python.h" in text for text in found)
    assert not any("gcc" in text for text in info.warnings({"triton": PackageState(None)}))


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

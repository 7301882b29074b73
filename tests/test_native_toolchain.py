"""What the native parts are built with: architectures, jobs, memory, compilers, and what is said where one is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pretended_toolchain import fake_nvcc, machine, toolchain


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("8.0", ["sm_80"]),
        ("8.0;9.0+PTX", ["sm_80", "sm_90", "compute_90"]),
        (" 8.6  8.9 ", ["sm_86", "sm_89"]),
        ("9.0a;10.0f+PTX", ["sm_90a", "sm_100f", "compute_100f"]),
        ("8.0;8.0+PTX;8.0", ["sm_80", "compute_80"]),
        ("5.2 7.5 8.6+PTX", ["sm_86", "compute_86"]),
        ("Ampere", ["sm_80", "sm_86", "compute_86"]),
        ("Ampere+PTX;Hopper", ["sm_80", "sm_86", "compute_86", "sm_90", "compute_90"]),
        (toolchain.WHEEL_ARCHS, ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_120"]),
    ],
)
def test_arch_lists_are_read_as_torch_reads_them(text: str, codes: list[str]) -> None:
    assert toolchain.parse_archs(text) == codes


@pytest.mark.parametrize("text", ["sm_80", "80", "8", "8.0,9.0", "8.0+ptx", "8.0;hopper", "all", "9.0b", "Hopper+"])
def test_nonsense_in_an_arch_list_is_named(text: str) -> None:
    with pytest.raises(
        toolchain.BuildError, match=r"^MY_LIST: '.+' is no architecture; write for example \"8\.0;9\.0\+PTX\""
    ) as caught:
        toolchain.parse_archs(text, "MY_LIST")
    assert repr(text.rpartition(";")[2]) in str(caught.value)


@pytest.mark.parametrize("text", ["7.5", "6.0;7.0+PTX", "", " ; "])
def test_an_arch_list_without_a_usable_one_is_refused(text: str) -> None:
    with pytest.raises(toolchain.BuildError, match=r"holds no architecture that the kernels run on, which is 8\.0 and later"):
        toolchain.parse_archs(text)


@pytest.mark.parametrize(
    ("capabilities", "text"),
    [
        (["9.0"], "9.0+PTX"),
        (["9.0", "8.6", "9.0"], "8.6;9.0+PTX"),
        (["7.5", "8.0"], "8.0+PTX"),
        (["7.5"], ""),
        ([], ""),
        (["[N/A]"], ""),
    ],
)
def test_the_visible_gpus_make_an_arch_list(capabilities: list[str], text: str) -> None:
    assert toolchain.archs_of(capabilities) == text


@pytest.mark.parametrize(
    ("asked", "listed", "gpus", "codes"),
    [
        ("8.9", "8.6", ["9.0"], ["sm_89"]),
        ("all", "8.6", [], toolchain.parse_archs(toolchain.WHEEL_ARCHS)),
        (None, "8.6", ["9.0"], ["sm_86"]),
        (None, "  ", ["12.0"], ["sm_120", "compute_120"]),
        (None, None, [], ["sm_80", "sm_90", "compute_90"]),
        (None, None, ["7.0"], ["sm_80", "sm_90", "compute_90"]),
    ],
)
def test_archs_are_those_asked_for_then_listed_then_here(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, listed: str | None, gpus: list[str], codes: list[str]
) -> None:
    monkeypatch.setattr(toolchain, "visible_capabilities", lambda: gpus)
    assert toolchain.choose_archs(asked, {} if listed is None else {"TORCH_CUDA_ARCH_LIST": listed}) == codes


def test_a_wrong_list_in_the_environment_is_named() -> None:
    with pytest.raises(toolchain.BuildError, match=r"^TORCH_CUDA_ARCH_LIST: 'Kepler' is no architecture"):
        toolchain.choose_archs(None, {"TORCH_CUDA_ARCH_LIST": "8.0 Kepler"})
    with pytest.raises(toolchain.BuildError, match=r"^--archs: '' holds no architecture"):
        toolchain.choose_archs("", {"TORCH_CUDA_ARCH_LIST": "8.0"})


GIB = 2**30


@pytest.mark.parametrize(
    ("cpus", "memory", "jobs"),
    [
        (8, None, 8),
        (8, 64 * GIB, 8),
        (8, 12 * GIB, 4),
        (8, 12 * GIB - 1, 3),
        (64, 7 * GIB, 2),
        (4, GIB, 1),
        (4, 0, 1),
        (1, 64 * GIB, 1),
    ],
)
def test_jobs_are_capped_by_processors_and_memory(cpus: int, memory: int | None, jobs: int) -> None:
    assert toolchain.job_limit(cpus, memory) == jobs


MEMINFO = {"proc/meminfo": "MemTotal: 33554432 kB\nMemFree: 1 kB\nMemAvailable: 16777216 kB\n"}  # 32 and 16 GiB
STAT = "anon 1\ninactive_file {}\nactive_file 7\n"


@pytest.mark.parametrize(
    ("files", "gib"),
    [
        ({}, None),
        (MEMINFO, 16),
        (
            MEMINFO
            | {"sys/fs/cgroup/memory.max": f"{8 * GIB}", "sys/fs/cgroup/memory.current": f"{5 * GIB}"}
            | {"sys/fs/cgroup/memory.stat": STAT.format(GIB)},
            4,
        ),
        (
            MEMINFO
            | {"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": f"{5 * GIB}"}
            | {"sys/fs/cgroup/memory.stat": STAT.format(0)},
            16,
        ),
        (
            MEMINFO
            | {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{6 * GIB}",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}",
            }
            | {"sys/fs/cgroup/memory/memory.stat": STAT.format(0)},
            5,
        ),
        (
            {"sys/fs/cgroup/memory.max": f"{GIB}", "sys/fs/cgroup/memory.current": f"{2 * GIB}"}
            | {"sys/fs/cgroup/memory.stat": STAT.format(0)},
            0,
        ),
    ],
    ids=["unknown", "machine", "group", "group without a limit", "old group", "group over its limit"],
)
def test_free_memory_is_that_of_the_control_group_if_less(tmp_path: Path, files: dict[str, str], gib: int | None) -> None:
    assert toolchain.free_memory(machine(tmp_path, files)) == (None if gib is None else gib * GIB)


def test_jobs_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "usable_cpus", lambda: 6)
    monkeypatch.setattr(toolchain, "free_memory", lambda: 9 * GIB)
    assert toolchain.choose_jobs(None, {}) == 3
    assert toolchain.choose_jobs(None, {"MAX_JOBS": " "}) == 3
    assert toolchain.choose_jobs(None, {"MAX_JOBS": "11"}) == 11
    assert toolchain.choose_jobs(5, {"MAX_JOBS": "11"}) == 5
    for asked, environment, named in [
        (0, {}, "--jobs: '0'"),
        (-1, {}, "--jobs: '-1'"),
        (None, {"MAX_JOBS": "many"}, "MAX_JOBS: 'many'"),
    ]:
        with pytest.raises(toolchain.BuildError, match=rf"^{named} is no number of jobs; it is to be 1 or more"):
            toolchain.choose_jobs(asked, environment)


def test_nvcc_is_looked_for_in_order_and_asked_where_its_files_are(tmp_path: Path) -> None:
    home, path, on_path, fallback = (fake_nvcc(tmp_path / name) for name in ("home", "path", "on_path", "fallback"))
    environment = {"CUDA_HOME": str(home), "CUDA_PATH": str(path), "PATH": f"{on_path / 'bin'}:{os.environ['PATH']}"}
    for expected, gone in [(home, "CUDA_HOME"), (path, "CUDA_PATH"), (on_path, "PATH"), (fallback, None)]:
        found = toolchain.find_nvcc(environment, fallback)
        assert found.path == str(expected / "bin" / "nvcc")
        assert found.version == "13.1.4"
        assert found.includes == [f"{expected}/some include"]
        assert found.libraries == [f"{expected}/stubs", f"{expected}/lib"]
        assert found.codes == ["sm_80", "sm_90"]
        environment = {name: value for name, value in environment.items() if name != gone} | (
            {"PATH": ""} if gone == "PATH" else {}
        )


def test_no_nvcc_is_said_with_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(toolchain.MissingTool) as caught:
        toolchain.find_nvcc({"PATH": "", "CUDA_HOME": str(tmp_path / "moved")}, tmp_path / "cuda")
    looked = f"CUDA_HOME ({tmp_path}/moved), CUDA_PATH (not set), the PATH, {tmp_path}/cuda"
    assert str(caught.value) == f"no nvcc: looked in {looked}. Install the CUDA toolkit 12 or later, or set CUDA_HOME"


def test_an_nvcc_that_is_too_old_or_broken_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        toolchain.MissingTool, match=r"old/bin/nvcc is version 11\.8\.89, which is too old: 12\.0 or later is needed"
    ):
        toolchain.find_nvcc({"CUDA_HOME": str(fake_nvcc(tmp_path / "old", "11.8.89"))})
    broken = fake_nvcc(tmp_path / "broken")
    (broken / "bin" / "nvcc").write_text("#!/bin/sh\necho 'no such file: cicc' >&2\nexit 1\n")
    with pytest.raises(toolchain.MissingTool, match=r"broken/bin/nvcc --version does not say its version: no such file: cicc"):
        toolchain.find_nvcc({"CUDA_HOME": str(broken)})


def test_no_compiler_is_said() -> None:
    with pytest.raises(toolchain.MissingTool, match=r"no C\+\+ compiler: neither g\+\+ nor c\+\+ is on the PATH"):
        toolchain.find_cxx({"PATH": ""})
    with pytest.raises(toolchain.MissingTool, match=r"no C\+\+ compiler: CXX is 'g\+\+-99', which is not there"):
        toolchain.find_cxx({"PATH": os.environ["PATH"], "CXX": "g++-99 -m64"})


def test_torch_is_found_without_importing_it() -> None:
    program = (
        "import runpy, sys; facts = runpy.run_path(sys.argv[1]); torch = facts['find_torch']();"
        "print(torch.version); assert 'torch' not in sys.modules; assert (torch.folder / 'lib').is_dir()"
    )
    found = subprocess.run([sys.executable, "-c", program, toolchain.__file__], capture_output=True, text=True, check=True)
    import torch

    assert found.stdout.strip() == torch.__version__

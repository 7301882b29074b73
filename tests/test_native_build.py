"""How the native parts are built: for what, with what, what is said where they cannot be, and the wheel that comes of it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended_toolchain import build, fake_nvcc, machine, toolchain

from googlenet_fused.backends.cuda import native

ROOT = Path(__file__).resolve().parents[1]


def missing(find: Callable[[], object]) -> str | None:
    """Why what ``find`` looks for is not there, or None."""
    try:
        find()
    except build.MissingTool as error:
        return str(error)
    return None


no_nvcc = missing(toolchain.find_nvcc)
no_ninja = missing(toolchain.find_ninja)
no_cxx = missing(toolchain.find_cxx)


def test_an_arch_that_nvcc_does_not_know_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path / "cuda")))
    with pytest.raises(
        build.BuildError,
        match=r"nvcc 13\.1\.4 does not know sm_120, compute_120, only sm_80 sm_90: name others, by",
    ):
        build.build_library("8.0;12.0+PTX", tmp_path / "library.so", folder=tmp_path / "build")


def test_the_choice_of_an_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> None:
        raise build.MissingTool("no nvcc: looked in vain")

    monkeypatch.setattr(toolchain, "find_torch", lambda: None)
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: None)
    for choice in (None, "", "auto", "cuda"):
        assert build.why_without(choice) is None
    assert build.why_without("none") == "it was left out by GOOGLENET_FUSED_BUILD=none"
    for choice in ("yes", "CUDA", "0", "all"):
        with pytest.raises(
            build.BuildError, match=rf"^GOOGLENET_FUSED_BUILD is '{choice}'; it is to be one of auto, cuda, none$"
        ):
            build.why_without(choice)
    for tool in ("find_torch", "find_nvcc"):
        with monkeypatch.context() as patch:
            patch.setattr(toolchain, tool, nothing)
            assert build.why_without("auto") == "no nvcc: looked in vain"
            assert build.why_without("none") is not None
            with pytest.raises(
                build.BuildError, match=r"^GOOGLENET_FUSED_BUILD=cuda, but the library cannot be built: no nvcc"
            ):
                build.why_without("cuda")


def test_an_installation_without_it_says_so_and_leaves_what_was_built_in_place(tmp_path: Path) -> None:
    library, facts = tmp_path / native.LIBRARY, tmp_path / native.FACTS
    library.write_text("built")
    facts.write_text("facts")
    build.install_library(tmp_path, "it was left out", in_place=True)
    assert (library.read_text(), facts.read_text()) == ("built", "facts")
    build.install_library(tmp_path, "it was left out", in_place=False)
    assert not library.exists()
    assert json.loads(facts.read_text()) == {"built": False, "reason": "it was left out"}


def test_a_failed_build_of_an_installation_says_how_to_go_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**arguments: object) -> None:
        raise build.BuildError("the build failed")

    monkeypatch.setattr(build, "build_library", fails)
    with pytest.raises(
        build.BuildError, match=r"^the build failed\nGOOGLENET_FUSED_BUILD=none installs googlenet_fused without"
    ):
        build.install_library(tmp_path, None, in_place=False)


@pytest.mark.parametrize("arguments", [[], ["--if-possible"]])
def test_the_command_fails_or_skips_without_a_tool(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def nothing() -> None:
        raise build.MissingTool("no nvcc: looked in vain")

    monkeypatch.setattr(toolchain, "find_nvcc", nothing)
    monkeypatch.setattr(build, "PACKAGE", tmp_path)
    code = build.main(["cuda", *arguments])
    out, err = capsys.readouterr()
    if arguments:
        assert (code, out, err) == (0, "==> skipped cuda: no nvcc: looked in vain\n", "")
        assert json.loads((tmp_path / native.FACTS).read_text()) == {"built": False, "reason": "no nvcc: looked in vain"}
    else:
        assert (code, out, err) == (1, "", "error: no nvcc: looked in vain\n")
        assert not (tmp_path / native.FACTS).exists()


def test_ninja_files_keep_odd_paths_whole() -> None:
    ninja = build.NinjaFile()
    ninja.rule("host", build.quoted(["c++", "-I/a b/$c"]), "c++ $name")
    ninja.compile("host", Path("/a b/c:d$.cpp"), Path("/o/c d.o"))
    ninja.link(Path("/o/e f.so"))
    lines = ninja.text(3).splitlines()
    assert "  command = c++ '-I/a b/$$c'" in lines
    assert "build /o/c$ d.o: host /a$ b/c$:d$$.cpp" in lines
    assert "build /o/e$ f.so: link /o/c$ d.o" in lines
    assert lines[lines.index("pool device") + 1] == "  depth = 3"


SIMULATION = """
#include <pybind11/pybind11.h>
PYBIND11_MODULE(_host_sim, m) { m.def("answer", [] { return ANSWER; }); }
"""


@pytest.mark.slow
@pytest.mark.skipif(bool(no_ninja or no_cxx), reason=str(no_ninja or no_cxx))
@pytest.mark.skipif(importlib.util.find_spec("pybind11") is None, reason="needs pybind11")
def test_a_simulation_of_other_sources_is_built_again_only_where_they_change(tmp_path: Path) -> None:
    csrc, folder = tmp_path / "changed csrc", tmp_path / "a folder"
    machine(csrc, {"host_sim/module.cpp": SIMULATION, "inception/tile_plan.cpp": "", "inception/fill_params.cpp": ""})

    def answer(*defines: str) -> int:
        module = build.build_simulation(csrc=csrc, folder=folder, defines=defines, show=False)
        assert module.parent == folder
        program = "import sys; sys.path.insert(0, sys.argv[1]); import _host_sim; print(_host_sim.answer())"
        return int(subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, check=True).stdout)

    def stamps() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.o")}

    assert answer("ANSWER=41") == 41
    first = stamps()
    assert first.keys() == {"module.o", "tile_plan.o", "fill_params.o"}
    assert answer("ANSWER=41") == 41
    assert stamps() == first
    (csrc / "inception" / "tile_plan.cpp").write_text("int changed;\n")
    assert answer("ANSWER=41") == 41
    assert {name for name, stamp in stamps().items() if stamp != first[name]} == {"tile_plan.o"}
    assert answer("ANSWER=42") == 42
    with pytest.raises(build.BuildError, match=r"ANSWER.* was not declared"):
        answer()


@pytest.mark.slow
@pytest.mark.skipif(bool(no_ninja or no_cxx), reason=str(no_ninja or no_cxx))
@pytest.mark.skipif(importlib.util.find_spec("pybind11") is None, reason="needs pybind11")
def test_what_ninja_takes_for_current_is_built_again(tmp_path: Path) -> None:
    """Sources with old times, as after ``mv`` or ``rsync``, and damaged outputs."""
    csrc, folder = tmp_path / "csrc", tmp_path / "build"
    machine(csrc, {"inception/tile_plan.cpp": "", "inception/fill_params.cpp": ""})

    def put(answer: str, also: str = "", age: float = 1e9) -> None:
        code = f'extern "C" int answer() {{ return {answer}; }}'
        machine(csrc, {"host_sim/module.cpp": code, "inception/tile_plan.cpp": also})
        os.utime(csrc / "host_sim" / "module.cpp", (age, age))

    def made() -> bytes:
        return build.build_simulation(csrc=csrc, folder=folder, show=False).read_bytes()

    put("41")
    first = made()
    put("42")
    second = made()
    assert second != first

    put("41", also="no C++", age=time.time())
    with pytest.raises(build.BuildError, match="no C"):
        made()
    put("42")
    assert made() == second

    (csrc / "host_sim" / "more.cpp").write_text("int more() { return 1; }")
    with_more = made()
    (csrc / "host_sim" / "more.cpp").unlink()
    assert made() == second
    (csrc / "host_sim" / "more.cpp").write_text("int more() { return 2; }")
    os.utime(csrc / "host_sim" / "more.cpp", (1e9, 1e9))
    assert made() not in (second, with_more)
    (csrc / "host_sim" / "more.cpp").unlink()

    module = folder / native.SIMULATION
    for record in (True, False):
        made()
        if not record:
            (folder / "contents.json").unlink()
        module.write_bytes(second[:1000])
        assert made() == second


@pytest.mark.skipif(bool(no_ninja or no_cxx), reason=str(no_ninja or no_cxx))
@pytest.mark.skipif(importlib.util.find_spec("pybind11") is None, reason="needs pybind11")
def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    def made(output: Path) -> None:
        build.build_simulation(output, folder=tmp_path / "build", show=False)

    with pytest.raises(build.BuildError, match=r"is a folder; name the file to build$"):
        made(tmp_path)
    with pytest.raises(build.BuildError, match=r"^/proc/nope: No such file or directory$"):
        made(Path("/proc/nope/x.so"))
    (tmp_path / "build" / "lock").mkdir()
    with pytest.raises(build.BuildError, match=r"build/lock: Is a directory$"):
        made(tmp_path / "x.so")


def test_an_interrupt_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "build_library", interrupted)
    assert build.main(["cuda"]) == 130
    assert capsys.readouterr().err == "interrupted: what is compiled is kept\n"


def test_architectures_of_a_simulation_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build.main(["sim", "--archs", "8.0"])
    assert "--archs is for the target cuda" in capsys.readouterr().err


def package_in(folder: Path, monkeypatch: pytest.MonkeyPatch, *, checkout: bool = False, **files: str) -> Path:
    """Lets ``native`` look at a package, or a checkout, in ``folder``."""
    package = folder / "package"
    package.mkdir(exist_ok=True)
    for name, text in files.items():
        (package / {"facts": native.FACTS, "library": native.LIBRARY}[name]).write_text(text)
    monkeypatch.setattr(native, "FOLDER", package)
    monkeypatch.setattr(native, "SOURCES", folder / "csrc")
    monkeypatch.setattr(native, "_loaded", None)
    if checkout:
        machine(
            folder / "csrc",
            {"inception/params.h": "// one", "inception/deep/a.cu": "// two", "binding.cpp": "// three"}
            | {"build.py": "# four", "toolchain.py": "# five"},
        )
    return package


FACTS = {"built": True, "archs": ["sm_80"], "nvcc": "13.0.88", "torch": "2.14.1", "source": "?", "seconds": 1.5}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, r"^this installation was made without the native library: .*GOOGLENET_FUSED_BUILD=cuda pip install"),
        ({"facts": json.dumps({"built": False, "reason": "no nvcc"})}, "^no nvcc; .*GOOGLENET_FUSED_BUILD=cuda pip install"),
        ({"facts": json.dumps({"built": False})}, "^it was not built; "),
        ({"facts": "{"}, r"build\.json cannot be read \(Expecting.*\): .* anew$"),
        ({"facts": "[]"}, r"build\.json cannot be read"),
        ({"facts": "{}"}, r"build\.json cannot be read"),
        ({"facts": json.dumps(FACTS | {"archs": None})}, r"build\.json cannot be read \(its archs are not names\): .* anew$"),
        ({"facts": json.dumps(FACTS)}, rf"{native.LIBRARY} is missing: .* anew$"),
        (
            {"facts": json.dumps(FACTS | {"bytes": 9}), "library": "8 bytes."},
            rf"{native.LIBRARY} is damaged, it has 8 bytes of 9: .* anew$",
        ),
    ],
)
def test_why_the_library_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], reason: str
) -> None:
    package_in(tmp_path, monkeypatch, **files)
    facts = native.build_facts()
    assert not facts["built"]
    assert re.search(reason, facts["reason"])
    assert native.load() == facts["reason"]


def test_facts_of_a_library_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package_in(tmp_path, monkeypatch, facts=json.dumps(FACTS), library="")
    assert native.build_facts() == FACTS


def test_a_library_of_other_sources_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = package_in(tmp_path, monkeypatch, checkout=True)
    assert native.build_facts()["reason"] == "this installation was made without the native library: `make native` builds it"
    current = FACTS | {"source": native.source_hash(tmp_path / "csrc", native.LIBRARY_SOURCES)}
    package_in(tmp_path, monkeypatch, facts=json.dumps(current), library="no library")
    assert native.build_facts() == current
    for name in ("inception/params.h", "inception/deep/a.cu", "binding.cpp", "build.py", "toolchain.py"):
        path = tmp_path / "csrc" / name
        before = path.read_text()
        path.write_text(before + " changed")
        facts = native.build_facts()
        assert not facts["built"]
        assert facts["reason"] == f"csrc/ has changed since {native.LIBRARY} was built: `make native` builds it anew"
        assert facts["archs"] == ["sm_80"]
        path.write_text(before)
    machine(tmp_path / "csrc", {"host_sim/simulation.cpp": "", "inception/notes.md": ""})
    assert native.build_facts()["built"]
    reason = native.load()
    assert reason is not None
    assert reason.startswith("the native library does not load: ")
    assert str(package / native.LIBRARY) in reason
    assert "file too short" in reason
    assert ("built with torch 2.14.1, here is " in reason) == (torch.__version__ != "2.14.1")
    assert reason.endswith("`make native` builds it anew")


def test_a_simulation_of_other_sources_or_damaged_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = package_in(tmp_path, monkeypatch, checkout=True)
    assert native.simulation_fault() is None  # which says that there is none
    machine(tmp_path / "csrc", {"host_sim/simulator.cpp": "// six"})
    module = package / native.SIMULATION
    module.write_text("a simulation")
    assert native.simulation_fault() is None
    source = native.source_hash(tmp_path / "csrc", native.SIMULATION_SOURCES)
    (package / native.SIMULATION_FACTS).write_text(json.dumps({"file": module.name, "source": source, "bytes": 12}))
    assert native.simulation_fault() is None
    module.write_text("a simul")
    remedy = "`make native` builds it anew"
    assert native.simulation_fault() == f"{module} is damaged, it has 7 bytes of 12: {remedy}"
    module.write_text("a simulation")
    machine(tmp_path / "csrc", {"host_sim/simulator.cpp": "// seven"})
    changed = f"csrc/ has changed since {module.name} was built: {remedy}"
    assert native.simulation_fault() == changed
    (tmp_path / "csrc" / "toolchain.py").unlink()
    assert native.simulation_fault() == changed
    for facts in ("[]", "{", json.dumps({"file": "_host_sim.of_another_python.so", "source": "", "bytes": 1})):
        (package / native.SIMULATION_FACTS).write_text(facts)
        assert native.simulation_fault() is None


def test_facts_need_no_torch() -> None:
    program = "import runpy, sys; print(runpy.run_path(sys.argv[1])['build_facts']()); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program, native.__file__], capture_output=True, check=True)


def sources(folder: Path) -> Path:
    """What a wheel is made of. ``csrc`` is this checkout's own, so that its objects need not be compiled again."""
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(
        ROOT / "googlenet_fused", folder / "googlenet_fused", ignore=shutil.ignore_patterns("__pycache__", "*.so", "build.json")
    )
    (folder / "csrc").symlink_to(ROOT / "csrc")
    return folder


def make(what: str, tree: Path, **environment: str) -> Path:
    """Builds a wheel or an sdist as a user would, and returns it."""
    command = [sys.executable, "-m", "build", f"--{what}", "--no-isolation", "--outdir", tree.parent / "dist", tree]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (tree.parent / "dist").iterdir()
    return made


def environment_with(wheel: Path, folder: Path) -> Path:
    """The Python of a virtual environment that has the wheel, and all that is in this one but this package."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "these.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(command, check=True, capture_output=True)
    return python


needs_build = pytest.mark.skipif(importlib.util.find_spec("build") is None, reason="needs build")

USE = """
import json, sys
from pathlib import Path
import torch
import googlenet_fused
from googlenet_fused.backends.cuda import native

assert Path(sys.prefix) in Path(googlenet_fused.__file__).parents, googlenet_fused.__file__
facts = native.build_facts()
reason = native.load()
module = googlenet_fused.FusedInception(16, 8, 8, 8, 8, 8, 8).eval()
with torch.inference_mode():
    answer = module(torch.ones(1, 16, 5, 5))
assert answer.shape == (1, 32, 5, 5) and answer.isfinite().all()
said = None
if reason is None:
    ops = torch.ops.googlenet_fused_cuda
    said = ops.plan([0, 1, 28, 28, 192, 64, 96, 128, 16, 32, 32, 5], [132, 232448])
    try:
        ops.inception(*(torch.empty(1, device="meta") for _ in range(3)), [1], [], torch.empty(1, device="meta"))
    except RuntimeError as error:
        said = [said, str(error)]
assert not torch.cuda.is_initialized()
print(json.dumps([facts, reason, said]))
"""


def run(python: Path, *arguments: str, cwd: Path) -> Any:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([python, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@needs_build
@pytest.mark.skipif(bool(no_nvcc or no_ninja or no_cxx), reason=str(no_nvcc or no_ninja or no_cxx))
def test_a_wheel_with_the_library(tmp_path: Path) -> None:
    wheel = make("wheel", sources(tmp_path / "tree"), GOOGLENET_FUSED_BUILD="cuda")
    assert wheel.name.endswith(f"-py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    folder = "googlenet_fused/backends/cuda"
    assert {f"{folder}/{name}" for name in (native.LIBRARY, native.FACTS, "native.py")} <= set(names)
    assert [name for name in names if name.endswith(".so")] == [f"{folder}/{native.LIBRARY}"]
    assert not [name for name in names if "csrc" in name or name.startswith("build")]

    python = environment_with(wheel, tmp_path / "venv")
    facts, reason, said = run(python, "-c", USE, cwd=tmp_path)
    assert reason is None
    assert facts["built"]
    assert facts["archs"] == toolchain.choose_archs(None)
    assert facts["source"] == native.source_hash(ROOT / "csrc", native.LIBRARY_SOURCES)
    assert said[0]
    assert said[1] == "googlenet_fused_cuda: x is [1]; it is to be [n, in_channels, h, w]"
    doctor = run(python, "-m", "googlenet_fused", "doctor", "--json", cwd=tmp_path)
    assert "cuda" in doctor["backends"]


@pytest.mark.extra
@needs_build
@pytest.mark.skipif(bool(no_nvcc or no_ninja or no_cxx), reason=str(no_nvcc or no_ninja or no_cxx))
def test_the_wheel_for_every_architecture(tmp_path: Path) -> None:
    """Built whole, beside the sources' own objects, within 25 minutes."""
    tree = sources(tmp_path / "tree")
    (tree / "csrc").unlink()
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    wheel = make("wheel", tree, GOOGLENET_FUSED_BUILD="cuda", TORCH_CUDA_ARCH_LIST=toolchain.WHEEL_ARCHS)
    with zipfile.ZipFile(wheel) as archive:
        facts = json.loads(archive.read(f"googlenet_fused/backends/cuda/{native.FACTS}"))
    assert facts["archs"] == ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_120"]
    assert 30 < facts["seconds"] < 25 * 60


@pytest.mark.slow
@needs_build
def test_a_wheel_without_the_library(tmp_path: Path) -> None:
    tree = sources(tmp_path / "tree")
    cuda = tree / "googlenet_fused" / "backends" / "cuda"
    for name in (native.LIBRARY, "_host_sim.so"):  # as "make native" leaves them
        (cuda / name).write_text("built in place")
    build.write_facts(cuda, {"built": True})
    wheel = make("wheel", tree, GOOGLENET_FUSED_BUILD="none")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert (cuda / native.LIBRARY).read_text() == "built in place"
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]

    python = environment_with(wheel, tmp_path / "venv")
    facts, reason, _ = run(python, "-c", USE, cwd=tmp_path)
    assert not facts["built"]
    assert reason == facts["reason"]
    assert reason.startswith("it was left out by GOOGLENET_FUSED_BUILD=none; ")
    assert run(python, "-m", "googlenet_fused", "doctor", "--json", cwd=tmp_path)["backends"]["cuda"]["available"] is False


@pytest.mark.slow
@needs_build
def test_an_sdist_has_the_sources_and_nothing_that_was_built(tmp_path: Path) -> None:
    tree = sources(tmp_path / "tree")
    (tree / "csrc").unlink()
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    cuda = tree / "googlenet_fused" / "backends" / "cuda"
    (cuda / native.LIBRARY).write_text("built in place")
    build.write_facts(cuda, {"built": True})
    made = make("sdist", tree, GOOGLENET_FUSED_BUILD="none")
    shutil.unpack_archive(made, tmp_path / "unpacked")
    (top,) = (tmp_path / "unpacked").iterdir()
    wanted = {
        path.relative_to(tree) for path in (tree / "csrc").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert wanted <= {path.relative_to(top) for path in top.rglob("*")}
    for names in (native.LIBRARY_SOURCES, native.SIMULATION_SOURCES):
        assert native.source_hash(top / "csrc", names) == native.source_hash(ROOT / "csrc", names)
    assert not list(top.rglob("*.so"))
    assert not list(top.rglob(native.FACTS))

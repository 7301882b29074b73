"""Builds the native parts: the CUDA library, and the simulation of its kernels on a CPU.

    python csrc/build.py cuda|sim|asan [--archs "8.0;9.0+PTX"] [--output PATH] [--jobs N] [-v] [--if-possible]

Ninja does the work in ``build/native/<target>``, with what ``toolchain.py`` finds, and builds again only what has changed.
Nothing beyond the standard library is imported here, torch neither.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import platform
import re
import shlex
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

CSRC = Path(__file__).resolve().parent
ROOT = CSRC.parent
PACKAGE = ROOT / "googlenet_fused" / "backends" / "cuda"
BUILD = ROOT / "build" / "native"

TORCH_TARGET = "0x020b000000000000"
"""The oldest torch, 2.11, whose stable ABI the library keeps to."""

WARNINGS = ("-Wall", "-Wextra")
NVCC_FLAGS = (
    "-O3",
    "-std=c++20",
    "--expt-relaxed-constexpr",
    "-Wno-deprecated-gpu-targets",
    "-Xptxas",
    "-v",
    "-cudart",
    "static",
)
LINKED = (
    "-lstdc++",
    "-Wl,--no-as-needed",
    "-ltorch",
    "-ltorch_cpu",
    "-Wl,--as-needed",
    "-lcudart_static",
    "-lrt",
    "-lpthread",
    "-ldl",
)
"""The C++ library first, because torch gives away parts of the one that it was built with."""

PTXAS_STATISTICS = r"^(ptxas info|nvlink info| +[0-9]+ bytes stack frame|$)"


def load_module(path: Path) -> ModuleType:
    """A file of Python, run without the package that it belongs to."""
    spec = importlib.util.spec_from_file_location(f"_{path.stem}_of_the_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


native = load_module(PACKAGE / "native.py")
toolchain = load_module(CSRC / "toolchain.py")
BuildError, MissingTool = toolchain.BuildError, toolchain.MissingTool


def quoted(words: Iterable[str | Path]) -> str:
    """A command's words for a ninja file."""
    return " ".join(shlex.quote(str(word)).replace("$", "$$") for word in words)


def escaped(path: str | Path) -> str:
    """A path for a ninja file's build lines."""
    return re.sub(r"([$ :])", r"$\1", str(path))


class NinjaFile:
    """Objects, each from a source by a rule, linked into one output by the rule ``link``."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.objects: list[Path] = []

    def rule(self, name: str, command: str, description: str, *more: str) -> None:
        settings = (f"command = {command}", f"description = {description}", *more)
        self.lines += [f"rule {name}", *(f"  {line}" for line in settings)]

    def compile(self, rule: str, source: Path, to: Path) -> None:
        self.lines += [f"build {escaped(to)}: {rule} {escaped(source)}", f"  name = {source.name}"]
        self.objects.append(to)

    def link(self, output: Path) -> None:
        self.lines.append(f"build {escaped(output)}: link {' '.join(map(escaped, self.objects))}")
        self.lines.append(f"default {escaped(output)}")

    def text(self, depth: int) -> str:
        """The file; of the rules in the pool ``device`` so many run at a time."""
        return "\n".join(["ninja_required_version = 1.8", "pool device", f"  depth = {depth}", *self.lines, ""])


class Contents:
    """What files held when a folder was last built, because ninja goes by their times alone: a source put in place with its old
    time would not be compiled, and a damaged output not be linked again."""

    def __init__(self, folder: Path, sources: Iterable[Path], output: Path) -> None:
        self.folder, self.record, self.output = folder, folder / "contents.json", output
        self.sources = {str(path): self.of(path) for path in sources}

    @staticmethod
    def of(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def recorded(self) -> dict[str, str]:
        try:
            found = json.loads(self.record.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def forget_stale(self) -> None:
        """Remove the objects if a source has changed that does not look new, and the output if it is another than was built.

        What the sources hold now is recorded before anything is compiled: a build that fails or is interrupted leaves objects.
        """
        before = self.recorded()
        changed = [path for path, content in self.sources.items() if before and before.get(path) != content]
        if changed and min(Path(path).stat().st_mtime_ns for path in changed) <= self.record.stat().st_mtime_ns:
            for path in self.folder.glob("*.o"):
                path.unlink()
        if self.output.is_file() and before.get(str(self.output)) != self.of(self.output):
            self.output.unlink()
        write_json(self.record, {**before, **self.sources})

    def remember_output(self) -> None:
        kept = {path: content for path, content in self.recorded().items() if Path(path).is_file()}
        write_json(self.record, {**kept, str(self.output): self.of(self.output)})


def write_json(path: Path, what: Mapping[str, Any]) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(what, indent=1) + "\n")
    new.replace(path)


def sources_of(csrc: Path, names: Sequence[str]) -> list[Path]:
    """Files of C++ and CUDA, of ``native.LIBRARY_SOURCES`` for example."""
    return [path for path in native.source_files(csrc, names) if path.suffix != ".py"]


@contextmanager
def writing() -> Iterator[None]:
    """Says which file or folder cannot be written. Raises BuildError."""
    try:
        yield
    except OSError as error:
        raise BuildError(f"{error.filename or 'a file of the build'}: {error.strerror or error}") from error


def run_ninja(folder: Path, text: str, contents: Contents, jobs: int, verbose: bool, show: bool) -> None:
    """Raises BuildError with the compiler's text, which has been shown already if ``show``."""
    import fcntl  # not in Windows' Python, where setup.py runs this file, too

    ninja = toolchain.find_ninja()
    if contents.output.is_dir():
        raise BuildError(f"{contents.output} is a folder; name the file to build")
    with writing(), ExitStack() as stack:
        for place in (folder, contents.output.parent):
            place.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context((folder / "lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        contents.forget_stale()
        (folder / "build.ninja").write_text(text)
        command = [ninja, "-C", str(folder), "-j", str(jobs), *(["-v"] if verbose else [])]
        sys.stdout.flush()
        to = None if show else subprocess.PIPE
        done = subprocess.run(command, stdout=to, stderr=to and subprocess.STDOUT, text=True)
        if done.returncode == 0:
            contents.remember_output()
    if done.returncode != 0:
        said = "the compiler's messages are above" if show else f"the compiler said:\n{done.stdout}"
        raise BuildError(f"the build in {folder} failed; {said}")


def build_library(
    archs: str | None = None,
    output: Path | None = None,
    *,
    folder: Path = BUILD / "cuda",
    jobs: int | None = None,
    verbose: bool = False,
    show: bool = True,
) -> Path:
    """Build the CUDA library, and write the facts of its build beside it.

    Args:
        archs: as ``choose_archs`` takes them.
        output: the library; by default its place in the package.

    Raises:
        MissingTool: there is no nvcc, torch or ninja.
        BuildError: anything else that keeps it from being built.
    """
    output = (output or PACKAGE / native.LIBRARY).resolve()
    codes = toolchain.choose_archs(archs)
    jobs = toolchain.choose_jobs(jobs)
    nvcc, torch = toolchain.find_nvcc(), toolchain.find_torch()
    unknown = [code for code in codes if code.replace("compute_", "sm_") not in nvcc.codes] if nvcc.codes else []
    if unknown:
        known = " ".join(nvcc.codes)
        raise BuildError(
            f"{nvcc.path} {nvcc.version} does not know {', '.join(unknown)}, only {known}: "
            "name others, by --archs or in TORCH_CUDA_ARCH_LIST"
        )
    source = native.source_hash(CSRC, native.LIBRARY_SOURCES)
    threads = min(jobs, len({re.sub(r"\D", "", code) for code in codes}))
    if show:
        made_by = f"{nvcc.path} {nvcc.version}, torch {torch.version}, {jobs} at a time"
        print(f"==> {output.name} for {' '.join(codes)}: {made_by}", flush=True)
    major = nvcc.version.partition(".")[0]
    if show and torch.cuda and torch.cuda.partition(".")[0] != major:
        print(f"    torch is built with CUDA {torch.cuda}; the library will want a driver for CUDA {major}", flush=True)
    before = output.stat().st_mtime_ns if output.exists() else None
    begin = time.monotonic()
    text = _library_ninja(nvcc, torch, codes, output, folder, threads).text(jobs // threads)
    contents = Contents(folder, sources_of(CSRC, native.LIBRARY_SOURCES), output)
    run_ninja(folder, text, contents, jobs, verbose, show)
    made = output.stat()
    facts = {"built": True, "archs": codes, "nvcc": nvcc.version, "torch": torch.version, "source": source}
    seconds = round(time.monotonic() - begin, 1)
    if before == made.st_mtime_ns:
        seconds = _facts_beside(output).get("seconds", seconds)
    write_facts(output.parent, {**facts, "bytes": made.st_size, "seconds": seconds})
    return output


def _library_ninja(
    nvcc: toolchain.Nvcc, torch: toolchain.Torch, codes: Sequence[str], output: Path, folder: Path, threads: int
) -> NinjaFile:
    ninja = NinjaFile()
    host = ["-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", *WARNINGS]
    gencode = [f"-gencode=arch={code.replace('sm_', 'compute_')},code={code}" for code in codes]
    device = [nvcc.path, *NVCC_FLAGS]
    device += ["-Xcompiler", ",".join(host), f"--threads={threads}", *gencode]
    # ptxas' statistics stay in a file beside the object, for the audit; warnings and errors are shown.
    keep = f"> $out.log 2>&1; code=$$?; grep -Ev {quoted([PTXAS_STATISTICS])} $out.log; exit $$code"
    ninja.rule(
        "device",
        f"{quoted(device)} -MD -MF $out.d -c $in -o $out {keep}",
        "nvcc $name",
        *("depfile = $out.d", "deps = gcc", "pool = device"),
    )
    cxx = [*toolchain.find_cxx(), "-O2", "-std=c++20", *host, "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    cxx += [word for path in (torch.folder / "include", *nvcc.includes) for word in ("-isystem", str(path))]
    ninja.rule("host", f"{quoted(cxx)} -MD -MF $out.d -c $in -o $out", "c++ $name", "depfile = $out.d", "deps = gcc")
    # torch is loaded already when this is, so no path to it is noted. A torch for CPUs has all names but the one that is weak.
    folders = [f"-L{path}" for path in (torch.folder / "lib", *nvcc.libraries)]
    link = [*toolchain.find_cxx(), "-shared", "-Wl,--exclude-libs,ALL", "-Wl,-z,defs", *folders]
    ninja.rule("link", f"{quoted(link)} -o $out $in {quoted(LINKED)}", "link $out")
    for path in sorted((CSRC / "inception").rglob("*.cu")):
        ninja.compile("device", path, folder / f"{path.stem}.o")
    for path in [CSRC / "binding.cpp", *sorted((CSRC / "inception").glob("*.cpp"))]:
        ninja.compile("host", path, folder / f"{path.stem}.host.o")
    ninja.link(output)
    return ninja


def build_simulation(
    output: Path | None = None,
    *,
    csrc: Path = CSRC,
    folder: Path | None = None,
    defines: Sequence[str] = (),
    sanitized: bool = False,
    jobs: int | None = None,
    verbose: bool = False,
    show: bool = True,
) -> Path:
    """Build the extension module ``_host_sim``, in which the kernels run on a CPU.

    Args:
        output: the module; by default in the package, or in ``folder`` if that is given or the build is ``sanitized``.
        csrc: the sources, which may be a changed copy.
        folder: for objects.
        defines: as ``NAME`` or ``NAME=VALUE``.
        sanitized: with AddressSanitizer and UndefinedBehaviorSanitizer; ``sanitizer_environment`` says how to run it.
        show: print the compiler's messages; otherwise they are in the error.

    Raises:
        MissingTool: there is no C++ compiler, pybind11 or ninja.
        BuildError: anything else that keeps it from being built.
    """
    if platform.machine() not in ("x86_64", "AMD64") or not {"avx2", "fma", "f16c"} <= toolchain.cpu_flags():
        raise MissingTool("the simulation is written for x86-64 with AVX2, FMA and F16C, which this machine has not")
    output = output or (folder or BUILD / "asan" if folder or sanitized else PACKAGE) / native.SIMULATION
    folder = folder or BUILD / ("asan" if sanitized else "sim")
    jobs = toolchain.choose_jobs(jobs)
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"] if sanitized else []
    flags = [
        *("-std=c++20", "-g1", "-fPIC", "-pthread", "-fvisibility=hidden", *WARNINGS, "-Wno-unknown-pragmas"),
        *("-mavx2", "-mfma", "-mf16c"),
        *(["-O1", "-fno-omit-frame-pointer", *sanitizers] if sanitized else ["-O2"]),
        *(f"-D{define}" for define in defines),
        *("-isystem", str(toolchain.pybind11_include()), "-isystem", sysconfig.get_path("include")),
    ]
    compiler = toolchain.find_cxx()
    ninja = NinjaFile()
    command = quoted([*compiler, *flags])
    ninja.rule("host", f"{command} -MD -MF $out.d -c $in -o $out", "c++ $name", "depfile = $out.d", "deps = gcc")
    ninja.rule("link", f"{quoted([*compiler, '-shared', '-pthread', *sanitizers])} -o $out $in", "link $out")
    inception = [csrc / "inception" / name for name in ("tile_plan.cpp", "fill_params.cpp")]
    for path in [*sorted((csrc / "host_sim").glob("*.cpp")), *inception]:
        ninja.compile("host", path.resolve(), folder.resolve() / f"{path.stem}.o")
    ninja.link(output.resolve())
    if show:
        print(f"==> {output.name}{' with sanitizers' if sanitized else ''}, {jobs} at a time", flush=True)
    ours = output.resolve() == PACKAGE / native.SIMULATION
    source = native.source_hash(csrc, native.SIMULATION_SOURCES) if ours else None
    contents = Contents(folder, sources_of(csrc, native.SIMULATION_SOURCES), output.resolve())
    run_ninja(folder, ninja.text(jobs), contents, jobs, verbose, show)
    if ours:
        facts = {"file": output.name, "source": source, "bytes": output.stat().st_size}
        write_facts(PACKAGE, facts, native.SIMULATION_FACTS)
    return output


def why_without(choice: str | None) -> str | None:
    """Why an installation goes without the library, or None: it is to be built.

    Args:
        choice: the value of GOOGLENET_FUSED_BUILD. ``auto``, which no value means, builds it where nvcc, torch, ninja and a C++
            compiler are found.

    Raises:
        BuildError: it is ``cuda``, and they are not; or it is none of ``auto``, ``cuda`` and ``none``.
    """
    if choice == "none":
        return "it was left out by GOOGLENET_FUSED_BUILD=none"
    if choice not in (None, "", "auto", "cuda"):
        raise BuildError(f"GOOGLENET_FUSED_BUILD is {choice!r}; it is to be one of auto, cuda, none")
    try:
        if sys.platform != "linux":
            raise MissingTool(f"it is built on Linux, not on {sys.platform}")
        toolchain.find_nvcc()
        toolchain.find_torch()
        toolchain.find_ninja()
        toolchain.find_cxx()
    except MissingTool as error:
        if choice == "cuda":
            raise BuildError(f"GOOGLENET_FUSED_BUILD=cuda, but the library cannot be built: {error}") from error
        return str(error)
    return None


def install_library(folder: Path, without: str | None, *, in_place: bool) -> None:
    """What setup.py does: build the library into ``folder``, or say there why an installation goes ``without``.

    Args:
        in_place: ``folder`` is that of the sources, where ``make native`` may have built the library.

    Raises:
        BuildError: the library cannot be built; the message says how to install without.
    """
    if without is None:
        try:
            build_library(output=folder / native.LIBRARY)
        except BuildError as error:
            raise BuildError(
                f"{error}\nGOOGLENET_FUSED_BUILD=none installs googlenet_fused without its native library."
            ) from error
    elif not (in_place and (folder / native.LIBRARY).exists()):
        print(f"==> googlenet_fused without its native library: {without}", flush=True)
        (folder / native.LIBRARY).unlink(missing_ok=True)
        write_facts(folder, {"built": False, "reason": without})


def _facts_beside(library: Path) -> dict[str, Any]:
    try:
        facts = json.loads((library.parent / native.FACTS).read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def write_facts(folder: Path, facts: Mapping[str, Any], name: str = native.FACTS) -> None:
    """Say beside the library's place what was built, or ``{"built": False, "reason": ...}``; or beside the simulation's."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / name, facts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python csrc/build.py", description="Build the native parts of googlenet_fused.")
    parser.add_argument(
        "target", choices=("cuda", "sim", "asan"), help="the CUDA library, the simulation, or it with sanitizers"
    )
    parser.add_argument("--archs", help=f'as TORCH_CUDA_ARCH_LIST; "all" is "{toolchain.WHEEL_ARCHS}"')
    parser.add_argument(
        "--output",
        type=Path,
        help="the file to build, the library with build.json beside it; by default in the package, with sanitizers in build/",
    )
    parser.add_argument("--jobs", type=int, help="compilers at a time; by default what processors and memory allow")
    parser.add_argument("--if-possible", action="store_true", help="where a tool is missing say so, and succeed")
    parser.add_argument("-v", "--verbose", action="store_true", help="show the commands")
    options = parser.parse_args(arguments)
    if options.archs is not None and options.target != "cuda":
        parser.error("--archs is for the target cuda; the simulation is built for this machine")
    try:
        if options.target == "cuda":
            build_library(options.archs, options.output, jobs=options.jobs, verbose=options.verbose)
        else:
            sanitized = options.target == "asan"
            build_simulation(options.output, sanitized=sanitized, jobs=options.jobs, verbose=options.verbose)
    except MissingTool as error:
        if not options.if_possible:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(f"==> skipped {options.target}: {error}", flush=True)
        if options.target == "cuda" and options.output is None and not (PACKAGE / native.LIBRARY).exists():
            write_facts(PACKAGE, {"built": False, "reason": str(error)})
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: what is compiled is kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

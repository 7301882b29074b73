"""The script for a machine with a GPU, played on stand-ins for everything it calls."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from canned import results, row
from cases import BATCHES

ROOT = Path(__file__).resolve().parents[1]
NO_GPU = "no CUDA device: torch.cuda.is_available() is False"
GPU_STAGES = ["tests", "sanitizer", "bench-nets", "bench-modules", "bench-compile", "bench-training"]
ALL_STAGES = ["build", "tests", "sanitizer", "bench-nets", "bench-modules", "probes", "bench-compile", "bench-training"]

pytestmark = pytest.mark.skipif(
    any(shutil.which(command) is None for command in ("bash", "timeout")), reason="needs bash and coreutils"
)

JUNIT = '<testsuites><testsuite><testcase classname="tests.test_gpu" name="test_a"/></testsuite></testsuites>'


class Stage:
    """A checkout of stand-ins, with a machine around it whose commands only write down how they were called."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin, self.out = folder / "checkout", folder / "bin", folder / "out"
        self.calls_file = folder / "calls"
        for name in ("benchmarks", "tests", "googlenet_fused"):
            (self.root / name).mkdir(parents=True)
        self.bin.mkdir()
        for name in ("gpu.sh", "summary.py"):
            shutil.copy(ROOT / "benchmarks" / name, self.root / "benchmarks" / name)
        (self.root / "tests/test_gpu.py").write_text("pytest.mark.gpu\n")
        (self.root / "tests/test_plain.py").write_text("import torch\n")
        self.results = folder / "canned.json"
        self.results.write_text(json.dumps(results(row("eager", 2.0), row("fused_reference", 1.0))))
        self.junit = folder / "junit.xml"
        self.junit.write_text(JUNIT)
        self.python()

    def command(self, name: str, body: str = "") -> None:
        """Puts a command on PATH that writes down its call and then runs ``body`` in bash."""
        path = self.bin / name
        path.write_text(f'#!{shutil.which("bash")}\nprintf "%s\\n" "{name} ${{*//$\'\\n\'/ }}" >>"{self.calls_file}"\n{body}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def python(self, before: str = "", *, gpu: bool = True) -> None:
        """The interpreter; ``before`` are cases of its arguments that come before its usual answers."""
        answer = "cuda\\nNVIDIA Test, sm_90, 132 multiprocessors, 79 GiB, torch 2.11.0" if gpu else f"{NO_GPU}\\ntorch 2.11.0"
        self.command(
            "python",
            f"""case "$*" in
            {before}
            *cuda.is_available*) printf '{answer}\\n' ;;
            *native.load*) exit 1 ;;
            *lineup*) echo fused_triton fused_reference ;;
            *"-m benchmarks.summary"*) exec "{sys.executable}" "$@" ;;
            *"-m benchmarks.verify"*) echo '[{{"backend": "triton"}}]' ;;
            *"gpu and sanitizer"*) ;;
            *"-m pytest"*) cp "{self.junit}" "{self.out}/tests.xml" ;;
            *"-m benchmarks.run"*) cp "{self.results}" "{self.out}/results.json" ;;
            *e4_triton*) echo '{{"probe": "E4", "ok": true, "stays": false}}' ;;
            *e3_peers*) echo '{{"probe": "E3", "ok": true}}' ;;
            esac""",
        )

    def gpu_machine(self) -> None:
        """All that such a machine has on PATH, with probes that build and print a line."""
        self.command("nvidia-smi", 'case "$*" in -L) echo "GPU 0: NVIDIA Test" ;; *driver_version*) echo 580.1 ;; esac')
        self.command("nvcc", "echo release 13.0")
        self.command("compute-sanitizer", 'echo "========= ERROR SUMMARY: 0 errors"')
        probes = self.root / "benchmarks/probes"
        (probes / "build").mkdir(parents=True)
        for name in ("e4_triton_tma.py", "e3_peers.py"):
            (probes / name).touch()
        for name in ("e1_wgmma_shift", "e2_sync_latency", "e5_weight_multicast"):
            self.command(name, f"""echo '{{"probe": "{name[:2].upper()}", "ok": true}}'""")
            (self.bin / name).rename(probes / "build" / name)
        self.command("make")

    def own_kernels(self) -> None:
        (self.root / "csrc").mkdir()
        (self.root / "csrc/inception.cu").write_text("__global__ void k() {}\n")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "CUDA_HOME": str(self.bin),
        }
        script = self.root / "benchmarks/gpu.sh"
        return subprocess.Popen(
            [str(script), "--output", str(self.out), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell cannot trap what its parent ignores, as a job in the background does SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *arguments: str, status: int = 0) -> str:
        """Runs the script to its end and returns what it printed."""
        process = self.start(*arguments)
        printed, errors = process.communicate(timeout=50)
        assert process.returncode == status, (printed, errors)
        assert errors == ""
        return printed

    def calls(self, name: str) -> list[str]:
        """The arguments of every call of this command so far."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]

    def summary(self) -> list[str]:
        return (self.out / "summary.txt").read_text().splitlines()

    def outcomes(self) -> dict[str, str]:
        """What the summary says of each stage."""
        found = {}
        for line in self.summary():
            name, _, rest = line.partition(" ")
            if name in ALL_STAGES:
                found[name] = rest.strip()
        return found


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def option(call: str, name: str) -> str:
    """The words after an option of ``benchmarks.run``."""
    words = call.split(f" --{name} ", 1)[1]
    return words.split(" --")[0]


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "soon"], "--budget must be a whole number of seconds from 30 to 99999, got 'soon'"),
        (["--budget", "29"], "--budget must be a whole number of seconds from 30 to 99999, got '29'"),
        (["--budget", "-60"], "--budget must be a whole number of seconds from 30 to 99999, got '-60'"),
        (["--budget", "060"], "--budget must be a whole number of seconds from 30 to 99999, got '060'"),
        (["--budget", "1000000000000000000000"], "--budget must be a whole number of seconds from 30 to 99999"),
        (["--budget"], "--budget needs a value"),
        (["--commit", ""], "--commit needs a value"),
        (["--commit", "abc"], "--commit must be a hash, 4 to 40 hexadecimal digits, got 'abc'"),
        (["--commit", "main"], "--commit must be a hash, 4 to 40 hexadecimal digits, got 'main'"),
        (["--stages", "build,bench"], f"unknown stage 'bench': choose from {','.join(ALL_STAGES)}"),
        (["--stages", "build,,tests"], f"unknown stage '': choose from {','.join(ALL_STAGES)}"),
        (["--stages", "tests,build,tests"], "'tests' is named twice in 'tests,build,tests'"),
        (["--python", "no-such-python"], "--python: there is no command 'no-such-python': name an interpreter"),
        (["--output", "/proc/nowhere"], "--output: the folder '/proc/nowhere' cannot be made or written to"),
        (["--quick"], "unknown argument '--quick': choose from --budget, --stages, --output, --commit, --python"),
        (["540"], "unknown argument '540': choose from"),
    ],
)
def test_wrong_arguments(stage: Stage, arguments: list[str], message: str) -> None:
    process = stage.start(*arguments)
    printed, errors = process.communicate(timeout=20)
    assert process.returncode == 2
    assert printed == ""
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert stage.calls("python") == []


def test_help_names_every_option_and_stage(stage: Stage) -> None:
    text = stage.run("--help")
    for name in ("--budget", "--stages", "--output", "--commit", "--python", *ALL_STAGES):
        assert name in text


def test_the_output_folder_is_the_callers(stage: Stage, tmp_path: Path) -> None:
    stage.python(gpu=False)
    script = str(stage.root / "benchmarks/gpu.sh")
    command = [script, "--output", "a/b", "--stages", "tests", "--python", "../bin/python"]
    (tmp_path / "elsewhere").mkdir()
    subprocess.run(command, cwd=tmp_path / "elsewhere", check=True, capture_output=True)
    assert sorted(path.name for path in (tmp_path / "elsewhere/a/b").iterdir()) == ["summary.txt"]


def test_the_environment_of_make_install_is_preferred(stage: Stage) -> None:
    stage.python("*) exit 7 ;;")
    (stage.root / ".venv/bin").mkdir(parents=True)
    (stage.bin / "python").rename(stage.root / ".venv/bin/python")
    stage.python()
    stage.run("--stages", "tests")
    assert "ended with exit code 7" in stage.outcomes()["tests"]


# Without a GPU.


def test_without_a_gpu_its_stages_are_skipped(stage: Stage) -> None:
    stage.gpu_machine()
    stage.command("nvidia-smi", "exit 9")
    stage.python(gpu=False)
    printed = stage.run()
    outcomes = stage.outcomes()
    assert list(outcomes) == ALL_STAGES
    for name in GPU_STAGES:
        assert outcomes[name].split(maxsplit=1)[0] == "skipped"
        assert outcomes[name].endswith(NO_GPU)
    assert outcomes["build"].startswith("ok")
    assert outcomes["build"].endswith("nothing to build: this checkout has no csrc/")
    assert outcomes["probes"].endswith(f"compiled only, {NO_GPU}")
    assert [call.split()[0] for call in stage.calls("python") if "probes" in call] == ["benchmarks/probes/e4_triton_tma.py"]
    assert stage.calls("make") == ["-j 4 -C benchmarks/probes"]
    assert stage.calls("compute-sanitizer") == [], "nothing is run"
    assert all(stage.calls(name) == [] for name in ("e1_wgmma_shift", "e2_sync_latency", "e5_weight_multicast"))
    assert printed.endswith((stage.out / "summary.txt").read_text())
    assert sorted(path.name for path in stage.out.iterdir()) == ["log.txt", "probes.jsonl", "summary.txt"]


def test_a_gpu_that_torch_does_not_see_is_mentioned(stage: Stage) -> None:
    stage.gpu_machine()
    stage.python(gpu=False)
    stage.run("--stages", "tests")
    assert stage.outcomes()["tests"].endswith(f"{NO_GPU}, though nvidia-smi lists a GPU")


def test_an_interpreter_without_torch_is_said_so(stage: Stage) -> None:
    stage.python("*cuda.is_available*) echo 'no such thing' >&2; exit 3 ;;")
    stage.run("--stages", "tests")
    assert "ended with exit code 3" in stage.outcomes()["tests"]
    assert stage.summary()[0] == "machine: unknown: no such thing"


def test_an_interpreter_that_says_nothing_is_no_python(stage: Stage) -> None:
    stage.python("*cuda.is_available*) ;;")
    printed, errors = stage.start("--stages", "tests").communicate(timeout=20)
    assert printed == ""
    assert errors.startswith("error: --python: '/")
    assert errors.endswith("answered nothing and is no Python: name an interpreter that has torch\n")


def test_probes_with_nothing_to_build_them_are_skipped(stage: Stage) -> None:
    stage.python(gpu=False)
    stage.run("--stages", "probes")
    assert stage.outcomes()["probes"].startswith("skipped")
    assert stage.outcomes()["probes"].endswith("there is nothing to build or run them with")


@pytest.mark.slow
def test_this_repository_without_a_gpu(tmp_path: Path) -> None:
    """Nothing is a stand-in here."""
    script = [str(ROOT / "benchmarks/gpu.sh"), "--output", str(tmp_path / "out"), "--python", sys.executable]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}  # a probe compiles kernels
    done = subprocess.run(script, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "out/summary.txt").read_text().splitlines()
    assert len(lines) <= 40
    assert sum(line.split()[1] == "skipped" and NO_GPU in line for line in lines if line.split()[0] in GPU_STAGES) == 6
    assert "results: none, nothing was measured" in lines
    assert "Backends" in (tmp_path / "out/log.txt").read_text()
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"log.txt", "probes.jsonl", "summary.txt"}


# With one.


def test_every_stage_in_the_order_of_worth(stage: Stage) -> None:
    stage.gpu_machine()
    stage.own_kernels()
    printed = stage.run("--commit", "abc123")
    assert {name: outcome.split()[0] for name, outcome in stage.outcomes().items()} == dict.fromkeys(ALL_STAGES, "ok")
    assert list(stage.outcomes()) == ALL_STAGES
    calls = stage.calls("python")
    assert "csrc/build.py cuda" in calls
    assert "-m googlenet_fused doctor" in calls

    (tests,) = [call for call in calls if "-m pytest" in call and "sanitizer" not in call]
    assert tests == f"-m pytest -q -m gpu -p no:cacheprovider -W default --junitxml {stage.out}/tests.xml tests/test_gpu.py"

    runs = [call for call in calls if "benchmarks.run" in call]
    head = f"-m benchmarks.run --device cuda --output {stage.out}/results.json --append --budget "
    assert all(run.startswith(head) and " --commit abc123 " in run for run in runs)
    quick = "eager channels_last merged_cudnn fused_triton fused_reference"
    shape = [tuple(option(run, name) for name in ("subjects", "modes", "dtypes", "batches")) for run in runs]
    assert shape == [
        ("nets", "inference", "fp16", "1 8 32 128"),
        ("nets", "inference", "bf16 tf32", "1 8 32 128"),
        ("modules", "inference", "fp16", "1 8 32 128"),
        ("modules", "inference", "bf16 tf32", "1 8 32 128"),
        ("modules", "inference", "fp16 bf16 tf32", "256"),
        ("torchvision", "inference", "fp16", "8 1 32"),
        ("torchvision", "inference", "fp16", "8 1 32"),
        ("nets", "training", "bf16 tf32", "32"),
    ]
    assert [option(run, "providers") for run in runs[:5]] == [quick] * 5
    # What is measured again is replaced, so that nothing may be missing from the later run.
    first, second = (set(option(run, "providers").split()) for run in runs[5:7])
    assert set(quick.split()) < first < second
    assert second - first == {"compile_max_autotune"}

    order = [
        next(i for i, call in enumerate(calls) if text in call)
        for text in ("csrc/build.py", "-m gpu", "nets", "modules", "e4_")
    ]
    assert order == sorted(order)
    assert stage.calls("make") == ["-j 4 -C benchmarks/probes"] * 2
    for name in ("e1_wgmma_shift", "e2_sync_latency", "e5_weight_multicast"):
        assert stage.calls(name) == [""]
    assert f"benchmarks/probes/e3_peers.py {stage.out}/results.json" in calls
    probes = [json.loads(line)["probe"] for line in (stage.out / "probes.jsonl").read_text().splitlines()]
    assert probes == ["E1", "E2", "E5", "E4", "E3"]

    assert printed.endswith((stage.out / "summary.txt").read_text())
    lines = stage.summary()
    assert len(lines) <= 40
    assert lines[0] == "machine: NVIDIA Test, sm_90, 132 multiprocessors, 79 GiB, torch 2.11.0, driver 580.1"
    assert "tests: 1 passed, 0 failed, 0 skipped" in lines
    assert any("torchvision fp16" in line and "b1 2.00x 1 " in line for line in lines)
    files = ["log.txt", "probes.jsonl", "results.json", "summary.txt", "tests.xml", "verified.json"]
    assert sorted(path.name for path in stage.out.iterdir()) == files


def test_the_sanitizers_commands(stage: Stage) -> None:
    stage.gpu_machine()
    stage.own_kernels()
    stage.command("compute-sanitizer", 'echo "caching off: $PYTORCH_NO_CUDA_MEMORY_CACHING"')
    stage.run("--stages", "sanitizer")
    assert (stage.out / "log.txt").read_text().count("caching off: 1") == 16
    calls = stage.calls("compute-sanitizer")
    common = "--target-processes all --error-exitcode 86 --check-exit-code no --print-limit 10000"
    pytest_call = "-m pytest -q -m gpu and sanitizer -p no:cacheprovider -W default tests/test_gpu.py"
    options = {"memcheck": "--report-api-errors no ", "racecheck": "--kernel-name kns=googlenet_fused "}
    tools = ["memcheck", "racecheck", "synccheck", "initcheck"]
    assert calls[:4] == [f"--tool {tool} {common} {options.get(tool, '')}{stage.bin}/python {pytest_call}" for tool in tools]
    assert calls[4:] == [
        f"--tool {tool} {common} benchmarks/probes/build/{probe} --quick"
        for probe in ("e1_wgmma_shift", "e2_sync_latency", "e5_weight_multicast")
        for tool in tools
    ]
    assert "sanitizer, tests: memcheck clean; racecheck clean; synccheck clean; initcheck clean" in stage.summary()


def test_stages_run_as_chosen_and_in_that_order(stage: Stage) -> None:
    stage.gpu_machine()
    stage.run("--stages", "probes,tests")
    assert list(stage.outcomes()) == ["probes", "tests"]
    calls = stage.calls("python")
    assert not any("benchmarks.run" in call or "doctor" in call for call in calls)
    assert [call.split()[0] for call in calls if "e4_" in call or "-m pytest" in call] == [
        "benchmarks/probes/e4_triton_tma.py",
        "-m",
    ]


def test_results_are_kept_and_the_rest_is_of_this_run(stage: Stage) -> None:
    stage.gpu_machine()
    stage.run("--stages", "tests,bench-nets,probes")
    kept = (stage.out / "results.json").read_bytes()
    stage.run("--stages", "build")
    assert (stage.out / "results.json").read_bytes() == kept
    assert sorted(path.name for path in stage.out.iterdir()) == ["log.txt", "results.json", "summary.txt"]
    assert not any(line.startswith("tests:") for line in stage.summary())


# What goes wrong.


def test_a_failing_stage_does_not_stop_the_next(stage: Stage) -> None:
    stage.gpu_machine()
    failed = JUNIT.replace("/>", '><failure message="no"/></testcase>', 1)
    stage.junit.write_text(failed)
    stage.python(f'*"-m gpu "*) echo a test broke; cp "{stage.junit}" "{stage.out}/tests.xml"; exit 1 ;;')
    printed = stage.run("--stages", "build,tests,bench-nets", status=1)
    outcomes = stage.outcomes()
    assert outcomes["tests"].startswith("failed")
    assert outcomes["tests"].endswith("pytest: exit code 1")
    assert outcomes["bench-nets"].startswith("ok")
    assert "    | a test broke" in printed
    assert "  FAILED: tests.test_gpu.test_a" in stage.summary()


def test_tests_that_passed_are_recorded(stage: Stage) -> None:
    stage.gpu_machine()
    stage.run("--stages", "tests", "--commit", "abc123")
    (call,) = [call for call in stage.calls("python") if "benchmarks.verify" in call]
    assert call == f"-m benchmarks.verify {stage.out}/tests.xml --commit abc123"
    assert json.loads((stage.out / "verified.json").read_text()) == [{"backend": "triton"}]
    assert "not recorded" not in stage.outcomes()["tests"]


def test_why_nothing_is_recorded_is_in_the_summary(stage: Stage) -> None:
    stage.gpu_machine()
    stage.python('*"-m benchmarks.verify"*) echo "["; echo a warning >&2; echo "error: the tree is dirty" >&2; exit 1 ;;')
    stage.run("--stages", "tests")
    (call,) = [call for call in stage.calls("python") if "benchmarks.verify" in call]
    assert call == f"-m benchmarks.verify {stage.out}/tests.xml"
    assert stage.outcomes()["tests"].startswith("ok")
    assert stage.outcomes()["tests"].endswith(" not recorded as verified: the tree is dirty")
    assert "a warning" in (stage.out / "log.txt").read_text()
    assert not (stage.out / "verified.json").exists()


def test_a_record_that_takes_too_long_is_left_out(stage: Stage) -> None:
    stage.gpu_machine()
    shorten(stage, "tests", 1, 1, 0)
    stage.python('*"-m benchmarks.verify"*) echo "[]"; exec sleep 60 ;;')
    stage.run("--stages", "tests")
    assert stage.outcomes()["tests"].startswith("ok")
    assert stage.outcomes()["tests"].endswith(" not recorded as verified: no time was left")
    assert not (stage.out / "verified.json").exists()


@pytest.mark.parametrize("stages", ["tests,sanitizer", "sanitizer,tests"])
@pytest.mark.parametrize("verdict", ['echo "========= RACECHECK SUMMARY: 3 hazards displayed"; exit 86', "exit 1"])
def test_what_the_sanitizer_fails_is_not_recorded(stage: Stage, stages: str, verdict: str) -> None:
    stage.gpu_machine()
    stage.own_kernels()
    stage.command("compute-sanitizer", f'case "$*" in *"tool racecheck"*"gpu and"*) {verdict} ;; esac')
    stage.run("--stages", stages, status=1)
    assert not (stage.out / "verified.json").exists()
    notes = {"tests,sanitizer": "the tests are not recorded as verified", "sanitizer,tests": "the sanitizer failed"}
    (line,) = [outcome for outcome in stage.outcomes().values() if notes[stages] in outcome]
    assert line.count("recorded") == 1
    assert stage.outcomes()["tests"].startswith("ok")


@pytest.mark.parametrize("verdict", ["e2_*) exit 86", "*) echo Device not supported; exit 255"])
def test_what_the_sanitizer_does_not_fail_the_tests_for_stays_recorded(stage: Stage, verdict: str) -> None:
    """A probe's own faults, or a device that the sanitizer refuses."""
    stage.gpu_machine()
    stage.own_kernels()
    stage.command("compute-sanitizer", f'case "$*" in *{verdict} ;; esac')
    stage.run("--stages", "tests,sanitizer", status=int("e2" in verdict))
    assert (stage.out / "verified.json").exists()


@pytest.mark.parametrize("status", [1, 5])
def test_nothing_is_recorded_of_tests_that_did_not_pass(stage: Stage, status: int) -> None:
    stage.gpu_machine()
    stage.python(f'*"-m gpu "*) cp "{stage.junit}" "{stage.out}/tests.xml"; exit {status} ;;')
    stage.run("--stages", "tests", status=int(status == 1))
    assert not any("benchmarks.verify" in call for call in stage.calls("python"))
    assert not (stage.out / "verified.json").exists()


def test_a_stage_without_gpu_tests_is_skipped(stage: Stage) -> None:
    stage.gpu_machine()
    stage.python('*"-m gpu "*) exit 5 ;;')
    stage.run("--stages", "tests")
    assert stage.outcomes()["tests"].endswith("no GPU tests")
    (stage.root / "tests/test_gpu.py").write_text("import torch\n")
    stage.python('*"-m gpu "*) exit 1 ;;')
    stage.run("--stages", "tests")
    assert stage.outcomes()["tests"].endswith("no GPU tests")


def shorten(stage: Stage, name: str, least: int, limit: int, weight: int) -> None:
    """Gives a stage other numbers in the script's table."""
    script = stage.root / "benchmarks/gpu.sh"
    text = script.read_text()
    (line,) = [line for line in text.splitlines() if line.removeprefix("STAGES='").split()[:1] == [name]]
    assert len(line.removeprefix("STAGES='").split()) == 4
    head = "STAGES='" if line.startswith("STAGES='") else ""
    tail = "'" if line.endswith("'") else ""
    script.write_text(text.replace(line, f"{head}{name} {least} {limit} {weight}{tail}"))


def test_a_hanging_stage_is_ended_with_all_it_started(stage: Stage, tmp_path: Path) -> None:
    stage.gpu_machine()
    shorten(stage, "tests", 1, 1, 0)
    # A child of its own, and neither heeds a polite request.
    stage.python(
        f"""*"-m gpu "*) trap '' TERM; sleep 60 & echo $! $$ >"{tmp_path}/pids"; echo partial; while :; do sleep 1; done ;;"""
    )
    script = stage.root / "benchmarks/gpu.sh"
    script.write_text(script.read_text().replace("GRACE=5 ", "GRACE=1 "))
    began = time.monotonic()
    stage.run("--stages", "tests,bench-nets", status=1)
    assert time.monotonic() - began < 20
    assert stage.outcomes()["tests"].startswith("timed out")
    assert stage.outcomes()["tests"].endswith("pytest was cut off")
    assert stage.outcomes()["bench-nets"].startswith("ok")
    assert "partial" in (stage.out / "log.txt").read_text()
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        assert not alive(pid)


def wait_for(path: Path) -> None:
    """Until the file has something in it, 10 s at most."""
    for _ in range(200):
        if path.exists() and path.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"nothing was written to {path}")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_results_of_a_benchmark_that_is_cut_off_are_in_the_summary(stage: Stage) -> None:
    stage.gpu_machine()
    shorten(stage, "bench-training", 1, 0, 1)
    script = stage.root / "benchmarks/gpu.sh"
    script.write_text(script.read_text().replace("measure 15 ", "measure 1 "))
    stage.python(f'*"-m benchmarks.run"*) cp "{stage.results}" "{stage.out}/results.json"; exec sleep 60 ;;')
    # Of 30 s that leaves the stage less than 6.
    script.write_text(script.read_text().replace("RESERVE=10 ", "RESERVE=24 "))
    stage.run("--budget", "30", "--stages", "bench-training", status=1)
    assert stage.outcomes()["bench-training"].startswith("timed out")
    assert any("torchvision fp16" in line for line in stage.summary())


def test_compiling_with_autotune_needs_the_time_and_a_first_run_that_ended(stage: Stage) -> None:
    stage.gpu_machine()
    stage.run("--budget", "150", "--stages", "bench-compile")
    assert stage.outcomes()["bench-compile"].startswith("ok")
    assert "no time for torchvision inference fp16" in stage.outcomes()["bench-compile"]
    assert sum("benchmarks.run" in call for call in stage.calls("python")) == 1
    stage.python('*"-m benchmarks.run"*) exit 1 ;;')
    stage.run("--stages", "bench-compile", status=1)
    assert sum("benchmarks.run" in call for call in stage.calls("python")) == 2


def test_benchmarks_run_takes_what_it_is_given(stage: Stage) -> None:
    """The arguments of every call, by its own parser, and cases in the order that the script counts on."""
    from benchmarks import grid, providers, run

    names = [provider.name for provider in providers.lineup("cuda")]
    stage.gpu_machine()
    stage.python(f"*lineup*) echo {' '.join(name for name in names if name.startswith('fused_'))} ;;")
    stage.run("--commit", "abc123")
    orders = []
    for call in stage.calls("python"):
        words = call.split()
        if words[:2] != ["-m", "benchmarks.run"]:
            continue
        given = run.parser().parse_args(words[2:])
        cases = list(grid.cases(grid.Selection(given.subjects, given.batches, given.dtypes, given.modes), given.device))
        assert {provider.name for provider in providers.lineup("cuda", given.providers)} == set(given.providers) <= set(names)
        assert given.append
        assert given.commit == "abc123"
        assert given.output.name == "results.json"
        orders.append([(case.dtype, case.batch) for case in cases])
    assert len(orders) == 8
    assert all(orders)
    assert [batch for _, batch in orders[0]] == [1, 1, 8, 8, 32, 32, 128, 128]
    assert [dtype for dtype, _ in orders[1]] == ["bf16"] * 8 + ["tf32"] * 8
    modules = [case for order in orders[2:5] for case in order]
    assert sorted(set(modules)) == sorted(set(itertools.product(("fp16", "bf16", "tf32"), BATCHES)))


def test_a_stage_with_too_little_time_left_is_skipped(stage: Stage) -> None:
    stage.gpu_machine()
    stage.run("--budget", "90", "--stages", "build,bench-compile,bench-nets")
    outcomes = stage.outcomes()
    assert outcomes["build"].startswith("ok")
    assert outcomes["bench-compile"].startswith("skipped")
    assert outcomes["bench-compile"].endswith("s of the budget were left, it needs 90")
    assert outcomes["bench-nets"].startswith("ok")


@pytest.mark.parametrize("budget", [540, 1740])
def test_measuring_gets_what_is_left_by_weight(stage: Stage, budget: int) -> None:
    stage.gpu_machine()
    printed = stage.run("--budget", str(budget))
    limits = {name: int(printed.split(f"==> {name}, at most ")[1].split()[0]) for name in ALL_STAGES}
    assert [limits[name] for name in ("build", "tests", "sanitizer", "probes")] == [150, 75, 90, 60]
    # Nothing takes any time here, so each of them is offered its share of all the time but the reserve and the limit of the
    # probes, if those are to come.
    shares = {"bench-nets": 4 / 10, "bench-modules": 3 / 6, "bench-compile": 2 / 3, "bench-training": 1}
    for name, share in shares.items():
        left = budget - 10 - (60 if name in ("bench-nets", "bench-modules") else 0)
        assert share * (left - 8) - 1 <= limits[name] <= share * left, name


def test_what_is_worth_more_gets_its_least_before_what_comes_later(stage: Stage) -> None:
    stage.gpu_machine()
    # Of 80 s the 60 of the probes and the reserve of 10 leave 10.
    printed = stage.run("--budget", "80", "--stages", "bench-nets,probes")
    assert "==> bench-nets, at most 40 s" in printed


def test_inner_budgets_end_before_the_limit(stage: Stage) -> None:
    stage.gpu_machine()
    printed = stage.run("--budget", "200", "--stages", "bench-nets")
    limit = int(printed.split("at most ")[1].split()[0])
    first, second = (int(option(call, "budget")) for call in stage.calls("python") if "benchmarks.run" in call)
    assert limit * 0.4 < first < limit * 0.5
    assert limit * 0.7 < second < limit  # the first took no time


@pytest.mark.parametrize(("which", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_what_runs_and_sums_up(stage: Stage, tmp_path: Path, which: signal.Signals, status: int) -> None:
    stage.gpu_machine()
    stage.python(f'*"-m gpu "*) echo so far; echo $$ >"{tmp_path}/pid"; exec sleep 60 ;;')
    process = stage.start("--stages", "build,tests,bench-nets")
    wait_for(tmp_path / "pid")
    process.send_signal(which)
    printed, _ = process.communicate(timeout=20)
    assert process.returncode == status
    outcomes = stage.outcomes()
    assert [outcomes[name].split(" ")[0] for name in ("build", "tests", "bench-nets")] == ["ok", "interrupted", "not"]
    assert printed.endswith((stage.out / "summary.txt").read_text())
    assert "so far" in (stage.out / "log.txt").read_text()
    assert not alive(int((tmp_path / "pid").read_text()))


def test_what_is_done_is_in_the_folder_if_the_script_is_killed(stage: Stage, tmp_path: Path) -> None:
    stage.gpu_machine()
    stage.python(f'*"-m gpu "*) echo so far; echo $$ >"{tmp_path}/pid"; exec sleep 60 ;;')
    process = stage.start("--stages", "build,tests,bench-nets")
    wait_for(tmp_path / "pid")
    process.kill()
    try:
        process.communicate(timeout=20)  # nothing that outlives the script holds on to its output
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert stage.outcomes()["build"].startswith("ok")
    assert stage.outcomes()["tests"].startswith("to come")
    assert "so far" in (stage.out / "stage.txt").read_text()
    assert "doctor" in (stage.out / "log.txt").read_text()
    stage.python()
    stage.run("--stages", "build")
    assert sorted(path.name for path in stage.out.iterdir()) == ["log.txt", "summary.txt"]


def test_a_stage_that_says_too_much_is_cut(stage: Stage) -> None:
    stage.gpu_machine()
    stage.python("""*"-m gpu "*) echo the first words; head -c 300000 /dev/zero | tr '\\0' x; echo; echo the last words ;;""")
    stage.run("--stages", "tests")
    log = (stage.out / "log.txt").read_text()
    assert "===== tests: ok =====" in log
    assert "bytes are left out]" in log
    assert "the first words" not in log
    assert log.endswith("the last words\n")
    assert len(log) < 201_000


def test_a_broken_summary_does_not_hide_the_outcomes(stage: Stage) -> None:
    stage.gpu_machine()
    stage.python('*"-m benchmarks.summary"*) echo it is haunted >&2; exit 1 ;;')
    stage.run("--stages", "tests")
    assert stage.outcomes()["tests"].startswith("ok")
    assert "no summary of the files: it is haunted" in stage.summary()


# What compute-sanitizer says.


def sanitized(stage: Stage, body: str, status: int = 1) -> str:
    """The summary's line of the tests with a compute-sanitizer that does ``body``."""
    stage.gpu_machine()
    stage.own_kernels()
    stage.command("compute-sanitizer", body)
    stage.run("--stages", "sanitizer", status=status)
    (line,) = [line for line in stage.summary() if line.startswith("sanitizer, tests:")]
    return line


UNINITIALIZED = """cat <<'EOF'
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void {kernel}<(int)4>(float *)+0x90
=========     by thread (0,0,0) in block (0,0,0)
========= ERROR SUMMARY: 7 errors
EOF
exit 86"""


def test_what_is_found_fails_the_stage(stage: Stage) -> None:
    line = sanitized(
        stage,
        'case "$*" in *"tool racecheck"*"gpu and"*) echo "========= RACECHECK SUMMARY: 3 hazards displayed"; exit 86 ;; esac',
    )
    assert "memcheck clean; racecheck 3 FOUND; synccheck clean" in line
    assert stage.outcomes()["sanitizer"].endswith("racecheck, tests: 3 found")


def test_what_a_probe_does_wrong_fails_the_stage(stage: Stage) -> None:
    sanitized(stage, 'case "$*" in *"tool memcheck"*e2_*) echo "========= ERROR SUMMARY: 1 error"; exit 86 ;; esac')
    assert "sanitizer, e2_sync_latency: memcheck 1 FOUND; racecheck clean; synccheck clean; initcheck clean" in stage.summary()


def test_initcheck_blames_our_kernels_only(stage: Stage) -> None:
    others = UNINITIALIZED.format(kernel="cudnn::winograd")
    line = sanitized(stage, f'case "$*" in *"tool initcheck"*"gpu and"*) {others} ;; esac', status=0)
    assert line.endswith("initcheck clean in our kernels, 7 reports of others")


def test_initcheck_finds_in_our_kernels(stage: Stage) -> None:
    ours = UNINITIALIZED.format(kernel="googlenet_fused::inception")
    line = sanitized(stage, f'case "$*" in *"tool initcheck"*"gpu and"*) {ours} ;; esac')
    assert line.endswith("initcheck 7 FOUND")


def test_failing_tests_under_the_sanitizer_fail_the_stage(stage: Stage) -> None:
    line = sanitized(stage, 'case "$*" in *"tool memcheck"*"gpu and"*) exit 1 ;; esac')
    assert "memcheck exit code 1;" in line


def test_a_probe_that_cannot_run_here_is_no_failure(stage: Stage) -> None:
    sanitized(stage, """case "$*" in *e1_*) echo '{"probe": "E1", "skipped": "needs sm_90"}'; exit 2 ;; esac""", status=0)
    assert any(line.startswith("sanitizer, e1_wgmma_shift: memcheck not for this device;") for line in stage.summary())


def test_a_device_that_the_sanitizer_refuses(stage: Stage) -> None:
    line = sanitized(stage, 'echo "========= Error: Device not supported. Please refer to the manual"; exit 255', status=0)
    assert "memcheck device not supported" in line
    assert stage.outcomes()["sanitizer"].startswith("skipped")
    assert stage.outcomes()["sanitizer"].endswith("no check could run")


def test_no_sanitizer(stage: Stage) -> None:
    stage.gpu_machine()
    (stage.bin / "compute-sanitizer").unlink()
    stage.run("--stages", "sanitizer")
    assert stage.outcomes()["sanitizer"].endswith("compute-sanitizer is not on PATH")


def test_without_kernels_of_our_own_only_memcheck_sees_the_tests(stage: Stage) -> None:
    stage.gpu_machine()
    stage.run("--stages", "sanitizer")
    assert [call.split()[1] for call in stage.calls("compute-sanitizer") if "-m pytest" in call] == ["memcheck"]
    assert "no GPU kernels of our own yet" in stage.outcomes()["sanitizer"]


# Measuring.


def test_providers_that_cannot_be_listed_fail_the_stage(stage: Stage) -> None:
    stage.gpu_machine()
    stage.python("*lineup*) exit 1 ;;")
    stage.run("--stages", "bench-nets,build", status=1)
    assert stage.outcomes()["bench-nets"].endswith("the providers could not be listed")
    assert stage.outcomes()["build"].startswith("ok")


# Probes.


def test_a_probe_that_fails_leaves_a_line_and_the_others_run(stage: Stage) -> None:
    stage.gpu_machine()
    probe = stage.root / "benchmarks/probes/build/e2_sync_latency"
    probe.write_text("#!/bin/sh\nexit 4\n")
    stage.run("--stages", "probes", status=1)
    lines = [json.loads(line) for line in (stage.out / "probes.jsonl").read_text().splitlines()]
    assert [line["probe"] for line in lines] == ["E1", "e2_sync_latency", "E5", "E4"]
    assert lines[1]["error"] == "no result, exit code 4"
    assert "probe e2_sync_latency: error no result, exit code 4" in stage.summary()


def test_probes_without_a_compiler(stage: Stage) -> None:
    stage.gpu_machine()
    (stage.bin / "nvcc").unlink()
    stage.run("--stages", "probes")
    assert "nvcc or make is not on PATH" in stage.outcomes()["probes"]
    assert "probe E4: stays False" in stage.summary()


# The script's own text.


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (
            "a parse error",
            lambda text: subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr.split(),
        ),
        ("what bash 3.2 lacks", lambda text: [word for word in ("declare -A", "mapfile", "readarray", "|&") if word in text]),
        ("a long line", lambda text: [line for line in text.splitlines() if len(line) > 128]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_script_has_no(fault: str, found: Callable[[str], Sequence[object]]) -> None:
    assert not found((ROOT / "benchmarks/gpu.sh").read_text()), fault


def test_the_device_is_asked_and_never_set(stage: Stage) -> None:
    stage.gpu_machine()
    stage.run()
    assert {call.split("=")[0] for call in stage.calls("nvidia-smi")} == {"-L", "--query-gpu"}


def test_a_library_that_was_brought_along_is_not_built_again(stage: Stage) -> None:
    stage.gpu_machine()
    stage.own_kernels()
    stage.python("*native.load*) ;;")
    stage.run("--stages", "build")
    assert stage.outcomes()["build"].endswith("the CUDA library is there already")
    assert not [call for call in stage.calls("python") if "build.py" in call]

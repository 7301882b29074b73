"""The command that measures: its cases, its providers, its result files."""

from __future__ import annotations

import importlib.util
import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import BATCHES, GOOGLENET_MODULES, assert_agrees, message_of
from torch import Tensor, nn

from benchmarks import grid, reading, results, run, summary
from benchmarks.providers import CUDA_ONLY, all_providers, compiled, lineup, merged, merged_cudnn, torchvision_eager
from benchmarks.runtimes import onnx_runtime, openvino, tensorrt, torch_tensorrt
from googlenet_fused import bench
from googlenet_fused.backends import registry
from googlenet_fused.bench import BASELINE, Case, Provider, Row, Schedule, Status, Timing, Unavailable, Workload, build_workload

ROOT = Path(__file__).parents[1]
QUICK = Schedule(rounds=1, calls=1, warmup=0, settle=0.0)


def conv_relu(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return F.relu(conv(x))


def test_a_gpu_measures_the_whole_grid() -> None:
    found = list(grid.cases(grid.Selection(), "cuda"))
    assert len(found) == len(set(found))
    modules = [case for case in found if case.is_module]
    assert len(modules) == len(GOOGLENET_MODULES) * len(BATCHES) * 3
    assert {case.dtype for case in modules} == {"fp16", "bf16", "tf32"}
    training = [case for case in found if case.mode == "training"]
    assert {(case.subject, case.dtype) for case in training} == {
        (variant, dtype) for variant in ("torchvision", "bvlc") for dtype in ("bf16", "tf32")
    }


def test_a_cpu_measures_what_it_can() -> None:
    found = list(grid.cases(grid.Selection(), "cpu"))
    assert {case.dtype for case in found} == {"fp32", "bf16"}
    assert {case.subject for case in found} == {"torchvision", "bvlc", *GOOGLENET_MODULES}
    with pytest.raises(ValueError, match="--dtypes: tf32 is a mode of CUDA's tensor cores"):
        list(grid.cases(grid.Selection(dtypes=["tf32"]), "cpu"))
    chosen = grid.Selection(subjects=["4a", "nets"], batches=[2], dtypes=["fp32"])
    assert [str(case) for case in grid.cases(chosen, "cpu")] == [
        "4a, batch 2, fp32",
        "torchvision, batch 2, fp32",
        "bvlc, batch 2, fp32",
        "torchvision, batch 2, fp32, training step",
        "bvlc, batch 2, fp32, training step",
    ]


def test_every_backend_is_a_provider() -> None:
    names = [provider.name for provider in all_providers()]
    assert len(set(names)) == len(names)
    assert {f"fused_{name}" for name in registry.names() if not registry.get(name).for_tests} <= set(names)


def test_a_device_gets_its_providers_and_always_the_baseline() -> None:
    assert not {provider.name for provider in lineup("cpu")} & set(CUDA_ONLY)
    assert "onnxruntime" not in [provider.name for provider in lineup("cuda")]
    assert [provider.name for provider in lineup("cpu", ["fused_cpu"])] == [BASELINE, "fused_cpu"]
    with pytest.raises(ValueError, match=r"--providers must be among eager, .*, got 'cudnn'"):
        lineup("cpu", ["cudnn"])


@pytest.mark.parametrize("case", [Case("3a"), Case("torchvision", side=64), Case("bvlc", side=64)], ids=str)
def test_the_stand_in_for_tensorrt_computes_the_same(case: Case) -> None:
    workload = build_workload(case)
    stand_in = merged(workload.model, conv_relu)
    assert_agrees(stand_in, workload.model, workload.input(0))
    convolutions = [layer for layer in stand_in.modules() if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == (4 if case.is_module else 9 * 4 + 3), "the 1x1s that read the input are one"
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in stand_in.modules())


@pytest.mark.parametrize("build", [merged_cudnn, tensorrt, torch_tensorrt])
def test_gpu_runtimes_say_that_they_need_one(build: Any) -> None:
    with pytest.raises(Unavailable, match=r"GPU|CUDA"):
        build(build_workload(Case("5a")))


@pytest.mark.parametrize("build", [onnx_runtime, openvino, tensorrt, torch_tensorrt])
def test_runtimes_without_gradients_do_not_train(build: Any) -> None:
    with pytest.raises(Unavailable, match="it does not train"):
        build(build_workload(Case(mode="training", side=64)))


def test_onnx_runtime_has_no_half_precision() -> None:
    with pytest.raises(Unavailable, match="no convolution in bf16"):
        onnx_runtime(build_workload(Case("5a", dtype="bf16")))


@pytest.mark.parametrize(("package", "build"), [("onnxruntime", onnx_runtime), ("openvino", openvino)])
def test_cpu_runtimes_pass_the_gate(package: str, build: Any) -> None:
    pytest.importorskip(package)
    pytest.importorskip("onnx")
    workload = build_workload(Case("5a", batch=2))
    rows = bench.measure(workload, [Provider(BASELINE, "PyTorch", torchvision_eager), Provider("it", "It", build)], QUICK)
    assert [row.status for row in rows] == ["ok", "ok"], rows[1].reason


def test_the_baseline_is_torchvisions_own_network() -> None:
    torchvision = pytest.importorskip("torchvision.models.googlenet")
    models: list[nn.Module] = []
    workload = build_workload(Case(side=64))
    run_it = torchvision_eager(workload)(workload.input(0))
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: models.append(module))
    try:
        with torch.inference_mode():
            out = run_it()
            plain = workload.model(workload.input(0))
    finally:
        hook.remove()
    assert any(type(model) is torchvision.GoogLeNet for model in models)
    torch.testing.assert_close(out, plain)


def tiny_row(provider: str, case: Case, ms: float = 2.0, status: Any = "ok") -> Row:
    if status != "ok":
        return Row(case, provider, provider, status, "a reason")
    timing = Timing(ms, ms * 0.9, ms * 1.1, 5)
    return Row(case, provider, provider, "ok", None, {"wall": timing}, {"wall": 1.0}, 1.0, 1e-7, 1e-8)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """The cases that the command measured; each has a row of the baseline and one of ours."""
    found: list[Case] = []

    def measure(workload: Workload, providers: Any, schedule: Schedule, *, progress: Any) -> list[Row]:
        found.append(workload.case)
        progress("timing", 1.0)
        return [tiny_row(BASELINE, workload.case, 4.0), tiny_row("fused_cpu", workload.case)]

    monkeypatch.setattr(bench, "measure", measure)
    return found


ARGUMENTS = ["--device", "cpu", "--quick", "--dtypes", "fp32", "--modes", "inference", "--batches", "1", "--commit", "c0ffee"]


def test_a_run_writes_what_the_report_reads(tmp_path: Path, measured: list[Case], capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([*ARGUMENTS, "--subjects", "5a", "5b", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    read = reading.read_file(path)
    assert path.name == results.file_name(read.data)
    assert [case.subject for case in measured] == ["5a", "5b"]
    assert [(row["provider"], row["case"]["subject"]) for row in read.rows] == [
        (provider, subject) for subject in ("5a", "5b") for provider in (BASELINE, "fused_cpu")
    ]
    assert read.data["git"] == {"commit": "c0ffee", "dirty": None}
    assert read.data["settings"]["auto_backend"] == "cpu"
    assert read.data["versions"]["torch"] == results.versions()["torch"]
    for row in read.rows:
        assert row["roofline"]["flops"] > 0
        median = row["timings"]["wall"]["median"]
        assert row["roofline"]["percent"] == pytest.approx(100 * row["roofline"]["floor_ms"] / median)
    said = capsys.readouterr()
    assert f"wrote {path}" in said.out
    assert "5b, batch 1, fp32: fused_cpu 2 ms; eager 4 ms the fastest other" in said.err


def test_rows_are_added_to_a_result_of_the_same_run(tmp_path: Path, measured: list[Case]) -> None:
    path = tmp_path / "r.json"
    more = [*ARGUMENTS, "--append", "--output", str(path)]
    assert run.main([*more, "--subjects", "5a", "5b"]) == 0
    before = json.loads(path.read_text())
    assert run.main([*more, "--subjects", "5b", "4e"]) == 0
    after = json.loads(path.read_text())
    assert [row["case"]["subject"] for row in after["rows"]] == ["5a", "5a", "5b", "5b", "4e", "4e"]
    old, new = (result["ceilings"]["copy_gb_per_s"]["median"] for result in (before, after))
    assert new >= old, "a ceiling once reached stays"
    for row in after["rows"]:
        rate = after["ceilings"]["arithmetic_tflop_per_s"]["fp32"]["median"]
        floor = max(row["roofline"]["flops"] / rate / 1e9, row["roofline"]["bytes"] / new / 1e6)
        assert row["roofline"]["floor_ms"] == pytest.approx(floor), "all rows stand under the same ceilings"


def test_rows_of_another_commit_are_refused(tmp_path: Path, measured: list[Case], capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    assert run.main([*ARGUMENTS, "--subjects", "5a", "--output", str(path)]) == 0
    content = path.read_bytes()
    assert run.main([*ARGUMENTS, "--append", "--commit", "decaf", "--subjects", "5b", "--output", str(path)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        "benchmarks.run: error: results of different runs must not be mixed: "
        "git is commit: 'c0ffee' in one and 'decaf' in the other"
    )
    assert path.read_bytes() == content
    assert [case.subject for case in measured] == ["5a"]


def test_an_interrupted_run_keeps_its_cases_and_the_older_file(
    tmp_path: Path, measured: list[Case], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.json"
    assert run.main([*ARGUMENTS, "--subjects", "4e", "--output", str(path)]) == 0
    content, measure = path.read_bytes(), bench.measure

    def interrupted(workload: Workload, *arguments: Any, **options: Any) -> list[Row]:
        if workload.case.subject == "5b":
            raise KeyboardInterrupt
        return measure(workload, *arguments, **options)

    again = [*ARGUMENTS, "--subjects", "4e", "5a", "5b", "--output", str(path)]
    with monkeypatch.context() as context:
        context.setattr(bench, "measure", interrupted)
        capsys.readouterr()
        assert run.main(again) == 130
        assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted: the cases that were done are kept")
    assert path.read_bytes() == content
    partial = tmp_path / "r.partial.json"
    half = reading.read_file(partial)
    assert [row["case"]["subject"] for row in half.rows] == ["4e", "4e", "5a", "5a"]
    assert [(entry["case"]["subject"], entry["reason"]) for entry in half.data["not_run"]] == [("5b", run.INTERRUPTED)]

    left = partial.read_bytes()
    assert refusal(capsys, again) == (
        f"{partial} holds 4 rows of an interrupted run: go on with --resume, or give --replace to lose them"
    )
    said = refusal(capsys, [*ARGUMENTS, "--subjects", "3a", "--append", "--output", str(path)])
    assert "rows of an interrupted run: go on with --resume" in said, "what it added would be in the way of the run's end"
    other = refusal(capsys, [*ARGUMENTS, "--subjects", "4e", "5b", "--resume", "--output", str(path)])
    assert other.startswith(f"--resume: the interrupted run in {partial} is of other cases or providers; leave out --subjects,")
    fewer = refusal(capsys, [*again, "--resume", "--providers", "fused_cpu"])
    assert "of other cases or providers" in fewer
    assert (partial.read_bytes(), path.read_bytes()) == (left, content)

    rounds = json.loads(left) | {"settings": half.data["settings"] | {"rounds": 7}}
    partial.write_text(json.dumps(rounds))
    assert "--resume: the interrupted run has --rounds 7, got 9" in refusal(capsys, [*again, "--resume", "--rounds", "9"])
    for name in ("the same", "none"):
        measured.clear()
        partial.write_bytes(left)
        path.write_bytes(content)
        given = {"the same": again, "none": ["--device", "cpu", "--quick", "--commit", "c0ffee", "--output", str(path)]}[name]
        assert run.main([*given, "--resume"]) == 0
        assert [case.subject for case in measured] == ["5b"], "what was done is not done again"
        assert [row["case"]["subject"] for row in reading.read_file(path).rows] == ["4e", "4e", "5a", "5a", "5b", "5b"]
        assert reading.read_file(path).data["not_run"] == []
        assert not partial.exists()


def test_adding_to_a_result_loses_no_provider(tmp_path: Path, measured: list[Case], capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    more = [*ARGUMENTS, "--append", "--output", str(path)]
    assert run.main([*more, "--subjects", "5a"]) == 0
    before = reading.read_file(path)
    measured.clear()
    assert run.main([*more, "--subjects", "5a", "5b", "--providers", "channels_last"]) == 0
    assert "1 cases stay as they are, with figures of fused_cpu too" in capsys.readouterr().err
    assert [case.subject for case in measured] == ["5b"]
    after = reading.read_file(path)
    assert [row for row in after.rows if row["case"]["subject"] == "5a"] == [
        {**row, "roofline": new["roofline"]} for row, new in zip(before.rows, after.rows, strict=False)
    ]
    names = before.data["settings"]["providers"]
    assert after.data["settings"]["providers"] == names, "channels_last was among them"
    assert run.main([*more, "--subjects", "5a", "--providers", "channels_last", "--replace"]) == 0
    assert [case.subject for case in measured] == ["5b", "5a"]


def test_an_interrupted_addition_is_repeated(
    tmp_path: Path, measured: list[Case], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> list[Row]:
        raise KeyboardInterrupt

    more = [*ARGUMENTS, "--append", "--output", str(tmp_path / "r.json")]
    assert run.main([*more, "--subjects", "5a"]) == 0
    monkeypatch.setattr(bench, "measure", interrupted)
    assert run.main([*more, "--subjects", "5b"]) == 130
    said = "interrupted: the cases that were done are kept; repeat the command to measure the others"
    assert capsys.readouterr().err.splitlines()[-1] == said
    kept = reading.read_file(tmp_path / "r.json")
    assert {row["case"]["subject"] for row in kept.rows} == {"5a"}
    assert [(entry["case"]["subject"], entry["reason"]) for entry in kept.data["not_run"]] == [("5b", run.INTERRUPTED)]


def test_what_a_run_did_not_come_to_keeps_the_older_file(
    tmp_path: Path, measured: list[Case], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, partial = tmp_path / "r.json", tmp_path / "r.partial.json"
    both = [*ARGUMENTS, "--subjects", "5a", "5b", "--output", str(path)]
    assert run.main(both) == 0
    content = path.read_bytes()
    with monkeypatch.context() as context:
        clock = itertools.count(0.0, 10.0)
        context.setattr(run.time, "monotonic", lambda: next(clock))
        said = refusal(capsys, [*both, "--budget", "15"])
    assert said.startswith(f"{path} stays: it holds 2 rows that this run did not come to, the first eager on 5b, batch 1, fp32")
    assert path.read_bytes() == content
    assert {row["case"]["subject"] for row in reading.read_file(partial).rows} == {"5a"}
    assert run.main([*both, "--resume"]) == 0
    assert not partial.exists()
    assert {row["case"]["subject"] for row in reading.read_file(path).rows} == {"5a", "5b"}


def test_a_broken_device_ends_the_run_and_keeps_what_was_measured(
    tmp_path: Path, measured: list[Case], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = bench.measure

    def breaking(workload: Workload, *arguments: Any, **options: Any) -> list[Row]:
        if workload.case.subject == "5b":
            raise bench.DeviceBroken("fused_cuda broke the device: an illegal memory access")
        return measure(workload, *arguments, **options)

    monkeypatch.setattr(bench, "measure", breaking)
    path = tmp_path / "r.json"
    assert run.main([*ARGUMENTS, "--subjects", "5a", "5b", "4e", "--output", str(path)]) == 1
    assert "2 of 3 cases not run: fused_cuda broke the device" in capsys.readouterr().err
    read = reading.read_file(path)
    assert {row["case"]["subject"] for row in read.rows} == {"5a"}
    assert [entry["case"]["subject"] for entry in read.data["not_run"]] == ["5b", "4e"]


def test_an_error_outside_the_cases_is_one_line(
    tmp_path: Path, measured: list[Case], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, times = run.measured_ceilings, itertools.count()

    def second_time_out_of_memory(plan: run.Plan) -> Any:
        if next(times):
            raise torch.OutOfMemoryError("no more\nsecond line")
        return real(plan)

    monkeypatch.setattr(run, "measured_ceilings", second_time_out_of_memory)
    said = refusal(capsys, [*ARGUMENTS, "--subjects", "5a", "--output", str(tmp_path / "r.json")])
    assert said == "no more; what was measured before is kept"
    assert {row["case"]["subject"] for row in reading.read_file(tmp_path / "r.partial.json").rows} == {"5a"}


def test_a_compiler_out_of_memory_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(bench, "run_of", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        compiled("it", "It").build(build_workload(Case("5a")))


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The error of a run that is refused."""
    capsys.readouterr()
    assert run.main(arguments) == 1
    return capsys.readouterr().err.splitlines()[-1].removeprefix("benchmarks.run: error: ")


def test_an_interruption_before_the_first_case_promises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> list[Row]:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(bench, "measure", interrupted)
        assert run.main([*ARGUMENTS, "--subjects", "5a", "--output", str(tmp_path)]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted: no case was done yet"
    monkeypatch.setattr(bench, "measure", lambda workload, *_, **__: [tiny_row(BASELINE, workload.case)])
    assert run.main([*ARGUMENTS, "--subjects", "5b", "--output", str(tmp_path)]) == 0, "nothing is in its way"
    (path,) = tmp_path.iterdir()
    assert [row["case"]["subject"] for row in reading.read_file(path).rows] == ["5b"]


def test_a_run_takes_the_place_of_what_it_measures_again_only(
    tmp_path: Path, measured: list[Case], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.json"
    both = [*ARGUMENTS, "--output", str(path), "--subjects", "5a", "5b"]
    assert run.main(both) == 0
    assert run.main(both) == 0
    content = path.read_bytes()
    said = refusal(capsys, both[:-1])
    assert said == (
        f"{path} holds 2 rows that this run does not measure, the first eager on 5b, batch 1, fp32: "
        "give --append to add to it, --output for another file, or --replace"
    )
    said = refusal(capsys, [*both, "--providers", "channels_last"])
    assert "2 rows that this run does not measure, the first fused_cpu on 5a" in said
    assert path.read_bytes() == content
    assert run.main([*both[:-1], "--replace"]) == 0
    assert {row["case"]["subject"] for row in reading.read_file(path).rows} == {"5a"}

    full = json.loads(path.read_text())
    full["settings"]["quick"] = False
    path.write_text(json.dumps(full))
    assert "holds figures of no trial" in refusal(capsys, both[:-1])
    path.write_text("{")
    assert "is not JSON" in refusal(capsys, both)


def test_an_unavailable_provider_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(workload: Workload, *_: Any, **__: Any) -> list[Row]:
        return [tiny_row(BASELINE, workload.case), tiny_row("tensorrt", workload.case, status="unavailable")]

    monkeypatch.setattr(bench, "measure", measure)
    assert run.main([*ARGUMENTS, "--subjects", "5a", "5b", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().err.count("tensorrt is unavailable: a reason\n") == 1


def test_an_output_of_another_kind_is_refused(tmp_path: Path, measured: list[Case], capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, [*ARGUMENTS, "--subjects", "5a", "--output", str(tmp_path / "o.txt")])
    assert said == f"--output must be a .json file or a folder, got {tmp_path / 'o.txt'}"
    (tmp_path / "v1.5").mkdir()
    assert run.main([*ARGUMENTS, "--subjects", "5a", "--output", str(tmp_path / "v1.5")]) == 0


def test_a_trial_is_kept_apart(tmp_path: Path, measured: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run.main([*ARGUMENTS, "--subjects", "5a"]) == 0
    (path,) = (tmp_path / run.TRIALS).iterdir()
    assert reading.read_file(path).data["settings"] | {"quick": True, "rounds": 2} == reading.read_file(path).data["settings"]


@pytest.mark.parametrize("folder", ["/proc", "file"])  # Path("anything") / "/proc" is "/proc"
def test_an_output_that_cannot_be_written_is_said_before_anything_is_measured(
    tmp_path: Path, measured: list[Case], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / folder / "x.json"
    monkeypatch.setattr(run, "measured_ceilings", lambda plan: pytest.fail("it measures"))
    said = refusal(capsys, [*ARGUMENTS, "--subjects", "5a", "--output", str(path)])
    assert said.startswith(f"--output: {path.with_suffix('.partial.json')} cannot be written: ")


def test_a_spent_budget_and_a_case_that_cannot_run_are_recorded(
    tmp_path: Path, measured: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, measure = tmp_path / "r.json", bench.measure

    def without_5a(workload: Workload, *arguments: Any, **options: Any) -> list[Row]:
        if workload.case.subject == "5a":
            raise Unavailable("plain PyTorch cannot run it here: no kernel")
        return measure(workload, *arguments, **options)

    monkeypatch.setattr(bench, "measure", without_5a)
    assert run.main([*ARGUMENTS, "--subjects", "5a", "5b", "--output", str(path)]) == 0
    (entry,) = reading.read_file(path).data["not_run"]
    assert (entry["case"]["subject"], entry["reason"]) == ("5a", "plain PyTorch cannot run it here: no kernel")
    clock = itertools.count(0.0, 10.0)
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))  # at the start, before the first case, after it, ...
    other = tmp_path / "s.json"
    assert run.main([*ARGUMENTS, "--subjects", "4c", "4d", "4e", "--budget", "15", "--output", str(other)]) == 0
    read = reading.read_file(other)
    assert {row["case"]["subject"] for row in read.rows} == {"4c"}
    assert [(entry["case"]["subject"], entry["reason"]) for entry in read.data["not_run"]] == [
        (name, "the time budget of 15 s was spent") for name in ("4d", "4e")
    ]


def test_a_run_that_measures_nothing_leaves_the_older_file(
    tmp_path: Path, measured: list[Case], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.json"
    assert run.main([*ARGUMENTS, "--subjects", "5a", "--output", str(path)]) == 0
    content = path.read_bytes()
    said = refusal(capsys, [*ARGUMENTS, "--subjects", "5a", "--budget", "1e-9", "--output", str(path)])
    assert said == "nothing was measured, so nothing was written"
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_costs_one_case_only(tmp_path: Path, measured: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    measure = bench.measure

    def broken_5a(workload: Workload, *arguments: Any, **options: Any) -> list[Row]:
        if workload.case.subject == "5a":
            raise IndexError("a defect\nin two lines")
        return measure(workload, *arguments, **options)

    monkeypatch.setattr(bench, "measure", broken_5a)
    assert run.main([*ARGUMENTS, "--subjects", "5a", "5b", "--output", str(tmp_path / "r.json")]) == 1
    read = reading.read_file(tmp_path / "r.json")
    assert [(entry["case"]["subject"], entry["reason"]) for entry in read.data["not_run"]] == [("5a", "a defect")]
    assert {row["case"]["subject"] for row in read.rows} == {"5b"}


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_compiler_with_graphs_of_its_own_passes_the_gate(mode: Any) -> None:
    own = compiled("own", "Own", own_graph=True, backend="eager")
    workload = build_workload(Case(mode=mode, side=64, batch=2))
    rows = bench.measure(workload, [Provider(BASELINE, "PyTorch", torchvision_eager), own], QUICK)
    assert [row.status for row in rows] == ["ok", "ok"], rows[1].reason


@pytest.mark.parametrize("status", ["wrong", "failed"])
def test_a_wrong_provider_makes_the_run_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: Status) -> None:
    def measure(workload: Workload, *_: Any, **__: Any) -> list[Row]:
        return [tiny_row(BASELINE, workload.case), tiny_row("fused_cpu", workload.case, status=status)]

    monkeypatch.setattr(bench, "measure", measure)
    assert run.main([*ARGUMENTS, "--subjects", "5a", "--output", str(tmp_path)]) == 1
    (path,) = tmp_path.iterdir()
    assert [row["status"] for row in reading.read_file(path).rows] == ["ok", status]


@pytest.mark.slow
def test_a_real_run_from_measuring_to_reading(tmp_path: Path) -> None:
    names = [BASELINE, "channels_last", "compile_freezing", "onnxruntime", "openvino", "fused_reference", "fused_cpu"]
    before = torch.get_num_threads()
    arguments = [*ARGUMENTS, "--threads", "1", "--subjects", "5a", "--providers", *names, "--output", str(tmp_path)]
    assert run.main(arguments) == 0
    assert torch.get_num_threads() == before
    (path,) = tmp_path.iterdir()
    read = reading.read_file(path)
    statuses = {row["provider"]: row["status"] for row in read.rows}
    assert list(statuses) == names
    assert [statuses[name] for name in (BASELINE, "channels_last", "fused_reference", "fused_cpu")] == ["ok"] * 4
    assert set(statuses.values()) <= {"ok", "unavailable"}, read.rows
    assert read.data["machine"]["threads"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "0"], "--batches must be at least 1, got 0"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--threads", "0"], "threads must be from 1 to "),
        (["--threads", "9999"], "threads must be from 1 to "),
        (["--budget", "0"], "--budget must be more than 0 seconds, got 0"),
        (["--budget", "-5"], "--budget must be more than 0 seconds, got -5"),
        (["--commit", "zzz"], "--commit must be a hash, 4 to 40 hexadecimal digits, got 'zzz'"),
        (["--providers", "cudnn"], "got 'cudnn'"),
        (["--resume"], "so no run was interrupted; start without --resume"),
        (["--modes", "training", "--subjects", "5a"], "nothing to measure"),
        (["--dtypes", "tf32"], "tf32 is a mode of CUDA's tensor cores"),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda: torch sees no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_bad_arguments_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run.main(["--device", "cpu", *arguments, "--output", str(tmp_path)]) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: the load")]
    assert len(error) == 1
    assert error[0].startswith("benchmarks.run: error: ")
    assert message in error[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        ({"cpu": "AMD EPYC", "threads": 2}, "cpu-amd-epyc-2-threads.json"),
        (
            {"cpu": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "threads": 8},
            "cpu-intel-xeon-platinum-8481c-8-threads.json",
        ),
    ],
)
def test_a_cpu_result_is_named_after_the_processor(machine: dict[str, Any], name: str) -> None:
    assert results.file_name({"device": "cpu", "machine": machine}) == name


def test_a_gpu_result_is_named_after_the_gpu() -> None:
    machine = {"cpu": "Intel(R) Xeon(R)", "threads": 8, "gpu": {"name": "NVIDIA H100 80GB HBM3"}}
    assert results.file_name({"device": "cuda", "machine": machine}) == "cuda-nvidia-h100-80gb-hbm3.json"


def result_of(*subjects: str, **changes: Any) -> dict[str, Any]:
    made = results.new_result("cpu", {"commit": "c0ffee", "dirty": False}, {"rounds": 1, "quick": False})
    made["rows"] = [tiny_row(BASELINE, Case(subject)).to_json() | {"roofline": None} for subject in subjects]
    rate = {"median": 1.0, "p20": 0.9, "p80": 1.1, "n": 3}
    made["ceilings"] = {"copy_gb_per_s": rate, "arithmetic_tflop_per_s": {"fp32": rate}}
    return made | changes


def test_results_of_one_run_merge() -> None:
    left = {"case": result_of("5b")["rows"][0]["case"], "reason": "no time"}
    first, second = result_of("5a", not_run=[left]), result_of("5b")
    faster = {"median": 2.0, "p20": 1.9, "p80": 2.1, "n": 3}
    second["ceilings"]["arithmetic_tflop_per_s"] = {"fp32": faster, "bf16": faster}
    merged_result = results.merge([first, second])
    assert [row["case"]["subject"] for row in merged_result["rows"]] == ["5a", "5b"]
    assert merged_result["not_run"] == [], "it ran in the other"
    assert merged_result["ceilings"]["arithmetic_tflop_per_s"] == {"fp32": faster, "bf16": faster}
    for row in merged_result["rows"]:
        roofline = row["roofline"]
        assert roofline["floor_ms"] == pytest.approx(max(roofline["flops"] / 2e9, roofline["bytes"] / 1e6))
    assert [row["case"]["subject"] for row in first["rows"]] == ["5a"], "the sources stay as they were"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"machine": {"cpu": "another"}}, "machine is cpu"),
        ({"versions": {}}, "versions is"),
        ({"git": None}, "git is"),
        ({"device": "cuda"}, "device is 'cpu' in one and 'cuda' in the other"),
        ({"settings": {"quick": True}}, "one is a trial (--quick)"),
    ],
)
def test_results_of_two_runs_are_not_mixed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="must not be mixed") as error:
        results.merge([result_of("5a"), result_of("5b", **changes)])
    assert message in message_of(error)


def test_there_is_no_commit_outside_a_checkout(tmp_path: Path) -> None:
    assert results.git_state(tmp_path) is None


def test_clocks_are_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '1980, 2619, 34, [N/A]'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    clocks = results.read_clocks()
    assert clocks is not None
    assert [clocks[name] for name in ("sm_mhz", "memory_mhz", "temperature_c", "power_w")] == [1980.0, 2619.0, 34.0, None]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert results.read_clocks() is None


@pytest.mark.parametrize(("status", "said"), [("wrong", "is wrong"), ("failed", "failed")])
def test_one_line_says_who_is_wrong(status: Status, said: str) -> None:
    case = Case("5a")
    line = run.one_line(case, [tiny_row(BASELINE, case, 4.0), tiny_row("fused_cpu", case, status=status)], 3.2)
    assert line == f"5a, batch 1, fp32: eager 4 ms the fastest other; fused_cpu {said}: a reason (3 s)"


def test_a_case_that_is_not_run_is_recorded_once_with_its_last_reason() -> None:
    first, second, third = Case("5a"), Case("5b"), Case("4e")
    result: dict[str, Any] = {"rows": [{"case": asdict(third)}], "not_run": []}
    results.add_not_run(result, [first, second], "no time")
    results.add_not_run(result, [second, third], "no memory")
    assert [(entry["case"]["subject"], entry["reason"]) for entry in result["not_run"]] == [
        ("5a", "no time"),
        ("5b", "no memory"),
    ]


def test_providers_are_classed_alike_everywhere() -> None:
    """summary.py and e3_peers.py import nothing of the package, so that they run where it does not."""
    specification = importlib.util.spec_from_file_location("e3_peers", ROOT / "benchmarks/probes/e3_peers.py")
    assert specification is not None
    assert specification.loader is not None
    e3_peers = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(e3_peers)
    for name in (provider.name for provider in all_providers()):
        assert e3_peers.is_pytorch(name) == (name == BASELINE or reading.is_pytorch_peer(name)), name
    assert (bench.OURS, reading.HEADLINES, tuple(bench.NETWORKS)) == (summary.OURS, summary.HEADLINES, summary.NETWORKS)
    assert e3_peers.SCHEMA == reading.SCHEMA

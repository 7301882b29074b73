"""The timing core, its correctness gate, the charts, and the CPU benchmark with its report."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from googlenet_fused import bench, charts
from googlenet_fused.bench import BASELINE, Bind, Case, Provider, Row, Schedule, Timing, Unavailable, Workload

ROOT = Path(__file__).parents[1]
QUICK = Schedule(rounds=1, calls=2, warmup=0, settle=0.0)


def script(name: str) -> ModuleType:
    """A script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


cpu, report = script("cpu"), script("report")


@pytest.fixture
def workload() -> Workload:
    """A network of one convolution in place of GoogLeNet."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 5)).eval()
    return Workload(Case(side=8), model)


def provider(name: str, run: Callable[[Tensor], Tensor]) -> Provider:
    def build(_: Workload) -> Bind:
        return lambda x: lambda: run(x)

    return Provider(name, name.title(), build)


def eager(workload: Workload) -> Provider:
    return provider(BASELINE, workload.model)


def test_timing_summarises_samples() -> None:
    timing = Timing.of([float(ms) for ms in range(11)])
    assert (timing.median, timing.p20, timing.p80, timing.n) == (5.0, 2.0, 8.0, 11)
    assert Timing.of([3.0]) == Timing(3.0, 3.0, 3.0, 1)
    with pytest.raises(ValueError, match="ms must hold at least one sample"):
        Timing.of([])


@pytest.mark.parametrize(("name", "value"), [("rounds", 0), ("calls", 0), ("warmup", -1), ("settle", -0.1)])
def test_schedule_refuses_impossible_counts(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        Schedule(**{name: value})


@pytest.mark.parametrize(("field", "value"), [("dtype", "fp8"), ("batch", 0)])
def test_case_names_the_wrong_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"Case: {field} must be"):
        Case(**{field: value})


def test_interleaved_takes_turns_in_blocks() -> None:
    made: list[str] = []
    advanced: list[int] = []
    times = iter(range(1000))
    timings = bench.interleaved(
        {name: lambda name=name: made.append(name) for name in "abc"},
        rounds=8,
        warmup=2,
        calls=3,
        settle=0.0,
        clock=lambda call: (call(), float(next(times)))[1],
        advance=lambda: advanced.append(1),
    )
    assert made[:6] == ["a", "a", "b", "b", "c", "c"]
    blocks = ["".join(made[start : start + 4]) for start in range(6, len(made), 4)]
    rounds = [blocks[start : start + 3] for start in range(0, len(blocks), 3)]
    assert all(sorted(turns) == ["aaaa", "bbbb", "cccc"] for turns in rounds)
    assert len({tuple(turns) for turns in rounds}) > 1, "the order within a round never changed"
    assert {name: timing.n for name, timing in timings.items()} == {"a": 24, "b": 24, "c": 24}
    assert len(advanced) == 24


def test_wall_clock_counts_milliseconds() -> None:
    import time

    assert 20 <= bench.wall_clock(lambda: time.sleep(0.02)) < 2000


def test_only_providers_that_agree_get_a_time(workload: Workload) -> None:
    def missing(_: Workload) -> Bind:
        raise Unavailable("not on this machine")

    def broken(_: Workload) -> Bind:
        raise RuntimeError("cannot be built\nsecond line")

    def crashing(x: Tensor) -> Tensor:
        raise RuntimeError("cannot run")

    first: list[Tensor] = []

    def stale(x: Tensor) -> Tensor:
        first.append(workload.model(x))
        return first[0]

    rows = bench.measure(
        workload,
        [
            eager(workload),
            provider("same", lambda x: workload.model(x.contiguous(memory_format=torch.channels_last))),
            provider("off", lambda x: workload.model(x) * 1.001),
            provider("stale", stale),
            provider("nan", lambda x: workload.model(x) * float("nan")),
            provider("crashing", crashing),
            Provider("missing", "Missing", missing),
            Provider("broken", "Broken", broken),
        ],
        QUICK,
    )
    assert {row.provider: row.status for row in rows} == {
        BASELINE: "ok",
        "same": "ok",
        "off": "wrong",
        "stale": "wrong",
        "nan": "wrong",
        "crashing": "wrong",
        "missing": "unavailable",
        "broken": "wrong",
    }
    by_name = {row.provider: row for row in rows}
    assert by_name[BASELINE].speedup == 1.0
    assert all((row.timing is not None) == (row.status == "ok") for row in rows)
    assert all((row.reason is None) == (row.status == "ok") for row in rows)
    assert by_name["missing"].reason == "not on this machine"
    assert by_name["broken"].reason == "cannot be built"
    assert by_name["crashing"].reason == "cannot run"


def test_nothing_is_measured_without_the_baseline(workload: Workload) -> None:
    with pytest.raises(ValueError, match="must include the baseline 'eager'"):
        bench.measure(workload, [provider("other", workload.model)], QUICK)

    def refusing(x: Tensor) -> Tensor:
        raise NotImplementedError("no kernel")

    failing = nn.Module()
    failing.forward = refusing  # type: ignore[method-assign]
    with pytest.raises(Unavailable, match="plain PyTorch cannot run torchvision, batch 1, fp32 here: no kernel"):
        bench.measure(Workload(workload.case, failing), [provider(BASELINE, failing)], QUICK)


def test_the_network_itself_runs_through_the_gate() -> None:
    case = Case(side=64)
    rows = bench.measure(bench.build_workload(case), bench.package_providers(), QUICK)
    assert [row.status for row in rows] == ["ok"] * 3, [row.reason for row in rows]
    assert all(row.case == case and row.max_error is not None and row.max_error < 1e-5 for row in rows)


def test_inputs_are_seeded_and_in_the_dtype_of_the_case(workload: Workload) -> None:
    half = Workload(Case(batch=2, dtype="bf16", side=8), workload.model)
    assert half.input(3).shape == (2, 3, 8, 8)
    assert half.input(3).dtype == torch.bfloat16
    assert torch.equal(half.input(3), half.input(3))
    assert not torch.equal(half.input(3), half.input(4))


def test_torch_threads_puts_the_number_back() -> None:
    before = torch.get_num_threads()
    with bench.torch_threads(before + 1) as threads:
        assert threads == torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="threads must be at least 1"), bench.torch_threads(0):
        pass


def row(name: str, title: str, median: float, case: Case | None = None) -> Row:
    timing = Timing(median, median * 0.9, median * 1.2, 10)
    return Row(case or Case(), name, title, "ok", None, timing, 40.0 / median, 1e-7, 1e-8)


def rows() -> list[Row]:
    half = Case(dtype="bf16")
    return [
        row(BASELINE, "PyTorch", 40.0),
        row("eager_channels_last", "PyTorch, channels_last", 20.0),
        row("onnxruntime", "ONNX Runtime", 10.0),
        row("fused_cpu", "googlenet_fused, cpu", 16.0),
        row(BASELINE, "PyTorch", 40.0, half),
        Row(half, "onnxruntime", "ONNX Runtime", "unavailable", "it has no such convolution"),
        Row(half, "fused_cpu", "googlenet_fused, cpu", "wrong", "disagrees"),
    ]


def test_rows_survive_json() -> None:
    assert [Row.from_json(json.loads(json.dumps(row.to_json()))) for row in rows()] == rows()


@pytest.mark.parametrize(("threads", "said"), [(1, "1 torch thread."), (2, "2 torch threads.")])
def test_results_are_printed_with_reasons(threads: int, said: str) -> None:
    from rich.console import Console

    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    bench.print_results(rows(), threads, console)
    console.file.close()
    text = console.export_text()
    assert "torchvision, batch 1, fp32: ms a call, 10 calls each" in text
    assert "ONNX Runtime, unavailable: it has no such convolution" in text
    assert "googlenet_fused, cpu, wrong: disagrees" in text
    assert "2.50x" in text
    assert said in text


def test_a_chart_is_a_png_with_its_source(tmp_path: Path) -> None:
    from PIL import Image

    path = charts.latency_chart(bench.latency_panels(rows()), tmp_path / "new" / "c.png", "title", metadata={"Source": "abc"})
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 300
        assert image.info["Source"] == "abc"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved, laid out."""
    figures: list[Any] = []
    save = charts._save

    def keep(figure: Any, *arguments: Any) -> Path:
        figures.append(figure)
        return save(figure, *arguments)

    monkeypatch.setattr(charts, "_save", keep)
    return figures


@pytest.mark.parametrize("panels", [1, 2])
def test_latency_charts_centre_their_titles_and_explain_their_bars(tmp_path: Path, drawn: list[Any], panels: int) -> None:
    charts.latency_chart(bench.latency_panels(rows())[:panels], tmp_path / "c.png", "title")
    (figure,) = drawn
    assert len(figure.axes) == len(figure.subfigs) == panels

    def centre(texts: Any) -> float:
        (title,) = texts
        box = title.get_window_extent()
        return float(box.x0 + box.x1) / 2

    middle = centre(text for text in figure.texts if text.get_text() == "title")
    titles = [centre(place.texts) for place in figure.subfigs]
    assert sum(titles) / panels == pytest.approx(middle, abs=1)
    for axes in figure.axes:
        assert axes.get_xlabel() == "ms a call, lower is better (bars: median; whiskers: 20th to 80th percentile)"


def test_the_demo_chart_shares_the_scale_of_probabilities(tmp_path: Path, drawn: list[Any]) -> None:
    from PIL import Image

    image = Image.new("RGB", (8, 8))
    photographs = [charts.PhotographResult(str(p), image, [("a", p, p), ("b", p / 2, p / 2)]) for p in (0.2, 0.9, 0.4)]
    bars = [charts.Bar("plain", 2.0, 1.0, 3.0, "2 ms"), charts.Bar("fused", 1.0, 0.5, 1.5, "1 ms", True)]
    charts.demo_chart(photographs, bars, tmp_path / "c.png", subtitle="words")
    (figure,) = drawn
    limits = [axes.get_xlim() for axes in figure.axes if axes.get_xlabel() == "probability, %"]
    assert len(limits) == 3
    assert len(set(limits)) == 1
    assert limits[0][1] >= 90
    latency = figure.axes[-1]
    assert latency.get_title() == "Time an image at batch 1: lower is better"
    assert latency.get_xlabel() == "ms (bars: median; whiskers: 20th to 80th percentile)"
    assert sum(axes.get_legend() is not None for axes in figure.axes) == 1


def test_charts_refuse_nothing_and_name_the_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="panels must hold at least one"):
        charts.latency_chart([], tmp_path / "c.png", "title")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(charts.ChartError, match="pip install matplotlib"):
        charts.latency_chart(bench.latency_panels(rows()), tmp_path / "c.png", "title")


@pytest.mark.parametrize(
    ("cpu_name", "slug"),
    [
        ("AMD EPYC", "amd-epyc-2-threads"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "intel-xeon-platinum-8481c-2-threads"),
    ],
)
def test_a_result_is_named_after_the_machine(cpu_name: str, slug: str) -> None:
    assert cpu.slug({"cpu": cpu_name, "threads": 2}) == slug


def test_larger_batches_get_fewer_rounds() -> None:
    assert [cpu.schedule_for(Case(batch=batch), 30).rounds for batch in (1, 2, 8)] == [30, 15, 10]
    assert cpu.schedule_for(Case(batch=8), 3).rounds == 3


def test_there_is_no_commit_outside_a_checkout(tmp_path: Path) -> None:
    assert cpu.git_state(tmp_path) is None


def result(root: Path, content: str | None = None) -> Path:
    """A repository with a README and one result file."""
    root.joinpath("benchmarks", "results").mkdir(parents=True)
    root.joinpath("README.md").write_text(f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nTail\n")
    path = root / "benchmarks" / "results" / "cpu-x.json"
    git = {"commit": "0123456789abcdef", "dirty": True}
    path.write_text(content if content is not None else json.dumps(cpu.record(rows(), 2, 0.1, git)))
    return path


def test_the_report_is_made_from_json_alone(tmp_path: Path) -> None:
    path = result(tmp_path)
    assert report.main(["--check"], tmp_path) == 1
    assert report.main([], tmp_path) == 0
    assert report.main(["--check"], tmp_path) == 0
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("# Title\n")
    assert readme.endswith("\n\nTail\n")
    assert "old" not in readme
    assert "| **googlenet_fused, cpu** | **16.0** (14.4–19.2) **2.50x** | wrong |" in readme
    assert "| ONNX Runtime | 10.0 (9.0–12.0) 4.00x | – |" in readme
    speeds = "2.50x the speed of PyTorch and 1.25x that of PyTorch, channels_last"
    assert f"- batch 1, fp32: {speeds}; 1.60x the time of ONNX Runtime\n" in readme
    assert "ONNX Runtime, unavailable: it has no such convolution" in readme
    assert "commit 012345678 with local changes" in readme
    assert "(docs/cpu-x.png)" in readme

    data = json.loads(path.read_text())
    data["rows"][0]["ms"]["n"] += 1  # a change that the text does not show
    path.write_text(json.dumps(data))
    assert report.main(["--check"], tmp_path) == 1, "the chart is of another file"
    assert report.main([], tmp_path) == 0
    (tmp_path / "docs" / "cpu-x.png").unlink()
    assert report.main(["--check"], tmp_path) == 1


def test_the_report_says_that_nothing_is_measured_yet(tmp_path: Path) -> None:
    result(tmp_path).unlink()
    assert report.main([], tmp_path) == 0
    assert report.main(["--check"], tmp_path) == 0
    assert report.NOTHING in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a result of benchmarks/cpu.py"),
        ("[]", "is not a result of benchmarks/cpu.py"),
        ('{"schema": 99}', "schema 99 is not 1"),
        ('{"schema": 1, "rows": [{}]}', "is not a result of benchmarks/cpu.py"),
    ],
)
def test_a_bad_result_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str) -> None:
    result(tmp_path, content)
    assert report.main([], tmp_path) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "cpu-x.json" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("text", ["no markers", "{end} {begin}", "{begin} {begin} {end}"])
def test_a_readme_without_markers_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    result(tmp_path)
    (tmp_path / "README.md").write_text(text.format(begin=report.BEGIN, end=report.END))
    assert report.main([], tmp_path) == 1
    assert "README.md must hold" in capsys.readouterr().err


def test_the_cpu_benchmark_writes_a_result_the_report_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "Case", lambda variant, batch, dtype: Case(variant, batch, dtype, side=64))
    folder = tmp_path / "benchmarks" / "results"
    before = torch.get_num_threads()
    code = cpu.main(["--rounds", "1", "--batches", "1", "--dtypes", "fp32", "--threads", "1", "--output", str(folder)])
    assert torch.get_num_threads() == before
    (read,) = report.read(folder)
    statuses = {row.provider: row.status for row in read.rows}
    assert code == 0, [row.reason for row in read.rows]
    assert [statuses[name] for name in (BASELINE, "eager_channels_last", "fused_reference", "fused_cpu")] == ["ok"] * 4
    assert {statuses["onnxruntime"], statuses["openvino"]} <= {"ok", "unavailable"}
    assert read.data["machine"]["threads"] == 1
    assert read.data["versions"]["torch"]
    assert "docs/" in report.markdown([read], "docs")


def test_the_cpu_benchmark_refuses_bad_arguments_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cpu.main(["--batches", "0", "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "benchmarks/cpu.py: error: Case: batch must be at least 1, got 0"
    assert not list(tmp_path.iterdir())

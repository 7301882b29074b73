"""Rows of measurements, and the tables and charts made of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from googlenet_fused import bench, charts
from googlenet_fused.bench import BASELINE, Case, Row, Timing


def row(name: str, title: str, median: float, case: Case | None = None) -> Row:
    timing = Timing(median, median * 0.9, median * 1.2, 10)
    cold = Timing(median + 1, median, median + 2, 7)
    timings, speedup = {"wall": timing, "wall_cold": cold}, {"wall": 40.0 / median}
    return Row(case or Case(), name, title, "ok", None, timings, speedup, 12.5, 1e-7, 1e-8)


def rows() -> list[Row]:
    half = Case(dtype="bf16")
    return [
        row(BASELINE, "PyTorch", 40.0),
        row("channels_last", "PyTorch, channels_last", 20.0),
        row("onnxruntime", "ONNX Runtime", 10.0),
        row("fused_cpu", "googlenet_fused, cpu", 16.0),
        row(BASELINE, "PyTorch", 40.0, half),
        Row(half, "onnxruntime", "ONNX Runtime", "unavailable", "it has no such convolution"),
        Row(half, "fused_cpu", "googlenet_fused, cpu", "wrong", "disagrees"),
    ]


def test_rows_survive_json() -> None:
    assert [Row.from_json(json.loads(json.dumps(row.to_json()))) for row in rows()] == rows()


def test_the_headline_is_the_graphs_time_where_there_is_one() -> None:
    wall, graph = Timing(2.0, 1.0, 3.0, 5), Timing(1.0, 0.9, 1.1, 5)
    assert Row(Case(), "a", "A", "ok", timings={"wall": wall}).timing is wall
    assert Row(Case(), "a", "A", "ok", timings={"wall": wall, "graph": graph}).timing is graph
    assert Row(Case(), "a", "A", "wrong", "off").timing is None


def test_results_are_printed_with_reasons() -> None:
    from rich.console import Console

    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    bench.print_results(rows(), "a processor, 1 torch thread", console)
    console.file.close()
    text = console.export_text()
    assert "torchvision, batch 1, fp32: ms a call, 10 calls each" in text
    assert "ONNX Runtime, unavailable: it has no such convolution" in text
    assert "googlenet_fused, cpu, wrong: disagrees" in text
    assert "2.50x" in text
    assert "a processor, 1 torch thread. Speed-up" in text


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
    save = charts.save_figure

    def keep(figure: Any, *arguments: Any) -> Path:
        figures.append(figure)
        return save(figure, *arguments)

    monkeypatch.setattr(charts, "save_figure", keep)
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

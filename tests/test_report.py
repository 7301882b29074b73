"""The report: README tables, the page, CSV and charts, made from result files alone. All figures here are invented."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from benchmarks import plots, reading, report
from benchmarks.plots.batch import batch_panels
from benchmarks.plots.labels import Box, spread_apart
from benchmarks.plots.roofline import FEWEST_POINTS, draw_roofline, roofline_panels
from benchmarks.plots.speedup import MEAN, speedup_panels
from benchmarks.reading import ReportError, Result
from benchmarks.tables.page import page
from benchmarks.tables.readme import machine_part, markers, section

TITLES = {
    "eager": "PyTorch",
    "channels_last": "PyTorch, channels_last",
    "compile_freezing": "torch.compile, freezing",
    "compile_reduce_overhead": "torch.compile, reduce-overhead",
    "onnxruntime": "ONNX Runtime",
    "fused_reference": "googlenet_fused, reference",
    "fused_cpu": "googlenet_fused, cpu",
    "fused_triton": "googlenet_fused, triton",
    "fused_cuda": "googlenet_fused, cuda",
}
FLOPS, BYTES, FLOOR = 6_000_000_000, 40_000_000, 4.0
REFUSED = "it has no such | convolution"
DISAGREES = "disagrees: largest 1e-2"
BREAKS = "out of memory: no more"
BUDGET = "the time budget of 300 s was spent"

Data = dict[str, Any]


def case(subject: str = "torchvision", batch: int = 1, dtype: str = "fp32", mode: str = "inference") -> Data:
    return {"subject": subject, "batch": batch, "dtype": dtype, "mode": mode, "side": 224}


def timing(median: float) -> Data:
    return {"median": median, "p20": 0.9 * median, "p80": 1.2 * median, "n": 50}


def rows(of: Data, medians: Mapping[str, float | str | Mapping[str, float]], **changes: Any) -> list[Data]:
    """Rows of one case; for each provider a wall time, times by metric, or the reason why it has none."""
    found = []
    times = {name: {"wall": value} if isinstance(value, float) else value for name, value in medians.items()}
    for provider, value in times.items():
        measured = {} if isinstance(value, str) else value
        headline = measured.get("graph", measured.get("wall"))
        status = "ok" if measured else {DISAGREES: "wrong", BREAKS: "failed"}.get(value, "unavailable")
        found.append(
            {
                "case": dict(of),
                "provider": provider,
                "title": TITLES[provider],
                "status": status,
                "reason": None if measured else value,
                "timings": {metric: timing(median) for metric, median in measured.items()},
                "speedup": {m: times["eager"][m] / median for m, median in measured.items() if m != "host"},  # type: ignore[index]
                "peak_mib": None,
                "max_error": 3e-7 if measured else None,
                "rms_error": 2e-7 if measured else None,
                "roofline": {
                    "flops": FLOPS,
                    "bytes": BYTES,
                    "floor_ms": FLOOR,
                    "percent": None if headline is None else 100 * FLOOR / headline,
                },
            }
            | changes
        )
    return found


def rate(median: float) -> Data:
    return {"median": median, "p20": 0.95 * median, "p80": 1.02 * median, "n": 20}


def run(device: str, measured: list[Data], **changes: Any) -> Data:
    gpu = {
        "name": "NVIDIA H100",
        "arch": "sm_90",
        "multiprocessors": 132,
        "memory_gib": 79.1,
        "l2_mib": 50.0,
        "driver": "580.1",
    }
    return {
        "schema": 3,
        "kind": "benchmark",
        "device": device,
        "created": "2026-11-23T10:00:00+00:00",
        "machine": {
            "cpu": "AMD EPYC",
            "isa": "AVX512",
            "physical_cores": 2,
            "usable_cpus": 2,
            "threads": 2,
            "os": "Linux x86_64",
            "python": "3.12.3",
            "onednn": "3.12.0",
            "flags": {},
            "gpu": gpu if device == "cuda" else None,
        },
        "versions": {"googlenet_fused": "0.2.0", "torch": "2.14.1", "onnxruntime": None},
        "git": {"commit": "0123456789abcdef", "dirty": True},
        "settings": {"rounds": 30},
        "clocks": [
            {"time": "t", "sm_mhz": mhz, "memory_mhz": 2619, "temperature_c": 40, "power_w": 300} for mhz in (1700, 1980)
        ]
        if device == "cuda"
        else [],
        "ceilings": {"copy_gb_per_s": rate(20.0), "arithmetic_tflop_per_s": {"fp32": rate(1.6), "bf16": rate(3.0)}},
        "rows": measured,
        "not_run": [],
    } | changes


def cpu_run() -> Data:
    return run(
        "cpu",
        [
            *rows(
                case(),
                {"eager": 40.0, "channels_last": 20.0, "onnxruntime": 10.0, "fused_reference": 25.0, "fused_cpu": 16.0},
                peak_mib=120.4,
            ),
            *rows(
                case(batch=8),
                {
                    "eager": 320.0,
                    "channels_last": 160.0,
                    "onnxruntime": REFUSED,
                    "fused_reference": DISAGREES,
                    "fused_cpu": {"wall": 128.0, "wall_cold": 150.0},
                }
                | {"eager": {"wall": 320.0, "wall_cold": 330.0}},
            ),
            *rows(
                case(dtype="bf16"),
                {"eager": 30.0, "channels_last": BREAKS, "onnxruntime": REFUSED, "fused_cpu": 12.0},
                max_error=2e-3,
            ),
            *rows(case(dtype="fp16"), {"eager": 31.0, "fused_cpu": 15.5}),
            *rows(case("bvlc"), {"eager": 50.0, "fused_cpu": 25.0}),
            *rows(
                case("3a"), {"eager": 2.0, "channels_last": 1.0, "compile_freezing": 0.8, "onnxruntime": 0.4, "fused_cpu": 0.5}
            ),
            *rows(case("3b"), {"eager": 8.0, "channels_last": 4.0, "fused_cpu": 8.0}),
            *rows(case("3a", 8), {"eager": 16.0, "fused_cpu": 4.0}),
            *rows(case(batch=8, mode="training"), {"eager": 1000.0, "fused_cpu": 800.0}),
        ],
        not_run=[{"case": case("3b", 8), "reason": BUDGET}],
    )


def cuda_run() -> Data:
    return run(
        "cuda",
        [
            *rows(
                case(dtype="fp16"),
                {
                    "eager": {"graph": 1.0, "wall": 2.0, "host": 1.9},
                    "compile_reduce_overhead": {"wall": 0.5},
                    "fused_triton": {"graph": 0.2, "wall": 0.6},
                    "fused_cuda": {"graph": 0.25, "wall": 0.8, "host": 0.1},
                },
                peak_mib=300.0,
            ),
            *rows(
                case("3a", dtype="fp16"),
                {
                    "eager": {"graph": 0.06, "wall": 0.3},
                    "channels_last": {"graph": 0.03, "wall": 0.2},
                    "compile_reduce_overhead": {"wall": 0.03},
                    "fused_cuda": {"graph": 0.02, "wall": 0.06},
                },
            ),
        ],
        settings={"rounds": 30, "auto_backend": "cuda"},
    )


def result(data: Data, name: str = "cpu-x.json") -> Result:
    reading._check(data)
    return Result(Path(name), "0" * 64, data, data["rows"])


def cpu_tables(data: Data | None = None) -> str:
    return machine_part([result(data or cpu_run())])


def line_of(text: str, *beginnings: str) -> str:
    """The one line of a table that begins with these cells, after the one that has the first of them as its corner."""
    corner, *cells = beginnings
    lines = text[text.index(f"| {corner} |") :].splitlines()
    found = [line for line in lines[: lines.index("") if "" in lines else None] if line.startswith(f"| {cells[0]} |")]
    assert len(found) == 1, found
    return found[0]


def test_a_network_table_has_providers_down_and_batches_across() -> None:
    text = cpu_tables()
    assert "| torchvision, fp32, 224x224 | batch 1 | batch 8 |\n" in text
    corner = "torchvision, fp32, 224x224"
    assert line_of(text, corner, "PyTorch") == "| PyTorch | 40.0 (36.0–48.0), 10 % | 320 (288–384), 1.2 % |"
    assert line_of(text, corner, "ONNX Runtime") == "| ONNX Runtime | 10.0 (9.0–12.0) 4.00x, 40 % | – |"
    assert line_of(text, corner, "googlenet_fused, reference").endswith("| 25.0 (22.5–30.0) 1.60x, 16 % | wrong |")
    ours = line_of(text, corner, "**googlenet_fused, cpu**")
    assert ours.endswith("| **16.0** (14.4–19.2) **2.50x**, 25 % | **128** (115–154) **2.50x**, 3.1 % |")


def test_a_failure_is_neither_a_wrong_result_nor_a_provider_that_is_not_there() -> None:
    text = cpu_tables()
    assert line_of(text, "torchvision, bf16, 224x224", "PyTorch, channels_last") == "| PyTorch, channels_last | failed |"
    assert f"- PyTorch, channels_last, failed on torchvision, batch 1, bf16: {BREAKS}\n" in text


def test_a_gpu_table_has_graph_and_wall_times() -> None:
    text = machine_part([result(cuda_run(), "cuda-x.json")])
    corner = "torchvision, fp16, 224x224"
    assert line_of(text, corner, "PyTorch") == "| PyTorch | 1.00 (0.90–1.20), 400 %<br>wall 2.00 |"
    assert line_of(text, corner, "torch.compile, reduce-overhead").endswith(
        "| no graph<br>wall 0.500 (0.450–0.600) 4.00x, 800 % |"
    )
    assert "| **googlenet_fused, cuda** | **0.250** (0.225–0.300) **4.00x**, 1600 %<br>wall 0.800 |" in text
    assert "### NVIDIA H100\n" in text
    assert "driver 580.1, SM 1700–1980 MHz, memory 2619 MHz, at 40 °C, 300 W as read during the run; host AMD EPYC" in text
    assert "| **googlenet_fused, cuda** | **300 MiB, host 0.100** |" in text


def test_a_module_table_compares_ours_with_the_fastest_of_each_kind() -> None:
    text = cpu_tables()
    batch_1 = "**0.500** **4.00x**, 800 %<br>1.60x torch.compile, freezing<br>0.80x ONNX Runtime"
    assert line_of(text, "fp32", "3a") == f"| 3a | {batch_1} | **4.00** **4.00x**, 100 % |"
    assert line_of(text, "fp32", "3b") == "| 3b | **8.00** **1.00x**, 50 %<br>0.50x PyTorch, channels_last | not run |"
    mean = f"**2.00x** PyTorch<br>{math.sqrt(1.6 * 0.5):.2f}x its fastest way<br>0.80x the fastest runtime (of 1)"
    assert line_of(text, "fp32", "geometric mean") == f"| geometric mean | {mean} | **4.00x** PyTorch (of 1) |"


def test_a_provider_without_a_graph_is_compared_by_wall_time_and_not_passed_over() -> None:
    text = machine_part([result(cuda_run(), "cuda-x.json")])
    assert line_of(text, "fp16", "3a").endswith("**3.00x**, 20000 %<br>0.50x torch.compile, reduce-overhead (wall) |")


def test_the_training_step_has_a_table_of_its_own() -> None:
    text = cpu_tables()
    training = text[text.index("**Whole network, training step**") :]
    assert "| **googlenet_fused, cpu** | **800** (720–960) **1.25x**, 0.50 % |" in training
    assert "1000" not in text[: text.index("**Whole network, training step**")]


def test_other_dtypes_and_variants_are_folded() -> None:
    head, _, folded = cpu_tables().partition("<details><summary>The same for torchvision, fp16, 224x224; bvlc, fp32, 224x224<")
    assert "| torchvision, bf16, 224x224 |" in head
    assert folded.index("| torchvision, fp16, 224x224 |") < folded.index("| bvlc, fp32, 224x224 |") < folded.index("</details>")
    only_fp16 = run("cpu", rows(case(dtype="fp16"), {"eager": 31.0, "fused_cpu": 15.5}))
    assert "<details>" not in cpu_tables(only_fp16)


def test_errors_and_memory_are_told() -> None:
    text = cpu_tables()
    assert "fp32: PyTorch 3.0e-07 / PyTorch, channels_last 3.0e-07 / googlenet_fused, cpu 3.0e-07; bf16: " in text
    assert "bf16: PyTorch 2.0e-03 / " in text
    assert "| ONNX Runtime | 120 MiB | – |" in text


def test_reasons_are_told_once() -> None:
    text = cpu_tables()
    assert text.count(r"ONNX Runtime, unavailable: it has no such \| convolution") == 1
    assert f"- googlenet_fused, reference, wrong on torchvision, batch 8, fp32: {DISAGREES}\n" in text
    assert f"Not run:\n\n- {BUDGET}: 3b, batch 8, fp32\n" in text


def test_many_cases_that_were_not_run_are_counted_and_the_page_names_them() -> None:
    data = cpu_run()
    data["not_run"] = [{"case": case("4a", batch), "reason": BUDGET} for batch in (1, 2, 4, 8)]
    assert f"- {BUDGET}: 4 cases, the first 4a, batch 1, fp32" in cpu_tables(data)
    assert "4a, batch 1, fp32; 4a, batch 2, fp32; 4a, batch 4" in page([result(data)])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "2026-11-23, commit 012345678, with local changes."),
        ({"git": {"commit": "0123456789abcdef", "dirty": False}}, "2026-11-23, commit 012345678."),
        ({"git": None}, "2026-11-23, no commit recorded."),
    ],
)
def test_the_heading_says_on_what_and_of_what_commit(changes: Data, said: str) -> None:
    text = cpu_tables(cpu_run() | changes)
    assert text.startswith("### AMD EPYC, 2 threads\n")
    assert f"AVX512; Linux x86_64, Python 3.12.3; torch 2.14.1, oneDNN 3.12.0; {said}" in text
    ceilings = "device copy 20.0 (19.0–20.4) GB/s; arithmetic in TFLOP/s: fp32 1.60 (1.52–1.63), bf16 3.00 (2.85–3.06)."
    assert ceilings in text


@pytest.mark.parametrize("make", [cpu_run, cuda_run])
def test_every_row_of_the_page_has_its_percentage(make: Callable[[], Data]) -> None:
    data = make()
    text = page([result(data)])
    header: list[str] = []
    percentages = []
    for line in text[: text.index("## What the rooflines are")].splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if cells[1:2] == ["batch"]:
            header = cells
        elif cells[1:2] and cells[1].isdigit():
            percentages.append(cells[header.index("% of roofline")])
    assert len(percentages) == len(data["rows"])
    assert sum(p.endswith(" %") for p in percentages) == sum(row["status"] == "ok" for row in data["rows"])
    assert all(p == "" or p.endswith(" %") for p in percentages)


def test_the_page_has_every_metric() -> None:
    text = page([result(cpu_run())])
    cells = "128 (115–154) 2.50x | 150 2.20x | 50 | 3.1 % | 3.0e-07 | 2.0e-07 | –"
    assert f"| 8 | **googlenet_fused, cpu** | {cells} |" in text
    assert "| 8 | googlenet_fused, reference | wrong |" in text
    assert "| torchvision, batch 1, fp32 | 6.00 | 40.0 | 150 | 4.00 |" in text
    assert "rounds 30" in text


def test_a_row_without_a_ceiling_says_so() -> None:
    data = cpu_run()
    data["rows"][0]["roofline"]["percent"] = None
    assert "| 1 | PyTorch | 40.0 (36.0–48.0) | – | 50 | no ceiling |" in page([result(data)])
    assert "| PyTorch | 40.0 (36.0–48.0) | 320" in cpu_tables(data)


def test_text_of_others_does_not_break_a_table() -> None:
    data = cpu_run()
    for row in data["rows"]:
        if row["provider"] == "onnxruntime":
            row["title"] = "a|b <c>\n*d*"
    assert r"| a\|b \<c> \*d\* | 10.0 (9.0–12.0) 4.00x, 40 % |" in cpu_tables(data)


@pytest.mark.parametrize("make", [machine_part, page])
def test_two_machines_are_refused(make: Callable[[list[Result]], str]) -> None:
    other = cpu_run()
    other["machine"]["threads"] = 4
    with pytest.raises(
        ReportError, match=r"cpu-x.json is of cpu, AMD EPYC, AVX512, 2, .* and cpu-y.json .* AVX512, 4, .* two mac"
    ):
        make([result(cpu_run()), result(other, "cpu-y.json")])
    with pytest.raises(ReportError, match=r"cpu-x.json .* and cuda-y.json .*NVIDIA H100"):
        make([result(cpu_run()), result(cuda_run(), "cuda-y.json")])


def test_two_files_of_one_machine_are_merged_for_its_tables() -> None:
    other = cpu_run() | {"rows": rows(case("5b"), {"eager": 3.0, "fused_cpu": 1.0}), "not_run": []}
    text = machine_part([result(cpu_run()), result(other, "cpu-y.json")])
    assert "| 3b | **8.00**" in text
    assert "| 5b | **1.00** **3.00x**" in text


@pytest.mark.parametrize(
    ("settings", "ours"),
    [
        ({"auto_backend": "triton"}, "fused_triton"),
        ({"auto_backend": "cuda"}, "fused_cuda"),
        ({"auto_backend": None}, "fused_cuda"),
        ({}, "fused_cuda"),
    ],
)
def test_ours_is_what_auto_chooses_and_not_the_fastest(settings: Data, ours: str) -> None:
    of = result(cuda_run() | {"settings": settings}, "cuda-x.json")
    assert reading.our_provider(of) == ours
    text = machine_part([of])
    assert f"| **{TITLES[ours]}** |" in text
    others = {"fused_triton", "fused_cuda"} - {ours}
    assert not any(f"**{TITLES[name]}**" in text for name in others)


def test_a_run_without_ours_is_shown_all_the_same() -> None:
    text = cpu_tables(run("cpu", rows(case(), {"eager": 40.0, "channels_last": 20.0})))
    assert "| PyTorch, channels_last | 20.0 (18.0–24.0) 2.00x, 20 % |" in text
    assert "Bold" not in text


def test_what_was_not_measured_is_said_and_never_estimated() -> None:
    text = section([result(cpu_run())], "cuda")
    assert text.startswith("<!-- results:gpu:begin -->\n")
    assert text.endswith("\n<!-- results:gpu:end -->")
    assert "**No GPU figures yet.**" in text
    for table in (
        "the whole network, torchvision variant, inference",
        "the whole network, bvlc variant, inference",
        "the nine modules, inference",
        "the training step of the whole network",
    ):
        assert f"- {table}\n" in text
    assert "Nothing is estimated" in text
    assert "AMD" not in text


def test_tables_that_wait_for_figures_are_named() -> None:
    text = section([result(cuda_run(), "cuda-x.json")], "cuda")
    missing = text[text.index("No GPU figures yet for:") :]
    assert "the training step" in missing
    assert "bvlc" in missing
    assert "the modules 3b, 4a, 4b, 4c, 4d, 4e, 5a, 5b, inference" in missing
    assert "torchvision" not in missing
    unavailable = run("cuda", rows(case("bvlc"), {"eager": REFUSED}))
    assert "bvlc variant" in section([result(unavailable, "cuda-y.json")], "cuda")


def lines_of_csv(data: Data) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(report.csv_text(result(data)))))


def test_the_csv_begins_with_the_columns_of_timm() -> None:
    header = report.csv_text(result(cpu_run())).partition("\n")[0].split(",")
    assert header[:11] == [
        "model",
        "infer_samples_per_sec",
        "infer_step_time",
        "infer_batch_size",
        "infer_img_size",
        "infer_gmacs",
        "param_count",
        "train_samples_per_sec",
        "train_step_time",
        "train_batch_size",
        "train_img_size",
    ]
    assert {"provider", "dtype", "metric", "p20", "p80", "n", "speedup", "roofline_percent"} < set(header)


def test_the_csv_has_a_line_for_each_row_and_metric() -> None:
    lines = lines_of_csv(cpu_run())
    measured = sum(max(1, len(row["timings"])) for row in cpu_run()["rows"])
    assert len(lines) == measured
    eager, *_ = lines
    assert eager["model"] == "googlenet_torchvision"
    assert (eager["infer_samples_per_sec"], eager["infer_step_time"]) == ("25.00", "40")
    assert (eager["infer_batch_size"], eager["infer_img_size"], eager["infer_gmacs"]) == ("1", "224", "3.0000")
    assert eager["param_count"] == "6.625", "torchvision's 6,624,904 without auxiliary heads"
    assert (eager["metric"], eager["p20"], eager["p80"], eager["n"]) == ("wall", "36", "48", "50")
    assert (eager["roofline_percent"], eager["peak_mib"], eager["train_step_time"]) == ("10.00", "120.4", "")
    cold = [line for line in lines if line["metric"] == "wall_cold" and line["provider"] == "fused_cpu"]
    assert [line["infer_gmacs"] for line in cold] == ["0.3750"], "of one image, at batch 8"
    assert cold[0]["roofline_percent"] == ""
    module = next(line for line in lines if line["model"] == "inception_3a")
    assert module["infer_img_size"] == "28"
    assert module["param_count"] == f"{(163_328 + 368) / 1e6:.3f}", "weights and biases of 3a with its 5x5"


def test_the_csv_puts_training_into_the_columns_of_training_and_keeps_reasons() -> None:
    lines = lines_of_csv(cpu_run())
    step = next(line for line in lines if line["train_batch_size"] and line["provider"] == "fused_cpu")
    assert (step["train_samples_per_sec"], step["train_step_time"], step["train_img_size"]) == ("10.00", "800", "224")
    assert step["infer_samples_per_sec"] == step["infer_batch_size"] == step["infer_gmacs"] == ""
    wrong = next(line for line in lines if line["status"] == "wrong")
    assert (wrong["reason"], wrong["infer_step_time"], wrong["infer_batch_size"]) == (DISAGREES, "", "8")


def test_the_host_time_is_a_column() -> None:
    lines = [line for line in lines_of_csv(cuda_run()) if line["provider"] == "fused_cuda" and line["model"].startswith("goog")]
    assert [(line["metric"], line["host_ms"]) for line in lines] == [("graph", "0.1"), ("wall", "0.1")]


def test_the_speedup_chart_has_a_bar_for_each_provider_and_module() -> None:
    panels = speedup_panels(result(cpu_run()))
    assert [(panel.dtype, panel.batch) for panel in panels] == [("fp32", 1), ("fp32", 8)]
    first = panels[0]
    assert first.places == ["3a", "3b", MEAN]
    by_name = {series.provider: series.values for series in first.series}
    assert "eager" not in by_name
    assert [value and pytest.approx(value.value) for value in by_name["fused_cpu"]] == [4.0, 1.0, 2.0]
    bar = by_name["fused_cpu"][0]
    assert bar is not None
    assert (bar.low, bar.high) == (pytest.approx(4.0 / 1.2), pytest.approx(4.0 / 0.9))
    assert by_name["onnxruntime"][1:] == [None, None], "no mean over a part of the modules"


def test_charts_show_the_smallest_and_the_largest_batch() -> None:
    data = run("cpu", [row for b in (2, 4, 8) for row in rows(case("3a", b), {"eager": 2.0 * b, "fused_cpu": 1.0 * b})])
    assert [panel.batch for panel in speedup_panels(result(data))] == [2, 8]
    assert [panel.batch for panel in roofline_panels(result(data))] == [2, 8]


def test_a_few_modules_of_a_larger_batch_do_not_take_the_place_of_all() -> None:
    both = {"eager": 2.0, "fused_cpu": 1.0}
    data = run("cpu", [row for b in (1, 8) for name in ("3a", "3b", "4a") for row in rows(case(name, b), both)])
    data["rows"] += rows(case("3a", 32), both)
    assert [panel.batch for panel in speedup_panels(result(data))] == [1, 8]
    data["rows"] += rows(case("3b", 32), both)
    assert [panel.batch for panel in speedup_panels(result(data))] == [1, 32]


def test_the_roofline_chart_has_ours_and_plain_pytorch_below_the_ceilings_of_the_run() -> None:
    panels = {(panel.dtype, panel.batch): panel for panel in roofline_panels(result(cpu_run()))}
    panel = panels["fp32", 1]
    assert (panel.copy, panel.arithmetic) == (20.0, 1.6)
    points = {point.label: point for point in panel.points}
    assert set(points) == {"torchvision", "bvlc", "3a", "3b"}
    assert points["torchvision"].intensity == FLOPS / BYTES
    assert points["torchvision"].ours == pytest.approx(6.0 / 16.0)
    assert points["torchvision"].baseline == pytest.approx(6.0 / 40.0)
    (fp16,) = roofline_panels(result(run("cpu", rows(case(dtype="fp16"), {"eager": 31.0, "fused_cpu": 15.5}))))
    assert fp16.arithmetic is None, "no product was measured in it"


def test_the_roofline_chart_leaves_out_panels_of_few_points() -> None:
    def measured(batch: int, subjects: int, dtype: str = "fp32") -> list[Data]:
        names = reading.MODULES[:subjects]
        return [row for name in names for row in rows(case(name, batch, dtype), {"eager": 2.0, "fused_cpu": 1.0})]

    def shown(*measurements: list[Data]) -> list[tuple[str, int]]:
        panels = roofline_panels(result(run("cpu", [row for part in measurements for row in part])))
        return [(panel.dtype, panel.batch) for panel in panels]

    enough = [measured(batch, FEWEST_POINTS) for batch in (1, 4, 8)]
    few = [measured(32, FEWEST_POINTS - 1), measured(1, 1, "bf16")]
    assert shown(*enough, *few) == [("fp32", 1), ("fp32", 8)], "8 is the largest batch of those worth a look"
    assert shown(*few) == [("fp32", 32), ("bf16", 1)], "there is nothing better"


def test_the_batch_chart_has_a_line_for_each_provider() -> None:
    (panel,) = batch_panels(result(cpu_run()))
    assert (panel.subject, panel.dtype, panel.batches) == ("torchvision", "fp32", [1, 8])
    values = {series.title: [value and value.value for value in series.values] for series in panel.series}
    assert values["googlenet_fused, cpu"] == [16.0, 16.0]
    assert values["ONNX Runtime"] == [10.0, None]


@pytest.mark.parametrize(
    ("places", "moved"),
    [
        ([0.1, 0.5, 0.9], [0.1, 0.5, 0.9]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.0, 0.01, 0.9], [0.0, 0.1, 0.9]),
        ([0.3, 0.99, 1.0], [0.3, 0.9, 1.0]),
        ([0.5], [0.5]),
    ],
)
def test_labels_move_apart_and_stay_beside_the_axes(places: list[float], moved: list[float]) -> None:
    assert spread_apart(places, 0.1) == pytest.approx(moved)


@pytest.mark.parametrize("chart", plots.CHARTS, ids=lambda chart: chart.name)
@pytest.mark.parametrize("make", [cpu_run, cuda_run])
def test_a_chart_is_a_small_png_that_names_its_source(tmp_path: Path, chart: plots.Chart, make: Callable[[], Data]) -> None:
    from PIL import Image

    data = make()
    if data["device"] == "cuda":
        data["rows"] += rows(case(batch=4, dtype="fp16"), {"eager": {"graph": 4.0, "wall": 5.0}, "fused_cuda": {"wall": 2.0}})
    of = result(data)
    assert chart in plots.charts_of(of)
    path = chart.draw(of, tmp_path / "docs" / "c.png")
    assert path.stat().st_size < 200_000
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 300
        assert image.info["Source"] == of.digest


def test_labels_of_the_roofline_cover_neither_points_nor_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subjects = reading.MODULES
    data = run("cpu", [])
    for number, subject in enumerate(subjects):
        new = rows(case(subject), {"eager": 40.0, "fused_cpu": 16.0 + number / 4})
        for row in new:
            row["roofline"]["bytes"] += 400_000 * number
        data["rows"] += new
    from matplotlib.text import Text

    figures: list[Any] = []
    monkeypatch.setattr("benchmarks.plots.roofline.save_small", lambda figure, path, _: figures.append(figure) or path)
    draw_roofline(result(data), tmp_path / "c.png")
    figures[0].canvas.draw()
    (axes,) = (axes for axes in figures[0].axes if axes.get_title())
    labels = [text for text in axes.texts if text.get_text() in subjects]
    assert len(labels) == len(subjects)
    boxes = [Box(*Text.get_window_extent(label).extents) for label in labels]  # a label's own would hold its leader
    points = [place for cloud in axes.collections for place in axes.transData.transform(cloud.get_offsets())]
    marks = [Box.around(place, 3, 3) for place in points]
    assert len(marks) == 2 * len(subjects)
    covered = [a.overlap(b) for number, a in enumerate(boxes) for b in [*boxes[:number], *marks]]
    assert max(covered) < 10, "square pixels"


def test_a_result_without_modules_or_batches_has_fewer_charts() -> None:
    networks = result(run("cpu", rows(case(), {"eager": 40.0, "fused_cpu": 16.0})))
    assert [chart.name for chart in plots.charts_of(networks)] == ["roofline"]
    assert plots.charts_of(result(run("cpu", []))) == []
    assert ".png" not in machine_part([result(run("cpu", []))])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with a README and one small result."""
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    sections = [f"{begin}\nold\n{end}" for begin, end in map(markers, ("cpu", "cuda"))]
    tmp_path.joinpath("README.md").write_text("# Title\n\n{}\n\nBetween\n\n{}\n\nTail\n".format(*sections))
    small = run("cpu", rows(case("3a"), {"eager": 2.0, "fused_cpu": 0.5}))
    folder.joinpath("cpu-x.json").write_text(json.dumps(small))
    return tmp_path


GENERATED = (
    "README.md",
    "docs/benchmarks-cpu-x.md",
    "benchmarks/results/cpu-x.csv",
    "docs/cpu-x-speedup.png",
    "docs/cpu-x-roofline.png",
)


def test_everything_is_made_from_json_alone(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--check"], root) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(name in error for name in GENERATED)
    assert report.main([], root) == 0
    assert all(root.joinpath(name).is_file() for name in GENERATED)
    assert report.main(["--check"], root) == 0
    readme = (root / "README.md").read_text()
    assert readme.startswith("# Title\n")
    assert readme.endswith("\n\nTail\n")
    assert "old" not in readme
    cpu, _, gpu = readme.partition("\n\nBetween\n\n")
    assert "### AMD EPYC" in cpu
    assert "No GPU figures yet" in gpu
    for link in (
        "docs/benchmarks-cpu-x.md",
        "benchmarks/results/cpu-x.csv",
        "docs/cpu-x-speedup.png",
        "docs/cpu-x-roofline.png",
    ):
        assert f"({link})" in readme
    capsys.readouterr()
    assert report.main([], root) == 0
    assert capsys.readouterr().out == "", "nothing was stale"


@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.parametrize("missing", [False, True])
def test_each_stale_file_is_found(root: Path, capsys: pytest.CaptureFixture[str], name: str, missing: bool) -> None:
    report.main([], root)
    path = root / name
    if missing:
        path.unlink()
    elif path.suffix == ".png":
        path.write_bytes(b"no picture")
    else:
        path.write_text(path.read_text().replace("0.5", "0.4").replace("0.500", "0.400"))
    capsys.readouterr()
    assert report.main(["--check"], root) == 1
    error = capsys.readouterr().err
    assert name in error
    assert not any(other in error for other in GENERATED if other != name)


def test_a_change_that_no_text_shows_makes_the_charts_stale(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.main([], root)
    path = root / "benchmarks" / "results" / "cpu-x.json"
    path.write_text(path.read_text() + "\n")
    capsys.readouterr()
    assert report.main(["--check"], root) == 1
    error = capsys.readouterr().err
    assert "docs/cpu-x-speedup.png" in error
    assert "README.md" not in error
    assert report.main([], root) == 0
    assert report.main(["--check"], root) == 0


def test_what_no_result_makes_any_more_is_removed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.main([], root)
    own = root / "docs" / "cpu-x-own.png"
    own.write_bytes(b"")
    (root / "benchmarks" / "results" / "cpu-x.json").unlink()
    capsys.readouterr()
    assert report.main(["--check"], root) == 1
    error = capsys.readouterr().err
    assert all(name in error for name in GENERATED)
    assert own.name not in error
    assert report.main([], root) == 0
    assert not any(root.joinpath(name).exists() for name in GENERATED[1:])
    assert own.exists()
    assert "No CPU figures yet" in (root / "README.md").read_text()
    assert report.main(["--check"], root) == 0


def test_each_machine_gets_its_own_part(root: Path) -> None:
    folder = root / "benchmarks" / "results"
    other = run("cpu", rows(case("3a"), {"eager": 4.0, "fused_cpu": 0.8}))
    other["machine"]["cpu"] = "Intel Xeon"
    (folder / "cpu-y.json").write_text(json.dumps(other))
    (folder / "cuda-z.json").write_text(json.dumps(cuda_run()))
    assert report.main([], root) == 0
    cpu, _, gpu = (root / "README.md").read_text().partition("\n\nBetween\n\n")
    assert cpu.index("### AMD EPYC, 2 threads") < cpu.index("**4.00x**") < cpu.index("### Intel Xeon") < cpu.index("**5.00x**")
    assert "H100" not in cpu
    assert "### NVIDIA H100" in gpu
    assert "Xeon" not in (root / "docs" / "benchmarks-cpu-x.md").read_text()


def changed(*path: str | int, to: Any) -> str:
    data = copy.deepcopy(cpu_run())
    inner: Any = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return json.dumps(data)


BAD = {
    "{": "is not JSON",
    "\x00": "is not JSON",
    "[]": "the file must be an object, got list",
    "{}": "schema is missing",
    '{"schema": 1}': "schema 1 is not 3: measure again with python -m benchmarks.run --replace",
    changed("kind", to="probe"): "kind must be one of benchmark, got 'probe'",
    changed("device", to="tpu"): "device must be one of cpu, cuda, got 'tpu'",
    changed("device", to="cuda"): "machine.gpu must be object, got None",
    changed("git", to={"commit": 3, "dirty": False}): "git.commit must be string, got 3",
    changed("ceilings", "copy_gb_per_s", to=None): "ceilings.copy_gb_per_s must be object, got None",
    changed("rows", 0, to=[]): "rows[0] must be an object, got list",
    changed("rows", 1, "case", "subject", to="6a"): "rows[1].case.subject must be one of torchvision, bvlc, 3a",
    changed("rows", 1, "case", "batch", to=True): "rows[1].case.batch must be number, got True",
    changed("rows", 0, "status", to="fine"): f"rows[0].status must be one of {', '.join(reading.STATUSES)}, got 'fine'",
    changed("rows", 0, "timings", "wall", "median", to=float("nan")): "rows[0].timings.wall.median must be positive and finite",
    changed("rows", 0, "timings", "wall", "p80", to=1.0): "rows[0].timings.wall.median must lie between p20 and p80",
    changed(
        "rows", 0, "timings", to={"host": timing(1.0)}
    ): "rows[0].timings must hold graph or wall where status is ok, got host",
    changed("rows", 0, "timings", to={"cpu": timing(1.0)}): "rows[0].timings.cpu is none of graph",
    changed("rows", 0, "speedup", to={"graph": 2.0}): "rows[0].speedup.graph has no timing",
    changed("rows", 7, "reason", to=None): "rows[7].status unavailable needs a reason and no timings",
    changed("rows", 0, "roofline", "flops", to=0): "rows[0].roofline.flops must be positive",
    changed("rows", 1, "provider", to="eager"): "rows[0] and rows[1] are both eager on torchvision, batch 1, fp32",
    changed("not_run", 0, "reason", to=None): "not_run[0].reason must be string, got None",
}


@pytest.mark.parametrize(("content", "message"), BAD.items(), ids=BAD.values())
def test_a_bad_result_is_named_with_its_fault(
    root: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    before = (root / "README.md").read_text()
    (root / "benchmarks" / "results" / "cpu-x.json").write_text(content)
    assert report.main([], root) == 1
    error = capsys.readouterr().err
    assert error.startswith("benchmarks.report: error: ")
    assert "cpu-x.json" in error
    assert message in error
    assert error.count("\n") == 1
    assert (root / "README.md").read_text() == before


@pytest.mark.parametrize("text", ["no markers", "{end} {begin}", "{begin} {begin} {end}"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_readme_without_markers_is_refused(root: Path, capsys: pytest.CaptureFixture[str], device: str, text: str) -> None:
    begin, end = markers(device)
    other = {"cpu": "cuda", "cuda": "cpu"}[device]
    (root / "README.md").write_text(text.format(begin=begin, end=end) + " ".join(markers(other)))
    assert report.main([], root) == 1
    assert capsys.readouterr().err == f"benchmarks.report: error: README.md must hold {begin} and, after it, {end}, once each\n"
    (root / "README.md").unlink()
    assert report.main([], root) == 1
    assert "README.md is missing" in capsys.readouterr().err


def given(folder: Path, name: str, data: Data) -> str:
    path = folder / name
    path.write_text(json.dumps(data))
    return str(path)


def test_add_takes_a_file_in_under_its_machines_name(root: Path, tmp_path: Path) -> None:
    from benchmarks.results import file_name

    data = cuda_run()
    assert report.main(["--add", given(tmp_path, "from-elsewhere.json", data)], root) == 0
    path = root / "benchmarks" / "results" / file_name(data)
    assert path.name == "cuda-nvidia-h100.json"
    assert json.loads(path.read_text())["rows"] == data["rows"]
    assert "### NVIDIA H100" in (root / "README.md").read_text()
    assert report.main(["--check"], root) == 0


def test_add_merges_files_of_one_run_and_what_was_there_of_it(root: Path, tmp_path: Path) -> None:
    def part(subject: str) -> Data:
        graph = {"eager": {"graph": 1.0, "wall": 2.0}, "fused_cuda": {"graph": 0.5, "wall": 1.0}}
        return run("cuda", rows(case(subject, dtype="fp16"), graph))

    files = [given(tmp_path, f"{name}.json", part(name)) for name in ("3a", "3b", "4a")]
    assert report.main(["--add", *files[:2]], root) == 0
    assert report.main(["--add", files[2]], root) == 0
    (of,) = (of for of in reading.read(root / "benchmarks" / "results") if of.device == "cuda")
    assert {row["case"]["subject"] for row in of.rows} == {"3a", "3b", "4a"}


def test_add_puts_another_commit_in_place_of_the_old(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = cuda_run(), cuda_run()
    new["git"] = {"commit": "fedcba9876543210", "dirty": False}
    new["rows"] = new["rows"][:4]
    report.main(["--add", given(tmp_path, "old.json", old)], root)
    capsys.readouterr()
    assert report.main(["--add", given(tmp_path, "new.json", new)], root) == 1
    error = capsys.readouterr().err
    assert f"--add: {len(old['rows']) - 4} rows would be lost, the first " in error
    assert "cuda-nvidia-h100.json is of other versions or another commit; measure those too, or give --replace" in error
    assert report.main(["--add", given(tmp_path, "new.json", new), "--replace"], root) == 0
    assert "take the place of those of" in capsys.readouterr().out
    (of,) = (of for of in reading.read(root / "benchmarks" / "results") if of.device == "cuda")
    assert of.data["git"] == new["git"]
    assert len(of.rows) == 4


def test_add_loses_no_provider_of_a_case_that_was_measured_again(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of = case("3a", dtype="fp16")
    full = run("cuda", rows(of, {"eager": {"graph": 1.0}, "channels_last": {"graph": 0.8}, "fused_cuda": {"graph": 0.5}}))
    fewer = run("cuda", rows(of, {"eager": {"graph": 1.0}, "fused_cuda": {"graph": 0.4}}))
    assert report.main(["--add", given(tmp_path, "full.json", full)], root) == 0
    assert report.main(["--add", given(tmp_path, "fewer.json", fewer)], root) == 1
    said = "--add: 1 rows would be lost, the first channels_last on 3a, batch 1, fp16: its case was measured again without it"
    assert said in capsys.readouterr().err
    (kept,) = (found for found in reading.read(root / "benchmarks" / "results") if found.device == "cuda")
    assert kept.rows == full["rows"]
    again = [given(tmp_path, "full.json", full), given(tmp_path, "fewer.json", fewer)]
    assert report.main(["--add", *again], root) == 1
    assert said in capsys.readouterr().err
    assert report.main(["--add", given(tmp_path, "fewer.json", fewer), "--replace"], root) == 0
    with pytest.raises(SystemExit):
        report.main(["--replace"], root)


def test_a_trial_among_the_results_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trial = cuda_run() | {"settings": {"quick": True}}
    (root / "benchmarks" / "results" / "cuda-x.json").write_text(json.dumps(trial))
    before = (root / "README.md").read_bytes()
    assert report.main([], root) == 1
    assert "cuda-x.json is of a trial (--quick), which is nothing to publish" in capsys.readouterr().err
    assert (root / "README.md").read_bytes() == before


def test_add_refuses_two_machines_and_bad_files(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [given(tmp_path, "a.json", cpu_run()), given(tmp_path, "b.json", cuda_run())]
    before = sorted((root / "benchmarks" / "results").iterdir())
    assert report.main(["--add", *files], root) == 1
    error = capsys.readouterr().err
    assert "a.json" in error
    assert "b.json" in error
    assert "two machines" in error
    trial, empty = cuda_run(), cuda_run()
    trial["settings"] = {"quick": True}
    empty["rows"] = []
    assert report.main(["--add", given(tmp_path, "c.json", trial)], root) == 1
    assert "c.json is of a trial (--quick), which is nothing to publish" in capsys.readouterr().err
    assert report.main(["--add", given(tmp_path, "d.json", empty)], root) == 1
    assert "d.json holds no rows: nothing was measured" in capsys.readouterr().err
    assert report.main(["--add", str(tmp_path / "none.json")], root) == 1
    assert "none.json cannot be read: No such file" in capsys.readouterr().err
    assert sorted((root / "benchmarks" / "results").iterdir()) == before
    with pytest.raises(SystemExit):
        report.main(["--check", "--add", files[0]], root)


def test_a_result_under_another_name_is_not_passed_over(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = root / "benchmarks" / "results"
    report.main([], root)
    (folder / "audit.json").write_text(json.dumps({"kind": "audit"}))
    assert report.main(["--check"], root) == 0, "what says to be something else is"
    (folder / "x.json").write_text("{")
    assert report.main(["--check"], root) == 1
    assert "x.json is not JSON" in capsys.readouterr().err
    (folder / "x.json").write_text(json.dumps(cuda_run()))
    assert report.main(["--check"], root) == 1
    assert "x.json must be named cuda-*.json: rename it, or take it in with --add" in capsys.readouterr().err

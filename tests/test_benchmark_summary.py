"""What a run of gpu.sh found, in a few lines."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from canned import results, row

from benchmarks import summary

ROOT = Path(__file__).resolve().parents[1]


def test_ours_against_the_fastest_other() -> None:
    lines = summary.result_lines(
        results(
            *(row("eager", 4.0), row("channels_last", 2.0), row("fused_reference", 3.0), row("fused_triton", 1.0)),
            *(row("eager", 8.0, batch=8), row("fused_triton", 16.0, batch=8)),
            *(row("eager", 2.0, "3a"), row("fused_triton", 1.0, "3a"), row("eager", 8.0, "5b"), row("fused_triton", 1.0, "5b")),
            git={"commit": "0123456789abcdef", "dirty": True},
        )
    )
    assert lines == [
        "results: 4 cases, 10 rows, commit 012345678, changed since",
        "  our fastest against the fastest other: speed-up (above 1x ours is faster), and ms of networks, graph",
        "  torchvision fp16       b1 2.00x 1  b8 0.50x 16   fused_triton against channels_last, eager",
        "  modules fp16           b1 4.00x (2)   fused_triton against eager",
        "  geometric mean, networks, inference: 1.00x over 2 cases",
        "  geometric mean, modules, inference: 4.00x over 2 cases",
    ]


def duels(*rows: Mapping[str, Any]) -> list[summary.Duel]:
    return summary.duels(results(*rows))


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row("eager", 1.0)],
        [row("fused_triton", 1.0)],
        [row("eager", 1.0), row("fused_triton", None)],
        [row("eager", 1.0), row("fused_triton", 0.5, status="wrong")],
        [row("eager", 1.0), row("fused_triton", float("nan"))],
        [row("eager", 1.0), row("fused_triton", 0.0)],
        [row("eager", 1.0), row("fused_triton", 1.0, dtype="bf16")],
        [row("eager", 1.0), row("fused_triton", 1.0, mode="training")],
        [row("eager", 1.0), row("fused_triton", 1.0, side=299)],
        [row("eager", 1.0), row("fused_triton", None, status="ok", timings={"wall": {"median": 1.0}})],
    ],
)
def test_nothing_is_claimed_without_two_times_of_one_case_and_metric(rows: list[dict[str, Any]]) -> None:
    assert duels(*rows) == []
    assert "  no case has a time of ours and one of another provider" in summary.result_lines(results(*rows))


def test_wall_time_is_compared_where_a_side_has_nothing_else() -> None:
    wall = {"wall": {"median": 3.0}}
    both = {"graph": {"median": 1.0}, "wall": {"median": 6.0}}
    (duel,) = duels(row("eager", 0, timings=both), row("fused_cpu", 0, timings=wall))
    assert (duel.metric, duel.ratio) == ("wall", 2.0)
    (duel,) = duels(row("eager", 0, timings=both), row("fused_triton", 0, timings=both))
    assert duel.metric == "graph"


def test_what_was_wrong_missing_and_not_run_is_said() -> None:
    lines = summary.result_lines(
        results(
            row("eager", 1.0),
            *(row("fused_triton", 0.1, batch=batch, status="wrong", reason="off by 3") for batch in (1, 2, 3, 4, 5)),
            row("compile_default", None, status="failed", reason="out of memory: no more"),
            *(row(name, None) for name in ("tensorrt", "openvino", "a", "b", "c")),
            not_run=[{"reason": "the time budget of 60 s was spent"}] * 2,
        )
    )
    assert "  WRONG: fused_triton on torchvision, batch 1, fp16, inference: off by 3" in lines
    assert "  WRONG: 2 more rows" in lines
    assert "  FAILED: compile_default on torchvision, batch 1, fp16, inference: out of memory: no more" in lines
    assert "  unavailable: tensorrt: not installed" in lines
    assert "  unavailable, too: b, c" in lines
    assert "  not run: 2 cases: the time budget of 60 s was spent" in lines


def test_training_is_told_from_inference() -> None:
    step = {"mode": "training", "dtype": "bf16"}
    lines = summary.result_lines(results(row("eager", 9.0, **step), row("fused_reference", 10.0, **step)))
    assert lines[2].split()[:4] == ["torchvision", "bf16", "training", "b1"]
    assert lines[3] == "  geometric mean, networks, training: 0.90x over 1 case"


def test_counts_of_tests() -> None:
    cases = '<testcase classname="t" name="a"/><testcase classname="t" name="b"><skipped/></testcase>'
    cases += "".join(f'<testcase classname="t" name="c{i}"><error/></testcase>' for i in range(5))
    assert summary.count_lines(f"<testsuites><testsuite>{cases}</testsuite></testsuites>") == [
        "tests: 1 passed, 5 failed, 1 skipped",
        *(f"  FAILED: t.c{i}" for i in range(3)),
        "  FAILED: 2 more",
    ]


def test_probes_in_brief() -> None:
    def line(**fields: Any) -> str:
        return json.dumps({"device": "NVIDIA Test", **fields})

    wrong = {"cluster": 4, "right": False, "ms": 0.1, "tb_per_s": 20.0}
    rows = [
        wrong,
        {"cluster": 1, "right": True, "ms": 1.0, "tb_per_s": 2.0},
        {"cluster": 2, "right": True, "ms": 0.5, "tb_per_s": 4.0},
    ]
    chains = [{"launch": "plain", "graph_ns_per_kernel": 900.0}, {"launch": "dependent", "graph_ns_per_kernel": 700.0}]
    text = "\n".join(
        [
            line(probe="E1", ok=True, base_offset="zero"),
            line(probe="E2", ok=False, grid_barrier_ns=1234.56, kernel_chains=chains),
            line(probe="E5", ok=True, streams=rows, cases=[], names=["a"], layouts=[wrong]),
            "broken {",
        ]
    )
    assert summary.probe_lines(text) == [
        "probe E1: base_offset zero",
        "probe E2: ok False, grid_barrier_ns 1235, kernel_chains: 2, best graph_ns_per_kernel 700 at launch dependent",
        "probe E5: streams: 2 of 3 right, best tb_per_s 4 at cluster 2, layouts: 0 of 1 right",
        "probe: not a line of JSON: broken {",
    ]


def main(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert summary.main(arguments) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results.json", "{"),
        ("results.json", "[]"),
        ("results.json", "{}"),
        ("results.json", '{"rows": [{"case": {}}]}'),
        ("results.json", '{"rows": [{"case": 3}]}'),
        ("results.json", '{"rows": 3}'),
        ("tests.xml", "<a>"),
        ("tests.xml", ""),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert any(line.startswith(f"{name} cannot be read: ") for line in main(capsys, str(tmp_path)))


def test_an_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(capsys, str(tmp_path)) == ["results: none, nothing was measured"]


def test_no_more_lines_than_wanted_and_none_too_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("eager", 1.0, dtype=f"d{i}", reason="x" * 300) for i in range(30)]
    rows += [row("fused_triton", 1.0, dtype=f"d{i}", status="wrong" if i < 2 else "ok", reason="y\n" * 300) for i in range(30)]
    (tmp_path / "results.json").write_text(json.dumps(results(*rows)))
    lines = main(capsys, str(tmp_path))
    assert len(lines) == summary.LINES
    assert max(map(len, lines)) <= summary.WIDTH
    assert lines[-1].startswith("and ")
    assert len(main(capsys, str(tmp_path), "--lines", "3")) == 3


def test_the_summary_needs_neither_torch_nor_the_package() -> None:
    program = (
        "import sys, benchmarks.summary; sys.exit(any(name in sys.modules for name in ('torch', 'googlenet_fused', 'numpy')))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)

"""What the CUDA kernel compiles to: the record is whole, clean and of today's source; faults in small kernels are found."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.audit import cuda, record
from benchmarks.audit.limits import LIMITS

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "audit.json"

needs_nvcc = pytest.mark.skipif(
    not any(found for _, found in cuda.load_build().nvcc_candidates()), reason="there is no nvcc: what it compiles is not seen"
)


def recorded() -> dict[str, Any]:
    (run,) = (run for run in json.loads(RECORD.read_text())["runs"] if "nvcc" in run)
    return run


def test_the_record_is_of_todays_kernel_and_whole() -> None:
    """Otherwise: make audit."""
    rows = {(row["dtype"], row["arch"]): row["source"] for row in recorded()["rows"]}
    assert rows == {(dtype, arch): cuda.source_key() for dtype in ("fp16", "bf16", "tf32") for arch in cuda.ARCHES}


def test_nothing_was_found() -> None:
    assert recorded()["findings"] == []
    assert recorded()["dirty"] is False


def test_every_instantiation_is_as_the_design_wants_it() -> None:
    for row in recorded()["rows"]:
        assert row["threads"] == 256
        assert row["registers"] <= 255
        assert row["stack"] == row["spill_loads"] == row["spill_stores"] == 0
        assert 0 < row["dynamic_shared"] <= LIMITS[row["arch"]].shared
        assert list(row["copy_bytes"]) == ["16"]
        shape = "m16n8k8" if row["dtype"] == "tf32" else "m16n8k16"
        assert all(name.startswith(f"mma.{shape}.f32") for name in row["matrix"])
        assert row["machine_matrix"]


def test_what_was_simulated_meets_no_conflicts() -> None:
    counted = recorded()["simulated"]
    assert len(counted) == 9 * len(cuda.MULTIPROCESSORS)
    assert [text for counters in counted for text in cuda.conflicts(counters)] == []


def test_a_conflict_is_found() -> None:
    (counters, *_) = recorded()["simulated"]
    least = counters["ldmatrix_a"][1]
    (text,) = cuda.conflicts({**counters, "ldmatrix_a": [2 * least, least]})
    assert text == "3a on 1 multiprocessors: ldmatrix_a takes 2.000 times the least, at most 1.08"


@needs_nvcc
@pytest.mark.slow
def test_compiling_again_says_the_same() -> None:
    pytest.importorskip("googlenet_fused.backends.cuda._host_sim", reason="the planner is not built")
    if cuda.nvcc().version != recorded()["nvcc"]:
        pytest.skip(f"the record is of nvcc {recorded()['nvcc']}")
    command = [sys.executable, "-m", "benchmarks.audit.cuda", "--check", "--dtypes", "tf32", "--arches", "sm_80", "sm_90"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "as in " in done.stdout


KERNEL = """
extern "C" __global__ void __launch_bounds__(256, 1) googlenet_fused_inception(const float *in, float *out, int n) {
  BODY
}
"""
MMA = """
  float sum[4] = {0, 0, 0, 0};
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
               "{%0, %1, %2, %3}, {%4, %4, %4, %4}, {%4, %4}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(n));
  reinterpret_cast<float4 *>(out)[threadIdx.x] = make_float4(sum[0], sum[1], sum[2], sum[3]);
"""
LOCAL = "float many[64] = {}; for (int i = 0; i < n; i++) many[int(in[i])] += in[i]; out[0] = many[n];  // narrow: of this test"


@pytest.fixture
def audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Audits a kernel of this body."""
    monkeypatch.setattr(cuda, "most_shared_memory", lambda dtype, arch: 1024)

    def run(body: str, arch: str = "sm_90") -> tuple[dict[str, Any], list[str]]:
        (tmp_path / "fp16.cu").write_text(KERNEL.replace("BODY", body))
        return cuda.audited(cuda.Variant("fp16", folder=tmp_path), arch)

    return run


@needs_nvcc
def test_a_good_kernel_has_nothing(audit: Any) -> None:
    row, findings = audit(MMA)
    assert findings == []
    assert row["matrix"] == {"mma.m16n8k16.f32.f16": 1}
    assert row["store_bytes"] == {"16": 1}
    assert row["dynamic_shared"] == 1024


@needs_nvcc
@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("out[0] = in[0];  // narrow: of this test", "no matrix instruction"),
        (MMA + LOCAL, "bytes of local memory a thread"),
        (MMA + "out[4096 + threadIdx.x] = n;", "narrow: 1 stores of 4 bytes at fp16.cu:"),
        (MMA + "this is no C++", "does not compile: "),
    ],
    ids=["no mma", "local memory", "narrow", "nonsense"],
)
def test_each_fault_is_found(audit: Any, body: str, found: str) -> None:
    _, findings = audit(body)
    assert any(found in text for text in findings), findings


@needs_nvcc
def test_too_much_shared_memory_is_found(audit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "most_shared_memory", lambda dtype, arch: LIMITS[arch].shared + 1)
    _, findings = audit(MMA)
    assert findings == [
        f"{LIMITS['sm_90'].shared + 1} bytes of shared memory a block, of which there are {LIMITS['sm_90'].shared}"
    ]


def test_runs_of_both_compilers_are_kept_beside_one_another(tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    shutil.copy(RECORD, path)
    before = record.read(path)
    new = {**recorded(), "date": "another"}
    record.write(path, new)
    after = record.read(path)
    assert [record.compiler_of(run) for run in after] == [record.compiler_of(run) for run in before]
    assert [run for run in after if "triton" in run] == [run for run in before if "triton" in run]
    assert after[-1] == new


def test_without_nvcc_it_says_where_it_looked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    build = cuda.load_build()

    def missing() -> None:
        raise build.MissingTool("no nvcc: looked in /nowhere")

    monkeypatch.setattr(build, "find_nvcc", missing)
    monkeypatch.setattr(cuda, "load_build", lambda: build)
    cuda.nvcc.cache_clear()
    assert cuda.main([]) == 1
    assert capsys.readouterr().err == "benchmarks.audit.cuda: error: no nvcc: looked in /nowhere\n"

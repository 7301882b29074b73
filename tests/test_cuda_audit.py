"""What the CUDA kernel compiles to: the record is whole, clean and of today's source; faults in small kernels are found."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.audit import cuda, record, rows, simulated
from benchmarks.audit.compile import MissingTool
from benchmarks.audit.limits import LIMITS
from benchmarks.audit.tools import ToolError

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "audit.json"

needs_nvcc = pytest.mark.skipif(
    not any(found for _, found in cuda.load_build().toolchain.nvcc_candidates()),
    reason="there is no nvcc: what it compiles is not seen",
)


def simulation() -> Any:
    return pytest.importorskip("googlenet_fused.backends.cuda._host_sim", reason="the simulation is not built: make native")


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


def test_shared_memory_is_what_the_planner_asks_for_today() -> None:
    """Which the source key is not of. Otherwise: make audit."""
    simulation()
    for row in recorded()["rows"]:
        assert row["dynamic_shared"] == cuda.most_shared_memory(row["dtype"], row["arch"]), (row["dtype"], row["arch"])


def test_what_was_simulated_meets_no_conflicts() -> None:
    counted = recorded()["simulated"]
    assert [simulated.case_of(counters) for counters in counted] == list(simulated.CASES)
    assert [text for counters in counted for text in simulated.conflicts(counters)] == []


def test_every_bound_is_near_what_was_counted() -> None:
    bounds = simulated.MOST | {kind: simulated.MOST_OF[kind, name] for kind, name in simulated.MOST_OF}
    assert set(bounds) == {"ldmatrix_a", "ldmatrix_b", "copy_writes", "global_reads", "global_writes"}
    for kind, most in bounds.items():
        counted = (counters[kind] for counters in recorded()["simulated"])
        assert most - 0.01 < max(taken / least for taken, least in counted) <= most, kind


def test_several_images_a_tile_and_tiles_cut_off_are_simulated() -> None:
    for case in simulated.CASES:
        spec, side = cuda.GOOGLENET_SPECS[case.module], cuda.GOOGLENET_SIDES[case.module]
        problem = cuda.problem_of(spec, cuda.DTYPES[case.dtype], case.batch, side, side)
        device = {"multiprocessors": case.multiprocessors, "shared_memory": 227 * 1024}
        tile = simulation().plan(problem, device)["tile"]
        if case.multiprocessors == 1 and side < 28 and (case.module, case.dtype) != ("4e", "tf32"):
            assert (tile["rows"], tile["columns"]) == (side, side), case
            assert (tile["images"] > 1) == (side == 7), case
        if (case.multiprocessors, case.batch, side) == (132, 4, 7):
            assert side % tile["rows"] or side % tile["columns"], case


@pytest.mark.parametrize("module", ["5a", "3a"])
def test_simulating_again_counts_the_same(module: str) -> None:
    """Otherwise: make audit."""
    simulation()
    cases = [case for case in simulated.CASES if (case.module, case.dtype) == (module, "fp16")]
    before = {simulated.case_of(counters): counters for counters in recorded()["simulated"]}
    assert list(simulated.simulated(cases)) == [before[case] for case in cases]


def test_a_conflict_is_found() -> None:
    counters = {**{kind: [100, 100] for kind in simulated.KINDS}, **simulated.Case("3a", "fp16", 132, 1)._asdict()}
    assert list(simulated.conflicts(counters)) == []
    (text,) = simulated.conflicts({**counters, "ldmatrix_a": [104, 100]})
    assert text == "3a, fp16, 1 image on 132 SM: ldmatrix_a takes 1.040 times the least, at most 1.03"
    (text,) = simulated.conflicts({**counters, "batch": 4, "global_writes": [200, 100]})
    assert text == "3a, fp16, 4 images on 132 SM: global_writes takes 2.000 times the least, at most 1.0"
    assert list(simulated.conflicts({**counters, "dtype": "tf32", "global_writes": [200, 100]})) == []


def test_the_table_has_a_line_a_case() -> None:
    counters = {**{kind: [3, 2] for kind in simulated.KINDS}, **simulated.Case("3a", "fp16", 132, 1)._asdict()}
    head, line = simulated.table([{**counters, "shared_stores": [0, 0]}]).splitlines()
    assert head.split() == ["simulated,", "times", "the", "least", *simulated.KINDS]
    factors = ["0.000" if kind == "shared_stores" else "1.500" for kind in simulated.KINDS]
    assert line.split() == ["3a,", "fp16,", "1", "image", "on", "132", "SM", *factors]


def test_what_is_counted_otherwise_is_said() -> None:
    one, other = ({**simulated.Case(name, "fp16", 1, 4)._asdict(), "ldmatrix_a": [1, 1]} for name in ("3a", "3b"))
    older = {"module": "3a", "multiprocessors": 1, "ldmatrix_a": [1, 1]}
    says = "{}, fp16, 4 images on 1 SM: simulated, it counts otherwise".format

    def changes(before: list[Any], after: list[Any], whole: bool) -> list[str]:
        return cuda.recounted({"simulated": before}, {"simulated": after}, whole)

    assert changes([one, other], [one, other], whole=True) == []
    assert changes([one, other], [one], whole=False) == []
    assert changes([one, other], [one], whole=True) == [says("3b")]
    assert changes([one], [{**one, "ldmatrix_a": [2, 1]}], whole=False) == [says("3a")]
    assert changes([older], [one], whole=True) == [says("3a")]


@needs_nvcc
@pytest.mark.slow
def test_compiling_again_says_the_same() -> None:
    simulation()
    if cuda.nvcc().version != recorded()["nvcc"]:
        pytest.skip(f"the record is of nvcc {recorded()['nvcc']}")
    command = [sys.executable, "-m", "benchmarks.audit.cuda", "--check", "--dtypes", "bf16", "--arches", "sm_80", "sm_90"]
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
SPILL = """
  float kept[96];
  for (int i = 0; i < 96; i++) kept[i] = in[i * 1024 + threadIdx.x];  // narrow: of this test
  for (int j = 0; j < n; j++) {
    for (int i = 0; i < 96; i++) kept[i] = kept[i] * kept[(i + 7) % 96] + 1;
  }
  for (int i = 0; i < 96; i++) out[i * 1024 + threadIdx.x] = kept[i];  // narrow: of this test
"""
STATIC = """
  __shared__ float tile[10240];
  tile[threadIdx.x * n] = n;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];  // narrow: of this test
"""
LOCAL = "float many[64] = {}; for (int i = 0; i < n; i++) many[int(in[i])] += in[i]; out[0] = many[n];  // narrow: of this test"


@pytest.fixture
def audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Audits a kernel of this body."""
    monkeypatch.setattr(cuda, "most_shared_memory", lambda dtype, arch: 1024)

    def run(body: str, arch: str = "sm_90", bounds: str = "256, 1") -> tuple[dict[str, Any], list[str]]:
        (tmp_path / "fp16.cu").write_text(KERNEL.replace("BODY", body).replace("256, 1", bounds))
        return cuda.audited(cuda.Variant("fp16", folder=tmp_path), arch)

    return run


@needs_nvcc
def test_a_good_kernel_has_nothing(audit: Any) -> None:
    row, findings = audit(MMA)
    assert findings == []
    assert row["matrix"] == {"mma.m16n8k16.f32.f16": 1}
    assert row["store_bytes"] == {"16": 1}
    assert (row["threads"], row["shared"], row["dynamic_shared"]) == (256, 0, 1024)


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
def test_a_spill_is_found(audit: Any) -> None:
    row, findings = audit(MMA + SPILL, bounds="1024, 2")
    stores, loads, stack = (row[name] for name in ("spill_stores", "spill_loads", "stack"))
    assert min(stores, loads, stack) > 0
    said = f"spills: {stores} bytes stored and {loads} loaded a thread, {stack} of stack"
    assert findings == [said, f"{stack} bytes of local memory a thread"]


@needs_nvcc
def test_too_much_shared_memory_is_found(audit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    most = LIMITS["sm_90"].shared
    monkeypatch.setattr(cuda, "most_shared_memory", lambda dtype, arch: most - 40959)
    row, findings = audit(MMA + STATIC)
    assert row["shared"] == 40960
    assert findings == [f"{most + 1} bytes of shared memory a block, of which there are {most}"]


@needs_nvcc
def test_a_file_of_another_kernel_is_refused(audit: Any) -> None:
    _, (finding,) = audit('} extern "C" __global__ void __launch_bounds__(32) other(int *out) { out[0] = 1;')
    assert finding.startswith("does not compile: NvccError: fp16.cu must hold one kernel, googlenet_fused_inception, ")


def test_machine_code_that_cannot_be_read_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(binary: Any, arch: str) -> None:
        raise ToolError("nvdisasm failed")

    monkeypatch.setattr(cuda, "compile_variant", lambda variant, arch: None)
    monkeypatch.setattr(rows, "_read", refuse)
    row, findings = cuda.audited(cuda.Variant("fp16"), "sm_90")
    assert list(row) == ["kernel", "label", "dtype", "arch"]
    assert findings == ["compiles, and cannot be read: ToolError: nvdisasm failed"]


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


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The command on a compiler that knows sm_80 alone and makes rows without fault; gives the variants that it compiled."""
    compiled: list[Any] = []

    def audited(variant: cuda.Variant, arch: str) -> tuple[dict[str, Any], list[str]]:
        compiled.append((variant.dtype, arch))
        (row, *_) = (row for row in recorded()["rows"] if (row["dtype"], row["arch"]) == (variant.dtype, arch))
        return row, []

    monkeypatch.setattr(cuda, "OUTPUT", tmp_path / "audit.json")
    monkeypatch.setattr(cuda, "nvcc", lambda: SimpleNamespace(version="12.0.1", codes=["sm_75", "sm_80"]))
    monkeypatch.setattr(cuda, "audited", audited)
    monkeypatch.setattr(cuda, "simulation", lambda: None)
    monkeypatch.setattr(cuda.tools, "check", lambda: None)
    monkeypatch.setattr(cuda, "simulated", lambda cases, advance: iter(()))
    return compiled


def test_architectures_that_nvcc_does_not_know_are_said_and_left_out(
    fake: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cuda.main([]) == 0
    assert fake == [(dtype, "sm_80") for dtype in ("fp16", "bf16", "tf32")]
    said = capsys.readouterr().out
    assert said.startswith("nvcc 12.0.1 does not compile for sm_86, sm_89, sm_90, sm_100, sm_120\n")
    (run,) = record.read(tmp_path / "audit.json")
    assert [(row["dtype"], row["arch"]) for row in run["rows"]] == fake
    assert cuda.main(["--arches", "sm_90"]) == 1
    assert "nothing to audit: nvcc 12.0.1 compiles for sm_75, sm_80" in capsys.readouterr().err


def test_a_selection_is_audited_and_not_written(fake: list[Any], tmp_path: Path) -> None:
    assert cuda.main(["--arches", "sm_80", "--dtypes", "tf32", "--kernels", cuda.KERNEL, "--details"]) == 0
    assert fake == [("tf32", "sm_80")]
    assert not (tmp_path / "audit.json").exists()


def test_an_interrupt_waits_only_for_what_is_begun(fake: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(variant: cuda.Variant, arch: str) -> None:
        fake.append(arch)
        time.sleep(0.1)
        raise KeyboardInterrupt

    monkeypatch.setattr(cuda, "nvcc", lambda: SimpleNamespace(version="12.0.1", codes=list(cuda.ARCHES)))
    monkeypatch.setattr(cuda, "audited", interrupted)
    assert cuda.main(["--jobs", "1"]) == 130
    assert 1 <= len(fake) <= 3  # of 18


def test_a_missing_disassembler_is_said_and_nothing_written(
    fake: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> None:
        raise ToolError("nvdisasm is nowhere")

    monkeypatch.setattr(cuda.tools, "check", missing)
    assert cuda.main([]) == 1
    assert capsys.readouterr().err == "benchmarks.audit.cuda: error: nvdisasm is nowhere\n"
    assert not fake
    assert not (tmp_path / "audit.json").exists()


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    build = cuda.load_build()

    def missing() -> None:
        raise build.MissingTool("no nvcc: looked in /nowhere")

    monkeypatch.setattr(build.toolchain, "find_nvcc", missing)
    monkeypatch.setattr(cuda, "load_build", lambda: build)
    cuda.nvcc.cache_clear()
    assert cuda.main([]) == 1
    assert capsys.readouterr().err == "benchmarks.audit.cuda: error: no nvcc: looked in /nowhere\n"
    assert cuda.main(["--if-possible"]) == 0
    assert capsys.readouterr().out == "==> the CUDA kernel is not audited: no nvcc: looked in /nowhere\n"
    monkeypatch.setitem(sys.modules, "googlenet_fused.backends.cuda._host_sim", None)
    with pytest.raises(MissingTool, match=r"the simulation, which has the planner, is not built .*: make native"):
        simulated.simulation()

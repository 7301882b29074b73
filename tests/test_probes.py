"""The probes of benchmarks/probes: they build, spill nothing, hold the instructions they are about, and say if they cannot run.

The index arithmetic of layout.h is tested on the host: what a wgmma descriptor makes the tensor cores read, by the PTX manual's
canonical layouts written out here, must be the pixel and the channel that the probe stored there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

PROBES = Path(__file__).resolve().parent.parent / "benchmarks" / "probes"
PROGRAMS = ("e1_wgmma_shift", "e2_sync_latency", "e5_weight_multicast")
NVCC = shutil.which("nvcc")
HOST_COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

needs_nvcc = pytest.mark.skipif(NVCC is None or shutil.which("make") is None, reason="needs nvcc and make")
needs_host_compiler = pytest.mark.skipif(HOST_COMPILER is None, reason="needs a C++ compiler")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

LAYOUT_PROGRAM = r"""
#include <cstdio>
#include <initializer_list>
#include "layout.h"
using namespace probe;
int main() {
    for (unsigned row = 0; row < 280; ++row)
        for (unsigned channel = 0; channel < 64; ++channel)
            std::printf("swizzle128 %u %u %u\n", row, channel, swizzle128_offset(row, channel));
    for (unsigned row = 0; row < 280; ++row)
        for (unsigned channel = 0; channel < 64; ++channel)
            std::printf("planes %u %u %u\n", row, channel, planes_offset(row, channel, 280));
    for (int thread = 0; thread < 128; ++thread)
        for (int i = 0; i < 108; ++i)
            std::printf("accumulator %d %d %d %d\n", thread, i, accumulator_row(thread, i), accumulator_column(thread, i));
    const SwizzleMode modes[] = {SWIZZLE_NONE, SWIZZLE_128B, SWIZZLE_64B, SWIZZLE_32B};
    for (unsigned start : {0u, 1024u, 1152u, 35840u, 232432u})
        for (unsigned leading : {16u, 128u, 4480u})
            for (unsigned stride : {128u, 1024u, 4480u})
                for (SwizzleMode mode : modes) {
                    const unsigned base = base_offset_of_start(start);
                    const unsigned long long word = wgmma_descriptor(start, leading, stride, base, mode);
                    std::printf("descriptor %u %u %u %u %u %llu\n", start, leading, stride, base, unsigned(mode), word);
                }
}
"""


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, ...]]]:
    """Every line that LAYOUT_PROGRAM prints, by its first word."""
    folder = tmp_path_factory.mktemp("layout")
    source, program = folder / "layout.cpp", folder / "layout"
    source.write_text(LAYOUT_PROGRAM, encoding="utf-8")
    assert HOST_COMPILER is not None
    subprocess.run(
        [HOST_COMPILER, "-std=c++17", "-Wall", "-Werror", f"-I{PROBES}", str(source), "-o", str(program)], check=True
    )
    lines: dict[str, list[tuple[int, ...]]] = {}
    for line in subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.splitlines():
        word, *numbers = line.split()
        lines.setdefault(word, []).append(tuple(map(int, numbers)))
    return lines


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str, str]]:
    """For every program its path, its PTX and what the compiler said."""
    folder = tmp_path_factory.mktemp("probes")
    result: dict[str, tuple[Path, str, str]] = {}
    for name in PROGRAMS:
        flags = f"-Xptxas -v --keep --keep-dir {folder}"
        command = ["make", "-C", str(PROBES), f"BUILD={folder}", f"NVCC={NVCC}", f"NVCCFLAGS={flags}", str(folder / name)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        result[name] = (folder / name, (folder / f"{name}.ptx").read_text(encoding="utf-8"), done.stdout + done.stderr)
    return result


def run_without_device(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs `command` where CUDA shows it no device."""
    return subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=120)


def one_json_line(text: str) -> dict[str, Any]:
    """The object that `text` consists of."""
    lines = text.splitlines()
    assert len(lines) == 1, text
    value = json.loads(lines[0])
    assert isinstance(value, dict)
    return value


@needs_host_compiler
def test_swizzled_offset_is_the_address_with_its_row_bits_xored_into_its_chunk_bits(
    layout: dict[str, list[tuple[int, ...]]],
) -> None:
    for row, channel, offset in layout["swizzle128"]:
        plain = 128 * row + 2 * channel
        assert offset == plain ^ (plain >> 3 & 0b1110000), (row, channel)
    assert len({offset for _, _, offset in layout["swizzle128"]}) == 280 * 64


def canonical_swizzle128(start: int, row: int, channel: int) -> int:
    """Byte that a K-major operand with 128-byte swizzle, base offset 0 and 1024 bytes between row groups reads."""
    address = start + row % 8 * 128 + row // 8 * 1024 + 2 * channel
    return address ^ (((address >> 7) & 7) << 4)


def canonical_planes(start: int, row: int, channel: int, leading: int, stride: int) -> int:
    """Byte that a K-major operand without swizzle reads: ((8, m), (8, 2)) : ((16 B, stride), (2 B, leading))."""
    return start + row % 8 * 16 + row // 8 * stride + channel % 8 * 2 + channel // 8 * leading


@needs_host_compiler
@pytest.mark.parametrize("shift", [0, 1, 5, 8, 16, 30, 61])
def test_moved_start_reads_the_moved_pixels(layout: dict[str, list[tuple[int, ...]]], shift: int) -> None:
    swizzled = {(row, channel): offset for row, channel, offset in layout["swizzle128"]}
    planes = {(row, channel): offset for row, channel, offset in layout["planes"]}
    plane_bytes = 280 * 16
    for step in range(4):
        for row in range(216):
            for channel in range(16):
                stored = (row + shift, 16 * step + channel)
                assert canonical_swizzle128(128 * shift + 32 * step, row, channel) == swizzled[stored]
                start = 16 * shift + 2 * step * plane_bytes
                assert canonical_planes(start, row, channel, leading=plane_bytes, stride=128) == planes[stored]


@needs_host_compiler
def test_descriptor_fields(layout: dict[str, list[tuple[int, ...]]]) -> None:
    assert len(layout["descriptor"]) == 5 * 3 * 3 * 4
    for start, leading, stride, base, mode, word in layout["descriptor"]:
        assert (word & 0x3FFF) * 16 == start
        assert (word >> 16 & 0x3FFF) * 16 == leading
        assert (word >> 32 & 0x3FFF) * 16 == stride
        assert word >> 49 & 7 == base == start // 128 % 8
        assert word >> 62 == mode
        assert word & ~(0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 7 << 49 | 3 << 62) == 0


@needs_host_compiler
def test_accumulators_cover_the_tile_once(layout: dict[str, list[tuple[int, ...]]]) -> None:
    places = {(row, column) for _, _, row, column in layout["accumulator"]}
    assert len(layout["accumulator"]) == len(places) == 64 * 216
    assert places == {(row, column) for row in range(64) for column in range(216)}
    of = {(thread, i): (row, column) for thread, i, row, column in layout["accumulator"]}
    # The manual's figure: a quad of threads holds 8 columns of a row, a warp 16 rows, in halves of 8.
    assert [of[0, i] for i in range(6)] == [(0, 0), (0, 1), (8, 0), (8, 1), (0, 8), (0, 9)]
    assert (of[3, 0], of[4, 0], of[31, 3], of[32, 0], of[127, 107]) == ((0, 6), (1, 0), (15, 7), (16, 0), (63, 215))


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_spills_and_wgmma_is_not_serialised(built: dict[str, tuple[Path, str, str]], name: str) -> None:
    said = built[name][2]
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert spills
    assert all(spill == ("0", "0", "0") for spill in spills), said
    assert "C7510" not in said, said
    assert "warning" not in said, said


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "instructions"),
    [
        (
            "e1_wgmma_shift",
            [
                "wgmma.mma_async.sync.aligned.m64n216k16.f32.bf16.bf16",
                "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16",
                "wgmma.wait_group.sync.aligned",
                "fence.proxy.async.shared::cta",
            ],
        ),
        (
            "e2_sync_latency",
            [
                "griddepcontrol.wait",
                "griddepcontrol.launch_dependents",
                "barrier.cluster.arrive.release",
                "red.release.gpu.global.add.u32",
            ],
        ),
        (
            "e5_weight_multicast",
            [
                "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster",
                "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [",
                "mbarrier.arrive.expect_tx",
                "mbarrier.try_wait.parity",
            ],
        ),
    ],
)
def test_holds_the_instructions_it_is_about(
    built: dict[str, tuple[Path, str, str]], name: str, instructions: list[str]
) -> None:
    ptx = built[name][1]
    assert ".target sm_90a" in ptx
    assert [wanted for wanted in instructions if wanted not in ptx] == []


def cuobjdump() -> str | None:
    """The disassembler of the CUDA toolkit, or the one in the wheel of triton."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        wheel = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(wheel) if wheel.exists() else None
    return found


@needs_nvcc
@pytest.mark.slow
def test_wgmma_chain_is_back_to_back_in_machine_code(built: dict[str, tuple[Path, str, str]]) -> None:
    tool = cuobjdump()
    if tool is None:
        pytest.skip("needs cuobjdump")
    sass = subprocess.run([tool, "-sass", str(built["e1_wgmma_shift"][0])], check=True, capture_output=True, text=True).stdout
    kernels = [text for text in re.split(r"Function : ", sass)[1:] if "convolution_kernel" in text.split("\n", 1)[0]]
    assert len(kernels) == 12
    for text in kernels:
        instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][\w.]*)", text)
        products = [i for i, instruction in enumerate(instructions) if instruction.startswith("HGMMA")]
        assert len(products) == 36
        between = {instruction.split(".")[0] for instruction in instructions[products[0] : products[-1]]}
        # Sums of descriptors in uniform registers and the loop's counter; no moves from other registers, no loads, no waits.
        assert between <= {"HGMMA", "UIADD3", "UMOV", "ISETP", "IADD3", "VIADD", "NOP"}, between


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_without_a_device_it_says_so_and_exits_2(built: dict[str, tuple[Path, str, str]], name: str) -> None:
    done = run_without_device([str(built[name][0])])
    assert done.returncode == 2, done.stderr
    line = one_json_line(done.stdout)
    assert line["probe"] == name[:2].upper()
    assert line["ok"] is False
    assert "device" in line["skipped"]


@needs_nvcc
@pytest.mark.slow
def test_unknown_argument_exits_2(built: dict[str, tuple[Path, str, str]]) -> None:
    done = run_without_device([str(built["e2_sync_latency"][0]), "--fast"])
    assert done.returncode == 2
    assert "--fast" in one_json_line(done.stdout)["skipped"]


@needs_nvcc
@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0",
)
@pytest.mark.parametrize("name", PROGRAMS)
def test_is_right_on_the_device(built: dict[str, tuple[Path, str, str]], name: str) -> None:
    done = subprocess.run([str(built[name][0]), "--quick"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert one_json_line(done.stdout)["ok"] is True


@needs_triton
@pytest.mark.slow
def test_triton_probe_reads_the_compiled_code(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(PROBES / "e4_triton_tma.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    line = one_json_line(done.stdout)
    assert line["probe"] == "E4"
    assert len(line["cases"]) == 8
    for case in line["cases"]:
        assert case["wgmma"] >= 4
        assert case["wgmma"] == case["wgmma_first_operand_registers"] + case["wgmma_first_operand_descriptor"]
        assert case["tma_loads"] >= 2
    # The controls need no reshape: if these left shared memory, the probe would be misreading the code.
    assert line["tile_2d_as_first_operand"] == line["tile_2d_as_second_operand"] == "shared"
    assert line["stays_in_shared_memory"] == (line["tile_4d_as_first_operand"] == line["tile_4d_as_second_operand"] == "shared")


@needs_triton
def test_triton_verdicts() -> None:
    probe = load_probe("e4_triton_tma")
    ptx = "\n".join(
        [
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r5];",
            "$L__BB0_1:",
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1,%r2,%r3,%r4}, %rd5, %rd6, %p1, 1, 1, 0, 0;",
            "{extra}",
            "@%p2 bra $L__BB0_1;",
            "st.shared.b32 [%r1], %r2;",
        ]
    )
    outside = probe.ptx_counts(ptx.replace("{extra}", "")) | {"tile_local_load": 0}
    assert probe.verdict(outside, second=False) == "shared"
    written = probe.ptx_counts(ptx.replace("{extra}", "st.shared.v4.b32 [%r1], {%r2, %r3, %r4, %r5};")) | {"tile_local_load": 1}
    assert probe.verdict(written, second=True) == "round_trip"
    read = probe.ptx_counts(ptx.replace("%rd5,", "{%r8, %r9, %r10, %r11},").replace("{extra}", "")) | {"tile_local_load": 1}
    assert probe.verdict(read, second=False) == "registers"
    with pytest.raises(ValueError, match="expected wgmma"):
        probe.verdict(probe.ptx_counts("ret;") | {"tile_local_load": 0}, second=False)


def load_probe(name: str) -> Any:
    """The module benchmarks/probes/NAME.py."""
    spec = importlib.util.spec_from_file_location(f"probe_{name}", PROBES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(
    provider: str, timings: dict[str, float], percent: float | None = None, status: str = "ok", batch: int = 1
) -> dict[str, Any]:
    """A row of a result file; `timings` are medians in ms."""
    return {
        "case": {"subject": "3a", "batch": batch, "dtype": "fp16", "mode": "inference", "side": 28},
        "provider": provider,
        "status": status,
        "timings": {metric: {"median": ms, "p20": ms, "p80": ms, "n": 5} for metric, ms in timings.items()},
        "roofline": {"flops": 1, "bytes": 1, "floor_ms": 0.1, "percent": percent},
    }


@pytest.fixture
def peers(tmp_path: Path) -> Callable[[Any], subprocess.CompletedProcess[str]]:
    """Runs e3_peers.py on a file with this text, or this value as JSON."""

    def run(content: Any) -> subprocess.CompletedProcess[str]:
        path = tmp_path / "result.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return subprocess.run(
            [sys.executable, str(PROBES / "e3_peers.py"), str(path)], capture_output=True, text=True, timeout=60
        )

    return run


def test_best_peer_is_the_fastest_right_pytorch_provider(peers: Callable[[Any], subprocess.CompletedProcess[str]]) -> None:
    rows = [
        row("eager", {"graph": 3.0, "wall": 4.0}, 10.0),
        row("compile_max_autotune", {"graph": 1.5, "wall": 2.5}, 20.0),
        row("compile_default", {"wall": 0.5}, 40.0),  # not measured by the metric of the others
        row("merged_cudnn", {"graph": 1.0, "wall": 2.0}, 30.0, status="wrong"),
        row("tensorrt", {"graph": 0.7}, 50.0),
        row("fused_cuda", {"graph": 0.4}, 80.0),
        row("eager", {"wall": 9.0}, 5.0, batch=8),
        row("channels_last", {"wall": 8.0}, 6.0, batch=8),
        row("openvino", {"wall": 1.0}, batch=16),
    ]
    machine = {"cpu": "some cpu", "gpu": {"name": "some gpu"}}
    done = peers({"schema": 3, "kind": "benchmark", "machine": machine, "git": None, "rows": rows})
    assert done.returncode == 0, done.stderr
    line = one_json_line(done.stdout)
    assert (line["probe"], line["ok"], line["device"]) == ("E3", True, "some gpu")
    found = [(p["batch"], p["provider"], p["metric"], p["ms"], p["percent_of_roofline"]) for p in line["peers"]]
    assert found == [
        (1, "compile_max_autotune", "graph", 1.5, 20.0),
        (8, "channels_last", "wall", 8.0, 6.0),
        (16, None, None, None, None),
    ]
    assert line["peers"][0]["subject"] == "3a"
    assert line["peers"][0]["dtype"] == "fp16"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{not json", "is not JSON"),
        ({"schema": 1, "rows": []}, "schema is 1, expected 3"),
        ([1, 2], "schema is 'list', expected 3"),
        ({"schema": 3}, "has no list of rows"),
        ({"schema": 3, "rows": [{"provider": "eager", "case": {"subject": "3a"}}]}, "row 0 lacks"),
    ],
)
def test_bad_result_file_is_one_line(
    peers: Callable[[Any], subprocess.CompletedProcess[str]], content: Any, reason: str
) -> None:
    done = peers(content)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert reason in done.stderr
    assert "result.json" in done.stderr


def test_missing_result_file_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(PROBES / "e3_peers.py"), str(tmp_path / "none.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "cannot be read" in done.stderr

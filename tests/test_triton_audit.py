"""What the Triton kernels compile to: the record is whole, clean and of today's kernels, and compiling again says the same."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "audit.json"
OLDEST, PINNED = "3.6.0", "3.8.0"

Row = dict[str, Any]


def compiling() -> dict[str, str]:
    """The environment without interpreter."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@cache
def listed() -> dict[tuple[str, ...], str]:
    """The source of each variant for each architecture."""
    program = """
import json
from benchmarks.audit.__main__ import VARIANTS
from benchmarks.audit.compile import load, source_key
print(json.dumps([[v.kernel, v.label, v.dtype, arch, source_key(v)] for v in load(VARIANTS) for arch in v.arches]))
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=compiling(), capture_output=True, text=True, check=True)
    return {tuple(name): source for *name, source in json.loads(run.stdout)}


@cache
def recorded(version: str) -> dict[str, Any]:
    (run,) = (run for run in json.loads(RECORD.read_text())["runs"] if run.get("triton") == version)
    return run


both_versions = pytest.mark.parametrize("version", [OLDEST, PINNED])


@both_versions
def test_the_record_is_of_todays_kernels(version: str) -> None:
    """Otherwise: make audit, with both versions of Triton."""
    sources = {(row["kernel"], row["label"], row["dtype"], row["arch"]): row["source"] for row in recorded(version)["rows"]}
    assert sources == listed()


@both_versions
def test_nothing_was_found(version: str) -> None:
    assert recorded(version)["findings"] == []
    assert not any(row["spill_loads"] for row in recorded(version)["rows"])


def test_the_pinned_version_is_the_one_in_the_record() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"triton=={PINNED}" in pins


@both_versions
def test_every_kernel_is_there_for_every_architecture(version: str) -> None:
    kernels = {"googlenet_fused_pointwise", "googlenet_fused_spatial", "googlenet_fused_branch"}
    for dtype in ("fp16", "bf16", "tf32", "fp32"):
        for arch in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942"):
            rows = [row for row in recorded(version)["rows"] if (row["dtype"], row["arch"]) == (dtype, arch)]
            assert {row["kernel"] for row in rows} == kernels, (dtype, arch)


@both_versions
def test_matrix_units_are_those_of_the_architecture(version: str) -> None:
    prefixes = {"sm_80": "mma.", "sm_90": "wgmma.", "sm_100": "tcgen05.", "sm_120": "mma.", "gfx942": "v_mfma_"}
    for row in recorded(version)["rows"]:
        if row["dtype"] == "fp32":
            continue
        own = [name.startswith(prefixes[row["arch"]]) for name in row["matrix"]]
        # A pooled tile may have fewer rows than the units of Hopper and later take.
        assert any(own) if row["kernel"] == "googlenet_fused_pointwise" else all(own), row


@both_versions
def test_tma_and_dependent_launch_are_there_where_they_were_asked_for(version: str) -> None:
    for row in recorded(version)["rows"]:
        assert bool(row["tma"]) == ("TMA" in row["label"]), row
        assert bool(row["griddepcontrol"]) == ("PDL" in row["label"]), row


def test_offsets_of_pixels_have_64_bits() -> None:
    """Tiles of 128 pixels and fewer columns tell the two apart."""
    program = """
import json
from dataclasses import replace
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton._C.libtriton import ir
from googlenet_fused.backends.triton import variants
from googlenet_fused.backends.triton.plans import Config, Plan
texts = []
for form in ("merged", "fused"):
    plan = Plan(form, Config(128, 32, 32, 8, 2), Config(128, 32, 32, 8, 2))
    for launch in variants.launches_of("3a", "fp16", plan):
        variant = variants._variant(launch, "3a", "fp16", plan, "channels_last")
        source = ASTSource(variant.fn, variant.signature, variant.constexprs, variant.attrs)
        backend = make_backend(target := GPUTarget("cuda", 80, 32))
        options, context = backend.parse_options(dict(variant.options)), ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        maps = backend.get_codegen_implementation(options), backend.get_module_map(), context
        texts.append([variant.kernel, str(source.make_ir(target, options, *maps))])
print(json.dumps(texts))
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=compiling(), capture_output=True, text=True, check=True)
    offsets = re.compile(r"tt\.addptr .* : tensor<128(?:x1)?x!tt\.ptr<f16>>, tensor<128(?:x1)?x(i\d+)>")
    kernels = json.loads(run.stdout)
    assert len(kernels) == 5
    for kernel, text in kernels:
        found = offsets.findall(text)
        assert found, kernel
        assert set(found) == {"i64"}, kernel


@pytest.mark.extra
@pytest.mark.parametrize("dtype", ["bf16", "tf32", "fp32"])
def test_compiling_again_says_the_same(dtype: str) -> None:
    """All kernels in all configurations, one module, all architectures. fp16 has three modules: its record must do."""
    import triton

    if triton.__version__.split("+")[0] not in (OLDEST, PINNED):
        pytest.skip(f"no record of triton {triton.__version__}")
    command = [sys.executable, "-m", "benchmarks.audit", "--check", "--dtypes", dtype]
    run = subprocess.run(command, cwd=ROOT, env=compiling(), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]

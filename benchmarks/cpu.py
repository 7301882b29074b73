"""Measures the whole network on this machine's CPU, beside other CPU runtimes, and writes one JSON file.

    python benchmarks/cpu.py && python benchmarks/report.py

Every provider is checked against a double-precision run before anything is timed, and all of them take turns in one run: see
``googlenet_fused/bench.py`` for how and why. A provider that cannot run here is recorded with the reason. Measure on a quiet
machine: threads that spin make oneDNN fall apart when another job holds a core.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from googlenet_fused import __version__, bench, info
from googlenet_fused.bench import Bind, Case, Provider, Row, Schedule, Unavailable, Workload

RESULTS = Path(__file__).parent / "results"
SCHEMA = 1
FEWEST_ROUNDS = 10
BUSY_LOAD = 0.5
RUNTIMES = ("torch", "torchvision", "numpy", "onnx", "onnxruntime", "openvino")


def torchvision_eager(workload: Workload) -> Bind:
    """torchvision's own module with the workload's parameters; for a variant torchvision lacks, this package's plain model."""
    if workload.case.variant != "torchvision":
        return lambda x: lambda: workload.model(x)
    try:
        from torchvision.models import googlenet
    except (ImportError, RuntimeError) as error:
        raise Unavailable(f"torchvision does not import: {_first_line(error)}") from error
    model = googlenet(weights=None, aux_logits=False, init_weights=False).eval()
    model.load_state_dict(workload.model.state_dict())
    model.to(bench.DTYPES[workload.case.dtype])
    return lambda x: lambda: model(x)


def compiled(workload: Workload) -> Bind:
    """torch.compile with parameters frozen into the graph, which lets Inductor fold the norms and prepack the weights."""
    model = torch.compile(workload.model, dynamic=False, options={"freezing": True})
    try:
        model(workload.input(seed=0))
    except Exception as error:  # no compiler, no Python headers, an unsupported platform: Inductor raises its own for each
        raise Unavailable(f"torch.compile fails here: {_first_line(error)}") from error
    return lambda x: lambda: model(x)


def onnx_bytes(workload: Workload) -> bytes:
    """The workload's network as ONNX with fp32 parameters and a fixed batch; runtimes choose their own precision for it."""
    model = copy.deepcopy(workload.model).float()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        path = Path(folder, "network.onnx")
        try:
            warnings.simplefilter("ignore")  # the TorchScript exporter is deprecated; it needs no package beyond onnx
            torch.onnx.export(model, (workload.input(seed=0).float(),), path, dynamo=False)
        except ImportError as error:
            raise Unavailable(f"the ONNX export needs a package: {_first_line(error)}") from error
        return path.read_bytes()


def onnx_runtime(workload: Workload) -> Bind:
    """ONNX Runtime's CPU provider with its default options, and as many threads as torch has."""
    if workload.case.dtype != "fp32":
        raise Unavailable(f"ONNX Runtime's CPU provider has no convolution in {workload.case.dtype}")
    try:
        import onnxruntime
    except ImportError as error:
        raise Unavailable(f"onnxruntime does not import: {_first_line(error)}") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(onnx_bytes(workload), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def bind(x: Tensor) -> Callable[[], Tensor]:
        feed = {name: x.numpy()}
        return lambda: torch.from_numpy(session.run(None, feed)[0])

    return bind


def openvino(workload: Workload) -> Bind:
    """OpenVINO's CPU plugin for latency, in the precision of the case, and as many threads as torch has."""
    try:
        from openvino import Core
    except ImportError as error:
        raise Unavailable(f"openvino does not import: {_first_line(error)}") from error
    precision, name = {"fp32": ("f32", "float32"), "bf16": ("bf16", "bfloat16"), "fp16": ("f16", "float16")}[
        workload.case.dtype
    ]
    core = Core()
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    network = core.compile_model(core.read_model(onnx_bytes(workload)), "CPU", settings)
    chosen = network.get_property("INFERENCE_PRECISION_HINT").to_string()
    if chosen not in (precision, name):
        raise Unavailable(f"OpenVINO runs this in {chosen} on this processor, not in {precision}")
    request = network.create_infer_request()

    def bind(x: Tensor) -> Callable[[], Tensor]:
        feed = x.float().numpy()
        return lambda: torch.from_numpy(request.infer([feed], share_inputs=True, share_outputs=True)[0])

    return bind


def providers(with_compile: bool) -> list[Provider]:
    """All providers in the order of the tables."""
    _, channels_last, _ = bench.package_providers()
    return [
        Provider(bench.BASELINE, "PyTorch", torchvision_eager),
        channels_last,
        *([Provider("compile_freezing", "torch.compile, freezing", compiled)] if with_compile else []),
        Provider("onnxruntime", "ONNX Runtime", onnx_runtime),
        Provider("openvino", "OpenVINO", openvino),
        bench.fused_provider("reference"),
        bench.fused_provider("cpu"),
    ]


def schedule_for(case: Case, rounds: int) -> Schedule:
    """Fewer rounds for larger batches, whose calls take longer and vary less; ``n`` in the results says how many it was."""
    return Schedule(rounds=max(rounds // case.batch, min(rounds, FEWEST_ROUNDS)))


def run(cases: Sequence[Case], rounds: int, with_compile: bool) -> list[Row]:
    rows: list[Row] = []
    lineup = providers(with_compile)
    for case in cases:
        schedule = schedule_for(case, rounds)
        with bench.progress_bar(schedule.rounds * len(lineup), str(case)) as advance:
            rows += bench.measure(bench.build_workload(case), lineup, schedule, advance=advance)
    return rows


def record(rows: Sequence[Row], rounds: int, load: float | None, git: dict[str, Any] | None) -> dict[str, Any]:
    """The result file's content: everything the tables and charts are made from."""
    schedule = Schedule()
    return {
        "schema": SCHEMA,
        "kind": "cpu",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": bench.machine_description(),
        "versions": {"googlenet_fused": __version__} | {name: info.distribution_version(name) for name in RUNTIMES},
        "git": git,
        "settings": {
            "rounds": rounds,
            "calls_a_block": schedule.calls,
            "warmup_calls": schedule.warmup,
            "settle_seconds": schedule.settle,
            "load_average_before": load,
            "input": "seeded normal noise, contiguous NCHW; weights and batch-norm statistics seeded",
        },
        "rows": [row.to_json() for row in rows],
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit and whether files differ from it; ``None`` outside a git checkout, without git, or before the first commit."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit.strip(), "dirty": bool(_git(folder, "status", "--porcelain").strip())}
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True).stdout


def slug(machine: dict[str, Any]) -> str:
    """A file name's worth of the machine: ``amd-epyc-2-threads``."""
    name = re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b|@.*", " ", machine["cpu"], flags=re.IGNORECASE)
    name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"{name}-{machine['threads']}-threads"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--variants", nargs="+", default=["torchvision"], choices=["torchvision", "bvlc"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], metavar="N")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads of every runtime (default: torch's, one a physical core)"
    )
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="rounds at batch 1 (default: 30)")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too (takes minutes to compile)")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, metavar="DIR", help="folder of the JSON file (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)

    git = git_state(Path(__file__).parent)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if load is not None and load > BUSY_LOAD:
        print(f"warning: the load average is {load:.1f}; other work on this machine spoils the timings", file=sys.stderr)
    try:
        cases = [Case(v, b, d) for v in arguments.variants for b in arguments.batches for d in arguments.dtypes]
        with bench.torch_threads(arguments.threads):
            rows = run(cases, arguments.rounds, arguments.compile)
            result = record(rows, arguments.rounds, load, git)
            bench.print_results(rows, result["machine"]["threads"], Console(highlight=False))
    except (ValueError, Unavailable) as error:
        print(f"benchmarks/cpu.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    path = arguments.output / f"cpu-{slug(result['machine'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")
    return 1 if any(row.status == "wrong" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

"""``googlenet-fused bench``: plain against fused GoogLeNet, timed on this machine."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack

from googlenet_fused import GOOGLENET_SPECS
from googlenet_fused.cli.common import (
    DTYPES,
    CommandError,
    Commands,
    add_output,
    check_backend,
    failed,
    output_folder,
    positive_argument,
    say,
)

NETWORKS = ("torchvision", "bvlc")
"""The variants whose arithmetic differs: slim's is torchvision's."""


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "bench",
        help="time plain against fused GoogLeNet on this machine",
        description="Time plain against fused GoogLeNet on this machine, for every pair of batch size and dtype, once their "
        "outputs are found to agree. The weights are seeded, the input is noise.",
    )
    command.add_argument(
        "--batch", type=positive_argument, nargs="+", default=[1], metavar="N", help="batch sizes (default: 1)"
    )
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        nargs="+",
        default=["fp32"],
        metavar="DTYPE",
        help=f"dtypes among {', '.join(DTYPES)} (default: fp32)",
    )
    command.add_argument("--variant", choices=NETWORKS, default="torchvision", help="which GoogLeNet (default: %(default)s)")
    command.add_argument("--device", choices=["cpu", "cuda"], help="where to run (default: cuda if there is one)")
    command.add_argument("--backend", default="auto", metavar="NAME", help="as listed by doctor (default: %(default)s)")
    command.add_argument("--threads", type=positive_argument, metavar="N", help="threads of torch (default: as torch chooses)")
    command.add_argument(
        "--rounds", type=positive_argument, default=20, metavar="N", help="rounds of 5 timed calls each (default: %(default)s)"
    )
    add_output(command, "bench-output", "results")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    check_backend(arguments.backend)
    import torch
    from rich.console import Console

    from googlenet_fused import bench
    from googlenet_fused.backends import registry
    from googlenet_fused.charts import ChartError, latency_chart
    from googlenet_fused.progress import progress_display

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("argument --device: torch sees no CUDA device; see googlenet-fused doctor, or give --device cpu")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    output = output_folder(arguments.output)
    schedule = bench.Schedule(rounds=arguments.rounds)
    cases = [bench.Case(arguments.variant, batch, dtype) for batch in arguments.batch for dtype in arguments.dtype]
    rows: list[bench.Row] = []
    not_run: list[str] = []
    with ExitStack() as stack:
        try:
            stack.enter_context(bench.torch_threads(arguments.threads))
        except ValueError as error:
            raise CommandError(f"argument --{error}") from error
        machine = bench.machine_description()
        with progress_display("measuring") as show:
            for at, case in enumerate(cases):

                def progress(what: str, done: float, at: int = at, case: bench.Case = case) -> None:
                    show(f"{case}: {what}", (at + done) / len(cases))

                problem = registry.Problem(device, bench.DTYPES[case.dtype], GOOGLENET_SPECS["3a"])
                try:
                    backend = registry.select(arguments.backend, problem).name
                    workload, providers = bench.build_workload(case, device), bench.package_providers(backend)
                    rows += bench.measure(workload, providers, schedule, progress=progress)
                except (bench.Unavailable, bench.DeviceBroken, registry.BackendError, torch.OutOfMemoryError) as error:
                    not_run.append(f"{case} not run: {bench.first_line(error)}")  # the other cases' figures are kept
                    if isinstance(error, bench.DeviceBroken):
                        break
    if not rows:
        raise CommandError("; ".join(not_run))

    document = {"device": device.type, "machine": machine, "rows": [row.to_json() for row in rows], "not_run": not_run}
    threads = f"{machine['cpu']}, {machine['threads']} torch thread{'s' if machine['threads'] != 1 else ''}"
    where = machine["gpu"]["name"] if device.type == "cuda" else threads
    written = [output / "bench.json"]
    written[0].write_text(json.dumps(document, indent=2) + "\n")
    try:
        written.append(latency_chart(bench.latency_panels(rows), output / "bench.png", f"GoogLeNet on {where}"))
    except ChartError as error:
        say(f"warning: no chart: {error}")
    if arguments.json:
        print(json.dumps({**document, "files": [str(path) for path in written]}, indent=2))
    else:
        bench.print_results(rows, where, Console(highlight=False))
        print(f"wrote {' and '.join(map(str, written))}")
    bad = [row for row in rows if row.status != "ok"]
    for row in bad:
        failed(f"{row.title} ({row.case}): {row.status}: {row.reason}")
    for reason in not_run:
        failed(reason)
    return CommandError.code if bad or not_run else 0

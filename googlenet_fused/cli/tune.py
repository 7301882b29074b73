"""``googlenet-fused tune``: the fastest plans of the Triton backend, found by trying."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from googlenet_fused import GOOGLENET_SPECS
from googlenet_fused.cli.common import (
    CommandError,
    Commands,
    check_backend,
    failed,
    path_argument,
    positive_argument,
    say,
    seconds_argument,
)

if TYPE_CHECKING:
    import torch


ARITHMETICS = ("fp16", "bf16", "tf32", "fp32")
TUNED = ("fp16", "bf16", "tf32")
"""What models run in unless torch's flags were changed."""


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "tune",
        help="find the fastest plans of the Triton backend for GoogLeNet's modules on this GPU",
        description="Find, by trying, how the Triton backend runs GoogLeNet's modules fastest on this GPU: the form of its "
        "kernels, their tiles, warps and stages. The plans found go into a table of the user's and are used from then on. Each "
        "plan that is tried is first checked against the plain module.",
    )
    command.add_argument(
        "--modules",
        choices=[*GOOGLENET_SPECS, "all"],
        nargs="+",
        default=["all"],
        metavar="NAME",
        help=f"modules among {', '.join(GOOGLENET_SPECS)} (default: all)",
    )
    command.add_argument(
        "--large-kernel",
        type=int,
        choices=[3, 5],
        nargs="+",
        default=[3, 5],
        metavar="N",
        help="the third branch's kernel: 5 as in the paper, 3 as in torchvision's network (default: both)",
    )
    command.add_argument(
        "--batch",
        type=positive_argument,
        nargs="+",
        default=[1, 8, 32, 128],
        metavar="N",
        help="batch sizes (default: 1 8 32 128)",
    )
    command.add_argument(
        "--dtype",
        choices=ARITHMETICS,
        nargs="+",
        metavar="DTYPE",
        help=f"dtypes among {', '.join(ARITHMETICS)}; fp32 models run as tf32 by torch's default flags, and fp32 is for those "
        f"with torch.backends.cudnn.conv.fp32_precision = 'ieee' (default: {' '.join(TUNED)}, those that run here)",
    )
    command.add_argument(
        "--seconds-each",
        type=seconds_argument,
        default=0.5,
        metavar="S",
        help="how long each plan that is tried is timed, in turns with the best one before it (default: %(default)s)",
    )
    instead = command.add_mutually_exclusive_group()
    instead.add_argument(
        "--output", type=path_argument, metavar="FILE", help="add the plans to this file instead, which is not used"
    )
    instead.add_argument("--show", action="store_true", help="print the user's table and where it is, and measure nothing")
    instead.add_argument("--forget", action="store_true", help="remove the user's table, and measure nothing")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from googlenet_fused.backends.triton import plan_table
    from googlenet_fused.user_files import check_writable

    if arguments.forget:
        return _forget_plans(as_json=arguments.json)
    named = arguments.output is not None and not _is_user_table(arguments.output)
    path = Path(arguments.output) if arguments.output is not None else plan_table.user_table()
    try:
        if arguments.show:
            return _show_plans(path, as_json=arguments.json)
        check_backend("triton")
        from googlenet_fused.backends.triton.backend import interpreting

        kept = arguments.output is not None or not interpreting()
        if kept:  # what cannot be kept need not be measured
            plan_table.read_table(path, named=named)
            check_writable(path, named=named)
    except ValueError as error:
        raise CommandError(str(error)) from error
    import torch

    from googlenet_fused import bench
    from googlenet_fused.backends import BackendError
    from googlenet_fused.progress import progress_display
    from googlenet_fused.tune import Outcome, Problem, outcomes_as_text, tune

    device = torch.device("cpu") if interpreting() else torch.device("cuda", torch.cuda.current_device())
    problems = [
        Problem.of_googlenet(name, batch, dtype, large_kernel)
        for name in dict.fromkeys(GOOGLENET_SPECS if "all" in arguments.modules else arguments.modules)
        for large_kernel in dict.fromkeys(arguments.large_kernel)
        for dtype in dict.fromkeys(arguments.dtype or _tuned(device))
        for batch in dict.fromkeys(arguments.batch)
    ]
    outcomes: list[Outcome] = []
    faults: list[str] = []

    def warn(message: str) -> None:
        say(f"warning: {message}")

    def keep(outcome: Outcome) -> None:
        if kept and outcome.entry is not None:
            plan_table.add_to_table(path, [outcome.entry], named=named)
        outcomes.append(outcome)
        if not sys.stderr.isatty():  # where no bar is shown
            say(f"{len(outcomes)}/{len(problems)} {outcome}")

    def found() -> bool:
        return kept and any(outcome.entry is not None for outcome in outcomes)

    if not kept:
        warn("with TRITON_INTERPRET=1 no plan is kept; --output FILE keeps them in a file that is not used")
    try:
        with progress_display("tuning") as show:
            tune(problems, device, seconds_each=arguments.seconds_each, progress=show, say=warn, done=keep)
    except BackendError as error:
        raise CommandError(str(error)) from error
    except bench.DeviceBroken as error:
        faults.append(str(error))  # the plans found before are kept
    except KeyboardInterrupt:
        say(f"{len(outcomes)} of {len(problems)} problems are done{f'; their plans are kept in {path}' if found() else ''}")
        raise
    finally:
        plan_table.forget_user_entries()

    if arguments.json:
        table = str(path) if found() else None
        print(json.dumps({"table": table, "outcomes": [outcome.to_json() for outcome in outcomes]}, indent=2))
    else:
        why_not = "no plan was found" if kept else "the times of interpreted kernels mean nothing"
        print(f"{outcomes_as_text(outcomes)}\n{f'wrote {path}' if found() else f'nothing is written: {why_not}'}")
    if skipped := sum(outcome.skipped for outcome in outcomes):
        say(f"warning: {skipped} plans were skipped, since they do not compile or do not fit on the device")
    faults += [f"{outcome.problem}: {outcome.reason}" for outcome in outcomes if outcome.reason is not None]
    faults += [f"{outcome.problem}: wrong results by the plan {plan}" for outcome in outcomes for plan in outcome.wrong]
    for fault in faults:
        failed(fault)
    return CommandError.code if faults else 0


def _tuned(device: torch.device) -> list[str]:
    """Those of ``TUNED`` that the Triton backend runs on this device."""
    from googlenet_fused.backends import registry
    from googlenet_fused.backends.triton.backend import device_facts, has_tf32
    from googlenet_fused.backends.triton.plans import DTYPES as OF_TENSORS

    backend, spec = registry.get("triton"), GOOGLENET_SPECS["3a"]
    able = [name for name in TUNED if backend.supports(registry.Problem(device, OF_TENSORS[name], spec)) is None]
    if able and not has_tf32(device_facts(device)[0]):
        able = ["fp32" if name == "tf32" else name for name in able]
    return able or list(TUNED)


def _is_user_table(name: str) -> bool:
    """Whether the file that was named is the user's own table after all, which is trusted and must be safe."""
    from googlenet_fused.backends.triton.plan_table import user_table

    try:
        return os.path.realpath(name) == os.path.realpath(user_table())
    except OSError:
        return False


def _show_plans(path: Path, *, as_json: bool) -> int:
    from googlenet_fused.backends.triton.plan_table import read_table
    from googlenet_fused.tune import entries_as_text

    entries = read_table(path)
    if as_json:
        print(json.dumps({"table": str(path), "entries": [entry.to_json() for entry in entries]}, indent=2))
    elif entries:
        print(f"{entries_as_text(entries)}\nin {path}")
    else:
        print(f"there are no plans in {path}")
    return 0


def _forget_plans(*, as_json: bool) -> int:
    from googlenet_fused.backends.triton.plan_table import forget_user_entries, user_table
    from googlenet_fused.user_files import ELSEWHERE

    path, removed = user_table(), True
    try:
        path.unlink()
    except FileNotFoundError:
        removed = False
    except OSError as error:
        raise CommandError(f"cannot remove {path}: {error.strerror}; {ELSEWHERE}") from error
    forget_user_entries()
    if as_json:
        print(json.dumps({"table": str(path), "removed": removed}))
    else:
        print(f"removed {path}" if removed else f"there is no table at {path}")
    return 0

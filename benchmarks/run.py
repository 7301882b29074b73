"""Measures providers on this machine and writes one JSON file.

    python -m benchmarks.run && python -m benchmarks.report

Every provider is checked against a double-precision run before anything is timed, and all providers of a case take turns in one
run: see ``googlenet_fused/bench/`` for how and why. A provider that cannot run here is recorded with the reason. The file is
written after every case. Measure on a quiet machine: threads that spin make oneDNN fall apart when another job holds a core.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import grid, reading, results
from benchmarks.providers import lineup
from benchmarks.roofline import Ceilings, measure_ceilings
from googlenet_fused import bench
from googlenet_fused.backends import registry
from googlenet_fused.bench import Case, Provider, Row, Schedule
from googlenet_fused.progress import progress_display
from googlenet_fused.spec import GOOGLENET_SPECS

BUSY_LOAD = 0.5
SECONDS = {"cpu": {"module": 5.0, "net": 30.0}, "cuda": {"module": 2.0, "net": 4.0}}
"""How long the providers of one case take turns, about."""

SAID: dict[str, str] = {"wrong": "is wrong", "failed": "failed"}
"""What is said of a row that makes the run itself fail, by its status."""

TRIAL = Schedule(rounds=2, calls=1, warmup=1, settle=0.0)
TRIALS = Path("bench-output")
INTERRUPTED = "the run was interrupted before it"
SELECTION = ("subjects", "batches", "dtypes", "modes", "providers")
"""The arguments that say what is measured."""

INPUT = "seeded normal noise; weights, biases and statistics seeded and randomised"


@dataclass(frozen=True)
class Plan:
    """What to measure and how long."""

    device: torch.device
    cases: Sequence[Case]
    providers: Sequence[Provider]
    rounds: int
    budget: float | None
    quick: bool

    def schedule(self, case: Case) -> Schedule:
        """The turns of one case."""
        if self.quick:
            return TRIAL
        return Schedule(rounds=self.rounds, seconds=SECONDS[self.device.type]["module" if case.is_module else "net"])


def measured_ceilings(plan: Plan) -> Ceilings:
    """The ceilings of the plan's dtypes, as they are now."""
    small: dict[str, Any] = {"copy_bytes": 2**22, "arithmetic_side": 256, "repeats": 3, "budget": 0.2} if plan.quick else {}
    ceilings = measure_ceilings(plan.device, dict.fromkeys(case.dtype for case in plan.cases), **small)
    if plan.device.type == "cuda":
        torch.cuda.empty_cache()
    return ceilings


def run(plan: Plan, result: dict[str, Any], path: Path) -> tuple[list[Row], int]:
    """Measures the plan's cases into ``result``, and writes that to ``path`` after each.

    Returns the rows, and how many cases broke off with an error that nobody expected.
    """
    start, broken = time.monotonic(), 0
    rows: list[Row] = []
    absent: set[str] = set()
    with progress_display("measuring") as show:
        show("ceilings", 0.0)
        results.add_ceilings(result, measured_ceilings(plan))
        ceilings = Ceilings.from_json(result["ceilings"])
        results.add_not_run(result, plan.cases, INTERRUPTED)
        results.write(result, path)
        for at, case in enumerate(plan.cases):
            if plan.budget is not None and time.monotonic() - start > plan.budget:
                leave_out(result, plan, at, f"the time budget of {plan.budget:g} s was spent")
                break

            def progress(what: str, done: float, at: int = at, case: Case = case) -> None:
                show(f"{case}: {what}", (at + done) / len(plan.cases))

            began = time.monotonic()
            try:
                torch.compiler.reset()  # it compiles no more than a few models of one class
                workload = bench.build_workload(case, plan.device)
                found = bench.measure(workload, plan.providers, plan.schedule(case), progress=progress)
            except bench.DeviceBroken as error:
                broken += 1
                leave_out(result, plan, at, str(error))
                results.write(result, path)
                return rows, broken
            except Exception as error:  # one case must not cost the others, whatever a runtime raises
                results.add_not_run(result, [case], bench.first_line(error))
                say(f"{case}: not run: {bench.first_line(error)}")
                broken += not isinstance(error, bench.Unavailable | torch.OutOfMemoryError)
            else:
                rows += found
                for text in (f"{row.title} is unavailable: {row.reason}" for row in found if row.status == "unavailable"):
                    if text not in absent:
                        say(text)
                        absent.add(text)
                new = [row.to_json() for row in found]
                results.add_rows(result, [{**row, "roofline": results.roofline(row, ceilings)} for row in new])
                say(one_line(case, found, time.monotonic() - began))
            if plan.device.type == "cuda":
                result["clocks"] += [clocks] if (clocks := results.read_clocks()) else []
            results.write(result, path)
            if plan.device.type == "cuda":
                torch.cuda.empty_cache()
        show("ceilings again", 1.0)
        results.add_ceilings(result, measured_ceilings(plan))
    results.write(result, path)
    return rows, broken


def leave_out(result: dict[str, Any], plan: Plan, at: int, reason: str) -> None:
    """Records that the plan's cases from ``at`` on are not run."""
    left = plan.cases[at:]
    results.add_not_run(result, left, reason)
    say(f"{len(left)} of {len(plan.cases)} cases not run: {reason}")


def one_line(case: Case, rows: Sequence[Row], seconds: float) -> str:
    """What came of a case, in short: ours and the fastest other, and who is wrong."""
    timed = [row for row in rows if row.timing is not None]
    parts = []
    for title, group in (
        ("ours", [r for r in timed if reading.is_ours(r.provider)]),
        ("others", [r for r in timed if not reading.is_ours(r.provider)]),
    ):
        if group:
            best = min(group, key=lambda row: row.timing.median if row.timing else float("inf"))
            assert best.timing is not None
            parts.append(f"{best.title} {best.timing.median:.4g} ms" + ("" if title == "ours" else " the fastest other"))
    parts += [f"{row.title} {SAID[row.status]}: {row.reason}" for row in rows if row.status in SAID]
    return f"{case}: {'; '.join(parts)} ({seconds:.0f} s)"


def say(text: str) -> None:
    """On standard error, above a progress bar if there is one."""
    print(f"\r\x1b[K{text}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def auto_backend(device: torch.device, dtype: str) -> str:
    """The backend that runs modules where none is asked for."""
    return registry.select(registry.AUTO, registry.Problem(device, bench.DTYPES[dtype], GOOGLENET_SPECS["3a"])).name


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").partition("\n")[0])
    subjects = [*grid.GROUPS, *grid.GROUPS["all"]]
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    parser.add_argument("--subjects", nargs="+", default=["all"], choices=subjects, metavar="NAME", help=", ".join(subjects))
    parser.add_argument("--batches", nargs="+", type=int, default=[], metavar="N", help="batch sizes (default: the device's)")
    parser.add_argument("--dtypes", nargs="+", default=[], choices=list(bench.DTYPES), help="default: the device's")
    parser.add_argument("--modes", nargs="+", default=list(grid.MODES), choices=grid.MODES)
    parser.add_argument("--providers", nargs="+", default=[], metavar="NAME", help="default: all that the device can have")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no case after so long (default: no limit)")
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="at most so many rounds a case (default: 30)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of every runtime (default: as torch chooses)")
    into = parser.add_mutually_exclusive_group()
    into.add_argument("--append", action="store_true", help="add to a result of the same machine, versions and commit, if any")
    into.add_argument("--resume", action="store_true", help="go on with an interrupted run: measure what it left out")
    parser.add_argument("--replace", action="store_true", help="lose earlier figures that are not measured again")
    parser.add_argument("--commit", metavar="HASH", help="the commit of this code, where there is no git to ask")
    parser.add_argument("--quick", action="store_true", help="a trial: two rounds, small ceilings, nothing to believe")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help=f"a .json file or a folder (default: benchmarks/results; of a trial: {TRIALS})",
    )
    return parser


def plan_of(arguments: argparse.Namespace) -> Plan:
    """What the arguments ask for.

    Raises:
        ValueError: an argument is out of range.
    """
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device; measure with --device cpu")
    for batch in arguments.batches:
        if batch < 1:
            raise ValueError(f"--batches must be at least 1, got {batch}")
    selection = grid.Selection(arguments.subjects, arguments.batches, arguments.dtypes, arguments.modes)
    cases = list(grid.cases(selection, device))
    if not cases:
        raise ValueError(
            "nothing to measure: --modes training needs whole networks (--subjects nets) in another dtype than fp16"
        )
    if arguments.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {arguments.rounds}")
    if arguments.budget is not None and not arguments.budget > 0:
        raise ValueError(f"--budget must be more than 0 seconds, got {arguments.budget:g}")
    if arguments.commit is not None and not re.fullmatch("[0-9a-f]{4,40}", arguments.commit):
        raise ValueError(f"--commit must be a hash, 4 to 40 hexadecimal digits, got {arguments.commit!r}")
    providers = lineup(device, arguments.providers)
    return Plan(torch.device(device), cases, providers, arguments.rounds, arguments.budget, arguments.quick)


def new_result(plan: Plan, commit: str | None) -> dict[str, Any]:
    """An empty result of this machine and plan."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if load is not None and load > BUSY_LOAD and plan.device.type == "cpu":
        say(f"warning: the load average is {load:.1f}; other work on this machine spoils the timings")
    git = {"commit": commit, "dirty": None} if commit else results.git_state(Path(__file__).parent)
    settings = {
        "rounds": TRIAL.rounds if plan.quick else plan.rounds,
        "seconds_a_case": SECONDS[plan.device.type],
        "auto_backend": auto_backend(plan.device, plan.cases[0].dtype),
        "load_average_before": load,
        "input": INPUT,
        "quick": plan.quick,
        "providers": [provider.name for provider in plan.providers],
    }
    return results.new_result(plan.device.type, git, settings)


def files_of(result: dict[str, Any], arguments: argparse.Namespace) -> tuple[Path, Path]:
    """Where a result is written while unfinished, and where in the end; with ``--append`` that is the same.

    Raises:
        ValueError: the output is neither a folder nor a JSON file.
    """
    if arguments.output is not None and arguments.output.suffix not in ("", ".json") and not arguments.output.is_dir():
        raise ValueError(f"--output must be a .json file or a folder, got {arguments.output}")
    output = arguments.output or (TRIALS if arguments.quick else results.FOLDER)
    final = output if output.suffix == ".json" else output / results.file_name(result)
    return final if arguments.append else final.with_suffix(reading.UNFINISHED), final


def check_no_run_is_forgotten(unfinished: Path) -> None:
    """Refuses to begin anything while an interrupted run waits to be resumed.

    Raises:
        ValueError: one does.
    """
    if unfinished.is_file() and (rows := reading.read_file(unfinished).rows):
        raise ValueError(
            f"{unfinished} holds {len(rows)} rows of an interrupted run: go on with --resume, or give --replace to lose them"
        )


def check_nothing_is_lost(plan: Plan, final: Path) -> None:
    """Refuses to begin a run whose file would take the place of figures that it will not hold itself.

    Raises:
        ValueError: it would.
    """
    if not final.is_file():
        return
    old = reading.read_file(final)
    gone = reading.lost(old.rows, planned(plan))
    if gone or (plan.quick and old.rows and not old.data["settings"].get("quick")):
        what = f"{len(gone)} rows that this run does not measure, the first {gone[0]}" if gone else "figures of no trial"
        raise ValueError(f"{final} holds {what}: give --append to add to it, --output for another file, or --replace")


def planned(plan: Plan) -> list[tuple[Case, str]]:
    """The cases with the names of their providers: what the plan will have rows of."""
    return [(case, provider.name) for case in plan.cases for provider in plan.providers]


def resumed(plan: Plan, new: dict[str, Any], unfinished: Path, arguments: argparse.Namespace) -> tuple[Plan, dict[str, Any]]:
    """What an interrupted run left to do, and its result so far.

    Raises:
        ValueError: there was none, or it was another run than the one asked for.
    """
    if not unfinished.is_file():
        raise ValueError(f"--resume: there is no {unfinished}, so no run was interrupted; start without --resume")
    old = dict(reading.read_file(unfinished).data)
    results.check_same_run(old, new)
    left = [reading.case_of(entry) for entry in old["not_run"]]
    asked = [provider.name for provider in plan.providers]
    names, rounds = old["settings"].get("providers", asked), old["settings"].get("rounds", plan.rounds)
    if any(getattr(arguments, name) != parser().get_default(name) for name in SELECTION):
        all_of_it = {reading.case_of(row) for row in old["rows"]} | set(left)
        if set(plan.cases) != all_of_it or asked != names:
            raise ValueError(
                f"--resume: the interrupted run in {unfinished} is of other cases or providers; leave out "
                f"{', '.join(f'--{name}' for name in SELECTION)} to go on with it"
            )
    if arguments.rounds not in (rounds, parser().get_default("rounds")):
        raise ValueError(f"--resume: the interrupted run has --rounds {rounds}, got {arguments.rounds}; leave it out")
    return replace(plan, cases=left, providers=lineup(plan.device.type, names), rounds=rounds), old


def appended(plan: Plan, new: dict[str, Any], final: Path, arguments: argparse.Namespace) -> tuple[Plan, dict[str, Any]]:
    """What to add to a result, and that result.

    The providers of a case are measured in one run, so a case with rows of others than those asked for stays as it is, unless
    ``--replace`` is given.

    Raises:
        ValueError: the result is of another run.
    """
    old = dict(reading.read_file(final).data)
    results.check_same_run(old, new)
    names = [provider.name for provider in plan.providers]
    old["settings"] = results.both_settings(old["settings"], new["settings"])
    if arguments.replace:
        return plan, old
    richer = [row for row in old["rows"] if row["provider"] not in names and reading.case_of(row) in plan.cases]
    kept = {reading.case_of(row) for row in richer}
    if kept:
        others = ", ".join(dict.fromkeys(row["title"] for row in richer))
        say(f"{len(kept)} cases stay as they are, with figures of {others} too; give --replace to lose those")
    return replace(plan, cases=[case for case in plan.cases if case not in kept]), old


def begin(arguments: argparse.Namespace) -> tuple[Plan, dict[str, Any], Path, Path]:
    """The plan, the result to add to, and its file while it is unfinished and in the end.

    Raises:
        ValueError: an argument is wrong, or figures would be mixed or lost.
    """
    plan = plan_of(arguments)
    result = new_result(plan, arguments.commit)
    unfinished, final = files_of(result, arguments)
    if not arguments.resume and not arguments.replace:
        check_no_run_is_forgotten(final.with_suffix(reading.UNFINISHED))
    if arguments.resume:
        plan, result = resumed(plan, result, unfinished, arguments)
    elif arguments.append and final.is_file():
        plan, result = appended(plan, result, final, arguments)
    elif not arguments.append and not arguments.replace:
        check_nothing_is_lost(plan, final)
    results.check_writable(unfinished)
    return plan, result, unfinished, final


def finish(result: dict[str, Any], unfinished: Path, final: Path, *, replace: bool) -> None:
    """Puts a finished run's file in its place.

    Raises:
        ValueError: nothing was measured, or an earlier file holds figures that this run did not come to.
    """
    if unfinished == final:
        return
    if not result["rows"]:
        unfinished.unlink()
        raise ValueError("nothing was measured, so nothing was written")
    if final.is_file() and not replace:
        measured = [(reading.case_of(row), row["provider"]) for row in result["rows"]]
        if gone := reading.lost(reading.read_file(final).rows, measured):
            raise ValueError(
                f"{final} stays: it holds {len(gone)} rows that this run did not come to, the first {gone[0]}; the new figures "
                f"are in {unfinished}: go on with --resume, or give --resume --replace to lose the old ones"
            )
    unfinished.replace(final)


def interruption(result: dict[str, Any], arguments: argparse.Namespace) -> str:
    """What is kept, and how to go on."""
    if arguments.append:
        return "interrupted: the cases that were done are kept; repeat the command to measure the others"
    if not result.get("rows"):
        return "interrupted: no case was done yet"
    return "interrupted: the cases that were done are kept; go on with --resume and the same arguments"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    result: dict[str, Any] = {}
    try:
        with bench.torch_threads(arguments.threads):
            plan, result, unfinished, final = begin(arguments)
            rows, broken = run(plan, result, unfinished)
        finish(result, unfinished, final, replace=arguments.replace)
    except (ValueError, reading.ReportError, registry.BackendError) as error:
        print(f"benchmarks.run: error: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, OSError) as error:  # out of memory, a full disk, a lost device
        done = "; what was measured before is kept" if result.get("rows") else ""
        print(f"benchmarks.run: error: {bench.first_line(error)}{done}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(interruption(result, arguments), file=sys.stderr)
        return 130
    print(f"wrote {final}")
    statuses = [row.status for row in rows] if arguments.append else [row["status"] for row in result["rows"]]
    return 1 if broken or any(status in SAID for status in statuses) else 0


if __name__ == "__main__":
    sys.exit(main())

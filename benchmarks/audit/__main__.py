"""Compiles every GPU kernel in every variant for every architecture, without a GPU, and checks what it became.

    python -m benchmarks.audit            # make audit

Findings are a kernel that does not compile, one that spills registers, one that must use the matrix units and does not, one
that needs more than a block can have, and narrow accesses of one that says its accesses are wide.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import results
from benchmarks.audit import record
from benchmarks.audit.compile import AuditError, Variant, keep_cache_in, load, versions
from benchmarks.audit.limits import LIMITS
from benchmarks.audit.rows import NAME, ROOT, Row, name_of
from benchmarks.audit.show import print_audit
from benchmarks.audit.work import Task, outcomes
from googlenet_fused.info import usable_cpus
from googlenet_fused.progress import progress_bar

VARIANTS = "googlenet_fused.backends.triton.variants:variants"
OUTPUT = results.FOLDER / "audit.json"
CACHE = ROOT / "build" / "triton-cache"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arches", nargs="+", default=[], choices=list(LIMITS), metavar="ARCH", help=", ".join(LIMITS))
    parser.add_argument("--kernels", nargs="+", default=[], metavar="NAME", help="kernels by name (default: all)")
    parser.add_argument("--dtypes", nargs="+", default=[], metavar="DTYPE", help="fp16, bf16, tf32, fp32 (default: all)")
    parser.add_argument("--variants", default=VARIANTS, metavar="MODULE:FUNCTION", help=f"what to audit (default: {VARIANTS})")
    parser.add_argument("--jobs", type=int, default=usable_cpus(), metavar="N", help="processes (default: the usable CPUs)")
    parser.add_argument("--details", action="store_true", help="show every variant, not only the worst on an architecture")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the file says otherwise")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"default: {OUTPUT.name} in results/; for a selection, none"
    )
    return parser


def selected(variants: Sequence[Variant], arguments: argparse.Namespace) -> list[Task]:
    """The tasks that the arguments ask for.

    Raises:
        AuditError: there are none.
    """
    for option, field in (("kernels", "kernel"), ("dtypes", "dtype")):
        known = dict.fromkeys(getattr(variant, field) for variant in variants)
        for name in getattr(arguments, option):
            if name not in known:
                raise AuditError(f"--{option} must be among {', '.join(known)}, got {name!r}")
    tasks = [
        (index, arch)
        for index, variant in enumerate(variants)
        if not arguments.kernels or variant.kernel in arguments.kernels
        if not arguments.dtypes or variant.dtype in arguments.dtypes
        for arch in variant.arches
        if not arguments.arches or arch in arguments.arches
    ]
    if not tasks:
        raise AuditError(f"nothing to audit: no variant of {arguments.variants} is of those kernels, dtypes and architectures")
    return tasks


def audit(variants: Sequence[Variant], tasks: Sequence[Task], arguments: argparse.Namespace) -> record.Run:
    """Compiles and reads all."""
    with progress_bar(len(tasks), "compiling") as advance:
        found = outcomes(arguments.variants, tasks, arguments.jobs, advance)
    rows: list[Row] = []
    findings: list[Row] = []
    for (index, arch), outcome in zip(tasks, found, strict=True):
        name = {**{field: getattr(variants[index], field) for field in NAME[:-1]}, "arch": arch}
        row, texts = outcome or (name, ["does not compile: the compiler crashed"])
        rows.append(row)
        findings += [{**name, "finding": text} for text in texts]
    git = results.git_state(ROOT) or {"commit": None, "dirty": None}
    return {**versions(), **git, "date": results.now(), "rows": rows, "findings": findings}


def run(arguments: argparse.Namespace) -> int:
    if arguments.jobs < 1:
        raise AuditError(f"--jobs must be at least 1, got {arguments.jobs}")
    keep_cache_in(str(CACHE))
    variants = load(arguments.variants)
    tasks = selected(variants, arguments)
    whole = arguments.variants == VARIANTS and len(tasks) == sum(len(list(variant.arches)) for variant in variants)
    output = arguments.output or (OUTPUT if whole or arguments.check else None)
    recorded = record.read(output) if output else []
    version = versions()["triton"]
    old = next((run for run in recorded if record.compiler_of(run) == ("triton", version)), None)
    if arguments.check and old is None:
        raise AuditError(f"{output} has no run of Triton {version}: make one without --check")
    if output and not arguments.check:
        check_writable(output)
    new = audit(variants, tasks, arguments)
    show(new, arguments.details)
    changes = list(record.differences(old, new, whole or not arguments.check)) if old else ["all of it"]
    if output and not changes:
        print(f"as in {output}")
    elif arguments.check:
        for change in changes:
            print(f"not as in {output.name if output else None}: {change}")
    elif output:
        record.write(output, new)
        print(f"wrote {output}")
    return 1 if new["findings"] or (arguments.check and changes) else 0


def check_writable(path: Path) -> None:
    try:
        results.check_writable(path)
    except ValueError as error:
        raise AuditError(str(error)) from error


def show(run: record.Run, details: bool) -> None:
    """Prints the tables, all findings, and how many there are."""
    try:
        from rich.console import Console
    except ImportError as error:
        raise AuditError("the tables need rich: pip install rich") from error
    print_audit(
        run["rows"],
        run["findings"],
        details,
        Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 160),
    )
    for finding in run["findings"]:
        print(f"{name_of(finding)}: {finding['finding']}")
    print(f"{' '.join(record.compiler_of(run))}: {len(run['rows'])} audited, {len(run['findings'])} findings")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        return run(arguments)
    except AuditError as error:
        print(f"benchmarks.audit: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

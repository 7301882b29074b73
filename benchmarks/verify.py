"""What automatic choice goes by on a GPU: which backends' tests passed there.

python -m benchmarks.verify gpu-output/tests.xml            # on the GPU's machine: the entries that the tests amount to
python -m benchmarks.verify --add gpu-output/verified.json  # where the repository is: take them into the package
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import results
from googlenet_fused.backends import registry, trust


def passed(report: str, backends: Iterable[str]) -> dict[str, dict[str, int]]:
    """How many tests of each backend passed on a CUDA device, by arithmetic, by a JUnit report (its text).

    A test says what it ran in its id: ``test_layouts[cuda-triton-float16-contiguous]``, or ``tf32`` for the dtype.

    Raises:
        ValueError: a test failed, or it is no such report.
    """
    try:
        cases = list(ElementTree.fromstring(report).iter("testcase"))
    except ElementTree.ParseError as error:
        raise ValueError(f"the report is not XML: {error}") from error
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    if failed:
        raise ValueError(f"{len(failed)} of {len(cases)} tests failed, the first {failed[0].get('name')}")
    names = [case.get("name", "") for case in cases if case.find("skipped") is None]
    found: dict[str, dict[str, int]] = {}
    for backend in backends:
        ran = re.compile(rf"cuda-{re.escape(backend)}-({'|'.join(trust.ARITHMETICS)})[-\]]")
        found[backend] = dict(Counter(match[1] for match in map(ran.search, names) if match))
    return found


def entries(report: str, commit: str | None) -> list[dict[str, Any]]:
    """The entries of ``verified.json`` that a report of tests on this machine amounts to.

    Raises:
        ValueError: nothing may be recorded, or there is nothing.
    """
    if commit is None:
        git = results.git_state(Path(__file__).parent)
        if git is None:
            raise ValueError("there is no git to say which commit was tested: name it with --commit")
        if git["dirty"]:
            raise ValueError(f"files differ from commit {git['commit'][:9]}: commit them, or name a commit with --commit")
        commit = str(git["commit"])
    elif not re.fullmatch("[0-9a-f]{4,40}", commit):
        raise ValueError(f"--commit must be a hash, 4 to 40 hexadecimal digits, got {commit!r}")
    names = [name for name in registry.names() if registry.get(name).needs_verification]
    found = trust.record(commit, results.now(), passed(report, names))
    if not found:
        raise ValueError(f"no test of a backend that needs verification passed here ({', '.join(names) or 'there is none'})")
    return found


def add(path: Path) -> list[trust.Verification]:
    """Takes the entries of a file into the package's record, in place of those of the same backend, GPU and versions.

    Returns the entries that were added.

    Raises:
        ValueError: the file or the record is damaged.
        OSError: one cannot be read or written.
    """
    new = trust.read_verifications(path)
    merged = {entry.key: entry for entry in [*trust.read_verifications(trust.VERIFIED), *new]}
    found = [asdict(merged[key]) for key in sorted(merged)]
    trust.VERIFIED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return new


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1, with the reason on standard error, if nothing was recorded or added."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verify", description=(__doc__ or "").partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("report", nargs="?", type=Path, help="pytest's JUnit report of the GPU tests, just run on this machine")
    what.add_argument("--add", type=Path, metavar="FILE", help=f"take entries into {trust.VERIFIED.name}")
    parser.add_argument("--commit", metavar="HASH", help="the commit that was tested, where there is no git to ask")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.add is not None:
            for entry in add(chosen.add):
                tests = ", ".join(f"{count} tests in {name}" for name, count in sorted(entry.tests.items()))
                print(f"{entry.backend} on {entry.gpu}: {tests}, commit {entry.commit[:9]}")
        else:
            print(json.dumps(entries(chosen.report.read_text(encoding="utf-8"), chosen.commit), indent=1))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Test processes share the cores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROBE = """
import os
import pytest

@pytest.mark.parametrize("at", range(8))
def test_threads(at):
    counts = [os.environ[name] for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")]
    with open("threads.txt", "a") as file:
        file.write(" ".join(counts) + "\\n")
"""


@pytest.mark.parametrize(("processes", "given"), [(0, None), (1, None), (2, None), (2, "3")])
def test_threads_do_not_outnumber_the_cores(processes: int, given: str | None, tmp_path: Path) -> None:
    """But where the user says how many there are."""
    if processes:
        pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (tmp_path / "test_probe.py").write_text(PROBE)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "OPENBLAS_", "PYTEST_"))}
    if given is not None:
        environment["OMP_NUM_THREADS"] = given
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(["-n", str(processes)] if processes else [])]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.DEVNULL)
    share = str(max(1, min(4, (os.cpu_count() or 1) // max(processes, 1))))
    assert set((tmp_path / "threads.txt").read_text().splitlines()) == {f"{given or share} {share}"}

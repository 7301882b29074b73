"""What every test shares: few threads, fixed seeds, and the meaning of the markers."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

# Read by OpenMP and by numpy's OpenBLAS when torch and numpy are first imported, here and in every process a test starts.
# Spinning threads that outnumber the cores slow all test processes down together, some tests tenfold.
_THREADS = [name for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS") if name not in os.environ]


def _share_cores(processes: int) -> None:
    os.environ.update(dict.fromkeys(_THREADS, str(max(1, min(4, (os.cpu_count() or 1) // processes)))))


_share_cores(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: list[object]) -> None:
    """Before the test processes start, which inherit the environment."""
    _share_cores(len(specs))


# Where there is no GPU Triton's kernels are interpreted, on CPU tensors. Triton asks for this when a kernel is defined.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The user's own plans and self-checks are none of the tests' business.
_cache = tempfile.mkdtemp(prefix="googlenet_fused-")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ.setdefault("GOOGLENET_FUSED_CACHE", _cache)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Seeds every random generator the test can see; torch and numpy only where the test's module has imported them."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@cache
def _quick_interpreter() -> None:
    import quick_interpreter

    quick_interpreter.install()


@pytest.fixture(autouse=True)
def _triton() -> None:
    """Where Triton interprets, it does so in a third of the time."""
    if "triton.runtime.interpreter" in sys.modules and os.environ.get("TRITON_INTERPRET") == "1":
        _quick_interpreter()


def _record_calls(name: str, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    from googlenet_fused import kept_weights

    calls: list[object] = []
    function = getattr(kept_weights, name)
    monkeypatch.setattr(kept_weights, name, lambda *arguments: calls.append(arguments) or function(*arguments))
    return calls


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One entry for each time that a module's weights are packed."""
    return _record_calls("pack_inception", monkeypatch)


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One entry for each time that the stem's weights are folded."""
    return _record_calls("fold_batch_norm", monkeypatch)


@pytest.fixture
def warnings_of_inference_tensors(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], int]]:
    """How often it was said so far in the test that inference tensors are packed in every call."""
    from googlenet_fused import parameter_cache

    parameter_cache._warn_of_inference_tensors.cache_clear()
    with caplog.at_level("WARNING", logger="googlenet_fused"):
        yield lambda: sum("inference_mode" in record.getMessage() for record in caplog.records)
    parameter_cache._warn_of_inference_tensors.cache_clear()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--extra", action="store_true", help="also the tests that take minutes each, last of all")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def lateness(item: pytest.Item) -> int:
        return 2 if item.get_closest_marker("extra") else 1 if item.get_closest_marker("slow") else 0

    items.sort(key=lateness)
    if not config.getoption("--extra"):
        for item in items:
            if item.get_closest_marker("extra"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: --extra runs it"))

    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_items:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))

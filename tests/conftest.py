"""What every test shares: few threads, fixed seeds, and the meaning of the markers."""

from __future__ import annotations

import os
import random
import sys

import pytest

# Read by OpenMP when torch is first imported, here and in every process a test starts. Spinning threads that outnumber the
# cores slow all test processes down together.
_processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(4, (os.cpu_count() or 1) // _processes))))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Seeds every random generator the test can see; torch and numpy only where the test's module has imported them."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)

    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_items:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))

"""How the processes that read images start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from googlenet_fused.workers import start_method


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("usual", "alone", "beside"), [("fork", None, "spawn"), ("forkserver", "spawn", "spawn"), ("spawn", None, None)]
)
def test_they_are_neither_forked_beside_threads_nor_by_a_server(
    usual: str, alone: str | None, beside: str | None, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr("multiprocessing.get_start_method", lambda: usual)
    assert start_method(2) == alone
    request.getfixturevalue("group")
    assert start_method(2) == beside
    assert start_method(0) is None

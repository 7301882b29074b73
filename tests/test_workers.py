"""How the processes that read images start."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

from googlenet_fused.workers import start_method


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """The signals that were blocked whenever the server would have been started."""
    found: list[set[int]] = []
    monkeypatch.setattr(forkserver, "set_forkserver_preload", lambda _: None)
    monkeypatch.setattr(forkserver, "ensure_running", lambda: found.append(signal.pthread_sigmask(signal.SIG_BLOCK, [])))
    return found


def test_alone_they_start_as_usual(masks: list[set[int]]) -> None:
    assert start_method(2) is None
    assert not masks


def test_beside_others_a_server_that_heeds_no_signal_forks_them(group: None, masks: list[set[int]]) -> None:
    """Forking beside gloo's threads hung 19 times in 18,000."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    context = start_method(2)
    assert context is not None
    assert context.get_start_method() == "forkserver"
    assert [mask - before for mask in masks] == [{signal.SIGTERM, signal.SIGINT}]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_without_workers_no_server_starts(group: None, masks: list[set[int]]) -> None:
    assert start_method(0) is None
    assert not masks


def test_what_is_not_forked_stays_so(group: None, masks: list[set[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS, where processes are spawned, and from Python 3.14, where the server is usual."""
    monkeypatch.setattr("multiprocessing.get_start_method", lambda: "spawn")
    assert start_method(2) is None
    assert not masks

"""The processes that read images: how they start, which signals they heed, and how they end."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

from torch import distributed
from torch.utils.data import DataLoader


def start_method(workers: int) -> str | None:
    """How processes that read images start from this one: DataLoader's ``multiprocessing_context``; None if as usual.

    One of several processes has threads of gloo or NCCL. A child that is forked while such a thread enters or leaves Python, as
    it does at the end of an exchange, waits for ever for a lock of CPython's that the thread held (``_PyEval_ReInitThreads``,
    Python 3.11). A server of forks, Python 3.14's usual way, would end by a SIGTERM to the group and its workers count as dead.
    In both cases they are spawned, so that what they are given is pickled.
    """
    if not workers:
        return None
    usual = multiprocessing.get_start_method()
    return "spawn" if usual == "forkserver" or (usual == "fork" and distributed.is_initialized()) else None


SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""That often go to the whole group of processes, and are for the one that trains."""


def leave_signals_alone(_: int) -> None:
    """A worker's ``worker_init_fn``."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def batches_of(loader: DataLoader[Any]) -> Iterator[Iterator[Any]]:
    """The loader's batches. Its workers heed none of ``SIGNALS`` and end with the block, whatever ends it.

    Else an error, whose traceback keeps the iterator, would leave them to ``multiprocessing``, which at exit sends the SIGTERM
    that they ignore and waits for them for ever.
    """
    with _signals_blocked():
        batches: Any = iter(loader)
    try:
        yield batches
    finally:
        if loader.num_workers:
            batches._shutdown_workers()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Which processes that start in the block inherit: a spawned one takes seconds to reach ``leave_signals_alone``."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # whose start would end the blocking
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

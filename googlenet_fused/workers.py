"""The processes that read images: how they start, which signals they heed, and how they end."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from typing import Any

from torch import distributed
from torch.utils.data import DataLoader

PRELOADED = ("__main__", "torchvision.transforms.v2", "googlenet_fused.workers")
"""What a server of forks imports once, so that the workers, which it forks, need not."""


def start_method(workers: int) -> BaseContext | None:
    """How processes that read images start from this one: DataLoader's ``multiprocessing_context``; None if as usual.

    One of several processes has threads of gloo or NCCL. A child that is forked while such a thread enters or leaves Python, as
    it does at the end of an exchange, waits for ever for a lock of CPython's that the thread held (``_PyEval_ReInitThreads``,
    Python 3.11). So these workers are forked by a server, which has one thread, and what they are given is pickled.
    """
    if not workers or not distributed.is_initialized() or multiprocessing.get_start_method() != "fork":
        return None
    resource_tracker.ensure_running()  # which, where it starts, unblocks the signals
    forkserver.set_forkserver_preload(list(PRELOADED))
    # The server inherits the mask: it must not end by a signal to the group, or the workers would be taken for dead.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return multiprocessing.get_context("forkserver")


def leave_signals_alone(_: int) -> None:
    """A worker's ``worker_init_fn``: signals often go to the whole group of processes, and are for the one that trains."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def batches_of(loader: DataLoader[Any]) -> Iterator[Iterator[Any]]:
    """The loader's batches. Its workers end with the block, whatever ends it.

    Else an error, whose traceback keeps the iterator, would leave them to ``multiprocessing``, which at exit sends the SIGTERM
    that they ignore and waits for them for ever.
    """
    batches: Any = iter(loader)
    try:
        yield batches
    finally:
        if loader.num_workers:
            batches._shutdown_workers()

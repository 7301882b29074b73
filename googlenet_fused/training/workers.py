"""The processes that read images for a run: signals to stop are for the process that trains, which then ends its workers."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader


def leave_signals_alone(_: int) -> None:
    """A worker's ``worker_init_fn``: signals often go to the whole group of processes."""
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

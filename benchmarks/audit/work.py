"""Variants compiled in several processes, so that one in which a compiler crashes costs no other its row."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from benchmarks.audit.compile import Variant, load
from benchmarks.audit.rows import Row, audited

Task = tuple[int, str]
"""A variant's place in its list, and an architecture."""
Outcome = tuple[Row, list[str]]

_variants: Sequence[Variant] = ()


def outcomes(source: str, tasks: Sequence[Task], jobs: int, advance: Callable[[], None]) -> list[Outcome | None]:
    """What ``audited`` says of each task, in their order; None where the compiler took its process down.

    Args:
        source: as ``load`` takes it.
        tasks: of the variants that ``source`` gives, in the order in which it gives them.
        jobs: how many processes.
        advance: called after each task.
    """
    done: dict[Task, Outcome | None] = {}
    while left := [task for task in tasks if task not in done]:
        crashed = not _run(source, left, jobs, done, advance)
        if crashed and jobs == 1:
            done[next(task for task in left if task not in done)] = None
            advance()
        jobs = 1  # a crash takes down all that run beside it: the rest one by one, which tells whose it is
    return [done[task] for task in tasks]


def _run(source: str, tasks: Sequence[Task], jobs: int, done: dict[Task, Outcome | None], advance: Callable[[], None]) -> bool:
    """Whether all went through without a crash; what did is in ``done``."""
    # The children are fresh: a process with threads, as torch has them, does not fork well.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(tasks)), context, _begin, (source,)) as pool:
        futures = {pool.submit(_audit, *task): task for task in tasks}
        try:
            for future in as_completed(futures):
                done[futures[future]] = future.result()
                advance()
        except BrokenProcessPool:
            return False
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return True


def _begin(source: str) -> None:
    global _variants
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the parent, which then waits for what is begun
    _variants = load(source)


def _audit(index: int, arch: str) -> Outcome:
    return audited(_variants[index], arch)

"""Bars that show how far a command is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Show = Callable[[str, float], None]
"""Takes what is being done and how far all of it is, from 0 to 1."""


@contextmanager
def progress_display(title: str) -> Iterator[Show]:
    """A bar on standard error that vanishes when done; yields a function that moves it. Silent when it is not a terminal.

    Without rich, a percentage on one line takes the bar's place.
    """
    if not sys.stderr.isatty():
        yield lambda what, done: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    except ImportError:
        try:
            yield lambda what, done: print(f"\r\x1b[K{title}: {done:4.0%}  {what}", end="", file=sys.stderr, flush=True)
        finally:
            print("\r\x1b[K", end="", file=sys.stderr)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=1.0, what="")
        yield lambda what, done: progress.update(task, completed=done, what=what)


@contextmanager
def progress_bar(total: int, title: str) -> Iterator[Callable[[], None]]:
    """A bar as of `progress_display` for so many equal steps; yields ``advance()``."""
    done = 0
    with progress_display(title) as show:

        def advance() -> None:
            nonlocal done
            done += 1
            show(f"{done}/{total}", done / total)

        yield advance

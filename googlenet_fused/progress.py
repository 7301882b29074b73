"""Bars that show how far a command is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

NEWS_EVERY = 30.0
"""Seconds between two lines of progress where no bar is shown."""

Show = Callable[[str, float], None]
"""Takes what is being done and how far all of it is, from 0 to 1."""


@contextmanager
def progress_display(title: str, speak: Callable[[str], None] | None = None) -> Iterator[Show]:
    """A bar on standard error that vanishes when done; yields a function that moves it.

    When standard error is no terminal, ``speak`` takes a line from time to time instead. Without rich, a percentage on one line
    takes the bar's place.
    """
    if not sys.stderr.isatty():
        yield (lambda what, done: None) if speak is None else _lines(speak)
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


def _lines(speak: Callable[[str], None]) -> Show:
    """Says what is being done, how far all of it is, and how long the rest takes if it goes on as since the first call."""
    started: tuple[float, float] | None = None  # when, and how far it was then: what is resumed does not begin at 0
    said = time.monotonic()

    def show(what: str, done: float) -> None:
        nonlocal started, said
        now = time.monotonic()
        if started is None:
            started = now, done
        began, before = started
        if now - said >= NEWS_EVERY and done > before:
            said = now
            left = timedelta(seconds=round((now - began) * (1 - done) / (done - before)))
            speak(f"{what}, {100 * done:.0f} %, {left} left")

    return show


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

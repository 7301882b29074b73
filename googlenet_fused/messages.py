"""What is said of errors."""

from __future__ import annotations

from collections.abc import Sequence


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def quoted(name: str, longest: int = 60) -> str:
    """A name out of a file in one line, in quotation marks and cut if it is long."""
    return repr(name if len(name) <= longest else f"{name[:longest]}...")


def listed(words: Sequence[str], conjunction: str) -> str:
    """``a, b and c``."""
    *first, last = words
    return f"{', '.join(first)} {conjunction} {last}" if first else last

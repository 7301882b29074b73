"""What is said of errors."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return (str(error).strip() or repr(error)).splitlines()[0]

"""What is said of errors."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def quoted(name: str, longest: int = 60) -> str:
    """A name out of a file in one line, in quotation marks and cut if it is long."""
    return repr(name if len(name) <= longest else f"{name[:longest]}...")

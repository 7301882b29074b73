"""Numbers, text and tables as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def number(value: float) -> str:
    return f"{value:.{_decimals(value)}f}"


def spread(timing: Mapping[str, float]) -> str:
    """Median (20th to 80th percentile), with the median's number of decimals."""
    decimals = _decimals(timing["median"])
    return f"{timing['median']:.{decimals}f} ({timing['p20']:.{decimals}f}–{timing['p80']:.{decimals}f})"


def _decimals(value: float) -> int:
    """Decimals for three significant digits, and no more than five."""
    return next((decimals for decimals in range(5) if value * 10**decimals >= 99.95), 5)


def per_cent(value: float) -> str:
    return f"{value:.0f} %" if value >= 9.95 else f"{value:.1f} %" if value >= 0.95 else f"{value:.2f} %"


def bold_if(bold: bool, text: str) -> str:
    return f"**{text}**" if bold else text


def plain(text: str) -> str:
    """Text that Markdown shows as it is, in one line and in a table's cell."""
    text = " ".join(text.split())
    for character in "\\`*<|[":
        text = text.replace(character, f"\\{character}")
    return text


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def folded(summary: str, body: Sequence[str]) -> str:
    return f"<details><summary>{summary}</summary>\n\n" + "\n\n".join(body) + "\n\n</details>"


def partly_folded(tables: Sequence[tuple[bool, str, str]]) -> list[str]:
    """Tables of (open, name, Markdown); those not open follow folded, but where none is open all are."""
    if not any(is_open for is_open, _, _ in tables):
        return [text for _, _, text in tables]
    shown = [text for is_open, _, text in tables if is_open]
    hidden = {name: text for is_open, name, text in tables if not is_open}
    if hidden:
        shown.append(folded(f"The same for {'; '.join(hidden)}", list(hidden.values())))
    return shown

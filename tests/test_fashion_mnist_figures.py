"""README's table of the Fashion-MNIST run says what evaluate measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- fashion-mnist:begin -->\n", "<!-- fashion-mnist:end -->"


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| network | crops | right, top-1 | right, top-5 |", "| --- | --- | --- | --- |"]
    for row in rows:
        top1, top5 = (100 * row[name] / row["images"] for name in ("top1_correct", "top5_correct"))
        name = row["name"] if row["name"] != "ensemble" else f"**ensemble of {row['models']}**"
        lines.append(f"| {name} | {row['crops']} | {top1:.2f} % | {top5:.2f} % |")
    return "\n".join(lines) + "\n"


def test_the_table_is_what_was_measured() -> None:
    measured = json.loads((ROOT / "docs" / "fashion-mnist" / "evaluation.json").read_text(encoding="utf-8"))
    shown = (ROOT / "README.md").read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert shown == table(measured["rows"])
    assert measured["images"] == 10_000


def test_the_ensemble_beats_its_members_with_one_crop() -> None:
    rows = json.loads((ROOT / "docs" / "fashion-mnist" / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    *members, ensemble = (row for row in rows if row["crops"] == 1)
    assert ensemble["name"] == "ensemble"
    assert len(members) == ensemble["models"] == 3
    assert all(ensemble["top1_correct"] > member["top1_correct"] for member in members)

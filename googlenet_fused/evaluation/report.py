"""The results as tables, JSON and a chart, in the form of Table 3 of the GoogLeNet paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from googlenet_fused.charts import FUSED_COLOUR, LOWER, PLAIN_COLOUR, new_figure, save_figure
from googlenet_fused.evaluation.engine import Evaluation, Score
from googlenet_fused.evaluation.members import Member

if TYPE_CHECKING:
    from rich.console import Console

PAPER = {(1, 1): 10.07, (1, 10): 9.15, (1, 144): 7.89, (7, 1): 8.09, (7, 10): 7.62, (7, 144): 6.67}
"""Top-5 error in percent, by the numbers of networks and of crops."""

PAPER_SOURCE = "Szegedy et al., Going deeper with convolutions, CVPR 2015, Table 3: ILSVRC 2014, their own networks"


class Row(NamedTuple):
    """A line of the table: one network, or all of them as an ensemble.

    Attributes:
        name: of the network, or ``"ensemble"``.
        models: how many networks.
        crops: how many views of an image each was shown.
        score: theirs.
        compared: top-5 error less that of the first line, in percent; None in that line.
    """

    name: str
    models: int
    crops: int
    score: Score
    compared: float | None

    @property
    def cost(self) -> int:
        """How many views were classified for an image."""
        return self.models * self.crops

    @property
    def paper(self) -> float | None:
        """The paper's top-5 error, in percent, for as many networks and crops."""
        return PAPER.get((self.models, self.crops))

    def to_json(self) -> dict[str, Any]:
        score = self.score
        return {
            "name": self.name,
            "models": self.models,
            "crops": self.crops,
            "cost": self.cost,
            "top5_error": score.top5_error,
            "compared_to_base": self.compared,
            "top1_error": score.top1_error,
            "images": score.images,
            "top5_correct": score.top5,
            "top1_correct": score.top1,
            "paper_top5_error": self.paper,
        }


def rows(members: Sequence[Member], evaluations: Sequence[Evaluation]) -> list[Row]:
    """For each protocol a line for each network and, of several, one for their ensemble."""
    found: list[Row] = []

    def add(name: str, models: int, evaluation: Evaluation, score: Score) -> None:
        compared = score.top5_error - found[0].score.top5_error if found else None
        found.append(Row(name, models, int(evaluation.crops), score, compared))

    for evaluation in evaluations:
        for member, score in zip(members, evaluation.members, strict=True):
            add(member.name, 1, evaluation, score)
        if len(members) > 1:
            add("ensemble", len(members), evaluation, evaluation.ensemble)
    return found


def document(members: Sequence[Member], evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """The results, fit for JSON; errors are in percent."""
    corrupt = {each.name: each.reason for evaluation in evaluations for each in evaluation.corrupt}
    return {
        "models": [member.to_json() for member in members],
        "rows": [row.to_json() for row in rows(members, evaluations)],
        "paper": PAPER_SOURCE,
        "corrupt": [{"image": name, "reason": reason} for name, reason in corrupt.items()],
        "runs": [
            {"crops": int(each.crops), "seconds": each.seconds, "views_a_call": each.views_a_call} for each in evaluations
        ],
    }


def print_table(lines: Sequence[Row], title: str, console: Console, *, paper: bool = False) -> None:
    """Prints the table; with ``paper`` the paper's own figures stand beside ours, and where they come from below."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    several = any(line.models > 1 for line in lines)
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    if several:
        table.add_column("", overflow="fold")
    for column in ("models", "crops", "cost", "top-5 error", "compared to base", "top-1 error", *(["paper"] if paper else [])):
        table.add_column(column, justify="right")
    for line in lines:
        compared = "base" if line.compared is None else f"{line.compared:+.2f} %"
        cells = [str(line.models), str(line.crops), str(line.cost), f"{line.score.top5_error:.2f} %", compared]
        cells += [f"{line.score.top1_error:.2f} %"]
        if paper:
            cells.append("–" if line.paper is None else f"{line.paper:.2f} %")
        style = "bold" if line.models > 1 else None
        table.add_row(*([escape(line.name)] if several else []), *cells, style=style)
    console.print(table)
    if paper:
        console.print(f"paper: top-5 error of {PAPER_SOURCE}.", markup=False)


def error_chart(lines: Sequence[Row], path: Path, title: str) -> Path:
    """Draws the errors by the number of crops into a PNG file: bars for the ensemble, or for the network if there is one.

    Of several networks each one's own errors are dots in the bars.

    Raises:
        ChartError: matplotlib is not installed.
    """
    most = max(line.models for line in lines)
    shown = [line for line in lines if line.models == most]
    figure = new_figure((2.2 + 1.8 * len(shown), 4.2))
    axes = figure.add_subplot()
    width = 0.38
    for place, line in enumerate(shown):
        for at, colour, label, error in (
            (place - width / 2, PLAIN_COLOUR, "top-1", line.score.top1_error),
            (place + width / 2, FUSED_COLOUR, "top-5", line.score.top5_error),
        ):
            axes.bar(at, error, width, color=colour, label=label if not place else None)
            axes.annotate(f"{error:.2f}", (at, error), (0, 3), textcoords="offset points", ha="center", fontsize=9)
        single = [other.score for other in lines if other.crops == line.crops and other.models < most]
        for at, errors in (
            (place - width / 2, [score.top1_error for score in single]),
            (place + width / 2, [score.top5_error for score in single]),
        ):
            axes.plot([at] * len(errors), errors, "o", color="#333333", markersize=3, linestyle="none")
    axes.set_xticks(range(len(shown)), labels=[f"{line.crops} crop{'s' if line.crops > 1 else ''}" for line in shown])
    axes.set_ylabel(f"error, %: {LOWER}", fontsize=9)
    axes.set_ylim(0, max(5.0, 1.3 * max(line.score.top1_error for line in lines)))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, loc="upper right")
    dots = f"{most} networks together; dots: each by itself" if most > 1 else "one network"
    figure.suptitle(f"{title}\n{dots}", fontsize=11)
    return save_figure(figure, path)

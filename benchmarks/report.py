"""Writes the README's tables, a page and charts in docs/, and CSV files, from the JSON files in benchmarks/results/ alone.

    python -m benchmarks.report                  # write them
    python -m benchmarks.report --check          # fail if they are not what the JSON files say
    python -m benchmarks.report --add FILE...    # take in result files of another machine first

Each machine gets tables, charts and a file of its own: machines are never mixed.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from benchmarks import plots
from benchmarks.reading import ReportError, Result, Row, by_machine, case_of, headline, lost, one, read, read_file, row_percent
from benchmarks.tables.page import page, page_name
from benchmarks.tables.readme import SECTIONS, markers, section
from benchmarks.tables.remarks import facts
from googlenet_fused.bench import METRICS
from googlenet_fused.charts import ChartError
from googlenet_fused.spec import GOOGLENET_SIDES, GOOGLENET_SPECS

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "python -m benchmarks.report"
TIMM_COLUMNS = (
    "model",
    "infer_samples_per_sec",
    "infer_step_time",
    "infer_batch_size",
    "infer_img_size",
    "infer_gmacs",
    "param_count",
    "train_samples_per_sec",
    "train_step_time",
    "train_batch_size",
    "train_img_size",
)
"""As in the CSV files of timm's benchmark.py: ms a step, GMACs of one image, millions of parameters."""
OWN_COLUMNS = (
    "provider",
    "dtype",
    "status",
    "reason",
    "metric",
    "p20",
    "p80",
    "n",
    "speedup",
    "roofline_percent",
    "max_error",
    "rms_error",
    "peak_mib",
    "host_ms",
)


@cache
def parameters(subject: str) -> int:
    """Parameters of a network without auxiliary heads, or of a module in the form that is measured (5x5, biases, no norm)."""
    import torch

    from googlenet_fused.blocks import Inception
    from googlenet_fused.models import VARIANTS, googlenet

    with torch.device("meta"):
        if subject in GOOGLENET_SPECS:
            model: torch.nn.Module = Inception.from_spec(GOOGLENET_SPECS[subject], norm=None)
        else:
            variant = next(name for name in VARIANTS if name == subject)
            model = googlenet(variant, aux_logits=False, init_weights=False)
    return sum(parameter.numel() for parameter in model.parameters())


def csv_text(result: Result) -> str:
    """A line for each row and metric, and one for each row without a time; ``host`` is a column, not a metric."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*TIMM_COLUMNS, *OWN_COLUMNS], lineterminator="\n")
    writer.writeheader()
    for row in result.rows:
        metrics: list[str | None] = [metric for metric in METRICS if metric in row["timings"] and metric != "host"]
        writer.writerows(_csv_line(row, metric) for metric in metrics or [None])
    return text.getvalue()


def _csv_line(row: Row, metric: str | None) -> dict[str, object]:
    case, roofline = case_of(row), row["roofline"]
    prefix = "infer" if case.mode == "inference" else "train"
    line: dict[str, object] = {
        "model": f"inception_{case.subject}" if case.is_module else f"googlenet_{case.subject}",
        f"{prefix}_batch_size": case.batch,
        f"{prefix}_img_size": GOOGLENET_SIDES[case.subject] if case.is_module else case.side,
        "param_count": f"{parameters(case.subject) / 1e6:.3f}",
        **{name: row[name] for name in ("provider", "status", "reason", "peak_mib")},
        **{name: f"{row[name]:.3g}" for name in ("max_error", "rms_error") if row[name] is not None},
        "dtype": case.dtype,
    }
    if roofline is not None and case.mode == "inference":
        line["infer_gmacs"] = f"{roofline['flops'] / 2e9 / case.batch:.4f}"
    if metric is not None:
        timing = row["timings"][metric]
        line |= {
            f"{prefix}_samples_per_sec": f"{1e3 * case.batch / timing['median']:.2f}",
            f"{prefix}_step_time": f"{timing['median']:.6g}",
            "metric": metric,
            "p20": f"{timing['p20']:.6g}",
            "p80": f"{timing['p80']:.6g}",
            "n": timing["n"],
            "speedup": f"{row['speedup'][metric]:.4f}" if metric in row["speedup"] else None,
        }
        if metric == headline(row) and row_percent(row) is not None:
            line["roofline_percent"] = f"{row_percent(row):.2f}"
        if "host" in row["timings"]:
            line["host_ms"] = f"{row['timings']['host']['median']:.6g}"
    return line


def replaced(readme: str, text: str, device: str) -> str:
    """The README with a device's section replaced by ``text``.

    Raises:
        ReportError: the section's markers are not there, once each and in order.
    """
    begin, end = markers(device)
    if readme.count(begin) != 1 or readme.count(end) != 1 or readme.index(begin) > readme.index(end):
        raise ReportError(f"README.md must hold {begin} and, after it, {end}, once each")
    head, _, rest = readme.partition(begin)
    return head + text + rest.partition(end)[2]


def texts(results: Sequence[Result], root: Path) -> dict[Path, str]:
    """What each generated text file holds.

    Raises:
        ReportError: the README is missing or lacks a marker.
    """
    path = root / "README.md"
    if not path.is_file():
        raise ReportError(f"{path} is missing")
    readme = path.read_text(encoding="utf-8")
    for device in SECTIONS:
        readme = replaced(readme, section(results, device), device)
    wanted = {path: readme}
    for result in results:
        wanted[root / "docs" / page_name(result)] = page([result])
        wanted[root / "benchmarks" / "results" / f"{result.stem}.csv"] = csv_text(result)
    return wanted


def charts(results: Sequence[Result], root: Path) -> dict[Path, tuple[plots.Chart, Result]]:
    """What each chart's file shows."""
    return {root / "docs" / plots.file_name(r, chart): (chart, r) for r in results for chart in plots.charts_of(r)}


def is_current(chart: Path, result: Result) -> bool:
    """Whether a chart was drawn from this very JSON file."""
    from PIL import Image

    try:
        with Image.open(chart) as image:
            return image.info.get("Source") == result.digest
    except OSError:  # it is missing, or no picture
        return False


def leftovers(results: Sequence[Result], root: Path) -> list[Path]:
    """Generated files that no result file makes any more."""
    wanted = {*texts(results, root), *charts(results, root)}
    patterns = [
        pattern
        for device in SECTIONS
        for pattern in (
            f"docs/benchmarks-{device}-*.md",
            f"benchmarks/results/{device}-*.csv",
            *(f"docs/{device}-*-{chart.name}.png" for chart in plots.CHARTS),
        )
    ]
    return [path for pattern in patterns for path in sorted(root.glob(pattern)) if path not in wanted]


def stale(results: Sequence[Result], root: Path) -> list[Path]:
    """The generated files that are not what the results say, or are missing."""
    wanted = texts(results, root).items()
    found = [path for path, text in wanted if not path.is_file() or path.read_text(encoding="utf-8") != text]
    return found + [path for path, (_, result) in charts(results, root).items() if not is_current(path, result)]


def write(results: Sequence[Result], root: Path) -> None:
    """Writes the generated files that are stale and removes those that no result makes; says which."""
    wanted, drawn = texts(results, root), charts(results, root)
    for path in stale(results, root):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path in wanted:
            path.write_text(wanted[path], encoding="utf-8")
        else:
            chart, result = drawn[path]
            chart.draw(result, path)
        print(f"wrote {path}")
    for path in leftovers(results, root):
        path.unlink()
        print(f"removed {path}")


def add(files: Sequence[Path], folder: Path, *, replace: bool = False) -> Path:
    """Takes result files of one machine into ``folder``, merged, under that machine's name.

    A file already there is merged with them if it is of the same versions and commit, and replaced if not.

    Args:
        replace: whether rows may be lost thereby: those of cases and providers that are not among the new ones.

    Raises:
        ReportError: a file is not a result, or of a trial, or empty; the files are of two machines or cannot be merged; or
            rows would be lost.
    """
    from benchmarks import results

    given = [read_file(path) for path in files]
    check_publishable(given)
    for result in given:
        if not result.rows:
            raise ReportError(f"--add: {result.path} holds no rows: nothing was measured")
    new = one(given)
    path = folder / results.file_name(new.data)
    old = [read_file(path)] if path.is_file() else []
    of_another_run = any(result.data[name] != new.data[name] for result in old for name in ("versions", "git"))
    if not of_another_run:
        new = one([*old, *given])
    before = [row for result in [*old, *given] for row in result.rows]
    gone = list(dict.fromkeys(lost(before, [(case_of(row), row["provider"]) for row in new.rows])))
    if gone and not replace:
        why = f"{path} is of other versions or another commit" if of_another_run else "its case was measured again without it"
        raise ReportError(
            f"--add: {len(gone)} rows would be lost, the first {gone[0]}: {why}; measure those too, or give --replace"
        )
    if of_another_run:
        print(f"{path.name}: the new figures take the place of those of {facts(old[0])}")
    results.write(new.data, path)
    return path


def check_publishable(found: Sequence[Result]) -> None:
    """Refuses trials.

    Raises:
        ReportError: one is among them.
    """
    for result in found:
        if result.data["settings"].get("quick"):
            raise ReportError(f"{result.path} is of a trial (--quick), which is nothing to publish: measure without --quick")


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a generated file is stale")
    parser.add_argument(
        "--add", nargs="+", type=Path, default=[], metavar="FILE", help="result files of one machine to take in first"
    )
    parser.add_argument("--replace", action="store_true", help="--add may lose figures that the new files do not have")
    arguments = parser.parse_args(argv)
    if arguments.check and arguments.add:
        parser.error("--check writes nothing and --add does: give one of them")
    if arguments.replace and not arguments.add:
        parser.error("--replace is about --add: give the files to take in")
    folder = root / "benchmarks" / "results"
    try:
        if arguments.add:
            print(f"wrote {add(arguments.add, folder, replace=arguments.replace)}")
        found = read(folder)
        check_publishable(found)
        results = by_machine(found)
        if not arguments.check:
            write(results, root)
        elif old := stale(results, root) + leftovers(results, root):
            names = ", ".join(str(path.relative_to(root)) for path in old)
            raise ReportError(f"not what benchmarks/results says: {names}; run {COMMAND}")
    except (ReportError, ChartError) as error:
        print(f"benchmarks.report: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

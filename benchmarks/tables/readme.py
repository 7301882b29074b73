"""The README's section on a device: of each machine the tables, the largest errors, what has no time, and links."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.reading import MODULES, Result, case_of, headline, one, our_provider
from benchmarks.tables.markdown import bullets, plain
from benchmarks.tables.modules import module_tables
from benchmarks.tables.networks import memory_and_host, network_tables
from benchmarks.tables.page import page_name
from benchmarks.tables.remarks import NOTE, captions, ceilings, facts, not_run, reasons
from googlenet_fused.bench import BASELINE, DTYPES, NETWORKS

SECTIONS = {"cpu": "CPU", "cuda": "GPU"}
"""The README's two sections, by device, as they are spoken of; their markers have the same words in small letters."""


def markers(device: str) -> tuple[str, str]:
    """The two lines of the README between which a device's section stands."""
    name = SECTIONS[device].lower()
    return f"<!-- results:{name}:begin -->", f"<!-- results:{name}:end -->"


def section(results: Sequence[Result], device: str) -> str:
    """What stands in the README from one marker of a device to the other, markers included.

    Args:
        results: one for each machine; those of other devices are passed over.
    """
    begin, end = markers(device)
    here = [result for result in results if result.device == device]
    body = [machine_part([result]) for result in here]
    missing = without_figures(here)
    name = SECTIONS[device]
    if not here:
        body.append(f"**No {name} figures yet.** Nothing was measured on a {name}. These tables wait for it:")
    elif missing:
        body.append(f"No {name} figures yet for:")
    if missing:
        body += [bullets(missing), "Nothing is estimated: a figure stands here once it was measured."]
    return "\n\n".join([f"{begin}\n{NOTE}", *body, end])


def without_figures(results: Sequence[Result]) -> list[str]:
    """The tables for which no result has a time of any provider."""
    timed = [case_of(row) for result in results for row in result.rows if headline(row) is not None]
    inference = {case.subject for case in timed if case.mode == "inference"}
    missing = [f"the whole network, {subject} variant, inference" for subject in NETWORKS if subject not in inference]
    modules = [name for name in MODULES if name not in inference]
    if modules:
        which = "the nine modules" if len(modules) == len(MODULES) else f"the modules {', '.join(modules)}"
        missing.append(f"{which}, inference")
    if not any(case.mode == "training" for case in timed):
        missing.append("the training step of the whole network")
    return missing


def machine_part(results: Sequence[Result]) -> str:
    """The README's part on one machine.

    Raises:
        ReportError: the results are of two machines; the message names both.
    """
    result = one(results)
    parts = [
        f"### {plain(result.machine)}",
        facts(result),
        ceilings(result),
        *network_tables(result, "inference"),
        *module_tables(result),
        *network_tables(result, "training"),
        *_accuracy(result),
        *memory_and_host(result),
        *reasons(result.rows),
        *not_run(result),
        *_charts(result),
        f"All figures of this machine, of every provider: [docs/{page_name(result)}](docs/{page_name(result)}); as CSV: "
        f"[benchmarks/results/{result.stem}.csv](benchmarks/results/{result.stem}.csv).",
    ]
    return "\n\n".join(parts)


def _accuracy(result: Result) -> list[str]:
    """The largest errors, over all that was measured in one mode, of ours and of PyTorch in both memory formats."""
    named = (BASELINE, "channels_last", our_provider(result))
    found = []
    for mode, of in (
        ("inference", "relative to the largest value of the output"),
        ("training", "of a parameter's gradient, root mean square relative to its own"),
    ):
        said = []
        for dtype in DTYPES:
            worst: dict[str, float] = {}
            for row in result.rows:
                case = case_of(row)
                known = row["provider"] in named and row["max_error"] is not None
                if known and (case.dtype, case.mode) == (dtype, mode):
                    worst[row["title"]] = max(row["max_error"], worst.get(row["title"], 0.0))
            if worst:
                said.append(f"{dtype}: " + " / ".join(f"{plain(title)} {error:.1e}" for title, error in worst.items()))
        if said:
            found.append(f"**Largest error** against fp64, {mode}, {of}: {'; '.join(said)}.")
    return found


def _charts(result: Result) -> list[str]:
    """The first chart as a picture, the others as links."""
    links = [f"[{caption}](docs/{name})" for name, caption in captions(result).items()]
    if not links:
        return []
    first, *others = links
    return [f"!{first}", *([f"{'; '.join(others)}."] if others else [])]

"""The demonstration: plain and fused GoogLeNet side by side on real photographs, judged against fp64 and timed.

Plain PyTorch is timed in the channels_last memory format too: much of the time can be saved by that one-line change alone.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast
from urllib.error import URLError

import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from googlenet_fused import FusionMismatch, FusionReport, fuse, googlenet
from googlenet_fused.bench import Timing, interleaved, machine_description
from googlenet_fused.charts import Bar, ChartError, PhotographResult, demo_chart
from googlenet_fused.images import CROP_SIDE, RESIZE_SIDE, ImageError, load_image, preprocess, sample_photographs
from googlenet_fused.models import VariantName
from googlenet_fused.preparation import PREPARATIONS, Preparation
from googlenet_fused.progress import progress_bar
from googlenet_fused.randomize import calibrate_batch_norm, randomize_
from googlenet_fused.tolerance import judge
from googlenet_fused.weights import GoogLeNet_Weights, WeightsError, load_weights
from googlenet_fused.weights.conversion import understand
from googlenet_fused.weights.published import PublishedWeights

logger = logging.getLogger("googlenet_fused")

TOP = 5
ROUNDS = 20
UNSTEADY = 1.5
"""How many times the 20th percentile of a network's times the 80th may be before the timing is called unreliable."""

TITLES = {"plain": "plain", "channels_last": "plain, channels_last", "fused": "fused"}
"""What is timed, by its name in ``demo.json``, as tables and charts call it."""


class DemoError(Exception):
    """The demonstration cannot run, or the two networks disagree; the message is one line."""


@dataclass(frozen=True)
class Network:
    """A plain network, its weights in words, and labels only where the weights were trained on them.

    ``path`` is the file of the weights; seeded ones have none. ``preparation``, ``resize`` and ``crop`` are how it wants its
    images, as ``preprocess`` takes them.
    """

    model: nn.Module
    weights: str
    labels: Sequence[str] | None
    path: Path | None = None
    preparation: Preparation = PREPARATIONS["torchvision"]
    resize: int = RESIZE_SIDE
    crop: int = CROP_SIDE

    def prepare(self, image: Image.Image) -> Tensor:
        """An RGB image as the network's input, ``[3, crop, crop]``. Raises ``ImageError`` as ``preprocess`` does."""
        return preprocess(image, self.preparation, resize=self.resize, crop=self.crop)

    def label(self, index: int) -> str:
        return self.labels[index] if self.labels else f"class {index}"


@dataclass(frozen=True)
class Outcome:
    """What was measured: logits ``[photographs, 1000]``, and the largest logit error and the time of each of ``TITLES``.

    ``backend`` is what ran the fused network, as ``FusionReport.backends`` gives it.
    """

    network: Network
    backend: str
    photographs: Mapping[str, Image.Image]
    plain: Tensor
    fused: Tensor
    errors: Mapping[str, float]
    timings: Mapping[str, Timing]

    def speedup(self, of: str = "fused", over: str = "plain") -> float:
        return self.timings[over].median / self.timings[of].median

    @property
    def unsteady(self) -> list[str]:
        """What took so uneven times that they cannot be relied on."""
        return [name for name, timing in self.timings.items() if timing.p80 > UNSTEADY * timing.p20]

    @property
    def agreeing(self) -> int:
        """On how many photographs the most probable classes are the same ones in the same order."""
        return int((self.plain.topk(self.top).indices == self.fused.topk(self.top).indices).all(1).sum())

    @property
    def top(self) -> int:
        """How many classes are named of each photograph: ``TOP``, or as many as there are."""
        return min(TOP, self.plain.shape[1])

    @cached_property
    def results(self) -> list[PhotographResult]:
        """Each photograph with the plain network's most probable classes and both networks' probabilities for them."""
        found = []
        for (name, image), plain, fused in zip(self.photographs.items(), self.plain, self.fused, strict=True):
            p, f = plain.softmax(0), fused.softmax(0)
            rows = [(self.network.label(i), p[i].item(), f[i].item()) for i in p.topk(self.top).indices.tolist()]
            found.append(PhotographResult(name, image, rows))
        return found


def seeded_network(variant: VariantName = "torchvision", seed: int = 0, *, transform_input: bool = False) -> nn.Module:
    """An untrained network with seeded weights whose batch norms are calibrated on the sample photographs, in eval mode.

    Raises:
        ImportError: scikit-image, which holds the photographs, is missing.
        ImageError: one of the photographs cannot be read.
        ValueError: ``transform_input`` is for a variant other than torchvision's.
    """
    model = randomize_(googlenet(variant, aux_logits=False, transform_input=transform_input, init_weights=False), seed)
    prepare = partial(preprocess, preparation=PREPARATIONS[variant])
    photographs = torch.stack([prepare(load_image(path)) for path in sample_photographs().values()])
    return calibrate_batch_norm(model, photographs).eval()


def load_network(
    source: str | Path | PublishedWeights, variant: VariantName | None = None, *, transform_input: bool = False
) -> Network:
    """The network with trained weights, in eval mode. A warning says what is assumed of a file that does not say what it is.

    Args:
        source: as ``load_weights`` takes it.
        variant: which GoogLeNet the weights are for; None takes what the file says, or its keys tell.
        transform_input: whether the weights expect input in [-1, 1]; it is known of files that say so.

    Raises:
        WeightsError: the weights cannot be had or read, do not fit, or say of themselves what cannot be; or
            ``transform_input`` is for a variant other than torchvision's.
        ImportError: torchvision, which knows the labels, or a package that reads the file is missing.
    """
    path, contents, said = understand(source, variant, transform_input=transform_input)
    held = cast(VariantName, said.variant)
    model = googlenet(
        held, num_classes=said.num_classes, aux_logits=False, transform_input=said.transform_input, init_weights=False
    )
    if said.crop < model.min_side:
        raise WeightsError(f"{path}: images of {said.crop}x{said.crop} are too small for {held}, which takes {model.min_side}")
    load_weights(model, path)
    if contents.published is not None:
        words = _PUBLISHERS[held]
    else:
        words = f"the weights in {path}"
        if contents.description is None:
            assumed = _assumed_input(held, transform_input)
            logger.warning("%s is not the published file; assumed are %s", path, f"ImageNet's classes and {assumed}")
    labels = said.classes or _imagenet_labels(said.num_classes)
    return Network(model.eval(), words, labels, path, PREPARATIONS[held], said.resize, said.crop)


_PUBLISHERS = {"torchvision": "torchvision's published ImageNet weights", "bvlc": "BVLC's published ImageNet weights"}


def _imagenet_labels(num_classes: int) -> list[str] | None:
    """ImageNet's classes for a classifier of their number, or of one more for the background, which TF-slim puts first."""
    names: list[str] = GoogLeNet_Weights.DEFAULT.meta["categories"]
    return {len(names): names, len(names) + 1: ["background", *names]}.get(num_classes)


def _assumed_input(variant: VariantName, transform_input: bool) -> str:
    """What input weights that do not say what they are are taken to expect: a wrong assumption would go unseen."""
    if variant != "torchvision":
        return f"input as the {variant} variant's: {PREPARATIONS[variant]}"
    if transform_input:
        return "input mapped to [-1, 1], as for the published weights (--transform-input)"
    return "input with ImageNet's mean and deviation; for a conversion of the published weights give --transform-input"


def choose_network(weights: Path | None = None, *, transform_input: bool = False) -> tuple[Network, str | None]:
    """The network with the weights of a file or, without one, the published weights where they can be had, else seeded ones.

    Returns:
        The network and, if its weights are seeded, why the published ones cannot be had.

    Raises:
        DemoError: the file cannot be loaded.
    """
    try:
        return load_network(weights or GoogLeNet_Weights.DEFAULT, transform_input=transform_input), None
    except WeightsError as error:
        if weights is not None:
            raise DemoError(str(error)) from error
        return Network(seeded_network(transform_input=transform_input), "seeded, untrained weights", None), _reason(error)


def _reason(error: WeightsError) -> str:
    """Why a download failed, without its address, which was shown when it began; else the whole message."""
    cause = error.__cause__
    why = cause.reason if type(cause) is URLError else cause
    return str(why or "") or str(error)


def run(
    output: Path,
    *,
    weights: Path | None = None,
    transform_input: bool = False,
    rounds: int = ROUNDS,
    console: Console | None = None,
) -> Outcome:
    """Runs the demonstration, prints it, and writes ``demo.png`` and ``demo.json`` into a folder.

    Args:
        weights: a file; without one torchvision's published weights, or else seeded ones.
        transform_input: whether the weights expect input in [-1, 1]; of the published ones it is known.
        rounds: rounds of the timing, 5 calls of each network a round.

    Raises:
        DemoError: the photographs or the weights cannot be read, or the fused network disagrees with the plain one.
        ImportError: an optional package is missing.
    """
    console = console or Console(highlight=False)
    try:
        photographs = {name: load_image(path) for name, path in sample_photographs().items()}
    except ImageError as error:
        raise DemoError(str(error)) from error
    console.print(
        f"This runs GoogLeNet on {len(photographs)} photographs twice, as plain PyTorch and with its Inception modules fused, "
        "to show that both give the same answers and how much time fusing saves.\n"
    )
    network, reason = choose_network(weights, transform_input=transform_input)
    _print_weights(console, network, reason)
    try:
        x = torch.stack([network.prepare(image) for image in photographs.values()])  # [photographs, 3, crop, crop]
    except ImageError as error:
        raise DemoError(str(error)) from error
    outcome = _compare(console, network, photographs, x, rounds)
    for place in range(len(photographs)):
        console.print(_top_table(outcome, place))
    console.print(_summary_table(outcome))
    _print_summary(console, outcome, _write(console, outcome, output))
    return outcome


def _print_weights(console: Console, network: Network, reason: str | None) -> None:
    console.print(f"[bold]Weights:[/bold] {escape(network.weights)}.", soft_wrap=True)
    if reason is not None:
        console.print(f"The published ones cannot be had here: {reason}", markup=False, soft_wrap=True)
        console.print("[bold]The class numbers below mean nothing[/bold]; for real ones give --weights FILE.", soft_wrap=True)


def _compare(console: Console, network: Network, photographs: Mapping[str, Image.Image], x: Tensor, rounds: int) -> Outcome:
    """Fuses, judges, and times the networks taking turns at batch 1."""
    plain = network.model
    try:
        fused = fuse(plain)
    except FusionMismatch as error:
        raise DemoError(str(error)) from error
    report: FusionReport = fused.fusion_report  # type: ignore[assignment]
    backend = report.backends
    modules = sum(block.kind == "inception" for block in report.fused)
    convolutions = sum(block.kind == "conv" for block in report.fused)
    console.print(
        f"[bold]Fused:[/bold] {modules} Inception modules and {convolutions} convolutions of the stem, run by the "
        f"[bold]{backend}[/bold] backend and each checked against the plain block; {len(report.skipped)} blocks left plain.\n"
    )
    with torch.inference_mode():
        comparison = judge(fused, plain, x)
        if not comparison.ok:
            raise DemoError(f"the fused network {comparison}")
        truth = copy.deepcopy(plain).double()(x.double())
        channels_last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
        runs = {
            "plain": (plain, x),
            "channels_last": (channels_last, x.contiguous(memory_format=torch.channels_last)),
            "fused": (fused, x),
        }
        logits = {name: model(images) for name, (model, images) in runs.items()}
        errors = {name: (value.double() - truth).abs().max().item() for name, value in logits.items()}
        calls = {name: partial(model, images[:1]) for name, (model, images) in runs.items()}
        with progress_bar(len(calls) * rounds, "timing") as advance:
            timings = interleaved(calls, rounds, advance=advance)
    return Outcome(network, backend, photographs, logits["plain"], logits["fused"], errors, timings)


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", caption_justify="left", box=box.SIMPLE_HEAD, min_width=64
    )


def _top_table(outcome: Outcome, place: int) -> Table:
    """The most probable classes of both networks for one photograph, side by side."""
    result = outcome.results[place]
    table = _table(f"{result.name} ({result.image.width}x{result.image.height})")
    table.add_column("", justify="right")
    for heading in ("plain", "fused"):
        table.add_column(heading)
        table.add_column("%", justify="right")
    tops = [logits[place].softmax(0).topk(outcome.top) for logits in (outcome.plain, outcome.fused)]
    for rank in range(outcome.top):
        cells = [(outcome.network.label(int(t.indices[rank])), f"{100 * t.values[rank].item():.4f}") for t in tops]
        table.add_row(str(rank + 1), *cells[0], *cells[1])
    return table


def _summary_table(outcome: Outcome) -> Table:
    table = _table("Accuracy and time")
    table.add_column("network", no_wrap=True)
    for heading in ("largest error", "ms an image", "p20 to p80", "speed-up"):
        table.add_column(heading, justify="right")
    for name, timing in outcome.timings.items():
        spread = f"{timing.p20:.1f} to {timing.p80:.1f}"
        speedup = f"{outcome.speedup(name):.2f}x"
        table.add_row(TITLES[name], f"{outcome.errors[name]:.1e}", f"{timing.median:.1f}", spread, speedup)
    calls, threads = outcome.timings["plain"].n, torch.get_num_threads()
    table.caption = (
        f"Error: of the logits, against the same network in fp64; the largest logit is {outcome.plain.abs().max():.2g}.\n"
        f"Time: median of {calls} calls at batch 1, taking turns, on {threads} thread{'s' if threads > 1 else ''}."
    )
    return table


def _write(console: Console, outcome: Outcome, output: Path) -> list[Path]:
    """Writes the report and, where matplotlib is there, the chart; returns what was written."""
    output.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "machine": machine_description(),
        "weights": outcome.network.weights,
        "backend": outcome.backend,
        "photographs": {
            result.name: [{"label": label, "plain": plain, "fused": fused} for label, plain, fused in result.rows]
            for result in outcome.results
        },
        "largest_logit_error": dict(outcome.errors),
        "ms": {name: timing.to_json() for name, timing in outcome.timings.items()},
        "speedup": outcome.speedup(),
        "speedup_over_channels_last": outcome.speedup(over="channels_last"),
    }
    report, chart = output / "demo.json", output / "demo.png"
    report.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    bars = [
        Bar(TITLES[name], t.median, t.p20, t.p80, f"{t.median:.1f} ms ({outcome.speedup(name):.2f}x)", name == "fused")
        for name, t in outcome.timings.items()
    ]
    subtitle = outcome.network.weights + ("" if outcome.network.labels else ": the class numbers mean nothing")
    try:
        return [demo_chart(outcome.results, bars, chart, subtitle=subtitle), report]
    except ChartError as error:
        console.print(f"No chart: {error}", markup=False)
        return [report]


def _print_summary(console: Console, outcome: Outcome, written: Sequence[Path]) -> None:
    errors, timings = outcome.errors, outcome.timings
    console.print(
        f"[bold]Summary:[/bold] both networks name the same top {outcome.top}, in the same order, on {outcome.agreeing} of "
        f"{len(outcome.photographs)} photographs. Against fp64 the largest logit error is {errors['plain']:.1e} plain and "
        f"{errors['fused']:.1e} fused. Fused takes {timings['fused'].median:.1f} ms an image instead of "
        f"{timings['plain'].median:.1f} ms: [bold]{outcome.speedup():.2f}x as fast as PyTorch, and "
        f"{outcome.speedup(over='channels_last'):.2f}x as fast as PyTorch in channels_last[/bold]."
    )
    if outcome.unsteady:
        console.print(
            f"[bold]The timing is unreliable[/bold]: p80 is more than {UNSTEADY}x p20. Run it again on an idle machine.",
            soft_wrap=True,
        )
    console.print(f"Wrote {' and '.join(map(str, written))}.", markup=False, soft_wrap=True)

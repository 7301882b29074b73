"""Timing that can be believed: a correctness gate first, then all providers interleaved in one run.

A *provider* is one way of running a network. It is built for a `Workload` (a seeded network, its dtype and batch), bound to an
input, and then called. Before anything is timed every provider runs on fresh random inputs and is judged against an fp64 run of
the same network by the package's tolerance law; one that fails gets the failure recorded and no time.

Runtimes disturb each other: the threads of one keep spinning for a while after its call returned, and a oneDNN call that starts
while another runtime's threads still hold a core can take several times as long. So providers take turns in small blocks, not
single calls: each block waits for ``settle`` seconds, makes one call that is not counted (caches and threads are then its own)
and times the next ``calls``. The order of the blocks is drawn anew in every round.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from googlenet_fused.backends.registry import BackendError
from googlenet_fused.charts import Bar, Panel
from googlenet_fused.convert import fuse
from googlenet_fused.info import machine_description
from googlenet_fused.models import VariantName, googlenet
from googlenet_fused.randomize import randomize_
from googlenet_fused.tolerance import Comparison, compare, references

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "BASELINE",
    "DTYPES",
    "Case",
    "Provider",
    "Row",
    "Schedule",
    "Timing",
    "Unavailable",
    "Workload",
    "build_workload",
    "interleaved",
    "latency_panels",
    "machine_description",
    "measure",
    "package_providers",
    "print_results",
    "progress_bar",
    "torch_threads",
    "wall_clock",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BASELINE = "eager"
"""The provider whose output sets the tolerance and whose time is 1.0x: plain PyTorch, run as a user would."""

Call = Callable[[], object]
Bind = Callable[[Tensor], Callable[[], Tensor]]
Clock = Callable[[Call], float]
Status = Literal["ok", "wrong", "unavailable"]


class Unavailable(Exception):
    """A provider cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of ``n`` calls: the median and the 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float
    n: int
    ms: tuple[float, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def of(cls, ms: Sequence[float]) -> Timing:
        """Summarises samples in milliseconds.

        Raises:
            ValueError: there are no samples.
        """
        if not ms:
            raise ValueError("Timing.of: ms must hold at least one sample, got none")
        deciles = statistics.quantiles(ms, n=10, method="inclusive") if len(ms) > 1 else [ms[0]] * 9
        return cls(statistics.median(ms), deciles[1], deciles[7], len(ms), tuple(ms))

    def to_json(self) -> dict[str, float]:
        """The summary without the samples."""
        return {"median": self.median, "p20": self.p20, "p80": self.p80, "n": self.n}


@dataclass(frozen=True)
class Schedule:
    """How long to measure: for each provider ``warmup`` untimed calls, then ``rounds`` blocks of ``calls`` timed ones."""

    rounds: int = 20
    calls: int = 5
    warmup: int = 3
    settle: float = 0.05

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("calls", 1), ("warmup", 0), ("settle", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"Schedule: {name} must be at least {least}, got {value!r}")


def wall_clock(call: Call) -> float:
    """Milliseconds that one call takes by the wall clock."""
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e6


def interleaved(
    providers: Mapping[str, Call],
    rounds: int = 20,
    warmup: int = 3,
    *,
    calls: int = 5,
    settle: float = 0.05,
    clock: Clock = wall_clock,
    seed: int = 0,
    advance: Call = lambda: None,
) -> dict[str, Timing]:
    """Times providers against each other in one run; the module's docstring says why in blocks.

    Args:
        providers: a call of no arguments for each name.
        clock: takes a call and returns its milliseconds; the place to put device events for asynchronous devices.
        advance: called after each block, ``rounds * len(providers)`` times: for a progress bar.

    Raises:
        ValueError: a count is out of range.
    """
    Schedule(rounds, calls, warmup, settle)
    samples: dict[str, list[float]] = {name: [] for name in providers}
    for call in providers.values():
        for _ in range(warmup):
            call()
    order, draw = list(providers), random.Random(seed)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            call = providers[name]
            time.sleep(settle)
            call()
            samples[name].extend(clock(call) for _ in range(calls))
            advance()
    return {name: Timing.of(ms) for name, ms in samples.items()}


@dataclass(frozen=True)
class Case:
    """What is run: a variant of the network on ``[batch, 3, side, side]`` in a dtype of `DTYPES`."""

    variant: VariantName = "torchvision"
    batch: int = 1
    dtype: str = "fp32"
    side: int = 224

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"Case: dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.batch < 1:
            raise ValueError(f"Case: batch must be at least 1, got {self.batch!r}")

    def __str__(self) -> str:
        return f"{self.variant}, batch {self.batch}, {self.dtype}"


@dataclass(frozen=True)
class Workload:
    """A case with its network, ``model``, in the case's dtype."""

    case: Case
    model: nn.Module

    def input(self, seed: int) -> Tensor:
        """Seeded normal noise ``[batch, 3, side, side]``, contiguous, already rounded to the case's dtype."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.case.batch, 3, self.case.side, self.case.side)
        return torch.randn(shape, generator=generator).to(DTYPES[self.case.dtype])


@dataclass(frozen=True)
class Provider:
    """One way of running the network: ``build(workload)`` prepares it, or raises `Unavailable`, and returns ``bind``.

    ``bind(x)`` puts an input into the form that the provider takes, untimed, and returns the call that is timed.
    """

    name: str
    title: str
    build: Callable[[Workload], Bind]


@dataclass(frozen=True)
class Row:
    """One provider on one case. ``speedup`` is against the baseline of the same run.

    Errors are of the logits against the fp64 truth: the largest relative to the largest logit, and root mean square likewise.
    """

    case: Case
    provider: str
    title: str
    status: Status
    reason: str | None = None
    timing: Timing | None = None
    speedup: float | None = None
    max_error: float | None = None
    rms_error: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self.case),
            "provider": self.provider,
            "title": self.title,
            "status": self.status,
            "reason": self.reason,
            "ms": None if self.timing is None else self.timing.to_json(),
            "speedup": self.speedup,
            "relative_error": None if self.max_error is None else {"max": self.max_error, "rms": self.rms_error},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        ms, error = data["ms"], data["relative_error"] or {}
        return cls(
            Case(data["variant"], data["batch"], data["dtype"], data["side"]),
            data["provider"],
            data["title"],
            data["status"],
            data["reason"],
            None if ms is None else Timing(ms["median"], ms["p20"], ms["p80"], ms["n"]),
            data["speedup"],
            error.get("max"),
            error.get("rms"),
        )


def build_workload(case: Case, seed: int = 0) -> Workload:
    """A network with seeded, non-degenerate weights and statistics (fresh ones would make every logit equal its bias)."""
    model = randomize_(googlenet(case.variant, aux_logits=False, init_weights=False), seed).eval().to(DTYPES[case.dtype])
    return Workload(case, model)


def _eager(workload: Workload) -> Bind:
    return lambda x: lambda: workload.model(x)


def _eager_channels_last(workload: Workload) -> Bind:
    model = copy.deepcopy(workload.model).to(memory_format=torch.channels_last)

    def bind(x: Tensor) -> Callable[[], Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        return lambda: model(x)

    return bind


def fused_provider(backend: str = "auto") -> Provider:
    """This package's fused network. It gets the same contiguous input as plain PyTorch: any change of layout is in its time."""

    def build(workload: Workload) -> Bind:
        try:
            model = fuse(workload.model, backend=backend)
        except BackendError as error:
            raise Unavailable(str(error)) from error
        return lambda x: lambda: model(x)

    return Provider(f"fused_{backend}", f"googlenet_fused, {backend}", build)


def package_providers(backend: str = "auto") -> list[Provider]:
    """Plain PyTorch in both memory formats, and the fused network: what ``googlenet-fused bench`` compares."""
    return [
        Provider(BASELINE, "PyTorch", _eager),
        Provider("eager_channels_last", "PyTorch, channels_last", _eager_channels_last),
        fused_provider(backend),
    ]


def measure(
    workload: Workload,
    providers: Sequence[Provider],
    schedule: Schedule,
    *,
    clock: Clock = wall_clock,
    advance: Call = lambda: None,
) -> list[Row]:
    """Builds, checks and times providers on one workload; rows come in the order of ``providers``.

    Args:
        providers: the one named `BASELINE` must be among them.
        advance: called after each timed block, at most ``schedule.rounds * len(providers)`` times.

    Raises:
        ValueError: the baseline is missing.
        Unavailable: the baseline cannot run the case, so there is nothing to compare with.
    """
    if BASELINE not in [provider.name for provider in providers]:
        raise ValueError(f"measure: providers must include the baseline {BASELINE!r}, got {[p.name for p in providers]}")
    rows: dict[str, Row] = {}
    bound: dict[str, Bind] = {}
    with torch.inference_mode():
        for provider in providers:
            try:
                bound[provider.name] = provider.build(workload)
            except Unavailable as reason:
                if provider.name == BASELINE:
                    raise
                rows[provider.name] = Row(workload.case, provider.name, provider.title, "unavailable", str(reason))
            except Exception as error:  # a provider that breaks is its own result, and the others go on
                if provider.name == BASELINE:
                    raise
                rows[provider.name] = Row(workload.case, provider.name, provider.title, "wrong", _first_line(error))
        known = {provider.name: provider for provider in providers}
        gated = _gate(workload, [(known[name], bind) for name, bind in bound.items()])
        for name, failure in gated.failures.items():
            rows[name] = Row(workload.case, name, known[name].title, "wrong", failure)
        x = workload.input(seed=0)
        calls = {name: bind(x) for name, bind in bound.items() if name not in gated.failures}
        timings = interleaved(
            calls,
            schedule.rounds,
            schedule.warmup,
            calls=schedule.calls,
            settle=schedule.settle,
            clock=clock,
            advance=advance,
        )
    for name, timing in timings.items():
        speedup = timings[BASELINE].median / timing.median
        worst = gated.worst[name]
        rows[name] = Row(workload.case, name, known[name].title, "ok", None, timing, speedup, worst.max_error, worst.rms_error)
    return [rows[provider.name] for provider in providers]


@dataclass
class _Gate:
    worst: dict[str, Comparison] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def _gate(workload: Workload, bound: Sequence[tuple[Provider, Bind]], inputs: int = 2) -> _Gate:
    """Judges each provider on fresh inputs; two, so that one which returns an earlier answer again is caught."""
    gate = _Gate()
    for seed in range(1, 1 + inputs):
        x = workload.input(seed)
        try:
            judged_by = references(workload.model, x)
        except (NotImplementedError, RuntimeError) as error:
            raise Unavailable(f"plain PyTorch cannot run {workload.case} here: {_first_line(error)}") from error
        for provider, bind in bound:
            name = provider.name
            if name in gate.failures:
                continue
            try:
                comparison = compare(bind(x)().to(x.dtype), *judged_by)
            except Exception as error:  # whatever a provider does wrong is its own result, and the others go on
                gate.failures[name] = _first_line(error)
                continue
            gate.worst[name] = max(gate.worst.get(name, comparison), comparison, key=lambda c: c.max_error)
            if not comparison.ok:
                gate.failures[name] = str(comparison)
    return gate


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


@contextmanager
def torch_threads(count: int | None) -> Iterator[int]:
    """Runs a block with ``count`` torch threads (``None``: as they are) and puts the number back afterwards.

    Raises:
        ValueError: ``count`` is below 1.
    """
    before = torch.get_num_threads()
    if count is not None:
        if count < 1:
            raise ValueError(f"threads must be at least 1, got {count}")
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@contextmanager
def progress_bar(total: int, title: str) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error that vanishes when done; yields ``advance()``. Silent when it is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)


def latency_panels(rows: Sequence[Row]) -> list[Panel]:
    """One chart panel for each case that has timings, with a bar for each provider that has one."""
    panels: dict[Case, list[Bar]] = {}
    for row in rows:
        if row.timing is not None:
            note = f"{row.timing.median:.1f} ms  ({row.speedup:.2f}x)"
            bar = Bar(row.title, row.timing.median, row.timing.p20, row.timing.p80, note, row.provider.startswith("fused"))
            panels.setdefault(row.case, []).append(bar)
    return [Panel(str(case), bars) for case, bars in panels.items()]


def print_results(rows: Sequence[Row], threads: int, console: Console) -> None:
    """Prints a table for each case, and under it why a provider has no time."""
    from rich import box
    from rich.table import Table

    for case in dict.fromkeys(row.case for row in rows):
        of_case = [row for row in rows if row.case == case]
        calls = max((row.timing.n for row in of_case if row.timing is not None), default=0)
        title = f"{case}: ms a call, {calls} calls each"
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, min_width=76)
        table.add_column("", ratio=1)
        for column in ("median", "p20", "p80", "speed-up", "error"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in of_case:
            timing = row.timing
            if timing is None:
                table.add_row(f"{row.title} ({row.status})")
                continue
            cells = (f"{timing.median:.2f}", f"{timing.p20:.2f}", f"{timing.p80:.2f}")
            table.add_row(row.title, *cells, f"{row.speedup:.2f}x", f"{row.max_error:.1e}")
        console.print(table)
        for row in of_case:
            if row.reason is not None:
                console.print(f"{row.title}, {row.status}: {row.reason}\n", markup=False)
    console.print(
        f"{threads} torch thread{'s' if threads > 1 else ''}. Speed-up: median against PyTorch in the same run. "
        "Error: the largest of the logits, against an fp64 run and relative to the largest logit."
    )

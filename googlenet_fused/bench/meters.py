"""What can be timed on a device, and how: one meter for CPUs, one for CUDA.

The metrics, all in milliseconds a call:

* ``wall``: eager wall time, the device synchronised before and after.
* ``wall_cold``: the same while calls rotate through inputs that together exceed the last cache; outputs rotate with them.
  Weights are the same ones each time, as in a server that runs one network.
* ``graph``: device time of a call in a replayed CUDA graph.
* ``graph_cold``: the same for a graph of calls on rotated buffers.
* ``host``: until the call returns to the host, on an idle device: what a call costs the processor.

A CPU has the first two. A provider that replays CUDA graphs itself has no ``graph``: its calls cannot be captured in another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from googlenet_fused.bench.memory import CpuMemory, CudaMemory
from googlenet_fused.bench.provider import Bind, Run, TrainingStep
from googlenet_fused.bench.timing import Call, Schedule, Turn, wall_clock, wall_turn
from googlenet_fused.messages import first_line

METRICS = ("graph", "graph_cold", "wall", "wall_cold", "host")

BEYOND = 1.25
"""Rotated buffers hold this many times the last cache."""

MOST_COPIES = 512
BLOCK_MS = 50.0
FEWEST_CALLS, MOST_CALLS = 2, 30
GRAPH_MS = 1.0
MOST_REPEATS = 32


def headline(metrics: Sequence[str]) -> str:
    """The metric by which providers are compared: the device's time in a CUDA graph where there is one, else the wall time."""
    return "graph" if "graph" in metrics else "wall"


def last_cache_bytes() -> int:
    """Size of the first processor's largest cache (Linux); 32 MiB where it cannot be read."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes, default=32 * 2**20)


class DeviceBroken(Exception):
    """A device answers no more; the message says after whom."""


class Rotation:
    """Calls on one input after another; with ``keep`` outputs live until their turn comes again, so that they rotate too."""

    def __init__(self, runs: Sequence[Run], *, keep: bool = True) -> None:
        self.runs = list(runs)
        self.kept: list[Tensor | None] = [None] * (len(runs) if keep else 0)
        self.at = 0

    def __call__(self) -> None:
        at = self.at
        self.at = (at + 1) % len(self.runs)
        output = self.runs[at]()
        if self.kept:
            self.kept[at] = output


def rotated(bind: Bind, inputs: Callable[[int], Tensor], example: Run, cache: int, *, keep: bool = True) -> Rotation:
    """A rotation whose inputs and outputs exceed a cache of so many bytes.

    Args:
        inputs: gives the input of a seed.
        example: a call, to see how large its output is.
        keep: whether outputs are kept; a provider that replays CUDA graphs itself writes to the same memory each time.
    """
    each = inputs(0).nbytes + example().nbytes
    copies = min(MOST_COPIES, max(2, -(-int(BEYOND * cache) // each)))
    return Rotation([bind(inputs(seed)) for seed in range(copies)], keep=keep)


class CpuMeter:
    """Times calls by the wall clock."""

    def __init__(self) -> None:
        self.memory: CpuMemory | CudaMemory = CpuMemory()
        self.cache = last_cache_bytes()

    def turns(
        self, bind: Bind, inputs: Callable[[int], Tensor], schedule: Schedule, *, own_graph: bool = False
    ) -> tuple[dict[str, Turn], list[str]]:
        """A turn for each metric that this provider has, and why others are missing."""
        run = bind(inputs(0))
        each = _warm(run, schedule.warmup)
        calls = schedule.calls
        if schedule.seconds is not None:
            calls = min(MOST_CALLS, max(FEWEST_CALLS, int(BLOCK_MS / max(each, 1e-3))))
        turns = {"wall": self.turn(run, calls, schedule.settle)}
        if not isinstance(run, TrainingStep):
            turns["wall_cold"] = self.turn(rotated(bind, inputs, run, self.cache), calls, schedule.settle)
        return turns, []

    def turn(self, run: Call, calls: int, settle: float = 0.0) -> Turn:
        """The headline metric of a call: its wall time."""
        return wall_turn(run, calls, settle)

    def replayed(self, run: Run) -> Callable[[], Tensor] | None:
        """There are no graphs here."""
        return None

    def check(self, who: str) -> None:
        """A CPU that still runs this is not broken."""


class CudaMeter:
    """Times calls by the wall clock, and by events on the device."""

    def __init__(self) -> None:
        self.memory: CpuMemory | CudaMemory = CudaMemory()
        self.cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size

    def turns(
        self, bind: Bind, inputs: Callable[[int], Tensor], schedule: Schedule, *, own_graph: bool = False
    ) -> tuple[dict[str, Turn], list[str]]:
        """A turn for each metric that this provider has, and why others are missing."""
        run = bind(inputs(0))
        for _ in range(max(schedule.warmup, 1)):
            run()
        calls = schedule.calls
        turns: dict[str, Turn] = {
            "wall": lambda: self._samples(run, calls, self._wall),
            "host": lambda: self._samples(run, calls, self._host),
        }
        missing: list[str] = []
        rotation = None
        if not isinstance(run, TrainingStep):
            rotation = rotated(bind, inputs, run, self.cache, keep=not own_graph)
            turns["wall_cold"] = lambda: self._samples(rotation, calls, self._wall)
        if own_graph:
            return turns, ["no graph metric: it replays CUDA graphs of its own"]
        try:
            turns["graph"] = self.turn(run, calls)
            if rotation is not None:
                turns["graph_cold"] = self._graph_turn(rotation.runs, calls, keep=True)
        except Exception as error:  # whatever stops a capture is the provider's own; its wall time stands
            missing.append(f"no CUDA graph: {first_line(error)}")
            torch.cuda.synchronize()
        return turns, missing

    def turn(self, run: Run, calls: int) -> Turn:
        """The headline metric of a call: its device time in a replayed graph, of several calls if they take little time."""
        once = self._device_ms(self._capture([run], keep=False)[0].replay, 3)
        repeats = max(1, min(MOST_REPEATS, int(GRAPH_MS / max(once, 1e-3))))
        return self._graph_turn([run] * repeats, calls, keep=False)

    def replayed(self, run: Run) -> Callable[[], Tensor] | None:
        """A call captured in a CUDA graph: returns a function that replays it and returns its output, which is always the same
        memory."""
        graph, outputs = self._capture([run], keep=True)

        def replay() -> Tensor:
            graph.replay()
            torch.cuda.synchronize()
            return outputs[0]

        return replay

    def check(self, who: str) -> None:
        """Makes sure, after an error of ``who``, that the device still works: some errors of a kernel are its end.

        Raises:
            DeviceBroken: it does not.
        """
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceBroken(f"{who} broke the device: {first_line(error)}") from error

    def _capture(self, runs: Sequence[Run], *, keep: bool) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        """The graph of calls one after another; with ``keep`` each has an output of its own."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for run in dict.fromkeys(runs):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        outputs: list[Tensor] = []
        current = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, stream=stream):
                for run in runs:
                    output = run()
                    if keep:
                        outputs.append(output)
                    del output
        finally:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own
        return graph, outputs

    def _graph_turn(self, runs: Sequence[Run], samples: int, *, keep: bool) -> Turn:
        graph, outputs = self._capture(runs, keep=keep)
        for _ in range(2):
            graph.replay()
        torch.cuda.synchronize()
        count = len(runs)

        def turn() -> list[float]:
            assert len(outputs) == (count if keep else 0)  # they live as long as the graph that writes them
            return [self._device_ms(graph.replay, 1, lead=graph.replay) / count for _ in range(samples)]

        return turn

    @staticmethod
    def _samples(call: Callable[[], object], count: int, clock: Callable[[Callable[[], object]], float]) -> list[float]:
        call()
        return [clock(call) for _ in range(count)]

    @staticmethod
    def _wall(call: Callable[[], object]) -> float:
        torch.cuda.synchronize()

        def complete() -> None:
            call()
            torch.cuda.synchronize()

        return wall_clock(complete)

    @staticmethod
    def _host(call: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        ms = wall_clock(call)
        torch.cuda.synchronize()
        return ms

    @staticmethod
    def _device_ms(call: Callable[[], object], count: int, lead: Callable[[], object] = lambda: None) -> float:
        """Milliseconds of device time a call, of ``count`` back to back; ``lead`` keeps the device busy during their launch."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        lead()
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / count


Meter = CpuMeter | CudaMeter


def meter_for(device: torch.device) -> Meter:
    """The meter of a device.

    Raises:
        ValueError: it is neither a CPU nor a CUDA device.
    """
    if device.type == "cpu":
        return CpuMeter()
    if device.type == "cuda":
        return CudaMeter()
    raise ValueError(f"device must be a CPU or a CUDA device, got {str(device)!r}")


def failure(error: BaseException) -> str:
    """Why a provider failed, in one line."""
    return f"out of memory: {first_line(error)}" if isinstance(error, torch.OutOfMemoryError) else first_line(error)


def _warm(run: Run, count: int) -> float:
    """Calls ``count`` times, at least twice, and returns the last call's milliseconds."""
    for _ in range(max(count, 2) - 1):
        run()
    start = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - start) / 1e6

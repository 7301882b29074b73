"""The roofline of a case: how much arithmetic and memory traffic it needs at least, and how fast this machine does either.

FLOPs are two for each multiply-accumulate of the convolutions and the linear layer; pools, norms, biases and ReLUs are not
counted. Bytes are the least that passes through device memory if every *stage* of the network reads its input once and writes
its output once, nothing inside a stage is stored, and parameters are read once. The stages are

    conv1, pool1 (LRN); conv2's 1x1; conv2's 3x3, (LRN) pool2; the nine Inception modules, 3b and 4e each with the max pool
    after it and 5b with the average pool; the linear layer.

At 224x224 they move 2,819,176 elements an image, 5.64 MB in half precision. conv2's two convolutions in one stage would save
0.80 MB of that; the average pool in the linear layer's stage instead of 5b's would cost 0.20 MB.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import torch

from googlenet_fused.bench import DTYPES, Case, numerics
from googlenet_fused.bench.case import CLASSES
from googlenet_fused.bench.meters import last_cache_bytes
from googlenet_fused.bench.timing import Summary
from googlenet_fused.models.googlenet import VARIANTS, Variant, VariantName
from googlenet_fused.spec import GOOGLENET_SIDES, GOOGLENET_SPECS, STEM_WIDTH

IMAGE_CHANNELS = 3
MODULE_FORM = VARIANTS["bvlc"]
"""Cases of one module take the paper's form: a 5x5 in the third branch, convolutions with biases."""

PARAMETER_BYTES = 4
PARAMETER_PASSES = 8
"""How often a training step moves every parameter, always in fp32: the forward and the backward read it, the backward writes
its gradient, and SGD with momentum reads parameter, gradient and momentum and writes parameter and momentum."""

COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
LEAST_CACHES = 4
"""A copy on a CPU is at least this many times its last cache."""

ARITHMETIC_SIDE = {"cpu": 2048, "cuda": 8192}
SMALLEST_SIDE = 256
CONV_BATCH = 4
FEWEST_REPEATS = 3
WARMUP = 2


@dataclass(frozen=True)
class Stage:
    """A part of the network that stores nothing between its input and its output; elements and MACs are those of one image.

    Attributes:
        macs: multiply-accumulates of the convolutions or the linear layer.
        reads: elements of the input.
        writes: elements of the output.
        weights: of the convolutions or the linear layer.
        biases: one for every output channel of every convolution (batch norm folded in), or of the linear layer.
        trained: what an optimiser updates: the weights, and the biases or batch norm's scales and shifts.
    """

    name: str
    macs: int
    reads: int
    writes: int
    weights: int
    biases: int
    trained: int


@dataclass(frozen=True)
class Counts:
    """FLOPs of a case, and the least bytes that it moves through device memory."""

    flops: int
    bytes: int


class _Sides(NamedTuple):
    """Sides of the maps after conv1 and after each max pool."""

    conv1: int
    pool1: int
    pool2: int
    pool3: int
    pool4: int


def _sides(form: Variant, side: int) -> _Sides:
    """The network's maps for an image of ``side`` x ``side``.

    Raises:
        ValueError: the image is too small for the network's pools.
    """
    if side < form.min_side:
        raise ValueError(f"roofline: side must be at least {form.min_side} for this network, got {side}; the usual is 224")

    def pooled(length: int, kernel: int = 3) -> int:
        if form.same_padding:
            return -(-length // 2)
        return -(-(length - kernel) // 2) + 1  # stride 2 and ceil mode

    conv1 = (side - 1) // 2 + 1  # 7x7, stride 2, padding 3 or what comes to as many outputs
    pool1 = pooled(conv1)
    pool2 = pooled(pool1)
    pool3 = pooled(pool2)
    return _Sides(conv1, pool1, pool2, pool3, pooled(pool3, form.pool4_kernel))


def _per_channel(form: Variant) -> int:
    """What is trained for a convolution's output channel besides its weights: a scale and a shift, or a bias."""
    return 2 if form.norm == "batch" else 1


def _conv_stage(
    name: str, form: Variant, channels: tuple[int, int], kernel: int, side: int, own_side: int, out_side: int
) -> Stage:
    """A convolution from a map of ``side`` to one of ``own_side``, and what leaves ``out_side`` of it in the same stage."""
    in_channels, out_channels = channels
    weights = out_channels * in_channels * kernel**2
    return Stage(
        name,
        macs=weights * own_side**2,
        reads=in_channels * side**2,
        writes=out_channels * out_side**2,
        weights=weights,
        biases=out_channels,
        trained=weights + _per_channel(form) * out_channels,
    )


def _module_stage(name: str, form: Variant, side: int, out_side: int) -> Stage:
    """An Inception module on maps of ``side``, and a pool to ``out_side`` in the same stage if that is smaller."""
    spec = replace(GOOGLENET_SPECS[name], large_kernel=form.large_kernel)
    channels = sum(conv.out_channels for conv in spec.convs)
    return Stage(
        name,
        macs=spec.macs(side, side),
        reads=spec.in_channels * side**2,
        writes=spec.out_channels * out_side**2,
        weights=spec.weight_count,
        biases=channels,
        trained=spec.weight_count + _per_channel(form) * channels,
    )


def network_stages(form: Variant, side: int) -> list[Stage]:
    """The stages of a network without auxiliary heads, in order, for images of ``side`` x ``side``.

    Raises:
        ValueError: the image is too small for the network's pools.
    """
    sides = _sides(form, side)
    conv2_width = GOOGLENET_SPECS["3a"].in_channels
    stages = [
        _conv_stage("conv1", form, (IMAGE_CHANNELS, STEM_WIDTH), 7, side, sides.conv1, sides.pool1),
        _conv_stage("conv2 1x1", form, (STEM_WIDTH, STEM_WIDTH), 1, sides.pool1, sides.pool1, sides.pool1),
        _conv_stage("conv2 3x3", form, (STEM_WIDTH, conv2_width), 3, sides.pool1, sides.pool1, sides.pool2),
    ]
    side_of = {"3": sides.pool2, "4": sides.pool3, "5": sides.pool4}
    pooled_to = {"3b": sides.pool3, "4e": sides.pool4, "5b": 1}
    for name in GOOGLENET_SPECS:
        own = side_of[name[0]]
        stages.append(_module_stage(name, form, own, pooled_to.get(name, own)))
    features = GOOGLENET_SPECS["5b"].out_channels
    weights = features * CLASSES
    linear = Stage("linear", weights, features, CLASSES, weights=weights, biases=CLASSES, trained=weights + CLASSES)
    return [*stages, linear]


def counts(case: Case) -> Counts:
    """FLOPs and least bytes of one call of ``case``: see the module's docstring.

    A training step has the FLOPs of the forward, of the gradients of all weights and of the gradients of all inputs but the
    images. Its activations, in the case's dtype, pass through memory in these terms:

    - the forward of each stage reads its input and writes its output;
    - the loss reads the logits and writes their gradient (its labels are not counted);
    - the backward of each other stage reads its output again, for the masks of its ReLUs and max pools;
    - the backward of each stage reads its output's gradient and its input, and writes its input's gradient, conv1 excepted.

    Its parameters pass through memory ``PARAMETER_PASSES`` times in fp32 whatever the case's dtype, as half precision means
    autocast over fp32 parameters. What the backward needs from inside a stage is neither stored nor counted as computed again,
    and batch norm's statistics cost nothing: FLOPs and bytes are lower bounds that no one program need reach together.

    Raises:
        ValueError: the image is too small for the network.
    """
    element = DTYPES[case.dtype].itemsize
    if case.is_module:
        side = GOOGLENET_SIDES[case.subject]
        stages = [_module_stage(case.subject, MODULE_FORM, side, side)]
    else:
        stages = network_stages(VARIANTS[cast(VariantName, case.subject)], case.side)

    macs = case.batch * sum(stage.macs for stage in stages)
    reads = case.batch * sum(stage.reads for stage in stages)
    writes = case.batch * sum(stage.writes for stage in stages)
    if case.mode == "inference":
        parameters = sum(stage.weights + stage.biases for stage in stages)
        return Counts(2 * macs, element * (reads + writes + parameters))
    first, last = stages[0], stages[-1]
    elements = 3 * reads + 3 * writes + case.batch * (last.writes - first.reads)
    parameters = sum(stage.trained for stage in stages)
    return Counts(
        flops=2 * (3 * macs - case.batch * first.macs),
        bytes=element * elements + PARAMETER_BYTES * PARAMETER_PASSES * parameters,
    )


class Rate(Summary):
    """A rate measured ``n`` times, in the unit that its place says."""


@dataclass(frozen=True)
class Ceilings:
    """What a machine reaches: GB/s of a large copy, read plus written, and TFLOP/s of large arithmetic in each dtype."""

    copy_gb_per_s: Rate
    arithmetic_tflop_per_s: Mapping[str, Rate]

    def or_better(self, other: Ceilings) -> Ceilings:
        """Of each ceiling the higher one: what a machine reached at any time it can reach."""
        rates = dict(self.arithmetic_tflop_per_s)
        for dtype, rate in other.arithmetic_tflop_per_s.items():
            rates[dtype] = max(rates.get(dtype, rate), rate, key=lambda rate: rate.median)
        return Ceilings(max(self.copy_gb_per_s, other.copy_gb_per_s, key=lambda rate: rate.median), rates)

    def to_json(self) -> dict[str, Any]:
        return {
            "copy_gb_per_s": self.copy_gb_per_s.to_json(),
            "arithmetic_tflop_per_s": {dtype: rate.to_json() for dtype, rate in self.arithmetic_tflop_per_s.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Ceilings:
        """What ``to_json`` gave.

        Raises:
            KeyError: a field is missing.
        """
        arithmetic = {dtype: Rate.from_json(rate) for dtype, rate in data["arithmetic_tflop_per_s"].items()}
        return cls(Rate.from_json(data["copy_gb_per_s"]), arithmetic)


def _seconds(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each of ``repeats`` calls, by CUDA events on a GPU and by the wall clock on a CPU, after ``WARMUP`` more."""
    for _ in range(WARMUP):
        call()
    if device.type == "cpu":
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return seconds
    with torch.cuda.device(device):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(events)]


def _copy_rate(device: torch.device, size: int, repeats: int) -> Rate:
    """GB/s of copying ``size`` bytes, each counted as read and as written."""
    # Written, not empty: a CPU reads pages that were never written from one page in its cache.
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    moved = 2 * source.nbytes
    return Rate.of([moved / seconds / 1e9 for seconds in _seconds(lambda: target.copy_(source), device, repeats)])


class Work(NamedTuple):
    """A call, and how many FLOPs it does."""

    call: Callable[[], object]
    flops: int


Way = Callable[[torch.device, torch.dtype, int], Work]


def _random_matmul(device: torch.device, dtype: torch.dtype, side: int) -> Work:
    """A product of square matrices; of random numbers, because zeros take less power and so run faster than any real data."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return Work(lambda: torch.matmul(a, b, out=out), 2 * side**3)


def _random_conv3x3(device: torch.device, dtype: torch.dtype, side: int) -> Work:
    """A convolution in channels_last, which on a CPU is another library's work than a product, and the faster.

    At a ``side`` of 2048 it has 256 channels on maps of 56x56: of several such sizes the fastest on an AVX-512 EPYC.
    """
    generator = torch.Generator(device).manual_seed(0)
    channels, map_side = max(1, side // 8), max(1, 7 * side // 256)
    shapes = (CONV_BATCH, channels, map_side, map_side), (channels, channels, 3, 3)
    x, weight = (
        torch.randn(shape, device=device, generator=generator).to(dtype, memory_format=torch.channels_last) for shape in shapes
    )
    flops = 2 * weight.numel() * CONV_BATCH * map_side**2
    return Work(lambda: torch.nn.functional.conv2d(x, weight, padding=1), flops)


def _ways(device: torch.device) -> list[Way]:
    return [_random_matmul, _random_conv3x3] if device.type == "cpu" else [_random_matmul]


def _fastest_rate(device: torch.device, dtype: torch.dtype, side: int, repeats: int, budget: float) -> Rate:
    """TFLOP/s of the fastest arithmetic that is known here."""
    ways = _ways(device)
    rates = [_arithmetic_rate(way, device, dtype, side, repeats, budget / len(ways)) for way in ways]
    return max(rates, key=lambda rate: rate.median)


def _arithmetic_rate(way: Way, device: torch.device, dtype: torch.dtype, side: int, repeats: int, budget: float) -> Rate:
    """TFLOP/s of work of size ``side``, or of the largest half, quarter ... of that which fits in ``budget`` seconds."""
    sides = [side]
    while sides[0] > SMALLEST_SIDE:
        sides.insert(0, sides[0] // 2)
    work = way(device, dtype, sides[0])
    once = _seconds(work.call, device, 1)[0]
    for larger in sides[1:]:
        next_work = way(device, dtype, larger)
        if once * next_work.flops / work.flops * (2 * WARMUP + 1 + FEWEST_REPEATS) > budget:
            break
        work = next_work
        once = _seconds(work.call, device, 1)[0]
    fit = min(repeats, max(FEWEST_REPEATS, int(budget / once)))
    return Rate.of([work.flops / seconds / 1e12 for seconds in _seconds(work.call, device, fit)])


def _can_compute(device: torch.device, dtype: str) -> bool:
    """Whether the device has the arithmetic that is measured, in ``dtype``."""
    if dtype == "tf32":
        return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        for way in _ways(device):
            way(device, DTYPES[dtype], 16).call()
    except RuntimeError:
        return False
    return True


def measure_ceilings(
    device: torch.device,
    dtypes: Iterable[str],
    *,
    copy_bytes: int | None = None,
    arithmetic_side: int | None = None,
    repeats: int = 20,
    budget: float = 4.0,
) -> Ceilings:
    """Measures how fast ``device`` copies within its own memory and how fast it computes.

    Args:
        device: ``cpu`` or ``cuda``.
        dtypes: names in ``DTYPES``; those in which the device cannot compute are left out of the result.
        copy_bytes: size of the buffer that is copied, beyond any cache; by default 256 MiB or more on a CPU, and on a GPU
            2 GiB or a quarter of the free memory, whichever is less.
        arithmetic_side: of the square matrices, and a measure of the convolution; by default 2048 on a CPU and 8192 on a GPU.
        repeats: timed runs of each.
        budget: seconds for each dtype's arithmetic; smaller sizes and fewer runs keep a slow one within it.

    Raises:
        ValueError: ``device`` is neither a CPU nor a GPU, or ``repeats`` is not positive.
    """
    if device.type not in COPY_BYTES:
        raise ValueError(f"measure_ceilings: device must be cpu or cuda, got {device}")
    if repeats < 1:
        raise ValueError(f"measure_ceilings: repeats must be at least 1, got {repeats}")
    if copy_bytes is None and device.type == "cpu":
        copy_bytes = max(COPY_BYTES["cpu"], LEAST_CACHES * last_cache_bytes())
    elif copy_bytes is None:
        copy_bytes = min(COPY_BYTES["cuda"], torch.cuda.mem_get_info(device)[0] // 4)
    side = arithmetic_side or ARITHMETIC_SIDE[device.type]
    arithmetic = {}
    for dtype in dtypes:
        if _can_compute(device, dtype):
            with numerics(dtype):
                arithmetic[dtype] = _fastest_rate(device, DTYPES[dtype], side, repeats, budget)
    # The copy comes last: the arithmetic has raised the clocks by then.
    return Ceilings(_copy_rate(device, copy_bytes, repeats), arithmetic)


class Floor(NamedTuple):
    """The least milliseconds of a call, and which ceiling sets them."""

    ms: float
    bound: Literal["compute", "memory"]


def floor_ms(counts: Counts, ceilings: Ceilings, dtype: str) -> Floor | None:
    """The time in which the machine could do ``counts`` at its ceilings, arithmetic and traffic at once.

    The ceiling of arithmetic is that of ``dtype``, or fp32's if that is higher: fp32 products serve every dtype, and runtimes
    use them on a processor without half-precision arithmetic. None if ``dtype`` has no ceiling.

    The floor is no hard limit. The copy's ceiling is that of large copies, so a small problem whose data stays in a cache
    faster than device memory can take less time; so can an algorithm with fewer FLOPs than are counted, and a library that
    computes faster than those of the ceiling.
    """
    rate = ceilings.arithmetic_tflop_per_s.get(dtype)
    if rate is None:
        return None
    tflop_per_s = max(rate.median, ceilings.arithmetic_tflop_per_s.get("fp32", rate).median)
    compute = counts.flops / (tflop_per_s * 1e9)
    memory = counts.bytes / (ceilings.copy_gb_per_s.median * 1e6)
    return Floor(compute, "compute") if compute >= memory else Floor(memory, "memory")


def percent(ms: float, floor: Floor | None) -> float | None:
    """Per cent of the roofline that a call of ``ms`` reaches, None without a floor.

    Above 100 for a call that is faster than its floor, as a small problem can be whose data stays in a cache faster than device
    memory: see ``floor_ms``.
    """
    return None if floor is None else 100 * floor.ms / ms

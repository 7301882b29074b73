"""The gate before any timing: a provider's results on fresh inputs against an fp64 run, by the package's tolerance law.

Two inputs are judged, so that a provider which returns an earlier answer again is caught. Before each call memory of the
output's size is filled with NaN and freed, and after it the output itself is filled with NaN: an element that the next call
does not write shows. Where calls will be timed in a CUDA graph, a replay of one is judged too, on a poisoned output.

A training step is judged by the gradients of all parameters, each divided by its true root mean square. They are no continuous
function of the numbers before them: where rounding turns the sign of a ReLU's input or the largest of a pool's, a gradient
takes another way. What that costs in a dtype shows only in some of torch's own results, so there are more of them here: those
on images moved by as much as the roundings of a network's layers add up to.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from googlenet_fused.bench.case import DTYPES, Workload
from googlenet_fused.bench.meters import Meter, first_line
from googlenet_fused.bench.provider import Bind, Provider, Run, TrainingStep, Unavailable, channels_last
from googlenet_fused.tolerance import Comparison, References, compare, references

FRESH_INPUTS = 2
MOVED_PEERS = 6
LAYERS = 58  # convolutions and the linear layer of GoogLeNet


@dataclass
class Verdicts:
    """The worst comparison of each provider, by name, and why some fail."""

    worst: dict[str, Comparison] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, comparison: Comparison, where: str = "") -> None:
        self.worst[name] = max(self.worst.get(name, comparison), comparison, key=lambda c: c.max_error)
        if not comparison.ok and name not in self.failures:
            self.failures[name] = where + str(comparison)


def judge_all(workload: Workload, bound: Sequence[tuple[Provider, Bind]], meter: Meter) -> Verdicts:
    """Judges every provider on every fresh input.

    Raises:
        Unavailable: plain PyTorch itself cannot run the case, so there is nothing to judge by.
    """
    verdicts = Verdicts()
    for seed in range(1, 1 + FRESH_INPUTS):
        x = workload.input(seed)
        try:
            truth = _Truth.of(workload, x)
        except (NotImplementedError, RuntimeError) as error:
            raise Unavailable(f"plain PyTorch cannot run {workload.case} here: {first_line(error)}") from error
        for provider, bind in bound:
            if provider.name in verdicts.failures:
                continue
            try:
                with provider.settings():
                    run = bind(x)
                    verdicts.add(provider.name, truth.judge(run))
                    if seed == FRESH_INPUTS and not provider.own_graph:
                        _judge_graph(provider.name, run, truth, meter, verdicts)
            except Exception as error:  # whatever a provider does wrong is its own result, and the others go on
                verdicts.failures[provider.name] = first_line(error)
    return verdicts


def _judge_graph(name: str, run: Run, truth: _Truth, meter: Meter, verdicts: Verdicts) -> None:
    """Judges a replay; a call that cannot be captured is not wrong for that, and the meter will say so."""
    try:
        replay = meter.replayed(run)
    except Exception:
        return
    if replay is not None:
        replay()
        verdicts.add(name, truth.judge(run, replay), "in a CUDA graph it ")


@dataclass(frozen=True)
class _Truth:
    """What results on one input are judged by. ``scales`` are for gradients: the true root mean square of each parameter's."""

    references: References
    scales: Mapping[str, Tensor] | None

    @classmethod
    def of(cls, workload: Workload, x: Tensor) -> _Truth:
        if workload.case.mode == "inference":
            return cls(references(workload.model, x), None)
        dtype, labels = DTYPES[workload.case.dtype], workload.labels(seed=0)

        def gradients(x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
            model = copy.deepcopy(workload.model)
            if dtype == torch.float64:
                model = model.double()
            elif x.is_contiguous(memory_format=torch.channels_last):
                model = model.to(memory_format=torch.channels_last)
            return TrainingStep(model, x, labels, dtype).gradients()

        exact = gradients(x.double(), torch.float64)
        scales = {name: gradient.square().mean().sqrt().clamp_min(1e-300) for name, gradient in exact.items()}
        peers = [_flat(gradients(images, dtype), scales) for images in (x, channels_last(x), *_moved(x, dtype))]
        # The longest sum is that of conv1's weight gradient, over all pixels of its output.
        terms = workload.case.batch * (workload.case.side // 2) ** 2
        return cls(References(peers, _flat(exact, scales), terms), scales)

    def judge(self, run: Run, replay: Run | None = None) -> Comparison:
        """Judges a call, or a replay of it in place of the call."""
        if isinstance(run, TrainingStep):
            return self._judge_step(run, replay)
        truth, dtype = self.references.truth, self.references.peers[0].dtype
        poisoned = torch.full_like(truth, torch.nan, dtype=dtype)
        del poisoned
        if replay is not None:
            replay().fill_(torch.nan)
        output = (replay or run)()
        comparison = compare(output.to(truth.device, dtype), *self.references)
        output.fill_(torch.nan)
        return comparison

    def _judge_step(self, step: TrainingStep, replay: Run | None) -> Comparison:
        assert self.scales is not None
        if replay is None:
            return compare(_flat(step.gradients(), self.scales), *self.references)
        for gradient in step.held_gradients().values():
            gradient.fill_(torch.nan)
        replay()
        return compare(_flat(step.held_gradients(), self.scales), *self.references)


def _moved(x: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Copies of ``x`` with relative noise as large as the roundings of so many layers, added up at random."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(MOVED_PEERS):
        noise = torch.randn(x.shape, generator=generator).to(x.device)
        yield x * (1 + LAYERS**0.5 * torch.finfo(dtype).eps * noise)


def _flat(gradients: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> Tensor:
    """All gradients in one vector, in the order of ``scales``; fp64 for fp64 gradients, else fp32.

    Raises:
        ValueError: there is a gradient too many or too few.
    """
    if gradients.keys() != scales.keys():
        odd = sorted(gradients.keys() ^ scales.keys())
        raise ValueError(f"gradients must be of the plain model's parameters; of one model only: {', '.join(odd)}")
    return torch.cat([(gradients[name].double() / scale).to(gradients[name].dtype).flatten() for name, scale in scales.items()])

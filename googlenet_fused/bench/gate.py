"""The gate before any timing: a provider's results on fresh inputs against an fp64 run, by the package's tolerance law.

Two inputs are judged, so that a provider which returns an earlier answer again is caught. Before each call memory of the
output's size is filled with NaN and freed, and after it the output itself is filled with NaN: an element that the next call
does not write shows. Where calls will be timed in a CUDA graph, a replay of one is judged too, on a poisoned output.

A training step is judged by its loss, in the case's dtype, and by its gradients in fp32: each parameter's root mean square
error, relative to its true root mean square, may be at most twice the largest that torch's own results show for any parameter.
Torch's own are several: in both memory formats, and on images moved by as much as the roundings of a network's layers add up
to, because what a maximum or a ReLU does to a gradient where rounding decides shows only in some. In half precision and in TF32
such choices are so many that torch's own gradients of a whole network do not resemble the true ones: there they must be finite.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from googlenet_fused.backends.triton.plans import DTYPES
from googlenet_fused.bench.case import Workload, numerics
from googlenet_fused.bench.meters import Meter, failure
from googlenet_fused.bench.provider import Bind, Provider, Run, TrainingStep, Unavailable, WrongResult, channels_last
from googlenet_fused.messages import first_line
from googlenet_fused.tolerance import PEER_FACTOR, Comparison, References, compare, references

Gradients = Mapping[str, Tensor]

FRESH_INPUTS = 2
MOVED_PEERS = 4
MOST_PEER_ERROR = 0.2  # twice that and a gradient halved, 0.5 off, is still found
LAYERS = 58  # convolutions and the linear layer of GoogLeNet


class Failure(NamedTuple):
    """Why a provider did not pass: its result is wrong, or it ended in an error."""

    status: Literal["wrong", "failed"]
    reason: str


@dataclass
class Verdicts:
    """The worst comparison of each provider, by name, and why some did not pass."""

    worst: dict[str, Comparison] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)

    def add(self, name: str, comparison: Comparison, where: str = "") -> None:
        self.worst[name] = max(self.worst.get(name, comparison), comparison, key=lambda c: c.max_error)
        if not comparison.ok and name not in self.failures:
            self.failures[name] = Failure("wrong", where + str(comparison))


def judge_all(workload: Workload, bound: Sequence[tuple[Provider, Bind]], meter: Meter) -> Verdicts:
    """Judges every provider on every fresh input.

    Raises:
        Unavailable: plain PyTorch itself cannot run the case, so there is nothing to judge by.
        DeviceBroken: a provider left the device unusable.
    """
    verdicts = Verdicts()
    for seed in range(1, 1 + FRESH_INPUTS):
        x = workload.input(seed)
        try:
            truth = _Truth.of(workload, x) if workload.case.mode == "inference" else _TrueStep.of(workload, x)
        except (NotImplementedError, RuntimeError) as error:
            raise Unavailable(f"plain PyTorch cannot run {workload.case} here: {first_line(error)}") from error
        for provider, bind in bound:
            if provider.name in verdicts.failures:
                continue
            try:
                with provider.settings():
                    run = bind(x)
                    verdicts.add(provider.name, truth.judge(run))
                    if seed == FRESH_INPUTS and provider.name not in verdicts.failures and not provider.own_graph:
                        _judge_graph(provider.name, run, truth, meter, verdicts)
            except WrongResult as fault:
                verdicts.failures[provider.name] = Failure("wrong", str(fault))
            except Exception as error:  # a provider that breaks is its own result, and the others go on
                verdicts.failures[provider.name] = Failure("failed", failure(error))
                meter.check(provider.title)
    return verdicts


def _judge_graph(name: str, run: Run, truth: _Truth | _TrueStep, meter: Meter, verdicts: Verdicts) -> None:
    """Judges a replay; a call that cannot be captured is not wrong for that, and the meter will say so."""
    try:
        replay = meter.replayed(run)
    except Exception:  # whatever stops a capture stops the meter's too, which records it as the reason for the missing metric
        return
    if replay is not None:
        replay()
        verdicts.add(name, truth.judge(run, replay), "in a CUDA graph it ")


@dataclass(frozen=True)
class _Truth:
    """What results on one input are judged by."""

    references: References

    @classmethod
    def of(cls, workload: Workload, x: Tensor) -> _Truth:
        return cls(references(workload.model, x))

    def judge(self, run: Run, replay: Run | None = None) -> Comparison:
        """Judges a call, or a replay of it in place of the call."""
        truth, dtype = self.references.truth, self.references.peers[0].dtype
        poisoned = torch.full_like(truth, torch.nan, dtype=dtype)
        del poisoned
        if replay is not None:
            replay().fill_(torch.nan)
        output = (replay or run)()
        comparison = compare(output.to(truth.device, dtype), *self.references)
        output.fill_(torch.nan)
        return comparison


@dataclass(frozen=True)
class _TrueStep:
    """The fp64 gradients of a step by parameter, the largest error that torch's fp32 ones have in any, and the losses."""

    dtype: torch.dtype
    precise: bool
    exact: Gradients
    peer_error: float
    losses: References

    @classmethod
    def of(cls, workload: Workload, x: Tensor) -> _TrueStep:
        """Of one input.

        Raises:
            Unavailable: torch's own gradients are too far from the true ones.
        """
        labels, dtype = workload.labels(seed=0), DTYPES[workload.case.dtype]

        def step(x: Tensor, dtype: torch.dtype) -> TrainingStep:
            model = copy.deepcopy(workload.model)
            if dtype == torch.float64:
                model = model.double()
            elif x.is_contiguous(memory_format=torch.channels_last):
                model = model.to(memory_format=torch.channels_last)
            return TrainingStep(model, x, labels, dtype)

        images = [x, channels_last(x), *_moved(x)]
        true = step(x.double(), torch.float64)
        loss = true()
        exact = true.held_gradients()
        with numerics("fp32"):
            error = max(max(_errors(step(moved, torch.float32).gradients(), exact).values()) for moved in images)
        if not error <= MOST_PEER_ERROR:
            raise Unavailable(
                f"torch's own gradients of {workload.case} err by {error:.2g} of a parameter's: nothing to judge by"
            )
        losses = References([step(moved, dtype)().reshape(1) for moved in images], loss.reshape(1), 1)
        return cls(dtype, workload.case.dtype == "fp32", exact, error, losses)

    def judge(self, run: Run, replay: Run | None = None) -> Comparison:
        """Judges a step, or a replay of it in place of the step."""
        assert isinstance(run, TrainingStep)
        if replay is not None:
            for gradient in run.held_gradients().values():
                gradient.fill_(torch.nan)
        loss = (replay or run)()
        judged = compare(loss.reshape(1).to(self.losses.peers[0].dtype), *self.losses)
        if not judged.ok:
            return replace(judged, detail=f"of the loss, {judged.detail}")
        for name, gradient in run.held_gradients().items():
            if not gradient.isfinite().all():
                return replace(judged, ok=False, detail=f"the gradient of {name} is not finite")
        if replay is not None:
            return self.compare(run.held_gradients()) if self.precise else judged
        with numerics("fp32"):
            return self.compare(run.at(torch.float32).gradients())

    def compare(self, found: Gradients) -> Comparison:
        """Judges fp32 gradients of all parameters."""
        errors = _errors(found, self.exact)
        allowed = PEER_FACTOR * self.peer_error + torch.finfo(torch.float32).eps
        off = {name: error for name, error in errors.items() if not error <= allowed}  # NaN is off
        largest, typical = max(errors.values()), sum(errors.values()) / len(errors)
        detail = "".join(f"the gradient of {name} errs by {error:.2g} of its own size" for name, error in list(off.items())[:1])
        return Comparison(not off, largest, typical, self.peer_error, self.peer_error, detail)


def _errors(found: Gradients, exact: Gradients) -> dict[str, float]:
    """Root mean square error of each parameter's gradient, relative to the true root mean square.

    Raises:
        WrongResult: there is a gradient too many or too few.
    """
    if found.keys() != exact.keys():
        odd = sorted(found.keys() ^ exact.keys())
        raise WrongResult(f"gradients must be of the plain model's parameters; of one model only: {', '.join(odd)}")
    return {name: _rms(found[name].double() - true) / max(_rms(true), 1e-300) for name, true in exact.items()}


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def _moved(x: Tensor) -> Iterator[Tensor]:
    """Copies of ``x`` with relative noise as large as the roundings of so many layers, added up at random."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(MOVED_PEERS):
        noise = torch.randn(x.shape, generator=generator).to(x.device)
        yield x * (1 + LAYERS**0.5 * torch.finfo(torch.float32).eps * noise)

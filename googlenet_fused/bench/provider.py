"""Providers: ways of running a workload."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from googlenet_fused.backends.registry import BackendError
from googlenet_fused.backends.triton.plans import DTYPES
from googlenet_fused.bench.case import Workload
from googlenet_fused.convert import FusionMismatch, fuse

BASELINE = "eager"
"""The provider whose output sets the tolerance and whose time is 1.0x: plain PyTorch, run as a user would."""

OURS = "fused_"
"""What the names of this package's own providers begin with."""

Run = Callable[[], Tensor]
Bind = Callable[[Tensor], Run]


class Unavailable(Exception):
    """A provider cannot run here; the message is the reason."""


class WrongResult(Exception):
    """A provider ran, but what came is not what was asked for; the message says how."""


@dataclass(frozen=True)
class Provider:
    """One way of running a workload: ``build(workload)`` prepares it, or raises `Unavailable`, and returns ``bind``.

    ``bind(x)`` puts an input into the form that the provider takes, untimed, and returns the call that is timed. For a training
    case that call is a `TrainingStep`.

    Attributes:
        settings: entered around everything that the provider does, for torch's global flags.
        own_graph: whether the provider replays CUDA graphs itself, so that its calls cannot be captured in one.
    """

    name: str
    title: str
    build: Callable[[Workload], Bind]
    settings: Callable[[], AbstractContextManager[object]] = nullcontext
    own_graph: bool = False


class TrainingStep:
    """One step of SGD with momentum 0.9 on the cross entropy of a model's logits; a call returns the loss.

    ``before`` is called first in each step. The learning rate is 0, so that hundreds of steps leave the parameters as they
    were and all providers' gradients comparable; the step does the same work whatever the rate.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, labels: Tensor, dtype: torch.dtype, before: Callable[[], None] = lambda: None
    ) -> None:
        self.model, self.x, self.labels, self.dtype, self.before = model, x, labels, dtype, before
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.0, momentum=0.9)

    def _backward(self) -> Tensor:
        self.before()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.x.device.type, self.dtype, enabled=self.dtype in (torch.float16, torch.bfloat16)):
            logits = self.model(self.x)  # [batch, classes]
        loss = F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, self.labels)
        loss.backward()
        return loss.detach()

    def at(self, dtype: torch.dtype) -> TrainingStep:
        """The same step in another dtype."""
        return TrainingStep(self.model, self.x, self.labels, dtype, self.before)

    def __call__(self) -> Tensor:
        loss = self._backward()
        self.optimizer.step()
        return loss

    def gradients(self) -> dict[str, Tensor]:
        """Of every parameter, by name, from a backward pass without the optimizer's step."""
        self._backward()
        return self.held_gradients()

    def held_gradients(self) -> dict[str, Tensor]:
        """The gradients as the last step left them.

        Raises:
            WrongResult: a parameter has none.
        """
        found = {}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is None:
                raise WrongResult(f"the step left no gradient for {name}")
            found[name.removeprefix("_orig_mod.")] = parameter.grad  # the prefix is torch.compile's
        return found


def run_of(workload: Workload, model: nn.Module, x: Tensor) -> Run:
    """The call of a torch module on an input: the forward pass, or a training step."""
    if workload.case.mode == "training":
        return TrainingStep(model, x, workload.labels(seed=0), DTYPES[workload.case.dtype])
    return lambda: model(x)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _eager(workload: Workload) -> Bind:
    model = copy.deepcopy(workload.model) if workload.case.mode == "training" else workload.model
    return lambda x: run_of(workload, model, x)


def _channels_last(workload: Workload) -> Bind:
    model = copy.deepcopy(workload.model).to(memory_format=torch.channels_last)
    return lambda x: run_of(workload, model, channels_last(x))


@contextmanager
def cudnn_benchmark() -> Iterator[None]:
    """cuDNN tries its algorithms at the first call of a shape and keeps the fastest; without effect on a CPU."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def fused_provider(backend: str = "auto") -> Provider:
    """This package's fused model. A network gets the same contiguous input as plain PyTorch, so that any change of layout is in
    its time; a module gets channels_last, as it does inside a network."""

    def build(workload: Workload) -> Bind:
        model = workload.model
        try:
            if workload.case.mode == "training":
                model = copy.deepcopy(model).to(memory_format=torch.channels_last)
                fused = fuse(model.eval(), backend=backend).train()
            else:
                fused = fuse(model, backend=backend)
        except BackendError as error:
            raise Unavailable(str(error)) from error
        except FusionMismatch as error:
            raise WrongResult(str(error)) from error
        form = channels_last if workload.case.is_module else lambda x: x
        return lambda x: run_of(workload, fused, form(x))

    return Provider(f"{OURS}{backend}", f"googlenet_fused, {backend}", build, cudnn_benchmark)


def package_providers(backend: str = "auto") -> list[Provider]:
    """Plain PyTorch in both memory formats, and the fused network: what ``googlenet-fused bench`` compares."""
    return [
        Provider(BASELINE, "PyTorch", _eager),
        Provider("channels_last", "PyTorch, channels_last", _channels_last, cudnn_benchmark),
        fused_provider(backend),
    ]

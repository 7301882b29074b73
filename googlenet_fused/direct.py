"""The forward pass of a fused module where only its result is wanted: straight to the backend, past the operator.

An operator's call from Python checks its arguments and looks up its weights each time: 1 to 2 ms of the 24 to 27 that GoogLeNet
takes at batch 1 on two cores of an AMD EPYC. Where nothing can observe the operator, and after a first call has gone through
it, it may as well be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from googlenet_fused import kept_weights, ops
from googlenet_fused.arithmetic import arithmetic
from googlenet_fused.backends import registry
from googlenet_fused.packing import ConvParams
from googlenet_fused.parameter_cache import lend


class DirectCall(NamedTuple):
    """A module's forward pass bound to its packed weights and to a backend, for inputs of one dtype on one device."""

    run: Callable[[Tensor], Tensor]
    requested: str
    dtype: torch.dtype
    device: torch.device
    in_channels: int
    smallest_side: int
    arithmetic: str | None
    """Of fp32 on a CUDA device, where automatic choice depends on it."""

    def serves(self, x: Tensor, backend: str) -> bool:
        """Whether the operator would do with ``x`` and this request for a backend what ``run`` does."""
        return (
            x.dtype == self.dtype
            and x.device == self.device
            and registry.requested(backend) == self.requested
            and x.dim() == 4
            and x.shape[1] == self.in_channels
            and min(x.shape[2], x.shape[3]) >= self.smallest_side
            and x.shape[0] > 0
            and _arithmetic(x) == self.arithmetic
        )


def _arithmetic(x: Tensor) -> str | None:
    return arithmetic(x.dtype) if x.dtype == torch.float32 and x.is_cuda else None


# Not documented interfaces, all of them.
_CAN_TELL = all(
    hasattr(owner, name)
    for owner, name in (
        (torch._C, "_len_torch_dispatch_stack"),
        (torch._C, "_len_torch_function_stack"),
        (getattr(torch._C, "_functorch", None), "peek_interpreter_stack"),
        (torch._C, "_get_tracing_state"),
        (getattr(torch._C, "_autograd", None), "_profiler_enabled"),
    )
)


def unobserved(x: Tensor) -> bool:
    """Whether nothing wants to know of the operator: no gradients of either mode, autocast, tracing, transform of
    ``torch.func``, dispatch or function mode, or profiler. False, too, where this torch cannot tell.
    """
    return eager(x) and not (torch.is_grad_enabled() or torch._C._autograd._profiler_enabled())


def eager(x: Tensor) -> bool:
    """As ``unobserved``, but gradients of reverse mode and the profiler may be on."""
    return not (
        torch.compiler.is_compiling()
        or not _CAN_TELL
        or type(x) is not Tensor
        or ops.in_forward_ad()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or ops.autocasts(x.device.type)
    )


def inception(x: Tensor, convs: Sequence[ConvParams], backend: str) -> DirectCall:
    """``ops.inception`` with ``cache``, for inputs like ``x``; it must have run with these arguments.

    Raises:
        ValueError: it did not run on a backend that later calls would have, too.
    """
    packed = kept_weights.pack(convs, x.dtype, cache=True)
    spec = packed.spec
    chosen = registry.select(backend, registry.Problem(x.device, x.dtype, spec), lasting=True)
    prepared = kept_weights.prepare(chosen, packed, x.shape)

    def run(x: Tensor) -> Tensor:
        out = ops.allocate(x, spec.out_channels, x.shape[2], x.shape[3])
        chosen.inception(x, packed, prepared, out)
        return out

    lent = _lent(run, convs[0].weight, (*packed, *prepared))
    return DirectCall(lent, registry.requested(backend), x.dtype, x.device, spec.in_channels, 1, _arithmetic(x))


def conv2d_relu(x: Tensor, conv: ConvParams, stride: Sequence[int], padding: Sequence[int], backend: str) -> DirectCall:
    """``ops.conv2d_relu`` with ``cache``, for inputs like ``x``; it must have run with these arguments.

    Raises:
        ValueError: it did not run on a backend that later calls would have, too.
    """
    weight, bias = kept_weights.fold(conv, x.dtype, cache=True)
    chosen = registry.select(backend, registry.Problem(x.device, x.dtype, None), lasting=True)
    prepared = kept_weights.prepare_conv2d(chosen, weight, stride, padding, x.shape)

    def run(x: Tensor) -> Tensor:
        return chosen.conv2d_relu(x, weight, bias, prepared, stride, padding)

    _, in_channels, *kernel = weight.shape
    smallest = max(size - 2 * pad for size, pad in zip(kernel, padding, strict=True))
    lent = _lent(run, conv.weight, (weight, bias, *prepared))
    return DirectCall(lent, registry.requested(backend), x.dtype, x.device, in_channels, max(smallest, 1), _arithmetic(x))


def _lent(run: Callable[[Tensor], Tensor], source: Tensor, kept: tuple[Tensor, ...]) -> Callable[[Tensor], Tensor]:
    """``run``, lent what it reads in each call: the tensors ``kept`` of ``source``."""
    if not source.is_cuda:
        return run
    streams: set[int] = set()

    def run_lent(x: Tensor) -> Tensor:
        lend(source, kept, streams)
        return run(x)

    return run_lent

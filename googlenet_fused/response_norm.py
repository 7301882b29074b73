"""Local response normalisation across channels on CPU tensors, by sums of shifted slices in blocks that stay in a cache.

``y[c] = x[c] / (k + alpha / size * s[c]) ** beta``, where ``s[c]`` is the sum of ``x ** 2`` over those of the channels from
``c - size // 2`` to ``c + (size - 1) // 2`` that exist: what ``torch.nn.functional.local_response_norm`` computes, by way of a
three-dimensional average pool. A running sum would take fewer additions, but carry NaN and infinities past the window's end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 18
"""Elements of a block, of which some two copies in fp32 are alive at a time: of 2**14 to 2**20 the fastest on an EPYC."""


class ResponseNorm(NamedTuple):
    """The parameters of ``torch.nn.LocalResponseNorm``."""

    size: int
    alpha: float
    beta: float
    k: float


def local_response_norm(x: Tensor, norm: ResponseNorm) -> Tensor:
    """``x [n, c, h, w]`` normalised, in x's dtype and layout; channels_last if its strides are neither of the two usual ones.

    Half precisions are computed in fp32 and rounded once.
    """
    x = _usual_layout(x)
    out = torch.empty_like(x)
    for axis, (values, normalised) in _blocks(x, out):
        torch.div(values, _power_(_base(values, norm, axis), norm.beta), out=normalised)
    return out


def local_response_norm_backward(grad: Tensor, x: Tensor, norm: ResponseNorm) -> Tensor:
    """The gradient of ``x [n, c, h, w]`` for that of the result, in x's dtype, computed as ``local_response_norm`` does."""
    x = _usual_layout(x)
    channels_last = not x.is_contiguous()
    grad = grad.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    out = torch.empty_like(x)
    before, after = _reach(norm)
    factor = -2 * norm.beta * norm.alpha / norm.size
    for axis, (gradients, values, found) in _blocks(grad, x, out):
        base = _base(values, norm, axis)
        through = gradients / _power_(base.clone(), norm.beta)
        # Channel c is in the windows of those from c - after to c + before.
        around = _window_sum(base.reciprocal_().mul_(values).mul_(through), after, before, axis)
        found.copy_(through.addcmul_(around, values.to(around.dtype), value=factor))
    return out


def _usual_layout(x: Tensor) -> Tensor:
    usual = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return x if usual else x.contiguous(memory_format=torch.channels_last)


def _blocks(*tensors: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
    """The axis of the channels, and views with two axes of the same part of each tensor; all are of one shape and layout."""
    n, channels, height, width = tensors[0].shape
    pixels = max(1, BLOCK_ELEMENTS // channels)
    if tensors[0].is_contiguous():
        flat = [tensor.view(n, channels, height * width) for tensor in tensors]
        for image in range(n):
            for start in range(0, height * width, pixels):
                yield 0, [tensor[image, :, start : start + pixels] for tensor in flat]
    else:
        flat = [tensor.permute(0, 2, 3, 1).view(-1, channels) for tensor in tensors]
        for start in range(0, n * height * width, pixels):
            yield 1, [tensor[start : start + pixels] for tensor in flat]


def _base(values: Tensor, norm: ResponseNorm, axis: int) -> Tensor:
    """``k + alpha / size * s``, in fp32 at least."""
    wide = torch.promote_types(values.dtype, torch.float32)
    return _window_sum(values.to(wide).square(), *_reach(norm), axis).mul_(norm.alpha / norm.size).add_(norm.k)


def _power_(base: Tensor, beta: float) -> Tensor:
    """``base ** beta``, written over ``base`` or beside it."""
    if beta != 0.75:
        return base.pow_(beta)
    root = base.sqrt_()
    return root.sqrt().mul_(root)  # the usual beta, in a fraction of a power's time


def _reach(norm: ResponseNorm) -> tuple[int, int]:
    """How many channels before and after one are in its window."""
    return norm.size // 2, (norm.size - 1) // 2


def _window_sum(values: Tensor, before: int, after: int, axis: int) -> Tensor:
    """For each channel the sum of ``values`` over it, ``before`` channels before it and ``after`` after it."""
    channels = values.shape[axis]
    total = values.clone()
    for shift in range(1, min(before, channels - 1) + 1):
        total.narrow(axis, shift, channels - shift).add_(values.narrow(axis, 0, channels - shift))
    for shift in range(1, min(after, channels - 1) + 1):
        total.narrow(axis, 0, channels - shift).add_(values.narrow(axis, shift, channels - shift))
    return total

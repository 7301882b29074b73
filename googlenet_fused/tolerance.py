"""The one law by which a result is judged equal, for every backend, dtype and test.

``truth`` is the plain model in fp64 on the same (already rounded) inputs and parameters. The ``peers`` are torch's own results
in the dtype under judgement. Torch picks its kernels by layout and batch (on a CPU, one image on one thread is not oneDNN's),
and they differ in how they add up, so there are several peers, and the largest of their errors is what that dtype costs. A
result passes if, over the finite elements,

* every element errs by at most twice the peers' largest error, plus eps(dtype) of the element, plus the rounding of a sum, and
* the root mean square error is at most twice the peers', plus eps(dtype) of the values' root mean square.

The rounding of a sum of k products in fp32 is sqrt(k) * 2**-24 of the largest value, k being the longest sum in the module:
what sequential addition costs where partial sums grow that large, which depends on the order of addition and falls on few
elements. Against the eps of a half precision it is nothing. In fp64 the peers are no worse than the truth; there 2**-40 of the
largest value takes the place of both. NaN and infinities must stand exactly where the first peer has them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

PEER_FACTOR = 2.0
PEER_BATCH = 16  # on one thread torch gives 1x1 convolutions to oneDNN from this batch on (ATen/native/Convolution.cpp)
FP64_SLACK = 2.0**-40
FP32_ROUNDING = 2.0**-24


@dataclass(frozen=True)
class Comparison:
    """How far a result is from the truth, relative to its largest value and root mean square, and whether that passes."""

    ok: bool
    max_error: float
    rms_error: float
    peer_max_error: float
    peer_rms_error: float
    detail: str

    def __str__(self) -> str:
        verdict = "agrees" if self.ok else f"disagrees: {self.detail}"
        return (
            f"{verdict} (relative error: largest {self.max_error:.2e} against {self.peer_max_error:.2e} of torch's own, "
            f"rms {self.rms_error:.2e} against {self.peer_rms_error:.2e})"
        )


class References(NamedTuple):
    """What a result is judged by: torch's own results in its dtype, the fp64 truth, and the length of the longest sum."""

    peers: list[Tensor]
    truth: Tensor
    terms: int


def judge(run: Callable[[Tensor], Tensor], plain: nn.Module, x: Tensor) -> Comparison:
    """Judge ``run(x)`` against the plain module, which should be in evaluation mode."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return compare(run(x), *references(plain, x))


def references(plain: nn.Module, x: Tensor) -> References:
    """The plain module's results on ``x [n, c, h, w]`` by which others are judged."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        truth = copy.deepcopy(plain).double()(x.double())
        repeated = torch.cat([x] * -(-PEER_BATCH // max(len(x), 1)))
        peers = [plain(x)]
        for layout in (torch.contiguous_format, torch.channels_last):
            peers.append(plain(repeated.contiguous(memory_format=layout))[: len(x)])
    sums = [layer.weight[0].numel() for layer in plain.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    return References(peers, truth, max(sums, default=1))


def compare(actual: Tensor, peers: Sequence[Tensor], truth: Tensor, terms: int = 1) -> Comparison:
    """Judge ``actual`` by the law above, on the device of ``truth``.

    All have one shape; the peers have ``actual``'s dtype and ``truth`` is fp64. ``terms`` is the length of the longest sum
    behind a value.

    Raises:
        TypeError: ``truth`` is not fp64.
        ValueError: there is no peer.
    """
    if not peers:
        raise ValueError("peers must hold at least one of torch's own results")
    if truth.dtype != torch.float64:
        raise TypeError(f"truth must be float64, got {truth.dtype}")
    peer = peers[0]
    if actual.shape != truth.shape or peer.shape != truth.shape:
        return _failed(f"shapes differ: {list(actual.shape)}, torch's own {list(peer.shape)}, truth {list(truth.shape)}")
    if actual.dtype != peer.dtype:
        return _failed(f"dtype is {actual.dtype}, torch's own {peer.dtype}")
    if actual.numel() == 0:
        return Comparison(True, 0.0, 0.0, 0.0, 0.0, "empty")
    dtype = actual.dtype
    actual, peer, truth = (_exactly(tensor, truth.device) for tensor in (actual, peer, truth))

    finite = peer.isfinite()
    misplaced = (actual.isfinite() != finite) | (~finite & (actual.isnan() != peer.isnan()))
    misplaced |= peer.isinf() & actual.isinf() & (actual != peer)
    if misplaced.any():
        worst = _position(misplaced.to(torch.uint8))
        return _failed(f"at {worst} it is {actual[worst].item()} where torch's own is {peer[worst].item()}")

    finite &= truth.isfinite()
    for other in peers[1:]:  # where one overflows and another does not, nothing can be said
        finite &= _exactly(other, truth.device).isfinite()
    truth = truth.where(finite, 0)
    error = (actual.where(finite, 0) - truth).abs()
    peer_errors = [(_exactly(other, truth.device).where(finite, 0) - truth).abs() for other in peers]
    scale, rms_scale, rms = truth.abs().max().item(), _rms(truth), _rms(error)
    peer_max, peer_rms = max(e.max().item() for e in peer_errors), max(_rms(e) for e in peer_errors)
    if dtype == torch.float64:
        rounding, rms_rounding = torch.full_like(truth, FP64_SLACK * scale), FP64_SLACK * rms_scale
    else:
        eps, of_sum = torch.finfo(dtype).eps, terms**0.5 * FP32_ROUNDING * scale
        rounding, rms_rounding = eps * truth.abs() + of_sum, eps * rms_scale

    excess = error - (PEER_FACTOR * peer_max + rounding)
    detail = ""
    if excess.max() > 0:
        worst = _position(excess)
        detail = f"at {worst} it is {actual[worst].item():.9g} where the truth is {truth[worst].item():.9g}"
    elif rms > PEER_FACTOR * peer_rms + rms_rounding:
        detail = "its root mean square error is too large"
    return Comparison(
        ok=not detail,
        max_error=_ratio(error.max().item(), scale),
        rms_error=_ratio(rms, rms_scale),
        peer_max_error=_ratio(peer_max, scale),
        peer_rms_error=_ratio(peer_rms, rms_scale),
        detail=detail,
    )


def check_close(actual: Tensor, peers: Sequence[Tensor], truth: Tensor, terms: int = 1, label: str = "result") -> Comparison:
    """``compare``, as an assertion.

    Raises:
        AssertionError: the result does not pass; says where and by how much.
    """
    comparison = compare(actual, peers, truth, terms)
    if not comparison.ok:
        raise AssertionError(f"{label} {comparison}")
    return comparison


def _exactly(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device=device, dtype=torch.float64)


def _rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def _failed(detail: str) -> Comparison:
    return Comparison(False, float("nan"), float("nan"), float("nan"), float("nan"), detail)


def _ratio(error: float, scale: float) -> float:
    return error / scale if scale else error


def _position(values: Tensor) -> tuple[int, ...]:
    """Index of the largest element."""
    return tuple(int(i) for i in torch.unravel_index(values.argmax(), values.shape))

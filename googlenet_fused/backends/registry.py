"""The backends that can run a fused module, and the rules by which one is chosen."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from googlenet_fused.messages import first_line
from googlenet_fused.packing import PackedInception
from googlenet_fused.response_norm import ResponseNorm
from googlenet_fused.spec import InceptionSpec

logger = logging.getLogger("googlenet_fused")

AUTO = "auto"


@dataclass(frozen=True)
class Problem:
    """What a backend is asked to run. ``spec`` is None for one convolution with ReLU, as in the stem."""

    device: torch.device
    dtype: torch.dtype
    spec: InceptionSpec | None

    def __str__(self) -> str:
        what = "a convolution with ReLU" if self.spec is None else f"{self.spec}"
        return f"{what} in {str(self.dtype).removeprefix('torch.')} on {self.device.type}"


class VerifiedOn(TypedDict):
    """A GPU on which the tests passed; ``current`` says whether with the sources and the versions that are here now."""

    gpu: str
    arch: str
    torch: str
    triton: str | None
    commit: str
    date: str
    current: bool


class BackendStatus(TypedDict):
    available: bool
    reason: str | None
    description: str
    needs_verification: bool
    verified_on: list[VerifiedOn]
    here: dict[str, str]


class Hindrance(str):
    """A doubt that may be gone at the next call, so that nobody is to keep what was chosen because of it."""


class Backend(ABC):
    """One way to run a fused module. A subclass says what it can do as data; it never falls back to another."""

    name: str
    description: str
    for_tests = False
    """Whether nobody would use it for its results: automatic choice and benchmarks pass it over, and no message offers it."""

    last_resort = False
    """Whether it is slow enough for ending there to be worth a warning."""

    needs_verification = False
    """Whether automatic choice uses it on a GPU only where it was seen to be right (see ``trust``)."""

    has_response_norm = False
    """Whether it normalises responses itself; elsewhere torch's operators do."""

    arithmetics: tuple[str, ...] = ("float16", "bfloat16", "float32", "tf32")
    """What it multiplies on a GPU, in the terms of ``arithmetic``."""

    @abstractmethod
    def probe(self) -> str | None:
        """Why this backend cannot run on this machine at all, or None if it can."""

    @abstractmethod
    def supports(self, problem: Problem) -> str | None:
        """Why this backend cannot run ``problem``, or None if it can."""

    def described(self) -> str:
        """What it is on this machine, on which it can run: its description, unless there is more to say."""
        return self.description

    def facts(self) -> dict[str, Any]:
        """What ``doctor --json`` tells of it besides its status."""
        return {}

    def sources(self) -> str:
        """What names the code that runs besides the Python of this backend, for a verdict to depend on."""
        return ""

    def doubt(self, problem: Problem) -> str | None:
        """Why automatic choice passes this backend over although it supports ``problem``, or None.

        A backend that was asked for by name runs all the same. It is asked at every call, so an answer should be kept, unless
        it is a ``Hindrance``.
        """
        return None

    def ways(self, problem: Problem) -> Mapping[str, AbstractContextManager[None]]:
        """Further ways in which it may come to run ``problem``, by name: each a context, entered once, within which it does.

        A self-check tries them besides what the backend does by itself.
        """
        return {}

    def prepare(self, packed: PackedInception, input_shape: Sequence[int]) -> tuple[Tensor, ...]:
        """What ``inception`` wants of the packed weights in a form of its own: made once and kept for as long as they are.

        It serves inputs of every shape; ``input_shape`` is that of the first.
        """
        return ()

    @abstractmethod
    def inception(self, x: Tensor, packed: PackedInception, prepared: tuple[Tensor, ...], out: Tensor) -> None:
        """Write all four branches of the module into ``out``.

        Args:
            x: input ``[n, in_channels, h, w]`` with n, h, w >= 1, any strides.
            packed: weights of x's dtype and device.
            prepared: what ``prepare`` made of them.
            out: the concat buffer ``[n, out_channels, h, w]``, any strides; every element is written, nothing else is.
        """

    def prepare_conv2d(
        self, weight: Tensor, stride: Sequence[int], padding: Sequence[int], input_shape: Sequence[int]
    ) -> tuple[Tensor, ...]:
        """As ``prepare``, for ``conv2d_relu``."""
        return ()

    def conv2d_relu(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        prepared: tuple[Tensor, ...],
        stride: Sequence[int],
        padding: Sequence[int],
    ) -> Tensor:
        """``relu(conv2d(x, weight, bias))``, channels_last. Torch's own operators unless a backend has something better."""
        out = F.conv2d(x.contiguous(memory_format=torch.channels_last), weight, bias, stride, padding).relu_()
        laid_out = torch.empty_like(out, device="meta", memory_format=torch.channels_last)
        if out.stride() == laid_out.stride():  # asked so, because strides of one channel or pixel are ambiguous
            return out
        return torch.empty_like(out, memory_format=torch.channels_last).copy_(out)

    def local_response_norm(self, x: Tensor, norm: ResponseNorm) -> Tensor:
        """``x [n, c, h, w]`` normalised, in its dtype; only where ``has_response_norm`` says so."""
        raise NotImplementedError(f"backend {self.name!r} has no local response norm")


class DamagedInstallation(RuntimeError):
    """A file that comes with the package is missing or damaged; the message names it."""


class BackendError(RuntimeError):
    """The backend that was asked for cannot run the problem; the message says why and what can."""


_backends: dict[str, Backend] = {}
_requested: ContextVar[str] = ContextVar("googlenet_fused_backend", default=AUTO)
_announced: set[tuple[str, str, torch.dtype]] = set()


def register(backend: Backend) -> None:
    """Add a backend. Automatic choice prefers the one registered last."""
    if backend.name == AUTO or backend.name in _backends:
        raise ValueError(f"the backend name {backend.name!r} is taken")
    _backends[backend.name] = backend


def names() -> list[str]:
    """Names of the registered backends, the most preferred first."""
    return list(reversed(_backends))


def get(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: there is none.
    """
    check_name(name)
    return _backends[name]


def check_name(name: str) -> None:
    """Raise ValueError unless ``name`` is ``"auto"`` or a registered backend."""
    if name != AUTO and name not in _backends:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(repr(known) for known in [AUTO, *names()])}")


def status() -> dict[str, BackendStatus]:
    """For every backend: whether it can run on this machine and, if not, why; the GPUs that it is known to be right on; and
    what is known of it on the current one, as ``trust.standing`` says it.

    Raises:
        DamagedInstallation: the record of these GPUs, which comes with the package, cannot be read.
    """
    from googlenet_fused.backends import trust  # which needs this module

    report: dict[str, BackendStatus] = {}
    for name in names():
        backend, reason = _backends[name], unavailable(name)
        verified: list[VerifiedOn] = []
        if backend.needs_verification:
            try:
                verified = trust.verified_on(backend)
            except SystemExit:  # of a broken Triton, whose version is asked for
                pass
            except (OSError, ValueError) as error:
                raise DamagedInstallation(f"the installation is damaged: {first_line(error)}; install it anew") from error
        report[name] = {
            "available": reason is None,
            "reason": reason,
            "description": backend.described() if reason is None else backend.description,
            "needs_verification": backend.needs_verification,
            "verified_on": verified,
            "here": trust.standing(backend) if backend.needs_verification and reason is None else {},
        }
    return report


def unavailable(name: str) -> str | None:
    """Why the backend of that name cannot run on this machine, or None if it can; a probe that fails is a reason."""
    try:
        return get(name).probe()
    except (Exception, SystemExit) as error:
        return f"its probe failed: {type(error).__name__}: {first_line(error)}"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, run fused modules whose own ``backend`` is ``"auto"`` with this backend.

    Raises:
        ValueError: no backend has this name.
        BackendError: raised by the call of a module that the backend cannot run, with the reason.
    """
    check_name(name)
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def requested(name: str) -> str:
    """The backend asked for here by a module or call that itself asks for ``name``."""
    return _requested.get() if name == AUTO else name


def select(name: str, problem: Problem, *, lasting: bool = False) -> Backend:
    """The backend for ``problem``: the one named, else the one of ``use_backend``, else the most preferred that supports it
    without a doubt.

    Args:
        lasting: the choice is to be kept for later calls.

    Raises:
        ValueError: no backend has this name, or a choice that is to be kept is hindered.
        BackendError: the backend that was named cannot run the problem.
    """
    name = requested(name)
    if name != AUTO:
        backend = get(name)
        reason = backend.supports(problem)
        if reason is not None:
            able = [other for other in names() if not get(other).for_tests and get(other).supports(problem) is None]
            raise BackendError(
                f"backend {name!r} cannot run {problem}: {reason}. Backends that can: {', '.join(map(repr, able)) or 'none'}"
            )
        return backend
    refusals: dict[str, str] = {}
    for candidate in names():
        backend = _backends[candidate]
        reason = backend.supports(problem)
        if reason is None:
            reason = backend.doubt(problem)
        if lasting and isinstance(reason, Hindrance):
            raise ValueError(f"no backend is settled for {problem}: {candidate}: {reason}")
        if reason is None:
            _announce(backend, problem, refusals)
            return backend
        refusals[candidate] = reason
    raise BackendError(f"no backend can run {problem}: " + "; ".join(f"{name}: {why}" for name, why in refusals.items()))


def _announce(backend: Backend, problem: Problem, refusals: dict[str, str]) -> None:
    key = (backend.name, problem.device.type, problem.dtype)
    if key in _announced:
        return
    _announced.add(key)
    why = "; ".join(f"{name}: {reason}" for name, reason in refusals.items()) or "the most preferred backend supports it"
    # Ending at the last resort costs the user speed, which they would want to hear of without asking.
    level = logging.WARNING if refusals and backend.last_resort else logging.INFO
    dtype = str(problem.dtype).removeprefix("torch.")
    logger.log(level, "auto chose backend %r for %s on %s (%s)", backend.name, dtype, problem.device.type, why)

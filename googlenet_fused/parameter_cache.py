"""A cache of values derived from parameters, which follows the parameters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Generic, NamedTuple, TypeVar
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

logger = logging.getLogger("googlenet_fused")

Value = TypeVar("Value", bound=tuple[Tensor, ...])


_optimizer_steps = 0


def _count_optimizer_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Fused optimizers write to parameters without moving their version counters.
register_optimizer_step_post_hook(_count_optimizer_step)


_FOLLOWED = {Tensor, Parameter}


class _Entry(NamedTuple, Generic[Value]):
    sources: tuple[ReferenceType[Tensor], ...]
    aliases: tuple[Tensor, ...]  # keep the memory, so that an address cannot come to mean another tensor's
    states: list[tuple[int, int]]
    optimizer_steps: int
    value: Value


class ParameterCache(Generic[Value]):
    """Values built from tensors, kept for as long as none of those tensors is replaced, moved or written to.

    An entry lives as long as its first source tensor and is valid while every source is the same object with the same version
    counter and storage address and no optimizer of torch's has made a step. In-place updates, ``load_state_dict``, training
    steps and ``Module.to`` all change one of these. A write through ``.data`` or ``.detach().numpy()`` changes none and cannot
    be seen: ``forget`` serves that case.
    """

    def __init__(self) -> None:
        self._entries: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def get(self, sources: Sequence[Tensor], key: Hashable, build: Callable[[], Value]) -> Value:
        """The value of ``build()`` for these sources and ``key``: kept if still valid, else built, without autograd."""
        states = self._states(sources)
        if states is None:
            return _build_detached(build)
        by_key: dict[Hashable, _Entry[Value]] | None = self._entries.get(sources[0])
        if by_key is None:
            by_key = self._entries[sources[0]] = {}
        entry = by_key.get(key)
        if entry is not None and entry.optimizer_steps == _optimizer_steps and entry.states == states:
            for known, source in zip(entry.sources, sources, strict=True):
                if known() is not source:
                    break
            else:
                return entry.value
        if entry is not None:
            by_key.clear()  # what was built for other keys is stale too
        value = _build_detached(build)
        if all(type(tensor) is Tensor for tensor in value):  # under a fake mode it is not
            references, aliases = tuple(ref(source) for source in sources), tuple(source.detach() for source in sources)
            by_key[key] = _Entry(references, aliases, states, _optimizer_steps, value)
        return value

    def forget(self, source: Tensor) -> None:
        """Drop what was built with ``source`` as the first source tensor."""
        self._entries.pop(source, None)

    def _states(self, sources: Sequence[Tensor]) -> list[tuple[int, int]] | None:
        """Version and address of each source; None where a tensor has neither (inference, functorch and fake tensors)."""
        if not _FOLLOWED.issuperset(map(type, sources)):
            return None
        try:
            return [(source._version, source.data_ptr()) for source in sources]
        except RuntimeError:
            if any(source.is_inference() for source in sources):
                _warn_of_inference_tensors()
            return None


def _build_detached(build: Callable[[], Value]) -> Value:
    # Built as ordinary tensors even inside inference_mode, so that they carry a version counter themselves.
    with torch.inference_mode(False), torch.no_grad():
        return build()


@cache
def _warn_of_inference_tensors() -> None:
    logger.warning(
        "the model's parameters were created under torch.inference_mode(), so changes to them cannot be followed and its "
        "weights are packed anew in every call; build or load the model outside inference_mode"
    )

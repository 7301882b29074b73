"""A cache of values derived from parameters, which follows the parameters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Generic, NamedTuple, TypeVar
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

logger = logging.getLogger("googlenet_fused")

Value = TypeVar("Value")


class _Entry(NamedTuple, Generic[Value]):
    sources: tuple[ReferenceType[Tensor], ...]
    states: list[tuple[int, int]]
    value: Value


class ParameterCache(Generic[Value]):
    """Values built from tensors, kept for as long as none of those tensors is replaced, moved or written to.

    An entry lives as long as its first source tensor and is valid while every source is the same object with the same version
    counter and storage address. In-place updates, ``load_state_dict``, ``optimizer.step`` and ``Module.to`` all change one of
    these. A write through ``.data`` or ``.detach().numpy()`` changes neither and cannot be seen: ``forget`` serves that case.
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
        if entry is not None and entry.states == states:
            for known, source in zip(entry.sources, sources, strict=True):
                if known() is not source:
                    break
            else:
                return entry.value
        value = _build_detached(build)
        by_key[key] = _Entry(tuple(ref(source) for source in sources), states, value)
        return value

    def forget(self, source: Tensor) -> None:
        """Drop what was built with ``source`` as the first source tensor."""
        self._entries.pop(source, None)

    def _states(self, sources: Sequence[Tensor]) -> list[tuple[int, int]] | None:
        """Version and address of each source; None where a tensor has neither (inference, functorch and fake tensors)."""
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

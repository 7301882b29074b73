"""What is derived from parameters, and how it follows them: a cache keyed by tensors, and a watch over a module."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from operator import attrgetter, is_
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

logger = logging.getLogger("googlenet_fused")

Value = TypeVar("Value", bound=tuple[Tensor, ...])
Watched = TypeVar("Watched")


_forgotten = 0  # calls of forget: a watch looks again after one
_optimizer_steps = 0
_last_step: dict[int, int] = {}  # by id of a parameter; an id that comes to mean another one costs a rebuild


def _record_optimizer_step(optimizer: Optimizer, *_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1
    _last_step.update((id(parameter), _optimizer_steps) for group in optimizer.param_groups for parameter in group["params"])


# Fused optimizers write to parameters without moving their version counters.
register_optimizer_step_post_hook(_record_optimizer_step)


def _stepped_since(steps: int, tensors: Sequence[Tensor]) -> bool:
    return steps != _optimizer_steps and any(_last_step.get(id(tensor), 0) > steps for tensor in tensors)


_FOLLOWED = {Tensor, Parameter}


# A CUDA device reads a kept value after the call that hands it out: on whichever stream that call was made, and in a captured
# graph at every replay.

_pinned: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by source: by id, the values that captured graphs read
_pinned_for_good: list[Sequence[Tensor]] = []


def capturing(tensor: Tensor) -> bool:
    """Whether what is done with ``tensor`` now is captured in a CUDA graph instead of run."""
    if not tensor.is_cuda:
        return False
    if tensor.device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(tensor.device):  # whose stream is asked about
        return torch.cuda.is_current_stream_capturing()


def lend(source: Tensor, value: Sequence[Tensor], streams: set[int]) -> None:
    """Have ``value``, kept of ``source``, outlive the CUDA kernels that the caller is about to launch on it.

    A graph that captures them may be replayed for as long as ``source`` lives, and so does ``value`` then. Otherwise its memory
    is not used for anything else before they are done: ``streams`` are those for which the allocator knows that.
    """
    if not source.is_cuda:
        return
    if capturing(source):
        _pinned.setdefault(source, {})[id(value)] = value
    elif (handle := _current_stream(source)) not in streams:
        stream = torch.cuda.current_stream(source.device)
        if stream.stream_id != handle or handle == 0:  # an external one may be gone when the allocator turns to it
            for tensor in value:
                tensor.record_stream(stream)
        streams.add(handle)


def pin_for_good(source: Tensor) -> None:
    """Let go of ``source``, which torch does not swap while there are weak references to it, but not of what graphs read."""
    _pinned_for_good.extend(_pinned.pop(source, {}).values())


def _settle(source: Tensor) -> set[int]:
    """Wait for a value just built of ``source``; the streams that may read it without the allocator's knowledge.

    A later call on another stream would read it too early, as nothing orders the two. Values are built rarely enough to wait.
    """
    if not source.is_cuda:
        return set()
    stream = torch.cuda.current_stream(source.device)
    stream.synchronize()
    return {stream.cuda_stream}


def _current_stream(tensor: Tensor) -> int:
    return torch._C._cuda_getCurrentRawStream(tensor.device.index)  # torch.cuda.current_stream would take ten times as long


class _Entry(NamedTuple, Generic[Value]):
    sources: tuple[ReferenceType[Tensor], ...]
    aliases: tuple[Tensor, ...]  # keep the memory, so that an address cannot come to mean another tensor's
    states: list[tuple[int, int]]
    optimizer_steps: int
    value: Value
    streams: set[int]


class ParameterCache(Generic[Value]):
    """Values built from tensors, kept for as long as none of those tensors is replaced, moved or written to.

    An entry lives as long as its first source tensor and is valid while every source is the same object with the same version
    counter and storage address and no optimizer of torch's has made a step on it. In-place updates, ``load_state_dict``,
    training steps and ``Module.to`` all change one of these. A write through ``.data``, through ``.detach().numpy()``, by
    another process to shared memory, or by batch norm to its running statistics changes none and cannot be seen: ``forget``
    serves those cases.

    Values on a CUDA device may be used on every stream. While the current one captures a graph, none is kept; one kept before
    is, beyond its validity, for as long as its first source tensor lives, since every replay reads it.
    """

    def __init__(self) -> None:
        self._entries: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def get(self, sources: Sequence[Tensor], key: Hashable, build: Callable[[], Value]) -> Value:
        """The value of ``build()`` for these sources and ``key``: kept if still valid, else built, without autograd."""
        states = _states(sources)
        if states is None:
            return _build_detached(build)
        by_key: dict[Hashable, _Entry[Value]] | None = self._entries.get(sources[0])
        if by_key is None:
            by_key = self._entries[sources[0]] = {}
        entry = by_key.get(key)
        if entry is not None and entry.states == states and not _stepped_since(entry.optimizer_steps, sources):
            for known, source in zip(entry.sources, sources, strict=True):
                if known() is not source:
                    break
            else:
                lend(sources[0], entry.value, entry.streams)
                return entry.value
        if capturing(sources[0]):  # each replay makes the value anew, in the graph's memory: before the first it is not there
            return _build_detached(build)
        if entry is not None:
            by_key.clear()  # what was built for other keys is stale too
        value = _build_detached(build) if not sources[0].is_cuda else _build_beyond_pools(build, sources[0])
        if all(type(tensor) is Tensor for tensor in value):  # under a fake mode it is not
            references, aliases = tuple(ref(source) for source in sources), tuple(source.detach() for source in sources)
            by_key[key] = _Entry(references, aliases, states, _optimizer_steps, value, _settle(sources[0]))
        return value

    def forget(self, source: Tensor) -> None:
        """Drop what was built with ``source`` as the first source tensor."""
        global _forgotten
        _forgotten += 1
        self._entries.pop(source, None)


class ModuleWatch(Generic[Watched]):
    """A value derived from all the tensors of a module in evaluation mode, and a quick way to ask whether it still holds.

    It sees a child, parameter or buffer replaced, written to or given other memory, a norm set to training or to another eps, a
    convolution given another stride or padding, batches counted by a norm, and every step of an optimizer of torch's. Asking
    costs half as much as collecting the tensors and looking them up: 60 us against 120 for a module whose memory other work
    has driven out of the caches.
    """

    def __init__(self, module: Module, build: Callable[[], Watched]) -> None:
        """``build`` must read all that it needs from the module, which may change before it is called.

        Raises:
            ValueError: the module holds a tensor that cannot be followed.
        """
        self._forgotten, self._optimizer_steps = _forgotten, _optimizer_steps
        self._root = module._modules
        slots: list[tuple[dict[str, Any], str, Any]] = []
        for child in module.modules():
            for members in (child._modules, child._parameters, child._buffers):
                slots += [(members, name, member) for name, member in members.items()]
            if child is not module:  # whose own attributes hold this watch: a cycle
                attributes = vars(child)
                names = ("training", "eps") if "eps" in attributes else ("stride", "padding")
                slots += [(attributes, name, attributes[name]) for name in names if name in attributes]
        self._owners, self._names, self._members = zip(*slots, strict=True)
        self._tensors = [member for member in self._members if isinstance(member, Tensor)]
        states = _states(self._tensors)
        if states is None:
            raise ValueError("a parameter or buffer has no version to follow")
        self._versions, self._addresses = [version for version, _ in states], [address for _, address in states]
        self._aliases = [tensor.detach() for tensor in self._tensors]  # as in _Entry
        self.value = build()

    def intact(self, module: Module) -> bool:
        """Whether ``module`` is the one that was watched (and not a copy that took over its attributes), unchanged."""
        return (
            not module.training
            and self._root is module._modules
            and all(map(is_, map(dict.get, self._owners, self._names), self._members))
            and list(map(_version_of, self._tensors)) == self._versions
            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
        )

    def current(self) -> bool:
        """Whether nothing happened since that ``intact`` could not see."""
        return self._forgotten == _forgotten and not _stepped_since(self._optimizer_steps, self._tensors)


_version_of = attrgetter("_version")


def _states(sources: Sequence[Tensor]) -> list[tuple[int, int]] | None:
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


def _build_beyond_pools(build: Callable[[], Value], source: Tensor) -> Value:
    """Builds a value on the current stream of ``source``'s device, in memory that the allocator may keep.

    Before it captures a graph, Inductor makes a call whose allocations all go to the graph's memory pool, which must be empty
    afterwards. That holds for the thread that makes the call, and for no other.
    """
    # Not a documented interface. A mode holds for one thread too, and has its own idea of what is built.
    if getattr(torch._C, "_len_torch_dispatch_stack", int)():
        return _build_detached(build)
    stream = torch.cuda.current_stream(source.device)

    def build_here() -> Value:
        with torch.cuda.stream(stream):
            return _build_detached(build)

    with ThreadPoolExecutor(max_workers=1) as thread:
        try:
            built = thread.submit(build_here)
        except RuntimeError:  # the interpreter is shutting down
            return _build_detached(build)
        return built.result()


@cache
def _warn_of_inference_tensors() -> None:
    logger.warning(
        "the model's parameters were created under torch.inference_mode(), so changes to them cannot be followed and its "
        "weights are packed anew in every call; build or load the model outside inference_mode"
    )

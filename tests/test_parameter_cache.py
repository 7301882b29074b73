"""The cache of what is built from tensors: it follows every change of them, and nothing that it holds outlives them."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from pretended_cuda import PretendedCuda
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from googlenet_fused import parameter_cache
from googlenet_fused.parameter_cache import ParameterCache, pin_for_good


class Counter:
    """A ``build`` that counts its calls and returns twice the first source."""

    def __init__(self, *sources: Tensor) -> None:
        self.sources = sources
        self.builds = 0

    def __call__(self) -> Tensor:
        self.builds += 1
        return self.sources[0] * 2


@pytest.fixture
def cache() -> ParameterCache[Tensor]:
    return ParameterCache()


def test_hit_while_nothing_changes(cache: ParameterCache[Tensor]) -> None:
    sources = [torch.randn(3), torch.randn(3)]
    build = Counter(*sources)
    first = cache.get(sources, "key", build)
    assert all(cache.get(list(sources), "key", build) is first for _ in range(5))
    assert build.builds == 1


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "in-place operator": lambda t: t.add_(1),
    "assignment to a slice": lambda t: t.__setitem__(0, 5.0),
    "copy_": lambda t: t.copy_(torch.ones(3)),
    "out=": lambda t: torch.mul(t, 3, out=t),
    "through a view": lambda t: t.view(3, 1).zero_(),
    "through detach": lambda t: t.detach().mul_(2),
    ".data swapped": lambda t: setattr(t, "data", torch.full((3,), 7.0)),
    ".data swapped for another dtype": lambda t: setattr(t, "data", torch.full((3,), 7.0).double()),
    "set_": lambda t: t.set_(torch.full((3,), 7.0)),
    "inside inference_mode": torch.inference_mode()(lambda t: t.mul_(2)),
}


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("change", CHANGES)
def test_rebuilt_after_a_change(change: str, which: int, cache: ParameterCache[Tensor]) -> None:
    sources = [torch.randn(3), torch.randn(3)]
    build = Counter(*sources)
    cache.get(sources, None, build)
    CHANGES[change](sources[which])
    assert torch.equal(cache.get(sources, None, build), sources[0] * 2)
    assert build.builds == 2
    cache.get(sources, None, build)
    assert build.builds == 2


@pytest.mark.parametrize("which", [0, 1])
def test_rebuilt_after_a_source_is_replaced(which: int, cache: ParameterCache[Tensor]) -> None:
    sources = [torch.randn(3), torch.randn(3)]
    build = Counter(*sources)
    cache.get(sources, None, build)
    # An alias has the same version and address, and is another tensor all the same.
    sources[which] = sources[which].detach()
    cache.get(sources, None, build)
    assert build.builds == 2


def test_rebuilt_when_sources_come_or_go_or_change_places(cache: ParameterCache[Tensor]) -> None:
    a, b, c = torch.randn(3), torch.randn(3), torch.randn(3)
    for builds, sources in enumerate([[a], [a, b], [a, b, c], [a, c, b], [a, b]], start=1):
        build = Counter(*sources)
        cache.get(sources, None, build)
        assert build.builds == 1, builds


def test_rebuilt_when_the_memory_is_used_again(cache: ParameterCache[Tensor]) -> None:
    # Beyond 32 MiB the C library gives memory back to the system, and gets it again at the same address: then version and
    # address are as before. The caching allocator of a GPU does this at every size.
    source = nn.Parameter(torch.full((9_000_000,), 1 / 3))
    cache.get([source], None, lambda: source[:1] * 1)
    source.data = source.data.bfloat16()
    source.data = source.data.float()
    assert cache.get([source], None, lambda: source[:1] * 1).item() == source[0].item()


def test_keys_are_kept_apart(cache: ParameterCache[Tensor]) -> None:
    source = torch.randn(3)
    values = {key: cache.get([source], key, lambda key=key: source.to(key[0]) * key[1]) for key in _KEYS}
    for key in _KEYS:
        assert cache.get([source], key, pytest.fail) is values[key]
        assert torch.equal(values[key], source.to(key[0]) * key[1])
    source.add_(1)
    for key in _KEYS:
        assert torch.equal(cache.get([source], key, lambda key=key: source.to(key[0]) * key[1]), source.to(key[0]) * key[1])


_KEYS = [(torch.float32, 1), (torch.float32, 2), (torch.bfloat16, 1)]


def test_caches_are_kept_apart() -> None:
    source = torch.randn(3)
    first, second = ParameterCache[Tensor](), ParameterCache[Tensor]()
    assert first.get([source], None, lambda: source + 1) is not second.get([source], None, lambda: source + 2)


def test_forget(cache: ParameterCache[Tensor]) -> None:
    source, other = torch.randn(3), torch.randn(3)
    build, other_build = Counter(source), Counter(other)
    for key in (1, 2):
        cache.get([source], key, build)
    cache.get([other], 1, other_build)
    source.data.mul_(2)  # not to be seen
    cache.forget(source)
    cache.forget(torch.randn(3))
    for key in (1, 2):
        assert torch.equal(cache.get([source], key, build), source * 2)
    cache.get([other], 1, other_build)
    assert (build.builds, other_build.builds) == (4, 1)


def test_values_die_with_the_first_source(cache: ParameterCache[Tensor]) -> None:
    source, other = torch.randn(3), torch.randn(3)
    value = weakref.ref(cache.get([source, other], None, Counter(source)))
    assert value() is not None
    del source
    gc.collect()
    assert value() is None


def test_a_source_is_not_kept_alive(cache: ParameterCache[Tensor]) -> None:
    first, second = torch.randn(3), torch.randn(3)
    cache.get([first, second], None, lambda: torch.zeros(1))
    alive = weakref.ref(second)
    del second
    gc.collect()
    assert alive() is None
    build = Counter(first)
    cache.get([first, torch.randn(3)], None, build)
    assert build.builds == 1


def test_a_rebuilt_value_replaces_the_old_one(cache: ParameterCache[Tensor]) -> None:
    source = torch.randn(3)
    old = weakref.ref(cache.get([source], None, Counter(source)))
    source.add_(1)
    cache.get([source], None, Counter(source))
    gc.collect()
    assert old() is None


def test_an_id_that_is_used_again(cache: ParameterCache[Tensor]) -> None:
    seen: set[int] = set()
    reused = 0
    for i in range(200):
        source = torch.full((3,), float(i))
        reused += id(source) in seen
        seen.add(id(source))
        assert torch.equal(cache.get([source], None, Counter(source)), source * 2)
    assert reused > 0


def test_nothing_is_kept_of_a_failed_build(cache: ParameterCache[Tensor]) -> None:
    source = torch.randn(3)
    with pytest.raises(ZeroDivisionError):
        cache.get([source], None, lambda: source / (1 // 0))
    assert torch.equal(cache.get([source], None, Counter(source)), source * 2)


def test_values_are_ordinary_tensors_without_a_graph(cache: ParameterCache[Tensor]) -> None:
    source = nn.Parameter(torch.randn(3))
    with torch.inference_mode():
        value = cache.get([source], None, Counter(source))
        assert not torch.is_inference(value)
    assert value.grad_fn is None
    assert not value.requires_grad
    leaf = torch.randn(3, requires_grad=True)
    (leaf * value).sum().backward()  # an inference tensor could not be saved for this
    assert torch.equal(leaf.grad, value)
    with torch.inference_mode():
        assert cache.get([source], None, pytest.fail) is value
        assert torch.equal(value + 1, source * 2 + 1)


def test_inference_tensors_are_packed_anew_with_one_warning(
    cache: ParameterCache[Tensor], warnings_of_inference_tensors: Callable[[], int]
) -> None:
    with torch.inference_mode():
        sources = [torch.randn(3), torch.randn(3)]
    build = Counter(*sources)
    for _ in range(3):
        with torch.inference_mode():
            sources[0].mul_(2)
        assert torch.equal(cache.get(sources, None, build), sources[0] * 2)
    assert build.builds == 3
    mixed = [torch.randn(3), sources[0]]
    build = Counter(*mixed)
    cache.get(mixed, None, build)
    cache.get(mixed, None, build)
    assert build.builds == 2
    assert warnings_of_inference_tensors() == 1


@pytest.mark.parametrize("allow_non_fake_inputs", [False, True])
def test_nothing_is_kept_of_a_fake_mode(allow_non_fake_inputs: bool, cache: ParameterCache[Tensor]) -> None:
    source = torch.randn(3)
    with FakeTensorMode(allow_non_fake_inputs=allow_non_fake_inputs) as mode:
        cache.get([mode.from_tensor(source)], None, lambda: torch.zeros(3))
        if allow_non_fake_inputs:
            cache.get([source], None, Counter(source))
    assert torch.equal(cache.get([source], None, Counter(source)), source * 2)


# On a CUDA device.


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> PretendedCuda:
    return PretendedCuda(monkeypatch)


def test_a_value_is_waited_for_once_it_is_built(cache: ParameterCache[Tensor], cuda: PretendedCuda) -> None:
    source = torch.randn(3)
    waits_at_build = []

    def build() -> Tensor:
        waits_at_build.append(cuda.side.waits)
        return source * 2

    cuda.stream = cuda.side
    cache.get([source], None, build)
    assert (waits_at_build, cuda.side.waits) == ([0], 1)
    cuda.stream = cuda.default
    cache.get([source], None, build)
    cuda.stream = cuda.side
    source.add_(1)
    cache.get([source], None, build)
    assert (waits_at_build, cuda.side.waits, cuda.default.waits) == ([0, 1], 2, 0)


def test_a_value_is_built_where_no_pool_of_the_callers_thread_is_used(
    cache: ParameterCache[Tensor], cuda: PretendedCuda
) -> None:
    """As Inductor sets one for the call before a capture; that of the caller's stream, and of its device."""
    source = torch.randn(3)
    seen = []

    def build() -> Tensor:
        seen.append((threading.current_thread() is threading.main_thread(), list(cuda.entered), torch.is_grad_enabled()))
        return source * 2

    cuda.stream = cuda.side
    with torch.inference_mode():
        value = cache.get([source], None, build)
    assert not value.is_inference()
    assert cache.get([source], None, pytest.fail) is value
    source.add_(1)
    cuda.capturing = True
    cache.get([source], None, build)
    assert seen == [(False, [cuda.side], False), (True, [cuda.side], False)], "a capture's own value is the graph's"


def test_an_error_of_a_build_is_the_callers(cache: ParameterCache[Tensor], cuda: PretendedCuda) -> None:
    def build() -> Tensor:
        raise ZeroDivisionError("in a thread")

    with pytest.raises(ZeroDivisionError, match="in a thread"):
        cache.get([torch.randn(3)], None, build)


def test_a_capture_on_a_device_that_is_not_the_current_one(cache: ParameterCache[Tensor], cuda: PretendedCuda) -> None:
    source = torch.randn(3)
    cuda.capturing, cuda.current = True, 1
    first = cache.get([source], None, Counter(source))
    assert cuda.current == 1
    assert cache.get([source], None, Counter(source)) is not first, "nothing is kept of a capture"


def test_nothing_is_kept_of_a_capture(cache: ParameterCache[Tensor], cuda: PretendedCuda) -> None:
    source = torch.randn(3)
    build = Counter(source)
    cuda.capturing = True
    in_graph = [cache.get([source], None, build) for _ in range(2)]
    assert all(torch.equal(value, source * 2) for value in in_graph)
    assert cuda.default.waits == 0, "a stream that captures cannot be waited for"
    alive = [weakref.ref(value) for value in in_graph]
    del in_graph
    assert not any(reference() is not None for reference in alive)
    cuda.capturing = False
    kept = cache.get([source], None, build)
    assert cache.get([source], None, build) is kept
    assert build.builds == 3


def test_a_stale_value_is_not_used_in_a_capture_nor_its_successor_kept(
    cache: ParameterCache[Tensor], cuda: PretendedCuda
) -> None:
    source = torch.randn(3)
    build = Counter(source)
    cache.get([source], None, build)
    source.add_(1)
    cuda.capturing = True
    assert torch.equal(cache.get([source], None, build), source * 2)
    cuda.capturing = False
    assert torch.equal(cache.get([source], None, build), source * 2)
    assert build.builds == 3


DROPS: dict[str, Callable[[ParameterCache[Tensor], Tensor], object]] = {
    "changed": lambda cache, source: source.add_(1),
    "forgotten": lambda cache, source: cache.forget(source),
    "changed and forgotten": lambda cache, source: (source.add_(1), cache.forget(source)),
}


@pytest.mark.parametrize("drop", DROPS)
def test_what_a_graph_reads_lives_as_long_as_the_first_source(
    drop: str, cache: ParameterCache[Tensor], cuda: PretendedCuda
) -> None:
    sources = [torch.randn(3), torch.randn(3)]
    alive = []
    for captures in (0, 1, 3):
        cuda.capturing = False
        value = cache.get(sources, None, Counter(*sources))
        cuda.capturing = True
        assert all(cache.get(sources, None, pytest.fail) is value for _ in range(captures))
        alive.append(weakref.ref(value))
        del value
        DROPS[drop](cache, sources[0])
        cuda.capturing = False
        cache.get(sources, None, Counter(*sources))
        DROPS[drop](cache, sources[0])
    del sources[1]
    gc.collect()
    assert [reference() is not None for reference in alive] == [False, True, True]
    assert len(parameter_cache._pinned[sources[0]]) == 2, "once each, however many captures"
    del sources[0]
    gc.collect()
    assert not any(reference() is not None for reference in alive)


def test_what_a_graph_reads_outlives_a_source_that_torch_swaps(cache: ParameterCache[Tensor], cuda: PretendedCuda) -> None:
    source = torch.randn(3)
    value = weakref.ref(cache.get([source], None, Counter(source)))
    cuda.capturing = True
    cache.get([source], None, pytest.fail)
    cache.forget(source)
    pin_for_good(source)
    pin_for_good(torch.randn(3))
    torch.utils.swap_tensors(source, torch.ones(3))
    del source
    gc.collect()
    assert value() is not None


def test_the_allocator_is_told_once_of_each_other_stream(
    cache: ParameterCache[tuple[Tensor, ...]], cuda: PretendedCuda
) -> None:
    source, other = torch.randn(3), torch.randn(3)
    value = cache.get([source], None, lambda: (source + 1, source + 2))
    cache.get([other], None, lambda: (other + 1,))
    for stream in (cuda.default, cuda.side, cuda.default, cuda.side):
        cuda.stream = stream
        assert cache.get([source], None, pytest.fail) is value
    assert cuda.side.recorded == [id(tensor) for tensor in value]
    assert cuda.default.recorded == []
    source.add_(1)
    value = cache.get([source], None, lambda: (source + 1,))
    assert len(cuda.side.recorded) == 2
    cuda.stream = cuda.default
    cache.get([source], None, pytest.fail)
    assert cuda.default.recorded == [id(value[0])]


def test_the_allocator_is_not_told_of_a_stream_that_may_be_gone(cache: ParameterCache[Tensor], cuda: PretendedCuda) -> None:
    source = torch.randn(3)
    cache.get([source], None, Counter(source))
    cuda.stream = cuda.external
    cache.get([source], None, pytest.fail)
    assert cuda.external.recorded == []


def test_the_allocator_is_not_told_in_a_capture(cache: ParameterCache[Tensor], cuda: PretendedCuda) -> None:
    source = torch.randn(3)
    value = cache.get([source], None, Counter(source))
    cuda.stream, cuda.capturing = cuda.side, True
    cache.get([source], None, pytest.fail)
    assert cuda.side.recorded == []
    cuda.capturing = False
    cache.get([source], None, pytest.fail)
    assert len(cuda.side.recorded) == len(value)

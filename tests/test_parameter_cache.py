"""The cache of what is built from tensors: it follows every change of them, and nothing that it holds outlives them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from googlenet_fused.parameter_cache import ParameterCache


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

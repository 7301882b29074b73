"""FusedInception under autocast, gradient modes, functional_call and threads, in every memory format, empty and on meta."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from cases import LAYOUTS, ODD_SPECS, TINY, assert_same, can_run, fused_inception, plain_inception, random_input
from torch import Tensor, nn

from googlenet_fused.backends import registry
from googlenet_fused.blocks import Norm
from googlenet_fused.tolerance import check_close

PRIMES = ODD_SPECS["primes"]
every_backend = pytest.mark.parametrize("backend", can_run(torch.float32))
both_norms = pytest.mark.parametrize("norm", ["batch", None])


@every_backend
@pytest.mark.parametrize("amp_dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@both_norms
def test_autocast(norm: Norm, amp_dtype: torch.dtype, backend: str) -> None:
    if backend not in can_run(amp_dtype):
        pytest.skip(f"{backend} cannot run {amp_dtype} here")
    spec = replace(PRIMES, large_kernel=5)
    plain, fused, x = plain_inception(spec, norm), fused_inception(spec, norm, backend=backend), random_input(spec, 2, 9, 8)
    twice = torch.cat([x, x])
    for grad in (False, True):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", amp_dtype):
            actual = fused(x)
            peers = [plain(x), plain(twice)[:2], plain(LAYOUTS["channels_last"](twice))[:2]]
        assert actual.dtype == peers[0].dtype == amp_dtype
        check_close(actual, peers, copy.deepcopy(plain).double()(x.double()))
    with torch.no_grad():
        with torch.autocast("cpu", amp_dtype), torch.autocast("cpu", enabled=False):
            assert fused(x).dtype == torch.float32
        with torch.autocast("cpu", amp_dtype):
            assert_same(fused(x.to(amp_dtype)), fused(x))
        assert fused(x).dtype == torch.float32


def test_autocast_leaves_fp64_alone() -> None:
    plain, fused = plain_inception(PRIMES).double(), fused_inception(PRIMES).double()
    x = random_input(PRIMES, 2, 4, 5, torch.float64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, actual = plain(x), fused(x)
    assert actual.dtype == expected.dtype == torch.float64
    check_close(actual, [expected], expected)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_memory_format_follows_the_input(dtype: torch.dtype, backend: str) -> None:
    if backend not in can_run(dtype):
        pytest.skip(f"{backend} cannot run {dtype} here")
    plain, fused = plain_inception(PRIMES).to(dtype), fused_inception(PRIMES, backend=backend).to(dtype)
    x = random_input(PRIMES, 3, 6, 5, dtype)
    channels_last = {"channels_last", "slice_of_wider"}
    for name, layout in LAYOUTS.items():
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                out = fused(layout(x))
            assert out.is_contiguous(memory_format=torch.channels_last) == (name in channels_last), name
            assert out.is_contiguous() == (name not in channels_last), name
            if name in ("contiguous", "channels_last"):
                assert out.stride() == plain(layout(x)).stride(), name


@every_backend
@both_norms
def test_gradient_modes_give_the_same_numbers(norm: Norm, backend: str) -> None:
    module, x = fused_inception(PRIMES, norm, backend=backend), random_input(PRIMES, 2, 6, 5)
    with torch.no_grad():
        expected = module(x)
    assert not expected.requires_grad
    with torch.inference_mode():
        inferred = module(x)
        assert inferred.is_inference()
    with_parameters = module(x)
    assert with_parameters.requires_grad
    module.requires_grad_(False)
    assert not module(x).requires_grad
    with_input = module(x.clone().requires_grad_())
    assert with_input.requires_grad
    for result in (inferred, with_parameters, module(x), with_input):
        assert_same(result.detach(), expected)


@every_backend
def test_a_module_made_under_inference_mode(backend: str) -> None:
    with torch.inference_mode():
        module = fused_inception(TINY, backend=backend)
        x = random_input(TINY, 2, 4, 5)
        first = module(x)
        assert_same(first, fused_inception(TINY, backend=backend)(x))
        module.branch1.conv.weight.mul_(2)
        assert_same(module(x), copy.deepcopy(module)(x))
        assert not torch.equal(module(x), first)


@every_backend
@both_norms
def test_functional_call(norm: Norm, backend: str) -> None:
    plain, module = plain_inception(PRIMES, norm, seed=9), fused_inception(PRIMES, norm, backend=backend)
    x = random_input(PRIMES, 2, 4, 5)
    other = fused_inception(PRIMES, norm, seed=9, backend=backend)
    with torch.no_grad():
        own, expected = module(x), other(x)
        assert not torch.equal(own, expected)
        for _ in range(2):
            assert_same(torch.func.functional_call(module, other.state_dict(), (x,)), expected)
            assert_same(module(x), own)
        assert_same(torch.func.functional_call(module, {k: v.clone() for k, v in other.state_dict().items()}, (x,)), expected)

    def gradients(host: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        state = {k: v.detach().to(dtype).requires_grad_() for k, v in plain.named_parameters()}
        buffers = {k: v.to(dtype) if v.is_floating_point() else v for k, v in plain.named_buffers()}
        torch.func.functional_call(host, {**state, **buffers}, (x.to(dtype),)).square().sum().backward()
        return {name: value.grad for name, value in state.items() if value.grad is not None}

    peers, truth = gradients(copy.deepcopy(plain), torch.float32), gradients(copy.deepcopy(plain).double(), torch.float64)
    for name, gradient in gradients(module, torch.float32).items():
        check_close(gradient, [peers[name]], truth[name], label=name)
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("norm", ["batch", None])
def test_meta_device(norm: Norm) -> None:
    module = fused_inception(PRIMES, norm).to("meta")
    for name in ("contiguous", "channels_last"):
        x = LAYOUTS[name](random_input(PRIMES, 2, 6, 5)).to("meta")
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                out = module(x)
            assert out.is_meta
            assert out.shape == (2, PRIMES.out_channels, 6, 5)
            assert out.is_contiguous(memory_format=torch.channels_last) == (name == "channels_last")


@every_backend
@both_norms
def test_empty_batch(norm: Norm, backend: str) -> None:
    module = fused_inception(PRIMES, norm, backend=backend)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert module(torch.empty(0, PRIMES.in_channels, 6, 5)).shape == (0, PRIMES.out_channels, 6, 5)


@every_backend
def test_shared_between_threads(backend: str) -> None:
    module = fused_inception(PRIMES, backend=backend)
    inputs = [random_input(PRIMES, 2, 6, 5, seed=seed) for seed in range(4)]
    with torch.no_grad():
        expected = [copy.deepcopy(module)(x) for x in inputs]
    start = threading.Barrier(len(inputs))

    def work(index: int) -> bool:
        start.wait(30)
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(module(inputs[index]), expected[index]):
                    return False
                if index == 0:
                    module.repack()
        return True

    with ThreadPoolExecutor(len(inputs)) as pool:
        assert all(pool.map(work, range(len(inputs))))


def test_every_backend_of_this_machine_is_tested() -> None:
    """The lists above are not empty, and hold what status() calls available."""
    assert "cpu" in can_run(torch.float32) or not registry.status()["cpu"]["available"]
    assert "reference" in can_run(torch.float64)

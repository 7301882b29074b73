"""The whole network, fused against plain: every backend, both variants, batches and sizes, by the one tolerance law.

Weights and batch norm statistics are randomised: freshly initialised ones leave the logits at ``fc.bias``, whatever the blocks
compute.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from cases import LAYOUTS, can_run
from torch import Tensor, nn
from torchvision.models.googlenet import GoogLeNet as TorchvisionGoogLeNet

from googlenet_fused import GOOGLENET_SPECS, FusedInception, fuse, googlenet, unfuse, use_backend
from googlenet_fused.backends import registry
from googlenet_fused.modules import FusedConv2d
from googlenet_fused.randomize import calibrate_batch_norm, randomize_
from googlenet_fused.tolerance import References, check_close, compare, references

Shape = tuple[int, int, int]
"""Batch, height and width."""


@cache
def plain_network(host: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """torchvision's own network, or ours in one of its variants, with auxiliary heads left out."""
    if host == "torchvision's own":
        model: nn.Module = TorchvisionGoogLeNet(aux_logits=False, transform_input=True, init_weights=False)
    else:
        model = googlenet(host, aux_logits=False, init_weights=False)  # type: ignore[arg-type]
    return randomize_(model, seed=11).to(dtype).eval()


@cache
def fused_network(host: str, dtype: torch.dtype, backend: str) -> nn.Module:
    fused = fuse(plain_network(host, dtype), backend=backend)
    assert sum(isinstance(module, FusedInception) for module in fused.modules()) == 9
    assert sum(isinstance(module, FusedConv2d) for module in fused.modules()) == 3
    return fused


def images(shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
    batch, height, width = shape
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randn(batch, 3, height, width, generator=generator).to(dtype)


@cache
def judged_by(host: str, dtype: torch.dtype, shape: Shape) -> References:
    return references(plain_network(host, dtype), images(shape, dtype))


@pytest.fixture(scope="module", autouse=True)
def _networks_are_forgotten() -> Iterator[None]:
    """Else they would take gigabytes from the tests that follow in this process."""
    yield
    for cached in (plain_network, fused_network, judged_by):
        cached.cache_clear()


def assert_parity(host: str, dtype: torch.dtype, backend: str, shape: Shape, layout: str = "contiguous") -> None:
    with torch.no_grad():
        actual = fused_network(host, dtype, backend)(LAYOUTS[layout](images(shape, dtype)))
    assert actual.shape == (shape[0], 1000)
    check_close(actual, *judged_by(host, dtype, shape), label=f"{host}, {dtype}, {backend}, {shape}")


def grid(dtype: torch.dtype, shapes: dict[str, list[Shape]], slow: tuple[Shape, ...] = ()) -> pytest.MarkDecorator:
    """Every backend that runs ``dtype``, with each network's shapes; those in ``slow`` are marked so."""
    return pytest.mark.parametrize(
        ("backend", "host", "shape"),
        [
            pytest.param(
                *(backend, host, shape),
                id=f"{backend}-{host}-{'x'.join(map(str, shape))}",
                marks=[pytest.mark.slow] if shape in slow else [],
            )
            for backend in can_run(dtype)
            for host, wanted in shapes.items()
            for shape in wanted
        ],
    )


LARGE: tuple[Shape, ...] = ((1, 224, 224), (1, 299, 299))

FP32: dict[str, list[Shape]] = {
    "torchvision's own": [
        *(
            (0, 64, 64),
            (1, 15, 15),
            (2, 16, 16),
            (5, 31, 31),
            (1, 64, 64),
            (1, 64, 97),
            (2, 97, 64),
            (5, 15, 299),
            (1, 299, 16),
        ),
        *LARGE,
    ],
    "torchvision": [(0, 15, 15), (1, 16, 15), (2, 31, 31), (5, 64, 64), (1, 97, 97)],
    "slim": [(0, 15, 15), (1, 1, 1), (2, 31, 30), (1, 97, 64)],
    "bvlc": [(0, 64, 64), (1, 31, 31), (1, 64, 64), (2, 32, 47), (5, 31, 64), (1, 97, 97), (1, 299, 33), *LARGE],
}


@grid(torch.float32, FP32, slow=LARGE)
def test_fp32(backend: str, host: str, shape: Shape) -> None:
    assert_parity(host, torch.float32, backend, shape)


BF16: dict[str, list[Shape]] = {
    "torchvision's own": [(0, 64, 64), (1, 15, 15), (2, 16, 31), (5, 31, 31), (1, 64, 64), (1, 97, 64), (1, 299, 299)],
    "torchvision": [(1, 16, 15), (2, 64, 64)],
    "bvlc": [(1, 31, 31), (2, 64, 48)],
}


@grid(torch.bfloat16, BF16, slow=LARGE)
def test_bf16(backend: str, host: str, shape: Shape) -> None:
    assert_parity(host, torch.bfloat16, backend, shape)


# torch computes float16 slowly on a CPU, and fusing a network checks every block, so there are few shapes and two networks.
FP16: dict[str, list[Shape]] = {
    "torchvision's own": [(0, 64, 64), (1, 15, 15), (2, 16, 31), (5, 31, 31), (1, 64, 64)],
    "bvlc": [(1, 31, 31), (2, 32, 47)],
}


@grid(torch.float16, FP16)
def test_fp16(backend: str, host: str, shape: Shape) -> None:
    assert_parity(host, torch.float16, backend, shape)


FP64: dict[str, list[Shape]] = {
    "torchvision's own": [(0, 64, 64), (1, 15, 15), (1, 64, 64), (2, 31, 48), (5, 16, 16)],
    "torchvision": [(1, 16, 15)],
    "bvlc": [(1, 31, 31), (2, 32, 48), (5, 31, 33)],
}


@grid(torch.float64, FP64)
def test_fp64(backend: str, host: str, shape: Shape) -> None:
    assert_parity(host, torch.float64, backend, shape)


def interpreted(dtype: torch.dtype) -> list[str]:
    """Backends that are interpreted or simulated here; of fp32 those that have it themselves, as a CPU's torch has no TF32 to
    judge others by."""
    able = {*can_run(dtype, interpreted=True)} - {*can_run(dtype)}
    return sorted(name for name in able if dtype != torch.float32 or "float32" in registry.get(name).arithmetics)


@pytest.mark.parametrize(("host", "shape"), [("torchvision's own", (2, 64, 48)), ("bvlc", (1, 47, 64))], ids=str)
@pytest.mark.parametrize(
    ("backend", "dtype"), [(name, dtype) for dtype in (torch.float32, torch.float16) for name in interpreted(dtype)], ids=str
)
def test_interpreted_kernels(
    backend: str, dtype: torch.dtype, host: str, shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = registry.get(backend)
    inception, ran = kernels.inception, []
    monkeypatch.setattr(kernels, "inception", lambda *arguments: ran.append(backend) or inception(*arguments))
    with torch.no_grad(), use_backend(backend):
        actual = fused_network(host, dtype, "auto")(images(shape, dtype))
    check_close(actual, *judged_by(host, dtype, shape))
    assert len(ran) >= len(GOOGLENET_SPECS), "another backend ran"


@pytest.mark.parametrize("shape", [(1, 31, 31), (2, 64, 48), (5, 33, 31)], ids=str)
@pytest.mark.parametrize("host", ["torchvision's own", "bvlc"])
@pytest.mark.parametrize("backend", can_run(torch.bfloat16))
def test_autocast(backend: str, host: str, shape: Shape) -> None:
    plain, x = plain_network(host), images(shape)
    with torch.no_grad():
        repeated = torch.cat([x] * 16)
        with torch.autocast("cpu", torch.bfloat16):
            actual = fused_network(host, torch.float32, backend)(x)
            peers = [plain(x), *(plain(LAYOUTS[layout](repeated))[: len(x)] for layout in ("contiguous", "channels_last"))]
        truth = copy.deepcopy(plain).double()(x.double())
    assert actual.dtype == peers[0].dtype == torch.bfloat16
    check_close(actual, peers, truth)
    with pytest.raises(AssertionError):
        check_close(actual.roll(1, dims=1), peers, truth)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("host", ["torchvision's own", "bvlc"])
@pytest.mark.parametrize("backend", can_run(torch.float32))
def test_layouts_of_the_image(backend: str, host: str, layout: str) -> None:
    assert_parity(host, torch.float32, backend, (2, 31, 48), layout)


@pytest.mark.parametrize("backend", can_run(torch.bfloat16))
def test_channels_last_in_bf16(backend: str) -> None:
    assert_parity("torchvision's own", torch.bfloat16, backend, (2, 31, 48), "channels_last")


@pytest.mark.parametrize("backend", can_run(torch.float32))
@pytest.mark.parametrize("host", ["torchvision's own", "bvlc"])
def test_use_backend_is_the_same_as_naming_it(host: str, backend: str) -> None:
    x = images((1, 48, 31))
    automatic = fuse(plain_network(host))
    with torch.no_grad(), use_backend(backend):
        assert torch.equal(automatic(x), fused_network(host, torch.float32, backend)(x))


@pytest.mark.parametrize("backend", can_run(torch.float32))
@pytest.mark.parametrize("host", ["torchvision's own", "bvlc"])
def test_gradient_modes_agree(host: str, backend: str) -> None:
    """With gradients the stem runs as separate operators, which may round otherwise."""
    x = images((2, 31, 48))
    fused = fused_network(host, torch.float32, backend)
    with torch.inference_mode():
        inferred = fused(x)
    with torch.no_grad():
        assert torch.equal(fused(x), inferred)
    check_close(fused(x), *judged_by(host, torch.float32, (2, 31, 48)))


@pytest.mark.parametrize("backend", can_run(torch.float32))
def test_calibrated_network(backend: str) -> None:
    """With statistics of images, as trained weights have them, negative and near-zero batch norm weights among them."""
    plain = copy.deepcopy(plain_network("torchvision"))
    with torch.no_grad():
        for module in plain.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight[::3] *= -1
                module.weight[1::7] = 1e-6
    calibrate_batch_norm(plain, images((4, 64, 64)))
    x = images((2, 48, 64))
    with torch.no_grad():
        check_close(fuse(plain, backend=backend)(x), *references(plain, x))


@pytest.mark.parametrize("backend", can_run(torch.float32))
@pytest.mark.parametrize("host", ["torchvision's own", "bvlc"])
def test_unfused_again_is_bit_equal(host: str, backend: str) -> None:
    plain, x = plain_network(host), images((2, 31, 48))
    with torch.no_grad():
        assert torch.equal(unfuse(fused_network(host, torch.float32, backend))(x), plain(x))


# The law would notice.


def zero_third_branches(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "branch3"):
            module.branch3[1].conv.weight.zero_()


def zero_one_third_branch(model: nn.Module) -> None:
    model.inception5b.branch3[1].conv.weight.zero_()


def one_weight(model: nn.Module) -> None:
    """The largest of the first convolution, by 1 %."""
    weight = model.conv1.conv.weight
    weight.view(-1)[weight.abs().argmax()] *= 1.01


def one_weight_in_the_middle(model: nn.Module) -> None:
    weight = model.inception4c.branch1.conv.weight
    weight.view(-1)[weight.abs().argmax()] *= 1.01


def one_layers_weights(model: nn.Module) -> None:
    model.inception3a.branch3[1].conv.weight.mul_(1.01)


def two_channels_swapped(model: nn.Module) -> None:
    weight = model.inception5b.branch2[1].conv.weight
    weight[[0, 1]] = weight[[1, 0]]


def kernels_transposed(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.copy_(module.weight.transpose(2, 3).clone())


def another_eps(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-5


def statistics_forgotten(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()


def biases_forgotten(model: nn.Module) -> None:
    model.inception4a.branch4[1].conv.bias.zero_()


WRONG_ANYWHERE = [zero_third_branches, zero_one_third_branch, kernels_transposed]
WRONG_IN_FP32 = [*WRONG_ANYWHERE, one_weight, one_weight_in_the_middle, one_layers_weights, two_channels_swapped]


@pytest.mark.parametrize(
    ("host", "dtype", "spoil"),
    [
        *(("torchvision's own", torch.float32, spoil) for spoil in (*WRONG_IN_FP32, another_eps, statistics_forgotten)),
        *(("bvlc", torch.float32, spoil) for spoil in (*WRONG_IN_FP32, biases_forgotten)),
        *(("torchvision's own", torch.bfloat16, spoil) for spoil in (*WRONG_ANYWHERE, statistics_forgotten)),
        ("torchvision's own", torch.float16, zero_one_third_branch),
        *(("torchvision's own", torch.float64, spoil) for spoil in (zero_one_third_branch, one_weight)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value).removeprefix("torch.")),
)
def test_another_network_is_told_apart(host: str, dtype: torch.dtype, spoil: Callable[[nn.Module], None]) -> None:
    x, right = images((1, 64, 64), dtype), judged_by(host, dtype, (1, 64, 64))
    wrong = copy.deepcopy(plain_network(host, dtype))
    with torch.no_grad():
        spoil(wrong)
        comparison = compare(fuse(wrong)(x), *right)
    assert not comparison.ok, comparison

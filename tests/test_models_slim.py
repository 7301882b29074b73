"""The ``"slim"`` variant against TF-slim's network written down independently, and TensorFlow's padding."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
import torch.nn.functional as F
from cases import assert_agrees, assert_same, can_run, outcome
from slim_net import random_variables, slim_forward
from torch import nn

from googlenet_fused import fuse, googlenet, unfuse
from googlenet_fused.models import GoogLeNet
from googlenet_fused.models.same import SameMaxPool2d, SamePadding2d, same_padding
from googlenet_fused.modules import FusedConv2d
from googlenet_fused.randomize import randomize_

SIDES = range(1, 20)

VARIABLES = random_variables(gamma=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> GoogLeNet:
    path = tmp_path_factory.mktemp("slim") / "inception_v1.npz"
    numpy.savez(path, **VARIABLES)
    return googlenet("slim", weights=path, num_classes=1001).eval()


def images(*shape: int, seed: int = 1) -> torch.Tensor:
    """In [-1, 1], as the network takes them."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 224, 224), (2, 65, 48), (1, 47, 33), (2, 30, 31), (1, 1, 2)])
def test_the_network_is_slims(model: GoogLeNet, batch: int, height: int, width: int) -> None:
    x = images(batch, 3, height, width)
    with torch.no_grad():
        actual, expected = model.double()(x), slim_forward(VARIABLES, x.permute(0, 2, 3, 1))
    assert actual.shape == (batch, 1001)
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spoil", ["conv1", "pools"])
def test_torchvisions_padding_would_be_seen(model: GoogLeNet, spoil: str) -> None:
    """conv1 differs on even sides; pools on odd maps (57x57 after conv1 here)."""
    side = 64 if spoil == "conv1" else 113
    x = images(1, 3, side, side)
    theirs = googlenet("torchvision", num_classes=1001, aux_logits=False, init_weights=False).double().eval()
    theirs.load_state_dict(model.state_dict())
    if spoil == "pools":
        assert_same(theirs.conv1(x), model.double().conv1(model.pad1(x)))
    with torch.no_grad():
        actual, expected = theirs(x), slim_forward(VARIABLES, x.permute(0, 2, 3, 1))
    assert (actual - expected).abs().max() > 0.01 * expected.std()


def test_padding_of_224() -> None:
    assert same_padding(224, 7, 2) == (2, 3)
    assert same_padding(225, 7, 2) == (3, 3)
    assert [same_padding(side, 3, 2) for side in (112, 56, 28, 57)] == [(0, 1), (0, 1), (0, 1), (1, 1)]
    assert [same_padding(side, 2, 2) for side in (14, 15)] == [(0, 0), (0, 1)]


@pytest.mark.parametrize(("kernel_size", "stride"), [(7, 2), (3, 2), (2, 2), (3, 1), (1, 1), (5, 3), (1, 2)])
def test_padding_gives_as_many_windows_as_it_must_and_no_more(kernel_size: int, stride: int) -> None:
    for side in SIDES:
        before, after = same_padding(side, kernel_size, stride)
        outputs = math.ceil(side / stride)
        assert (side + before + after - kernel_size) // stride + 1 == outputs
        assert after - before in (0, 1)
        if before + after:
            assert (side + before + after - kernel_size) % stride == 0
        padded = SamePadding2d(kernel_size, stride)(torch.ones(1, 2, side, side + 1))
        assert padded.sum() == 2 * side * (side + 1)
        assert not padded[:, :, :before].any()
        assert padded.shape[2] == side + before + after


@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 2), (2, 2), (3, 3), (5, 3), (7, 2)])
def test_max_pool_is_that_of_the_padded_map(kernel_size: int, stride: int) -> None:
    for height in SIDES:
        width = 20 - height
        x = torch.randn(2, 3, height, width)
        pads = [*same_padding(width, kernel_size, stride), *same_padding(height, kernel_size, stride)]
        expected = F.max_pool2d(F.pad(x, pads, value=float("-inf")), kernel_size, stride)
        assert_same(SameMaxPool2d(kernel_size, stride)(x), expected)
        assert expected.isfinite().all()


def test_ceil_mode_is_the_same_on_even_maps_only() -> None:
    pool, ceil = SameMaxPool2d(3, 2), nn.MaxPool2d(3, 2, ceil_mode=True)
    for side in range(3, 20):
        x = torch.randn(1, 2, side, side)
        if side % 2 == 0:
            assert_same(pool(x), ceil(x))
        else:
            assert pool(x).shape[-1] == ceil(x).shape[-1] + 1


def test_keys_and_shapes_are_torchvisions() -> None:
    with torch.device("meta"):
        ours, theirs = (googlenet(variant).state_dict() for variant in ("slim", "torchvision"))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    assert list(ours) == list(theirs)


def test_parameters_of_1001_classes(model: GoogLeNet) -> None:
    assert sum(p.numel() for p in model.parameters()) == 6_624_904 + 1024 + 1
    # slim's own count lacks a scale in each of the 57 batch norms.
    assert sum(value.size for name, value in VARIABLES.items() if "moving" not in name) == 6_624_904 + 1024 + 1
    scales = sum(value.size for name, value in VARIABLES.items() if name.endswith("gamma"))
    assert sum(value.size for value in random_variables().values()) == sum(v.size for v in VARIABLES.values()) - scales


@pytest.mark.parametrize("backend", can_run(torch.float32))
def test_fused(model: GoogLeNet, backend: str) -> None:
    plain = model.float()
    fused = fuse(plain, backend=backend)
    assert len(outcome(fused)) == 12
    assert all(outcome(fused).values())
    assert isinstance(fused.conv1, FusedConv2d)
    for height, width in ((64, 48), (33, 47), (1, 1)):
        assert_agrees(fused, plain, images(2, 3, height, width).float())
    assert repr(unfuse(fused)) == repr(plain)


def test_smallest_image() -> None:
    model = randomize_(googlenet("slim", num_classes=10, aux_logits=False, init_weights=False)).eval()
    assert model(torch.zeros(1, 3, 1, 1)).shape == (1, 10)
    with pytest.raises(ValueError, match="at least 1x1, got 0x1"):
        model(torch.zeros(1, 3, 0, 1))


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = googlenet("slim", num_classes=1001)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            std = 0.01 if isinstance(module, nn.Conv2d) else math.sqrt(2.6 / module.in_features)
            assert 1.9 * std < module.weight.abs().max() <= 2 * std, name
            # A normal cut off at two deviations has 0.88 of its deviation.
            assert module.weight.std().item() == pytest.approx(0.88 * std, rel=0.03), name
            if module.bias is not None:
                assert not module.bias.any(), name


def test_transform_input_is_refused_with_what_it_takes() -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=r"got variant='slim': prepare its input as RGB, 0 to 1, minus"):
        googlenet("slim", transform_input=True)

"""Dense maps, maps of logits and FCNs: the network's own values where it has them, and in the right place in between."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from cases import FP64_TOLERANCE, assert_same, message_of, outcome, plain_googlenet
from torch import Tensor, nn

from googlenet_fused import fuse
from googlenet_fused.dense import FCN, DilatedMaxPool2d, Grid, dense_backbone, dense_logits, grid_of, resample
from googlenet_fused.features import features
from googlenet_fused.models import VARIANTS
from googlenet_fused.models.same import SameMaxPool2d

HOSTS = ("torchvision's own", *VARIANTS)
SIZES = [(64, 64), (65, 79), (96, 71), (33, 100), (90, 51), (31, 47)]
"""Even and odd at one pool or the other, the smallest that bvlc takes among them."""

every_host = pytest.mark.parametrize("host", HOSTS)
strides = pytest.mark.parametrize("output_stride", [16, 8])


Dense = Callable[[str, int], nn.Module]


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    return {host: plain_googlenet(host, aux_logits=host == "bvlc").double() for host in HOSTS}


@pytest.fixture(scope="module")
def dense(networks: dict[str, nn.Module]) -> Dense:
    """The dense network of a host and an output stride."""
    return cache(lambda host, output_stride: dense_backbone(networks[host], output_stride))


def last_map(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return features(model, ["inception5b"])(x)["inception5b"]


def picture(height: int, width: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, height, width, dtype=torch.float64)


@every_host
@strides
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_networks_own_map_is_in_the_dense_one(
    networks: dict[str, nn.Module],
    dense: Dense,
    host: str,
    output_stride: int,
    height: int,
    width: int,
) -> None:
    x = picture(height, width)
    own, finer = last_map(networks[host], x), last_map(dense(host, output_stride), x)
    step = 32 // output_stride
    torch.testing.assert_close(finer[:, :, ::step, ::step], own, **FP64_TOLERANCE)
    if height % 32 == width % 32 == 0:
        assert finer.shape[2:] == (height // output_stride, width // output_stride)


@strides
@pytest.mark.parametrize(("height", "width"), [(1, 1), (17, 9), (35, 50)])
def test_slim_takes_any_size(networks: dict[str, nn.Module], dense: Dense, output_stride: int, height: int, width: int) -> None:
    x = picture(height, width)
    finer, step = last_map(dense("slim", output_stride), x), 32 // output_stride
    torch.testing.assert_close(finer[:, :, ::step, ::step], last_map(networks["slim"], x), **FP64_TOLERANCE)


@every_host
@strides
def test_positions_between_are_those_of_a_shifted_image(
    networks: dict[str, nn.Module], dense: Dense, host: str, output_stride: int
) -> None:
    """Of a window of a tall image, further down; compared where the ends of neither come into sight."""
    height, reach = 928, {3: 189, 5: 357}[networks[host].inception5b.branch3[1].conv.kernel_size[0]]
    x = picture(height, 32)
    finer = last_map(dense(host, output_stride), x)
    offset = grid_of(dense(host, output_stride)).offset
    step = 32 // output_stride
    for phase in range(1, step):
        start = phase * output_stride
        own = last_map(networks[host], x[:, :, start : start + height - 32])
        centres = {p: start + 32 * p + offset for p in range(own.shape[2])}
        inside = [p for p, centre in centres.items() if start <= centre - reach and centre + reach < start + height - 32]
        assert len(inside) >= 4
        between = finer[:, :, phase::step, ::step]
        torch.testing.assert_close(between[:, :, inside], own[:, :, inside], **FP64_TOLERANCE)
        assert not torch.allclose(finer[:, :, ::step, ::step][:, :, inside], own[:, :, inside])


@pytest.mark.parametrize("step", [1, 2, 4])
@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2, 2, ceil_mode=True),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.MaxPool2d(3, 2),
        nn.MaxPool2d(3, 1, 1, ceil_mode=True),
        SameMaxPool2d(2, 2),
        SameMaxPool2d(3, 2),
    ],
    ids=str,
)
def test_a_dense_pool_holds_the_pool_at_every_phase(pool: nn.MaxPool2d, step: int) -> None:
    apart = step * int(pool.stride)
    for height, width in [(16, 17), (18, 19), (20, 21), (25, 22)]:
        x = torch.randn(1, 2, height, width)
        out = DilatedMaxPool2d(pool, step)(x)
        assert out.isfinite().all()
        for y in range(step):
            for z in range(step):
                coarse = x[:, :, y::step, z::step]
                parities = (y == 0 or height % (2 * step) == 0, z == 0 or width % (2 * step) == 0)
                if isinstance(pool, SameMaxPool2d) and not all(parities):
                    continue  # the side's parity may differ from that at the first phase, and with it the padding
                own, found = pool(coarse), out[:, :, y::apart, z::apart]
                rows, columns = (min(a, b) for a, b in zip(own.shape[2:], found.shape[2:], strict=True))
                assert_same(found[:, :, :rows, :columns], own[:, :, :rows, :columns])
                if y == z == 0:
                    assert found.shape == own.shape


def test_a_map_too_small_for_a_pool() -> None:
    with pytest.raises(ValueError, match="size 1 is too small for a max pool of kernel 3"):
        DilatedMaxPool2d(nn.MaxPool2d(3, 2, ceil_mode=True), 1)(torch.randn(1, 2, 1, 5))


@every_host
def test_the_copy_shares_nothing_and_the_model_is_as_before(networks: dict[str, nn.Module], host: str) -> None:
    model = networks[host]
    before = copy.deepcopy(model)
    finer = dense_backbone(model, 8)
    assert str(model) == str(before)
    assert not {id(parameter) for parameter in model.parameters()} & {id(parameter) for parameter in finer.parameters()}
    own = {key: value for key, value in model.state_dict().items() if not key.startswith("aux")}
    assert_same(dict(finer.state_dict()), own)
    x = picture(64, 64)
    assert_same(last_map(dense_backbone(model, 32), x), last_map(model, x))
    with torch.no_grad():
        assert finer(x).shape == (1, 10)
        assert finer.train()(x.repeat(2, 1, 1, 1)).shape == (2, 10)  # without auxiliary heads, which bvlc's size would not suit


@pytest.mark.parametrize(("host", "output_stride"), [("torchvision's own", 16), ("bvlc", 8)])
def test_fused_models(networks: dict[str, nn.Module], host: str, output_stride: int) -> None:
    fast = fuse(copy.deepcopy(networks[host]).float())
    finer = dense_backbone(fast, output_stride)
    assert not hasattr(finer, "fusion_report")
    fast_again = fuse(finer)
    left = [name for name, fused in outcome(fast_again).items() if not fused and name.startswith("inception")]
    dilated = [f"inception{block}" for block in ("4a", "4b", "4c", "4d", "4e", "5a", "5b")]
    assert left == dilated[-2 if output_stride == 16 else 0 :]
    x, step = picture(64, 96).float(), 32 // output_stride
    torch.testing.assert_close(last_map(fast_again, x)[:, :, ::step, ::step], last_map(fast, x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model: dense_backbone(model, 4), "output_stride must be 32, 16 or 8, got 4"),
        (lambda model: dense_backbone(nn.Sequential(model)), "takes a GoogLeNet; this Sequential has no conv1"),
        (lambda model: dense_backbone(dense_backbone(model, 16), 16), "stride 2 without padding; maxpool4 is DilatedMaxPool2d"),
        (lambda model: grid_of(model, "fc"), "got 'fc'"),
        (lambda model: dense_logits(model, window=0), "window must be at least 1, got 0"),
        (lambda model: dense_logits(model, 16)(picture(224, 192)), "image of 224x192 is too small for a window of 7"),
        (lambda model: dense_logits(model, 16)(picture(224, 192)), "window=6 or less"),
        (lambda model: FCN(model, 0), "num_classes must be at least 1, got 0"),
        (lambda model: FCN(model, 2, ["inception5b"]), "got ['inception5b']"),
        (lambda model: FCN(model, 2, ["inception4e", "inception4e"]), "each once"),
        (lambda model: FCN(model, 2, "inception4e"), "a list of some of inception3a"),
    ],
)
def test_wrong_arguments(networks: dict[str, nn.Module], change: Callable[[nn.Module], object], said: str) -> None:
    with pytest.raises(ValueError, match=r"\w") as error:
        change(networks["torchvision's own"])
    assert said in message_of(error)


def test_blocks_that_cannot_be_dilated(networks: dict[str, nn.Module]) -> None:
    model = copy.deepcopy(networks["torchvision"])
    model.inception5a.branch2[1].conv.padding_mode = "reflect"
    with pytest.raises(ValueError, match=r"padded with zeros; inception5a\.branch2\.1\.conv is"):
        dense_backbone(model, 16)
    model.inception5a = nn.Identity()
    with pytest.raises(ValueError, match="inception5a is a Identity"):
        dense_backbone(model, 16)


def farthest(sees: Callable[[int], bool], low: int, high: int) -> int:
    """The last of low..high-1 for which ``sees`` holds, given that it does so up to somewhere between."""
    assert sees(low)
    assert not sees(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sees(middle) else (low, middle)
    return low


@pytest.mark.parametrize(
    ("layer", "output_stride", "offsets"),
    [
        ("inception3b", 32, {"torchvision": 6, "bvlc": 6, "slim": 7}),
        ("inception4e", 32, {"torchvision": 14, "bvlc": 14, "slim": 15}),
        ("inception5b", 16, {"torchvision": 22, "bvlc": 30, "slim": 23}),
    ],
)
@pytest.mark.parametrize("host", VARIANTS)
def test_a_position_sees_symmetrically_about_its_grids_pixel(
    dense: Dense, host: str, layer: str, output_stride: int, offsets: dict[str, int]
) -> None:
    """NaN pixels are followed through the network, in a tall image."""
    model = copy.deepcopy(dense(host, output_stride)).float()
    grid = Grid(8 if layer == "inception3b" else 16, offsets[host])
    assert grid_of(model, layer) == grid
    extract = features(model, [layer])
    height = 800
    position = (height // 2 - 30) // grid.stride

    def sees(rows: slice) -> bool:
        x = torch.zeros(1, 3, height, 31)
        x[:, :, rows] = float("nan")
        with torch.no_grad():
            return bool(extract(x)[layer][0, :, position].isnan().any())

    last = farthest(lambda row: sees(slice(row, None)), height // 2, height - 1)
    first = height - 1 - farthest(lambda row: sees(slice(None, height - row)), height // 2, height - 1)
    assert (first + last) / 2 == grid.stride * position + grid.offset


def test_resampling_agrees_with_interpolate_where_that_places_maps() -> None:
    maps = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    found = resample(maps, Grid(8, 3.5), (32, 40))
    torch.testing.assert_close(found, F.interpolate(maps, (32, 40), mode="bilinear"), **FP64_TOLERANCE)


def test_resampling_goes_by_the_grids() -> None:
    """A map of its positions' own pixel coordinates must give each target's coordinates, clamped to the outermost."""
    source, target = Grid(16, 14), Grid(8, 6)
    rows, columns = torch.meshgrid(torch.arange(5.0) * 16 + 14, torch.arange(3.0) * 16 + 14, indexing="ij")
    found = resample(torch.stack([rows, columns])[None], source, (11, 7), target)
    rows = (torch.arange(11.0) * 8 + 6).clamp(14, 14 + 16 * 4)
    columns = (torch.arange(7.0) * 8 + 6).clamp(14, 14 + 16 * 2)
    torch.testing.assert_close(found[0], torch.stack(torch.meshgrid(rows, columns, indexing="ij")))
    assert resample(torch.ones(1, 1, 1, 1, dtype=torch.bfloat16), source, (3, 4)).dtype == torch.bfloat16


@every_host
@pytest.mark.parametrize("output_stride", [32, 16, 8])
def test_logits_of_an_image_of_224_are_the_networks(networks: dict[str, nn.Module], host: str, output_stride: int) -> None:
    x = picture(224, 224)
    with torch.no_grad():
        maps, expected = dense_logits(networks[host], output_stride)(x), networks[host](x)
    assert maps.shape == (1, 10, 32 // output_stride, 32 // output_stride)
    torch.testing.assert_close(maps[:, :, 0, 0], expected, **FP64_TOLERANCE)


@pytest.mark.parametrize(("output_stride", "window"), [(32, 2), (16, 2), (8, 3), (16, 1)])
def test_logits_are_the_classifier_of_the_windows_mean(networks: dict[str, nn.Module], output_stride: int, window: int) -> None:
    model, x, step = networks["bvlc"], picture(160, 128, batch=2), 32 // output_stride
    module = dense_logits(model, output_stride, window=window)
    assert module.grid == Grid(output_stride, 30 + 16 * (window - 1))
    with torch.no_grad():
        logits, maps = module(x), last_map(dense_backbone(model, output_stride), x)
        assert logits.shape[2:] == (160 // output_stride - step * (window - 1), 128 // output_stride - step * (window - 1))
        for row in range(logits.shape[2]):
            for column in range(logits.shape[3]):
                seen = maps[:, :, row::step, column::step][:, :, :window, :window]
                torch.testing.assert_close(logits[:, :, row, column], model.fc(seen.mean((2, 3))), **FP64_TOLERANCE)


@every_host
@pytest.mark.parametrize("skips", [(), ("inception4e",), ("inception3b", "inception4e")])
def test_an_fcn_adds_what_its_layers_score(networks: dict[str, nn.Module], host: str, skips: tuple[str, ...]) -> None:
    net, x = FCN(networks[host], 3, skips), picture(65, 96)
    assert list(net.scores) == ["inception5b", *reversed(skips)]
    with torch.no_grad():
        assert_same(net(x), x.new_zeros(1, 3, 65, 96))  # the scores start at zero
        for parameter in net.scores.parameters():
            parameter.normal_()
        maps = features(networks[host], list(net.scores))(x)
        scores = {name: net.scores[name](maps[name]) for name in net.scores}
        total = scores.pop("inception5b")
        grid = grid_of(networks[host], "inception5b")
        for name, score in scores.items():
            finer = grid_of(networks[host], name)
            total, grid = score + resample(total, grid, score.shape[2:], finer), finer
        torch.testing.assert_close(net(x), resample(total, grid, (65, 96)), **FP64_TOLERANCE)


def test_an_fcn_is_fused_and_keeps_its_state(networks: dict[str, nn.Module]) -> None:
    net = FCN(copy.deepcopy(networks["torchvision"]).float(), 2, output_stride=16)
    with torch.no_grad():
        for parameter in net.scores.parameters():
            parameter.normal_(0, 0.01)
        x = picture(64, 64).float()
        fast = fuse(net)
        assert len(fast.fusion_report.fused) == 10
        torch.testing.assert_close(fast(x), net(x), rtol=1e-3, atol=1e-3)
    assert list(fast.state_dict()) == list(net.state_dict())


def test_an_fcn_learns_to_segment(networks: dict[str, nn.Module]) -> None:
    """Bright discs on noise: the score layers alone, on a frozen backbone of random weights."""
    net = FCN(copy.deepcopy(networks["torchvision"]).float(), 2, ("inception3b", "inception4e"))
    net.features.requires_grad_(False)
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    labels = torch.stack([((y - 20) ** 2 + (x - 24) ** 2 < 200).long(), ((y - 40) ** 2 + (x - 36) ** 2 < 300).long()])
    images = torch.randn(2, 3, 64, 64) + 3 * labels[:, None]
    optimizer = torch.optim.Adam(net.scores.parameters(), lr=1e-2)

    def share_of_union() -> float:
        with torch.no_grad():
            found = net(images).argmax(1)
        return float((found & labels).sum() / (found | labels).sum())

    assert share_of_union() == 0
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
    assert share_of_union() > 0.9


def test_gradients_reach_an_fcns_backbone(networks: dict[str, nn.Module]) -> None:
    net = FCN(networks["torchvision"], 2, output_stride=8).train()
    for parameter in net.scores.parameters():
        nn.init.normal_(parameter)
    net(picture(64, 64, batch=2)).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    unused = {name for name, gradient in gradients.items() if gradient is None}
    assert unused == set()  # or DistributedDataParallel would refuse
    assert all(gradient.abs().max() > 0 for gradient in gradients.values() if gradient is not None)

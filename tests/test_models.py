"""The plain GoogLeNet against published counts, torchvision's own module, and a layer-by-layer reading of the paper's net."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from math import ceil, prod, sqrt

import pytest
import torch
import torch.nn.functional as F
from cases import assert_same
from torch import Tensor, nn
from torchvision.models import googlenet as torchvision_factory
from torchvision.models.googlenet import BasicConv2d as TorchvisionConv
from torchvision.models.googlenet import GoogLeNet as TorchvisionGoogLeNet
from torchvision.models.googlenet import Inception as TorchvisionInception
from torchvision.models.googlenet import InceptionAux as TorchvisionAux

from googlenet_fused.blocks import BasicConv2d, Inception
from googlenet_fused.models import VARIANTS, GoogLeNet, GoogLeNetOutputs, InceptionAux, VariantName, googlenet
from googlenet_fused.randomize import randomize_

every_variant = pytest.mark.parametrize("variant", VARIANTS)


def pair(**arguments: object) -> tuple[GoogLeNet, TorchvisionGoogLeNet]:
    """Our network and torchvision's with one randomised state."""
    theirs = randomize_(TorchvisionGoogLeNet(init_weights=False, **arguments))
    ours = googlenet(init_weights=False, **arguments)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def image(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, value), (their_name, expected) in zip_longest(
        ours.state_dict().items(), theirs.state_dict().items(), fillvalue=("missing", torch.empty(0))
    ):
        assert name == their_name
        assert_same(value, expected, name)


def count_macs(model: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates of the convolutions and linears that one forward pass really runs."""
    total = 0

    def add(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        total += output.numel() * prod(module.weight.shape[1:])

    hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    model(x)
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize(
    ("variant", "aux_logits", "parameters", "keys"),
    [
        ("bvlc", False, 6_998_552, 2 * 58),
        ("bvlc", True, 13_378_280, 2 * 64),
        ("torchvision", False, 6_624_904, 344),
        ("torchvision", True, 13_004_888, 364),
        ("slim", False, 6_624_904, 344),
        ("slim", True, 13_004_888, 364),
    ],
)
def test_parameter_counts(variant: VariantName, aux_logits: bool, parameters: int, keys: int) -> None:
    with torch.device("meta"):
        model = googlenet(variant, aux_logits=aux_logits)
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == keys


@pytest.mark.parametrize(
    ("variant", "macs"), [("bvlc", 1_582_671_872), ("torchvision", 1_498_376_192), ("slim", 1_498_376_192)]
)
def test_macs(variant: VariantName, macs: int) -> None:
    with torch.device("meta"):
        model = googlenet(variant).eval()
        assert count_macs(model, torch.empty(1, 3, 224, 224)) == macs
        assert count_macs(model, torch.empty(3, 3, 224, 224)) == 3 * macs


@every_variant
def test_feature_maps_at_224(variant: VariantName) -> None:
    expected = {
        "conv1": (64, 112, 112),
        "maxpool1": (64, 56, 56),
        "conv3": (192, 56, 56),
        "maxpool2": (192, 28, 28),
        "inception3a": (256, 28, 28),
        "inception3b": (480, 28, 28),
        "maxpool3": (480, 14, 14),
        "inception4a": (512, 14, 14),
        "inception4e": (832, 14, 14),
        "maxpool4": (832, 7, 7),
        "inception5a": (832, 7, 7),
        "inception5b": (1024, 7, 7),
        "avgpool": (1024, 1, 1),
        "fc": (1000,),
        "aux1": (1000,),
        "aux2": (1000,),
        "aux1.avgpool": (512, 4, 4),
        "aux2.avgpool": (528, 4, 4),
    }
    seen: dict[str, tuple[int, ...]] = {}

    def recorder(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, inputs, output: seen.update({name: tuple(output.shape[1:])})

    with torch.device("meta"):
        model = googlenet(variant)
        for name in expected:
            model.get_submodule(name).register_forward_hook(recorder(name))
        model(torch.empty(2, 3, 224, 224))
    assert seen == expected


@every_variant
def test_dropout_probabilities(variant: VariantName) -> None:
    model = googlenet(variant, init_weights=False)
    assert model.dropout.p == {"bvlc": 0.4, "torchvision": 0.2, "slim": 0.2}[variant]
    assert model.aux1.dropout.p == model.aux2.dropout.p == 0.7
    model = googlenet(variant, init_weights=False, dropout=0.0, dropout_aux=0.1)
    assert (model.dropout.p, model.aux1.dropout.p, model.aux2.dropout.p) == (0.0, 0.1, 0.1)


@pytest.mark.parametrize("init_weights", [True, False])
@pytest.mark.parametrize("aux_logits", [True, False])
def test_torchvisions_random_draws(init_weights: bool, aux_logits: bool) -> None:
    torch.manual_seed(0)
    theirs = TorchvisionGoogLeNet(num_classes=10, aux_logits=aux_logits, init_weights=init_weights)
    their_next = torch.rand(1)
    torch.manual_seed(0)
    ours = GoogLeNet(num_classes=10, aux_logits=aux_logits, init_weights=init_weights)
    assert_same(torch.rand(1), their_next, "the generator after construction")
    assert_same_state(ours, theirs)


def test_bvlc_fillers() -> None:
    torch.manual_seed(0)
    model = googlenet("bvlc", num_classes=1024)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = sqrt(3 / prod(module.weight.shape[1:]))
            assert 0.97 * bound < module.weight.abs().max() <= bound, name
            assert module.weight.mean().abs() < 0.1 * bound, name
            bias = 0.0 if name in ("fc", "aux1.fc2", "aux2.fc2") else 0.2
            assert_same(module.bias, torch.full_like(module.bias, bias), name)


@pytest.mark.parametrize("transform_input", [False, True])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 224, 224), (2, 15, 15), (5, 33, 64), (0, 32, 32)])
def test_eval_outputs_are_torchvisions(transform_input: bool, batch: int, height: int, width: int) -> None:
    ours, theirs = pair(transform_input=transform_input)
    x = image(batch, 3, height, width)
    with torch.no_grad():
        actual, expected = ours.eval()(x), theirs.eval()(x)
    assert actual.shape == (batch, 1000)
    assert batch == 0 or expected.std() > 0.1
    assert_same(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_transform_input_rounds_as_torchvisions(dtype: torch.dtype) -> None:
    ours, theirs = (model.to(dtype).eval() for model in pair(num_classes=10, transform_input=True))
    x = image(2, 3, 32, 32, dtype=dtype)
    with torch.no_grad():
        assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("heads", ["used", "absent", "switched off"])
def test_train_step_is_torchvisions(heads: str) -> None:
    ours, theirs = pair(num_classes=10, aux_logits=heads != "absent")
    x, target = image(3, 3, 64, 64), torch.tensor([1, 7, 3])
    outputs = []
    for model in (ours, theirs):
        if heads == "switched off":
            model.aux_logits = False
        model.train()
        torch.manual_seed(3)
        output = model(x)
        parts = tuple(output) if heads == "used" else (output,)
        outputs.append(parts)
        loss = sum(weight * F.cross_entropy(part, target) for weight, part in zip((1.0, 0.3, 0.3), parts, strict=False))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        loss.backward()
        optimizer.step()
    for actual, expected in zip(*outputs, strict=True):
        assert_same(actual, expected)
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is None) == (gradients[name].grad is None), name
        if parameter.grad is not None:
            assert_same(parameter.grad, gradients[name].grad, name)
    assert_same_state(ours, theirs)
    assert ours.conv1.bn.num_batches_tracked == 1


def test_training_output_names_the_second_head_first() -> None:
    ours, theirs = pair(num_classes=10, dropout_aux=0.0)
    output, expected = (model.train()(image(2, 3, 32, 32)) for model in (ours, theirs))
    assert isinstance(output, GoogLeNetOutputs)
    assert output._fields == expected._fields == ("logits", "aux_logits2", "aux_logits1")
    assert_same(output.aux_logits1, expected.aux_logits1)
    assert_same(output.aux_logits2, expected.aux_logits2)
    assert not torch.equal(output.aux_logits1, output.aux_logits2)


def test_heads_can_be_dropped_after_construction() -> None:
    model = googlenet(num_classes=10, init_weights=False)
    model.aux_logits, model.aux1, model.aux2 = False, None, None
    assert model.train()(image(2, 3, 32, 32)).shape == (2, 10)
    assert len(model.state_dict()) == 344


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("host", [TorchvisionGoogLeNet, GoogLeNet])
def test_blocks_are_interchangeable_with_torchvisions(host: Callable[..., nn.Module], training: bool) -> None:
    theirs = randomize_(TorchvisionGoogLeNet(num_classes=10, init_weights=False))
    blocks = {
        TorchvisionGoogLeNet: [BasicConv2d, Inception, InceptionAux],
        GoogLeNet: [TorchvisionConv, TorchvisionInception, TorchvisionAux],
    }[host]
    mixed = host(num_classes=10, init_weights=False, blocks=blocks)
    assert {type(m) for m in mixed.modules()} >= set(blocks)
    mixed.load_state_dict(theirs.state_dict())
    x = image(2, 3, 48, 48)
    outputs = []
    for model in (mixed, theirs):
        torch.manual_seed(5)
        output = model.train(training)(x)
        outputs.append(tuple(output) if training else (output,))
    for actual, expected in zip(*outputs, strict=True):
        assert_same(actual, expected)


def test_torchvisions_factory_and_ours_hold_one_state() -> None:
    theirs = torchvision_factory(weights=None, init_weights=False)
    googlenet(init_weights=False).load_state_dict(theirs.state_dict(), strict=True)


def test_every_batch_norm_has_torchvisions_settings() -> None:
    ours, theirs = pair(num_classes=10)
    norms = [[m for m in model.modules() if isinstance(m, nn.BatchNorm2d)] for model in (ours, theirs)]
    assert len(norms[0]) == 59
    for mine, other in zip(*norms, strict=True):
        assert (mine.eps, mine.momentum) == (other.eps, other.momentum) == (0.001, 0.1)


def paper_forward(state: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """BVLC Caffe's GoogLeNet layer by layer, with Caffe's arithmetic for pools and LRN and no module of this package."""

    def conv(name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        return F.conv2d(x, state[f"{name}.conv.weight"], state[f"{name}.conv.bias"], stride, padding).clamp_min(0)

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def max_pool(x: Tensor, stride: int, padding: int = 0) -> Tensor:
        # ceil((side + 2 padding - 3) / stride) + 1 windows; what lies outside is never the largest
        outputs = [ceil((side + 2 * padding - 3) / stride) + 1 for side in x.shape[-2:]]
        after = [(n - 1) * stride + 3 - padding - side for n, side in zip(outputs, x.shape[-2:], strict=True)]
        padded = F.pad(x, (padding, max(after[1], 0), padding, max(after[0], 0)), value=float("-inf"))
        return padded.unfold(2, 3, stride).unfold(3, 3, stride).amax((-2, -1))

    def lrn(x: Tensor) -> Tensor:
        squares = F.pad(x**2, (0, 0, 0, 0, 2, 2)).unfold(1, 5, 1).sum(-1)
        return x / (1 + 1e-4 / 5 * squares) ** 0.75

    def inception(name: str, x: Tensor) -> Tensor:
        return torch.cat(
            [
                conv(f"{name}.branch1", x),
                conv(f"{name}.branch2.1", conv(f"{name}.branch2.0", x), padding=1),
                conv(f"{name}.branch3.1", conv(f"{name}.branch3.0", x), padding=2),
                conv(f"{name}.branch4.1", max_pool(x, 1, padding=1)),
            ],
            1,
        )

    def aux(name: str, x: Tensor) -> Tensor:
        x = x.unfold(2, 5, 3).unfold(3, 5, 3).mean((-2, -1))
        x = conv(f"{name}.conv", x).flatten(1)
        return linear(f"{name}.fc2", linear(f"{name}.fc1", x).clamp_min(0))

    outputs = {}
    x = lrn(max_pool(conv("conv1", x, 2, 3), 2))
    x = max_pool(lrn(conv("conv3", conv("conv2", x), padding=1)), 2)
    x = max_pool(inception("inception3b", inception("inception3a", x)), 2)
    x = inception("inception4a", x)
    if x.shape[-2:] == (14, 14):
        outputs["aux_logits1"] = aux("aux1", x)
    x = inception("inception4d", inception("inception4c", inception("inception4b", x)))
    if x.shape[-2:] == (14, 14):
        outputs["aux_logits2"] = aux("aux2", x)
    x = max_pool(inception("inception4e", x), 2)
    x = inception("inception5b", inception("inception5a", x))
    outputs["logits"] = linear("fc", x.mean((-2, -1)))
    return outputs


def caffe_image(*shape: int) -> Tensor:
    """Values as large as pixels minus their mean: with small ones local response normalisation is next to nothing."""
    return 60 * image(*shape, dtype=torch.float64)


def bvlc(**arguments: object) -> GoogLeNet:
    return randomize_(googlenet("bvlc", num_classes=10, init_weights=False, **arguments)).double()


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 224, 224), (2, 31, 31), (2, 97, 64), (1, 57, 131)])
def test_bvlc_is_the_papers_network(batch: int, height: int, width: int) -> None:
    model = bvlc().eval()
    x = caffe_image(batch, 3, height, width)
    with torch.no_grad():
        actual, expected = model(x), paper_forward(model.state_dict(), x)["logits"]
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_bvlc_heads_are_the_papers() -> None:
    model = bvlc(dropout=0.0, dropout_aux=0.0).train()
    x = caffe_image(1, 3, 224, 224)
    with torch.no_grad():
        actual, expected = model(x), paper_forward(model.state_dict(), x)
    assert set(expected) == set(actual._fields)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(actual, name), value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("side", "fits"), [(176, False), (192, True), (224, True), (256, False)])
def test_bvlc_heads_need_a_four_by_four_pool(side: int, fits: bool) -> None:
    with torch.device("meta"):
        model, x = googlenet("bvlc", init_weights=False).train(), torch.empty(1, 3, side, side)
        if fits:
            assert model(x).aux_logits1.shape == (1, 1000)
        else:
            with pytest.raises(ValueError, match=r"4x4 map .* aux_logits=False"):
                model(x)
        assert model.eval()(x).shape == (1, 1000)
        assert googlenet("bvlc", init_weights=False, aux_logits=False).train()(x).shape == (1, 1000)


@pytest.mark.parametrize("shape", [(11, 12), (12, 15)])
def test_head_refuses_either_side(shape: tuple[int, int]) -> None:
    head = InceptionAux(8, 10, norm=None, pool="5x5/3")
    assert head(torch.zeros(2, 8, 12, 14)).shape == (2, 10)
    with pytest.raises(ValueError, match=f"got {shape[0]}x{shape[1]}"):
        head(torch.zeros(2, 8, *shape))


@every_variant
@pytest.mark.parametrize("training", [False, True])
def test_empty_batch(variant: VariantName, training: bool) -> None:
    model = googlenet(variant, num_classes=10, init_weights=False).train(training)
    output = model(torch.zeros(0, 3, 224, 224))
    for part in output if training else (output,):
        assert part.shape == (0, 10)


@pytest.mark.parametrize(("variant", "side"), [("torchvision", 15), ("bvlc", 31)])
def test_smallest_image(variant: VariantName, side: int) -> None:
    model = googlenet(variant, num_classes=10, init_weights=False).eval()
    assert model(torch.zeros(1, 3, side, side)).shape == (1, 10)
    for shape in ((side - 1, side), (side, side - 1)):
        with pytest.raises(ValueError, match=f"at least {side}x{side}, got {shape[0]}x{shape[1]}"):
            model(torch.zeros(1, 3, *shape))
    model.min_side = 0
    with pytest.raises(RuntimeError, match="Output size is too small"):
        model(torch.zeros(1, 3, side - 1, side - 1))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 64, 64), r"\[n, 3, h, w\], got \[3, 64, 64\]; add the batch axis"),
        (torch.zeros(2, 64, 64, 3), r"\[n, 3, h, w\], got \[2, 64, 64, 3\]; bring the channels forward"),
        (torch.zeros(2, 1, 64, 64), r"\[n, 3, h, w\], got \[2, 1, 64, 64\]$"),
        (torch.zeros(1, 3, 2, 64, 64), r"\[n, 3, h, w\], got \[1, 3, 2, 64, 64\]$"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), r"floating-point images, got torch.uint8"),
    ],
)
@every_variant
def test_wrong_input(variant: VariantName, x: Tensor, message: str) -> None:
    with torch.device("meta"):
        model = googlenet(variant, init_weights=False)
    with pytest.raises(ValueError, match=message):
        model(x.to("meta"))


def test_other_channels_after_replacing_conv1() -> None:
    model = googlenet(num_classes=10, init_weights=False).eval()
    model.conv1, model.in_channels = BasicConv2d(1, 64, kernel_size=7, stride=2, padding=3), 1
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "v3"}, "variant must be one of 'torchvision', 'bvlc', 'slim', got 'v3'"),
        ({"variant": "bvlc", "transform_input": True}, "transform_input=True belongs to .* got variant='bvlc'"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"blocks": [BasicConv2d, Inception]}, "blocks must be .* got 2 of them"),
        ({"blocks": []}, "blocks must be .* got 0 of them"),
        ({"dropout": 1.5}, "dropout probability has to be between 0 and 1, but got 1.5"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        GoogLeNet(init_weights=False, **arguments)


def test_wrong_head_pool() -> None:
    with pytest.raises(ValueError, match="pool must be 'adaptive' or '5x5/3', got 'max'"):
        InceptionAux(8, 10, pool="max")


def test_bvlc_takes_blocks_that_hold_its_kernels() -> None:
    blocks = [
        partial(BasicConv2d, norm=None),
        partial(Inception, norm=None, large_kernel=5),
        partial(InceptionAux, norm=None, pool="5x5/3"),
    ]
    torch.manual_seed(0)
    default = googlenet("bvlc", num_classes=10)
    torch.manual_seed(0)
    assert_same_state(GoogLeNet(num_classes=10, blocks=blocks, variant="bvlc"), default)


@every_variant
def test_export_with_dynamic_batch(variant: VariantName) -> None:
    model = randomize_(googlenet(variant, num_classes=10, init_weights=False, aux_logits=False)).eval()
    batch = torch.export.Dim("batch", min=1, max=16)
    exported = torch.export.export(model, (image(2, 3, 32, 32),), dynamic_shapes=({0: batch},)).module()
    x = image(5, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(exported(x), model(x))

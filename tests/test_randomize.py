"""Seeded weights: reproducible, private, and such that every part of the network matters."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.googlenet import BasicConv2d as TorchvisionConv
from torchvision.models.googlenet import GoogLeNet as TorchvisionGoogLeNet
from torchvision.models.googlenet import Inception as TorchvisionInception

from googlenet_fused import googlenet
from googlenet_fused.blocks import BasicConv2d, Inception
from googlenet_fused.models import VariantName
from googlenet_fused.randomize import calibrate_batch_norm, randomize_

both_variants = pytest.mark.parametrize("variant", ["torchvision", "bvlc"])


def network(variant: VariantName, **options: object) -> nn.Module:
    return googlenet(variant, **{"init_weights": False, **options})


def small_net(norm: str | None = "batch") -> nn.Module:
    convs = BasicConv2d(3, 8, norm=norm, kernel_size=3), BasicConv2d(8, 6, norm=norm, kernel_size=3)  # type: ignore[arg-type]
    return nn.Sequential(*convs, nn.Dropout(0.5), nn.Flatten(), nn.Linear(6 * 4 * 4, 5))


def assert_same_state(actual: nn.Module, expected: nn.Module) -> None:
    assert list(actual.state_dict()) == list(expected.state_dict())
    for name, value in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[name], value), name


# randomize_


def test_returns_the_model_itself() -> None:
    model = small_net()
    assert randomize_(model) is model


@both_variants
def test_same_seed_same_values(variant: VariantName) -> None:
    first, second = network(variant), network(variant)
    assert_same_state(randomize_(first, seed=3), randomize_(second, seed=3))
    assert_same_state(randomize_(first, seed=3), second)
    randomize_(second, seed=4)
    changed = [name for name, value in first.state_dict().items() if not torch.equal(second.state_dict()[name], value)]
    assert changed == [name for name in first.state_dict() if not name.endswith("num_batches_tracked")]


def test_the_default_seed_is_zero() -> None:
    assert_same_state(randomize_(small_net()), randomize_(small_net(), 0))


def test_no_global_generator_is_touched() -> None:
    torch.manual_seed(5)
    before, python = torch.get_rng_state(), random.getstate()
    model = small_net()
    torch.set_rng_state(before)
    randomize_(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python
    torch.manual_seed(6)
    assert_same_state(randomize_(small_net()), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_same_values_in_every_dtype_but_for_rounding(dtype: torch.dtype) -> None:
    expected = randomize_(small_net())
    assert_same_state(randomize_(small_net().to(dtype)), copy.deepcopy(expected).to(dtype))


def test_same_values_under_another_default_dtype() -> None:
    expected, model = randomize_(small_net()), small_net()
    torch.set_default_dtype(torch.float64)
    try:
        randomize_(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_state(model, expected)


def test_same_values_under_another_default_device() -> None:
    """As after ``torch.set_default_device("cuda")``, with a model on the CPU."""
    expected, model = randomize_(small_net()), small_net()
    with torch.device("meta"):
        randomize_(model)
    assert_same_state(model, expected)


def test_modes_and_gradients_are_kept() -> None:
    model = small_net().train()
    model[1].eval()
    model[0].requires_grad_(False)
    randomize_(model)
    assert [module.training for module in model] == [True, False, True, True, True]
    assert [parameter.requires_grad for parameter in model.parameters()] == [False] * 3 + [True] * 5
    assert all(parameter.grad_fn is None for parameter in model.parameters())
    assert [name for name, buffer in model.named_buffers() if "tracked" in name and buffer != 0] == []


def test_distributions() -> None:
    model = randomize_(nn.Sequential(nn.Conv2d(64, 256, 3), nn.BatchNorm2d(2048), nn.Linear(512, 1024)))
    convolution, norm, linear = model
    for layer, fan_in in ((convolution, 64 * 9), (linear, 512)):
        assert layer.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.02)
        assert layer.weight.mean().abs().item() < 3 * layer.weight.std().item() / layer.weight.numel() ** 0.5
        assert 0.07 < layer.bias.std().item() < 0.13
    for uniform in (norm.weight, norm.running_var):
        assert 0.5 <= uniform.min().item() < 0.51
        assert 1.49 < uniform.max().item() <= 1.5
        assert uniform.mean().item() == pytest.approx(1.0, abs=0.03)
    for normal in (norm.bias, norm.running_mean):
        assert normal.std().item() == pytest.approx(0.1, rel=0.1)
        assert abs(normal.mean().item()) < 0.01
    for tensor, other in ((norm.weight, norm.running_var), (norm.bias, norm.running_mean)):
        assert not torch.equal(tensor, other)


def test_no_weight_is_left_as_it_was() -> None:
    """Every layer of the networks is of a kind that is filled."""
    for model in (network("torchvision"), network("bvlc"), TorchvisionGoogLeNet(init_weights=False)):
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(77)
        randomize_(model)
        for name, tensor in model.state_dict().items():
            assert (tensor == 77).all() == name.endswith("num_batches_tracked"), name


def test_layers_without_bias_or_statistics() -> None:
    norms = nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, track_running_stats=False)
    model = randomize_(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), *norms, nn.Identity()))
    assert model[0].bias is None
    assert model[1].running_mean.abs().sum() > 0
    assert model[2].weight.sum() != 4


@both_variants
def test_activations_have_a_sensible_size_everywhere(variant: VariantName) -> None:
    """Neither vanishing nor growing, in every block and in every branch."""
    model = randomize_(network(variant, aux_logits=False)).eval()
    sizes: dict[str, float] = {}

    def record(name: str) -> object:
        return lambda module, args, out: sizes.update({name: out.double().square().mean().sqrt().item()})

    blocks = (BasicConv2d, Inception, nn.Linear)
    for name, module in model.named_modules():
        if isinstance(module, blocks):
            module.register_forward_hook(record(name))  # type: ignore[arg-type]
    with torch.no_grad():
        out = model(torch.randn(2, 3, 64, 64))
    assert len(sizes) == 3 + 9 * 7 + 1
    assert {name: size for name, size in sizes.items() if not 0.05 < size < 50} == {}
    assert (out[0] - out[1]).abs().max() > 0.1, "the logits do not depend on the image"


@pytest.mark.parametrize("branch", ["branch1", "branch2", "branch3", "branch4"])
@both_variants
def test_every_branch_of_every_block_matters(variant: VariantName, branch: str) -> None:
    model = randomize_(network(variant, aux_logits=False)).eval()
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        expected = model(x)
        for module in model.modules():
            if isinstance(module, Inception | TorchvisionInception):
                hook = module.get_submodule(branch).register_forward_hook(lambda module, args, out: torch.zeros_like(out))
                assert (model(x) - expected).abs().max() > 1e-2 * expected.abs().max()
                hook.remove()
        assert torch.equal(model(x), expected)


# calibrate_batch_norm


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    flat = x.double().transpose(0, 1).flatten(1)
    return flat.mean(1), flat.var(1, unbiased=True)


def test_statistics_are_those_of_the_images() -> None:
    model = randomize_(small_net())
    parameters = copy.deepcopy(dict(model.named_parameters()))
    images = torch.randn(6, 3, 8, 8) * 2 + 1
    assert calibrate_batch_norm(model, images) is model
    for name, value in model.named_parameters():
        assert torch.equal(value, parameters[name]), name

    first, second = (block.bn for block in (model[0], model[1]))
    with torch.no_grad():
        mean, var = batch_statistics(model[0].conv(images))
        torch.testing.assert_close(first.running_mean.double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(first.running_var.double(), var, rtol=1e-4, atol=1e-5)
        # The second layer saw the first one normalised with the statistics of the batch.
        inner = model[0].conv(images).double()
        biased = inner.transpose(0, 1).flatten(1).var(1, unbiased=False)
        view = (1, -1, 1, 1)
        normalised = (inner - mean.view(view)) / (biased.view(view) + first.eps).sqrt()
        normalised = (normalised * first.weight.double().view(view) + first.bias.double().view(view)).relu()
        mean, var = batch_statistics(model[1].conv.double()(normalised))
        torch.testing.assert_close(second.running_mean.double(), mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(second.running_var.double(), var, rtol=1e-4, atol=1e-4)


def test_earlier_statistics_do_not_matter() -> None:
    images = torch.randn(4, 3, 8, 8)
    first = calibrate_batch_norm(randomize_(small_net()), images)
    twice = calibrate_batch_norm(copy.deepcopy(first), images)
    assert_same_state(twice, first)
    spoiled = copy.deepcopy(first)
    for module in spoiled.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(float("nan"))
            module.running_var.fill_(1e9)
    assert_same_state(calibrate_batch_norm(spoiled, images), first)


def described(model: nn.Module) -> list[tuple[bool, object]]:
    return [(module.training, getattr(module, "momentum", None)) for module in model.modules()]


@pytest.mark.parametrize("training", [False, True])
def test_modes_and_momenta_are_restored(training: bool) -> None:
    model = randomize_(small_net()).train(training)
    model[0].bn.momentum = 0.3
    model[1].bn.momentum = None
    model[1].eval()
    model[2].train()
    before = described(model)
    generator = torch.get_rng_state()
    calibrate_batch_norm(model, torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    assert described(model) == before
    assert torch.equal(torch.get_rng_state(), generator), "dropout drew"
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_modes_and_momenta_are_restored_after_an_error() -> None:
    model = randomize_(small_net()).train()
    model[0].bn.momentum = 0.3
    before = described(model)
    with pytest.raises(RuntimeError):
        calibrate_batch_norm(model, torch.randn(4, 7, 8, 8))
    assert described(model) == before


def test_gradients_are_not_recorded() -> None:
    model = randomize_(small_net())
    recorded: list[bool] = []
    model.register_forward_hook(lambda module, args, out: recorded.append(out.requires_grad))
    calibrate_batch_norm(model, torch.randn(4, 3, 8, 8).requires_grad_())
    assert recorded == [False]
    assert torch.is_grad_enabled()


def test_a_model_without_batch_norm_is_left_alone() -> None:
    model = randomize_(small_net(norm=None))
    before = copy.deepcopy(model)
    calibrate_batch_norm(model, torch.randn(4, 3, 8, 8))
    assert_same_state(model, before)


def test_calibrated_network_has_normalised_activations() -> None:
    images = torch.randn(8, 3, 112, 112) * 3
    model = randomize_(TorchvisionGoogLeNet(init_weights=False, aux_logits=False)).eval()
    calibrate_batch_norm(model, images)
    assert not any(module.training for module in model.modules())
    found: dict[str, tuple[float, float]] = {}

    def record(name: str) -> object:
        def hook(module: nn.BatchNorm2d, args: tuple[Tensor], out: Tensor) -> None:
            mean, var = batch_statistics((out - module.bias.view(1, -1, 1, 1)) / module.weight.view(1, -1, 1, 1))
            found[name] = mean.abs().max().item(), var.max().item()

        return hook

    for name, module in model.named_modules():
        if isinstance(module, TorchvisionConv):
            module.bn.register_forward_hook(record(name))  # type: ignore[arg-type]
    with torch.no_grad():
        model(images)
    assert len(found) == 57
    # Evaluation normalises with the unbiased variance, training with the biased one; the difference adds up over the layers.
    assert {name: size for name, size in found.items() if size[0] > 0.5 or not 0.5 < size[1] < 1.5} == {}

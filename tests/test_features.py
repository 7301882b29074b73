"""Outputs of inner layers: the right ones, unchanged by what follows, and nothing left behind."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator

import pytest
import torch
from cases import assert_same, message_of, plain_googlenet, small_model, through_pickle
from torch import Tensor, nn

from googlenet_fused import fuse, unfuse
from googlenet_fused.features import Features, features
from googlenet_fused.models import VARIANTS
from googlenet_fused.randomize import randomize_

HOSTS = ("torchvision's own", *VARIANTS)

CHAIN = (
    *("pad1", "conv1", "maxpool1", "norm1", "conv2", "conv3", "norm2", "maxpool2", "inception3a", "inception3b", "maxpool3"),
    *("inception4a", "inception4b", "inception4c", "inception4d", "inception4e", "maxpool4", "inception5a", "inception5b"),
)
"""The layers of every GoogLeNet here, in order; some have not all of them."""

X = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    """Every plain GoogLeNet in evaluation mode, and its fused copy."""
    plain = {host: plain_googlenet(host) for host in HOSTS}
    return plain | {f"{host}, fused": fuse(model) for host, model in plain.items()}


@pytest.fixture(params=[*HOSTS, *(f"{host}, fused" for host in HOSTS)])
def network(request: pytest.FixtureRequest, networks: dict[str, nn.Module]) -> nn.Module:
    return networks[request.param]


@pytest.fixture
def model(networks: dict[str, nn.Module]) -> nn.Module:
    return networks["torchvision's own"]


def layer_by_layer(network: nn.Module, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    for name in CHAIN:
        if hasattr(network, name):
            x = getattr(network, name)(x)
            yield name, x


def hooks_on(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_features_are_the_layers_outputs(network: nn.Module) -> None:
    with torch.no_grad():
        found = features(network)(X)
        expected = dict(layer_by_layer(network, X))
    assert list(found) == ["inception4e", "inception5b"]
    assert found["inception4e"].shape == (2, 832, 4, 6)
    assert found["inception5b"].shape == (2, 1024, 2, 3)
    assert_same(found, {name: expected[name] for name in found})


def test_every_layer_at_once_in_the_order_asked_for(network: nn.Module) -> None:
    names = [name for name in reversed(CHAIN) if hasattr(network, name)]
    with torch.no_grad():
        found = features(network, names)(X)
        assert list(found) == names
        assert_same(found, dict(layer_by_layer(network, X)))


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_later_layers_do_not_change_a_result(networks: dict[str, nn.Module], host: str, mode: type) -> None:
    plain = networks[host]
    block = plain.conv1
    with mode():
        conv = block.conv(plain.pad1(X) if hasattr(plain, "pad1") else X)
        expected = {"conv1.conv": conv}
        if block.bn is not None:
            expected["conv1.bn"] = block.bn(conv)
        expected["conv1"] = expected[list(expected)[-1]].clamp(min=0)
        assert all((expected[name] < 0).any() for name in expected if name != "conv1")
        assert_same(features(plain, list(expected))(X), expected)
        for name in expected:
            assert_same(features(plain, [name])(X), {name: expected[name]}, name)


def test_layers_inside_a_plain_inception_module(model: nn.Module) -> None:
    names = ["inception3a.branch2.0", "inception3a.branch2", "inception3a.branch4.0", "inception3a"]
    with torch.no_grad():
        found = features(model, names)(X)
        block, x = model.inception3a, dict(layer_by_layer(model, X))["maxpool2"]
        assert_same(found["inception3a.branch2"], block.branch2(x))
        assert_same(found["inception3a.branch2"], block.branch2[1](found["inception3a.branch2.0"]))
        assert_same(found["inception3a.branch4.0"], block.branch4[0](x))
        assert_same(found["inception3a"], block(x))


def test_nothing_runs_after_the_last_layer() -> None:
    model = small_model().train()
    counted = model[1].branch1.bn.num_batches_tracked
    stem = features(model, ["0"])
    stem(X)
    assert model[0].bn.num_batches_tracked == 1
    assert counted == 0
    features(model, ["1"])(X)
    assert counted == 1

    def unreachable(*arguments: object) -> None:
        raise AssertionError("ran")

    model[1].register_forward_pre_hook(unreachable)
    stem(X)
    with pytest.raises(AssertionError, match="ran"):
        model(X)


def test_no_hook_is_left_behind() -> None:
    model = small_model()
    extract = features(model, ["0.conv", "1"])
    assert hooks_on(model) == 0
    extract(X)
    assert hooks_on(model) == 0
    with pytest.raises(RuntimeError):
        extract(X[:, :2])
    assert hooks_on(model) == 0


def test_hooks_of_the_users_fire_and_count() -> None:
    model = small_model()
    expected = features(model, ["0"])(X)["0"]
    model[0].register_forward_hook(lambda module, arguments, output: output + 1)
    assert_same(features(model, ["0"])(X)["0"], expected + 1)


def test_gradients_flow_as_without(model: nn.Module) -> None:
    weight = model.conv1.conv.weight
    names = ["conv1.conv", "inception3b"]
    found = features(model, names)(X)
    (gradient,) = torch.autograd.grad(sum(out.square().mean() for out in found.values()), weight)
    loss = model.conv1.conv(X).square().mean() + dict(layer_by_layer(model, X))["inception3b"].square().mean()
    (expected,) = torch.autograd.grad(loss, weight)
    assert expected.abs().max() > 0
    torch.testing.assert_close(gradient, expected)


def test_auxiliary_heads_are_layers_in_training_only() -> None:
    model = plain_googlenet("torchvision")
    extract = features(model, ["aux1.conv", "aux1"])
    with pytest.raises(ValueError, match="auxiliary heads") as error:
        extract(X)
    assert "does not run 'aux1.conv', 'aux1'" in message_of(error)
    extract.train()
    found = extract(X)
    assert found["aux1.conv"].shape == (2, 128, 4, 4)
    assert found["aux1"].shape == (2, 10)


def test_autocast(network: nn.Module) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = features(network, ["inception3a"])(X)["inception3a"]
        assert found.dtype == torch.bfloat16
        assert_same(found, dict(layer_by_layer(network, X))["inception3a"])


def test_parameters_are_the_models() -> None:
    model = small_model().train()
    extract = features(model, ["0"])
    assert extract.training
    assert [id(parameter) for parameter in extract.parameters()] == [id(parameter) for parameter in model.parameters()]
    assert list(extract.state_dict()) == [f"model.{key}" for key in model.state_dict()]
    extract.eval()
    assert not model[0].bn.training
    assert not features(model, ["0"]).training


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_copies_are_on_their_own(copied: object) -> None:
    model = small_model()
    extract = features(model, ["1"])
    expected = extract(X)
    other = copied(extract)  # type: ignore[operator]
    randomize_(model, seed=3)
    assert_same(other(X), expected)
    assert not torch.equal(extract(X)["1"], expected["1"])


def test_fused_and_unfused_afterwards() -> None:
    extract = features(small_model(), ["0", "1"])
    fast = fuse(extract)
    assert isinstance(fast, Features)
    assert len(fast.fusion_report.fused) == 2
    with torch.no_grad():
        torch.testing.assert_close(fast(X), extract(X), rtol=1e-4, atol=1e-4)
        assert_same(unfuse(fast)(X), extract(X))


@pytest.mark.parametrize("name", ["1.branch2", "1.branch2.0.conv", "0.conv", "0.bn"])
def test_layers_inside_fused_blocks_are_refused(name: str) -> None:
    plain = small_model()
    fast = fuse(plain)
    with pytest.raises(ValueError, match="unfuse") as error:
        features(fast, ["0", name])
    text = message_of(error)
    assert f"'{name}' is inside {name[0]}, a Fused" in text
    features(unfuse(fast), ["0", name])(X)

    fused_later = fuse(features(plain, [name]))
    with pytest.raises(ValueError, match="unfuse"):
        fused_later(X)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (["inception4f"], "the model has no layer 'inception4f'; close to it: inception4"),
        (["qqqqqq"], "no layer 'qqqqqq'; model.named_modules() lists them"),
        ([""], "no layer ''"),
        (["conv1", "conv2", "conv1"], "'conv1' is given twice"),
        ([], "layers is empty"),
        ("conv1", "write ['conv1']"),
    ],
)
def test_wrong_names(model: nn.Module, layers: list[str], said: str) -> None:
    with pytest.raises(ValueError, match="layer") as error:
        features(model, layers)
    assert said in message_of(error)


def test_one_layer_under_two_names() -> None:
    shared = nn.ReLU()
    with pytest.raises(ValueError, match="'2' is the layer '0' again"):
        features(nn.Sequential(shared, nn.Conv2d(3, 3, 1), shared), ["0", "2"])


def test_a_layer_that_runs_twice() -> None:
    shared = nn.ReLU()
    model = nn.Sequential(shared, nn.Conv2d(3, 3, 1), shared, nn.Identity())
    with pytest.raises(ValueError, match="runs '0' more than once"):
        features(model, ["0", "3"])(X)
    assert hooks_on(model) == 0


def test_only_tensors_are_features() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(TypeError, match="'0' gives a tuple, not a tensor"):
        features(nn.Sequential(Pair()), ["0"])(X)
    with pytest.raises(TypeError, match="got int"):
        features(3)  # type: ignore[arg-type]


def test_compiled() -> None:
    model = small_model()
    extract = features(model, ["0", "1"])
    with torch.no_grad():
        compiled = torch.compile(extract, backend="eager")
        for _ in range(2):
            assert_same(compiled(X), extract(X))
        assert hooks_on(model) == 0

        whole = torch.compile(model, backend="eager")
        whole(X)
        with pytest.raises(ValueError, match=r"does not run '_orig_mod\.0'; .* torch.compile calls no layer by itself"):
            features(whole, ["_orig_mod.0"])(X)


def test_threads_share_a_model() -> None:
    model = small_model()
    extracts = [features(model, ["0", "1"]), features(model, ["0.conv"]), features(model, ["1.branch1"])]
    images = [torch.randn(1, 3, 24, 24 + 4 * i) for i in range(3)]
    expected = [extract(x) for extract, x in zip(extracts, images, strict=True)]
    wrong: list[object] = []

    def work(which: int) -> None:
        try:
            for _ in range(30):
                assert_same(extracts[which](images[which]), expected[which])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert hooks_on(model) == 0


def test_a_pass_inside_a_pass() -> None:
    model = small_model()
    inner, outer = features(model, ["0", "1"]), features(model, ["0", "1"])
    expected = inner(X)
    calls: list[Tensor] = []

    def look_again(module: nn.Module, arguments: object, output: Tensor) -> None:
        if not calls:
            calls.append(output)
            assert_same(inner(X), expected)

    model[0].register_forward_hook(look_again)
    assert_same(outer(X), expected)
    assert len(calls) == 1

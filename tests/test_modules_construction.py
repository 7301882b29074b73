"""FusedInception as it is constructed: torchvision's signature, state and random draws, alone and as a block of a network."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import ODD_SPECS, TINY, assert_agrees, assert_same, fused_conv, fused_inception, random_input
from torch import Tensor, nn
from torchvision.models.googlenet import BasicConv2d as TorchvisionConv
from torchvision.models.googlenet import GoogLeNet as TorchvisionGoogLeNet
from torchvision.models.googlenet import Inception as TorchvisionInception
from torchvision.models.googlenet import InceptionAux as TorchvisionAux

from googlenet_fused import CannotFuse, FusedInception
from googlenet_fused.blocks import BasicConv2d, Inception, Norm
from googlenet_fused.models import GoogLeNet
from googlenet_fused.packing import spec_of_weights
from googlenet_fused.randomize import randomize_
from googlenet_fused.spec import InceptionSpec

PRIMES = ODD_SPECS["primes"]


def test_signature_is_torchvisions() -> None:
    theirs = list(inspect.signature(TorchvisionInception.__init__).parameters.values())
    ours = list(inspect.signature(FusedInception.__init__).parameters.values())
    described = [[(p.name, p.kind, p.default) for p in parameters] for parameters in (theirs, ours)]
    assert described[1][: len(theirs)] == described[0]
    for extra in ours[len(theirs) :]:
        assert extra.kind is inspect.Parameter.KEYWORD_ONLY
        assert extra.default is not inspect.Parameter.empty


@pytest.mark.parametrize("spec", ODD_SPECS.values(), ids=ODD_SPECS)
def test_state_dict_is_torchvisions(spec: InceptionSpec) -> None:
    theirs = randomize_(TorchvisionInception(*list(spec)[:7])).eval()
    ours = FusedInception(*list(spec)[:7])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for name, value in theirs.state_dict().items():
        assert_same(ours.state_dict()[name], value, name)
    back = TorchvisionInception(*list(spec)[:7]).eval()
    back.load_state_dict(ours.state_dict(), strict=True)
    assert_agrees(ours.eval(), back, random_input(spec, 2, 5, 4))


def test_random_draws_are_torchvisions() -> None:
    torch.manual_seed(3)
    theirs = TorchvisionInception(*list(PRIMES)[:7])
    state = torch.get_rng_state()
    torch.manual_seed(3)
    ours = FusedInception(*list(PRIMES)[:7])
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in theirs.state_dict().items():
        assert_same(ours.state_dict()[name], value, name)


@pytest.mark.parametrize("large_kernel", [3, 5])
@pytest.mark.parametrize("norm", ["batch", None])
def test_constructor_arguments(norm: Norm, large_kernel: int) -> None:
    spec = replace(PRIMES, large_kernel=large_kernel)
    module = FusedInception(*list(spec)[:7], large_kernel=large_kernel, norm=norm, backend="reference")
    assert module.spec == spec
    assert module.backend == "reference"
    assert module.training
    plain = Inception(*list(spec)[:7], large_kernel=large_kernel, norm=norm)
    assert {k: v.shape for k, v in module.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    defaults = FusedInception(*list(spec)[:7])
    assert (defaults.spec.large_kernel, defaults.backend, defaults.branch1.bn is None) == (3, "auto", False)


@pytest.mark.parametrize("conv_block", [TorchvisionConv, BasicConv2d, partial(BasicConv2d, norm="batch")])
def test_conv_block_is_used(conv_block: Callable[..., nn.Module]) -> None:
    module = randomize_(FusedInception(*list(TINY)[:7], conv_block)).eval()
    made = conv_block.func if isinstance(conv_block, partial) else conv_block
    assert {type(block) for block in module.modules() if isinstance(block, BasicConv2d | TorchvisionConv)} == {made}
    assert_agrees(module, module.to_plain(), random_input(TINY, 1, 4, 5))


class WithoutReLU(TorchvisionConv):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


@pytest.mark.parametrize(
    ("conv_block", "message"),
    [
        (nn.Conv2d, "branch1: Conv2d is not a BasicConv2d of torchvision's or googlenet_fused's GoogLeNet"),
        (WithoutReLU, "branch1: WithoutReLU is not a BasicConv2d"),
        (partial(TorchvisionConv, dilation=2), "branch1: its convolution is grouped, dilated or not padded"),
        (partial(TorchvisionConv, padding_mode="reflect"), "branch1: its convolution is grouped, dilated or not padded"),
        (partial(BasicConv2d, stride=2), r"branch1 has stride \(2, 2\) and padding \(0, 0\), not 1 and 0"),
    ],
)
def test_conv_block_that_cannot_be_fused(conv_block: Callable[..., nn.Module], message: str) -> None:
    with pytest.raises(CannotFuse, match=message):
        FusedInception(*list(TINY)[:7], conv_block)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ch3x3": 0}, "ch3x3 must be a positive integer, got 0"),
        ({"large_kernel": 7}, "large_kernel must be 3 or 5, got 7"),
        ({"norm": "layer"}, "norm must be 'batch' or None, got 'layer'"),
        ({"backend": "tpu"}, "unknown backend 'tpu': choose one of 'auto'"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    widths = dict(zip(("in_channels", "ch1x1", "ch3x3red", "ch3x3", "ch5x5red", "ch5x5", "pool_proj"), TINY, strict=False))
    with pytest.raises(ValueError, match=message):
        FusedInception(**{**widths, **arguments})  # type: ignore[arg-type]


def test_wrong_input() -> None:
    module = fused_inception(TINY)
    with pytest.raises(ValueError, match=r"x must be \[n, 5, h, w\] .*, got \[1, 4, 3, 3\]"):
        module(torch.randn(1, 4, 3, 3))
    with pytest.raises(ValueError, match=r"got \[5, 3, 3\]"):
        module(torch.randn(5, 3, 3))
    with pytest.raises(TypeError, match=r"x is torch.bfloat16 but the weights are torch.float32"):
        module(random_input(TINY, 1, 3, 3, torch.bfloat16))


def test_repr_names_kernel_and_backend() -> None:
    text = repr(fused_inception(replace(TINY, large_kernel=5), backend="reference"))
    assert text.startswith("FusedInception(\n  large_kernel=5, backend='reference'\n")
    assert "large_kernel=3, backend='auto'" in repr(fused_inception(replace(TINY, large_kernel=3)))
    assert repr(fused_conv()).startswith("FusedConv2d(\n  backend='auto'\n")


# As a block of a network.


def hosts() -> tuple[nn.Module, nn.Module]:
    """torchvision's GoogLeNet with its own blocks and with FusedInception, of one randomised state."""
    plain = randomize_(TorchvisionGoogLeNet(init_weights=False, num_classes=10))
    fused = TorchvisionGoogLeNet(init_weights=False, num_classes=10, blocks=[TorchvisionConv, FusedInception, TorchvisionAux])
    assert sum(isinstance(module, FusedInception) for module in fused.modules()) == 9
    fused.load_state_dict(plain.state_dict(), strict=True)
    return plain, fused


def test_as_a_block_of_torchvisions_network() -> None:
    plain, fused = hosts()
    assert_agrees(fused.eval(), plain.eval(), torch.randn(2, 3, 64, 48))


def test_as_a_block_of_torchvisions_network_in_training() -> None:
    plain, fused = hosts()
    x, results = torch.randn(2, 3, 48, 48), []
    for model in (plain, fused):
        torch.manual_seed(1)
        outputs = model(x)
        sum(output.square().mean() for output in outputs).backward()
        results.append([*outputs, *(p.grad for p in model.parameters()), *model.buffers()])
    for theirs, ours in zip(*results, strict=True):
        assert_same(ours, theirs)
    assert_agrees(fused.eval(), plain.eval(), x)


def test_torchvisions_initial_weights_under_one_seed() -> None:
    states = []
    for inception in (TorchvisionInception, FusedInception):
        torch.manual_seed(5)
        states.append(TorchvisionGoogLeNet(init_weights=True, blocks=[TorchvisionConv, inception, TorchvisionAux]).state_dict())
    for name, value in states[0].items():
        assert_same(states[1][name], value, name)


def test_as_a_block_of_our_network() -> None:
    fused = GoogLeNet(
        10, variant="bvlc", aux_logits=False, init_weights=False, blocks=[
            partial(BasicConv2d, norm=None), partial(FusedInception, norm=None, large_kernel=5), TorchvisionAux,
        ],
    )  # fmt: skip
    plain = GoogLeNet(10, variant="bvlc", aux_logits=False, init_weights=False)
    fused.load_state_dict(randomize_(plain).state_dict(), strict=True)
    assert_agrees(fused.eval(), plain.eval(), torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("cls", [Inception, FusedInception])
def test_from_spec(cls: type[Inception]) -> None:
    for spec in (TINY, replace(TINY, large_kernel=3)):
        module = cls.from_spec(spec, norm=None)
        assert type(module) is cls
        assert spec_of_weights([p for n, p in module.named_parameters() if n.endswith("conv.weight")]) == spec
        assert module.branch1.bn is None


@pytest.mark.parametrize("spec", ["4a", None, (192, 64, 96, 128, 16, 32, 32, 5)])
@pytest.mark.parametrize("cls", [Inception, FusedInception])
def test_from_spec_of_something_else(cls: type[Inception], spec: object) -> None:
    with pytest.raises(TypeError, match=r"spec must be an InceptionSpec, such as GOOGLENET_SPECS\['4a'\], got "):
        cls.from_spec(spec)  # type: ignore[arg-type]


@pytest.mark.parametrize("cls", [Inception, FusedInception])
def test_a_spec_unpacked_into_the_constructor_names_from_spec(cls: type[Inception]) -> None:
    with pytest.raises(TypeError, match=rf"conv_block must be .*, got 5; .*{cls.__name__}\.from_spec\(spec\)"):
        cls(*TINY)  # type: ignore[arg-type]

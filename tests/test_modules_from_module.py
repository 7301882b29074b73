"""FusedInception.from_module and to_plain: what they carry over, hooks included, and every module refused, by its part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from cases import ODD_SPECS, TINY, assert_agrees, assert_same, can_run, plain_inception, random_input
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torchvision.models.googlenet import BasicConv2d as TorchvisionConv
from torchvision.models.googlenet import Inception as TorchvisionInception

from googlenet_fused import CannotFuse, FusedInception
from googlenet_fused.blocks import BasicConv2d
from googlenet_fused.randomize import randomize_

PRIMES = ODD_SPECS["primes"]
every_backend = pytest.mark.parametrize("backend", can_run(torch.float32))


def torchvision_inception() -> TorchvisionInception:
    return randomize_(TorchvisionInception(*list(PRIMES)[:7])).eval()


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "torchvision": torchvision_inception,
    "ours, 3x3": lambda: plain_inception(replace(PRIMES, large_kernel=3)),
    "ours, 5x5": lambda: plain_inception(replace(PRIMES, large_kernel=5)),
    "ours, no norm": lambda: plain_inception(PRIMES, norm=None),
}
every_host = pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)


@every_host
@every_backend
def test_from_module_and_back(backend: str, host: Callable[[], nn.Module]) -> None:
    plain, x = host(), random_input(PRIMES, 2, 6, 5)
    state = torch.get_rng_state()
    fused = FusedInception.from_module(plain, backend=backend)
    assert torch.equal(torch.get_rng_state(), state)
    assert fused.backend == backend
    assert fused.spec.large_kernel == plain.branch3[1].conv.kernel_size[0]
    assert_agrees(fused, plain, x)

    back = fused.to_plain()
    assert type(back) is type(plain)
    assert_same(back(x), plain(x))
    for module in (fused, back):
        assert not module.training
        assert [(k, id(v)) for k, v in module.named_parameters()] == [(k, id(v)) for k, v in plain.named_parameters()]
        assert list(module.state_dict()) == list(plain.state_dict())
    assert FusedInception.from_module(plain.train()).training
    assert FusedInception.from_module(plain).to_plain().training


@every_backend
def test_bias_and_batch_norm_together(backend: str) -> None:
    plain = TorchvisionInception(*list(PRIMES)[:7])
    for block in plain.modules():
        if isinstance(block, TorchvisionConv):
            block.conv.bias = nn.Parameter(torch.zeros(block.conv.out_channels))
    randomize_(plain).eval()
    assert_agrees(FusedInception.from_module(plain, backend=backend), plain, random_input(PRIMES, 2, 6, 5))


# Hooks.


@pytest.mark.parametrize("before", [False, True], ids=["on the fused module", "on the plain module"])
def test_hooks_on_the_block_fire(before: bool) -> None:
    plain = torchvision_inception()
    module = plain if before else FusedInception.from_module(plain)
    x = random_input(PRIMES, 2, 4, 5)
    fired: dict[str, list[object]] = {"pre": [], "forward": [], "always": [], "backward": [], "backward_pre": []}

    def double(block: nn.Module, args: tuple[Tensor], kwargs: dict[str, object]) -> tuple[tuple[Tensor], dict[str, object]]:
        fired["pre"].append(block)
        return (args[0] * 2,), kwargs

    def negate(block: nn.Module, args: object, out: Tensor) -> Tensor:
        fired["forward"].append(block)
        return -out

    module.register_forward_pre_hook(double, with_kwargs=True)
    module.register_forward_hook(negate)
    module.register_forward_hook(lambda *_: fired["always"].append(None), always_call=True)
    module.register_full_backward_pre_hook(lambda *_: fired["backward_pre"].append(None))
    module.register_full_backward_hook(lambda _, into, out_of: fired["backward"].append((into[0].shape, out_of[0].shape)))
    fused = FusedInception.from_module(plain) if before else module

    out = fused(x.requires_grad_())
    assert fired["pre"] == fired["forward"] == [fused]
    assert fired["always"] == [None]
    without_hooks = FusedInception.from_module(torchvision_inception())
    assert_same(out.detach(), -without_hooks(x * 2).detach())
    out.sum().backward()
    assert fired["backward_pre"] == [None]
    assert fired["backward"] == [(x.shape, out.shape)]


def test_hooks_set_later_are_the_modules_own() -> None:
    plain = plain_inception(TINY)
    fused = FusedInception.from_module(plain)
    back = fused.to_plain()
    fired: list[nn.Module] = []
    for module in (plain, fused, back):
        module.register_forward_hook(lambda block, *_: fired.append(block))
        module(random_input(TINY, 1, 4, 5))
    assert [id(module) for module in fired] == [id(plain), id(fused), id(back)]


# What is refused, and what is not.


def set_on(path: str, **values: object) -> Callable[[nn.Module], None]:
    def spoil(block: nn.Module) -> None:
        for name, value in values.items():
            setattr(block.get_submodule(path), name, value)

    return spoil


def put(path: str, make: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], None]:
    """Replaces the submodule at ``path`` by what ``make`` makes of it."""

    def spoil(block: nn.Module) -> None:
        block.set_submodule(path, make(block.get_submodule(path)))

    return spoil


def hook(path: str, method: str) -> Callable[[nn.Module], None]:
    def spoil(block: nn.Module) -> None:
        getattr(block.get_submodule(path), method)(lambda *_: None)

    return spoil


def own_forward(path: str) -> Callable[[nn.Module], None]:
    return lambda block: setattr(block.get_submodule(path), "forward", block.get_submodule(path).forward)


def conv(out_channels: int, in_channels: int, kernel: int | tuple[int, int], **options: Any) -> nn.Conv2d:
    """Without bias, padded to keep height and width."""
    padding = kernel // 2 if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2)
    return nn.Conv2d(in_channels, out_channels, kernel, padding=padding, bias=False, **options)


def sync_batch_norm(block: nn.Module) -> None:
    for name, child in list(block.named_children()):
        setattr(block, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))


class OwnInception(TorchvisionInception):
    pass


class OwnConv(TorchvisionConv):
    pass


class OwnBatchNorm(nn.BatchNorm2d):
    pass


def of_class(path: str, cls: type[nn.Module]) -> Callable[[nn.Module], None]:
    return lambda block: setattr(block.get_submodule(path), "__class__", cls)


NOT_PLAIN = "its convolution is grouped, dilated or not padded with a number of zeros"
POOL = "branch4.0 is .*, not a max pool of kernel 3, stride 1 and padding 1"

REFUSALS: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    # PRIMES: 13 channels in, ch3x3 17 of 11, ch5x5 5 of 3, pool_proj 19.
    "dilation": (set_on("branch2.1.conv", dilation=(2, 2), padding=(2, 2)), f"branch2.1: {NOT_PLAIN}: Conv2d"),
    "groups": (put("branch2.1.conv", lambda _: nn.Conv2d(11, 11, 3, padding=1, groups=11)), f"branch2.1: {NOT_PLAIN}"),
    "padding mode": (put("branch3.1.conv", lambda _: conv(5, 3, 3, padding_mode="circular")), f"branch3.1: {NOT_PLAIN}"),
    "padding in words": (put("branch3.1.conv", lambda _: nn.Conv2d(3, 5, 3, padding="same")), f"branch3.1: {NOT_PLAIN}"),
    "padding": (set_on("branch2.1.conv", padding=(0, 0)), r"branch2.1 has stride \(1, 1\) and padding \(0, 0\), not 1 and 1"),
    "padding of a 1x1": (
        set_on("branch4.1.conv", padding=(1, 1)),
        r"branch4.1 has stride \(1, 1\) and padding \(1, 1\), not 1 and 0",
    ),
    "stride": (set_on("branch1.conv", stride=(2, 2)), r"branch1 has stride \(2, 2\) and padding \(0, 0\), not 1 and 0"),
    "other convolution": (
        put("branch1.conv", lambda _: nn.ConvTranspose2d(13, 7, 1)),
        "branch1: its convolution is a ConvTranspose2d",
    ),
    "SyncBatchNorm": (sync_batch_norm, "branch1: its norm is a SyncBatchNorm, not an nn.BatchNorm2d"),
    "GroupNorm": (put("branch3.0.bn", lambda _: nn.GroupNorm(1, 3)), "branch3.0: its norm is a GroupNorm"),
    "subclass of the norm": (of_class("branch3.0.bn", OwnBatchNorm), "branch3.0: its norm is a OwnBatchNorm"),
    "no running statistics": (
        put("branch3.0.bn", lambda _: nn.BatchNorm2d(3, track_running_stats=False)),
        "branch3.0: its batch norm has no running statistics or no weight and bias",
    ),
    "no weight and bias": (
        put("branch2.1.bn", lambda _: nn.BatchNorm2d(17, affine=False)),
        "branch2.1: its batch norm has no running statistics or no weight and bias",
    ),
    "forward hook on a block": (
        hook("branch4.1", "register_forward_hook"),
        "branch4.1: the block has hooks, which would not fire",
    ),
    "pre-hook on a block": (hook("branch1", "register_forward_pre_hook"), "branch1: the block has hooks"),
    "hook on a convolution": (hook("branch2.0.conv", "register_forward_hook"), "branch2.0: its convolution has hooks"),
    "backward hook": (hook("branch2.0.conv", "register_full_backward_hook"), "branch2.0: its convolution has hooks"),
    "backward pre-hook": (hook("branch3.1", "register_full_backward_pre_hook"), "branch3.1: the block has hooks"),
    "hook on a norm": (hook("branch3.1.bn", "register_forward_hook"), "branch3.1: its batch norm has hooks"),
    "hook on a branch": (hook("branch2", "register_forward_hook"), "branch2 has hooks"),
    "hook on the pool": (hook("branch4.0", "register_forward_pre_hook"), "branch4.0 has hooks"),
    "own forward": (own_forward(""), "the module has a forward of its own on the instance"),
    "own forward of a branch": (own_forward("branch3"), "branch3 has a forward of its own on the instance"),
    "own forward of the pool": (own_forward("branch4.0"), "branch4.0 has a forward of its own on the instance"),
    "own forward of a block": (own_forward("branch1"), "branch1: the block has a forward of its own on the instance"),
    "own forward of a convolution": (own_forward("branch2.1.conv"), "branch2.1: its convolution has a forward of its own"),
    "own forward of a norm": (own_forward("branch3.0.bn"), "branch3.0: its batch norm has a forward of its own"),
    "subclass": (
        of_class("", OwnInception),
        "OwnInception is not an Inception module of torchvision's or googlenet_fused's GoogLeNet",
    ),
    "subclass of a block": (of_class("branch3.0", OwnConv), "branch3.0: OwnConv is not a BasicConv2d"),
    "weight_norm": (
        lambda block: parametrizations.weight_norm(block.branch2[1].conv),
        "branch2.1: its convolution is a ParametrizedConv2d, not an nn.Conv2d",
    ),
    "spectral_norm": (
        lambda block: parametrizations.spectral_norm(block.branch1.conv),
        "branch1: its convolution is a Parametrized",
    ),
    "pruning": (lambda block: prune.l1_unstructured(block.branch1.conv, "weight", 0.5), "branch1: its convolution has hooks"),
    "average pool": (put("branch4.0", lambda _: nn.AvgPool2d(3, 1, 1)), POOL),
    "pool's kernel": (put("branch4.0", lambda _: nn.MaxPool2d(5, 1, 2)), POOL),
    "pool's stride": (put("branch4.0", lambda _: nn.MaxPool2d(3, 2, 1)), POOL),
    "pool's padding": (put("branch4.0", lambda _: nn.MaxPool2d(3, 1, 0)), POOL),
    "pool's dilation": (put("branch4.0", lambda _: nn.MaxPool2d(3, 1, 1, dilation=2)), POOL),
    "pool's indices": (put("branch4.0", lambda _: nn.MaxPool2d(3, 1, 1, return_indices=True)), POOL),
    "three blocks": (put("branch2", lambda old: nn.Sequential(*old, nn.Identity())), "branch2 is not a sequence of two blocks"),
    "no sequence": (put("branch3", lambda _: nn.Identity()), "branch3 is not a sequence of two blocks"),
    "one block": (put("branch4", lambda old: nn.Sequential(old[1])), "branch4 is not a sequence of two blocks"),
    "no block": (put("branch1", lambda _: nn.Identity()), "branch1: Identity is not a BasicConv2d"),
    "mixed dtypes": (lambda block: block.branch3.double(), "its convolutions differ in dtype"),
    "7x7": (put("branch3.1.conv", lambda _: conv(5, 3, 7)), "InceptionSpec: large_kernel must be 3 or 5, got 7"),
    "1x1 in the third branch": (
        put("branch3.1.conv", lambda _: conv(5, 3, 1)),
        "InceptionSpec: large_kernel must be 3 or 5, got 1",
    ),
    "5x5 in the second branch": (put("branch2.1.conv", lambda _: conv(17, 11, 5)), r"ch3x3 weight has shape \[17, 11, 5, 5\]"),
    "3x5": (put("branch3.1.conv", lambda _: conv(5, 3, (3, 5))), r"ch5x5 weight has shape \[5, 3, 3, 5\]"),
    "widths": (
        put("branch2.0.conv", lambda _: conv(10, 13, 1)),
        r"ch3x3 weight has shape \[17, 11, 3, 3\], expected \[17, 10, 3, 3\]",
    ),
    "bias here and there": (put("branch1.conv", lambda _: nn.Conv2d(13, 7, 1)), "some of its convolutions have a bias"),
    "norm here and there": (
        put("branch4.1", lambda _: BasicConv2d(13, 19, norm=None, kernel_size=1)),
        "some of its convolutions have a bias or a batch norm and others have not",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("host", ["torchvision", "ours, 3x3"])
def test_refusals_name_the_part(host: str, spoil: Callable[[nn.Module], object], message: str) -> None:
    plain = HOSTS[host]()
    spoil(plain)
    with pytest.raises(CannotFuse, match="^" + message):
        FusedInception.from_module(plain)


@pytest.mark.parametrize("cls", [nn.Identity, nn.Sequential, partial(BasicConv2d, 1, 1, kernel_size=1)])
def test_other_modules_are_refused(cls: Callable[[], nn.Module]) -> None:
    module = cls()
    with pytest.raises(CannotFuse, match=f"{type(module).__name__} is not an Inception module of torchvision's"):
        FusedInception.from_module(module)


HARMLESS: dict[str, Callable[[nn.Module], object]] = {
    "ceil mode": set_on("branch4.0", ceil_mode=False),
    "pool in pairs": put("branch4.0", lambda _: nn.MaxPool2d((3, 3), (1, 1), (1, 1))),
    "momentum": set_on("branch1.bn", momentum=None),
    "eps": set_on("branch3.1.bn", eps=0.1),
    "frozen": lambda block: block.requires_grad_(False),
    "channels_last": lambda block: block.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_harmless_changes_are_fused(change: Callable[[nn.Module], object]) -> None:
    plain = torchvision_inception()
    change(plain)
    assert_agrees(FusedInception.from_module(plain), plain, random_input(PRIMES, 2, 6, 5))

"""``fuse`` and ``unfuse`` leave the model they are given untouched, and the hooks on its blocks come along."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from cases import ODD_SPECS, assert_same, outcome, plain_googlenet, report_of, small_model
from torch import nn

from googlenet_fused import FusedInception, fuse, unfuse
from googlenet_fused.blocks import BasicConv2d, Inception
from googlenet_fused.modules import FusedConv2d


def everything(model: nn.Module) -> dict[str, object]:
    """What must not change in a model, compared by identity where that matters."""
    return {
        "modules": [(name, id(module), type(module), module.training) for name, module in model.named_modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [sorted(module._forward_hooks) + sorted(module._forward_pre_hooks) for module in model.modules()],
        "tensors": [(name, id(value), value._version) for name, value in model.state_dict(keep_vars=True).items()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [id(parameter.grad) for parameter in model.parameters()],
        "extra": repr(model),
    }


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("do", [fuse, unfuse], ids=["fuse", "unfuse"])
def test_the_original_is_left_untouched(do: Callable[[nn.Module], nn.Module], training: bool) -> None:
    plain = plain_googlenet() if do is fuse else fuse(plain_googlenet())
    plain.train(training)
    plain.inception3b.eval()
    plain.inception4a.requires_grad_(False)
    fired: list[nn.Module] = []
    for module in (plain, plain.inception3a, plain.conv1, plain.fc):
        module.register_forward_hook(lambda block, *_: fired.append(block))
    before, state = everything(plain), {name: value.clone() for name, value in plain.state_dict().items()}
    generator, mode = torch.get_rng_state(), torch.is_grad_enabled()
    done = do(plain)
    assert fired == [], "a hook of the user's fired"
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.is_grad_enabled() == mode
    assert everything(plain) == before
    for name, value in plain.state_dict().items():
        assert_same(value, state[name], name)

    assert [(name, p.requires_grad) for name, p in done.named_parameters()] == [
        (name, p.requires_grad) for name, p in plain.named_parameters()
    ]
    assert done.training == training
    modes = {name: module.training for name, module in plain.named_modules()}
    assert {name: module.training for name, module in done.named_modules()} == modes
    with torch.no_grad():
        for parameter in done.parameters():
            parameter.add_(1)
    for name, value in plain.state_dict().items():
        assert_same(value, state[name], name)


def test_hooks_on_blocks_come_along() -> None:
    plain, fired = small_model(), []
    for block in plain:
        block.register_forward_hook(lambda module, *_: fired.append(type(module)))
    fused = fuse(plain)
    x = torch.randn(1, 3, 9, 8)
    fused(x)
    assert fired == [FusedConv2d, FusedInception, nn.AdaptiveAvgPool2d]
    fired.clear()
    unfuse(fused)(x)
    assert fired == [BasicConv2d, Inception, nn.AdaptiveAvgPool2d]


def test_backward_hooks_on_blocks_come_along() -> None:
    plain, fired = small_model(), []
    plain[1].register_full_backward_hook(lambda module, grad_in, grad_out: fired.append(grad_in[0].shape))
    for model in (plain, fuse(plain), unfuse(fuse(plain))):
        model(torch.randn(1, 3, 9, 8)).sum().backward()
    assert fired == [(1, ODD_SPECS["primes"].in_channels, 5, 4)] * 3


def test_a_hook_that_changes_the_output_does_not_disturb_the_check() -> None:
    plain = small_model()
    plain[1].register_forward_hook(lambda module, args, out: out * torch.rand(()))
    assert outcome(fuse(plain)) == {"0": True, "1": True}


def test_a_block_with_hooks_inside_stays_plain() -> None:
    plain = small_model()
    plain[1].branch2[0].register_forward_hook(lambda *_: None)
    fused = fuse(plain)
    assert outcome(fused) == {"0": True, "1": False}
    assert report_of(fused).skipped[0].reason == "branch2.0: the block has hooks, which would not fire"
    assert type(fused[1]) is Inception


@pytest.mark.parametrize("way", [fuse, lambda plain: unfuse(fuse(plain))], ids=["fuse", "unfuse"])
def test_a_copy_is_freed_without_the_collector(way: Callable[[nn.Module], nn.Module]) -> None:
    made = way(small_model())
    with torch.no_grad():
        made(torch.randn(1, 3, 9, 8)), made(torch.randn(1, 3, 9, 8))
    alive = weakref.ref(next(made.parameters()))
    gc.collect()
    gc.disable()
    try:
        del made
        assert alive() is None
    finally:
        gc.enable()

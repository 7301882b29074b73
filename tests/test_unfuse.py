"""Fused and back: ``unfuse`` restores classes, outputs and state, and what is fused may be fused, saved and loaded again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import TINY, assert_agrees, assert_same, outcome, plain_googlenet, random_input, small_model, through_a_file
from torch import Tensor, nn
from torchvision.models.googlenet import Inception as TorchvisionInception

from googlenet_fused import FusedInception, fuse, unfuse
from googlenet_fused.blocks import Inception
from googlenet_fused.randomize import randomize_


@pytest.mark.parametrize("build", [plain_googlenet, lambda: plain_googlenet("bvlc")], ids=["torchvision", "bvlc"])
def test_unfuse_restores_classes_and_outputs(build: Callable[[], nn.Module]) -> None:
    plain = build()
    back = unfuse(fuse(plain))
    assert [(name, type(module)) for name, module in back.named_modules()] == [
        (name, type(module)) for name, module in plain.named_modules()
    ]
    assert list(back.state_dict()) == list(plain.state_dict())
    assert repr(back) == repr(plain)
    x = torch.randn(2, 3, 32, 48)
    assert_same(back(x), plain(x))


def test_fuse_twice() -> None:
    plain = plain_googlenet()
    once = fuse(plain)
    twice = fuse(once)
    assert outcome(twice) == outcome(once)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert_same(twice(x), once(x))
    assert {id(p) for p in twice.parameters()}.isdisjoint(id(p) for p in once.parameters())
    assert_same(unfuse(twice)(x), plain(x))
    assert type(unfuse(twice).inception3a) is TorchvisionInception


def test_fuse_again_with_another_backend_or_filter() -> None:
    once = fuse(small_model(), backend="reference")
    assert fuse(once)[1].backend == "auto"
    fewer = fuse(once, lambda module, name: name == "0")
    assert outcome(fewer) == {"0": True, "1": False}
    assert type(fewer[1]) is Inception


def test_unfuse_of_a_plain_model_is_a_copy() -> None:
    plain = small_model()
    back = unfuse(plain)
    assert back is not plain
    assert repr(back) == repr(plain)
    assert {id(p) for p in back.parameters()}.isdisjoint(id(p) for p in plain.parameters())


def test_a_fused_inception_of_the_users_own_is_unfused() -> None:
    model = randomize_(nn.Sequential(FusedInception(*list(TINY)[:7]))).eval()
    back = unfuse(model)
    assert type(back[0]) is Inception
    assert_agrees(model, back, random_input(TINY, 1, 4, 5))


class Doubled(FusedInception):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize("do", [fuse, unfuse], ids=["fuse", "unfuse"])
def test_a_subclass_of_the_fused_module_keeps_what_it_computes(do: Callable[[nn.Module], nn.Module]) -> None:
    model = randomize_(nn.Sequential(Doubled(*list(TINY)[:7]), nn.Identity())).eval()
    x = random_input(TINY, 1, 4, 5)
    with torch.no_grad():
        torch.testing.assert_close(do(model)(x), model(x))


def test_what_hangs_on_a_block_comes_along() -> None:
    """A buffer or a submodule that forward does not use still belongs to the state_dict."""
    plain = small_model()
    plain[1].register_buffer("seen", torch.tensor(3))
    plain[1].remark = "the user's own"
    fused = fuse(plain)
    assert set(fused.state_dict()) == set(plain.state_dict())
    back = unfuse(fused)
    assert set(back.state_dict()) == set(plain.state_dict())
    assert back[1].remark == "the user's own"


def test_a_fused_model_through_a_file() -> None:
    fused, x = fuse(small_model()), torch.randn(1, 3, 9, 8)
    with torch.no_grad():
        expected = fused(x)
        assert_same(through_a_file(fused)(x), expected)


def test_a_state_dict_goes_both_ways() -> None:
    plain, fused = small_model(), fuse(randomize_(small_model(), seed=5))
    x = torch.randn(1, 3, 9, 8)
    fused(x)
    fused.load_state_dict(plain.state_dict(), strict=True)
    assert_agrees(fused, plain, x)
    other = randomize_(small_model(), seed=6)
    other.load_state_dict(fused.state_dict(), strict=True)
    assert_same(other(x), plain(x))

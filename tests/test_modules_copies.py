"""Copies of FusedInception, by deepcopy, pickle, a file or a state_dict, compute the same and are independent."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from cases import ODD_SPECS, assert_same, fused_inception, random_input, through_a_file, through_pickle
from torch import nn
from torchvision.models.googlenet import Inception as TorchvisionInception

from googlenet_fused import FusedInception
from googlenet_fused.blocks import Norm
from googlenet_fused.randomize import randomize_

PRIMES = ODD_SPECS["primes"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_a_file])
@pytest.mark.parametrize("origin", ["constructor", "constructor, no norm", "torchvision", "ours", "ours, no norm"])
def test_copies(origin: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    norm: Norm = None if "no norm" in origin else "batch"
    widths = list(PRIMES)[:7]
    if origin == "torchvision":
        module = FusedInception.from_module(randomize_(TorchvisionInception(*widths)).eval(), backend="reference")
    elif "ours" in origin:
        module = fused_inception(PRIMES, norm, backend="reference")
    else:
        module = randomize_(FusedInception(*widths, large_kernel=5, norm=norm, backend="reference")).eval()
    x = random_input(PRIMES, 2, 4, 5)
    with torch.no_grad():
        expected = module(x)  # packs, so that what is packed is there to be copied
        twin = duplicate(module)
        assert isinstance(twin, FusedInception)
        assert (twin.backend, twin.spec, twin.plain_class) == ("reference", module.spec, module.plain_class)
        assert not twin.training
        assert_same(twin(x), expected)
        assert {p.data_ptr() for p in twin.parameters()}.isdisjoint({p.data_ptr() for p in module.parameters()})
        twin.branch3[1].conv.weight.mul_(1.5)
        assert not torch.equal(twin(x), expected)
        assert_same(module(x), expected)
        module.branch3[1].conv.weight.mul_(1.5)
        assert_same(module(x), twin(x))


@pytest.mark.parametrize("weights_only", [True, False])
def test_state_dict_through_a_file(weights_only: bool) -> None:
    module, x, file = fused_inception(PRIMES), random_input(PRIMES, 2, 4, 5), io.BytesIO()
    with torch.no_grad():
        expected = module(x)
        torch.save(module.state_dict(), file)
        file.seek(0)
        other = fused_inception(PRIMES, seed=7)
        assert not torch.equal(other(x), expected)
        other.load_state_dict(torch.load(file, weights_only=weights_only), strict=True)
        assert_same(other(x), expected)

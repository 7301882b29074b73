"""Learning rates, the optimiser and the average: against values written out by hand, and Caffe's rule in plain numbers."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")

from googlenet_fused.models import GoogLeNet
from googlenet_fused.training import RECIPES, Cosine, Polynomial, Recipe, StepDecay
from googlenet_fused.training.optimiser import averaged, set_lr, sgd


def test_step_decay_falls_every_8_epochs() -> None:
    schedule = StepDecay(0.96, 8)
    rates = [schedule(step, 10, 1000) for step in (0, 79, 80, 159, 160, 999)]
    assert rates == pytest.approx([1, 1, 0.96, 0.96, 0.9216, 0.96**12])


def test_polynomial_is_bvlcs() -> None:
    """quick_solver.prototxt: 0.01 * (1 - iteration / 2400000) ** 0.5."""
    schedule = RECIPES["bvlc"].schedule
    rates = [0.01 * schedule(step, 40_000, 2_400_000) for step in (0, 600_000, 1_200_000, 1_800_000, 2_399_999)]
    assert rates == pytest.approx([0.01, 0.008660254, 0.007071068, 0.005, 6.4549722e-06])


def test_cosine_rises_and_falls() -> None:
    schedule = Cosine(0.1)
    assert [schedule(step, 10, 110) for step in (0, 4, 10)] == pytest.approx([1 / 11, 5 / 11, 1])
    assert [schedule(step, 10, 110) for step in (11, 44, 77)] == pytest.approx([1, 0.75, 0.25])
    assert schedule(109, 10, 110) == pytest.approx((1 - math.cos(math.pi / 99)) / 2)
    assert Cosine(0.0)(0, 10, 100) == 1


def test_recipes_are_the_papers_and_bvlcs() -> None:
    paper, bvlc = RECIPES["paper"], RECIPES["bvlc"]
    assert (paper.momentum, paper.schedule, paper.aux_weight, paper.dropout_aux) == (0.9, StepDecay(0.96, 8), 0.3, 0.7)
    assert paper.averaging is not None
    assert (bvlc.lr, bvlc.momentum, bvlc.weight_decay, bvlc.batch_size, bvlc.schedule) == (0.01, 0.9, 2e-4, 32, Polynomial(0.5))
    # 2.4 million steps of 32 images are 60 epochs of the 1,281,167 of ImageNet.
    assert round(2_400_000 * 32 / 1_281_167) == bvlc.epochs == 60
    assert round(10_000_000 * 32 / 1_281_167) == paper.epochs == 250
    assert {name: recipe.name for name, recipe in RECIPES.items()} == {name: name for name in RECIPES}
    with pytest.raises(FrozenInstanceError):
        paper.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", 0), ("batch_size", 0), ("lr", 0.0), ("lr", math.inf), ("lr", math.nan), ("momentum", 1.0), ("averaging", 1.0),
     ("label_smoothing", -0.1), ("weight_decay", -1.0), ("aux_weight", math.nan)],
)  # fmt: skip
def test_recipes_are_checked(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be"):
        replace(RECIPES["paper"], **{name: value})


@pytest.mark.parametrize("variant", ["torchvision", "bvlc"])
def test_groups_of_parameters(variant: str) -> None:
    model = GoogLeNet(10, init_weights=False, variant=variant)  # type: ignore[arg-type]
    recipe = replace(RECIPES["bvlc"], bias_lr=2.0)
    optimiser = sgd(model, recipe)
    set_lr(optimiser, 0.01, caffe_momentum=False)
    weights, others = optimiser.param_groups
    assert (weights["lr"], weights["weight_decay"]) == (0.01, 2e-4)
    assert (others["lr"], others["weight_decay"]) == (0.02, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(names[id(p)].endswith((".conv.weight", "fc.weight", "fc1.weight", "fc2.weight")) for p in weights["params"])
    assert all(names[id(p)].endswith((".bias", ".bn.weight")) for p in others["params"])
    assert len(weights["params"]) + len(others["params"]) == len(names)


def _descend(recipe: Recipe, rates: list[float]) -> list[float]:
    """Where one weight and one bias go on the loss (w - 3)^2 / 2 + (b + 1)^2 / 2."""
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(0.5)
    optimiser = sgd(model, recipe)
    for rate in rates:
        set_lr(optimiser, rate, caffe_momentum=recipe.caffe_momentum)
        optimiser.zero_grad()
        ((model.weight - 3) ** 2 / 2 + (model.bias + 1) ** 2 / 2).sum().backward()
        optimiser.step()
    return [model.weight.item(), model.bias.item()]


def test_caffes_momentum_keeps_the_rate_inside() -> None:
    """SGDSolver: v = momentum * v + rate * (gradient + decay * w); w = w - v, rate and decay by lr_mult and decay_mult."""
    rates = [0.1, 0.1, 0.05, 0.2, 0.01]
    w, b, vw, vb = 1.0, 0.5, 0.0, 0.0
    for rate in rates:
        vw = 0.9 * vw + rate * ((w - 3) + 2e-4 * w)
        vb = 0.9 * vb + 2 * rate * (b + 1)
        w, b = w - vw, b - vb
    assert _descend(RECIPES["bvlc"], rates) == pytest.approx([w, b], rel=1e-5)
    assert _descend(replace(RECIPES["bvlc"], caffe_momentum=False), rates) != pytest.approx([w, b], rel=1e-2)


def test_torchs_momentum_keeps_it_outside() -> None:
    rates = [0.1, 0.1, 0.05, 0.2, 0.01]
    recipe = RECIPES["paper"]
    w, u = 1.0, 0.0
    for rate in rates:
        u = 0.9 * u + (w - 3) + 2e-4 * w
        w -= rate * u
    assert _descend(recipe, rates)[0] == pytest.approx(w, rel=1e-5)


def test_the_average_forgets_the_initial_weights_soon() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    mean = averaged(model, 0.5)
    expected, statistics = 0.0, 0.0
    for count, value in enumerate((1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)):
        with torch.no_grad():
            model[0].weight.fill_(value)
            model[1].running_mean.fill_(-value)
            model[1].num_batches_tracked.fill_(count)
        mean.update_parameters(model)
        decay = 0.0 if count == 0 else min(0.5, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * value
        statistics = decay * statistics - (1 - decay) * value
        assert mean.module[0].weight.item() == pytest.approx(expected)
        assert mean.module[1].running_mean.item() == pytest.approx(statistics)
        assert mean.module[1].num_batches_tracked.item() == count

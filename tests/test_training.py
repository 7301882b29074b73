"""Training the fused module step by step beside the plain one, with batch norm live, frozen or absent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from cases import FP64_TOLERANCE, TINY, conv_blocks, cotangent, fused_inception, plain_inception, random_input
from torch import Tensor, nn

from googlenet_fused import FusedInception
from googlenet_fused.blocks import Inception


def train(
    module: nn.Module,
    steps: int,
    update: Callable[[list[nn.Parameter]], None] | None = None,
    optimizer_options: dict[str, bool] | None = None,
) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """Steps of SGD on seeded batches: the loss and the state after each."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9, **optimizer_options or {})
    for step in range(steps):
        x = random_input(TINY, 3, 5, 6, torch.float64, seed=step)
        loss = (module(x) - cotangent(TINY, x, seed=step)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if update is None:
            optimizer.step()
        else:
            update(parameters)
        yield loss.item(), {name: tensor.clone() for name, tensor in module.state_dict().items()}


def check_training(
    fused: nn.Module,
    plain: nn.Module,
    update: Callable[[list[nn.Parameter]], None] | None = None,
    optimizer_options: dict[str, bool] | None = None,
) -> None:
    states = [{name: tensor.clone() for name, tensor in plain.state_dict().items()}]
    for (loss, state), (expected_loss, expected) in zip(
        train(fused, 4, update, optimizer_options), train(plain, 4, update), strict=True
    ):
        assert loss == pytest.approx(expected_loss, rel=1e-11)
        torch.testing.assert_close(state, expected, **FP64_TOLERANCE)
        states.append(state)
    for before, after in pairwise(states):
        assert not torch.equal(before["branch1.conv.weight"], after["branch1.conv.weight"])


def make_fused_and_plain(norm: str | None) -> tuple[FusedInception, Inception]:
    return fused_inception(TINY, norm).double(), plain_inception(TINY, norm).double()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", ["batch", None])
def test_training(norm: str | None, training: bool) -> None:
    fused, plain = make_fused_and_plain(norm)
    check_training(fused.train(training), plain.train(training))


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}], ids=lambda options: next(iter(options)))
@pytest.mark.parametrize("training", [False, True])
def test_training_with_other_implementations_of_the_optimizer(training: bool, options: dict[str, bool]) -> None:
    # The fused one writes to the parameters without a new version.
    fused, plain = make_fused_and_plain(None)
    check_training(fused.train(training), plain.train(training), optimizer_options=options)


@pytest.mark.parametrize("norm", ["batch", None])
def test_training_that_updates_through_data(norm: str | None) -> None:
    def update(parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.data.sub_(0.02 * parameter.grad)  # type: ignore[operator]

    fused, plain = make_fused_and_plain(norm)
    for module in (fused, plain):
        module.train()
        for block in conv_blocks(module):
            if block.bn is not None:
                block.bn.eval()  # live batch norm would run plain
    check_training(fused, plain, update)


def test_fine_tuning_with_frozen_batch_norm() -> None:
    fused, plain = make_fused_and_plain("batch")
    for module in (fused, plain):
        module.train()
        for block in conv_blocks(module):
            block.bn.eval()
    statistics = {name: tensor.clone() for name, tensor in fused.named_buffers()}
    check_training(fused, plain)
    assert all(torch.equal(tensor, statistics[name]) for name, tensor in fused.named_buffers())


def test_one_live_batch_norm_among_frozen_ones() -> None:
    fused, plain = make_fused_and_plain("batch")
    for module in (fused, plain):
        module.branch3[0].bn.train()
    before = fused.branch3[0].bn.running_mean.clone()
    check_training(fused, plain)
    assert not torch.equal(fused.branch3[0].bn.running_mean, before)


def test_evaluation_between_steps_follows_the_training() -> None:
    fused, plain = make_fused_and_plain(None)
    x = random_input(TINY, 1, 5, 6, torch.float64)
    for _ in zip(train(fused, 3), train(plain, 3), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(fused(x), plain(x), **FP64_TOLERANCE)

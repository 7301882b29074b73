"""Stochastic gradient descent as the recipes want it, and the average of the weights it passes through."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel

from googlenet_fused.training.recipes import Recipe

WARMUP = 10
"""The average of ``n`` steps decays by at most ``(1 + n) / (WARMUP + n)``, so that the initial weights are soon forgotten."""


def sgd(model: nn.Module, recipe: Recipe) -> SGD:
    """The recipe's optimiser: biases and batch norms are not decayed, and learn ``recipe.bias_lr`` times as fast."""
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [
        {"params": weights, "weight_decay": recipe.weight_decay, "lr_multiple": 1.0},
        {"params": others, "weight_decay": 0.0, "lr_multiple": recipe.bias_lr},
    ]
    return SGD([group for group in groups if group["params"]], recipe.lr, recipe.momentum, nesterov=recipe.nesterov)


def set_lr(optimiser: SGD, lr: float, *, caffe_momentum: bool) -> None:
    """Sets the rate of the next step.

    torch keeps ``u = momentum * u + gradient`` and moves by ``lr * u``. Caffe keeps ``v = lr * u``, so that a change of the
    rate does not reach what is in it already: for that, ``u`` is divided by what the rate is multiplied by.
    """
    for group in optimiser.param_groups:
        before, now = group["lr"], lr * group["lr_multiple"]
        group["lr"] = now
        if caffe_momentum and now != before:
            for parameter in group["params"]:
                momentum = optimiser.state[parameter].get("momentum_buffer")
                if momentum is not None:
                    momentum.mul_(before / now)


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential average of the model's parameters and batch norm statistics, which is the model's copy at first."""

    @torch.no_grad()
    def average(means: list[Tensor], values: list[Tensor], _: Tensor) -> None:
        n = int(result.n_averaged)  # which stays on the CPU: what is handed in would have to be waited for on a GPU
        weight = 1 - min(decay, (1 + n) / (WARMUP + n))
        if means[0].is_floating_point():
            torch._foreach_lerp_(means, values, weight)
        else:  # how many batches a norm has seen
            torch._foreach_copy_(means, values)

    result = AveragedModel(model, multi_avg_fn=average, use_buffers=True)  # type: ignore[arg-type]
    return result

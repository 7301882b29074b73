"""Weights for when there are no trained ones: seeded, and such that every layer's activations have a sensible size.

A freshly initialised torchvision GoogLeNet is no test of anything: its activations are near 1e-11 and its logits equal
``fc.bias``.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def randomize_(model: Model, seed: int = 0) -> Model:
    """Fill the parameters and batch norm statistics of ``model`` from ``seed``, in place; returns it. No global seed moves.

    Convolutions and linear layers: normal, variance 2 / fan_in (He); biases normal, deviation 0.1. Batch norm: weight and
    running variance uniform in [0.5, 1.5], bias and running mean normal with deviation 0.1. The same seed gives the same values
    on every device.
    """
    generator = torch.Generator("cpu").manual_seed(seed)

    def fill(tensor: Tensor | None, kind: str, deviation: float = 0.1) -> None:
        if tensor is None:
            return
        drawn = torch.empty(tensor.shape, device="cpu", dtype=torch.float32)
        if kind == "uniform":
            drawn.uniform_(0.5, 1.5, generator=generator)
        else:
            drawn.normal_(0, deviation, generator=generator)
        tensor.copy_(drawn)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fill(module.weight, "normal", (2.0 / module.weight[0].numel()) ** 0.5)
                fill(module.bias, "normal")
            elif isinstance(module, nn.BatchNorm2d):
                fill(module.weight, "uniform")
                fill(module.bias, "normal")
                fill(module.running_mean, "normal")
                fill(module.running_var, "uniform")
    return model


def calibrate_batch_norm(model: Model, images: Tensor) -> Model:
    """Set the running statistics of every batch norm from one pass over ``images [n, c, h, w]``, in place; returns the model.

    Dropout is off, and the modes and momenta of all modules are as before afterwards. Parameters do not change.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average: of one batch, that batch's own statistics
            norm.train()
        with torch.no_grad():
            model(images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training
    return model

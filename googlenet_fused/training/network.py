"""The network that is trained, and its initial weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from googlenet_fused.convert import fuse
from googlenet_fused.models import VARIANTS, GoogLeNet, GoogLeNetOutputs, VariantName
from googlenet_fused.training.recipes import Recipe

AUX_SIDE = 224
"""The side of images for which the paper's auxiliary heads are defined, in pixels."""


def has_aux_heads(variant: VariantName, size: int) -> bool:
    """Whether the variant's auxiliary heads can take images of this side: the paper's only those of 224x224."""
    return VARIANTS[variant].aux_pool == "adaptive" or size == AUX_SIDE


def build(
    variant: VariantName, num_classes: int, size: int, recipe: Recipe, seed: int, *, backend: str | None = "auto"
) -> nn.Module:
    """A GoogLeNet in training mode, channels_last, with initial weights that follow from ``seed``.

    Without batch norm they are BVLC's (xavier, biases 0.2). With batch norm they are He's: from torchvision's own, normal with
    deviation 0.01, less is learned in the same time (docs/training.md gives figures).

    Args:
        size: side of the images; the auxiliary heads are left out where they cannot take it.
        backend: what runs the fused modules; None leaves the network plain.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        aux, norm = has_aux_heads(variant, size), VARIANTS[variant].norm
        model: nn.Module = GoogLeNet(
            num_classes,
            aux,
            init_weights=norm is None,
            dropout=recipe.dropout,
            dropout_aux=recipe.dropout_aux,
            variant=variant,
        )
        if norm is not None:
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                elif isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.01)
                    nn.init.zeros_(module.bias)
    model = model.to(memory_format=torch.channels_last).train()
    return model if backend is None else fuse(model, backend=backend)


def loss_of(output: Tensor | GoogLeNetOutputs, labels: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The loss of a batch, auxiliary heads included at the recipe's weight, and the logits ``[n, num_classes]``."""
    logits, *heads = output if isinstance(output, GoogLeNetOutputs) else (output,)
    outputs = [logits, *(head for head in heads if head is not None)]
    losses = [F.cross_entropy(each, labels, label_smoothing=recipe.label_smoothing) for each in outputs]
    return losses[0] + recipe.aux_weight * sum(losses[1:]), logits

"""The plain GoogLeNet, in the paper's and in torchvision's variant: readable PyTorch, never fused by itself."""

from googlenet_fused.models.googlenet import (
    VARIANTS,
    GoogLeNet,
    GoogLeNetOutputs,
    InceptionAux,
    Variant,
    VariantName,
    googlenet,
)

__all__ = [
    "VARIANTS",
    "GoogLeNet",
    "GoogLeNetOutputs",
    "InceptionAux",
    "Variant",
    "VariantName",
    "googlenet",
]

"""Fused Inception modules for PyTorch: ``fuse(model)``, or ``FusedInception`` in a model of your own."""

from googlenet_fused.backends import BackendError, use_backend
from googlenet_fused.convert import FusionMismatch, FusionReport, fuse, unfuse
from googlenet_fused.models import googlenet
from googlenet_fused.modules import CannotFuse, FusedInception
from googlenet_fused.ops import inception
from googlenet_fused.packing import BatchNormParams, ConvParams
from googlenet_fused.spec import GOOGLENET_SPECS, InceptionSpec
from googlenet_fused.weights import BVLC_GoogLeNet_Weights, GoogLeNet_Weights, WeightsError

__version__ = "0.1.0"

__all__ = [
    "GOOGLENET_SPECS",
    "BVLC_GoogLeNet_Weights",
    "BackendError",
    "BatchNormParams",
    "CannotFuse",
    "ConvParams",
    "FusedInception",
    "FusionMismatch",
    "FusionReport",
    "GoogLeNet_Weights",
    "InceptionSpec",
    "WeightsError",
    "__version__",
    "fuse",
    "googlenet",
    "inception",
    "unfuse",
    "use_backend",
]

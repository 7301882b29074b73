"""Weights of GoogLeNet: published ones by name, local files, and loading that either succeeds or leaves the model as it was."""

from googlenet_fused.weights.caffe import read_caffemodel
from googlenet_fused.weights.description import Description, read_description, save_described
from googlenet_fused.weights.download import fetch, published_as
from googlenet_fused.weights.errors import WeightsError
from googlenet_fused.weights.files import read_state_dict
from googlenet_fused.weights.load import LoadedWeights, load_weights
from googlenet_fused.weights.published import BVLC_GoogLeNet_Weights, GoogLeNet_Weights, PublishedWeights, Weights

__all__ = [
    "BVLC_GoogLeNet_Weights",
    "Description",
    "GoogLeNet_Weights",
    "LoadedWeights",
    "PublishedWeights",
    "Weights",
    "WeightsError",
    "fetch",
    "load_weights",
    "published_as",
    "read_caffemodel",
    "read_description",
    "read_state_dict",
    "save_described",
]

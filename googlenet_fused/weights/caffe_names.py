"""BVLC's GoogLeNet in a ``.caffemodel`` file as a state_dict of ``googlenet("bvlc")``.

Source of the layers' names: BVLC/caffe, ``models/bvlc_googlenet/train_val.prototxt``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from googlenet_fused.messages import quoted
from googlenet_fused.spec import GOOGLENET_SPECS, STEM_WIDTH
from googlenet_fused.weights.caffe import read_caffemodel
from googlenet_fused.weights.errors import WeightsError

Blobs = Mapping[str, list[Tensor]]


class CaffeLayer(NamedTuple):
    """One layer with parameters: Caffe's name, the key of the module here, and the shape of the weight; the bias has its first.

    A width of 0 is the number of classes, which the file decides.
    """

    name: str
    key: str
    weight: tuple[int, ...]


_CONVS = ("1x1", "3x3_reduce", "3x3", "5x5_reduce", "5x5", "pool_proj")
_BRANCHES = ("branch1", "branch2.0", "branch2.1", "branch3.0", "branch3.1", "branch4.1")
"""The six convolutions of a module in the order of ``InceptionSpec.convs``: Caffe's names and those here."""


def _inception(name: str) -> list[CaffeLayer]:
    convs = zip(_CONVS, _BRANCHES, GOOGLENET_SPECS[name].convs, strict=True)
    return [
        CaffeLayer(
            f"inception_{name}/{conv}",
            f"inception{name}.{branch}.conv",
            (shape[2], shape[1], shape.kernel_size, shape.kernel_size),
        )
        for conv, branch, shape in convs
    ]


def _head(number: int, module: str) -> list[CaffeLayer]:
    """An auxiliary head. Its 4x4 maps of 128 channels are flattened in the same order in Caffe and here, channels first."""
    loss, aux = f"loss{number}", f"aux{number}"
    return [
        CaffeLayer(f"{loss}/conv", f"{aux}.conv.conv", (128, GOOGLENET_SPECS[module].out_channels, 1, 1)),
        CaffeLayer(f"{loss}/fc", f"{aux}.fc1", (1024, 128 * 4 * 4)),
        CaffeLayer(f"{loss}/classifier", f"{aux}.fc2", (0, 1024)),
    ]


BODY = (
    CaffeLayer("conv1/7x7_s2", "conv1.conv", (STEM_WIDTH, 3, 7, 7)),
    CaffeLayer("conv2/3x3_reduce", "conv2.conv", (STEM_WIDTH, STEM_WIDTH, 1, 1)),
    CaffeLayer("conv2/3x3", "conv3.conv", (GOOGLENET_SPECS["3a"].in_channels, STEM_WIDTH, 3, 3)),
    *(layer for name in GOOGLENET_SPECS for layer in _inception(name)),
)
HEADS = (*_head(1, "4a"), *_head(2, "4d"))
CLASSIFIER = CaffeLayer("loss3/classifier", "fc", (0, GOOGLENET_SPECS["5b"].out_channels))


def bvlc_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The parameters of BVLC's GoogLeNet, or of a net fine-tuned from it, with the keys of ``googlenet("bvlc")``; fp32.

    The auxiliary heads are there if the file has them; the file says how many classes each classifier tells apart. One layer
    under another name in the place of ``loss3/classifier``, or of a head's classifier, is taken for it if its shape fits
    and no other layer could be meant.

    Raises:
        WeightsError: the file cannot be read (see ``read_caffemodel``), lacks a layer, has one with weights that there is no
            place for, or one of another shape. The first such layer is named.
    """
    path = Path(path).expanduser()
    return state_dict_of(read_caffemodel(path), path)


def state_dict_of(blobs: Blobs, path: Path) -> dict[str, Tensor]:
    """As ``bvlc_state_dict``, of what ``read_caffemodel`` found in a file; the path is for messages.

    Raises:
        WeightsError: as there.
    """
    heads = HEADS if any(name.startswith(("loss1/", "loss2/")) for name in blobs) else ()
    layers = (*BODY, *heads, CLASSIFIER)
    names = {layer: layer.name for layer in layers} | _renamed(blobs, layers)
    faults = {name: fault for layer, name in names.items() if (fault := _fault(blobs.get(name), layer))}
    surplus = [name for name in blobs if name not in names.values()]
    if faults or surplus:
        raise WeightsError(f"{path} is not BVLC's GoogLeNet: {_describe(faults, surplus)}{_hint(faults, surplus)}")
    state: dict[str, Tensor] = {}
    for layer, name in names.items():
        weight, bias = blobs[name]
        shape = (len(bias.flatten()), *layer.weight[1:])
        state[f"{layer.key}.weight"] = weight.reshape(shape)
        state[f"{layer.key}.bias"] = bias.flatten()
    return state


def _renamed(blobs: Blobs, layers: tuple[CaffeLayer, ...]) -> dict[CaffeLayer, str]:
    """Which layers stand for missing classifiers: fine-tuning in Caffe gives the new classifier a name of its own."""
    own = {layer.name for layer in layers}
    strangers = [name for name in blobs if name not in own]
    missing = [layer for layer in layers if layer.weight[0] == 0 and layer.name not in blobs]
    found: dict[CaffeLayer, str] = {}
    for layer in missing:
        beginning = layer.name.partition("/")[0] + "/"
        fitting = [name for name in strangers if _fault(blobs[name], layer) is None]
        candidates = [name for name in fitting if name.startswith(beginning)]
        if not candidates and missing == [layer]:
            candidates = fitting
        if len(candidates) == 1:
            found[layer] = candidates[0]
    return found


def _fault(blobs: list[Tensor] | None, layer: CaffeLayer) -> str | None:
    """What is wrong with a layer of the file, or None."""
    if blobs is None:
        return "is missing"
    if len(blobs) != 2:
        return f"has {len(blobs)} blob{'' if len(blobs) == 1 else 's'} and not a weight and a bias"
    weight, bias = blobs
    width = layer.weight[0] or bias.numel()
    for what, blob, shape in (("weight", weight, (width, *layer.weight[1:])), ("bias", bias, (width,))):
        # Caffe's first format gives every blob four dimensions, the leading ones 1.
        if tuple(blob.shape) != (1,) * (blob.dim() - len(shape)) + shape:
            classes = "classes" if layer.weight[0] == 0 and what == "weight" else width
            due = ", ".join(map(str, (classes, *shape[1:])))
            return f"has a {what} of shape {list(blob.shape)} and not [{due}]"
    return None


def _describe(faults: Mapping[str, str], surplus: list[str]) -> str:
    if faults:
        name, fault = next(iter(faults.items()))
        first = f"its layer {quoted(name)} {fault}"
    else:
        first = f"its layer {quoted(surplus[0])} has weights and no place in the network"
    if len(faults) + len(surplus) == 1:
        return f"{first}; no other layer is wrong"
    counts = [(len(faults), "missing or of another shape"), (len(surplus), "without a place")]
    total = ", ".join(f"{count} layer{'' if count == 1 else 's'} {what}" for count, what in counts if count)
    extra = f" (first: {quoted(surplus[0])})" if faults and surplus else ""
    return f"{first}; in all {total}{extra}"


def _hint(faults: Mapping[str, str], surplus: list[str]) -> str:
    """What fine-tuning may have left: classifiers under names that do not tell which is which."""
    lost = [name for name in faults if name.endswith("/classifier")]
    if lost and len(lost) == len(faults) and surplus:
        return (
            f". If it was fine-tuned and {quoted(surplus[0])} stands for {quoted(lost[0])}, "
            "give the layer that name in the prototxt and save the net again"
        )
    return ""

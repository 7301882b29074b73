"""TF-slim's names and layouts for the variables of ``inception_v1``, and what they are called here.

Source of the names: tensorflow/models, research/slim/nets/inception_v1.py. Kernels are ``[h, w, in, out]`` there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from googlenet_fused.spec import GOOGLENET_SPECS
from googlenet_fused.weights.errors import WeightsError

_SCOPE = "InceptionV1/"
_STEM = {"Conv2d_1a_7x7": "conv1", "Conv2d_2b_1x1": "conv2", "Conv2d_2c_3x3": "conv3"}
_BRANCHES = {
    "Branch_0/Conv2d_0a_1x1": "branch1",
    "Branch_1/Conv2d_0a_1x1": "branch2.0",
    "Branch_1/Conv2d_0b_3x3": "branch2.1",
    "Branch_2/Conv2d_0a_1x1": "branch3.0",
    "Branch_2/Conv2d_0b_3x3": "branch3.1",
    "Branch_3/Conv2d_0b_1x1": "branch4.1",
}
_NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}

_OF_TRAINING = re.compile(
    r"(^|/)(global_step|beta[12]_power)$"
    r"|/(RMSProp|Momentum|Adam|Adagrad|Adadelta|Ftrl)(_\d+)?$"
    r"|/ExponentialMovingAverage$"
)
"""What training keeps beside the variables: steps, optimizers' slots and averages."""


def _keys() -> dict[str, str]:
    """Our key of each of slim's variables, without the scope; ours in the model's order."""
    blocks = dict(_STEM)
    for module in GOOGLENET_SPECS:
        mixed = f"Mixed_{module[0]}{chr(ord(module[1]) + 1)}"  # slim's letters count the pool before the modules
        for scope, branch in _BRANCHES.items():
            if mixed == "Mixed_5b" and scope == "Branch_2/Conv2d_0b_3x3":
                scope = "Branch_2/Conv2d_0a_3x3"  # slim's own slip
            blocks[f"{mixed}/{scope}"] = f"inception{module}.{branch}"
    keys = {}
    for scope, block in blocks.items():
        keys[f"{scope}/weights"] = f"{block}.conv.weight"
        keys |= {f"{scope}/BatchNorm/{theirs}": f"{block}.bn.{ours}" for theirs, ours in _NORM.items()}
    return keys | {"Logits/Conv2d_0c_1x1/weights": "fc.weight", "Logits/Conv2d_0c_1x1/biases": "fc.bias"}


_KEYS = _keys()


def is_slim(names: Iterable[str]) -> bool:
    """Whether any of the names is that of a variable of TF-slim's ``inception_v1``."""
    return any(name.startswith(_SCOPE) for name in names)


def from_slim(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under this package's keys and in its layouts, if they have TF-slim's names; as they are otherwise.

    A batch norm without a scale gets ones. Optimizers' slots, moving averages of the variables and steps are left out; a name
    that ``inception_v1`` has no variable for is kept as it is.

    Raises:
        WeightsError: a kernel has not four axes, the classifier's is not 1x1, or a variable is there twice. The message names
            ``path``.
    """
    if not is_slim(tensors):
        return dict(tensors)
    found: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name, value in tensors.items():
        variable = name.removesuffix(":0")
        if _OF_TRAINING.search(variable):
            continue
        while variable.startswith(_SCOPE):  # the names of a graph's operations have the scope twice
            variable = variable.removeprefix(_SCOPE)
        key = _KEYS.get(variable)
        if key is None:
            others[name] = value
            continue
        if key in found:
            raise WeightsError(f"{path} holds the variable {_SCOPE}{variable} twice; keep one of them")
        found[key] = _in_our_layout(path, name, key, value) if variable.endswith("/weights") else value
    clash = next((name for name in others if name in found), None)
    if clash is not None:
        raise WeightsError(f"{path} holds {clash} under TF-slim's name and under this one; keep one of them")
    for key in [key for key in found if key.endswith(".bn.bias")]:
        found.setdefault(f"{key.removesuffix('bias')}weight", torch.ones_like(found[key]))
    return {key: found[key] for key in _KEYS.values() if key in found} | others


def _in_our_layout(path: Path, name: str, key: str, kernel: Tensor) -> Tensor:
    """``[h, w, in, out]`` as ``[out, in, h, w]``, or as ``[out, in]`` for the classifier, in slim a 1x1 convolution."""
    linear = key == "fc.weight"
    if kernel.dim() != 4 or (linear and kernel.shape[:2] != (1, 1)):
        wanted = "[1, 1, in, out]" if linear else "[h, w, in, out]"
        raise WeightsError(f"{path}: the variable {name} has shape {list(kernel.shape)}, not {wanted}")
    kernel = kernel.permute(3, 2, 0, 1).contiguous()
    return kernel.flatten(1) if linear else kernel

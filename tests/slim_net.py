"""TF-slim's ``inception_v1`` by its variables' names, ``[n, h, w, c]`` throughout, with no module of the package under test."""

from __future__ import annotations

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

Variables = dict[str, numpy.ndarray]

# The module's widths: 1x1; 1x1 and 3x3; 1x1 and 3x3; the projection after the pool.
MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}


def second_of_branch_2(mixed: str) -> str:
    return "Conv2d_0a_3x3" if mixed == "Mixed_5b" else "Conv2d_0b_3x3"


def layers() -> list[tuple[str, int, int, int]]:
    """Every convolution with a batch norm: its scope, kernel size, and channels in and out."""
    found = [
        ("InceptionV1/Conv2d_1a_7x7", 7, 3, 64),
        ("InceptionV1/Conv2d_2b_1x1", 1, 64, 64),
        ("InceptionV1/Conv2d_2c_3x3", 3, 64, 192),
    ]
    channels = 192
    for mixed, (b0, b1a, b1b, b2a, b2b, b3) in MIXED.items():
        scope = f"InceptionV1/{mixed}"
        found += [
            (f"{scope}/Branch_0/Conv2d_0a_1x1", 1, channels, b0),
            (f"{scope}/Branch_1/Conv2d_0a_1x1", 1, channels, b1a),
            (f"{scope}/Branch_1/Conv2d_0b_3x3", 3, b1a, b1b),
            (f"{scope}/Branch_2/Conv2d_0a_1x1", 1, channels, b2a),
            (f"{scope}/Branch_2/{second_of_branch_2(mixed)}", 3, b2a, b2b),
            (f"{scope}/Branch_3/Conv2d_0b_1x1", 1, channels, b3),
        ]
        channels = b0 + b1b + b2b + b3
    return found


def random_variables(classes: int = 1001, *, gamma: bool = False, seed: int = 0) -> Variables:
    """What a checkpoint of the network holds, in float32; with ``gamma`` the batch norms have scales."""
    generator = numpy.random.default_rng(seed)
    variables: Variables = {}

    def put(name: str, values: numpy.ndarray) -> None:
        variables[name] = values.astype(numpy.float32)

    for scope, kernel, channels, out in layers():
        deviation = (2 / (kernel * kernel * channels)) ** 0.5
        put(f"{scope}/weights", generator.normal(0, deviation, (kernel, kernel, channels, out)))
        if gamma:
            put(f"{scope}/BatchNorm/gamma", generator.uniform(0.5, 1.5, out))
        put(f"{scope}/BatchNorm/beta", generator.normal(0, 0.1, out))
        put(f"{scope}/BatchNorm/moving_mean", generator.normal(0, 0.1, out))
        put(f"{scope}/BatchNorm/moving_variance", generator.uniform(0.5, 1.5, out))
    put("InceptionV1/Logits/Conv2d_0c_1x1/weights", generator.normal(0, 0.1, (1, 1, 1024, classes)))
    put("InceptionV1/Logits/Conv2d_0c_1x1/biases", generator.normal(0, 0.1, classes))
    return variables


def pad_same(x: Tensor, kernel: int, stride: int, value: float) -> Tensor:
    """TensorFlow's rule: as much as makes ``ceil(side / stride)`` windows, the odd element after."""
    pads = []
    for side in (x.shape[2], x.shape[1]):
        total = max(kernel - (side % stride or stride), 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, (0, 0, *pads), value=value)


def windows(x: Tensor, kernel: int, stride: int) -> Tensor:
    """``[n, h, w, c] -> [n, h', w', c, kernel, kernel]``."""
    return x.unfold(1, kernel, stride).unfold(2, kernel, stride)


def slim_forward(variables: Variables, x: Tensor) -> Tensor:
    """Logits ``[n, classes]`` of images ``[n, h, w, 3]`` in float64, averaged over the whole last map."""

    def get(name: str) -> Tensor:
        return torch.from_numpy(variables[name]).double()

    def conv(scope: str, x: Tensor, stride: int = 1) -> Tensor:
        scope = f"InceptionV1/{scope}"
        kernel = get(f"{scope}/weights")
        side = kernel.shape[0]
        x = torch.einsum("nhwcij,ijco->nhwo", windows(pad_same(x, side, stride, 0.0), side, stride), kernel)
        mean, variance = get(f"{scope}/BatchNorm/moving_mean"), get(f"{scope}/BatchNorm/moving_variance")
        gamma = get(f"{scope}/BatchNorm/gamma") if f"{scope}/BatchNorm/gamma" in variables else 1.0
        return ((x - mean) / (variance + 0.001).sqrt() * gamma + get(f"{scope}/BatchNorm/beta")).clamp_min(0)

    def max_pool(x: Tensor, kernel: int, stride: int) -> Tensor:
        return windows(pad_same(x, kernel, stride, float("-inf")), kernel, stride).amax((-2, -1))

    def mixed(name: str, x: Tensor) -> Tensor:
        branches = [
            conv(f"{name}/Branch_0/Conv2d_0a_1x1", x),
            conv(f"{name}/Branch_1/Conv2d_0b_3x3", conv(f"{name}/Branch_1/Conv2d_0a_1x1", x)),
            conv(f"{name}/Branch_2/{second_of_branch_2(name)}", conv(f"{name}/Branch_2/Conv2d_0a_1x1", x)),
            conv(f"{name}/Branch_3/Conv2d_0b_1x1", max_pool(x, 3, 1)),
        ]
        return torch.cat(branches, -1)

    x = max_pool(conv("Conv2d_1a_7x7", x, 2), 3, 2)
    x = max_pool(conv("Conv2d_2c_3x3", conv("Conv2d_2b_1x1", x)), 3, 2)
    for name in MIXED:
        if name in ("Mixed_4b", "Mixed_5b"):
            x = max_pool(x, 3 if name == "Mixed_4b" else 2, 2)
        x = mixed(name, x)
    scope = "InceptionV1/Logits/Conv2d_0c_1x1"
    return x.mean((1, 2)) @ get(f"{scope}/weights")[0, 0] + get(f"{scope}/biases")

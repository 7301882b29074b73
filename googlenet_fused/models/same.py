"""TensorFlow's ``SAME`` padding, which depends on the size of the input, for the layers that were trained with it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def same_padding(side: int, kernel_size: int, stride: int) -> tuple[int, int]:
    """What is put before and after an axis of ``side`` elements, so that ``ceil(side / stride)`` come out.

    An odd total puts the larger half after. Source: TensorFlow's API documentation, ``tf.nn``, notes on padding.
    """
    outputs = -(-side // stride)
    total = max((outputs - 1) * stride + kernel_size - side, 0)
    return total // 2, total - total // 2


class SamePadding2d(nn.Module):
    """The zeros before a convolution that itself pads nothing: ``[n, c, h, w] -> [n, c, h', w']``."""

    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        vertical, horizontal = (same_padding(side, self.kernel_size, self.stride) for side in x.shape[-2:])
        return F.pad(x, (*horizontal, *vertical))

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}"


class SameMaxPool2d(nn.Module):
    """Max pool with ``SAME`` padding: ``[n, c, h, w] -> [n, c, ceil(h / stride), ceil(w / stride)]``.

    What lies outside is never the largest. The kernel must not be smaller than the stride.
    """

    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        # Ceil mode adds the one that an odd total puts after the axis.
        before = [same_padding(side, self.kernel_size, self.stride)[0] for side in x.shape[-2:]]
        return F.max_pool2d(x, self.kernel_size, self.stride, before, ceil_mode=True)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}"

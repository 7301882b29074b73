"""How the networks want their pixels: the order of the channels, the range, the mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Per channel (red, green, blue), for pixels in [0, 1]: torchvision's usual preprocessing."""


@dataclass(frozen=True)
class Preparation:
    """From pixels to a network's input: reordered, divided, less the mean, over the deviation.

    Attributes:
        bgr: whether the network takes blue, green, red.
        divisor: what pixels in 0..255 are divided by first.
        mean: per channel in the network's order, of divided pixels.
        std: per channel in the network's order, of divided pixels.
    """

    bgr: bool
    divisor: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, pixels: Tensor) -> Tensor:
        """RGB in 0..255, uint8 or floating, ``[..., 3, h, w]``, as the network's input: float32 of the same shape.

        Raises:
            ValueError: the tensor has not three channels, or is neither uint8 nor floating.
        """
        if pixels.dim() < 3 or pixels.shape[-3] != 3:
            raise ValueError(f"pixels must be RGB, [..., 3, h, w], got {list(pixels.shape)}")
        if pixels.dtype != torch.uint8 and not pixels.is_floating_point():
            raise ValueError(f"pixels must be uint8 or floating, in 0..255, got {pixels.dtype}")
        if self.bgr:
            pixels = pixels.flip(-3)
        # non_blocking: else the process would wait at each call for all that the GPU was given before.
        mean, std = (torch.tensor(each).view(3, 1, 1).to(pixels.device, non_blocking=True) for each in (self.mean, self.std))
        return (pixels.float() / self.divisor - mean) / std

    def __str__(self) -> str:
        steps = ["BGR" if self.bgr else "RGB", f"0 to {255 / self.divisor:g}", f"minus {_channels(self.mean)}"]
        if self.std != (1.0, 1.0, 1.0):
            steps.append(f"over {_channels(self.std)}")
        return ", ".join(steps)


def _channels(values: tuple[float, float, float]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"


PREPARATIONS: dict[str, Preparation] = {
    "torchvision": Preparation(False, 255.0, IMAGENET_MEAN, IMAGENET_STD),
    "bvlc": Preparation(True, 1.0, (104.0, 117.0, 123.0), (1.0, 1.0, 1.0)),
    "slim": Preparation(False, 255.0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""By variant of GoogLeNet. Sources: torchvision/models/googlenet.py; BVLC/caffe, models/bvlc_googlenet/train_val.prototxt;
tensorflow/models, research/slim/preprocessing/inception_preprocessing.py."""

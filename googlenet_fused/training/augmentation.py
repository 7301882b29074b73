"""What is done to an image before it is learned from. Every draw comes from torch's generator."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image
from torch import Tensor

from googlenet_fused.training.recipes import Augmentation

try:
    from torchvision.transforms import InterpolationMode, v2
except ModuleNotFoundError as error:
    raise ImportError("preparing images needs torchvision: pip install 'googlenet-fused[tools]'") from error

Augment = Callable[[Image.Image], Tensor]
"""From an RGB image to pixels ``[3, size, size]``, uint8."""

AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
"""Of a crop, as parts of the image's area, and width by height (the paper, section 6)."""

PHOTOMETRIC = 0.5
"""Brightness, contrast and saturation each change by at most this part, in random order (Howard, 2013)."""


def resize_of(size: int) -> int:
    """The side that an image is resized to before a crop of ``size`` is cut out of it: 256 for 224."""
    return round(size * 256 / 224)


def augmentation(name: Augmentation, size: int) -> Augment:
    """What a recipe's name of an augmentation stands for; ``size`` is the side of the result, in pixels.

    - ``"paper"``: a crop of 8 to 100 % of the area, 3/4 to 4/3 wide, resized by an interpolation drawn from bilinear, area,
      nearest and bicubic; mirrored at random; brightness, contrast and saturation distorted in random order.
    - ``"bvlc"``: the image warped to a square, a random crop of it, mirrored at random.
    - ``"modern"``: the paper's crop, bilinear; mirrored at random; a random operation (TrivialAugment); at times a part erased.
    - ``"none"``: the shorter side resized, the centre cut out: what evaluation looks at.

    Raises:
        ValueError: there is no such augmentation.
    """
    if name not in AUGMENTATIONS:
        raise ValueError(f"augmentation must be one of {', '.join(AUGMENTATIONS)}, got {name!r}")
    return v2.Compose(AUGMENTATIONS[name](size))


def _paper(size: int) -> list[Callable[..., object]]:
    # BOX is Pillow's name for resizing by area.
    modes = (InterpolationMode.BILINEAR, InterpolationMode.BOX, InterpolationMode.NEAREST, InterpolationMode.BICUBIC)
    return [
        v2.RandomChoice([v2.RandomResizedCrop(size, AREA, RATIO, interpolation=mode) for mode in modes]),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(PHOTOMETRIC, PHOTOMETRIC, PHOTOMETRIC),
        v2.PILToTensor(),
    ]


def _bvlc(size: int) -> list[Callable[..., object]]:
    side = resize_of(size)
    return [v2.Resize((side, side)), v2.RandomCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()]


def _modern(size: int) -> list[Callable[..., object]]:
    return [
        v2.RandomResizedCrop(size, AREA, RATIO),
        v2.RandomHorizontalFlip(),
        v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR),
        v2.PILToTensor(),
        v2.RandomErasing(p=0.1),
    ]


def _none(size: int) -> list[Callable[..., object]]:
    return [v2.Resize(resize_of(size)), v2.CenterCrop(size), v2.PILToTensor()]


AUGMENTATIONS: dict[str, Callable[[int], list[Callable[..., object]]]] = {
    "paper": _paper,
    "bvlc": _bvlc,
    "modern": _modern,
    "none": _none,
}

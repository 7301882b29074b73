"""The views of an image that a network is shown at test time: the centre crop, 10 crops, or the 144 crops of the paper."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Literal, NamedTuple, cast, get_args

import torch
from PIL import Image
from torch import Tensor

from googlenet_fused.images import CROP_SIDE, RESIZE_SIDE, ImageError

Protocol = Literal["1", "10", "144"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
"""By the number of views an image.

``"1"``: the centre crop. ``"10"``: the four corners and the centre of the central square, and their mirror images (Krizhevsky
et al., NIPS 2012: section 2 keeps only the central 256x256 of an image whose shorter side is 256, section 4.1 crops that).
``"144"``: Szegedy et al., CVPR 2015, section 7.
"""

_SCALES = (256, 288, 320, 352)
_SCALES_SIDE = 224
"""The shorter sides of the 144 crops, and the side of the network's input that they belong to."""


class Box(NamedTuple):
    """A part of an image, in pixels from its upper left corner."""

    left: int
    top: int
    width: int
    height: int


class View(NamedTuple):
    """One view, as a part of the resized image.

    Attributes:
        scale: the shorter side to which the image is resized, in pixels.
        square: which square of the resized image the view is part of: left, centre, right; top, bottom for portraits.
        box: where the view is in the resized image.
        resized: whether the box is the whole square, which is then resized to the network's side.
        mirrored: whether left and right are exchanged.
    """

    scale: int
    square: str
    box: Box
    resized: bool
    mirrored: bool


def scales(crop: int = CROP_SIDE) -> tuple[int, ...]:
    """The shorter sides, in pixels, of the 144 crops: 256, 288, 320 and 352 for 224x224, else in proportion, rounded."""
    return tuple(round(crop * scale / _SCALES_SIDE) for scale in _SCALES)


def resized_size(width: int, height: int, scale: int) -> tuple[int, int]:
    """Width and height once the shorter side is ``scale``; the longer one is rounded down, as torchvision does."""
    return (scale, scale * height // width) if width <= height else (scale * width // height, scale)


def plan(width: int, height: int, protocol: Protocol, crop: int = CROP_SIDE, resize: int = RESIZE_SIDE) -> tuple[View, ...]:
    """The views of an image of this size, in their order: 1, 10 or 144 of them, each as weighty as another.

    The three squares of the 144 crops coincide where the image is square; they are views of their own all the same.

    Args:
        width, height: of the image, in pixels.
        protocol: one of ``PROTOCOLS``.
        crop: side of the views, in pixels.
        resize: shorter side of the resized image for 1 and 10 crops; the 144 have scales of their own (``scales``).

    Raises:
        ValueError: the protocol is unknown, a size is not positive, or ``resize`` is less than ``crop``.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be {', '.join(map(repr, PROTOCOLS))}, got {protocol!r}")
    if min(width, height, crop) < 1:
        raise ValueError(f"width, height and crop must be positive, got {width}, {height} and {crop}")
    if resize < crop:
        raise ValueError(f"resize must be at least crop ({crop}), got {resize}")
    if protocol == "144":
        return tuple(view for scale in scales(crop) for view in _views_of_scale(width, height, scale, crop))
    resized = resized_size(width, height, resize)
    if protocol == "1":
        # Not the centre of the central square: where a side is odd the two can differ by a pixel, and this is torchvision's.
        return (View(resize, "centre", Box(*_corner(resized, crop), crop, crop), False, False),)
    square = Box(*_corner(resized, resize), resize, resize)
    return tuple(View(resize, "centre", box, False, mirrored) for box in _five(square, crop) for mirrored in (False, True))


def load_transforms() -> ModuleType:
    """``torchvision.transforms.v2.functional``. The first time it takes seconds.

    Raises:
        ImportError: torchvision is missing.
    """
    try:
        from torchvision.transforms.v2 import functional
    except ModuleNotFoundError as error:
        raise ImportError("cropping images needs torchvision: pip install 'googlenet-fused[tools]'") from error
    return cast(ModuleType, functional)


def views(image: Image.Image, protocol: Protocol, crop: int = CROP_SIDE, resize: int = RESIZE_SIDE) -> Tensor:
    """The views of an RGB image in the order of ``plan``: ``[views, 3, crop, crop]``, uint8.

    Images are resized bilinearly with antialiasing.

    Args:
        protocol, crop, resize: as for ``plan``.

    Raises:
        ImageError: the image is not RGB, is empty, or is so long and narrow that resizing it would pass
            ``PIL.Image.MAX_IMAGE_PIXELS``.
        ImportError: torchvision is missing.
        ValueError: as for ``plan``.
    """
    functional = load_transforms()
    if image.mode != "RGB":
        raise ImageError(f"views: the image must be RGB, got mode {image.mode!r}; load_image converts it")
    width, height = image.size
    if not min(width, height):
        raise ImageError(f"views: the image is empty ({width}x{height})")
    planned = plan(width, height, protocol, crop, resize)
    sizes = {view.scale: resized_size(width, height, view.scale) for view in planned}
    if Image.MAX_IMAGE_PIXELS and max(w * h for w, h in sizes.values()) > Image.MAX_IMAGE_PIXELS:
        raise ImageError(f"views: the image is too long and narrow to be resized ({width}x{height})")

    def resize_to(pixels: Tensor, width: int, height: int) -> Tensor:
        resized: Tensor = functional.resize(pixels, [height, width], functional.InterpolationMode.BILINEAR, antialias=True)
        return resized

    pixels = functional.pil_to_tensor(image)  # [3, height, width]
    images = {scale: resize_to(pixels, *size) for scale, size in sizes.items()}
    found = torch.empty(len(planned), 3, crop, crop, dtype=torch.uint8)
    cut: dict[tuple[int, Box], Tensor] = {}
    for place, view in zip(found, planned, strict=True):
        key = view.scale, view.box
        if key not in cut:
            left, top, width, height = view.box
            part = images[view.scale][:, top : top + height, left : left + width]
            cut[key] = resize_to(part, crop, crop) if view.resized else part
        place.copy_(cut[key].flip(2) if view.mirrored else cut[key])
    return found


def _corner(size: tuple[int, int], inner: int) -> tuple[int, int]:
    """Where a square in the middle of an image begins, from the left and from the top."""
    return _centred(size[0], inner), _centred(size[1], inner)


def _centred(side: int, inner: int) -> int:
    """Where a part of ``inner`` pixels in the middle of ``side`` begins; of two middles the one that torchvision takes."""
    return round((side - inner) / 2)


def _views_of_scale(width: int, height: int, scale: int, crop: int) -> Iterator[View]:
    width, height = resized_size(width, height, scale)
    names = ("top", "centre", "bottom") if height > width else ("left", "centre", "right")
    spare = max(width, height) - scale
    for name, start in zip(names, (0, _centred(scale + spare, scale), spare), strict=True):
        square = Box(0, start, scale, scale) if height > width else Box(start, 0, scale, scale)
        for box in (*_five(square, crop), square):
            for mirrored in (False, True):
                yield View(scale, name, box, box is square, mirrored)


def _five(square: Box, crop: int) -> tuple[Box, ...]:
    """The four corners of a square, from the upper left to the lower right one, and its centre."""
    left, top, side, _ = square
    far, middle = side - crop, _centred(side, crop)
    starts = ((0, 0), (far, 0), (0, far), (far, far), (middle, middle))
    return tuple(Box(left + x, top + y, crop, crop) for x, y in starts)

"""Regions of an image scored one by one: how the paper's entry to detection used the network (section 8)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from googlenet_fused.preparation import PREPARATIONS, Preparation


def score_regions(
    model: nn.Module,
    image: Tensor,
    boxes: Tensor,
    *,
    preparation: Preparation | None = None,
    size: int = 224,
    context: int = 16,
    batch_size: int = 32,
    softmax: bool = True,
) -> Tensor:
    """Class scores of regions of one image: ``[k, num_classes]``, of the model's dtype and on its device, without gradients.

    A model without floating-point parameters gets float32 on the image's device.

    The regions are warped as R-CNN warps its proposals (Girshick et al., CVPR 2014, appendix A, and rcnn_im_crop.m of their
    code): a box is enlarged about its centre so that ``context`` pixels of the result lie around it on each side, rounded to
    whole pixels, filled with the preparation's mean where it leaves the image, and resized to ``size`` x ``size`` whatever its
    aspect ratio. The resizing is torchvision's ``resized_crop``, bilinear and antialiased; R-CNN's does not smooth, and fills
    after it.

    Args:
        model: in evaluation mode, ``[n, 3, size, size] -> [n, num_classes]``.
        image: RGB in 0..255, ``[3, h, w]``, uint8 or floating.
        boxes: ``[k, 4]``, x0, y0, x1, y1 in pixels, edges not centres: the whole image is ``0, 0, w, h``. k may be 0.
        preparation: how the model wants its pixels; by default that of its ``variant``, or torchvision's if it has none.
        size: side of what the model gets.
        context: pixels around the box in that, at most a quarter of ``size``.
        batch_size: regions in one call of the model.
        softmax: probabilities; False gives the logits.

    Raises:
        ValueError: the model is in training mode or of an unknown variant, the image is not ``[3, h, w]`` of pixels or seems to
            be in 0..1, a box is empty, not finite or not in the image, or a number is out of range.
        ImportError: torchvision is missing.
    """
    try:
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2.functional import resized_crop
    except ModuleNotFoundError as error:
        raise ImportError("warping regions needs torchvision: pip install 'googlenet-fused[tools]'") from error
    if model.training:
        raise ValueError("model is in training mode, whose results depend on the other regions: call model.eval()")
    if batch_size < 1 or size < 1:
        raise ValueError(f"batch_size and size must be at least 1, got {batch_size} and {size}")
    if not 0 <= context <= size / 4:
        raise ValueError(f"context must be at least 0 and at most a quarter of size={size}, got {context}")
    if image.dim() != 3 or 0 in image.shape:
        raise ValueError(f"image must be one image, [3, h, w], got {list(image.shape)}")
    if image.is_floating_point() and 0 < float(image.max()) <= 1:
        raise ValueError(f"image must be in 0..255, and its largest value is {float(image.max()):g}: multiply it by 255")
    weights = (parameter for parameter in model.parameters() if parameter.is_floating_point())
    weight = next(weights, torch.empty(0, dtype=torch.float32, device=image.device))
    prepared = (preparation or _preparation_of(model))(image.to(weight.device))
    windows = _windows(boxes, image.shape[1], image.shape[2], size / (size - 2 * context))

    def warp(window: list[int]) -> Tensor:
        left, top, right, bottom = window
        # Beyond the image resized_crop puts zeros, which are the mean here.
        crop: Tensor = resized_crop(
            prepared, top, left, bottom - top, right - left, [size, size], InterpolationMode.BILINEAR, antialias=True
        )
        return crop.to(weight.dtype)

    with torch.no_grad():
        none = prepared.new_empty(0, 3, size, size, dtype=weight.dtype)
        batches = [windows[start : start + batch_size] for start in range(0, len(windows), batch_size)]
        logits = torch.cat(
            [model(torch.stack([warp(window) for window in batch]) if batch else none) for batch in batches or [[]]]
        )
        return logits.softmax(1) if softmax else logits


def _preparation_of(model: nn.Module) -> Preparation:
    variant = getattr(model, "variant", "torchvision")
    if variant not in PREPARATIONS:
        raise ValueError(f"how variant {variant!r} wants its pixels is not known: give preparation")
    return PREPARATIONS[variant]


def _windows(boxes: Tensor, height: int, width: int, scale: float) -> list[list[int]]:
    """The boxes enlarged about their centres, in whole pixels, at least one in the image; they may leave it."""
    if boxes.dim() != 2 or boxes.shape[1] != 4 or boxes.is_complex() or boxes.dtype == torch.bool:
        raise ValueError(f"boxes must be numbers, [k, 4], got {list(boxes.shape)} of {boxes.dtype}")
    boxes = boxes.detach().to("cpu", torch.float64)
    start, end = boxes[:, :2], boxes[:, 2:]
    limits = torch.tensor([width, height])
    bad = ~((start >= 0) & (start < end) & (end <= limits)).all(1)  # NaN compares false
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"boxes[{first}] is {boxes[first].tolist()}: boxes are x0, y0, x1, y1 with 0 <= x0 < x1 <= {width} and "
            f"0 <= y0 < y1 <= {height}; clip them to the image"
        )
    centre, half = (start + end) / 2, (end - start) / 2 * scale
    start, end = torch.minimum((centre - half).round(), limits - 1), (centre + half).round()
    return torch.cat([start, torch.maximum(end, start + 1)], 1).long().tolist()

"""Regions of an image, against Pillow's cropping and resizing one by one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import assert_same, message_of, plain_googlenet
from PIL import Image
from torch import Tensor, nn

from googlenet_fused import fuse
from googlenet_fused.models import VARIANTS
from googlenet_fused.preparation import PREPARATIONS
from googlenet_fused.regions import score_regions

HEIGHT, WIDTH = 48, 64
IMAGE = torch.randint(0, 256, (3, HEIGHT, WIDTH), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))

WINDOWS = [
    ([10, 5, 34, 29], (8, 3, 36, 31)),  # a box of 24 within the image: 28 with its context
    ([0, 0, 12, 24], (-1, -2, 13, 26)),  # at a corner
    ([52, 24, 64, 48], (51, 22, 65, 50)),  # at the other
    ([0, 0, 64, 48], (-5, -4, 69, 52)),  # the whole image
    ([20.1, 10.1, 20.3, 10.3], (20, 10, 21, 11)),  # less than a pixel
    ([63.8, 47.8, 64, 48], (63, 47, 64, 48)),  # the same at the last corner, where it would round out of the image
]
"""Boxes, and what of the image they come to with 16 of 224 pixels of context."""


class Recorder(nn.Module):
    """Keeps what it is given; its outputs are the means of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.given: list[Tensor] = []
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.given.append(x)
        return x.mean((2, 3)) * self.weight


def with_pillow(window: tuple[int, int, int, int], variant: str, size: int) -> Tensor:
    """The window's pixels as the variant wants them, ``[3, size, size]``, channel by channel in Pillow's floats."""
    preparation = PREPARATIONS[variant]
    left, top, right, bottom = window
    planes = []
    for channel, mean, std in zip(range(3)[:: -1 if preparation.bgr else 1], preparation.mean, preparation.std, strict=True):
        pixels = IMAGE[channel].numpy().astype(np.float32)
        canvas = Image.new("F", (right - left, bottom - top), mean * preparation.divisor)
        canvas.paste(Image.fromarray(pixels), (-left, -top))
        resized = np.asarray(canvas.resize((size, size), Image.Resampling.BILINEAR))
        planes.append((torch.tensor(resized) / preparation.divisor - mean) / std)
    return torch.stack(planes)


@pytest.mark.parametrize("variant", PREPARATIONS)
@pytest.mark.parametrize("size", [224, 28])
def test_regions_are_warped_as_pillow_warps_them(variant: str, size: int) -> None:
    model = Recorder()
    boxes = torch.tensor([box for box, _ in WINDOWS])
    score_regions(model, IMAGE, boxes, preparation=PREPARATIONS[variant], size=size, context=size // 14)
    (given,) = model.given
    assert given.shape == (len(WINDOWS), 3, size, size)
    for found, (_, window) in zip(given, WINDOWS, strict=True):
        expected = with_pillow(window, variant, size)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_without_context_a_box_is_the_crop_itself() -> None:
    model = Recorder()
    score_regions(model, IMAGE, torch.tensor([[8, 4, 40, 36]]), size=32, context=0)
    assert_same(model.given[0][0], PREPARATIONS["torchvision"](IMAGE)[:, 4:36, 8:40])


@pytest.mark.parametrize("host", ["torchvision's own", *VARIANTS])
def test_scores_of_a_network_plain_and_fused(host: str) -> None:
    model = plain_googlenet(host, aux_logits=False)
    variant = host if host in VARIANTS else "torchvision"
    boxes = torch.tensor([box for box, _ in WINDOWS[:3]], dtype=torch.float32)
    logits = score_regions(model, IMAGE, boxes, size=70, context=5, softmax=False)
    with torch.no_grad():
        expected = torch.cat([model(with_pillow(window, variant, 70)[None]) for _, window in WINDOWS[:3]])
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert not logits.requires_grad
    scores = score_regions(model, IMAGE, boxes, size=70, context=5)
    torch.testing.assert_close(scores, logits.softmax(1))
    fused = score_regions(fuse(model), IMAGE, boxes, size=70, context=5, softmax=False)
    torch.testing.assert_close(fused, logits, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_batches() -> None:
    model = Recorder()
    boxes = torch.tensor([[x, 2, x + 20, 30] for x in range(5)])
    found = score_regions(model, IMAGE, boxes, batch_size=2, size=32, context=2, softmax=False)
    assert [len(batch) for batch in model.given] == [2, 2, 1]
    assert_same(found, score_regions(Recorder(), IMAGE, boxes, size=32, context=2, softmax=False))
    assert_same(found[3:4], score_regions(Recorder(), IMAGE, boxes[3:4], size=32, context=2, softmax=False))


def test_no_boxes() -> None:
    for model in (plain_googlenet("bvlc", aux_logits=False), fuse(plain_googlenet("torchvision", aux_logits=False))):
        assert score_regions(model, IMAGE, torch.empty(0, 4), size=32, context=2).shape == (0, 10)


def test_dtypes() -> None:
    model = Recorder().double()
    boxes = torch.tensor([[0, 0, 20, 20]], dtype=torch.float16)
    found = score_regions(model, IMAGE, boxes, size=32, context=2)
    assert found.dtype == torch.float64
    assert_same(score_regions(model, IMAGE.float(), boxes.long(), size=32, context=2), found)


@pytest.mark.parametrize(
    "box",
    [
        [-1, 0, 5, 5],
        [0, 0, 65, 5],
        [0, 0, 5, 48.5],
        [5, 5, 5, 9],
        [9, 5, 5, 9],
        [0, float("nan"), 5, 5],
        [0, 0, float("inf"), 5],
    ],
)
def test_boxes_outside_or_empty(box: list[float]) -> None:
    with pytest.raises(ValueError, match=r"boxes\[1\] is") as error:
        score_regions(Recorder(), IMAGE, torch.tensor([[0, 0, 64, 48], box]))
    assert "0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 48; clip them" in message_of(error)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model, box: score_regions(model.train(), IMAGE, box), "model is in training mode"),
        (lambda model, box: score_regions(model, IMAGE[None], box), "one image, [3, h, w], got [1, 3, 48, 64]"),
        (lambda model, box: score_regions(model, IMAGE[:, :0], box), "got [3, 0, 64]"),
        (lambda model, box: score_regions(model, IMAGE[:1], box), "pixels must be RGB"),
        (lambda model, box: score_regions(model, IMAGE.int(), box), "uint8 or floating"),
        (lambda model, box: score_regions(model, IMAGE, box[0]), "[k, 4], got [4]"),
        (lambda model, box: score_regions(model, IMAGE, box > 0), "torch.bool"),
        (lambda model, box: score_regions(model, IMAGE, box, batch_size=0), "batch_size and size"),
        (lambda model, box: score_regions(model, IMAGE, box, size=32, context=9), "a quarter of size=32, got 9"),
        (lambda model, box: score_regions(model, IMAGE, box, context=-1), "got -1"),
    ],
)
def test_wrong_arguments(change: Callable[[nn.Module, Tensor], object], said: str) -> None:
    with pytest.raises(ValueError, match=r"\w") as error:
        change(Recorder(), torch.tensor([[0.0, 0, 20, 20]]))
    assert said in message_of(error)


def test_an_unknown_variant_needs_a_preparation() -> None:
    model = Recorder()
    model.variant = "v7"
    box = torch.tensor([[0.0, 0, 20, 20]])
    with pytest.raises(ValueError, match="variant 'v7' wants its pixels is not known: give preparation"):
        score_regions(model, IMAGE, box)
    score_regions(model, IMAGE, box, preparation=PREPARATIONS["slim"], size=32, context=2)


def test_a_model_without_floating_point_parameters_gets_float32() -> None:
    class Means(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.dtype == torch.float32
            return x.mean((2, 3))

    scores = score_regions(Means().eval(), IMAGE, torch.tensor([[0.0, 0.0, WIDTH, HEIGHT]]))
    assert list(scores.shape) == [1, 3]

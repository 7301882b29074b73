"""What the tests of the evaluation share: images in memory, and networks that are tiny and fussy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from googlenet_fused.evaluation import Member
from googlenet_fused.images import ImageError, load_image, sample_photographs
from googlenet_fused.preparation import PREPARATIONS

CLASSES = ("astronaut", "chelsea", "coffee", "rocket")
CROP, RESIZE = 16, 20
SIZES = ((40, 30), (30, 47), (33, 33), (64, 21))


class Pictures:
    """Parts of the sample photographs, four forms of each; those in ``damaged`` cannot be read."""

    def __init__(self, count: int = 11, damaged: Sequence[int] = (), classes: tuple[str, ...] = CLASSES) -> None:
        self.classes, self.damaged = classes, damaged
        photographs = [load_image(sample_photographs()[name]) for name in CLASSES]
        self.images = []
        for index in range(count):
            width, height = SIZES[index % 4]
            left, top = 20 * index, 10 * index
            self.images.append(photographs[index // 4 % 4].crop((left, top, left + width, top + height)))

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{self.classes[self.label(index)]}/{index}.png"

    def label(self, index: int) -> int:
        return index // 4 % len(self.classes)

    def load(self, index: int) -> Image.Image:
        if index in self.damaged:
            raise ImageError(f"{self.name(index)} cannot be decoded:\nit is damaged")
        return self.images[index]


class Tiny(nn.Module):
    """A convolution and a classifier of seven classes.

    Attributes:
        fussy: how much the logits depend on the number of images in a call and on an image's place among them.
        shapes: of all inputs so far.
    """

    def __init__(self, seed: int = 0, classes: int = 7, fussy: float = 0.0) -> None:
        super().__init__()
        self.conv, self.fc, self.fussy = nn.Conv2d(3, 8, 5, stride=3), nn.Linear(8, classes), fussy
        self.shapes: list[tuple[int, ...]] = []
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape))
        places = torch.arange(1, len(x) + 1, dtype=x.dtype).unsqueeze(1)
        return self.fc(self.conv(x).relu().mean((2, 3))) + self.fussy * len(x) * places


def member(
    seed: int = 0, name: str = "tiny", dtype: torch.dtype = torch.float64, crop: int = CROP, fussy: float = 0.0
) -> Member:
    return Member(name, Tiny(seed, fussy=fussy).to(dtype), PREPARATIONS["torchvision"], 7, crop=crop, resize=crop + 4)

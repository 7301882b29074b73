"""Which image comes when, and what chance does to it: functions of the seed, so that a run can go on at any step.

No state of a generator is ever kept. The order of an epoch follows from the seed and the epoch, an image's augmentation from
the seed, the epoch and the image, and dropout from the seed, the step and the process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from googlenet_fused.data import DataError, LabelledImages
from googlenet_fused.images import ImageError
from googlenet_fused.training.augmentation import Augment

MOST_IN_A_ROW = 100
"""How many images after one another may be unreadable before the data as a whole is taken to be."""


def derive(*numbers: int) -> int:
    """A seed of 63 bits that follows from the numbers, and from no other ones."""
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


@lru_cache(maxsize=2)
def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Order:
    """The order of the images in a run. What remains of an epoch after its last whole batch is left out of it.

    Attributes:
        images: how many there are.
        batch_size: images in a step.
        seed: what the order follows from.

    Raises:
        ValueError: there are fewer images than a step needs.
    """

    images: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.images < self.batch_size:
            raise ValueError(
                f"batch_size must be at most {self.images}, the number of images, since a step needs a whole batch, "
                f"got {self.batch_size}"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.images // self.batch_size

    def of(self, step: int) -> list[int]:
        """The images of one step."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = _order(self.images, derive(self.seed, epoch))
        return order[within * self.batch_size : (within + 1) * self.batch_size].tolist()


class Key(NamedTuple):
    """One image in one epoch."""

    epoch: int
    image: int


class Batches(Sampler[list[Key]]):
    """The batches of one process from a step on: ``accumulate`` of them a step, each its share of the step's images.

    A step's images are cut into ``accumulate * world`` equal pieces; of each ``world`` pieces one process takes one.
    """

    def __init__(self, order: Order, steps: range, *, accumulate: int = 1, rank: int = 0, world: int = 1) -> None:
        self._order, self._steps = order, steps
        self._accumulate, self._rank, self._world = accumulate, rank, world

    def __len__(self) -> int:
        return len(self._steps) * self._accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        size = self._order.batch_size // (self._accumulate * self._world)
        for step in self._steps:
            images, epoch = self._order.of(step), step // self._order.steps_per_epoch
            for batch in range(self._accumulate):
                start = (batch * self._world + self._rank) * size
                yield [Key(epoch, image) for image in images[start : start + size]]


class Sample(NamedTuple):
    """Pixels ``[3, size, size]`` in uint8, their label, and the images before it that could not be read, with the reasons."""

    pixels: Tensor
    label: int
    unreadable: list[tuple[str, str]]


class AugmentedImages(Dataset[Sample]):
    """Images by ``Key``, augmented. An image that cannot be read gives way to the next one that can."""

    def __init__(self, images: LabelledImages, augment: Augment, seed: int) -> None:
        self._images, self._augment, self._seed = images, augment, seed

    def __getitem__(self, key: Key) -> Sample:
        unreadable: list[tuple[str, str]] = []
        for further in range(min(MOST_IN_A_ROW, len(self._images))):
            index = (key.image + further) % len(self._images)
            try:
                image = self._images.load(index)
            except ImageError as error:
                unreadable.append((self._images.name(index), str(error)))
                continue
            with torch.random.fork_rng(devices=[]):
                # Not torch.manual_seed, which would seed the generators of GPUs too, whose state is not put back.
                torch.default_generator.manual_seed(derive(self._seed, key.epoch, key.image))
                return Sample(self._augment(image), self._images.label(index), unreadable)
        name, reason = unreadable[0]
        raise DataError(f"{len(unreadable)} images in a row cannot be read, the first of them {name}: {reason}")


def reason_of(error: DataError) -> str:
    """What a dataset says of its images, in one line; through a worker it comes as the last line of a traceback."""
    return str(error).strip().splitlines()[-1].rpartition("DataError: ")[2]


class Batch(NamedTuple):
    """Pixels ``[n, 3, size, size]`` in uint8, labels ``[n]``, and what could not be read."""

    pixels: Tensor
    labels: Tensor
    unreadable: list[tuple[str, str]]


def collate(samples: list[Sample]) -> Batch:
    pixels = torch.stack([sample.pixels for sample in samples])
    labels = torch.tensor([sample.label for sample in samples])
    return Batch(pixels, labels, [entry for sample in samples for entry in sample.unreadable])

"""Images as the views that the networks are shown, read here or in worker processes, in groups of fixed members."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from googlenet_fused.crops import Protocol, load_transforms, views
from googlenet_fused.data import LabelledImages
from googlenet_fused.images import ImageError
from googlenet_fused.workers import start_method


class Geometry(NamedTuple):
    """Side of a network's input, and shorter side of the image before the centre crop and the 10 crops; in pixels."""

    crop: int
    resize: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """One image.

    Attributes:
        index: its index in the data.
        views: for each geometry ``[views, 3, crop, crop]``, uint8; of no meaning if the image cannot be had.
        fault: why it cannot be had, in one line; None if it can.
    """

    index: int
    views: tuple[Tensor, ...]
    fault: str | None


class _Views(Dataset[Loaded]):
    def __init__(self, images: LabelledImages, crops: Protocol, geometries: Sequence[Geometry]) -> None:
        self.images, self.crops, self.geometries = images, crops, tuple(geometries)

    def __getitem__(self, index: int) -> Loaded:
        try:
            image = self.images.load(index)
            return Loaded(index, tuple(views(image, self.crops, *geometry) for geometry in self.geometries), None)
        except ImageError as error:
            empty = (torch.zeros(int(self.crops), 3, crop, crop, dtype=torch.uint8) for crop, _ in self.geometries)
            return Loaded(index, tuple(empty), " ".join(str(error).split()))


class _Batch(NamedTuple):
    """Images stacked: a tensor costs a worker a file descriptor, whatever its size."""

    indices: list[int]
    views: list[Tensor]
    faults: list[str | None]

    @staticmethod
    def of(images: Sequence[Loaded]) -> _Batch:
        stacked = [torch.stack(each) for each in zip(*(image.views for image in images), strict=True)]
        return _Batch([image.index for image in images], stacked, [image.fault for image in images])

    def images(self) -> Iterator[Loaded]:
        for at, (index, fault) in enumerate(zip(self.indices, self.faults, strict=True)):
            yield Loaded(index, tuple(each[at] for each in self.views), fault)


def groups(
    images: LabelledImages,
    crops: Protocol,
    geometries: Sequence[Geometry],
    shares: Sequence[range],
    *,
    batch_size: int,
    workers: int,
) -> Iterator[list[Loaded]]:
    """The images of each of ``shares``, one list for each, whatever the batches in which they are read.

    Memory: an image of 144 views of 224x224 takes 22 MB, and up to ``batch_size * (2 * workers + 1)`` of them are there at a
    time, beside those of one share.
    """
    start = start_method(workers)
    if workers and start is None:
        load_transforms()  # takes seconds, which each forked worker would spend anew
    order = [index for share in shares for index in share]
    loader: DataLoader[Any] = DataLoader(
        _Views(images, crops, geometries),
        batch_sampler=[order[start : start + batch_size] for start in range(0, len(order), batch_size)],
        num_workers=workers,
        multiprocessing_context=start,
        collate_fn=_Batch.of,
    )
    read = (image for batch in loader for image in batch.images())
    for share in shares:
        yield list(islice(read, len(share)))

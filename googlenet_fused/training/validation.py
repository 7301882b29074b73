"""How well a network does on images it has not learned from, quickly: one centre crop each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Dataset

from googlenet_fused.crops import views
from googlenet_fused.data import LabelledImages
from googlenet_fused.distributed import Processes
from googlenet_fused.images import ImageError
from googlenet_fused.training.augmentation import resize_of
from googlenet_fused.training.errors import TrainingError
from googlenet_fused.training.sampling import Sample, collate
from googlenet_fused.workers import batches_of, leave_signals_alone, start_method

NO_CLASS = -1


class Validation(NamedTuple):
    """Mean cross entropy; images named right at the first and in five guesses, in per cent; those left out, and why."""

    loss: float
    top1: float
    top5: float
    unreadable: dict[str, str]


class _Centres(Dataset[Sample]):
    """Centre crops by index. An image that cannot be read is all zeros and of no class."""

    def __init__(self, images: LabelledImages, size: int) -> None:
        self._images, self._size = images, size

    def __getitem__(self, index: int) -> Sample:
        try:
            (pixels,) = views(self._images.load(index), "1", self._size, resize_of(self._size))
            return Sample(pixels, self._images.label(index), [])
        except ImageError as error:
            empty = torch.zeros(3, self._size, self._size, dtype=torch.uint8)
            return Sample(empty, NO_CLASS, [(self._images.name(index), str(error))])


def validate(
    model: nn.Module,
    images: LabelledImages,
    size: int,
    prepare: Callable[[Tensor], Tensor],
    *,
    batch_size: int,
    workers: int,
    processes: Processes,
) -> Validation:
    """The model, in evaluation mode for that time, on every image that can be read; each process takes its share of them.

    ``prepare`` makes the network's input of pixels in uint8.

    Raises:
        TrainingError: none of the images can be read.
    """
    share = processes.share(len(images))
    batches = [list(share[start : start + batch_size]) for start in range(0, len(share), batch_size)]
    loader = DataLoader(
        _Centres(images, size),
        batch_sampler=batches,
        num_workers=workers,
        multiprocessing_context=start_method(workers),
        collate_fn=collate,
        worker_init_fn=leave_signals_alone,
        generator=torch.Generator().manual_seed(0),
    )
    sums = torch.zeros(4, dtype=torch.float64)  # loss, right at the first guess, right in five, images
    unreadable: dict[str, str] = {}
    mode = model.training
    model.eval()
    try:
        with torch.inference_mode(), batches_of(loader) as read:
            for batch in read:
                unreadable.update(batch.unreadable)
                known = batch.labels != NO_CLASS
                pixels, labels = batch.pixels[known], batch.labels[known]
                if not len(labels):
                    continue
                logits = model(prepare(pixels)).float().cpu()
                top = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
                loss = F.cross_entropy(logits, labels, reduction="sum").item()
                sums += torch.tensor([loss, top[:, 0].sum().item(), top.any(1).sum().item(), len(labels)], dtype=torch.float64)
    finally:
        model.train(mode)
    if processes.world > 1:
        distributed.all_reduce(sums)
    for theirs in processes.gather_objects(unreadable):
        unreadable = {**unreadable, **theirs}
    loss, first, five, count = sums.tolist()
    if not count:
        raise TrainingError(f"none of the {len(images)} images for validation can be read: {next(iter(unreadable.values()))}")
    return Validation(loss / count, 100 * first / count, 100 * five / count, unreadable)

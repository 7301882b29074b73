"""How well a network does on images it has not learned from, quickly: one centre crop each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader

from googlenet_fused.data import DataError, LabelledImages
from googlenet_fused.distributed import Processes
from googlenet_fused.training.augmentation import augmentation
from googlenet_fused.training.errors import TrainingError
from googlenet_fused.training.sampling import (
    AugmentedImages,
    Batch,
    Key,
    Sample,
    collate,
    reason_of,
)
from googlenet_fused.training.workers import batches_of, leave_signals_alone


class Validation(NamedTuple):
    """Mean cross entropy, and images named right at the first and in five guesses, in per cent."""

    loss: float
    top1: float
    top5: float


def validate(
    model: nn.Module,
    images: LabelledImages,
    size: int,
    prepare: Callable[[Tensor], Tensor],
    *,
    batch_size: int,
    workers: int,
    processes: Processes,
    say: Callable[[str], None] = lambda _: None,
) -> Validation:
    """The model, in evaluation mode for that time, on every image that can be read; each process takes its share of them.

    ``prepare`` makes the network's input of pixels in uint8. ``say`` is told of the images that cannot be read.

    Raises:
        TrainingError: so many in a row cannot be read that none seems to be readable.
    """
    dataset = AugmentedImages(images, augmentation("none", size), seed=0)
    keys = [Key(0, image) for image in processes.share(len(images))]
    batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=leave_signals_alone,
        generator=torch.Generator().manual_seed(0),
    )
    sums = torch.zeros(4, dtype=torch.float64)  # loss, right at the first guess, right in five, images
    mode = model.training
    model.eval()
    try:
        with torch.inference_mode(), batches_of(loader) as read:
            for pixels, labels, unreadable in read:
                for _, reason in unreadable:
                    say(f"warning: validation goes without an image: {reason}")
                if not len(labels):
                    continue
                logits = model(prepare(pixels)).float().cpu()
                top = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
                loss = F.cross_entropy(logits, labels, reduction="sum").item()
                sums += torch.tensor([loss, top[:, 0].sum().item(), top.any(1).sum().item(), len(labels)], dtype=torch.float64)
    except DataError as error:
        raise TrainingError(f"validation: {reason_of(error)}") from error
    finally:
        model.train(mode)
    if processes.world > 1:
        distributed.all_reduce(sums)
    loss, first, five, count = sums.tolist()
    return Validation(loss / count, 100 * first / count, 100 * five / count)


def _collate(samples: list[Sample]) -> Batch:
    """Without the samples that stand for others."""
    own = [sample for sample in samples if not sample.unreadable]
    lost = [sample.unreadable[0] for sample in samples if sample.unreadable]
    if not own:
        return Batch(samples[0].pixels[None][:0], torch.empty(0, dtype=torch.int64), lost)
    return collate(own)._replace(unreadable=lost)

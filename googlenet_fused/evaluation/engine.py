"""Top-1 and top-5 of networks and of their ensemble, as the GoogLeNet paper evaluates (section 7).

The softmax is averaged over an image's views and then over the networks, in fp64. In the last bits a convolution's result
depends on how many images it is given at once, so a network is always given the same number of views, and each image has its
place among them by its index: what is computed of an image does not depend on the size of the batches in which images are
read, on workers, or on the number of processes, as long as these have equal devices and numbers of threads. It costs the rows
left empty in a last call, and those of images that cannot be had.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from googlenet_fused.crops import PROTOCOLS, Protocol
from googlenet_fused.data import LabelledImages
from googlenet_fused.distributed import Processes
from googlenet_fused.evaluation.errors import EvaluationError
from googlenet_fused.evaluation.labels import Labels
from googlenet_fused.evaluation.loading import Geometry, Loaded, groups
from googlenet_fused.evaluation.members import Member

VIEWS_A_CALL = {"cpu": 12, "cuda": 144}
"""How many views a network is given at once, by the kind of device."""

TOP = 5


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the ensemble says of one image; classes are the classifier's.

    Attributes:
        index: of the image in the data.
        label: its class.
        top: the most probable classes, the most probable first, at most ``TOP``; of equal ones the lower index first.
        probabilities: theirs.
        rank: the place of the image's class among all, from 1.
        member_ranks: the same for each network by itself.
    """

    index: int
    label: int
    top: tuple[int, ...]
    probabilities: tuple[float, ...]
    rank: int
    member_ranks: tuple[int, ...]


class Corrupt(NamedTuple):
    """An image that could not be had, and why."""

    name: str
    reason: str


class Score(NamedTuple):
    """How many of how many images had their class in the first place, and among the first five."""

    images: int
    top1: int
    top5: int

    @staticmethod
    def of(ranks: Sequence[int]) -> Score:
        return Score(len(ranks), sum(rank == 1 for rank in ranks), sum(rank <= TOP for rank in ranks))

    @property
    def top1_error(self) -> float:
        """In percent."""
        return 100 * (self.images - self.top1) / self.images

    @property
    def top5_error(self) -> float:
        """In percent."""
        return 100 * (self.images - self.top5) / self.images


@dataclass(frozen=True)
class Evaluation:
    """The result of one protocol.

    Attributes:
        crops: the protocol.
        views_a_call: how many views a network was given at once; results are the same to the last bit only for the same number.
        predictions: of every image that could be had, in the order of the data.
        corrupt: the others.
        seconds: how long it took.
        ensemble: the score of all networks together.
        members: the score of each by itself.
    """

    crops: Protocol
    views_a_call: int
    predictions: Sequence[Prediction]
    corrupt: Sequence[Corrupt]
    seconds: float
    ensemble: Score = field(init=False)
    members: tuple[Score, ...] = field(init=False)

    def __post_init__(self) -> None:
        ranks = [prediction.rank for prediction in self.predictions]
        of_members = zip(*(prediction.member_ranks for prediction in self.predictions), strict=True)
        object.__setattr__(self, "ensemble", Score.of(ranks))
        object.__setattr__(self, "members", tuple(map(Score.of, of_members)))


Progress = Callable[[int, int], None]
"""Takes how many images are done, and of how many; those of this process."""


def evaluate(
    members: Sequence[Member],
    images: LabelledImages,
    labels: Labels,
    crops: Protocol = "1",
    *,
    processes: Processes | None = None,
    batch_size: int | None = None,
    workers: int = 0,
    max_corrupt: int = 0,
    views_a_call: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluates networks and their ensemble by one protocol. Every process gets the whole result.

    Args:
        members: networks that agree on their classes, on the device of ``processes``.
        images: what to evaluate on; picklable if there are workers and these are not forked (``workers.start_method``).
        labels: which class of the networks each class of the images is.
        crops: how many views an image: one of ``PROTOCOLS``.
        processes: those that share the work; by default there is this one, on the CPU.
        batch_size: how many images a process reads at a time; None takes as many as have 144 views.
        workers: how many processes read them, for each process that evaluates; 0 reads them in it.
        max_corrupt: how many images may be left out because they cannot be had.
        views_a_call: how many views a network is given at once; None goes by the device (``VIEWS_A_CALL``).
        progress: called after each group of images.

    Raises:
        EvaluationError: there is no image, more than ``max_corrupt`` cannot be had or none can, or a network gives NaN or
            infinite values.
        ValueError: an argument is out of range.
    """
    if crops not in PROTOCOLS:
        raise ValueError(f"crops must be {', '.join(map(repr, PROTOCOLS))}, got {crops!r}")
    own = Processes() if processes is None else processes
    views_a_call = VIEWS_A_CALL.get(own.device.type, VIEWS_A_CALL["cpu"]) if views_a_call is None else views_a_call
    batch_size = max(1, 144 // int(crops)) if batch_size is None else batch_size
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("workers", workers, 0),
        ("max_corrupt", max_corrupt, 0),
        ("views_a_call", views_a_call, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not members:
        raise ValueError("members must hold at least one network")
    if not len(images):
        raise EvaluationError("there is no image to evaluate on")

    started = time.perf_counter()
    a_group = max(1, views_a_call // int(crops))  # images
    shares = [range(start, min(start + a_group, len(images))) for start in range(0, len(images), a_group)]
    shares = [shares[number] for number in own.share(len(shares))]
    geometries = list(dict.fromkeys(Geometry(member.crop, member.resize) for member in members))
    predictions: list[Prediction] = []
    corrupt: list[tuple[int, Corrupt]] = []
    total, done = sum(map(len, shares)), 0
    with torch.inference_mode():
        for group in groups(images, crops, geometries, shares, batch_size=batch_size, workers=workers):
            for image in group:
                if image.fault is not None:
                    corrupt.append((image.index, Corrupt(images.name(image.index), image.fault)))
            _check_corrupt([fault for _, fault in corrupt], max_corrupt)
            answers = _answers(group, a_group, members, geometries, own.device, views_a_call)
            predictions += [
                _prediction(image.index, labels.index[images.label(image.index)], answer)
                for image, answer in zip(group, answers, strict=True)
                if image.fault is None
            ]
            done += len(group)
            if progress is not None:
                progress(done, total)
    gathered = own.gather_objects((predictions, corrupt))
    predictions = sorted(chain.from_iterable(each for each, _ in gathered), key=lambda each: each.index)
    left_out = [fault for _, fault in sorted(chain.from_iterable(each for _, each in gathered))]
    _check_corrupt(left_out, max_corrupt)
    if not predictions:
        raise EvaluationError(f"none of the {len(left_out)} images can be had: {left_out[0].name}: {left_out[0].reason}")
    return Evaluation(crops, views_a_call, predictions, left_out, time.perf_counter() - started)


def _check_corrupt(corrupt: Sequence[Corrupt], limit: int) -> None:
    if len(corrupt) > limit:
        reason = corrupt[-1].reason
        which = reason if corrupt[-1].name in reason else f"{corrupt[-1].name}: {reason}"
        raise EvaluationError(
            f"{len(corrupt)} image{'s' if len(corrupt) > 1 else ''} cannot be read, where at most {limit} may be left out "
            f"(max_corrupt); the last: {which}"
        )


def _answers(
    group: Sequence[Loaded],
    slots: int,
    members: Sequence[Member],
    geometries: Sequence[Geometry],
    device: torch.device,
    views_a_call: int,
) -> Tensor:
    """Every network's probabilities, averaged over the views: ``[images, networks, classes]``, fp64, on the CPU.

    The images stand in the first of ``slots`` places, so that all groups have the same shapes.
    """
    pixels: dict[Geometry, Tensor] = {}
    for at, geometry in enumerate(geometries):
        shape = slots, *group[0].views[at].shape  # [slots, views, 3, crop, crop]
        batch = torch.zeros(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
        for slot, image in zip(batch, group, strict=False):
            slot.copy_(image.views[at])
        pixels[geometry] = batch.to(device, non_blocking=True)
    answers = []
    for member in members:
        batch = pixels[Geometry(member.crop, member.resize)]
        probabilities = _softmax(member, batch.flatten(0, 1), views_a_call)  # [slots * views, classes]
        answers.append(probabilities.view(*batch.shape[:2], -1).mean(1).cpu())
    found = torch.stack(answers, 1)[: len(group)]
    for image, answer in zip(group, found, strict=True):
        for member, probabilities in zip(members, answer, strict=True):
            if image.fault is None and not probabilities.isfinite().all():
                raise EvaluationError(
                    f"the network {member.name} gives NaN or infinite values for image {image.index}: "
                    "check its weights, or evaluate in fp32"
                )
    return found


def _softmax(member: Member, pixels: Tensor, views_a_call: int) -> Tensor:
    """``[n, 3, crop, crop]``, uint8, ``-> [n, classes]``, fp64; the last call is filled up with zeros."""
    rows = min(views_a_call, len(pixels))
    dtype = next((parameter.dtype for parameter in member.network.parameters()), torch.float32)
    found = []
    for part in pixels.split(rows):
        x = member.preparation(part).to(dtype)
        if len(x) < rows:
            x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, rows - len(x)))
        logits: Tensor = member.network(x)
        if logits.shape != (rows, member.num_classes):
            expected = f"[{rows}, {member.num_classes}]"
            raise EvaluationError(f"the network {member.name} must give logits {expected}, and gives {list(logits.shape)}")
        found.append(logits[: len(part)].double().softmax(1))
    return torch.cat(found)


def _prediction(index: int, label: int, answers: Tensor) -> Prediction:
    """From the networks' probabilities for one image, ``[networks, classes]``."""
    ensemble = answers.mean(0)
    probabilities, classes = ensemble.sort(descending=True, stable=True)
    ranks = tuple(_rank(answer, label) for answer in answers)
    return Prediction(
        index, label, tuple(classes[:TOP].tolist()), tuple(probabilities[:TOP].tolist()), _rank(ensemble, label), ranks
    )


def _rank(probabilities: Tensor, label: int) -> int:
    """The place of a class, from 1: after the more probable ones, and after equal ones of lower index."""
    own = probabilities[label]
    return 1 + int((probabilities > own).sum()) + int((probabilities[:label] == own).sum())

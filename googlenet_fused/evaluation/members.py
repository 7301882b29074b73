"""The networks of an evaluation, made of files of weights: what each is, and how it wants its images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from googlenet_fused import CannotFuse, FusionMismatch, fuse, googlenet
from googlenet_fused.backends import BackendError
from googlenet_fused.evaluation.errors import EvaluationError
from googlenet_fused.images import CROP_SIDE, RESIZE_SIDE
from googlenet_fused.models import VariantName
from googlenet_fused.models.googlenet import VARIANTS
from googlenet_fused.preparation import PREPARATIONS, Preparation
from googlenet_fused.weights import (
    WeightsError,
    load_weights,
)
from googlenet_fused.weights.conversion import understand

DEFAULT = "default"
"""What stands for the published weights in place of a file."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_LIST_LIMIT = 1_000_000
"""Bytes that a list of weights may have."""


@dataclass(frozen=True)
class Member:
    """One network of an evaluation.

    Attributes:
        name: what it is called in results.
        network: takes ``[n, 3, crop, crop]`` in its own dtype, gives logits ``[n, num_classes]``; in eval mode.
        preparation: from RGB pixels to the network's input.
        num_classes: width of the classifier.
        classes: names in the classifier's order; None if they are not known.
        background: whether class 0 stands for none of the others, as in TF-slim's classifiers of 1001.
        crop: side of the network's input, in pixels.
        resize: shorter side of an image before the centre crop and the 10 crops, in pixels.
        facts: what else to say of it in results, fit for JSON.
    """

    name: str
    network: nn.Module
    preparation: Preparation
    num_classes: int
    classes: tuple[str, ...] | None = None
    background: bool = False
    crop: int = CROP_SIDE
    resize: int = RESIZE_SIDE
    facts: tuple[tuple[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        own = {"name": self.name, "classes": self.num_classes, "crop": self.crop, "resize": self.resize}
        return {**own, "preparation": str(self.preparation), **dict(self.facts)}


def load_member(
    source: str | os.PathLike[str],
    *,
    variant: str | None = None,
    transform_input: bool = False,
    backend: str = "auto",
    device: torch.device | None = None,
    dtype: str = "fp32",
) -> Member:
    """The fused network with the weights of a file, or with the published ones, ready to be evaluated.

    A file that describes itself decides about variant, classes and sizes. Of any other the variant must be said, the classifier
    has the width that the file gives it, and images are 224x224 out of 256.

    Args:
        source: a file as ``read_state_dict`` takes it, or ``"default"`` for the variant's published weights, downloaded once.
        variant: which GoogLeNet the weights are for; None takes what the file says, or its names tell.
        transform_input: whether the weights expect input in [-1, 1]; of the published file, and of a file that says so, it is
            known. The ``"torchvision"`` variant only.
        backend: as ``fuse`` takes it.
        device: where the network is to run; None is the CPU.
        dtype: one of ``DTYPES``.

    Raises:
        EvaluationError: the weights cannot be had or do not fit, the file contradicts ``variant``, or the network cannot be
            fused as asked.
        ValueError: ``variant``, ``backend`` or ``dtype`` is unknown.
    """
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"variant must be {' or '.join(map(repr, VARIANTS))}, got {variant!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be {', '.join(map(repr, DTYPES))}, got {dtype!r}")
    try:
        path, _, said = understand(source, variant, transform_input=transform_input)
        model = googlenet(
            cast(VariantName, said.variant),
            num_classes=said.num_classes,
            aux_logits=False,
            transform_input=said.transform_input,
            init_weights=False,
        )
        loaded = load_weights(model, path)
        if said.crop < model.min_side:
            raise EvaluationError(f"{path}: images of {said.crop}x{said.crop} are too small for {said.variant}")
        network = fuse(model.eval().to(device=device, dtype=DTYPES[dtype]), backend=backend)
    except (WeightsError, BackendError, CannotFuse, FusionMismatch) as error:
        raise EvaluationError(str(error)) from error
    facts = {
        "file": str(path),
        "variant": said.variant,
        "transform_input": model.transform_input,
        "published": None if loaded.published is None else loaded.published.name,
        "source": said.source,
        "dtype": dtype,
        "backend": network.fusion_report.backends,  # type: ignore[union-attr]
    }
    return Member(
        path.stem,
        network,
        PREPARATIONS[said.variant],
        said.num_classes,
        said.classes,
        said.variant == "slim" and said.num_classes == 1001,
        said.crop,
        said.resize,
        tuple(facts.items()),
    )


def read_weights_list(path: str | os.PathLike[str], *, existing: bool = True) -> list[Path]:
    """The files that a list names, one a line; relative ones are sought beside the list. ``#`` begins a comment.

    ``existing`` says whether they must be there already, which those to be trained are not.

    Raises:
        EvaluationError: the list cannot be read, is no text or too long, names nothing, or names a file that is not there.
    """
    path = Path(path).expanduser()
    try:
        with open(path, "rb") as file:
            content = file.read(_LIST_LIMIT + 1)
        if len(content) > _LIST_LIMIT:
            raise EvaluationError(f"{path} is longer than the {_LIST_LIMIT} bytes that a list of weights may have")
        lines = content.decode("utf-8-sig").splitlines()
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read: {error.strerror or error}; name a list of weights") from error
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path} is not a text file: name a list with one file of weights a line") from error
    found = []
    for number, line in enumerate(lines, 1):
        if name := line.partition("#")[0].strip():
            file_ = path.parent / Path(name).expanduser()
            if existing and not file_.is_file():
                raise EvaluationError(f"{path}, line {number}: there is no file {file_}")
            found.append(file_)
    if not found:
        raise EvaluationError(f"{path} names no file of weights: write one a line")
    return found


def check_agreement(members: Sequence[Member]) -> None:
    """Refuses networks whose answers cannot be averaged, because they have other classes.

    Raises:
        EvaluationError: there is no network, or two of them differ in their classes.
    """
    if not members:
        raise EvaluationError("there is no network to evaluate: name at least one file of weights")
    first = members[0]
    described = next((member for member in members if member.classes is not None), first)
    for member in members:
        if (member.num_classes, member.background) != (first.num_classes, first.background):
            widths = f"{first.name} has {first.num_classes} classes and {member.name} has {member.num_classes}"
            raise EvaluationError(f"the networks have other classes, so their answers have no average: {widths}")
        if member.classes is not None and described.classes is not None and member.classes != described.classes:
            pairs = zip(described.classes, member.classes, strict=True)
            at, (one, other) = next((at, pair) for at, pair in enumerate(pairs) if pair[0] != pair[1])
            raise EvaluationError(
                f"the networks have other classes, so their answers have no average: class {at} is {one!r} for "
                f"{described.name} and {other!r} for {member.name}"
            )

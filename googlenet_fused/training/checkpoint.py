"""All that a run needs to go on as if it had never been stopped, in one file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from googlenet_fused.data import LabelledImages
from googlenet_fused.training.errors import TrainingError
from googlenet_fused.whole_files import whole_file

_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A run after ``step`` steps. Chance is no part of it: see ``sampling``.

    Attributes:
        settings: what must not change when the run is resumed, as text by name.
        step: steps done.
        model, averaged, optimiser, scaler: state_dicts; ``averaged`` is None where weights are not averaged.
        totals: sums of the epoch that was begun.
        history: the epochs before it, as ``Epoch`` in JSON.
        unreadable: the images found unreadable so far, with the reasons.
    """

    settings: dict[str, str]
    step: int
    model: dict[str, Any]
    averaged: dict[str, Any] | None
    optimiser: dict[str, Any]
    scaler: dict[str, Any]
    totals: list[float]
    history: list[dict[str, Any]]
    unreadable: dict[str, str]


_FIELDS = tuple(field.name for field in fields(Checkpoint))


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Writes the file whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with whole_file(path) as file:
        # Not asdict, which would copy every tensor.
        torch.save({"format": _FORMAT, **{name: getattr(checkpoint, name) for name in _FIELDS}}, file)


def load(path: Path, settings: dict[str, str]) -> Checkpoint:
    """The checkpoint in the file, of a run with these settings.

    Raises:
        TrainingError: the file is missing, damaged or of another version, or belongs to a run with other settings.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content.pop("format") != _FORMAT:
            raise TrainingError(f"{path} was written by another version of googlenet_fused: begin a new run in another folder")
        checkpoint = Checkpoint(**content)
    except FileNotFoundError as error:
        raise TrainingError(f"there is no run to resume: {path} does not exist") from error
    except PermissionError as error:
        raise TrainingError(f"{path} cannot be read: {error.strerror}") from error
    except TrainingError:
        raise
    except Exception as error:  # damaged files raise KeyError, EOFError, RuntimeError and more, besides UnpicklingError
        raise TrainingError(f"{path} is not a checkpoint, or is damaged: begin a new run in another folder") from error
    for name in {**checkpoint.settings, **settings}:
        before, now = checkpoint.settings.get(name), settings.get(name)
        if before != now:
            raise TrainingError(
                f"{path} belongs to a run with {name} = {before}, and now it is {now}: resume with what the run began with, "
                "or begin another in another folder"
            )
    return checkpoint


def fingerprint(images: LabelledImages) -> str:
    """Tells one set of labelled images from another by its names and labels; what the files hold is not read."""
    digest = hashlib.sha256()
    for index in range(len(images)):
        digest.update(f"{images.name(index)}\0{images.label(index)}\n".encode("utf-8", "surrogateescape"))
    return f"{len(images)} images, {len(images.classes)} classes, {digest.hexdigest()[:16]}"

"""What a run has reached after each epoch: a table in CSV, curves in a picture, and TensorBoard's events."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from googlenet_fused.charts import FUSED_COLOUR, PLAIN_COLOUR, new_figure, save_figure
from googlenet_fused.training.errors import TrainingError
from googlenet_fused.whole_files import whole_file


@dataclass(frozen=True)
class Epoch:
    """One line of the table. Validation is of the averaged weights, on centre crops; None where there are no images for it.

    Attributes:
        epoch: its number, from 1.
        step: steps done at its end.
        lr: learning rate of its last step.
        train_loss: mean over its images, auxiliary heads included.
        train_top1: how many of its augmented images the network named right, in per cent.
        val_loss, val_top1, val_top5: mean cross entropy, and images named right at the first and in five guesses, in per cent.
        images_per_second: of training alone, over all processes.
        seconds: from its beginning to the end of its validation; of the part since the last resumption.
        unreadable: images found unreadable so far.
    """

    epoch: int
    step: int
    lr: float
    train_loss: float
    train_top1: float
    val_loss: float | None
    val_top1: float | None
    val_top5: float | None
    images_per_second: float
    seconds: float
    unreadable: int

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Epoch:
        return cls(**{field.name: found[field.name] for field in fields(cls)})

    def __str__(self) -> str:
        words = [f"train loss {self.train_loss:.3f}", f"top-1 {self.train_top1:.1f} %"]
        if self.val_top1 is not None:
            words += [f"validation loss {self.val_loss:.3f}", f"top-1 {self.val_top1:.2f} %", f"top-5 {self.val_top5:.2f} %"]
        return ", ".join([*words, f"lr {self.lr:.3g}", f"{self.images_per_second:.0f} img/s", f"{self.seconds:.0f} s"])


def write_csv(epochs: Sequence[Epoch], path: Path) -> Path:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Epoch)])
    writer.writerows(["" if value is None else value for value in asdict(epoch).values()] for epoch in epochs)
    with whole_file(path) as file:
        file.write(text.getvalue().encode())
    return path


def draw_curves(epochs: Sequence[Epoch], path: Path, title: str) -> Path:
    """Loss, accuracy and learning rate over the epochs, as a PNG file.

    Raises:
        ChartError: matplotlib is not installed.
        ValueError: there is no epoch yet.
    """
    if not epochs:
        raise ValueError("draw_curves: epochs must hold at least one")
    figure = new_figure((12.0, 4.0))
    panels = (
        ("loss", {"train (with auxiliary losses)": "train_loss", "validation": "val_loss"}),
        ("top-1, %", {"train (augmented)": "train_top1", "validation": "val_top1"}),
        ("learning rate", {"": "lr"}),
    )
    for axes, (what, curves) in zip(figure.subplots(1, 3), panels, strict=True):
        for (label, name), colour in zip(curves.items(), (PLAIN_COLOUR, FUSED_COLOUR), strict=False):
            points = [(epoch.epoch, getattr(epoch, name)) for epoch in epochs if getattr(epoch, name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, label=label, marker="o" if len(points) < 30 else None)
        axes.set_xlabel("epoch")
        axes.set_title(what, fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(curves) > 1:
            axes.legend(fontsize=9)
    figure.suptitle(title)
    return save_figure(figure, path)


class Events(Protocol):
    """What is written for TensorBoard of each epoch."""

    def add(self, epoch: Epoch) -> None: ...

    def close(self) -> None: ...


class _NoEvents:
    def add(self, epoch: Epoch) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrainingError(
                f"TensorBoard's events need tensorboard, which does not import ({error}): pip install 'googlenet-fused[train]'"
            ) from error
        self._writer: Any = SummaryWriter(folder, purge_step=step)

    def add(self, epoch: Epoch) -> None:
        for name, value in asdict(epoch).items():
            if value is not None and name not in ("epoch", "step"):
                self._writer.add_scalar(name, value, epoch.step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def events(folder: Path | None, step: int) -> Events:
    """A writer of TensorBoard's events from ``step`` on, or of nothing without a folder.

    Raises:
        TrainingError: tensorboard is not installed.
    """
    return _NoEvents() if folder is None else _TensorBoard(folder, step)

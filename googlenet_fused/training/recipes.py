"""Named recipes: everything that decides how a network is trained, but for the data and the size of its images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from googlenet_fused.training.schedule import Cosine, Polynomial, Schedule, StepDecay

Augmentation = Literal["paper", "bvlc", "modern", "none"]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        epochs: passes over the images.
        batch_size: images in one step, over all processes and accumulated batches.
        lr: learning rate at that batch size, before the schedule.
        schedule: what ``lr`` is multiplied by in the course of the run.
        augmentation: what is done to the images, a name of ``augmentation.AUGMENTATIONS``.
        momentum, nesterov: of stochastic gradient descent.
        weight_decay: of convolutions' and linear layers' weights.
        bias_lr: how many times ``lr`` biases and batch norms learn with.
        caffe_momentum: keep the learning rate inside the momentum, as Caffe does: ``v = momentum * v + lr * gradient``.
        aux_weight: what each auxiliary head's loss counts (the paper, section 5: 0.3).
        label_smoothing: of the cross entropy.
        averaging: decay of the exponential average of the weights, which is the result; None: the weights themselves.
        dropout: before the classifier; None: the variant's.
        dropout_aux: in the auxiliary heads (the paper, section 5: 0.7).
    """

    name: str
    epochs: int
    batch_size: int
    lr: float
    schedule: Schedule
    augmentation: Augmentation
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 2e-4
    bias_lr: float = 1.0
    caffe_momentum: bool = False
    aux_weight: float = 0.3
    label_smoothing: float = 0.0
    averaging: float | None = None
    dropout: float | None = None
    dropout_aux: float = 0.7

    def __post_init__(self) -> None:
        bounds = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "lr": (0 < self.lr < float("inf"), "above 0"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "weight_decay": (0 <= self.weight_decay < float("inf"), "at least 0"),
            "aux_weight": (0 <= self.aux_weight < float("inf"), "at least 0"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "in [0, 1)"),
            "averaging": (self.averaging is None or 0 <= self.averaging < 1, "None or in [0, 1)"),
        }
        for name, (good, range_) in bounds.items():
            if not good:
                raise ValueError(f"{name} must be {range_}, got {getattr(self, name)!r}")


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        # The paper, section 6: momentum 0.9, 4 % less every 8 epochs, averaged weights, crops of 8 to 100 % of the image. It
        # gives no learning rate, batch, decay or constant of the average. Batch, decay and length are those of BVLC's
        # solver.prototxt (10 million steps of 32 are 250 epochs of ImageNet); its learning rate of 0.01 is known not to get
        # going from scratch where 0.005 does (NVIDIA/DIGITS issue 82).
        Recipe("paper", 250, 32, 0.005, StepDecay(0.96, 8), "paper", averaging=0.9999),
        # BVLC/caffe, models/bvlc_googlenet/quick_solver.prototxt and train_val.prototxt: 2.4 million steps of 32.
        Recipe("bvlc", 60, 32, 0.01, Polynomial(0.5), "bvlc", bias_lr=2.0, caffe_momentum=True, dropout=0.4),
        # Batch norm lets the rate be large; the rest is torchvision's usual recipe (references/classification).
        Recipe(
            "modern",
            90,
            128,
            0.1,
            Cosine(0.05),
            "modern",
            nesterov=True,
            weight_decay=5e-5,
            label_smoothing=0.1,
            averaging=0.9998,
        ),
    )
}
"""By name. They are frozen: a change is made of one by ``dataclasses.replace``."""

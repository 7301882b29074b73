"""Training from scratch: named recipes, runs that can be stopped and resumed at any step, one process or many."""

from googlenet_fused.training.augmentation import augmentation
from googlenet_fused.training.errors import TrainingError
from googlenet_fused.training.loop import Run, Settings, Stopped
from googlenet_fused.training.recipes import RECIPES, Recipe
from googlenet_fused.training.schedule import Cosine, Polynomial, StepDecay

__all__ = [
    "RECIPES",
    "Cosine",
    "Polynomial",
    "Recipe",
    "Run",
    "Settings",
    "StepDecay",
    "Stopped",
    "TrainingError",
    "augmentation",
]

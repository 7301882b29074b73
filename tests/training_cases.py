"""Tiny runs: a few noisy images of 32x32, a recipe of a few steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from googlenet_fused.data import FolderImages
from googlenet_fused.training import RECIPES, Recipe, Run, Settings

SIZE = 32
CLASSES = ("ant", "bee", "cat")


def image_folder(root: Path, each: int = 4, seed: int = 0) -> Path:
    """``each`` images of noise for every class, each class with a brightness of its own."""
    generator = torch.Generator().manual_seed(seed)
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True, exist_ok=True)
        for at in range(each):
            pixels = torch.randint(80 * label, 80 * label + 90, (36, 40, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(root / name / f"{at}.png")
    return root


def recipe(name: str = "modern", **changes: Any) -> Recipe:
    return replace(RECIPES[name], **{"epochs": 2, "batch_size": 4, "lr": 0.01, **changes})


def settings(of: Recipe | None = None, **changes: Any) -> Settings:
    return Settings(of or recipe(), **{"image_size": SIZE, "workers": 0, **changes})


def start(folder: Path, images: Path, of: Settings | None = None, validation: Path | None = None, **options: Any) -> Run:
    folder.mkdir(exist_ok=True)
    other = None if validation is None else FolderImages(validation)
    return Run(of or settings(), FolderImages(images), other, folder, **options)


def state_of(run: Run) -> dict[str, Any]:
    """All numbers that a run leaves: weights, their average, and the optimiser's momentum."""
    return {
        "model": run.model.state_dict(),
        "averaged": None if run.averaged is None else run.averaged.state_dict(),
        "momentum": [state["momentum_buffer"] for state in run.optimiser.state_dict()["state"].values()],
    }


def in_fp64(run: Run) -> Run:
    """The run with weights, inputs and gradients in fp64, so that two that compute the same agree to its rounding."""
    prepare = run._prepare
    run.model.double()
    run._prepare = lambda pixels: prepare(pixels).double()  # type: ignore[assignment, misc]
    return run

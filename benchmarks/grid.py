"""Which cases are measured: the nine modules and both networks of ``tests/cases.py``, in the batches and dtypes of a device."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from googlenet_fused.bench import NETWORKS, Case, Mode

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from cases import BATCHES, GOOGLENET_MODULES

MODES: tuple[Mode, ...] = get_args(Mode)
GROUPS = {"nets": tuple(NETWORKS), "modules": tuple(GOOGLENET_MODULES)}
GROUPS["all"] = GROUPS["nets"] + GROUPS["modules"]
"""Names that stand for several subjects."""

DTYPES: dict[str, dict[Mode, tuple[str, ...]]] = {
    "cpu": {"inference": ("fp32", "bf16"), "training": ("fp32",)},
    "cuda": dict.fromkeys(MODES, ("fp16", "bf16", "tf32")),
}
"""Those that are measured where none is asked for."""

CPU_BATCHES = (1, 8)
CPU_BATCHES_OF = {("torchvision", "fp32"): (1, 8, 32)}
"""By subject and dtype, where they are others. More would take a CPU with few cores hours."""
TRAINING_BATCHES = {"cpu": (8,), "cuda": (32, 128)}
NO_TRAINING = ("fp16",)
"""A step in fp16 needs loss scaling, which would be measured with it."""


@dataclass(frozen=True)
class Selection:
    """What a run was asked for; an empty field stands for the device's own choice."""

    subjects: Sequence[str] = ("all",)
    batches: Sequence[int] = ()
    dtypes: Sequence[str] = ()
    modes: Sequence[Mode] = MODES


def cases(selection: Selection, device: str) -> Iterator[Case]:
    """The cases of a selection: by mode, then dtype, then batch, then subject, networks first.

    Raises:
        ValueError: a subject, batch or dtype is unknown, or the device cannot run it.
    """
    subjects = dict.fromkeys(name for asked in selection.subjects for name in GROUPS.get(asked, (asked,)))
    if device == "cpu" and "tf32" in selection.dtypes:
        raise ValueError("--dtypes: tf32 is a mode of CUDA's tensor cores; on a CPU measure fp32")
    for mode in selection.modes:
        for dtype in selection.dtypes or DTYPES[device][mode]:
            for batch in selection.batches or sorted({*BATCHES, *TRAINING_BATCHES[device]}):
                for subject in subjects:
                    if mode == "training" and (subject in GROUPS["modules"] or dtype in NO_TRAINING):
                        continue
                    inference = CPU_BATCHES_OF.get((subject, dtype), CPU_BATCHES) if device == "cpu" else BATCHES
                    if selection.batches or batch in (TRAINING_BATCHES[device] if mode == "training" else inference):
                        yield Case(subject, batch, dtype, mode)

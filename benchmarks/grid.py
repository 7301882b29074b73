"""Which cases are measured: the nine modules and both networks of ``tests/cases.py``, in the batches and dtypes of a device."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from googlenet_fused.bench import NETWORKS, Case, Mode

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from cases import BATCHES, GOOGLENET_MODULES

GROUPS = {"nets": tuple(NETWORKS), "modules": tuple(GOOGLENET_MODULES)}
GROUPS["all"] = GROUPS["nets"] + GROUPS["modules"]
"""Names that stand for several subjects."""

CPU_BATCHES = {"modules": (1, 8), "nets": (1, 8, 32)}
CPU_DTYPES = ("fp32", "bf16")
TRAINING_BATCHES = {"cpu": (8,), "cuda": (32, 128)}
NO_TRAINING = ("fp16",)
"""A step in fp16 needs loss scaling, which would be measured with it."""


@dataclass(frozen=True)
class Selection:
    """What a run was asked for; an empty field stands for the device's own choice."""

    subjects: Sequence[str] = ("all",)
    batches: Sequence[int] = ()
    dtypes: Sequence[str] = ()
    modes: Sequence[Mode] = ("inference", "training")


def cases(selection: Selection, device: str) -> Iterator[Case]:
    """The cases of a selection, networks first and smaller batches before larger ones.

    Raises:
        ValueError: a subject, batch or dtype is unknown, or the device cannot run it.
    """
    subjects = dict.fromkeys(name for asked in selection.subjects for name in GROUPS.get(asked, (asked,)))
    dtypes = selection.dtypes or (CPU_DTYPES if device == "cpu" else ("fp16", "bf16", "tf32"))
    if device == "cpu" and "tf32" in dtypes:
        raise ValueError("--dtypes: tf32 is a mode of CUDA's tensor cores; on a CPU measure fp32")
    for mode in selection.modes:
        for dtype in dtypes:
            for batch in selection.batches or sorted({*BATCHES, *TRAINING_BATCHES[device]}):
                for subject in subjects:
                    group = "modules" if subject in GROUPS["modules"] else "nets"
                    if mode == "training" and (group == "modules" or dtype in NO_TRAINING):
                        continue
                    inference = CPU_BATCHES[group] if device == "cpu" else BATCHES
                    if selection.batches or batch in (TRAINING_BATCHES[device] if mode == "training" else inference):
                        yield Case(subject, batch, dtype, mode)

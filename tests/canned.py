"""Made-up rows and result files, as benchmarks/gpu.sh leaves them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def row(provider: str, ms: float | None, subject: str = "torchvision", batch: int = 1, **changes: Any) -> dict[str, Any]:
    """A row of a result file; with ``ms`` None, one of a provider that is not there."""
    case = {"subject": subject, "batch": batch, "dtype": "fp16", "mode": "inference", "side": 224}
    case |= {name: changes.pop(name) for name in list(changes) if name in case}
    timings = {} if ms is None else {"graph": {"median": ms, "p20": ms, "p80": ms, "n": 9}}
    status, reason = ("ok", None) if ms is not None else ("unavailable", "not installed")
    return {"case": case, "provider": provider, "status": status, "reason": reason, "timings": timings, **changes}


def results(*rows: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    return {"schema": 3, "git": None, "not_run": [], **fields, "rows": list(rows)}

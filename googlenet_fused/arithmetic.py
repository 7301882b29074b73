"""What products of a dtype's numbers are computed in: fp32 on a GPU may be TF32, as torch's flags say."""

from __future__ import annotations

import torch


def arithmetic(dtype: torch.dtype) -> str:
    """The dtype's name; ``tf32`` for fp32 while torch's flags allow convolutions that on a GPU, as other kernels run then."""
    tf32 = dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if tf32 else str(dtype).removeprefix("torch.")

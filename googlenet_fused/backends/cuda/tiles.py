"""Tiles forced upon the kernel, and inputs as it reads them: what the GPU backend and the simulation share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from googlenet_fused.arithmetic import arithmetic
from googlenet_fused.backends.cuda.weights import UNIT_BYTES

ELEMENTS = {"float16": "fp16", "bfloat16": "bf16", "tf32": "tf32"}
"""What the kernel multiplies, by what ``arithmetic`` says."""


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}
"""Of the tensors."""


class Tile(NamedTuple):
    """How a module is cut into blocks: ``struct Tile`` of ``csrc/inception/params.h``."""

    images: int
    rows: int
    columns: int
    splits: int
    stages: int

    def within(self, batch: int, height: int, width: int) -> Tile:
        """No larger than these images are, and of several only if they are whole."""
        images = min(self.images, batch) if self.rows >= height and self.columns >= width else 1
        return self._replace(images=images, rows=min(self.rows, height), columns=min(self.columns, width))


_forced: ContextVar[Tile | None] = ContextVar("googlenet_fused_cuda_tile", default=None)


@contextmanager
def use_tile(tile: Tile | None) -> Iterator[None]:
    """Within the block modules run in this tile, or what of it fits their images; with None in the planner's choice."""
    token = _forced.set(tile)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_tile(x: Tensor) -> Tile | None:
    """The tile of ``use_tile`` for an input ``[n, c, h, w]``, if there is one."""
    tile, (n, _, h, w) = _forced.get(), x.shape
    return None if tile is None else tile.within(n, h, w)


def refuse_dtype(dtype: torch.dtype) -> str | None:
    """Why the kernel does not run tensors of this dtype, or None if it does."""
    found = arithmetic(dtype)
    if found in ELEMENTS:
        return None
    if found == "float32":
        return (
            "its kernel multiplies fp32 as TF32, which torch.backends.cudnn.conv.fp32_precision does not allow here; "
            "the triton backend runs fp32 itself"
        )
    return f"its kernel takes float16, bfloat16 and, as TF32, float32, not {str(dtype).removeprefix('torch.')}"


def readable(x: Tensor) -> Tensor:
    """``x [n, c, h, w]`` itself if its channels are adjacent and its pixels lie on 16 bytes, else a copy that does so."""
    unit, (n, c, h, w) = UNIT_BYTES // x.element_size(), x.shape
    aligned = all(x.stride(axis) % unit == 0 for axis in (0, 2, 3) if x.shape[axis] > 1)
    if (c == 1 or x.stride(1) == 1) and aligned and x.data_ptr() % UNIT_BYTES == 0:
        return x
    return x.new_empty(n, h, w, -(-c // unit) * unit).permute(0, 3, 1, 2)[:, :c].copy_(x)

"""A module's weights as the CUDA kernel reads them; ``csrc/inception/params.h`` says the layout.

It depends on widths and dtype alone, so what is packed once serves inputs of every size, in every tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from googlenet_fused.packing import PackedInception

UNIT_BYTES = 16
STEP_BYTES = 32
STAGE_BYTES = 64
UNIT_COLUMNS = 8


def pack(packed: PackedInception) -> tuple[Tensor, Tensor]:
    """Weights ``[bytes]`` in uint8 and biases ``[columns]`` in fp32 of the four products: the pooled projection, the 1x1s that
    read the input, the second branch's convolution, the third's.

    Only by operators on that device: a first call may be captured in a CUDA graph, which takes no copies from the host.

    Args:
        packed: in fp16, bf16 or fp32, which is rounded to TF32; on any device.
    """
    spec = packed.spec
    weights = [tensor.detach() for tensor in packed[::2]]
    biases = [tensor.detach().float() for tensor in packed[1::2]]
    if weights[0].dtype == torch.float32:
        weights = [round_to_tf32(weight) for weight in weights]
    shared, ch3x3, ch5x5, pool_proj = weights
    shared_bias, ch3x3_bias, ch5x5_bias, pool_proj_bias = biases

    step = STEP_BYTES // shared.element_size()
    of_shared, multiples = spec.shared_slices, (UNIT_COLUMNS, step, step)
    matrices = [
        _matrix(pool_proj),
        _stacked([_matrix(shared)[columns] for columns in of_shared], multiples),
        _matrix(ch3x3, step),
        _matrix(ch5x5, step),
    ]
    rows = [
        pool_proj_bias,
        _stacked([shared_bias[columns] for columns in of_shared], multiples),
        ch3x3_bias,
        ch5x5_bias,
    ]
    return torch.cat([_staged(matrix) for matrix in matrices]), torch.cat([_padded(row, UNIT_COLUMNS) for row in rows])


def round_to_tf32(values: Tensor) -> Tensor:
    """The nearest TF32 numbers of fp32 ones, ties away from zero, as ``cvt.rna.tf32.f32`` rounds; NaN and infinity stay.

    A NaN becomes one that TF32 holds: the tensor cores read the upper bits alone, of which a NaN may have none but infinity's.
    """
    rounded = ((values.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values.masked_fill(values.isnan(), torch.nan))


def _padded(tensor: Tensor, multiple: int) -> Tensor:
    """With zeros behind along the first axis, up to a multiple."""
    missing = -tensor.shape[0] % multiple
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, missing))


def _stacked(parts: Sequence[Tensor], multiples: Sequence[int]) -> Tensor:
    return torch.cat([_padded(part, multiple) for part, multiple in zip(parts, multiples, strict=True)])


def _matrix(weight: Tensor, multiple: int = 1) -> Tensor:
    """``[out, in, k, k]`` as ``[out, k * k * in]``, taps before channels, each tap's channels padded to a multiple."""
    out, channels, *_ = weight.shape
    taps = weight.permute(0, 2, 3, 1).reshape(out, -1, channels)
    return F.pad(taps, (0, -channels % multiple)).flatten(1)


def _staged(matrix: Tensor) -> Tensor:
    """``[columns, k]`` as bytes ``[stages, columns, STAGE_BYTES]``, flat; unit u of column n at ``u ^ (n >> 1 & 3)``."""
    size = matrix.element_size()
    units, stage = STAGE_BYTES // UNIT_BYTES, STAGE_BYTES // size
    padded = F.pad(_padded(matrix, UNIT_COLUMNS), (0, -matrix.shape[1] % stage))
    columns = padded.shape[0]
    staged = padded.reshape(columns, -1, units, UNIT_BYTES // size).transpose(0, 1)
    column, unit = (torch.arange(count, device=matrix.device) for count in (columns, units))
    source = (unit ^ (column[:, None] >> 1 & 3))[None, :, :, None]
    return staged.gather(2, source.expand(staged.shape)).contiguous().view(torch.uint8).flatten()

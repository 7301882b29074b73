"""The plain-PyTorch backend: any device, any floating dtype, and the definition of what every other backend computes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from googlenet_fused.backends.registry import Backend, Problem
from googlenet_fused.packing import PackedInception


class ReferenceBackend(Backend):
    name = "reference"
    description = "plain PyTorch operators, any device and floating dtype"
    last_resort = True

    def probe(self) -> str | None:
        return None

    def supports(self, problem: Problem) -> str | None:
        return None if problem.dtype.is_floating_point else f"{problem.dtype} is not a floating dtype"

    def inception(self, x: Tensor, packed: PackedInception, prepared: tuple[Tensor, ...], out: Tensor) -> None:
        spec = packed.spec
        shared = F.conv2d(x, packed.shared_weight, packed.shared_bias).relu()
        ch1x1, ch3x3red, ch5x5red = (shared[:, channels] for channels in spec.shared_slices)
        pooled = F.max_pool2d(x, kernel_size=3, stride=1, padding=1)

        out[:, spec.slices.ch1x1] = ch1x1
        out[:, spec.slices.ch3x3] = F.conv2d(ch3x3red, packed.ch3x3_weight, packed.ch3x3_bias, padding=1).relu()
        out[:, spec.slices.ch5x5] = F.conv2d(
            ch5x5red, packed.ch5x5_weight, packed.ch5x5_bias, padding=spec.large_kernel // 2
        ).relu()
        out[:, spec.slices.pool_proj] = F.conv2d(pooled, packed.pool_proj_weight, packed.pool_proj_bias).relu()

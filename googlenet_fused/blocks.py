"""The plain building blocks of GoogLeNet in ordinary PyTorch: the reference that every fused path is judged against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from googlenet_fused.spec import InceptionSpec

Norm = Literal["batch"] | None
ConvBlock = Callable[..., nn.Module]

BATCH_NORM_EPS = 1e-3
"""torchvision/models/googlenet.py, BasicConv2d; the TF-slim weights it ported were trained with it."""


def conv_block_for(norm: Norm) -> ConvBlock:
    """The ``conv_block`` factory for a norm: ``"batch"`` (torchvision) or ``None`` (the paper: convolutions with bias)."""
    if norm not in ("batch", None):
        raise ValueError(f"norm must be 'batch' or None, got {norm!r}")
    return partial(BasicConv2d, norm=norm)


class BasicConv2d(nn.Module):
    """Convolution, optional batch norm, ReLU: ``[n, in_channels, h, w] -> [n, out_channels, h', w']``.

    With ``norm="batch"`` the convolution has no bias and the state_dict keys are torchvision's (``conv.weight``, ``bn.*``);
    with ``norm=None`` it has one (``conv.weight``, ``conv.bias``), as in the paper's network. Keyword arguments go to
    ``nn.Conv2d``.
    """

    def __init__(self, in_channels: int, out_channels: int, *, norm: Norm = "batch", **kwargs: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, bias=norm is None, **kwargs)  # type: ignore[arg-type]
        self.bn: nn.BatchNorm2d | None
        self.register_module("bn", nn.BatchNorm2d(out_channels, eps=BATCH_NORM_EPS) if norm == "batch" else None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.bn is not None:
            x = self.bn(x)
        return F.relu(x, inplace=True)


class Inception(nn.Module):
    """One Inception module: ``[n, in_channels, h, w] -> [n, ch1x1 + ch3x3 + ch5x5 + pool_proj, h, w]`` (the paper, Fig. 2b).

    The signature and the state_dict keys are torchvision's. ``large_kernel`` is the kernel size of ``branch3``: 3 as in
    torchvision (the default, so that this class takes its place) or 5 as in the paper. A ``conv_block`` of your own overrides
    ``norm``.

    Raises:
        ValueError: a width, ``large_kernel`` or ``norm`` is out of range.
        TypeError: ``conv_block`` cannot be called.
    """

    def __init__(
        self,
        in_channels: int,
        ch1x1: int,
        ch3x3red: int,
        ch3x3: int,
        ch5x5red: int,
        ch5x5: int,
        pool_proj: int,
        conv_block: ConvBlock | None = None,
        *,
        large_kernel: int = 3,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        if conv_block is not None and not callable(conv_block):
            raise TypeError(
                f"conv_block must be a class or function that makes a convolution block, got {conv_block!r}; "
                f"for a spec's widths and kernel size, call {type(self).__name__}.from_spec(spec)"
            )
        spec = InceptionSpec(in_channels, ch1x1, ch3x3red, ch3x3, ch5x5red, ch5x5, pool_proj, large_kernel)
        block = conv_block or conv_block_for(norm)
        c1, c3r, c3, c5r, c5, proj = (
            partial(block, conv.in_channels, conv.out_channels, kernel_size=conv.kernel_size, padding=conv.padding)
            for conv in spec.convs
        )
        self.branch1 = c1()
        self.branch2 = nn.Sequential(c3r(), c3())
        self.branch3 = nn.Sequential(c5r(), c5())
        self.branch4 = nn.Sequential(nn.MaxPool2d(kernel_size=3, stride=1, padding=1, ceil_mode=True), proj())

    @classmethod
    def from_spec(cls, spec: InceptionSpec, **kwargs: Any) -> Self:
        """A module of a spec's widths and kernel size; ``kwargs`` are the constructor's other arguments.

        Raises:
            TypeError: ``spec`` is not an ``InceptionSpec``.
        """
        if not isinstance(spec, InceptionSpec):
            raise TypeError(f"spec must be an InceptionSpec, such as GOOGLENET_SPECS['4a'], got {spec!r}")
        return cls(**asdict(spec), **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class LocalResponseNorm(nn.LocalResponseNorm):
    """torch's, also for half precisions on a CPU, where torch has no kernel for them: the norm is computed in fp32 there."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.float16, torch.bfloat16):
            return super().forward(x.float()).to(x.dtype)
        return super().forward(x)

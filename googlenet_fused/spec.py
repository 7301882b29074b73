"""The shape of an Inception module: its widths, its kernel sizes and where each branch lies in the concat buffer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple


class ConvShape(NamedTuple):
    """One convolution of a module: weight ``[out_channels, in_channels, kernel_size, kernel_size]``, stride 1."""

    name: str
    in_channels: int
    out_channels: int
    kernel_size: int

    @property
    def padding(self) -> int:
        return self.kernel_size // 2

    @property
    def weight_count(self) -> int:
        return self.out_channels * self.in_channels * self.kernel_size**2


class BranchSlices(NamedTuple):
    """Channel ranges of the four branches in the concat buffer, in the paper's order (Fig. 2b)."""

    ch1x1: slice
    ch3x3: slice
    ch5x5: slice
    pool_proj: slice


class SharedSlices(NamedTuple):
    """Channel ranges of the 1x1 convolutions that read the module's input, when merged into one."""

    ch1x1: slice
    ch3x3red: slice
    ch5x5red: slice


@dataclass(frozen=True)
class InceptionSpec:
    """Widths of one Inception module, with torchvision's argument names.

    ``large_kernel`` is the kernel size of the third branch: 5 in the paper, 3 in torchvision, whose ``ch5x5`` branch holds 3x3
    kernels (a bug its published weights depend on: torchvision issue 906).

    Raises:
        ValueError: a width is not a positive integer, or ``large_kernel`` is neither 3 nor 5.
    """

    in_channels: int
    ch1x1: int
    ch3x3red: int
    ch3x3: int
    ch5x5red: int
    ch5x5: int
    pool_proj: int
    large_kernel: int = 5

    def __post_init__(self) -> None:
        for name in ("in_channels", "ch1x1", "ch3x3red", "ch3x3", "ch5x5red", "ch5x5", "pool_proj"):
            width = getattr(self, name)
            if not isinstance(width, int) or isinstance(width, bool) or width < 1:
                raise ValueError(f"InceptionSpec: {name} must be a positive integer, got {width!r}")
        if self.large_kernel not in (3, 5):
            raise ValueError(f"InceptionSpec: large_kernel must be 3 or 5, got {self.large_kernel!r}")

    def __iter__(self) -> Iterator[int]:
        """The fields in order: ``*widths, large_kernel = spec`` gives the widths that ``FusedInception(*widths)`` takes."""
        return iter(astuple(self))

    @property
    def out_channels(self) -> int:
        return self.ch1x1 + self.ch3x3 + self.ch5x5 + self.pool_proj

    @property
    def shared_channels(self) -> int:
        """Output width of the merged 1x1 convolutions of ``shared_slices``."""
        return self.ch1x1 + self.ch3x3red + self.ch5x5red

    @cached_property
    def slices(self) -> BranchSlices:
        """Where each branch's channels lie in the output, axis 1."""
        return BranchSlices(*_consecutive(self.ch1x1, self.ch3x3, self.ch5x5, self.pool_proj))

    @cached_property
    def shared_slices(self) -> SharedSlices:
        """Where the 1x1 convolutions that read the module's input lie when merged, ``shared_channels`` wide in all."""
        return SharedSlices(*_consecutive(self.ch1x1, self.ch3x3red, self.ch5x5red))

    @property
    def convs(self) -> tuple[ConvShape, ...]:
        """The six convolutions, in the order in which torchvision constructs them."""
        return (
            ConvShape("ch1x1", self.in_channels, self.ch1x1, 1),
            ConvShape("ch3x3red", self.in_channels, self.ch3x3red, 1),
            ConvShape("ch3x3", self.ch3x3red, self.ch3x3, 3),
            ConvShape("ch5x5red", self.in_channels, self.ch5x5red, 1),
            ConvShape("ch5x5", self.ch5x5red, self.ch5x5, self.large_kernel),
            ConvShape("pool_proj", self.in_channels, self.pool_proj, 1),
        )

    @property
    def weight_count(self) -> int:
        """Convolution weights in the module, without biases or norms."""
        return sum(conv.weight_count for conv in self.convs)

    def macs(self, height: int, width: int, batch: int = 1) -> int:
        """Multiply-accumulates of one forward pass on ``[batch, in_channels, height, width]``."""
        return batch * height * width * self.weight_count


def _consecutive(*widths: int) -> Iterator[slice]:
    ends = list(accumulate(widths))
    return (slice(end - width, end) for width, end in zip(widths, ends, strict=True))


GOOGLENET_SPECS: dict[str, InceptionSpec] = {
    "3a": InceptionSpec(192, 64, 96, 128, 16, 32, 32),
    "3b": InceptionSpec(256, 128, 128, 192, 32, 96, 64),
    "4a": InceptionSpec(480, 192, 96, 208, 16, 48, 64),
    "4b": InceptionSpec(512, 160, 112, 224, 24, 64, 64),
    "4c": InceptionSpec(512, 128, 128, 256, 24, 64, 64),
    "4d": InceptionSpec(512, 112, 144, 288, 32, 64, 64),
    "4e": InceptionSpec(528, 256, 160, 320, 32, 128, 128),
    "5a": InceptionSpec(832, 256, 160, 320, 32, 128, 128),
    "5b": InceptionSpec(832, 384, 192, 384, 48, 128, 128),
}
"""The nine Inception modules of GoogLeNet (Szegedy et al., CVPR 2015, Table 1), with the paper's 5x5 in the third branch."""

STEM_WIDTH = 64
"""Output width of conv1 and of the 1x1 reduction before conv2's 3x3 (the paper, Table 1)."""

GOOGLENET_SIDES: dict[str, int] = {"3a": 28, "3b": 28, "4a": 14, "4b": 14, "4c": 14, "4d": 14, "4e": 14, "5a": 7, "5b": 7}
"""Height and width of each module's input when the network's input is 224x224."""

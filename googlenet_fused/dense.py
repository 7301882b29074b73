"""GoogLeNet over whole images: finer feature maps from the same weights, maps of logits, and an FCN for segmentation.

Long et al., *Fully Convolutional Networks for Semantic Segmentation*, CVPR 2015, for FCNs and for strides exchanged for
dilation (section 3.2, "a trous").
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from googlenet_fused.convert import unfuse
from googlenet_fused.features import features
from googlenet_fused.models.same import SameMaxPool2d, SamePadding2d, same_padding
from googlenet_fused.modules import FusedConv2d, FusedInception, block_kind

_CHAIN = (
    *("conv1", "maxpool1", "conv2", "conv3", "maxpool2", "inception3a", "inception3b", "maxpool3"),
    *("inception4a", "inception4b", "inception4c", "inception4d", "inception4e", "maxpool4", "inception5a", "inception5b"),
)
"""The layers that an image passes through, but for norms of the same size."""

_REDUCED: dict[int, tuple[str, ...]] = {32: (), 16: ("maxpool4",), 8: ("maxpool3", "maxpool4")}
"""By output stride: the pools that become dense."""

LAST = "inception5b"
POOLED_SIDE = 7
"""Height and width of the classifier's average pool (the paper, Table 1)."""


class Grid(NamedTuple):
    """Where a feature map's positions lie in the image, along each axis.

    Position p sees pixels symmetrically about ``stride * p + offset``; the first pixel's centre is 0.
    """

    stride: int
    offset: float


PIXELS = Grid(1, 0.0)


class DilatedMaxPool2d(nn.Module):
    """A max pool computed at every position: ``[n, c, h, w] -> [n, c, h', w']``, any floating dtype.

    If every ``step``-th position of its input is the input of ``pool``, then every ``step * pool.stride``-th one of its output
    is the output of ``pool``, at the borders as elsewhere; h' is at most h, and shorter by what no such position needs.
    ``pool`` has stride 1 and keeps the size, or stride 2 and no padding of its own or TensorFlow's.
    """

    def __init__(self, pool: nn.MaxPool2d | SameMaxPool2d, step: int) -> None:
        super().__init__()
        self.kernel_size, self.skipped = _single(pool.kernel_size), _single(pool.stride)
        self.same, self.ceil_mode = isinstance(pool, SameMaxPool2d), isinstance(pool, SameMaxPool2d) or pool.ceil_mode
        self.stride, self.padding, self.dilation = 1, _padding(pool) * step, step
        self.training = pool.training

    def forward(self, x: Tensor) -> Tensor:
        top, bottom = self._margins(x.shape[2])
        left, right = self._margins(x.shape[3])
        padded = F.pad(x, (left, right, top, bottom), value=float("-inf"))
        return F.max_pool2d(padded, self.kernel_size, stride=1, dilation=self.dilation)

    def _margins(self, size: int) -> tuple[int, int]:
        """What to pad along an axis, before and after. Every window then holds an element of the input."""
        step = self.dilation
        coarse = -(-size // step)  # size of the input of the pool that this one stands for
        before = after = self.padding // step
        if self.same:
            before, after = same_padding(coarse, self.kernel_size, self.skipped)
        room = coarse + before + after - self.kernel_size
        windows = (-(-room // self.skipped) if self.ceil_mode else room // self.skipped) + 1
        if windows < 1:
            raise ValueError(
                f"a map of size {size} is too small for a max pool of kernel {self.kernel_size}: enlarge the image"
            )
        length = min(windows * self.skipped * step, size)
        return step * before, length + step * (self.kernel_size - 1) - size - step * before

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, dilation={self.dilation}, for_stride={self.skipped}"


def dense_backbone(model: nn.Module, output_stride: int = 16) -> nn.Module:
    """A plain copy of a GoogLeNet whose inception5b comes at a stride of 32, 16 or 8 pixels. Every weight stays valid.

    For 16 the pool before 5a, for 8 that before 4a too, runs at every position, and what follows is dilated: by 2, and by 4
    after both. With ``step = 32 // output_stride``, ``dense[:, :, ::step, ::step]`` of inception5b is the map of ``model``
    itself, at the borders too and for every image size. The positions between are what ``model`` gives for windows of the same
    size that begin ``output_stride`` pixels further down or right, or twice or thrice as many, where the ends of neither window
    are in sight. The map of an image of h x w, multiples of 32, is ``[n, 1024, h / output_stride, w / output_stride]``; with
    other sizes the pools round as they do in ``model``.

    The auxiliary heads are dropped. The copy's own logits are those of an average over all positions of the dense map. ``fuse``
    fuses what is not dilated; the rest stays plain and the report says so.

    Args:
        model: torchvision's GoogLeNet or this package's, plain or fused.
        output_stride: 32, 16 or 8.

    Raises:
        ValueError: ``output_stride`` is another one; ``model`` is no GoogLeNet of these, or its pools are not max pools of
            stride 2 without padding, as in a model that is dense already.
        TypeError: ``model`` is not an ``nn.Module``.
    """
    if output_stride not in _REDUCED:
        raise ValueError(f"output_stride must be 32, 16 or 8, got {output_stride!r}")
    dense: Any = unfuse(model)
    missing = [name for name in (*_CHAIN, "fc") if not isinstance(getattr(dense, name, None), nn.Module)]
    if missing:
        raise ValueError(f"dense_backbone takes a GoogLeNet; this {type(model).__name__} has no {missing[0]}")
    step = 1
    for name in _CHAIN[_CHAIN.index("maxpool3") :]:
        layer = getattr(dense, name)
        if not name.startswith("maxpool"):
            _dilate(layer, name, step)
        elif type(layer) not in (nn.MaxPool2d, SameMaxPool2d) or _geometry(layer) != (2, 0, 1):
            raise ValueError(f"dense_backbone takes max pools of stride 2 without padding; {name} is {layer}")
        elif name in _REDUCED[output_stride]:
            setattr(dense, name, DilatedMaxPool2d(layer, step))
            step *= 2
    dense.aux1 = dense.aux2 = None
    dense.aux_logits = False
    return dense


def _dilate(block: nn.Module, block_name: str, step: int) -> None:
    """Make a plain Inception module read every ``step``-th position, in place."""
    if step == 1:
        return
    if block_kind(block) != "inception" or any(isinstance(layer, FusedInception | FusedConv2d) for layer in block.modules()):
        raise ValueError(
            f"dense_backbone takes plain Inception modules or those of fuse; {block_name} is a {type(block).__name__}"
        )
    for name, layer in list(block.named_modules()):
        if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
            if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
                raise ValueError(f"dense_backbone takes convolutions padded with zeros; {block_name}.{name} is {layer}")
            layer.dilation = tuple(step * size for size in layer.dilation)
            layer.padding = tuple(step * size for size in layer.padding)
        elif isinstance(layer, nn.MaxPool2d):
            block.set_submodule(name, DilatedMaxPool2d(layer, step))


def _geometry(pool: nn.MaxPool2d | SameMaxPool2d) -> tuple[int, int, int]:
    return _single(pool.stride), _padding(pool), 1 if isinstance(pool, SameMaxPool2d) else _single(pool.dilation)


def _padding(layer: Any) -> int:
    """What is put before an axis; of TensorFlow's, where the layer's input has an even side."""
    if isinstance(layer, SamePadding2d | SameMaxPool2d):
        return same_padding(2 * layer.kernel_size, layer.kernel_size, layer.stride)[0]
    return _single(layer.padding)


def _single(size: int | tuple[int, ...]) -> int:
    if isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise ValueError(f"a layer's geometry must be the same along both axes, got {size}")
    return size[0]


def grid_of(model: nn.Module, layer: str = LAST) -> Grid:
    """Where the output of a layer of a GoogLeNet, dense or not, lies in the image.

    TF-slim's layers lie there in images whose sides are multiples of 32; in others up to 15 pixels further up or left, as the
    sides of their inputs are odd.

    Args:
        model: as :func:`dense_backbone` takes and gives it.
        layer: the name of a convolution block, pool or Inception module of the main path.

    Raises:
        ValueError: ``layer`` is not one of these.
    """
    if layer not in _CHAIN:
        raise ValueError(f"layer must be one of {', '.join(_CHAIN)}, got {layer!r}")
    stride, offset = PIXELS
    for name in _CHAIN[: _CHAIN.index(layer) + 1]:
        if not name.startswith("inception"):  # those see symmetrically
            module: Any = getattr(model, name)
            module = getattr(module, "conv", module)
            extent = _single(getattr(module, "dilation", 1)) * (_single(module.kernel_size) - 1)
            padding = _padding(module)
            if name == "conv1" and isinstance(getattr(model, "pad1", None), SamePadding2d):
                padding += _padding(model.pad1)
            offset += stride * (extent / 2 - padding)
            stride *= _single(module.stride)
    return Grid(stride, offset)


def resample(maps: Tensor, source: Grid, size: tuple[int, int], target: Grid = PIXELS) -> Tensor:
    """Maps ``[n, c, h, w]`` on one grid, bilinearly on another: ``[n, c, *size]``, of the same dtype.

    With the default target, maps of an image's height and width. What lies beyond the outermost positions takes their values.
    """
    dtype = torch.promote_types(maps.dtype, torch.float32)

    def coordinates(length: int, available: int) -> Tensor:
        """In grid_sample's units: -1 and 1 are the outer edges of the first and last position."""
        pixels = torch.arange(length, device=maps.device, dtype=dtype) * target.stride + target.offset
        return ((pixels - source.offset) / source.stride * 2 + 1) / available - 1

    y, x = (coordinates(length, available) for length, available in zip(size, maps.shape[2:], strict=True))
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).expand(maps.shape[0], -1, -1, -1)  # [n, *size, 2]
    return F.grid_sample(maps.to(dtype), points, padding_mode="border", align_corners=False).to(maps.dtype)


class DenseLogits(nn.Module):
    """What :func:`dense_logits` makes. ``grid`` says where the windows' centres lie in the image, for :func:`resample`."""

    def __init__(self, model: nn.Module, output_stride: int, window: int) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.features = features(dense_backbone(model, output_stride), [LAST])
        self.training = self.features.training
        self.window, self.step = window, 32 // output_stride
        stride, offset = grid_of(self.features.model)
        self.grid = Grid(stride, offset + 32 * (window - 1) / 2)

    def forward(self, x: Tensor) -> Tensor:
        backbone: Any = self.features.model
        maps = self.features(x)[LAST]
        extent = self.step * (self.window - 1) + 1
        if extent > min(maps.shape[2:]):
            raise ValueError(
                f"an image of {x.shape[-2]}x{x.shape[-1]} is too small for a window of {self.window} positions 32 pixels "
                f"apart: take window={(min(maps.shape[2:]) - 1) // self.step + 1} or less, or enlarge the image"
            )
        for axis in (2, 3):
            maps = maps.unfold(axis, extent, 1)[..., :: self.step].mean(-1)
        maps = backbone.dropout(maps)  # [n, 1024, h', w']
        return F.conv2d(maps, backbone.fc.weight[:, :, None, None], backbone.fc.bias)


def dense_logits(model: nn.Module, output_stride: int = 16, *, window: int = POOLED_SIDE) -> DenseLogits:
    """The classifier at every place of an image: a module ``[n, 3, h, w] -> [n, num_classes, h', w']``, on a copy of ``model``.

    The logits at (y, x) are ``fc`` of the mean over ``window`` x ``window`` positions, 32 pixels apart, of the dense map of
    inception5b, of which (y, x) is the first. With the default 7, the network's own average pool, an image of 224x224 has at
    (0, 0) the logits of ``model``; of a height h, a multiple of 32, h' is ``(h - 192) / output_stride``. In a larger image
    (y, x) stands for the 224x224 pixels that begin ``output_stride`` times (y, x) further down and right, yet not with the
    logits that these have by themselves: around them the network sees the image, and not zeros.

    Args:
        model, output_stride: as :func:`dense_backbone` takes them.
        window: 7, or 1 for the classifier at single positions (finer, and not what it was trained on).

    Raises:
        ValueError: as :func:`dense_backbone`, or ``window`` is below 1; in a call, the image is too small for a window.
        TypeError: ``model`` is not an ``nn.Module``.
    """
    return DenseLogits(model, output_stride, window)


class FCN(nn.Module):
    """A network for segmentation: ``[n, 3, h, w] -> [n, num_classes, h, w]``, logits, on a copy of a GoogLeNet.

    A 1x1 convolution scores inception5b and each of ``skips``, from coarse to fine: scores are brought bilinearly to the next
    finer grid and added, and in the end brought to the image's pixels. The grids lie where the layers see the image
    (:func:`grid_of`), not where ``interpolate`` would put them. The score layers start at zero, as in Long et al., section
    4.3; there is no dropout, and upsampling is not learned. ``skips=()`` corresponds to their FCN-32s, the default to FCN-16s,
    ``("inception3b", "inception4e")`` to FCN-8s.

    Args:
        model: as :func:`dense_backbone` takes it. Prepare images as for it; TF-slim's want sides that are multiples of 32, or
            the grids are off as :func:`grid_of` says.
        num_classes: of the pixels.
        skips: Inception modules before inception5b, in any order.
        output_stride: of inception5b, 32, 16 or 8. With 16 inception4e is no finer.

    Raises:
        ValueError: as :func:`dense_backbone`; ``num_classes`` is below 1; ``skips`` names something else or one twice.
        TypeError: ``model`` is not an ``nn.Module``.
    """

    def __init__(
        self, model: nn.Module, num_classes: int, skips: Iterable[str] = ("inception4e",), *, output_stride: int = 32
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        allowed = [name for name in _CHAIN if name.startswith("inception") and name != LAST]
        wanted = list(skips)
        if isinstance(skips, str) or not set(wanted) <= set(allowed) or len(set(wanted)) != len(wanted):
            raise ValueError(f"skips must be a list of some of {', '.join(allowed)}, each once, got {skips!r}")
        backbone = dense_backbone(model, output_stride)
        backbone.fc = nn.Identity()  # never runs, and DistributedDataParallel refuses parameters that get no gradients
        layers = [LAST, *(name for name in reversed(allowed) if name in wanted)]
        self.features = features(backbone, layers)
        self.training = backbone.training
        self.grids = {name: grid_of(backbone, name) for name in layers}
        weight = next(backbone.parameters())
        scores = {
            name: nn.Conv2d(_out_channels(getattr(backbone, name)), num_classes, 1, device=weight.device, dtype=weight.dtype)
            for name in layers
        }
        self.scores = nn.ModuleDict(scores)
        for parameter in self.scores.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.features(x)
        total, grid = self.scores[LAST](maps[LAST]), self.grids[LAST]
        for name in self.features.layers[1:]:
            score = self.scores[name](maps[name])
            total = score + resample(total, grid, (score.shape[2], score.shape[3]), self.grids[name])
            grid = self.grids[name]
        return resample(total, grid, (x.shape[2], x.shape[3]))


def _out_channels(block: Any) -> int:
    last = (block.branch1, block.branch2[1], block.branch3[1], block.branch4[1])
    return sum(branch.conv.out_channels for branch in last)

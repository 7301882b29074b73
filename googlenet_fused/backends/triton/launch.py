"""From a module's tensors and a plan to kernel launches. Pure of devices: tensors on ``meta`` give the same launches, unrun."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from googlenet_fused.backends.triton import kernels
from googlenet_fused.backends.triton.plans import Arithmetic, Config, Plan
from googlenet_fused.packing import PackedInception
from googlenet_fused.spec import InceptionSpec

INT32_LIMIT = 2**31 - 2**20
"""Offsets and indices below this, with room for a tile, are computed in 32 bits."""

RESIDENT = 2
"""Programs that a persistent grid has on each multiprocessor."""


REGISTERS = 2**16
"""That a block may have on NVIDIA GPUs; a thread may have 255 of them."""


class Launch(NamedTuple):
    """One kernel launch."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> None:
        self.kernel[(self.programs,)](**self.arguments, **self.options)


class Image(NamedTuple):
    """A [batch, channels, height, width] tensor as the kernels address it."""

    tensor: Tensor
    strides: tuple[int, int, int, int]  # of image, row, pixel and channel
    dense: bool  # pixels follow one another at the pixel stride

    @classmethod
    def of(cls, tensor: Tensor) -> Image:
        (n, _, h, w), (stride_n, stride_c, stride_h, stride_w) = tensor.shape, tensor.stride()
        pixel = stride_w if w > 1 else stride_h if h > 1 else stride_n
        dense = (h == 1 or stride_h == w * pixel) and (n == 1 or stride_n == h * w * pixel)
        return cls(tensor, (stride_n, stride_h, pixel if dense else stride_w, stride_c), dense)

    @property
    def farthest(self) -> int:
        """An upper bound of offsets along rows and channels."""
        channels = self.tensor.shape[1]
        _, stride_h, stride_w, stride_c = map(abs, self.strides)
        return max(channels * stride_c, stride_h + stride_w)


class Padded(NamedTuple):
    """The geometry of a flat padded buffer (``kernels``) for a convolution of ``kernel_size``."""

    batch: int
    height: int
    width: int
    kernel_size: int

    @property
    def padding(self) -> int:
        return self.kernel_size // 2

    @property
    def positions(self) -> int:
        pad = self.padding
        return (self.batch * (self.height + pad) + pad) * (self.width + pad) + pad

    @property
    def outputs(self) -> int:
        """Positions from the first output pixel to the last and its border."""
        return self.batch * (self.height + self.padding) * (self.width + self.padding)


class Weights(NamedTuple):
    """A module's packed weights as matrices: [shared, in], [ch3x3, 9 * ch3x3red] with taps before channels, and so on."""

    shared: Tensor
    shared_bias: Tensor
    ch3x3: Tensor
    ch3x3_bias: Tensor
    ch5x5: Tensor
    ch5x5_bias: Tensor
    pool_proj: Tensor
    pool_proj_bias: Tensor

    @classmethod
    def of(cls, packed: PackedInception) -> Weights:
        """Views, where the packed weights are channels_last as they should be."""
        # Detached, because a view keeps the tensor itself alive, by whose life its own is bounded in the cache.
        return cls(
            *(t.detach().movedim(1, -1).flatten(1).contiguous() if t.dim() == 4 else t.detach().contiguous() for t in packed)
        )


def launches(
    x: Tensor, spec: InceptionSpec, weights: Weights, out: Tensor, plan: Plan, arithmetic: Arithmetic, multiprocessors: int
) -> list[Launch]:
    """The launches that write all four branches of a module into ``out``, in their order.

    Args:
        x: input ``[n, in_channels, h, w]``, any strides, not empty; fp16, bf16 or fp32.
        weights: of x's dtype and device.
        out: the concat buffer ``[n, out_channels, h, w]``, any strides.
    """
    build = _merged if plan.form == "merged" else _fused
    return build(_Module(spec, weights, Image.of(x), Image.of(out), plan, arithmetic, multiprocessors))


class _Module:
    """What the launches of one module share."""

    def __init__(
        self,
        spec: InceptionSpec,
        weights: Weights,
        x: Image,
        out: Image,
        plan: Plan,
        arithmetic: Arithmetic,
        multiprocessors: int,
    ) -> None:
        self.spec, self.weights, self.x, self.out, self.plan = spec, weights, x, out, plan
        self.multiprocessors = multiprocessors
        n, _, h, w = x.tensor.shape
        self.size = {"batch": n, "height": h, "width": w}
        self.padded = {kernel: Padded(n, h, w, kernel) for kernel in (3, self.spec.large_kernel)}
        longest_row = self.spec.large_kernel * (w + 2) * max(self.spec.ch3x3red, self.spec.ch5x5red)
        positions = max(padded.positions for padded in self.padded.values())
        self.wide = max(positions, longest_row, x.farthest, out.farthest) > INT32_LIMIT
        self.common = {
            "WIDE": self.wide,
            "PDL": plan.pdl,
            "PRECISION": "tf32" if arithmetic == "tf32" else "ieee",
        }

    @property
    def pixels(self) -> int:
        return self.size["batch"] * self.size["height"] * self.size["width"]

    def workspace(self, rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=self.x.tensor.dtype, device=self.x.tensor.device)

    def descriptor(self, tensor: Tensor, shape: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> Any:
        """A tensor descriptor, or None where the tensor permits none: addresses must be of 16 bytes, sizes of 32 bits, and no
        two indices of one element."""
        aligned = tensor.data_ptr() % 16 == 0 and all(stride * tensor.itemsize % 16 == 0 for stride in strides[:-1])
        spans = (size * stride for size, stride in zip(shape[1:], strides[1:], strict=True))
        apart = all(stride >= span for stride, span in zip(strides[:-1], spans, strict=True))
        if not aligned or not apart or strides[-1] != 1 or max(shape) > INT32_LIMIT:
            return None
        return TensorDescriptor(tensor, list(shape), list(strides), list(box))

    def launch(self, kernel: Any, programs: int, config: Config, arguments: dict[str, Any]) -> Launch:
        options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
        if torch.version.hip is None:
            # Without it ptxas spills a few values to fit more blocks on a multiprocessor.
            options["maxnreg"] = min(255, REGISTERS // (32 * config.warps) // 8 * 8)
        if self.plan.pdl:
            options["launch_pdl"] = True
        return Launch(kernel, programs, {**arguments, **self.size, **self.common}, options)


def _strides(name: str, image: Image) -> dict[str, int]:
    return {f"{name}_{axis}": stride for axis, stride in zip("nhwc", image.strides, strict=True)}


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _pointwise(module: _Module, reduced3: Tensor | None = None, reduced5: Tensor | None = None) -> Launch:
    spec, weights, x, plan = module.spec, module.weights, module.x, module.plan
    config, c = plan.pointwise, spec.in_channels
    shared = spec.ch1x1 if reduced3 is None else spec.shared_channels
    tiles = _cdiv(module.pixels, config.rows) * _cdiv(shared, config.columns)
    pool = _pool_tile(config, spec.pool_proj)
    tiles += _cdiv(module.pixels, pool.rows) * _cdiv(spec.pool_proj, pool.columns)
    borders = 0 if reduced3 is None else sum(_cdiv(module.padded[k].positions, config.rows) for k in (3, spec.large_kernel))
    x_desc = weight_desc = None
    if plan.pointwise_tma and x.dense:
        x_desc = module.descriptor(x.tensor, (module.pixels, c), x.strides[2:], (config.rows, config.depth))
        weight_desc = module.descriptor(weights.shared, (shared, c), (c, 1), (config.columns, config.depth))
    if x_desc is None or weight_desc is None:
        x_desc = weight_desc = None
    return module.launch(
        kernels.googlenet_fused_pointwise,
        tiles + borders,
        config,
        dict(
            x=x.tensor,
            x_desc=x_desc,
            shared_weight=weights.shared,
            shared_weight_desc=weight_desc,
            shared_bias=weights.shared_bias,
            pool_weight=weights.pool_proj,
            pool_bias=weights.pool_proj_bias,
            out=module.out.tensor,
            reduced3=reduced3,
            reduced5=reduced5,
            **_strides("x", x),
            **_strides("out", module.out),
            C=c,
            CH1X1=spec.ch1x1,
            CH3X3RED=spec.ch3x3red,
            CH5X5RED=spec.ch5x5red,
            POOL_PROJ=spec.pool_proj,
            POOL_OFFSET=spec.slices.pool_proj.start,
            LARGE_KERNEL=spec.large_kernel,
            BM=config.rows,
            BN=config.columns,
            BK=config.depth,
            POOL_BM=pool.rows,
            POOL_BN=pool.columns,
            POOL_BK=pool.depth,
            X_DENSE=x.dense,
            OUT_DENSE=module.out.dense,
        ),
    )


def _pool_tile(config: Config, width: int) -> Config:
    """The pooled projection's: 8 values a thread of the input in registers at a time, and of three neighbours each."""
    depth = min(config.depth, 32)
    rows = min(config.rows, 32 * 8 * config.warps // depth)
    return replace(config, rows=rows, columns=_columns(config, width, depth), depth=depth)


def _merged(module: _Module) -> list[Launch]:
    spec, weights, config = module.spec, module.weights, module.plan.spatial
    reduced3 = module.workspace(module.padded[3].positions, spec.ch3x3red)
    reduced5 = module.workspace(module.padded[spec.large_kernel].positions, spec.ch5x5red)
    small = _convolution(module, 3, reduced3, weights.ch3x3)
    large = _convolution(module, spec.large_kernel, reduced5, weights.ch5x5)
    spatial = module.launch(
        kernels.googlenet_fused_spatial,
        min(small.tiles + large.tiles, RESIDENT * module.multiprocessors),
        config,
        dict(
            reduced3=reduced3,
            reduced3_desc=small.reduced_desc,
            weight3=weights.ch3x3,
            weight3_desc=small.weight_desc,
            bias3=weights.ch3x3_bias,
            reduced5=reduced5,
            reduced5_desc=large.reduced_desc,
            weight5=weights.ch5x5,
            weight5_desc=large.weight_desc,
            bias5=weights.ch5x5_bias,
            out=module.out.tensor,
            **_strides("out", module.out),
            tiles3=small.tiles,
            tiles5=large.tiles,
            CH3X3RED=spec.ch3x3red,
            CH3X3=spec.ch3x3,
            OFFSET3=spec.slices.ch3x3.start,
            CH5X5RED=spec.ch5x5red,
            CH5X5=spec.ch5x5,
            OFFSET5=spec.slices.ch5x5.start,
            LARGE_KERNEL=spec.large_kernel,
            BM=config.rows,
            BN3=small.columns,
            BK3=small.depth,
            BN5=large.columns,
            BK5=large.depth,
            OUT_DENSE=module.out.dense,
        ),
    )
    return [_pointwise(module, reduced3, reduced5), spatial]


class _Convolution(NamedTuple):
    """How the spatial kernel runs one of its two convolutions."""

    reduced_desc: Any
    weight_desc: Any
    columns: int
    depth: int
    tiles: int


def _convolution(module: _Module, kernel: int, reduced: Tensor, weight: Tensor) -> _Convolution:
    config, padded, taps = module.plan.spatial, module.padded[kernel], kernel * kernel
    (positions, r), o = reduced.shape, weight.shape[0]
    columns, depth = _columns(config, o, config.depth), min(config.depth, _power_of_2(r))
    if module.plan.spatial_tma:
        reduced_desc = module.descriptor(reduced, (positions, r), (r, 1), (config.rows, depth))
        weight_desc = module.descriptor(weight, (o, taps, r), (taps * r, r, 1), (columns, 1, depth))
        if reduced_desc is not None and weight_desc is not None:
            tiles = _cdiv(padded.outputs, config.rows) * _cdiv(o, columns)
            return _Convolution(reduced_desc, weight_desc, columns, depth, tiles)
    return _Convolution(None, None, columns, config.depth, _cdiv(module.pixels, config.rows) * _cdiv(o, columns))


def _columns(config: Config, width: int, depth: int) -> int:
    """The tile's columns, but no more than ``width`` needs and a thread needs to load 8 weights a step, 16 bytes of fp16."""
    return min(config.columns, max(_power_of_2(width), 32 * 8 * config.warps // depth))


def _power_of_2(width: int) -> int:
    """The least one, 16 or more, that is no less."""
    return max(16, 1 << (width - 1).bit_length())


def _fused(module: _Module) -> list[Launch]:
    spec, weights, shared = module.spec, module.weights, module.spec.shared_slices
    return [
        _pointwise(module),
        _branch(module, 3, shared.ch3x3red, weights.ch3x3, weights.ch3x3_bias, spec.slices.ch3x3),
        _branch(module, spec.large_kernel, shared.ch5x5red, weights.ch5x5, weights.ch5x5_bias, spec.slices.ch5x5),
    ]


def _branch(module: _Module, kernel: int, reduce: slice, weight: Tensor, bias: Tensor, channels: slice) -> Launch:
    spec, x, config = module.spec, module.x, module.plan.spatial
    r, o, pad = reduce.stop - reduce.start, weight.shape[0], kernel // 2
    columns = _columns(config, o, config.depth)
    tile = branch_tile(**module.size, kernel=kernel, column_tiles=_cdiv(o, columns), multiprocessors=module.multiprocessors)
    positions = Padded(tile.images, tile.rows, module.size["width"], kernel).positions
    scratch_pitch = _cdiv(positions * r, 16) * 16
    programs = min(tile.tiles, RESIDENT * module.multiprocessors)
    return module.launch(
        kernels.googlenet_fused_branch,
        programs,
        config,
        dict(
            x=x.tensor,
            reduce_weight=module.weights.shared[reduce],
            reduce_bias=module.weights.shared_bias[reduce],
            weight=weight,
            bias=bias,
            scratch=module.workspace(programs, scratch_pitch),
            out=module.out.tensor,
            **_strides("x", x),
            **_strides("out", module.out),
            tiles=tile.tiles,
            tile_images=tile.images,
            tile_rows=tile.rows,
            image_pitch=tile.rows + pad if tile.images > 1 else tile.rows + 2 * pad + 1,
            splits=tile.splits,
            scratch_pitch=scratch_pitch,
            C=spec.in_channels,
            R=r,
            COLUMNS=o,
            OFFSET=channels.start,
            KERNEL=kernel,
            BP=config.rows,
            BR=_columns(config, r, config.depth),
            BM=config.rows,
            BN=columns,
            BK=config.depth,
        ),
    )


class BranchTile(NamedTuple):
    """What one program of the branch kernel computes: so many images and rows, and one of ``splits`` parts of the columns."""

    images: int
    rows: int
    splits: int
    tiles: int


def branch_tile(
    *, batch: int, height: int, width: int, kernel: int, column_tiles: int, multiprocessors: int, pixels: int = 256
) -> BranchTile:
    """Tiles of about ``pixels``: the halo is computed again by each neighbour, so the fewer rows the more is wasted.

    Where there are fewer tiles than multiprocessors the output columns are split too, though each part computes the bottleneck.
    """
    area = height * width
    if area >= pixels:
        images, row_tiles = 1, _cdiv(height, max(kernel, pixels // width))
    else:
        images, row_tiles = max(1, min(pixels // area, batch // multiprocessors)), 1
    tiles = _cdiv(batch, images) * row_tiles
    splits = min(column_tiles, max(1, multiprocessors // tiles))
    splits = _cdiv(column_tiles, _cdiv(column_tiles, splits))  # none of them empty
    return BranchTile(images, _cdiv(height, row_tiles), splits, tiles * splits)

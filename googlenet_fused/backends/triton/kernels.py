"""The Triton kernels of an Inception module. Activations are [pixels, channels] matrices, best with channels innermost.

Two forms. Merged, two launches: ``googlenet_fused_pointwise`` is one product for all 1x1 convolutions that read the input, with
an epilogue that scatters to the concat buffer and to two bottleneck buffers, beside the pooled projection;
``googlenet_fused_spatial`` runs the 3x3 and 5x5 on those buffers. Fused, three launches: the pointwise kernel without the
reductions, and ``googlenet_fused_branch`` for each of the two, which keeps the bottleneck of its tile in a scratch of its own.

A bottleneck is stored flat and zero-padded, so that every tap of a convolution is one constant added to a pixel's address: rows
of ``width + P`` pixels and images of ``height + P`` rows, with P = kernel // 2. The P zeros right of a row are also those left
of the next, those below an image also those above the next, and P rows and P pixels of zeros come first. With
``at(n, y, x) = (n * (height + P) + y) * (width + P) + x``, pixel (n, y, x) lies P rows and P pixels behind ``at``, and an
output pixel finds tap (i, j) at ``at + i * (width + P) + j``. Weights are [out, kernel, kernel, in], so that the taps of a row
of the kernel are contiguous in both operands.

Every name has the package's in it, by which profilers and sanitizers are told what to look at.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Not specialised: another batch or image size runs the code that there is, unless it gives strides another divisibility.
_SIZES = (
    *("batch", "height", "width"),
    *("tiles", "tiles3", "tiles5", "tile_images", "tile_rows", "image_pitch", "splits"),
)


@triton.jit
def _begin(PDL: tl.constexpr):
    """With programmatic dependent launch: the next kernel may be brought in, and the one before must have ended."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _index(value, WIDE: tl.constexpr):
    """``value`` in 64 bits where offsets need them."""
    if WIDE:
        value = tl.cast(value, tl.int64)
    return value


@triton.jit
def _relu(value):
    return tl.where(value <= 0, 0.0, value)  # keeps NaN, as torch does


@triton.jit
def _unravel(m, height, width, WIDE: tl.constexpr):
    """Image, row and column of pixel ``m``."""
    area = _index(height, WIDE) * width
    return m // area, m % area // width, m % area % width


@triton.jit
def _offsets(m, height, width, stride_n, stride_h, stride_w, DENSE: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of pixels ``m [BM]`` in elements; DENSE: pixels follow one another at ``stride_w``."""
    if DENSE:
        offsets = m.to(tl.int64) * stride_w
    else:
        n, y, x = _unravel(m, height, width, WIDE)
        offsets = n.to(tl.int64) * stride_n + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
    return offsets


@triton.jit
def _flat(m, height, width, P: tl.constexpr, WIDE: tl.constexpr):
    """``at`` of pixels ``m [BM]`` in a flat padded buffer."""
    n, y, x = _unravel(m, height, width, WIDE)
    return (n.to(tl.int64) * (height + P) + y) * (width + P) + x


@triton.jit
def _weight_tile(weight, columns, k, COLUMNS: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """[BK, BN] of ``weight [COLUMNS, K]``, transposed; columns past the last repeat it."""
    pointers = weight + _index(tl.minimum(columns, COLUMNS - 1), COLUMNS * K >= 2**31)[None, :] * K + k[:, None]
    if K % BK == 0:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(k < K)[:, None], other=0.0)
    return tile


@triton.jit
def _bias_relu(acc, bias, columns, COLUMNS: tl.constexpr):
    """relu(acc + bias), 0 in columns past the last: there ``acc`` is not, if the input holds infinities."""
    inside = columns < COLUMNS
    values = tl.load(bias + columns, mask=inside, other=0.0)  # narrow: one vector a tile
    acc = _relu(acc + values.to(tl.float32)[None, :])
    return tl.where(inside[None, :], acc, 0.0)


@triton.jit
def _product(
    rows, stride_c, weight, columns,
    COLUMNS: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BM, BN] of pixels x weights; ``rows [BM]`` points at the pixels, ``weight`` is [COLUMNS, C]."""
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, C, BK):
        k = k0 + tl.arange(0, BK)
        pointers = rows[:, None] + (_index(k, WIDE) * stride_c)[None, :]
        if C % BK == 0:
            a = tl.load(pointers)
        else:
            a = tl.load(pointers, mask=(k < C)[None, :], other=0.0)
        acc = tl.dot(a, _weight_tile(weight, columns, k, COLUMNS, C, BK), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _product_tma(
    x, row, weight, column,
    C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``_product`` by tensor descriptors: ``x`` [pixels, C] in boxes [BM, BK], ``weight`` [columns, C] in boxes [BN, BK]."""
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, C, BK):
        acc = tl.dot(x.load([row, k0]), weight.load([column, k0]).T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _pooled_product(
    x, m, height, width, x_n, x_h, x_w, x_c, weight, columns,
    COLUMNS: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    X_DENSE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``_product`` of the 3x3 maximum around each pixel, minus infinity outside of the image and NaN kept."""
    _, y, column = _unravel(m, height, width, WIDE)
    rows = x + _offsets(m, height, width, x_n, x_h, x_w, X_DENSE, WIDE)
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in tl.range(0, C, BK, num_stages=1):  # nine tiles a stage would fill shared memory
        k = k0 + tl.arange(0, BK)
        pointers = rows[:, None] + (_index(k, WIDE) * x_c)[None, :]
        largest = tl.full((BM, BK), float("-inf"), x.dtype.element_ty)
        for dy in tl.range(-1, 2):  # not unrolled, or registers would hold all nine
            for dx in tl.static_range(-1, 2):
                inside = (y + dy >= 0) & (y + dy < height) & (column + dx >= 0) & (column + dx < width)
                mask = inside[:, None]
                if C % BK != 0:
                    mask &= (k < C)[None, :]
                value = tl.load(pointers + (dy * _index(x_h, WIDE) + dx * x_w), mask=mask, other=float("-inf"))
                # Of bfloat16 the maximum is float32.
                largest = tl.maximum(largest, value, propagate_nan=tl.PropagateNan.ALL).to(x.dtype.element_ty)
        if C % BK != 0:
            largest = tl.where((k < C)[None, :], largest, 0.0)
        acc = tl.dot(largest, _weight_tile(weight, columns, k, COLUMNS, C, BK), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _convolution(
    rows, weight, columns, pitch,
    COLUMNS: tl.constexpr, R: tl.constexpr, KERNEL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BM, BN] of a convolution over a flat padded buffer [positions, R] whose rows are ``pitch`` pixels apart.

    ``rows [BM]`` points at ``at`` of the output pixels. Taps and channels are one sum of length KERNEL * KERNEL * R, so that no
    channel count needs padding to BK.
    """
    K: tl.constexpr = KERNEL * KERNEL * R
    SPAN: tl.constexpr = KERNEL * R
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        pointers = rows[:, None] + (k + k // SPAN * (_index(pitch - KERNEL, WIDE) * R))[None, :]
        if K % BK == 0:
            a = tl.load(pointers)
        else:
            a = tl.load(pointers, mask=(k < K)[None, :], other=0.0)
        acc = tl.dot(a, _weight_tile(weight, columns, k, COLUMNS, K, BK), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _convolution_tma(
    reduced, first, weight, column, pitch,
    R: tl.constexpr, KERNEL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``_convolution`` for the output pixels whose ``at`` are first, first + 1, ..., by tensor descriptors.

    ``reduced`` of [positions, R] in boxes [BM, BK], ``weight`` of [columns, KERNEL * KERNEL, R] in boxes [BN, 1, BK]. What lies
    outside of either is 0, so that the last channels of a tap need no mask.
    """
    PARTS: tl.constexpr = (R + BK - 1) // BK
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(KERNEL * KERNEL * PARTS):
        tap = step // PARTS
        k0 = step % PARTS * BK
        a = reduced.load([first + tap // KERNEL * pitch + tap % KERNEL, k0])
        b = weight.load([column, tap, k0]).reshape(BN, BK)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _zero_border(
    reduced, tile, batch, height, width,
    R: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Zeros into the border positions among the BM of a tile of a flat padded buffer [positions, R]."""
    pitch = width + P
    position = _index(tile, WIDE) * BM + tl.arange(0, BM)
    at = position - P * (pitch + 1)
    row = at // pitch
    inside = (at >= 0) & (at % pitch < width) & (row % (height + P) < height) & (row // (height + P) < batch)
    border = (position < (_index(batch, WIDE) * (height + P) + P) * pitch + P) & ~inside
    zeros = tl.zeros((BM, BK), reduced.dtype.element_ty)
    for r0 in range(0, R, BK):
        r = r0 + tl.arange(0, BK)
        tl.store(reduced + (position.to(tl.int64) * R)[:, None] + r[None, :], zeros, mask=border[:, None] & (r < R)[None, :])


@triton.jit
def _store_slice(
    base, rows, columns, stride, value, valid,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, OFFSET: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Columns FIRST to FIRST + WIDTH of ``value [BM, BN]`` at channel OFFSET of the pixels at offsets ``rows [BM]``."""
    inside = (columns >= FIRST) & (columns < FIRST + WIDTH)
    channels = _index(columns - FIRST + OFFSET, WIDE) * stride
    tl.store(base + rows[:, None] + channels[None, :], value, mask=valid[:, None] & inside[None, :])


@triton.jit(do_not_specialize=_SIZES)
def googlenet_fused_pointwise(
    x, x_desc, shared_weight, shared_weight_desc, shared_bias, pool_weight, pool_bias, out, reduced3, reduced5,
    batch, height, width, x_n, x_h, x_w, x_c, out_n, out_h, out_w, out_c,
    C: tl.constexpr, CH1X1: tl.constexpr, CH3X3RED: tl.constexpr, CH5X5RED: tl.constexpr,
    POOL_PROJ: tl.constexpr, POOL_OFFSET: tl.constexpr, LARGE_KERNEL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    POOL_BM: tl.constexpr, POOL_BN: tl.constexpr, POOL_BK: tl.constexpr,
    X_DENSE: tl.constexpr, OUT_DENSE: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The 1x1 convolutions of the input and of the pooled input, with bias and ReLU.

    One program a tile: first the pooled tiles, which take longest, then those of the merged product, then the borders of the
    bottleneck buffers. Without ``reduced3`` and ``reduced5`` only the branches that end here are computed.

    x: [batch, height, width, C] at strides x_*; out likewise, branches at channels 0 and POOL_OFFSET.
    shared_weight: [CH1X1 + CH3X3RED + CH5X5RED, C]; pool_weight: [POOL_PROJ, C].
    reduced3, reduced5: flat padded buffers [positions, CH3X3RED], [positions, CH5X5RED], or None.
    x_desc, shared_weight_desc: tensor descriptors of x as [pixels, C] and of shared_weight, or None.
    """
    _begin(PDL)
    WITH_REDUCED: tl.constexpr = reduced3 is not None
    SHARED: tl.constexpr = CH1X1 + CH3X3RED + CH5X5RED if WITH_REDUCED else CH1X1
    SHARED_TILES: tl.constexpr = (SHARED + BN - 1) // BN
    POOL_TILES: tl.constexpr = (POOL_PROJ + POOL_BN - 1) // POOL_BN
    pixels = _index(batch, WIDE) * height * width
    tile = tl.program_id(0)
    pooled = tl.cdiv(pixels, POOL_BM).to(tl.int32) * POOL_TILES
    shared = tl.cdiv(pixels, BM).to(tl.int32) * SHARED_TILES
    if tile < pooled:
        columns = tile % POOL_TILES * POOL_BN + tl.arange(0, POOL_BN)
        m = _index(tile // POOL_TILES, WIDE) * POOL_BM + tl.arange(0, POOL_BM)
        valid = m < pixels
        m = tl.minimum(m, pixels - 1)
        acc = _pooled_product(
            x, m, height, width, x_n, x_h, x_w, x_c, pool_weight, columns,
            POOL_PROJ, C, POOL_BM, POOL_BN, POOL_BK, X_DENSE, WIDE, PRECISION,
        )  # fmt: skip
        value = _bias_relu(acc, pool_bias, columns, POOL_PROJ).to(out.dtype.element_ty)
        rows = _offsets(m, height, width, out_n, out_h, out_w, OUT_DENSE, WIDE)
        _store_slice(out, rows, columns, out_c, value, valid, 0, POOL_PROJ, POOL_OFFSET, WIDE)
    elif tile < pooled + shared:
        row_tile = (tile - pooled) // SHARED_TILES
        column = (tile - pooled) % SHARED_TILES * BN
        columns = column + tl.arange(0, BN)
        m = _index(row_tile, WIDE) * BM + tl.arange(0, BM)
        valid = m < pixels
        m = tl.minimum(m, pixels - 1)
        if x_desc is not None:
            acc = _product_tma(x_desc, row_tile * BM, shared_weight_desc, column, C, BM, BN, BK, PRECISION)
        else:
            x_rows = x + _offsets(m, height, width, x_n, x_h, x_w, X_DENSE, WIDE)
            acc = _product(x_rows, x_c, shared_weight, columns, SHARED, C, BM, BN, BK, WIDE, PRECISION)
        value = _bias_relu(acc, shared_bias, columns, SHARED).to(out.dtype.element_ty)
        if column < CH1X1:
            rows = _offsets(m, height, width, out_n, out_h, out_w, OUT_DENSE, WIDE)
            _store_slice(out, rows, columns, out_c, value, valid, 0, CH1X1, 0, WIDE)
        if WITH_REDUCED:
            FIRST5: tl.constexpr = CH1X1 + CH3X3RED
            if (column + BN > CH1X1) & (column < FIRST5):
                rows3 = (_flat(m, height, width, 1, WIDE) + (width + 1 + 1)) * CH3X3RED
                _store_slice(reduced3, rows3, columns, 1, value, valid, CH1X1, CH3X3RED, 0, WIDE)
            if column + BN > FIRST5:
                P: tl.constexpr = LARGE_KERNEL // 2
                rows5 = (_flat(m, height, width, P, WIDE) + P * (width + P + 1)) * CH5X5RED
                _store_slice(reduced5, rows5, columns, 1, value, valid, FIRST5, CH5X5RED, 0, WIDE)
    elif WITH_REDUCED:
        tile -= pooled + shared
        border3 = tl.cdiv((_index(batch, WIDE) * (height + 1) + 1) * (width + 1) + 1, BM).to(tl.int32)
        if tile < border3:
            _zero_border(reduced3, tile, batch, height, width, CH3X3RED, 1, BM, BK, WIDE)
        else:
            _zero_border(reduced5, tile - border3, batch, height, width, CH5X5RED, LARGE_KERNEL // 2, BM, BK, WIDE)


@triton.jit
def _spatial_tile(
    reduced, reduced_desc, weight, weight_desc, bias, out, tile, batch, height, width, out_n, out_h, out_w, out_c,
    R: tl.constexpr, COLUMNS: tl.constexpr, OFFSET: tl.constexpr, KERNEL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    OUT_DENSE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of a 3x3 or 5x5 convolution with bias and ReLU: of BM output pixels or, by descriptors, of BM positions without
    those in the border."""
    P: tl.constexpr = KERNEL // 2
    TILES: tl.constexpr = (COLUMNS + BN - 1) // BN
    pitch = width + P
    column = tile % TILES * BN
    columns = column + tl.arange(0, BN)
    m = _index(tile // TILES, WIDE) * BM + tl.arange(0, BM)
    if reduced_desc is not None:
        n, y, x = _unravel(m, height + P, pitch, WIDE)
        valid = (n < batch) & (y < height) & (x < width)
        rows = n.to(tl.int64) * out_n + y.to(tl.int64) * out_h + x.to(tl.int64) * out_w
        acc = _convolution_tma(reduced_desc, tile // TILES * BM, weight_desc, column, pitch, R, KERNEL, BM, BN, BK, PRECISION)
    else:
        pixels = _index(batch, WIDE) * height * width
        valid = m < pixels
        m = tl.minimum(m, pixels - 1)
        rows = _offsets(m, height, width, out_n, out_h, out_w, OUT_DENSE, WIDE)
        at = reduced + _flat(m, height, width, P, WIDE) * R
        acc = _convolution(at, weight, columns, pitch, COLUMNS, R, KERNEL, BM, BN, BK, WIDE, PRECISION)
    value = _bias_relu(acc, bias, columns, COLUMNS).to(out.dtype.element_ty)
    _store_slice(out, rows, columns, out_c, value, valid, 0, COLUMNS, OFFSET, WIDE)


@triton.jit(do_not_specialize=_SIZES)
def googlenet_fused_spatial(
    reduced3, reduced3_desc, weight3, weight3_desc, bias3, reduced5, reduced5_desc, weight5, weight5_desc, bias5, out,
    batch, height, width, out_n, out_h, out_w, out_c, tiles3, tiles5,
    CH3X3RED: tl.constexpr, CH3X3: tl.constexpr, OFFSET3: tl.constexpr,
    CH5X5RED: tl.constexpr, CH5X5: tl.constexpr, OFFSET5: tl.constexpr, LARGE_KERNEL: tl.constexpr,
    BM: tl.constexpr, BN3: tl.constexpr, BK3: tl.constexpr, BN5: tl.constexpr, BK5: tl.constexpr,
    OUT_DENSE: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The 3x3 and the 5x5 convolution over the bottleneck buffers, with bias and ReLU, in one persistent grid.

    tiles3, tiles5: how many tiles each has; the 3x3's come first, since they take longer.
    reduced3, reduced5: flat padded buffers; weight3: [CH3X3, 3, 3, CH3X3RED], weight5 likewise. The descriptors are those of
    ``_convolution_tma``, or None.
    out: [batch, height, width, channels] at strides out_*, the branches at channels OFFSET3 and OFFSET5.
    """
    _begin(PDL)
    for tile in range(tl.program_id(0), tiles3 + tiles5, tl.num_programs(0)):
        if tile < tiles3:
            _spatial_tile(
                reduced3, reduced3_desc, weight3, weight3_desc, bias3, out, tile,
                batch, height, width, out_n, out_h, out_w, out_c,
                CH3X3RED, CH3X3, OFFSET3, 3, BM, BN3, BK3, OUT_DENSE, WIDE, PRECISION,
            )  # fmt: skip
        else:
            _spatial_tile(
                reduced5, reduced5_desc, weight5, weight5_desc, bias5, out, tile - tiles3,
                batch, height, width, out_n, out_h, out_w, out_c,
                CH5X5RED, CH5X5, OFFSET5, LARGE_KERNEL, BM, BN5, BK5, OUT_DENSE, WIDE, PRECISION,
            )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def googlenet_fused_branch(
    x, reduce_weight, reduce_bias, weight, bias, scratch, out,
    batch, height, width, x_n, x_h, x_w, x_c, out_n, out_h, out_w, out_c,
    tiles, tile_images, tile_rows, image_pitch, splits, scratch_pitch,
    C: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr, OFFSET: tl.constexpr, KERNEL: tl.constexpr,
    BP: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    WIDE: tl.constexpr, PDL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A branch of two convolutions, 1x1 then 3x3 or 5x5, each with bias and ReLU, in a persistent grid.

    A tile is ``tile_rows`` rows of an image or ``tile_images`` whole images, and one of ``splits`` parts of the output columns.
    Its program computes the bottleneck of all its pixels and their halo, zeros outside of the image, in a flat padded scratch
    of its own, which stays in the cache, and then convolves that.

    image_pitch: rows from one image of a tile to the next in the scratch: height + P, or for a single image more than it has.
    scratch: [programs, scratch_pitch] elements. reduce_weight: [R, C]; weight: [COLUMNS, KERNEL, KERNEL, R].
    out: [batch, height, width, channels] at strides out_*, the branch at channel OFFSET.
    """
    _begin(PDL)
    P: tl.constexpr = KERNEL // 2
    pitch = width + P
    row_tiles = tl.cdiv(height, tile_rows)
    positions = (_index(tile_images, WIDE) * (tile_rows + P) + P) * pitch + P
    column_tiles = tl.cdiv(tl.cdiv(COLUMNS, BN), splits)  # of a split
    mine = scratch + tl.program_id(0).to(tl.int64) * scratch_pitch
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        split = tile % splits
        first_row = tile // splits % row_tiles * tile_rows
        first_image = tile // splits // row_tiles * tile_images
        for p0 in range(0, positions, BP):
            p = p0 + tl.arange(0, BP)
            row = p // pitch
            n = first_image + row // image_pitch
            y = first_row + row % image_pitch - P
            column = p % pitch - P
            inside = (y >= 0) & (y < height) & (column >= 0) & (n < batch)
            # Clamped, and not chosen by ``inside``: a choice would hide from the compiler what the offsets are multiples of.
            n = tl.minimum(n, batch - 1).to(tl.int64)
            y = tl.minimum(tl.maximum(y, 0), height - 1).to(tl.int64)
            rows = x + n * x_n + y * x_h + tl.maximum(column, 0).to(tl.int64) * x_w
            for r0 in range(0, R, BR):
                r = r0 + tl.arange(0, BR)
                acc = _product(rows, x_c, reduce_weight, r, R, C, BP, BR, BK, WIDE, PRECISION)
                value = tl.where(inside[:, None], _bias_relu(acc, reduce_bias, r, R), 0.0).to(x.dtype.element_ty)
                pointers = mine + (p.to(tl.int64) * R)[:, None] + r[None, :]
                tl.store(pointers, value, mask=(p < positions)[:, None] & (r < R)[None, :])
        tl.debug_barrier()  # the program's threads read what others of them wrote
        area = _index(tile_rows, WIDE) * width
        for m0 in range(0, tile_images * area, BM):
            m = m0 + tl.arange(0, BM)
            n = first_image + m // area
            y = first_row + m % area // width
            column = m % area % width
            valid = (m < tile_images * area) & (y < height) & (n < batch)
            m = tl.minimum(m, tile_images * area - 1)
            at = mine + ((m // area * image_pitch + m % area // width) * pitch + m % area % width).to(tl.int64) * R
            out_rows = n.to(tl.int64) * out_n + y.to(tl.int64) * out_h + column.to(tl.int64) * out_w
            for column_tile in range(split * column_tiles, tl.minimum((split + 1) * column_tiles, tl.cdiv(COLUMNS, BN))):
                columns = column_tile * BN + tl.arange(0, BN)
                acc = _convolution(at, weight, columns, pitch, COLUMNS, R, KERNEL, BM, BN, BK, WIDE, PRECISION)
                value = _bias_relu(acc, bias, columns, COLUMNS).to(out.dtype.element_ty)
                _store_slice(out, out_rows, columns, out_c, value, valid, 0, COLUMNS, OFFSET, WIDE)
        tl.debug_barrier()  # before the next tile writes to the scratch

"""From parameters to the weights that backends read: batch norm folded, sibling 1x1s merged, channels_last layout.

Pure functions of tensors. No backend knows batch norm and no module knows a layout; both meet in ``PackedInception``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from googlenet_fused.spec import InceptionSpec


class BatchNormParams(NamedTuple):
    """Evaluation-mode batch norm of one convolution's output; every tensor is ``[out_channels]``."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor


class ConvParams(NamedTuple):
    """A convolution as a model holds it: weight ``[o, i, k, k]``, perhaps a bias ``[o]``, perhaps a batch norm."""

    weight: Tensor
    bias: Tensor | None = None
    norm: BatchNormParams | None = None
    eps: float = 0.0


class PackedInception(NamedTuple):
    """The weights of one module as every backend reads them, all in one dtype on one device, channels_last.

    ``shared`` holds the three 1x1 convolutions that read the module's input, merged on the output axis as
    ``InceptionSpec.shared_slices`` says; their widths follow from the other shapes.
    """

    shared_weight: Tensor  # [shared_channels, in_channels, 1, 1]
    shared_bias: Tensor  # [shared_channels]
    ch3x3_weight: Tensor  # [ch3x3, ch3x3red, 3, 3]
    ch3x3_bias: Tensor  # [ch3x3]
    ch5x5_weight: Tensor  # [ch5x5, ch5x5red, large_kernel, large_kernel]
    ch5x5_bias: Tensor  # [ch5x5]
    pool_proj_weight: Tensor  # [pool_proj, in_channels, 1, 1]
    pool_proj_bias: Tensor  # [pool_proj]

    @property
    def spec(self) -> InceptionSpec:
        """The widths, read off the shapes.

        Raises:
            ValueError: the shapes do not belong to one Inception module.
        """
        shapes = [tensor.shape for tensor in self]
        try:
            return _spec_of_packed_shapes(*shapes)
        except TypeError:  # under tracing a size may be symbolic, which has no hash; a weight's widths are not meant to vary
            return _spec_of_packed_shapes(*(torch.Size(map(int, shape)) for shape in shapes))


@lru_cache(maxsize=256)
def _spec_of_packed_shapes(*shapes: torch.Size) -> InceptionSpec:
    if [len(shape) for shape in shapes] != [4, 1] * 4:
        raise ValueError(
            f"packed weights must be 4-D and biases 1-D, got shapes {dict(zip(PackedInception._fields, shapes, strict=True))}"
        )
    (shared, in_channels, *_), (ch3x3, ch3x3red, *_), (ch5x5, ch5x5red, large_kernel, _), (pool_proj, *_) = shapes[::2]
    spec = InceptionSpec(in_channels, shared - ch3x3red - ch5x5red, ch3x3red, ch3x3, ch5x5red, ch5x5, pool_proj, large_kernel)
    expected = (
        *((spec.shared_channels, in_channels, 1, 1), (spec.shared_channels,)),
        *((ch3x3, ch3x3red, 3, 3), (ch3x3,)),
        *((ch5x5, ch5x5red, large_kernel, large_kernel), (ch5x5,)),
        *((pool_proj, in_channels, 1, 1), (pool_proj,)),
    )
    for name, found, should_be in zip(PackedInception._fields, shapes, expected, strict=True):
        if found != should_be:
            raise ValueError(f"{name} has shape {list(found)}, expected {list(should_be)} for {spec}")
    return spec


def spec_of_weights(weights: Sequence[Tensor]) -> InceptionSpec:
    """The widths of the module whose six convolution weights, in the order of ``InceptionSpec.convs``, are given.

    Raises:
        ValueError: the shapes do not belong to one Inception module; names the first weight that does not fit.
    """
    if len(weights) != 6 or any(weight.dim() != 4 for weight in weights):
        raise ValueError(f"expected six 4-D convolution weights, got shapes {[list(weight.shape) for weight in weights]}")
    ch1x1, ch3x3red, ch3x3, ch5x5red, ch5x5, pool_proj = (int(weight.shape[0]) for weight in weights)
    spec = InceptionSpec(
        int(weights[0].shape[1]), ch1x1, ch3x3red, ch3x3, ch5x5red, ch5x5, pool_proj, large_kernel=int(weights[4].shape[2])
    )
    for weight, conv in zip(weights, spec.convs, strict=True):
        expected = (conv.out_channels, conv.in_channels, conv.kernel_size, conv.kernel_size)
        if tuple(weight.shape) != expected:
            raise ValueError(f"{conv.name} weight has shape {list(weight.shape)}, expected {list(expected)} for {spec}")
    return spec


def check_convs(convs: Sequence[ConvParams]) -> InceptionSpec:
    """The widths of the module that these six convolutions make up, after checking every shape.

    Raises:
        ValueError: a tensor does not fit, or only some of the convolutions have a bias or a batch norm.
    """
    spec = spec_of_weights([conv.weight for conv in convs])
    for conv, shape in zip(convs, spec.convs, strict=True):
        check_conv(conv, shape.name)
    if len({(conv.bias is None, conv.norm is None) for conv in convs}) > 1:
        raise ValueError("some of the convolutions have a bias or a batch norm and others have not")
    return spec


def check_conv(conv: ConvParams, name: str) -> None:
    """Raise ValueError if the bias or a tensor of the batch norm does not hold one value an output channel."""
    channels = int(conv.weight.shape[0])
    tensors = {"bias": conv.bias} if conv.bias is not None else {}
    if conv.norm is not None:
        tensors |= {f"batch norm's {key}": tensor for key, tensor in conv.norm._asdict().items()}
    for key, tensor in tensors.items():
        if tuple(tensor.shape) != (channels,):
            raise ValueError(f"{name} {key} has shape {list(tensor.shape)}, expected [{channels}]")


def fold_batch_norm(conv: ConvParams, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight ``[o, i, k, k]`` and bias ``[o]`` of the convolution that equals ``conv`` followed by its batch norm.

    The arithmetic is fp64 and rounds once, to ``dtype``. Differentiable in every tensor of ``conv``.
    """
    weight, bias, norm, eps = conv
    if norm is None:
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        return weight.to(dtype), bias.to(dtype)
    scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + eps)
    shift = norm.bias.double() - norm.running_mean.double() * scale
    if bias is not None:
        shift = shift + bias.double() * scale
    return (weight.double() * scale[:, None, None, None]).to(dtype), shift.to(dtype)


class ConvGrads(NamedTuple):
    """Gradients of a ``ConvParams``; the fields of tensors that it lacks, and of running statistics, are None."""

    weight: Tensor
    bias: Tensor | None = None
    norm: tuple[Tensor, Tensor, None, None] | None = None


def fold_batch_norm_backward(conv: ConvParams, grad_weight: Tensor, grad_bias: Tensor) -> ConvGrads:
    """Gradients of ``conv``'s tensors from those of the folded weight and bias; running statistics get none, as in torch.

    Made of differentiable operators, so that it can itself be differentiated.
    """
    weight, bias, norm, eps = conv
    if norm is None:
        return ConvGrads(grad_weight.to(weight.dtype), None if bias is None else grad_bias.to(bias.dtype))
    inverse_std = torch.rsqrt(norm.running_var.double() + eps)
    scale = norm.weight.double() * inverse_std
    grad_weight, grad_bias = grad_weight.double(), grad_bias.double()
    offset = -norm.running_mean.double() if bias is None else bias.double() - norm.running_mean.double()
    grad_scale = (grad_weight * weight.double()).sum((1, 2, 3)) + grad_bias * offset
    return ConvGrads(
        (grad_weight * scale[:, None, None, None]).to(weight.dtype),
        None if bias is None else (grad_bias * scale).to(bias.dtype),
        ((grad_scale * inverse_std).to(norm.weight.dtype), grad_bias.to(norm.bias.dtype), None, None),
    )


def pack_inception(convs: Sequence[ConvParams], dtype: torch.dtype) -> PackedInception:
    """Fold, merge and lay out the six convolutions of a module, given in the order of ``InceptionSpec.convs``.

    Raises:
        ValueError: the tensors do not belong to one Inception module; names the first that does not fit.
    """
    check_convs(convs)
    folded = [fold_batch_norm(conv, dtype) for conv in convs]
    (w1, b1), (w3r, b3r), (w3, b3), (w5r, b5r), (w5, b5), (wp, bp) = folded
    shared, ch3x3, ch5x5, pool_proj = map(_channels_last, (torch.cat([w1, w3r, w5r]), w3, w5, wp))
    return PackedInception(shared, torch.cat([b1, b3r, b5r]), ch3x3, b3, ch5x5, b5, pool_proj, bp)


def _channels_last(weight: Tensor) -> Tensor:
    """``weight`` in channels_last strides. Those of a 1x1 kernel are ambiguous and ``contiguous`` would keep either kind, which
    some of torch's convolutions then run differently."""
    return torch.empty_like(weight, memory_format=torch.channels_last).copy_(weight)

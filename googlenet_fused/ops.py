"""The operators ``torch.ops.googlenet_fused.*``: schemas, shape rules and autograd. The backend is chosen inside, at the call.

``inception`` takes a module's parameters as they are, batch norm included, keeps what it packs of them until one changes, and
is differentiable. ``conv2d_relu`` does the same for one convolution with its batch norm and ReLU, for the stem, and returns it
channels_last.
``inception_packed`` takes weights that are packed already and is for inference.

Forward-mode differentiation is refused. ``torch.func.jvp`` hands an operator tensors without their tangents, so there it is the
functions and modules that refuse; an operator of ``torch.ops`` called directly cannot know, and its tangent is zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from googlenet_fused.backends import registry
from googlenet_fused.kept_weights import fold, pack, prepare, prepare_conv2d, tensors_of
from googlenet_fused.packing import (
    BatchNormParams,
    ConvParams,
    PackedInception,
    check_conv,
    check_convs,
    fold_batch_norm,
    fold_batch_norm_backward,
    spec_of_weights,
)
from googlenet_fused.spec import InceptionSpec

aten = torch.ops.aten

_library = torch.library.Library("googlenet_fused", "DEF")
_library.define(
    "inception(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] norms, float[] eps, str backend='auto', "
    "bool cache=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_library.define(
    "inception_packed(Tensor x, Tensor shared_weight, Tensor shared_bias, Tensor ch3x3_weight, Tensor ch3x3_bias, "
    "Tensor ch5x5_weight, Tensor ch5x5_bias, Tensor pool_proj_weight, Tensor pool_proj_bias, str backend='auto') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_library.define(
    "conv2d_relu(Tensor x, Tensor weight, Tensor? bias, Tensor[] norm, float eps, SymInt[2] stride, SymInt[2] padding, "
    "str backend='auto', bool cache=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def inception(x: Tensor, convs: Sequence[ConvParams], *, backend: str = registry.AUTO, cache: bool = False) -> Tensor:
    """One Inception module in evaluation mode, fused: four branches written into one concat buffer.

    Differentiable in ``x``, the weights, the biases and the batch norms' weight and bias, twice.

    Args:
        x: ``[n, in_channels, h, w]``, any strides, h and w at least 1; float64, float32, bfloat16 or float16.
        convs: the six convolutions in the order of ``InceptionSpec.convs``, each a ``ConvParams`` or its first fields, such as
            ``(weight, bias)``. All of them have a bias or none has, and likewise for the batch norm.
        backend: a backend's name, or ``"auto"``.
        cache: keep the folded and packed weights until a tensor of ``convs`` changes. A write through ``.data`` is a change
            that cannot be seen, so the default is to pack in every call.

    Returns:
        ``[n, out_channels, h, w]`` in x's dtype, channels in the order of ``InceptionSpec.slices``; channels_last if x is.

    Raises:
        ValueError: shapes that do not fit, or an unknown backend.
        TypeError: x's dtype is not that of the weights, outside autocast.
        BackendError: the backend that was named cannot run this.
        NotImplementedError: forward-mode differentiation.

    :Equivalent pytorch code: ``googlenet_fused.blocks.Inception.forward``
    """
    convs = _as_convs(convs)
    _check_tensor(x)
    # Here, since under torch.func.jvp the operator itself is handed tensors without their tangents.
    _refuse_forward_ad(x, *(tensor for conv in convs for tensor in tensors_of(conv)))
    x = _autocast_input(x, convs[0].weight.dtype)
    if torch.compiler.is_compiling() or _differentiates(x, convs):
        return torch.ops.googlenet_fused.inception.default(x, *_flatten(convs), backend, cache)
    return torch.ops.googlenet_fused.inception_packed.default(x, *pack(convs, x.dtype, cache), backend)


def _as_convs(convs: Any) -> list[ConvParams]:
    wanted = "convs must hold six ConvParams or tuples (weight, bias), in the order of InceptionSpec.convs"
    if not isinstance(convs, Sequence):
        raise TypeError(f"{wanted}, got {type(convs).__name__}")
    if len(convs) != 6:
        raise ValueError(f"{wanted}, got {len(convs)}")
    for index, conv in enumerate(convs):
        if not isinstance(conv, tuple | list) or not conv or not isinstance(conv[0], Tensor):
            raise TypeError(f"{wanted}, got {type(conv).__name__} at {index}")
    found = [conv if isinstance(conv, ConvParams) else ConvParams(*conv) for conv in convs]
    without = [str(index) for index, conv in enumerate(found) if conv.bias is None]
    if 0 < len(without) < 6:
        raise ValueError(f"{wanted}: all with a bias or all without, but there is none at {', '.join(without)}")
    return found


def _check_tensor(x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")


def conv2d_relu(
    x: Tensor,
    conv: ConvParams,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    backend: str = registry.AUTO,
    cache: bool = False,
) -> Tensor:
    """Convolution with batch norm folded and ReLU, ``[n, i, h, w] -> [n, o, h', w']``, channels_last out.

    Differentiable as ``inception`` is; ``backend`` and ``cache`` are as there.

    Raises:
        ValueError: shapes that do not fit, or an unknown backend.
        TypeError: x's dtype is not that of the weights, outside autocast.
        BackendError: the backend that was named cannot run this.
        NotImplementedError: forward-mode differentiation.
    """
    _check_tensor(x)
    _refuse_forward_ad(x, *tensors_of(conv))
    x = _autocast_input(x, conv.weight.dtype)
    return torch.ops.googlenet_fused.conv2d_relu.default(
        x, conv.weight, conv.bias, list(conv.norm or ()), conv.eps, stride, padding, backend, cache
    )


def _autocast_input(x: Tensor, weight_dtype: torch.dtype) -> Tensor:
    """``x`` in the dtype that autocast asks for here, as torch's own convolutions cast; fp64 is left alone, as they do.

    Raises:
        TypeError: outside autocast, x's dtype is not ``weight_dtype``.
    """
    device = x.device.type
    if autocasts(device) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    if x.dtype != weight_dtype:
        raise TypeError(
            f"x is {x.dtype} but the weights are {weight_dtype}: convert one with .to(), "
            f"or run under torch.autocast({x.device.type!r})"
        )
    return x


def autocasts(device: str) -> bool:
    """Whether autocast is on for this type of device."""
    return device != "meta" and torch.is_autocast_enabled(device)  # which raises for meta


def _differentiates(x: Tensor, convs: Sequence[ConvParams]) -> bool:
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(tensor.requires_grad for conv in convs for tensor in tensors_of(conv))


def _flatten(convs: Sequence[ConvParams]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[float]]:
    """The operator's arguments ``weights, biases, norms, eps``: 6, 0 or 6, 0 or 24 tensors, and 6 numbers."""
    biases = [conv.bias for conv in convs if conv.bias is not None]
    norms = [tensor for conv in convs for tensor in conv.norm or ()]
    return [conv.weight for conv in convs], biases, norms, [conv.eps for conv in convs]


def _unflatten(
    weights: Sequence[Tensor], biases: Sequence[Tensor], norms: Sequence[Tensor], eps: Sequence[float]
) -> list[ConvParams]:
    if len(weights) != 6 or len(biases) not in (0, 6) or len(norms) not in (0, 24) or len(eps) != 6:
        raise ValueError(
            "expected 6 weights, 0 or 6 biases, 0 or 24 batch norm tensors and 6 eps, "
            f"got {len(weights)}, {len(biases)}, {len(norms)} and {len(eps)}"
        )
    return [
        ConvParams(
            weights[i], biases[i] if biases else None, BatchNormParams(*norms[4 * i : 4 * i + 4]) if norms else None, eps[i]
        )
        for i in range(6)
    ]


def _check_input(x: Tensor, spec: InceptionSpec, weight: Tensor) -> None:
    if x.dim() != 4 or x.shape[1] != spec.in_channels:
        raise ValueError(f"x must be [n, {spec.in_channels}, h, w] for {spec}, got {list(x.shape)}")
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"x must have a height and width of at least 1, got {list(x.shape)}")
    _check_device(x, weight)


def _check_device(x: Tensor, weight: Tensor) -> None:
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device} but the weights are on {weight.device}: move one with .to()")


def _memory_format(x: Tensor) -> torch.memory_format:
    """The output's memory format: channels_last if a pixel's channels are adjacent in x, as in any slice of such a tensor."""
    return torch.channels_last if x.stride(1) == 1 else torch.contiguous_format


def allocate(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """The concat buffer for input x, not written yet."""
    shape = (x.shape[0], channels, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))


def in_forward_ad() -> bool:
    """Whether this runs inside forward-mode differentiation."""
    # The level is negative outside forward-mode differentiation. Asking 30 tensors for tangents instead would cost 10 us.
    return getattr(forward_ad, "_current_level", 0) >= 0


def _refuse_forward_ad(*tensors: Tensor) -> None:
    if in_forward_ad() and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            "forward-mode differentiation (jvp) of the fused Inception module is not implemented: differentiate the plain "
            "block, which googlenet_fused.unfuse(model) gives back"
        )


def _refuse_autograd(*tensors: Tensor) -> None:
    """For operators without a backward, where they run (below autograd), rather than none at all in the backward pass."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise NotImplementedError(
            "this operator is for inference: call it under torch.no_grad() or, for gradients, call googlenet_fused.inception "
            "or the module"
        )


def _run(x: Tensor, packed: PackedInception, backend: str) -> Tensor:
    spec = packed.spec
    _check_input(x, spec, packed.shared_weight)
    if x.dtype != packed.shared_weight.dtype:
        raise TypeError(f"x is {x.dtype} but the packed weights are {packed.shared_weight.dtype}: convert one with .to()")
    chosen = registry.select(backend, registry.Problem(x.device, x.dtype, spec))
    out = allocate(x, spec.out_channels, x.shape[2], x.shape[3])
    if out.numel():
        chosen.inception(x, packed, prepare(chosen, packed, x.shape), out)
    return out


def _inception(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norms: Sequence[Tensor],
    eps: Sequence[float],
    backend: str = registry.AUTO,
    cache: bool = False,
) -> Tensor:
    _refuse_forward_ad(x, *weights, *biases, *norms)
    return _run(x, pack(_unflatten(weights, biases, norms, eps), x.dtype, cache), backend)


def _inception_fake(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norms: Sequence[Tensor],
    eps: Sequence[float],
    backend: str = registry.AUTO,
    cache: bool = False,
) -> Tensor:
    spec = check_convs(_unflatten(weights, biases, norms, eps))
    _check_input(x, spec, weights[0])
    return allocate(x, spec.out_channels, x.shape[2], x.shape[3])


def _inception_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, biases, norms, eps, *_ = inputs
    ctx.eps, ctx.counts = eps, (len(weights), len(biases), len(norms))
    ctx.save_for_backward(x, output, *weights, *biases, *norms)


Backward = Callable[[Any, Tensor], tuple[Any, ...]]


def _in_forward_dtypes(backward: Backward) -> Backward:
    """``backward`` with autocast off, and as many gradients as the dispatcher expects."""

    @functools.wraps(backward)
    def run(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        device = ctx.saved_tensors[0].device.type
        if autocasts(device):
            with torch.autocast(device, enabled=False):
                returned = backward(ctx, grad)
        else:
            returned = backward(ctx, grad)
        # The dispatcher drops a trailing argument that has its default value, and torch 2.11 wants no gradient for it then.
        return returned[: len(ctx.needs_input_grad)]

    return run


@_in_forward_dtypes
def _inception_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Gradients by torch's own operators, so that they can be differentiated again. Bottlenecks and pool are recomputed."""
    x, output, *parameters = ctx.saved_tensors
    n_weights, n_biases, _ = ctx.counts
    convs = _unflatten(
        parameters[:n_weights], parameters[n_weights : n_weights + n_biases], parameters[n_weights + n_biases :], ctx.eps
    )
    folded = [fold_batch_norm(conv, x.dtype) for conv in convs]
    spec = spec_of_weights([weight for weight, _ in folded])
    (w1, _), (w3r, b3r), (w3, _), (w5r, b5r), (w5, _), (wp, _) = folded

    reduced3 = F.conv2d(x, w3r, b3r).relu()
    reduced5 = F.conv2d(x, w5r, b5r).relu()
    pooled, indices = aten.max_pool2d_with_indices(x, [3, 3], [1, 1], [1, 1])

    grad = aten.threshold_backward(grad, output.detach(), 0)
    grad1, grad3, grad5, gradp = (grad[:, channels] for channels in spec.slices)
    of_x, of_parameters = wanted = ctx.needs_input_grad[0], _any_wanted(ctx.needs_input_grad[1:])
    to_1x1 = _conv2d_backward(grad1, x, w1, wanted)
    to_3x3 = _conv2d_backward(grad3, reduced3, w3, (True, of_parameters))
    to_3x3red = _conv2d_backward(aten.threshold_backward(to_3x3[0], reduced3, 0), x, w3r, wanted)
    to_5x5 = _conv2d_backward(grad5, reduced5, w5, (True, of_parameters))
    to_5x5red = _conv2d_backward(aten.threshold_backward(to_5x5[0], reduced5, 0), x, w5r, wanted)
    to_proj = _conv2d_backward(gradp, pooled, wp, wanted)

    grad_x = None
    if of_x:
        through_pool = aten.max_pool2d_with_indices_backward(to_proj[0], x, [3, 3], [1, 1], [1, 1], [1, 1], False, indices)
        grad_x = to_1x1[0] + to_3x3red[0] + to_5x5red[0] + through_pool
    if not of_parameters:
        return grad_x, *([None] * count for count in ctx.counts), *(None, None, None)
    of_folded = (to_1x1, to_3x3red, to_3x3, to_5x5red, to_5x5, to_proj)
    grads = [fold_batch_norm_backward(conv, dw, db) for conv, (_, dw, db) in zip(convs, of_folded, strict=True)]
    return (
        grad_x,
        [conv.weight for conv in grads],
        [conv.bias for conv in grads if conv.bias is not None],
        [tensor for conv in grads for tensor in conv.norm or ()],
        *(None, None, None),
    )


def _any_wanted(needs: Sequence[Any]) -> bool:
    """Whether a gradient is wanted of any argument, lists among them."""
    return any(_any_wanted(need) if isinstance(need, list | tuple) else need for need in needs)


def _conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    wanted: tuple[bool, bool],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; without ``padding``, of a convolution that keeps height and width.

    ``wanted`` says whether that of x, and whether those of weight and bias are computed; the others are None.
    """
    if padding is None:
        padding = [weight.shape[2] // 2, weight.shape[3] // 2]
    of_x, of_parameters = wanted
    return aten.convolution_backward(
        *(grad, x, weight, [weight.shape[0]], stride, padding, [1, 1], False, [0, 0], 1),
        [of_x, of_parameters, of_parameters],
    )


def _inception_packed(
    x: Tensor,
    shared_weight: Tensor,
    shared_bias: Tensor,
    ch3x3_weight: Tensor,
    ch3x3_bias: Tensor,
    ch5x5_weight: Tensor,
    ch5x5_bias: Tensor,
    pool_proj_weight: Tensor,
    pool_proj_bias: Tensor,
    backend: str = registry.AUTO,
) -> Tensor:
    packed = PackedInception(
        *(shared_weight, shared_bias, ch3x3_weight, ch3x3_bias),
        *(ch5x5_weight, ch5x5_bias, pool_proj_weight, pool_proj_bias),
    )
    _refuse_forward_ad(x, *packed)
    _refuse_autograd(x, *packed)
    return _run(x, packed, backend)


def _inception_packed_fake(x: Tensor, *weights_and_backend: Any) -> Tensor:
    packed = PackedInception(*weights_and_backend[:8])
    _refuse_autograd(x, *packed)
    _check_input(x, packed.spec, packed.shared_weight)
    return allocate(x, packed.spec.out_channels, x.shape[2], x.shape[3])


def _conv2d_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Sequence[Tensor],
    eps: float,
    stride: Sequence[int],
    padding: Sequence[int],
    backend: str = registry.AUTO,
    cache: bool = False,
) -> Tensor:
    conv = _conv_of(weight, bias, norm, eps)
    _refuse_forward_ad(x, *tensors_of(conv))
    shape = _conv2d_relu_shape(x, conv, stride, padding)
    chosen = registry.select(backend, registry.Problem(x.device, x.dtype, None))
    if 0 in shape:
        return _allocate_conv2d_relu(x, shape)
    weight, bias = fold(conv, x.dtype, cache)
    return chosen.conv2d_relu(x, weight, bias, prepare_conv2d(chosen, weight, stride, padding, x.shape), stride, padding)


def _conv_of(weight: Tensor, bias: Tensor | None, norm: Sequence[Tensor], eps: float) -> ConvParams:
    if weight.dim() != 4 or len(norm) not in (0, 4):
        raise ValueError(f"expected a 4-D weight and 0 or 4 batch norm tensors, got {list(weight.shape)} and {len(norm)}")
    conv = ConvParams(weight, bias, BatchNormParams(*norm) if norm else None, eps)
    check_conv(conv, "the convolution's")
    return conv


def _conv2d_relu_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Sequence[Tensor],
    eps: float,
    stride: Sequence[int],
    padding: Sequence[int],
    backend: str = registry.AUTO,
    cache: bool = False,
) -> Tensor:
    return _allocate_conv2d_relu(x, _conv2d_relu_shape(x, _conv_of(weight, bias, norm, eps), stride, padding))


def _allocate_conv2d_relu(x: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _conv2d_relu_shape(x: Tensor, conv: ConvParams, stride: Sequence[int], padding: Sequence[int]) -> tuple[int, ...]:
    weight = conv.weight
    channels, in_channels, *kernel = weight.shape
    if x.dim() != 4 or x.shape[1] != in_channels:
        raise ValueError(f"x must be [n, {in_channels}, h, w] for a weight of shape {list(weight.shape)}, got {list(x.shape)}")
    _check_device(x, weight)
    height, width = ((x.shape[2 + i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in range(2))
    if height < 1 or width < 1:
        raise ValueError(f"x of shape {list(x.shape)} is too small for a {kernel[0]}x{kernel[1]} convolution")
    return x.shape[0], channels, height, width


def _conv2d_relu_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, norm, ctx.eps, ctx.stride, ctx.padding, *_ = inputs
    ctx.save_for_backward(x, output, weight, bias, *norm)


@_in_forward_dtypes
def _conv2d_relu_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, output, weight, bias, *norm = ctx.saved_tensors
    conv = _conv_of(weight, bias, norm, ctx.eps)
    wanted = ctx.needs_input_grad[0], _any_wanted(ctx.needs_input_grad[1:])
    grad = aten.threshold_backward(grad, output.detach(), 0)
    grad_x, *of_folded = _conv2d_backward(grad, x, fold_batch_norm(conv, x.dtype)[0], wanted, ctx.stride, ctx.padding)
    if not wanted[1]:
        return grad_x, None, None, [None] * len(norm), *(None,) * 5
    grads = fold_batch_norm_backward(conv, *of_folded)
    return grad_x, grads.weight, grads.bias, list(grads.norm or ()), *(None,) * 5


for _name, _kernel, _fake in (
    ("inception", _inception, _inception_fake),
    ("inception_packed", _inception_packed, _inception_packed_fake),
    ("conv2d_relu", _conv2d_relu, _conv2d_relu_fake),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"googlenet_fused::{_name}", _fake, lib=_library)
for _name, _backward, _setup_context in (
    ("inception", _inception_backward, _inception_setup_context),
    ("conv2d_relu", _conv2d_relu_backward, _conv2d_relu_setup_context),
):
    torch.library.register_autograd(f"googlenet_fused::{_name}", _backward, setup_context=_setup_context, lib=_library)

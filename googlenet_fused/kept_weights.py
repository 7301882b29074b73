"""The weights that operators and modules run on, made of a model's parameters and kept until one of those changes.

Three steps, each kept: batch norm folded and siblings merged (``fold``, ``pack``), then whatever a backend makes of the result
(``prepare``, ``prepare_conv2d``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from googlenet_fused.backends.registry import Backend
from googlenet_fused.packing import ConvParams, PackedInception, fold_batch_norm, pack_inception
from googlenet_fused.parameter_cache import ParameterCache, pin_for_good

_packed: ParameterCache[PackedInception] = ParameterCache()
_folded: ParameterCache[tuple[Tensor, ...]] = ParameterCache()
_prepared: ParameterCache[tuple[Tensor, ...]] = ParameterCache()


def fold(conv: ConvParams, dtype: torch.dtype, cache: bool) -> tuple[Tensor, Tensor]:
    """Weight and bias of ``conv`` in ``dtype``, batch norm folded; with ``cache``, kept until a tensor of it changes."""
    if not cache:
        with torch.no_grad():
            return fold_batch_norm(conv, dtype)
    sources = tensors_of(conv)
    weight, bias = _folded.get(sources, (dtype, conv.eps), lambda: _own(fold_batch_norm(conv, dtype), sources))
    return weight, bias


def pack(convs: Sequence[ConvParams], dtype: torch.dtype, cache: bool) -> PackedInception:
    """The packed weights of six convolutions in ``dtype``; with ``cache``, kept until a tensor of them changes."""
    if not cache:
        with torch.no_grad():
            return pack_inception(convs, dtype)
    sources = [tensor for conv in convs for tensor in tensors_of(conv)]
    eps = tuple(conv.eps for conv in convs)
    return _packed.get(sources, (dtype, eps), lambda: PackedInception(*_own(pack_inception(convs, dtype), sources)))


def prepare(backend: Backend, packed: PackedInception, input_shape: Sequence[int]) -> tuple[Tensor, ...]:
    """``backend.prepare``, kept until a tensor of ``packed`` changes."""
    return _prepared.get(packed, backend.name, lambda: backend.prepare(packed, input_shape))


def prepare_conv2d(
    backend: Backend, weight: Tensor, stride: Sequence[int], padding: Sequence[int], input_shape: Sequence[int]
) -> tuple[Tensor, ...]:
    """``backend.prepare_conv2d``, kept until ``weight`` changes."""
    key = (backend.name, *stride, *padding)
    return _prepared.get([weight], key, lambda: backend.prepare_conv2d(weight, stride, padding, input_shape))


def _own(tensors: Iterable[Tensor], sources: Sequence[Tensor]) -> tuple[Tensor, ...]:
    # Where nothing had to be folded or laid out anew a result is the parameter itself. A cache must not keep that alive, and a
    # CUDA graph, which goes on reading the other weights of its capture, must not see it change.
    return tuple(tensor.clone() if any(tensor is source for source in sources) else tensor for tensor in tensors)


def forget(weight: Tensor) -> None:
    """Drop what is kept of a module, by its first convolution's weight, after a change that cannot be seen.

    What a captured CUDA graph reads is not freed.
    """
    _packed.forget(weight)
    _folded.forget(weight)
    if torch.__future__.get_swap_module_params_on_conversion():
        pin_for_good(weight)


def tensors_of(conv: ConvParams) -> list[Tensor]:
    """The weight, then what there is of the bias and the batch norm."""
    return [conv.weight, *(() if conv.bias is None else (conv.bias,)), *(conv.norm or ())]

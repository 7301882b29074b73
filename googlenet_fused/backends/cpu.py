"""The CPU backend: PyTorch's oneDNN convolutions, prepacked, channels_last, the branches copied into one concat buffer.

``torch.ops.mkldnn`` is not a documented interface, so the arguments of its operators are compared with those this file was
written for before it is used. oneDNN can apply ReLU itself, but its ReLU turns NaN into 0 where torch's keeps it, so ReLU is
torch's, in place. oneDNN can write into a slice of the concat buffer too, but only slower than torch copies its dense results
there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from googlenet_fused import response_norm
from googlenet_fused.backends.registry import Backend, Problem
from googlenet_fused.packing import PackedInception
from googlenet_fused.response_norm import ResponseNorm
from googlenet_fused.spec import InceptionSpec

_ARGUMENTS = {
    "_reorder_convolution_weight": ("self", "padding", "stride", "dilation", "groups", "input_size"),
    "_convolution_pointwise": (
        *("X", "W", "B", "padding", "stride", "dilation", "groups"),
        *("attr", "scalars", "algorithm"),
    ),
}
_UNIT = (1, 1)
_NO_PADDING = (0, 0)


class CpuBackend(Backend):
    name = "cpu"
    description = "oneDNN convolutions with prepacked weights, channels_last"
    has_response_norm = True

    def probe(self) -> str | None:
        return _probe()

    def supports(self, problem: Problem) -> str | None:
        if problem.device.type != "cpu":
            return f"it runs on CPU tensors, not on {problem.device.type}"
        return _probe() or _refuse_dtype(problem.dtype)

    def prepare(self, packed: PackedInception, input_shape: Sequence[int]) -> tuple[Tensor, ...]:
        spec = packed.spec
        n, _, h, w = input_shape
        return (
            _prepack(packed.shared_weight, input_shape),
            _prepack(packed.ch3x3_weight, (n, spec.ch3x3red, h, w), padding=_UNIT),
            _prepack(packed.ch5x5_weight, (n, spec.ch5x5red, h, w), padding=_large_padding(spec)),
            _prepack(packed.pool_proj_weight, input_shape),
        )

    def inception(self, x: Tensor, packed: PackedInception, prepared: tuple[Tensor, ...], out: Tensor) -> None:
        spec = packed.spec
        shared_weight, ch3x3_weight, ch5x5_weight, pool_proj_weight = prepared
        x = x.contiguous(memory_format=torch.channels_last)
        shared = _conv2d(x, shared_weight, packed.shared_bias).relu_()
        ch1x1, ch3x3red, ch5x5red = (shared[:, channels] for channels in spec.shared_slices)
        branches = (
            ch1x1,
            _conv2d(ch3x3red, ch3x3_weight, packed.ch3x3_bias, padding=_UNIT),
            _conv2d(ch5x5red, ch5x5_weight, packed.ch5x5_bias, padding=_large_padding(spec)),
            _conv2d(F.max_pool2d(x, kernel_size=3, stride=1, padding=1), pool_proj_weight, packed.pool_proj_bias),
        )
        torch.cat(branches, dim=1, out=out).relu_()

    def prepare_conv2d(
        self, weight: Tensor, stride: Sequence[int], padding: Sequence[int], input_shape: Sequence[int]
    ) -> tuple[Tensor, ...]:
        return (_prepack(weight, input_shape, padding=padding, stride=stride),)

    def conv2d_relu(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        prepared: tuple[Tensor, ...],
        stride: Sequence[int],
        padding: Sequence[int],
    ) -> Tensor:
        (prepacked,) = prepared
        x = x.contiguous(memory_format=torch.channels_last)
        return _conv2d(x, prepacked, bias, padding=padding, stride=stride).relu_()

    def local_response_norm(self, x: Tensor, norm: ResponseNorm) -> Tensor:
        return response_norm.local_response_norm(x, norm)


def _large_padding(spec: InceptionSpec) -> tuple[int, int]:
    return spec.large_kernel // 2, spec.large_kernel // 2


def _prepack(
    weight: Tensor, input_shape: Sequence[int], *, padding: Sequence[int] = _NO_PADDING, stride: Sequence[int] = _UNIT
) -> Tensor:
    """``weight [o, i, k, k]`` in oneDNN's blocked layout, opaque to torch: it can be neither copied nor saved.

    The input shape is only a hint: the result serves every other one.
    """
    return torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, _UNIT, 1, list(input_shape))


def _conv2d(
    x: Tensor, prepacked: Tensor, bias: Tensor, *, padding: Sequence[int] = _NO_PADDING, stride: Sequence[int] = _UNIT
) -> Tensor:
    return torch.ops.mkldnn._convolution_pointwise.default(x, prepacked, bias, padding, stride, _UNIT, 1, "none", [], None)


@cache
def _probe() -> str | None:
    if not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN"
    for name, arguments in _ARGUMENTS.items():
        try:
            schema = getattr(torch.ops.mkldnn, name).default._schema
        except AttributeError:
            return f"torch {torch.__version__} has no operator mkldnn::{name}"
        found = tuple(argument.name for argument in schema.arguments)
        if found != arguments:
            return f"torch {torch.__version__} has another mkldnn::{name} than the one known here: arguments {', '.join(found)}"
    return None


@cache
def _refuse_dtype(dtype: torch.dtype) -> str | None:
    if dtype == torch.float32:
        return None
    if dtype == torch.bfloat16:
        supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    elif dtype == torch.float16:
        supported = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    else:
        return f"oneDNN convolves float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return None if supported else f"this CPU has no instructions for oneDNN's {str(dtype).removeprefix('torch.')} convolutions"

"""What tests share: shapes, models, arguments, inputs in every layout, definitions to compare with, comparisons and copies."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from googlenet_fused import FusionReport, googlenet, inception
from googlenet_fused.backends import registry
from googlenet_fused.blocks import BasicConv2d, Inception, Norm
from googlenet_fused.modules import FusedConv2d, FusedInception
from googlenet_fused.packing import BatchNormParams, ConvParams, PackedInception, pack_inception
from googlenet_fused.randomize import randomize_
from googlenet_fused.spec import GOOGLENET_SIDES, GOOGLENET_SPECS, InceptionSpec
from googlenet_fused.tolerance import judge

GOOGLENET_MODULES: dict[str, tuple[InceptionSpec, int]] = {
    name: (spec, GOOGLENET_SIDES[name]) for name, spec in GOOGLENET_SPECS.items()
}
"""The nine modules with the side of their input at 224x224."""

BATCHES = (1, 8, 32, 128, 256)
"""Batch sizes that kernels must run well, latency and throughput alike."""

TINY = InceptionSpec(5, 3, 4, 6, 2, 3, 5, large_kernel=5)
"""Small enough for gradcheck, with no width a multiple of another's."""

ODD_SPECS: dict[str, InceptionSpec] = {
    "tiny": TINY,
    "ones": InceptionSpec(1, 1, 1, 1, 1, 1, 1),
    "primes": InceptionSpec(13, 7, 11, 17, 3, 5, 19),
    "wide": InceptionSpec(33, 65, 31, 63, 9, 129, 15),
}
"""Widths that no kernel likes."""

ALIGNED = InceptionSpec(24, 8, 16, 40, 8, 24, 16)
"""Widths that tensor descriptors permit, few of them powers of 2."""

CONV_BLOCKS = ("branch1", "branch2.0", "branch2.1", "branch3.0", "branch3.1", "branch4.1")
"""The names of an Inception module's convolution blocks, in the order of ``InceptionSpec.convs``."""

SMALL_SIZES: list[tuple[int, int, int]] = [(1, 1, 1), (2, 7, 7), (1, 5, 9), (3, 4, 1), (1, 14, 13), (5, 2, 3)]
"""(batch, height, width), smaller than the large kernel included."""

INTEGER_LIMIT = 3

FP64_TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}

EPS = 1e-3

PARTS = {"norm": (True, False), "bias": (False, True), "norm and bias": (True, True), "neither": (False, False)}
"""Whether the convolutions have a batch norm and a bias."""

Arguments = tuple[list[Tensor], list[Tensor], list[Tensor], list[float]]
"""``weights, biases, norms, eps`` of the raw operator."""


def can_run(dtype: torch.dtype, device: str = "cpu", *, interpreted: bool = False) -> list[str]:
    """The backends that run Inception modules of this dtype on this machine's device.

    ``interpreted``: on a CPU also those written for GPUs, whose kernels are interpreted or simulated there, a thousand times
    slower. Where torch's flags have it so, fp32 is TF32 for those.
    """
    problem = registry.Problem(torch.device(device), dtype, TINY)
    able = [name for name in registry.names() if registry.get(name).supports(problem) is None]
    return [name for name in able if device != "cpu" or interpreted or registry.get(name).doubt(problem) is None]


both_large_kernels = pytest.mark.parametrize("large_kernel", [3, 5])


def backends_and_dtypes(*, interpreted: bool) -> pytest.MarkDecorator:
    """Every backend with every dtype that it runs on this machine's CPU; ``interpreted`` as in ``can_run``."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    return pytest.mark.parametrize(
        ("backend", "dtype"),
        [(name, dtype) for dtype in dtypes for name in can_run(dtype, interpreted=interpreted)],
        ids=lambda value: str(value).removeprefix("torch."),
    )


every_backend_and_dtype = backends_and_dtypes(interpreted=True)


def assert_same(actual: object, expected: object, label: str = "", *, equal_nan: bool = False) -> None:
    """Tensors, or dictionaries of them, with exactly the same values."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=equal_nan, msg=lambda text: f"{label}: {text}")


def assert_agrees(fused: nn.Module, plain: nn.Module, x: Tensor) -> None:
    comparison = judge(fused, plain, x)
    assert comparison.ok, comparison


def through_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def through_a_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def both_kernels(spec: InceptionSpec) -> list[InceptionSpec]:
    return [replace(spec, large_kernel=3), replace(spec, large_kernel=5)]


def plain_inception(spec: InceptionSpec, norm: Norm = "batch", seed: int = 0) -> Inception:
    """A plain module in evaluation mode with weights and batch norm statistics that make every branch matter."""
    return randomize_(Inception.from_spec(spec, norm=norm), seed).eval()


def fused_inception(spec: InceptionSpec, norm: Norm = "batch", seed: int = 0, backend: str = "auto") -> FusedInception:
    """The fused module with the same parameters as ``plain_inception``."""
    return FusedInception.from_module(plain_inception(spec, norm, seed), backend=backend)


def conv_blocks(module: nn.Module) -> list[nn.Module]:
    return [module.get_submodule(name) for name in CONV_BLOCKS]


def small_model(spec: InceptionSpec = ODD_SPECS["primes"]) -> nn.Module:
    """A stem and an Inception module: quick, with both kinds of blocks."""
    stem = BasicConv2d(3, spec.in_channels, kernel_size=3, stride=2, padding=1)
    return randomize_(nn.Sequential(stem, Inception.from_spec(spec), nn.AdaptiveAvgPool2d(1))).eval()


def plain_googlenet(host: str = "torchvision's own", **options: Any) -> nn.Module:
    """torchvision's own network, or ours in one of its variants, in evaluation mode and with ten classes."""
    options = {"num_classes": 10, "init_weights": False, **options}
    if host != "torchvision's own":
        return randomize_(googlenet(host, **options)).eval()  # type: ignore[arg-type]
    # Here, so that the tests that do without torchvision's network run without torchvision.
    from torchvision.models import GoogLeNet

    return randomize_(GoogLeNet(**options)).eval()


def report_of(model: nn.Module) -> FusionReport:
    report = model.fusion_report
    assert isinstance(report, FusionReport)
    return report


def outcome(model: nn.Module) -> dict[str, bool]:
    """Which blocks of a model from ``fuse`` are fused, by name."""
    return {block.name: block.fused for block in report_of(model).blocks}


class TinyNet(nn.Module):
    """A model with GoogLeNet's key names, in a few hundred numbers."""

    def __init__(self, classes: int = 5, aux: bool = False) -> None:
        super().__init__()
        self.transform_input = False
        self.conv1 = BasicConv2d(3, 4, kernel_size=3)
        if aux:
            self.aux1 = nn.Sequential(nn.Linear(4, 3))
            self.aux2 = nn.Sequential(nn.Linear(4, 3))
        self.fc = nn.Linear(4, classes)


def tiny_state(**kwargs: Any) -> dict[str, Tensor]:
    """A ``TinyNet``'s state_dict, every floating-point value drawn at random."""
    state = TinyNet(**kwargs).state_dict()
    return {key: torch.randn_like(value) if value.is_floating_point() else value + 7 for key, value in state.items()}


def save_tensors(tensors: Any, path: Path, **kwargs: Any) -> Path:
    """As safetensors or by ``torch.save``, as the suffix of ``path`` says; ``kwargs`` are for the function that saves."""
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(tensors, path, **kwargs)
    else:
        torch.save(tensors, path, **kwargs)
    return path


def message_of(error: pytest.ExceptionInfo[BaseException]) -> str:
    """The error's text, which must be one line."""
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


def plain_conv(norm: Norm = "batch", in_channels: int = 3, out_channels: int = 11, **options: Any) -> BasicConv2d:
    return randomize_(BasicConv2d(in_channels, out_channels, norm=norm, **{"kernel_size": 3, **options})).eval()


def fused_conv(norm: Norm = "batch", backend: str = "auto", **options: Any) -> FusedConv2d:
    return FusedConv2d.from_module(plain_conv(norm, **options), backend=backend)


def random_input(
    spec: InceptionSpec, batch: int, height: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 1
) -> Tensor:
    """Normal input ``[batch, in_channels, height, width]``, contiguous; the same numbers in every dtype, rounded."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, spec.in_channels, height, width, generator=generator).to(dtype)


def image(
    batch: int = 2, height: int = 7, width: int = 6, dtype: torch.dtype = torch.float32, spec: InceptionSpec = TINY
) -> Tensor:
    """A small input, for where its shape matters little."""
    return random_input(spec, batch, height, width, dtype)


def cotangent(spec: InceptionSpec, x: Tensor, seed: int = 5) -> Tensor:
    """Normal numbers in the shape of the module's output for ``x``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape[0], spec.out_channels, *x.shape[2:], generator=generator).to(x.dtype)


def inception_arguments(
    spec: InceptionSpec = TINY,
    *,
    norm: bool = True,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    requires_grad: bool = False,
    seed: int = 4,
) -> Arguments:
    """Random parameters. Running statistics never require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, deviation: float = 0.3) -> Tensor:
        return (torch.randn(shape, generator=generator) * deviation).to(dtype).requires_grad_(requires_grad)

    def statistics(width: int) -> list[Tensor]:
        mean, variance = torch.randn(width, generator=generator) * 0.1, torch.rand(width, generator=generator) + 0.5
        return [mean.to(dtype), variance.to(dtype)]

    weights = [normal(conv.out_channels, conv.in_channels, conv.kernel_size, conv.kernel_size) for conv in spec.convs]
    biases = [normal(conv.out_channels) for conv in spec.convs] if bias else []
    norms = []
    for conv in spec.convs if norm else ():
        norms += [normal(conv.out_channels, deviation=1.0), normal(conv.out_channels), *statistics(conv.out_channels)]
    return weights, biases, norms, [EPS] * 6


def as_convs(
    weights: Sequence[Tensor], biases: Sequence[Tensor], norms: Sequence[Tensor], eps: Sequence[float]
) -> list[ConvParams]:
    return [
        ConvParams(weight, biases[i] if biases else None, BatchNormParams(*norms[4 * i : 4 * i + 4]) if norms else None, eps[i])
        for i, weight in enumerate(weights)
    ]


def run_operator(x: Tensor, arguments: Arguments) -> Tensor:
    return torch.ops.googlenet_fused.inception(x, *arguments)


def run_face(x: Tensor, arguments: Arguments) -> Tensor:
    return inception(x, as_convs(*arguments))


def packed_inception(spec: InceptionSpec = TINY) -> PackedInception:
    return pack_inception(as_convs(*inception_arguments(spec)), torch.float32)


def stem_arguments(
    kernel_size: int = 3, stride: int = 1, padding: int = 1, *, parts: str = "norm", requires_grad: bool = False
) -> tuple[Tensor, Tensor | None, list[Tensor], float, list[int], list[int]]:
    """``weight, bias, norm, eps, stride, padding`` of ``conv2d_relu``: 5 channels to 4."""
    norm, bias = PARTS[parts]
    weight = (torch.randn(4, 5, kernel_size, kernel_size) * 0.2).requires_grad_(requires_grad)
    norms = [torch.randn(4), torch.randn(4), torch.randn(4) * 0.1, torch.rand(4) + 0.5] if norm else []
    return weight, torch.randn(4) if bias else None, norms, EPS, [stride, stride], [padding, padding]


def before_relu(x: Tensor, conv: ConvParams, stride: int = 1, padding: int | None = None) -> Tensor:
    """A convolution out of torch's functions, in fp64, batch norm unfolded; ``padding`` keeps the size unless given."""
    padding = conv.weight.shape[2] // 2 if padding is None else padding
    weight, bias, *norm = (None if tensor is None else tensor.double() for tensor in (*conv[:2], *(conv.norm or ())))
    x = F.conv2d(x.double(), weight, bias, stride, padding)
    if norm:
        gamma, beta, mean, variance = norm
        x = F.batch_norm(x, mean, variance, gamma, beta, eps=conv.eps)
    return x


def by_definition(x: Tensor, convs: Sequence[Any], conv: Callable[[Tensor, Any], Tensor]) -> Tensor:
    """The module by its definition (the paper, Fig. 2b); ``conv`` applies one of ``convs`` and its ReLU."""
    ch1x1, ch3x3red, ch3x3, ch5x5red, ch5x5, pool_proj = convs
    pooled = F.max_pool2d(x, 3, stride=1, padding=1)
    branches = [conv(x, ch1x1), conv(conv(x, ch3x3red), ch3x3), conv(conv(x, ch5x5red), ch5x5), conv(pooled, pool_proj)]
    return torch.cat(branches, 1)


def plain_result(x: Tensor, convs: Sequence[ConvParams]) -> Tensor:
    """The module out of torch's functions, in fp64, batch norm unfolded: ``[n, out_channels, h, w]``."""
    return by_definition(x.double(), convs, lambda x, conv: before_relu(x, conv).relu())


def integer_convs(spec: InceptionSpec, dtype: torch.dtype = torch.float32, seed: int = 2) -> list[ConvParams]:
    """Six convolutions of small integers.

    With integer inputs of at most INTEGER_LIMIT every partial sum is an integer that fp32 holds exactly, in any order of
    addition, so a result must equal the fp64 one bit for bit. Weights are thinned out to keep the second convolution's sums
    below 2**24.
    """
    generator = torch.Generator().manual_seed(seed)

    def integers(shape: tuple[int, ...], keep: float) -> Tensor:
        values = torch.randint(-INTEGER_LIMIT, INTEGER_LIMIT + 1, shape, generator=generator)
        return (values * (torch.rand(shape, generator=generator) < keep)).to(dtype)

    return [
        ConvParams(
            integers(
                (conv.out_channels, conv.in_channels, conv.kernel_size, conv.kernel_size), keep=min(1.0, 40 / conv.in_channels)
            ),
            integers((conv.out_channels,), keep=1.0),
        )
        for conv in spec.convs
    ]


def integer_input(
    spec: InceptionSpec, batch: int, height: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 3
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, spec.in_channels, height, width)
    return torch.randint(-INTEGER_LIMIT, INTEGER_LIMIT + 1, shape, generator=generator).to(dtype)


def _slice_of_wider(x: Tensor) -> Tensor:
    wider = x.new_full((x.shape[0], x.shape[1] + 5, x.shape[2], x.shape[3]), float("nan"))
    wider = wider.contiguous(memory_format=torch.channels_last)
    wider[:, 2 : 2 + x.shape[1]] = x
    return wider[:, 2 : 2 + x.shape[1]]


def _every_other_pixel(x: Tensor) -> Tensor:
    larger = x.new_full((x.shape[0], x.shape[1], x.shape[2] * 2, x.shape[3] * 2), float("nan"))
    larger[:, :, ::2, ::2] = x
    return larger[:, :, ::2, ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "slice_of_wider": _slice_of_wider,
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch_innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "every_other_pixel": _every_other_pixel,
}
"""The same values in other strides."""


def guarded_buffer(
    shape: tuple[int, int, int, int], dtype: torch.dtype, *, channels_last: bool = True
) -> tuple[Tensor, Tensor]:
    """A NaN-poisoned output of ``shape`` inside a larger buffer of sentinels: ``(out, buffer)``, for ``check_guards``."""
    n, c, h, w = shape
    buffer = torch.full((n + 2, c + 16, h + 2, w + 2), SENTINEL, dtype=dtype)
    if channels_last:
        buffer = buffer.contiguous(memory_format=torch.channels_last)
    out = buffer[1:-1, 8:-8, 1:-1, 1:-1]
    out.fill_(float("nan"))
    return out, buffer


def check_guards(out: Tensor, buffer: Tensor) -> None:
    """Every element of ``out`` was written and nothing around it.

    Raises:
        AssertionError: a NaN is left in the output, or a sentinel is gone.
    """
    assert not out.isnan().any(), f"{int(out.isnan().sum())} output elements were never written"
    written = torch.zeros_like(buffer, dtype=torch.bool)
    written[1:-1, 8:-8, 1:-1, 1:-1] = True
    assert (buffer[~written] == SENTINEL).all(), "something outside the output was written"


SENTINEL = 1234.0

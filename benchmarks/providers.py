"""All providers: plain PyTorch and its compilers, other runtimes, and every backend of this package.

TensorRT and Torch-TensorRT are measured where they are installed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.runtimes import onnx_runtime, openvino, tensorrt, torch_tensorrt
from googlenet_fused import bench
from googlenet_fused.backends import registry
from googlenet_fused.bench import Bind, Provider, Run, Unavailable, Workload
from googlenet_fused.blocks import BasicConv2d, Inception

ConvRelu = Callable[[Tensor, nn.Conv2d], Tensor]

CUDA_ONLY = ("compile_reduce_overhead", "compile_max_autotune", "merged_cudnn", "torch_tensorrt", "tensorrt")
CPU_ONLY = ("compile_freezing", "onnxruntime", "openvino", "fused_cpu")


def torchvision_eager(workload: Workload) -> Bind:
    """torchvision's own network with the workload's parameters; for what torchvision lacks, this package's plain model."""
    model = copy.deepcopy(workload.model) if workload.case.mode == "training" else workload.model
    if workload.case.subject == "torchvision":
        try:
            from torchvision.models import googlenet
        except (ImportError, RuntimeError):  # the plain model is the same network: tests/test_models.py
            pass
        else:
            model = googlenet(weights=None, aux_logits=False, init_weights=False, dropout=0.0)
            model.load_state_dict(workload.model.state_dict())
            like = next(workload.model.parameters())
            model = model.to(like.device, like.dtype).train(workload.model.training)
    return lambda x: bench.run_of(workload, model, x)


def compiled(name: str, title: str, *, own_graph: bool = False, trains: bool = True, **options: Any) -> Provider:
    """torch.compile of the plain model in channels_last, for fixed shapes."""

    def build(workload: Workload) -> Bind:
        if workload.case.mode == "training" and not trains:
            raise Unavailable("it does not train")
        plain = copy.deepcopy(workload.model).to(memory_format=torch.channels_last)
        model: Any = torch.compile(plain, dynamic=False, **options)
        try:
            x = bench.channels_last(workload.input(seed=0))
            bench.run_of(workload, model, x)()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no compiler, no Python headers, an unsupported platform: Inductor raises its own for each
            raise Unavailable(f"torch.compile fails here: {bench.first_line(error)}") from error

        def bind(x: Tensor) -> Run:
            run = bench.run_of(workload, model, bench.channels_last(x))
            return _new_step_each_time(run) if own_graph else run

        return bind

    return Provider(name, title, build, bench.cudnn_benchmark, own_graph)


def _new_step_each_time(run: Run) -> Run:
    """Tells torch.compile's own CUDA graphs that the last call's output is no longer wanted."""
    begin = torch.compiler.cudagraph_mark_step_begin
    if isinstance(run, bench.TrainingStep):
        return bench.TrainingStep(run.model, run.x, run.labels, run.dtype, begin)

    def call() -> Tensor:
        begin()
        return run()

    return call


def cudnn_conv_relu(x: Tensor, conv: nn.Conv2d) -> Tensor:
    assert isinstance(conv.padding, tuple)
    return torch.cudnn_convolution_relu(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, 1)


class MergedInception(nn.Module):
    """An Inception module as TensorRT schedules it, as far as PyTorch's cuDNN call allows: the 1x1 convolutions that read the
    input merged into one, bias and ReLU in each convolution's epilogue, then one concatenation (TensorRT needs none)."""

    def __init__(self, plain: Inception, conv_relu: ConvRelu) -> None:
        super().__init__()
        self.conv_relu = conv_relu
        shared = [folded(block) for block in (plain.branch1, plain.branch2[0], plain.branch3[0])]
        self.widths = [conv.out_channels for conv in shared]
        self.shared = nn.Conv2d(shared[0].in_channels, sum(self.widths), 1)
        self.shared.weight = nn.Parameter(torch.cat([conv.weight for conv in shared]))
        self.shared.bias = nn.Parameter(torch.cat([conv.bias for conv in shared if conv.bias is not None]))
        self.ch3x3, self.ch5x5 = folded(plain.branch2[1]), folded(plain.branch3[1])
        self.pool, self.pool_proj = plain.branch4[0], folded(plain.branch4[1])

    def forward(self, x: Tensor) -> Tensor:
        ch1x1, ch3x3red, ch5x5red = self.conv_relu(x, self.shared).split(self.widths, 1)
        ch3x3, ch5x5 = self.conv_relu(ch3x3red, self.ch3x3), self.conv_relu(ch5x5red, self.ch5x5)
        return torch.cat([ch1x1, ch3x3, ch5x5, self.conv_relu(self.pool(x), self.pool_proj)], 1)


class FoldedConv2d(nn.Module):
    """A convolution block with batch norm folded, bias and ReLU in the convolution's epilogue."""

    def __init__(self, plain: BasicConv2d, conv_relu: ConvRelu) -> None:
        super().__init__()
        self.conv, self.conv_relu = folded(plain), conv_relu

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_relu(x, self.conv)


def folded(block: nn.Module) -> nn.Conv2d:
    """A block's convolution with its batch norm folded in, if it has one."""
    assert isinstance(block, BasicConv2d)
    if isinstance(block.bn, nn.BatchNorm2d):
        return nn.utils.fuse_conv_bn_eval(block.conv, block.bn)
    return block.conv


def merged(model: nn.Module, conv_relu: ConvRelu = cudnn_conv_relu) -> nn.Module:
    """A copy of a plain model with its blocks as `MergedInception` and `FoldedConv2d`."""
    model = copy.deepcopy(model)
    if isinstance(model, Inception):
        return MergedInception(model, conv_relu)
    for name, child in model.named_children():
        if isinstance(child, Inception):
            setattr(model, name, MergedInception(child, conv_relu))
        elif isinstance(child, BasicConv2d):
            setattr(model, name, FoldedConv2d(child, conv_relu))
    return model


def merged_cudnn(workload: Workload) -> Bind:
    """The stand-in for TensorRT on cuDNN."""
    if workload.device.type != "cuda":
        raise Unavailable("cuDNN needs a CUDA device")
    if workload.case.mode == "training":
        raise Unavailable("cuDNN's convolution with ReLU has no gradient in PyTorch")
    model = merged(workload.model).to(memory_format=torch.channels_last)
    return lambda x: bench.run_of(workload, model, bench.channels_last(x))


def all_providers() -> list[Provider]:
    """In the order of the tables."""
    _, channels_last, _ = bench.package_providers()
    return [
        Provider(bench.BASELINE, "PyTorch", torchvision_eager),
        channels_last,
        compiled("compile_default", "torch.compile"),
        compiled("compile_reduce_overhead", "torch.compile, reduce-overhead", own_graph=True, mode="reduce-overhead"),
        compiled("compile_max_autotune", "torch.compile, max-autotune", mode="max-autotune-no-cudagraphs"),
        compiled("compile_freezing", "torch.compile, freezing", trains=False, options={"freezing": True}),
        Provider("merged_cudnn", "merged 1x1 on cuDNN (a TensorRT-like stand-in)", merged_cudnn, bench.cudnn_benchmark),
        Provider("torch_tensorrt", "Torch-TensorRT", torch_tensorrt),
        Provider("tensorrt", "TensorRT", tensorrt),
        Provider("onnxruntime", "ONNX Runtime", onnx_runtime),
        Provider("openvino", "OpenVINO", openvino),
        *(bench.fused_provider(name) for name in reversed(registry.names()) if not registry.get(name).for_tests),
    ]


def lineup(device: str, names: Sequence[str] = ()) -> list[Provider]:
    """The providers of those names, the baseline always among them; without names, all that are for the device.

    Raises:
        ValueError: a name is unknown.
    """
    known = {provider.name: provider for provider in all_providers()}
    for name in names:
        if name not in known:
            raise ValueError(f"--providers must be among {', '.join(known)}, got {name!r}")
    elsewhere = CUDA_ONLY if device == "cpu" else CPU_ONLY
    chosen = {bench.BASELINE, *(names or (name for name in known if name not in elsewhere))}
    return [provider for name, provider in known.items() if name in chosen]

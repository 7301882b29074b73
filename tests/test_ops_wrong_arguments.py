"""What the operators and the functions in front of them say to wrong arguments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import (
    TINY,
    Arguments,
    as_convs,
    fused_inception,
    image,
    inception_arguments,
    packed_inception,
    run_face,
    run_operator,
    stem_arguments,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from googlenet_fused import inception
from googlenet_fused.modules import FusedConv2d
from googlenet_fused.packing import ConvParams

ops = torch.ops.googlenet_fused


def _fake(call: Callable[[Tensor, Arguments], Tensor]) -> Callable[[Tensor, Arguments], Tensor]:
    def run(x: Tensor, parameters: Arguments) -> Tensor:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            weights, biases, norms, eps = parameters
            fakes = [[mode.from_tensor(tensor) for tensor in group] for group in (weights, biases, norms)]
            return call(mode.from_tensor(x), (*fakes, eps))

    return run


def _face_with_gradients(x: Tensor, parameters: Arguments) -> Tensor:
    return inception(x.requires_grad_(), as_convs(*parameters))


WAYS = {
    "face": run_face,
    "face with gradients": _face_with_gradients,
    "operator": run_operator,
    "fake operator": _fake(run_operator),
}
every_way = pytest.mark.parametrize("way", WAYS)

WRONG_INPUTS = {
    "channels": (torch.zeros(2, 6, 7, 6), r"x must be \[n, 5, h, w\].*got \[2, 6, 7, 6\]"),
    "3-D": (torch.zeros(5, 7, 6), r"x must be \[n, 5, h, w\].*got \[5, 7, 6\]"),
    "5-D": (torch.zeros(2, 5, 7, 6, 1), r"x must be \[n, 5, h, w\].*got \[2, 5, 7, 6, 1\]"),
    "no height": (torch.zeros(2, 5, 0, 6), r"height and width of at least 1, got \[2, 5, 0, 6\]"),
    "no width": (torch.zeros(2, 5, 7, 0), r"height and width of at least 1, got \[2, 5, 7, 0\]"),
}


@every_way
@pytest.mark.parametrize("wrong", WRONG_INPUTS)
def test_wrong_input(wrong: str, way: str) -> None:
    x, message = WRONG_INPUTS[wrong]
    with pytest.raises(ValueError, match=message):
        WAYS[way](x.clone(), inception_arguments())


@pytest.mark.parametrize("wrong", WRONG_INPUTS)
def test_wrong_input_of_packed(wrong: str) -> None:
    x, message = WRONG_INPUTS[wrong]
    with pytest.raises(ValueError, match=message):
        ops.inception_packed(x, *packed_inception())


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_wrong_dtype(dtype: torch.dtype, requires_grad: bool) -> None:
    module = fused_inception(TINY).requires_grad_(requires_grad)
    with pytest.raises(TypeError, match=rf"x is {dtype} but the weights are torch\.float32"):
        module(image().to(dtype))
    stem = FusedConv2d.from_module(module.branch1)
    with pytest.raises(TypeError, match=rf"x is {dtype} but the weights are torch\.float32"):
        stem(image().to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_wrong_dtype_of_packed(dtype: torch.dtype) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError), match=r"(?i)bfloat16|float64|double|dtype"):
        ops.inception_packed(image().to(dtype), *packed_inception())


def test_wrong_device() -> None:
    module = fused_inception(TINY)
    for run in (lambda x: module(x), torch.no_grad()(lambda x: module(x))):
        with pytest.raises(ValueError, match=r"x is on meta but the weights are on cpu"):
            run(image().to("meta"))
    module = module.to("meta")
    for run in (lambda x: module(x), torch.no_grad()(lambda x: module(x))):
        with pytest.raises(ValueError, match=r"x is on cpu but the weights are on meta"):
            run(image())


@pytest.mark.parametrize("x_device", ["cpu", "meta"])
def test_wrong_device_of_the_inference_operators(x_device: str) -> None:
    weights_device = "meta" if x_device == "cpu" else "cpu"
    message = rf"x is on {x_device} but the weights? (are|is) on {weights_device}"
    x = image().to(x_device)
    with pytest.raises(ValueError, match=message):
        ops.inception_packed(x, *(tensor.to(weights_device) for tensor in packed_inception()))
    weight, _, norm, *rest = stem_arguments()
    with pytest.raises(ValueError, match=message):
        ops.conv2d_relu(x, weight.to(weights_device), None, [tensor.to(weights_device) for tensor in norm], *rest)


@every_way
@pytest.mark.parametrize("index", range(6), ids=[conv.name for conv in TINY.convs])
def test_weight_that_does_not_fit_is_named(index: int, way: str) -> None:
    parameters = inception_arguments(norm=False, bias=True)
    conv = TINY.convs[index]
    # One input channel too many: for the first weight this makes the second the odd one out.
    parameters[0][index] = torch.zeros(conv.out_channels, conv.in_channels + 1, conv.kernel_size, conv.kernel_size)
    name = TINY.convs[max(index, 1)].name
    with pytest.raises(ValueError, match=rf"^{name} weight has shape"):
        WAYS[way](image(), parameters)


@every_way
def test_reductions_swapped_with_the_first_branch(way: str) -> None:
    # The merged 1x1s are as wide as they should be, so only the parts can tell.
    weights, biases, norms, eps = inception_arguments(norm=False, bias=True)
    weights[0], weights[1], biases[0], biases[1] = weights[1], weights[0], biases[1], biases[0]
    with pytest.raises(ValueError, match=r"ch3x3 weight has shape \[6, 4, 3, 3\], expected \[6, 3, 3, 3\]"):
        WAYS[way](image(), (weights, biases, norms, eps))


@every_way
@pytest.mark.parametrize("kernel", [(1, 1), (7, 7), (5, 3)])
def test_large_kernel_that_no_variant_has(kernel: tuple[int, int], way: str) -> None:
    parameters = inception_arguments(norm=False, bias=True)
    parameters[0][4] = torch.zeros(3, 2, *kernel)
    with pytest.raises(ValueError, match=r"large_kernel must be 3 or 5|^ch5x5 weight has shape"):
        WAYS[way](image(), parameters)


@every_way
def test_weight_of_too_few_dimensions(way: str) -> None:
    parameters = inception_arguments(norm=False, bias=True)
    parameters[0][3] = torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"4-D"):
        WAYS[way](image(), parameters)


@every_way
@pytest.mark.parametrize("width", [1, 7])
@pytest.mark.parametrize("norm", [False, True])
def test_bias_that_does_not_fit(norm: bool, width: int, way: str) -> None:
    for index in range(6):
        parameters = inception_arguments(norm=norm, bias=True)
        parameters[1][index] = torch.zeros(width)
        with pytest.raises(ValueError, match="bias"):
            WAYS[way](image(), parameters)


@every_way
def test_biases_swapped_within_the_merged_convolution(way: str) -> None:
    weights, biases, norms, eps = inception_arguments(norm=False, bias=True)
    biases[0], biases[1] = biases[1], biases[0]
    with pytest.raises(ValueError, match="bias"):
        WAYS[way](image(), (weights, biases, norms, eps))


@every_way
@pytest.mark.parametrize("width", [1, 7])
def test_norm_that_does_not_fit(width: int, way: str) -> None:
    for part in range(4):
        parameters = inception_arguments()
        parameters[2][4 * 3 + part] = torch.ones(width)
        with pytest.raises(ValueError, match=r"ch5x5red|norm"):
            WAYS[way](image(), parameters)


@pytest.mark.parametrize("way", [run_operator, _fake(run_operator)], ids=["operator", "fake operator"])
@pytest.mark.parametrize("group", ["weights", "biases", "norms", "eps"])
def test_wrong_list_lengths(group: str, way: Callable[[Tensor, Arguments], Tensor]) -> None:
    parameters = dict(zip(("weights", "biases", "norms", "eps"), inception_arguments(bias=True), strict=True))
    parameters[group] = parameters[group][:-1]
    found = ", ".join(str(len(parameters[name])) for name in ("weights", "biases", "norms"))
    message = (
        rf"expected 6 weights, 0 or 6 biases, 0 or 24 batch norm tensors and 6 eps, got {found} and {len(parameters['eps'])}"
    )
    with pytest.raises(ValueError, match=message):
        way(image(), tuple(parameters.values()))


@pytest.mark.parametrize("way", [run_face, _face_with_gradients], ids=["face", "face with gradients"])
def test_face_with_too_few_convs(way: Callable[[Tensor, Arguments], Tensor]) -> None:
    weights, biases, norms, eps = inception_arguments()
    with pytest.raises(ValueError, match=r"convs must hold six .*, got 5"):
        way(image(), (weights[:5], biases, norms[:20], eps[:5]))


@pytest.mark.parametrize("way", [run_face, _face_with_gradients], ids=["face", "face with gradients"])
def test_face_with_a_bias_on_some_convs_only(way: Callable[..., Tensor]) -> None:
    weights, _, _, _ = inception_arguments()
    convs = [ConvParams(weight, torch.zeros(len(weight)) if i % 2 else None) for i, weight in enumerate(weights)]
    x = image().requires_grad_(way is _face_with_gradients)
    with pytest.raises(ValueError, match=r"all with a bias or all without, but there is none at 0, 2, 4"):
        inception(x, convs)


WRONG_CONVS = {
    "a module": (lambda: fused_inception(TINY), "got FusedInception"),
    "none": (lambda: None, "got NoneType"),
    "weights alone": (lambda: inception_arguments()[0], "got Tensor at 0"),
    "an empty tuple": (lambda: [()] * 6, "got tuple at 0"),
}


@pytest.mark.parametrize("what", WRONG_CONVS)
def test_face_with_something_else_than_convs(what: str) -> None:
    make, found = WRONG_CONVS[what]
    with pytest.raises(TypeError, match=rf"convs must hold six ConvParams or tuples \(weight, bias\).*, {found}$"):
        inception(image(), make())  # type: ignore[arg-type]


@pytest.mark.parametrize("x", [None, [1.0], "x"])
@pytest.mark.parametrize("grad", [False, True])
def test_x_that_is_no_tensor(grad: bool, x: object) -> None:
    stem = FusedConv2d.from_module(fused_inception(TINY).to_plain().branch1)
    for call in (fused_inception(TINY), stem, lambda x: inception(x, as_convs(*inception_arguments()))):
        with torch.set_grad_enabled(grad), pytest.raises(TypeError, match=f"x must be a torch.Tensor, got {type(x).__name__}"):
            call(x)  # type: ignore[arg-type]


def test_unknown_backend_names_the_choices() -> None:
    message = r"unknown backend 'gpu': choose one of 'auto', .*'cpu'.*'reference'"
    with pytest.raises(ValueError, match=message):
        inception(image(), as_convs(*inception_arguments()), backend="gpu")
    with pytest.raises(ValueError, match=message):
        inception(image().requires_grad_(), as_convs(*inception_arguments()), backend="gpu")
    with pytest.raises(ValueError, match=message):
        ops.inception_packed(image(), *packed_inception(), "gpu")
    with pytest.raises(ValueError, match=message):
        ops.conv2d_relu(image(), *stem_arguments(), "gpu")


def test_convolution_that_leaves_nothing() -> None:
    with pytest.raises(ValueError, match=r"too small for a 3x3 convolution"):
        ops.conv2d_relu(image(height=2), *stem_arguments(3, 1, 0))
    with pytest.raises(ValueError, match=r"x must be \[n, 5, h, w\]"):
        ops.conv2d_relu(image()[:, :4], *stem_arguments(3, 1, 0))
    with pytest.raises(ValueError, match=r"x must be \[n, 5, h, w\]"):
        ops.conv2d_relu(image()[0], *stem_arguments(3, 1, 0))


def test_packed_weights_that_do_not_fit_are_named() -> None:
    weights = packed_inception()
    with pytest.raises(ValueError, match="pool_proj_weight has shape"):
        ops.inception_packed(image(), *weights._replace(pool_proj_weight=torch.zeros(5, 4, 1, 1)))
    with pytest.raises(ValueError, match="ch3x3_bias has shape"):
        ops.inception_packed(image(), *weights._replace(ch3x3_bias=torch.zeros(5)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_stem_parameters_that_do_not_fit(device: str) -> None:
    weight, bias, norm, *rest = (
        [t.to(device) for t in argument] if isinstance(argument, list) and isinstance(argument[0], Tensor) else argument
        for argument in stem_arguments(parts="norm and bias")
    )
    x, weight, bias = image().to(device), weight.to(device), bias.to(device)
    with pytest.raises(ValueError, match="norm"):
        ops.conv2d_relu(x, weight, bias, norm[:3], *rest)
    with pytest.raises(ValueError, match="weight"):
        ops.conv2d_relu(x, weight[0], bias, norm, *rest)
    for width in (1, 7):
        with pytest.raises(ValueError, match="bias"):
            ops.conv2d_relu(x, weight, torch.zeros(width, device=device), norm, *rest)
        with pytest.raises(ValueError, match="norm"):
            ops.conv2d_relu(x, weight, bias, [*norm[:3], torch.ones(width, device=device)], *rest)

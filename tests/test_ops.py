"""The operators as torch sees them: schema, fake kernels, strides, transforms, and what they say to wrong arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import cases
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from googlenet_fused import FusedInception, InceptionSpec, inception
from googlenet_fused.modules import FusedConv2d
from googlenet_fused.ops import conv2d_relu
from googlenet_fused.packing import BatchNormParams, ConvParams, PackedInception, pack_inception

ops = torch.ops.googlenet_fused
EPS = 1e-3
SPECS = cases.both_kernels(cases.TINY)
PARTS = {"norm": (True, False), "bias": (False, True), "norm and bias": (True, True), "neither": (False, False)}
STEM = {"1x1": (1, 1, 0), "3x3": (3, 1, 1), "7x7 stride 2": (7, 2, 3)}

Arguments = tuple[list[Tensor], list[Tensor], list[Tensor], list[float]]


def arguments(
    spec: InceptionSpec = cases.TINY,
    *,
    norm: bool = True,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    requires_grad: bool = False,
    seed: int = 4,
) -> Arguments:
    """``weights, biases, norms, eps`` of the raw operator. Running statistics never require gradients."""
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


def as_convs(weights: list[Tensor], biases: list[Tensor], norms: list[Tensor], eps: list[float]) -> list[ConvParams]:
    return [
        ConvParams(weight, biases[i] if biases else None, BatchNormParams(*norms[4 * i : 4 * i + 4]) if norms else None, eps[i])
        for i, weight in enumerate(weights)
    ]


def plain(x: Tensor, convs: list[ConvParams]) -> Tensor:
    """The module out of torch's own functions, batch norm unfolded."""

    def conv(x: Tensor, params: ConvParams) -> Tensor:
        x = F.conv2d(x, params.weight, params.bias, padding=params.weight.shape[2] // 2)
        if params.norm is not None:
            weight, bias, mean, variance = params.norm
            x = F.batch_norm(x, mean, variance, weight, bias, eps=params.eps)
        return x.relu()

    c1, c3r, c3, c5r, c5, proj = convs
    return torch.cat(
        [conv(x, c1), conv(conv(x, c3r), c3), conv(conv(x, c5r), c5), conv(F.max_pool2d(x, 3, stride=1, padding=1), proj)],
        dim=1,
    )


def packed(spec: InceptionSpec = cases.TINY, dtype: torch.dtype = torch.float32) -> PackedInception:
    return pack_inception(as_convs(*arguments(spec, dtype=dtype)), dtype)


def stem_arguments(
    kernel_size: int = 3, stride: int = 1, padding: int = 1, *, parts: str = "norm", requires_grad: bool = False
) -> tuple[Tensor, Tensor | None, list[Tensor], float, list[int], list[int]]:
    """``weight, bias, norm, eps, stride, padding`` of ``conv2d_relu``: 5 channels to 4."""
    norm, bias = PARTS[parts]
    weight = (torch.randn(4, 5, kernel_size, kernel_size) * 0.2).requires_grad_(requires_grad)
    norms = [torch.randn(4), torch.randn(4), torch.randn(4) * 0.1, torch.rand(4) + 0.5] if norm else []
    return weight, torch.randn(4) if bias else None, norms, EPS, [stride, stride], [padding, padding]


def plain_stem(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: list[Tensor], eps: float, stride: list[int], padding: list[int]
) -> Tensor:
    x = F.conv2d(x, weight, bias, stride, padding)
    if norm:
        gamma, beta, mean, variance = norm
        x = F.batch_norm(x, mean, variance, gamma, beta, eps=eps)
    return x.relu()


def image(spec: InceptionSpec = cases.TINY, batch: int = 2, height: int = 7, width: int = 6) -> Tensor:
    return cases.random_input(spec, batch, height, width)


# What every operator must be to torch.


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice_of_wider"])
@pytest.mark.parametrize("spec", SPECS, ids=["3x3", "5x5"])
def test_opcheck_inception(spec: InceptionSpec, layout: str) -> None:
    x = cases.LAYOUTS[layout](image(spec)).requires_grad_()
    opcheck(ops.inception, (x, *arguments(spec, requires_grad=True)))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("parts", PARTS)
def test_opcheck_inception_parts(parts: str, requires_grad: bool) -> None:
    norm, bias = PARTS[parts]
    x = image().requires_grad_(requires_grad)
    parameters = arguments(norm=norm, bias=bias, requires_grad=requires_grad)
    for backend_and_cache in ((), ("reference", True)):
        opcheck(ops.inception, (x, *parameters, *backend_and_cache))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice_of_wider"])
@pytest.mark.parametrize("spec", SPECS, ids=["3x3", "5x5"])
def test_opcheck_inception_packed(spec: InceptionSpec, layout: str) -> None:
    opcheck(ops.inception_packed, (cases.LAYOUTS[layout](image(spec)), *packed(spec)))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice_of_wider"])
@pytest.mark.parametrize("stem", STEM)
def test_opcheck_conv2d_relu(stem: str, layout: str, requires_grad: bool) -> None:
    x = cases.LAYOUTS[layout](image()).requires_grad_(requires_grad)
    opcheck(ops.conv2d_relu, (x, *stem_arguments(*STEM[stem], requires_grad=requires_grad)))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("parts", PARTS)
def test_opcheck_conv2d_relu_parts(parts: str, requires_grad: bool) -> None:
    for backend_and_cache in ((), ("reference", True)):
        parameters = stem_arguments(parts=parts, requires_grad=requires_grad)
        opcheck(ops.conv2d_relu, (image().requires_grad_(requires_grad), *parameters, *backend_and_cache))


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("spec", SPECS, ids=["3x3", "5x5"])
def test_operator_and_face_are_the_plain_functions(spec: InceptionSpec, parts: str) -> None:
    norm, bias = PARTS[parts]
    convs = arguments(spec, norm=norm, bias=bias, dtype=torch.float64)
    x = cases.random_input(spec, 2, 7, 6, torch.float64)
    expected = plain(x, as_convs(*convs))
    torch.testing.assert_close(inception(x, as_convs(*convs)), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ops.inception(x, *convs), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("stem", STEM)
def test_stem_is_the_plain_functions(stem: str, parts: str) -> None:
    x = image().double()
    weight, bias, norm, *geometry = stem_arguments(*STEM[stem], parts=parts)
    parameters = (weight.double(), None if bias is None else bias.double(), [tensor.double() for tensor in norm], *geometry)
    expected = plain_stem(x, *parameters)
    torch.testing.assert_close(ops.conv2d_relu(x, *parameters), expected, rtol=1e-12, atol=1e-12)
    conv = ConvParams(parameters[0], parameters[1], BatchNormParams(*parameters[2]) if norm else None, EPS)
    for x_or_leaf in (x, x.clone().requires_grad_()):
        out = conv2d_relu(x_or_leaf, conv, stride=geometry[1], padding=geometry[2])
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_face_takes_the_first_fields_of_a_conv() -> None:
    weights, biases, _, _ = arguments(norm=False, bias=True)
    convs = [ConvParams(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    assert torch.equal(inception(image(), list(zip(weights, biases, strict=True))), inception(image(), convs))


# Strides: what the fake kernel promises is what the real one returns.


def _inception_call(x: Tensor, on: Callable[[Tensor], Tensor], spec: InceptionSpec) -> Tensor:
    weights, biases, norms, eps = arguments(spec)
    return ops.inception(x, [on(w) for w in weights], [on(b) for b in biases], [on(t) for t in norms], eps)


def _packed_call(x: Tensor, on: Callable[[Tensor], Tensor], spec: InceptionSpec) -> Tensor:
    return ops.inception_packed(x, *(on(tensor) for tensor in packed(spec)))


def _face_call(x: Tensor, on: Callable[[Tensor], Tensor], spec: InceptionSpec) -> Tensor:
    weights, biases, norms, eps = arguments(spec)
    return inception(x, as_convs([on(w) for w in weights], [on(b) for b in biases], [on(t) for t in norms], eps))


def _conv_call(x: Tensor, on: Callable[[Tensor], Tensor], spec: InceptionSpec) -> Tensor:
    weight, bias, norm, *rest = stem_arguments(3, 2, 1, parts="norm and bias")
    return ops.conv2d_relu(x, on(weight), on(bias), [on(tensor) for tensor in norm], *rest)


CALLS = {"inception": _inception_call, "inception_packed": _packed_call, "conv2d_relu": _conv_call, "face": _face_call}
SHAPES = [(2, 7, 6), (1, 5, 3), (1, 1, 1), (3, 1, 4), (0, 4, 3)]


def assert_same_frame(fake: Tensor, real: Tensor) -> None:
    assert fake.shape == real.shape
    assert fake.dtype == real.dtype
    assert fake.stride() == real.stride()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("call", CALLS)
def test_meta_strides_are_the_real_ones(call: str, layout: str, shape: tuple[int, int, int]) -> None:
    for spec in SPECS:
        x = cases.LAYOUTS[layout](image(spec, *shape))
        on_meta = torch.empty_strided(x.shape, x.stride(), device="meta")
        fake = CALLS[call](on_meta, lambda tensor: tensor.to("meta"), spec)
        assert fake.is_meta
        assert_same_frame(fake, CALLS[call](x, lambda tensor: tensor, spec))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("call", CALLS)
def test_fake_tensor_strides_are_the_real_ones(call: str, layout: str) -> None:
    x = cases.LAYOUTS[layout](image())
    mode = FakeTensorMode()
    fake = CALLS[call](mode.from_tensor(x), mode.from_tensor, cases.TINY)
    assert_same_frame(fake, CALLS[call](x, lambda tensor: tensor, cases.TINY))
    assert fake.fake_mode is mode


def test_modules_made_and_called_in_a_fake_mode() -> None:
    with FakeTensorMode():
        module = FusedInception(*list(cases.TINY)[:7]).eval()
        x = torch.empty(2, 5, 7, 6).contiguous(memory_format=torch.channels_last)
        out = module(x)
        with torch.no_grad():
            assert_same_frame(module(x), out)
    assert out.shape == (2, cases.TINY.out_channels, 7, 6)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_output_follows_the_layout_of_the_input(layout: str) -> None:
    x = cases.LAYOUTS[layout](image())
    channels_last = layout in ("channels_last", "slice_of_wider")
    expected = torch.channels_last if channels_last else torch.contiguous_format
    out = ops.inception(x, *arguments())
    assert out.is_contiguous(memory_format=expected)
    assert torch.equal(out, ops.inception(x.clone(memory_format=expected), *arguments()))


@pytest.mark.parametrize("call", CALLS)
def test_empty_batch(call: str) -> None:
    out = CALLS[call](image(batch=0), lambda tensor: tensor, cases.TINY)
    channels, *size = (4, 4, 3) if call == "conv2d_relu" else (cases.TINY.out_channels, 7, 6)
    assert list(out.shape) == [0, channels, *size]


def test_operators_leave_their_arguments_alone() -> None:
    x, parameters = image(), arguments(bias=True)
    copies = x.clone(), [[tensor.clone() for tensor in group] for group in parameters[:3]]
    ops.inception(x, *parameters)
    inception(x, as_convs(*parameters))
    assert torch.equal(x, copies[0])
    for group, before in zip(parameters[:3], copies[1], strict=True):
        assert all(torch.equal(tensor, old) for tensor, old in zip(group, before, strict=True))


# Forward-mode differentiation: an error, never zeros.


def _dual(run: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(run(forward_ad.make_dual(tensor, torch.ones_like(tensor)))).tangent


def _jvp(run: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor | None:
    return torch.func.jvp(run, (tensor,), (torch.ones_like(tensor),))[1]


def _jacfwd(run: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor | None:
    return torch.func.jacfwd(lambda t: run(t).sum())(tensor)


def _of_module(of: str, requires_grad: bool = True) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    module = cases.fused_inception(cases.TINY).requires_grad_(requires_grad)
    x = image()
    if of == "x":
        return module, x
    return lambda tensor: torch.func.functional_call(module, {of: tensor}, (x,)), module.get_parameter(of).detach().clone()


def _of_parameters(way: Callable[[Tensor, Arguments], Tensor], of: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    weights, biases, norms, eps = arguments(bias=True)
    x = image()
    if of == "weight":
        return lambda tensor: way(x, ([*weights[:4], tensor, weights[5]], biases, norms, eps)), weights[4]
    if of == "bias":
        return lambda tensor: way(x, (weights, [tensor, *biases[1:]], norms, eps)), biases[0]
    if of == "norm":
        return lambda tensor: way(x, (weights, biases, [tensor, *norms[1:]], eps)), norms[0]
    if of == "x of a trainable module":
        parameters = arguments(requires_grad=True)
        return lambda tensor: way(tensor, parameters), x
    return lambda tensor: way(tensor, (weights, biases, norms, eps)), x


def _of_packed(of: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    weights, x = packed(), image()
    if of == "x":
        return lambda tensor: ops.inception_packed(tensor, *weights), x
    return lambda tensor: ops.inception_packed(x, *weights._replace(**{of: tensor})), getattr(weights, of)


def _of_conv(of: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    x, (weight, bias, norm, *rest) = image(), stem_arguments(parts="norm and bias")
    if of == "x":
        return lambda tensor: ops.conv2d_relu(tensor, weight, bias, norm, *rest), x
    if of == "weight":
        return lambda tensor: ops.conv2d_relu(x, tensor, bias, norm, *rest), weight
    return lambda tensor: ops.conv2d_relu(x, weight, bias, [tensor, *norm[1:]], *rest), norm[0]


def _of_stem(of: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    x, (weight, bias, norm, _, stride, padding) = image(), stem_arguments(parts="norm and bias")

    def face(x: Tensor, weight: Tensor) -> Tensor:
        return conv2d_relu(x, ConvParams(weight, bias, BatchNormParams(*norm), EPS), stride=stride, padding=padding)

    return (lambda tensor: face(tensor, weight), x) if of == "x" else (lambda tensor: face(x, tensor), weight)


def _raw(x: Tensor, parameters: Arguments) -> Tensor:
    return ops.inception(x, *parameters)


def _face(x: Tensor, parameters: Arguments) -> Tensor:
    return inception(x, as_convs(*parameters))


FORWARD_MODE: dict[str, Callable[[], tuple[Callable[[Tensor], Tensor], Tensor]]] = {
    "module, x": lambda: _of_module("x"),
    "frozen module, x": lambda: _of_module("x", requires_grad=False),
    "module, weight": lambda: _of_module("branch2.0.conv.weight"),
    **{
        f"{name}, {of}": partial(_of_parameters, way, of)
        for name, way in (("face", _face), ("inception", _raw))
        for of in ("x", "x of a trainable module", "weight", "bias", "norm")
    },
    **{f"face of the stem, {of}": partial(_of_stem, of) for of in ("x", "weight")},
    **{f"inception_packed, {of}": partial(_of_packed, of) for of in ("x", "ch3x3_weight", "shared_bias")},
    **{f"conv2d_relu, {of}": partial(_of_conv, of) for of in ("x", "weight", "norm")},
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("mode", [_jvp, _jacfwd], ids=["jvp", "jacfwd"])
@pytest.mark.parametrize("what", [what for what in FORWARD_MODE if what.startswith(("module", "frozen module", "face"))])
def test_func_jvp_is_refused(what: str, mode: Callable[..., Tensor | None]) -> None:
    # Only here: torch.func hands an operator that is called directly tensors without their tangents.
    run, tensor = FORWARD_MODE[what]()
    with pytest.raises(NotImplementedError, match=r"forward-mode differentiation|jvp"):
        mode(run, tensor)


@pytest.mark.parametrize("what", FORWARD_MODE)
def test_dual_tensors_are_refused(what: str) -> None:
    run, tensor = FORWARD_MODE[what]()
    with pytest.raises(NotImplementedError, match=r"forward-mode differentiation|jvp"):
        _dual(run, tensor)


def test_a_forward_mode_level_that_does_not_touch_the_operator_is_no_obstacle() -> None:
    x = image()
    expected = ops.inception(x, *arguments())
    with forward_ad.dual_level():
        forward_ad.make_dual(x.clone(), torch.ones_like(x))
        assert torch.equal(inception(x, as_convs(*arguments())), expected)


# torch.func's transforms: the plain block's result or an error, never a wrong result.


def test_func_grad_is_exact_or_refused() -> None:
    fused, plain_block = cases.fused_inception(cases.TINY).double(), cases.plain_inception(cases.TINY).double()
    x = image().double()
    expected = torch.func.grad(lambda x: plain_block(x).square().sum())(x)
    try:
        gradient = torch.func.grad(lambda x: fused(x).square().sum())(x)
    except (NotImplementedError, RuntimeError) as error:
        assert "functorch" in str(error) or "torch.func" in str(error)  # noqa: PT017
        return
    torch.testing.assert_close(gradient, expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("grad_enabled", [False, True])
def test_vmap_over_images_is_exact_or_refused(grad_enabled: bool) -> None:
    fused = cases.fused_inception(cases.TINY)
    x = image(batch=4)[:, None]
    with torch.set_grad_enabled(grad_enabled):
        try:
            out = torch.func.vmap(fused)(x)
        except (NotImplementedError, RuntimeError) as error:
            assert "atching rule not implemented" in str(error) or "vmap" in str(error)  # noqa: PT017
            return
        torch.testing.assert_close(out, torch.stack([fused(image) for image in x]))


# The operator on packed weights has no gradient: asking for one is an error that says what to call.


INFERENCE = {
    "inception_packed, x": lambda: (ops.inception_packed, (image().requires_grad_(), *packed())),
    "inception_packed, weight": lambda: (
        ops.inception_packed,
        (image(), *packed()._replace(ch3x3_weight=packed().ch3x3_weight.requires_grad_())),
    ),
}


def _backward(operator: Callable[..., Tensor], parameters: tuple[Any, ...]) -> None:
    operator(*parameters).sum().backward()


@pytest.mark.parametrize("what", INFERENCE)
def test_inference_operators_refuse_gradients(what: str) -> None:
    operator, parameters = INFERENCE[what]()
    with pytest.raises(NotImplementedError, match=r"for inference: .*googlenet_fused\.inception"):
        _backward(operator, parameters)


@pytest.mark.parametrize("what", INFERENCE)
def test_inference_operators_compiled_do_not_drop_gradients_in_silence(what: str) -> None:
    operator, parameters = INFERENCE[what]()
    torch._dynamo.reset()
    with pytest.raises(NotImplementedError, match=r"for inference: .*googlenet_fused\.inception"):
        _backward(torch.compile(operator, backend="aot_eager"), parameters)


@pytest.mark.parametrize("what", INFERENCE)
def test_inference_operators_on_parameters_without_gradients_wanted(what: str) -> None:
    operator, parameters = INFERENCE[what]()
    with torch.no_grad():
        out = operator(*parameters)
    assert not out.requires_grad
    with torch.inference_mode():
        assert torch.equal(operator(*parameters), out)


# Wrong arguments.


def _fake(call: Callable[[Tensor, Arguments], Tensor]) -> Callable[[Tensor, Arguments], Tensor]:
    def run(x: Tensor, parameters: Arguments) -> Tensor:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            weights, biases, norms, eps = parameters
            fakes = [[mode.from_tensor(tensor) for tensor in group] for group in (weights, biases, norms)]
            return call(mode.from_tensor(x), (*fakes, eps))

    return run


def _face_with_gradients(x: Tensor, parameters: Arguments) -> Tensor:
    return inception(x.requires_grad_(), as_convs(*parameters))


WAYS = {"face": _face, "face with gradients": _face_with_gradients, "operator": _raw, "fake operator": _fake(_raw)}
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
        WAYS[way](x.clone(), arguments())


@pytest.mark.parametrize("wrong", WRONG_INPUTS)
def test_wrong_input_of_packed(wrong: str) -> None:
    x, message = WRONG_INPUTS[wrong]
    with pytest.raises(ValueError, match=message):
        ops.inception_packed(x, *packed())


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_wrong_dtype(dtype: torch.dtype, requires_grad: bool) -> None:
    module = cases.fused_inception(cases.TINY).requires_grad_(requires_grad)
    with pytest.raises(TypeError, match=rf"x is {dtype} but the weights are torch\.float32"):
        module(image().to(dtype))
    stem = FusedConv2d.from_module(module.branch1)
    with pytest.raises(TypeError, match=rf"x is {dtype} but the weights are torch\.float32"):
        stem(image().to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_wrong_dtype_of_packed(dtype: torch.dtype) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError), match=r"(?i)bfloat16|float64|double|dtype"):
        ops.inception_packed(image().to(dtype), *packed())


def test_wrong_device() -> None:
    module = cases.fused_inception(cases.TINY)
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
        ops.inception_packed(x, *(tensor.to(weights_device) for tensor in packed()))
    weight, _, norm, *rest = stem_arguments()
    with pytest.raises(ValueError, match=message):
        ops.conv2d_relu(x, weight.to(weights_device), None, [tensor.to(weights_device) for tensor in norm], *rest)


@every_way
@pytest.mark.parametrize("index", range(6), ids=[conv.name for conv in cases.TINY.convs])
def test_weight_that_does_not_fit_is_named(index: int, way: str) -> None:
    parameters = arguments(norm=False, bias=True)
    conv = cases.TINY.convs[index]
    # One input channel too many: for the first weight this makes the second the odd one out.
    parameters[0][index] = torch.zeros(conv.out_channels, conv.in_channels + 1, conv.kernel_size, conv.kernel_size)
    name = cases.TINY.convs[max(index, 1)].name
    with pytest.raises(ValueError, match=rf"^{name} weight has shape"):
        WAYS[way](image(), parameters)


@every_way
def test_reductions_swapped_with_the_first_branch(way: str) -> None:
    # The merged 1x1s are as wide as they should be, so only the parts can tell.
    weights, biases, norms, eps = arguments(norm=False, bias=True)
    weights[0], weights[1], biases[0], biases[1] = weights[1], weights[0], biases[1], biases[0]
    with pytest.raises(ValueError, match=r"ch3x3 weight has shape \[6, 4, 3, 3\], expected \[6, 3, 3, 3\]"):
        WAYS[way](image(), (weights, biases, norms, eps))


@every_way
@pytest.mark.parametrize("kernel", [(1, 1), (7, 7), (5, 3)])
def test_large_kernel_that_no_variant_has(kernel: tuple[int, int], way: str) -> None:
    parameters = arguments(norm=False, bias=True)
    parameters[0][4] = torch.zeros(3, 2, *kernel)
    with pytest.raises(ValueError, match=r"large_kernel must be 3 or 5|^ch5x5 weight has shape"):
        WAYS[way](image(), parameters)


@every_way
def test_weight_of_too_few_dimensions(way: str) -> None:
    parameters = arguments(norm=False, bias=True)
    parameters[0][3] = torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"4-D"):
        WAYS[way](image(), parameters)


@every_way
@pytest.mark.parametrize("width", [1, 7])
@pytest.mark.parametrize("norm", [False, True])
def test_bias_that_does_not_fit(norm: bool, width: int, way: str) -> None:
    for index in range(6):
        parameters = arguments(norm=norm, bias=True)
        parameters[1][index] = torch.zeros(width)
        with pytest.raises(ValueError, match="bias"):
            WAYS[way](image(), parameters)


@every_way
def test_biases_swapped_within_the_merged_convolution(way: str) -> None:
    weights, biases, norms, eps = arguments(norm=False, bias=True)
    biases[0], biases[1] = biases[1], biases[0]
    with pytest.raises(ValueError, match="bias"):
        WAYS[way](image(), (weights, biases, norms, eps))


@every_way
@pytest.mark.parametrize("width", [1, 7])
def test_norm_that_does_not_fit(width: int, way: str) -> None:
    for part in range(4):
        parameters = arguments()
        parameters[2][4 * 3 + part] = torch.ones(width)
        with pytest.raises(ValueError, match=r"ch5x5red|norm"):
            WAYS[way](image(), parameters)


@pytest.mark.parametrize("way", [_raw, _fake(_raw)], ids=["operator", "fake operator"])
@pytest.mark.parametrize("group", ["weights", "biases", "norms", "eps"])
def test_wrong_list_lengths(group: str, way: Callable[[Tensor, Arguments], Tensor]) -> None:
    parameters = dict(zip(("weights", "biases", "norms", "eps"), arguments(bias=True), strict=True))
    parameters[group] = parameters[group][:-1]
    found = ", ".join(str(len(parameters[name])) for name in ("weights", "biases", "norms"))
    message = (
        rf"expected 6 weights, 0 or 6 biases, 0 or 24 batch norm tensors and 6 eps, got {found} and {len(parameters['eps'])}"
    )
    with pytest.raises(ValueError, match=message):
        way(image(), tuple(parameters.values()))


@pytest.mark.parametrize("way", [_face, _face_with_gradients], ids=["face", "face with gradients"])
def test_face_with_too_few_convs(way: Callable[[Tensor, Arguments], Tensor]) -> None:
    weights, biases, norms, eps = arguments()
    with pytest.raises(ValueError, match=r"six convolutions .*got 5"):
        way(image(), (weights[:5], biases, norms[:20], eps[:5]))


@pytest.mark.parametrize("way", [_face, _face_with_gradients], ids=["face", "face with gradients"])
def test_face_with_a_bias_on_some_convs_only(way: Callable[..., Tensor]) -> None:
    weights, _, _, _ = arguments()
    convs = [ConvParams(weight, torch.zeros(len(weight)) if i % 2 else None) for i, weight in enumerate(weights)]
    x = image().requires_grad_(way is _face_with_gradients)
    with pytest.raises(ValueError, match="bias"):
        inception(x, convs)


def test_unknown_backend_names_the_choices() -> None:
    message = r"unknown backend 'gpu': choose one of 'auto', .*'cpu'.*'reference'"
    with pytest.raises(ValueError, match=message):
        inception(image(), as_convs(*arguments()), backend="gpu")
    with pytest.raises(ValueError, match=message):
        inception(image().requires_grad_(), as_convs(*arguments()), backend="gpu")
    with pytest.raises(ValueError, match=message):
        ops.inception_packed(image(), *packed(), "gpu")
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
    weights = packed()
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

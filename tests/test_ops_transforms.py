"""The operators under forward mode and torch.func, and those without gradients: right or an error, never silently wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from cases import (
    EPS,
    TINY,
    Arguments,
    as_convs,
    fused_inception,
    image,
    inception_arguments,
    packed_inception,
    plain_inception,
    run_face,
    run_operator,
    stem_arguments,
)
from torch import Tensor

from googlenet_fused import inception
from googlenet_fused.ops import conv2d_relu
from googlenet_fused.packing import BatchNormParams, ConvParams

ops = torch.ops.googlenet_fused


# Forward-mode differentiation: an error, never zeros.


def _dual(run: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(run(forward_ad.make_dual(tensor, torch.ones_like(tensor)))).tangent


def _jvp(run: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor | None:
    return torch.func.jvp(run, (tensor,), (torch.ones_like(tensor),))[1]


def _jacfwd(run: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor | None:
    return torch.func.jacfwd(lambda t: run(t).sum())(tensor)


def _of_module(of: str, requires_grad: bool = True) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    module = fused_inception(TINY).requires_grad_(requires_grad)
    x = image()
    if of == "x":
        return module, x
    return lambda tensor: torch.func.functional_call(module, {of: tensor}, (x,)), module.get_parameter(of).detach().clone()


def _of_parameters(way: Callable[[Tensor, Arguments], Tensor], of: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    weights, biases, norms, eps = inception_arguments(bias=True)
    x = image()
    if of == "weight":
        return lambda tensor: way(x, ([*weights[:4], tensor, weights[5]], biases, norms, eps)), weights[4]
    if of == "bias":
        return lambda tensor: way(x, (weights, [tensor, *biases[1:]], norms, eps)), biases[0]
    if of == "norm":
        return lambda tensor: way(x, (weights, biases, [tensor, *norms[1:]], eps)), norms[0]
    if of == "x of a trainable module":
        parameters = inception_arguments(requires_grad=True)
        return lambda tensor: way(tensor, parameters), x
    return lambda tensor: way(tensor, (weights, biases, norms, eps)), x


def _of_packed(of: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    weights, x = packed_inception(), image()
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


FORWARD_MODE: dict[str, Callable[[], tuple[Callable[[Tensor], Tensor], Tensor]]] = {
    "module, x": lambda: _of_module("x"),
    "frozen module, x": lambda: _of_module("x", requires_grad=False),
    "module, weight": lambda: _of_module("branch2.0.conv.weight"),
    **{
        f"{name}, {of}": partial(_of_parameters, way, of)
        for name, way in (("face", run_face), ("inception", run_operator))
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
    expected = ops.inception(x, *inception_arguments())
    with forward_ad.dual_level():
        forward_ad.make_dual(x.clone(), torch.ones_like(x))
        assert torch.equal(inception(x, as_convs(*inception_arguments())), expected)


# torch.func's transforms: the plain block's result or an error, never a wrong result.


def test_func_grad_is_exact_or_refused() -> None:
    fused, plain_block = fused_inception(TINY).double(), plain_inception(TINY).double()
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
    fused = fused_inception(TINY)
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
    "inception_packed, x": lambda: (ops.inception_packed, (image().requires_grad_(), *packed_inception())),
    "inception_packed, weight": lambda: (
        ops.inception_packed,
        (image(), *packed_inception()._replace(ch3x3_weight=packed_inception().ch3x3_weight.requires_grad_())),
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

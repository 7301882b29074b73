"""Modules that take the place of the plain ones: same constructor, same state_dict, fused in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from googlenet_fused import direct, kept_weights
from googlenet_fused.backends import registry
from googlenet_fused.blocks import BasicConv2d, ConvBlock, Inception, Norm
from googlenet_fused.direct import DirectCall, unobserved
from googlenet_fused.ops import conv2d_relu, inception
from googlenet_fused.packing import BatchNormParams, ConvParams, spec_of_weights
from googlenet_fused.parameter_cache import ModuleWatch, capturing
from googlenet_fused.spec import InceptionSpec

_CONV_BLOCKS = {("googlenet_fused.blocks", "BasicConv2d"), ("torchvision.models.googlenet", "BasicConv2d")}
_INCEPTIONS = {("googlenet_fused.blocks", "Inception"), ("torchvision.models.googlenet", "Inception")}


class CannotFuse(ValueError):
    """The module is not one that can be fused; the message says what stands in the way."""


class _Fused(nn.Module):
    """What fused modules share: which way a call takes, packed weights that follow the parameters, and the way back.

    ``_watch`` is a shortcut for the calls that users time: while nothing about the module changes, they need not go through the
    operator and its cache.
    """

    backend: str
    plain_class: type[nn.Module]
    _watch: ModuleWatch[DirectCall] | None = None

    def _conv_blocks(self) -> tuple[nn.Module, ...]:
        raise NotImplementedError

    def _through_operator(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _bind_direct(self, x: Tensor) -> DirectCall:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        run = self._shortcut(x)
        if run is not None:
            return run(x)
        if any(_has_live_norm(block) for block in self._conv_blocks()):
            if not torch.compiler.is_compiling():
                self.repack()  # live batch norm updates its statistics without a trace
            return super().forward(x)
        out = self._through_operator(x)
        self._make_shortcut(x)
        return out

    def to_plain(self) -> nn.Module:
        """The plain module of the class this one was made from, sharing its parameters."""
        return plain_of(self)

    def repack(self) -> None:
        """Forget the packed weights. Needed only after a change that cannot be seen, as through ``weight.data``."""
        self._watch = None
        conv: Any = self._conv_blocks()[0]._modules["conv"]
        weight = conv._parameters.get("weight")
        if weight is not None:
            kept_weights.forget(weight)

    def _shortcut(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """The forward pass for ``x`` without the operator, if that is ready and the module unchanged."""
        if not unobserved(x):  # first, so that a compiler sees no attribute that changes
            return None
        watch = self._watch
        if watch is None:
            return None
        if not watch.intact(self):
            self.repack()  # a norm that counted a batch has written its statistics, which the operator's cache cannot see
            return None
        return watch.value.run if watch.current() and watch.value.serves(x, self.backend) else None

    def _make_shortcut(self, x: Tensor) -> None:
        """After a call with ``x`` that went through the operator: spare the next ones that."""
        if not unobserved(x) or self.training or x.is_meta or not x.numel() or capturing(x):
            return
        try:
            self._watch = ModuleWatch(self, lambda: self._bind_direct(x))
        except ValueError:
            self._watch = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_watch"}

    # Parameters can keep their identity and version in the next two; and where torch swaps tensors instead
    # (torch.__future__.set_swap_module_params_on_conversion), it refuses those to which a cache holds weak references.

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        # What Module.to, half, cuda and the like come down to.
        self.repack()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.repack()
        super()._load_from_state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module.train``; weights are packed anew afterwards."""
        self.repack()
        return super().train(mode)


class FusedConv2d(_Fused, BasicConv2d):
    """Convolution, batch norm and ReLU as one operator in evaluation mode, with a channels_last result.

    ``[n, in_channels, h, w] -> [n, out_channels, h', w']``. In training mode with live batch norm it runs the plain sequence.
    Made by ``from_module``, which ``fuse`` calls for the stem and the auxiliary heads.
    """

    @classmethod
    def from_module(cls, block: nn.Module, *, backend: str = registry.AUTO) -> FusedConv2d:
        """A fused block that shares the parameters of a plain one: torchvision's or this package's ``BasicConv2d``.

        Raises:
            CannotFuse: the block is not exactly convolution, batch norm and ReLU.
            ValueError: no backend has this name.
        """
        registry.check_name(backend)
        _check_conv_block(block)
        fused = cls.__new__(cls)
        adopt(fused, block)
        fused.backend, fused.plain_class = backend, type(block)
        return fused

    def _conv_blocks(self) -> tuple[nn.Module, ...]:
        return (self,)

    def _through_operator(self, x: Tensor) -> Tensor:
        conv: Any = self.conv
        params, cache = _conv_params(self), not self.training
        return conv2d_relu(x, params, stride=conv.stride, padding=conv.padding, backend=self.backend, cache=cache)

    def _bind_direct(self, x: Tensor) -> DirectCall:
        conv: Any = self.conv
        return direct.conv2d_relu(x, _conv_params(self), conv.stride, conv.padding, self.backend)

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"


class FusedInception(_Fused, Inception):
    """An Inception module that runs fused: ``[n, in_channels, h, w] -> [n, ch1x1 + ch3x3 + ch5x5 + pool_proj, h, w]``.

    Constructor and state_dict keys are torchvision's, so it also serves as ``torchvision.models.GoogLeNet(blocks=[BasicConv2d,
    FusedInception, InceptionAux])``. In evaluation mode batch norm is folded in fp64, the 1x1 convolutions that read the input
    are merged, and the packed weights are kept until a parameter, its dtype or its device changes. In training mode batch norm
    is live and the module runs as the plain one does; without batch norm (``norm=None``) training runs fused too.

    A change that leaves neither a new tensor nor a new version behind, such as ``weight.data.mul_(2)`` or a write to shared
    memory by another process, is followed only after ``train()``, ``eval()`` or ``repack()``. Hooks on the inner
    convolutions do not fire while the module runs fused, and another pool or dilation put into it later is not
    looked at. A captured CUDA graph keeps computing with the weights of its capture: after a change, capture anew, or call
    ``torch.compiler.reset()`` where ``torch.compile(mode="reduce-overhead")`` or ``"max-autotune"`` made it.

    Args:
        in_channels, ch1x1, ch3x3red, ch3x3, ch5x5red, ch5x5, pool_proj: the widths, any positive integers.
        conv_block: torchvision's or this package's ``BasicConv2d``; another kind cannot be fused.
        large_kernel: kernel size of ``branch3``: 3 as in torchvision (the default), or 5 as in the paper.
        norm: ``"batch"``, or None for convolutions with bias, as in the paper.
        backend: a backend's name, or ``"auto"``, which also obeys ``use_backend``.

    Raises:
        ValueError: a width, ``large_kernel``, ``norm`` or ``backend`` is out of range.
        CannotFuse: ``conv_block`` makes something other than convolution, batch norm and ReLU.
    """

    def __init__(
        self,
        in_channels: int,
        ch1x1: int,
        ch3x3red: int,
        ch3x3: int,
        ch5x5red: int,
        ch5x5: int,
        pool_proj: int,
        conv_block: ConvBlock | None = None,
        *,
        large_kernel: int = 3,
        norm: Norm = "batch",
        backend: str = registry.AUTO,
    ) -> None:
        registry.check_name(backend)
        super().__init__(
            in_channels, ch1x1, ch3x3red, ch3x3, ch5x5red, ch5x5, pool_proj, conv_block, large_kernel=large_kernel, norm=norm
        )
        self.backend = backend
        self.plain_class = Inception
        read_inception(self)

    @classmethod
    def from_module(cls, block: nn.Module, *, backend: str = registry.AUTO) -> FusedInception:
        """A fused module that shares the parameters of a plain one: torchvision's or this package's ``Inception``.

        The kernel size of the third branch is the module's own.

        Raises:
            CannotFuse: the block is not such a module, or was altered in a way that the fused one would not follow.
            ValueError: no backend has this name.
        """
        registry.check_name(backend)
        _check_class(block, _INCEPTIONS, "an Inception module")
        read_inception(block)
        fused = cls.__new__(cls)
        adopt(fused, block)
        fused.backend, fused.plain_class = backend, type(block)
        return fused

    @property
    def spec(self) -> InceptionSpec:
        """The module's widths and kernel size."""
        return spec_of_weights([_conv_params(block).weight for block in self._conv_blocks()])

    def _conv_blocks(self) -> tuple[nn.Module, ...]:
        return _conv_blocks(self)

    def _through_operator(self, x: Tensor) -> Tensor:
        convs = [_conv_params(block) for block in self._conv_blocks()]
        return inception(x, convs, backend=self.backend, cache=not self.training)

    def _bind_direct(self, x: Tensor) -> DirectCall:
        return direct.inception(x, [_conv_params(block) for block in self._conv_blocks()], self.backend)

    def extra_repr(self) -> str:
        return f"large_kernel={self.spec.large_kernel}, backend={self.backend!r}"


def block_kind(module: nn.Module) -> Literal["inception", "conv", "lrn"] | None:
    """Whether ``module`` is, or derives from, an Inception module, a convolution block or a local response norm that is looked
    at for fusing.
    """
    bases = {_qualified(cls) for cls in type(module).__mro__}
    if bases & _INCEPTIONS:
        return "inception"
    if isinstance(module, nn.LocalResponseNorm):
        return "lrn"
    return "conv" if bases & _CONV_BLOCKS else None


def read_inception(block: nn.Module) -> InceptionSpec:
    """The spec of an Inception module, after checking that the fused form computes exactly what it computes.

    Raises:
        CannotFuse: it does not; the message names the first part that stands in the way.
    """
    if "forward" in vars(block):
        raise CannotFuse("the module has a forward of its own on the instance")
    for name in ("branch2", "branch3", "branch4"):
        branch = getattr(block, name)
        _check_untouched(branch, name)
        if type(branch) is not nn.Sequential or len(branch) != 2:
            raise CannotFuse(f"{name} is not a sequence of two blocks")
    pool: Any = block.branch4[0]  # type: ignore[index]
    _check_untouched(pool, "branch4.0")
    geometry = [_pair(getattr(pool, field, None)) for field in ("kernel_size", "stride", "padding", "dilation")]
    if type(pool) is not nn.MaxPool2d or geometry != [(3, 3), (1, 1), (1, 1), (1, 1)] or pool.return_indices:
        raise CannotFuse(f"branch4.0 is {pool}, not a max pool of kernel 3, stride 1 and padding 1")
    names = ("branch1", "branch2.0", "branch2.1", "branch3.0", "branch3.1", "branch4.1")
    blocks = _conv_blocks(block)
    for name, conv_block in zip(names, blocks, strict=True):
        try:
            _check_untouched(conv_block, "the block")
            _check_conv_block(conv_block)
        except CannotFuse as reason:
            raise CannotFuse(f"{name}: {reason}") from None
    try:
        spec = spec_of_weights([conv_block.conv.weight for conv_block in blocks])
    except ValueError as reason:
        raise CannotFuse(str(reason)) from None
    for name, conv_block, shape in zip(names, blocks, spec.convs, strict=True):
        conv = conv_block.conv
        if conv.stride != (1, 1) or conv.padding != (shape.padding, shape.padding):
            raise CannotFuse(f"{name} has stride {conv.stride} and padding {conv.padding}, not 1 and {shape.padding}")
    if len({(conv_block.conv.bias is None, conv_block.bn is None) for conv_block in blocks}) != 1:
        raise CannotFuse("some of its convolutions have a bias or a batch norm and others have not")
    if len({conv_block.conv.weight.dtype for conv_block in blocks}) != 1:
        raise CannotFuse("its convolutions differ in dtype")
    return spec


def _check_class(block: nn.Module, classes: set[tuple[str, str]], what: str) -> None:
    name = type(block).__name__
    if isinstance(block, _Fused):
        derived = "" if type(block) in (FusedConv2d, FusedInception) else ", by a class of its own that is left as it is"
        raise CannotFuse(f"{name} is fused already{derived}")
    if _qualified(type(block)) not in classes:
        raise CannotFuse(f"{name} is not {what} of torchvision's or googlenet_fused's GoogLeNet")


def _check_conv_block(block: nn.Module) -> None:
    _check_class(block, _CONV_BLOCKS, "a BasicConv2d")
    if "forward" in vars(block):
        raise CannotFuse("the block has a forward of its own on the instance")
    conv, norm = block.conv, block.bn
    if type(conv) is not nn.Conv2d:
        raise CannotFuse(f"its convolution is a {type(conv).__name__}, not an nn.Conv2d")
    _check_untouched(conv, "its convolution")
    if conv.groups != 1 or conv.dilation != (1, 1) or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise CannotFuse(f"its convolution is grouped, dilated or not padded with a number of zeros: {conv}")
    if norm is None:
        return
    if type(norm) is not nn.BatchNorm2d:
        raise CannotFuse(f"its norm is a {type(norm).__name__}, not an nn.BatchNorm2d")
    _check_untouched(norm, "its batch norm")
    if norm.running_mean is None or norm.weight is None:
        raise CannotFuse("its batch norm has no running statistics or no weight and bias")


def _check_untouched(module: nn.Module, what: str) -> None:
    if "forward" in vars(module):
        raise CannotFuse(f"{what} has a forward of its own on the instance")
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise CannotFuse(f"{what} has hooks, which would not fire")


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


def clear_hooks(module: nn.Module) -> None:
    """Remove the hooks on ``module`` itself."""
    for name, value in vars(module).items():
        if name.endswith("_hooks") or "_hooks_" in name:
            value.clear()


def _qualified(cls: type) -> tuple[str, str]:
    # By name, so that torchvision need not be imported, or even installed.
    return cls.__module__, cls.__qualname__


def plain_of(module: Any) -> nn.Module:
    """A module of the class that a fused one was made from, with all that the fused one holds."""
    plain: Any = module.plain_class.__new__(module.plain_class)
    adopt(plain, module)
    del plain.backend, plain.plain_class
    return plain


def adopt(target: nn.Module, source: nn.Module) -> None:
    """Make ``target`` a module with all that ``source`` holds, without a constructor (which would draw random numbers).

    Children, parameters and buffers, hooks and other attributes are the same objects, in registries of the target's own. What
    ``Module.compile`` and ``_Fused`` keep is about the source itself and stays with it.
    """
    for name, value in vars(source).items():
        if name in ("_compiled_call_impl", "_watch"):
            continue
        registry_of_module = name.startswith("_") and isinstance(value, dict | set)
        vars(target)[name] = value.copy() if registry_of_module else value


# The functions below run in every call, so they read the registries of nn.Module directly: its __getattr__ costs ten times as
# much.


def _conv_blocks(block: nn.Module) -> tuple[Any, ...]:
    """The six convolution blocks, in the order of ``InceptionSpec.convs``."""
    modules = block._modules
    branch2, branch3 = modules["branch2"]._modules, modules["branch3"]._modules  # type: ignore[union-attr]
    branch4 = modules["branch4"]._modules  # type: ignore[union-attr]
    return modules["branch1"], branch2["0"], branch2["1"], branch3["0"], branch3["1"], branch4["1"]


def _has_live_norm(block: nn.Module) -> bool:
    norm = block._modules["bn"]
    return norm is not None and norm.training


def _conv_params(block: nn.Module) -> ConvParams:
    """The block's tensors.

    Raises:
        CannotFuse: pruning, weight normalisation, a parametrisation or another replacement has taken one of them away.
    """
    conv, norm = block._modules["conv"], block._modules["bn"]
    try:
        weight, bias = conv._parameters["weight"], conv._parameters["bias"]  # type: ignore[union-attr]
        if norm is None:
            return ConvParams(weight, bias)  # type: ignore[arg-type]
        affine, statistics = norm._parameters, norm._buffers
        params = BatchNormParams(
            affine["weight"],  # type: ignore[arg-type]
            affine["bias"],  # type: ignore[arg-type]
            statistics["running_mean"],  # type: ignore[arg-type]
            statistics["running_var"],  # type: ignore[arg-type]
        )
        return ConvParams(weight, bias, params, norm.eps)  # type: ignore[arg-type]
    except KeyError as missing:
        raise CannotFuse(
            f"a fused block's convolution or batch norm has no parameter or buffer {missing} any more (pruned, normalised or "
            "parametrised after fusing?): do that to the plain model, which googlenet_fused.unfuse(model) gives back"
        ) from None

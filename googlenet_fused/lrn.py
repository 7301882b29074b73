"""The local response norm that takes the place of the plain one where a backend has its own, and is the plain one elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from googlenet_fused.backends import registry
from googlenet_fused.blocks import LocalResponseNorm
from googlenet_fused.direct import eager
from googlenet_fused.modules import CannotFuse, adopt, plain_of
from googlenet_fused.response_norm import ResponseNorm, local_response_norm_backward


class FusedLocalResponseNorm(LocalResponseNorm):
    """Local response normalisation across channels, ``[n, c, h, w] -> [n, c, h, w]``, in one pass over blocks of pixels.

    Made by ``from_module``, which ``fuse`` calls. The backend that runs it is chosen at each call, as for convolutions. Torch's
    operators run instead if that backend has no norm of its own, which all but ``cpu`` have not, if the input has not four
    axes, under autocast, and wherever something looks at operators, such as ``torch.compile`` (which makes one loop of them),
    ``torch.export``, tracing and ``torch.func``. Differentiable, twice.
    """

    backend: str
    plain_class: type[nn.LocalResponseNorm]

    @classmethod
    def from_module(cls, block: nn.Module, *, backend: str = registry.AUTO) -> FusedLocalResponseNorm:
        """A fused norm with the parameters of a plain one: torch's or this package's ``LocalResponseNorm``.

        Raises:
            CannotFuse: the block is not such a norm, or torch would refuse its size.
            ValueError: no backend has this name.
        """
        registry.check_name(backend)
        name = type(block).__name__
        if isinstance(block, cls):
            derived = "" if type(block) is cls else ", by a class of its own that is left as it is"
            raise CannotFuse(f"{name} is fused already{derived}")
        if not isinstance(block, nn.LocalResponseNorm) or type(block) not in (nn.LocalResponseNorm, LocalResponseNorm):
            raise CannotFuse(f"{name} is not torch's or googlenet_fused's LocalResponseNorm")
        if "forward" in vars(block):
            raise CannotFuse("the norm has a forward of its own on the instance")
        size: Any = block.size
        if type(size) is not int or size < 1:
            raise CannotFuse(f"its size is {size!r}, not a positive integer")
        fused = cls.__new__(cls)
        adopt(fused, block)
        fused.backend, fused.plain_class = backend, type(block)
        return fused

    def to_plain(self) -> nn.Module:
        """The plain norm of the class this one was made from."""
        return plain_of(self)

    def forward(self, x: Tensor) -> Tensor:
        if not eager(x) or x.dim() != 4 or not x.numel() or not x.is_floating_point():
            return self.plain_class.forward(self, x)
        chosen = registry.select(self.backend, registry.Problem(x.device, x.dtype, None))
        if not chosen.has_response_norm:
            return self.plain_class.forward(self, x)
        norm = ResponseNorm(self.size, self.alpha, self.beta, self.k)
        if torch.is_grad_enabled() and x.requires_grad:
            return _Differentiable.apply(x, norm, chosen)
        return chosen.local_response_norm(x, norm)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backend={self.backend!r}"


class _Differentiable(torch.autograd.Function):
    """A backend's norm with its gradient in closed form, of which only the input is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: ResponseNorm, backend: registry.Backend) -> Tensor:
        ctx.save_for_backward(x)
        ctx.norm = norm
        return backend.local_response_norm(x, norm)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return local_response_norm_backward(grad, x, ctx.norm), None, None
        # To be differentiated again: the gradient of torch's own operators, which can be.
        (of_x,) = torch.autograd.grad(LocalResponseNorm(*ctx.norm)(x), x, grad, create_graph=True)
        return of_x, None, None

"""Outputs of a network's inner layers, by name: what runs stops at the last of them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from googlenet_fused.modules import FusedConv2d, FusedInception

Captured = dict[str, Tensor]

# Of the innermost pass in this thread. The hooks of another pass, here or in another thread, leave it alone.
_running: ContextVar[Captured | None] = ContextVar("googlenet_fused.features", default=None)


class _Reached(BaseException):
    """Ends a pass once every layer asked for has run; past any ``except Exception`` of the model's."""


def features(model: nn.Module, layers: Iterable[str] = ("inception4e", "inception5b")) -> Features:
    """A module that gives the outputs of the named layers of ``model``: ``[n, 3, h, w] -> {name: output}``.

    Args:
        model: any module, plain or fused; its parameters are shared, not copied, and so is its mode.
        layers: names as in ``model.named_modules()``; the results have this order. Of GoogLeNet at h x w, multiples of 32, the
            default's are ``[n, 832, h / 16, w / 16]`` and ``[n, 1024, h / 32, w / 32]``.

    Raises:
        ValueError: ``layers`` is empty or a lone string, or a name is unknown, given twice or inside a block that runs fused.
        TypeError: ``model`` is not an ``nn.Module``.
    """
    return Features(model, layers)


class Features(nn.Module):
    """What :func:`features` makes. Parameters and state_dict are those of the model, under ``model.``.

    A pass ends once every layer asked for has run: later ones do not run, nor do their batch norms count it in training mode.
    A result is the layer's own output, after the hooks on it, and no later layer changes it: ReLUs that work in place do
    change what ``conv1.conv`` of a plain GoogLeNet gave, so whatever others follow is copied. Gradients flow.

    The layers are hooked for the time of a call. One model may serve several of these, in several threads. To compile, compile
    this module; its graphs end where layers asked for do.

    Raises:
        ValueError: in a call, a layer does not run (an auxiliary head in evaluation mode), or runs again before the last one
            asked for.
        TypeError: in a call, a layer gives something else than a tensor.
    """

    # torchvision.models.feature_extraction would not do: torch.fx cannot trace fused modules, nor this package's GoogLeNet,
    # which looks at its input; and of torchvision's it gives conv1.bn after the ReLU has overwritten it.

    def __init__(self, model: nn.Module, layers: Iterable[str]) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        super().__init__()
        self.layers = _checked(model, layers)
        self.model = model
        self.training = model.training

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        captured: Captured = {}
        with ExitStack() as stack:
            for name in self.layers:
                hook = self._hook(name, captured)
                stack.enter_context(self.model.get_submodule(name).register_forward_hook(hook))
            stack.callback(_running.reset, _running.set(captured))
            try:
                self.model(x)
            except _Reached:
                return {name: captured[name] for name in self.layers}
        missed = [name for name in self.layers if name not in captured]
        for name in missed:
            _check_not_inside_fused(self.model, name)
        mode = "training" if self.model.training else "evaluation"
        listed = ", ".join(map(repr, missed))
        raise ValueError(
            f"features: in {mode} mode the model does not run {listed}; auxiliary heads run in training only, and a model from "
            "torch.compile calls no layer by itself"
        )

    def _hook(self, name: str, captured: Captured) -> Callable[[nn.Module, Any, Any], None]:
        def capture(module: nn.Module, arguments: Any, output: Any) -> None:
            if _running.get() is not captured:
                return
            if name in captured:
                raise ValueError(f"features: the model runs {name!r} more than once in a pass; which output is not defined")
            if not isinstance(output, Tensor):
                raise TypeError(f"features: {name!r} gives a {type(output).__name__}, not a tensor")
            if len(captured) + 1 < len(self.layers):
                captured[name] = output.clone()
            else:
                captured[name] = output
                raise _Reached

        return capture

    def extra_repr(self) -> str:
        return f"layers={list(self.layers)}"


def _checked(model: nn.Module, layers: Iterable[str]) -> tuple[str, ...]:
    if isinstance(layers, str):
        raise ValueError(f"layers must be a list of names, got the string {layers!r}: write [{layers!r}]")
    names = tuple(layers)
    if not names:
        raise ValueError("layers is empty: name at least one, as in model.named_modules()")
    known = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    seen: dict[nn.Module, str] = {}
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=3)
            hint = f"; close to it: {', '.join(close)}" if close else "; model.named_modules() lists them"
            raise ValueError(f"layers: the model has no layer {name!r}{hint}")
        if known[name] in seen:
            twice = "is given twice" if seen[known[name]] == name else f"is the layer {seen[known[name]]!r} again"
            raise ValueError(f"layers: {name!r} {twice}")
        seen[known[name]] = name
        _check_not_inside_fused(model, name)
    return names


def _check_not_inside_fused(model: nn.Module, name: str) -> None:
    parts = name.split(".")
    for end in range(len(parts)):
        outer = model.get_submodule(".".join(parts[:end]))
        if isinstance(outer, FusedInception | FusedConv2d):
            where = f"{'.'.join(parts[:end]) or 'the model'}, a {type(outer).__name__}"
            raise ValueError(
                f"layers: {name!r} is inside {where}, which runs as one operator and calls none of its inner layers: ask for "
                "the block's output, or take googlenet_fused.unfuse(model)"
            )

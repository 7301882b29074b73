"""``fuse`` and ``unfuse``: a model of plain Inception modules into one of fused modules, checked block by block, and back."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from googlenet_fused.backends import registry
from googlenet_fused.blocks import LocalResponseNorm
from googlenet_fused.lrn import FusedLocalResponseNorm
from googlenet_fused.modules import CannotFuse, FusedConv2d, FusedInception, block_kind, clear_hooks
from googlenet_fused.tolerance import Comparison, judge

logger = logging.getLogger("googlenet_fused")

BlockKind = Literal["inception", "conv", "lrn"]
Filter = Callable[[nn.Module, str], bool]

FusedBlock = FusedInception | FusedConv2d | FusedLocalResponseNorm

_FUSED_CLASSES: dict[BlockKind, type[FusedBlock]] = {
    "inception": FusedInception,
    "conv": FusedConv2d,
    "lrn": FusedLocalResponseNorm,
}
_CHECK_SEED = 20150607
_CHECK_SIDES = (8, 7)  # one even, one odd, both larger than the 5x5 kernel
_CHECK_DEVIATION_LRN = 100.0  # of pixels, about: of 1, the usual norm would do next to nothing


class FusionMismatch(RuntimeError):
    """A fused block computed something else than the plain block; the message names it and says by how much."""


@dataclass(frozen=True)
class BlockReport:
    """What became of one block.

    ``max_error`` is the largest error of the fused block in its self-check, relative to the largest value of the plain block in
    fp64; ``plain_error`` is the same for the plain block in the model's own dtype. Both are None if the block was not checked.
    """

    name: str
    kind: BlockKind
    fused: bool
    reason: str | None = None
    backend: str | None = None
    max_error: float | None = None
    plain_error: float | None = None


@dataclass(frozen=True)
class FusionReport:
    """What ``fuse`` did: one entry for each block that could have been fused, in the model's order."""

    blocks: list[BlockReport] = field(default_factory=list)

    @property
    def fused(self) -> list[BlockReport]:
        return [block for block in self.blocks if block.fused]

    @property
    def skipped(self) -> list[BlockReport]:
        return [block for block in self.blocks if not block.fused]

    @property
    def backends(self) -> str:
        """The backend that ran the fused blocks in their self-check; names with commas between if blocks differ."""
        return ", ".join(dict.fromkeys(block.backend for block in self.fused if block.backend is not None))

    def __str__(self) -> str:
        if not self.blocks:
            return "no Inception block was found"
        width = max(len(block.name) for block in self.blocks)
        lines = [f"fused {len(self.fused)} of {len(self.blocks)} blocks"]
        for block in self.blocks:
            if not block.fused:
                outcome = f"left plain: {block.reason}"
            elif block.max_error is None:
                outcome = f"fused, not checked: {block.reason}"
            else:
                outcome = f"fused, {block.backend} backend, error {block.max_error:.1e} (plain {block.plain_error:.1e})"
            lines.append(f"  {block.name:<{width}}  {block.kind:<9}  {outcome}")
        return "\n".join(lines)


def fuse(
    model: nn.Module,
    filter_fn: Filter | None = None,
    backend: str = registry.AUTO,
    *,
    on_mismatch: Literal["raise", "keep"] = "raise",
) -> nn.Module:
    """A copy of ``model`` whose Inception modules run fused. The model itself is left untouched.

    Finds the Inception modules of torchvision's and of this package's GoogLeNet anywhere in the model; a third branch of 3x3
    stays 3x3. The stem's and auxiliary heads' convolution, batch norm and ReLU are folded as well, and local response norms are
    replaced where the backend has its own, which on a GPU none has. Every fused block is run once on random input, on the
    model's device and in its dtype, against the plain block in fp64; a local response norm, which has no parameters to tell
    either, on those of the model's first parameter.

    Args:
        model: any module, in either mode; modes, parameters, state_dict keys and hooks on the model are those of the original.
        filter_fn: called as ``filter_fn(module, qualified_name)`` for each block; False leaves that block plain.
        backend: the backend that the fused modules use; ``"auto"`` chooses at each call and obeys ``use_backend``.
        on_mismatch: whether a block that fails its check is an error, or stays plain with the reason in the report.

    Returns:
        The fused copy. Its ``fusion_report`` is a ``FusionReport``; ``print(model.fusion_report)`` shows it.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or is TorchScript; ``filter_fn`` is no function or does not return a bool.
        ValueError: an unknown backend or ``on_mismatch``.
        BackendError: the backend that was named cannot run a block on this device in this dtype.
        FusionMismatch: a block failed its check and ``on_mismatch`` is ``"raise"``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is TorchScript, whose modules cannot be replaced: fuse the eager model, then trace the result")
    if on_mismatch not in ("raise", "keep"):
        raise ValueError(f"on_mismatch must be 'raise' or 'keep', got {on_mismatch!r}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be a function of (module, name) that returns True or False, got {filter_fn!r}")
    registry.check_name(backend)
    reports: list[BlockReport] = []
    of_model = _floating(model)

    def fuse_block(module: nn.Module, name: str) -> nn.Module | None:
        kind = block_kind(module)
        if kind is None:
            return None
        plain = module.to_plain() if type(module) in _FUSED_CLASSES.values() else module  # type: ignore[operator]
        like = next(iter([*_floating(plain), *of_model]), torch.empty(0, dtype=torch.float32, device="cpu"))
        fused, report = _fuse_block(plain, name, kind, filter_fn, backend, on_mismatch, like)
        reports.append(report)
        return fused

    with torch.inference_mode(False):  # a copy made of inference tensors could not be followed when it changes
        model = _replace(copy.deepcopy(model), fuse_block)
    report = FusionReport(reports)
    model.fusion_report = report  # type: ignore[assignment]
    if not report.fused:
        reasons = {block.reason for block in report.skipped}
        why = "no Inception block was found" if not report.blocks else "; ".join(sorted(filter(None, reasons)))
        logger.warning("fuse: nothing was fused: %s", why)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with plain blocks again, of the classes they had before ``fuse``. Parameters and modes are kept.

    A block of a class derived from a fused one stays as it is, with a warning.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")

    def unfuse_block(module: nn.Module, name: str) -> nn.Module | None:
        if isinstance(module, FusedBlock):
            if type(module) in _FUSED_CLASSES.values():
                return module.to_plain()
            logger.warning(
                "unfuse: %s is a %s, a class of its own, and stays fused", name or "the model", type(module).__name__
            )
        return None

    with torch.inference_mode(False):
        model = _replace(copy.deepcopy(model), unfuse_block)
    vars(model).pop("fusion_report", None)
    return model


Replacement = Callable[[nn.Module, str], nn.Module | None]


def _replace(
    module: nn.Module, replacement: Replacement, name: str = "", known: dict[nn.Module, nn.Module] | None = None
) -> nn.Module:
    """``module`` with each module in it that has a replacement replaced, wherever and however often it occurs.

    Not a closure that calls itself, which would be a reference cycle and keep the model alive after its last user.
    """
    known = {} if known is None else known
    if module not in known:
        new = replacement(module, name)
        known[module] = module if new is None else new
        if new is None:
            for child_name, child in module._modules.items():
                if child is not None:
                    qualified = f"{name}.{child_name}" if name else child_name
                    module._modules[child_name] = _replace(child, replacement, qualified, known)
    return known[module]


def _fuse_block(
    plain: nn.Module,
    name: str,
    kind: BlockKind,
    filter_fn: Filter | None,
    backend: str,
    on_mismatch: str,
    like: Tensor,
) -> tuple[nn.Module, BlockReport]:
    """The fused block, or the plain one, and what is said of it; it is checked on the device and in the dtype of ``like``."""
    if filter_fn is not None:
        wanted = filter_fn(plain, name)
        if not isinstance(wanted, bool):
            raise TypeError(f"filter_fn must return True or False, got {wanted!r} for {name or 'the model itself'}")
        if not wanted:
            return plain, BlockReport(name, kind, fused=False, reason="filter_fn said no")
    try:
        fused = _FUSED_CLASSES[kind].from_module(plain, backend=backend)
    except CannotFuse as reason:
        return plain, BlockReport(name, kind, fused=False, reason=str(reason))
    if like.is_meta:
        return fused, BlockReport(name, kind, fused=True, reason="its parameters are on the meta device")

    spec = fused.spec if isinstance(fused, FusedInception) else None
    selected = registry.select(backend, registry.Problem(like.device, like.dtype, spec))
    chosen = selected.name
    if kind == "lrn" and not selected.has_response_norm:
        lacking = f"the {chosen} backend has no local response norm of its own, so torch's operators run"
        return plain, BlockReport(name, kind, fused=False, reason=lacking, backend=chosen)
    comparison = _check_block(plain, kind, backend, like)
    if comparison.ok:
        return fused, BlockReport(name, kind, True, None, chosen, comparison.max_error, comparison.peer_max_error)
    mismatch = f"with backend {chosen!r} the fused block {comparison}"
    if on_mismatch == "raise":
        raise FusionMismatch(
            f"{name or type(plain).__name__}: {mismatch}. fuse(..., on_mismatch='keep') leaves such blocks plain"
        )
    return plain, BlockReport(name, kind, fused=False, reason=mismatch, backend=chosen)


def _check_block(plain: nn.Module, kind: BlockKind, backend: str, like: Tensor) -> Comparison:
    """One run of the plain and the fused block on the same random input ``[1, in_channels, h, w]``, on copies without hooks."""
    plain = copy.deepcopy(plain).eval()
    clear_hooks(plain)
    fused = _FUSED_CLASSES[kind].from_module(plain, backend=backend)
    deviation = 1.0
    if isinstance(plain, nn.LocalResponseNorm):
        in_channels, deviation = min(2 * plain.size + 1, 256), _CHECK_DEVIATION_LRN
        plain = LocalResponseNorm(plain.size, plain.alpha, plain.beta, plain.k)  # for half precisions, too
    else:
        in_channels = next(module for module in plain.modules() if isinstance(module, nn.Conv2d)).in_channels
    generator = torch.Generator("cpu").manual_seed(_CHECK_SEED)
    x = torch.randn(1, in_channels, *_CHECK_SIDES, generator=generator, device="cpu", dtype=torch.float32) * deviation
    return judge(fused, plain, x.to(like))


def _floating(module: nn.Module) -> list[Tensor]:
    return [parameter for parameter in module.parameters() if parameter.is_floating_point()]

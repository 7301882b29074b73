"""What is measured: a module or a whole network, its batch, dtype and mode, with seeded parameters and inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from googlenet_fused.backends.triton.plans import DTYPES
from googlenet_fused.blocks import Inception
from googlenet_fused.models import VariantName, googlenet
from googlenet_fused.randomize import randomize_
from googlenet_fused.spec import GOOGLENET_SIDES, GOOGLENET_SPECS

Mode = Literal["inference", "training"]

T = TypeVar("T")

NETWORKS: tuple[VariantName, ...] = ("torchvision", "bvlc")
"""The variants that are measured; ``"slim"`` does the arithmetic of ``"torchvision"``."""

CLASSES = 1000


@dataclass(frozen=True)
class Case:
    """One problem that providers are measured on.

    Attributes:
        subject: a variant of the whole network (without auxiliary heads, 1000 classes), or one of the nine modules by its name
            in `GOOGLENET_SPECS`: the paper's form, 5x5 in the third branch and convolutions with bias.
        dtype: a name of `DTYPES`; ``tf32`` is fp32 tensors whose products may run on TF32 tensor cores. Training in a half
            precision is autocast over fp32 parameters.
        mode: inference, or one training step: forward, cross entropy, backward, SGD with momentum. Whole networks only.
        side: height and width of the network's input. A module's input has the side it has in a network of 224x224.

    Raises:
        ValueError: an attribute is out of range.
    """

    subject: str = "torchvision"
    batch: int = 1
    dtype: str = "fp32"
    mode: Mode = "inference"
    side: int = 224

    def __post_init__(self) -> None:
        if self.subject not in NETWORKS and self.subject not in GOOGLENET_SPECS:
            known = ", ".join([*NETWORKS, *GOOGLENET_SPECS])
            raise ValueError(f"Case: subject must be one of {known}, got {self.subject!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"Case: dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.mode not in get_args(Mode):
            raise ValueError(f"Case: mode must be inference or training, got {self.mode!r}")
        if self.mode == "training" and self.is_module:
            raise ValueError(f"Case: mode must be inference for a module, got subject {self.subject!r} and mode 'training'")
        if self.batch < 1:
            raise ValueError(f"Case: batch must be at least 1, got {self.batch!r}")
        if self.side < 1:
            raise ValueError(f"Case: side must be at least 1, got {self.side!r}")
        if self.is_module and self.side != 224:
            raise ValueError(f"Case: side must be 224 for a module, got {self.side!r}")

    @property
    def is_module(self) -> bool:
        return self.subject in GOOGLENET_SPECS

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """``[batch, channels, height, width]``."""
        if self.is_module:
            side = GOOGLENET_SIDES[self.subject]
            return (self.batch, GOOGLENET_SPECS[self.subject].in_channels, side, side)
        return (self.batch, 3, self.side, self.side)

    def __str__(self) -> str:
        training = ", training step" if self.mode == "training" else ""
        return f"{self.subject}, batch {self.batch}, {self.dtype}{training}"


@dataclass(frozen=True)
class Workload:
    """A case with its plain model: in the case's dtype and evaluation mode, or in training mode in fp32."""

    case: Case
    model: nn.Module
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def input(self, seed: int) -> Tensor:
        """Seeded normal noise of the case's shape on the device, contiguous, already rounded to the case's dtype."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.case.input_shape, generator=generator)
        if self.case.mode == "inference":
            x = x.to(DTYPES[self.case.dtype])
        return x.to(self.device)

    def labels(self, seed: int) -> Tensor:
        """Seeded classes ``[batch]`` for a training step."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(CLASSES, (self.case.batch,), generator=generator).to(self.device)


def build_workload(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Workload:
    """The case's model with seeded, non-degenerate weights and statistics (fresh ones would make every logit equal its bias).

    A model for training has no dropout, so that every provider computes the same gradients.
    """
    device = torch.device(device)
    model: nn.Module
    if case.is_module:
        model = Inception.from_spec(GOOGLENET_SPECS[case.subject], norm=None)
    else:
        variant: VariantName = "torchvision" if case.subject == "torchvision" else "bvlc"
        model = googlenet(variant, num_classes=CLASSES, aux_logits=False, init_weights=False, dropout=0.0)
    model = randomize_(model, seed)
    if case.mode == "training":
        return Workload(case, model.train().to(device), device)
    return Workload(case, model.eval().to(device, DTYPES[case.dtype]), device)


@contextmanager
def numerics(dtype: str) -> Iterator[None]:
    """Lets convolutions and matrix products of fp32 tensors use TF32 if ``dtype`` is ``"tf32"``, and not otherwise.

    Torch's older flags are set too, since Inductor reads them. One that raised before, because a newer one was set alone, has
    that one's value afterwards.
    """
    backends: Any = torch.backends
    flags = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul, backends.mkldnn.matmul)
    before = [flag.fp32_precision for flag in flags]
    convolutions = _read_or(before[0] == "tf32", lambda: backends.cudnn.allow_tf32)
    products = _read_or("high" if before[2] == "tf32" else "highest", torch.get_float32_matmul_precision)

    def put(convolutions: bool, products: str, precisions: Iterable[str]) -> None:
        backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)
        for flag, precision in zip(flags, precisions, strict=True):  # last, since those before change them as well
            flag.fp32_precision = precision

    if dtype == "tf32":
        put(True, "high", ["tf32"] * len(flags))
    else:
        put(False, "highest", ["ieee"] * len(flags))
    try:
        yield
    finally:
        put(convolutions, products, before)


def _read_or(otherwise: T, read: Callable[[], T]) -> T:
    """One of torch's older flags; they raise where they do not say what the newer ones do."""
    try:
        return read()
    except RuntimeError:
        return otherwise

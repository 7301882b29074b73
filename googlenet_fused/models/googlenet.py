"""GoogLeNet (Szegedy et al., "Going deeper with convolutions", CVPR 2015) in the forms in which it is in use.

``"bvlc"`` is the paper's network as BVLC Caffe trained it: convolutions with biases, local response normalisation, 5x5 kernels.
``"torchvision"`` is the port most users hold: batch norm, 3x3 kernels in place of the 5x5 ones, torchvision's state_dict keys.
``"slim"`` is TF-slim's ``inception_v1``, from which that was ported: the same layers and keys, with TensorFlow's padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from googlenet_fused.blocks import BasicConv2d, ConvBlock, Inception, LocalResponseNorm, Norm, conv_block_for
from googlenet_fused.models.same import SameMaxPool2d, SamePadding2d
from googlenet_fused.preparation import IMAGENET_MEAN, IMAGENET_STD, PREPARATIONS
from googlenet_fused.spec import GOOGLENET_SPECS, STEM_WIDTH
from googlenet_fused.weights import load_weights
from googlenet_fused.weights.load import Source, resolve

VariantName = Literal["torchvision", "bvlc", "slim"]
AuxPool = Literal["adaptive", "5x5/3"]


@dataclass(frozen=True)
class Variant:
    """What the forms of GoogLeNet disagree on.

    Attributes:
        norm: ``"batch"`` puts batch norm after every convolution; ``None`` gives the convolutions biases.
        large_kernel: kernel size of the Inception modules' third branch.
        local_response_norm: whether the stem holds its two local response normalisations.
        pool4_kernel: kernel size of the max pool before 5a, stride 2.
        dropout: default probability of the dropout before the classifier.
        aux_pool: how the auxiliary heads come to 4x4.
        min_side: smallest height or width of an image that every pool can take.
        same_padding: whether conv1 and the max pools are padded as TensorFlow's ``SAME`` says, which depends on the size:
            conv1 puts 2 zeros before and 3 after an even side, 3 and 3 around an odd one; a 3x3 pool reaches 1 past an even
            side, as ceil mode does, and 1 past either end of an odd one, where ceil mode would give one output less.
    """

    norm: Norm
    large_kernel: int
    local_response_norm: bool
    pool4_kernel: int
    dropout: float
    aux_pool: AuxPool
    min_side: int
    same_padding: bool


VARIANTS: dict[VariantName, Variant] = {
    "torchvision": Variant("batch", 3, False, 2, 0.2, "adaptive", 15, False),
    "bvlc": Variant(None, 5, True, 3, 0.4, "5x5/3", 31, False),
    "slim": Variant("batch", 3, False, 2, 0.2, "adaptive", 1, True),
}
"""Sources: torchvision/models/googlenet.py; the paper, Table 1 and section 5, and BVLC/caffe, models/bvlc_googlenet;
tensorflow/models, research/slim/nets/inception_v1.py and inception_utils.py."""


class GoogLeNetOutputs(NamedTuple):
    """Result of a training forward: three ``[n, num_classes]`` tensors, the second head before the first as in torchvision."""

    logits: Tensor
    aux_logits2: Tensor | None
    aux_logits1: Tensor | None


class InceptionAux(nn.Module):
    """Auxiliary classifier, used in training only: ``[n, in_channels, h, w] -> [n, num_classes]`` (the paper, section 5).

    The signature and the state_dict keys are torchvision's. ``pool`` says how the input comes to 4x4: ``"adaptive"`` as in
    torchvision (the default, so that this class takes its place), or ``"5x5/3"``, the paper's average pool, which takes heights
    and widths of 12 to 14 only (14 when the image is 224x224). A ``conv_block`` of your own overrides ``norm``.

    Raises:
        ValueError: ``pool`` or ``norm`` is unknown; in ``forward``, the ``"5x5/3"`` pool would not give 4x4.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        conv_block: ConvBlock | None = None,
        dropout: float = 0.7,
        *,
        norm: Norm = "batch",
        pool: AuxPool = "adaptive",
    ) -> None:
        super().__init__()
        if pool not in get_args(AuxPool):
            raise ValueError(f"InceptionAux: pool must be 'adaptive' or '5x5/3', got {pool!r}")
        block = conv_block or conv_block_for(norm)
        self.avgpool = nn.AdaptiveAvgPool2d((4, 4)) if pool == "adaptive" else nn.AvgPool2d(5, stride=3, ceil_mode=True)
        self.conv = block(in_channels, 128, kernel_size=1)
        self.fc1 = nn.Linear(128 * 4 * 4, 1024)
        self.fc2 = nn.Linear(1024, num_classes)
        self.dropout = nn.Dropout(p=dropout)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.avgpool, nn.AvgPool2d) and not all(12 <= side <= 14 for side in x.shape[-2:]):
            raise ValueError(
                f"InceptionAux: average pool 5/3 gives the 4x4 map that fc1 needs only for inputs 12 to 14 high and wide, got "
                f"{x.shape[-2]}x{x.shape[-1]}; train on images of 224x224, or build the network with aux_logits=False"
            )
        x = self.avgpool(x)  # [n, in_channels, 4, 4]
        x = self.conv(x)  # [n, 128, 4, 4]
        x = torch.flatten(x, 1)  # [n, 2048]
        x = F.relu(self.fc1(x), inplace=True)  # [n, 1024]
        x = self.dropout(x)
        return self.fc2(x)  # [n, num_classes]


class GoogLeNet(nn.Module):
    """GoogLeNet: ``[n, 3, h, w]``, floating point, ``-> [n, num_classes]``; 224x224 is the size it is trained on.

    In training with auxiliary heads the result is a :class:`GoogLeNetOutputs`. The arguments and attributes are torchvision's;
    with ``variant="torchvision"`` so are the state_dict keys, the initial weights under one seed and the outputs.

    ``"torchvision"`` takes RGB normalised with ``IMAGENET_MEAN`` and ``IMAGENET_STD``; ``"bvlc"`` takes pixels in 0..255 minus
    their mean: RGB in the paper, BGR minus (104, 117, 123) for the weights that BVLC published; ``"slim"`` takes RGB in
    [-1, 1].

    ``"slim"`` has torchvision's keys and shapes. It averages maps of every size, as TF-slim does with ``global_pool=True``, and
    has the same output without that for 224x224. TF-slim has no auxiliary heads, so those are torchvision's, and its batch
    norms learn no scale, so ``bn.weight`` is 1 in its weights; one of its 1001 published classes, the first, is the background.

    Args:
        num_classes: width of the classifiers.
        aux_logits: whether to build the two auxiliary heads, which run in training only.
        transform_input: maps inputs normalised with the ImageNet mean and deviation to pixels in [-1, 1] before conv1, as
            torchvision's published weights want; the ``"torchvision"`` variant only.
        init_weights: draw the weights as the variant's source does (torchvision: normal, deviation 0.01; BVLC: xavier, biases
            0.2; TF-slim: normal, cut off at two deviations, 0.01 in convolutions and 1.6 over the root of the inputs in linear
            layers, biases 0). False leaves ``torch.nn``'s own initial weights, which is faster when weights will be loaded.
        blocks: ``[conv_block, inception_block, inception_aux_block]`` in place of the variant's, called as torchvision does:
            ``conv_block(in_channels, out_channels, **conv_args)``, ``inception_block(in_channels, ch1x1, ch3x3red, ch3x3,
            ch5x5red, ch5x5, pool_proj)``, ``inception_aux_block(in_channels, num_classes, dropout=...)``. They decide norm and
            kernel sizes then: for ``"bvlc"`` give for example ``partial(Inception, norm=None, large_kernel=5)``.
        dropout: probability before the classifier; None takes the variant's (0.2, in ``"bvlc"`` 0.4 as in the paper).
        dropout_aux: probability in the auxiliary heads.
        variant: ``"torchvision"``, ``"bvlc"`` or ``"slim"``.

    Raises:
        ValueError: an argument is out of range; in ``forward``, the input is not ``[n, 3, h, w]`` in floating point or is too
            small for the pools, or the paper's auxiliary heads cannot take its size.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        aux_logits: bool = True,
        transform_input: bool = False,
        init_weights: bool = True,
        blocks: Sequence[Callable[..., nn.Module]] | None = None,
        dropout: float | None = None,
        dropout_aux: float = 0.7,
        *,
        variant: VariantName = "torchvision",
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")
        if transform_input and variant != "torchvision":
            raise ValueError(
                f"transform_input=True belongs to variant='torchvision', got variant={variant!r}: prepare its input as "
                f"{PREPARATIONS[variant]}"
            )
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        form = VARIANTS[variant]
        if blocks is None:
            blocks = [
                partial(BasicConv2d, norm=form.norm),
                partial(Inception, norm=form.norm, large_kernel=form.large_kernel),
                partial(InceptionAux, norm=form.norm, pool=form.aux_pool),
            ]
        if len(blocks) != 3:
            raise ValueError(f"blocks must be [conv_block, inception_block, inception_aux_block], got {len(blocks)} of them")
        conv_block, inception_block, aux_block = blocks

        def local_response_norm() -> nn.Module:
            # The paper gives no parameters; these are BVLC's. torch divides alpha by the size, as Caffe does.
            return LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0) if form.local_response_norm else nn.Identity()

        def max_pool(kernel_size: int = 3) -> nn.Module:
            if form.same_padding:
                return SameMaxPool2d(kernel_size, stride=2)
            return nn.MaxPool2d(kernel_size, stride=2, ceil_mode=True)

        def inception(name: str) -> nn.Module:
            spec = GOOGLENET_SPECS[name]
            return inception_block(
                spec.in_channels, spec.ch1x1, spec.ch3x3red, spec.ch3x3, spec.ch5x5red, spec.ch5x5, spec.pool_proj
            )

        def aux(name: str) -> nn.Module:
            return aux_block(GOOGLENET_SPECS[name].out_channels, num_classes, dropout=dropout_aux)

        self.variant = variant
        self.num_classes = num_classes
        self.aux_logits = aux_logits
        self.transform_input = transform_input
        self.in_channels = 3
        self.min_side = form.min_side

        # The order of construction is torchvision's, because it decides which random numbers each weight gets.
        self.pad1 = SamePadding2d(kernel_size=7, stride=2) if form.same_padding else nn.Identity()
        padding = 0 if form.same_padding else 3
        self.conv1 = conv_block(self.in_channels, STEM_WIDTH, kernel_size=7, stride=2, padding=padding)
        self.maxpool1 = max_pool()
        self.norm1 = local_response_norm()
        self.conv2 = conv_block(STEM_WIDTH, STEM_WIDTH, kernel_size=1)
        self.conv3 = conv_block(STEM_WIDTH, GOOGLENET_SPECS["3a"].in_channels, kernel_size=3, padding=1)
        self.norm2 = local_response_norm()
        self.maxpool2 = max_pool()

        self.inception3a = inception("3a")
        self.inception3b = inception("3b")
        self.maxpool3 = max_pool()

        self.inception4a = inception("4a")
        self.inception4b = inception("4b")
        self.inception4c = inception("4c")
        self.inception4d = inception("4d")
        self.inception4e = inception("4e")
        self.maxpool4 = max_pool(form.pool4_kernel)

        self.inception5a = inception("5a")
        self.inception5b = inception("5b")

        self.aux1 = aux("4a") if aux_logits else None
        self.aux2 = aux("4d") if aux_logits else None

        # The paper's 7x7 average pool when the image is 224x224, and defined for every other size.
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(p=form.dropout if dropout is None else dropout)
        self.fc = nn.Linear(GOOGLENET_SPECS["5b"].out_channels, num_classes)

        if init_weights:
            self._init_weights()

    def _init_weights(self) -> None:
        for name, module in self.named_modules():
            if not isinstance(module, nn.Conv2d | nn.Linear):
                continue
            if self.variant == "torchvision":
                nn.init.trunc_normal_(module.weight, mean=0.0, std=0.01, a=-2, b=2)
                continue
            if self.variant == "slim":
                # The 1.3 makes up for what the cut takes away (tf_slim, variance_scaling_initializer, factor 2).
                std = 0.01 if isinstance(module, nn.Conv2d) else math.sqrt(1.3 * 2.0 / module.in_features)
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                continue
            # Caffe's "xavier" filler is uniform in +-sqrt(3 / fan_in); only the classifiers' biases start from 0.
            nn.init.kaiming_uniform_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.constant_(module.bias, 0.0 if name in ("fc", "aux1.fc2", "aux2.fc2") else 0.2)

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"GoogLeNet takes images as [n, {self.in_channels}, h, w], got {list(x.shape)}"
                + ("; add the batch axis with x.unsqueeze(0)" if x.dim() == 3 else "")
                + ("; bring the channels forward with x.permute(0, 3, 1, 2)" if x.shape[-1:] == (self.in_channels,) else "")
            )
        if not x.is_floating_point():
            raise ValueError(f"GoogLeNet takes floating-point images, got {x.dtype}; normalise them first")
        if min(x.shape[-2:]) < self.min_side:
            raise ValueError(
                f"GoogLeNet variant {self.variant!r} takes images of at least {self.min_side}x{self.min_side}, "
                f"got {x.shape[-2]}x{x.shape[-1]}; resize them (the usual size is 224x224)"
            )

    def _normalise(self, x: Tensor) -> Tensor:
        """From ``(pixel - mean) / std`` to ``(pixel - 0.5) / 0.5``, pixels in [0, 1]; a no-op without ``transform_input``."""
        if not self.transform_input:
            return x
        # Python scalars, not a tensor of three: low precisions then round only the result.
        channels = [
            x[:, c : c + 1] * (std / 0.5) + (mean - 0.5) / 0.5
            for c, (mean, std) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True))
        ]
        return torch.cat(channels, 1)

    def forward(self, x: Tensor) -> Tensor | GoogLeNetOutputs:
        # The shapes are those of a 224x224 image.
        self._check_input(x)
        x = self._normalise(x)  # [n, 3, 224, 224]

        x = self.conv1(self.pad1(x))  # [n, 64, 112, 112]
        x = self.norm1(self.maxpool1(x))  # [n, 64, 56, 56]
        x = self.conv2(x)
        x = self.norm2(self.conv3(x))  # [n, 192, 56, 56]
        x = self.maxpool2(x)  # [n, 192, 28, 28]

        x = self.inception3a(x)  # [n, 256, 28, 28]
        x = self.inception3b(x)  # [n, 480, 28, 28]
        x = self.maxpool3(x)  # [n, 480, 14, 14]

        x = self.inception4a(x)  # [n, 512, 14, 14]
        aux1 = self.aux1(x) if self.training and self.aux1 is not None else None
        x = self.inception4b(x)
        x = self.inception4c(x)
        x = self.inception4d(x)  # [n, 528, 14, 14]
        aux2 = self.aux2(x) if self.training and self.aux2 is not None else None
        x = self.inception4e(x)  # [n, 832, 14, 14]
        x = self.maxpool4(x)  # [n, 832, 7, 7]

        x = self.inception5a(x)
        x = self.inception5b(x)  # [n, 1024, 7, 7]

        x = torch.flatten(self.avgpool(x), 1)  # [n, 1024]
        x = self.fc(self.dropout(x))  # [n, num_classes]
        return GoogLeNetOutputs(x, aux2, aux1) if self.training and self.aux_logits else x


def googlenet(
    variant: VariantName = "torchvision",
    *,
    weights: Source | None = None,
    progress: bool = True,
    num_classes: int = 1000,
    aux_logits: bool | None = None,
    transform_input: bool = False,
    init_weights: bool = True,
    dropout: float | None = None,
    dropout_aux: float = 0.7,
) -> GoogLeNet:
    """Build a plain GoogLeNet, ``"torchvision"``, ``"bvlc"`` or ``"slim"``, with initial weights or with those of ``weights``.

    Args:
        variant: which form of the network.
        weights: a file that ``read_state_dict`` reads, or the variant's published weights, which are downloaded once:
            ``"DEFAULT"``, or the member itself, ``GoogLeNet_Weights.DEFAULT`` for ``"torchvision"`` and
            ``BVLC_GoogLeNet_Weights.DEFAULT`` for ``"bvlc"``; there are none for ``"slim"``. With torchvision's
            ``transform_input`` becomes True, as they expect.
        progress: whether a download shows its progress.
        aux_logits: whether the auxiliary heads are there; by default only without ``weights``, as in torchvision.
        num_classes, transform_input, init_weights, dropout, dropout_aux: as ``GoogLeNet`` takes them.

    Raises:
        WeightsError: the weights cannot be had or do not fit.
        TypeError: ``weights`` is something else.
        ValueError: as ``GoogLeNet`` raises it.
    """
    # An unknown variant is refused below, by GoogLeNet.
    weights = None if weights is None else resolve(weights, "weights", variant if variant in VARIANTS else None)
    aux_logits = weights is None if aux_logits is None else aux_logits
    init_weights = init_weights and weights is None
    model = GoogLeNet(
        num_classes, aux_logits, transform_input, init_weights, dropout=dropout, dropout_aux=dropout_aux, variant=variant
    )
    if weights is not None:
        load_weights(model, weights, progress=progress)
    return model

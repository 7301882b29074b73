"""The published weights of GoogLeNet: where they are, how to recognise them and how to prepare an image for them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from googlenet_fused.preparation import PREPARATIONS


@dataclass(frozen=True, eq=False)
class Weights:
    """A published file of weights, with torchvision's field names.

    ``sha256`` is the digest in hexadecimal, or a prefix of it. ``transforms`` makes what prepares an image for these weights.
    ``size`` is the number of the file's bytes and ``variant`` the GoogLeNet that the weights are for, where they are known.
    """

    url: str
    sha256: str
    transforms: Callable[..., Callable[..., Tensor]]
    meta: Mapping[str, Any]
    size: int | None = None
    variant: str | None = None

    @property
    def filename(self) -> str:
        return PurePosixPath(urlsplit(self.url).path).name


class _Meta(Mapping[str, Any]):
    """Facts of the weights; ``"categories"`` is taken from torchvision when it is read, everything else is there without it."""

    def __init__(self, facts: Mapping[str, Any], categories: Callable[[], list[str]]) -> None:
        self._facts = dict(facts)
        self._categories = categories

    def __getitem__(self, key: str) -> Any:
        return self._categories() if key == "categories" else self._facts[key]

    def __iter__(self) -> Iterator[str]:
        yield from self._facts
        yield "categories"

    def __len__(self) -> int:
        return len(self._facts) + 1

    def __contains__(self, key: object) -> bool:
        return key == "categories" or key in self._facts

    def __repr__(self) -> str:
        return f"{{{', '.join(f'{key!r}: {value!r}' for key, value in self._facts.items())}, 'categories': ...}}"


def _torchvision(name: str) -> Any:
    """One of torchvision's modules.

    Raises:
        ImportError: torchvision is missing, or does not fit the installed torch.
    """
    try:
        return importlib.import_module(f"torchvision.{name}")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the transforms and the class names of the weights come from torchvision, and there is no module {error.name!r}: "
            "pip install 'googlenet-fused[tools]'"
        ) from error
    except (ImportError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ImportError(
            f"torchvision does not import beside this torch ({reason}): install versions of the two that belong together"
        ) from error


def _imagenet_transforms(**options: Any) -> Callable[..., Tensor]:
    transforms: Callable[..., Tensor] = _torchvision("models").GoogLeNet_Weights.IMAGENET1K_V1.transforms(**options)
    return transforms


def _imagenet_categories() -> list[str]:
    categories: list[str] = _torchvision("models").GoogLeNet_Weights.IMAGENET1K_V1.meta["categories"]
    return categories


def _bvlc_transforms(*, resize_size: int = 256, crop_size: int = 224) -> Callable[..., Tensor]:
    """From an RGB image (PIL, or a tensor ``[..., 3, h, w]`` in 0..255) to BVLC's input, ``[..., 3, 224, 224]``, float32.

    The image is warped to 256x256, whatever its proportions (bilinear, without antialiasing, as Caffe's ``convert_imageset``
    resizes); of it the centre is taken, as BGR in 0..255 minus (104, 117, 123).
    """
    v2 = _torchvision("transforms.v2")
    # Warped as floating point: torch's kernel for uint8 is up to one level off.
    warp = [v2.ToImage(), v2.ToDtype(torch.float32), v2.Resize([resize_size, resize_size], antialias=False)]
    transforms: Callable[..., Tensor] = v2.Compose([*warp, v2.CenterCrop(crop_size), PREPARATIONS["bvlc"]])
    return transforms


class PublishedWeights(Enum):
    """What the enums below have in common: a member's value is a ``Weights``, and its fields are the member's own."""

    @property
    def url(self) -> str:
        return self.value.url

    @property
    def sha256(self) -> str:
        return self.value.sha256

    @property
    def filename(self) -> str:
        return self.value.filename

    @property
    def transforms(self) -> Callable[..., Callable[..., Tensor]]:
        return self.value.transforms

    @property
    def meta(self) -> Mapping[str, Any]:
        return self.value.meta

    @property
    def size(self) -> int | None:
        return self.value.size

    @property
    def variant(self) -> str | None:
        return self.value.variant


class GoogLeNet_Weights(PublishedWeights):
    """Published weights of the ``"torchvision"`` variant, laid out as ``torchvision.models.GoogLeNet_Weights`` is.

    Url, digest and figures: torchvision 0.29.2, ``torchvision/models/googlenet.py``. ``meta["num_params"]`` counts the network
    without auxiliary heads; the file holds both heads, untrained. The weights expect ``model.transform_input = True``.

    ``transforms()`` and ``meta["categories"]`` need torchvision; without it their ``ImportError`` names the extra to install.
    """

    IMAGENET1K_V1 = Weights(
        url="https://download.pytorch.org/models/googlenet-1378be20.pth",
        sha256="1378be20",
        transforms=_imagenet_transforms,
        meta=_Meta(
            {
                "num_params": 6_624_904,
                "min_size": (15, 15),
                "_metrics": {"ImageNet-1K": {"acc@1": 69.778, "acc@5": 89.530}},
            },
            categories=_imagenet_categories,
        ),
        variant="torchvision",
    )
    DEFAULT = IMAGENET1K_V1


class BVLC_GoogLeNet_Weights(PublishedWeights):
    """Published weights of the ``"bvlc"`` variant: BVLC Caffe's replication of the paper's network, as a ``.caffemodel`` file.

    Url, digests and figures: BVLC/caffe, ``models/bvlc_googlenet``; the accuracy is that of one centre crop.
    ``meta["num_params"]`` counts the network without auxiliary heads; the file holds both heads, trained.

    ``transforms()`` prepares an image as the weights expect it: warped to 256x256 (bilinear), centre crop 224, BGR in 0..255
    minus (104, 117, 123). ``meta["categories"]`` is torchvision's list: BVLC's ``synset_words.txt`` has the classes in the same
    order, by WordNet id. Both need torchvision; without it their ``ImportError`` names the extra to install.
    """

    IMAGENET1K_V1 = Weights(
        url="http://dl.caffe.berkeleyvision.org/bvlc_googlenet.caffemodel",
        sha256="6f7101e3a2183738a7125a0c5021ba82a1feb4228c5ca0924d991b6daf6f6fad",
        transforms=_bvlc_transforms,
        meta=_Meta(
            {
                "num_params": 6_998_552,
                "min_size": (31, 31),
                "sha1": "405fc5acd08a3bb12de8ee5e23a96bec22f08204",
                "_metrics": {"ImageNet-1K": {"acc@1": 68.7, "acc@5": 88.9}},
            },
            categories=_imagenet_categories,
        ),
        size=53_533_754,
        variant="bvlc",
    )
    DEFAULT = IMAGENET1K_V1


PUBLISHED: dict[str, type[PublishedWeights]] = {"torchvision": GoogLeNet_Weights, "bvlc": BVLC_GoogLeNet_Weights}
"""By variant of GoogLeNet; a variant that is not there has no published weights that this package can fetch."""

"""The published weights of GoogLeNet: where they are, how to recognise them and how to prepare an image for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Weights:
    """A published file of weights, with torchvision's field names.

    ``sha256`` is the digest in hexadecimal, or a prefix of it. ``transforms`` makes what prepares an image for these weights.
    """

    url: str
    sha256: str
    transforms: Callable[..., Callable[..., Tensor]]
    meta: Mapping[str, Any]

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


def _torchvision_weights() -> Any:
    """torchvision's own enum member for the same file.

    Raises:
        ImportError: torchvision is missing, or does not fit the installed torch.
    """
    try:
        from torchvision.models import GoogLeNet_Weights as TorchvisionWeights
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
    return TorchvisionWeights.IMAGENET1K_V1


def _imagenet_transforms(**options: Any) -> Callable[..., Tensor]:
    return _torchvision_weights().transforms(**options)


def _imagenet_categories() -> list[str]:
    return _torchvision_weights().meta["categories"]


class GoogLeNet_Weights(Enum):
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
    )
    DEFAULT = IMAGENET1K_V1

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

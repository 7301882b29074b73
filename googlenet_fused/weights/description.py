"""What a file of weights says of itself, in the metadata of a ``.safetensors`` file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from googlenet_fused.weights.errors import WeightsError
from googlenet_fused.weights.files import SAFETENSORS_SUFFIX
from googlenet_fused.whole_files import whole_file

KEY = "googlenet_fused"
"""The entry of the metadata that holds the description, as JSON."""

_LIMIT = 100_000_000
"""Bytes that the header of a ``.safetensors`` file may have: the limit of the format itself."""


MAX_SIDE = 4096
"""Pixels that ``resize`` and ``crop`` may be: conv1 makes 1 GB of an image of this height and width."""


@dataclass(frozen=True)
class Description:
    """What a network needs to know of its weights beyond the numbers.

    Attributes:
        variant: which GoogLeNet they are for.
        num_classes: width of the classifier.
        classes: names in the classifier's order; None if they are not known.
        transform_input: whether the network maps ImageNet's normalisation to [-1, 1] first, as ``GoogLeNet`` takes it.
        resize: shorter side of an image, in pixels, before the centre crop.
        crop: height and width of the network's input, in pixels.
        source: where the weights come from, in words.

    Raises:
        ValueError: a field is of another type, or out of range.
    """

    variant: str
    num_classes: int
    classes: tuple[str, ...] | None = None
    transform_input: bool = False
    resize: int = 256
    crop: int = 224
    source: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_classes", "resize", "crop"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
            if name != "num_classes" and value > MAX_SIDE:
                raise ValueError(f"{name} must be at most {MAX_SIDE}, got {value}")
        if not isinstance(self.variant, str) or not isinstance(self.source, str | None):
            raise ValueError(f"variant and source must be strings, got {self.variant!r} and {self.source!r}")
        if type(self.transform_input) is not bool:
            raise ValueError(f"transform_input must be True or False, got {self.transform_input!r}")
        if self.classes is not None:
            object.__setattr__(self, "classes", tuple(self.classes))
            if not all(isinstance(name, str) for name in self.classes) or len(self.classes) != self.num_classes:
                raise ValueError(f"classes must be {self.num_classes} names, got {len(self.classes)}")


def save_described(path: str | os.PathLike[str], state_dict: Mapping[str, Tensor], description: Description) -> None:
    """Writes tensors and their description to a ``.safetensors`` file, whole or not at all.

    Raises:
        WeightsError: the suffix is another one, or the file cannot be written.
        ImportError: the package safetensors is not installed.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() != SAFETENSORS_SUFFIX:
        raise WeightsError(f"{path}: described weights are written to {SAFETENSORS_SUFFIX} files; name one")
    try:
        from safetensors.torch import save
    except ModuleNotFoundError as error:
        raise ImportError(f"writing {path.name} needs the safetensors package: pip install 'googlenet-fused[tools]'") from error
    content = save(
        {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}, {KEY: _to_json(description)}
    )
    try:
        with whole_file(path) as file:
            file.write(content)
    except OSError as error:
        raise WeightsError(f"cannot write {path}: {error.strerror or error}; name another file") from error


def read_description(path: str | os.PathLike[str]) -> Description | None:
    """What the file says of itself; None for another format, or a file without a description.

    Raises:
        WeightsError: the file cannot be read, or its header or its description is damaged.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() != SAFETENSORS_SUFFIX:
        return None
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(_LIMIT, path.stat().st_size - 8):
                raise ValueError("its header is longer than the file, or than the format allows")
            metadata = json.loads(file.read(length)).get("__metadata__", {})
        text = metadata.get(KEY)
        return None if text is None else _from_json(text)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path} does not say in a readable form what it holds: {error}; write it again") from error


def _to_json(description: Description) -> str:
    return json.dumps(asdict(description), ensure_ascii=False, separators=(",", ":"))


def _from_json(text: str) -> Description:
    found: dict[str, Any] = json.loads(text)
    known = {field.name for field in fields(Description)}
    return Description(**{name: value for name, value in found.items() if name in known})

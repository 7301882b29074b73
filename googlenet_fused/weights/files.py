"""Reading a file of weights into a plain state_dict, without running anything that the file holds."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from googlenet_fused.messages import listed
from googlenet_fused.weights import caffe, npz
from googlenet_fused.weights.caffe_names import bvlc_state_dict
from googlenet_fused.weights.errors import WeightsError
from googlenet_fused.weights.slim import from_slim, is_slim

SAFETENSORS_SUFFIX = ".safetensors"

_WRAPPERS = ("state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
"""What ``nn.DataParallel`` (and its distributed sibling) and ``torch.compile`` put before every key."""

_IMPOSTORS = (
    (re.compile(rb"\s*<(!doctype|html|\?xml|head|body)", re.IGNORECASE), "a web page, not weights: download it again"),
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer: fetch the real file with `git lfs pull`"),
)

_REMEDY = "; copy or download it again"

_SAYS_NOTHING = re.compile(r"\S+$|Unsupported operand|pop from empty|(list )?index out of range|unpack requires")
"""How unpickling fails on what is no pickle: a single word is the ``KeyError`` of an opcode or a name."""


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a ``.pth``, ``.pt``, ``.safetensors``, ``.npz`` or ``.caffemodel`` file, on the CPU, in the file's order.

    A checkpoint that keeps them under ``"state_dict"`` or ``"model"`` is opened, and ``module.`` or ``_orig_mod.`` before
    every key is taken off. Pickles are read with ``weights_only=True`` and never otherwise. The checksums inside a ``.pth``
    are verified, which ``torch.load`` leaves out; files from before torch 1.6 and ``.safetensors`` carry none. A
    ``.caffemodel`` is read as BVLC's GoogLeNet, in the order and with the keys of ``googlenet("bvlc")``.

    Variables of TF-slim's ``inception_v1``, known by their names, come under this package's keys: see ``slim.from_slim``.

    Raises:
        WeightsError: the file is missing, empty, truncated, damaged, of another type or suffix, refused as unsafe, or holds
            something other than tensors by name.
        ImportError: the file is ``.safetensors`` and the package of that name is not installed, or ``.npz`` and numpy is not.
    """
    return read_with_variant(path)[0]


def read_with_variant(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], str | None]:
    """As ``read_state_dict``, and the variant of GoogLeNet where names that are not this package's own tell it; else None."""
    path = Path(path).expanduser()
    _check_file(path)
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise WeightsError(f"{path}: unsupported suffix {path.suffix!r}; weights are read from {listed(SUFFIXES, 'and')}")
    tensors = _strip_prefixes(_tensors_by_name(path, read(path)))
    if is_slim(tensors):
        return from_slim(path, tensors), "slim"
    return tensors, "bvlc" if read is bvlc_state_dict else None


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise WeightsError(f"{path} is a folder, not a file of weights")
    if not path.exists():
        raise WeightsError(f"{path}: there is no such file")
    if not path.is_file():
        raise WeightsError(f"{path} is not a regular file")
    try:
        with open(path, "rb") as file:
            start = file.read(256)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
    if not start:
        raise WeightsError(f"{path} is empty")
    for pattern, what in _IMPOSTORS:
        if pattern.match(start):
            raise WeightsError(f"{path} is {what}")


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ModuleNotFoundError as error:
        raise ImportError(f"reading {path.name} needs the safetensors package: pip install 'googlenet-fused[tools]'") from error
    try:
        # Not load_file: it maps the file, and whoever rewrites the file later changes the tensors.
        return load(path.read_bytes())
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is truncated, damaged or not a safetensors file: {_first_line(error)}{_REMEDY}") from error


def _read_torch(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        _check_records(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise KeyError, IndexError, EOFError and more, besides UnpicklingError
        raise WeightsError(f"{path} {_why_refused(str(error))}") from error


def _check_records(path: Path) -> None:
    """Verifies the CRC-32 of every record; ``torch.serialization.set_crc32_options(False)`` writes zeros, which say nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.compress_type not in npz.BOUNDED:
                    raise ValueError(f"its record {record.filename!r} is compressed in a way that torch.save does not use")
                if record.CRC:
                    with archive.open(record) as stream:
                        while stream.read(1 << 20):
                            pass
    except Exception as error:  # damaged archives raise struct.error, zlib.error and more, besides BadZipFile
        raise WeightsError(f"{path} is damaged: {_first_line(error)}{_REMEDY}") from error


def _why_refused(message: str) -> str:
    unsafe = re.search(r"GLOBAL:? ([\w.]+)", message)
    if unsafe:
        return (
            f"is refused: it holds the Python object {unsafe[1]}, and unpickling it could run code. "
            "Save model.state_dict() instead of the model or the whole checkpoint"
        )
    if "TorchScript" in message:
        return "is a TorchScript program, not weights: save its state_dict() instead"
    cause = _first_line(message) or "it ends too early"
    reason = "" if _SAYS_NOTHING.match(cause) else f": {cause}"
    return f"is truncated, damaged or not a file that torch.save wrote{reason}{_REMEDY}"


def _first_line(error: object) -> str:
    """The first sentence of a library's message; torch's advice to load without ``weights_only`` is left out."""
    text = str(error).strip()
    if "WeightsUnpickler error:" in text:
        text = text.partition("WeightsUnpickler error:")[2].strip()
    return text.partition("\n")[0].partition(". ")[0]


def _tensors_by_name(path: Path, content: Any) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        if {"settings", "optimiser", "model"} <= set(content):
            raise WeightsError(
                f"{path} is the checkpoint of a training run, for train --resume: its result is model.safetensors beside it"
            )
        content = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), Mapping)), content)
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a state_dict (tensors by name)")
    if not content:
        raise WeightsError(f"{path} holds no tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise WeightsError(f"{path} is not a state_dict: its entry {name!r} is a {type(value).__name__}, not a tensor")
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            kind = "quantized" if value.is_quantized else "without data (meta device)" if value.is_meta else str(value.layout)
            raise WeightsError(f"{path}: the tensor {name} is {kind}; only dense tensors can be loaded")
    return {name: value.detach() for name, value in content.items()}


def _strip_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


_READERS: dict[str, Callable[[Path], Any]] = {
    ".pth": _read_torch,
    ".pt": _read_torch,
    SAFETENSORS_SUFFIX: _read_safetensors,
    npz.SUFFIX: npz.read_npz,
    caffe.SUFFIX: bvlc_state_dict,
}

SUFFIXES = tuple(_READERS)
"""What the name of a file of weights ends with, in either case."""

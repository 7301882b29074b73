"""Reading the arrays of a ``.npz`` file (numpy's ``savez``), in bounded memory and without unpickling."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from googlenet_fused.messages import first_line
from googlenet_fused.weights.errors import WeightsError

SUFFIX = ".npz"

LIMIT = 1 << 30
"""Bytes that the arrays of a file may have together: GoogLeNet's take 27 MB, with an optimizer's slots a few times that."""

BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""The compressions that ``zipfile`` unpacks a piece at a time: of bzip2 it makes 3 GB out of 1.4 kB, whatever is announced."""


def read_npz(path: Path) -> dict[str, Tensor]:
    """The file's arrays by name, in its order and in the machine's byte order.

    Raises:
        WeightsError: the file is damaged, is another kind of file, is compressed otherwise than numpy does, or holds something
            other than arrays of numbers or more than ``LIMIT`` bytes of them.
        ImportError: numpy is not installed.
    """
    try:
        import numpy  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(f"reading {path.name} needs the numpy package: pip install 'googlenet-fused[tools]'") from error
    tensors: dict[str, Tensor] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            total = sum(member.file_size for member in members)
            if total > LIMIT:
                raise ValueError(f"it unpacks to {total:,} bytes, and weights may have {LIMIT:,}")
            for member in members:
                name = member.filename.removesuffix(".npy")
                if member.compress_type not in BOUNDED:
                    raise ValueError(f"{name!r} is compressed in a way that numpy does not use")
                if name in tensors:
                    raise ValueError(f"it holds {name!r} twice")
                with archive.open(member) as stream:
                    tensors[name] = _read_array(stream, member.file_size, name)
    except Exception as error:  # damaged archives raise struct.error, zlib.error and more, besides BadZipFile
        raise WeightsError(
            f"{path} is truncated, damaged or not a .npz file of arrays: {first_line(error)}; copy it again, or write it anew "
            "with numpy.savez"
        ) from error
    return tensors


def _read_array(stream: IO[bytes], size: int, name: str) -> Tensor:
    """The array in a ``.npy`` stream of ``size`` bytes: its header must account for all of them before it is believed."""
    import numpy
    from numpy.lib import format as npy

    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{name!r} is in version {version[0]}.{version[1]} of the format, which is not for numbers")
    read_header: Any = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    if dtype.kind not in "biufc":
        raise ValueError(f"{name!r} is of type {dtype}, not numbers")
    if any(side < 0 for side in shape):
        raise ValueError(f"{name!r} has a shape that cannot be: {shape}")
    announced, held = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if announced != held:
        raise ValueError(f"{name!r} has {held} bytes where its header announces {announced}")
    stream.seek(0)
    array = npy.read_array(stream, allow_pickle=False)
    return torch.from_numpy(numpy.ascontiguousarray(array.astype(dtype.newbyteorder("="), copy=False)).reshape(shape))

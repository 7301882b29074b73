"""Caffe's ``.caffemodel`` files, read without Caffe and without protobuf.

Source of field numbers, legacy dimensions and limits: BVLC/caffe, ``src/caffe/proto/caffe.proto`` and ``src/caffe/blob.cpp``.
A file is a ``NetParameter``: layers (``V1LayerParameter`` in field 2, ``LayerParameter`` in field 100), each with a name and
blobs, each with a shape and values. Nesting ends there, so that no file can make the reader descend further; everything else
is passed over unread.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from googlenet_fused.messages import quoted
from googlenet_fused.weights.errors import WeightsError
from googlenet_fused.weights.wire import BYTES, FIXED32, FIXED64, VARINT, Field, Reader, WireError

SUFFIX = ".caffemodel"

MAX_BYTES = 2**30
"""BVLC's file has 53.5 MB; a GoogLeNet of 21,841 classes, auxiliary heads and all, in double precision has 0.6 GB."""

MAX_FIELDS = 200_000
MAX_LAYERS = 10_000
MAX_BLOBS = 10_000
MAX_DIMS = 32
MAX_NAME_BYTES = 1000
"""Bounds of the time and memory that a file can cost beyond its own size; BVLC's has some 150 layers and a few thousand fields.
Of the dimensions: Caffe's own limit."""


@dataclass(frozen=True)
class _LayerFields:
    """Where one version of Caffe's layers keeps its name and its blobs."""

    name: int
    blobs: int


_LAYERS = {2: _LayerFields(name=4, blobs=6), 100: _LayerFields(name=1, blobs=7)}
"""By the field of ``NetParameter``: ``layers`` (V1) and ``layer``."""

_LEGACY_DIMS = (1, 2, 3, 4)
"""``num``, ``channels``, ``height``, ``width``."""

_DATA, _SHAPE, _DOUBLE_DATA = 5, 7, 8
_DIM = 1

_VALUES = {_DATA: (FIXED32, 4, torch.float32), _DOUBLE_DATA: (FIXED64, 8, torch.float64)}
"""Wire type of one value outside a packed field, its bytes, and its dtype."""


def read_caffemodel(path: str | os.PathLike[str]) -> dict[str, list[Tensor]]:
    """The blobs of every layer that has any, by the layer's name and in the file's order: fp32, in the dimensions stored.

    Files of Caffe's first layer format, whose blobs all have four dimensions (``num``, ``channels``, ``height``, ``width``; a
    bias is ``[1, 1, 1, n]``), and of the later one are read, values in single and double precision, packed or not. Memory stays
    within some three times the size of the file, time within a second or two. Gradients in the file are passed over.

    Raises:
        WeightsError: the file is missing or no regular one, is larger than ``MAX_BYTES``, is truncated or damaged, has more
            layers, blobs or dimensions than the limits above, or holds no blobs; or a blob's values do not fill its shape. The
            message names the layer and the offset.
    """
    path = Path(path).expanduser()
    return parse_caffemodel(_content(path), path)


def parse_caffemodel(content: bytes, path: Path) -> dict[str, list[Tensor]]:
    """As ``read_caffemodel``, of a file's content; the path is for messages.

    Raises:
        WeightsError: as there.
    """
    reader, place = Reader(content, MAX_FIELDS), _Place()
    try:
        layers = _layers(reader, place)
    except WireError as error:
        where = f"at byte {error.at}{place}"
        raise WeightsError(
            f"{path} is truncated, damaged or not a {SUFFIX} file: {where}: {error}; copy or download it again"
        ) from error
    if not layers:
        raise WeightsError(
            f"{path} holds no layers with weights: it is not a {SUFFIX} file, or one of a net without parameters"
        )
    return layers


class _Place:
    """In which layer and blob the reader is, in words."""

    layer: str | None = None
    blob: int | None = None

    def __str__(self) -> str:
        layer = "" if self.layer is None else f", in layer {quoted(self.layer)}"
        return layer if self.blob is None else f"{layer}, blob {self.blob}"


def _content(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise WeightsError(f"{path} is not a regular file")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise WeightsError(f"{path} has {size} bytes; a {SUFFIX} file may have {MAX_BYTES}")
            return file.read(size)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error


def _layers(reader: Reader, place: _Place) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    at, end, layers, blobs = 0, len(reader.content), 0, 0
    while at < end:
        field = reader.read(at, end)
        at = field.end
        if field.number not in _LAYERS:
            continue
        layers += 1
        if layers > MAX_LAYERS:
            raise WireError(field.at, f"it has more than {MAX_LAYERS} layers")
        name, spans = _layer(reader, field, _LAYERS[field.number], place)
        blobs += len(spans)
        if blobs > MAX_BLOBS:
            raise WireError(field.at, f"it has more than {MAX_BLOBS} blobs")
        if spans and name in found:
            raise WireError(field.at, "an earlier layer of the same name has blobs, too")
        if spans:
            found[name] = [_blob(reader, span, index, place) for index, span in enumerate(spans)]
        place.layer = None
    return found


def _layer(reader: Reader, layer: Field, fields: _LayerFields, place: _Place) -> tuple[str, list[Field]]:
    """A layer's name and the fields that hold its blobs."""
    _expect(layer, BYTES)
    name, spans, at = "", [], layer.start
    place.layer = name
    while at < layer.end:
        field = reader.read(at, layer.end)
        at = field.end
        if field.number == fields.name:
            _expect(field, BYTES)
            place.layer = name = _text(reader, field)
        elif field.number == fields.blobs:
            _expect(field, BYTES)
            spans.append(field)
            if len(spans) > MAX_BLOBS:
                raise WireError(field.at, f"it has more than {MAX_BLOBS} blobs")
    return name, spans


def _blob(reader: Reader, blob: Field, index: int, place: _Place) -> Tensor:
    place.blob = index
    legacy: dict[int, int] = {}
    shape: list[int] = []
    values = {number: bytearray() for number in _VALUES}
    at = blob.start
    while at < blob.end:
        field = reader.read(at, blob.end)
        at = field.end
        if field.number in _LEGACY_DIMS:
            _expect(field, VARINT)
            legacy[field.number] = _signed(field.value)
        elif field.number == _SHAPE:
            _expect(field, BYTES)
            _extend_shape(reader, field, shape)
        elif field.number in _VALUES:
            at = _extend_values(reader, field, blob.end, values[field.number])
    # As Caffe reads them: one legacy dimension is enough for the shape to be the legacy one, absent dimensions being 0.
    dims = [legacy.get(number, 0) for number in _LEGACY_DIMS] if legacy else shape
    if all(values.values()):
        raise WireError(blob.at, "it has values in single and in double precision")
    number = _DOUBLE_DATA if values[_DOUBLE_DATA] else _DATA
    _, size, dtype = _VALUES[number]
    data = values[number]
    count = len(data) // size
    if any(dim < 1 for dim in dims) or math.prod(dims) != count:
        raise WireError(blob.at, f"its shape is {dims}, and it holds {count} value{'' if count == 1 else 's'}")
    place.blob = None
    return torch.frombuffer(data, dtype=dtype).reshape(dims).to(torch.float32)


def _extend_shape(reader: Reader, field: Field, shape: list[int]) -> None:
    """Appends the dimensions of a ``BlobShape``."""
    at = field.start
    while at < field.end:
        inner = reader.read(at, field.end)
        at = inner.end
        if inner.number != _DIM:
            continue
        if inner.wire == VARINT:
            shape.append(_signed(inner.value))
        else:
            _expect(inner, BYTES)
            packed = inner.start
            while packed < inner.end and len(shape) <= MAX_DIMS:
                dim, packed = reader.varint(packed, inner.end)
                shape.append(_signed(dim))
        if len(shape) > MAX_DIMS:
            raise WireError(inner.at, f"its shape has more than {MAX_DIMS} dimensions")


def _extend_values(reader: Reader, field: Field, end: int, data: bytearray) -> int:
    """Appends the bytes of packed values, or of a run of single ones, to ``data``; returns the offset after them."""
    wire, size, _ = _VALUES[field.number]
    view = memoryview(reader.content)
    if field.wire == BYTES:
        if (field.end - field.start) % size:
            raise WireError(field.at, f"{field.end - field.start} bytes are no whole number of values of {size} bytes")
        data += view[field.start : field.end]
        return field.end
    _expect(field, wire)
    stop = reader.run_end(field, end)
    stride = field.end - field.at
    run = bytearray((stop - field.at) // stride * size)
    for byte in range(size):
        run[byte::size] = view[field.start + byte : stop : stride]
    data += run
    return stop


def _expect(field: Field, wire: int) -> None:
    if field.wire != wire:
        raise WireError(field.at, f"field {field.number} has wire type {field.wire}, where {wire} is due")


def _text(reader: Reader, field: Field) -> str:
    if field.end - field.start > MAX_NAME_BYTES:
        raise WireError(field.at, f"its name is longer than {MAX_NAME_BYTES} bytes")
    try:
        return reader.content[field.start : field.end].decode()
    except UnicodeDecodeError as error:
        raise WireError(field.start + error.start, "its name is not UTF-8") from error


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value

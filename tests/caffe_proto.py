"""Caffe's messages as Google's own protobuf reads them, so far as weights are concerned: field numbers as in caffe.proto."""

from __future__ import annotations

from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_OPTIONAL, _REPEATED = 1, 3
_DOUBLE, _FLOAT, _INT64, _INT32, _STRING, _MESSAGE = 1, 2, 3, 5, 9, 11

_MESSAGES: dict[str, list[tuple[str, int, int, int, str]]] = {
    "BlobShape": [("dim", 1, _REPEATED, _INT64, "")],
    "BlobProto": [
        ("num", 1, _OPTIONAL, _INT32, ""),
        ("channels", 2, _OPTIONAL, _INT32, ""),
        ("height", 3, _OPTIONAL, _INT32, ""),
        ("width", 4, _OPTIONAL, _INT32, ""),
        ("data", 5, _REPEATED, _FLOAT, ""),
        ("shape", 7, _OPTIONAL, _MESSAGE, "BlobShape"),
        ("double_data", 8, _REPEATED, _DOUBLE, ""),
    ],
    "V1LayerParameter": [("name", 4, _OPTIONAL, _STRING, ""), ("blobs", 6, _REPEATED, _MESSAGE, "BlobProto")],
    "LayerParameter": [("name", 1, _OPTIONAL, _STRING, ""), ("blobs", 7, _REPEATED, _MESSAGE, "BlobProto")],
    "NetParameter": [
        ("layers", 2, _REPEATED, _MESSAGE, "V1LayerParameter"),
        ("layer", 100, _REPEATED, _MESSAGE, "LayerParameter"),
    ],
}


def _net_parameter() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="caffe_weights.proto", package="caffe_weights", syntax="proto2")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, label, kind, of in fields:
            made = message.field.add(name=field, number=number, label=label, type=kind)
            if of:
                made.type_name = f".caffe_weights.{of}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("caffe_weights.NetParameter"))


NetParameter = _net_parameter()


def blobs_by_protobuf(content: bytes) -> dict[str, list[np.ndarray]]:
    """Blobs by layer as fp32, read as Caffe's ``Blob::FromProto`` does; raises what protobuf raises of a damaged file."""
    net = NetParameter.FromString(content)
    return {layer.name: [_array(blob) for blob in layer.blobs] for layer in (*net.layers, *net.layer) if layer.blobs}


def _array(blob: Any) -> np.ndarray:
    legacy = [blob.num, blob.channels, blob.height, blob.width]
    dims = legacy if any(map(blob.HasField, ("num", "channels", "height", "width"))) else list(blob.shape.dim)
    values = np.array(blob.double_data, np.float64) if len(blob.double_data) else np.array(blob.data, np.float32)
    with np.errstate(over="ignore"):
        return values.astype(np.float32).reshape(dims)

"""BVLC's GoogLeNet in Caffe's own terms, written from its description: a prototxt, random weights, and ``.caffemodel`` files.

Nothing here knows of this package's reader, its table of names or its networks: only the widths come from the specs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np

from googlenet_fused.spec import GOOGLENET_SPECS

Blobs = dict[str, list[np.ndarray]]
Version = Literal["V1", "V2"]
Values = Literal["packed", "unpacked", "double", "unpacked double"]

V1_TYPES = {"Convolution": 4, "InnerProduct": 14}


class Layer(NamedTuple):
    """One layer of the net. ``blobs``: the shapes of its weight and its bias; ``params``: the rest of its prototxt."""

    name: str
    type: str
    bottoms: tuple[str, ...]
    top: str
    params: str = ""
    blobs: tuple[tuple[int, ...], ...] = ()


def conv(name: str, bottom: str, inputs: int, outputs: int, kernel: int, stride: int = 1) -> Iterator[Layer]:
    """A convolution and the ReLU that works in place on its output."""
    params = f"convolution_param {{ num_output: {outputs} kernel_size: {kernel} stride: {stride} pad: {kernel // 2} }}"
    yield Layer(name, "Convolution", (bottom,), name, params, ((outputs, inputs, kernel, kernel), (outputs,)))
    yield relu(name)


def relu(top: str) -> Layer:
    folder, _, last = top.rpartition("/")
    return Layer(f"{folder}/relu_{last}", "ReLU", (top,), top)


def pool(name: str, bottom: str, kind: str, kernel: int, stride: int, pad: int = 0) -> Layer:
    return Layer(
        name, "Pooling", (bottom,), name, f"pooling_param {{ pool: {kind} kernel_size: {kernel} stride: {stride} pad: {pad} }}"
    )


def lrn(name: str, bottom: str) -> Layer:
    return Layer(name, "LRN", (bottom,), name, "lrn_param { local_size: 5 alpha: 0.0001 beta: 0.75 }")


def linear(name: str, bottom: str, inputs: int, outputs: int) -> Layer:
    params = f"inner_product_param {{ num_output: {outputs} }}"
    return Layer(name, "InnerProduct", (bottom,), name, params, ((outputs, inputs), (outputs,)))


def dropout(name: str, bottom: str) -> Layer:
    return Layer(name, "Dropout", (bottom,), bottom, "dropout_param { dropout_ratio: 0.5 }")


def inception(name: str, bottom: str) -> Iterator[Layer]:
    inputs, ch1x1, ch3x3red, ch3x3, ch5x5red, ch5x5, pool_proj, _ = GOOGLENET_SPECS[name]
    at = f"inception_{name}"
    yield from conv(f"{at}/1x1", bottom, inputs, ch1x1, 1)
    yield from conv(f"{at}/3x3_reduce", bottom, inputs, ch3x3red, 1)
    yield from conv(f"{at}/3x3", f"{at}/3x3_reduce", ch3x3red, ch3x3, 3)
    yield from conv(f"{at}/5x5_reduce", bottom, inputs, ch5x5red, 1)
    yield from conv(f"{at}/5x5", f"{at}/5x5_reduce", ch5x5red, ch5x5, 5)
    yield pool(f"{at}/pool", bottom, "MAX", 3, 1, 1)
    yield from conv(f"{at}/pool_proj", f"{at}/pool", inputs, pool_proj, 1)
    parts = (f"{at}/1x1", f"{at}/3x3", f"{at}/5x5", f"{at}/pool_proj")
    yield Layer(f"{at}/output", "Concat", parts, f"{at}/output")


def head(number: int, bottom: str, inputs: int, classes: int) -> Iterator[Layer]:
    at = f"loss{number}"
    yield pool(f"{at}/ave_pool", bottom, "AVE", 5, 3)
    yield from conv(f"{at}/conv", f"{at}/ave_pool", inputs, 128, 1)
    yield linear(f"{at}/fc", f"{at}/conv", 2048, 1024)
    yield relu(f"{at}/fc")
    yield dropout(f"{at}/drop_fc", f"{at}/fc")
    yield linear(f"{at}/classifier", f"{at}/fc", 1024, classes)


def bvlc_layers(classes: int = 1000, heads: bool = True) -> list[Layer]:
    """The whole net, in the order of ``train_val.prototxt``."""
    layers: list[Layer] = []

    def add(*more: Layer) -> str:
        layers.extend(more)
        return more[-1].top

    top = add(*conv("conv1/7x7_s2", "data", 3, 64, 7, 2))
    top = add(pool("pool1/3x3_s2", top, "MAX", 3, 2))
    top = add(lrn("pool1/norm1", top))
    top = add(*conv("conv2/3x3_reduce", top, 64, 64, 1))
    top = add(*conv("conv2/3x3", top, 64, 192, 3))
    top = add(lrn("conv2/norm2", top))
    top = add(pool("pool2/3x3_s2", top, "MAX", 3, 2))
    for name in GOOGLENET_SPECS:
        top = add(*inception(name, top))
        if heads and name in ("4a", "4d"):
            add(*head(1 if name == "4a" else 2, top, GOOGLENET_SPECS[name].out_channels, classes))
        if name in ("3b", "4e"):
            top = add(pool(f"pool{name[0]}/3x3_s2", top, "MAX", 3, 2))
    top = add(pool("pool5/7x7_s1", top, "AVE", 7, 1))
    top = add(dropout("pool5/drop_7x7_s1", top))
    add(linear("loss3/classifier", top, 1024, classes))
    return layers


def prototxt(layers: Iterable[Layer], side: int = 224) -> str:
    """The net as Caffe's text format has it, with an input of one image."""
    lines = ['name: "GoogLeNet"', 'input: "data"', f"input_shape {{ dim: 1 dim: 3 dim: {side} dim: {side} }}"]
    for layer in layers:
        bottoms = " ".join(f'bottom: "{bottom}"' for bottom in layer.bottoms)
        lines.append(f'layer {{ name: "{layer.name}" type: "{layer.type}" {bottoms} top: "{layer.top}" {layer.params} }}')
    return "\n".join(lines) + "\n"


def random_blobs(layers: Iterable[Layer], seed: int = 0) -> Blobs:
    """Weights of He's variance and biases of deviation 0.1, fp32: no layer's output vanishes or explodes."""
    generator = np.random.default_rng(seed)
    found: Blobs = {}
    for layer in layers:
        if layer.blobs:
            weight, bias = layer.blobs
            deviation = (2 / np.prod(weight[1:])) ** 0.5
            found[layer.name] = [
                generator.standard_normal(weight, np.float32) * np.float32(deviation),
                generator.standard_normal(bias, np.float32) * np.float32(0.1),
            ]
    return found


def varint(value: int) -> bytes:
    value %= 2**64
    content = bytearray()
    while value > 0x7F:
        content.append(value & 0x7F | 0x80)
        value >>= 7
    content.append(value)
    return bytes(content)


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def message(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def blob(values: np.ndarray, version: Version = "V2", kind: Values = "packed") -> bytes:
    """A ``BlobProto``: legacy dimensions, as many leading ones as make four, or a ``BlobShape``."""
    if version == "V1":
        dims = [1] * (4 - values.ndim) + list(values.shape)
        shape = b"".join(number(field, dim) for field, dim in enumerate(dims, start=1))
    else:
        shape = message(7, message(1, b"".join(varint(dim) for dim in values.shape)))
    double = kind.endswith("double")
    field, wire, data = (8, 1, values.astype("<f8")) if double else (5, 5, values.astype("<f4"))
    if kind.startswith("unpacked"):
        tag = varint(field << 3 | wire)
        return shape + b"".join(tag + one.tobytes() for one in data.ravel())
    return shape + message(field, data.tobytes())


def layer(name: str, blobs: Iterable[bytes], type: str = "Convolution", version: Version = "V2") -> bytes:
    """A layer of a ``NetParameter`` with its blobs, and the names of its bottom and top as Caffe writes them."""
    if version == "V1":
        start = message(2, b"bottom") + message(3, name.encode()) + message(4, name.encode()) + number(5, V1_TYPES[type])
        return message(2, start + b"".join(message(6, one) for one in blobs))
    start = message(1, name.encode()) + message(2, type.encode()) + message(3, b"bottom") + message(4, name.encode())
    return message(100, start + b"".join(message(7, one) for one in blobs))


def caffemodel(blobs: Mapping[str, Iterable[np.ndarray]], version: Version = "V2", kind: Values = "packed") -> bytes:
    """A ``NetParameter``: its name, then the layers."""
    layers = [
        layer(name, (blob(one, version, kind) for one in arrays), _type_of(arrays), version) for name, arrays in blobs.items()
    ]
    return message(1, b"GoogLeNet") + b"".join(layers)


def _type_of(arrays: Iterable[np.ndarray]) -> str:
    return "Convolution" if next(iter(arrays)).ndim == 4 else "InnerProduct"

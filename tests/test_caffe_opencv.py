"""BVLC's network layer by layer against OpenCV, which reads and runs Caffe's nets with an engine of its own."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import pytest
import torch
from caffe_net import Layer, Version, bvlc_layers, caffemodel, prototxt, random_blobs
from torch import Tensor, nn

from googlenet_fused.models import GoogLeNet
from googlenet_fused.weights.caffe_names import bvlc_state_dict

cv2 = pytest.importorskip("cv2", reason="opencv-python-headless<5 runs Caffe's nets")
if not hasattr(cv2.dnn, "readNetFromCaffe"):
    pytest.skip("OpenCV 5 and later no longer run Caffe's nets", allow_module_level=True)

LIMIT = 1e-5
"""Of the largest difference in a layer to its largest value."""

CONVS = {
    "1x1": "branch1",
    "3x3_reduce": "branch2.0",
    "3x3": "branch2.1",
    "5x5_reduce": "branch3.0",
    "5x5": "branch3.1",
    "pool_proj": "branch4.1",
}

MODULES = {
    "conv1/7x7_s2": "conv1.conv",
    "conv1/relu_7x7_s2": "conv1",
    "pool1/3x3_s2": "maxpool1",
    "pool1/norm1": "norm1",
    "conv2/3x3_reduce": "conv2.conv",
    "conv2/relu_3x3_reduce": "conv2",
    "conv2/3x3": "conv3.conv",
    "conv2/relu_3x3": "conv3",
    "conv2/norm2": "norm2",
    "pool2/3x3_s2": "maxpool2",
    "pool3/3x3_s2": "maxpool3",
    "pool4/3x3_s2": "maxpool4",
    "pool5/7x7_s1": "avgpool",
    "pool5/drop_7x7_s1": "dropout",
    "loss3/classifier": "fc",
}

IN_HEADS = {
    "ave_pool": "avgpool",
    "conv": "conv.conv",
    "relu_conv": "conv",
    "fc": "fc1",
    "drop_fc": "dropout",
    "classifier": "fc2",
}


def module_of(layer: str) -> str:
    """The module here whose output is that of a layer; a head's second ReLU is none, and its dropout does nothing."""
    folder, _, last = layer.partition("/")
    if layer in MODULES:
        return MODULES[layer]
    if folder.startswith("inception_"):
        module = folder.replace("_", "")
        if last == "output":
            return module
        if last == "pool":
            return f"{module}.branch4.0"
        return f"{module}.{CONVS[last.removeprefix('relu_')]}" + ("" if last.startswith("relu_") else ".conv")
    return f"aux{folder[-1]}.{'dropout' if last == 'relu_fc' else IN_HEADS[last]}"


class Case(NamedTuple):
    layers: list[Layer]
    path: Path
    image: Tensor
    expected: dict[str, np.ndarray]


def by_opencv(layers: list[Layer], content: bytes, image: Tensor) -> dict[str, np.ndarray]:
    """The output of every layer. Nothing is fused, so that each is computed as the net says."""
    net = cv2.dnn.readNetFromCaffe(np.frombuffer(prototxt(layers).encode(), np.uint8), np.frombuffer(content, np.uint8))
    net.enableFusion(False)
    net.setInput(image.numpy())
    names = [layer.name for layer in layers]
    assert list(net.getLayerNames()) == names
    return dict(zip(names, net.forward(names), strict=True))


def by_torch(model: GoogLeNet, image: Tensor) -> dict[str, Tensor]:
    """The output of every module by name, the heads included, which run in training only."""
    found: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module) -> None:
        # A copy, because ReLUs work in place.
        module.register_forward_hook(lambda _, __, output: found.update({name: output.clone()}))

    for name, module in model.named_modules():
        keep(name, module)
    with torch.inference_mode():
        model(image)
        for head, block in ((model.aux1, "inception4a"), (model.aux2, "inception4d")):
            assert head is not None
            head(found[block].clone())
    return found


def network(path: Path) -> GoogLeNet:
    model = GoogLeNet(variant="bvlc", init_weights=False).eval()
    model.load_state_dict(bvlc_state_dict(path))
    return model


def error(actual: Tensor, expected: np.ndarray) -> float:
    largest = np.abs(expected).max()
    assert 1e-2 < largest < 1e4, "the comparison would say nothing"
    return float(np.abs(actual.numpy().reshape(expected.shape) - expected).max() / largest)


@pytest.fixture(scope="module", params=get_args(Version))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    layers = bvlc_layers()
    content = caffemodel(random_blobs(layers), request.param)
    path = tmp_path_factory.mktemp("caffe") / "x.caffemodel"
    path.write_bytes(content)
    image = torch.from_numpy(np.random.default_rng(1).uniform(-123, 151, (1, 3, 224, 224)).astype(np.float32))
    return Case(layers, path, image, by_opencv(layers, content, image))


def test_every_layer_agrees_with_opencv(case: Case) -> None:
    actual = by_torch(network(case.path), case.image)
    errors = {layer.name: error(actual[module_of(layer.name)], case.expected[layer.name]) for layer in case.layers}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < LIMIT, f"{worst}: {errors[worst]:.1e}"


@pytest.mark.parametrize(
    ("wrong", "layer"),
    [
        ("alpha not divided by the size", "pool1/norm1"),
        ("pools that round down", "pool1/3x3_s2"),
        ("swapped branches", "inception_3a/output"),
    ],
)
def test_the_comparison_sees_what_ports_get_wrong(wrong: str, layer: str, case: Case) -> None:
    model = network(case.path)
    if "alpha" in wrong:
        model.norm1.alpha *= 5
    elif "pools" in wrong:
        model.maxpool1 = nn.Sequential(nn.MaxPool2d(3, stride=2, padding=1))
    else:
        block = model.inception3a
        block.branch3, block.branch4 = block.branch4, block.branch3
    assert error(by_torch(model, case.image)[module_of(layer)], case.expected[layer]) > 100 * LIMIT

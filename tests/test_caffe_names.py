"""From the layers of a ``.caffemodel`` file to the state_dict of ``googlenet("bvlc")``, or a refusal that names the layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from caffe_net import Blobs, Version, bvlc_layers, caffemodel, random_blobs
from cases import message_of
from torch import Tensor

from googlenet_fused.models import googlenet
from googlenet_fused.weights import WeightsError, load_weights, read_state_dict
from googlenet_fused.weights.caffe_names import bvlc_state_dict

CLASSES = 7


@cache
def _blobs(heads: bool) -> Blobs:
    return random_blobs(bvlc_layers(CLASSES, heads))


def blobs(heads: bool = True) -> Blobs:
    return {name: list(arrays) for name, arrays in _blobs(heads).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests, which write their 50 MB to the same file."""
    return tmp_path_factory.mktemp("caffe")


def read(folder: Path, content: Blobs, version: Version = "V1") -> dict[str, Tensor]:
    path = folder / "x.caffemodel"
    path.write_bytes(caffemodel(content, version))
    return bvlc_state_dict(path)


def refusal(folder: Path, content: Blobs) -> str:
    with pytest.raises(WeightsError) as error:
        read(folder, content)
    text = message_of(error)
    assert text.startswith(str(folder / "x.caffemodel"))
    return text.removeprefix(str(folder / "x.caffemodel"))


@pytest.mark.parametrize("version", get_args(Version))
@pytest.mark.parametrize("heads", [True, False])
def test_the_keys_and_shapes_are_those_of_the_network(version: Version, heads: bool, folder: Path) -> None:
    model = googlenet("bvlc", num_classes=CLASSES, aux_logits=heads, init_weights=False)
    state = read(folder, blobs(heads), version)
    assert [(key, value.shape) for key, value in state.items()] == [(k, v.shape) for k, v in model.state_dict().items()]
    assert all(value.dtype == torch.float32 for value in state.values())
    model.load_state_dict(state)


@pytest.mark.parametrize(
    ("layer", "key"),
    [
        ("conv1/7x7_s2", "conv1.conv"),
        ("conv2/3x3_reduce", "conv2.conv"),
        ("conv2/3x3", "conv3.conv"),
        ("inception_3a/1x1", "inception3a.branch1.conv"),
        ("inception_3b/3x3_reduce", "inception3b.branch2.0.conv"),
        ("inception_4a/3x3", "inception4a.branch2.1.conv"),
        ("inception_4e/5x5_reduce", "inception4e.branch3.0.conv"),
        ("inception_5a/5x5", "inception5a.branch3.1.conv"),
        ("inception_5b/pool_proj", "inception5b.branch4.1.conv"),
        ("loss1/conv", "aux1.conv.conv"),
        ("loss1/fc", "aux1.fc1"),
        ("loss2/classifier", "aux2.fc2"),
        ("loss3/classifier", "fc"),
    ],
)
def test_values_arrive_under_their_key(layer: str, key: str, folder: Path) -> None:
    state = read(folder, blobs())
    weight, bias = blobs()[layer]
    assert torch.equal(state[f"{key}.weight"], torch.from_numpy(weight))
    assert torch.equal(state[f"{key}.bias"], torch.from_numpy(bias))


def test_the_order_in_the_file_does_not_matter(folder: Path) -> None:
    expected = read(folder, blobs())
    state = read(folder, dict(reversed(blobs().items())))
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def remove(*names: str) -> Callable[[Blobs], None]:
    def change(content: Blobs) -> None:
        for name in names:
            del content[name]

    return change


def put(name: str, *shapes: tuple[int, ...]) -> Callable[[Blobs], None]:
    return lambda content: content.update({name: [np.zeros(shape, np.float32) for shape in shapes]})


def rename(**names: str) -> Callable[[Blobs], None]:
    """``loss3=...``: the new name of ``loss3/classifier``, which moves to the file's end."""

    def change(content: Blobs) -> None:
        for head, name in names.items():
            content[name] = content.pop(f"{head}/classifier")

    return change


def both(*changes: Callable[[Blobs], None]) -> Callable[[Blobs], None]:
    def change(content: Blobs) -> None:
        for one in changes:
            one(content)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (remove("conv2/3x3"), "its layer 'conv2/3x3' is missing; no other layer is wrong"),
        (
            remove("inception_4b/5x5", "loss2/conv"),
            "its layer 'inception_4b/5x5' is missing; in all 2 layers missing or of another shape",
        ),
        (remove("loss1/conv", "loss1/fc", "loss1/classifier"), "its layer 'loss1/conv' is missing; in all 3 layers"),
        (remove("loss3/classifier"), "its layer 'loss3/classifier' is missing; no other layer is wrong"),
        (put("fc6", (3, 4), (3,)), "its layer 'fc6' has weights and no place in the network; no other layer is wrong"),
        (
            both(put("fc6", (3, 4), (3,)), put("fc7", (3, 4), (3,))),
            "its layer 'fc6' has weights and no place in the network; in all 2 layers without a place",
        ),
        (
            both(put("fc6", (3, 4), (3,)), remove("conv2/3x3")),
            "'conv2/3x3' is missing; in all 1 layer missing or of another shape, 1 layer without a place (first: 'fc6')",
        ),
        (
            put("conv1/7x7_s2", (64, 3, 7, 5), (64,)),
            "'conv1/7x7_s2' has a weight of shape [64, 3, 7, 5] and not [64, 3, 7, 7]; no other",
        ),
        (put("conv1/7x7_s2", (64, 3, 7, 7), (63,)), "has a bias of shape [1, 1, 1, 63] and not [64]"),
        (put("conv1/7x7_s2", (64, 3, 7, 7), (64, 1)), "has a bias of shape [1, 1, 64, 1] and not [64]"),
        (put("conv1/7x7_s2", (64, 3, 7, 7)), "'conv1/7x7_s2' has 1 blob and not a weight and a bias"),
        (put("loss3/classifier", (7, 1023), (7,)), "has a weight of shape [1, 1, 7, 1023] and not [classes, 1024]"),
        (put("loss3/classifier", (7, 1024), (6,)), "has a weight of shape [1, 1, 7, 1024] and not [classes, 1024]"),
        (put("loss1/fc", (1024, 2048), (1024,), (1,)), "'loss1/fc' has 3 blobs and not a weight and a bias"),
        (put("inception_3a/5x5", (32, 16, 3, 3), (32,)), "has a weight of shape [32, 16, 3, 3] and not [32, 16, 5, 5]"),
    ],
)
def test_the_first_layer_that_is_wrong_is_named(change: Callable[[Blobs], None], reason: str, folder: Path) -> None:
    content = blobs()
    change(content)
    text = refusal(folder, content)
    assert text.startswith(" is not BVLC's GoogLeNet: its layer ")
    assert reason in text


def test_another_network_is_refused(folder: Path) -> None:
    content: Blobs = {"conv1": [np.zeros((96, 3, 11, 11), np.float32), np.zeros(96, np.float32)]}
    text = refusal(folder, content)
    assert "its layer 'conv1/7x7_s2' is missing; in all 58 layers missing or of another shape, 1 layer without" in text
    assert text.endswith("(first: 'conv1')")


def test_each_classifier_has_its_own_number_of_classes(folder: Path) -> None:
    content = blobs()
    put("loss3/classifier", (3, 1024), (3,))(content)
    state = read(folder, content)
    assert state["fc.weight"].shape == (3, 1024)
    assert state["aux1.fc2.bias"].shape == (CLASSES,)
    model = googlenet("bvlc", num_classes=3, aux_logits=False, init_weights=False)
    model.load_state_dict(state, strict=False)


@pytest.mark.parametrize(
    ("heads", "names"),
    [
        (False, {"loss3": "loss3/classifier_food"}),
        (False, {"loss3": "fc8_food"}),
        (True, {"loss3": "fc8_food"}),
        (True, {"loss1": "loss1/food", "loss2": "loss2/food", "loss3": "loss3/food"}),
    ],
)
def test_a_classifier_under_a_name_of_its_own_is_found(heads: bool, names: dict[str, str], folder: Path) -> None:
    expected = read(folder, blobs(heads))
    content = blobs(heads)
    rename(**names)(content)
    state = read(folder, content)
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (
            both(remove("loss1/classifier"), rename(loss3="b")),
            "and 'b' stands for 'loss1/classifier', give the layer that name",
        ),
        (rename(loss1="a", loss3="b"), "and 'a' stands for 'loss1/classifier', give the layer that name"),
        (both(rename(loss3="b"), put("c", (2, 1024), (2,))), "and 'b' stands for 'loss3/classifier', give the layer that name"),
        (
            both(rename(loss3="loss3/b"), put("loss3/c", (2, 1024), (2,))),
            "and 'loss3/b' stands for 'loss3/classifier', give the layer that name",
        ),
    ],
)
def test_classifiers_that_could_be_several_get_a_hint(change: Callable[[Blobs], None], hint: str, folder: Path) -> None:
    content = blobs()
    change(content)
    text = refusal(folder, content)
    assert "/classifier' is missing" in text
    assert hint in text


def test_a_second_classifier_is_surplus(folder: Path) -> None:
    content = blobs()
    put("loss3/classifier_food", (2, 1024), (2,))(content)
    assert "'loss3/classifier_food' has weights and no place" in refusal(folder, content)


def test_a_caffemodel_loads_like_any_file(folder: Path) -> None:
    expected = read(folder, blobs())
    path = folder / "x.caffemodel"
    assert all(torch.equal(value, expected[key]) for key, value in read_state_dict(path).items())
    model = googlenet("bvlc", weights=str(path), num_classes=CLASSES)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert model.transform_input is False
    with_heads = googlenet("bvlc", num_classes=CLASSES, init_weights=False)
    load_weights(with_heads, path.rename(folder / "X.CaffeModel"))
    assert all(torch.equal(value, expected[key]) for key, value in with_heads.state_dict().items())


def test_a_caffemodel_that_does_not_fit_the_model_says_why(folder: Path) -> None:
    read(folder, blobs(heads=False))
    for options, reason in (
        ({"variant": "torchvision", "num_classes": CLASSES}, "is for the 'bvlc' variant, and the model is the 'torchvision'"),
        ({"variant": "bvlc", "num_classes": 8}, "build the model with num_classes=7"),
        ({"variant": "bvlc", "num_classes": CLASSES, "aux_logits": True}, "build the model with aux_logits=False"),
    ):
        with pytest.raises(WeightsError) as error:
            googlenet(weights=folder / "x.caffemodel", **options)  # type: ignore[arg-type]
        assert reason in message_of(error)

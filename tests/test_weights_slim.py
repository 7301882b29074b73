"""TF-slim's variables, from ``.npz`` and other files: mapped by name, and refused with the reason where they do not fit."""

from __future__ import annotations

import io
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from cases import assert_same, message_of, save_tensors, tiny_state
from slim_net import Variables, layers, random_variables
from torch import Tensor, nn

from googlenet_fused import googlenet
from googlenet_fused.randomize import randomize_
from googlenet_fused.weights import WeightsError, load_weights, npz, read_state_dict
from googlenet_fused.weights.slim import from_slim

VARIABLES = random_variables(classes=3)
LOGITS = "InceptionV1/Logits/Conv2d_0c_1x1"


def savez(path: Path, variables: Variables) -> Path:
    numpy.savez(path, **variables)
    return path


def npy(value: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    numpy.save(stream, value, **options)
    return stream.getvalue()


def expected_state(variables: Variables = VARIABLES) -> dict[str, Tensor]:
    """Under torchvision's keys, in the order of the network's state_dict, which is that of slim's layers."""
    with torch.device("meta"):
        network = googlenet("slim", num_classes=3, aux_logits=False)
    blocks = [name for name, module in network.named_modules() if hasattr(module, "bn")]
    state = {}
    for block, (scope, *_) in zip(blocks, layers(), strict=True):
        state[f"{block}.conv.weight"] = variables[f"{scope}/weights"].transpose(3, 2, 0, 1)
        norm = f"{scope}/BatchNorm"
        state[f"{block}.bn.weight"] = variables.get(f"{norm}/gamma", numpy.ones_like(variables[f"{norm}/beta"]))
        state[f"{block}.bn.bias"] = variables[f"{norm}/beta"]
        state[f"{block}.bn.running_mean"] = variables[f"{norm}/moving_mean"]
        state[f"{block}.bn.running_var"] = variables[f"{norm}/moving_variance"]
    state["fc.weight"] = variables[f"{LOGITS}/weights"][0, 0].T
    state["fc.bias"] = variables[f"{LOGITS}/biases"]
    return {key: torch.from_numpy(value.copy()) for key, value in state.items()}


def test_every_variable_is_found(tmp_path: Path) -> None:
    actual = read_state_dict(savez(tmp_path / "w.npz", VARIABLES))
    assert_same(actual, expected_state())
    network = googlenet("slim", num_classes=3, aux_logits=False, init_weights=False)
    wanted = [key for key in network.state_dict() if not key.endswith("num_batches_tracked")]
    assert list(actual) == wanted
    assert all(value.is_contiguous() for value in actual.values())


def test_scales_are_read_where_there_are_any(tmp_path: Path) -> None:
    variables = random_variables(classes=3, gamma=True)
    del variables["InceptionV1/Mixed_4f/Branch_1/Conv2d_0b_3x3/BatchNorm/gamma"]
    actual = read_state_dict(savez(tmp_path / "w.npz", variables))
    assert_same(actual, expected_state(variables))
    assert (actual["inception4e.branch2.1.bn.weight"] == 1).all()
    assert (actual["inception4e.branch2.0.bn.weight"] != 1).any()


def as_tensors(variables: Variables) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in variables.items()}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_other_formats_with_slims_names(suffix: str, tmp_path: Path) -> None:
    path = save_tensors(as_tensors(VARIABLES), tmp_path / f"w{suffix}")
    assert_same(read_state_dict(path), expected_state())


@pytest.mark.parametrize("compressed", [False, True])
def test_numpys_own_files(compressed: bool, tmp_path: Path) -> None:
    path = tmp_path / "w.NPZ"
    with open(path, "wb") as file:
        (numpy.savez_compressed if compressed else numpy.savez)(file, **VARIABLES)
    assert_same(read_state_dict(path), expected_state())


def test_names_of_tensors_and_of_operations(tmp_path: Path) -> None:
    for rename in (lambda name: f"{name}:0", lambda name: f"InceptionV1/{name}:0"):
        path = savez(tmp_path / "w.npz", {rename(name): value for name, value in VARIABLES.items()})
        assert_same(read_state_dict(path), expected_state())


def test_what_training_keeps_is_left_out(tmp_path: Path) -> None:
    rest: Variables = {"global_step": numpy.array(7), "beta1_power:0": numpy.float32(0.5), "beta2_power": numpy.float32(0.5)}
    for name, value in VARIABLES.items():
        for slot in ("RMSProp", "RMSProp_1", "Momentum", "Adam", "Adam_1:0", "ExponentialMovingAverage"):
            rest[f"{name}/{slot}"] = value + 1
        break
    assert_same(read_state_dict(savez(tmp_path / "w.npz", VARIABLES | rest)), expected_state())


def test_a_parameter_under_both_names(tmp_path: Path) -> None:
    path = savez(tmp_path / "w.npz", VARIABLES | {"fc.bias": numpy.zeros(3, numpy.float32)})
    with pytest.raises(WeightsError, match=r"holds fc\.bias under TF-slim's name and under this one; keep one of them"):
        read_state_dict(path)


def test_a_npz_of_our_own_keys(tmp_path: Path) -> None:
    state = tiny_state()
    path = savez(tmp_path / "w.npz", {name: value.numpy() for name, value in state.items()})
    assert_same(read_state_dict(path), state)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f2", ">i8", "u1", "?", "<c8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_dtypes_and_orders(dtype: str, order: str, tmp_path: Path) -> None:
    value = numpy.asarray(numpy.arange(24).reshape(2, 3, 4) % 5, dtype=dtype, order=order)  # type: ignore[call-overload]
    actual = read_state_dict(savez(tmp_path / "w.npz", {"a": value, "scalar": value[0, 0, 0], "none": value[:0]}))
    assert actual["a"].tolist() == value.tolist()
    assert actual["a"].dtype == torch.from_numpy(value.astype(value.dtype.newbyteorder("="))).dtype
    assert actual["scalar"].shape == ()
    assert actual["none"].shape == (0, 3, 4)


# Into the network.


def test_the_factory_loads_them(tmp_path: Path) -> None:
    model = googlenet("slim", weights=str(savez(tmp_path / "w.npz", VARIABLES)), num_classes=3)
    state = model.state_dict()
    assert_same({key: value for key, value in state.items() if "num_batches" not in key}, expected_state())
    assert model.transform_input is False
    assert model.aux1 is None


def refusal(load: Callable[[], object]) -> str:
    with pytest.raises(WeightsError) as error:
        load()
    return message_of(error)


def test_classes_have_to_fit(tmp_path: Path) -> None:
    path = savez(tmp_path / "w.npz", VARIABLES)
    message = refusal(lambda: googlenet("slim", weights=path))
    assert "fc.weight has shape [3, 1024] in the file and [1000, 1024] in the model" in message
    assert "build the model with num_classes=3" in message
    assert "variant" not in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop(f"{LOGITS}/biases"), "fc.bias is missing in the file"),
        (
            lambda v: v.pop("InceptionV1/Mixed_5b/Branch_2/Conv2d_0a_3x3/weights"),
            "inception5a.branch3.1.conv.weight is missing in the file",
        ),
        (
            lambda v: v.update({"InceptionV1/Conv2d_1a_7x7/biases": v[f"{LOGITS}/biases"]}),
            "InceptionV1/Conv2d_1a_7x7/biases is in the file and not in the model",
        ),
        (
            lambda v: v.update({"InceptionV1/Conv2d_2b_1x1/weights": numpy.zeros((64, 64), numpy.float32)}),
            "the variable InceptionV1/Conv2d_2b_1x1/weights has shape [64, 64], not [h, w, in, out]",
        ),
        (
            lambda v: v.update({f"{LOGITS}/weights": numpy.zeros((2, 1, 512, 3), numpy.float32)}),
            f"the variable {LOGITS}/weights has shape [2, 1, 512, 3], not [1, 1, in, out]",
        ),
        (
            lambda v: v.update({f"{LOGITS}/biases:0": v[f"{LOGITS}/biases"]}),
            f"holds the variable {LOGITS}/biases twice; keep one of them",
        ),
        (
            lambda v: v.update({f"{LOGITS}/biases": numpy.zeros(3, numpy.int64)}),
            "fc.bias has dtype torch.int64 in the file and torch.float32 in the model",
        ),
        (
            lambda v: v.update({f"{LOGITS}/biases": numpy.full(3, numpy.nan, numpy.float32)}),
            "fc.bias holds 3 NaN or infinite values",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(
    change: Callable[[Variables], object], message: str, tmp_path: Path
) -> None:
    variables = dict(VARIABLES)
    change(variables)
    model = googlenet("slim", num_classes=3, aux_logits=False, init_weights=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = savez(tmp_path / "w.npz", variables)
    found = refusal(lambda: load_weights(model, path))
    assert message in found
    assert str(path) in found
    assert_same(model.state_dict(), before)


def test_the_published_weights_are_not_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from googlenet_fused.weights import load

    message = refusal(lambda: googlenet("slim", weights="DEFAULT"))
    assert message.startswith("no weights are published for the 'slim' variant")
    model = googlenet("slim", num_classes=3, aux_logits=False, init_weights=False)
    path = save_tensors(
        randomize_(googlenet(num_classes=3, aux_logits=False, init_weights=False)).state_dict(), tmp_path / "w.pth"
    )
    monkeypatch.setattr(load, "published_as", lambda path: load.GoogLeNet_Weights.DEFAULT)
    message = refusal(lambda: load_weights(model, path))
    assert "is for the 'torchvision' variant, and the model is the 'slim' variant" in message
    assert model.transform_input is False


def test_the_variant_is_named_when_another_ones_file_is_given(tmp_path: Path) -> None:
    model = googlenet("slim", num_classes=3, aux_logits=False, init_weights=False)
    state = googlenet("bvlc", num_classes=3, aux_logits=False, init_weights=False).state_dict()
    message = refusal(lambda: load_weights(model, save_tensors(state, tmp_path / "w.pth")))
    assert "the model is the 'slim' variant" in message


# Files that are damaged or hostile.


def header(shape: str, dtype: str = "<f4", version: bytes = b"\x01\x00") -> bytes:
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY" + version + struct.pack("<H" if version[0] == 1 else "<I", len(text)) + text


def archive(path: Path, members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members:
            file.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header("(1000000000000,)") + bytes(8), "'a' has 8 bytes where its header announces 4000000000000"),
        (header("(4294967296, 4294967296)"), "'a' has 0 bytes where its header announces"),
        (header("(2,)") + bytes(12), "'a' has 12 bytes where its header announces 8"),
        (header("(-2,)") + bytes(8), "'a' has a shape that cannot be"),
        (header("(-2, -1)") + bytes(8), "'a' has a shape that cannot be"),
        (header("(0, 1180591620717411303424)"), "."),
        (header("(2,)", version=b"\x03\x00") + bytes(8), "'a' is in version 3.0 of the format"),
        (header("(2,)", version=b"\x09\x00") + bytes(8), "'a' is in version 9.0 of the format"),
        (npy(numpy.array([object()]), allow_pickle=True), "'a' is of type object, not numbers"),
        (npy(numpy.array(["text"])), "'a' is of type <U4, not numbers"),
        (npy(numpy.zeros(2, "f4,i4")), "not numbers"),
        (npy(numpy.zeros(2, numpy.longdouble)), "longdouble|float128|can't convert"),
        (b"", "'a'|EOF"),
        (b"\x93NUMPY", "EOF"),
        (b"no array", "magic string"),
        (header("(" * 3000), "."),
        (header("__import__('os').system('true')"), "."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_members_that_are_no_arrays(content: bytes, message: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "w.npz", [("a.npy", content)])
    with pytest.raises(WeightsError, match=message) as error:
        read_state_dict(path)
    assert message_of(error).startswith(f"{path} is truncated, damaged or not a .npz file of arrays: ")


def test_more_than_weights_may_have_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path / "w.npz", [(f"{name}.npy", npy(numpy.zeros(3000, numpy.float32))) for name in "abc"])
    assert path.stat().st_size < 3000
    monkeypatch.setattr(npz, "LIMIT", 3 * 12_128)
    assert len(read_state_dict(path)) == 3
    monkeypatch.setattr(npz, "LIMIT", 3 * 12_128 - 1)
    monkeypatch.setattr(npz, "_read_array", None)
    with pytest.raises(WeightsError, match=r"it unpacks to 36,384 bytes, and weights may have 36,383"):
        read_state_dict(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("suffix", [".npz", ".pth"])
def test_what_zipfile_unpacks_without_a_bound_is_not_unpacked(
    suffix: str, compression: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = archive(tmp_path / f"w{suffix}", [("a.npy", npy(numpy.zeros(1)))], compression)
    monkeypatch.setattr(zipfile.ZipFile, "open", None)
    with pytest.raises(WeightsError, match=r"is compressed in a way that (numpy|torch.save) does not use"):
        read_state_dict(path)


def test_two_members_of_one_name(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = archive(tmp_path / "w.npz", [("a.npy", npy(numpy.zeros(1)))] * 2)
    with pytest.raises(WeightsError, match="it holds 'a' twice"):
        read_state_dict(path)


def test_any_damage_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "w.npz"
    state = {"a": numpy.arange(4, dtype=numpy.float32), "b": numpy.arange(3)}
    whole = savez(path, state).read_bytes()
    expected = read_state_dict(path)
    refused = 0
    damaged = [whole[:length] for length in range(1, len(whole), 7)]
    damaged += [whole[:i] + bytes([whole[i] ^ 0x55]) + whole[i + 1 :] for i in range(0, len(whole), 3)]
    for content in damaged:
        path.write_bytes(content)
        try:
            actual = read_state_dict(path)
        except WeightsError:
            refused += 1
        else:
            for name in actual.keys() & expected.keys():
                assert_same(actual[name], expected[name], name)
    assert refused > len(damaged) // 2


def test_without_numpy_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = savez(tmp_path / "w.npz", {"a": numpy.zeros(1)})
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(ImportError, match=r"reading w.npz needs the numpy package: pip install 'googlenet-fused\[tools\]'"):
        read_state_dict(path)


def test_an_empty_file_of_arrays(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="holds no tensors"):
        read_state_dict(archive(tmp_path / "w.npz", []))


def test_other_names_are_left_alone() -> None:
    state = nn.Linear(2, 2).state_dict()
    assert_same(from_slim(Path("x"), state), state)

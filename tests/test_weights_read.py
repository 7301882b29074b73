"""Reading weights from files: every format comes back as saved, and every other file is refused with the reason."""

from __future__ import annotations

import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_same, message_of, save_tensors, tiny_state
from torch import Tensor, nn

from googlenet_fused.weights import WeightsError, read_state_dict
from googlenet_fused.weights.files import SUFFIXES


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.PTH", "w.safetensors"])
def test_read_gives_back_what_was_saved(name: str, tmp_path: Path) -> None:
    expected = tiny_state()
    actual = read_state_dict(str(save_tensors(expected, tmp_path / name)))
    assert_same(actual, expected)
    assert all(type(value) is Tensor and not value.requires_grad for value in actual.values())


def test_read_takes_files_from_before_torch_1_6(tmp_path: Path) -> None:
    expected = tiny_state()
    path = save_tensors(expected, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    assert_same(read_state_dict(path), expected)


def test_read_takes_parameters_and_keeps_the_order(tmp_path: Path) -> None:
    expected = {"z": nn.Parameter(torch.ones(2)), "a": nn.Parameter(torch.zeros(3))}
    actual = read_state_dict(save_tensors(expected, tmp_path / "w.pth"))
    assert list(actual) == ["z", "a"]
    assert not actual["z"].requires_grad


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_read_opens_checkpoints(wrapper: str, prefix: str, tmp_path: Path) -> None:
    expected = tiny_state()
    checkpoint = {"epoch": 3, wrapper: {prefix + key: value for key, value in expected.items()}, "optimizer": {"lr": 0.1}}
    assert_same(read_state_dict(save_tensors(checkpoint, tmp_path / "w.pth")), expected)


def test_read_keeps_a_prefix_that_not_every_key_has(tmp_path: Path) -> None:
    expected = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert_same(read_state_dict(save_tensors(expected, tmp_path / "w.pth")), expected)


def test_read_does_not_follow_later_changes_of_the_file(tmp_path: Path) -> None:
    for name in ("w.safetensors", "w.pth"):
        path = save_tensors({"a": torch.ones(1000)}, tmp_path / name)
        tensors = read_state_dict(path)
        with open(path, "r+b") as file:
            file.write(bytes(path.stat().st_size))
        assert tensors["a"].sum() == 1000


def test_read_reports_a_missing_file_or_folder(tmp_path: Path) -> None:
    for path, reason in [(tmp_path / "no.pth", "no such file"), (tmp_path, "is a folder")]:
        with pytest.raises(WeightsError, match=reason) as error:
            read_state_dict(path)
        assert str(path) in message_of(error)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are a Unix thing")
def test_read_does_not_wait_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(WeightsError, match="not a regular file"):
        read_state_dict(tmp_path / "pipe.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".caffemodel"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"  <!DOCTYPE html><html><body>404</body></html>", "is a web page"),
        (b"<html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "Git LFS pointer"),
        (b"hello, world\n", "truncated, damaged or not a"),
        (b"\x00" * 64, "truncated, damaged or not a"),
        (b"\xff" * 64, "truncated, damaged or not a"),
        (b"PK\x03\x04" + b"\x00" * 60, "truncated, damaged or not a"),
    ],
)
def test_read_names_what_the_file_is(suffix: str, content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=reason) as error:
        read_state_dict(path)
    assert message_of(error).startswith(str(path))


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"import torch\n", ""),  # KeyError: 105
        (b"hello, world\n", ""),  # Unsupported operand 104
        (b"0123", ""),  # pop from an empty list
        (b"\x80\x02", ": it ends too early"),
        (b"PK\x03\x04" + b"\x00" * 60, ": PytorchStreamReader failed reading zip archive: failed finding central directory"),
    ],
)
def test_read_gives_the_cause_where_it_says_something(content: bytes, cause: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError) as error:
        read_state_dict(path)
    expected = f"{path} is truncated, damaged or not a file that torch.save wrote{cause}; copy or download it again"
    assert message_of(error) == expected


def test_read_refuses_other_suffixes(tmp_path: Path) -> None:
    for name in ("w.onnx", "w.caffemodel.h5", "w"):
        (tmp_path / name).write_bytes(b"data")
        with pytest.raises(WeightsError) as error:
            read_state_dict(tmp_path / name)
        text = message_of(error)
        assert f"unsupported suffix {Path(name).suffix!r}; weights are read from .pth, .pt, " in text
        assert all(suffix in text for suffix in SUFFIXES)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (torch.ones(3), "holds a Tensor, not a state_dict"),
        ([torch.ones(3)], "holds a list, not a state_dict"),
        ({}, "holds no tensors"),
        ({"state_dict": {}}, "holds no tensors"),
        ({"epoch": 3, "weights": {"a": torch.ones(1)}}, "entry 'epoch' is a int"),
        ({"a": torch.ones(1), "b": [1.0]}, "entry 'b' is a list"),
        ({1: torch.ones(1)}, "entry 1 is a Tensor"),
        ({"a": torch.eye(3).to_sparse()}, "tensor a is torch.sparse_coo"),
        ({"a": torch.empty(3, device="meta")}, "tensor a is without data"),
    ],
)
def test_read_refuses_what_is_not_tensors_by_name(content: object, reason: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=reason) as error:
        read_state_dict(save_tensors(content, tmp_path / "w.pth"))
    message_of(error)


def test_read_refuses_whole_models(tmp_path: Path) -> None:
    for new_format in (True, False):
        path = save_tensors(nn.Sequential(nn.Linear(2, 2)), tmp_path / "w.pth", _use_new_zipfile_serialization=new_format)
        with pytest.raises(WeightsError, match=r"torch\.nn\.\S+\.Sequential.*Save model\.state_dict\(\)") as error:
            read_state_dict(path)
        assert "weights_only" not in message_of(error)


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "pickle protocol 2"])
def test_read_runs_no_code_from_the_file(kind: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "was here", tmp_path / "w.pth"
    content = {"a": torch.ones(1), "b": Malicious(marker)}
    if kind.startswith("pickle"):
        path.write_bytes(pickle.dumps(Malicious(marker), protocol=2 if "2" in kind else None))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(WeightsError) as error:
        read_state_dict(path)
    message_of(error)
    assert not marker.exists()

    if not kind.startswith("pickle"):
        torch.load(path, weights_only=False)
        assert marker.exists(), "the file does nothing, so the test proves nothing"


@pytest.mark.parametrize("kind", ["w.pth", "legacy.pth", "w.safetensors"])
def test_read_reports_every_truncation(kind: str, tmp_path: Path) -> None:
    options = {"_use_new_zipfile_serialization": False} if kind == "legacy.pth" else {}
    path = save_tensors(tiny_state(), tmp_path / kind, **options)
    whole = path.read_bytes()
    for length in {1, 2, 5, 9, *range(16, len(whole), len(whole) // 40), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError) as error:
            read_state_dict(path)
        assert message_of(error).startswith(str(path))


def test_read_finds_a_flipped_bit_that_torch_load_takes(tmp_path: Path) -> None:
    tensors = tiny_state()
    path = save_tensors(tensors, tmp_path / "w.pth")
    content = bytearray(path.read_bytes())
    content[content.index(tensors["fc.weight"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["fc.weight"], tensors["fc.weight"])
    with pytest.raises(WeightsError, match=r"is damaged: Bad CRC-32 for file 'w/data/\d+'"):
        read_state_dict(path)


def test_read_takes_files_saved_without_checksums(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = save_tensors(tiny_state(), tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert len(read_state_dict(path)) == len(tiny_state())


def test_missing_safetensors_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_tensors(tiny_state(), tmp_path / "w.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'googlenet-fused\[tools\]'"):
        read_state_dict(path)

"""What a file of weights says of itself: written and read back, silent in other files, refused when it is damaged."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_same, message_of, save_tensors, tiny_state

from googlenet_fused.weights import Description, WeightsError, read_description, read_state_dict, save_described

FULL = Description("bvlc", 2, ("Katze", "犬"), False, 73, 64, "a test")


def test_a_description_comes_back_with_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    tensors = tiny_state()
    save_described(path, tensors, FULL)
    assert read_description(path) == FULL
    assert_same(read_state_dict(path), tensors)
    save_described(path, {"a": torch.ones(4, 6)[:, ::2]}, Description("torchvision", 1000))
    assert read_description(path) == Description("torchvision", 1000)
    assert os.listdir(tmp_path) == ["w.safetensors"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.touch()
    path.chmod(0o600)
    save_described(path, tiny_state(), FULL)
    assert read_description(path) == FULL
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_other_files_say_nothing(tmp_path: Path) -> None:
    assert read_description(save_tensors(tiny_state(), tmp_path / "w.pth")) is None
    assert read_description(save_tensors(tiny_state(), tmp_path / "w.safetensors")) is None


def test_a_field_of_later_versions_is_passed_over(tmp_path: Path) -> None:
    path = _with_metadata(tmp_path, json.dumps({"variant": "bvlc", "num_classes": 3, "colour": "red"}))
    assert read_description(path) == Description("bvlc", 3)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "null", "{}", '{"variant": 1, "num_classes": 3}', '{"variant": "bvlc", "num_classes": 3, "classes": ["a"]}'],
)
def test_a_damaged_description_is_refused(text: str, tmp_path: Path) -> None:
    path = _with_metadata(tmp_path, text)
    with pytest.raises(WeightsError) as error:
        read_description(path)
    assert str(path) in message_of(error)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x05", b"\xff" * 8, (10**6).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]", b"\x08" + bytes(15)],
)
def test_a_damaged_header_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError) as error:
        read_description(path)
    assert str(path) in message_of(error)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"num_classes": 0}, "num_classes"),
        ({"num_classes": True}, "num_classes"),
        ({"crop": 22.4}, "crop"),
        ({"resize": -1}, "resize"),
        ({"resize": 4097}, "resize must be at most 4096"),
        ({"crop": 10**12}, "crop must be at most 4096"),
        ({"transform_input": 1}, "transform_input"),
        ({"variant": None}, "variant"),
        ({"classes": ("a", "b")}, "classes"),
        ({"classes": (1, 2, 3)}, "classes"),
    ],
)
def test_fields_are_checked(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        Description(**{"variant": "bvlc", "num_classes": 3, **fields})


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    tensors = tiny_state()
    save_described(path, tensors, FULL)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WeightsError) as error:
        save_described(path, {"a": torch.zeros(1)}, FULL)
    message = message_of(error)
    assert str(path) in message
    assert "No space left" in message
    assert_same(read_state_dict(path), tensors)
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_only_safetensors_files_are_described(tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as error:
        save_described(tmp_path / "w.pth", tiny_state(), FULL)
    assert ".safetensors" in message_of(error)


def _with_metadata(folder: Path, text: str) -> Path:
    return save_tensors(tiny_state(), folder / "w.safetensors", metadata={"googlenet_fused": text})

"""Reading ``.caffemodel`` files: what Caffe's two formats hold comes back, all else is refused with place and reason."""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from caffe_net import Blobs, Values, Version, blob, caffemodel, layer, message, number, varint
from cases import message_of

from googlenet_fused.weights import WeightsError, caffe
from googlenet_fused.weights.caffe import read_caffemodel
from googlenet_fused.weights.wire import Reader, WireError

VALUES = np.arange(1, 7, dtype=np.float32).reshape(2, 3) / 7


def written(folder: Path, content: bytes) -> Path:
    path = folder / "x.caffemodel"
    path.write_bytes(content)
    return path


def refusal(folder: Path, content: bytes) -> str:
    path = written(folder, content)
    with pytest.raises(WeightsError) as error:
        read_caffemodel(path)
    text = message_of(error)
    assert text.startswith(str(path))
    return text.removeprefix(str(path))


def one_blob(folder: Path, content: bytes) -> torch.Tensor:
    [(name, [tensor])] = read_caffemodel(written(folder, layer("a", [content]))).items()
    assert name == "a"
    return tensor


@pytest.mark.parametrize("version", get_args(Version))
@pytest.mark.parametrize("kind", get_args(Values))
def test_read_gives_back_what_was_saved(version: Version, kind: Values, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    shapes = {"conv1/7x7_s2": [(4, 3, 7, 7), (4,)], "loss3/classifier": [(5, 64), (5,)], "one": [(1,), (300,)]}
    blobs: Blobs = {name: [generator.standard_normal(shape, np.float32) for shape in both] for name, both in shapes.items()}
    read = read_caffemodel(str(written(tmp_path, caffemodel(blobs, version, kind))))
    assert list(read) == list(blobs)
    for name, arrays in blobs.items():
        for tensor, array in zip(read[name], arrays, strict=True):
            leading = (1,) * (4 - array.ndim) if version == "V1" else ()
            assert tensor.shape == leading + array.shape
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor.reshape(array.shape), torch.from_numpy(array))


def test_read_tensors_can_be_written_to_and_do_not_follow_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, caffemodel({"a": [VALUES, VALUES]}))
    first, second = read_caffemodel(path)["a"]
    first.zero_()
    path.write_bytes(b"")
    assert torch.equal(second, torch.from_numpy(VALUES))


@pytest.mark.parametrize("kind", get_args(Values))
@pytest.mark.parametrize("count", [1, 2, 64, 65, 66, 193, 194, 1000])
def test_values_come_in_pieces(kind: Values, count: int, tmp_path: Path) -> None:
    values = np.random.default_rng(1).standard_normal(2 * count, np.float32)
    pieces = [blob(values[:count], kind=kind), blob(values[count:], kind=kind)]
    dims = len(message(7, message(1, varint(count))))
    content = message(7, message(1, varint(2 * count))) + pieces[0][dims:] + number(99, 5) + pieces[1][dims:]
    assert torch.equal(one_blob(tmp_path, content), torch.from_numpy(values))


def test_packed_and_single_values_join_in_their_order(tmp_path: Path) -> None:
    single = [varint(5 << 3 | 5) + value.tobytes() for value in VALUES.ravel()[:2]]
    content = message(7, message(1, varint(6))) + b"".join(single) + message(5, VALUES.tobytes()[8:])
    assert torch.equal(one_blob(tmp_path, content), torch.from_numpy(VALUES.ravel()))


def test_a_tag_may_be_longer_than_it_must(tmp_path: Path) -> None:
    tag = bytes([0x80 | 5 << 3 | 5, 0x80, 0])
    content = message(7, message(1, varint(6))) + b"".join(tag + value.tobytes() for value in VALUES.ravel())
    assert torch.equal(one_blob(tmp_path, content), torch.from_numpy(VALUES.ravel()))


@pytest.mark.parametrize(
    ("dims", "shape"),
    [
        (message(7, number(1, 2) + number(1, 3)), (2, 3)),  # not packed
        (message(7, message(1, b"\x02")) + message(7, message(1, b"\x03")), (2, 3)),  # parts of one message join
        (message(7, number(2, 9) + message(1, b"\x06")), (6,)),  # a field that there is not
        (message(7, message(1, b"\x06")) + b"".join(number(f, d) for f, d in ((1, 1), (2, 1), (3, 2), (4, 3))), (1, 1, 2, 3)),
        (b"".join(number(f, d) for f, d in ((1, 7), (4, 3), (2, 1), (3, 2), (1, 1))), (1, 1, 2, 3)),  # the last one counts
        (message(7, message(1, b"\x01" * 31 + b"\x06")), (*(1,) * 31, 6)),  # as many as there may be
    ],
)
def test_shapes(dims: bytes, shape: tuple[int, ...], tmp_path: Path) -> None:
    for content in (dims + message(5, VALUES.tobytes()), message(5, VALUES.tobytes()) + dims):
        assert torch.equal(one_blob(tmp_path, content), torch.from_numpy(VALUES.reshape(shape)))


def test_a_blob_without_dimensions_is_one_value(tmp_path: Path) -> None:
    assert one_blob(tmp_path, message(5, VALUES.tobytes()[:4])).shape == ()
    assert one_blob(tmp_path, message(7, b"") + message(5, VALUES.tobytes()[:4])).shape == ()


def test_other_fields_are_passed_over(tmp_path: Path) -> None:
    """The net's own, the layer's parameters, gradients, and fields of every wire type that nobody knows."""
    strange = number(1000, 2**64 - 1) + message(2000, b"\xff" * 9) + varint(3000 << 3 | 1) + b"\xff" * 8
    strange += varint((2**29 - 1) << 3 | 5) + b"\xff" * 4
    gradients = message(6, VALUES.tobytes()) + message(9, b"odd")
    inner = message(1, b"a") + strange + message(7, strange + blob(VALUES) + gradients + strange) + strange
    content = strange + message(1, b"\xff") + message(100, inner) + layer("no weights", []) + strange
    read = read_caffemodel(written(tmp_path, content))
    assert list(read) == ["a"]
    assert torch.equal(read["a"][0], torch.from_numpy(VALUES))


def test_the_name_may_come_last_and_twice(tmp_path: Path) -> None:
    content = message(100, message(7, blob(VALUES)) + message(1, b"b") + message(1, "ä/犬".encode()))
    assert list(read_caffemodel(written(tmp_path, content))) == ["ä/犬"]


def test_layers_of_both_versions_may_share_names_if_one_has_no_blobs(tmp_path: Path) -> None:
    content = layer("data", []) + layer("data", []) + layer("a", [blob(VALUES, "V1")], version="V1") + layer("a", [])
    assert list(read_caffemodel(written(tmp_path, content))) == ["a"]


SOME = blob(VALUES)
GROUP = number(3, 0)[:0] + bytes([3 << 3 | 3]) + bytes([3 << 3 | 4])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x00", "at byte 0: there is no field 0"),
        (varint(2**29 << 3), f"at byte 0: there is no field {2**29}"),
        (b"\xff" * 9, "at byte 0: a number passes the end of its message"),
        (b"\xff" * 10, "at byte 0: a number is longer than 64 bits"),
        (b"\x08" + b"\xff" * 9 + b"\x02", "at byte 1: a number is longer than 64 bits"),
        (b"\x08" + b"\x80" * 10 + b"\x00", "at byte 1: a number is longer than 64 bits"),
        (b"\x09\x00", "at byte 0: field 1 has 8 bytes, and its message only 1 more"),
        (b"\x0a\x05abcd", "at byte 0: field 1 has 5 bytes, and its message only 4 more"),
        (b"\x0a" + varint(2**63), f"at byte 0: field 1 has {2**63} bytes, and its message only 0 more"),
        (b"\x0b", "at byte 0: field 1 has wire type 3, a group"),
        (b"\x0c", "at byte 0: field 1 has wire type 4, a group"),
        (b"\x0e", "at byte 0: field 1 has wire type 6, which there is not"),
        (b"\x0f", "at byte 0: field 1 has wire type 7, which there is not"),
        (number(2, 1), "at byte 0: field 2 has wire type 0, where 2 is due"),
        (varint(100 << 3 | 5) + b"abcd", "at byte 0: field 100 has wire type 5, where 2 is due"),
        (message(100, number(1, 1)), "at byte 3, in layer '': field 1 has wire type 0, where 2 is due"),
        (message(100, message(1, b"a\xff")), "at byte 6, in layer '': its name is not UTF-8"),
        (message(100, message(1, b"a" * 1001)), "at byte 4, in layer '': its name is longer than 1000 bytes"),
        (message(2, message(4, b"a") + number(6, 1)), "at byte 5, in layer 'a': field 6 has wire type 0, where 2 is due"),
        (message(2, message(4, b"a") + GROUP), "at byte 5, in layer 'a': field 3 has wire type 3, a group"),
        (message(2, message(4, b"a\nb" * 99) + GROUP), f"in layer {('a' + chr(10) + 'b') * 20 + '...'!r}: field 3"),
        (layer("a", [SOME]) + layer("a", [SOME]), "in layer 'a': an earlier layer of the same name has blobs, too"),
    ],
)
def test_read_says_what_is_wrong_where(content: bytes, reason: str, tmp_path: Path) -> None:
    text = refusal(tmp_path, content)
    assert text.startswith(" is truncated, damaged or not a .caffemodel file: at byte ")
    assert text.endswith("; copy or download it again")
    assert reason in text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (message(5, VALUES.tobytes()), "its shape is [], and it holds 6 values"),
        (message(7, message(1, b"\x06")), "its shape is [6], and it holds 0 values"),
        (message(7, message(1, b"\x02")) + message(5, VALUES.tobytes()[:4]), "its shape is [2], and it holds 1 value;"),
        (number(1, 6) + message(5, VALUES.tobytes()), "its shape is [6, 0, 0, 0], and it holds 6 values"),
        (message(7, message(1, b"\x00")), "its shape is [0], and it holds 0 values"),
        (message(7, message(1, varint(-2) + varint(-3))) + message(5, VALUES.tobytes()), "its shape is [-2, -3]"),
        (message(7, message(1, varint(2**62) * 5)), f"its shape is {[2**62] * 5}, and it holds 0 values"),
        (message(7, message(1, b"\x01" * 33)), "its shape has more than 32 dimensions"),
        (message(7, message(1, b"\x01" * 32) + number(1, 1)), "its shape has more than 32 dimensions"),
        (message(7, b"".join([number(1, 1)] * 33)), "its shape has more than 32 dimensions"),
        (message(7, message(1, b"\x86")), "a number passes the end of its message"),
        (message(7, varint(1 << 3 | 5) + b"abcd"), "field 1 has wire type 5, where 2 is due"),
        (number(7, 6), "field 7 has wire type 0, where 2 is due"),
        (message(1, b"\x06"), "field 1 has wire type 2, where 0 is due"),
        (number(5, 6), "field 5 has wire type 0, where 5 is due"),
        (varint(5 << 3 | 1) + b"abcdefgh", "field 5 has wire type 1, where 5 is due"),
        (varint(8 << 3 | 5) + b"abcd", "field 8 has wire type 5, where 1 is due"),
        (message(5, b"abcdef"), "6 bytes are no whole number of values of 4 bytes"),
        (message(8, b"abcdefghabcd"), "12 bytes are no whole number of values of 8 bytes"),
        (blob(VALUES) + message(8, VALUES.astype("<f8").tobytes()), "it has values in single and in double precision"),
    ],
)
def test_read_says_what_is_wrong_with_a_blob(content: bytes, reason: str, tmp_path: Path) -> None:
    for version in get_args(Version):
        text = refusal(tmp_path, layer("a", [blob(VALUES), content], version=version))
        assert ", in layer 'a', blob 1: " in text
        assert reason in text


@pytest.mark.parametrize("content", [message(1, b"GoogLeNet"), layer("a", []) * 3, number(77, 1)])
def test_a_file_without_weights_is_refused(content: bytes, tmp_path: Path) -> None:
    assert refusal(tmp_path, content).startswith(" holds no layers with weights")


@pytest.mark.parametrize(
    ("limit", "value", "content", "reason"),
    [
        ("MAX_LAYERS", 3, layer("a", []) * 3 + layer("a", []), "more than 3 layers"),
        ("MAX_BLOBS", 3, layer("a", [SOME] * 4), "in layer 'a': it has more than 3 blobs"),
        ("MAX_BLOBS", 3, layer("a", [SOME] * 2) + layer("b", [SOME] * 2), "in layer 'b': it has more than 3 blobs"),
        ("MAX_FIELDS", 50, number(1, 1) * 51, "at byte 100: it has more than 50 fields"),
        ("MAX_FIELDS", 50, message(100, number(9, 1) * 51), "in layer '': it has more than 50 fields"),
        ("MAX_FIELDS", 50, layer("a", [number(9, 1) * 51]), "in layer 'a', blob 0: it has more than 50 fields"),
    ],
)
def test_limits(limit: str, value: int, content: bytes, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caffe, limit, value)
    assert reason in refusal(tmp_path, content)


def test_a_run_of_single_values_is_one_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caffe, "MAX_FIELDS", 20)
    values = np.arange(1000, dtype=np.float32)
    assert torch.equal(one_blob(tmp_path, blob(values, kind="unpacked")), torch.from_numpy(values))


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.caffemodel"
    with open(path, "wb") as file:
        file.truncate(caffe.MAX_BYTES + 1)
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError, match=f"x.caffemodel has {caffe.MAX_BYTES + 1} bytes; .* may have {caffe.MAX_BYTES}$"):
            read_caffemodel(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.caffemodel")
    for path, reason in (
        (tmp_path / "none.caffemodel", "cannot be read: No such file"),
        (tmp_path, "is not a regular file"),
        (tmp_path / "pipe.caffemodel", "is not a regular file"),
    ):
        with pytest.raises(WeightsError, match=reason) as error:
            read_caffemodel(path)
        assert message_of(error).startswith(str(path))


COSTLY: dict[str, Callable[[int], bytes]] = {
    "fields": lambda count: layer("a", [number(1000, 1) * count]),
    "single values apart": lambda count: layer("a", [(b"\x2dabcd" + number(9, 1)) * count]),
    "packed values apart": lambda count: layer("a", [b"\x2a\x04abcd" * count]),
    "long numbers": lambda count: layer("a", [number(1, 2**64 - 1) * count]),
    "long shapes": lambda count: layer("a", [(message(7, message(1, b"\x81\x80\x00" * 32)) + b"\x2a\x04abcd") * count]),
    "dimensions": lambda count: layer("a", [message(7, message(1, varint(300) * 40 * count))]),
    "layers": lambda count: b"".join(layer(str(index), [message(5, b"abcd")]) for index in range(count)),
    "layers without blobs": lambda count: layer("a", []) * count,
    "blobs": lambda count: layer("a", [message(5, b"abcd")] * count),
}
"""Files of so many of the smallest parts that there are."""


@pytest.mark.parametrize("kind", COSTLY)
def test_what_costs_most_takes_seconds_at_most(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path, COSTLY[kind](250_000))
    begin = time.process_time()
    with pytest.raises(WeightsError, match="has more than"):
        read_caffemodel(path)
    assert time.process_time() - begin < 5


@pytest.mark.parametrize("kind", COSTLY)
def test_what_costs_most_takes_little_memory(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caffe, "MAX_FIELDS", 20_000)
    path = written(tmp_path, COSTLY[kind](25_000))
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError):
            read_caffemodel(path)
        assert tracemalloc.get_traced_memory()[1] < 3 * path.stat().st_size + 5 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", get_args(Values))
def test_a_sound_file_takes_little_memory(kind: Values, tmp_path: Path) -> None:
    path = written(tmp_path, layer("a", [blob(np.ones(500_000, np.float32), kind=kind)]))
    tracemalloc.start()
    try:
        read_caffemodel(path)
        assert tracemalloc.get_traced_memory()[1] < 3 * path.stat().st_size + 2**16
    finally:
        tracemalloc.stop()


def test_numbers_end_with_their_message() -> None:
    reader = Reader(b"\x80\x80\x01\xff", 10)
    assert reader.varint(0, 3) == (1 << 14, 3)
    assert reader.varint(1, 4) == (1 << 7, 3)
    for at, end in ((0, 2), (0, 0), (3, 4), (4, 4)):
        with pytest.raises(WireError, match="passes the end") as error:
            reader.varint(at, end)
        assert error.value.at == at
    assert Reader(varint(2**64 - 1), 1).varint(0, 10) == (2**64 - 1, 10)


@pytest.mark.parametrize(
    ("content", "end"),
    [
        (b"\x2dabcd\x2dabcd\x2dabcd", 15),
        (b"\x2dabcd\x2dabcd\x2dabc", 10),  # the last one is cut off
        (b"\x2dabcd\x2dabcd\x2d", 10),
        (b"\x2dabcd\x2dabcd\x2eabcd\x2dabcd", 10),
        (b"\x2dabcd", 5),
        (b"\xad\x80\x00abcd\xad\x01abcdxy", 7),  # another field, whose tag begins as this one's
    ],
)
def test_where_a_run_of_single_values_ends(content: bytes, end: int) -> None:
    reader = Reader(content + b"\x2dabcd" * 3, 10)
    assert reader.run_end(reader.read(0, len(content)), len(content)) == end


def test_a_value_that_is_cut_off_is_not_completed_by_what_follows_the_blob(tmp_path: Path) -> None:
    content = message(7, blob(VALUES, kind="unpacked")[:-2]) + number(2**14, 1)
    assert "field 5 has 4 bytes, and its message only 2 more" in refusal(tmp_path, message(100, message(1, b"a") + content))

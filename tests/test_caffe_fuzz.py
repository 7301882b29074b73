"""Files that are nearly right: whatever is changed, what comes out is what Google's protobuf reads, or a WeightsError."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from caffe_net import blob, layer, message, number, varint

from googlenet_fused.weights import WeightsError
from googlenet_fused.weights.caffe import parse_caffemodel
from googlenet_fused.weights.caffe_names import state_dict_of

TARGET = Path(__file__).parent / "fuzz" / "caffemodel.py"
PATH = Path("x.caffemodel")

WEIGHT = np.arange(4, dtype=np.float32).reshape(2, 2) / 3
SEEDS = {
    "V1": layer("a", [blob(WEIGHT, "V1"), blob(WEIGHT[0], "V1")], version="V1"),
    "V2": layer("b", [blob(WEIGHT), blob(WEIGHT[0])]),
    "unpacked": layer("c", [blob(WEIGHT, kind="unpacked")]),
    "double": layer("d", [blob(WEIGHT[0], kind="double"), blob(WEIGHT[0], kind="unpacked double")]),
}

HOSTILE = (
    *(varint(2**bits - off) for bits in (7, 14, 31, 32, 63, 64) for off in (0, 1)),
    b"\xff" * 9,
    b"\xff" * 10,
    b"\x80" * 30,
    *(bytes([field << 3 | wire]) for field in (1, 2, 5, 6, 7, 8) for wire in range(8)),
    number(1, 2**64 - 1),
    message(7, message(1, varint(2**31) * 3)),
    message(7, message(7, message(7, message(7, b"")))),
    varint(2 << 3 | 2) + varint(2**40),
)


def parse(content: bytes) -> bool:
    """Whether the content is taken; then it must be all that protobuf finds in it."""
    try:
        found = parse_caffemodel(content, PATH)
    except WeightsError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert refusal.startswith(str(PATH))
        assert "\n" not in refusal
        return False
    assert 4 * sum(tensor.numel() for tensors in found.values() for tensor in tensors) <= len(content)
    if find_spec("google.protobuf") is not None:
        from caffe_proto import blobs_by_protobuf

        expected = blobs_by_protobuf(content)
        assert found.keys() == expected.keys()
        for name, tensors in found.items():
            for tensor, array in zip(tensors, expected[name], strict=True):
                np.testing.assert_array_equal(tensor.numpy(), array, strict=True)
    with pytest.raises(WeightsError, match="is not BVLC's GoogLeNet"):
        state_dict_of(found, PATH)
    return True


def test_the_seeds_are_sound() -> None:
    assert all(parse(content) for content in SEEDS.values())
    assert parse(b"".join(SEEDS.values()))


def test_protobuf_is_compared_with() -> None:
    pytest.importorskip("google.protobuf")
    from caffe_proto import blobs_by_protobuf

    [weight, _] = blobs_by_protobuf(SEEDS["V1"])["a"]
    np.testing.assert_array_equal(weight, WEIGHT.reshape(1, 1, 2, 2), strict=True)


def truncated(content: bytes) -> Iterator[bytes]:
    return (content[:end] for end in range(len(content)))


def with_every_byte_changed(content: bytes) -> Iterator[bytes]:
    for at in range(len(content)):
        for value in (0, 1, 2, 4, 8, 16, 32, 64, 0x7F, 0x80, 0x81, 0xFF, *(content[at] ^ 1 << bit for bit in range(8))):
            yield content[:at] + bytes([value]) + content[at + 1 :]


def with_hostile_parts(content: bytes) -> Iterator[bytes]:
    for at in range(len(content)):
        for part in HOSTILE:
            yield content[:at] + part + content[at:]
            yield content[:at] + part + content[at + len(part) :]


def shuffled(content: bytes, count: int = 3000) -> Iterator[bytes]:
    """A few spans at a time copied elsewhere, left out, doubled or drawn anew."""
    generator = random.Random(7)
    for _ in range(count):
        changed = content
        for _ in range(generator.randint(1, 4)):
            begin, end = sorted(generator.randint(0, len(changed)) for _ in range(2))
            end = min(end, begin + generator.choice((1, 2, 5, 40)))
            at = generator.randint(0, len(changed))
            kind = generator.randrange(4)
            if kind == 0:
                changed = changed[:at] + changed[begin:end] + changed[at:]
            elif kind == 1:
                changed = changed[:begin] + changed[end:]
            elif kind == 2:
                changed = changed[:end] + changed[begin:]
            else:
                changed = changed[:begin] + generator.randbytes(end - begin) + changed[end:]
        yield changed


@pytest.mark.parametrize("change", [truncated, with_every_byte_changed, with_hostile_parts, shuffled])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_changed_file_is_read_as_it_is_or_refused(change: object, seed: str) -> None:
    assert callable(change)
    taken = refused = 0
    for content in change(SEEDS[seed]):
        begin = time.perf_counter()
        if parse(content):
            taken += 1
        else:
            refused += 1
        assert time.perf_counter() - begin < 2, content.hex()
    assert refused
    assert taken or change is truncated


def test_a_changed_file_takes_little_memory() -> None:
    content = b"".join(SEEDS.values())
    changes = [*truncated(content), *shuffled(content, 300)]
    parse(content)
    tracemalloc.start()
    try:
        for changed in changes:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            parse(changed)
            assert tracemalloc.get_traced_memory()[1] - before < 2**18, changed.hex()
    finally:
        tracemalloc.stop()


@pytest.mark.extra
def test_coverage_guided_fuzzing_finds_nothing(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name, content in SEEDS.items():
        (corpus / name).write_bytes(content)
    # libFuzzer's limit on memory is of the most that its process ever had. A process that is forked begins with what this one
    # has, and keeps the figure when it becomes another program; what the shell then forks does not.
    command = [
        *("sh", "-c", '"$@"; exit $?', "sh"),
        sys.executable,
        str(TARGET),
        "-max_total_time=60",
        f"-artifact_prefix={tmp_path}/",
        "-print_final_stats=1",
        str(corpus),
    ]
    done = subprocess.run(command, cwd=TARGET.parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    executed = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    assert executed is not None
    assert int(executed[1]) > 10_000, "too few to say anything"
    assert len(list(corpus.iterdir())) > 50, "nothing new was reached: is the reader instrumented?"

"""Labelled images: folders and shards give the same samples, and what is wrong with one is said with its place."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import tarfile
import time
from pathlib import Path

import pytest
from cases import message_of

pytest.importorskip("PIL")
from PIL import Image

from googlenet_fused.data import DataError, FolderImages, LabelledImages, ShardImages, open_images
from googlenet_fused.images import ImageError

COLOURS = {"cat/b.png": (1, 2, 3), "cat/a.png": (4, 5, 6), "dog/deep/c.png": (7, 8, 9)}


def picture(colour: tuple[int, int, int]) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (5, 4), colour).save(content, "PNG")
    return content.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def shard(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            add(archive, name, content)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for name, colour in COLOURS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(colour))
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / ".hidden").mkdir()
    return root


def samples(images: LabelledImages) -> list[tuple[str, str, tuple[int, int, int]]]:
    """Name, class and colour of every image."""
    found = []
    for index in range(len(images)):
        image = images.load(index)
        assert (image.mode, image.size) == ("RGB", (5, 4))
        found.append((images.name(index), images.classes[images.label(index)], image.getpixel((0, 0))))
    return found


def test_a_folder_of_class_folders(folder: Path) -> None:
    images = open_images(str(folder))
    assert isinstance(images, FolderImages)
    assert images.classes == ("cat", "dog")
    assert samples(images) == [(name, name[:3], COLOURS[name]) for name in ("cat/a.png", "cat/b.png", "dog/deep/c.png")]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take no such names")
def test_names_may_hold_any_bytes(tmp_path: Path) -> None:
    """In a folder that is read, in workers that are not forked, and at either end."""
    names = [b"caf\xe9.png", b"z\n.png", "ë.png".encode()]
    (tmp_path / "any").mkdir()
    for name in names:
        Image.new("RGB", (3, 2)).save(str(tmp_path / "any" / os.fsdecode(name)))
    images = pickle.loads(pickle.dumps(FolderImages(tmp_path)))
    assert [images.name(at) for at in (0, 1, -1)] == [f"any/{os.fsdecode(name)}" for name in names]
    assert [images.load(at).size for at in range(3)] == [(3, 2)] * 3
    with pytest.raises(IndexError):
        images.name(3)


def test_shards(tmp_path: Path) -> None:
    """Files of a sample in any order, other files among them, in folders, labels in .cls and in .json."""
    shard(
        tmp_path / "s-000.tar",
        {
            "./x/1.cls": b"1\n",
            "./x/1.png": picture((1, 1, 1)),
            "./x/1.txt": b"caption",
            "./y/1.PNG": picture((2, 2, 2)),
            "./y/1.json": json.dumps({"label": 0}).encode(),
            "./y/1.seg.png": b"another file of the same sample",
        },
    )
    shard(tmp_path / "s-001.tar", {"7.png": picture((3, 3, 3)), "7.cls": b"2", "7.json": b'{"width": 5}'})
    expected = [("s-000.tar/./x/1", "1", (1, 1, 1)), ("s-000.tar/./y/1", "0", (2, 2, 2)), ("s-001.tar/7", "2", (3, 3, 3))]
    for path in (tmp_path, tmp_path / "s-*.tar", tmp_path / "s-{000..001}.tar"):
        images = open_images(path)
        assert isinstance(images, ShardImages)
        assert images.classes == ("0", "1", "2")
        assert samples(images) == expected
    assert samples(open_images(tmp_path / "s-000.tar")) == expected[:2]


def test_classes_of_shards_have_names(tmp_path: Path) -> None:
    shard(tmp_path / "s.tar", {"1.png": picture((1, 1, 1)), "1.cls": b"1"})
    (tmp_path / "classes.txt").write_text("cat\ndog\nbird\n")
    images = open_images(tmp_path)
    assert images.classes == ("cat", "dog", "bird")
    assert images.label(0) == 1
    shard(tmp_path / "s.tar", {"1.png": picture((1, 1, 1)), "1.cls": b"dog"})
    assert open_images(tmp_path).label(0) == 1
    (tmp_path / "classes.txt").unlink()
    assert open_images(tmp_path).classes == ("dog",)


@pytest.mark.parametrize("content", [b"", b"no image", picture((1, 2, 3))[:40]], ids=["empty", "text", "cut"])
def test_a_damaged_image_names_itself(content: bytes, folder: Path, tmp_path: Path) -> None:
    (folder / "cat" / "a.png").write_bytes(content)
    with pytest.raises(ImageError, match=r"cat/a\.png"):
        open_images(folder).load(0)
    shard(tmp_path / "s.tar", {"k.png": content, "k.cls": b"0"})
    with pytest.raises(ImageError, match=r"^s\.tar/k "):
        open_images(tmp_path / "s.tar").load(0)


def test_a_shard_that_is_gone_is_an_error_of_the_image(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", {"k.png": picture((1, 2, 3)), "k.cls": b"0"})
    images = open_images(path)
    path.unlink()
    with pytest.raises(ImageError, match=r"^s\.tar/k cannot be read"):
        images.load(0)


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({}, "no samples"),
        ({"1.cls": b"0"}, "no samples"),
        ({"1.png": b""}, "sample 1 has no label"),
        ({"1.png": b"", "1.json": b'{"width": 5}'}, "sample 1 has no label"),
        ({"1.png": b"", "1.jpg": b"", "1.cls": b"0"}, "two images"),
        ({"1.png": b"", "1.cls": b"-1"}, "it holds '-1'"),
        ({"1.png": b"", "1.cls": b""}, "it holds ''"),
        ({"1.png": b"", "1.cls": b"9" * 30}, "from 0 to 999999"),
        ({"1.png": b"", "1.cls": b"\xff\xfe"}, "cannot be read as a label"),
        ({"1.png": b"", "1.json": b"{"}, "cannot be read as a label"),
        ({"1.png": b"", "1.json": b"[" * 100_000}, "cannot be read as a label"),
        ({"1.png": b"", "1.json": b'{"label": 1.5}'}, "it holds 1.5"),
        ({"1.png": b"", "1.json": b'{"label": true}'}, "it holds True"),
        ({"1.png": b"", "1.cls": b"0" * (1 << 20) + b"1"}, "more than a label's file may have"),
        ({"1.png": b"", "1.cls": b"0", "2.png": b"", "2.cls": b"dog"}, "use one of the two"),
    ],
)
def test_shards_that_are_refused(members: dict[str, bytes], says: str, tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", members)
    with pytest.raises(DataError) as error:
        open_images(path)
    assert says in message_of(error)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("names", ["cat\n", "cat\ncat\n", "cat\n\ndog\n"])
def test_a_list_of_classes_that_does_not_fit(names: str, tmp_path: Path) -> None:
    shard(tmp_path / "s.tar", {"1.png": b"", "1.cls": b"1"})
    (tmp_path / "classes.txt").write_text(names)
    with pytest.raises(DataError) as error:
        open_images(tmp_path)
    assert str(tmp_path / "classes.txt") in message_of(error)


def test_no_shards_at_all(tmp_path: Path) -> None:
    whole = shard(tmp_path / "whole.tar", {"1.cls": b"0", "1.png": picture((1, 2, 3)) + bytes(5000)}).read_bytes()
    cases = {
        "zipped.tar": shard(tmp_path / "zipped.tar", {"1.png": b"", "1.cls": b"0"}, "w:gz").read_bytes(),
        "noise.tar": bytes(range(256)) * 8,
        "empty.tar": b"",
        "cut.tar": whole[:3000],
        "picture.png": picture((1, 2, 3)),
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError) as error:
            open_images(tmp_path / name)
        assert name in message_of(error)


def test_links_and_devices_in_a_shard_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name, kind in (("a.png", tarfile.SYMTYPE), ("b.png", tarfile.CHRTYPE), ("c.png", tarfile.LNKTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
        add(archive, "d.png", picture((1, 2, 3)))
        add(archive, "d.cls", b"0")
    assert samples(open_images(tmp_path / "s.tar")) == [("s.tar/d", "0", (1, 2, 3))]


def test_a_negative_size_in_a_shard(tmp_path: Path) -> None:
    entry = tarfile.TarInfo("a.png")
    entry.size = -1
    (tmp_path / "s.tar").write_bytes(entry.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(DataError) as error:
        open_images(tmp_path / "s.tar")
    assert "s.tar is " in message_of(error)


def test_folders_that_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    for name in ("train", "Val"):
        (tmp_path / "parts" / name / "cat").mkdir(parents=True)
    (tmp_path / "flat" / "a.png").write_bytes(picture((1, 2, 3)))
    for path, says in (
        (folder, str(folder / "empty")),
        (tmp_path / "flat", "no class folders"),
        (tmp_path / "parts", "parts of a data set and no classes (Val, train)"),
        (tmp_path / "missing", "no such folder"),
        (tmp_path / "missing-*.tar", "no shard"),
        (tmp_path / "missing-{0..3}.tar", "missing-0.tar: there is no such shard"),
        (tmp_path / "s-{0..9999999}.tar", "more than a million"),
    ):
        start = time.monotonic()
        with pytest.raises(DataError) as error:
            open_images(path)
        assert says in message_of(error)
        assert time.monotonic() - start < 2

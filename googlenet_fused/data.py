"""Labelled images for training and evaluation: folders of class folders, and shards in WebDataset's layout."""

from __future__ import annotations

import glob
import io
import json
import os
import re
import tarfile
from array import array
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image

from googlenet_fused.images import SUFFIXES, ImageError, decode_image, find_images, load_image
from googlenet_fused.progress import progress_display

CLASS_NAMES = "classes.txt"
"""A file beside the shards that names the classes, one a line, in the order of the labels."""

_PARTS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
_MOST_CLASSES = 1_000_000
_LABEL_LIMIT = 1 << 20
"""Bytes that a sample's ``.cls`` or ``.json`` may have."""


class DataError(RuntimeError):
    """Labelled images cannot be found or read; the message is one line that names the place and the remedy."""


class LabelledImages(Protocol):
    """Images with labels, in an order that never changes. ``classes`` are the names of the labels, by index."""

    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What the image is called: its path under the folder, or its shard and key."""

    def label(self, index: int) -> int: ...

    def load(self, index: int) -> Image.Image:
        """The image as RGB with 8 bits a channel. Raises ``ImageError`` if it cannot be read."""


class _Texts:
    """Many texts in two buffers, which forked workers share; lists are copied in time, as references to objects are counted."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]  # names of files may hold any bytes
        self._bytes, self._ends = b"".join(encoded), array("Q", accumulate(map(len, encoded), initial=0))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        at = range(len(self))[index]
        return self._bytes[self._ends[at] : self._ends[at + 1]].decode("utf-8", "surrogatepass")


class FolderImages:
    """A folder with a folder for each class, as torchvision's ``ImageFolder``: classes in the order of their names.

    Files count by their suffix (``images.SUFFIXES``), in folders of folders too; names that start with a dot are passed over.

    Raises:
        DataError: there is no such folder, it has no class folders, all of them are named as parts of a data set are, or one of
            them holds no image.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = Path(root)
        try:
            folders = sorted(path for path in self._root.iterdir() if path.is_dir() and not path.name.startswith("."))
        except OSError as error:
            raise DataError(f"the folder {root} cannot be read: {error.strerror}") from error
        if not folders:
            raise DataError(
                f"the folder {root} holds no class folders: put the images of each class into a folder of its own, "
                f"{self._root / 'CLASS' / 'image.jpg'}"
            )
        self.classes = tuple(folder.name for folder in folders)
        if len(folders) > 1 and {name.lower() for name in self.classes} <= _PARTS:
            raise DataError(
                f"the folders in {root} are parts of a data set and no classes ({', '.join(self.classes)}): name one of them, "
                f"{self._root / self.classes[-1]}"
            )
        names: list[str] = []
        self._labels = array("I")
        for label, folder in enumerate(folders):
            try:
                found = find_images(folder)
            except ImageError as error:
                raise DataError(f"{error}; remove the folder, or put the images of this class there") from error
            names.extend(str(path.relative_to(self._root)) for path in found)
            self._labels.extend([label] * len(found))
        self._names = _Texts(names)

    def __len__(self) -> int:
        return len(self._labels)

    def name(self, index: int) -> str:
        return self._names[index]

    def label(self, index: int) -> int:
        return self._labels[index]

    def load(self, index: int) -> Image.Image:
        return load_image(self._root / self._names[index])


class _Member(NamedTuple):
    """Where in a shard a sample's image lies, in bytes."""

    shard: int
    key: str
    offset: int
    size: int


class ShardImages:
    """Shards in WebDataset's layout: uncompressed ``.tar`` files in which a sample's files share the name up to its first dot.

    A sample is an image (``.jpg``, ``.png`` and so on) with its label beside it: ``.cls``, a whole number or a name in text, or
    ``.json`` with an entry ``"label"``. A file ``classes.txt`` beside the shards names the classes of numbers. The headers are
    read once, at the start, so that images can then be had in any order.

    Raises:
        DataError: a shard cannot be read, is compressed or damaged; a sample lacks its label, or it is out of range; or there
            are no samples.
    """

    def __init__(self, shards: list[Path]) -> None:
        self._shards = shards
        members: list[_Member] = []
        labels: list[str | int] = []
        with progress_display("reading shards") as show:
            for at, path in enumerate(shards):
                show(path.name, at / len(shards))
                for member, label in _samples(path, at):
                    members.append(member)
                    labels.append(label)
        if not labels:
            others = f", nor in the {len(shards) - 1} others" if len(shards) > 1 else ""
            raise DataError(f"{shards[0]}: there are no samples in it{others}")
        self.classes = _class_names(shards[0].parent / CLASS_NAMES, labels)
        index = {name: at for at, name in enumerate(self.classes)}
        self._labels = array("I", (label if isinstance(label, int) else index[label] for label in labels))
        self._keys = _Texts(member.key for member in members)
        self._shard_of = array("I", (member.shard for member in members))
        self._offsets = array("Q", (member.offset for member in members))
        self._sizes = array("Q", (member.size for member in members))

    def __len__(self) -> int:
        return len(self._labels)

    def name(self, index: int) -> str:
        return f"{self._shards[self._shard_of[index]].name}/{self._keys[index]}"

    def label(self, index: int) -> int:
        return self._labels[index]

    def load(self, index: int) -> Image.Image:
        try:
            with open(self._shards[self._shard_of[index]], "rb") as file:
                file.seek(self._offsets[index])
                content = file.read(self._sizes[index])
        except OSError as error:
            raise ImageError(f"{self.name(index)} cannot be read: {error.strerror}") from error
        return decode_image(io.BytesIO(content), self.name(index))


def open_images(path: str | os.PathLike[str]) -> FolderImages | ShardImages:
    """The labelled images at ``path``: a folder of class folders, a folder of ``.tar`` shards, or one or more shards.

    Several shards are named by a pattern, ``train-*.tar`` or ``train-{000..146}.tar``.

    Raises:
        DataError: there is nothing at ``path``, or it cannot be read.
    """
    text = os.path.expanduser(os.fspath(path))
    found = Path(text)
    if found.is_dir():
        shards = sorted(found.glob("*.tar"))
        return ShardImages(shards) if shards else FolderImages(found)
    if found.is_file():
        if found.suffix.lower() != ".tar":
            raise DataError(f"{path} is not a folder of class folders and not a .tar shard")
        return ShardImages([found])
    shards = _expand(text)
    if not shards:
        raise DataError(f"{path}: there is no such folder, and no shard of that name")
    if missing := next((shard for shard in shards if not shard.is_file()), None):
        raise DataError(f"{missing}: there is no such shard (one of {len(shards)} that {path} names)")
    return ShardImages(shards)


def _expand(pattern: str) -> list[Path]:
    """The files of a pattern: ``{000..146}`` counts, and ``*``, ``?`` and ``[]`` match what is there."""
    if counted := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        first, last = counted.groups()
        if int(last) - int(first) > 1_000_000:
            raise DataError(f"{pattern} names {int(last) - int(first) + 1} shards, more than a million")
        numbers = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
        names = [f"{pattern[: counted.start()]}{number}{pattern[counted.end() :]}" for number in numbers]
        return [path for name in names for path in (_expand(name) if glob.has_magic(name) else [Path(name)])]
    return [Path(name) for name in sorted(glob.glob(pattern))]


def _samples(path: Path, shard: int) -> Iterator[tuple[_Member, str | int]]:
    """Each image of a shard with its label, in the order of the images."""
    images: dict[str, _Member] = {}
    labels: dict[str, str | int] = {}
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as archive:
            for entry in archive:
                if not entry.isreg() or entry.issparse():
                    continue
                folder, _, base = entry.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key, suffix = (f"{folder}/{stem}" if folder else stem), f".{suffix.lower()}"
                if not 0 <= entry.size <= size - entry.offset_data:
                    raise DataError(f"{path} is truncated: {entry.name} ends after the file does; copy or download it again")
                if suffix in SUFFIXES:
                    if key in images:
                        raise DataError(f"{path}: the sample {key} has two images; give each sample a name of its own")
                    images[key] = _Member(shard, key, entry.offset_data, entry.size)
                elif suffix in (".cls", ".json"):
                    label = _label(path, archive, entry)
                    if label is not None:
                        labels[key] = label
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} is damaged, compressed or not a tar file: {error}; shards must be plain .tar files") from error
    for key, member in images.items():
        if key not in labels:
            raise DataError(f'{path}: the sample {key} has no label: there is no {key}.cls, and no {key}.json with a "label"')
        yield member, labels[key]


def _label(path: Path, archive: tarfile.TarFile, entry: tarfile.TarInfo) -> str | int | None:
    """The label in a ``.cls`` or ``.json`` file; None if a ``.json`` says nothing of one."""
    if entry.size > _LABEL_LIMIT:
        raise DataError(f"{path}: {entry.name} has {entry.size} bytes, more than a label's file may have ({_LABEL_LIMIT})")
    stream = archive.extractfile(entry)
    text = b"" if stream is None else stream.read()
    try:
        label: object = text.decode("utf-8").strip()
        if entry.name.lower().endswith(".json"):
            document = json.loads(text)
            label = document.get("label") if isinstance(document, dict) else None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {entry.name} cannot be read as a label: {error}") from error
    if label is None:
        return None
    if isinstance(label, str) and re.fullmatch(r"[0-9]+", label):
        label = int(label[:20])
    if isinstance(label, int) and type(label) is not bool and 0 <= label < _MOST_CLASSES:
        return label
    if isinstance(label, str) and label and label[0] != "-":
        return label
    raise DataError(
        f"{path}: {entry.name} must hold the number of a class, from 0 to {_MOST_CLASSES - 1}, or its name; it holds {label!r}"
    )


def _class_names(path: Path, labels: list[str | int]) -> tuple[str, ...]:
    """The names of the classes: of ``classes.txt`` if it is there, else the labels' own."""
    numbers = {label for label in labels if isinstance(label, int)}
    words = {label for label in labels if isinstance(label, str)}
    if numbers and words:
        raise DataError(
            f"the shards in {path.parent} label some samples by a number ({min(numbers)}) and others by a name "
            f"({min(words)!r}): use one of the two"
        )
    if not path.exists():
        return tuple(sorted(words)) if words else tuple(map(str, range(max(numbers) + 1)))
    try:
        names = tuple(path.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if len(set(names)) < len(names) or not all(names):
        raise DataError(f"{path} must name each class once, one a line, without empty lines")
    unknown = [*sorted(words.difference(names)), *sorted(number for number in numbers if number >= len(names))]
    if unknown:
        raise DataError(f"{path} names {len(names)} classes, and the label {unknown[0]!r} is none of them: add its name")
    return names

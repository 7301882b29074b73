"""Fashion-MNIST as folders of images for ``googlenet-fused train``: OUTPUT/train/CLASS/00000.png, and OUTPUT/test the same.

    python examples/fashion_mnist.py OUTPUT [--source DIR] [--each N]

Takes the four files ``*-ubyte.gz`` from DIR (Debian's package dataset-fashion-mnist puts them into
/usr/share/datasets/fashion-mnist), or lets torchvision download them. Fashion-MNIST: Xiao et al., 2017, 28x28 grey, MIT.
"""

from __future__ import annotations

import argparse
import gzip
import tempfile
from collections import Counter
from pathlib import Path

import torch
from PIL import Image
from torchvision.datasets import FashionMNIST
from torchvision.datasets.mnist import read_image_file, read_label_file

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


def read(source: Path, prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``[n, 28, 28]`` and labels ``[n]`` of one part, from its two compressed files."""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for kind in ("images-idx3", "labels-idx1"):
            path = Path(folder, kind)
            path.write_bytes(gzip.decompress((source / f"{prefix}-{kind}-ubyte.gz").read_bytes()))
            paths.append(str(path))
        return read_image_file(paths[0]), read_label_file(paths[1])


def write(images: torch.Tensor, labels: torch.Tensor, output: Path, each: int | None) -> int:
    """One PNG file an image, at most ``each`` of every class; returns how many."""
    written: Counter[int] = Counter()
    for pixels, label in zip(images, labels.tolist(), strict=True):
        if each is None or written[label] < each:
            folder = output / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(folder / f"{written[label]:05d}.png")
            written[label] += 1
    return written.total()


def main() -> None:
    parser = argparse.ArgumentParser(description="Fashion-MNIST as folders of images.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--source", type=Path, help="a folder with the four *-ubyte.gz files (default: download them)")
    parser.add_argument("--each", type=int, metavar="N", help="only the first N training images of every class")
    arguments = parser.parse_args()
    for part, prefix in (("train", "train"), ("test", "t10k")):
        if arguments.source is None:
            found = FashionMNIST(arguments.output / "download", train=part == "train", download=True)
            images, labels = found.data, found.targets
        else:
            images, labels = read(arguments.source, prefix)
        count = write(images, labels, arguments.output / part, arguments.each if part == "train" else None)
        print(f"{arguments.output / part}: {count} images")


if __name__ == "__main__":
    main()

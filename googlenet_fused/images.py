"""Photographs: finding, reading and preparing them, and the four that come with scikit-image."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from googlenet_fused.preparation import PREPARATIONS, Preparation

try:
    from PIL import Image, ImageOps, UnidentifiedImageError
except ModuleNotFoundError as error:
    raise ImportError("reading images needs Pillow: pip install 'googlenet-fused[tools]'") from error

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""The Pillow formats that are opened; every other decoder stays closed to files from outside."""

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}
)
"""What a file in a folder must end with to count as an image, in either case."""

RESIZE_SIDE = 256
CROP_SIDE = 224
"""Shorter side after resizing, and side of the centre crop: torchvision's preset for GoogLeNet."""

SAMPLES = {"astronaut": "astronaut.png", "chelsea": "chelsea.png", "coffee": "coffee.png", "rocket": "rocket.jpg"}


class ImageError(RuntimeError):
    """An image cannot be found, read or prepared; the message is one line that names the file and the reason."""


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """The image in a file, as RGB with 8 bits a channel, turned the way its EXIF orientation says.

    Of an animation or a multi-page file the first frame is read. Transparent pixels are laid over white, 16-bit grey is scaled
    to 8 bits, and palettes, grey and CMYK are converted; colour profiles are not applied.

    Raises:
        ImageError: the file is missing, is in none of ``FORMATS``, is truncated or damaged, has more pixels than
            ``PIL.Image.MAX_IMAGE_PIXELS``, or has pixels of a kind without a defined white (32-bit integers, floats).
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ImageError(f"{path}: there is no such file")
    if not path.is_file():
        raise ImageError(f"{path} is not a file")
    return decode_image(path, str(path))


def decode_image(file: Path | BinaryIO, name: str) -> Image.Image:
    """As ``load_image``, from an open file too; ``name`` is what its errors call it.

    Raises:
        ImageError: as ``load_image`` raises it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                return _to_rgb(ImageOps.exif_transpose(image), image.format)
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image in one of the formats {', '.join(FORMATS)}") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(f"{name} is too large to be decoded: {error}") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more on damaged files
        raise ImageError(f"{name} cannot be decoded: {str(error) or type(error).__name__}") from error


def find_images(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], recursive: bool = True) -> list[Path]:
    """The image files that ``paths`` name, in that order and each once; a folder stands for its images, sorted by path.

    In folders a file counts by its suffix (``SUFFIXES``), and names that start with a dot are passed over. A file that is named
    itself is returned whatever its suffix.

    Args:
        paths: files and folders, or a single one.
        recursive: look into the folders of a folder too.

    Raises:
        ImageError: a path does not exist, a folder holds no image, or no path is given.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    found: dict[Path, None] = {}
    for path in (Path(path).expanduser() for path in paths):
        if path.is_dir():
            inside = sorted(_images_in(path, recursive))
            if not inside:
                depth = "" if recursive else ", folders inside it not searched"
                raise ImageError(f"the folder {path} holds no image (by suffix: {', '.join(sorted(SUFFIXES))}{depth})")
            found.update(dict.fromkeys(inside))
        elif path.exists():
            found[path] = None
        else:
            raise ImageError(f"{path}: there is no such file or folder")
    if not found:
        raise ImageError("no images given: name at least one file or folder")
    return list(found)


def preprocess(
    image: Image.Image,
    preparation: Preparation = PREPARATIONS["torchvision"],
    *,
    resize: int = RESIZE_SIDE,
    crop: int = CROP_SIDE,
) -> Tensor:
    """An RGB image as a network expects it: ``[3, crop, crop]``, float32.

    The shorter side is resized to ``resize`` (bilinear, antialiased), the centre is cut out, and the pixels are prepared. By
    default that is what ``GoogLeNet_Weights.IMAGENET1K_V1.transforms()`` does.

    Args:
        preparation: what the network wants its pixels to be.
        resize, crop: in pixels.

    Raises:
        ImageError: the image is not RGB, is empty, or is so long and narrow that resizing it would pass
            ``PIL.Image.MAX_IMAGE_PIXELS``.
        ImportError: torchvision is missing.
    """
    try:
        from torchvision.transforms import functional
    except ModuleNotFoundError as error:
        raise ImportError("preparing images needs torchvision: pip install 'googlenet-fused[tools]'") from error
    if image.mode != "RGB":
        raise ImageError(f"preprocess: the image must be RGB, got mode {image.mode!r}; load_image converts it")
    short, long = sorted(image.size)
    if not short:
        raise ImageError(f"preprocess: the image is empty ({image.width}x{image.height})")
    if Image.MAX_IMAGE_PIXELS and resize * (resize * long // short) > Image.MAX_IMAGE_PIXELS:
        raise ImageError(f"preprocess: the image is too long and narrow to be resized ({image.width}x{image.height})")
    resized = functional.resize(image, [resize], functional.InterpolationMode.BILINEAR, antialias=True)
    return preparation(functional.pil_to_tensor(functional.center_crop(resized, [crop])))


def sample_photographs() -> dict[str, Path]:
    """Four photographs by name, from the installed scikit-image (CC0 or public domain), without a network.

    Raises:
        ImportError: scikit-image is missing.
        ImageError: the installed scikit-image lacks one of the files.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the sample photographs come with scikit-image: pip install 'googlenet-fused[tools]'")
    folder = Path(spec.submodule_search_locations[0], "data")
    samples = {name: folder / filename for name, filename in SAMPLES.items()}
    for path in samples.values():
        if not path.is_file():
            raise ImageError(f"the installed scikit-image lacks {path}: reinstall it, or give photographs of your own")
    return samples


def _images_in(folder: Path, recursive: bool) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise ImageError(f"the folder {error.filename} cannot be read: {error.strerror}") from error

    for root, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(root, name)


def _to_rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        # White is 65535 here, and Pillow's own conversion would clip at 255.
        image = image.point(lambda value: value * (1 / 257) + 0.5).convert("L")
    elif image.mode in ("I", "F"):
        raise ValueError(f"white is undefined for its pixels (mode {image.mode!r}); save it with 8 or 16 bits a channel")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")

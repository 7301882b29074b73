"""Images: finding, reading every accepted kind, refusing the rest, and the preprocessing of the published weights."""

from __future__ import annotations

import importlib.util
import io
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL")
from PIL import Image

from googlenet_fused import images
from googlenet_fused.images import ImageError, find_images, load_image, preprocess, sample_photographs

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)

SAVED_AS = {
    "JPEG": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "GIF": "gif",
    "TIFF": "tif",
    "PPM": "ppm",
}


def picture(width: int = 60, height: int = 40) -> Image.Image:
    """Smooth in both directions, so that lossy formats keep it."""
    return Image.merge(
        "RGB",
        [
            Image.linear_gradient("L").resize((width, height)),
            Image.radial_gradient("L").resize((width, height)),
            Image.linear_gradient("L").rotate(90).resize((width, height)),
        ],
    )


def bytes_of(image: Image.Image) -> torch.Tensor:
    """``[height, width, channels]``, int."""
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, -1).int()


def message_of(error: pytest.ExceptionInfo[BaseException], path: Path) -> str:
    """The error's text, which must be one line and name the file."""
    text = str(error.value)
    assert "\n" not in text
    assert str(path) in text
    return text


@pytest.mark.parametrize("file_format", images.FORMATS)
def test_every_format_is_read(file_format: str, tmp_path: Path) -> None:
    path = tmp_path / f"p.{SAVED_AS[file_format]}"
    picture().save(path, file_format)
    image = load_image(str(path))
    assert (image.mode, image.size) == ("RGB", (60, 40))
    difference = (bytes_of(image) - bytes_of(picture())).abs().float().mean()
    assert difference <= {"JPEG": 8, "WEBP": 8, "GIF": 12}.get(file_format, 0)


def test_other_decoders_stay_closed(tmp_path: Path) -> None:
    for file_format in ("TGA", "PCX", "ICO", "EPS"):
        path = tmp_path / "p.png"
        picture().save(path, file_format)
        with Image.open(path) as image:
            assert image.format == file_format
        with pytest.raises(ImageError, match="not an image in one of the formats JPEG, PNG") as error:
            load_image(path)
        message_of(error, path)


@pytest.mark.parametrize("file_format", images.FORMATS)
def test_truncated_files_are_refused(file_format: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    picture().save(buffer, file_format)
    path = tmp_path / "p"
    whole = buffer.getvalue()
    for length in (1, 10, len(whole) // 2, len(whole) * 9 // 10):
        path.write_bytes(whole[:length])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ImageError) as error:
                load_image(path)
        message_of(error, path)
    assert "cannot be decoded: " in str(error.value)


@pytest.mark.parametrize("content", [b"", b"hello, world\n", b"<!DOCTYPE html><html></html>", b"\x89PNG\r\n\x1a\n"])
def test_files_that_are_no_images_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match="not an image") as error:
        load_image(path)
    message_of(error, path)


def test_a_damaged_png_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    picture().save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ImageError, match="cannot be decoded") as error:
        load_image(path)
    message_of(error, path)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    for path, reason in [(tmp_path / "no.png", "there is no such file"), (tmp_path, "is not a file")]:
        with pytest.raises(ImageError, match=reason) as error:
            load_image(path)
        message_of(error, path)


@pytest.mark.parametrize(("side", "pillow_itself_raises"), [(12, False), (20, True)])
def test_a_decompression_bomb_is_an_error(
    side: int, pillow_itself_raises: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.png"
    picture(side, side).save(path)
    load_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        filters = list(warnings.filters)
        with pytest.raises(ImageError, match="too large") as error:
            load_image(path)
        assert warnings.filters == filters
    assert str(side * side) in message_of(error, path)
    assert isinstance(error.value.__cause__, Image.DecompressionBombError) is pillow_itself_raises


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(file_format: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 32), BLUE)
    image.paste(RED, (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to show
    path = tmp_path / "p"
    image.save(path, file_format, exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        turned = load_image(path)
    assert turned.size == (32, 64)
    top, bottom = bytes_of(turned)[8, 16], bytes_of(turned)[56, 16]
    assert top[0] > 200
    assert top[2] < 50
    assert bottom[0] < 50
    assert bottom[2] > 200


def first_pixels(path: Path, count: int) -> list[tuple[int, ...]]:
    image = load_image(path)
    assert image.mode == "RGB"
    return [tuple(pixel) for pixel in bytes_of(image).flatten(0, 1)[:count].tolist()]


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    rgba = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    rgba.putpixel((1, 0), (255, 0, 0, 255))
    rgba.putpixel((2, 0), (255, 0, 0, 51))
    rgba.save(path)
    assert first_pixels(path, 3) == [WHITE, RED, (255, 204, 204)]

    rgba.convert("LA").save(path)
    assert first_pixels(path, 2) == [WHITE, (76, 76, 76)]

    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *BLUE])
    palette.putpixel((1, 0), 1)
    palette.save(path)
    assert first_pixels(path, 2) == [RED, BLUE]
    palette.save(path, transparency=0)
    assert first_pixels(path, 2) == [WHITE, BLUE]

    Image.new("RGB", (1, 1), BLUE).save(path, transparency=BLUE)
    assert first_pixels(path, 1) == [WHITE]


def test_grey_images_become_rgb(tmp_path: Path) -> None:
    Image.new("L", (1, 1), 77).save(tmp_path / "p.png")
    assert first_pixels(tmp_path / "p.png", 1) == [(77, 77, 77)]
    Image.new("1", (1, 1), 1).save(tmp_path / "p.png")
    assert first_pixels(tmp_path / "p.png", 1) == [WHITE]


@pytest.mark.parametrize("name", ["p.png", "p.tif", "p.pgm"])
def test_sixteen_bit_grey_is_scaled_not_clipped(name: str, tmp_path: Path) -> None:
    levels = (0, 400, 32768, 65535)
    path = tmp_path / name
    if name == "p.pgm":
        path.write_bytes(b"P5 4 1 65535\n" + b"".join(level.to_bytes(2, "big") for level in levels))
    else:
        Image.frombytes("I;16", (4, 1), b"".join(level.to_bytes(2, "little") for level in levels)).save(path)
    assert first_pixels(path, 4) == [(grey, grey, grey) for grey in (0, 2, 128, 255)]


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "p.jpg")
    assert first_pixels(tmp_path / "p.jpg", 1)[0] == pytest.approx(RED, abs=3)


@pytest.mark.parametrize(("mode", "value"), [("F", 0.5), ("I", 70000)])
def test_pixels_without_a_defined_white_are_refused(mode: str, value: float, tmp_path: Path) -> None:
    path = tmp_path / "p.tif"
    Image.new(mode, (2, 2), value).save(path)
    with pytest.raises(ImageError, match="white is undefined") as error:
        load_image(path)
    message_of(error, path)


def test_of_an_animation_the_first_frame_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    for name in ("p.gif", "p.tif", "p.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert first_pixels(tmp_path / name, 1)[0] == pytest.approx(RED, abs=2)


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_find_expands_folders_in_order(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("b.PNG", "a.jpg", "notes.txt", "._a.jpg", "deep/er/c.webp", ".hidden/d.png")))
    touch(tmp_path / "z" / "x.tiff")
    a, b, c, x = (tmp_path / name for name in ("a.jpg", "b.PNG", "deep/er/c.webp", "z/x.tiff"))
    assert find_images([tmp_path]) == [a, b, c, x]
    assert find_images(tmp_path) == find_images(str(tmp_path)) == [a, b, c, x]
    assert find_images([tmp_path], recursive=False) == [a, b]
    assert find_images([tmp_path / "z", b, tmp_path]) == [x, b, a, c]
    assert find_images([tmp_path / "notes.txt"]) == [tmp_path / "notes.txt"]


def test_find_names_what_is_missing(tmp_path: Path) -> None:
    touch(tmp_path / "a.jpg", tmp_path / "empty" / "notes.txt", tmp_path / "outer" / "inner" / "a.jpg")
    with pytest.raises(ImageError, match="no such file or folder") as error:
        find_images([tmp_path / "a.jpg", tmp_path / "no"])
    message_of(error, tmp_path / "no")
    with pytest.raises(ImageError, match="holds no image") as error:
        find_images([tmp_path / "a.jpg", tmp_path / "empty"])
    message_of(error, tmp_path / "empty")
    with pytest.raises(ImageError, match="not searched"):
        find_images([tmp_path / "outer"], recursive=False)
    with pytest.raises(ImageError, match="no images given"):
        find_images([])


def test_find_reports_a_folder_it_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "a.jpg", tmp_path / "closed" / "b.jpg")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ImageError, match="Permission denied") as error:
        find_images(tmp_path)
    message_of(error, tmp_path / "closed")


@pytest.mark.parametrize("size", [(500, 333), (333, 500), (256, 256), (224, 224), (31, 500), (1000, 999), (2, 1)])
def test_preprocess_is_the_preset_of_the_weights(size: tuple[int, int]) -> None:
    weights = pytest.importorskip("torchvision").models.GoogLeNet_Weights.IMAGENET1K_V1
    image = picture(*size)
    actual = preprocess(image)
    assert actual.shape == (3, 224, 224)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, weights.transforms()(image), rtol=0, atol=0)


def test_preprocess_is_the_preset_on_photographs() -> None:
    weights = pytest.importorskip("torchvision").models.GoogLeNet_Weights.IMAGENET1K_V1
    pytest.importorskip("skimage")
    for path in sample_photographs().values():
        image = load_image(path)
        torch.testing.assert_close(preprocess(image), weights.transforms()(image), rtol=0, atol=0)


def test_preprocess_refuses_what_it_cannot_prepare() -> None:
    with pytest.raises(ImageError, match="must be RGB, got mode 'L'"):
        preprocess(Image.new("L", (300, 300)))
    with pytest.raises(ImageError, match=r"empty \(0x5\)"):
        preprocess(Image.new("RGB", (0, 5)))
    with pytest.raises(ImageError, match=r"too long and narrow to be resized \(1x5000\)"):
        preprocess(Image.new("RGB", (1, 5000)))


def test_sample_photographs_are_the_four_that_scikit_image_ships() -> None:
    pytest.importorskip("skimage")
    samples = sample_photographs()
    assert list(samples) == ["astronaut", "chelsea", "coffee", "rocket"]
    sizes = {name: load_image(path).size for name, path in samples.items()}
    assert sizes == {"astronaut": (512, 512), "chelsea": (451, 300), "coffee": (600, 400), "rocket": (640, 427)}


def test_missing_tools_are_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    extra = r"pip install 'googlenet-fused\[tools\]'"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=f"scikit-image.*{extra}"):
        sample_photographs()
    monkeypatch.undo()

    for name in ("torchvision", "torchvision.transforms", "PIL"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"torchvision.*{extra}"):
        preprocess(picture())
    spec = importlib.util.spec_from_file_location("images_without_pillow", images.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=f"Pillow.*{extra}"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_a_scikit_image_without_photographs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "skimage" / "__init__.py", tmp_path / "skimage" / "data" / "astronaut.png")
    monkeypatch.delitem(sys.modules, "skimage", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImageError, match=r"lacks .*chelsea\.png"):
        sample_photographs()

"""The views of an image: where they are, against plain loops, and their pixels, against Pillow's."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("torchvision")
pytest.importorskip("skimage")

from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional

from googlenet_fused.crops import Box, Protocol, plan, resized_size, scales, views
from googlenet_fused.images import ImageError, load_image, sample_photographs

FORMS = {"landscape": (451, 300), "portrait": (217, 431), "square": (300, 300), "small": (97, 64)}


def photograph(form: str) -> Image.Image:
    """A part of a photograph with the width and height of the form."""
    return (
        load_image(sample_photographs()["chelsea"])
        .rotate(90 if form == "portrait" else 0, expand=True)
        .crop((0, 0, *FORMS[form]))
    )


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3).permute(2, 0, 1)


def at_scale(image: Image.Image, scale: int) -> Image.Image:
    """The image with this shorter side, as torchvision resizes it."""
    return functional.to_pil_image(functional.resize(functional.pil_to_tensor(image), [scale], antialias=True))


def with_mirror(image: Image.Image) -> list[Image.Image]:
    return [image, ImageOps.mirror(image)]


def five_crops(square: Image.Image, crop: int) -> list[Image.Image]:
    """The corners and the centre; every side here leaves an even number of pixels beside the crop."""
    side = square.width
    corners = [square.crop((x, y, x + crop, y + crop)) for y in (0, side - crop) for x in (0, side - crop)]
    edge = (side - crop) // 2
    return [*corners, square.crop((edge, edge, edge + crop, edge + crop))]


def the_144(image: Image.Image) -> list[tuple[Image.Image, bool]]:
    """The paper, section 7, word by word; and whether the view is a whole square, resized by Pillow."""
    found = []
    for scale in (256, 288, 320, 352):
        resized = at_scale(image, scale)
        width, height = resized.size
        middle = round((max(width, height) - scale) / 2)
        for start in (0, middle, max(width, height) - scale):
            square = resized.crop((0, start, scale, start + scale) if height > width else (start, 0, start + scale, scale))
            for view in five_crops(square, 224):
                found += [(each, False) for each in with_mirror(view)]
            whole = square.resize((224, 224), Image.Resampling.BILINEAR)
            found += [(each, True) for each in with_mirror(whole)]
    return found


@pytest.mark.parametrize("form", FORMS)
def test_144_crops_are_the_papers(form: str) -> None:
    image = photograph(form)
    found, expected = views(image, "144"), the_144(image)
    assert found.shape == (144, 3, 224, 224)
    assert found.dtype == torch.uint8
    assert len(expected) == 144
    for at, (view, (plain, resized)) in enumerate(zip(found, expected, strict=True)):
        difference = (view.int() - pixels_of(plain).int()).abs().max()
        assert difference <= (2 if resized else 0), at  # resizing rounds after each direction, and one library up, one down


def test_144_crops_of_a_square_image_are_48_in_three_equal_parts() -> None:
    parts = views(photograph("square"), "144").view(4, 3, 12, -1)
    assert torch.equal(parts[:, 0], parts[:, 1])
    assert torch.equal(parts[:, 0], parts[:, 2])
    assert len({tuple(view) for scale in parts[:, 0] for view in scale[:, ::997].tolist()}) == 48


@pytest.mark.parametrize("form", FORMS)
def test_10_crops_are_of_the_central_square(form: str) -> None:
    image = photograph(form)
    resized = at_scale(image, 256)
    left, top = (round((side - 256) / 2) for side in resized.size)
    square = resized.crop((left, top, left + 256, top + 256))
    expected = [pixels_of(each) for view in five_crops(square, 224) for each in with_mirror(view)]
    assert torch.equal(views(image, "10"), torch.stack(expected))


@pytest.mark.parametrize(("crop", "resize"), [(224, 256), (32, 36), (33, 40), (224, 224)])
@pytest.mark.parametrize("form", FORMS)
def test_centre_crop_is_torchvisions(form: str, crop: int, resize: int) -> None:
    image = photograph(form)
    resized = functional.resize(functional.pil_to_tensor(image), [resize], antialias=True)
    assert torch.equal(views(image, "1", crop, resize)[0], functional.center_crop(resized, [crop]))


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (300, 300), (31, 7), (7, 31), (1, 1), (333, 250)])
@pytest.mark.parametrize("crop", [224, 32, 15, 299])
@pytest.mark.parametrize("protocol", ["1", "10", "144"])
def test_views_lie_in_the_resized_image(size: tuple[int, int], crop: int, protocol: Protocol) -> None:
    found = plan(*size, protocol, crop, crop + 9)
    assert len(found) == int(protocol)
    for view in found:
        width, height = resized_size(*size, view.scale)
        assert min(width, height) == view.scale
        left, top, *sides = view.box
        assert left >= 0 <= top
        assert left + sides[0] <= width
        assert top + sides[1] <= height
        assert sides == ([view.scale] * 2 if view.resized else [crop] * 2)
    assert sum(view.mirrored for view in found) == len(found) // 2


def test_the_squares_of_144_crops_are_named() -> None:
    squares = {
        size: {(view.square, view.box) for view in plan(*size, "144") if view.resized and view.scale == 256}
        for size in ((512, 256), (256, 512))
    }
    assert squares[512, 256] == {
        ("left", Box(0, 0, 256, 256)),
        ("centre", Box(128, 0, 256, 256)),
        ("right", Box(256, 0, 256, 256)),
    }
    assert squares[256, 512] == {
        ("top", Box(0, 0, 256, 256)),
        ("centre", Box(0, 128, 256, 256)),
        ("bottom", Box(0, 256, 256, 256)),
    }


def test_scales_go_with_the_networks_side() -> None:
    assert scales() == (256, 288, 320, 352)
    assert scales(112) == (128, 144, 160, 176)
    assert scales(32) == (37, 41, 46, 50)
    assert {view.scale for view in plan(300, 200, "144", 32)} == {37, 41, 46, 50}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 10, "5"), "protocol must be '1', '10', '144', got '5'"),
        ((10, 0, "1"), "width, height and crop must be positive, got 10, 0 and 224"),
        ((10, 10, "1", 0), "got 10, 10 and 0"),
        ((10, 10, "1", 224, 223), r"resize must be at least crop \(224\), got 223"),
    ],
)
def test_what_cannot_be_planned(arguments: tuple[int, int, Protocol], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(*arguments)


def test_images_that_have_no_views() -> None:
    with pytest.raises(ImageError, match="must be RGB, got mode 'L'"):
        views(Image.new("L", (30, 30)), "1")
    with pytest.raises(ImageError, match=r"is empty \(0x4\)"):
        views(Image.new("RGB", (0, 4)), "1")
    with pytest.raises(ImageError, match=r"too long and narrow to be resized \(20000x2\)"):
        views(Image.new("RGB", (20000, 2)), "144")

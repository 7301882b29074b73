"""The table of widths against published figures (the paper, Table 1), and everything that is computed from it."""

from dataclasses import FrozenInstanceError, replace

import pytest

from googlenet_fused.spec import GOOGLENET_SIDES, GOOGLENET_SPECS, InceptionSpec

# name: in, side, ch1x1, ch3x3red, ch3x3, ch5x5red, ch5x5, pool_proj, out, weights, millions of MACs
TABLE = {
    "3a": (192, 28, 64, 96, 128, 16, 32, 32, 256, 163_328, 128.05),
    "3b": (256, 28, 128, 128, 192, 32, 96, 64, 480, 388_096, 304.27),
    "4a": (480, 14, 192, 96, 208, 16, 48, 64, 512, 375_552, 73.61),
    "4b": (512, 14, 160, 112, 224, 24, 64, 64, 512, 448_512, 87.91),
    "4c": (512, 14, 128, 128, 256, 24, 64, 64, 512, 509_440, 99.85),
    "4d": (512, 14, 112, 144, 288, 32, 64, 64, 528, 604_672, 118.52),
    "4e": (528, 14, 256, 160, 320, 32, 128, 128, 832, 867_328, 170.00),
    "5a": (832, 7, 256, 160, 320, 32, 128, 128, 832, 1_042_432, 51.08),
    "5b": (832, 7, 384, 192, 384, 48, 128, 128, 1024, 1_442_816, 70.70),
}
WIDTHS = ("in_channels", "ch1x1", "ch3x3red", "ch3x3", "ch5x5red", "ch5x5", "pool_proj")


def test_the_nine_modules_in_order() -> None:
    assert list(GOOGLENET_SPECS) == list(GOOGLENET_SIDES) == list(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_row(name: str) -> None:
    in_channels, side, *widths, out_channels, weights, mega_macs = TABLE[name]
    spec = GOOGLENET_SPECS[name]
    assert list(spec) == [in_channels, *widths, 5]
    assert spec.out_channels == out_channels
    assert spec.shared_channels == widths[0] + widths[1] + widths[3]
    shared = list(range(spec.shared_channels))
    lengths = [len(shared[channels]) for channels in spec.shared_slices]
    assert lengths == [spec.ch1x1, spec.ch3x3red, spec.ch5x5red]
    assert [i for channels in spec.shared_slices for i in shared[channels]] == shared
    assert spec.weight_count == weights
    assert GOOGLENET_SIDES[name] == side
    assert round(spec.macs(side, side) / 1e6, 2) == mega_macs


@pytest.mark.parametrize("name", TABLE)
def test_three_by_three_in_place_of_five_by_five(name: str) -> None:
    spec = GOOGLENET_SPECS[name]
    assert spec.weight_count - replace(spec, large_kernel=3).weight_count == (25 - 9) * spec.ch5x5red * spec.ch5x5


def test_macs_count_every_image_and_pixel() -> None:
    spec = InceptionSpec(2, 1, 1, 1, 1, 1, 1, large_kernel=3)
    assert spec.weight_count == 2 + 2 + 9 + 2 + 9 + 2
    assert spec.macs(3, 5, batch=7) == 7 * 3 * 5 * 26


def test_slices_are_the_papers_concat_order() -> None:
    assert GOOGLENET_SPECS["3a"].slices == (slice(0, 64), slice(64, 192), slice(192, 224), slice(224, 256))
    slices = GOOGLENET_SPECS["5b"].slices
    assert slices.ch1x1 == slice(0, 384)
    assert slices.ch3x3 == slice(384, 768)
    assert slices.ch5x5 == slice(768, 896)
    assert slices.pool_proj == slice(896, 1024)


@pytest.mark.parametrize("large_kernel", [3, 5])
def test_convolutions(large_kernel: int) -> None:
    spec = replace(GOOGLENET_SPECS["4d"], large_kernel=large_kernel)
    assert spec.convs == (
        ("ch1x1", 512, 112, 1),
        ("ch3x3red", 512, 144, 1),
        ("ch3x3", 144, 288, 3),
        ("ch5x5red", 512, 32, 1),
        ("ch5x5", 32, 64, large_kernel),
        ("pool_proj", 512, 64, 1),
    )
    assert [conv.padding for conv in spec.convs] == [0, 0, 1, 0, large_kernel // 2, 0]


@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize("width", [0, -1, True, 1.5, "64", None])
def test_width_that_is_no_positive_integer(name: str, width: object) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be a positive integer, got {width!r}"):
        replace(GOOGLENET_SPECS["3a"], **{name: width})


@pytest.mark.parametrize("large_kernel", [1, 4, 7, None])
def test_large_kernel_that_no_variant_has(large_kernel: object) -> None:
    with pytest.raises(ValueError, match=f"large_kernel must be 3 or 5, got {large_kernel!r}"):
        replace(GOOGLENET_SPECS["3a"], large_kernel=large_kernel)


def test_specs_are_frozen_and_hashable() -> None:
    spec = GOOGLENET_SPECS["3a"]
    with pytest.raises(FrozenInstanceError):
        spec.ch1x1 = 1  # type: ignore[misc]
    assert hash(spec) == hash(replace(spec))

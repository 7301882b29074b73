"""From pixels to a network's input: against the arithmetic written out, and against torchvision's preset."""

from __future__ import annotations

import pytest
import torch

from googlenet_fused.models import VARIANTS
from googlenet_fused.preparation import PREPARATIONS

PIXELS = torch.tensor([255, 128, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 2, 4)
"""Red 255, green 128, blue 0."""

EXPECTED = {
    "torchvision": [(1 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, -0.406 / 0.225],
    "bvlc": [0.0 - 104, 128.0 - 117, 255.0 - 123],
    "slim": [1.0, 128 / 127.5 - 1, -1.0],
}


def test_every_variant_has_a_preparation() -> None:
    assert set(VARIANTS) <= set(PREPARATIONS) == set(EXPECTED)


@pytest.mark.parametrize("variant", EXPECTED)
def test_values(variant: str) -> None:
    prepared = PREPARATIONS[variant](PIXELS)
    assert prepared.shape == (3, 2, 4)
    assert prepared.dtype == torch.float32
    torch.testing.assert_close(prepared[:, 1, 3], torch.tensor(EXPECTED[variant]))
    batch = PREPARATIONS[variant](torch.stack([PIXELS, PIXELS.float()]))  # type: ignore[list-item]
    assert batch.equal(torch.stack([prepared, prepared]))


def test_torchvisions_preset_prepares_alike() -> None:
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    pixels = torch.randint(0, 256, (2, 3, 5, 6), dtype=torch.uint8)
    scaled = functional.to_dtype(pixels, torch.float32, scale=True)
    expected = functional.normalize(scaled, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(PREPARATIONS["torchvision"](pixels), expected)


@pytest.mark.parametrize("pixels", [torch.zeros(2, 4, 4), torch.zeros(3, 4), torch.zeros(3, 4, 4, dtype=torch.int64)])
def test_other_tensors_are_refused(pixels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="pixels must be"):
        PREPARATIONS["bvlc"](pixels)


def test_a_preparation_says_what_it_does() -> None:
    assert str(PREPARATIONS["bvlc"]) == "BGR, 0 to 255, minus (104, 117, 123)"
    assert str(PREPARATIONS["slim"]) == "RGB, 0 to 1, minus (0.5, 0.5, 0.5), over (0.5, 0.5, 0.5)"

"""Which image comes when, and what chance does to it: every image once an epoch, the same for any cut among processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("PIL")

from PIL import Image
from training_cases import image_folder

from googlenet_fused.data import DataError, FolderImages
from googlenet_fused.training.augmentation import AUGMENTATIONS, augmentation
from googlenet_fused.training.sampling import AugmentedImages, Batches, Key, Order, collate, derive


def test_seeds_follow_from_all_numbers() -> None:
    found = {derive(*numbers) for numbers in ((0,), (1,), (0, 0), (0, 1), (1, 0), (10, 1), (1, 1), (101,), (1, 0, 1), (-1,))}
    assert len(found) == 10
    assert all(0 <= seed < 2**63 for seed in found)
    assert derive(3, 4) == derive(3, 4)


def test_an_epoch_shows_every_image_once_but_for_the_rest() -> None:
    order = Order(23, 4, seed=1)
    assert order.steps_per_epoch == 5
    epochs = [[image for step in range(5 * epoch, 5 * epoch + 5) for image in order.of(step)] for epoch in range(30)]
    assert all(len(set(epoch)) == len(epoch) == 20 for epoch in epochs)
    assert all(set(epoch) <= set(range(23)) for epoch in epochs)
    assert set().union(*epochs) == set(range(23))  # what is left out differs
    assert len({tuple(epoch) for epoch in epochs}) == 30
    assert order.of(7) == Order(23, 4, seed=1).of(7) != Order(23, 4, seed=2).of(7)


def test_a_step_needs_a_whole_batch() -> None:
    with pytest.raises(ValueError, match="batch_size must be at most 3"):
        Order(3, 4, seed=0)


@pytest.mark.parametrize(("accumulate", "world"), [(1, 1), (1, 2), (2, 1), (3, 2)])
def test_processes_and_accumulated_batches_cut_a_step(accumulate: int, world: int) -> None:
    order = Order(40, 12, seed=3)
    each = [list(Batches(order, range(2, 9), accumulate=accumulate, rank=rank, world=world)) for rank in range(world)]
    assert [len(batches) for batches in each] == [7 * accumulate] * world
    for at, step in enumerate(range(2, 9)):
        pieces = [each[rank][at * accumulate + batch] for batch in range(accumulate) for rank in range(world)]
        assert [key for piece in pieces for key in piece] == [Key(step // 3, image) for image in order.of(step)]
        assert {len(piece) for piece in pieces} == {12 // (accumulate * world)}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_image_is_augmented_by_seed_epoch_and_image_alone(name: str, tmp_path: Path) -> None:
    images = FolderImages(image_folder(tmp_path, each=2))

    def samples(seed: int, epoch: int) -> torch.Tensor:
        dataset = AugmentedImages(images, augmentation(name, 32), seed)  # type: ignore[arg-type]
        return torch.stack([dataset[Key(epoch, image)].pixels for image in range(len(images))])

    before = torch.get_rng_state()
    first = samples(0, 0)
    assert first.shape == (6, 3, 32, 32)
    assert first.dtype == torch.uint8
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(99)
    assert samples(0, 0).equal(first)
    assert samples(0, 1).equal(first) == samples(1, 0).equal(first) == (name == "none")


def test_augmentation_leaves_the_generators_of_gpus_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else dropout on a GPU would depend on whether images are read in the process that trains."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    images = FolderImages(image_folder(tmp_path, each=1))
    assert AugmentedImages(images, augmentation("paper", 32), 0)[Key(0, 0)].label == 0
    assert not seeds
    torch.manual_seed(5)
    assert seeds == [5]


def test_an_unreadable_image_gives_way_to_the_next(tmp_path: Path) -> None:
    root = image_folder(tmp_path, each=2)
    (root / "ant" / "1.png").write_bytes(b"no image")
    (root / "bee" / "0.png").write_bytes(b"")
    (root / "cat" / "1.png").write_bytes(b"")
    dataset = AugmentedImages(FolderImages(root), augmentation("none", 32), seed=0)
    batch = collate([dataset[Key(0, image)] for image in (0, 1, 5)])
    assert batch.labels.tolist() == [0, 1, 0]  # the last image's successor is the first
    assert [name for name, _ in batch.unreadable] == ["ant/1.png", "bee/0.png", "cat/1.png"]
    assert all(name in reason for name, reason in batch.unreadable)
    assert batch.pixels[2].equal(batch.pixels[0])
    assert batch.pixels[1].equal(dataset[Key(0, 3)].pixels)


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "ant").mkdir()
    for name in "ab":
        (tmp_path / "ant" / f"{name}.png").write_bytes(b"")
    dataset = AugmentedImages(FolderImages(tmp_path), augmentation("none", 32), seed=0)
    with pytest.raises(DataError, match=r"2 images in a row .* ant/b\.png"):
        dataset[Key(0, 1)]


def _gradient(width: int, height: int) -> Image.Image:
    """Red counts the columns and green the rows, from 0 to 240, so that a crop tells where it was."""
    x = torch.linspace(0, 240, width).expand(height, width)
    y = torch.linspace(0, 240, height)[:, None].expand(height, width)
    pixels = torch.stack([x, y, torch.zeros_like(x)], 2).round().to(torch.uint8)
    return Image.fromarray(pixels.numpy())


def test_the_papers_crop_has_8_to_100_percent_of_the_area() -> None:
    """Read off the gradient between two inner columns and rows, in which no interpolation meets an edge."""
    crop = augmentation("paper", 64).transforms[:-2]  # type: ignore[attr-defined]
    image, width, height = _gradient(300, 200), 300, 200
    areas, ratios, mirrored = [], [], 0
    torch.manual_seed(0)
    for _ in range(400):
        out = image
        for step in crop:
            out = step(out)
        pixels = torch.frombuffer(bytearray(out.tobytes()), dtype=torch.uint8).view(64, 64, 3).double()
        across = (pixels[32, 48, 0] - pixels[32, 16, 0]).item() / 32 * 64 / 240 * width
        down = (pixels[48, 32, 1] - pixels[16, 32, 1]).item() / 32 * 64 / 240 * height
        mirrored += across < 0
        areas.append(abs(across) * down / (width * height))
        ratios.append(abs(across) / down)
    assert 0.07 < min(areas) < 0.12
    assert 0.8 < max(areas) < 1.03
    assert 0.70 < min(ratios) < 0.80
    assert 1.25 < max(ratios) < 1.42
    assert 150 < mirrored < 250


def test_the_papers_interpolation_is_drawn() -> None:
    """Of noise each of the four leaves something else; a crop's place is known by the seed."""
    noise = Image.fromarray(torch.randint(0, 256, (200, 200, 3), dtype=torch.uint8).numpy())
    choice = augmentation("paper", 16).transforms[0]  # type: ignore[attr-defined]
    modes = [transform.interpolation.value for transform in choice.transforms]
    assert sorted(modes) == ["bicubic", "bilinear", "box", "nearest"]
    drawn = set()
    for seed in range(40):
        torch.manual_seed(seed)
        torch.multinomial(torch.ones(4) / 4, 1)
        state = torch.get_rng_state()
        variants = {}
        for transform in choice.transforms:
            torch.set_rng_state(state)
            variants[transform(noise).tobytes()] = transform.interpolation.value
        assert len(variants) == 4
        torch.manual_seed(seed)
        drawn.add(variants[choice(noise).tobytes()])
    assert drawn == set(modes)


def test_photometric_distortions_change_colours_and_not_places() -> None:
    jitter = augmentation("paper", 32).transforms[2]  # type: ignore[attr-defined]
    flat = Image.new("RGB", (32, 32), (100, 150, 200))
    torch.manual_seed(0)
    outs = [jitter(flat).getpixel((5, 7)) for _ in range(60)]
    assert len(set(outs)) > 50
    assert min(sum(out) for out in outs) < 300 < 600 < max(sum(out) for out in outs)


def test_bvlcs_crop_is_of_the_warped_image() -> None:
    """A 32 crop of an image warped to 37x37: whatever the image's form, 32/37 of it are seen each way."""
    image, transform = _gradient(300, 100), augmentation("bvlc", 32)
    torch.manual_seed(0)
    for _ in range(20):
        pixels = transform(image).double()
        for span in (pixels[0, 16, 24] - pixels[0, 16, 8], pixels[1, 24, 16] - pixels[1, 8, 16]):
            assert abs(span.item()) / 16 * 37 / 240 == pytest.approx(1, abs=0.05)


def test_an_unknown_augmentation_is_refused() -> None:
    with pytest.raises(ValueError, match="augmentation must be one of paper, bvlc, modern, none, got 'strong'"):
        augmentation("strong", 32)  # type: ignore[arg-type]

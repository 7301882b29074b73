"""Runs in this process: what they write, that a stopped one goes on as if it had not been, and how they fail."""

from __future__ import annotations

import csv
import io
import os
import shutil
import signal
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_same, message_of

pytest.importorskip("torchvision")
pytest.importorskip("PIL")
pytest.importorskip("safetensors")

from training_cases import CLASSES, SIZE, image_folder, in_fp64, recipe, settings, start, state_of

from googlenet_fused.data import FolderImages, open_images
from googlenet_fused.distributed import Processes
from googlenet_fused.models import googlenet
from googlenet_fused.training import Run, Stopped, TrainingError
from googlenet_fused.training import checkpoint as checkpoints
from googlenet_fused.training.history import events
from googlenet_fused.training.loop import CHECKPOINT, CURVES, TABLE
from googlenet_fused.training.network import build
from googlenet_fused.weights import Description, WeightsError, load_weights, read_description, read_state_dict


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def unbroken(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of 6 steps, 3 an epoch, validated after each epoch on images of its own."""
    folder = tmp_path_factory.mktemp("run")
    validation = image_folder(tmp_path_factory.mktemp("validation"), each=2, seed=1)
    run = start(folder / "run", images, validation=validation)
    run.run()
    return run


def test_a_run_writes_weights_that_say_what_they_are(unbroken: Run) -> None:
    path = unbroken.folder / "model.safetensors"
    described = read_description(path)
    assert described is not None
    source = "trained by googlenet-fused: recipe modern, 2 epochs, seed 0, on 12 images"
    assert described == Description("torchvision", 3, CLASSES, resize=37, crop=SIZE, source=source)
    model = googlenet("torchvision", weights=path, num_classes=3).eval()
    assert unbroken.averaged is not None
    for name, value in model.state_dict().items():
        assert value.equal(unbroken.averaged.module.state_dict()[name]), name


def test_a_run_writes_a_table_and_curves(unbroken: Run) -> None:
    with open(unbroken.folder / TABLE, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "3"), ("2", "6")]
    schedule = unbroken.settings.recipe.schedule
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.01 * schedule(step, 3, 6) for step in (2, 5)])
    assert all(0 <= float(row["val_top1"]) <= float(row["val_top5"]) == 100 for row in rows)
    assert (unbroken.folder / CURVES).read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(unbroken.folder)) == [CHECKPOINT, CURVES, TABLE, "model.safetensors"]


def test_the_same_run_gives_the_same_numbers_for_any_number_of_workers(unbroken: Run, images: Path, tmp_path: Path) -> None:
    again = start(tmp_path / "run", images, settings(workers=2))
    again.run()
    assert_same(state_of(again), state_of(unbroken))
    assert [epoch.train_loss for epoch in again.history] == [epoch.train_loss for epoch in unbroken.history]
    other = start(tmp_path / "other", images, settings(seed=1))
    assert_same(
        other.model.state_dict(), start(tmp_path / "third", images).model.state_dict()
    )  # the initial weights are shared
    other.run()
    assert not other.model.fc.weight.equal(unbroken.model.fc.weight)  # type: ignore[union-attr, operator, arg-type]


def test_shards_of_the_same_images_give_the_same_numbers(unbroken: Run, images: Path, tmp_path: Path) -> None:
    """In two files, their samples in the order of the folder's."""
    paths = sorted(images.rglob("*.png"))
    for number, part in enumerate((paths[:7], paths[7:])):
        with tarfile.open(tmp_path / f"part-{number}.tar", "w") as archive:
            for path in part:
                label = path.parent.name.encode()
                entry = tarfile.TarInfo(f"{path.parent.name}-{path.stem}.cls")
                entry.size = len(label)
                archive.addfile(entry, io.BytesIO(label))
                archive.add(path, f"{path.parent.name}-{path.stem}.png")
    (tmp_path / "run").mkdir()
    run = Run(settings(recipe(epochs=2)), open_images(tmp_path), None, tmp_path / "run")
    run.run()
    assert_same(state_of(run), state_of(unbroken))


@pytest.mark.parametrize(("number", "stop_at"), [(signal.SIGTERM, 2), (signal.SIGTERM, 3), (signal.SIGINT, 4)])
def test_a_stopped_run_goes_on_bit_for_bit(number: int, stop_at: int, unbroken: Run, images: Path, tmp_path: Path) -> None:
    """Stopped inside an epoch and at its end; between, other things draw from torch's generator."""
    broken = start(tmp_path, images)

    def show(what: str, done: float) -> None:
        if broken.step == stop_at:
            os.kill(os.getpid(), number)

    broken._show = show
    with pytest.raises(Stopped) as stopped:
        broken.run()
    assert stopped.value.signal == number
    assert broken.step == stop_at
    assert signal.getsignal(number) is not None
    torch.rand(7)
    resumed = start(tmp_path, images, resume=True)
    assert resumed.step == stop_at
    resumed.run()
    assert_same(state_of(resumed), state_of(unbroken))
    whole = [(epoch.step, epoch.lr, epoch.train_loss, epoch.train_top1) for epoch in unbroken.history]
    assert [(epoch.step, epoch.lr, epoch.train_loss, epoch.train_top1) for epoch in resumed.history] == whole


def test_handlers_of_signals_are_given_back(images: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    start(tmp_path, images, settings(recipe(epochs=1))).run()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_finished_run_is_resumed_to_nothing(unbroken: Run, images: Path) -> None:
    before = (unbroken.folder / "model.safetensors").read_bytes()
    again = start(unbroken.folder, images, resume=True)
    assert again.done
    again.run()
    assert (unbroken.folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seed": 1}, "seed"),
        ({"image_size": 33}, "image_size"),
        ({"dtype": "bf16"}, "dtype"),
        ({"accumulate": 2}, "accumulate"),
        ({"recipe": recipe(lr=0.02)}, "recipe.lr"),
        ({"recipe": recipe(epochs=3)}, "recipe.epochs"),
        ({"recipe": recipe("paper")}, "recipe.name"),
    ],
)
def test_a_run_is_not_resumed_as_another(changes: dict[str, Any], name: str, unbroken: Run, images: Path) -> None:
    with pytest.raises(TrainingError) as error:
        start(unbroken.folder, images, replace(settings(), **changes), resume=True)
    assert f" {name} = " in message_of(error)


def test_a_run_is_not_resumed_on_other_images(unbroken: Run, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"data = 12 images, 3 classes, .* now it is 15 images"):
        start(unbroken.folder, image_folder(tmp_path, each=5), resume=True)


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04", b"\x80\x02}q\x00."])
def test_a_checkpoint_that_is_none(content: bytes | None, images: Path, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / CHECKPOINT).write_bytes(content)
    with pytest.raises(TrainingError) as error:
        start(tmp_path, images, resume=True)
    assert str(tmp_path / CHECKPOINT) in message_of(error)


def test_a_checkpoint_cannot_run_code(images: Path, tmp_path: Path) -> None:
    torch.save({"format": 1, "step": os.system}, tmp_path / CHECKPOINT)
    with pytest.raises(TrainingError, match="is not a checkpoint"):
        start(tmp_path, images, resume=True)


def test_a_full_disk_leaves_the_old_checkpoint(unbroken: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = unbroken.folder / CHECKPOINT
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        unbroken._save()
    assert path.read_bytes() == before
    assert len(os.listdir(unbroken.folder)) == 4


def test_accumulated_batches_are_one_step(images: Path, tmp_path: Path) -> None:
    """Without batch norm and dropout a step of two halves is the whole one's, in fp64 to its rounding."""
    of = settings(recipe("bvlc", epochs=1, dropout=0.0), variant="bvlc")
    whole, halves = (in_fp64(start(tmp_path / str(n), images, replace(of, accumulate=n))) for n in (1, 2))
    initial = {name: value.clone() for name, value in whole.model.state_dict().items()}
    for run in (whole, halves):
        run.run()
    for name, value in whole.model.state_dict().items():
        assert not value.equal(initial[name]), name
        torch.testing.assert_close(halves.model.state_dict()[name], value, rtol=1e-9, atol=1e-11, msg=name)


def test_mixed_precision_keeps_weights_in_fp32(images: Path, tmp_path: Path) -> None:
    run = start(tmp_path, images, settings(recipe(epochs=1), dtype="bf16"))
    seen: set[torch.dtype] = set()
    run.model.inception5b.register_forward_hook(lambda *call: seen.add(call[-1].dtype))  # type: ignore[union-attr, operator]
    run.run()
    assert torch.bfloat16 in seen
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}


def test_the_scale_of_losses_is_resumed(images: Path, tmp_path: Path) -> None:
    of = settings(recipe(epochs=1), dtype="fp16")
    run = start(tmp_path, images, of)
    run.run()
    assert run.scaler.is_enabled()
    run.scaler.update(1024.0)
    run._save()
    assert start(tmp_path, images, of, resume=True).scaler.state_dict() == run.scaler.state_dict()


def test_processes_must_be_at_the_same_step(images: Path, tmp_path: Path) -> None:
    """As on machines that do not share the folder."""

    class Two(Processes):
        def gather_objects(self, value: Any) -> list[Any]:
            return [(6, value[1]), value]

    with pytest.raises(TrainingError, match=r"process 1 has other .* \(step 0 and 6\): all need .* the same folder"):
        start(tmp_path, images, processes=Two(1, 2))


def test_what_other_processes_cannot_read_is_named(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    run = start(tmp_path, images, say=lines.append)

    class Two(Processes):
        def gather_objects(self, value: Any) -> list[Any]:
            return [value, {"bee/1.png": "bee/1.png cannot be decoded"}]

    for name in ("all_reduce", "broadcast"):
        monkeypatch.setattr(torch.distributed, name, lambda *_: None)
    run.processes, run.step = Two(0, 2), 3
    run._totals += 1
    run._end_epoch(events(None, 0), 1.0, 3)
    assert lines[0] == "warning: bee/1.png cannot be decoded; the next image takes its place"
    assert run.history[0].unreadable == 1


def test_a_plain_network_and_a_fused_one_learn_the_same(unbroken: Run, images: Path, tmp_path: Path) -> None:
    plain = start(tmp_path, images, settings(backend=None))
    plain.run()
    assert not hasattr(plain.model, "fusion_report")
    losses = [[epoch.train_loss for epoch in run.history] for run in (plain, unbroken)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_unreadable_images_are_counted_and_remembered(images: Path, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images")
    (root / "ant" / "0.png").write_bytes(b"no image")
    lines: list[str] = []
    run = start(tmp_path / "run", root, settings(recipe(epochs=1)), say=lines.append)
    run.run()
    assert list(run.unreadable) == ["ant/0.png"]
    assert run.history[-1].unreadable == 1
    assert sum("ant/0.png" in line for line in lines) == 1
    assert start(tmp_path / "run", root, settings(recipe(epochs=1)), resume=True).unreadable == run.unreadable
    with pytest.raises(TrainingError, match=r"1 images cannot be read, more than max_corrupt = 0; .*ant/0\.png"):
        start(tmp_path / "other", root, settings(max_corrupt=0)).run()


def test_validation_leaves_out_what_cannot_be_read(images: Path, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "validation", each=2, seed=1)
    (root / "ant" / "0.png").write_bytes(b"no image")
    lines: list[str] = []
    run = start(tmp_path / "run", images, settings(recipe(epochs=1)), root, say=lines.append)
    run.run()
    assert list(run.unreadable) == ["validation: ant/0.png"]
    assert "ant/0.png" in lines[0]
    assert lines[0].endswith("it is left out")
    top1 = run.history[0].val_top1
    assert top1 is not None
    assert 5 * top1 / 100 == pytest.approx(round(5 * top1 / 100))
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(TrainingError) as error:
        start(tmp_path / "other", images, settings(recipe(epochs=1), workers=1), root).run()
    assert message_of(error).startswith("none of the 6 images for validation can be read: ")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_of_unreadable_images(workers: int, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", each=2)
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(TrainingError) as error:
        start(tmp_path / "run", root, settings(workers=workers)).run()
    assert message_of(error).startswith("6 images in a row cannot be read, the first of them ")


def test_a_loss_that_is_not_finite_ends_the_run(images: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"the loss is (nan|inf) at step \d: begin again in another folder, .* below 1e\+20"
    ):
        start(tmp_path, images, settings(recipe(lr=1e20))).run()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"recipe": recipe(batch_size=13)}, "batch_size must be at most 12"),
        ({"accumulate": 3}, "batch_size must be a multiple of 3"),
    ],
)
def test_settings_that_do_not_fit_the_images(changes: dict[str, Any], says: str, images: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as error:
        start(tmp_path, images, replace(settings(), **changes))
    assert says in message_of(error)


def test_validation_needs_the_same_classes(images: Path, tmp_path: Path) -> None:
    other = image_folder(tmp_path / "other", each=1)
    (other / "cat").rename(other / "cow")
    with pytest.raises(TrainingError, match="lack 'cat' and have 'cow', which is not learned"):
        start(tmp_path / "run", images, validation=other)
    shutil.rmtree(other / "cow")
    with pytest.raises(TrainingError, match="the former lack 'cat'; both need"):
        start(tmp_path / "run", images, validation=other)
    with pytest.raises(TrainingError, match="the former have 'cat', which is not learned; both need"):
        start(tmp_path / "run", other, settings(recipe(batch_size=2)), validation=images)


@pytest.mark.parametrize(
    ("name", "value"),
    [("image_size", 14), ("accumulate", 0), ("checkpoint_steps", 0), ("workers", -1), ("max_corrupt", -1), ("variant", "v3"),
     ("dtype", "float16")],
)  # fmt: skip
def test_settings_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be"):
        settings(**{name: value})


@pytest.mark.slow
def test_tensorboard_gets_the_table(unbroken: Run, images: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = start(tmp_path, images, settings(recipe(epochs=1), tensorboard=True))
    run.run()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    ((event,)) = found.Scalars("train_loss")
    assert (event.step, event.value) == (3, pytest.approx(run.history[0].train_loss))


@pytest.mark.parametrize(
    ("variant", "size", "parameters"),
    [("bvlc", 224, 13_378_280), ("bvlc", 96, 6_998_552), ("torchvision", 224, 13_004_888), ("torchvision", 64, 13_004_888)],
)
def test_the_trained_networks_are_the_published_ones(variant: Any, size: int, parameters: int) -> None:
    """Parameter counts with 1000 classes; the paper's auxiliary heads only for the images that they are defined for."""
    model = build(variant, 1000, size, recipe(), 0, backend=None)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_checkpoints_hold_no_state_of_chance(unbroken: Run, images: Path) -> None:
    found = checkpoints.load(unbroken.folder / CHECKPOINT, unbroken.settings.lasting(FolderImages(images)))
    assert found.step == 6
    assert not any("rng" in name for name in vars(found))


def test_weights_of_a_run_load_strictly_with_their_heads(unbroken: Run) -> None:
    model = googlenet("torchvision", num_classes=3, aux_logits=True, init_weights=False)
    loaded = load_weights(model, unbroken.folder / "model.safetensors")
    assert not loaded.missing_keys
    assert not loaded.unexpected_keys


def test_a_stop_during_validation_loses_nothing(unbroken: Run, images: Path, tmp_path: Path) -> None:
    """The checkpoint is there before validation; a run that is killed in it validates first when it goes on."""
    validation = image_folder(tmp_path / "validation", each=2, seed=1)
    killed = start(tmp_path / "run", images, validation=validation)

    def kill(what: str, done: float) -> None:
        if "validating" in what and killed.step == 3:
            raise MemoryError

    killed._show = kill
    with pytest.raises(MemoryError):
        killed.run()
    lines: list[str] = []
    resumed = start(tmp_path / "run", images, validation=validation, resume=True, say=lines.append)
    assert resumed.step == 3
    assert not resumed.history
    resumed.run()
    assert lines[0].startswith("epoch 1/2: ")
    assert_same(state_of(resumed), state_of(unbroken))
    for epoch, whole in zip(resumed.history, unbroken.history, strict=True):
        for name in ("epoch", "lr", "train_loss", "train_top1", "val_loss", "val_top1"):
            assert getattr(epoch, name) == getattr(whole, name), name


def test_a_batch_of_one_image_is_said_to_be_too_small_for_batch_norm(images: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="batch norm needs more than one image in each batch"):
        start(tmp_path, images, settings(recipe(batch_size=2), accumulate=2)).run()


def test_a_signal_after_the_last_step_is_remembered(images: Path, tmp_path: Path) -> None:
    """The run ends; whoever would start another one learns that it should not."""

    def say(line: str) -> None:
        if line.startswith("epoch 1/1"):
            os.kill(os.getpid(), signal.SIGTERM)

    run = start(tmp_path, images, settings(recipe(epochs=1)), say=say)
    assert run.run().exists()
    assert run.done
    assert run.told == signal.SIGTERM


def test_a_checkpoint_is_not_taken_for_weights(unbroken: Run) -> None:
    with pytest.raises(WeightsError, match=r"checkpoint\.pt is the checkpoint of a training run.* model\.safetensors"):
        read_state_dict(unbroken.folder / CHECKPOINT)

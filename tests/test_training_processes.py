"""Runs as users start them: killed and resumed, on two processes, and from the command line to an evaluated network."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_same

pytest.importorskip("torchvision")
pytest.importorskip("PIL")
pytest.importorskip("safetensors")
pytest.importorskip("rich")

from training_cases import image_folder, recipe

from googlenet_fused.cli import main
from googlenet_fused.training.network import build

ROOT = Path(__file__).parents[1]
SMALL = ("--image-size", "32", "--batch-size", "4", "--lr", "0.01", "--workers", "0")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "googlenet_fused", "train", *SMALL, *map(str, arguments)]


def finish(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=300)


def numbers_of(folder: Path) -> dict[str, Any]:
    """The whole checkpoint but for what depends on the clock."""
    found: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    for epoch in found["history"]:
        del epoch["seconds"], epoch["images_per_second"]
    return found


@pytest.mark.slow
def test_a_killed_run_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    """SIGKILL in the middle of an epoch: the checkpoint, all of it, and the weights come out bit for bit the same."""
    images = image_folder(tmp_path / "images", each=12)
    of = ("--data", images, "--epochs", 3, "--checkpoint-steps", 2)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run = finish(command(*of, "--output", whole))
    assert run.returncode == 0, run.stderr

    process = subprocess.Popen(command(*of, "--output", killed), env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 0 < numbers_of(killed)["step"] < 27
    assert not (killed / "model.safetensors").exists()

    run = finish(command(*of, "--output", killed))
    assert run.returncode == 1
    assert "--resume" in run.stderr
    run = finish(command(*of, "--output", killed, "--resume"))
    assert run.returncode == 0, run.stderr
    assert "resumed at step" in run.stderr
    assert json.dumps(numbers_of(killed)["history"]) == json.dumps(numbers_of(whole)["history"])
    one, other = numbers_of(killed), numbers_of(whole)
    for part in ("model", "averaged", "optimiser"):
        assert_same(one[part], other[part], label=part)
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_two_processes_learn_what_one_does_with_the_doubled_batch(tmp_path: Path) -> None:
    """Of the paper's network without dropout, in fp64 to its rounding; batch norm and dropout differ by process."""
    images = image_folder(tmp_path / "images", each=6)
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from pathlib import Path\n"
        "from training_cases import in_fp64, recipe, settings, start\n"
        "from googlenet_fused.distributed import processes\n"
        "with processes('cpu') as these:\n"
        "    of = settings(recipe('bvlc', dropout=0.0, batch_size=6, epochs=2), variant='bvlc')\n"
        "    run = in_fp64(start(Path(sys.argv[2]), Path(sys.argv[1]), of, Path(sys.argv[1]), processes=these))\n"
        "    run.run()\n"
        "    assert run.processes.world == int(sys.argv[3])\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for count, start in ((1, [sys.executable]), (2, launch)):
        run = finish([*start, str(script), str(images), str(tmp_path / str(count)), str(count)])
        assert run.returncode == 0, run.stderr
    one, two = (numbers_of(tmp_path / name) for name in "12")
    assert one["step"] == two["step"] == 6
    initial = build("bvlc", 3, 32, recipe("bvlc", dropout=0.0), 0).state_dict()
    for name, value in one["model"].items():
        assert not value.equal(initial[name].double()), name
        torch.testing.assert_close(two["model"][name], value, rtol=1e-9, atol=1e-11, msg=name)
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a == pytest.approx(b, rel=1e-6)


@pytest.mark.slow
def test_from_a_folder_to_an_evaluated_model_with_three_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, held_out = image_folder(tmp_path / "train"), image_folder(tmp_path / "held-out", each=2, seed=1)
    output = tmp_path / "run"
    assert main(["train", *SMALL, "--data", str(train), "--val", str(held_out), "--epochs", "1", "--output", str(output)]) == 0
    weights = output / "model.safetensors"
    out, err = capsys.readouterr()
    assert str(weights) in out
    assert "epoch 1/1: train loss" in err
    assert main(["evaluate", str(weights), "--data", str(held_out), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["images"] == 6
    assert "the top-5 error says nothing of networks with 3 classes" in err
    assert main(["classify", str(held_out / "ant" / "0.png"), "--weights", str(weights), "--json"]) == 0
    classified = json.loads(capsys.readouterr().out)
    assert {place["label"] for place in classified["images"][0]["top"]} == {"ant", "bee", "cat"}


@pytest.mark.slow
def test_several_models_share_their_initial_weights_and_a_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, output = image_folder(tmp_path / "images", each=2), tmp_path / "runs"
    of = ["train", *SMALL, "--data", str(images), "--epochs", "1", "--backend", "none"]
    assert main([*of, "--models", "2", "--output", str(output)]) == 0
    listed = output / "weights.txt"
    assert listed.read_text() == "model-1/model.safetensors\nmodel-2/model.safetensors\n"
    assert f"--weights-list {listed}" in capsys.readouterr().out
    one, two = (numbers_of(output / name) for name in ("model-1", "model-2"))
    assert (one["settings"]["seed"], two["settings"]["seed"]) == ("0", "1")
    assert one["settings"]["initial_seed"] == two["settings"]["initial_seed"]
    assert not one["model"]["fc.weight"].equal(two["model"]["fc.weight"])

    other = tmp_path / "other"
    other.mkdir()
    (other / "list.txt").write_text("# two networks\na/model.safetensors\nb/model.safetensors\n")
    assert main([*of, "--weights-list", str(other / "list.txt")]) == 0
    assert numbers_of(other / "b")["model"]["fc.weight"].equal(two["model"]["fc.weight"])
    capsys.readouterr()
    assert main(["evaluate", "--weights-list", str(listed), "--data", str(images), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["models"]) == 2


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What one run of the command that fails says; its exit code must not be 0."""
    assert main(["train", *SMALL, *arguments]) != 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    return line


def test_bad_input_is_named_before_anything_is_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, output = image_folder(tmp_path / "images", each=1), tmp_path / "run"
    data = ("--data", str(images), "--output", str(output))
    for arguments, says in (
        ((), "--data"),
        (("--data", str(tmp_path / "missing")), "no such folder"),
        (("--data", str(images / "ant")), "no class folders"),
        ((*data, "--val", str(tmp_path / "missing")), "no such folder"),
        ((*data, "--lr", "0"), "argument --lr: must be a positive number, got '0'"),
        ((*data, "--workers", "-1"), "argument --workers"),
        ((*data, "--variant", "v3"), "argument --variant"),
        ((*data, "--recipe", "best"), "argument --recipe"),
        ((*data, "--backend", "fast"), "argument --backend"),
        ((*data, "--resume"), "there is no run in"),
        ((*data, "--image-size", "14"), "image_size must be at least 15, got 14"),
        ((*data, "--batch-size", "99"), "batch_size must be at most 3"),
        ((*data, "--batch-size", "3", "--accumulate", "2"), "batch_size must be a multiple of 2"),
        (("--data", str(images), "--weights-list", str(tmp_path / "missing.txt")), "argument --weights-list"),
        ((*data, "--models", "2", "--weights-list", "x"), "not allowed with"),
    ):
        assert says in failure(capsys, *arguments)
    (tmp_path / "list.txt").write_text("a/model.safetensors\na/model.safetensors\n")
    twice = ("--data", str(images), "--weights-list", str(tmp_path / "list.txt"))
    assert f"names {tmp_path / 'a' / 'model.safetensors'} more than once" in failure(capsys, *twice)
    (tmp_path / "runs" / "model-2").mkdir(parents=True)
    (tmp_path / "runs" / "model-2" / "checkpoint.pt").touch()
    several = ("--data", str(images), "--batch-size", "3", "--models", "2", "--output", str(tmp_path / "runs"))
    assert f"{tmp_path / 'runs' / 'model-2'} holds a run already" in failure(capsys, *several)
    assert not (tmp_path / "runs" / "model-1" / "checkpoint.pt").exists()
    (tmp_path / "file").write_text("")
    assert "argument --output" in failure(capsys, "--data", str(images), "--output", str(tmp_path / "file" / "run"))
    assert not (output / "checkpoint.pt").exists()


def test_a_failure_late_in_a_run_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, output = image_folder(tmp_path / "images", each=2), tmp_path / "run"
    arguments = ("--data", str(images), "--output", str(output), "--epochs", "1")
    (output / "model.safetensors").mkdir(parents=True)
    assert f"cannot write {output / 'model.safetensors'}" in failure(capsys, *arguments)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr("googlenet_fused.training.loop.Run.run", full)
    assert "give --accumulate, or a smaller --batch-size" in failure(capsys, *arguments, "--resume")


def test_the_commands_choices_are_the_packages() -> None:
    from googlenet_fused.cli import train
    from googlenet_fused.training import RECIPES
    from googlenet_fused.training.augmentation import AUGMENTATIONS

    assert set(train.RECIPES) == set(RECIPES)
    assert set(train.AUGMENTATIONS) == set(AUGMENTATIONS)


PROGRAM = """
import os, signal, sys, threading, time
from pathlib import Path
from training_cases import image_folder, recipe, settings
import googlenet_fused.training.loop as loop
from googlenet_fused.data import FolderImages
from googlenet_fused.distributed import processes
from googlenet_fused.training import Run, Stopped

folder, what = Path(sys.argv[1]), sys.argv[2]
validate = loop.validate

class Slow(FolderImages):
    def load(self, index):
        time.sleep(0.3)
        return super().load(index)

def broken(*_, **__):
    raise RuntimeError("a defect")

def told(*arguments, **options):
    threading.Timer(0.5, os.killpg, (os.getpgrp(), signal.SIGTERM)).start()
    return validate(*arguments, **options)

if __name__ == "__main__":
    loop.validate = {"defect": broken, "sigterm": told}[what]
    with processes("cpu") as these:
        images, of = image_folder(folder / f"images{these.rank}"), settings(recipe(epochs=2), workers=2)
        run = Run(of, FolderImages(images), Slow(images), folder, processes=these)
        try:
            run.run()
        except Stopped as stopped:
            sys.exit(f"stopped at step {run.step}")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "count", "says"),
    [
        ("defect", 1, "RuntimeError: a defect"),
        ("defect", 2, "RuntimeError: a defect"),
        ("sigterm", 1, "stopped at step 3"),
        ("sigterm", 2, "stopped at step 3"),
    ],
)
def test_workers_end_with_the_run_and_not_before(what: str, count: int, says: str, tmp_path: Path) -> None:
    """An error that nobody expects, and SIGTERM to the whole group of processes during validation."""
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    process = subprocess.run(
        [sys.executable, *torchrun, str(program), str(tmp_path), what],
        env={**environment(), "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=240,
        start_new_session=True,
    )
    assert process.returncode == 1
    lines = process.stderr.strip().splitlines()
    if count == 1:
        assert lines[-1] == says
    elif what == "sigterm":
        assert lines.count(says) == count
    else:  # the first that fails may be the end of the others
        assert any(line.endswith(says) for line in lines)


@pytest.mark.slow
def test_few_images_are_learned_from_in_small_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With no option but the data, as in the README; the learning rate follows the batch size."""
    images, output = image_folder(tmp_path / "images", each=6), tmp_path / "run"
    of = ["train", "--data", str(images), "--image-size", "32", "--epochs", "1", "--workers", "0", "--output", str(output)]
    assert main(of) == 0
    err = capsys.readouterr().err
    assert "batches of 4, not 128 as in the recipe, since there are 18 images" in err
    assert "4 steps of 4, lr 0.003125" in err

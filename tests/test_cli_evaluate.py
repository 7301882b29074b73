"""The command evaluate, on real networks with images of 32x32: results, files, and one-line errors."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("PIL")
pytest.importorskip("torchvision")
pytest.importorskip("skimage")
pytest.importorskip("safetensors")

from googlenet_fused import cli, crops, evaluation, googlenet, progress
from googlenet_fused.cli import evaluate as command
from googlenet_fused.cli import main
from googlenet_fused.crops import views
from googlenet_fused.evaluation import engine
from googlenet_fused.images import load_image, sample_photographs
from googlenet_fused.preparation import PREPARATIONS
from googlenet_fused.randomize import calibrate_batch_norm, randomize_
from googlenet_fused.weights import Description, save_described

CROP, RESIZE = 32, 36
NAMES = ("astronaut", "chelsea", "coffee", "fifth", "rocket", "sixth", "seventh")
"""Of the classifier; there are pictures of four."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each of four photographs, and its middle."""
    folder = tmp_path_factory.mktemp("data")
    for name, path in sample_photographs().items():
        image = load_image(path).resize((90, 60))
        (folder / name).mkdir()
        image.save(folder / name / "whole.png")
        image.crop((8, 2, 80, 58)).save(folder / name / "middle.png")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, data: Path) -> list[Path]:
    """Two networks fitted to 1 and 10 crops of the data, the second with its classes in another order, and as a plain file."""
    folder = tmp_path_factory.mktemp("weights")
    pictures = [load_image(path) for path in sorted(data.glob("*/*.png"))]
    images = [views(picture, protocol, CROP, RESIZE) for picture in pictures for protocol in ("1", "10")]
    x = PREPARATIONS["torchvision"](torch.cat(images))
    found = []
    for seed in (1, 2):
        network = calibrate_batch_norm(randomize_(googlenet(num_classes=7, aux_logits=False, init_weights=False), seed), x)
        features: list[torch.Tensor] = []
        hook = network.fc.register_forward_pre_hook(lambda _, inputs, into=features: into.append(inputs[0]))
        with torch.no_grad():
            network.eval()(x)
            hook.remove()
            centred = (features[0] - features[0].mean(0)).double()
            answers = 8 * torch.eye(4).double().repeat_interleave(22, 0)
            ridge = torch.eye(len(centred)).double() * centred.square().sum(1).mean() / 100
            fitted = (centred.T @ torch.linalg.solve(centred @ centred.T + ridge, answers)).T.float()  # [4, 1024]
            network.fc.weight.zero_()
            network.fc.weight[[NAMES.index(name) for name in sample_photographs()]] = fitted
            network.fc.bias.copy_(-network.fc.weight @ features[0].mean(0))
        path = folder / f"seed{seed}.safetensors"
        save_described(path, network.state_dict(), Description("torchvision", 7, NAMES, resize=RESIZE, crop=CROP))
        found.append(path)
    path = folder / "other.safetensors"
    save_described(path, network.state_dict(), Description("torchvision", 7, NAMES[::-1], resize=RESIZE, crop=CROP))
    torch.save(network.state_dict(), folder / "plain.pth")
    return [*found, path, folder / "plain.pth"]


def result(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["evaluate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def error(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """The exit code and the one line on standard error that is an error; nothing may be on standard output."""
    code = main(["evaluate", *map(str, arguments)])
    said = capsys.readouterr()
    assert said.out == ""
    lines = [line for line in said.err.splitlines() if line.startswith("googlenet-fused: error: ")]
    assert all(line.startswith("googlenet-fused: ") for line in said.err.splitlines()), said.err
    assert len(lines) == 1
    return code, lines[0].removeprefix("googlenet-fused: error: ")


def test_a_network_that_knows_its_classes_makes_no_error(
    data: Path, weights: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(weights[0]), "--data", str(data), "--crops", "1", "10", "--paper"]) == 0
    said = capsys.readouterr().out
    assert "8 images of 4 classes" in said
    lines = [line.split() for line in said.splitlines()]
    words = {word for line in lines for word in line}
    assert words >= {"models", "crops", "cost", "top-5", "compared", "base", "top-1", "paper"}
    assert ["1", "1", "1", "0.00", "%", "base", "0.00", "%", "10.07", "%"] in lines
    assert ["1", "10", "10", "0.00", "%", "+0.00", "%", "0.00", "%", "9.15", "%"] in lines
    assert "Table 3" in said


def test_several_networks_are_an_ensemble(
    data: Path, weights: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = tmp_path / "few"
    shutil.copytree(data / "coffee", few / "rocket")  # a wrong class, so that there are errors
    shutil.copytree(data / "chelsea", few / "chelsea")
    (tmp_path / "list.txt").write_text(f"# the second\n{weights[1]}\n")
    output, predictions = tmp_path / "out" / "deep", tmp_path / "p.csv"
    arguments = [weights[0], "--weights-list", tmp_path / "list.txt", "--data", few, "--crops", 144, 1]
    found = result(capsys, *arguments, "--output", output, "--predictions", predictions)
    rows = found["rows"]
    assert [(row["name"], row["models"], row["crops"], row["cost"]) for row in rows] == [
        ("seed1", 1, 1, 1),
        ("seed2", 1, 1, 1),
        ("ensemble", 2, 1, 2),
        ("seed1", 1, 144, 144),
        ("seed2", 1, 144, 144),
        ("ensemble", 2, 144, 288),
    ]
    assert {row["top1_error"] for row in rows[:3]} == {50.0}
    assert [row["compared_to_base"] for row in rows] == [None, *(row["top5_error"] - rows[0]["top5_error"] for row in rows[1:])]
    assert [model["file"] for model in found["models"]] == list(map(str, weights[:2]))
    assert found["models"][0]["preparation"] == str(PREPARATIONS["torchvision"])
    with open(predictions, newline="") as file:
        table = list(csv.DictReader(file))
    for protocol in ("1", "144"):
        ranks = [int(row["rank"]) for row in table if row["crops"] == protocol]
        row = next(row for row in rows if (row["name"], row["crops"]) == ("ensemble", int(protocol)))
        assert (row["images"], row["top1_correct"], row["top5_correct"]) == (4, ranks.count(1), sum(r <= 5 for r in ranks))
    assert {row["top1_name"] for row in table if row["image"].startswith("rocket")} == {"coffee"}
    assert found["files"] == [str(predictions), str(output / "evaluation.json"), str(output / "evaluation.png")]
    written = json.loads((output / "evaluation.json").read_text())
    assert written == {name: value for name, value in found.items() if name != "files"}
    assert (output / "evaluation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_results_are_the_same_however_the_work_is_divided(data: Path, weights: list[Path], tmp_path: Path) -> None:
    """The real networks, whose last bits depend on how many images they are given at once."""
    arguments = [
        str(weights[0]),
        str(weights[1]),
        "--data",
        str(data),
        "--crops",
        "1",
        "10",
        "--device",
        "cpu",
        "--predictions",
    ]
    for at, options in enumerate((["--batch-size", "1"], ["--batch-size", "3"], ["--batch-size", "8", "--workers", "2"])):
        assert main(["evaluate", *arguments, str(tmp_path / f"{at}.csv"), *options]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "googlenet_fused"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [*torchrun, "evaluate", *arguments, str(tmp_path / "3.csv"), "--workers", "1"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ensemble") == 2  # once for each protocol: only the first process speaks
    files = [(tmp_path / f"{at}.csv").read_bytes() for at in range(4)]
    assert len(files[0].splitlines()) == 17
    assert files == [files[0]] * 4


def test_images_that_cannot_be_read(
    data: Path, weights: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    for name in ("coffee", "rocket"):
        (folder / name / "damaged.png").write_bytes((data / name / "whole.png").read_bytes()[:3000])
    code, said = error(capsys, weights[0], "--data", folder, "--max-corrupt", 1)
    assert code == 1
    assert "2 images cannot be read, where at most 1 may be left out (max_corrupt)" in said
    assert "rocket/damaged.png" in said
    assert main(["evaluate", str(weights[0]), "--data", str(folder), "--max-corrupt", "2", "--json"]) == 0
    output = capsys.readouterr()
    found = json.loads(output.out)
    assert [Path(each["image"]).name for each in found["corrupt"]] == ["damaged.png"] * 2
    assert found["rows"][0]["images"] == 8
    assert output.err.count("warning: left out: ") == 2
    assert "warning: 2 images of 10 could not be read and left out of the figures" in output.err


def test_what_cannot_be_evaluated(data: Path, weights: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, _, other, plain = weights
    (tmp_path / "empty").mkdir()
    (tmp_path / "strange" / "dog").mkdir(parents=True)
    shutil.copy(data / "coffee" / "whole.png", tmp_path / "strange" / "dog")
    (tmp_path / "list.txt").write_text("gone.pth\n")
    for arguments, message in (
        ((first, "--data", tmp_path / "gone"), "there is no such folder"),
        ((first, "--data", tmp_path / "empty"), "holds no class folders"),
        ((tmp_path / "gone.pth", "--data", data), "gone.pth: there is no such file"),
        (("--weights-list", tmp_path / "list.txt", "--data", data), "list.txt, line 1: there is no file"),
        ((first, "--data", tmp_path / "strange"), "1 of the data's 1 classes are unknown to the network seed1: 'dog'"),
        ((plain, "--data", data), "the data has 4 classes ('astronaut', 'chelsea', 'coffee', 'rocket') and the classifier 7"),
        ((first, other, "--data", data), "class 0 is 'astronaut' for seed1 and 'seventh' for other"),
        ((first, "--data", data, "--variant", "bvlc"), "is for the 'torchvision' variant, not for 'bvlc'"),
        ((first, "--data", data, "--predictions", tmp_path / "p.txt"), "predictions are written to .csv or .parquet files"),
        ((first, "--data", data, "--backend", "cuda", "--device", "cpu"), "backend 'cuda'"),
    ):
        code, said = error(capsys, *arguments)
        assert code == 1
        assert message in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "x"], "argument MODEL: name at least one file of weights, or default, or give --weights-list"),
        (["a.pth"], "the following arguments are required: --data"),
        (["a.pth", "--data", "x", "--crops", "12"], "argument --crops: invalid choice: '12'"),
        (["a.pth", "--data", "x", "--max-corrupt", "-1"], "argument --max-corrupt: "),
        (["a.pth", "--data", "x", "--workers", "two"], "argument --workers: must be a whole number from 0 on, got 'two'"),
        (["a.pth", "--data", "x", "--variant", "bvlc", "--transform-input"], "belongs to --variant torchvision, not bvlc"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = error(capsys, *arguments)
    assert code == 2
    assert message in said


def test_the_published_weights_without_a_network(
    data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    code = main(["evaluate", "default", "--data", str(data)])
    said = capsys.readouterr()
    assert (code, said.out) == (1, "")
    assert "no network" in said.err
    assert "Traceback" not in said.err
    assert command in cli.COMMANDS


def test_progress_is_said_where_no_bar_is_shown(
    data: Path, weights: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "NEWS_EVERY", 0.0)
    assert main(["evaluate", str(weights[0]), "--data", str(data), "--views-per-call", "5", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if "img/s" in line]
    assert [line.split(" images, ")[0] for line in lines] == ["googlenet-fused: 1 crop: 8/8"]
    assert lines[0].endswith(" img/s, 100 %, 0:00:00 left")
    assert said.out.splitlines()[-1] == f"wrote {tmp_path}/evaluation.json and {tmp_path}/evaluation.png"


def test_memory_that_does_not_suffice(
    data: Path, weights: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(evaluation, "evaluate", full)
    assert error(capsys, weights[0], "--data", data) == (
        1,
        "the device's memory does not suffice: give fewer --views-per-call",
    )


def test_the_command_and_the_package_have_one_mind(capsys: pytest.CaptureFixture[str]) -> None:
    assert crops.PROTOCOLS == command.CROPS
    assert tuple(evaluation.DTYPES) == command.DTYPES
    assert main(["evaluate", "--help"]) == 0
    views_a_call = engine.VIEWS_A_CALL
    assert f"default: {views_a_call['cuda']} on a GPU, {views_a_call['cpu']} on a CPU" in " ".join(
        capsys.readouterr().out.split()
    )


def test_classes_by_order(data: Path, weights: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for at, name in enumerate(NAMES):
        source = data / name if (data / name).exists() else data / "coffee"
        shutil.copytree(source, tmp_path / "data" / f"n{at}")
    found = result(capsys, weights[0], "--data", tmp_path / "data", "--by-order")
    assert (found["rows"][0]["images"], found["rows"][0]["top1_correct"]) == (14, 8)
    code, said = error(capsys, weights[0], "--data", tmp_path / "data")
    assert code == 1
    assert "7 of the data's 7 classes are unknown" in said
    assert "match them by order" in said


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/r/model-1/m.st", "/r/model-2/m.st"], ["model-1", "model-2"]),
        (["/r/a/x/m.st", "/r/b/y/m.st", "/r/b/x/m.st"], ["a/x", "b/y", "b/x"]),
        (["/r/m.st", "/r/a/m.st"], ["m.st", "a/m.st"]),
        (["/a/m.st", "/a/m.st"], ["/a/m.st", "/a/m.st"]),
    ],
)
def test_networks_of_one_name_are_told_apart_by_their_folders(paths: list[str], names: list[str]) -> None:
    assert command._told_apart(paths) == names

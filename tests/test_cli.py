"""The command line, through ``main(argv)`` and once as a process: results, exit codes, and one-line errors."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("PIL")
pytest.importorskip("torchvision")
pytest.importorskip("skimage")

from googlenet_fused import FusionMismatch, cli, demo, googlenet
from googlenet_fused.cli import main
from googlenet_fused.images import sample_photographs

COMMANDS = ("doctor", "demo", "classify", "bench")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network and an empty cache."""

    def unreachable(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights of the right kind."""
    path = tmp_path_factory.mktemp("weights") / "googlenet.pth"
    torch.save(demo.seeded_network().state_dict(), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two photographs, a damaged one and a text file."""
    samples = sample_photographs()
    folder = tmp_path / "photographs"
    folder.mkdir()
    for name in ("chelsea", "coffee"):
        shutil.copy(samples[name], folder)
    (folder / "damaged.jpg").write_bytes(samples["rocket"].read_bytes()[:20_000])
    (folder / "notes.txt").write_text("not an image")
    return folder


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines on standard error; anything else than one-line errors and warnings fails."""
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith(("googlenet-fused: ", "Downloading ")) for line in lines), lines
    return [line for line in lines if line.startswith("googlenet-fused: error: ")]


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
        assert f"googlenet-fused {command}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"googlenet-fused {cli.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "COMMAND"),
        (["paint"], "invalid choice: 'paint'"),
        (["classify"], "IMAGE"),
        (["classify", "a.png", "--top", "0"], "must be a positive whole number, got '0'"),
        (["classify", "a.png", "--variant", "vgg"], "invalid choice: 'vgg'"),
        (["classify", "a.png", "--backend", "abacus"], "unknown backend 'abacus': choose one of 'auto'"),
        (["bench", "--batch", "many"], "got 'many'"),
        (["bench", "--dtype", "fp8"], "invalid choice: 'fp8'"),
        (["bench", "--backend", "abacus"], "unknown backend 'abacus'"),
        (["bench", "--threads", "-1"], "got '-1'"),
        (["doctor", "--yaml"], "--yaml"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str], argv: list[str], said: str) -> None:
    assert main(argv) == 2
    (line,) = errors(capsys)
    assert said in line


def test_doctor_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backends"]["reference"] == {
        "available": True,
        "reason": None,
        "description": facts["backends"]["reference"]["description"],
    }
    assert facts["versions"]["torch"]


def test_doctor_as_text_without_optional_packages(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchvision", "matplotlib", "rich"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["doctor"]) == 0
    captured = capsys.readouterr()
    assert "reference" in captured.out
    assert "torchvision" in captured.out
    assert captured.err == ""


def test_classify_goes_on_after_a_bad_file(capsys: pytest.CaptureFixture[str], folder: Path, trained: Path) -> None:
    missing = folder / "missing.png"
    assert main(["classify", str(missing), str(folder), str(folder / "notes.txt"), "--weights", str(trained), "--json"]) == 1
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert [Path(image["image"]).name for image in document["images"]] == ["chelsea.png", "coffee.png"]
    assert [Path(error["image"]).name for error in document["errors"]] == ["missing.png", "damaged.jpg", "notes.txt"]
    assert document["weights"] == str(trained)
    for image in document["images"]:
        probabilities = [place["probability"] for place in image["top"]]
        assert len(probabilities) == 5
        assert probabilities == sorted(probabilities, reverse=True)
    warnings = [line for line in captured.err.splitlines() if line.startswith("googlenet-fused: warning: ")]
    errors = [line for line in captured.err.splitlines() if line.startswith("googlenet-fused: error: ")]
    assert len(errors) == 3
    assert len(warnings) == 1
    assert "is not the published file" in warnings[0]
    assert len(captured.err.splitlines()) == 4


def test_classify_transforms_the_input_when_told(capsys: pytest.CaptureFixture[str], folder: Path, trained: Path) -> None:
    def probabilities(*options: str) -> list[float]:
        main(["classify", str(folder / "chelsea.png"), "--weights", str(trained), "--json", *options])
        return [place["probability"] for place in json.loads(capsys.readouterr().out)["images"][0]["top"]]

    assert probabilities() != probabilities("--transform-input")
    assert main(["classify", str(folder), "--weights", str(trained), "--variant", "bvlc", "--transform-input"]) == 2
    assert "--transform-input: belongs to --variant torchvision" in capsys.readouterr().err


def test_classify_names_classes_and_backends_agree(capsys: pytest.CaptureFixture[str], folder: Path, trained: Path) -> None:
    outputs = []
    for backend in ("auto", "reference"):
        image = str(folder / "chelsea.png")
        assert main(["classify", image, "--weights", str(trained), "--top", "3", "--backend", backend]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    name, *places = outputs[0].splitlines()
    assert name == str(folder / "chelsea.png")
    assert len(places) == 3
    assert not any("class " in place for place in places), "labels, not numbers"


def test_classify_says_loudly_that_random_weights_mean_nothing(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert main(["classify", str(folder / "coffee.png"), "--weights", "random", "--variant", "bvlc", "--top", "1"]) == 0
    captured = capsys.readouterr()
    assert "MEAN NOTHING" in captured.err
    assert "class " in captured.out


@pytest.mark.usefixtures("offline")
def test_classify_without_a_network_says_how_to_go_on(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert main(["classify", str(folder / "coffee.png")]) == 1
    (line,) = errors(capsys)
    assert "--weights FILE" in line
    assert "--weights random" in line


def test_classify_refuses_weights_in_one_line(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    image = str(folder / "coffee.png")
    bvlc = tmp_path / "bvlc.pth"
    torch.save(googlenet("bvlc", aux_logits=False, init_weights=False).state_dict(), bvlc)
    for weights, said in [
        (folder / "none.pth", "no such file"),
        (folder / "notes.txt", "unsupported suffix"),
        (bvlc, "'bvlc' variant"),
    ]:
        assert main(["classify", image, "--weights", str(weights)]) == 1
        (line,) = errors(capsys)
        assert said in line
    assert main(["classify", image, "--variant", "bvlc"]) == 1
    (line,) = errors(capsys)
    assert "no weights are published for the bvlc variant" in line


def test_classify_with_nothing_to_classify(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["classify", str(tmp_path), "--json"]) == 1
    captured = capsys.readouterr()
    assert "holds no image" in captured.err
    assert json.loads(captured.out)["images"] == []


def test_bench_writes_results_and_a_chart(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "--rounds", "1", "--threads", "1", "--output", str(tmp_path / "out"), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "", "no progress bar outside a terminal"
    document = json.loads(captured.out)
    assert [row["status"] for row in document["rows"]] == ["ok"] * 3
    assert document["machine"]["threads"] == 1
    assert all(row["ms"]["n"] == 5 for row in document["rows"])
    assert {Path(path).name for path in document["files"]} == {"bench.json", "bench.png"}
    assert all(Path(path).stat().st_size for path in document["files"])


def test_an_output_that_cannot_be_written_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main(["bench", "--output", str(tmp_path / "file")]) == 1
    (line,) = errors(capsys)
    assert str(tmp_path / "file") in line


@pytest.mark.usefixtures("offline")
def test_the_demo_without_a_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=100)
    outcome = demo.run(tmp_path / "out", rounds=1, console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.startswith("This runs GoogLeNet on 4 photographs twice")
    assert "The class numbers below mean nothing" in text
    assert "9 Inception modules" in text
    assert "Summary: both networks name the same top 5" in text
    assert outcome.agreeing == len(outcome.photographs) == 4
    assert outcome.errors["fused"] < 1e-3
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"demo.json", "demo.png"}
    document = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert document["weights"] == "seeded, untrained weights"
    assert set(document["photographs"]) == set(sample_photographs())
    assert capsys.readouterr().out == ""


def test_the_demo_with_weights_names_classes(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network, reason = demo.choose_network(trained)
    assert reason is None
    assert str(trained) in network.weights
    assert network.label(281) == "tabby"
    assert main(["demo", "--weights", str(tmp_path / "none.pth"), "--output", str(tmp_path)]) == 1
    assert "no such file" in capsys.readouterr().err


def test_the_demo_fails_when_the_networks_disagree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def mismatch(*_: object) -> None:
        raise FusionMismatch("inception3a: disagrees")

    monkeypatch.setattr(demo, "fuse", mismatch)
    assert main(["demo", "--weights", str(trained), "--output", str(tmp_path)]) == 1
    (line,) = errors(capsys)
    assert line == "googlenet-fused: error: inception3a: disagrees"


def test_an_interrupt_is_clean(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_doctor", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "googlenet-fused: interrupted\n"


def test_a_missing_optional_package_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["bench", "--output", str(tmp_path)]) == 1
    (line,) = errors(capsys)
    assert "pip install 'googlenet-fused[tools]'" in line


def test_a_defect_of_the_package_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def defective(_: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_doctor", defective)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_as_a_process() -> None:
    root = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-m", "googlenet_fused", "doctor", "--json"], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert "cpu" in json.loads(run.stdout)["backends"]
    assert "Traceback" not in run.stderr

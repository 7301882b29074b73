"""The command line, through ``main(argv)`` and once as a process: results, exit codes, and one-line errors."""

from __future__ import annotations

import io
import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy
import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("PIL")
pytest.importorskip("torchvision")
pytest.importorskip("skimage")

from PIL import Image
from rich.console import Console

from googlenet_fused import FusionMismatch, bench, cli, demo, googlenet, use_backend
from googlenet_fused.backends import registry, trust
from googlenet_fused.bench import Timing
from googlenet_fused.cli import main
from googlenet_fused.images import sample_photographs
from googlenet_fused.randomize import randomize_
from googlenet_fused.weights import Description, WeightsError, save_described

COMMANDS = ("doctor", "demo", "classify", "convert", "train", "evaluate", "bench", "tune")


@pytest.fixture(autouse=True)
def _unannounced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process of its own, no choice of backend has been announced yet."""
    monkeypatch.setattr(registry, "_announced", set())


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
        (["classify", ""], "argument IMAGE: must be a path, got ''"),
        (["classify", "a.png", "--weights", ""], "argument --weights: must be a path"),
        (
            ["classify", "~no such user/a.png"],
            "argument IMAGE: must be a path, got '~no such user/a.png': there is no such user",
        ),
        (["convert", "~no such user/w.pth", "w.safetensors"], "argument INPUT: must be a path"),
        (["classify", "a.png", "--variant", "bvlc", "--transform-input"], "belongs to --variant torchvision, not bvlc"),
        (["demo", "--output", ""], "argument --output: must be a path"),
        (["classify", "a.png", "--top", "0"], "must be a positive whole number, got '0'"),
        (["classify", "a.png", "--variant", "vgg"], "invalid choice: 'vgg'"),
        (["bench", "--variant", "slim"], "invalid choice: 'slim'"),
        (["classify", "a.png", "--backend", "abacus"], "unknown backend 'abacus': choose one of 'auto'"),
        (["bench", "--batch", "many"], "got 'many'"),
        (["bench", "--dtype", "fp8"], "invalid choice: 'fp8'"),
        (["bench", "--backend", "abacus"], "unknown backend 'abacus'"),
        (["bench", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["bench", "--threads", "-1"], "got '-1'"),
        (["doctor", "--yaml"], "--yaml"),
        (["tune", "--modules", "6a"], "argument --modules: invalid choice: '6a'"),
        (["tune", "--batch", "0"], "argument --batch: must be a positive whole number, got '0'"),
        (["tune", "--dtype", "fp64"], "argument --dtype: invalid choice: 'fp64'"),
        (["tune", "--large-kernel", "7"], "argument --large-kernel: invalid choice: 7"),
        (["tune", "--seconds-each", "0"], "argument --seconds-each: must be a positive number of seconds, got '0'"),
        (["tune", "--seconds-each", "inf"], "must be a positive number of seconds, got 'inf'"),
        (["tune", "--seconds-each", "soon"], "must be a positive number of seconds, got 'soon'"),
        (["tune", "--output", ""], "argument --output: must be a path"),
        (["tune", "--show", "--forget"], "argument --forget: not allowed with argument --show"),
        (["tune", "--show", "--output", "plans.json"], "argument --output: not allowed with argument --show"),
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
        "needs_verification": False,
        "verified_on": [],
        "here": {},
    }
    assert facts["backends"]["triton"]["needs_verification"]
    assert facts["versions"]["torch"]


@pytest.mark.parametrize("content", ["[", "{}", None])
def test_doctor_in_a_damaged_installation(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "verified.json"
    if content is not None:
        file.write_text(content)
    monkeypatch.setattr(trust, "VERIFIED", file)
    trust._verified.cache_clear()
    try:
        assert main(["doctor"]) == 1
    finally:
        trust._verified.cache_clear()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("googlenet-fused: error: the installation is damaged: ")
    assert str(file) in line


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
    lines = captured.err.splitlines()
    assert sum(line.startswith("googlenet-fused: error: ") for line in lines) == 3
    assert sum(line.startswith(f"googlenet-fused: warning: {trained} is not the published file") for line in lines) == 1
    assert sum("auto chose backend" in line for line in lines) == 1
    assert len(lines) == 5


@pytest.mark.parametrize(
    ("asked", "within", "used"),
    [("reference", "auto", "reference"), ("auto", "reference", "reference"), ("auto", "cpu", "cpu")],
)
def test_classify_names_the_backend_that_ran(
    capsys: pytest.CaptureFixture[str], folder: Path, trained: Path, asked: str, within: str, used: str
) -> None:
    if not registry.status()[used]["available"]:
        pytest.skip(f"there is no {used} backend here")
    command = ["classify", str(folder / "chelsea.png"), "--weights", str(trained), "--backend", asked]
    with use_backend(within):
        assert main(command) == 0
        assert capsys.readouterr().err.splitlines()[-1] == f"googlenet-fused: classified 1 image with the {used} backend"
        assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["backend"], document["backend_used"]) == (asked, used)


def test_the_reason_for_a_backend_is_said_once_and_the_log_left_as_it_was(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, folder: Path, trained: Path
) -> None:
    logger = logging.getLogger("googlenet_fused")
    before = logger.level, logger.propagate, list(logger.handlers)
    assert main(["classify", str(folder / "chelsea.png"), "--weights", str(trained), "--json"]) == 0
    captured = capsys.readouterr()
    used = json.loads(captured.out)["backend_used"]
    (reason,) = [line for line in captured.err.splitlines() if "auto chose" in line]
    assert reason.startswith("googlenet-fused: ")
    assert f"auto chose backend {used!r} for float32 on cpu (" in reason
    assert reason.endswith(")")
    assert not caplog.records, "shown by the command, not by the log's own handlers as well"
    assert (logger.level, logger.propagate, logger.handlers) == before


def test_a_choice_that_costs_speed_is_a_warning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path, trained: Path
) -> None:
    monkeypatch.setattr(type(registry.get("cpu")), "supports", lambda *_: "it has\na (long) lunch")
    assert main(["classify", str(folder / "chelsea.png"), "--weights", str(trained)]) == 0
    (said,) = (line for line in capsys.readouterr().err.splitlines() if "auto" in line)
    assert said.startswith("googlenet-fused: warning: auto chose backend 'reference' for float32 on cpu (cuda: ")
    assert "; triton: " in said
    assert said.endswith("; cpu: it has a (long) lunch)")


def test_classify_transforms_the_input_when_told(capsys: pytest.CaptureFixture[str], folder: Path, trained: Path) -> None:
    def probabilities(*options: str) -> list[float]:
        main(["classify", str(folder / "chelsea.png"), "--weights", str(trained), "--json", *options])
        return [place["probability"] for place in json.loads(capsys.readouterr().out)["images"][0]["top"]]

    assert probabilities() != probabilities("--transform-input")


@pytest.mark.parametrize(
    ("options", "assumed"),
    [([], "input with ImageNet's mean and deviation"), (["--transform-input"], "input mapped to [-1, 1]")],
)
def test_demo_and_classify_warn_alike_of_unknown_weights(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    trained: Path,
    tmp_path: Path,
    options: list[str],
    assumed: str,
) -> None:
    def stop(_: object, network: demo.Network, *__: object) -> None:
        assert network.model.transform_input is bool(options)
        raise demo.DemoError("far enough")

    monkeypatch.setattr(demo, "_compare", stop)
    weights = ["--weights", str(trained)]
    assert main(["classify", str(folder / "chelsea.png"), *weights, *options]) == 0
    warning, *_ = capsys.readouterr().err.splitlines()
    assert main(["demo", "--output", str(tmp_path / "out"), *weights, *options]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines == [warning, "googlenet-fused: error: far enough"]
    assert f"{trained} is not the published file" in warning
    assert assumed in warning


@pytest.mark.usefixtures("offline")
def test_seeded_networks_transform_their_input_when_told() -> None:
    for transform_input in (False, True):
        network, _ = demo.choose_network(transform_input=transform_input)
        assert network.model.transform_input is transform_input


def test_the_warning_of_weights_for_the_paper_s_network(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "bvlc.pth"
    torch.save(googlenet("bvlc", aux_logits=False).state_dict(), path)
    assert main(["classify", str(folder / "chelsea.png"), "--weights", str(path), "--variant", "bvlc"]) == 0
    assert "assumed are ImageNet's classes and input as the bvlc variant's: BGR, 0 to 255, minus" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "options", "reason"),
    [
        ({}, ["--transform-input"], "is for the 'bvlc' variant, and transform_input belongs to 'torchvision': leave it out"),
        (
            {"transform_input": True},
            [],
            "is for the 'bvlc' variant, and transform_input belongs to 'torchvision': leave it out",
        ),
        ({"num_classes": 10**12}, [], "says that it has 1000000000000 classes, and its classifier has 7"),
        ({"crop": 30}, [], "images of 30x30 are too small for bvlc, which takes 31"),
    ],
)
def test_classify_refuses_a_description_that_cannot_be(
    fields: dict[str, Any],
    options: list[str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    tmp_path: Path,
) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "bvlc.safetensors"
    state = googlenet("bvlc", num_classes=7, aux_logits=False, init_weights=False).state_dict()
    save_described(path, state, replace(Description("bvlc", 7), **fields))
    assert main(["classify", str(folder / "chelsea.png"), "--weights", str(path), *options]) == 1
    line = capsys.readouterr().err
    assert reason in line
    assert line.count("\n") == 1


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


def test_classify_refuses_weights_in_one_line(
    capsys: pytest.CaptureFixture[str], folder: Path, trained: Path, tmp_path: Path
) -> None:
    image = str(folder / "coffee.png")
    cut, other = tmp_path / "cut.pth", tmp_path / "other.pth"
    cut.write_bytes(trained.read_bytes()[:1_000_000])
    torch.save({"weight": torch.ones(3)}, other)
    for weights, said in [
        (folder / "none.pth", "no such file"),
        (folder / "notes.txt", "unsupported suffix"),
        (other, "is no GoogLeNet"),
        (cut, "truncated, damaged or not a file that torch.save wrote"),
        (cut, "; copy or download it again"),
    ]:
        assert main(["classify", image, "--weights", str(weights)]) == 1
        (line,) = errors(capsys)
        assert said in line
    assert main(["classify", image, "--weights", str(trained), "--variant", "bvlc"]) == 1
    (line,) = errors(capsys)
    assert "The file holds the 'torchvision' variant" in line
    assert main(["classify", image, "--variant", "slim"]) == 1
    (line,) = errors(capsys)
    assert "no weights are published for the 'slim' variant" in line


def test_classify_goes_by_what_the_file_says(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    """Variant, preparation, sizes and names of classes; against the network called by hand."""
    model = randomize_(googlenet("bvlc", num_classes=3, aux_logits=False, init_weights=False)).eval()
    path = tmp_path / "three.safetensors"
    save_described(path, model.state_dict(), Description("bvlc", 3, ("cat", "dog", "cup"), resize=80, crop=64))
    assert main(["classify", str(folder / "chelsea.png"), "--weights", str(path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert "assumed" not in err
    found = json.loads(out)
    assert found["variant"] == "bvlc"
    image = Image.open(folder / "chelsea.png").convert("RGB")  # wider than high
    width = int(80 * image.width / image.height)
    left, top = round((width - 64) / 2), 8
    pixels = torch.tensor(numpy.asarray(image.resize((width, 80), Image.Resampling.BILINEAR))[top : top + 64, left : left + 64])
    mean = torch.tensor([104.0, 117.0, 123.0]).view(3, 1, 1)
    expected = model((pixels.permute(2, 0, 1).flip(0).float() - mean)[None]).softmax(1)[0]
    places = {place["label"]: place["probability"] for place in found["images"][0]["top"]}
    assert [places[name] for name in ("cat", "dog", "cup")] == pytest.approx(expected.tolist(), abs=1e-5)


def test_classify_with_nothing_to_classify(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["classify", str(tmp_path), "--json"]) == 1
    captured = capsys.readouterr()
    assert "holds no image" in captured.err
    document = json.loads(captured.out)
    assert document["images"] == []
    assert document["backend_used"] is None


def test_bench_writes_results_and_a_chart(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert (
        main(["bench", "--device", "cpu", "--rounds", "1", "--threads", "1", "--output", str(tmp_path / "out"), "--json"]) == 0
    )
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()  # no progress bar outside a terminal
    assert "auto chose backend" in line
    document = json.loads(captured.out)
    assert [row["status"] for row in document["rows"]] == ["ok"] * 3
    assert document["machine"]["threads"] == 1
    assert document["device"] == "cpu"
    assert all(row["timings"][metric]["n"] == 5 for row in document["rows"] for metric in ("wall", "wall_cold"))
    assert {Path(path).name for path in document["files"]} == {"bench.json", "bench.png"}
    assert all(Path(path).stat().st_size for path in document["files"])


def test_bench_keeps_the_cases_that_were_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(workload: bench.Workload, *_: Any, **__: Any) -> list[bench.Row]:
        if workload.case.batch > 1:
            raise torch.OutOfMemoryError("tried to allocate too much\nsee the manual")
        return [bench.Row(workload.case, bench.BASELINE, "PyTorch", "ok", timings={"wall": Timing(1.0, 1.0, 1.0, 1)})]

    monkeypatch.setattr(bench, "measure", measure)
    arguments = ["bench", "--device", "cpu", "--output", str(tmp_path), "--json"]
    assert main([*arguments, "--batch", "1", "2"]) == 1
    captured = capsys.readouterr()
    document = json.loads((tmp_path / "bench.json").read_text())
    assert [row["case"]["batch"] for row in document["rows"]] == [1]
    assert document["not_run"] == ["torchvision, batch 2, fp32 not run: tried to allocate too much"]
    said = f"googlenet-fused: error: {document['not_run'][0]}"
    assert captured.err.splitlines()[-1] == said
    (tmp_path / "bench.json").unlink()
    assert main([*arguments, "--batch", "2"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == said
    assert not (tmp_path / "bench.json").exists()


def test_bench_refuses_more_threads_than_processors(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "--threads", "9999", "--output", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("googlenet-fused: error: argument --threads must be from 1 to ")
    assert line.endswith("the processors that may be used here, got 9999")


@pytest.mark.parametrize("command", ["bench", "demo"])
def test_an_output_that_cannot_be_written_is_one_line_before_any_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main([command, "--output", str(tmp_path / "file")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    said = f"argument --output: cannot make the folder {tmp_path / 'file'}: File exists; name another"
    assert captured.err == f"googlenet-fused: error: {said}\n"


@pytest.mark.usefixtures("offline")
def test_the_demo_without_a_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    subtitles: list[str] = []
    draw = demo.demo_chart

    def chart(*arguments: Any, subtitle: str) -> Path:
        subtitles.append(subtitle)
        return draw(*arguments, subtitle=subtitle)

    monkeypatch.setattr(demo, "demo_chart", chart)
    console = Console(file=io.StringIO(), width=100)
    with use_backend("reference"):
        outcome = demo.run(tmp_path / "out", rounds=1, console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.startswith("This runs GoogLeNet on 4 photographs twice")
    assert "The published ones cannot be had here: no network\nThe class numbers below mean nothing" in text
    assert "http" not in text
    assert subtitles == ["seeded, untrained weights: the class numbers mean nothing"]
    assert "9 Inception modules" in text
    assert "run by the reference backend" in " ".join(text.split())
    assert "Summary: both networks name the same top 5" in text
    assert outcome.agreeing == len(outcome.photographs) == 4
    assert list(outcome.errors) == list(outcome.timings) == ["plain", "channels_last", "fused"]
    assert max(outcome.errors.values()) < 1e-3
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"demo.json", "demo.png"}
    document = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert document["weights"] == "seeded, untrained weights"
    assert document["backend"] == "reference"
    medians = {name: ms["median"] for name, ms in document["ms"].items()}
    assert document["speedup"] == pytest.approx(medians["plain"] / medians["fused"])
    assert document["speedup_over_channels_last"] == pytest.approx(medians["channels_last"] / medians["fused"])
    assert set(document["photographs"]) == set(sample_photographs())
    assert capsys.readouterr().out == ""


def outcome_of(plain: Timing, channels_last: Timing, fused: Timing) -> demo.Outcome:
    """An outcome without photographs."""
    timings = {"plain": plain, "channels_last": channels_last, "fused": fused}
    network = demo.Network(torch.nn.Identity(), "words", None)
    return demo.Outcome(network, "cpu", {}, torch.ones(1, 9), torch.ones(1, 9), dict.fromkeys(timings, 1e-6), timings)


@pytest.mark.parametrize(("p80", "unreliable"), [(14.9, False), (15.1, True)])
def test_the_demo_compares_with_channels_last_and_warns_of_uneven_times(p80: float, unreliable: bool) -> None:
    outcome = outcome_of(Timing(40.0, 39.0, 41.0, 5), Timing(12.0, 10.0, p80, 5), Timing(8.0, 7.9, 8.1, 5))
    console = Console(file=io.StringIO(), width=80)
    console.print(demo._summary_table(outcome))
    demo._print_summary(console, outcome, [Path("demo.json")])
    text = console.file.getvalue()  # type: ignore[attr-defined]
    (line,) = [line for line in text.splitlines() if "plain, channels_last" in line]
    assert line.split() == ["plain,", "channels_last", "1.0e-06", "12.0", "10.0", "to", f"{p80}", "3.33x"]
    assert "5.00x as fast as PyTorch, and 1.50x as fast as PyTorch in channels_last." in " ".join(text.split())
    assert ("The timing is unreliable: p80 is more than 1.5x p20." in text) is unreliable


def test_the_reason_for_seeded_weights_is_whole_unless_a_download_failed() -> None:
    failed, nameless = WeightsError("cannot download https://a/b: why"), WeightsError("cannot download: ")
    failed.__cause__, nameless.__cause__ = RuntimeError("invalid hash value"), TimeoutError()
    assert demo._reason(failed) == "invalid hash value"
    assert demo._reason(nameless) == "cannot download: "
    assert demo._reason(WeightsError("the cached file a is not b")) == "the cached file a is not b"


def test_the_demo_with_weights_names_classes(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network, reason = demo.choose_network(trained)
    assert reason is None
    assert str(trained) in network.weights
    assert network.label(281) == "tabby"
    assert main(["demo", "--weights", str(tmp_path / "none.pth"), "--output", str(tmp_path)]) == 1
    assert "no such file" in capsys.readouterr().err


def test_the_demo_prints_any_file_name(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shutil.copy(trained, tmp_path / "w[bold].pth")
    network, reason = demo.choose_network(path)
    demo._print_weights(Console(width=40), network, reason)
    assert capsys.readouterr().out == f"Weights: the weights in {path}.\n"


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

    monkeypatch.setattr(cli.doctor, "run", interrupted)
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

    monkeypatch.setattr(cli.doctor, "run", defective)
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


def test_the_networks_that_bench_offers_are_those_it_can_measure() -> None:
    assert tuple(bench.NETWORKS) == cli.bench.NETWORKS

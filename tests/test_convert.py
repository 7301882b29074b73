"""``googlenet-fused convert``: what is written is what was read, and says what it is; whatever is wrong is one line."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caffe_net import bvlc_layers, caffemodel, random_blobs
from cases import assert_same
from slim_net import random_variables

from googlenet_fused.cli import main
from googlenet_fused.models import VariantName, googlenet
from googlenet_fused.randomize import randomize_
from googlenet_fused.weights import (
    BVLC_GoogLeNet_Weights,
    Description,
    GoogLeNet_Weights,
    PublishedWeights,
    read_description,
    read_state_dict,
    save_described,
)

pytest.importorskip("safetensors")

CLASSES = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("convert")


@pytest.fixture(scope="module")
def caffe_file(folder: Path) -> Path:
    path = folder / "food.caffemodel"
    path.write_bytes(caffemodel(random_blobs(bvlc_layers(CLASSES)), "V1"))
    return path


@pytest.fixture(scope="module")
def torch_file(folder: Path) -> Path:
    path = folder / "net.pth"
    model = randomize_(googlenet("torchvision", num_classes=CLASSES, aux_logits=False, init_weights=False))
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture
def output(folder: Path) -> Path:
    """Not there yet."""
    path = folder / "out.safetensors"
    path.unlink(missing_ok=True)
    return path


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit code, output and the errors of ``convert`` with these arguments."""

    def convert(*arguments: object) -> tuple[int, str, str]:
        code = main(["convert", *map(str, arguments)])
        return (code, *capsys.readouterr())

    return convert


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_caffemodel_becomes_described_safetensors(caffe_file: Path, output: Path, run: Run) -> None:
    source = f"food.caffemodel, SHA-256 {digest(caffe_file)}"
    assert run(caffe_file, output) == (
        0,
        f"wrote {output}\n"
        f"  variant bvlc, 7 classes, {13_378_280 - 3 * 993 * 1025:,} parameters, with auxiliary heads\n"
        "  input BGR, 0 to 255, minus (104, 117, 123); resize 256, crop 224\n"
        f"  source {source}\n",
        "",
    )
    assert_same(read_state_dict(output), read_state_dict(caffe_file))
    assert read_description(output) == Description("bvlc", CLASSES, source=source)
    model = googlenet("bvlc", weights=output, num_classes=CLASSES)
    assert_same(model.fc.weight.detach(), read_state_dict(caffe_file)["fc.weight"])


@pytest.mark.parametrize("transform_input", [False, True])
def test_what_is_known_of_the_input_is_written_down(transform_input: bool, torch_file: Path, output: Path, run: Run) -> None:
    code, out, err = run(torch_file, output, *["--transform-input"] * transform_input)
    assert code == 0
    assert f"variant torchvision, 7 classes, {6_624_904 - 993 * 1025:,} parameters, without auxiliary heads" in out
    mapped = ", then mapped to [-1, 1] by the network" * transform_input
    assert f"input RGB, 0 to 1, minus (0.485, 0.456, 0.406), over (0.229, 0.224, 0.225){mapped}; resize 256, crop 224\n" in out
    assert ("assumed is input with ImageNet's mean" in err) is not transform_input
    model = googlenet(weights=output, num_classes=CLASSES)
    assert model.transform_input is transform_input
    assert_same(model.state_dict(), read_state_dict(torch_file))


@pytest.mark.parametrize(("member", "mapped"), [(GoogLeNet_Weights.DEFAULT, True), (BVLC_GoogLeNet_Weights.DEFAULT, False)])
def test_published_weights_are_recognised(
    member: PublishedWeights,
    mapped: bool,
    caffe_file: Path,
    torch_file: Path,
    output: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = torch_file if mapped else caffe_file
    names = [str(index) for index in range(CLASSES)]
    value = replace(member.value, sha256=digest(path), size=None, meta={"categories": names})
    monkeypatch.setattr(member, "_value_", value)
    code, out, err = run(path, output)
    assert (code, err) == (0, "")
    assert f", which is {member} from {member.url}\n" in out
    description = read_description(output)
    assert description is not None
    assert description.transform_input is mapped
    assert description.classes == tuple(names)

    assert run(output, output, "--force")[0] == 0
    again = read_description(output)
    assert again is not None
    assert again.source is not None
    assert again.source.endswith(f", made from {description.source}")
    assert replace(again, source=description.source) == description


def test_variables_of_slim_are_known_by_their_names(folder: Path, output: Path, run: Run) -> None:
    path = folder / "slim.npz"
    np.savez(path, **random_variables(classes=CLASSES))
    code, out, err = run(path, output)
    assert (code, err) == (0, "")
    assert f"  variant slim, {CLASSES} classes, {6_624_904 - 993 * 1025:,} parameters, without auxiliary heads\n" in out
    assert "  input RGB, 0 to 1, minus (0.5, 0.5, 0.5), over (0.5, 0.5, 0.5); resize 256, crop 224\n" in out
    description = read_description(output)
    assert description is not None
    assert (description.variant, description.transform_input) == ("slim", False)
    stored = read_state_dict(path)
    assert_same({key: value for key, value in read_state_dict(output).items() if key in stored}, stored)


def test_without_torchvision_the_names_of_the_classes_are_left_out(
    caffe_file: Path, output: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nothing(dict[str, object]):
        def __missing__(self, key: str) -> object:
            raise ImportError("torchvision is missing")

    value = replace(BVLC_GoogLeNet_Weights.DEFAULT.value, sha256=digest(caffe_file), meta=Nothing())
    monkeypatch.setattr(BVLC_GoogLeNet_Weights.DEFAULT, "_value_", value)
    assert run(caffe_file, output)[0] == 0
    description = read_description(output)
    assert description is not None
    assert description.classes is None


def test_a_description_is_carried_over(torch_file: Path, folder: Path, output: Path, run: Run) -> None:
    given = Description("torchvision", CLASSES, tuple("abcdefg"), True, 64, 56, "a test")
    path = folder / "described.safetensors"
    save_described(path, read_state_dict(torch_file), given)
    code, out, err = run(path, output)
    assert (code, err) == (0, "")
    assert "then mapped to [-1, 1] by the network; resize 64, crop 56\n" in out
    source = f"described.safetensors, SHA-256 {digest(path)}, made from a test"
    assert read_description(output) == replace(given, source=source)


def test_nothing_is_overwritten_unless_it_is_asked_for(caffe_file: Path, output: Path, run: Run) -> None:
    output.write_text("precious")
    code, out, err = run(caffe_file, output)
    assert (code, out) == (1, "")
    assert err == f"googlenet-fused: error: {output} is already there: name another file, or replace it with --force\n"
    assert output.read_text() == "precious"
    assert run(caffe_file, output, "--force")[0] == 0
    assert read_description(output) is not None


def test_wrong_usage_is_refused_before_any_work(folder: Path, run: Run) -> None:
    (folder / "folder.safetensors").mkdir()
    for name, reason in (("out.pth", "must end with .safetensors"), ("folder.safetensors", "is a folder; name a file")):
        code, out, err = run("there is no such file", folder / name, "--force")
        assert (code, out) == (2, "")
        assert err.startswith("googlenet-fused: error: argument OUTPUT: ")
        assert reason in err


def test_what_cannot_be_converted_is_one_line(caffe_file: Path, torch_file: Path, folder: Path, output: Path, run: Run) -> None:
    other, bad, strange, plain = (folder / name for name in ("o.pth", "b.caffemodel", "s.safetensors", "p.safetensors"))
    torch.save({"weight": torch.ones(1)}, other)
    bad.write_bytes(caffe_file.read_bytes()[:1000])
    save_described(strange, read_state_dict(torch_file), Description("strange", CLASSES))
    save_described(plain, read_state_dict(torch_file), Description("torchvision", CLASSES))
    for arguments, code, reason in (
        ((folder / "none.pth",), 1, "none.pth: there is no such file"),
        ((other,), 1, "o.pth is no GoogLeNet"),
        ((bad,), 1, "is truncated, damaged or not a .caffemodel file"),
        ((caffe_file, "--variant", "torchvision"), 1, "is for the 'bvlc' variant, not for 'torchvision'"),
        ((caffe_file, "--transform-input"), 2, "argument --transform-input: belongs to the torchvision variant"),
        ((strange,), 1, "is for the 'strange' variant, which this version does not know"),
        ((plain, "--transform-input"), 1, "says itself that its weights do not expect input in [-1, 1]"),
        ((plain, "--variant", "bvlc"), 1, "is for the 'torchvision' variant, not for 'bvlc'"),
    ):
        got, out, err = run(*arguments[:1], output, *arguments[1:])
        assert (got, out) == (code, ""), arguments
        assert reason in err
        assert err.count("\n") == 1
        assert not output.exists()


@pytest.mark.parametrize(
    ("classifier", "reason"),
    [
        (
            torch.zeros(1, 1024).expand(10**12, 1024),
            "holds fewer values than its fc.weight of shape [1000000000000, 1024] needs",
        ),
        (torch.zeros(10**12, 0), "its fc.weight has shape [1000000000000, 0], not [classes, 1024]"),
        (torch.zeros(0, 1024), "its fc.weight has shape [0, 1024], not [classes, 1024]"),
        (torch.zeros(CLASSES), "its fc.weight has shape [7], not [classes, 1024]"),
    ],
    ids=["expanded", "of no inputs", "of no classes", "a vector"],
)
def test_a_classifier_is_believed_only_if_the_file_holds_it(
    classifier: torch.Tensor, reason: str, torch_file: Path, folder: Path, output: Path, run: Run
) -> None:
    path = folder / "classifier.pth"
    torch.save({**read_state_dict(torch_file), "fc.weight": classifier}, path)
    code, out, err = run(path, output)
    assert (code, out) == (1, "")
    assert reason in err
    assert err.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_classes": 10**12}, "says that it has 1000000000000 classes, and its classifier has 7; write it anew"),
        ({"transform_input": True}, "want transform_input, which belongs to the 'torchvision' variant"),
    ],
)
def test_a_description_that_cannot_be_is_refused(
    fields: dict[str, Any], reason: str, caffe_file: Path, folder: Path, output: Path, run: Run
) -> None:
    path = folder / "untrue.safetensors"
    save_described(path, read_state_dict(caffe_file), replace(Description("bvlc", CLASSES), **fields))
    code, out, err = run(path, output)
    assert (code, out) == (1, "")
    assert reason in err
    assert err.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize("variant", ["torchvision", "bvlc"])
def test_the_variant_may_be_given(variant: VariantName, caffe_file: Path, torch_file: Path, output: Path, run: Run) -> None:
    path = torch_file if variant == "torchvision" else caffe_file
    code, out, _ = run(path, output, "--variant", variant)
    assert code == 0
    assert f"variant {variant}," in out

"""The networks of an evaluation: what files say of themselves, lists of files, and whose classes are whose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("torchvision")
pytest.importorskip("safetensors")

from evaluation_cases import member

from googlenet_fused import googlenet
from googlenet_fused.evaluation import (
    EvaluationError,
    Member,
    check_agreement,
    load_member,
    match,
    read_weights_list,
)
from googlenet_fused.preparation import PREPARATIONS
from googlenet_fused.randomize import randomize_
from googlenet_fused.weights import Description, GoogLeNet_Weights, WeightsError, load, save_described
from googlenet_fused.weights.published import PUBLISHED

NAMES = ("cat", "coffee", "rocket", "woman")


def weights_of(variant: str = "torchvision", classes: int = 4, **options: bool) -> dict[str, torch.Tensor]:
    network = googlenet(variant, num_classes=classes, aux_logits=False, init_weights=False, **options)
    return randomize_(network).state_dict()


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "four.safetensors"
    description = Description("torchvision", 4, NAMES, transform_input=True, resize=40, crop=32, source="a test")
    save_described(path, weights_of(), description)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the bvlc variant that says nothing of itself."""
    path = tmp_path_factory.mktemp("weights") / "five.pth"
    torch.save(weights_of("bvlc", 5), path)
    return path


def test_a_described_file_says_all(described: Path) -> None:
    found = load_member(described)
    assert (found.name, found.num_classes, found.classes, found.background) == ("four", 4, NAMES, False)
    assert (found.crop, found.resize, found.preparation) == (32, 40, PREPARATIONS["torchvision"])
    assert found.network.transform_input is True
    facts = found.to_json()
    assert (facts["file"], facts["variant"], facts["source"]) == (str(described), "torchvision", "a test")
    assert (facts["transform_input"], facts["published"], facts["dtype"]) == (True, None, "fp32")
    assert facts["backend"]


def test_the_network_is_the_files_and_is_fused(described: Path) -> None:
    found = load_member(described, backend="reference")
    plain = googlenet(num_classes=4, aux_logits=False, transform_input=True, init_weights=False)
    plain.load_state_dict(weights_of())
    x = torch.randn(2, 3, 32, 32)
    assert dict(found.facts)["backend"] == "reference"
    assert not found.network.training
    with torch.inference_mode():
        torch.testing.assert_close(found.network(x), plain.eval()(x), rtol=1e-4, atol=1e-4)


def test_of_another_file_the_variant_is_said(plain: Path) -> None:
    found = load_member(plain, variant="bvlc", dtype="bf16")
    assert (found.num_classes, found.classes, found.crop, found.resize) == (5, None, 224, 256)
    assert found.preparation == PREPARATIONS["bvlc"]
    assert {parameter.dtype for parameter in found.network.parameters()} == {torch.bfloat16}


def test_input_in_minus_one_to_one_is_said_or_known_of_the_published_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(weights_of(), path)
    assert load_member(path).network.transform_input is False
    assert load_member(path, transform_input=True).network.transform_input is True
    monkeypatch.setattr(load, "published_as", lambda _: GoogLeNet_Weights.DEFAULT)
    found = load_member(path)
    assert found.network.transform_input is True
    assert (dict(found.facts)["transform_input"], dict(found.facts)["published"]) == (True, "IMAGENET1K_V1")


def test_default_is_the_published_file(monkeypatch: pytest.MonkeyPatch, plain: Path) -> None:
    from googlenet_fused.weights import conversion

    asked = []

    def fetch(weights: object) -> Path:
        asked.append(weights)
        raise WeightsError("cannot be downloaded: no network")

    monkeypatch.setattr(conversion, "fetch", fetch)
    with pytest.raises(EvaluationError, match="cannot be downloaded"):
        load_member("default")
    assert [str(each) for each in asked] == ["GoogLeNet_Weights.IMAGENET1K_V1"]
    with pytest.raises(EvaluationError, match="cannot be downloaded"):
        load_member("default", variant="bvlc")
    assert [str(each) for each in asked] == ["GoogLeNet_Weights.IMAGENET1K_V1", "BVLC_GoogLeNet_Weights.IMAGENET1K_V1"]
    monkeypatch.delitem(PUBLISHED, "bvlc")
    with pytest.raises(EvaluationError, match="no weights are published for the 'bvlc' variant: give a"):
        load_member("default", variant="bvlc")


def test_files_that_are_refused(tmp_path: Path, described: Path, plain: Path) -> None:
    with pytest.raises(EvaluationError, match=r"four\.safetensors is for the 'torchvision' variant, not for 'bvlc'"):
        load_member(described, variant="bvlc")
    with pytest.raises(EvaluationError, match="The file holds the 'bvlc' variant"):
        load_member(plain, variant="torchvision")
    assert load_member(plain).to_json()["variant"] == "bvlc"
    with pytest.raises(EvaluationError, match=r"nowhere\.pth: there is no such file"):
        load_member(tmp_path / "nowhere.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(EvaluationError, match=r"other\.pth is no GoogLeNet"):
        load_member(tmp_path / "other.pth")
    with pytest.raises(ValueError, match="variant must be 'torchvision'"):
        load_member(plain, variant="vgg")
    with pytest.raises(ValueError, match="dtype must be 'fp32', 'bf16', 'fp16', got 'fp8'"):
        load_member(plain, dtype="fp8")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": "vgg"}, "is for the variant 'vgg', which is none of torchvision, bvlc"),
        ({"resize": 20, "crop": 30}, r"its resize must be at least its crop \(30\), got 20"),
        ({"crop": 14}, "images of 14x14 are too small for torchvision"),
        (
            {"variant": "bvlc", "transform_input": True},
            "is for the 'bvlc' variant, and transform_input belongs to 'torchvision'",
        ),
    ],
)
def test_descriptions_that_make_no_sense(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    path = tmp_path / "odd.safetensors"
    save_described(path, weights_of(), Description(**{"variant": "torchvision", "num_classes": 4, **fields}))
    with pytest.raises(EvaluationError, match=message):
        load_member(path)


def test_a_list_names_files_beside_it(tmp_path: Path) -> None:
    for name in ("a.pth", "b c.pth"):
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_text(
        f"\ufeff# seven\na.pth  # the first\n\n  b c.pth\r\n{tmp_path}/a.pth\n", encoding="utf-8"
    )
    assert read_weights_list(tmp_path / "list.txt") == [tmp_path / "a.pth", tmp_path / "b c.pth", tmp_path / "a.pth"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"# nothing\n\n", r"list\.txt names no file of weights: write one a line"),
        (b"a.pth\n\nb.pth\n", r"list\.txt, line 3: there is no file .*b\.pth"),
        (b"\xff\xfe\x00", r"list\.txt is not a text file"),
        (b"#" * 1_000_001, r"list\.txt is longer than the 1000000 bytes"),
        (None, r"list\.txt cannot be read: No such file or directory; name a list"),
    ],
)
def test_lists_that_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    (tmp_path / "a.pth").touch()
    if content is not None:
        (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(EvaluationError, match=message):
        read_weights_list(tmp_path / "list.txt")


def named(name: str, *classes: str) -> Member:
    return replace(member(name=name), num_classes=len(classes), classes=classes)


def test_networks_must_agree_on_their_classes() -> None:
    unnamed = replace(member(name="c"), num_classes=2)
    check_agreement([unnamed, named("a", "x", "y"), named("b", "x", "y")])
    with pytest.raises(EvaluationError, match="a has 2 classes and b has 3"):
        check_agreement([named("a", "x", "y"), named("b", "x", "y", "z")])
    with pytest.raises(EvaluationError, match="class 1 is 'y' for a and 'z' for b"):
        check_agreement([unnamed, named("a", "x", "y"), named("b", "x", "z")])
    with pytest.raises(EvaluationError, match="there is no network to evaluate"):
        check_agreement([])


def test_names_decide_whose_class_is_whose() -> None:
    networks = [replace(member(name="first"), num_classes=4), named("second", *NAMES)]
    labels = match(("woman", "cat"), networks)
    assert (labels.index, labels.names) == ((3, 0), NAMES)
    message = r"2 of the data's 3 classes are unknown to the network first: 'dog', 'n01440764'; it knows 'cat', .*'woman'$"
    with pytest.raises(EvaluationError, match=message):
        match(("cat", "dog", "n01440764"), networks)
    with pytest.raises(EvaluationError, match="match them by order"):
        match(("a", "b", "c", "d"), networks)
    assert match(("a", "b", "c", "d"), networks, by_order=True).index == (0, 1, 2, 3)
    assert match(("a", "b", "c", "d"), networks, by_order=True).names == NAMES
    with pytest.raises(EvaluationError, match="more than one class called 'crane'"):
        match(("crane",), [named("a", "crane", "cat", "crane")])


def test_without_names_the_numbers_must_be_equal() -> None:
    network = replace(member(name="net"), num_classes=4)
    labels = match(NAMES, [network])
    assert (labels.index, labels.names) == ((0, 1, 2, 3), NAMES)
    message = r"the data has 3 classes \('n1', 'n2', 'n3'\) and the classifier 4, and net does not say which its own are: eval"
    with pytest.raises(EvaluationError, match=message):
        match(("n1", "n2", "n3"), [network])
    with pytest.raises(EvaluationError, match=r"the data has 2 classes .* and the classifier 4, by order"):
        match(("cat", "coffee"), [named("a", *NAMES)], by_order=True)


def test_the_background_class_is_passed_over() -> None:
    network = replace(member(name="slim"), num_classes=5, background=True)
    labels = match(NAMES, [network])
    assert (labels.index, labels.names) == ((1, 2, 3, 4), ("background", *NAMES))
    with pytest.raises(EvaluationError, match=r"the data has 5 classes .* and the classifier 4"):
        match((*NAMES, "x"), [network])

"""Loading weights into a model: all or nothing, with the key that does not fit named."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import TinyNet, assert_same, message_of, save_tensors, tiny_state
from torch import Tensor, nn

from googlenet_fused.models import googlenet
from googlenet_fused.weights import Description, WeightsError, load_weights, save_described
from googlenet_fused.weights.files import SUFFIXES


def refusal(model: nn.Module, tensors: dict[str, Tensor], path: Path, **kwargs: Any) -> str:
    """The message with which ``load_weights`` refuses ``tensors``; the model must come out exactly as it was."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        load_weights(model, save_tensors(tensors, path), **kwargs)
    assert_same(model.state_dict(), before)
    message = message_of(error)
    assert message.startswith(str(path))
    return message


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "w.pth"


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_load_fills_the_model(name: str, tmp_path: Path) -> None:
    model, expected = TinyNet(), tiny_state()
    result = load_weights(model, save_tensors(expected, tmp_path / name))
    assert_same(model.state_dict(), expected)
    assert result == (tmp_path / name, None, [], [])
    assert model.transform_input is False


def test_load_converts_to_the_dtype_of_the_model(path: Path) -> None:
    tensors = tiny_state()
    model = TinyNet().to(torch.bfloat16)
    load_weights(model, save_tensors(tensors, path))
    torch.testing.assert_close(model.fc.weight.data, tensors["fc.weight"].to(torch.bfloat16), rtol=0, atol=0)


def test_load_names_the_first_wrong_key_in_the_order_of_the_model(path: Path) -> None:
    tensors = dict(reversed(tiny_state(classes=9).items()))
    tensors["conv1.conv.weight"] = torch.zeros(4, 3, 5, 5)
    message = refusal(TinyNet(), tensors, path)
    assert "conv1.conv.weight has shape [4, 3, 5, 5] in the file and [4, 3, 3, 3] in the model" in message
    assert "; in all 3 keys of the model not fitting" in message


def test_load_leaves_the_model_alone_when_only_the_last_key_is_wrong(path: Path) -> None:
    tensors = tiny_state()
    tensors["fc.bias"] = torch.zeros(6)
    assert "fc.bias has shape [6] in the file and [5] in the model" in refusal(TinyNet(), tensors, path)
    assert "fc.bias has shape" in refusal(TinyNet(), tensors, path, strict=False)


def test_load_refuses_missing_and_unexpected_keys(path: Path) -> None:
    tensors = tiny_state()
    del tensors["conv1.bn.weight"]
    assert "conv1.bn.weight is missing in the file" in refusal(TinyNet(), tensors, path)
    tensors = {"conv0.weight": torch.zeros(1), **tiny_state()}
    assert "conv0.weight is in the file and not in the model; no other key is wrong" in refusal(TinyNet(), tensors, path)
    del tensors["fc.bias"]
    message = refusal(TinyNet(), tensors, path)
    assert "fc.bias is missing in the file" in message
    assert "in all 1 key of the model not fitting, 1 key of the file not in the model (first: conv0.weight)" in message
    tensors["conv00.weight"] = torch.zeros(1)
    assert "1 key of the model not fitting, 2 keys of the file not in the model" in refusal(TinyNet(), tensors, path)


def test_load_not_strict_tells_what_it_left_out(path: Path) -> None:
    tensors = {"conv0.weight": torch.zeros(1), **tiny_state()}
    del tensors["fc.bias"]
    model = TinyNet()
    bias = model.fc.bias.data.clone()
    result = load_weights(model, save_tensors(tensors, path), strict=False)
    assert result.missing_keys == ["fc.bias"]
    assert result.unexpected_keys == ["conv0.weight"]
    assert torch.equal(model.fc.weight, tensors["fc.weight"])
    assert torch.equal(model.fc.bias, bias)


def test_load_refuses_a_file_with_nothing_for_the_model(path: Path) -> None:
    assert "no key in common" in refusal(TinyNet(), {"unet.weight": torch.ones(1)}, path, strict=False)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_load_refuses_another_kind_of_number(dtype: torch.dtype, path: Path) -> None:
    tensors = tiny_state()
    tensors["fc.bias"] = torch.zeros(5, dtype=dtype)
    assert f"fc.bias has dtype {dtype} in the file and torch.float32 in the model" in refusal(TinyNet(), tensors, path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_load_refuses_values_that_are_not_finite(bad: float, path: Path) -> None:
    tensors = tiny_state()
    tensors["conv1.bn.running_var"][1] = bad
    assert "conv1.bn.running_var holds 1 NaN or infinite value as" in refusal(TinyNet(), tensors, path)
    several = {**tiny_state(), "fc.bias": torch.full((5,), bad)}
    assert "fc.bias holds 5 NaN or infinite values as" in refusal(TinyNet(), several, path)
    save_tensors(tensors, path)
    model = TinyNet()
    load_weights(model, path, allow_nonfinite=True)
    assert_same(model.state_dict(), tensors, equal_nan=True)


def test_load_refuses_values_that_overflow_in_the_model(path: Path) -> None:
    tensors = tiny_state()
    tensors["fc.bias"][0] = 1e6
    assert "fc.bias holds 1 NaN or infinite value as torch.float16" in refusal(TinyNet().half(), tensors, path)


def test_load_refuses_a_model_without_memory(path: Path) -> None:
    with pytest.raises(WeightsError, match="to_empty"):
        load_weights(TinyNet().to("meta"), save_tensors(tiny_state(), path))


def test_load_passes_over_auxiliary_heads_that_the_model_lacks(path: Path) -> None:
    model, tensors = TinyNet(), tiny_state(aux=True)
    result = load_weights(model, save_tensors(tensors, path))
    assert torch.equal(model.fc.weight, tensors["fc.weight"])
    assert result.unexpected_keys == [key for key in tensors if key.startswith("aux")]
    assert len(result.unexpected_keys) == 4


def test_load_refuses_strange_keys_in_heads_that_the_model_has(path: Path) -> None:
    tensors = {**tiny_state(aux=True), "aux1.extra": torch.zeros(1)}
    assert "aux1.extra is in the file and not in the model" in refusal(TinyNet(aux=True), tensors, path)


def test_load_says_how_to_do_without_heads(path: Path) -> None:
    message = refusal(TinyNet(aux=True), tiny_state(), path)
    assert "aux1.0.weight is missing" in message
    assert "aux_logits=False" in message


def test_load_does_without_counters_on_either_side(path: Path) -> None:
    tensors = tiny_state()
    tensors.pop("conv1.bn.num_batches_tracked")
    model = TinyNet()
    result = load_weights(model, save_tensors(tensors, path))
    assert result.missing_keys == ["conv1.bn.num_batches_tracked"]
    assert torch.equal(model.conv1.bn.running_var, tensors["conv1.bn.running_var"])  # type: ignore[union-attr, arg-type]

    model.conv1.bn.num_batches_tracked = None  # type: ignore[union-attr]
    assert load_weights(model, save_tensors(tiny_state(), path)).unexpected_keys == ["conv1.bn.num_batches_tracked"]


def test_load_says_how_many_classes_the_file_has(path: Path) -> None:
    message = refusal(TinyNet(), tiny_state(classes=9), path)
    assert "fc.weight has shape [9, 4] in the file and [5, 4] in the model" in message
    assert message.endswith("The file's classifier has 9 outputs: build the model with num_classes=9")
    assert refusal(TinyNet(), tiny_state(classes=1), path).endswith("has 1 output: build the model with num_classes=1")


def test_load_refuses_for_models_that_are_no_googlenet(path: Path) -> None:
    message = refusal(nn.Linear(2, 3), {"weight": torch.zeros(3, 4), "bias": torch.zeros(3)}, path)
    assert message.endswith("weight has shape [3, 4] in the file and [3, 2] in the model; no other key is wrong")


def test_load_names_the_variants_it_was_asked_to_mix(path: Path) -> None:
    nets = {name: googlenet(name, num_classes=2, aux_logits=False, init_weights=False) for name in ("torchvision", "bvlc")}
    message = refusal(nets["bvlc"], nets["torchvision"].state_dict(), path)
    assert "conv1.conv.bias is missing in the file" in message
    assert "The file holds the 'torchvision' variant" in message
    assert "the model is the 'bvlc' variant" in message
    message = refusal(nets["torchvision"], nets["bvlc"].state_dict(), path)
    assert "conv1.bn.weight is missing in the file" in message
    assert "The file holds the 'bvlc' variant" in message


class OtherWeights(Enum):
    DEFAULT = "other"


@pytest.mark.parametrize(
    ("source", "got"),
    [
        (7, r"7 \(int\)"),
        (OtherWeights.DEFAULT, r"<OtherWeights\.DEFAULT: 'other'> \(\S*test_weights_load\.OtherWeights\)"),
        (TinyNet().state_dict(), r"collections\.OrderedDict"),
    ],
)
def test_sources_of_another_type_are_refused_under_the_name_of_the_argument(source: Any, got: str) -> None:
    with pytest.raises(TypeError, match=f"^source must be a path, .* or its name, got {got}$"):
        load_weights(TinyNet(), source)
    with pytest.raises(TypeError, match=f"^weights must be a path, .* or its name, got {got}$"):
        googlenet(weights=source)


def test_load_refuses_none() -> None:
    with pytest.raises(TypeError, match=r"^source must be a path, .* got NoneType$"):
        load_weights(TinyNet(), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("load", [lambda name: load_weights(TinyNet(), name), lambda name: googlenet(weights=name)])
def test_a_word_that_is_neither_a_file_nor_a_name_gets_the_choice(load: Callable[[str], object]) -> None:
    with pytest.raises(WeightsError) as error:
        load("imagenet")
    assert message_of(error) == (
        "imagenet: there is no such file, and no published weights of that name: "
        f"give a {', '.join(SUFFIXES)} file, 'DEFAULT' or 'IMAGENET1K_V1'"
    )
    with pytest.raises(WeightsError, match=r"none\.pth: there is no such file$"):
        load("none.pth")


def test_a_file_of_another_suffix_is_not_called_missing(tmp_path: Path) -> None:
    (tmp_path / "w.onnx").write_bytes(b"data")
    with pytest.raises(WeightsError, match="unsupported suffix"):
        load_weights(TinyNet(), str(tmp_path / "w.onnx"))


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_file_from_torchvision_gives_its_outputs(name: str, tmp_path: Path) -> None:
    theirs = pytest.importorskip("torchvision").models.GoogLeNet(num_classes=10, init_weights=False).eval()
    path = save_tensors(theirs.state_dict(), tmp_path / name)
    ours = googlenet("torchvision", num_classes=10, aux_logits=False, init_weights=False).eval()
    result = load_weights(ours, path)
    assert {key.partition(".")[0] for key in result.unexpected_keys} == {"aux1", "aux2"}
    image = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(image), theirs(image))


@pytest.mark.parametrize("transform_input", [True, False])
def test_a_description_says_what_the_input_transform_is_to_be(transform_input: bool, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_described(path, tiny_state(), Description("torchvision", 5, transform_input=transform_input))
    model = TinyNet()
    model.transform_input = not transform_input
    load_weights(model, path)
    assert model.transform_input is transform_input

    plain = nn.Linear(1, 1)
    save_described(path, {"weight": torch.ones(1, 1), "bias": torch.ones(1)}, Description("torchvision", 1))
    load_weights(plain, path)
    assert not hasattr(plain, "transform_input")


@pytest.mark.parametrize("strict", [True, False])
def test_load_names_the_variant_of_a_description(strict: bool, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_described(path, tiny_state(), Description("bvlc", 5, transform_input=True))
    model = TinyNet()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        load_weights(model, path, strict=strict)
    assert message_of(error) == (
        f"{path} says that it is for the 'bvlc' variant, and the model is the 'torchvision' variant: build a 'bvlc' model"
    )
    assert_same(model.state_dict(), before)
    assert model.transform_input is False


def test_a_model_that_says_its_variant_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_described(path, tiny_state(), Description("of my own", 5))
    model = TinyNet()
    model.variant = "of my own"  # type: ignore[assignment]
    load_weights(model, path)
    save_described(path, tiny_state(), Description("torchvision", 5))
    with pytest.raises(WeightsError, match="the model is the 'of my own' variant"):
        load_weights(model, path)
    with pytest.raises(WeightsError) as error:
        load_weights(model, "DEFAULT")
    assert message_of(error).startswith("no weights are published for the 'of my own' variant: give a .pth, .pt,")
    with pytest.raises(WeightsError) as error:
        load_weights(model, "imagenet")
    assert message_of(error).endswith(
        "no published weights of that name: give a " + " or ".join(", ".join(SUFFIXES).rsplit(", ", 1)) + " file"
    )

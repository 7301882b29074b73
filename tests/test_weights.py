"""Weights: the published enum, the download and its cache, reading files, and loading all or nothing."""

from __future__ import annotations

import hashlib
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from googlenet_fused.blocks import BasicConv2d
from googlenet_fused.models import googlenet
from googlenet_fused.weights import (
    GoogLeNet_Weights,
    Weights,
    WeightsError,
    fetch,
    load_weights,
    published_as,
    read_state_dict,
)

MEMBER = GoogLeNet_Weights.IMAGENET1K_V1


class Tiny(nn.Module):
    """A model with GoogLeNet's key names, in a few hundred numbers."""

    def __init__(self, classes: int = 5, norm: Any = "batch", aux: bool = False) -> None:
        super().__init__()
        self.transform_input = False
        self.conv1 = BasicConv2d(3, 4, kernel_size=3, norm=norm)
        if aux:
            self.aux1 = nn.Sequential(nn.Linear(4, 3))
            self.aux2 = nn.Sequential(nn.Linear(4, 3))
        self.fc = nn.Linear(4, classes)


def values(**kwargs: Any) -> dict[str, Tensor]:
    """A ``Tiny``'s state_dict, every floating-point value drawn at random."""
    state = Tiny(**kwargs).state_dict()
    return {key: torch.randn_like(value) if value.is_floating_point() else value + 7 for key, value in state.items()}


def save(tensors: Any, path: Path, **kwargs: Any) -> Path:
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(tensors, path)
    else:
        torch.save(tensors, path, **kwargs)
    return path


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=0, atol=0, equal_nan=True)


def message_of(error: pytest.ExceptionInfo[BaseException]) -> str:
    """The error's text, which must be one line."""
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


def test_enum_states_what_torchvision_states() -> None:
    theirs = pytest.importorskip("torchvision").models.GoogLeNet_Weights.IMAGENET1K_V1
    assert GoogLeNet_Weights.DEFAULT is MEMBER
    assert MEMBER.url == theirs.url
    assert MEMBER.filename == "googlenet-1378be20.pth"
    assert MEMBER.sha256 == "1378be20"
    for key in MEMBER.meta:
        assert MEMBER.meta[key] == theirs.meta[key]
    assert set(MEMBER.meta) == {"num_params", "min_size", "_metrics", "categories"}
    assert len(MEMBER.meta["categories"]) == 1000
    pixels = torch.randint(0, 256, (3, 300, 410), dtype=torch.uint8)
    torch.testing.assert_close(MEMBER.transforms()(pixels), theirs.transforms()(pixels), rtol=0, atol=0)


def test_enum_needs_torchvision_only_where_it_says() -> None:
    program = (
        "import sys; from googlenet_fused.weights import GoogLeNet_Weights as W\n"
        "assert W.DEFAULT.meta['num_params'] == 6624904 and 'categories' in W.DEFAULT.meta and repr(W.DEFAULT)\n"
        "assert 'torchvision' not in sys.modules, 'torchvision was imported'"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize("use", [lambda: MEMBER.transforms(), lambda: MEMBER.meta["categories"]])
def test_missing_torchvision_names_the_extra(use: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ImportError, match=r"pip install 'googlenet-fused\[tools\]'"):
        use()


def test_torchvision_that_does_not_fit_torch_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"torchvision::nms does not exist.*belong together"):
        MEMBER.transforms()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str] = []
        self.body = b""
        self.missing_bytes = 0

    def weights(self, body: bytes, sha256: str | None = None) -> Weights:
        self.body = body
        url = f"http://127.0.0.1:{self.server_address[1]}/models/net.pth?version=1"
        return replace(MEMBER.value, url=url, sha256=sha256 or hashlib.sha256(body).hexdigest()[:8])


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        self.send_response(200 if self.server.body else 404)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body[: len(self.server.body) - self.server.missing_bytes])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def dead_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/net.pth"


def test_fetch_downloads_once(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = server.weights(b"weights" * 100_000)
    cache = tmp_path / "not" / "yet"
    path = fetch(weights, cache)
    assert path == cache / "net.pth"
    assert path.read_bytes() == server.body
    assert list(cache.iterdir()) == [path]
    output = capsys.readouterr()
    assert output.out == ""
    assert weights.url in output.err
    assert "100" in output.err
    assert fetch(weights, str(cache)) == path
    assert len(server.requests) == 1
    assert capsys.readouterr().err == ""


def test_fetch_is_silent_without_progress(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fetch(server.weights(b"weights"), tmp_path, progress=False)
    assert capsys.readouterr() == ("", "")


def test_fetch_uses_the_cache_of_torch_hub(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert fetch(server.weights(b"weights"), progress=False) == tmp_path / "hub" / "checkpoints" / "net.pth"


def test_fetch_refuses_a_download_with_another_digest(server: Server, tmp_path: Path) -> None:
    weights = server.weights(b"not the weights", sha256="1378be20")
    with pytest.raises(WeightsError) as error:
        fetch(weights, tmp_path, progress=False)
    message = message_of(error)
    assert "1378be20" in message
    assert hashlib.sha256(b"not the weights").hexdigest() in message
    assert list(tmp_path.iterdir()) == []


def test_fetch_refuses_a_download_cut_short(server: Server, tmp_path: Path) -> None:
    weights = server.weights(b"weights" * 1000)
    server.missing_bytes = 10
    with pytest.raises(WeightsError, match="hash"):
        fetch(weights, tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_fetch_reports_what_the_server_says(server: Server, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="404") as error:
        fetch(server.weights(b"", sha256="00"), tmp_path, progress=False)
    assert "--weights FILE" in message_of(error)
    assert list(tmp_path.iterdir()) == []


def test_fetch_without_a_network_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    weights = replace(MEMBER.value, url=dead_url())
    start = time.monotonic()
    with pytest.raises(WeightsError) as error:
        fetch(weights, tmp_path, progress=False)
    assert time.monotonic() - start < 5
    message = message_of(error)
    assert weights.url in message
    assert "refused" in message
    assert "--weights FILE" in message
    assert "load_weights" in message
    assert list(tmp_path.iterdir()) == []


def test_fetch_does_not_wait_for_a_silent_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        weights = replace(MEMBER.value, url=f"http://127.0.0.1:{silent.getsockname()[1]}/net.pth")
        start = time.monotonic()
        with pytest.raises(WeightsError, match="timed out"):
            fetch(weights, tmp_path, progress=False, timeout=0.2)
        assert time.monotonic() - start < 5
    assert socket.getdefaulttimeout() is None


def test_fetch_never_uses_a_wrong_cached_file(server: Server, tmp_path: Path) -> None:
    weights = server.weights(b"weights", sha256="1378be20")
    cached = tmp_path / "net.pth"
    cached.write_bytes(b"something else")
    with pytest.raises(WeightsError) as error:
        fetch(weights, tmp_path)
    message = message_of(error)
    assert str(cached) in message
    assert "1378be20" in message
    assert hashlib.sha256(b"something else").hexdigest() in message
    assert "delete it" in message
    assert cached.read_bytes() == b"something else"
    assert server.requests == []


def test_fetch_reports_an_unusable_cache(server: Server, tmp_path: Path) -> None:
    weights = server.weights(b"weights")
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="file"):
        fetch(weights, tmp_path / "file" / "cache", progress=False)
    (tmp_path / "net.pth").mkdir()
    with pytest.raises(WeightsError, match=r"net\.pth: Is a directory"):
        fetch(weights, tmp_path, progress=False)


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.PTH", "w.safetensors"])
def test_read_gives_back_what_was_saved(name: str, tmp_path: Path) -> None:
    expected = values()
    actual = read_state_dict(str(save(expected, tmp_path / name)))
    assert_same(actual, expected)
    assert all(type(value) is Tensor and not value.requires_grad for value in actual.values())


def test_read_takes_files_from_before_torch_1_6(tmp_path: Path) -> None:
    expected = values()
    path = save(expected, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    assert_same(read_state_dict(path), expected)


def test_read_takes_parameters_and_keeps_the_order(tmp_path: Path) -> None:
    expected = {"z": nn.Parameter(torch.ones(2)), "a": nn.Parameter(torch.zeros(3))}
    actual = read_state_dict(save(expected, tmp_path / "w.pth"))
    assert list(actual) == ["z", "a"]
    assert not actual["z"].requires_grad


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_read_opens_checkpoints(wrapper: str, prefix: str, tmp_path: Path) -> None:
    expected = values()
    checkpoint = {"epoch": 3, wrapper: {prefix + key: value for key, value in expected.items()}, "optimizer": {"lr": 0.1}}
    assert_same(read_state_dict(save(checkpoint, tmp_path / "w.pth")), expected)


def test_read_keeps_a_prefix_that_not_every_key_has(tmp_path: Path) -> None:
    expected = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert_same(read_state_dict(save(expected, tmp_path / "w.pth")), expected)


def test_read_does_not_follow_later_changes_of_the_file(tmp_path: Path) -> None:
    for name in ("w.safetensors", "w.pth"):
        path = save({"a": torch.ones(1000)}, tmp_path / name)
        tensors = read_state_dict(path)
        with open(path, "r+b") as file:
            file.write(bytes(path.stat().st_size))
        assert tensors["a"].sum() == 1000


def test_read_reports_a_missing_file_or_folder(tmp_path: Path) -> None:
    for path, reason in [(tmp_path / "no.pth", "no such file"), (tmp_path, "is a folder")]:
        with pytest.raises(WeightsError, match=reason) as error:
            read_state_dict(path)
        assert str(path) in message_of(error)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are a Unix thing")
def test_read_does_not_wait_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(WeightsError, match="not a regular file"):
        read_state_dict(tmp_path / "pipe.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"  <!DOCTYPE html><html><body>404</body></html>", "is a web page"),
        (b"<html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "Git LFS pointer"),
        (b"hello, world\n", "truncated, damaged or not a"),
        (b"\x00" * 64, "truncated, damaged or not a"),
        (b"\xff" * 64, "truncated, damaged or not a"),
        (b"PK\x03\x04" + b"\x00" * 60, "truncated, damaged or not a"),
    ],
)
def test_read_names_what_the_file_is(suffix: str, content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=reason) as error:
        read_state_dict(path)
    assert message_of(error).startswith(str(path))


def test_read_refuses_other_suffixes(tmp_path: Path) -> None:
    for name in ("w.onnx", "w.caffemodel", "w"):
        (tmp_path / name).write_bytes(b"data")
        with pytest.raises(WeightsError, match=r"unsupported suffix .*\.pth, \.pt and \.safetensors"):
            read_state_dict(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (torch.ones(3), "holds a Tensor, not a state_dict"),
        ([torch.ones(3)], "holds a list, not a state_dict"),
        ({}, "holds no tensors"),
        ({"state_dict": {}}, "holds no tensors"),
        ({"epoch": 3, "weights": {"a": torch.ones(1)}}, "entry 'epoch' is a int"),
        ({"a": torch.ones(1), "b": [1.0]}, "entry 'b' is a list"),
        ({1: torch.ones(1)}, "entry 1 is a Tensor"),
        ({"a": torch.eye(3).to_sparse()}, "tensor a is torch.sparse_coo"),
        ({"a": torch.empty(3, device="meta")}, "tensor a is without data"),
    ],
)
def test_read_refuses_what_is_not_tensors_by_name(content: object, reason: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=reason) as error:
        read_state_dict(save(content, tmp_path / "w.pth"))
    message_of(error)


def test_read_refuses_whole_models(tmp_path: Path) -> None:
    for new_format in (True, False):
        path = save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "w.pth", _use_new_zipfile_serialization=new_format)
        with pytest.raises(WeightsError, match=r"torch\.nn\.\S+\.Sequential.*Save model\.state_dict\(\)") as error:
            read_state_dict(path)
        assert "weights_only" not in message_of(error)


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "pickle protocol 2"])
def test_read_runs_no_code_from_the_file(kind: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "was here", tmp_path / "w.pth"
    content = {"a": torch.ones(1), "b": Malicious(marker)}
    if kind.startswith("pickle"):
        path.write_bytes(pickle.dumps(Malicious(marker), protocol=2 if "2" in kind else None))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(WeightsError) as error:
        read_state_dict(path)
    message_of(error)
    assert not marker.exists()

    if not kind.startswith("pickle"):
        torch.load(path, weights_only=False)
        assert marker.exists(), "the file does nothing, so the test proves nothing"


@pytest.mark.parametrize("kind", ["w.pth", "legacy.pth", "w.safetensors"])
def test_read_reports_every_truncation(kind: str, tmp_path: Path) -> None:
    options = {"_use_new_zipfile_serialization": False} if kind == "legacy.pth" else {}
    path = save(values(), tmp_path / kind, **options)
    whole = path.read_bytes()
    for length in {1, 2, 5, 9, *range(16, len(whole), len(whole) // 40), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError) as error:
            read_state_dict(path)
        assert message_of(error).startswith(str(path))


def test_read_finds_a_flipped_bit_that_torch_load_takes(tmp_path: Path) -> None:
    tensors = values()
    path = save(tensors, tmp_path / "w.pth")
    content = bytearray(path.read_bytes())
    content[content.index(tensors["fc.weight"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["fc.weight"], tensors["fc.weight"])
    with pytest.raises(WeightsError, match=r"is damaged: Bad CRC-32 for file 'w/data/\d+'"):
        read_state_dict(path)


def test_read_takes_files_saved_without_checksums(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = save(values(), tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert len(read_state_dict(path)) == len(values())


def test_missing_safetensors_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(values(), tmp_path / "w.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'googlenet-fused\[tools\]'"):
        read_state_dict(path)


def refusal(model: nn.Module, tensors: dict[str, Tensor], path: Path, **kwargs: Any) -> str:
    """The message with which ``load_weights`` refuses ``tensors``; the model must come out exactly as it was."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        load_weights(model, save(tensors, path), **kwargs)
    assert_same(model.state_dict(), before)
    message = message_of(error)
    assert message.startswith(str(path))
    return message


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "w.pth"


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_load_fills_the_model(name: str, tmp_path: Path) -> None:
    model, expected = Tiny(), values()
    result = load_weights(model, save(expected, tmp_path / name))
    assert_same(model.state_dict(), expected)
    assert result == (tmp_path / name, None, [], [])
    assert model.transform_input is False


def test_load_converts_to_the_dtype_of_the_model(path: Path) -> None:
    tensors = values()
    model = Tiny().to(torch.bfloat16)
    load_weights(model, save(tensors, path))
    torch.testing.assert_close(model.fc.weight.data, tensors["fc.weight"].to(torch.bfloat16), rtol=0, atol=0)


def test_load_names_the_first_wrong_key_in_the_order_of_the_model(path: Path) -> None:
    tensors = dict(reversed(values(classes=9).items()))
    tensors["conv1.conv.weight"] = torch.zeros(4, 3, 5, 5)
    message = refusal(Tiny(), tensors, path)
    assert "conv1.conv.weight has shape [4, 3, 5, 5] in the file and [4, 3, 3, 3] in the model" in message
    assert "3 of the model's keys do not fit" in message


def test_load_leaves_the_model_alone_when_only_the_last_key_is_wrong(path: Path) -> None:
    tensors = values()
    tensors["fc.bias"] = torch.zeros(6)
    assert "fc.bias has shape [6] in the file and [5] in the model" in refusal(Tiny(), tensors, path)
    assert "fc.bias has shape" in refusal(Tiny(), tensors, path, strict=False)


def test_load_refuses_missing_and_unexpected_keys(path: Path) -> None:
    tensors = values()
    del tensors["conv1.bn.weight"]
    assert "conv1.bn.weight is missing in the file" in refusal(Tiny(), tensors, path)
    tensors = {"conv0.weight": torch.zeros(1), **values()}
    assert "conv0.weight is in the file and not in the model" in refusal(Tiny(), tensors, path)
    del tensors["fc.bias"]
    message = refusal(Tiny(), tensors, path)
    assert "fc.bias is missing in the file" in message
    assert "1 keys of the file are not in the model (first: conv0.weight)" in message


def test_load_not_strict_tells_what_it_left_out(path: Path) -> None:
    tensors = {"conv0.weight": torch.zeros(1), **values()}
    del tensors["fc.bias"]
    model = Tiny()
    bias = model.fc.bias.data.clone()
    result = load_weights(model, save(tensors, path), strict=False)
    assert result.missing_keys == ["fc.bias"]
    assert result.unexpected_keys == ["conv0.weight"]
    assert torch.equal(model.fc.weight, tensors["fc.weight"])
    assert torch.equal(model.fc.bias, bias)


def test_load_refuses_a_file_with_nothing_for_the_model(path: Path) -> None:
    assert "no key in common" in refusal(Tiny(), {"unet.weight": torch.ones(1)}, path, strict=False)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_load_refuses_another_kind_of_number(dtype: torch.dtype, path: Path) -> None:
    tensors = values()
    tensors["fc.bias"] = torch.zeros(5, dtype=dtype)
    assert f"fc.bias has dtype {dtype} in the file and torch.float32 in the model" in refusal(Tiny(), tensors, path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_load_refuses_values_that_are_not_finite(bad: float, path: Path) -> None:
    tensors = values()
    tensors["conv1.bn.running_var"][1] = bad
    assert "conv1.bn.running_var holds 1 NaN or infinite values" in refusal(Tiny(), tensors, path)
    model = Tiny()
    load_weights(model, path, allow_nonfinite=True)
    assert_same(model.state_dict(), tensors)


def test_load_refuses_values_that_overflow_in_the_model(path: Path) -> None:
    tensors = values()
    tensors["fc.bias"][0] = 1e6
    assert "fc.bias holds 1 NaN or infinite values as torch.float16" in refusal(Tiny().half(), tensors, path)


def test_load_refuses_a_model_without_memory(path: Path) -> None:
    with pytest.raises(WeightsError, match="to_empty"):
        load_weights(Tiny().to("meta"), save(values(), path))


def test_load_passes_over_auxiliary_heads_that_the_model_lacks(path: Path) -> None:
    model, tensors = Tiny(), values(aux=True)
    result = load_weights(model, save(tensors, path))
    assert torch.equal(model.fc.weight, tensors["fc.weight"])
    assert result.unexpected_keys == [key for key in tensors if key.startswith("aux")]
    assert len(result.unexpected_keys) == 4


def test_load_refuses_strange_keys_in_heads_that_the_model_has(path: Path) -> None:
    tensors = {**values(aux=True), "aux1.extra": torch.zeros(1)}
    assert "aux1.extra is in the file and not in the model" in refusal(Tiny(aux=True), tensors, path)


def test_load_says_how_to_do_without_heads(path: Path) -> None:
    message = refusal(Tiny(aux=True), values(), path)
    assert "aux1.0.weight is missing" in message
    assert "aux_logits=False" in message


def test_load_does_without_counters_on_either_side(path: Path) -> None:
    tensors = values()
    tensors.pop("conv1.bn.num_batches_tracked")
    model = Tiny()
    result = load_weights(model, save(tensors, path))
    assert result.missing_keys == ["conv1.bn.num_batches_tracked"]
    assert torch.equal(model.conv1.bn.running_var, tensors["conv1.bn.running_var"])  # type: ignore[union-attr, arg-type]

    model.conv1.bn.num_batches_tracked = None  # type: ignore[union-attr]
    assert load_weights(model, save(values(), path)).unexpected_keys == ["conv1.bn.num_batches_tracked"]


def test_load_says_how_many_classes_the_file_has(path: Path) -> None:
    message = refusal(Tiny(), values(classes=9), path)
    assert "fc.weight has shape [9, 4] in the file and [5, 4] in the model" in message
    assert "num_classes=9" in message


def test_load_refuses_for_models_that_are_no_googlenet(path: Path) -> None:
    message = refusal(nn.Linear(2, 3), {"weight": torch.zeros(3, 4), "bias": torch.zeros(3)}, path)
    assert "weight has shape [3, 4] in the file and [3, 2] in the model; in all 1 of the model's keys do not fit" in message


def test_load_names_the_variants_it_was_asked_to_mix(path: Path) -> None:
    nets = {name: googlenet(name, num_classes=2, aux_logits=False, init_weights=False) for name in ("torchvision", "bvlc")}
    message = refusal(nets["bvlc"], nets["torchvision"].state_dict(), path)
    assert "conv1.conv.bias is missing in the file" in message
    assert "The file holds the 'torchvision' variant" in message
    assert "the model is the 'bvlc' variant" in message
    message = refusal(nets["torchvision"], nets["bvlc"].state_dict(), path)
    assert "conv1.bn.weight is missing in the file" in message
    assert "The file holds the 'bvlc' variant" in message


def test_load_refuses_sources_of_another_type() -> None:
    for source in (7, None, Tiny().state_dict()):
        with pytest.raises(TypeError, match="source must be a path"):
            load_weights(Tiny(), source)  # type: ignore[arg-type]


def test_published_weights_switch_the_input_transform_on(
    server: Server, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = values()
    body = save(tensors, path).read_bytes()
    monkeypatch.setattr(MEMBER, "_value_", server.weights(body))
    cache = tmp_path / "cache"
    for source in (MEMBER, "DEFAULT", "IMAGENET1K_V1", path, str(path)):
        model = Tiny()
        result = load_weights(model, source, cache_dir=cache, progress=False)
        assert_same(model.state_dict(), tensors)
        assert result.published is MEMBER
        assert model.transform_input is True
    assert len(server.requests) == 1
    assert published_as(path) is MEMBER

    wrong = Tiny(classes=6)
    with pytest.raises(WeightsError):
        load_weights(wrong, MEMBER, cache_dir=cache)
    assert wrong.transform_input is False

    plain = nn.Linear(1, 1)
    load_weights(plain, save({"weight": torch.ones(1, 1), "bias": torch.ones(1)}, path))
    assert not hasattr(plain, "transform_input")


def test_weights_of_your_own_are_fetched_and_leave_the_input_transform(server: Server, path: Path, tmp_path: Path) -> None:
    weights = server.weights(save(values(), path).read_bytes())
    model = Tiny()
    result = load_weights(model, weights, cache_dir=tmp_path / "cache", progress=False)
    assert result.path == tmp_path / "cache" / "net.pth"
    assert result.published is None
    assert model.transform_input is False


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_file_from_torchvision_gives_its_outputs(name: str, tmp_path: Path) -> None:
    theirs = pytest.importorskip("torchvision").models.GoogLeNet(num_classes=10, init_weights=False).eval()
    path = save(theirs.state_dict(), tmp_path / name)
    ours = googlenet("torchvision", num_classes=10, aux_logits=False, init_weights=False).eval()
    result = load_weights(ours, path)
    assert {key.partition(".")[0] for key in result.unexpected_keys} == {"aux1", "aux2"}
    image = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(image), theirs(image))

"""The published weights: the enum, the download and its cache, and loading them by name."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from cases import TinyNet, assert_same, message_of, save_tensors, tiny_state
from torch import nn

from googlenet_fused.models import googlenet
from googlenet_fused.weights import GoogLeNet_Weights, Weights, WeightsError, fetch, load_weights, published_as

MEMBER = GoogLeNet_Weights.IMAGENET1K_V1


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
    for way in ('googlenet(weights="FILE")', 'googlenet_fused.weights.load_weights(model, "FILE")', "--weights FILE"):
        assert message.count(way) == 1
    assert message.endswith("--weights FILE"), "the command line goes on with '; or ... --weights random'"
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


def test_published_weights_switch_the_input_transform_on(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, path = tiny_state(), tmp_path / "w.pth"
    body = save_tensors(tensors, path).read_bytes()
    monkeypatch.setattr(MEMBER, "_value_", server.weights(body))
    cache = tmp_path / "cache"
    for source in (MEMBER, "DEFAULT", "default", "Default", "IMAGENET1K_V1", "imagenet1k_v1", path, str(path)):
        model = TinyNet()
        result = load_weights(model, source, cache_dir=cache, progress=False)
        assert_same(model.state_dict(), tensors)
        assert result.published is MEMBER
        assert model.transform_input is True
    assert len(server.requests) == 1
    assert published_as(path) is MEMBER

    wrong = TinyNet(classes=6)
    with pytest.raises(WeightsError):
        load_weights(wrong, MEMBER, cache_dir=cache)
    assert wrong.transform_input is False

    plain = nn.Linear(1, 1)
    load_weights(plain, save_tensors({"weight": torch.ones(1, 1), "bias": torch.ones(1)}, path))
    assert not hasattr(plain, "transform_input")


@pytest.mark.parametrize("weights", ["DEFAULT", "default", MEMBER])
def test_published_weights_are_not_fetched_for_the_other_variant(
    weights: str | GoogLeNet_Weights, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(MEMBER, "_value_", server.weights(b"weights"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    bvlc = googlenet("bvlc", init_weights=False)
    for load in (lambda: googlenet("bvlc", weights=weights, progress=False), lambda: load_weights(bvlc, weights)):
        with pytest.raises(WeightsError) as error:
            load()
        message = message_of(error)
        assert "no weights are published for the 'bvlc' variant" in message
        assert "give a .pth, .pt or .safetensors file" in message
    assert server.requests == []
    with pytest.raises(WeightsError, match="truncated, damaged"):
        googlenet(weights=weights, progress=False)
    assert len(server.requests) == 1


def test_weights_of_your_own_are_fetched_and_leave_the_input_transform(server: Server, tmp_path: Path) -> None:
    weights = server.weights(save_tensors(tiny_state(), tmp_path / "w.pth").read_bytes())
    model = TinyNet()
    result = load_weights(model, weights, cache_dir=tmp_path / "cache", progress=False)
    assert result.path == tmp_path / "cache" / "net.pth"
    assert result.published is None
    assert model.transform_input is False

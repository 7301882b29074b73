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
from caffe_net import bvlc_layers, caffemodel, random_blobs
from cases import TinyNet, assert_same, message_of, save_tensors, tiny_state
from torch import nn

from googlenet_fused.models import VARIANTS, VariantName, googlenet
from googlenet_fused.weights import (
    BVLC_GoogLeNet_Weights,
    GoogLeNet_Weights,
    PublishedWeights,
    Weights,
    WeightsError,
    fetch,
    load_weights,
    published_as,
    read_state_dict,
)
from googlenet_fused.weights.published import PUBLISHED

MEMBER = GoogLeNet_Weights.IMAGENET1K_V1
BVLC = BVLC_GoogLeNet_Weights.IMAGENET1K_V1


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


def test_enum_states_the_facts_of_bvlc() -> None:
    assert BVLC_GoogLeNet_Weights.DEFAULT is BVLC
    assert BVLC.filename == "bvlc_googlenet.caffemodel"
    assert (BVLC.size, len(BVLC.sha256), len(BVLC.meta["sha1"])) == (53_533_754, 64, 40)
    assert BVLC.meta["_metrics"] == {"ImageNet-1K": {"acc@1": 68.7, "acc@5": 88.9}}
    model = googlenet("bvlc", aux_logits=False, init_weights=False)
    assert BVLC.meta["num_params"] == sum(parameter.numel() for parameter in model.parameters())
    assert BVLC.meta["min_size"] == (VARIANTS["bvlc"].min_side,) * 2
    pytest.importorskip("torchvision")
    assert BVLC.meta["categories"] == MEMBER.meta["categories"]


def test_every_enum_is_for_one_variant() -> None:
    assert set(PUBLISHED) <= set(VARIANTS)
    for variant, members in PUBLISHED.items():
        assert {member.variant for member in members} == {variant}


def test_transforms_of_bvlc_do_what_caffe_does() -> None:
    """Against OpenCV, with which Caffe's convert_imageset warps images, in a fixed point of its own."""
    pytest.importorskip("torchvision")
    cv2 = pytest.importorskip("cv2")
    image = pytest.importorskip("PIL.Image")
    pixels = torch.nn.functional.interpolate(torch.rand(1, 3, 20, 31) * 255, (300, 410), mode="bicubic")[0].clamp(0, 255).byte()
    bgr = pixels.flip(0).permute(1, 2, 0).contiguous().numpy()
    warped = torch.from_numpy(cv2.resize(bgr, (256, 256), interpolation=cv2.INTER_LINEAR)).permute(2, 0, 1).float()
    expected = warped[:, 16:240, 16:240] - torch.tensor([104.0, 117.0, 123.0]).view(3, 1, 1)
    for given in (pixels, image.fromarray(pixels.permute(1, 2, 0).numpy())):
        prepared = BVLC.transforms()(given)
        assert type(prepared) is torch.Tensor
        assert prepared.dtype == torch.float32
        torch.testing.assert_close(prepared, expected, rtol=0, atol=1)
        assert (prepared - expected).abs().mean() < 0.5, "more than OpenCV's rounding"
    assert BVLC.transforms()(torch.zeros(2, 3, 9, 9, dtype=torch.uint8)).shape == (2, 3, 224, 224)
    assert BVLC.transforms(resize_size=73, crop_size=64)(pixels).shape == (3, 64, 64)


def test_enum_needs_torchvision_only_where_it_says() -> None:
    program = (
        "import sys; from googlenet_fused.weights import GoogLeNet_Weights as W\n"
        "assert W.DEFAULT.meta['num_params'] == 6624904 and 'categories' in W.DEFAULT.meta and repr(W.DEFAULT)\n"
        "assert 'torchvision' not in sys.modules, 'torchvision was imported'"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize(
    "use",
    [
        lambda: MEMBER.transforms(),
        lambda: MEMBER.meta["categories"],
        lambda: BVLC.transforms(),
        lambda: BVLC.meta["categories"],
    ],
)
def test_missing_torchvision_names_the_extra(use: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
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

    def weights(self, body: bytes, sha256: str | None = None, like: PublishedWeights = MEMBER) -> Weights:
        self.body = body
        url = f"http://127.0.0.1:{self.server_address[1]}/models/net{Path(like.filename).suffix}?version=1"
        digest = hashlib.sha256(body).hexdigest()[: len(like.sha256)]
        return replace(like.value, url=url, sha256=sha256 or digest, size=like.size and len(body))


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


def test_fetch_checks_the_size(server: Server, tmp_path: Path) -> None:
    weights = server.weights(b"weights", like=BVLC)
    cached = fetch(weights, tmp_path, progress=False)
    cached.write_bytes(b"weight")
    with pytest.raises(WeightsError) as error:
        fetch(weights, tmp_path)
    assert message_of(error) == (
        f"the cached file {cached} is not net.caffemodel: it has 6 bytes, expected 7; delete it to download it again"
    )
    assert len(server.requests) == 1
    cached.unlink()
    with pytest.raises(WeightsError, match="it has 7 bytes, expected 8"):
        fetch(replace(weights, size=8), tmp_path, progress=False)


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


@pytest.mark.parametrize("weights", ["DEFAULT", "default", "imagenet1k_v1", BVLC])
def test_a_name_stands_for_the_weights_of_the_variant(
    weights: str | PublishedWeights,
    caffemodel_file: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(caffemodel_file.parent))
    monkeypatch.setattr(BVLC, "_value_", server.weights(caffemodel_file.read_bytes(), like=BVLC))
    model = googlenet("bvlc", weights=weights, progress=False)
    assert_same(model.state_dict(), {k: v for k, v in read_state_dict(caffemodel_file).items() if not k.startswith("aux")})
    assert model.transform_input is False
    assert published_as(caffemodel_file) is BVLC
    result = load_weights(model, weights, progress=False)
    assert result.published is BVLC
    assert result.path == caffemodel_file.parent / "hub" / "checkpoints" / "net.caffemodel"
    assert model.transform_input is False
    assert {key.partition(".")[0] for key in result.unexpected_keys} == {"aux1", "aux2"}


@pytest.fixture(scope="module")
def caffemodel_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file like BVLC's, with weights drawn at random."""
    path = tmp_path_factory.mktemp("caffe") / "x.caffemodel"
    path.write_bytes(caffemodel(random_blobs(bvlc_layers()), "V1"))
    return path


@pytest.mark.parametrize(
    ("weights", "variant", "own"),
    [(MEMBER, "bvlc", "torchvision"), (BVLC, "torchvision", "bvlc"), (BVLC.value, "torchvision", "bvlc")],
)
def test_published_weights_are_not_fetched_for_another_variant(
    weights: PublishedWeights | Weights, variant: VariantName, own: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = server.weights(b"weights")
    monkeypatch.setattr(MEMBER, "_value_", served)
    monkeypatch.setattr(BVLC, "_value_", replace(served, variant="bvlc"))
    model = googlenet(variant, init_weights=False)
    for load in (lambda: googlenet(variant, weights=weights, progress=False), lambda: load_weights(model, weights)):
        with pytest.raises(WeightsError) as error:
            load()
        said = f" is for the {own!r} variant, and the model is the {variant!r} variant: build a {own!r} model"
        assert message_of(error).endswith(said)
        assert message_of(error).startswith("bvlc_googlenet.caffemodel" if isinstance(weights, Weights) else str(weights))
    assert server.requests == []


def test_a_fetched_file_that_is_no_weights_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for member, variant in ((MEMBER, "torchvision"), (BVLC, "bvlc")):
        monkeypatch.setattr(member, "_value_", server.weights(b"weights", like=member))
        with pytest.raises(WeightsError, match="truncated, damaged"):
            googlenet(variant, weights="DEFAULT", progress=False)
    assert len(server.requests) == 2


def test_a_published_file_is_not_loaded_into_another_variant_of_the_same_keys(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_tensors(tiny_state(), tmp_path / "w.pth")
    monkeypatch.setattr(MEMBER, "_value_", server.weights(path.read_bytes()))
    model = TinyNet()
    model.variant = "of my own"  # type: ignore[assignment]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        load_weights(model, path)
    assert message_of(error).startswith(
        f"{path}, which is {MEMBER}, is for the 'torchvision' variant, and the model is the 'of my"
    )
    assert_same(model.state_dict(), before)
    assert model.transform_input is False


def test_weights_of_your_own_are_fetched_and_leave_the_input_transform(server: Server, tmp_path: Path) -> None:
    weights = server.weights(save_tensors(tiny_state(), tmp_path / "w.pth").read_bytes())
    model = TinyNet()
    result = load_weights(model, weights, cache_dir=tmp_path / "cache", progress=False)
    assert result.path == tmp_path / "cache" / "net.pth"
    assert result.published is None
    assert model.transform_input is False

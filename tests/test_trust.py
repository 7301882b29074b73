"""Where automatic choice may use a GPU backend: records, self-checks, and what is remembered of them. No GPU is needed here."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import TINY, integer_convs, message_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from googlenet_fused.arithmetic import arithmetic
from googlenet_fused.backends import registry, trust
from googlenet_fused.backends.cpu import CpuBackend
from googlenet_fused.backends.reference import ReferenceBackend
from googlenet_fused.backends.registry import Backend, Problem
from googlenet_fused.backends.triton import backend as triton_backend
from googlenet_fused.backends.triton.plans import (
    DTYPES,
    FORMS,
    INTERPRETER,
    SPATIAL,
    Arithmetic,
    Request,
    configurations,
    configurations_for,
    hopper_or_later,
    plan_for,
    rule,
)
from googlenet_fused.backends.trust import Identity, Verification
from googlenet_fused.info import distribution_version
from googlenet_fused.packing import PackedInception, pack_inception
from googlenet_fused.spec import GOOGLENET_SPECS, InceptionSpec
from googlenet_fused.user_files import write_json

ROOT = Path(__file__).parents[1]
CPU = Problem(torch.device("cpu"), torch.float32, TINY)
CUDA = Problem(torch.device("cuda", 0), torch.float16, TINY)
HERE = Identity("NVIDIA Test", "sm_90", "580.1", "2.11.0", "3.6.0", "0123456789abcdef")


class Fake(ReferenceBackend):
    """The reference as a GPU backend, which counts how often it runs."""

    name = "fake"
    description = "made up by a test"
    needs_verification = True

    def __init__(self) -> None:
        self.calls = 0

    def doubt(self, problem: Problem) -> str | None:
        return trust.doubt(self, problem)

    def inception(self, x: Tensor, packed: PackedInception, prepared: tuple[Tensor, ...], out: Tensor) -> None:
        self.calls += 1
        super().inception(x, packed, prepared, out)


# The self-check.


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A self-check of the modules with odd widths only, and of one image in further ways: GoogLeNet's take seconds on a CPU."""
    monkeypatch.setattr(trust, "_IN_ALL_WAYS", (trust._IN_ALL_WAYS[0], (1, 14, 14)))
    monkeypatch.setattr(trust, "_RUNS", tuple(run for run in trust._RUNS if run[0] is None or run[0].in_channels < 100))


def test_modules_of_a_self_check() -> None:
    specs = [spec for spec, _ in trust._RUNS]
    assert None in specs, "the stem's convolution"
    assert {spec.large_kernel for spec in specs if spec is not None} == {3, 5}
    assert any(spec is not None and spec.in_channels == 832 for spec in specs), "GoogLeNet's"
    assert any(spec is not None and all(width % 2 for width in list(spec)[:7]) for spec in specs), "odd"


def test_a_right_backend_passes() -> None:
    assert trust.self_check(ReferenceBackend(), CPU) is None


def test_another_right_backend_passes(quick: None) -> None:
    backend = CpuBackend()
    if (reason := backend.supports(CPU)) is not None:
        pytest.skip(reason)
    assert trust.self_check(backend, CPU) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_in_every_dtype(dtype: torch.dtype, quick: None) -> None:
    assert trust.self_check(ReferenceBackend(), replace(CPU, dtype=dtype)) is None


def off_by_a_channel(self: Any, out: Tensor) -> None:
    out.copy_(out.roll(1, dims=1))


def off_by_a_little(self: Any, out: Tensor) -> None:
    out[-1, -1, -1, -1] += 0.01


def not_written(self: Any, out: Tensor) -> None:
    out[0, 0, 0, 0] = float("nan")


def other_each_time(self: Any, out: Tensor) -> None:
    if self.calls % 2:
        out[0, 0, 0, 0].copy_(out[0, 0, 0, 0].nextafter(torch.tensor(torch.inf)))


def beyond_its_end(self: Any, out: Tensor) -> None:
    flat = out.as_strided((1,), (1,), out.storage_offset() + out.numel())
    flat.fill_(0)


def before_its_start(self: Any, out: Tensor) -> None:
    out.as_strided((1,), (1,), out.storage_offset() - 1).fill_(0)


def raising(self: Any, out: Tensor) -> None:
    raise RuntimeError("no such instruction\nmore of it")


def raising_nothing(self: Any, out: Tensor) -> None:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (off_by_a_channel, "disagrees: at "),
        (off_by_a_little, "disagrees: at "),
        (not_written, "disagrees: at (0, 0, 0, 0) it is nan"),
        (other_each_time, "two runs on one input differ"),
        (beyond_its_end, "RuntimeError: it wrote outside its output"),
        (before_its_start, "RuntimeError: it wrote outside its output"),
        (raising, "RuntimeError: no such instruction"),
        (raising_nothing, "NotImplementedError: NotImplementedError()"),
    ],
)
@pytest.mark.parametrize("where", ["3x3", "5x5", "contiguous", "channels_last", "everywhere"])
def test_a_wrong_backend_fails(
    fault: Callable[[Any, Tensor], None], reason: str, where: str, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is wrong on some modules or layouts only."""

    class Wrong(Fake):
        def inception(self, x: Tensor, packed: PackedInception, prepared: tuple[Tensor, ...], out: Tensor) -> None:
            super().inception(x, packed, prepared, out)
            kernel = packed.spec.large_kernel
            layout = "channels_last" if out.stride(1) == 1 else "contiguous"
            assert layout == ("channels_last" if x.stride(1) == 1 else "contiguous")
            assert out.is_contiguous(memory_format=getattr(torch, layout if layout == "channels_last" else "contiguous_format"))
            if where in (f"{kernel}x{kernel}", layout, "everywhere"):
                fault(self, out)

    found = trust.self_check(Wrong(), CPU)
    assert found is not None
    assert reason in found
    assert "\n" not in found
    if where in ("3x3", "5x5"):
        assert f"large_kernel={where[0]}) in float32 on cpu, " in found
    if where in ("contiguous", "channels_last"):
        assert f" on cpu, {where}" in found


class Ways(Fake):
    """Has further ways, of which one may be wrong; notes for each call its way, the module and whether it is channels_last."""

    def __init__(self, wrong: str = "") -> None:
        super().__init__()
        self.wrong, self.way = wrong, ""
        self.ran: list[tuple[str, InceptionSpec, bool]] = []

    def ways(self, problem: Problem) -> Mapping[str, AbstractContextManager[None]]:
        return {name: self.within(name) for name in ("large tiles", "small tiles")}

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        self.way = name
        yield
        self.way = ""

    def inception(self, x: Tensor, packed: PackedInception, prepared: tuple[Tensor, ...], out: Tensor) -> None:
        self.ran.append((self.way, packed.spec, x.stride(1) == 1))
        if self.way == self.wrong != "":
            raise RuntimeError("no such instruction")
        super().inception(x, packed, prepared, out)


def test_further_ways_run_on_one_module(quick: None) -> None:
    backend = Ways()
    assert trust.self_check(backend, CPU) is None
    (spec,) = {spec for way, spec, _ in backend.ran if way}
    assert all(width % 16 == 0 for width in list(spec)[:7]), "descriptors apply to it"
    assert [(way, last) for way, _, last in backend.ran if way] == [("large tiles", True)] * 2 + [("small tiles", True)] * 2
    assert sum(not way for way, _, _ in backend.ran) == 8, "by itself"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120", "gfx942"])
@pytest.mark.parametrize("arithmetic", ["fp16", "fp32"])
def test_in_every_way_a_persistent_grid_goes_round_more_than_once(arch: str, arithmetic: Arithmetic) -> None:
    launch = pytest.importorskip("googlenet_fused.backends.triton.launch")
    spec, (n, h, w) = trust._IN_ALL_WAYS
    packed = pack_inception(integer_convs(spec, DTYPES[arithmetic]), DTYPES[arithmetic])
    x, out = (
        torch.empty(n, channels, h, w, dtype=DTYPES[arithmetic], device="meta", memory_format=torch.channels_last)
        for channels in (spec.in_channels, spec.out_channels)
    )
    more_than_once = []
    for plan in triton_backend.shipped_plans(Request(arch, 188, arithmetic, spec, n, h, w)):
        for each in launch.launches(x, spec, launch.Weights.of(packed), out, plan, arithmetic, 188):
            values = each.arguments
            if tiles := sum(values.get(name, 0) for name in ("tiles", "tiles3", "tiles5")):
                more_than_once.append(tiles > each.programs)
    assert len(more_than_once) > 2, "the spatial kernel and the branch kernel"
    assert all(more_than_once)


@pytest.mark.skipif(find_spec("triton") is None or not triton_backend.interpreting(), reason="Triton does not interpret here")
def test_every_shipped_configuration_is_a_way_of_the_triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(trust, "_RUNS", ())
    monkeypatch.setattr(trust, "_IN_ALL_WAYS", (InceptionSpec(32, 16, 16, 32, 16, 16, 16), (1, 5, 6)))
    monkeypatch.setattr(triton_backend, "plan_for", lambda request: seen.append(plan_for(request)) or seen[-1])
    assert trust.self_check(registry.get("triton"), CPU) is None
    configs = configurations(INTERPRETER)
    for form in FORMS:
        ran = [plan for plan in seen if plan.form == form]
        assert {plan.pointwise for plan in ran} == set(configs["pointwise"])
        assert {plan.spatial for plan in ran} == set(configs[SPATIAL[form]])


@pytest.mark.parametrize("arithmetic", ["fp16", "bf16", "tf32", "fp32"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120", "gfx942", "gfx90a"])
def test_shipped_plans(arch: str, arithmetic: Arithmetic) -> None:
    request = Request(arch, 100, arithmetic, GOOGLENET_SPECS["4a"], 8, 14, 14)
    configs, chosen = configurations_for(request), rule(request)
    *found, last = triton_backend.shipped_plans(request)
    assert last.spatial_tma == last.pointwise_tma == last.pdl == hopper_or_later(arch)
    found += [last] * (not last.spatial_tma)
    for form in FORMS:
        some = [plan for plan in found if plan.form == form]
        assert {plan.pointwise for plan in some} == set(configs["pointwise"])
        assert {plan.spatial for plan in some} == set(configs[SPATIAL[form]])
    flags = {(plan.pointwise_tma, plan.spatial_tma, plan.pdl) for plan in found}
    assert flags == {(chosen.pointwise_tma, chosen.spatial_tma, chosen.pdl)}


def test_a_way_that_is_wrong_is_named(quick: None) -> None:
    found = trust.self_check(Ways(wrong="small tiles"), CPU)
    assert found is not None
    assert found.endswith(" in float32 on cpu, channels_last, small tiles: RuntimeError: no such instruction")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError("Triton Error [CUDA]: out of memory")])
def test_too_little_memory_is_raised(error: Exception, quick: None) -> None:
    class Hungry(Fake):
        def inception(self, *arguments: Any) -> None:
            raise error

    with pytest.raises(torch.OutOfMemoryError, match="memory"):
        trust.self_check(Hungry(), CPU)


def test_a_wrong_convolution_fails(quick: None) -> None:
    class Wrong(Fake):
        def conv2d_relu(self, *arguments: Any) -> Tensor:
            return super().conv2d_relu(*arguments) * 1.01

    found = trust.self_check(Wrong(), CPU)
    assert found is not None
    assert found.startswith("a convolution with ReLU in float32 on cpu, contiguous_format: disagrees")


def test_what_a_backend_prepares_is_what_it_runs_on(quick: None) -> None:
    class Preparing(Fake):
        def prepare(self, packed: PackedInception, input_shape: Any) -> tuple[Tensor, ...]:
            assert not any(tensor.requires_grad or tensor.is_inference() for tensor in packed)
            return tuple(tensor + 0 for tensor in packed)

        def inception(self, x: Tensor, packed: PackedInception, prepared: tuple[Tensor, ...], out: Tensor) -> None:
            super().inception(x, PackedInception(*prepared), (), out)

    with torch.inference_mode():
        assert trust.self_check(Preparing(), CPU) is None


def test_a_backend_is_checked_on_what_it_supports(quick: None) -> None:
    class Choosy(Fake):
        refused: Callable[[Problem], bool]

        def supports(self, problem: Problem) -> str | None:
            return "no" if self.refused(problem) else None

        def inception(self, x: Tensor, packed: PackedInception, prepared: tuple[Tensor, ...], out: Tensor) -> None:
            assert packed.spec.large_kernel == 5
            super().inception(x, packed, prepared, out)

    backend = Choosy()
    backend.refused = lambda problem: problem.spec is None or problem.spec.large_kernel == 3
    assert trust.self_check(backend, CPU) is None
    assert backend.calls == 4
    backend.refused = lambda problem: True
    assert trust.self_check(backend, CPU) == "it supports none of the modules of the self-check"


def test_it_leaves_the_callers_state_alone(quick: None) -> None:
    class Watching(Fake):
        def inception(self, *arguments: Any) -> None:
            assert not torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_autocast_enabled("cpu")
            super().inception(*arguments)

    before = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert trust.self_check(Watching(), CPU) is None
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)


def test_it_is_the_same_each_time(quick: None) -> None:
    class Watching(Fake):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Tensor] = []

        def inception(self, x: Tensor, packed: PackedInception, prepared: tuple[Tensor, ...], out: Tensor) -> None:
            self.seen += [x, *packed]
            super().inception(x, packed, prepared, out)

    first, second = Watching(), Watching()
    for seed, backend in enumerate((first, second)):
        torch.manual_seed(seed)
        trust.self_check(backend, CPU)
    assert len(first.seen) == len(second.seen) > 9
    assert all(map(torch.equal, first.seen, second.seen))


def test_other_defaults_of_torchs_do_not_matter(quick: None) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert trust.self_check(Fake(), CPU) is None
    finally:
        torch.set_default_dtype(torch.float32)


def test_it_never_chooses_a_backend_itself(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "select", lambda *_: pytest.fail("it chose"))
    assert trust.self_check(Fake(), CPU) is None


# What is here.


def test_a_backend_in_a_file_of_its_own(tmp_path: Path) -> None:
    assert trust._sources(ROOT / "googlenet_fused/backends/cpu.py")[1] == [ROOT / "googlenet_fused/backends/cpu.py"]
    (tmp_path / "alone.py").touch()
    (tmp_path / "other.py").touch()
    assert trust._sources(tmp_path / "alone.py") == (tmp_path, [tmp_path / "alone.py"])


def test_a_backend_in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One beside this file ends at the folder of the backends; any other at its outermost package."""
    backends = tmp_path / "outer/backends"
    inner = backends / "own/inner"
    (inner / "__pycache__").mkdir(parents=True)
    for folder in (tmp_path / "outer", backends, backends / "own", inner):
        (folder / "__init__.py").touch()
    for name in ("own/table.json", "own/notes.txt", "own/inner/kernels.py", "own/inner/__pycache__/kernels.pyc", "trust.py"):
        (backends / name).touch()
    parts = ["own/__init__.py", "own/inner/__init__.py", "own/inner/kernels.py", "own/table.json"]
    monkeypatch.setattr(trust, "__file__", str(backends / "trust.py"))
    for file in ("own/__init__.py", "own/inner/kernels.py"):
        assert trust._sources(backends / file) == (backends / "own", [backends / part for part in parts])
    monkeypatch.undo()
    root, found = trust._sources(inner / "kernels.py")
    assert root == tmp_path / "outer"
    assert len(found) == 7


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """The fingerprint of a backend in a package in ``tmp_path / "made"``, asked anew each time."""
    folder = tmp_path / "made"
    folder.mkdir()
    shutil.copy(ROOT / "googlenet_fused/backends/reference.py", folder / "__init__.py")
    (folder / "table.json").write_text("[1]")
    monkeypatch.syspath_prepend(tmp_path)
    import made  # type: ignore[import-not-found]

    def ask() -> str:
        trust._fingerprint.cache_clear()
        return trust.fingerprint(made.ReferenceBackend())

    yield ask
    trust._fingerprint.cache_clear()
    del sys.modules["made"]


def test_the_fingerprint_follows_names_and_bytes(package: Callable[[], str], tmp_path: Path) -> None:
    folder = tmp_path / "made"
    first = package()
    assert len(first) == 16
    assert set(first) <= set("0123456789abcdef")
    assert package() == first

    def change(action: Callable[[], object]) -> str:
        action()
        return package()

    seen = [
        first,
        change(lambda: (folder / "__init__.py").write_text((folder / "__init__.py").read_text() + "# more\n")),
        change(lambda: (folder / "table.json").write_text("[2]")),
        change(lambda: (folder / "new.py").touch()),
        change(lambda: (folder / "new.py").rename(folder / "newer.py")),
        change(lambda: (folder / "newer.py").write_text("[2]") and (folder / "table.json").write_text("")),
    ]
    assert len(set(seen)) == len(seen)
    (folder / "notes.txt").touch()
    assert package() == seen[-1]


@pytest.mark.parametrize("name", trust._COMMON)
def test_the_fingerprint_follows_what_every_verdict_depends_on(
    name: str, package: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in trust._COMMON:
        (tmp_path / "googlenet_fused" / source).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "googlenet_fused" / source, tmp_path / "googlenet_fused" / source)
    first = package()
    monkeypatch.setattr(trust, "__file__", str(tmp_path / "googlenet_fused/backends/trust.py"))
    assert package() == first
    with (tmp_path / "googlenet_fused" / name).open("a") as file:
        file.write("# more\n")
    assert package() != first


def test_the_fingerprint_is_asked_once(package: Callable[[], str], tmp_path: Path) -> None:
    first = package()
    (tmp_path / "made/table.json").unlink()
    assert trust.fingerprint(sys.modules["made"].ReferenceBackend()) == first


def test_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    properties = SimpleNamespace(name="NVIDIA Test", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: asked.append(index) or properties)
    monkeypatch.setattr(trust, "nvidia_driver_version", lambda: "580.1")
    found = trust.identity(Fake(), 3)
    assert asked == [3]
    assert (found.gpu, found.arch, found.driver) == ("NVIDIA Test", "sm_90", "580.1")
    assert found.torch == str(torch.__version__)
    assert type(found.torch) is str
    assert found.triton == distribution_version("triton")
    assert found.fingerprint == trust.fingerprint(Fake())


@pytest.mark.parametrize(("hip", "arch"), [(None, "sm_120"), ("6.4", "gfx942")])
def test_architecture(hip: str | None, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    properties = SimpleNamespace(major=12, minor=0, gcnArchName="gfx942:sramecc+:xnack-")
    assert trust.architecture(properties) == arch


@pytest.mark.parametrize("module", [None, SimpleNamespace(__version__="3.6.0"), SimpleNamespace()])
def test_the_version_of_triton(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trust._triton_version.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", module)
    assert trust._triton_version() == getattr(module, "__version__", None)
    trust._triton_version.cache_clear()


@pytest.fixture
def flags() -> Iterator[None]:
    """Those for TF32 are afterwards as torch has them from the start."""
    yield
    torch.backends.fp32_precision = "none"
    torch.backends.cudnn.fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = True


def test_arithmetic_follows_torchs_flags(flags: None) -> None:
    """The old one and the new ones, which hold for all that lies below them."""
    assert arithmetic(torch.float32) == "tf32"
    assert arithmetic(torch.float16) == "float16"
    torch.backends.cudnn.allow_tf32 = False
    assert arithmetic(torch.float32) == "float32"
    for level in (torch.backends, torch.backends.cudnn, torch.backends.cudnn.conv):
        for precision, expected in (("tf32", "tf32"), ("ieee", "float32")):
            level.fp32_precision = precision
            assert arithmetic(torch.float32) == expected


# Records.


def entry(**changes: Any) -> dict[str, Any]:
    facts = {**asdict(HERE), "backend": "fake", "commit": "abc123", "date": "2026-01-02T03:04:05+00:00"}
    return {**facts, "tests": {"float16": 12, "tf32": 3}, **changes}


@pytest.fixture
def verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts entries into the package's record."""
    path = tmp_path / "verified.json"
    monkeypatch.setattr(trust, "VERIFIED", path)

    def put(*entries: Any) -> None:
        path.write_text(json.dumps(entries))
        trust._verified.cache_clear()

    put()
    yield put
    trust._verified.cache_clear()


def test_the_record_of_the_package_is_whole() -> None:
    entries = trust.read_verifications(trust.VERIFIED)
    assert {entry.backend for entry in entries} <= set(registry.names())
    assert len({entry.key for entry in entries}) == len(entries)
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert trust.VERIFIED.name in data["googlenet_fused.backends"]


def test_verifications_are_of_one_backend(verified: Callable[..., None]) -> None:
    verified(entry(), entry(backend="other"), entry(gpu="NVIDIA Other", triton=None, driver=None))
    assert trust.verifications("fake") == [
        Verification(**entry()),
        Verification(**entry(gpu="NVIDIA Other", triton=None, driver=None)),
    ]
    assert trust.verifications("nobody") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is not JSON"),
        ("{}", "must hold a list of entries, got dict"),
        ("[7]", "entry 0 must have the fields gpu, .*, tests, got 7"),
        (json.dumps([entry(), entry(more=1)]), "entry 1 must have the fields .*, got .*more"),
        (json.dumps([{name: value for name, value in entry().items() if name != "gpu"}]), "entry 0 must have the fields gpu, "),
        (json.dumps([entry(gpu=None)]), "entry 0 has None for gpu"),
        (json.dumps([entry(tests="12")]), "entry 0 has '12' for tests"),
        (json.dumps([entry(tests={"float16": "12"})]), "entry 0 has {'float16': '12'} for tests"),
        (json.dumps([entry(tests={"fp16": 12})]), "entry 0 has {'fp16': 12} for tests"),
        (json.dumps([entry(triton=3)]), "entry 0 has 3 for triton"),
    ],
)
def test_a_damaged_record_is_named(text: str, message: str, verified: Callable[..., None]) -> None:
    trust.VERIFIED.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        trust.verifications("fake")
    assert message_of(error).startswith(f"{trust.VERIFIED}")


@pytest.mark.parametrize(
    ("changes", "covered"),
    [
        ({}, True),
        ({"driver": "570.2", "arch": "sm_900", "commit": "def456", "date": "", "tests": {"float16": 1}}, True),
        ({"gpu": "NVIDIA Other"}, False),
        ({"torch": "2.12.0"}, False),
        ({"triton": None}, False),
        ({"fingerprint": "f" * 16}, False),
        ({"tests": {"float32": 12, "tf32": 3}}, False),
        ({"tests": {"float16": 0}}, False),
        ({"tests": {}}, False),
    ],
)
def test_what_a_record_covers(changes: dict[str, Any], covered: bool) -> None:
    assert Verification(**entry(**changes)).covers(HERE, "float16") is covered


class Elsewhere(Fake):
    name = "elsewhere"

    def probe(self) -> str | None:
        return "not on this machine"


class Plain(Fake):
    name = "plain"
    needs_verification = False


class Untested(Fake):
    name = "untested"


def test_new_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of backends that need them, can run and were tested."""
    asked = []
    monkeypatch.setattr(registry, "_backends", {cls.name: cls() for cls in (Fake, Elsewhere, Plain, Untested)})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(trust, "identity", lambda backend, index: asked.append((backend.name, index)) or HERE)
    some = {"float16": 12, "bfloat16": 0, "tf32": 3}
    tests = {"fake": some, "elsewhere": some, "plain": some, "untested": {"float16": 0}}
    date = "2026-01-02T03:04:05+00:00"
    assert trust.record("abc123", date, tests) == [entry()]
    assert asked == [("fake", 2)]
    assert trust.record("abc123", date, {}) == []


# What automatic choice asks.


class Machine:
    """A GPU that is not there, the user's cache, and what a self-check finds there."""

    def __init__(self, cache: Path) -> None:
        self.file = cache / trust.REMEMBERED
        self.here = HERE
        self.finding: str | None = None
        self.checked: list[Problem] = []
        self.capturing: int | None = None  # the device on which a graph is captured
        self.current: int = 0
        self.no_memory = False

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        yield
        self.current = before

    def self_check(self, backend: Backend, problem: Problem) -> str | None:
        self.checked.append(problem)
        if self.no_memory:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore of it")
        return self.finding

    def restart(self) -> None:
        """As a new process would begin."""
        trust._answers.clear()
        trust._warn.cache_clear()


@pytest.fixture
def machine(
    tmp_path: Path, verified: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[Machine]:
    machine = Machine(tmp_path / "cache")
    monkeypatch.setenv("GOOGLENET_FUSED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: machine.current)
    monkeypatch.setattr(torch.cuda, "device", machine.on)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: machine.capturing == machine.current)
    monkeypatch.setattr(trust, "identity", lambda backend, index: replace(machine.here, gpu=f"{machine.here.gpu} {index}"))
    monkeypatch.setattr(trust, "self_check", machine.self_check)
    caplog.set_level(logging.INFO, "googlenet_fused")
    machine.restart()
    yield machine
    machine.restart()


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def test_only_gpus_are_doubted(machine: Machine) -> None:
    for device in ("cpu", "meta"):
        assert trust.doubt(Fake(), replace(CUDA, device=torch.device(device))) is None
    assert machine.checked == []


def test_a_recorded_gpu_is_trusted(machine: Machine, verified: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    verified(entry(gpu="NVIDIA Test 0"))
    assert trust.doubt(Fake(), CUDA) is None
    assert machine.checked == []
    assert said(caplog) == []
    assert not machine.file.exists()


@pytest.mark.parametrize("changes", [{"gpu": "NVIDIA Other"}, {"backend": "other"}, {"fingerprint": "f" * 16}])
def test_another_record_does_not_help(changes: dict[str, Any], machine: Machine, verified: Callable[..., None]) -> None:
    verified(entry(**{"gpu": "NVIDIA Test 0", **changes}))
    trust.doubt(Fake(), CUDA)
    assert machine.checked == [CUDA]


CHECKING = (
    "backend 'fake' has not been verified on NVIDIA Test 0 in float16: checking it once, which takes as long as compiling some "
    "kernels"
)


def test_a_self_check_is_announced(machine: Machine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it makes a first call wait, and by what Python shows of loggers that nobody has set up."""
    seen = []
    monkeypatch.setattr(trust, "self_check", lambda *_: seen.append(said(caplog)))
    trust.doubt(Fake(), CUDA)
    assert seen == [[("WARNING", CHECKING)]]


def test_a_self_check_that_passes_is_said_and_remembered(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    assert trust.doubt(Fake(), CUDA) is None
    assert said(caplog) == [
        ("WARNING", CHECKING),
        (
            "WARNING",
            "the self-check of backend 'fake' on NVIDIA Test 0 in float16 passed in 0.0 s: automatic choice uses it",
        ),
    ]
    assert caplog.records[0].name == "googlenet_fused"
    facts = {**asdict(HERE), "gpu": "NVIDIA Test 0", "backend": "fake", "arithmetic": "float16"}
    assert json.loads(machine.file.read_text()) == [facts]
    assert machine.checked == [CUDA]
    for _ in range(3):
        assert trust.doubt(Fake(), CUDA) is None
    machine.restart()
    assert trust.doubt(Fake(), CUDA) is None
    assert machine.checked == [CUDA]
    assert len(caplog.records) == 2, "it is said once"
    assert json.loads(machine.file.read_text()) == [facts]


def test_a_self_check_that_fails_is_remembered_in_the_process_only(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.finding = "4a is wrong"
    for _ in range(3):
        assert trust.doubt(Fake(), CUDA) == "its self-check on this device failed: 4a is wrong"
    assert said(caplog) == [
        ("WARNING", CHECKING),
        (
            "WARNING",
            "the self-check of backend 'fake' on NVIDIA Test 0 in float16 failed: 4a is wrong: automatic choice passes it over",
        ),
    ]
    assert len(machine.checked) == 1
    assert not machine.file.exists()
    machine.restart()
    machine.finding = None
    assert trust.doubt(Fake(), CUDA) is None
    assert len(machine.checked) == 2


@pytest.mark.parametrize(
    "other",
    [
        lambda machine: (Untested(), CUDA),
        lambda machine: (Fake(), replace(CUDA, device=torch.device("cuda", 1))),
        lambda machine: (Fake(), replace(CUDA, dtype=torch.bfloat16)),
        *(
            lambda machine, change=change: setattr(machine, "here", replace(HERE, **change)) or (Fake(), CUDA)
            for change in (
                {"gpu": "NVIDIA Other"},
                {"arch": "sm_100"},
                {"driver": "590.0"},
                {"torch": "2.12.0"},
                {"triton": None},
                {"fingerprint": "f" * 16},
            )
        ),
    ],
    ids=["backend", "device", "dtype", "gpu", "arch", "driver", "torch", "triton", "fingerprint"],
)
def test_a_self_check_holds_for_what_it_ran_on(other: Callable[[Machine], tuple[Backend, Problem]], machine: Machine) -> None:
    trust.doubt(Fake(), CUDA)
    machine.restart()
    trust.doubt(*other(machine))
    assert len(machine.checked) == 2
    assert len(json.loads(machine.file.read_text())) == 2, "the first stays"


def test_backends_and_devices_are_checked_apart(machine: Machine) -> None:
    for backend in (Fake(), Untested(), Fake(), Untested()):
        for index in (0, 1):
            trust.doubt(backend, replace(CUDA, device=torch.device("cuda", index)))
    assert len(machine.checked) == 4


@pytest.mark.parametrize("finding", [None, "4a is wrong"])
def test_what_is_known_is_answered_without_a_look_at_the_machine(
    finding: str | None, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a few microseconds, since every call of a module asks."""
    machine.finding = finding
    answer = trust.doubt(Fake(), CUDA)
    for owner, name in ((torch.cuda, "is_available"), (trust, "identity"), (trust, "read_json"), (trust, "verifications")):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("it looked"))
    assert trust.doubt(Fake(), CUDA) == answer


def test_tf32_is_checked_apart_from_fp32(machine: Machine, flags: None) -> None:
    problem = replace(CUDA, dtype=torch.float32)
    for allowed in (True, False, True):
        torch.backends.cudnn.allow_tf32 = allowed
        assert trust.doubt(Fake(), problem) is None
    assert len(machine.checked) == 2


def test_all_problems_of_a_device_and_dtype_share_a_self_check(machine: Machine) -> None:
    for spec in (TINY, None, replace(TINY, large_kernel=3)):
        assert trust.doubt(Fake(), replace(CUDA, spec=spec)) is None
    assert len(machine.checked) == 1


def test_a_device_without_an_index_is_the_current_one(machine: Machine) -> None:
    anywhere = replace(CUDA, device=torch.device("cuda"))
    for index in (1, 0, 1, 0):
        machine.current = index
        trust.doubt(Fake(), anywhere)
    assert [problem.device for problem in machine.checked] == [torch.device("cuda", 1), torch.device("cuda", 0)]
    trust.doubt(Fake(), CUDA)
    assert len(machine.checked) == 2


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_without_cuda_nothing_is_asked(device: str, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("current_device", "is_current_stream_capturing", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("it was"))
    with FakeTensorMode():
        assert trust.doubt(Fake(), replace(CUDA, device=torch.device(device))) is None
    assert machine.checked == []
    assert trust._answers == {}


def test_no_self_check_runs_while_a_graph_is_captured(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.capturing = 0
    expected = "its self-check on this device cannot run while a CUDA graph is captured: call the model once before"
    assert trust.doubt(Fake(), CUDA) == expected
    assert machine.checked == []
    assert said(caplog) == []
    machine.capturing = None
    assert trust.doubt(Fake(), CUDA) is None, "nothing was remembered"
    machine.capturing = 0
    assert trust.doubt(Fake(), CUDA) is None, "what is known is known"
    machine.restart()
    assert trust.doubt(Fake(), CUDA) is None, "so is what was remembered on the disk"
    assert len(machine.checked) == 1


def test_the_capture_that_counts_is_the_devices_own(machine: Machine) -> None:
    other = replace(CUDA, device=torch.device("cuda", 1))
    machine.capturing = 0
    assert trust.doubt(Fake(), other) is None, "that of the current device hinders nothing"
    machine.restart()
    machine.file.unlink()
    machine.capturing = 1
    answer = trust.doubt(Fake(), other)
    assert answer is not None
    assert "while a CUDA graph is captured" in answer
    assert len(machine.checked) == 1
    assert machine.current == 0


def test_too_little_memory_is_no_verdict(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.no_memory = True
    expected = "its self-check on this device ran out of memory and is to be run again: CUDA out of memory. Tried to allocate"
    for _ in range(2):
        answer = trust.doubt(Fake(), CUDA)
        assert answer == expected
        assert isinstance(answer, registry.Hindrance)
    assert len(machine.checked) == 2
    assert said(caplog) == [("WARNING", CHECKING)]
    assert not machine.file.exists()
    machine.no_memory = False
    assert trust.doubt(Fake(), CUDA) is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_during_a_self_check_leaves_a_lock_that_is_free() -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with trust._answering:
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(30)
    child = os.fork()
    if child == 0:
        os._exit(0 if trust._answering.acquire(timeout=5) else 1)
    done.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("how", ["fake tensors", "compiler"])
def test_no_self_check_runs_while_the_model_is_traced(how: str, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "its self-check on this device cannot run while the model is traced: call the model once before"
    if how == "fake tensors":
        with FakeTensorMode():
            assert trust.doubt(Fake(), CUDA) == expected
    else:
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            assert trust.doubt(Fake(), CUDA) == expected
    assert machine.checked == []
    assert trust.doubt(Fake(), CUDA) is None


def test_threads_share_one_self_check(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, answers = threading.Event(), threading.Event(), []

    def slow(backend: Backend, problem: Problem) -> str:
        machine.checked.append(problem)
        begun.set()
        assert go_on.wait(30)
        return "4a is wrong"

    monkeypatch.setattr(trust, "self_check", slow)
    threads = [threading.Thread(target=lambda: answers.append(trust.doubt(Fake(), CUDA))) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(30)
    go_on.set()
    for thread in threads:
        thread.join()
    assert answers == ["its self-check on this device failed: 4a is wrong"] * 3
    assert len(machine.checked) == 1


# The file in the user's cache.


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(
            lambda file: file.chmod(0o666),
            "chmod go-w",
            marks=pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs user ids"),
        ),
        (lambda file: file.write_text("{"), "is not JSON"),
        (lambda file: file.write_text('{"a": 1}'), "holds no list: remove it"),
    ],
    ids=["unsafe", "broken", "other"],
)
def test_a_file_that_cannot_be_trusted_is_said_once_and_replaced(
    spoil: Callable[[Path], object], message: str, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    trust.doubt(Fake(), CUDA)
    machine.restart()
    caplog.clear()
    spoil(machine.file)
    assert trust.doubt(Fake(), CUDA) is None
    assert len(machine.checked) == 2, "it was not believed"
    warnings = [text for level, text in said(caplog) if level == "WARNING" and "self-check of" not in text and text != CHECKING]
    assert len(warnings) == 1
    assert str(machine.file) in warnings[0]
    assert message in warnings[0]
    assert len(json.loads(machine.file.read_text())) == 1
    machine.restart()
    trust.doubt(Fake(), CUDA)
    assert len(machine.checked) == 2


@pytest.mark.parametrize("content", [[], [7, None], [{"backend": "fake"}]])
def test_entries_of_no_use_are_kept(content: list[Any], machine: Machine) -> None:
    write_json(machine.file, content)
    assert trust.doubt(Fake(), CUDA) is None
    assert len(machine.checked) == 1
    assert json.loads(machine.file.read_text())[:-1] == content


def test_the_latest_are_kept(machine: Machine) -> None:
    write_json(machine.file, list(range(trust.KEPT)))
    trust.doubt(Fake(), CUDA)
    found = json.loads(machine.file.read_text())
    assert len(found) == trust.KEPT
    assert found[:2] == [1, 2]
    assert found[-1]["backend"] == "fake"


@pytest.mark.parametrize("how", ["a file in the way", "no home"])
def test_not_being_able_to_remember_is_a_warning(
    how: str, machine: Machine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "no home":
        monkeypatch.setattr(trust, "cache_folder", lambda: (_ for _ in ()).throw(OSError("no home")))
    else:
        machine.file.parent.write_text("")
    assert trust.doubt(Fake(), CUDA) is None
    assert trust.doubt(Fake(), replace(CUDA, dtype=torch.bfloat16)) is None
    texts = [text for _, text in said(caplog) if "is not remembered" in text]
    assert len(texts) == 1, "it is said once"
    assert texts[0].startswith("a self-check that passed is not remembered and will run anew: ")


# Through automatic choice.


@pytest.fixture
def chosen(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Which backend runs a problem on the GPU, with ``fake`` the most preferred."""
    monkeypatch.setattr(registry, "_backends", {backend.name: backend for backend in (ReferenceBackend(), Fake())})
    monkeypatch.setattr(registry, "_announced", set())
    return lambda name: registry.select(name, CUDA).name


def test_automatic_choice_uses_what_passed(machine: Machine, chosen: Callable[[str], str]) -> None:
    assert [chosen("auto") for _ in range(3)] == ["fake"] * 3
    assert len(machine.checked) == 1


def test_automatic_choice_passes_over_what_failed(
    machine: Machine, chosen: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    machine.finding = "4a is wrong"
    assert [chosen("auto") for _ in range(3)] == ["reference"] * 3
    assert len(machine.checked) == 1
    assert "fake: its self-check on this device failed: 4a is wrong" in caplog.records[-1].getMessage()
    assert "chose backend 'reference'" in caplog.records[-1].getMessage()
    assert len(caplog.records) == 3


def test_a_named_backend_is_not_doubted(machine: Machine, chosen: Callable[[str], str]) -> None:
    machine.finding = "4a is wrong"
    assert chosen("fake") == "fake"
    with registry.use_backend("fake"):
        assert chosen("auto") == "fake"
    assert machine.checked == []


def test_the_status_of_a_backend_that_needs_verification(chosen: Callable[[str], str], verified: Callable[..., None]) -> None:
    assert registry.status()["fake"]["verified_on"] == []
    current = {"fingerprint": trust.fingerprint(Fake()), "torch": str(torch.__version__), "triton": trust._triton_version()}
    others = [entry(**current | {name: "other"}) for name in current]
    verified(entry(gpu="NVIDIA Other", **current), *others, entry(backend="reference"))
    status = registry.status()
    assert status["fake"]["needs_verification"] is True
    assert [found["current"] for found in status["fake"]["verified_on"]] == [True, False, False, False]
    assert status["fake"]["verified_on"][0] == {
        **{"gpu": "NVIDIA Other", "arch": "sm_90", "torch": current["torch"], "triton": current["triton"]},
        **{"commit": "abc123", "date": entry()["date"], "current": True},
    }
    assert status["reference"]["needs_verification"] is False
    assert status["reference"]["verified_on"] == []
    assert status["reference"]["here"] == {}


def test_what_holds_here(machine: Machine, verified: Callable[..., None], flags: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the current device, without a check."""
    unknown = dict.fromkeys(trust.ARITHMETICS, "to be checked at first use")
    assert trust.standing(Fake()) == unknown
    trust.doubt(Fake(), replace(CUDA, dtype=torch.float32))
    machine.finding = "4a is wrong"
    trust.doubt(Fake(), replace(CUDA, dtype=torch.bfloat16))
    here = {"gpu": "NVIDIA Test 0"}
    verified(entry(**here, tests={"float16": 12}), entry(**here, tests={"float32": 1}, torch="2.12.0"))
    found = {"float16": "verified by record", "bfloat16": "self-check failed", "tf32": "self-check passed"}
    assert trust.standing(Fake()) == {**unknown, **found}
    machine.restart()
    assert trust.standing(Fake()) == {**unknown, **found, "bfloat16": unknown["bfloat16"]}
    assert len(machine.checked) == 2
    machine.current = 1
    assert trust.standing(Fake()) == unknown
    monkeypatch.setattr(Fake, "supports", lambda self, problem: "no" if problem.dtype == torch.float32 else None)
    assert list(trust.standing(Fake())) == ["float16", "bfloat16"]
    assert trust.standing(Elsewhere()) == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert trust.standing(Fake()) == {}

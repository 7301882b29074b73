"""What the cuda backend says it can run, on a machine that is pretended to have a GPU or has none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from cases import GOOGLENET_MODULES, ODD_SPECS, integer_convs

from googlenet_fused.backends import registry, trust
from googlenet_fused.backends.cuda import backend, native
from googlenet_fused.backends.cuda.tiles import Tile
from googlenet_fused.backends.registry import Problem
from googlenet_fused.packing import pack_inception
from googlenet_fused.spec import InceptionSpec

SPEC = ODD_SPECS["primes"]
CUDA = torch.device("cuda", 0)

built = pytest.mark.skipif((reason := native.load()) is not None, reason=f"the library is not here: {reason}")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An H100, as far as the backend asks."""
    facts = SimpleNamespace(capability=(9, 0), archs=["sm_80", "sm_90", "compute_90"], shared_memory=227 * 1024, driver="")
    planned = torch.ops.googlenet_fused_cuda.plan.default if reason is None else None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: facts.capability)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=facts.shared_memory),
    )
    for name in ("build_facts", "loaded_facts"):
        monkeypatch.setattr(native, name, lambda: {"built": True, "archs": facts.archs})
    monkeypatch.setattr(native, "load", lambda: None)
    ops = SimpleNamespace(plan=SimpleNamespace(default=planned), driver_fault=SimpleNamespace(default=lambda: facts.driver))
    monkeypatch.setattr(torch.ops, "googlenet_fused_cuda", ops)
    for cached in (backend._refuse_library, backend._refuse_gpu, backend._refuse_spec, backend._refuse_tile):
        cached.cache_clear()
    return facts


@pytest.fixture(autouse=True)
def _forget() -> object:
    yield
    for cached in (backend._refuse_library, backend._refuse_gpu, backend._refuse_spec, backend._refuse_tile):
        cached.cache_clear()


def refusal(dtype: torch.dtype = torch.float16, device: torch.device = CUDA, spec: InceptionSpec | None = None) -> str | None:
    return registry.get("cuda").supports(Problem(device, dtype, spec))


@built
def test_it_runs_half_precisions_and_tf32(gpu: SimpleNamespace) -> None:
    assert [refusal(dtype, spec=SPEC) for dtype in (torch.float16, torch.bfloat16, torch.float32)] == [None] * 3
    assert registry.get("cuda").probe() is None


def test_other_dtypes_and_devices_are_refused(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not float64" in str(refusal(torch.float64))
    assert refusal(device=torch.device("cpu")) == "it runs on CUDA tensors, not on cpu"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert "fp32_precision does not allow" in str(refusal(torch.float32))
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "built for AMD's" in str(refusal())


def test_a_library_that_is_not_there_is_the_reason_on_a_gpu(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(native, "load", lambda: asked.append(1) or "there is no nvcc")
    monkeypatch.setattr(native, "loaded_facts", lambda: {"built": False, "reason": "there is no nvcc"})
    assert refusal(spec=SPEC) == refusal() == registry.get("cuda").probe() == "there is no nvcc"
    assert len(asked) == 1, "an answer takes reading all of the library's sources"


def test_a_machine_without_a_gpu_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refusal(device=torch.device("cpu")) == backend.NO_CUDA


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((10, 0), ["sm_80", "sm_90"], False),
        ((10, 0), ["sm_90", "compute_90"], True),
        ((12, 0), ["sm_80", "compute_80"], True),
        ((9, 0), ["compute_100"], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 0), ["compute_90a"], False),
        ((12, 1), ["sm_120"], True),
        ((7, 5), ["compute_80"], False),
    ],
)
def test_what_was_built_must_run_on_the_device(
    gpu: SimpleNamespace, capability: tuple[int, int], archs: list[str], runs: bool
) -> None:
    gpu.capability, gpu.archs = capability, archs
    reason = refusal()
    assert (reason is None) == runs
    if not runs and capability >= (8, 0):
        assert f'TORCH_CUDA_ARCH_LIST="{capability[0]}.{capability[1]}"' in str(reason)


@built
def test_widths_that_fit_no_tile_are_refused(gpu: SimpleNamespace) -> None:
    assert "shared memory" in str(refusal(spec=InceptionSpec(8, 8, 20000, 8, 8, 8, 8)))
    assert "passes" in str(refusal(spec=InceptionSpec(8, 60000, 8, 8, 8, 8, 8)))


@built
def test_the_self_checks_module_runs_in_every_kind_of_tile(gpu: SimpleNamespace) -> None:
    spec, (batch, height, width) = trust._IN_ALL_WAYS
    for gpu.shared_memory in (99 * 1024, 163 * 1024, 227 * 1024):
        backend._refuse_tile.cache_clear()
        for dtype in (torch.float16, torch.float32):
            ways = registry.get("cuda").ways(Problem(CUDA, dtype, spec))
            tiles = [backend._WAYS[name].within(batch, height, width) for name in ways]
            assert any(tile.images > 1 for tile in tiles)
            assert any(tile.images > 1 and batch % tile.images for tile in tiles), "a last tile that is cut off"
            assert any((tile.images, tile.rows, tile.columns) == (1, height, width) for tile in tiles)
            assert any(tile.rows < height and tile.columns == width and height % tile.rows for tile in tiles)
            assert any(tile.columns < width and width % tile.columns for tile in tiles)
            assert any(tile.splits > 1 for tile in tiles)
            assert {tile.stages for tile in tiles} == {2, 3, 4}


@built
def test_a_way_that_does_not_fit_is_none(gpu: SimpleNamespace) -> None:
    gpu.shared_memory = 99 * 1024
    problem = Problem(CUDA, torch.float32, GOOGLENET_MODULES["4e"][0])
    assert 0 < len(registry.get("cuda").ways(problem)) < len(backend._WAYS)
    assert registry.get("cuda").ways(Problem(CUDA, torch.float16, None)) == {}


def test_a_tile_is_cut_to_the_images() -> None:
    assert Tile(4, 9, 11, 2, 3).within(2, 5, 11) == Tile(2, 5, 11, 2, 3)
    assert Tile(4, 9, 11, 2, 3).within(2, 5, 12) == Tile(1, 5, 11, 2, 3), "several only if they are whole"


@built
def test_a_driver_that_is_too_old_is_a_reason(gpu: SimpleNamespace) -> None:
    gpu.driver = "the driver is older than the CUDA that the library was built with"
    assert refusal() == registry.get("cuda").probe() == gpu.driver


@built
def test_a_verdict_depends_on_the_librarys_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = registry.get("cuda")
    before = trust.fingerprint(chosen)
    facts = native.loaded_facts()
    monkeypatch.setattr(native, "loaded_facts", lambda: {**facts, "seconds": 1.0})
    assert trust.fingerprint(chosen) == before, "how long it took is none of its sources"
    for change in ({"source": "another"}, {"nvcc": "12.0.0"}):
        monkeypatch.setattr(native, "loaded_facts", lambda change=change: {**facts, **change})
        assert trust.fingerprint(chosen) != before
    monkeypatch.setattr(native, "loaded_facts", lambda: facts)
    monkeypatch.setattr(native, "build_facts", lambda: {**facts, "source": "built since"})
    assert trust.fingerprint(chosen) == before, "the library that is loaded is the one that runs"


@built
def test_a_verdict_depends_on_the_code_that_runs_on_the_device(gpu: SimpleNamespace) -> None:
    chosen = registry.get("cuda")
    gpu.archs = ["sm_80", "sm_90", "compute_90"]
    machine_code = chosen.sources()
    gpu.archs = ["sm_90"]
    assert chosen.sources() == machine_code
    gpu.archs = ["sm_80", "compute_80"]
    assert chosen.sources() != machine_code


@built
def test_the_whole_way_to_the_operator_on_tensors_without_memory() -> None:
    """Its checks run on meta tensors; only the launch does not."""
    chosen, packed = registry.get("cuda"), pack_inception(integer_convs(SPEC, torch.float16), torch.float16)
    prepared = tuple(tensor.to("meta") for tensor in chosen.prepare(packed, (2, SPEC.in_channels, 6, 5)))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.empty(2, SPEC.in_channels, 6, 5, dtype=torch.float16, device="meta").contiguous(memory_format=memory_format)
        out = torch.empty(2, SPEC.out_channels, 6, 5, dtype=torch.float16, device="meta")
        chosen.inception(x, packed, prepared, out)
    with pytest.raises(RuntimeError, match="out is"):
        chosen.inception(x, packed, prepared, out[:, 1:])

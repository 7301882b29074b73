"""What the cuda backend says it can run, on a machine that is pretended to have a GPU or has none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from cases import ODD_SPECS, integer_convs

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
    facts = SimpleNamespace(capability=(9, 0), archs=["sm_80", "sm_90", "compute_90"], shared_memory=227 * 1024)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: facts.capability)
    properties = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=facts.shared_memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(native, "build_facts", lambda: {"built": True, "archs": facts.archs})
    monkeypatch.setattr(native, "load", lambda: None)
    for cached in (backend._refuse_gpu, backend._refuse_spec):
        cached.cache_clear()
    return facts


@pytest.fixture(autouse=True)
def _forget() -> object:
    yield
    for cached in (backend._refuse_gpu, backend._refuse_spec):
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


def test_every_way_is_a_tile_of_another_kind(gpu: SimpleNamespace) -> None:
    ways = registry.get("cuda").ways(Problem(CUDA, torch.float16, SPEC))
    assert len(ways) == 4
    assert registry.get("cuda").ways(Problem(CUDA, torch.float16, None)) == {}
    assert Tile(4, 9, 11, 2, 3).within(2, 5, 12) == Tile(2, 5, 11, 2, 3)


@built
def test_a_verdict_depends_on_the_librarys_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = registry.get("cuda")
    before = trust.fingerprint(chosen)
    facts = native.build_facts()
    monkeypatch.setattr(native, "build_facts", lambda: {**facts, "seconds": 1.0, "archs": ["sm_90"]})
    assert trust.fingerprint(chosen) == before, "when and where it was built is none of its sources"
    monkeypatch.setattr(native, "build_facts", lambda: {**facts, "source": "another"})
    assert trust.fingerprint(chosen) != before
    monkeypatch.setattr(native, "build_facts", lambda: {**facts, "nvcc": "12.0.0"})
    assert trust.fingerprint(chosen) != before


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

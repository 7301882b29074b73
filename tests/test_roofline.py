"""FLOPs and bytes of the roofline, against published figures and what the plain network does; its ceilings and floors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import roofline
from benchmarks.roofline import Ceilings, Counts, Floor, Rate, counts, floor_ms, measure_ceilings, network_stages, percent
from googlenet_fused import googlenet
from googlenet_fused.bench.case import Case
from googlenet_fused.blocks import Inception
from googlenet_fused.models import VariantName
from googlenet_fused.models.googlenet import VARIANTS
from googlenet_fused.spec import GOOGLENET_SPECS

CPU = torch.device("cpu")

# name: in, side, out, weights, millions of MACs (the paper's widths, Table 1)
MODULES = {
    "3a": (192, 28, 256, 163_328, 128.05),
    "3b": (256, 28, 480, 388_096, 304.27),
    "4a": (480, 14, 512, 375_552, 73.61),
    "4b": (512, 14, 512, 448_512, 87.91),
    "4c": (512, 14, 512, 509_440, 99.85),
    "4d": (512, 14, 528, 604_672, 118.52),
    "4e": (528, 14, 832, 867_328, 170.00),
    "5a": (832, 7, 832, 1_042_432, 51.08),
    "5b": (832, 7, 1024, 1_442_816, 70.70),
}
MACS = {"bvlc": 1_582_671_872, "torchvision": 1_498_376_192}
PARAMETERS = {"bvlc": 6_998_552, "torchvision": 6_624_904}

both_variants = pytest.mark.parametrize("variant", ["torchvision", "bvlc"])
SIDES = [224, 97, 64, 31]

STAGE_OUTPUTS = {
    "norm1": "conv1",
    "conv2": "conv2 1x1",
    "maxpool2": "conv2 3x3",
    **{f"inception{name}": name for name in ("3a", "4a", "4b", "4c", "4d", "5a")},
    "maxpool3": "3b",
    "maxpool4": "4e",
    "avgpool": "5b",
    "fc": "linear",
}
"""The modules of the plain network after which a stage writes to memory."""


@dataclass
class Observed:
    """One forward of the plain network: MACs of its convolutions and linear layer, and elements at the stages' ends."""

    macs: int
    first_macs: int
    image: int
    outputs: dict[str, int]

    @property
    def inputs(self) -> dict[str, int]:
        return dict(zip(self.outputs, [self.image, *list(self.outputs.values())[:-1]], strict=True))


def plain(variant: VariantName) -> nn.Module:
    """The network without memory for its parameters: only shapes are computed."""
    with torch.device("meta"):
        return googlenet(variant, aux_logits=False, init_weights=False).eval()


@cache
def observed(variant: VariantName, side: int, batch: int = 1) -> Observed:
    model = plain(variant)
    macs: list[int] = []
    outputs: dict[str, int] = {}

    def count(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        macs.append(output.numel() * module.weight[0].numel())

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
        if name in STAGE_OUTPUTS:
            stage = STAGE_OUTPUTS[name]
            module.register_forward_hook(lambda _module, _input, y, stage=stage: outputs.__setitem__(stage, y.numel()))
    image = torch.empty(batch, 3, side, side, device="meta")
    model(image)
    assert len(macs) == 58
    return Observed(sum(macs), macs[0], image.numel(), outputs)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_against_published_figures(name: str) -> None:
    in_channels, side, out_channels, weights, mega_macs = MODULES[name]
    found = counts(Case(name, batch=1, dtype="fp32"))
    assert round(found.flops / 2e6, 2) == mega_macs
    module = Inception.from_spec(GOOGLENET_SPECS[name], norm=None)
    biases = sum(p.numel() for key, p in module.named_parameters() if key.endswith("bias"))
    assert found.bytes == 4 * ((in_channels + out_channels) * side**2 + weights + biases)


@pytest.mark.parametrize("name", ["3a", "4e", "5b"])
def test_a_module_against_torchs_flop_counter(name: str) -> None:
    in_channels, side, *_ = MODULES[name]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        Inception.from_spec(GOOGLENET_SPECS[name], norm=None)(torch.empty(3, in_channels, side, side))
    assert counts(Case(name, batch=3)).flops == counter.get_total_flops()


@both_variants
def test_a_network_against_published_figures(variant: VariantName) -> None:
    assert counts(Case(variant)).flops == 2 * MACS[variant]
    assert sum(stage.trained for stage in network_stages(VARIANTS[variant], 224)) == PARAMETERS[variant]


def test_the_papers_network_against_the_design_figures() -> None:
    stages = network_stages(VARIANTS["bvlc"], 224)
    activations = 2 * sum(stage.reads + stage.writes for stage in stages)
    assert activations == 5_638_352  # 5.64 MB
    assert round(2 * sum(stage.weights for stage in stages) / 1e6, 2) == 13.98
    assert round(counts(Case("bvlc", dtype="fp16")).flops / 1e9, 3) == 3.165
    assert counts(Case("bvlc", dtype="fp16")).bytes == activations + 2 * PARAMETERS["bvlc"]


@pytest.mark.parametrize(
    ("batch", "compute_us", "memory_us", "bound"),
    [
        (1, 4.0, 6.5, "memory"),
        (8, 31.7, 19.7, "compute"),
        (32, 127, 65, "compute"),
        (128, 508, 245, "compute"),
        (256, 1015, 486, "compute"),
    ],
)
def test_floors_of_the_papers_network(batch: int, compute_us: float, memory_us: float, bound: str) -> None:
    """At 798 TFLOP/s and 3.0 TB/s in half precision, to the digits that were worked out by hand."""
    ceilings = Ceilings(rate(3000.0), {"fp16": rate(798.0)})
    found = counts(Case("bvlc", batch=batch, dtype="fp16"))
    slow_memory, slow_arithmetic = Ceilings(rate(3000.0), {"fp16": rate(1e9)}), Ceilings(rate(1e9), {"fp16": rate(798.0)})
    for wanted, at in ((compute_us, slow_arithmetic), (memory_us, slow_memory), (max(compute_us, memory_us), ceilings)):
        floor = floor_ms(found, at, "fp16")
        assert floor is not None
        assert floor.ms * 1e3 == pytest.approx(wanted, abs=0.5 if wanted > 60 else 0.05)
    floor = floor_ms(found, ceilings, "fp16")
    assert floor is not None
    assert floor.bound == bound


@both_variants
@pytest.mark.parametrize("side", SIDES)
def test_a_network_against_what_it_does(variant: VariantName, side: int) -> None:
    seen = observed(variant, side)
    stages = network_stages(VARIANTS[variant], side)
    assert {stage.name: stage.reads for stage in stages} == seen.inputs
    assert {stage.name: stage.writes for stage in stages} == seen.outputs
    assert sum(stage.macs for stage in stages) == seen.macs
    assert stages[0].macs == seen.first_macs
    assert counts(Case(variant, side=side)).flops == 2 * seen.macs


@pytest.mark.parametrize("side", [*SIDES, 225, 1])
def test_slims_network_against_what_it_does(side: int) -> None:
    """It is not measured, so it has stages and no cases."""
    seen = observed("slim", side)
    stages = network_stages(VARIANTS["slim"], side)
    assert {stage.name: stage.writes for stage in stages} == seen.outputs
    assert sum(stage.macs for stage in stages) == seen.macs


def test_the_smallest_image_of_torchvisions_network() -> None:
    """Its 2x2 pool takes maps of one pixel in ceil mode."""
    stages = network_stages(VARIANTS["torchvision"], 15)
    assert {stage.name: stage.writes for stage in stages} == observed("torchvision", 15).outputs


@pytest.mark.parametrize(("variant", "side"), [("torchvision", 14), ("bvlc", 30)])
def test_an_image_too_small_is_refused(variant: VariantName, side: int) -> None:
    with pytest.raises(ValueError, match=f"side must be at least {side + 1} for this network, got {side}"):
        counts(Case(variant, side=side))


@both_variants
def test_batch_multiplies_activations_only(variant: VariantName) -> None:
    one, many = counts(Case(variant, batch=1, side=64)), counts(Case(variant, batch=7, side=64))
    assert many.flops == 7 * one.flops
    seen = observed(variant, 64, 7)
    activations = sum(seen.inputs.values()) + sum(seen.outputs.values())
    network = plain(variant)
    folded = sum(m.weight.numel() + m.weight.shape[0] for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    assert many.bytes == 4 * (activations + folded)
    assert one.bytes == 4 * (activations // 7 + folded)


@pytest.mark.parametrize("subject", ["torchvision", "bvlc", "4c"])
def test_dtypes_differ_in_bytes_only(subject: str) -> None:
    found = {dtype: counts(Case(subject, batch=2, dtype=dtype)) for dtype in ("fp32", "tf32", "bf16", "fp16")}
    assert len({each.flops for each in found.values()}) == 1
    assert found["fp32"].bytes == found["tf32"].bytes == 2 * found["bf16"].bytes == 2 * found["fp16"].bytes


@both_variants
@pytest.mark.parametrize("side", [64, 97])
def test_flops_against_torchs_counter(variant: VariantName, side: int) -> None:
    with FlopCounterMode(display=False) as counter:
        plain(variant)(torch.empty(2, 3, side, side, device="meta"))
    assert counts(Case(variant, batch=2, side=side)).flops == counter.get_total_flops()


@both_variants
def test_flops_of_a_training_step_against_torchs_counter(variant: VariantName) -> None:
    model = plain(variant).train()
    labels = torch.zeros(2, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(torch.empty(2, 3, 64, 64, device="meta")), labels).backward()
    assert counts(Case(variant, batch=2, mode="training", side=64)).flops == counter.get_total_flops()


@both_variants
@pytest.mark.parametrize(("dtype", "element"), [("fp32", 4), ("fp16", 2)])
def test_bytes_of_a_training_step(variant: VariantName, dtype: str, element: int) -> None:
    batch, side = 3, 64
    seen = observed(variant, side, batch)
    elements = 0
    for stage, output in seen.outputs.items():
        elements += seen.inputs[stage] + output  # forward
        elements += seen.inputs[stage] + 2 * output  # backward: its input and output again (the loss, of the logits); gradient
        elements += 0 if stage == "conv1" else seen.inputs[stage]  # gradient of its input
    elements += seen.outputs["linear"]  # gradient of the logits
    trained = sum(p.numel() for p in plain(variant).parameters())
    forward, backward, gradient, optimiser = 1, 1, 1, 5
    assert trained == PARAMETERS[variant]
    parameters = 4 * trained * (forward + backward + gradient + optimiser)
    found = counts(Case(variant, batch=batch, dtype=dtype, mode="training", side=side))
    assert found.bytes == element * elements + parameters


def rate(median: float) -> Rate:
    return Rate(median, median, median, 1)


def test_floor_by_hand() -> None:
    ceilings = Ceilings(rate(100.0), {"fp32": rate(2.0), "bf16": rate(8.0)})
    found = Counts(flops=4 * 10**9, bytes=10**8)
    assert floor_ms(found, ceilings, "fp32") == Floor(2.0, "compute")  # 4 GFLOP at 2 TFLOP/s against 100 MB at 100 GB/s: 1 ms
    assert floor_ms(found, ceilings, "bf16") == Floor(1.0, "memory")
    assert floor_ms(found, ceilings, "fp16") is None
    assert floor_ms(found, Ceilings(rate(100.0), {}), "fp32") is None


def test_a_dtype_slower_than_fp32_has_its_ceiling() -> None:
    ceilings = Ceilings(rate(1e6), {"fp32": rate(2.0), "fp16": rate(0.01)})
    assert floor_ms(Counts(4 * 10**9, 1), ceilings, "fp16") == Floor(2.0, "compute")
    alone = Ceilings(rate(1e6), {"fp16": rate(0.01)})
    assert floor_ms(Counts(4 * 10**9, 1), alone, "fp16") == Floor(400.0, "compute")


def test_percent_by_hand() -> None:
    assert percent(8.0, Floor(2.0, "memory")) == 25.0
    assert percent(1.0, Floor(2.0, "memory")) == 200.0
    assert percent(1.0, None) is None


def test_a_rate_summarises_samples() -> None:
    assert Rate.of([float(value) for value in range(10, -1, -1)]) == Rate(5.0, 2.0, 8.0, 11)
    assert Rate.of([3.0]) == Rate(3.0, 3.0, 3.0, 1)
    with pytest.raises(ValueError, match="at least one sample"):
        Rate.of([])


def test_ceilings_of_this_processor() -> None:
    ceilings = measure_ceilings(CPU, ["fp32", "tf32", "bf16"], copy_bytes=1 << 20, arithmetic_side=64, repeats=5)
    assert list(ceilings.arithmetic_tflop_per_s) == ["fp32", "bf16"]  # a CPU has no TF32
    for each in (ceilings.copy_gb_per_s, *ceilings.arithmetic_tflop_per_s.values()):
        assert 0 < each.p20 <= each.median <= each.p80 < math.inf
        assert each.n == 5
    assert Ceilings.from_json(json.loads(json.dumps(ceilings.to_json()))) == ceilings


def test_rates_count_all_bytes_and_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def one_millisecond(call: object, device: torch.device, repeats: int) -> list[float]:
        sizes.append(repeats)
        return [1e-3] * repeats

    monkeypatch.setattr(roofline, "_seconds", one_millisecond)
    ceilings = measure_ceilings(CPU, ["fp32"], copy_bytes=10**6, arithmetic_side=100, repeats=20)
    assert ceilings.copy_gb_per_s.median == pytest.approx(2.0)  # 1 MB read and 1 MB written
    assert ceilings.arithmetic_tflop_per_s["fp32"].median == pytest.approx(2e-3)  # 100 x 100 x 100 products and sums
    assert sizes == [1, 20, 1, 20, 20], "on a CPU a product and a convolution"


def test_a_slow_product_is_measured_on_smaller_matrices_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    sides: list[int] = []

    def a_second_at_512(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
        call()
        return [(sides[-1] / 512) ** 3] * repeats

    def product(device: torch.device, dtype: torch.dtype, side: int) -> roofline.Work:
        return roofline.Work(lambda: sides.append(side), 2 * side**3)

    monkeypatch.setattr(roofline, "_seconds", a_second_at_512)
    found = roofline._arithmetic_rate(product, CPU, torch.float32, 2048, repeats=20, budget=10.0)
    assert sides == [256, 512, 512]
    assert found.n == 10
    assert found.median == pytest.approx(2 * 512**3 / 1e12)
    assert roofline._arithmetic_rate(product, CPU, torch.float32, 2048, repeats=20, budget=0.01).n == 3
    assert sides[3:] == [256, 256]


def test_a_dtype_the_device_cannot_multiply_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = roofline._random_matmul

    def no_bf16(device: torch.device, dtype: torch.dtype, side: int) -> roofline.Work:
        if dtype == torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")
        return real(device, dtype, side)

    monkeypatch.setattr(roofline, "_random_matmul", no_bf16)
    ceilings = measure_ceilings(CPU, ["bf16", "fp32"], copy_bytes=1 << 20, arithmetic_side=32, repeats=2)
    assert list(ceilings.arithmetic_tflop_per_s) == ["fp32"]


def test_each_dtype_is_measured_under_its_own_tf32_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def flags() -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    def record(*_: object) -> Rate:
        seen.append(flags())
        return rate(1.0)

    monkeypatch.setattr(roofline, "_can_compute", lambda device, dtype: True)
    monkeypatch.setattr(roofline, "_arithmetic_rate", record)
    before = flags()
    measure_ceilings(CPU, ["tf32", "fp32"], copy_bytes=1 << 10, repeats=1)
    assert list(dict.fromkeys(seen)) == [(True, True), (False, False)]
    assert flags() == before


def test_a_ceiling_is_that_of_the_faster_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {roofline._random_matmul: 1.0, roofline._random_conv3x3: 2.0}
    monkeypatch.setattr(roofline, "_arithmetic_rate", lambda way, *_: rate(rates[way]))
    assert measure_ceilings(CPU, ["fp32"], copy_bytes=1 << 10, repeats=1).arithmetic_tflop_per_s["fp32"].median == 2.0


def test_flops_are_those_that_torch_counts() -> None:
    for way, shape in ((roofline._random_matmul, (256, 256)), (roofline._random_conv3x3, (4, 32, 7, 7))):
        work = way(CPU, torch.float32, 256)
        with FlopCounterMode(display=False) as counter:
            result = work.call()
        assert isinstance(result, torch.Tensor)
        assert result.shape == shape
        assert work.flops == counter.get_total_flops()


def test_the_higher_of_two_ceilings_counts() -> None:
    first = Ceilings(rate(5.0), {"fp32": rate(1.0), "bf16": rate(3.0)})
    second = Ceilings(rate(4.0), {"fp32": rate(2.0), "fp16": rate(1.0)})
    assert first.or_better(second) == Ceilings(rate(5.0), {"fp32": rate(2.0), "bf16": rate(3.0), "fp16": rate(1.0)})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ceilings_of_a_gpu() -> None:
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    ceilings = measure_ceilings(
        torch.device("cuda"), ["fp32", "tf32", "fp16"], copy_bytes=1 << 28, arithmetic_side=4096, repeats=5
    )
    assert flags == (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    assert ceilings.copy_gb_per_s.median > 10
    if "tf32" in ceilings.arithmetic_tflop_per_s:
        assert ceilings.arithmetic_tflop_per_s["tf32"].median > 1.5 * ceilings.arithmetic_tflop_per_s["fp32"].median


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": torch.device("meta")}, "device must be cpu or cuda, got meta"),
        ({"repeats": 0}, "repeats must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_ceilings(**{"device": CPU, "dtypes": ["fp32"], **arguments})  # type: ignore[arg-type]

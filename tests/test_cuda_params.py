"""What the CUDA kernel's parameters say of its tensors: which inputs it reads, where results go, how wide it stores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from cases import message_of
from torch import Tensor

from googlenet_fused.spec import InceptionSpec

sim: Any = pytest.importorskip(
    "googlenet_fused.backends.cuda._host_sim", reason="the simulation is not built: `make native` builds it"
)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}
DEVICE = {"multiprocessors": 4, "shared_memory": 227 * 1024}
ALIGNED = InceptionSpec(16, 8, 8, 16, 8, 8, 24)
BATCH, HEIGHT, WIDTH = 2, 3, 4


def channels_last(channels: int, element: str, *, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """NaN, ``[batch, channels, height, width]``."""
    return torch.full((BATCH, height, width, channels), float("nan"), dtype=DTYPES[element]).permute(0, 3, 1, 2)


def biases(spec: InceptionSpec, element: str = "fp16") -> tuple[list[float], Tensor]:
    """A bias for each output channel, none like another, and the packed biases that hold them; zeros for the reductions."""
    numbers = [float(channel + 1) for channel in range(spec.out_channels)]
    ch1x1, ch3x3, ch5x5, pool_proj = (numbers[part] for part in spec.slices)
    step = 32 // DTYPES[element].itemsize

    def padded(values: list[float], multiple: int) -> list[float]:
        return values + [0.0] * (-len(values) % multiple)

    reductions = padded([0.0] * spec.ch3x3red, step) + padded([0.0] * spec.ch5x5red, step)
    shared = padded(ch1x1, 8) + reductions
    return numbers, torch.tensor(padded(pool_proj, 8) + shared + padded(ch3x3, 8) + padded(ch5x5, 8))


def as_numpy(tensor: Tensor) -> Any:
    return tensor.view(torch.uint16).numpy() if tensor.element_size() == 2 else tensor.numpy()


def run(spec: InceptionSpec, x: Tensor, out: Tensor, element: str = "fp16") -> dict[str, Any]:
    """The module with weights of zero, so that each output channel is its bias. Returns what was counted."""
    widths = {one.name: getattr(spec, one.name) for one in fields(spec)}
    batch, _, height, width = x.shape
    problem = {"element": element, "batch": batch, "height": height, "width": width, **widths}
    weights = torch.zeros(sim.packed_sizes(problem)[0], dtype=torch.uint8)
    _, packed = biases(spec, element)
    return sim.simulate(
        problem, DEVICE, None, as_numpy(x), weights.numpy(), packed.numpy(), as_numpy(out), count=True, threads=1
    )


def assert_biases(out: Tensor, spec: InceptionSpec) -> None:
    expected = torch.tensor(biases(spec)[0]).to(out.dtype)[None, :, None, None].expand(out.shape)
    assert torch.equal(out, expected)


def refusal(x: Tensor, spec: InceptionSpec = ALIGNED, element: str = "fp16") -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        run(spec, x, channels_last(spec.out_channels, element), element)
    return message_of(error)


@pytest.mark.parametrize("element", DTYPES)
def test_each_branch_has_its_channels(element: str) -> None:
    x, out = channels_last(16, element).zero_(), channels_last(ALIGNED.out_channels, element)
    run(ALIGNED, x, out, element)
    assert_biases(out, ALIGNED)


def from_the_third(out: Tensor) -> Tensor:
    """Channels of a wider tensor, from the third on."""
    wider = out.new_full((BATCH, HEIGHT, WIDTH, out.shape[1] + 8), float("nan")).permute(0, 3, 1, 2)
    return wider[:, 2 : 2 + out.shape[1]]


def from_the_ninth(out: Tensor) -> Tensor:
    wider = out.new_full((BATCH, HEIGHT, WIDTH, out.shape[1] + 16), float("nan")).permute(0, 3, 1, 2)
    return wider[:, 8 : 8 + out.shape[1]]


def odd_pixels(out: Tensor) -> Tensor:
    """Pixels an odd number of elements apart."""
    wider = out.new_full((BATCH, HEIGHT, WIDTH, out.shape[1] + 1), float("nan")).permute(0, 3, 1, 2)
    return wider[:, : out.shape[1]]


def planes(out: Tensor) -> Tensor:
    return out.contiguous()


@pytest.mark.parametrize("layout", [from_the_third, odd_pixels, planes])
@pytest.mark.parametrize("element", DTYPES)
def test_outputs_that_are_stored_one_by_one(layout: Callable[[Tensor], Tensor], element: str) -> None:
    x, wide = channels_last(16, element).zero_(), channels_last(ALIGNED.out_channels, element)
    narrow = layout(wide)
    assert narrow.data_ptr() % 16 != 0 or narrow.stride() != wide.stride()
    few, many = (run(ALIGNED, x, out, element)["global_writes"][1] for out in (wide, narrow))
    assert many > few
    assert_biases(narrow, ALIGNED)


def test_a_slice_on_16_bytes_is_stored_as_wide_as_the_whole() -> None:
    x, whole = channels_last(16, "fp16").zero_(), channels_last(ALIGNED.out_channels, "fp16")
    part = from_the_ninth(whole)
    assert run(ALIGNED, x, part)["global_writes"] == run(ALIGNED, x, whole)["global_writes"]
    assert_biases(part, ALIGNED)


def test_only_branches_that_begin_off_16_bytes_are_stored_one_by_one() -> None:
    def writes(spec: InceptionSpec) -> int:
        out = channels_last(spec.out_channels, "fp16")
        counted = run(spec, channels_last(16, "fp16").zero_(), out)["global_writes"][1]
        assert_biases(out, spec)
        return counted

    whole, shifted = replace(ALIGNED, pool_proj=32), replace(ALIGNED, ch5x5=12, pool_proj=28)
    assert whole.out_channels == shifted.out_channels
    assert writes(whole) < writes(shifted) < 8 * writes(whole)


def test_outputs_of_one_pixel_may_have_any_distance() -> None:
    x, out = (
        channels_last(16, "fp16", height=1, width=1).zero_(),
        channels_last(ALIGNED.out_channels, "fp16", height=1, width=1),
    )
    strides = (out.stride(0), 1, 3, 5)
    run(ALIGNED, x.as_strided(x.shape, (x.stride(0), 1, 7, 3)), out.as_strided(out.shape, strides))
    assert_biases(out, ALIGNED)


def test_inputs_that_are_refused() -> None:
    x = channels_last(16, "fp16")
    assert refusal(x.contiguous()) == "x has a stride of 12 from channel to channel, must be 1: make it channels_last"
    wider = torch.zeros(BATCH, HEIGHT, WIDTH, 20, dtype=torch.float16).permute(0, 3, 1, 2)
    assert refusal(wider[:, :16]) == "x has a stride of 20 elements from pixel to pixel, must be a multiple of 8"
    rows = torch.zeros(BATCH * 208, dtype=torch.float16).as_strided(x.shape, (208, 1, 68, 16))
    assert refusal(rows) == "x has a stride of 68 elements from row to row, must be a multiple of 8"
    images = torch.zeros(BATCH * 204, dtype=torch.float16).as_strided(x.shape, (204, 1, 64, 16))
    assert refusal(images) == "x has a stride of 204 elements from image to image, must be a multiple of 8"
    shifted = torch.zeros(BATCH, HEIGHT, WIDTH, 24, dtype=torch.float16).permute(0, 3, 1, 2)
    assert refusal(shifted[:, 4:20]) == "x must begin on 16 bytes"


def test_fp32_pixels_lie_on_four_numbers() -> None:
    spec = replace(ALIGNED, in_channels=5)
    for channels, fits in ((8, True), (12, True), (10, False)):
        x = torch.zeros(BATCH, HEIGHT, WIDTH, channels).permute(0, 3, 1, 2)[:, :5]
        if fits:
            out = channels_last(spec.out_channels, "tf32")
            run(spec, x, out, "tf32")
            assert_biases(out, spec)
        else:
            assert refusal(x, spec, "tf32") == "x has a stride of 10 elements from pixel to pixel, must be a multiple of 4"

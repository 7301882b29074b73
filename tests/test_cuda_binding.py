"""The CUDA library as torch sees it: its ops, their checks on tensors without memory, what it links to. No test needs a GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from googlenet_fused.backends.cuda import native
from googlenet_fused.spec import GOOGLENET_SPECS, InceptionSpec

why_not = native.load()
pytestmark = pytest.mark.skipif(why_not is not None, reason=str(why_not))

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
H100 = [132, 232448]
RTX4090 = [128, 101376]
SPEC = GOOGLENET_SPECS["3a"]


def ops() -> Any:
    return torch.ops.googlenet_fused_cuda


def widths_of(spec: InceptionSpec) -> list[int]:
    widths = [spec.in_channels, spec.ch1x1, spec.ch3x3red, spec.ch3x3, spec.ch5x5red, spec.ch5x5, spec.pool_proj]
    return [*widths, spec.large_kernel]


def packed_sizes(widths: list[int], element_bytes: int) -> tuple[int, int]:
    """Bytes of the packed weights and number of packed biases: four products, padded to whole stages and columns."""
    in_channels, ch1x1, ch3x3red, ch3x3, ch5x5red, ch5x5, pool_proj, kernel = widths

    def padded(number: int, multiple: int) -> int:
        return -(-number // multiple) * multiple

    step = 32 // element_bytes
    reduced3, reduced5 = padded(ch3x3red, step), padded(ch5x5red, step)
    products = [
        (padded(pool_proj, 8), in_channels),
        (padded(ch1x1, 8) + reduced3 + reduced5, in_channels),
        (padded(ch3x3, 8), 9 * reduced3),
        (padded(ch5x5, 8), kernel**2 * reduced5),
    ]
    stage = 64 // element_bytes
    return sum(columns * padded(depth, stage) * element_bytes for columns, depth in products), sum(
        columns for columns, _ in products
    )


def arguments(
    spec: InceptionSpec = SPEC,
    dtype: torch.dtype = torch.float16,
    shape: tuple[int, int, int] = (1, 28, 28),
    device: str = "meta",
    tile: list[int] | None = None,
    **changed: Any,
) -> list[Any]:
    """Arguments of ``inception``, all in order but those that are ``changed``."""
    n, h, w = shape
    widths = widths_of(spec)
    weight_bytes, biases = packed_sizes(widths, dtype.itemsize)
    known = {
        "x": torch.empty(n, spec.in_channels, h, w, dtype=dtype, device=device).to(memory_format=torch.channels_last),
        "weights": torch.empty(weight_bytes, dtype=torch.uint8, device=device),
        "bias": torch.empty(biases, device=device),
        "widths": widths,
        "tile": tile or [],
        "out": torch.empty(n, spec.out_channels, h, w, dtype=dtype, device=device),
    }
    assert changed.keys() <= known.keys()
    return list((known | changed).values())


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def test_the_ops_have_these_schemas() -> None:
    expected = {
        "inception": "(Tensor x, Tensor weights, Tensor bias, int[] widths, int[] tile, Tensor(a!) out) -> ()",
        "plan": "(int[] problem, int[] device, int[] tile=[]) -> str",
    }
    for name, schema in expected.items():
        assert str(getattr(ops(), name).default._schema) == f"googlenet_fused_cuda::{name}{schema}"


def test_loading_twice_does_nothing_and_no_cuda_is_started() -> None:
    program = (
        "import torch; from googlenet_fused.backends.cuda import native; assert (native.load(), native.load()) == (None, None);"
        "torch.ops.googlenet_fused_cuda.inception; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GOOGLENET_SPECS)
def test_every_module_of_googlenet_passes_the_checks(name: str, dtype: torch.dtype) -> None:
    size = {"3": 28, "4": 14, "5": 7}[name[0]]
    for batch in (1, 32):
        assert ops().inception(*arguments(GOOGLENET_SPECS[name], dtype, (batch, size, size))) is None


@pytest.mark.parametrize("shape", [(0, 28, 28), (2, 0, 28), (2, 28, 0), (0, 0, 0)], ids=str)
def test_an_empty_output_needs_no_plan(shape: tuple[int, int, int]) -> None:
    ops().inception(*arguments(shape=shape))
    ops().inception(*arguments(shape=shape, x=meta(shape[0], 192, *shape[1:])))  # whose strides would not do
    with pytest.raises(RuntimeError, match="weights is"):
        ops().inception(*arguments(shape=shape, weights=meta(1, dtype=torch.uint8)))
    with pytest.raises(RuntimeError, match="tile has 1 numbers"):
        ops().inception(*arguments(shape=shape, tile=[1]))


def test_out_may_have_any_strides_and_x_a_wider_pixel() -> None:
    for out in (
        meta(1, 256, 28, 28).to(memory_format=torch.channels_last),
        meta(1, 300, 28, 28)[:, 7:263],
        meta(28, 28, 1, 256).permute(2, 3, 1, 0),
        meta(1, 256, 56, 56)[..., ::2, 1::2],
    ):
        ops().inception(*arguments(out=out))
    ops().inception(*arguments(x=meta(1, 28, 28, 200).permute(0, 3, 1, 2)[:, :192]))
    ops().inception(*arguments(x=meta(1, 56, 56, 192).permute(0, 3, 1, 2)[..., ::2, ::2]))


WRONG = {
    "x of another dtype": (
        dict(x=meta(1, 192, 28, 28, dtype=torch.float64)),
        "x is float64; it is to be float16, bfloat16 or float32",
    ),
    "x of integers": (dict(x=meta(1, 192, 28, 28, dtype=torch.int8)), "x is .*; it is to be float16, bfloat16 or float32"),
    "x of three dimensions": (dict(x=meta(192, 28, 28)), r"x is \[192, 28, 28\]; it is to be \[n, in_channels, h, w\]"),
    "x of other channels": (dict(x=meta(1, 200, 28, 28)), r"x is \[1, 200, 28, 28\]; its channels are to be in_channels, 192"),
    "x contiguous": (dict(x=meta(1, 192, 28, 28)), "x has a stride of 784 from channel to channel, must be 1"),
    "x of unaligned pixels": (
        dict(x=meta(1, 28, 28, 193).permute(0, 3, 1, 2)[:, :192]),
        "x has a stride of 5404 elements from row to row, must be a multiple of 8",
    ),
    "x of too large a size": (dict(x=meta(1, 192, 2**31, 1)), r"the height is 2147483648; it is to be 0 to 2147483647"),
    "out of another dtype": (
        dict(out=meta(1, 256, 28, 28, dtype=torch.float32)),
        "out is float32, x float16; they are to be of one dtype",
    ),
    "out of another shape": (dict(out=meta(1, 255, 28, 28)), r"out is \[1, 255, 28, 28\]; .* it is to be \[1, 256, 28, 28\]"),
    "out of another batch": (dict(out=meta(2, 256, 28, 28)), r"out is \[2, 256, 28, 28\]; .* it is to be \[1, 256, 28, 28\]"),
    "out of fewer dimensions": (dict(out=meta(256, 28, 28)), r"out is \[256, 28, 28\]; .* it is to be \[1, 256, 28, 28\]"),
    "out expanded": (
        dict(out=meta(1, 256, 28, 1).expand(1, 256, 28, 28)),
        "out has strides of 7168, 28, 1 and 0 elements, by which its elements overlap or interleave; ",
    ),
    "out overlapping": (
        dict(out=meta(1, 256, 28, 28).as_strided((1, 256, 28, 28), (0, 1, 28 * 256, 255))),
        "out has strides of 0, 1, 7168 and 255 elements, by which its elements overlap or interleave; ",
    ),
    "weights of another dtype": (dict(weights=meta(9)), "weights is float16; it is to be uint8"),
    "weights of another size": (dict(weights=meta(9, dtype=torch.uint8)), r"weights is \[9\]; .* it is to be \[\d+\]"),
    "weights of two dimensions": (dict(weights=meta(3, 3, dtype=torch.uint8)), r"weights is \[3, 3\]; .* it is to be \[\d+\]"),
    "bias of another dtype": (dict(bias=meta(9)), "bias is float16; it is to be float32"),
    "bias of another size": (dict(bias=meta(9, dtype=torch.float32)), r"bias is \[9\]; .* it is to be \[\d+\]"),
    "weights elsewhere": (dict(weights=torch.empty(9)), "weights is on cpu, x on meta; they are to be on one device"),
    "bias elsewhere": (dict(bias=torch.empty(9)), "bias is on cpu, x on meta; they are to be on one device"),
    "out elsewhere": (dict(out=torch.empty(9)), "out is on cpu, x on meta; they are to be on one device"),
    "x elsewhere": (dict(x=torch.empty(1, 192, 28, 28, dtype=torch.float16)), "weights is on meta, x on cpu; "),
    "too few widths": (
        dict(widths=[192, 64]),
        r"widths has 2 numbers, \[192, 64\]; it is to have 8, \[in_channels, ch1x1, .*\]",
    ),
    "too many widths": (dict(widths=[1] * 9), "widths has 9 numbers"),
    "no widths": (dict(widths=[]), r"widths has 0 numbers, \[\]"),
    "a width of nothing": (dict(widths=[192, 64, 96, 0, 16, 32, 32, 5]), "ch3x3 is 0; it is to be 1 to 2147483647"),
    "a negative width": (dict(widths=[192, 64, 96, 128, -16, 32, 32, 5]), "ch5x5red is -16; it is to be 1 to 2147483647"),
    "a huge width": (dict(widths=[192, 2**40, 96, 128, 16, 32, 32, 5]), "ch1x1 is 1099511627776; it is to be 1 to 2147483647"),
    "a kernel of another size": (dict(widths=[192, 64, 96, 128, 16, 32, 32, 7]), "large_kernel is 7; it is to be 3 or 5"),
    "too short a tile": (
        dict(tile=[1, 7]),
        r"tile has 2 numbers, \[1, 7\]; it is to have 5, \[images, rows, columns, .*\], or none",
    ),
    "a tile of no rows": (dict(tile=[1, 0, 28, 1, 2]), "tile's rows is 0; it is to be 1 to 2147483647"),
    "a tile that does not fit": (dict(tile=[64, 28, 28, 1, 4]), r".*pixels, at most 256"),
    "too many stages": (dict(tile=[1, 7, 28, 1, 9]), "9 stages, must be 2 to 4"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_named(wrong: str) -> None:
    changed, text = WRONG[wrong]
    with pytest.raises(RuntimeError) as caught:
        ops().inception(*arguments(**changed))
    assert re.match(f"googlenet_fused_cuda: {text}", str(caught.value)), caught.value


def test_weights_and_bias_are_to_be_contiguous() -> None:
    weight_bytes, biases = packed_sizes(widths_of(SPEC), 2)
    for name, tensor in (
        ("weights", meta(2 * weight_bytes, dtype=torch.uint8)[::2]),
        ("bias", meta(2 * biases, dtype=torch.float32)[::2]),
    ):
        with pytest.raises(RuntimeError, match=f"^googlenet_fused_cuda: {name} is not contiguous$"):
            ops().inception(*arguments(**{name: tensor}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_sizes_of_packed_weights_are_those_of_odd_modules(dtype: torch.dtype) -> None:
    for widths in ([8, 1, 1, 1, 1, 1, 1, 5], [24, 9, 17, 23, 33, 1, 8, 3], [1, 8, 16, 8, 16, 8, 7, 5]):
        spec = InceptionSpec(*widths)
        pixel = -(-spec.in_channels * dtype.itemsize // 16) * 16 // dtype.itemsize
        x = meta(2, 5, 6, pixel, dtype=dtype).permute(0, 3, 1, 2)[:, : spec.in_channels]
        ops().inception(*arguments(spec, dtype, (2, 5, 6), x=x))
        for name, index in (("weights", 1), ("bias", 2)):
            known = arguments(spec, dtype, (2, 5, 6), x=x)[index]
            with pytest.raises(RuntimeError, match=rf"{name} is .*\[{known.numel()}\]$"):
                ops().inception(*arguments(spec, dtype, (2, 5, 6), x=x, **{name: known.new_empty(known.numel() + 1)}))


def test_cpu_tensors_are_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match=r"^googlenet_fused_cuda: x is on cpu; inception runs on CUDA devices only$"):
        ops().inception(*arguments(device="cpu"))


def test_fake_tensors_take_the_same_checks() -> None:
    with FakeTensorMode():
        assert ops().inception(*arguments(device="cuda")) is None
        with pytest.raises(RuntimeError, match="large_kernel is 4"):
            ops().inception(*arguments(device="cuda", widths=[192, 64, 96, 128, 16, 32, 32, 4]))


def test_opcheck() -> None:
    torch.library.opcheck(ops().inception.default, arguments(), test_utils=("test_schema", "test_faketensor"))


def test_a_plan_can_be_asked_for() -> None:
    problem = [0, 32, 28, 28, *widths_of(SPEC)]
    said = ops().plan(problem, H100)
    assert said == ops().plan(problem, H100)
    assert said != ops().plan(problem, RTX4090)
    assert said != ops().plan([2, *problem[1:]], H100)
    assert ops().plan(problem, H100, [1, 7, 28, 1, 2]) != ops().plan(problem, H100, [1, 4, 28, 1, 2])


@pytest.mark.parametrize(
    ("problem", "device", "tile", "text"),
    [
        ([0, 1, 28, 28], H100, [], "problem has 4 numbers; it is to have 12: dtype, batch, height, width and the widths"),
        ([3, 1, 28, 28, *widths_of(SPEC)], H100, [], "the dtype is 3; it is to be 0 to 2"),
        ([0, -1, 28, 28, *widths_of(SPEC)], H100, [], "the batch is -1; it is to be 0 to 2147483647"),
        ([0, 0, 28, 28, *widths_of(SPEC)], H100, [], "there is no plan for an empty output"),
        ([0, 1, 28, 28, *widths_of(SPEC)], [132], [], "device has 1 numbers; it is to have 2"),
        ([0, 1, 28, 28, *widths_of(SPEC)], [0, 1000], [], "multiprocessors is 0; it is to be 1 to"),
        ([0, 1, 28, 28, *widths_of(SPEC)], [132, 1000], [], ""),  # the planner's own words
        ([0, 1, 28, 28, *widths_of(SPEC)], H100, [1, 2, 3], "tile has 3 numbers"),
    ],
)
def test_a_wrong_question_for_a_plan_is_answered(problem: list[int], device: list[int], tile: list[int], text: str) -> None:
    with pytest.raises(RuntimeError, match=rf"^googlenet_fused_cuda: {text or '.'}"):
        ops().plan(problem, device, tile)


def test_plans_are_kept_and_forgotten_from_many_threads() -> None:
    def call(seed: int) -> list[str]:
        said = []
        for step in range(400):  # more problems than are kept
            size = 1 + (step * 7 + seed * 13) % 300
            ops().inception(*arguments(InceptionSpec(8, 8, 8, 8, 8, 8, 8), shape=(1, 3, size), tile=[1, 3, min(size, 8), 1, 2]))
            said.append(ops().plan([0, 1, 3, 5, 8, 8, 8, 8, 8, 8, 8, 5], H100))
        return said

    with ThreadPoolExecutor(4) as threads:
        said = [text for texts in threads.map(call, range(4)) for text in texts]
    assert len(set(said)) == 1


def output_of(*command: Any) -> str:
    triton = importlib.util.find_spec("triton")  # which has tools of the CUDA toolkit
    bundled = (triton and triton.submodule_search_locations) or []
    folders = [os.environ["PATH"], "/usr/local/cuda/bin", *(f"{path}/backends/nvidia/bin" for path in bundled)]
    path = shutil.which(command[0], path=os.pathsep.join(folders))
    if path is None:
        pytest.skip(f"needs {command[0]}")
    return subprocess.run([path, *command[1:]], capture_output=True, text=True, check=True).stdout


def test_it_links_to_torch_for_cpus_only() -> None:
    dynamic = output_of("readelf", "--dynamic", "--wide", native.FOLDER / native.LIBRARY)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    assert {"libtorch.so", "libtorch_cpu.so"} <= needed
    assert not {name for name in needed if re.match(r"libtorch_(cuda|python)|libc10|libcuda|libpython", name)}
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)


def test_of_torch_it_uses_the_stable_interface_alone() -> None:
    names = re.findall(
        r"^ +([Uw]) (\S+)$", output_of("nm", "--dynamic", "--undefined-only", native.FOLDER / native.LIBRARY), re.MULTILINE
    )
    of_torch = {
        name: kind for kind, name in names if not re.search(r"@", name) and not name.startswith(("_ITM_", "__gmon", "__cxa"))
    }
    assert of_torch
    assert [name for name in of_torch if not name.startswith(("aoti_torch_", "torch_"))] == []
    assert [name for name, kind in of_torch.items() if kind == "w"] == ["aoti_torch_get_current_cuda_stream"]


def test_it_gives_no_names_of_its_own_away() -> None:
    defined = output_of("nm", "--dynamic", "--defined-only", "--demangle", native.FOLDER / native.LIBRARY)
    assert not re.search(r"googlenet_fused|torch::|cudart|cuda[A-Z]", defined), defined


def test_it_holds_code_for_the_archs_that_its_facts_name() -> None:
    library, facts = native.FOLDER / native.LIBRARY, native.build_facts()
    code = set(re.findall(r"\.(sm_\w+)\.cubin", output_of("cuobjdump", "--list-elf", library)))
    ptx = {f"compute_{arch}" for arch in re.findall(r"\.sm_(\w+)\.ptx", output_of("cuobjdump", "--list-ptx", library))}
    assert code | ptx == set(facts["archs"])

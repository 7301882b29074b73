"""``torch.compile``, ``torch.export`` and autocast: one graph, dynamic batch, and the results of eager mode."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from functools import partial

import cases
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from googlenet_fused import FusedInception, InceptionSpec, fuse
from googlenet_fused.blocks import BasicConv2d, Inception
from googlenet_fused.randomize import randomize_

SECOND = InceptionSpec(cases.TINY.out_channels, 4, 3, 5, 2, 4, 3, large_kernel=3)

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++", "c++")), reason="Inductor needs a C++ compiler"
)
inductor = [needs_compiler, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
backends = pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=inductor)])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class SmallNet(nn.Module):
    """A stem, two Inception modules with a pool between them, and a classifier: ``[n, 3, h, w] -> [n, 7]``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = BasicConv2d(3, cases.TINY.in_channels, kernel_size=3, stride=2, padding=1)
        *first, first_kernel = cases.TINY
        *second, second_kernel = SECOND
        self.first = Inception(*first, large_kernel=first_kernel)
        self.second = Inception(*second, large_kernel=second_kernel)
        self.fc = nn.Linear(SECOND.out_channels, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        x = self.second(F.max_pool2d(x, 2, ceil_mode=True))
        return self.fc(x.mean((2, 3)))


def small_net(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """The fused and the plain network, with the same parameters."""
    plain = randomize_(SmallNet()).eval().to(dtype)
    return fuse(plain), plain


def pictures(batch: int = 2, height: int = 15, width: int = 12, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 3, height, width, generator=generator).to(dtype)


def assert_like_eager(actual: Tensor, expected: Tensor) -> None:
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert actual.stride() == expected.stride()


# One graph, whatever the batch.


@pytest.mark.parametrize("grad", [False, True])
def test_dynamic_batch_compiles_once(grad: bool) -> None:
    fused = cases.fused_inception(cases.TINY).requires_grad_(grad)
    counting = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused, fullgraph=True, backend=counting)
    with torch.set_grad_enabled(grad):
        for batch in (3, 2, 5, 8):
            x = cases.image(batch)
            torch._dynamo.mark_dynamic(x, 0)
            assert_like_eager(compiled(x), fused(cases.image(batch)))
    assert counting.frame_count == 1


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts(layout: str) -> None:
    fused = cases.fused_inception(cases.TINY)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = cases.LAYOUTS[layout](cases.image())
    with torch.no_grad():
        assert_like_eager(compiled(x), fused(x))
    leaf, eager_leaf = (x.detach().requires_grad_() for _ in range(2))
    grad = cases.LAYOUTS[layout](torch.randn(2, cases.TINY.out_channels, 7, 6))
    compiled(leaf).backward(grad)
    fused(eager_leaf).backward(grad)
    torch.testing.assert_close(leaf.grad, eager_leaf.grad, rtol=1e-5, atol=1e-5)


def test_dynamic_height_and_width() -> None:
    fused = cases.fused_inception(cases.TINY)
    counting = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused, fullgraph=True, backend=counting, dynamic=True)
    with torch.no_grad():
        compiled(cases.image())
        at_first = counting.frame_count
        for shape in ((2, 7, 6), (3, 5, 9), (4, 2, 3), (2, 14, 14)):
            assert_like_eager(compiled(cases.image(*shape)), fused(cases.image(*shape)))
    assert counting.frame_count == at_first


def test_batches_that_torch_compiles_apart() -> None:
    fused = cases.fused_inception(cases.TINY)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for shape in ((2, 7, 6), (1, 7, 6), (0, 7, 6), (1, 1, 1), (3, 1, 5)):
            assert_like_eager(compiled(cases.image(*shape)), fused(cases.image(*shape)))


@backends
def test_small_network(backend: str) -> None:
    fused, plain = small_net()
    counting = CompileCounterWithBackend(backend)
    compiled = torch.compile(fused, fullgraph=True, backend=counting)
    with torch.no_grad():
        for batch in (4, 2, 6):
            x = pictures(batch)
            torch._dynamo.mark_dynamic(x, 0)
            logits = compiled(x)
            torch.testing.assert_close(logits, fused(x), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(logits, plain(x), rtol=1e-4, atol=1e-4)
    assert counting.frame_count == 1


def test_the_graph_calls_the_operators() -> None:
    fused, _ = small_net()
    found: list[str] = []

    def reading(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        found.extend(str(node.target) for node in graph.graph.nodes if "googlenet_fused" in str(node.target))
        return graph

    with torch.no_grad():
        torch.compile(fused, fullgraph=True, backend=reading)(pictures())
    assert [name.split(".")[1] for name in found] == ["conv2d_relu", "inception", "inception"]


def test_the_weights_are_packed_once_for_all_calls(packs: list[object]) -> None:
    fused = cases.fused_inception(cases.TINY)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(3):
            compiled(cases.image())
    assert len(packs) == 1


# Backward.


def _step(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    network(x).square().mean().backward()
    found = {"x": x.grad, **{name: parameter.grad for name, parameter in network.named_parameters()}}
    network.zero_grad(set_to_none=True)
    return {name.removeprefix("_orig_mod."): gradient for name, gradient in found.items()}


def test_backward_of_the_small_network() -> None:
    fused, plain = small_net(torch.float64)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for batch in (3, 5):
        x = pictures(batch, dtype=torch.float64)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(_step(compiled, x), _step(plain, x), rtol=1e-9, atol=1e-9)


@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_backward_by_inductor() -> None:
    fused, plain = cases.fused_inception(cases.TINY, None), cases.plain_inception(cases.TINY, None)
    compiled = torch.compile(fused, fullgraph=True, backend="inductor")
    torch.testing.assert_close(_step(compiled, cases.image()), _step(plain, cases.image()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["batch", None])
def test_training_steps_follow_the_plain_block(norm: str | None) -> None:
    fused = cases.fused_inception(cases.TINY, norm).double().train()
    plain = cases.plain_inception(cases.TINY, norm).double().train()
    counting = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused, fullgraph=True, backend=counting)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9) for module in (fused, plain)]
    for step in range(3):
        x = cases.image(2 + step, dtype=torch.float64)
        torch._dynamo.mark_dynamic(x, 0)
        losses = []
        for module, optimizer in zip((compiled, plain), optimizers, strict=True):
            loss = (module(x) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert counting.frame_count == 1
    torch.testing.assert_close(fused.state_dict(), plain.state_dict(), rtol=1e-10, atol=1e-10)


# After compiling.


def _replace_parameter(module: nn.Module) -> None:
    module.branch2[0].conv.weight = nn.Parameter(module.branch2[0].conv.weight.detach() * -2)


CHANGES = {
    "in place": torch.no_grad()(lambda module: module.branch1.conv.weight.mul_(2)),
    "statistics": lambda module: module.branch3[1].bn.running_mean.add_(1),
    "load_state_dict": lambda module: module.load_state_dict(cases.plain_inception(cases.TINY, seed=7).state_dict()),
    "replaced": _replace_parameter,
    ".data": lambda module: setattr(module.branch4[1].conv.weight, "data", module.branch4[1].conv.weight.data * 3),
    "dtype": lambda module: module.double(),
    "eps": lambda module: setattr(module.branch1.bn, "eps", 2.0),
    "backend": lambda module: setattr(module, "backend", "reference"),
    "train": lambda module: module.train(),
}


@pytest.mark.parametrize(("change", "grad"), [*((change, False) for change in CHANGES), ("in place", True), ("train", True)])
def test_later_changes_are_followed(change: str, grad: bool) -> None:
    fused, plain = cases.fused_inception(cases.TINY), cases.plain_inception(cases.TINY)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            x = cases.image(dtype=next(plain.parameters()).dtype)
            torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-4)
            CHANGES[change](fused)
            CHANGES[change](plain)
        x = cases.image(dtype=next(plain.parameters()).dtype)
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-4)


def test_a_copy_is_compiled_on_its_own() -> None:
    fused = cases.fused_inception(cases.TINY)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = compiled(cases.image())
        other = copy.deepcopy(fused)
        other.branch1.conv.weight.mul_(2)
        assert not torch.equal(torch.compile(other, fullgraph=True, backend="aot_eager")(cases.image()), expected)
        assert torch.equal(compiled(cases.image()), expected)


# Export.


def _export(network: nn.Module, x: Tensor, *, strict: bool) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=64)
    return torch.export.export(network, (x,), dynamic_shapes=({0: batch},), strict=strict)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_export_with_dynamic_batch(grad: bool, strict: bool) -> None:
    fused, plain = small_net()
    with torch.set_grad_enabled(grad):
        exported = _export(fused, pictures(3), strict=strict)
        runnable = exported.module()
    targets = [str(node.target) for node in exported.graph.nodes]
    assert sum("googlenet_fused.inception.default" in target for target in targets) == 2
    assert set(exported.state_dict) == set(plain.state_dict())
    with torch.no_grad():
        for batch in (1, 2, 5):
            x = pictures(batch)
            torch.testing.assert_close(runnable(x), plain(x), rtol=1e-4, atol=1e-4)


def test_export_of_a_module_follows_a_loaded_state() -> None:
    fused, other = cases.fused_inception(cases.TINY), cases.plain_inception(cases.TINY, seed=7)
    with torch.no_grad():
        runnable = _export(fused, cases.image(3), strict=False).module()
        runnable(cases.image())
        runnable.load_state_dict(other.state_dict())
        torch.testing.assert_close(runnable(cases.image()), other(cases.image()), rtol=1e-4, atol=1e-4)


def test_export_of_fresh_parameters_on_meta() -> None:
    with torch.device("meta"):
        module = FusedInception(*list(cases.TINY)[:7]).eval()
        exported = _export(module, torch.empty(3, 5, 7, 6), strict=False)
    (output,) = (node for node in exported.graph.nodes if node.op == "output")
    assert list(output.args[0][0].meta["val"].shape)[1:] == [cases.TINY.out_channels, 7, 6]


# Autocast.


def _under_autocast(network: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return network(x)


@backends
def test_autocast_inside_the_compiled_function(backend: str) -> None:
    fused = cases.fused_inception(cases.TINY)
    compiled = torch.compile(partial(_under_autocast, fused), fullgraph=True, backend=backend)
    with torch.no_grad():
        expected = _under_autocast(fused, cases.image())
        assert expected.dtype == torch.bfloat16
        assert_like_eager(compiled(cases.image()), expected)


def test_autocast_outside_the_compiled_function() -> None:
    fused, plain = small_net()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for enabled in (False, True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                logits, eager, reference = compiled(pictures()), fused(pictures()), plain(pictures())
            assert logits.dtype == eager.dtype == reference.dtype == (torch.bfloat16 if enabled else torch.float32)
            tolerance = 5e-2 if enabled else 1e-4
            torch.testing.assert_close(logits, eager, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(logits, reference, rtol=tolerance, atol=tolerance)


def test_autocast_and_backward_inside_compile() -> None:
    fused = cases.fused_inception(cases.TINY)
    compiled = torch.compile(partial(_under_autocast, fused), fullgraph=True, backend="aot_eager")
    found = []
    for run in (compiled, partial(_under_autocast, fused)):
        leaf = cases.image().requires_grad_()
        run(leaf).float().square().sum().backward()
        found.append({"x": leaf.grad, **{name: parameter.grad for name, parameter in fused.named_parameters()}})
        fused.zero_grad(set_to_none=True)
    for name, gradient in found[0].items():
        assert gradient.dtype == torch.float32
        assert (gradient - found[1][name]).abs().max() <= 2e-2 * found[1][name].abs().max(), name

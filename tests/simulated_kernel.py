"""Runs small modules through one build of the simulated CUDA kernel and says whether they came out right.

    python tests/simulated_kernel.py MODULE.so [--whole]

For builds of a changed source and for sanitized ones, which must not run in the process of the tests. Exit status 0: all is
right; 1: something was caught, and is printed.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
MODULE = "googlenet_fused.backends.cuda._host_sim"


def load(path: Path) -> None:
    """Makes the module at ``path`` the simulation of this process, which must not have one yet."""
    assert MODULE not in sys.modules
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[MODULE] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[MODULE])


if __name__ == "__main__":
    load(Path(sys.argv[1]))  # before anything asks which backends there are

import torch  # noqa: E402
from cases import GOOGLENET_MODULES, ODD_SPECS, integer_convs, integer_input, plain_result  # noqa: E402
from torch import Tensor  # noqa: E402

import googlenet_fused  # noqa: E402
from googlenet_fused.backends.cuda.simulation import simulate  # noqa: E402
from googlenet_fused.backends.cuda.tiles import Tile, use_tile  # noqa: E402
from googlenet_fused.packing import ConvParams  # noqa: E402
from googlenet_fused.spec import InceptionSpec  # noqa: E402

SPEC = ODD_SPECS["wide"]
SHAPE = (3, 9, 11)
TILES = {
    "images": Tile(2, 9, 11, 1, 3),
    "rows": Tile(1, 4, 11, 1, 2),
    "columns": Tile(1, 4, 3, 1, 4),
    "splits": Tile(1, 9, 11, 3, 3),
}
MODES = {
    "forward": {},
    "reversed": {"order": "reversed", "eager": True},
    "shuffled": {"order": "shuffled", "seed": 7},
    "no shadow, reversed": {"order": "reversed", "races": False},
}


def run(spec: InceptionSpec, x: Tensor, convs: list[ConvParams], tile: Tile | None, **modes: object) -> Tensor:
    with ExitStack() as stack:
        stack.enter_context(simulate(**modes))
        stack.enter_context(use_tile(tile))
        return googlenet_fused.inception(x, convs, backend="cuda_sim")


def ones(convs: list[ConvParams]) -> list[ConvParams]:
    """With weights of 1, by which no infinity becomes NaN."""
    return [ConvParams(torch.ones_like(conv.weight), conv.bias) for conv in convs]


def special_values(x: Tensor, spec: InceptionSpec) -> Iterator[tuple[str, Tensor]]:
    """Inputs with one infinity and with one NaN."""
    for value in (float("inf"), float("nan")):
        spoiled = x.clone()
        spoiled[1, spec.in_channels // 2, 4, 3] = value
        yield str(value), spoiled


def faults(whole: bool) -> Iterator[str]:
    """What is wrong, a line each."""
    for large_kernel in (5, 3):
        spec = replace(SPEC, large_kernel=large_kernel)
        convs, x = integer_convs(spec, torch.float16), integer_input(spec, *SHAPE, torch.float16)
        x = x.contiguous(memory_format=torch.channels_last)  # and so is the output
        expected = plain_result(x, convs).half()
        for name, tile in TILES.items():
            for mode, changes in MODES.items():
                try:
                    if not torch.equal(run(spec, x, convs, tile, **changes), expected):
                        yield f"{name}, {mode}: another result"
                except RuntimeError as error:
                    yield f"{name}, {mode}: {error}"
        for value, spoiled in special_values(x, spec):
            try:
                found, wanted = run(spec, spoiled, ones(convs), None), plain_result(spoiled, ones(convs)).half()
                if not torch.equal(found.isnan(), wanted.isnan()) or not torch.equal(found.isinf(), wanted.isinf()):
                    yield f"{value} in the input: stands elsewhere"
            except RuntimeError as error:
                yield f"{value} in the input: {error}"
    if whole:
        for name in ("3a", "4a", "5a"):
            spec, side = GOOGLENET_MODULES[name]
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                convs, x = integer_convs(spec, dtype), integer_input(spec, 1, side, side, dtype)
                if not torch.equal(run(spec, x, convs, None), plain_result(x, convs).to(dtype)):
                    yield f"{name} in {dtype}: another result"


def main() -> int:
    torch.set_num_threads(2)
    for fault in faults("--whole" in sys.argv):
        print(fault)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The package's parts import one way only: each from the parts below it, never from its peers or from above."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "googlenet_fused"

LAYERS = (
    ("spec", "arithmetic", "preparation", "response_norm", "user_files", "messages", "progress", "whole_files", "distributed"),
    ("blocks",),
    ("packing", "parameter_cache", "tolerance", "randomize", "weights"),
    ("backends",),
    ("kept_weights",),
    ("ops",),
    ("direct",),
    ("modules",),
    ("lrn",),
    ("models", "convert"),
    ("features", "regions"),
    ("dense",),
    ("__init__",),
    ("images", "info", "charts"),
    ("data",),
    ("bench", "crops", "workers"),
    ("demo", "tune", "evaluation", "training"),
    ("cli",),
    ("__main__",),
)
"""From the bottom up; a part is a module or a sub-package, and ``__init__`` is the package's own public face."""

RANKS = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}


def part_of(name: str) -> str:
    """The part that a dotted name under the package belongs to; a name the table lacks is an attribute of ``__init__``."""
    part = [*name.split("."), "__init__"][1]
    return part if part in RANKS else "__init__"


def imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import in ``source``, a module of ``package``: also those inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def violations(root: Path) -> list[str]:
    """What is wrong in the package at ``root``, one line for each import or part."""
    found = []
    parts = set()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        part = relative.parts[0].removesuffix(".py")
        parts.add(part)
        if part not in RANKS:
            found.append(f"{relative}: {part} is not in the table")
            continue
        for line, name in imports(path.read_text(encoding="utf-8"), ".".join([PACKAGE, *relative.parts[:-1]])):
            if name.split(".")[0] != PACKAGE:
                continue
            target = part_of(name)
            if target != part and RANKS[target] >= RANKS[part]:
                found.append(f"{relative}:{line}: {part} must not import {target}")
    found.extend(f"{part} is in the table and not in the package" for part in RANKS if part not in parts)
    return found


def test_package_imports_one_way() -> None:
    found = violations(Path(__file__).parents[1] / PACKAGE)
    assert not found, "\n".join(found)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A well-directed package with every part of the table, ``backends`` being a folder."""
    for part in RANKS:
        tmp_path.joinpath(f"{part}.py").write_text("import torch\n")
    tmp_path.joinpath("backends.py").unlink()
    tmp_path.joinpath("backends").mkdir()
    for name in ("__init__", "cpu", "registry"):
        tmp_path.joinpath("backends", f"{name}.py").write_text("import torch\n")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("blocks.py", f"from {PACKAGE}.spec import InceptionSpec"),
        ("blocks.py", "from .spec import InceptionSpec"),
        ("backends/cpu.py", "from . import registry"),
        ("backends/cpu.py", "from ..packing import fold"),
        ("backends/cpu.py", f"from {PACKAGE}.backends import registry"),
        ("info.py", f"from {PACKAGE} import __version__"),
        ("cli.py", f"import {PACKAGE}"),
        ("spec.py", "import googlenet_fused_elsewhere"),
    ],
)
def test_downward_imports_pass(package: Path, path: str, source: str) -> None:
    package.joinpath(path).write_text(source)
    assert violations(package) == []


@pytest.mark.parametrize(
    ("path", "source", "violation"),
    [
        ("spec.py", f"from {PACKAGE}.blocks import Inception", "spec.py:1: spec must not import blocks"),
        ("spec.py", f"import {PACKAGE}.blocks as blocks", "spec.py:1: spec must not import blocks"),
        ("spec.py", f"from {PACKAGE} import blocks", "spec.py:1: spec must not import blocks"),
        ("spec.py", "def lazy():\n    from .backends.cpu import run", "spec.py:2: spec must not import backends"),
        ("backends/cpu.py", "import torch\nfrom .. import ops", "backends/cpu.py:2: backends must not import ops"),
        ("backends/cpu.py", f"from {PACKAGE}.ops import x", "backends/cpu.py:1: backends must not import ops"),
        ("tolerance.py", f"from {PACKAGE}.packing import fold", "tolerance.py:1: tolerance must not import packing"),
        ("modules.py", f"from {PACKAGE} import __version__", "modules.py:1: modules must not import __init__"),
        ("__init__.py", "from .cli import main", "__init__.py:1: __init__ must not import cli"),
        ("stray.py", "import torch", "stray.py: stray is not in the table"),
    ],
)
def test_a_violation_is_found(package: Path, path: str, source: str, violation: str) -> None:
    package.joinpath(path).write_text(source)
    assert violations(package) == [violation]


def test_a_missing_part_is_found(package: Path) -> None:
    package.joinpath("charts.py").unlink()
    assert violations(package) == ["charts is in the table and not in the package"]

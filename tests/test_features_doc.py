"""The snippets of docs/features.md run, print what they say and give the shapes they say."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

DOC = Path(__file__).parents[1] / "docs" / "features.md"


def test_snippets() -> None:
    """A comment on a line of its own is what the line above printed; ``name = ...  # [2, 3]`` gives a tensor's shape."""
    pytest.importorskip("torchvision")
    names: dict[str, Any] = {}
    lines = shapes = 0
    for snippet in re.findall(r"^```python\n(.*?)^```$", DOC.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(snippet, str(DOC), "exec"), names)
        said = re.findall(r"^# (.*)$", snippet, re.MULTILINE)
        assert printed.getvalue().splitlines() == said, snippet
        lines += len(said)
        for name, shape in re.findall(r"^ *(\w+) = .*  # (\[[\d, ]+\])$", snippet, re.MULTILINE):
            assert str(list(names[name].shape)) == shape, name
            shapes += 1
    assert (lines, shapes) == (7, 3)

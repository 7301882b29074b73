"""Coverage-guided fuzzing of the ``.caffemodel`` reader: ``python tests/fuzz/caffemodel.py [libFuzzer's options] [CORPUS]``.

What is taken must be what Google's protobuf reads, where that is installed; what is not must be a ``WeightsError``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch  # noqa: E402, F401 -- before the instrumentation, which is for the reader alone

READER = ["googlenet_fused.weights.wire", "googlenet_fused.weights.caffe", "googlenet_fused.weights.caffe_names"]

with atheris.instrument_imports(include=READER):
    from test_caffe_fuzz import parse

if __name__ == "__main__":
    limits = ["-max_len=2000", "-timeout=5", "-rss_limit_mb=3000", "-malloc_limit_mb=200"]
    atheris.Setup([*sys.argv, *limits], lambda content: parse(content) and None)
    atheris.Fuzz()

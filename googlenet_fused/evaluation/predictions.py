"""What was predicted of each image, as CSV or Parquet."""

from __future__ import annotations

import codecs
import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from googlenet_fused.data import LabelledImages
from googlenet_fused.evaluation.engine import TOP, Evaluation
from googlenet_fused.evaluation.errors import EvaluationError
from googlenet_fused.evaluation.labels import Labels
from googlenet_fused.whole_files import whole_file

SUFFIXES = (".csv", ".parquet")
_CHUNK = 8192
"""Rows that are turned into columns at a time."""

COLUMNS: tuple[tuple[str, type], ...] = (
    ("image", str),
    ("crops", int),
    ("label", int),
    ("label_name", str),
    *((f"top{place}", int) for place in range(1, TOP + 1)),
    *((f"top{place}_name", str) for place in range(1, TOP + 1)),
    *((f"probability{place}", float) for place in range(1, TOP + 1)),
    ("rank", int),
)
"""Classes are the classifier's; a classifier of fewer classes leaves the last places empty. ``rank`` is the image's class's."""


def check_predictions_path(path: str | os.PathLike[str]) -> None:
    """Refuses a file that ``write_predictions`` could not write, before there is anything to write.

    Raises:
        EvaluationError: the suffix is none of ``SUFFIXES``, or the folder is missing or closed to this user.
        ImportError: the file is ``.parquet`` and pyarrow is missing.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        raise EvaluationError(f"{path}: predictions are written to {' or '.join(SUFFIXES)} files; name one")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise EvaluationError(f"{path} cannot be written: name a file in a folder that is there and may be written to")
    if path.suffix.lower() == ".parquet":
        _parquet()


def write_predictions(
    path: str | os.PathLike[str], evaluations: Sequence[Evaluation], images: LabelledImages, labels: Labels
) -> Path:
    """Writes the ensemble's predictions, a row for each image and protocol, whole or not at all: ``COLUMNS``.

    In CSV probabilities have as many digits as fp64 needs.

    Raises:
        EvaluationError: the suffix is none of ``SUFFIXES``, or the file cannot be written.
        ImportError: the file is ``.parquet`` and pyarrow is missing.
    """
    path = Path(path).expanduser()
    check_predictions_path(path)
    rows = _rows(evaluations, images, labels)
    try:
        with whole_file(path) as file:
            if path.suffix.lower() == ".parquet":
                _write_parquet(file, rows)
                return path
            writer = csv.writer(codecs.getwriter("utf-8")(file, "backslashreplace"), lineterminator="\n")
            writer.writerow([name for name, _ in COLUMNS])
            writer.writerows(rows)
    except OSError as error:
        raise EvaluationError(f"cannot write {path}: {error.strerror or error}; name another file") from error
    return path


def _rows(evaluations: Sequence[Evaluation], images: LabelledImages, labels: Labels) -> Iterator[list[Any]]:
    for evaluation in evaluations:
        for prediction in evaluation.predictions:
            empty = [None] * (TOP - len(prediction.top))
            yield [
                images.name(prediction.index),
                int(evaluation.crops),
                prediction.label,
                labels.names[prediction.label],
                *prediction.top,
                *empty,
                *(labels.names[index] for index in prediction.top),
                *empty,
                *prediction.probabilities,
                *empty,
                prediction.rank,
            ]


def _parquet() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ImportError(
            "writing .parquet files needs pyarrow: pip install 'googlenet-fused[parquet]', or name a .csv file"
        ) from error
    return pyarrow


def _write_parquet(file: Any, rows: Iterator[list[Any]]) -> None:
    pyarrow = _parquet()
    kinds = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
    schema = pyarrow.schema([(name, kinds[kind]) for name, kind in COLUMNS])

    def encodable(value: Any) -> Any:
        return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value

    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        while chunk := [[encodable(value) for value in row] for _, row in zip(range(_CHUNK), rows, strict=False)]:
            columns = [pyarrow.array(column, kind.type) for column, kind in zip(zip(*chunk, strict=True), schema, strict=True)]
            writer.write_table(pyarrow.table(columns, schema=schema))

"""The evaluation on tiny networks: scores against a plain loop, the same bytes however the work is divided, and refusals."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("torchvision")
pytest.importorskip("skimage")

from evaluation_cases import Pictures, Tiny, member
from torch import nn

from googlenet_fused.crops import Protocol, views
from googlenet_fused.distributed import Processes
from googlenet_fused.evaluation import (
    Evaluation,
    EvaluationError,
    Labels,
    Member,
    Score,
    check_predictions_path,
    evaluate,
    write_predictions,
)
from googlenet_fused.preparation import PREPARATIONS

LABELS = Labels((6, 2, 0, 5), tuple(f"class {index}" for index in range(7)))
"""Not in order, and fewer than the classifier's."""


class Saying(nn.Module):
    """The same logits for every image."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(x), -1)


def saying(*logits: float) -> Member:
    return Member("saying", Saying(*logits), PREPARATIONS["slim"], len(logits), crop=4, resize=4)


def plainly(members: Sequence[Member], images: Pictures, crops: Protocol, index: int) -> torch.Tensor:
    """Probabilities of one image by the definition, ``[networks, classes]``."""
    answers = []
    for each in members:
        shown = views(images.load(index), crops, each.crop, each.resize)
        total = torch.zeros(7, dtype=torch.float64)
        for view in shown:
            total += (
                each.network(each.preparation(view).double().unsqueeze(0))[0].exp()
                / each.network(each.preparation(view).double().unsqueeze(0))[0].exp().sum()
            )
        answers.append(total / len(shown))
    return torch.stack(answers)


def rank_plainly(probabilities: torch.Tensor, label: int) -> int:
    order = sorted(range(len(probabilities)), key=lambda index: (-probabilities[index].item(), index))
    return 1 + order.index(label)


@pytest.mark.parametrize("crops", ["1", "10", "144"])
@torch.no_grad()
def test_scores_and_predictions_are_those_of_a_plain_loop(crops: Protocol) -> None:
    images = Pictures(5 if crops == "144" else 11)
    members = [member(1), member(2), member(3, crop=24)]
    result = evaluate(members, images, LABELS, crops)
    assert [each.index for each in result.predictions] == list(range(len(images)))
    for each in result.predictions:
        answers = plainly(members, images, crops, each.index)
        ensemble = answers.mean(0)
        assert each.label == LABELS.index[images.label(each.index)]
        assert each.rank == rank_plainly(ensemble, each.label)
        assert each.member_ranks == tuple(rank_plainly(answer, each.label) for answer in answers)
        assert list(each.top) == sorted(range(7), key=lambda index: -ensemble[index].item())[:5]
        torch.testing.assert_close(each.probabilities, tuple(ensemble[list(each.top)].tolist()), rtol=1e-12, atol=0)
    ranks = [each.rank for each in result.predictions]
    assert result.ensemble == Score(len(images), ranks.count(1), sum(rank <= 5 for rank in ranks))
    assert result.members[2].top1 == sum(each.member_ranks[2] == 1 for each in result.predictions)
    assert len({each.top for each in result.predictions}) > 1


def test_errors_are_in_percent_of_the_images_read() -> None:
    score = Score(8, 6, 7)
    assert (score.top1_error, score.top5_error) == (25.0, 12.5)
    assert evaluate([saying(0, 3, 2)], Pictures(4), Labels((1, 0, 2), ("a", "b", "c"))).ensemble == Score(4, 4, 4)


def test_of_equal_classes_the_lower_index_comes_first() -> None:
    images = Pictures(16)
    result = evaluate([saying(1, 2, 2, 1, 1, 2, 1)], images, LABELS)
    assert {each.top for each in result.predictions} == {(1, 2, 5, 0, 3)}
    assert {each.label: each.rank for each in result.predictions} == {6: 7, 2: 2, 0: 4, 5: 3}


def test_averages_are_of_probabilities_in_fp64() -> None:
    # In the mean of logits class 0 would win, and in fp32 the two would be equal.
    confident, other = saying(50.0, 0.0), saying(0.0, 1e-6)
    result = evaluate([confident, other], Pictures(1), Labels((1, 0, 0, 0), ("a", "b")))
    p = torch.tensor([[50.0, 0.0], [0.0, 1e-6]]).double().softmax(1).mean(0)
    assert result.predictions[0].probabilities == tuple(p.tolist())


def written(path: Path, members: Sequence[Member], images: Pictures, **options: object) -> bytes:
    results = [evaluate(members, images, LABELS, crops, max_corrupt=2, **options) for crops in ("1", "10", "144")]
    write_predictions(path, results, images, LABELS)
    return path.read_bytes()


def test_bytes_are_the_same_for_every_batch_size_and_number_of_workers(tmp_path: Path) -> None:
    """The network is fussy: any other shape of a call, or place in it, would show."""
    images = Pictures(11, damaged=[3, 9])
    members = [member(1, dtype=torch.float32, fussy=1e-3), member(2, dtype=torch.float32, crop=12, fussy=1e-3)]
    expected = written(tmp_path / "a.csv", members, images)
    assert len(expected.splitlines()) == 1 + 3 * 9
    for batch_size, workers in ((1, 0), (3, 0), (8, 0), (3, 2)):
        assert written(tmp_path / "b.csv", members, images, batch_size=batch_size, workers=workers) == expected
    assert written(tmp_path / "b.csv", members, images, views_a_call=7) != expected


@pytest.mark.parametrize(
    ("crops", "views_a_call", "rows"), [("1", 12, 12), ("10", 12, 10), ("10", 25, 20), ("144", 12, 12), ("144", 100, 100)]
)
def test_calls_have_one_shape(crops: Protocol, views_a_call: int, rows: int) -> None:
    tiny = member()
    evaluate([tiny], Pictures(3), LABELS, crops, views_a_call=views_a_call)
    assert isinstance(tiny.network, Tiny)
    assert set(tiny.network.shapes) == {(rows, 3, 16, 16)}


class Apart(Processes):
    """One of several processes, which gathers what the others have found before."""

    def __init__(self, rank: int, world: int, found: list[object]) -> None:
        super().__init__(rank, world)
        object.__setattr__(self, "found", found)

    def gather_objects(self, value: object) -> list[object]:
        self.found.append(value)
        return self.found


def test_processes_share_the_images_and_find_the_same(tmp_path: Path) -> None:
    images, members = Pictures(31, damaged=[13]), [member(1, dtype=torch.float32, fussy=1e-3)]
    expected = evaluate(members, images, LABELS, max_corrupt=1)
    found: list[object] = []
    for rank in (2, 0, 1):
        result = evaluate(members, images, LABELS, max_corrupt=1, processes=Apart(rank, 3, found))
    assert result.predictions == expected.predictions
    assert result.corrupt == expected.corrupt


def test_corrupt_images_are_left_out_up_to_a_limit() -> None:
    images = Pictures(8, damaged=[2, 5])
    result = evaluate([member()], images, LABELS, max_corrupt=2)
    reason = "cannot be decoded: it is damaged"
    assert [tuple(each) for each in result.corrupt] == [
        (images.name(index), f"{images.name(index)} {reason}") for index in (2, 5)
    ]
    assert result.ensemble.images == 6
    with pytest.raises(EvaluationError, match=r"2 images cannot be read, where at most 1 .*\(max_corrupt\).*chelsea/5.png"):
        evaluate([member()], images, LABELS, max_corrupt=1)
    with pytest.raises(EvaluationError, match="1 image cannot be read, where at most 0"):
        evaluate([member()], Pictures(8, damaged=[2]), LABELS)
    with pytest.raises(EvaluationError, match=r"none of the 2 images can be had: astronaut/0\.png"):
        evaluate([member()], Pictures(2, damaged=[0, 1]), LABELS, max_corrupt=2)


def test_the_limit_of_corrupt_images_is_that_of_all_processes() -> None:
    found: list[object] = []
    images = Pictures(24, damaged=[2, 14])
    evaluate([member()], images, LABELS, max_corrupt=1, processes=Apart(0, 2, found))
    with pytest.raises(EvaluationError, match="2 images cannot be read, where at most 1"):
        evaluate([member()], images, LABELS, max_corrupt=1, processes=Apart(1, 2, found))
    assert len(found) == 2


def test_progress_counts_images() -> None:
    told: list[tuple[int, int]] = []
    evaluate([member()], Pictures(9), LABELS, views_a_call=4, progress=lambda *done: told.append(done))
    assert told == [(4, 9), (8, 9), (9, 9)]


def test_networks_that_give_no_numbers_are_refused() -> None:
    with pytest.raises(EvaluationError, match="network saying gives NaN or infinite values for image 0: check its weights"):
        evaluate([saying(0, float("nan"))], Pictures(2), Labels((0, 1, 1, 1), ("a", "b")))
    broken = Member("broken", Tiny(classes=6), PREPARATIONS["slim"], 7, crop=16, resize=16)
    with pytest.raises(EvaluationError, match=r"broken must give logits \[12, 7\], and gives \[12, 6\]"):
        evaluate([broken], Pictures(2), LABELS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crops": "5"}, "crops must be '1', '10', '144', got '5'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"max_corrupt": -1}, "max_corrupt must be at least 0, got -1"),
        ({"views_a_call": 0}, "views_a_call must be at least 1, got 0"),
    ],
)
def test_arguments_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate([member()], Pictures(1), LABELS, **options)


def test_nothing_to_evaluate() -> None:
    with pytest.raises(EvaluationError, match="there is no image"):
        evaluate([member()], Pictures(0), LABELS)
    with pytest.raises(ValueError, match="members must hold at least one"):
        evaluate([], Pictures(1), LABELS)


@pytest.fixture(scope="module")
def few() -> tuple[Pictures, list[Evaluation]]:
    """A classifier of three classes, by two protocols."""
    images = Pictures(6)
    labels = Labels((1, 0, 2, 2), ('é, "x"', "line\nbreak", "=1+1"))
    return images, [evaluate([saying(0.1, 0.3, 0.2)], images, labels, crops) for crops in ("1", "10")]


FEW = Labels((1, 0, 2, 2), ('é, "x"', "line\nbreak", "=1+1"))


def test_csv_holds_every_prediction(tmp_path: Path, few: tuple[Pictures, list[Evaluation]]) -> None:
    images, results = few
    write_predictions(tmp_path / "p.csv", results, images, FEW)
    with open(tmp_path / "p.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert [row["crops"] for row in rows] == ["1"] * 6 + ["10"] * 6
    row, prediction = rows[5], results[0].predictions[5]
    assert (row["image"], row["label"], row["label_name"], row["rank"]) == ("chelsea/5.png", "0", 'é, "x"', "3")
    assert [row[f"top{place}"] for place in range(1, 6)] == ["1", "2", "0", "", ""]
    assert [row[f"top{place}_name"] for place in range(1, 6)] == ["line\nbreak", "=1+1", 'é, "x"', "", ""]
    assert [float(row[f"probability{place}"]) for place in (1, 2, 3)] == list(prediction.probabilities)


def test_parquet_holds_the_same_as_csv(tmp_path: Path, few: tuple[Pictures, list[Evaluation]]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    images, results = few
    write_predictions(tmp_path / "p.csv", results, images, FEW)
    write_predictions(tmp_path / "p.parquet", results, images, FEW)
    table = parquet.read_table(tmp_path / "p.parquet").to_pylist()
    with open(tmp_path / "p.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [{name: "" if value is None else str(value) for name, value in row.items()} for row in table] == rows
    assert {type(table[0][name]) for name in ("label", "top1", "rank", "crops")} == {int}
    assert isinstance(table[0]["probability1"], float)


def test_predictions_are_written_whole_or_not_at_all(tmp_path: Path, few: tuple[Pictures, list[Evaluation]]) -> None:
    images, results = few
    path = tmp_path / "p.csv"
    path.write_text("before")
    with pytest.raises(IndexError):
        write_predictions(path, results, images, Labels(FEW.index, FEW.names[:1]))
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_predictions_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, message in (
        ("p.txt", r"predictions are written to \.csv or \.parquet files"),
        ("missing/p.csv", "cannot be written: name a file in a folder that is there"),
    ):
        with pytest.raises(EvaluationError, match=message):
            check_predictions_path(tmp_path / name)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"needs pyarrow: pip install 'googlenet-fused\[parquet\]', or name a \.csv file"):
        check_predictions_path(tmp_path / "p.parquet")


def test_names_that_are_no_unicode_are_written(tmp_path: Path, few: tuple[Pictures, list[Evaluation]]) -> None:
    images = Pictures(6, classes=("a\udcff", "b", "c", "d"))
    write_predictions(tmp_path / "p.csv", few[1], images, FEW)
    assert b"a\\udcff/0.png" in (tmp_path / "p.csv").read_bytes()

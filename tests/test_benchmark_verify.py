"""The record of which backends' tests passed on which GPU: made of a JUnit report, and taken into the package."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import test_gpu
import torch
from cases import message_of

from benchmarks import results, verify
from googlenet_fused.backends import registry, trust
from googlenet_fused.backends.reference import ReferenceBackend
from googlenet_fused.backends.trust import Identity

HERE = Identity("NVIDIA Test", "sm_90", "580.1", "2.11.0", "3.6.0", "0123456789abcdef")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TESTS = {"float16": 2, "float32": 1, "tf32": 2}
PASSED = [
    "test_layouts[cuda-fast-float16-contiguous]",
    "test_layouts[cuda-fast-float16-channels_last]",
    "test_networks_agree[cuda-fast-float32-bvlc]",
    "test_layouts[cuda-auto-float16-contiguous]",
    "test_layouts[cuda-reference-float16-contiguous]",
    "test_layouts[cpu-fast-float16-contiguous]",
    "test_layouts[cuda-faster-float16-contiguous]",
    "test_network_in_tf32[cuda-fast-tf32]",
    "test_modules_agree_in_tf32[cuda-fast-tf32-4a]",
    "test_of_no_arithmetic[cuda-fast-empty]",
]


def junit(*names: str, **outcomes: str) -> str:
    """A report of tests that passed, and of those of ``outcomes``: the name of the element by that of the test."""
    cases = "".join(f'<testcase classname="tests.test_gpu" name="{name}" time="0.1"/>' for name in names)
    cases += "".join(
        f'<testcase classname="tests.test_gpu" name="test_x[cuda-fast-{name}]"><{outcome} message="m"/></testcase>'
        for name, outcome in outcomes.items()
    )
    return f'<?xml version="1.0" encoding="utf-8"?><testsuites><testsuite name="pytest">{cases}</testsuite></testsuites>'


class Fast(ReferenceBackend):
    name = "fast"
    needs_verification = True


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU with a backend ``fast`` that needs verification, a clean checkout, and a record of its own."""
    monkeypatch.setattr(registry, "_backends", {"reference": ReferenceBackend(), "fast": Fast()})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(trust, "identity", lambda backend, index: HERE)
    monkeypatch.setattr(results, "git_state", lambda folder: {"commit": COMMIT, "dirty": False})
    monkeypatch.setattr(trust, "VERIFIED", tmp_path / "record/verified.json")
    (tmp_path / "record").mkdir()
    trust.VERIFIED.write_text("[]\n")
    trust._verified.cache_clear()
    yield
    trust._verified.cache_clear()


@pytest.fixture
def report(tmp_path: Path) -> Callable[..., str]:
    """Writes a report and returns its path."""

    def write(text: str) -> str:
        (tmp_path / "tests.xml").write_text(text)
        return str(tmp_path / "tests.xml")

    return write


def test_passed_tests_are_counted_by_backend() -> None:
    text = junit(*PASSED, skips="skipped")
    one = {"float16": 1}
    found = verify.passed(text, ["fast", "auto", "reference", "cuda"])
    assert found == {"fast": TESTS, "auto": one, "reference": one, "cuda": {}}
    assert verify.passed(junit("test_layouts[cuda-cuda-float16]"), ["fast", "cuda"]) == {"fast": {}, "cuda": one}


def test_every_arithmetic_is_told_from_the_others() -> None:
    for name in trust.ARITHMETICS:
        assert verify.passed(junit(f"test[cuda-fast-{name}-4a]"), ["fast"]) == {"fast": {name: 1}}
    assert verify.passed(junit("test[cuda-fast-float64-4a]", "test[cuda-fast-float16x]"), ["fast"]) == {"fast": {}}


@pytest.mark.parametrize(
    ("test", "arithmetics"),
    [("test_modules_agree", {"float16", "bfloat16", "float32"}), ("test_network_in_tf32", {"tf32"})],
)
def test_ids_of_the_projects_own_tests(test: str, arithmetics: set[str]) -> None:
    """Those that a machine without a GPU skips have their ids there, too."""
    marks = [mark for mark in getattr(test_gpu, test).pytestmark if mark.name == "parametrize" and "backend" in mark.args[0]]
    names = [f"{test}[{parameters.id}]" for mark in marks for parameters in mark.args[1]]
    assert arithmetics <= set(verify.passed(junit(*names), ["auto"])["auto"])


@pytest.mark.parametrize("outcome", ["failure", "error"])
def test_a_test_that_failed_spoils_it(outcome: str) -> None:
    with pytest.raises(ValueError, match=r"1 of 11 tests failed, the first test_x\[cuda-fast-bad\]") as error:
        verify.passed(junit(*PASSED, bad=outcome), ["reference"])
    message_of(error)


def test_entries_are_printed(report: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([report(junit(*PASSED))]) == 0
    printed = capsys.readouterr()
    (entry,) = json.loads(printed.out)
    assert entry.pop("date").startswith("20")
    assert entry == {**asdict(HERE), "backend": "fast", "commit": COMMIT, "tests": TESTS}
    assert printed.err == ""
    assert trust.VERIFIED.read_text() == "[]\n", "it only prints"


def test_a_commit_that_is_named_counts(
    report: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "git_state", lambda folder: pytest.fail("git was asked"))
    assert verify.main([report(junit(*PASSED)), "--commit", "abc123"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["commit"] == "abc123"


@pytest.mark.parametrize(
    ("text", "git", "arguments", "message"),
    [
        (junit(*PASSED, bad="failure"), {"commit": COMMIT, "dirty": False}, [], "1 of 11 tests failed, the first test_x["),
        (junit(*PASSED[3:7]), {"commit": COMMIT, "dirty": False}, [], "no test of a backend that needs verification passed"),
        (junit(skips="skipped"), {"commit": COMMIT, "dirty": False}, [], "needs verification passed here (fast)"),
        (junit(), {"commit": COMMIT, "dirty": False}, [], "no test of a backend that needs verification passed here"),
        (junit(*PASSED), {"commit": COMMIT, "dirty": True}, [], f"files differ from commit {COMMIT[:9]}: commit them"),
        (junit(*PASSED), None, [], "there is no git to say which commit was tested: name it with --commit"),
        (junit(*PASSED), None, ["--commit", "main"], "--commit must be a hash, 4 to 40 hexadecimal digits, got 'main'"),
        (junit(*PASSED), None, ["--commit", "beefy"], "--commit must be a hash, 4 to 40 hexadecimal digits, got 'beefy'"),
        ("<a>", {"commit": COMMIT, "dirty": False}, [], "the report is not XML"),
    ],
)
def test_nothing_is_recorded(
    text: str,
    git: dict[str, Any] | None,
    arguments: list[str],
    message: str,
    report: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(results, "git_state", lambda folder: git)
    assert verify.main([report(text), *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_report_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(tmp_path / "tests.xml")]) == 1
    assert "tests.xml" in capsys.readouterr().err


def test_the_checkout_asked_is_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(results, "git_state", lambda folder: asked.append(folder) or {"commit": COMMIT, "dirty": False})
    verify.entries(junit(*PASSED), None)
    assert asked == [Path(verify.__file__).parent]


# Taking entries in.


def entry(**changes: Any) -> dict[str, Any]:
    return {**asdict(HERE), "backend": "fast", "commit": COMMIT, "date": "2026-01-02", "tests": TESTS, **changes}


def add(tmp_path: Path, *entries: Any) -> int:
    (tmp_path / "new.json").write_text(json.dumps(entries))
    return verify.main(["--add", str(tmp_path / "new.json")])


def record() -> list[dict[str, Any]]:
    return json.loads(trust.VERIFIED.read_text())


def test_entries_are_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert add(tmp_path, entry()) == 0
    assert capsys.readouterr().out == (
        f"fast on NVIDIA Test: 2 tests in float16, 1 tests in float32, 2 tests in tf32, commit {COMMIT[:9]}\n"
    )
    assert record() == [entry()]
    assert trust.VERIFIED.read_text().endswith("]\n")
    assert [found.gpu for found in trust.verifications("fast")] == ["NVIDIA Test"]


def test_entries_of_the_same_backend_gpu_and_versions_are_replaced(tmp_path: Path) -> None:
    others = [entry(backend="slow"), entry(gpu="NVIDIA Other"), entry(torch="2.12.0"), entry(triton=None)]
    assert add(tmp_path, entry(), *others) == 0
    newer = entry(commit="abc123", fingerprint="f" * 16, driver="590.0", tests={"tf32": 7})
    assert add(tmp_path, newer) == 0
    assert len(record()) == 5
    assert [found for found in record() if found not in others] == [newer]


def test_the_order_is_not_that_of_adding(tmp_path: Path) -> None:
    some = [entry(), entry(gpu="NVIDIA Other"), entry(triton=None), entry(backend="alpha")]
    add(tmp_path, *some)
    first = trust.VERIFIED.read_text()
    trust.VERIFIED.write_text("[]")
    add(tmp_path, *reversed(some))
    assert trust.VERIFIED.read_text() == first


def test_a_damaged_file_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = trust.VERIFIED.read_text()
    assert add(tmp_path, entry(), entry(gpu=None)) == 1
    assert f"{tmp_path / 'new.json'}: entry 1 has None for gpu" in capsys.readouterr().err
    assert trust.VERIFIED.read_text() == before


def test_a_damaged_record_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trust.VERIFIED.write_text("{}")
    assert add(tmp_path, entry()) == 1
    assert f"{trust.VERIFIED} must hold a list" in capsys.readouterr().err
    assert trust.VERIFIED.read_text() == "{}"


@pytest.mark.parametrize("arguments", [[], ["tests.xml", "--add", "new.json"]])
def test_one_thing_at_a_time(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        verify.main(arguments)

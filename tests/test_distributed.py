"""The processes of a run: what the environment says, and two processes that evaluate as one does."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from googlenet_fused import distributed
from googlenet_fused.distributed import Processes, ProcessesError, processes

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_without_torchrun_a_process_is_alone() -> None:
    with processes("cpu") as own:
        assert own == Processes(0, 1, 0, torch.device("cpu"))
        assert own.first
        assert own.gather_objects("x") == ["x"]
        assert not torch.distributed.is_initialized()


def test_work_is_shared_out_whole() -> None:
    shares = [list(Processes(rank, 3).share(8)) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert [Processes(rank, 2).first for rank in (0, 1)] == [True, False]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE is set and RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not: start .* with torchrun",
        ),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "must be whole numbers: .*'x'"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, r"RANK must be in 0\.\.WORLD_SIZE-1, got RANK=2, WORLD_SIZE=2"),
    ],
)
def test_environments_that_make_no_sense(environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if len(environment) > 1:
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ProcessesError, match=message), processes("cpu"):
        pass


def test_a_script_that_its_workers_run_anew_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(ProcessesError, match='under if __name__ == "__main__"'), processes("cpu"):
        pass


def test_a_process_takes_the_device_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert distributed._device(None, 1) == torch.device("cuda", 1)
    assert distributed._device("cuda", 0) == torch.device("cuda", 0)
    assert distributed._device("cpu", 1) == torch.device("cpu")
    assert taken == [1, 0]
    with pytest.raises(ProcessesError, match="no CUDA device for the process with LOCAL_RANK=2: torch sees 2"):
        distributed._device(None, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed._device(None, 0) == torch.device("cpu")
    with pytest.raises(ProcessesError, match="torch sees no CUDA device"):
        distributed._device("cuda", 0)
    with pytest.raises(ValueError, match="device must be 'cpu', 'cuda' or None, got 'tpu'"):
        distributed._device("tpu", 0)


def test_a_process_group_that_exists_is_left_as_it_is(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        with processes("cpu") as own:
            assert (own.rank, own.world) == (0, 1)
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()


def test_others_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(VARIABLES, ("1", "2", "1", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(ProcessesError, match="process 1 of 2 cannot reach the others: "),
        processes("cpu", timedelta(seconds=1)),
    ):
        pass


def test_another_process_that_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(torch.distributed, "all_gather_object", closed)
    with pytest.raises(ProcessesError, match="process 1 waits in vain for another, whose own error says why"):
        Processes(1, 2).gather_objects(None)


@pytest.mark.parametrize(("rank", "order"), [(0, ["block", "gather"]), (1, ["gather", "block"])])
def test_the_first_goes_ahead(rank: int, order: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda *_: done.append("gather"))
    with Processes(rank, 2).first_ahead():
        done.append("block")
    assert done == order


PROGRAM = """
import multiprocessing
import os
import sys
import torch
from evaluation_cases import Pictures, member
from googlenet_fused.distributed import processes
from googlenet_fused.evaluation import EvaluationError, Labels, evaluate, write_predictions

class Read(Pictures):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.reader = os.getpid()

    def load(self, index):
        assert os.getpid() == self.reader or not torch.distributed.is_initialized(), "forked beside threads of gloo"
        return super().load(index)

def main():
    images, labels = Read(40, damaged=[7, 20]), Labels((6, 2, 0, 5), tuple(f"class {index}" for index in range(7)))
    members = [member(seed, dtype=torch.float32, fussy=1e-3) for seed in (1, 2)]
    with processes("cpu") as own:
        options = {"processes": own, "batch_size": 3, "workers": own.world - 1}
        results = [evaluate(members, images, labels, crops, max_corrupt=2, **options) for crops in ("1", "10")]
        assert own.gather_objects(own.rank) == list(range(own.world))
        # Each of two processes meets one damaged image, which is not too many; together they are.
        try:
            evaluate(members, images, labels, max_corrupt=1, **options)
        except EvaluationError as error:
            assert "2 images cannot be read" in str(error)
        else:
            raise AssertionError("no error")
        if own.first:
            print("first")
            write_predictions(sys.argv[1], results, images, labels)
    assert not torch.distributed.is_initialized()

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    for module in ("PIL", "torchvision", "skimage"):
        pytest.importorskip(module)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, before in (("1.csv", []), ("2.csv", torchrun)):
        command = [sys.executable, *before, str(program), str(tmp_path / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "first\n"
    one, two = ((tmp_path / name).read_bytes() for name in ("1.csv", "2.csv"))
    assert one == two
    assert len(one.splitlines()) == 1 + 2 * 38

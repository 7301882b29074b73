"""The processes of one run, as torchrun starts them: which one this is, its device, and what all of them gather."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import distributed

T = TypeVar("T")

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class ProcessesError(RuntimeError):
    """The processes cannot work together as they were started; the message is one line."""


@dataclass(frozen=True)
class Processes:
    """This process among those of its run; by default it is alone.

    Attributes:
        rank: its number, from 0.
        world: how many there are.
        local_rank: its number among those on the same machine.
        device: where it computes.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether it is the one that speaks for all."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of ``count`` pieces of work are this process's: every ``world``-th."""
        return range(self.rank, count, self.world)

    @contextmanager
    def first_ahead(self) -> Iterator[None]:
        """The others enter the block once the first has left it, and find what it downloaded there."""
        if not self.first:
            self.gather_objects(None)
        yield
        if self.first:
            self.gather_objects(None)

    def gather_objects(self, value: T) -> list[T]:
        """Every process's value by rank, in every process. All of them must call it; the values are pickled.

        Raises:
            ProcessesError: another process has gone, or does not come.
        """
        if self.world == 1:
            return [value]
        gathered: list[T | None] = [None] * self.world
        try:
            distributed.all_gather_object(gathered, value)
        except RuntimeError as error:
            raise ProcessesError(f"process {self.rank} waits in vain for another, whose own error says why") from error
        return cast(list[T], gathered)


@contextmanager
def processes(device: str | None = None, timeout: timedelta | None = None) -> Iterator[Processes]:
    """Joins the processes that torchrun started, for the time of the block; without torchrun there is one.

    They talk through gloo, and where they compute on CUDA devices through NCCL as well. Each takes the CUDA device with its
    local rank. A process group that exists already is used and left as it is.

    Args:
        device: ``"cpu"`` or ``"cuda"``; None takes CUDA where there is a device.
        timeout: how long a process waits for the others before it gives up; None takes torch's own.

    Raises:
        ProcessesError: torchrun's environment variables are incomplete or make no sense, the others cannot be reached, there is
            no CUDA device for this process, or it is a worker that was spawned by a script without its ``__main__`` guarded.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # else it would wait for the others as one of them
        raise ProcessesError('workers run the script anew: put what it does under if __name__ == "__main__":')
    rank, world, local_rank = _from_environment(os.environ)
    place = _device(device, local_rank)
    if world == 1 and not distributed.is_initialized():
        yield Processes(device=place)
        return
    ours = not distributed.is_initialized()
    if ours:
        options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        try:
            distributed.init_process_group("gloo" if place.type == "cpu" else "cpu:gloo,cuda:nccl", **options)
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ProcessesError(f"process {rank} of {world} cannot reach the others: {reason}") from error
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size(), local_rank, place)
    finally:
        if ours and distributed.is_initialized():
            distributed.destroy_process_group()


def _from_environment(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """Rank, number of processes and local rank."""
    given = [name for name in _VARIABLES if environment.get(name)]
    if "WORLD_SIZE" not in given and "RANK" not in given:
        return 0, 1, 0
    if missing := [name for name in _VARIABLES if name not in given]:
        raise ProcessesError(f"{given[0]} is set and {', '.join(missing)} is not: start the processes with torchrun")
    try:
        rank, world, local_rank = (int(environment[name]) for name in _VARIABLES[:3])
    except ValueError as error:
        raise ProcessesError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {error}") from error
    if not 0 <= rank < world or local_rank < 0:
        raise ProcessesError(f"RANK must be in 0..WORLD_SIZE-1, got RANK={rank}, WORLD_SIZE={world}, LOCAL_RANK={local_rank}")
    return rank, world, local_rank


def _device(kind: str | None, local_rank: int) -> torch.device:
    if kind not in (None, "cpu", "cuda"):
        raise ValueError(f"device must be 'cpu', 'cuda' or None, got {kind!r}")
    count = torch.cuda.device_count() if kind != "cpu" and torch.cuda.is_available() else 0
    if kind == "cpu" or (kind is None and not count):
        return torch.device("cpu")
    if not count:
        raise ProcessesError("torch sees no CUDA device: choose the CPU, or see googlenet-fused doctor")
    if local_rank >= count:
        raise ProcessesError(f"there is no CUDA device for the process with LOCAL_RANK={local_rank}: torch sees {count}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)

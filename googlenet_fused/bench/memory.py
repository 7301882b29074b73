"""How much memory a provider takes: what it holds and what a call of it needs at its peak."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from pathlib import Path

import torch

from googlenet_fused.bench.timing import Call

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): resets the peak resident set size to the present one


class CpuMemory:
    """Anonymous memory of this process, in bytes, from Linux's accounting; ``None`` where there is no such thing.

    Allocators keep freed memory for later, so it is given back to the system before each reading, as far as glibc's allocator
    is concerned. Counts move by about a MiB.
    """

    def held(self) -> int | None:
        """In use now."""
        _trim()
        fields = _status()
        return fields.get("RssAnon")

    def peak(self, call: Call) -> int | None:
        """The most in use at any time of a call."""
        _trim()
        try:
            _CLEAR.write_text(_RESET_PEAK)
        except OSError:
            return None
        call()
        fields = _status()
        if not {"VmHWM", "RssFile", "RssShmem"} <= fields.keys():
            return None
        return fields["VmHWM"] - fields["RssFile"] - fields["RssShmem"]


class CudaMemory:
    """Memory of torch's CUDA allocator, in bytes. What other libraries allocate by themselves is not seen."""

    def held(self) -> int | None:
        """In use now."""
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def peak(self, call: Call) -> int | None:
        """The most in use at any time of a call."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


def _trim() -> None:
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _status() -> dict[str, int]:
    """The memory lines of ``/proc/self/status`` in bytes; empty elsewhere than on Linux."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines)
    return {words[0].removesuffix(":"): int(words[1]) * 1024 for words in fields if len(words) == 3 and words[2] == "kB"}

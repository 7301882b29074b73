"""CPU tensors in the part of a CUDA device's, so that what depends on streams and graphs is tried out without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor


@dataclass(eq=False)
class PretendedStream:
    """As ``torch.cuda.Stream``. Torch numbers its own streams, and takes an external one's handle for its number."""

    stream_id: int
    cuda_stream: int
    waits: int = 0
    recorded: list[int] = field(default_factory=list)  # ids of tensors

    def synchronize(self) -> None:
        self.waits += 1


class PretendedCuda:
    """Every tensor is on a CUDA device, whose current stream is ``stream``, which may be ``capturing``.

    A CPU tensor's device has the index None, and so has the current device, unless a test gives it another one.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.default, self.side, self.external = (
            PretendedStream(0, 0),
            PretendedStream(35, 0x7F00),
            PretendedStream(0x7FF0, 0x7FF0),
        )
        self.stream, self.capturing = self.default, False
        self.current: int | None = None
        self.entered: list[PretendedStream] = []
        monkeypatch.setattr(Tensor, "is_cuda", property(lambda _: True))
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: stream.recorded.append(id(tensor)))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "device", self._on)
        monkeypatch.setattr(torch.cuda, "stream", self._entering)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing and self.current is None)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: self.stream)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: self.stream.cuda_stream, raising=False)

    @contextmanager
    def _on(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        yield
        self.current = before

    @contextmanager
    def _entering(self, stream: PretendedStream) -> Iterator[None]:
        self.entered.append(stream)
        yield

"""Stand-ins for CUDA's streams and graphs on the CPU, for tests that run on a GPU where there is one."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor


class FakeStream:
    """Everything runs on the one that there is."""

    def __init__(self, device: torch.device | None = None) -> None:
        pass

    def wait_stream(self, stream: "FakeStream") -> None:
        assert isinstance(stream, FakeStream)


class FakeGraph:
    """Replayed by a call of what was captured, whose results go where the first ones lie."""

    def record(self, step: Callable[[], tuple[Tensor, ...]], results: tuple[Tensor, ...]) -> None:
        """What a real graph sees by itself."""
        self.step, self.results = step, results

    def replay(self) -> None:
        for result, again in zip(self.results, self.step(), strict=True):
            result.copy_(again)


def stand_in_for_streams_and_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let code that uses them run on the CPU."""
    stand_ins = {
        "Stream": FakeStream,
        "CUDAGraph": FakeGraph,
        "current_stream": FakeStream,
        "stream": lambda stream: nullcontext(),
        "graph": lambda graph: nullcontext(),
        "synchronize": lambda device=None: None,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)

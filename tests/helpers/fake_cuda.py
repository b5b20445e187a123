"""A stand-in for `torch.cuda` as `machine.clock` uses it: events on a clock that tests move, and an allocator."""

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace

import torch

CYCLES_A_MS = 1_000_000


class FakeCuda:
    """One GPU that is current, of index 1."""

    def __init__(self, step_ms: float = 0.0) -> None:
        self.now_ms, self.step_ms = 0.0, step_ms
        self.calls: list[str] = []
        self.allocated, self.peak, self.free, self.reserved = 1000, 0, 80 * 2**30, 0
        self.Event = lambda enable_timing: FakeEvent(self, enable_timing)

    def take(self, size: int) -> None:
        self.allocated += size
        self.peak = max(self.peak, self.allocated)

    def current_device(self) -> int:
        return 1

    def device(self, device: torch.device) -> AbstractContextManager[None]:
        assert device.index is not None
        return nullcontext()

    def _sleep(self, cycles: int) -> None:
        self.now_ms += cycles / CYCLES_A_MS
        self.calls.append(f"sleep {cycles / CYCLES_A_MS:g} ms")

    def current_stream(self, device: torch.device) -> str:
        return f"stream of {device}"

    def get_device_properties(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(L2_cache_size=50 * 2**20)

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        assert device.index is not None
        return self.free, 80 * 2**30

    def synchronize(self, device: torch.device) -> None:
        self.calls.append(f"synchronize {device}")

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.peak = self.allocated
        self.calls.append(f"reset {device}")

    def memory_reserved(self, device: torch.device) -> int:
        return self.reserved

    def memory_allocated(self, device: torch.device) -> int:
        self.calls.append(f"allocated {device}")
        return self.allocated

    def max_memory_allocated(self, device: torch.device) -> int:
        self.calls.append(f"peak {device}")
        return self.peak


class FakeEvent:
    """Like torch's: it has a time once it was recorded, and tells it once it was waited for."""

    def __init__(self, cuda: FakeCuda, enable_timing: bool) -> None:
        self.cuda, self.at, self.done = cuda, None, False

    def record(self, stream: str) -> None:
        self.at = self.cuda.now_ms
        self.cuda.now_ms += self.cuda.step_ms
        self.cuda.calls.append(f"record on {stream}")

    def synchronize(self) -> None:
        assert self.at is not None
        self.done = True
        self.cuda.calls.append("wait")

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert end.done
        return end.at - self.at

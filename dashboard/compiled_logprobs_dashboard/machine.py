"""What this machine is doing, now and in the last minutes: its GPUs through NVML, its CPU and memory through psutil.

One thread takes a look every second for as long as somebody asks, whoever that is: tabs share it. None stands for what
a device does not tell; it is not 0.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from compiled_logprobs.machine.clock import free_memory
from compiled_logprobs.machine.nvml import Gpu, NoTelemetry, Snapshot, gpus

INTERVAL_S = 1.0
FIRST_S = 0.1
"""Before the first look, over which the processors' share of work is taken."""
KEPT = 600
"""Looks."""
UNWATCHED_S = 20.0
"""After which the thread ends: looking costs the machine something, and there may be something to measure."""
NOT_TOLD = "n/a"


@dataclass(frozen=True)
class Host:
    """The CPU and the memory of this machine."""

    busy_percent: float | None
    """Of all its processors, since the look before."""
    processors: int
    load: float
    """How many programs ran or waited for a processor, averaged over the last minute."""
    clock_mhz: float | None
    """Mean of the processors."""
    memory_used_bytes: int
    memory_total_bytes: int
    memory_free_bytes: int | None
    """That this process could still take, within the limits it has."""


@dataclass(frozen=True)
class GpuLook:
    """One look at a GPU."""

    label: str
    snapshot: Snapshot
    trouble: str | None
    """What the driver says in place of any answer."""
    is_slice: bool = False
    """Memory and processes are then the slice's, all else is the whole GPU's."""


@dataclass(frozen=True)
class MachineLook:
    """One look at the machine."""

    at: float
    """Seconds since 1970."""
    host: Host
    gpus: tuple[GpuLook, ...]


class Machine:
    """Looks at this machine, and at the GPUs that `find` lists, every `interval` s while somebody asks for that."""

    def __init__(
        self, interval: float = INTERVAL_S, find: Callable[[], list[Gpu] | NoTelemetry] = gpus, *, kept: int = KEPT
    ) -> None:
        self.interval = interval
        self._find = find
        self._found: list[Gpu] | NoTelemetry = []
        self._looks: deque[MachineLook] = deque(maxlen=kept)
        self._cpu: tuple[float, float] | None = None
        self._asked_at = 0.0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def looks(self) -> list[MachineLook]:
        """Those of the last minutes, the newest last; at least one. Someone asking keeps them coming."""
        with self._lock:
            self._asked_at = time.monotonic()
            if self._thread is None or not self._thread.is_alive():
                self._found = self._find()  # again, too: a driver may have been loaded, or a GPU lost
                self._cpu = _cpu_seconds()
                time.sleep(FIRST_S)
                self._take()
                self._thread = threading.Thread(target=self._run, name="looks at the machine", daemon=True)
                self._thread.start()
            return list(self._looks)

    @property
    def reason(self) -> str | None:
        """Why there are no GPUs to look at; None if there are."""
        return self._found.reason if isinstance(self._found, NoTelemetry) else None

    @property
    def gpus(self) -> list[Gpu]:
        return [] if isinstance(self._found, NoTelemetry) else self._found

    def _run(self) -> None:
        while True:
            time.sleep(self.interval)
            with self._lock:
                if time.monotonic() - self._asked_at > max(UNWATCHED_S, 3 * self.interval):
                    self._thread = None
                    return
                self._take()

    def _take(self) -> None:
        labels = [label(gpu, self.gpus) for gpu in self.gpus]
        looks = tuple(
            GpuLook(name, gpu.provider.snapshot(), gpu.provider.trouble(), gpu.slice_of is not None)
            for name, gpu in zip(labels, self.gpus, strict=True)
        )
        cpu = _cpu_seconds()
        self._looks.append(MachineLook(time.time(), _host(self._cpu, cpu), looks))
        self._cpu = cpu


def label(gpu: Gpu, among: list[Gpu]) -> str:
    """What tells `gpu` from the others, for people: NVML's number, and its name."""
    if gpu.slice_of is None:
        return f"{gpu.number}: {gpu.name or NOT_TOLD}"
    slices = [other for other in among if other.slice_of == gpu.slice_of]
    return f"{gpu.number}, slice {slices.index(gpu)}: {gpu.name or NOT_TOLD}"


def process_name(pid: int) -> str | None:
    """What the process is called; None if this user cannot see it."""
    try:
        return str(psutil.Process(pid).name())
    except psutil.Error:
        return None


def _host(before: tuple[float, float] | None, now: tuple[float, float]) -> Host:
    busy = None
    if before is not None and now[1] > before[1]:
        busy = min(100.0, max(0.0, 100 * (now[0] - before[0]) / (now[1] - before[1])))
    memory = psutil.virtual_memory()
    clock = None
    with contextlib.suppress(OSError, NotImplementedError, AttributeError):  # where the system does not tell it
        clock = psutil.cpu_freq()
    return Host(
        busy_percent=busy,
        processors=psutil.cpu_count() or 1,
        load=psutil.getloadavg()[0],
        clock_mhz=None if clock is None else clock.current,
        memory_used_bytes=memory.total - memory.available,
        memory_total_bytes=memory.total,
        memory_free_bytes=free_memory("cpu"),
    )


def _cpu_seconds() -> tuple[float, float]:
    """Seconds that all processors worked, and all seconds, since the machine started."""
    times = psutil.cpu_times()
    total = sum(times[:8])  # what guests took is among these already
    return total - times.idle - getattr(times, "iowait", 0.0), total

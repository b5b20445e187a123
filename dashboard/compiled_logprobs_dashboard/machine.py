"""What this machine is doing, now and in the last minutes: its GPUs through `telemetry`, its CPU and memory through /proc.

One thread takes a look every second for as long as somebody asks, whoever that is: tabs share it. None stands for what a device
does not tell; it is not 0.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from compiled_logprobs.machine.clock import free_memory
from compiled_logprobs.machine.nvml import Gpu, NoTelemetry, Snapshot, gpus

INTERVAL_S = 1.0
FIRST_S = 0.1
"""Before the first look, over which the processors' share of work is taken."""
KEPT = 600
"""Looks."""
UNWATCHED_S = 20.0
"""After which the thread ends: looking costs the machine something, and there may be something to measure."""
GAP = 3.0
"""Intervals between two looks that make a gap in a line."""
PROC = Path("/proc")
NOT_TOLD = "n/a"


@dataclass(frozen=True)
class Host:
    """The CPU and the memory of this machine."""

    busy_percent: float | None
    """Of all its processors, since the look before."""
    processors: int
    load: float | None
    """How many programs ran or waited for a processor, averaged over the last minute."""
    clock_mhz: float | None
    """Mean of the processors."""
    memory_used_bytes: int | None
    memory_total_bytes: int | None
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
class Look:
    """One look at the machine."""

    at: float
    """Seconds since 1970."""
    host: Host
    gpus: tuple[GpuLook, ...]


class Machine:
    """Takes looks while somebody asks for them.

    Args:
        interval: seconds between two.
        find: lists the GPUs.
    """

    def __init__(
        self, interval: float = INTERVAL_S, find: Callable[[], list[Gpu] | NoTelemetry] = gpus, *, kept: int = KEPT
    ) -> None:
        self.interval = interval
        self._find = find
        self._found: list[Gpu] | NoTelemetry = []
        self._looks: deque[Look] = deque(maxlen=kept)
        self._ticks: tuple[int, int] | None = None
        self._asked_at = 0.0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def looks(self) -> list[Look]:
        """Those of the last minutes, the newest last; at least one. Someone asking keeps them coming."""
        with self._lock:
            self._asked_at = time.monotonic()
            if self._thread is None or not self._thread.is_alive():
                self._found = self._find()  # again, too: a driver may have been loaded, or a GPU lost
                self._ticks = _cpu_ticks()
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
        found = tuple(
            GpuLook(name, gpu.provider.snapshot(), gpu.provider.trouble(), gpu.slice_of is not None)
            for name, gpu in zip(labels, self.gpus, strict=True)
        )
        ticks = _cpu_ticks()
        self._looks.append(Look(time.time(), _host(self._ticks, ticks), found))
        self._ticks = ticks


def label(gpu: Gpu, among: list[Gpu]) -> str:
    """What tells `gpu` from the others, for people: NVML's number, and its name."""
    if gpu.slice_of is None:
        return f"{gpu.number}: {gpu.name or NOT_TOLD}"
    slices = [one for one in among if one.slice_of == gpu.slice_of]
    return f"{gpu.number}, slice {slices.index(gpu)}: {gpu.name or NOT_TOLD}"


HISTORY = [
    "memory_used_bytes",
    "memory_total_bytes",
    "busy_percent",
    "memory_busy_percent",
    "sm_clock_mhz",
    "memory_clock_mhz",
    "power_w",
    "temperature_c",
]
"""The figures of a look that a line can be drawn of."""


def history(looks: list[Look], interval: float = INTERVAL_S) -> pd.DataFrame:
    """A row for each device of each look, by rising time: `at`, `device`, and HISTORY.

    Where nobody looked for a while, a row without figures stands in between, so that no line bridges that.
    """
    rows: list[dict[str, object]] = []
    devices: list[str] = []
    before = None
    for look in looks:
        if before is not None and look.at - before > GAP * interval:
            rows += [{"at": (before + look.at) / 2, "device": device} for device in devices]
        before = look.at
        if look.gpus:
            found = {one.label: {name: getattr(one.snapshot, name) for name in HISTORY} for one in look.gpus}
        else:
            host = look.host
            figures = {
                "memory_used_bytes": host.memory_used_bytes,
                "memory_total_bytes": host.memory_total_bytes,
                "busy_percent": host.busy_percent,
                "sm_clock_mhz": host.clock_mhz,
            }
            found = {"this machine": figures}
        devices = list(found)
        rows += [{"at": look.at, "device": device, **figures} for device, figures in found.items()]
    table = pd.DataFrame(rows, columns=["at", "device", *HISTORY])
    table[HISTORY] = table[HISTORY].astype("float64")
    table["at"] = pd.to_datetime(table["at"], unit="s", utc=True)
    return table


def process_name(pid: int) -> str | None:
    """What the process is called; None if this user cannot see it."""
    try:
        return (PROC / str(pid) / "comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def size(number: int | None) -> str:
    """Bytes for people."""
    return NOT_TOLD if number is None else f"{number / 2**30:.1f} GiB"


def of(value: float | None, limit: float | None, unit: str) -> str:
    """Such as '1410 of 1980 MHz'; what is not told is said so."""
    parts = [NOT_TOLD if number is None else f"{number:.0f}" for number in (value, limit)]
    if value is None and limit is None:
        return NOT_TOLD
    return f"{parts[0]} of {parts[1]} {unit}" if limit is not None else f"{parts[0]} {unit}"


def throttling(reasons: tuple[str, ...] | None) -> str:
    """What holds the clocks down, in a sentence."""
    if reasons is None:
        return f"{NOT_TOLD}: the driver does not say what holds the clocks down"
    if not reasons:
        return "nothing holds the clocks down"
    return (
        f"clocks are held down: {', '.join(reasons)}"
        if reasons != ("idle",)
        else "idle: clocks are low for lack of work"
    )


def _host(before: tuple[int, int] | None, now: tuple[int, int] | None) -> Host:
    busy = None
    if before is not None and now is not None and now[1] > before[1]:
        busy = min(100.0, max(0.0, 100 * (now[0] - before[0]) / (now[1] - before[1])))
    memory = _fields(_text(PROC / "meminfo"))
    total, available = memory.get("MemTotal"), memory.get("MemAvailable")
    clocks = [float(line.split(":")[1]) for line in _text(PROC / "cpuinfo").splitlines() if line.startswith("cpu MHz")]
    return Host(
        busy_percent=busy,
        processors=os.cpu_count() or 1,
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        clock_mhz=sum(clocks) / len(clocks) if clocks else None,
        memory_used_bytes=None if total is None or available is None else total - available,
        memory_total_bytes=total,
        memory_free_bytes=free_memory("cpu"),
    )


def _cpu_ticks() -> tuple[int, int] | None:
    """Ticks that all processors worked, and all ticks, since the machine started; None if this system does not tell."""
    line = next(iter(_text(PROC / "stat").splitlines()), "")
    numbers = [int(part) for part in line.split()[1:9] if part.isdigit()]
    if len(numbers) < 5:
        return None
    idle = numbers[3] + numbers[4]  # waiting for disks counts as idle
    return sum(numbers) - idle, sum(numbers)


def _fields(text: str) -> dict[str, int]:
    """Sizes in /proc/meminfo, in bytes."""
    found = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        parts = rest.split()
        if len(parts) == 2 and parts[0].isdigit():
            found[name] = int(parts[0]) * 1024
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

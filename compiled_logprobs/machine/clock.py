"""What a run costs on a device: seconds and peak bytes, and the cold cache and free memory that it starts from.

CUDA's side goes through the one name `cuda`, where tests put a stand-in. ROCm is CUDA here, as in torch.
"""

import contextlib
import ctypes
import gc
import math
import os
import sys
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import psutil
import torch
from torch import Tensor, cuda

from compiled_logprobs.errors import InputError

MIB = 2**20
CPU_CACHES = Path("/sys/devices/system/cpu")
CGROUPS = Path("/sys/fs/cgroup")
PROCESS = Path("/proc/self")
UNKNOWN_CACHE = 64 * MIB
"""Taken for the last level of a CPU's cache where the system does not tell."""
INFINITY_CACHE = 256 * MIB
"""Of the AMD accelerators that have most of it: it lies behind the L2 cache, and torch does not report it."""
AHEAD_S, MOST_AHEAD_S = 1e-3, 20e-3
"""How long a device is kept busy before a timed call, unless told; and at most: its queue is not longer."""
SPIN_CYCLES = 200_000
"""Of a first spin, which tells how many cycles a second has; ROCm counts others than CUDA."""


class Time(NamedTuple):
    """What one call takes."""

    seconds: float
    """Of the device."""
    host_seconds: float
    """Until the call returned: on a CPU the same; on CUDA what Python and launches take, unless it waits."""


def time_call(function: Callable[[], object], device: torch.device | str, *, ahead_s: float = AHEAD_S) -> Time:
    """Time one call of `function`; what it returns is freed outside of the clock.

    On CUDA by the device's own events: what was queued on the current stream before does not count, and what the call
    queues is waited for. The device is kept busy for `ahead_s` before, so that the host is ahead of it, as in training:
    else a short call would take as long as the host takes to launch it.
    """
    device = measurable(device)
    if device.type == "cuda":
        first, last = (cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's gap
        _keep_busy(device, min(ahead_s, MOST_AHEAD_S))
        first.record(cuda.current_stream(device))
        start = perf_counter()
        result = function()
        host_seconds = perf_counter() - start
        last.record(cuda.current_stream(device))
        last.synchronize()
        seconds = float(first.elapsed_time(last)) / 1000
    else:
        start = perf_counter()
        result = function()
        seconds = host_seconds = perf_counter() - start
    del result
    return Time(seconds, host_seconds)


def cache_bytes(device: torch.device | str) -> int:
    """Size of the last level of cache in front of the device's memory, all its instances together."""
    device = measurable(device)
    if device.type == "cpu":
        return _cpu_cache(CPU_CACHES) or UNKNOWN_CACHE
    l2 = cuda.get_device_properties(device).L2_cache_size
    return max(l2, INFINITY_CACHE) if torch.version.hip else l2


def flush_cache(device: torch.device | str) -> None:
    """Put other data into the device's cache; queued on the current stream if it is CUDA."""
    _scratch(measurable(device)).amax()  # only read, so that nothing is left to be written back while the clock runs


def finish_queued(device: torch.device) -> None:
    """Wait for what this process has queued on `device`: nothing, where torch holds no memory of it."""
    if device.type == "cuda" and cuda.memory_reserved(device) > 0:  # else waiting would take some, for a context
        cuda.synchronize(device)


def free_memory(device: torch.device | str) -> int:
    """Bytes that can still be taken.

    On CUDA: of the device, without what torch's allocator holds in reserve. On the CPU: within the limits of the
    control groups that this process is in.
    """
    device = measurable(device)
    if device.type == "cuda":
        return int(cuda.mem_get_info(device)[0])
    return min([int(psutil.virtual_memory().available), *(room for _, room in _groups_of_control())])


@cache
def total_memory(device_type: str) -> int | None:
    """Bytes that the current device of this type has, in use or not, within the limits of this process's control
    groups; None where nobody can tell."""
    if device_type == "cpu":
        return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _groups_of_control())])
    if device_type == "cuda" and cuda.is_available():
        return int(cuda.get_device_properties(cuda.current_device()).total_memory)
    return None


def why_no_peak(device: torch.device | str) -> str | None:
    """Why `extra_peak_bytes` cannot measure here; None if it can."""
    if measurable(device).type == "cuda":
        return None
    if sys.platform != "linux":
        return "the peak of memory in use is measured on Linux and on CUDA devices only"
    if not os.access(PROCESS / "clear_refs", os.W_OK) or _status("VmHWM") is None or _status("VmRSS") is None:
        return "this system does not let a process reset and read the peak of its memory (/proc/self/clear_refs, VmHWM)"
    return None


def extra_peak_bytes(function: Callable[[], object], device: torch.device | str) -> int | None:
    """Peak of the memory in use while `function` runs, over what was in use before; its result counts.

    On CUDA it is what torch's allocator hands out. On the CPU it is the resident memory of the whole process, so other
    threads count too. None, without a call, where `why_no_peak` has a reason.
    """
    device = measurable(device)
    if why_no_peak(device) is not None:
        return None
    gc.collect()
    if device.type == "cuda":
        cuda.synchronize(device)
        cuda.reset_peak_memory_stats(device)
        before = cuda.memory_allocated(device)
        result = function()
        cuda.synchronize(device)
        peak = cuda.max_memory_allocated(device)
    else:
        _return_freed_memory()
        before = _status("VmRSS") or 0
        (PROCESS / "clear_refs").write_text("5", encoding="ascii")  # sets VmHWM back to what is resident now
        result = function()
        peak = _status("VmHWM") or 0
    del result
    return max(0, peak - before)


def measurable(device: torch.device | str) -> torch.device:
    """`device` with its index, if it is of a type that can be measured."""
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise InputError(
            f"got device '{device}'; time and memory are measured on 'cpu' and 'cuda' devices. Name one of these."
        )
    return with_index(device) if device.type == "cuda" else torch.device("cpu")


def with_index(device: torch.device) -> torch.device:
    """`device`; where it is CUDA's without an index, the one that is current in this process, and in no other."""
    return torch.device("cuda", cuda.current_device()) if device.type == "cuda" and device.index is None else device


def _keep_busy(device: torch.device, seconds: float) -> None:
    """Queue work for about so long on the current stream, before which nothing later begins."""
    spin, each = _spin(device)
    with cuda.device(device):
        spin(seconds / each)


@cache
def _spin(device: torch.device) -> tuple[Callable[[float], None], float]:
    """What queues work that many times, and the seconds of one time: a spin, else reads as of `flush_cache`."""
    sleep = getattr(cuda, "_sleep", None)  # no public name of torch's does that

    def spin(times: float) -> None:
        if sleep is not None:
            sleep(math.ceil(times * SPIN_CYCLES))
        else:
            for _ in range(math.ceil(times)):
                flush_cache(device)

    first, last = (cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's gap
    with cuda.device(device):
        spin(1.0)  # and load it
        first.record(cuda.current_stream(device))
        spin(1.0)
        last.record(cuda.current_stream(device))
    last.synchronize()
    return spin, max(float(first.elapsed_time(last)) / 1000, 1e-6)


@lru_cache(maxsize=1)
def _scratch(device: torch.device) -> Tensor:
    """A buffer of twice the cache, written once: memory that was never written is one page of zeros on the CPU."""
    return torch.ones(2 * cache_bytes(device) // 4, dtype=torch.float32, device=device)


@cache
def _cpu_cache(folder: Path) -> int | None:
    """Size of the last level of the CPUs that this process may use, as Linux describes it; None if it does not.

    CPUs that share an instance count it once.
    """
    sizes: dict[tuple[int, str], int] = {}
    cpus = os.sched_getaffinity(0) if sys.platform == "linux" else ()
    for entry in (entry for cpu in cpus for entry in (folder / f"cpu{cpu}" / "cache").glob("index*")):
        with contextlib.suppress(OSError, ValueError):
            level, size, shared = ((entry / name).read_text().strip() for name in ("level", "size", "shared_cpu_list"))
            sizes[int(level), shared] = int(size.removesuffix("K")) * 1024
    last = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last) or None


def _groups_of_control() -> list[tuple[int, int]]:
    """Each limit on this process's memory, and what it leaves; the page cache that can be dropped counts as free."""
    limits = []
    for line in _text(PROCESS / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            root, limit_file, use_file, dropped = CGROUPS, "memory.max", "memory.current", "inactive_file "
        elif "memory" in controllers.split(","):
            root, limit_file, use_file = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            dropped = "total_inactive_file "
        else:
            continue
        group = root / path.lstrip("/")  # in a container it may not exist, and then the root holds the limits
        for folder in [group, *(parent for parent in group.parents if parent.is_relative_to(root))]:
            limit, used = _text(folder / limit_file).strip(), _text(folder / use_file).strip()
            if limit.isdigit() and used.isdigit():  # no limit is 'max'
                statistics = _text(folder / "memory.stat").splitlines()
                cached = sum(int(line.split()[1]) for line in statistics if line.startswith(dropped))
                limits.append((int(limit), max(0, int(limit) - int(used) + cached)))
    return limits


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""


def _status(field: str) -> int | None:
    """A size in /proc/self/status, in bytes."""
    lines = _text(PROCESS / "status").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def _return_freed_memory() -> None:
    """So that what was freed before does not hide what is taken now."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)

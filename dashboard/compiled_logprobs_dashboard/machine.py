"""What this machine is doing now: its GPUs through NVML, its CPU and memory through psutil.

None stands for what a device does not tell; it is not 0.
"""

from dataclasses import dataclass

import psutil

from compiled_logprobs.machine.nvml import Gpu, Snapshot

CPU_S = 0.1
"""Over which the processors' share of work is taken."""
NOT_TOLD = "n/a"


@dataclass(frozen=True)
class Host:
    """The CPU and the memory of this machine."""

    busy_percent: float
    """Of all its processors."""
    processors: int
    load: float
    """How many programs ran or waited for a processor, averaged over the last minute."""
    memory_used_bytes: int
    memory_total_bytes: int


@dataclass(frozen=True)
class GpuLook:
    """One look at a GPU, or at a slice of one: then memory and processes are the slice's, all else is the whole's."""

    label: str
    snapshot: Snapshot
    trouble: str | None
    """What the driver says in place of any answer."""


def look_at(gpus: list[Gpu]) -> list[GpuLook]:
    """How the GPUs are now."""
    return [GpuLook(label(gpu, gpus), gpu.provider.snapshot(), gpu.provider.trouble()) for gpu in gpus]


def look_at_host() -> Host:
    """How the CPU and the memory are now."""
    memory = psutil.virtual_memory()
    return Host(
        busy_percent=psutil.cpu_percent(CPU_S),
        processors=psutil.cpu_count() or 1,
        load=psutil.getloadavg()[0],
        memory_used_bytes=memory.total - memory.available,
        memory_total_bytes=memory.total,
    )


def label(gpu: Gpu, among: list[Gpu]) -> str:
    """What tells `gpu` from the others, for people: NVML's number, and its name."""
    if gpu.slice_of is None:
        return f"{gpu.number}: {gpu.name or NOT_TOLD}"
    slices = [other for other in among if other.slice_of == gpu.slice_of]
    return f"{gpu.number}, slice {slices.index(gpu)}: {gpu.name or NOT_TOLD}"


def process(pid: int) -> tuple[str, str]:
    """Whose process it is, and its command; what this user cannot see is not told."""
    try:
        running = psutil.Process(pid)
        return str(running.username()), " ".join(running.cmdline()) or str(running.name())
    except psutil.Error:
        return NOT_TOLD, NOT_TOLD

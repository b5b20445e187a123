"""What a GPU is doing: memory, clocks, power, and what holds its clocks down, through NVIDIA's NVML.

NVML comes with the driver; nvidia-ml-py, imported here alone and only when asked, calls it. Elsewhere: a provider that
has a reason instead.
"""

import statistics
import threading
from dataclasses import dataclass
from typing import Any

import torch

IDLE = "idle"
THROTTLE_REASONS = {
    0x1: IDLE,
    0x2: "clocks set by the user",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "synchronised with other GPUs",
    0x20: "thermal slowdown by the driver",
    0x40: "thermal slowdown by the hardware",
    0x80: "power brake from outside",
    0x100: "display clocks",
    0x200: "board limit",
    0x400: "reliability",
}
"""NVML's bits, in words."""
NOT_AVAILABLE = (2**32 - 1, 2**64 - 1)
"""What NVML says in place of a number that it does not have."""


@dataclass(frozen=True)
class Process:
    """One that computes on the GPU. None where its memory is not told, as on Windows."""

    pid: int
    memory_bytes: int | None


@dataclass(frozen=True)
class Snapshot:
    """One look at a GPU. None where it does not tell: that is not 0."""

    memory_used_bytes: int | None
    """By processes."""
    memory_free_bytes: int | None
    """Neither used nor kept by the driver for itself."""
    memory_total_bytes: int | None
    busy_percent: int | None
    """Of the last moments, the share in which a kernel ran."""
    memory_busy_percent: int | None
    """Of the last moments, the share in which memory was read or written."""
    sm_clock_mhz: int | None
    sm_clock_max_mhz: int | None
    memory_clock_mhz: int | None
    memory_clock_max_mhz: int | None
    power_w: float | None
    power_limit_w: float | None
    temperature_c: int | None
    throttle_reasons: tuple[str, ...] | None
    """Why the clocks are not higher; empty if nothing holds them down."""
    persistence_mode: bool | None
    mig_mode: bool | None
    processes: tuple[Process, ...] | None


@dataclass(frozen=True)
class NoTelemetry:
    """For a device that nothing reports on."""

    reason: str
    """Why there are no snapshots."""

    def snapshot(self) -> None:
        return None


@dataclass(frozen=True)
class Nvml:
    """For an NVIDIA GPU, or a slice of one: then memory and processes are the slice's, all else is the whole GPU's."""

    nvml: Any
    """The module of nvidia-ml-py."""
    handle: Any
    """None for a GPU that NVML counts, and lets nobody ask."""
    gpu: Any
    """The handle of the whole GPU."""
    refusal: str | None = None
    """What NVML says in place of a handle."""
    reason: None = None

    def snapshot(self) -> Snapshot:
        nvml, gpu = self.nvml, self.gpu
        memory = _ask(nvml, "nvmlDeviceGetMemoryInfo", self.handle, nvml.nvmlMemory_v2)
        busy = _ask(nvml, "nvmlDeviceGetUtilizationRates", gpu)
        power = _ask(nvml, "nvmlDeviceGetPowerUsage", gpu)
        power_limit = _ask(nvml, "nvmlDeviceGetEnforcedPowerLimit", gpu)
        temperature = _ask(nvml, "nvmlDeviceGetTemperatureV", gpu, nvml.NVML_TEMPERATURE_GPU)
        if temperature is None:  # older drivers have the other function only
            temperature = _ask(nvml, "nvmlDeviceGetTemperature", gpu, nvml.NVML_TEMPERATURE_GPU)
        persistence = _ask(nvml, "nvmlDeviceGetPersistenceMode", gpu)
        mig = _ask(nvml, "nvmlDeviceGetMigMode", gpu)
        processes = _ask(nvml, "nvmlDeviceGetComputeRunningProcesses_v3", self.handle)
        return Snapshot(
            memory_used_bytes=getattr(memory, "used", None),
            memory_free_bytes=getattr(memory, "free", None),
            memory_total_bytes=getattr(memory, "total", None),
            busy_percent=getattr(busy, "gpu", None),
            memory_busy_percent=getattr(busy, "memory", None),
            sm_clock_mhz=_ask(nvml, "nvmlDeviceGetClockInfo", gpu, nvml.NVML_CLOCK_SM),
            sm_clock_max_mhz=_ask(nvml, "nvmlDeviceGetMaxClockInfo", gpu, nvml.NVML_CLOCK_SM),
            memory_clock_mhz=_ask(nvml, "nvmlDeviceGetClockInfo", gpu, nvml.NVML_CLOCK_MEM),
            memory_clock_max_mhz=_ask(nvml, "nvmlDeviceGetMaxClockInfo", gpu, nvml.NVML_CLOCK_MEM),
            power_w=None if power is None else power / 1000,
            power_limit_w=None if power_limit is None else power_limit / 1000,
            temperature_c=temperature,
            throttle_reasons=_in_words(_ask(nvml, "nvmlDeviceGetCurrentClocksEventReasons", gpu)),
            persistence_mode=None if persistence is None else bool(persistence),
            mig_mode=None if mig is None else bool(mig[0]),  # the second is the mode after the next reset
            processes=None if processes is None else tuple(Process(p.pid, p.usedGpuMemory) for p in processes),
        )

    def trouble(self) -> str | None:
        """What NVML says in place of any answer, such as that the GPU is lost; None if it answers."""
        if self.refusal is None:
            try:
                self.nvml.nvmlDeviceGetMemoryInfo(self.handle, self.nvml.nvmlMemory_v2)
            except (self.nvml.NVMLError_NotSupported, self.nvml.NVMLError_FunctionNotFound):
                return None
            except self.nvml.NVMLError as error:
                return _explained(self.nvml, error)
        return self.refusal


def telemetry(device: torch.device | str) -> Nvml | NoTelemetry:
    """Find what reports on `device`, by its identity: CUDA_VISIBLE_DEVICES gives torch other numbers than NVML's."""
    device = torch.device(device)
    if device.type != "cuda":
        return NoTelemetry(f"clocks, power and throttling are reported for NVIDIA GPUs only, not for '{device.type}'")
    if torch.version.hip:
        return NoTelemetry("NVML reports on NVIDIA GPUs only, and this torch is built for ROCm")
    pynvml = _nvml()
    if isinstance(pynvml, NoTelemetry):
        return pynvml
    if not torch.cuda.is_available():
        return NoTelemetry("torch sees no CUDA device")
    handle = _find(pynvml, torch.cuda.get_device_properties(device))
    if handle is None:
        return NoTelemetry(f"NVML does not show the GPU that torch calls '{device}'")
    gpu = _ask(pynvml, "nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle) or handle  # which is not a slice
    return Nvml(pynvml, handle, gpu)


@dataclass(frozen=True)
class Gpu:
    """A GPU as NVML shows it, or a slice of one. None where it does not tell."""

    number: int
    """NVML's, of the whole GPU; it stays where another GPU is lost."""
    name: str | None
    uuid: str | None
    driver: str | None
    slice_of: str | None
    """For a slice, the UUID of the whole GPU."""
    provider: Nvml


def gpus() -> list[Gpu] | NoTelemetry:
    """All that NVML shows of this machine, each whole one followed by its slices, whether or not torch may use them."""
    nvml = _nvml()
    if isinstance(nvml, NoTelemetry):
        return nvml
    listed: list[Gpu] = []
    for number in range(_ask(nvml, "nvmlDeviceGetCount") or 0):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(number)
        except nvml.NVMLError as error:  # this user may not see it, or it is lost
            listed.append(_gpu(Nvml(nvml, None, None, _explained(nvml, error)), number))
            continue
        places = range(_ask(nvml, "nvmlDeviceGetMaxMigDeviceCount", handle) or 0)
        slices = [_ask(nvml, "nvmlDeviceGetMigDeviceHandleByIndex", handle, place) for place in places]
        parts = [handle, *(part for part in slices if part is not None)]  # places may be empty
        listed += [_gpu(Nvml(nvml, part, handle), number) for part in parts]
    return listed or NoTelemetry("NVML starts, and shows no GPU")


@dataclass(frozen=True)
class Summary:
    """What was seen during a run. None where the GPU did not tell.

    Clocks and throttle reasons are of the snapshots in which the GPU was not idle, or of all if it was idle in all.
    """

    snapshots: int
    sm_clock_min_mhz: int | None
    sm_clock_median_mhz: float | None
    sm_clock_max_mhz: int | None
    """What the GPU could reach, not what was seen."""
    throttle_reasons: tuple[str, ...] | None
    """All that were seen, sorted."""
    memory_used_max_bytes: int | None


class Watch:
    """Takes a snapshot before and after what runs inside of it, and one every `interval` seconds in between.

    No more often than it has to: a question to the driver can hold up a launch for milliseconds.
    """

    def __init__(self, provider: Nvml | NoTelemetry, interval: float = 1.0) -> None:
        self._provider, self._interval = provider, interval
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        self.snapshots: list[Snapshot] = []

    def __enter__(self) -> "Watch":
        self._take()
        if self.snapshots:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self.snapshots:
            self._thread.join()
        self._take()

    def summary(self) -> Summary | None:
        """None if the provider has a reason to have none."""
        if not self.snapshots:
            return None
        busy = [look for look in self.snapshots if IDLE not in (look.throttle_reasons or ())] or self.snapshots
        clocks = [look.sm_clock_mhz for look in busy if look.sm_clock_mhz is not None]
        reasons = [look.throttle_reasons for look in busy if look.throttle_reasons is not None]
        memory = [look.memory_used_bytes for look in self.snapshots if look.memory_used_bytes is not None]
        return Summary(
            snapshots=len(self.snapshots),
            sm_clock_min_mhz=min(clocks, default=None),
            sm_clock_median_mhz=statistics.median(clocks) if clocks else None,
            sm_clock_max_mhz=self.snapshots[0].sm_clock_max_mhz,
            throttle_reasons=tuple(sorted({word for words in reasons for word in words})) if reasons else None,
            memory_used_max_bytes=max(memory, default=None),
        )

    def _run(self) -> None:
        while not self._over.wait(self._interval):
            self._take()

    def _take(self) -> None:
        if (snapshot := self._provider.snapshot()) is not None:
            self.snapshots.append(snapshot)


def _nvml() -> Any:
    """The module of nvidia-ml-py, started; or a NoTelemetry that says why it is not."""
    try:
        import pynvml  # type: ignore[import-untyped]  # nvidia-ml-py has no stubs
    except ImportError:
        return NoTelemetry("nvidia-ml-py is not installed; pip install nvidia-ml-py")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return NoTelemetry(f"NVML, the library of NVIDIA's driver, does not start: {error}")
    return pynvml


def _ask(nvml: Any, function: str, *arguments: Any) -> Any:
    """What NVML answers; None if driver or package has no such function, or this device or user gets no answer."""
    if None in arguments:
        return None
    try:
        answer = getattr(nvml, function)(*arguments)
    except (nvml.NVMLError, AttributeError):
        return None
    return None if answer in NOT_AVAILABLE else answer


def _gpu(provider: Nvml, number: int) -> Gpu:
    nvml, handle, whole = provider.nvml, provider.handle, provider.gpu
    return Gpu(
        number=number,
        name=_ask(nvml, "nvmlDeviceGetName", handle),
        uuid=_ask(nvml, "nvmlDeviceGetUUID", handle),
        driver=_ask(nvml, "nvmlSystemGetDriverVersion"),
        slice_of=None if handle is whole else _ask(nvml, "nvmlDeviceGetUUID", whole),
        provider=provider,
    )


def _explained(nvml: Any, error: Exception) -> str:
    """What NVML says, with what it means where its words alone leave one puzzled."""
    if isinstance(error, nvml.NVMLError_GpuIsLost):
        return f"{error}: it has fallen off the bus, or cannot be reached; a restart may bring it back"
    if isinstance(error, nvml.NVMLError_NoPermission):
        return f"{error}: this user may not look at it"
    return str(error)


def _find(nvml: Any, properties: Any) -> Any:
    """NVML's handle of the GPU, or slice of one, that torch describes; None if NVML has none."""
    address = f"{properties.pci_domain_id:08X}:{properties.pci_bus_id:02X}:{properties.pci_device_id:02X}.0"
    return (
        _ask(nvml, "nvmlDeviceGetHandleByUUID", f"GPU-{properties.uuid}")
        or _ask(nvml, "nvmlDeviceGetHandleByUUID", f"MIG-{properties.uuid}")
        or _ask(nvml, "nvmlDeviceGetHandleByPciBusId", address)
    )


def _in_words(bits: int | None) -> tuple[str, ...] | None:
    if bits is None:
        return None
    each = [1 << place for place in range(bits.bit_length()) if bits >> place & 1]
    return tuple(THROTTLE_REASONS.get(bit, f"unknown reason 0x{bit:x}") for bit in each)

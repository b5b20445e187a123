"""What a GPU is doing: memory, clocks, power, and what holds its clocks down, through NVIDIA's NVML.

NVML comes with the driver; nvidia-ml-py, imported here alone and only when asked, calls it. Elsewhere: a provider that
has a reason instead.
"""

import statistics
import threading
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any, Protocol

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

    @property
    def process_count(self) -> int | None:
        return None if self.processes is None else len(self.processes)


class Provider(Protocol):
    """What `telemetry` returns."""

    @property
    def reason(self) -> str | None:
        """Why there are no snapshots; None if there are."""

    def snapshot(self) -> Snapshot | None:
        """One look at the device; None if there is a reason."""


@dataclass(frozen=True)
class NoTelemetry:
    """For a device that nothing reports on."""

    reason: str

    def snapshot(self) -> None:
        return None


@dataclass(frozen=True)
class Nvml:
    """For an NVIDIA GPU, or a slice of one: then memory and processes are the slice's, all else is the whole GPU's."""

    nvml: Any
    """The module of nvidia-ml-py."""
    handle: Any
    gpu: Any
    """The handle of the whole GPU."""
    reason: None = None

    def snapshot(self) -> Snapshot:
        nvml, gpu = self.nvml, self.gpu
        memory = self._ask("nvmlDeviceGetMemoryInfo", self.handle, nvml.nvmlMemory_v2)
        busy = self._ask("nvmlDeviceGetUtilizationRates", gpu)
        power = self._ask("nvmlDeviceGetPowerUsage", gpu)
        power_limit = self._ask("nvmlDeviceGetEnforcedPowerLimit", gpu)
        temperature = self._ask("nvmlDeviceGetTemperatureV", gpu, nvml.NVML_TEMPERATURE_GPU)
        if temperature is None:  # older drivers have the other function only
            temperature = self._ask("nvmlDeviceGetTemperature", gpu, nvml.NVML_TEMPERATURE_GPU)
        persistence = self._ask("nvmlDeviceGetPersistenceMode", gpu)
        mig = self._ask("nvmlDeviceGetMigMode", gpu)
        processes = self._ask("nvmlDeviceGetComputeRunningProcesses_v3", self.handle)
        return Snapshot(
            memory_used_bytes=None if memory is None else memory.used,
            memory_free_bytes=None if memory is None else memory.free,
            memory_total_bytes=None if memory is None else memory.total,
            busy_percent=None if busy is None else busy.gpu,
            memory_busy_percent=None if busy is None else busy.memory,
            sm_clock_mhz=self._ask("nvmlDeviceGetClockInfo", gpu, nvml.NVML_CLOCK_SM),
            sm_clock_max_mhz=self._ask("nvmlDeviceGetMaxClockInfo", gpu, nvml.NVML_CLOCK_SM),
            memory_clock_mhz=self._ask("nvmlDeviceGetClockInfo", gpu, nvml.NVML_CLOCK_MEM),
            memory_clock_max_mhz=self._ask("nvmlDeviceGetMaxClockInfo", gpu, nvml.NVML_CLOCK_MEM),
            power_w=None if power is None else power / 1000,
            power_limit_w=None if power_limit is None else power_limit / 1000,
            temperature_c=temperature,
            throttle_reasons=_in_words(self._ask("nvmlDeviceGetCurrentClocksEventReasons", gpu)),
            persistence_mode=None if persistence is None else bool(persistence),
            mig_mode=None if mig is None else bool(mig[0]),  # the second is the mode after the next reset
            processes=None if processes is None else tuple(Process(p.pid, p.usedGpuMemory) for p in processes),
        )

    def trouble(self) -> str | None:
        """What NVML says in place of any answer, such as that the GPU is lost; None if it answers."""
        try:
            self.nvml.nvmlDeviceGetMemoryInfo(self.handle, self.nvml.nvmlMemory_v2)
        except (self.nvml.NVMLError_NotSupported, self.nvml.NVMLError_FunctionNotFound):
            return None
        except self.nvml.NVMLError as error:
            return _explained(self.nvml, error)
        return None

    def _ask(self, function: str, *arguments: Any) -> Any:
        """What NVML answers; None if driver or package has no such function, or this device or user gets no answer."""
        try:
            answer = getattr(self.nvml, function)(*arguments)
        except (self.nvml.NVMLError, AttributeError):
            return None
        return None if answer in NOT_AVAILABLE else answer


@dataclass(frozen=True)
class Silent:
    """For an NVIDIA GPU that NVML counts, and lets nobody ask."""

    why: str
    reason: None = None

    def snapshot(self) -> Snapshot:
        return Snapshot(**dict.fromkeys(field.name for field in fields(Snapshot)))

    def trouble(self) -> str:
        return self.why


def telemetry(device: torch.device | str) -> Provider:
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
    try:
        gpu = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
    except pynvml.NVMLError:  # not a slice
        gpu = handle
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
    provider: Nvml | Silent


def gpus() -> list[Gpu] | NoTelemetry:
    """All that NVML shows of this machine, each whole one followed by its slices, whether or not torch may use them."""
    nvml = _nvml()
    if isinstance(nvml, NoTelemetry):
        return nvml
    try:
        count = nvml.nvmlDeviceGetCount()
    except nvml.NVMLError as error:
        return NoTelemetry(f"NVML does not say which GPUs there are: {error}")
    listed: list[Gpu] = []
    for index in range(count):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
        except nvml.NVMLError as error:  # this user may not see it, or it is lost
            listed.append(Gpu(index, None, None, None, None, Silent(_explained(nvml, error))))
            continue
        most = Nvml(nvml, handle, handle)._ask("nvmlDeviceGetMaxMigDeviceCount", handle) or 0
        slices = [part for part in (_slice(nvml, handle, place) for place in range(most)) if part is not None]
        listed += [_gpu(nvml, index, part, handle) for part in (handle, *slices)]
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

    with Watch(telemetry(device)) as watch:
        ...
    watch.summary()
    """

    def __init__(self, provider: Provider, interval: float = 0.2) -> None:
        self._provider, self._interval = provider, interval
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        self.snapshots: list[Snapshot] = []

    def __enter__(self) -> "Watch":
        self._take()
        if self._provider.reason is None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._provider.reason is None:
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
        snapshot = self._provider.snapshot()
        if snapshot is not None:
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


def _gpu(nvml: Any, number: int, handle: Any, whole: Any) -> Gpu:
    provider = Nvml(nvml, handle, whole)
    return Gpu(
        number=number,
        name=provider._ask("nvmlDeviceGetName", handle),
        uuid=provider._ask("nvmlDeviceGetUUID", handle),
        driver=provider._ask("nvmlSystemGetDriverVersion"),
        slice_of=None if handle is whole else provider._ask("nvmlDeviceGetUUID", whole),
        provider=provider,
    )


def _slice(nvml: Any, whole: Any, place: int) -> Any:
    """NVML's handle of the slice in that place; None if there is none."""
    try:
        return nvml.nvmlDeviceGetMigDeviceHandleByIndex(whole, place)
    except nvml.NVMLError:
        return None


def _explained(nvml: Any, error: Exception) -> str:
    """What NVML says, with what it means where its words alone leave one puzzled."""
    if isinstance(error, nvml.NVMLError_GpuIsLost):
        return (
            f"{error}: it has fallen off the bus, or cannot be reached for another reason; a restart may bring it back"
        )
    if isinstance(error, nvml.NVMLError_NoPermission):
        return f"{error}: this user may not look at it"
    return str(error)


def _find(nvml: Any, properties: Any) -> Any:
    """NVML's handle of the GPU, or slice of one, that torch describes; None if NVML has none."""
    address = f"{properties.pci_domain_id:08X}:{properties.pci_bus_id:02X}:{properties.pci_device_id:02X}.0"
    for find, name in (
        (nvml.nvmlDeviceGetHandleByUUID, f"GPU-{properties.uuid}"),
        (nvml.nvmlDeviceGetHandleByUUID, f"MIG-{properties.uuid}"),
        (nvml.nvmlDeviceGetHandleByPciBusId, address),
    ):
        try:
            return find(name)
        except nvml.NVMLError:
            continue
    return None


def _in_words(bits: int | None) -> tuple[str, ...] | None:
    if bits is None:
        return None
    bits_set = [1 << place for place in range(bits.bit_length()) if bits >> place & 1]
    return tuple(THROTTLE_REASONS.get(bit, f"unknown reason 0x{bit:x}") for bit in bits_set)

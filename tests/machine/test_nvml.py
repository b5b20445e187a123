"""What is reported of a GPU: through a stand-in for NVML's library, so that nvidia-ml-py itself runs."""

import contextlib
import dataclasses
import inspect
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from compiled_logprobs.machine.nvml import NoTelemetry, Process, Snapshot, Watch, gpus, telemetry
from tests.helpers.nvml_library import build, use

pytest.importorskip("pynvml", reason="nvidia-ml-py is not made for this system")

NOT_STARTED = "NVML, the library of NVIDIA's driver, does not start: "


def describe(uuid: str, bus: int) -> SimpleNamespace:
    """As torch describes a GPU."""
    return SimpleNamespace(uuid=f"{uuid}-0000-0000-0000-000000000000", pci_domain_id=0, pci_bus_id=bus, pci_device_id=0)


# In another order than NVML's; the third is a slice, the fourth has an address alone, the fifth is not NVML's.
GPUS = [describe("bbbbbbbb", 0x8B), describe("aaaaaaaa", 0x0A), describe("cccccccc", 0x8B)]
GPUS += [describe("dddddddd", 0x0A), describe("eeeeeeee", 0xEE)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def load(monkeypatch):
    """Has nvidia-ml-py load another library, or none, and torch see GPUs."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: GPUS[torch.device(device).index or 0])
    return lambda path: use(path, monkeypatch)


@pytest.fixture
def nvml(load, library, monkeypatch):
    """Sets what the library says."""
    load(library)
    return lambda **says: [monkeypatch.setenv(f"FAKE_NVML_{name}", str(value)) for name, value in says.items()]


def test_every_field_is_what_nvml_says(nvml):
    provider = telemetry("cuda:0")
    assert provider.reason is None
    assert provider.snapshot() == Snapshot(
        memory_used_bytes=200,
        memory_free_bytes=1700,  # the driver keeps 100
        memory_total_bytes=2000,
        busy_percent=0,
        memory_busy_percent=42,
        sm_clock_mhz=1002,
        sm_clock_max_mhz=2002,
        memory_clock_mhz=2002,
        memory_clock_max_mhz=4002,
        power_w=350.5,
        power_limit_w=700.0,
        temperature_c=60,
        throttle_reasons=(),
        persistence_mode=False,
        mig_mode=True,
        processes=(Process(4711, 2048), Process(4712, None)),
    )
    assert telemetry("cuda:1").snapshot().processes == ()


@pytest.mark.usefixtures("nvml")
@pytest.mark.parametrize(
    ("device", "memory", "clock"),
    [("cuda:0", 200, 1002), ("cuda", 200, 1002), ("cuda:1", 100, 1001), ("cuda:2", 300, 1002), ("cuda:3", 100, 1001)],
    ids=["first", "current", "second", "a slice has its own memory", "by address"],
)
def test_a_gpu_is_found_by_its_identity(device, memory, clock):
    seen = telemetry(device).snapshot()
    assert (seen.memory_used_bytes, seen.sm_clock_mhz) == (memory, clock)


@pytest.mark.parametrize("code", [3, 4, 15, 999], ids=["not supported", "no permission", "GPU is lost", "unknown"])
def test_what_is_not_answered_is_none_and_never_0(nvml, code):
    provider = telemetry("cuda:0")
    nvml(POWER="0xffffffff")  # stands for none
    assert provider.snapshot().power_w is None
    nvml(RETURN=code)
    assert set(dataclasses.asdict(provider.snapshot()).values()) == {None}


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (0x0, ()),
        (0xA0, ("thermal slowdown by the driver", "power brake from outside")),
        (0x4009, ("idle", "hardware slowdown", "unknown reason 0x4000")),
    ],
)
def test_throttle_reasons_in_words(nvml, bits, words):
    nvml(REASONS=bits)
    assert telemetry("cuda:0").snapshot().throttle_reasons == words


def test_an_older_driver_tells_the_temperature_too(load, tmp_path):
    load(build(tmp_path, "-DOLD_DRIVER"))
    assert telemetry("cuda:0").snapshot().temperature_c == 50


def test_where_nothing_can_be_told_there_is_a_reason(load, nvml, monkeypatch):
    assert telemetry("cpu").reason == "clocks, power and throttling are reported for NVIDIA GPUs only, not for 'cpu'"
    assert telemetry("cuda:4").reason == "NVML does not show the GPU that torch calls 'cuda:4'"
    nvml(GPUS=0)
    assert gpus() == NoTelemetry("NVML starts, and shows no GPU")
    for code, said in (9, "Driver Not Loaded"), (18, "RM has detected an NVML/RM version mismatch."):
        nvml(INIT=code)
        assert telemetry("cuda") == gpus() == NoTelemetry(NOT_STARTED + said)
    assert telemetry("cuda").snapshot() is None
    load(None)
    assert telemetry("cuda").reason == gpus().reason == f"{NOT_STARTED}NVML Shared Library Not Found"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert telemetry("cuda").reason == "nvidia-ml-py is not installed; pip install nvidia-ml-py"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert telemetry("cuda").reason == "NVML reports on NVIDIA GPUs only, and this torch is built for ROCm"


def test_a_torch_without_gpus_is_a_reason(nvml, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert telemetry("cuda").reason == "torch sees no CUDA device"


def test_all_gpus_are_listed_each_followed_by_its_slices(nvml):
    listed = gpus()
    assert [gpu.uuid[4:12] for gpu in listed] == ["aaaaaaaa", "bbbbbbbb", "cccccccc"]
    assert [gpu.slice_of and gpu.slice_of[:12] for gpu in listed] == [None, None, "GPU-bbbbbbbb"]
    assert {gpu.driver for gpu in listed} == {"999.1"}
    assert [gpu.name for gpu in listed] == ["NVIDIA Fake 80GB", "NVIDIA Fake 80GB", "NVIDIA Fake 80GB MIG 1g.10gb"]
    assert [gpu.provider.snapshot().memory_used_bytes for gpu in listed] == [100, 200, 300]
    assert [gpu.provider.trouble() for gpu in listed] == [None, None, None]
    nvml(RETURN=15)
    assert listed[0].provider.trouble().startswith("GPU is lost: it has fallen off the bus")
    assert [gpu.name for gpu in gpus()] == [None, None]  # which slices there are is not told, either
    nvml(RETURN=3)
    assert listed[0].provider.trouble() is None  # not supported is an answer


@pytest.mark.parametrize("at", ["handle", "reads"])
def test_one_lost_gpu_of_several_is_listed_with_the_reason_and_without_figures(nvml, at):
    nvml(LOST=0, **({"LOST_AT": at} if at == "handle" else {}))
    lost, *others = gpus()
    assert (lost.number, lost.name, lost.uuid, lost.slice_of) == (0, None, None, None)
    assert lost.provider.reason is None and lost.provider.trouble().startswith("GPU is lost: it has fallen off the bus")
    assert set(dataclasses.asdict(lost.provider.snapshot()).values()) == {None}
    assert [(gpu.number, gpu.uuid[4:12]) for gpu in others] == [(1, "bbbbbbbb"), (1, "cccccccc")]
    assert [gpu.provider.snapshot().memory_used_bytes for gpu in others] == [200, 300]


# --- a watch ----------------------------------------------------------------------------------------------------------


class Scripted:
    """Reports one snapshot after the other, and the last one for ever."""

    def __init__(self, *snapshots: Snapshot) -> None:
        self.left = list(snapshots)

    def snapshot(self) -> Snapshot:
        return self.left.pop(0) if len(self.left) > 1 else self.left[0]


def seen(clock: int | None, *reasons: str, memory: int | None = None, told: bool = True) -> Snapshot:
    fields = dict.fromkeys(field.name for field in dataclasses.fields(Snapshot))
    return Snapshot(
        **fields | {"sm_clock_mhz": clock, "memory_used_bytes": memory, "throttle_reasons": reasons if told else None}
    )


def summary(*snapshots: Snapshot):
    """Of a watch until all were seen."""
    with Watch(Scripted(*snapshots), interval=0.001) as watch:
        limit = time.monotonic() + 60
        while len(watch.snapshots) < len(snapshots) and time.monotonic() < limit:
            time.sleep(0.001)
    return watch.summary()


def test_a_watch_sums_up_what_it_saw_while_the_gpu_worked():
    worked = [seen(1000, memory=20), seen(1980, "power cap", memory=30), seen(1500, "power cap", "board limit")]
    total = summary(seen(210, "idle", memory=90), *worked, seen(300, "idle"))
    assert total.snapshots >= 5
    assert (total.sm_clock_min_mhz, total.sm_clock_median_mhz, total.sm_clock_max_mhz) == (1000, 1500, None)
    assert total.throttle_reasons == ("board limit", "power cap")
    assert total.memory_used_max_bytes == 90


def test_a_watch_tells_idling_no_throttling_and_no_answer_apart():
    idle = summary(seen(210, "idle"), seen(230, "idle"))
    assert idle.sm_clock_min_mhz == 210 and idle.throttle_reasons == ("idle",)
    free = summary(seen(None))
    assert free.throttle_reasons == ()
    assert free.sm_clock_min_mhz is free.sm_clock_median_mhz is free.memory_used_max_bytes is None
    assert summary(seen(None, told=False)).throttle_reasons is None


def test_a_watch_asks_no_more_than_once_a_second():
    """A question to the driver can hold up a launch, and what is timed with it."""
    assert inspect.signature(Watch).parameters["interval"].default >= 1.0


def test_a_watch_looks_before_and_after_also_an_error_and_ends_its_thread():
    with contextlib.suppress(ZeroDivisionError), Watch(Scripted(seen(1)), interval=60) as watch:
        assert len(watch.snapshots) == 1
        assert "telemetry" in [thread.name for thread in threading.enumerate()]
        raise ZeroDivisionError
    assert watch.summary().snapshots == 2
    assert "telemetry" not in [thread.name for thread in threading.enumerate()]


def test_without_telemetry_there_is_no_thread_and_no_summary():
    threads = threading.active_count()
    with Watch(telemetry("cpu")) as watch:
        assert threading.active_count() == threads
    assert watch.summary() is None

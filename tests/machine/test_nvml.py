"""What is reported of a GPU: through a stand-in for NVML's library, so that nvidia-ml-py itself runs."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from compiled_logprobs.machine.nvml import NoTelemetry, Process, Snapshot, Watch, gpus, telemetry
from tests.helpers.nvml_library import build, use

pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not made for this system")


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
def torch_with_gpus(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: GPUS[torch.device(device).index or 0])


@pytest.fixture
def load(monkeypatch, torch_with_gpus):
    """Has nvidia-ml-py load another library, or none."""
    return lambda path: use(path, monkeypatch)


@pytest.fixture
def nvml(load, library):
    load(library)


@pytest.mark.usefixtures("nvml")
def test_every_field_is_what_nvml_says():
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
    assert provider.snapshot().process_count == 2


@pytest.mark.usefixtures("nvml")
@pytest.mark.parametrize(
    ("device", "memory", "clock"),
    [("cuda:0", 200, 1002), ("cuda", 200, 1002), ("cuda:1", 100, 1001), ("cuda:2", 300, 1002), ("cuda:3", 100, 1001)],
    ids=["first", "current", "second", "a slice has its own memory", "by address"],
)
def test_a_gpu_is_found_by_its_identity(device, memory, clock):
    seen = telemetry(device).snapshot()
    assert (seen.memory_used_bytes, seen.sm_clock_mhz) == (memory, clock)


@pytest.mark.usefixtures("nvml")
def test_no_process_is_another_thing_than_no_answer():
    assert telemetry("cuda:1").snapshot().process_count == 0


@pytest.mark.usefixtures("nvml")
@pytest.mark.parametrize("code", [3, 4, 15, 999], ids=["not supported", "no permission", "GPU is lost", "unknown"])
def test_what_is_not_answered_is_none_and_never_0(monkeypatch, code):
    provider = telemetry("cuda:0")
    monkeypatch.setenv("FAKE_NVML_RETURN", str(code))
    seen = provider.snapshot()
    assert {name: value for name, value in dataclasses.asdict(seen).items() if value is not None} == {}
    assert seen.process_count is None


@pytest.mark.usefixtures("nvml")
def test_the_number_that_stands_for_none_is_none(monkeypatch):
    monkeypatch.setenv("FAKE_NVML_POWER", "0xffffffff")
    assert telemetry("cuda:0").snapshot().power_w is None


@pytest.mark.usefixtures("nvml")
@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (0x0, ()),
        (0x1, ("idle",)),
        (0x44, ("power cap", "thermal slowdown by the hardware")),
        (0xA0, ("thermal slowdown by the driver", "power brake from outside")),
        (0x4008, ("hardware slowdown", "unknown reason 0x4000")),
    ],
    ids=lambda value: hex(value) if isinstance(value, int) else None,
)
def test_throttle_reasons_in_words(monkeypatch, bits, words):
    monkeypatch.setenv("FAKE_NVML_REASONS", str(bits))
    assert telemetry("cuda:0").snapshot().throttle_reasons == words


def test_an_older_driver_tells_the_temperature_too(load, tmp_path):
    load(build(tmp_path, "-DOLD_DRIVER"))
    assert telemetry("cuda:0").snapshot().temperature_c == 50


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (9, "NVML, the library of NVIDIA's driver, does not start: Driver Not Loaded"),
        (18, "NVML, the library of NVIDIA's driver, does not start: RM has detected an NVML/RM version mismatch."),
    ],
)
def test_a_driver_that_does_not_run_is_a_reason(nvml, monkeypatch, code, reason):
    monkeypatch.setenv("FAKE_NVML_INIT", str(code))
    assert telemetry("cuda") == NoTelemetry(reason)
    assert telemetry("cuda").snapshot() is None


def test_no_library_is_a_reason(load):
    load(None)
    reason = "NVML, the library of NVIDIA's driver, does not start: NVML Shared Library Not Found"
    assert telemetry("cuda").reason == reason


def test_a_gpu_that_nvml_does_not_show_is_a_reason(nvml):
    assert telemetry("cuda:4").reason == "NVML does not show the GPU that torch calls 'cuda:4'"


def test_a_torch_without_gpus_is_a_reason(nvml, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert telemetry("cuda").reason == "torch sees no CUDA device"


def test_a_missing_package_is_a_reason(torch_with_gpus, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert telemetry("cuda").reason == "nvidia-ml-py is not installed; pip install nvidia-ml-py"


def test_other_devices_have_a_reason(monkeypatch):
    assert telemetry("cpu").reason == "clocks, power and throttling are reported for NVIDIA GPUs only, not for 'cpu'"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert telemetry("cuda").reason == "NVML reports on NVIDIA GPUs only, and this torch is built for ROCm"


@pytest.mark.usefixtures("nvml")
def test_all_gpus_are_listed_each_followed_by_its_slices():
    found = gpus()
    ids = ["aaaaaaaa", "bbbbbbbb", "cccccccc"]
    assert [one.uuid[4:12] for one in found] == ids
    assert [one.slice_of and one.slice_of[:12] for one in found] == [None, None, "GPU-bbbbbbbb"]
    assert {one.driver for one in found} == {"999.1"}
    assert [one.name for one in found] == ["NVIDIA Fake 80GB", "NVIDIA Fake 80GB", "NVIDIA Fake 80GB MIG 1g.10gb"]
    assert [one.provider.snapshot().memory_used_bytes for one in found] == [100, 200, 300]
    assert [one.provider.trouble() for one in found] == [None, None, None]


@pytest.mark.usefixtures("nvml")
def test_a_lost_gpu_stays_listed_and_says_so(monkeypatch):
    (one,) = gpus()[:1]
    monkeypatch.setenv("FAKE_NVML_RETURN", "15")
    assert one.provider.trouble().startswith("GPU is lost: it has fallen off the bus")
    assert [gpu.name for gpu in gpus()] == [None, None]  # which slices there are is not told, either
    monkeypatch.setenv("FAKE_NVML_RETURN", "3")
    assert one.provider.trouble() is None  # not supported is an answer


@pytest.mark.usefixtures("nvml")
@pytest.mark.parametrize("at", ["handle", "reads"])
def test_one_lost_gpu_of_several_is_listed_with_the_reason_and_without_figures(monkeypatch, at):
    monkeypatch.setenv("FAKE_NVML_LOST", "0")
    if at == "handle":
        monkeypatch.setenv("FAKE_NVML_LOST_AT", at)
    lost, *others = gpus()
    assert (lost.number, lost.name, lost.uuid) == (0, None, None)
    assert lost.provider.reason is None and lost.provider.trouble().startswith("GPU is lost: it has fallen off the bus")
    assert set(dataclasses.asdict(lost.provider.snapshot()).values()) == {None}
    assert [(one.number, one.uuid[4:12]) for one in others] == [(1, "bbbbbbbb"), (1, "cccccccc")]
    assert [one.provider.trouble() for one in others] == [None, None]
    assert [one.provider.snapshot().memory_used_bytes for one in others] == [200, 300]


@pytest.mark.usefixtures("nvml")
def test_no_gpu_is_a_reason(monkeypatch):
    monkeypatch.setenv("FAKE_NVML_GPUS", "0")
    assert gpus() == NoTelemetry("NVML starts, and shows no GPU")


def test_gpus_without_a_library_or_driver_is_a_reason(load, nvml, monkeypatch):
    monkeypatch.setenv("FAKE_NVML_INIT", "9")
    assert gpus() == NoTelemetry("NVML, the library of NVIDIA's driver, does not start: Driver Not Loaded")
    load(None)
    assert "NVML Shared Library Not Found" in gpus().reason


PROGRAM = """
import dataclasses, json, torch
from types import SimpleNamespace
from compiled_logprobs.machine.nvml import telemetry
torch.version.hip = None
torch.cuda.is_available = lambda: True
uuid = "aaaaaaaa-0000-0000-0000-000000000000"
gpu = SimpleNamespace(uuid=uuid, pci_domain_id=0, pci_bus_id=10, pci_device_id=0)
torch.cuda.get_device_properties = lambda device: gpu
print(json.dumps(dataclasses.asdict(telemetry("cuda:1").snapshot())))
"""


@pytest.mark.slow
def test_the_library_is_found_by_its_name(library):
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library.parent)}
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["memory_total_bytes"] == 1000


class Scripted:
    """Reports one snapshot after the other, and the last one for ever."""

    reason = None

    def __init__(self, *snapshots: Snapshot) -> None:
        self.left = list(snapshots)

    def snapshot(self) -> Snapshot:
        return self.left.pop(0) if len(self.left) > 1 else self.left[0]


def seen(clock: int | None, *reasons: str, memory: int | None = None, told: bool = True) -> Snapshot:
    nothing = Snapshot(**dict.fromkeys((field.name for field in dataclasses.fields(Snapshot)), None))
    return dataclasses.replace(
        nothing, sm_clock_mhz=clock, memory_used_bytes=memory, throttle_reasons=reasons if told else None
    )


def watched(provider, until: int = 0):
    """Watch until there are that many snapshots before the end."""
    with Watch(provider, interval=0.001) as watch:
        limit = time.monotonic() + 60
        while len(watch.snapshots) < until and time.monotonic() < limit:
            time.sleep(0.001)
    return watch


def test_a_watch_sums_up_what_it_saw_while_the_gpu_worked():
    provider = Scripted(
        seen(210, "idle", memory=90),
        seen(1000, memory=20),
        seen(1980, "power cap", memory=30),
        seen(1500, "power cap", "board limit"),
        seen(300, "idle"),
    )
    summary = watched(provider, until=4).summary()
    assert summary.snapshots >= 5
    assert (summary.sm_clock_min_mhz, summary.sm_clock_median_mhz) == (1000, 1500)
    assert summary.throttle_reasons == ("board limit", "power cap")
    assert summary.memory_used_max_bytes == 90
    assert summary.sm_clock_max_mhz is None


def test_a_watch_over_an_idle_gpu_says_so():
    summary = watched(Scripted(seen(210, "idle"), seen(230, "idle"))).summary()
    assert summary.sm_clock_min_mhz == 210
    assert summary.throttle_reasons == ("idle",)


def test_a_watch_tells_no_answer_from_no_throttling():
    assert watched(Scripted(seen(None, told=False))).summary().throttle_reasons is None
    silent = watched(Scripted(seen(None))).summary()
    assert silent.throttle_reasons == ()
    assert silent.sm_clock_min_mhz is silent.sm_clock_median_mhz is silent.memory_used_max_bytes is None


def test_a_watch_takes_a_snapshot_before_and_after_and_ends_its_thread():
    with Watch(Scripted(seen(1)), interval=60) as watch:
        assert len(watch.snapshots) == 1
        assert "telemetry" in [thread.name for thread in threading.enumerate()]
    assert len(watch.snapshots) == 2
    assert "telemetry" not in [thread.name for thread in threading.enumerate()]


def test_a_watch_lets_errors_through_and_still_sums_up():
    watch = Watch(Scripted(seen(7)))
    with pytest.raises(ZeroDivisionError), watch:
        raise ZeroDivisionError
    assert watch.summary().snapshots == 2


def test_without_telemetry_there_is_no_thread_and_no_summary():
    threads = threading.active_count()
    with Watch(telemetry("cpu")) as watch:
        assert threading.active_count() == threads
    assert watch.summary() is None

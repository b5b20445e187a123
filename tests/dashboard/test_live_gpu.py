"""Live looks at the machine: through a stand-in for NVML's library, and psutil; their tables, lines, and page."""

import threading
import time

import psutil
import pytest
from compiled_logprobs_dashboard import machine, runs
from compiled_logprobs_dashboard.charts.live_gpu import line
from compiled_logprobs_dashboard.machine import GpuLook, Host, Machine, MachineLook, process_name
from compiled_logprobs_dashboard.tables.live_gpu import HISTORY, history, of, size, throttling

from compiled_logprobs.machine.nvml import NoTelemetry, Snapshot, gpus
from tests.helpers import nvml_library
from tests.helpers.dashboard_pages import charts_of, metrics_of, opened, text_of
from tests.helpers.dashboard_runs import wait_until

FAST_S = 0.01


@pytest.fixture
def with_gpus(nvml, monkeypatch):
    """Two GPUs and a slice."""
    nvml_library.use(nvml, monkeypatch)
    return lambda **environment: [monkeypatch.setenv(f"FAKE_NVML_{name}", text) for name, text in environment.items()]


@pytest.fixture
def watched():
    """Makes machines, whose threads are ended."""
    made = []

    def make(find=gpus, **options) -> Machine:
        made.append(Machine(FAST_S, find, **options))
        return made[-1]

    yield make
    for one in made:
        end(one)


def end(one: Machine) -> None:
    one._asked_at = -1e9
    wait_until(lambda: one._thread is None)


def none() -> NoTelemetry:
    return NoTelemetry("none here")


LABELS = ["0: NVIDIA Fake 80GB", "1: NVIDIA Fake 80GB", "1, slice 0: NVIDIA Fake 80GB MIG 1g.10gb"]


def test_two_gpus_and_a_slice(with_gpus, watched):
    one = watched()
    look = one.looks()[-1]
    assert one.reason is None and [gpu.label for gpu in look.gpus] == LABELS
    assert [gpu.snapshot.memory_used_bytes for gpu in look.gpus] == [100, 200, 300]
    assert [gpu.snapshot.busy_percent for gpu in look.gpus] == [0, 0, 0], "which is another thing than n/a"


def test_a_gpu_that_gets_lost_while_somebody_watches(with_gpus, watched):
    one = watched()
    assert one.looks()[-1].gpus[0].trouble is None
    with_gpus(RETURN="15")
    wait_until(lambda: (one.looks()[-1].gpus[0].trouble or "").startswith("GPU is lost"))
    table = history(one.looks(), FAST_S)
    busy = table.loc[table["device"] == LABELS[0], "busy_percent"]
    assert busy.iloc[0] == 0 and busy.isna().iloc[-1], "the line ends, and does not fall"


def test_without_a_library_there_is_a_reason_and_the_host(nvml, monkeypatch, watched):
    nvml_library.use(None, monkeypatch)
    one = watched()
    assert one.looks()[-1].gpus == () and one.gpus == []
    assert one.reason == "NVML, the library of NVIDIA's driver, does not start: NVML Shared Library Not Found"
    end(one)
    nvml_library.use(nvml, monkeypatch)  # a driver is installed meanwhile
    assert one.looks()[-1].gpus and one.reason is None


def test_the_host_is_what_the_system_says(watched):
    one = watched(none)
    wait_until(lambda: len(one.looks()) > 3)
    host = one.looks()[-1].host
    assert host.memory_total_bytes == psutil.virtual_memory().total
    assert 0 < host.memory_used_bytes < host.memory_total_bytes
    assert 0 < host.memory_free_bytes <= host.memory_total_bytes
    assert host.busy_percent is not None and 0 <= host.busy_percent <= 100
    assert host.processors == psutil.cpu_count()
    assert process_name(psutil.Process().pid) and process_name(2**30) is None


def test_the_share_of_work_is_taken_between_two_looks():
    assert machine._host((150, 1000), (190, 1100)).busy_percent == 40
    assert machine._host(None, (150, 1000)).busy_percent is None
    working, whole = machine._cpu_seconds()
    assert 0 < working < whole


def test_one_thread_serves_all_and_ends_when_nobody_asks(watched):
    before = set(threading.enumerate())  # pages that other tests have shown have threads of their own

    def looking() -> int:
        return [thread.name for thread in set(threading.enumerate()) - before].count("looks at the machine")

    one = watched(none, kept=5)
    tabs = [threading.Thread(target=one.looks) for _ in range(8)]
    for tab in tabs:
        tab.start()
    for tab in tabs:
        tab.join()
    assert looking() == 1
    wait_until(lambda: len(one.looks()) == 5)
    newest = one.looks()[-1].at
    wait_until(lambda: one.looks()[-1].at > newest)
    assert len(one.looks()) == 5, "only so many are kept"
    end(one)
    assert looking() == 0
    began = time.time()
    assert one.looks()[-1].at >= began, "and it begins anew"


HOST = Host(50.0, 2, 1.0, None, 3, 10, 7)


def at(seconds: float, **gpu: object) -> MachineLook:
    if not gpu:
        return MachineLook(seconds, HOST, ())
    fields = dict.fromkeys(Snapshot.__dataclass_fields__)
    return MachineLook(seconds, HOST, (GpuLook("0: <b>x</b>", Snapshot(**{**fields, **gpu}), None),))


def test_history_has_a_row_a_look_and_a_gap_where_nobody_looked():
    table = history([at(1), at(2), at(9)], 1.0)
    assert list(table["busy_percent"].isna()) == [False, False, True, False]
    assert set(table["device"]) == {"this machine"} and table["at"].is_monotonic_increasing
    assert table["power_w"].isna().all()
    assert list(history([], 1.0).columns) == ["at", "device", *HISTORY]
    low, high = line(history([at(1000)], 1.0), "busy_percent", "time busy", "%").layout.xaxis.range
    assert (high - low).total_seconds() == 30, "a first look has an axis of seconds"
    assert line(table.iloc[:0], "power_w", "power", "W").data == ()


def test_a_line_breaks_where_nothing_is_told_and_shows_no_markup():
    table = history([at(1, busy_percent=0), at(2), at(3, busy_percent=30), at(4, busy_percent=None, power_w=1.5)], 1.0)
    figure = line(table, "busy_percent", "time busy", "%", top=100)
    trace = next(trace for trace in figure.data if trace.name == "0: &lt;b&gt;x&lt;/b&gt;")
    assert list(trace.y)[:2] == [0, 30] and trace.y[2] != trace.y[2] and not trace.connectgaps
    assert tuple(figure.layout.yaxis.range) == (0, 100) and figure.layout.yaxis.title.text == "time busy, %"
    assert line(table, "temperature_c", "temperature", "°C").data == ()


def test_what_is_not_told_is_never_0():
    for value, limit, said in (
        (None, None, "n/a"),
        (0, None, "0 MHz"),
        (1, 2, "1 of 2 MHz"),
        (None, 2, "n/a of 2 MHz"),
    ):
        assert of(value, limit, "MHz") == said
    assert size(None) == "n/a" and size(0) == "0.0 GiB" and size(3 * 2**30) == "3.0 GiB"


@pytest.mark.parametrize(
    ("bits", "said"),
    [
        ("0x0", "nothing holds the clocks down"),
        ("0x1", "idle: clocks are low for lack of work"),
        ("0x44", "clocks are held down: power cap, thermal slowdown by the hardware"),
        ("0x4000", "clocks are held down: unknown reason 0x4000"),
    ],
)
def test_throttling_in_a_sentence(with_gpus, bits, said):
    with_gpus(REASONS=bits)
    assert throttling(gpus()[0].provider.snapshot().throttle_reasons) == said
    assert throttling(None) == "n/a: the driver does not say what holds the clocks down"


# --- the page ---------------------------------------------------------------------------------------------------------

OF_A_GPU = ("A kernel was running", "Power", "Temperature")


def shown(label: str, at) -> list[str]:
    return [metric.value for metric in at.metric if metric.label == label]


def test_without_a_library_it_says_so_and_shows_this_machine(monkeypatch):
    nvml_library.use(None, monkeypatch)
    at = opened("live_gpu")
    assert not at.exception
    assert "No NVIDIA GPU is reported on here: NVML, the library of NVIDIA's driver, does not start" in text_of(at)
    assert {"Processors busy", "Load", "Memory in use"} <= metrics_of(at).keys() and not shown("Power", at)
    assert "Not told here, so not drawn: power" in text_of(at)


def test_what_gpus_tell(with_gpus):
    with_gpus(REASONS="0x44")
    at = opened("live_gpu")
    assert not at.exception and [one.value.replace("\\", "") for one in at.subheader][:3] == LABELS
    assert shown("A kernel was running", at)[0] == "0 %" and shown("Power", at)[0] == "350 W"
    assert shown("Temperature", at)[0] == "60 °C" and "1001 MHz" in [metric.value for metric in at.metric]
    assert "MIG on" in text_of(at) and "MIG off" in text_of(at) and "driver 999.1" in text_of(at)
    assert any("power cap, thermal slowdown by the hardware" in one.value for one in at.warning)
    processes = [frame.value for frame in at.dataframe if "process" in frame.value]
    assert list(processes[0]["process"]) == [4711, 4712] and list(processes[0]["memory"]) == ["0.0 GiB", "n/a"]
    assert "does not mean that the GPU is full" in next(one.help for one in at.metric if one.label == OF_A_GPU[0])
    assert charts_of(at) and all(chart.alt for chart in charts_of(at))


def test_a_single_idle_gpu(with_gpus):
    with_gpus(GPUS="1", REASONS="0x1")
    at = opened("live_gpu")
    assert not at.warning and "idle: clocks are low for lack of work" in text_of(at)
    assert "No process computes on it" in text_of(at)


def test_what_this_user_may_not_see_is_na(with_gpus):
    with_gpus(HIDDEN="4", GPUS="2")
    at = opened("live_gpu")
    assert "Processes: n/a" in text_of(at) and "No process computes on it" not in text_of(at)


@pytest.mark.parametrize(("code", "said"), [("15", "GPU is lost"), ("999", "Unknown Error"), ("3", "")])
def test_a_gpu_that_does_not_answer_shows_no_figure(with_gpus, code, said):
    with_gpus(RETURN=code)
    at = opened("live_gpu")
    assert not at.exception and all(said in one.value for one in at.error) and len(at.error) == (2 if said else 0)
    assert {value for label in OF_A_GPU for value in shown(label, at)} == {"n/a"}


def test_a_lost_gpu_is_shown_and_so_are_the_others(with_gpus):
    with_gpus(LOST="0", LOST_AT="handle")
    at = opened("live_gpu")
    assert [one.value.replace("\\", "") for one in at.subheader][:3] == ["0: n/a", *LABELS[1:]]
    (error,) = at.error
    assert "GPU is lost: it has fallen off the bus" in error.value.replace("\\", "")
    for label in OF_A_GPU:
        assert shown(label, at)[0] == "n/a" and "n/a" not in shown(label, at)[1:3], label


def test_while_a_run_measures_it_does_not_look_by_itself(with_gpus, monkeypatch):
    monkeypatch.setattr(runs.Runs, "is_measuring", True)
    (refresh,) = opened("live_gpu").get("button_group")
    assert refresh.value == "off"

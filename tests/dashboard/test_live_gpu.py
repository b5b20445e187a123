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
from tests.helpers.dashboard_pages import charts_of, metrics_of, opened, table_of, text_of
from tests.helpers.dashboard_runs import wait_until

FAST_S = 0.01


@pytest.fixture
def with_gpus(nvml, monkeypatch):
    """Two GPUs and a slice; sets what the stand-in is to do."""
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
    for each in made:
        end(each)


def end(watching: Machine) -> None:
    watching._asked_at = -1e9
    wait_until(lambda: watching._thread is None)


LABELS = ["0: NVIDIA Fake 80GB", "1: NVIDIA Fake 80GB", "1, slice 0: NVIDIA Fake 80GB MIG 1g.10gb"]


def test_a_gpu_that_gets_lost_while_somebody_watches(with_gpus, watched):
    watching = watched()
    look = watching.looks()[-1]
    assert watching.reason is None and [gpu.label for gpu in look.gpus] == LABELS
    assert [gpu.snapshot.memory_used_bytes for gpu in look.gpus] == [100, 200, 300]
    assert look.gpus[0].trouble is None and look.gpus[0].snapshot.busy_percent == 0, "which is another thing than n/a"
    with_gpus(RETURN="15")
    wait_until(lambda: (watching.looks()[-1].gpus[0].trouble or "").startswith("GPU is lost"))
    table = history(watching.looks(), FAST_S)
    busy = table.loc[table["device"] == LABELS[0], "busy_percent"]
    assert busy.iloc[0] == 0 and busy.isna().iloc[-1], "the line ends, and does not fall"


def test_the_host_is_what_the_system_says(watched):
    host = watched(lambda: NoTelemetry("none here")).looks()[-1].host
    assert host.memory_total_bytes == psutil.virtual_memory().total > host.memory_used_bytes > 0
    assert host.processors == psutil.cpu_count() and 0 <= host.busy_percent <= 100
    assert machine._host((150, 1000), (190, 1100)).busy_percent == 40, "between two looks"
    assert process_name(psutil.Process().pid) and process_name(2**30) is None


def test_one_thread_serves_all_and_ends_when_nobody_asks(watched):
    watching = watched(lambda: NoTelemetry("none here"), kept=5)
    before = set(threading.enumerate())  # pages that other tests have shown have threads of their own
    tabs = [threading.Thread(target=watching.looks) for _ in range(8)]
    for act in (threading.Thread.start, threading.Thread.join):
        for tab in tabs:
            act(tab)
    assert [thread.name for thread in set(threading.enumerate()) - before] == ["looks at the machine"]
    wait_until(lambda: len(watching.looks()) == 5)
    newest = watching.looks()[-1].at
    wait_until(lambda: watching.looks()[-1].at > newest)
    assert len(watching.looks()) == 5, "only so many are kept"
    end(watching)
    began = time.time()
    assert watching.looks()[-1].at >= began, "and it begins anew"


HOST = Host(50.0, 2, 1.0, None, 3, 10, 7)


def at(seconds: float, **gpu: object) -> MachineLook:
    if not gpu:
        return MachineLook(seconds, HOST, ())
    fields = dict.fromkeys(Snapshot.__dataclass_fields__)
    return MachineLook(seconds, HOST, (GpuLook("0: <b>x</b>", Snapshot(**{**fields, **gpu}), None),))


def test_history_has_a_gap_where_nobody_looked_or_nothing_is_told():
    table = history([at(1), at(2), at(9)], 1.0)
    assert list(table["busy_percent"].isna()) == [False, False, True, False]
    assert set(table["device"]) == {"this machine"} and table["power_w"].isna().all()
    assert list(history([], 1.0).columns) == ["at", "device", *HISTORY]
    low, high = line(history([at(1000)], 1.0), "busy_percent", "time busy", "%").layout.xaxis.range
    assert (high - low).total_seconds() == 30, "a first look has an axis of seconds"
    table = history([at(1, busy_percent=0), at(2), at(3, busy_percent=30), at(4, busy_percent=None, power_w=1.5)], 1.0)
    figure = line(table, "busy_percent", "time busy", "%", top=100)
    (trace,) = (trace for trace in figure.data if trace.name == "0: &lt;b&gt;x&lt;/b&gt;")
    assert list(trace.y)[:2] == [0, 30] and trace.y[2] != trace.y[2] and not trace.connectgaps
    assert tuple(figure.layout.yaxis.range) == (0, 100) and figure.layout.yaxis.title.text == "time busy, %"
    assert line(table, "temperature_c", "temperature", "°C").data == line(table[:0], "power_w", "power", "W").data == ()


def test_what_is_not_told_is_never_0():
    said = {(None, None): "n/a", (0, None): "0 MHz", (1, 2): "1 of 2 MHz", (None, 2): "n/a of 2 MHz"}
    assert {pair: of(*pair, "MHz") for pair in said} == said
    assert (size(None), size(0), size(3 * 2**30)) == ("n/a", "0.0 GiB", "3.0 GiB")
    assert throttling(None) == "n/a: the driver does not say what holds the clocks down"
    assert throttling(()) == "nothing holds the clocks down"


OF_A_GPU = ("A kernel was running", "Power", "Temperature")


def shown(label: str, at) -> list[str]:
    return [metric.value for metric in at.metric if metric.label == label]


def test_without_a_library_it_says_so_and_shows_this_machine(monkeypatch):
    nvml_library.use(None, monkeypatch)
    at = opened("live_gpu")
    assert "No NVIDIA GPU is reported on here: NVML, the library of NVIDIA's driver, does not start" in text_of(at)
    assert {"Processors busy", "Load", "Memory in use"} <= metrics_of(at).keys() and not shown("Power", at)
    assert "Not told here, so not drawn: power" in text_of(at) and not at.exception


def test_what_gpus_tell(with_gpus):
    with_gpus(REASONS="0x44")
    at = opened("live_gpu")
    assert not at.exception and [title.value.replace("\\", "") for title in at.subheader][:3] == LABELS
    for label, value in zip(OF_A_GPU, ("0 %", "350 W", "60 °C"), strict=True):
        assert shown(label, at)[0] == value
    assert "MIG on" in text_of(at) and "MIG off" in text_of(at) and "driver 999.1" in text_of(at)
    assert any("power cap, thermal slowdown by the hardware" in warning.value for warning in at.warning)
    processes = table_of(at, "process")
    assert list(processes["process"]) == [4711, 4712] and list(processes["memory"]) == ["0.0 GiB", "n/a"]
    assert charts_of(at) and all(chart.alt for chart in charts_of(at))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"GPUS": "1", "REASONS": "0x1"}, ["idle: clocks are low for lack of work", "No process computes on it"]),
        ({"GPUS": "2", "HIDDEN": "4"}, ["Processes: n/a"]),
        ({"RETURN": "15"}, ["The driver does not answer for this GPU: GPU is lost"]),
        ({"RETURN": "3"}, ["Processes: n/a"]),
        ({"LOST": "0", "LOST_AT": "handle"}, ["GPU is lost: it has fallen off the bus", "0: n/a", *LABELS[1:]]),
    ],
    ids=str,
)
def test_what_is_idle_hidden_or_lost_is_said(with_gpus, settings, said):
    with_gpus(**settings)
    at = opened("live_gpu")
    assert not at.exception and all(words in text_of(at) for words in said)
    for label in OF_A_GPU:
        is_lost = [value == "n/a" for value in shown(label, at)]
        assert is_lost[0] == ("RETURN" in settings or "LOST" in settings), "no figure of a GPU that does not answer"
        assert all(is_lost) == ("RETURN" in settings), "and all of one that does"


def test_while_a_run_measures_it_does_not_look_by_itself(with_gpus, monkeypatch):
    monkeypatch.setattr(runs.Runs, "is_measuring", True)
    (refresh,) = opened("live_gpu").get("button_group")
    assert refresh.value == "off"

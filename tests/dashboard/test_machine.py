"""Live looks at the machine: through a stand-in for NVML's library, and through this machine's own /proc."""

import os
import threading
import time

import pytest
from compiled_logprobs_dashboard import machine
from compiled_logprobs_dashboard.charts.live import line
from compiled_logprobs_dashboard.machine import HISTORY, GpuLook, Host, Look, Machine, history, of, size, throttling

from compiled_logprobs.machine.nvml import NoTelemetry, Snapshot, gpus
from tests.helpers.nvml_library import build, use

FAST_S = 0.01
LIMIT_S = 60


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def nvml(library, monkeypatch):
    use(library, monkeypatch)


def nothing() -> NoTelemetry:
    return NoTelemetry("none here")


def wait_until(true):
    until = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < until
        time.sleep(0.005)


def ended(one: Machine):
    one._asked_at = -1e9
    wait_until(lambda: one._thread is None)


@pytest.mark.usefixtures("nvml")
def test_two_gpus_and_a_slice():
    one = Machine(FAST_S)
    look = one.looks()[-1]
    assert one.reason is None
    assert [gpu.label for gpu in look.gpus] == [
        "0: NVIDIA Fake 80GB",
        "1: NVIDIA Fake 80GB",
        "1, slice 0: NVIDIA Fake 80GB MIG 1g.10gb",
    ]
    assert [gpu.snapshot.memory_used_bytes for gpu in look.gpus] == [100, 200, 300]
    assert [gpu.snapshot.busy_percent for gpu in look.gpus] == [0, 0, 0]  # which is another thing than n/a
    ended(one)


@pytest.mark.usefixtures("nvml")
def test_one_gpu(monkeypatch):
    monkeypatch.setenv("FAKE_NVML_GPUS", "1")
    one = Machine(FAST_S)
    assert [gpu.label for gpu in one.looks()[-1].gpus] == ["0: NVIDIA Fake 80GB"]
    ended(one)


@pytest.mark.usefixtures("nvml")
def test_a_gpu_that_gets_lost_while_somebody_watches(monkeypatch):
    one = Machine(FAST_S)
    assert one.looks()[-1].gpus[0].trouble is None
    monkeypatch.setenv("FAKE_NVML_RETURN", "15")
    wait_until(lambda: (one.looks()[-1].gpus[0].trouble or "").startswith("GPU is lost"))
    table = history(one.looks(), FAST_S)
    first = table[table["device"] == "0: NVIDIA Fake 80GB"]
    assert (
        first["busy_percent"].iloc[0] == 0 and first["busy_percent"].isna().iloc[-1]
    )  # the line ends, and does not fall
    ended(one)


def test_without_a_library_there_is_a_reason_and_the_host(library, monkeypatch):
    use(None, monkeypatch)
    one = Machine(FAST_S)
    look = one.looks()[-1]
    assert one.reason == "NVML, the library of NVIDIA's driver, does not start: NVML Shared Library Not Found"
    assert look.gpus == () and one.gpus == []
    ended(one)
    use(library, monkeypatch)  # a driver is installed meanwhile
    assert one.looks()[-1].gpus and one.reason is None
    ended(one)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="/proc is Linux's")
def test_the_host_is_what_proc_says():
    one = Machine(FAST_S, nothing)
    wait_until(lambda: len(one.looks()) > 3)
    host = one.looks()[-1].host
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert host.memory_total_bytes == pytest.approx(total, rel=0.05)
    assert 0 < host.memory_used_bytes < host.memory_total_bytes
    assert 0 < host.memory_free_bytes <= host.memory_total_bytes
    assert host.busy_percent is not None and 0 <= host.busy_percent <= 100
    assert host.processors == os.cpu_count()
    assert machine.process_name(os.getpid())
    ended(one)


def test_a_system_without_proc_tells_nothing_rather_than_0(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "PROC", tmp_path)
    one = Machine(FAST_S, nothing)
    host = one.looks()[-1].host
    assert host.busy_percent is host.clock_mhz is host.memory_used_bytes is host.memory_total_bytes is None
    assert machine.process_name(1) is None
    ended(one)


def test_the_share_of_work_is_taken_between_two_looks(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "PROC", tmp_path)
    (tmp_path / "stat").write_text("cpu  100 0 50 800 50 0 0 0 0 0\ncpu0 1 2\n")
    before = machine._cpu_ticks()
    assert before == (150, 1000)
    (tmp_path / "stat").write_text("cpu  130 0 60 850 60 0 0 0 0 0\n")
    assert machine._host(before, machine._cpu_ticks()).busy_percent == 40
    assert machine._host(None, before).busy_percent is None
    (tmp_path / "stat").write_text("cpu  1 2\n")
    assert machine._cpu_ticks() is None


def test_one_thread_serves_all_and_ends_when_nobody_asks():
    before = set(threading.enumerate())  # pages that other tests have shown have threads of their own

    def looking() -> int:
        return [thread.name for thread in set(threading.enumerate()) - before].count("looks at the machine")

    one = Machine(FAST_S, nothing)
    tabs = [threading.Thread(target=one.looks) for _ in range(8)]
    for tab in tabs:
        tab.start()
    for tab in tabs:
        tab.join()
    assert looking() == 1
    ended(one)
    seen = len(one._looks)
    assert looking() == 0
    assert len(one.looks()) > seen  # and it begins anew
    ended(one)


def test_only_so_many_are_kept():
    one = Machine(0.0001, nothing, kept=5)
    wait_until(lambda: len(one.looks()) == 5)
    newest = one.looks()[-1].at
    wait_until(lambda: one.looks()[-1].at > newest)
    assert len(one.looks()) == 5
    ended(one)


HOST = Host(50.0, 2, 1.0, None, 3, 10, 7)


def at(seconds: float, **gpu: object) -> Look:
    if not gpu:
        return Look(seconds, HOST, ())
    fields = dict.fromkeys(Snapshot.__dataclass_fields__)
    return Look(seconds, HOST, (GpuLook("0: <b>x</b>", Snapshot(**{**fields, **gpu}), None),))


def test_history_has_a_row_a_look_and_a_gap_where_nobody_looked():
    table = history([at(1), at(2), at(9)], 1.0)
    assert list(table["busy_percent"].isna()) == [False, False, True, False]
    assert set(table["device"]) == {"this machine"} and table["at"].is_monotonic_increasing
    assert table["power_w"].isna().all()
    assert list(history([], 1.0).columns) == ["at", "device", *HISTORY]


def test_a_first_look_has_an_axis_of_seconds():
    table = history([at(1000)], 1.0)
    low, high = line(table, "busy_percent", "time busy", "%").layout.xaxis.range
    assert (high - low).total_seconds() == 30 and line(table.iloc[:0], "power_w", "power", "W").data == ()


def test_a_line_breaks_where_nothing_is_told_and_shows_no_markup():
    table = history([at(1, busy_percent=0), at(2), at(3, busy_percent=30), at(4, busy_percent=None, power_w=1.5)], 1.0)
    figure = line(table, "busy_percent", "time busy", "%", top=100)
    by_name = {trace.name: trace for trace in figure.data}
    trace = by_name["0: &lt;b&gt;x&lt;/b&gt;"]
    assert list(trace.y)[:2] == [0, 30] and trace.y[2] != trace.y[2] and not trace.connectgaps
    assert tuple(figure.layout.yaxis.range) == (0, 100) and figure.layout.yaxis.title.text == "time busy, %"
    assert line(table, "temperature_c", "temperature", "°C").data == ()


@pytest.mark.parametrize(
    ("value", "limit", "said"),
    [(None, None, "n/a"), (0, None, "0 MHz"), (1410, 1980, "1410 of 1980 MHz"), (None, 1980, "n/a of 1980 MHz")],
)
def test_what_is_not_told_is_never_0(value, limit, said):
    assert of(value, limit, "MHz") == said
    assert size(None) == "n/a" and size(0) == "0.0 GiB" and size(3 * 2**30) == "3.0 GiB"


@pytest.mark.usefixtures("nvml")
@pytest.mark.parametrize(
    ("bits", "said"),
    [
        ("0x0", "nothing holds the clocks down"),
        ("0x1", "idle: clocks are low for lack of work"),
        ("0x44", "clocks are held down: power cap, thermal slowdown by the hardware"),
        ("0x4000", "clocks are held down: unknown reason 0x4000"),
    ],
)
def test_throttling_in_a_sentence(monkeypatch, bits, said):
    monkeypatch.setenv("FAKE_NVML_REASONS", bits)
    assert throttling(gpus()[0].provider.snapshot().throttle_reasons) == said
    assert throttling(None) == "n/a: the driver does not say what holds the clocks down"

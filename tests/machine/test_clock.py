"""Time, cache and memory of a device: the CPU's for real, CUDA's through a stand-in."""

import sys
import time

import psutil
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from compiled_logprobs import InputError
from compiled_logprobs.machine import clock
from compiled_logprobs.machine.clock import (
    extra_peak_bytes,
    flush_cache,
    free_memory,
    time_call,
    why_no_peak,
    with_index,
)
from tests.helpers.fake_cuda import FakeCuda

MIB = 2**20
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone shows it")


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(clock, "cuda", fake)
    clock._spin.cache_clear()
    yield fake
    clock._spin.cache_clear()


@pytest.fixture
def no_buffer():
    """No buffer is left over from an earlier test, or for a later one."""
    clock._scratch.cache_clear()
    yield
    clock._scratch.cache_clear()


class Operations(TorchDispatchMode):
    """Which operation ran on how many bytes, where."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        first = args[0] if args and isinstance(args[0], torch.Tensor) else result
        self.seen.append((function._overloadpacket.__name__, first.nbytes, str(first.device)))
        return result


def write(folder, files):
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_the_time_of_a_call_on_the_cpu_lies_within_the_time_around_it():
    began = time.perf_counter()
    took = time_call(lambda: time.sleep(0.01), "cpu")
    assert 0.01 <= took.seconds == took.host_seconds <= time.perf_counter() - began


def test_the_time_of_a_call_on_a_gpu_is_that_between_its_events(cuda):
    def kernel():
        time.sleep(0.01)
        cuda.now_ms += 2.5

    took = time_call(kernel, "cuda")
    assert took.seconds == pytest.approx(0.0025) and took.host_seconds >= 0.01
    cuda.calls.clear()
    time_call(lambda: cuda.calls.append("call"), torch.device("cuda:1"))
    assert cuda.calls[1:] == ["record on stream of cuda:1", "call", "record on stream of cuda:1", "wait"]
    time_call(lambda: None, torch.device("cuda:3"))
    assert cuda.calls[-3:] == ["record on stream of cuda:3", "record on stream of cuda:3", "wait"]


@pytest.mark.parametrize("has_spin", [True, False])
@pytest.mark.parametrize(("asked", "gets"), [({}, 1.0), ({"ahead_s": 0.004}, 4.0), ({"ahead_s": 7.0}, 20.0)])
def test_a_gpu_is_busy_before_the_clock_starts_so_that_it_does_not_wait_for_the_host(
    cuda, monkeypatch, has_spin, asked, gets
):
    """By a spin, of which a first one tells how long it takes; where torch has none, by reading."""
    if not has_spin:
        monkeypatch.setattr(cuda, "_sleep", None)
        monkeypatch.setattr(clock, "flush_cache", lambda device: FakeCuda._sleep(cuda, 50_000))
    time_call(lambda: None, "cuda")
    cuda.calls.clear()
    began = cuda.now_ms
    time_call(lambda: cuda.calls.append(f"call after {cuda.now_ms - began:.2f} ms"), "cuda", **asked)
    sleeps = cuda.calls[: cuda.calls.index("record on stream of cuda:1")]
    assert len(sleeps) == (1 if has_spin else gets / 0.05) and {call[:5] for call in sleeps} == {"sleep"}
    assert f"call after {gets:.2f} ms" in cuda.calls


@pytest.mark.parametrize(("named", "meant"), [("cuda", "cuda:1"), ("cuda:3", "cuda:3"), ("cpu", "cpu")])
def test_a_gpu_without_an_index_is_the_one_that_is_current_here(cuda, named, meant):
    assert with_index(torch.device(named)) == clock.measurable(named) == torch.device(meant)


def test_what_is_queued_is_waited_for_where_this_process_uses_the_device(cuda):
    """Elsewhere waiting would take memory of the device, for a context."""
    clock.finish_queued(torch.device("cuda:1"))
    clock.finish_queued(torch.device("cpu"))
    assert cuda.calls == []
    cuda.reserved = 2**21
    clock.finish_queued(torch.device("cuda:1"))
    assert cuda.calls == ["synchronize cuda:1"]


def test_other_devices_are_refused():
    message = "got device 'meta'; time and memory are measured on 'cpu' and 'cuda' devices. Name one of these."
    with pytest.raises(InputError, match=message):
        time_call(print, "meta")


@needs_linux
def test_the_cpu_cache_is_its_last_level_each_instance_once(monkeypatch, tmp_path):
    l1 = {"level": "1\n", "size": "32K\n"}
    l3 = {"level": "3\n", "size": "16384K\n"}
    for cpu, shared in enumerate(("0-1", "0-1", "2-3", "2-3", "4")):
        caches = {"index0": l1 | {"shared_cpu_list": str(cpu)}, "index3": l3 | {"shared_cpu_list": f"{shared}\n"}}
        for name, files in caches.items():
            write(tmp_path / f"cpu{cpu}" / "cache" / name, files)
    write(tmp_path / "cpu0/cache/index4", {"level": "unreadable"})
    monkeypatch.setattr(clock, "CPU_CACHES", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2})
    assert clock.cache_bytes("cpu") == 2 * 16 * MIB  # CPU 4 is not this process's
    monkeypatch.setattr(clock, "CPU_CACHES", tmp_path / "nothing")
    assert clock.cache_bytes("cpu") == 64 * MIB  # where it is not told


def test_the_cache_of_a_gpu(cuda, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    assert clock.cache_bytes("cuda") == 50 * MIB
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert clock.cache_bytes("cuda") == 256 * MIB  # what lies behind its L2


@pytest.mark.usefixtures("no_buffer")
@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_flushing_reads_twice_the_cache_and_keeps_the_buffer(cuda, monkeypatch, device):
    monkeypatch.setattr(clock, "cache_bytes", lambda device: 3 * MIB)
    with FakeTensorMode(), Operations() as operations:
        flush_cache(device)
        flush_cache(torch.device(device))
    # Its pages were written: one that never was is a page of zeros.
    assert operations.seen == [("ones", 6 * MIB, device), *[("amax", 6 * MIB, device)] * 2]


def test_the_free_memory(cuda):
    assert free_memory("cuda") == cuda.free
    assert 0 < free_memory("cpu") <= psutil.virtual_memory().total


@needs_linux
@pytest.mark.parametrize(
    ("line", "files", "expected"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "5000\n", "a/memory.current": "1000\n"}, 4000),
        (  # the page cache that can be dropped
            "0::/\n",
            {"memory.max": "5000", "memory.current": "4500", "memory.stat": "anon 9\ninactive_file 300\nfile 400\n"},
            800,
        ),
        (  # in a container, without the group's own folder
            "4:memory:/elsewhere/x\n0::/\n",
            {"memory/memory.limit_in_bytes": "5000", "memory/memory.usage_in_bytes": "2000"},
            3000,
        ),
        (
            "4:hugetlb,memory:/x\n3:cpu:/y\n",
            {
                "memory/x/memory.limit_in_bytes": "5000",
                "memory/x/memory.usage_in_bytes": "6000",
                "memory/x/memory.stat": "inactive_file 7\ntotal_inactive_file 1100\n",
            },
            100,
        ),
    ],
)
def test_the_limit_of_a_control_group_counts(monkeypatch, tmp_path, line, files, expected):
    write(tmp_path, {"self/cgroup": line})
    write(tmp_path / "groups", files)
    monkeypatch.setattr(clock, "PROCESS", tmp_path / "self")
    monkeypatch.setattr(clock, "CGROUPS", tmp_path / "groups")
    assert free_memory("cpu") == expected


@needs_linux
def test_the_peak_on_the_cpu_counts_what_was_freed_again():
    if (reason := why_no_peak("cpu")) is not None:
        pytest.skip(reason)

    def function():
        torch.ones(64 * MIB, dtype=torch.uint8)
        return torch.ones(16 * MIB, dtype=torch.uint8)

    function()
    assert 60 * MIB < extra_peak_bytes(function, "cpu") < 100 * MIB
    assert extra_peak_bytes(lambda: None, "cpu") < 20 * MIB  # an earlier peak does not count


def test_the_peak_on_a_gpu_is_that_of_its_allocator(cuda):
    def function():
        cuda.take(300)
        cuda.take(50)
        cuda.take(-300)

    cuda.peak = 5000  # an earlier one
    assert extra_peak_bytes(function, "cuda") == 350
    assert cuda.calls == [f"{call} cuda:1" for call in ("synchronize", "reset", "allocated", "synchronize", "peak")]
    assert why_no_peak("cuda") is None


def test_where_no_peak_is_measured_there_is_a_reason_and_no_call(monkeypatch, tmp_path):
    monkeypatch.setattr(clock, "PROCESS", tmp_path)
    assert extra_peak_bytes(pytest.fail, "cpu") is None
    monkeypatch.setattr(sys, "platform", "linux")
    assert why_no_peak("cpu") == (
        "this system does not let a process reset and read the peak of its memory (/proc/self/clear_refs, VmHWM)"
    )
    monkeypatch.setattr(sys, "platform", "darwin")
    assert why_no_peak("cpu") == "the peak of memory in use is measured on Linux and on CUDA devices only"

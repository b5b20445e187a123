"""The bytes that must move, the bandwidth measured here, and the share of it that a time is."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from compiled_logprobs.machine import bandwidth
from compiled_logprobs.machine.bandwidth import Bandwidth, measured_bandwidth, minimum_bytes, percent_of_bandwidth
from compiled_logprobs.machine.clock import Time
from compiled_logprobs.problem import Problem

MIB = 2**20
N, V = 1000, 50000
RATES = Bandwidth(read=10e9, copy=20e9, in_place=40e9, buffer_bytes=64 * MIB)


@pytest.fixture(autouse=True)
def forget():
    """What other tests measured, or pretended to."""
    bandwidth._measured.cache_clear()
    yield
    bandwidth._measured.cache_clear()


def problem(dtype=torch.bfloat16, **options) -> Problem:
    return Problem("cpu", N, V, dtype, **options)


@pytest.mark.parametrize(
    ("what", "logits", "per_row"),
    [
        (problem(), 1, 8 + 4),
        (problem(torch.float64, out_dtype=torch.float64), 4, 8 + 8),
        (problem(labels_per_row=5, entropy=True), 1, 5 * (8 + 4) + 4),
        (problem(out_dtype=torch.bfloat16, temperature="number"), 1, 8 + 2),
        (problem(needs_grad=True, logsumexp=True, argmax=True, sum_p_squared=True), 3, 2 * (8 + 4 + 4 + 8) + 8 + 4),
        (problem(needs_grad=True, inplace_backward=True), 3, 2 * (8 + 4 + 8)),
        (problem(needs_grad=True, entropy=True, temperature="per_token"), 3, 2 * (8 + 4 + 4 + 8 + 4)),
    ],
    ids=lambda value: value.details() or str(value) if isinstance(value, Problem) else str(value),
)
def test_the_bytes_that_must_move(what, logits, per_row):
    """`logits`: how often N x V numbers of two bytes are moved."""
    assert minimum_bytes(what) == logits * N * V * 2 + N * per_row
    assert minimum_bytes(what._replace(rows=0)) == percent_of_bandwidth(what._replace(rows=0), 1.0, RATES) == 0


def test_the_percentage_is_of_the_time_that_the_bytes_take():
    shortest = minimum_bytes(problem()) / RATES.read
    assert percent_of_bandwidth(problem(), 4 * shortest, RATES) == pytest.approx(25)
    for inplace, rate in (False, RATES.copy), (True, RATES.in_place):
        both, logits = problem(needs_grad=True, inplace_backward=inplace), N * V * 2
        assert percent_of_bandwidth(both, logits / 10e9 + 2 * logits / rate, RATES) == pytest.approx(100, rel=1e-2)


def test_the_bandwidth_here_is_measured_once(monkeypatch):
    """For a number of threads."""
    monkeypatch.setattr(bandwidth, "_buffer_bytes", lambda device: MIB)
    measured = measured_bandwidth("cpu")
    assert min(measured.read, measured.copy, measured.in_place) > 0
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 99)
        assert measured_bandwidth("cpu") is not measured
    monkeypatch.setattr(bandwidth, "time_call", pytest.fail)
    assert measured_bandwidth(torch.device("cpu")) is measured


@pytest.mark.parametrize("launches", [1, 4])
def test_the_best_repetition_counts(monkeypatch, launches):
    """Of as many launches between two looks at the clock as a device needs."""
    monkeypatch.setattr(bandwidth, "_buffer_bytes", lambda device: 8 * MIB)
    monkeypatch.setitem(bandwidth.LAUNCHES, "cpu", launches)
    times = iter([3.0, 0.5, *[2.0] * 5, 4.0, *[8.0] * 6, *[16.0] * 7])
    calls = []

    def time_call(function, device):
        with Counted() as counted:
            function()
        calls.append(counted.operations)
        return Time(launches * next(times), 99.0)

    monkeypatch.setattr(bandwidth, "time_call", time_call)
    assert measured_bandwidth("cpu") == Bandwidth(16 * MIB, 16 * MIB / 4, MIB, 8 * MIB)
    assert calls == [launches] * 21


class Counted(TorchDispatchMode):
    """How many operations of torch ran."""

    operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("device", "cache", "free", "expected"),
    [
        ("cpu", 32 * MIB, 64 * 1024 * MIB, 128 * MIB),
        ("cpu", 32 * MIB, 1024 * MIB, 64 * MIB),
        ("cpu", 32 * MIB, 1000, MIB),
        ("cuda", 50 * MIB, 64 * 1024 * MIB, 2048 * MIB),
    ],
)
def test_the_buffer_is_larger_than_the_cache_and_takes_little_of_the_free_memory(
    monkeypatch, device, cache, free, expected
):
    monkeypatch.setattr(bandwidth, "cache_bytes", lambda device: cache)
    monkeypatch.setattr(bandwidth, "free_memory", lambda device: free)
    assert bandwidth._buffer_bytes(torch.device(device)) == expected

"""Running candidates: what they get, what is kept of them, and what becomes of those that fail."""

import itertools

import pytest
import torch

from compiled_logprobs.backends.eager import Eager
from compiled_logprobs.machine import clock
from compiled_logprobs.machine.clock import Time
from compiled_logprobs.operation.contract import Results
from compiled_logprobs.problem import Problem, collapse, layout_of
from compiled_logprobs.tuning import rounds as rounds_module
from compiled_logprobs.tuning.rounds import Measurement

PLAIN = Problem("cpu", rows=6, vocab=1024, dtype=torch.float32)
WITH_GRADIENT = PLAIN._replace(needs_grad=True)
IN_PLACE = WITH_GRADIENT._replace(inplace_backward=True)


class Watched(Eager):
    """Eager, with a hook before each pass."""

    def __init__(self, before_forward=lambda call, logits: None, before_backward=lambda logits: None):
        self.calls, self.backwards = 0, 0
        self.before_forward, self.before_backward = before_forward, before_backward
        self.addresses, self.arguments, self.layouts = [], [], set()

    def forward(self, inputs, wanted):
        logits = inputs.logits
        self.calls += 1
        self.addresses.append(logits.data_ptr())
        self.layouts.add(layout_of(collapse(logits)))
        self.arguments.append((logits.clone(), inputs.labels, inputs.temperature, wanted.entropy))
        self.before_forward(self.calls, logits)
        return super().forward(inputs, wanted)

    def backward(self, inputs, stats, upstream, *, inplace):
        self.backwards += 1
        self.before_backward(inputs.logits)
        return super().backward(inputs, stats, upstream, inplace=inplace)


def fail(error, at=1):
    def before_forward(call, logits):
        if call >= at:
            raise error

    return before_forward


def watched(problem, seed=None) -> Watched:
    """A candidate that has run in a round."""
    backend = Watched()
    measurement = Measurement(problem, {"one": backend}, seed=seed)
    next(measurement.rounds())
    assert measurement.runs["one"].alive, measurement.runs["one"].reason
    return backend


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    """So that rounds are quick."""
    monkeypatch.setattr(clock, "_cpu_cache", lambda folder: 2**20)
    clock._scratch.cache_clear()
    yield
    clock._scratch.cache_clear()


# --- the rounds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", [PLAIN, WITH_GRADIENT._replace(entropy=True, temperature="number"), IN_PLACE])
def test_the_order_is_shuffled_with_plain_torch_in_every_round(problem):
    """The first calls are in the given order, and plain torch is no candidate."""
    steps = []
    candidates = {"eager": Eager(), "other": Watched()}
    measurement = Measurement(problem, candidates, seed=1, on_step=lambda *step: steps.append(step), plain_s=60.0)
    list(measurement.rounds(30))
    assert steps[:4] == [(name, step) for step in ("compile", "memory") for name in candidates]
    timed = [name for name, step in steps if step == "time"][2:]  # the first two calls of plain torch are of no round
    rounds = [tuple(timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert len(rounds) == 30 and set(rounds) == set(itertools.permutations([*candidates, "log_softmax"]))
    assert {name: len(seconds) for name, seconds in measurement.times().items()} == dict.fromkeys(candidates, 30)
    assert len(measurement.plain_times()) == 30 and min(measurement.plain_times()) > 0.0
    assert set(measurement.extra_bytes()) == set(measurement.runs) == set(candidates)


def test_what_is_left_is_timed_in_no_further_round():
    measurement = Measurement(PLAIN, {"eager": Eager(), "other": Watched()}, seed=1)
    for done in measurement.rounds(5):
        if done == 2:
            measurement.leave("other", "eager")
    assert {name: len(run.seconds) for name, run in measurement.runs.items()} == {"eager": 5, "other": 2}
    assert set(measurement.times()) == {"eager"}


def test_what_was_left_for_one_that_fails_is_timed_again_beside_what_it_had_before():
    candidates = {"eager": Eager(), "fast": Watched(), "slow": Watched()}
    measurement = Measurement(PLAIN, candidates, seed=1, plain_s=60.0)
    counted = []
    for done in measurement.rounds(8):
        counted.append(done)
        if len(counted) == 3:
            measurement.leave("slow", "fast")
            assert not measurement.bring_back()
        if len(counted) == 5:
            measurement.runs["fast"].outcome = "failed"
            assert measurement.bring_back() and not measurement.bring_back()
    assert counted == [1, 2, 3, 4, 5, 4, 5, 6]
    assert {name: len(series) for name, series in measurement.times().items()} == {"eager": 6, "slow": 6}
    assert len(measurement.plain_times()) == len(measurement.runs["slow"].host_seconds) == 6


@pytest.mark.parametrize("problem", [PLAIN, WITH_GRADIENT, IN_PLACE], ids=["forward", "with gradient", "in place"])
def test_inputs_take_turns_and_all_of_a_round_get_the_same(problem):
    """In-place candidates get fresh logits, and write over them."""
    first, second = Watched(), Watched()
    list(Measurement(problem, {"first": first, "second": second}, seed=1).rounds(4))
    timed = first.addresses[-4:]
    assert timed == second.addresses[-4:]
    assert timed[0] == timed[2] != timed[1] == timed[3]
    assert first.calls > 4 and first.backwards == (first.calls if problem.needs_grad else 0)
    if problem == IN_PLACE:
        original = first.arguments[0][0]
        assert all(torch.equal(original, logits) for logits, *_ in first.arguments + second.arguments)


def test_the_cache_is_flushed_right_before_each_timed_call(monkeypatch):
    events = []
    monkeypatch.setattr(clock, "flush_cache", lambda device: events.append("flush"))
    backend = Watched(before_forward=lambda call, logits: events.append("call"))
    list(Measurement(PLAIN, {"one": backend}).rounds(3))
    assert events[-6:] == ["flush", "call"] * 3
    assert events.count("flush") == 3


def test_the_hosts_time_is_kept_and_a_device_is_busy_for_longer_than_that(monkeypatch):
    """As it would be on an accelerator, with a candidate whose host is slow, and one that waits for the device."""
    host = {"eager": iter([3.0, 0.003, 0.002, 0.004]), "waits": iter([3.0, 0.0001, 0.02, 0.03])}
    ahead = []

    def time_call(function, device, ahead_s=0.0):
        ahead.append(ahead_s)
        return Time(0.0005, next(host[steps[-1]]))

    steps = []
    monkeypatch.setattr(clock, "time_call", time_call)
    measurement = Measurement(
        PLAIN, {"eager": Eager(), "waits": Watched()}, seed=3, on_step=lambda name, step: steps.append(name)
    )
    list(measurement.rounds(3))
    assert measurement.host_times() == {}  # of a CPU they are the same
    measurement.device = torch.device("cuda:0")
    assert measurement.host_times() == {"eager": [0.003, 0.002, 0.004], "waits": [0.0001, 0.02, 0.03]}
    of = {name: [a for a, step in zip(ahead[2:], steps[4:], strict=True) if step == name] for name in host}
    assert of["eager"] == pytest.approx([0.001, 0.0045, 0.003]) and of["waits"] == [0.001] * 3
    assert [measurement.runs[name].first_call_seconds for name in host] == [3.0, 3.0]  # to compile is the host's


def test_fresh_logits_are_made_outside_of_the_clock(monkeypatch):
    inside = []

    def time_call(function, device, ahead_s=0.0):
        class Operations(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
                inside.append(operation._overloadpacket.__name__)
                return operation(*args, **(kwargs or {}))

        with Operations():
            function()
        return Time(1.0, 1.0)

    class Nothing(Eager):
        def forward(self, inputs, wanted):
            return Results(torch.zeros(inputs.labels.shape), torch.zeros(2, len(inputs.labels)))

        def backward(self, inputs, stats, upstream, *, inplace):
            assert inplace
            return inputs.logits

    monkeypatch.setattr(clock, "time_call", time_call)
    measurement = Measurement(IN_PLACE, {"one": Nothing()}, look_at_results=False)
    list(measurement.rounds(2))
    assert measurement.runs["one"].outcome == "measured", measurement.runs["one"].reason
    assert inside and "copy_" not in inside


@pytest.mark.parametrize("why", ["not asked for", "slow", "no memory", "fails at first", "fails later"])
def test_where_plain_torch_cannot_be_timed_it_is_left_out_and_nothing_else_changes(monkeypatch, why):
    calls = []

    def plain(*arguments, wanted):
        calls.append(arguments)
        if why == "fails at first" or (why == "fails later" and len(calls) > 3):
            raise MemoryError
        return (torch.zeros(PLAIN.rows, 1),)

    monkeypatch.setattr(rounds_module, "plain", plain)
    if why == "no memory":
        monkeypatch.setattr(clock, "free_memory", lambda device: rounds_module.bytes_of_plain(PLAIN))
    limit = {"not asked for": 0.0, "slow": 1e-9}.get(why, 60.0)
    measurement = Measurement(PLAIN, {"eager": Eager()}, plain_s=limit)
    assert list(measurement.rounds(3)) == [1, 2, 3]
    assert measurement.plain_times() == [] and len(measurement.times()["eager"]) == 3
    most = {"not asked for": 0, "no memory": 0, "fails at first": 1, "slow": 2, "fails later": 4}
    assert len(calls) == most[why]


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "outcome", "at", "step"),
    [
        (RuntimeError("broken\n  in two lines"), "failed", 1, "compile"),
        (torch.OutOfMemoryError("CUDA out of memory"), "oom", 2, "compile"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), "oom", 3, "memory"),
        (ValueError("out of memory, says a value"), "failed", 5, "time"),
    ],
)
def test_a_failure_is_an_outcome_and_the_others_go_on(monkeypatch, error, outcome, at, step):
    monkeypatch.setattr(clock, "why_no_peak", lambda device: None)
    monkeypatch.setattr(clock, "extra_peak_bytes", lambda function, device: function() and 1)
    measurement = Measurement(PLAIN, {"eager": Eager(), "bad": Watched(fail(error, at)), "good": Eager()})
    assert list(measurement.rounds(4)) == [1, 2, 3, 4]
    bad = measurement.runs["bad"]
    assert bad.outcome == outcome
    assert bad.reason == f"{step}: {type(error).__name__}: {' '.join(str(error).split())}"
    assert len(bad.seconds) == max(0, at - 4)  # what was measured before is kept, but not compared
    assert {name: len(seconds) for name, seconds in measurement.times().items()} == {"eager": 4, "good": 4}
    assert set(measurement.extra_bytes()) == {"eager", "good"}


def test_a_failure_in_backward_leaves_fresh_logits_to_the_others():
    def spoil(logits):
        logits.fill_(torch.nan)
        raise RuntimeError("half done")

    good = Watched()
    measurement = Measurement(IN_PLACE, {"bad": Watched(before_backward=spoil), "good": good})
    list(measurement.rounds(2))
    assert measurement.runs["bad"].outcome == "failed"
    assert not any(logits.isnan().any() for logits, *_ in good.arguments)


def test_one_that_leaves_torch_in_another_state_fails_and_the_state_is_as_it_was():
    before = torch.get_num_threads(), torch.get_default_dtype()

    def change(call, logits):
        torch.set_num_threads(before[0] + 1)
        torch.set_default_dtype(torch.float64)

    measurement = Measurement(PLAIN, {"eager": Eager(), "bad": Watched(change)})
    list(measurement.rounds(1))
    assert "it left torch with another number of threads, default dtype" in measurement.runs["bad"].reason
    assert (torch.get_num_threads(), torch.get_default_dtype()) == before and measurement.runs["eager"].alive


def test_a_time_that_no_call_can_take_is_a_failure(monkeypatch):
    monkeypatch.setattr(clock, "time_call", lambda function, device, **_: Time(0.0, 1.0))
    measurement = Measurement(PLAIN, {"eager": Eager()})
    assert list(measurement.rounds(2)) == [1]
    assert measurement.runs["eager"].reason == "time: ValueError: the clock gave 0.0 s, which no call can take"


def test_an_interrupt_is_not_a_failure():
    measurement = Measurement(PLAIN, {"eager": Watched(fail(KeyboardInterrupt()))})
    with pytest.raises(KeyboardInterrupt):
        list(measurement.rounds(1))


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(clock.why_no_peak("cpu") is not None, reason="the peak of memory cannot be measured here")
def test_memory_is_measured_in_bytes_and_in_multiples_of_the_logits():
    problem = Problem("cpu", rows=128, vocab=2**17, dtype=torch.float32)  # the heap itself wavers by some 20 MB

    class Hungry(Eager):
        def forward(self, inputs, wanted):
            copies = [inputs.logits.clone() for _ in range(2)]
            return super().forward(inputs._replace(logits=copies[1]), wanted)

    measurement = Measurement(problem, {"eager": Eager(), "hungry": Hungry()})
    next(measurement.rounds())
    eager, hungry = measurement.runs["eager"], measurement.runs["hungry"]
    assert hungry.extra_multiple == hungry.extra_bytes / (128 * 2**17 * 4)
    assert 1.9 < hungry.extra_multiple < 2.9
    assert 0 < eager.extra_multiple < 0.8


def test_memory_that_cannot_be_measured_is_none_and_no_failure(monkeypatch):
    """As on systems other than Linux."""
    monkeypatch.setattr(clock, "why_no_peak", lambda device: "not here")
    measurement = Measurement(PLAIN, {"eager": Eager()})
    next(measurement.rounds())
    assert measurement.runs["eager"].alive and measurement.extra_bytes() == {"eager": None}


# --- inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("layout", "aligned", "vocab"),
    [("flat", True, 1024), ("flat", False, 1023), ("rows", True, 1023), ("slice", True, 1024), ("slice", False, 1023)],
)
def test_the_logits_lie_as_the_problem_says(vocab, dtype, layout, aligned):
    problem = WITH_GRADIENT._replace(vocab=vocab, dtype=dtype, layout=layout, aligned=aligned)
    assert watched(problem).layouts == {(layout, aligned)}


@pytest.mark.parametrize(
    "changes",
    [
        {"labels_per_row": 3, "needs_grad": True, "entropy": True},
        {"temperature": "number"},
        {"temperature": "per_token", "needs_grad": True, "layout": "slice"},
        {"masked_logits": True, "entropy": True, "needs_grad": True},
        {"out_dtype": torch.bfloat16, "dtype": torch.bfloat16, "needs_grad": True},
        {"rows": 1, "layout": "slice"},
        {"vocab": 5, "masked_logits": True},
    ],
    ids=str,
)
def test_every_option_of_a_problem_reaches_the_candidates(changes):
    problem = PLAIN._replace(**changes)
    logits, labels, temperature, entropy = watched(problem).arguments[0]
    assert logits.numel() == problem.rows * problem.vocab and logits.dtype == problem.dtype
    assert labels.numel() == problem.rows * problem.labels_per_row
    assert entropy == problem.entropy
    kinds = {"none": float, "number": float, "per_token": torch.Tensor}
    assert isinstance(temperature, kinds[problem.temperature])
    assert (temperature == 1.0) is (problem.temperature == "none") or problem.temperature == "per_token"
    assert bool(logits.isinf().any()) is (problem.masked_logits and problem.vocab > rounds_module.KEPT)


def test_logits_look_like_a_models():
    backend = watched(PLAIN._replace(rows=256, vocab=32768), seed=3)
    logits, labels, *_ = backend.arguments[0]
    p = torch.softmax(logits, -1)
    assert p.topk(rounds_module.LIKELY).values.sum(-1).median() > 0.5
    of_labels = p.gather(-1, labels)
    assert of_labels.median() > 0.01  # drawn from them, not at random
    assert 0.5 < of_labels.mean() / (p * p).sum(-1).mean() < 2.0
    assert len({tuple(row[:8].tolist()) for row in logits}) > rounds_module.DISTINCT_ROWS
    assert not torch.equal(logits, backend.arguments[1][0])


def test_a_seed_makes_the_same_inputs():
    first, again, other = (watched(PLAIN, seed).arguments[0] for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])

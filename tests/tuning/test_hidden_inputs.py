"""Timing candidates from hidden states: what they get, how much of the problem, and within which memory."""

import itertools
import re

import pytest
import torch

from compiled_logprobs.backends import backends, get_backend, why_not
from compiled_logprobs.backends.chunked import Chunked
from compiled_logprobs.machine import clock
from compiled_logprobs.machine.clock import MIB
from compiled_logprobs.operation.hidden import compute_from_hidden
from compiled_logprobs.problem import Problem, problem_to_dict
from compiled_logprobs.tuning import sizes as sizes_module
from compiled_logprobs.tuning.hidden_inputs import InputsFromHidden, LogitsBackendCalled, limit_within
from compiled_logprobs.tuning.rounds import Measurement
from compiled_logprobs.tuning.sizes import MULTIPLE, sizes_of
from compiled_logprobs.tuning.tuner import Tuner
from compiled_logprobs.tuning.worker import Job
from tests.helpers.backends_for_tuning import registered

CPU = torch.device("cpu")
FORWARD = Problem("cpu", rows=70, vocab=5000, dtype=torch.float32, hidden=48)
BACKWARD = FORWARD._replace(needs_grad=True, weight_grad=True)
LARGE = BACKWARD._replace(rows=512, vocab=151936, hidden=1024)


def anything(part: Problem) -> bool:
    return True


def named(name: str, problem: Problem = BACKWARD) -> Chunked:
    return get_backend(name, problem)


# --- inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"needs_grad": False, "weight_grad": False, "temperature": "number"},
        {"dtype": torch.bfloat16, "weight_grad": False, "softcap": True},
        {"bias": True, "softcap": True, "temperature": "per_token", "entropy": True, "labels_per_row": 3},
    ],
    ids=str,
)
def test_right_candidates_pass_the_look_and_labels_are_likely(changes):
    problem = BACKWARD._replace(**changes)
    inputs = InputsFromHidden(problem, CPU, 1, whole=problem, logits_backend=None)
    for backend in (named("whole"), named("chunked_vocab"), None):
        results, gradients = inputs.call(inputs.forward_by(backend), 1)()
        assert inputs.what_is_wrong(1, results, gradients) is None
        if problem.labels_per_row == 1:
            assert results[0].median() > -6.0  # of 5000: nats, by chance 8.5 and more
    needed = problem.needs_grad * (1 + problem.weight_grad * (1 + problem.bias))
    assert len(gradients) == needed
    returned = [*results, *gradients]
    assert inputs.bytes_returned == sum(x.numel() * x.element_size() for x in returned)


class Off(Chunked):
    """All at once, and then one of the gradients is another."""

    def __init__(self, field: str, change) -> None:
        super().__init__("off", "wrong on purpose", None)
        self._field, self._change = field, change

    def backward(self, *arguments):
        gradients = super().backward(*arguments)
        return gradients._replace(**{self._field: self._change(getattr(gradients, self._field))})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("field", "said"), [("hidden", "the hidden states"), ("weight", "the weight")])
@pytest.mark.parametrize("change", [torch.neg, torch.zeros_like, lambda x: x * 2], ids=["sign", "none", "twice"])
def test_a_gradient_that_is_another_one_is_seen(dtype, field, said, change):
    measurement = Measurement(BACKWARD._replace(dtype=dtype), {"off": Off(field, change)}, seed=3)
    list(measurement.rounds(1))
    run = measurement.runs["off"]
    assert run.outcome == "wrong" and f"the gradient in {said} is off by" in run.reason


def test_all_rounds_have_plain_torch_beside_and_the_memory_is_without_what_is_returned(monkeypatch):
    monkeypatch.setattr(clock, "extra_peak_bytes", lambda call, device: 10**9)
    monkeypatch.setattr(clock, "flush_cache", lambda device: None)
    names = ["eager", "whole", "chunked_64", "chunked_vocab"]
    measurement = Measurement(BACKWARD, {name: named(name) for name in names}, plain_s=60.0, logits_backend="cpp")
    list(measurement.rounds(2))
    assert list(measurement.times()) == names and len(measurement.plain_times()) == 2
    returned = 4 * (70 + 70 * 48 + 5000 * 48)
    assert set(measurement.extra_bytes().values()) == {10**9 - returned}


def test_candidates_get_the_logits_backend_that_was_named_where_it_can_run():
    problem = Problem("cpu", 8, 16, torch.float32)
    assert LogitsBackendCalled("eager")(problem) is get_backend("eager")
    assert LogitsBackendCalled("eager")(problem, "compiled") is get_backend("compiled")
    for name in (None, "flash_attn", "of_another_process"):
        assert LogitsBackendCalled(name)(problem) is not get_backend("eager")


# --- a limit of memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hidden", "softcap"), [(1024, False), (4096, True)])
@pytest.mark.parametrize("name", ["eager", "chunked_256", "chunked_vocab"])
def test_a_part_of_the_vocabulary_has_the_chunks_of_the_whole(name, hidden, softcap, dtype):
    backend, whole = named(name), LARGE._replace(dtype=dtype, hidden=hidden, softcap=softcap)
    part = whole._replace(vocab=12288)
    whole = whole._replace(memory_limit=backend.least_memory(whole) + 48 * MIB)
    limit = limit_within(backend, part, whole)
    assert backend.why_not(part._replace(memory_limit=limit)) is None
    if name == "chunked_vocab":
        counts = [-(-one.vocab // backend._columns(one)) for one in (whole, part._replace(memory_limit=limit))]
        assert min(counts) > 1 and abs(counts[0] - counts[1]) <= 2  # whose size is limited in another way, too
    else:
        rows = [backend._rows_within(one, one.memory_limit) for one in (whole, part._replace(memory_limit=limit))]
        assert 1 < rows[0] <= whole.rows and abs(rows[0] - rows[1]) <= 1


def test_what_takes_more_than_it_may_is_out_and_says_so(monkeypatch):
    peaks = itertools.cycle([64 * MIB, 65 * MIB])
    monkeypatch.setattr(clock, "extra_peak_bytes", lambda call, device: next(peaks) + 4 * 70)
    limited = FORWARD._replace(memory_limit=64 * MIB)
    measurement = Measurement(limited, {"eager": named("eager"), "whole": named("whole")}, seed=1)
    list(measurement.rounds(1))
    assert measurement.runs["eager"].alive and measurement.runs["eager"].extra_bytes == 64 * MIB
    run = measurement.runs["whole"]
    assert (run.outcome, run.reason) == ("oom", "it took 65.0 MiB, and may take 64.0")


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_the_vocabulary_shrinks_before_the_rows_do():
    sizes = sizes_of(LARGE, CPU)
    assert sizes.pilot(anything) == LARGE._replace(vocab=8192)
    assert sizes.that_fit(2**23, anything) == LARGE._replace(vocab=16384)
    assert sizes.that_fit(1e12, anything) == LARGE
    assert sizes.that_fit(1.0, anything) == LARGE._replace(vocab=2048)  # for the little time of a first call
    odd = LARGE._replace(vocab=50257)
    assert sizes_of(odd, CPU).pilot(anything).vocab % MULTIPLE == odd.vocab % MULTIPLE
    wide = LARGE._replace(hidden=8192)
    assert sizes_of(wide, CPU).pilot(anything) == wide._replace(rows=256, vocab=2048)
    many = LARGE._replace(rows=65536)
    assert sizes_of(many, CPU).pilot(anything) == many._replace(rows=2048, vocab=2048)


@pytest.mark.parametrize("name", backends(from_hidden=True))
@pytest.mark.parametrize("rows", [512, 8192, 65536])
def test_every_candidate_can_run_its_pilot(name, rows):
    """With fewer rows than a chunk has, chunks of rows would not be measured."""
    problem = LARGE._replace(rows=rows, vocab=32768)
    if why_not(name, problem) is None:
        assert why_not(name, sizes_of(problem, CPU).pilot(lambda part: why_not(name, part) is None)) is None


def test_sizes_shrink_to_the_memory_there_is(monkeypatch):
    monkeypatch.setattr(sizes_module, "free_memory", lambda device: 200 * MIB)
    sizes = sizes_of(LARGE, CPU)
    timed = sizes.that_fit(1e12, anything)
    assert timed.rows == 512 and MULTIPLE <= timed.vocab < 151936 and sizes._bytes(timed) <= 100 * MIB
    assert sizes.of_look(timed, 1e12) is None
    assert sizes.smaller(timed).vocab < timed.vocab
    assert sizes.smaller(LARGE._replace(rows=1, vocab=MULTIPLE)) is None
    monkeypatch.setattr(sizes_module, "free_memory", lambda device: 2**40)
    assert sizes.of_look(timed, 1e12) == LARGE and sizes.of_look(timed, 1e6) is None
    assert sizes.of_look(LARGE, 1e12) is None


# --- the worker -------------------------------------------------------------------------------------------------------


def test_a_part_is_timed_and_the_winner_is_called_with_the_whole_within_its_memory(monkeypatch):
    """The first winner takes more with all columns than with those that were timed."""
    monkeypatch.setitem(sizes_module.PILOT_LOGITS, "cpu", 2**12)
    monkeypatch.setattr(sizes_module, "LEAST_VOCAB", 256)
    problem = BACKWARD._replace(vocab=16384, memory_limit=32 * MIB)
    named_ones = ["eager", "whole", "chunked_256", "chunked_64"]
    peaks = iter([33 * MIB, MIB])

    def extra(call, device):
        call()
        return 4 * (70 + 70 * 48 + 16384 * 48) + next(peaks) if told[-1]["step"] == "full size" else None

    told = []
    monkeypatch.setattr(clock, "extra_peak_bytes", extra)
    monkeypatch.setattr(clock, "flush_cache", lambda device: None)  # which takes longer than the calls
    order = {
        "problem": problem_to_dict(problem),
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "candidates": [[name, name] for name in named_ones],
        "checked": named_ones,
        "incumbent": None,
        "logits_backend": "eager",
        "short": True,
        "plain": True,
        "seconds": 0.01,
        "strict": False,
        "in_all": False,
        "too_slow": 0,
        "seed": 1,
    }
    Job(order, lambda event, **fields: told.append({"event": event, **fields})).run()
    (measuring,) = (event for event in told if event["event"] == "measuring")
    assert measuring["rows"] == 70 and measuring["vocab"] < 16384
    looked = [event["candidate"] for event in told if event.get("step") == "full size"]
    lost = {event["candidate"]: (event["outcome"], event["reason"]) for event in told if event["event"] == "lost"}
    assert len(looked) == 2
    assert lost[looked[0]] == ("oom", "it took 33.0 MiB, and may take 32.0") and looked[1] not in lost
    (proven,) = (event for event in told if event["event"] == "proven")
    assert proven == {"event": "proven", "rows": 70, "bytes": MIB}
    assert lost["chunked_256"][1].startswith("its chunks of 256 rows would hold all") and "chunked_64" not in lost


@pytest.mark.slow
@pytest.mark.skipif(clock.why_no_peak("cpu") is not None, reason=str(clock.why_no_peak("cpu")))
def test_within_a_limit_the_program_decides_for_the_fastest_that_keeps_it():
    limit = 48 * MIB  # the logits take 64
    problem = Problem(
        "cpu", 1024, 16384, torch.float32, needs_grad=True, hidden=64, weight_grad=True, memory_limit=limit
    )
    names = ["at_once", "forgets", "whole", "chunked_256"]
    with registered(from_hidden=True, at_once="AtOnce", forgets="ForgetsTheWeight"), Tuner(CPU, short=True) as tuner:
        decision, evidence = tuner.decide(problem, 2.0, names=names)
    found = {name: (candidate.outcome, candidate.reason) for name, candidate in decision.candidates.items()}
    assert found["whole"] == ("unsupported", "it takes 80.2 MiB, and may take 48.0")
    assert found["forgets"][0] == "wrong" and "weight_gradient_error" in found["forgets"][1]
    outcome, reason = found["at_once"]
    assert outcome != "chosen" and (
        outcome != "oom" or re.fullmatch(r"it took 6\d\.\d MiB, and may take 48\.0", reason)
    )
    assert decision.chosen in ("eager", "chunked_256") and decision.problem == problem
    assert re.search(r"; of 48\.0 MiB it takes \d\d\.\d$", decision.reason), decision.reason
    assert decision.bandwidth == {} and decision.winner.percent_of_bandwidth is None
    assert "chunked_256" in evidence.seconds
    assert type(decision).from_json(decision.to_json()) == decision


def test_the_logits_backend_of_a_call_is_asked_for_each_of_its_chunks():
    """So that what is timed is what is called."""
    asked = []

    def handed_on(problem, name=None):
        asked.append((problem.rows, problem.vocab, problem.hidden))
        return get_backend("eager")

    inputs = InputsFromHidden(FORWARD, CPU, 1, whole=FORWARD, logits_backend=None)
    compute_from_hidden(
        named("chunked_64"), FORWARD, inputs._hidden[0], inputs._weight, inputs._labels[0], logits_backend=handed_on
    )
    assert asked == [(64, 5000, None), (6, 5000, None)]

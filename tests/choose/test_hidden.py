"""What serves log-probabilities from hidden states: the same steps, a limit of memory that holds throughout, and
nothing that holds all logits where they are too many."""

import pytest
import torch

import compiled_logprobs as clp
from compiled_logprobs import Problem, autotune, log_probs_from_hidden
from compiled_logprobs.backends import base, chunked, get_backend, why_not
from compiled_logprobs.backends.chunked import CHUNKED_64
from compiled_logprobs.choose import auto, memory
from compiled_logprobs.choose.memory import Choice
from compiled_logprobs.choose.tune import logits_backend_for
from compiled_logprobs.errors import BackendUnavailable, LogProbsError, ProfileError
from compiled_logprobs.machine.clock import MIB, total_memory
from compiled_logprobs.policy import policy
from compiled_logprobs.problem import bucket, of_logits
from compiled_logprobs.store import user_store
from tests.helpers.stored_decisions import CPU, decided, measured, publish

pytestmark = pytest.mark.usefixtures("elsewhere")
PROBLEM = Problem("cpu", 300, 4100, torch.float32, needs_grad=True, hidden=32, weight_grad=True)
TIGHT = Problem("cpu", 1024, 8192, torch.bfloat16, needs_grad=True, hidden=256, weight_grad=True, memory_limit=20 * MIB)
"""What eager cannot do: it would sum the weight's gradient in float32, or hold all logits."""


def arguments(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.randn(problem.rows, problem.hidden, dtype=problem.dtype, requires_grad=problem.needs_grad)
    weight = torch.randn(problem.vocab, problem.hidden, dtype=problem.dtype, requires_grad=problem.weight_grad)
    return hidden, weight, torch.randint(problem.vocab, (problem.rows,))


def answer(problem: Problem, chosen: str = "chunked_64"):
    """A decision between the backends over hidden states."""
    names = clp.backends(from_hidden=True)
    candidates = {
        name: measured(name, fingerprint=get_backend(name, problem).fingerprint())
        for name in names
        if why_not(name, problem) is None
    }
    return decided(problem, chosen, candidates=candidates)


def test_the_first_call_measures_and_later_ones_take_what_won(fake, checks):
    fake.answer = answer
    hidden, weight, labels = arguments(PROBLEM)
    for _ in range(2):
        log_probs_from_hidden(hidden, weight, labels)
    assert fake.asked == [PROBLEM] and [auto.choose(PROBLEM, CPU, policy())[0]] == ["chunked_64"]
    ((_, stored),) = user_store().decisions()
    assert stored.problem == bucket(PROBLEM)
    assert clp.explain(PROBLEM).backend == "chunked_64" and "chunked_64" in str(clp.explain(PROBLEM))
    assert clp.explain(PROBLEM._replace(rows=20000)).source == "near"
    assert clp.explain(PROBLEM._replace(hidden=33)).backend is None


def test_candidates_are_handed_the_backend_that_serves_such_logits(fake, monkeypatch):
    fake.answer = answer
    logits = bucket(of_logits(PROBLEM, 300))
    assert logits_backend_for(PROBLEM, CPU) is None  # unknown: the worker takes the first that can
    publish(decided(logits, "compiled"))
    assert clp.tune(PROBLEM)[0].chosen == "chunked_64"
    assert fake.options[0]["logits_backend"] == logits_backend_for(PROBLEM, CPU) == "compiled"
    assert logits_backend_for(logits, CPU) is None


def test_a_limit_of_memory_is_part_of_the_problem_rounded_down(fake):
    fake.answer = answer
    (decision,) = clp.tune(PROBLEM._replace(memory_limit=100 * MIB))
    assert decision.problem.memory_limit == 96 * MIB and fake.asked == [decision.problem]
    assert clp.explain(PROBLEM._replace(memory_limit=127 * MIB)).source == "tuned here"
    assert clp.explain(PROBLEM._replace(memory_limit=128 * MIB)).source is None
    assert clp.explain(PROBLEM).source is None


def test_nothing_is_measured_where_only_more_than_the_rounded_limit_would_do(mode, checks, nothing_measures):
    mode("tune")
    limit = min(get_backend(name, PROBLEM).least_memory(PROBLEM) for name in ("eager", "chunked_vocab"))
    said = clp.explain(PROBLEM._replace(memory_limit=limit)).steps
    assert said["measure"] == "only eager can run it"


@pytest.mark.parametrize("mode_name", ["off", "lookup"])
def test_the_default_keeps_to_the_memory_of_the_device(mode_name, mode, checks, monkeypatch):
    mode(mode_name)
    assert auto.choose(PROBLEM, CPU, policy())[0] == "whole"
    memory.MEMORY.choices.clear()
    for module in (base, chunked):
        monkeypatch.setattr(module, "total_memory", lambda device_type: 4 * 300 * 4100 * 4 - 1)
    assert auto.choose(PROBLEM, CPU, policy())[0] == "chunked_vocab"
    assert "more than a quarter of the" in why_not("whole", PROBLEM)
    assert why_not("eager", PROBLEM) is None


def test_eager_goes_by_fewer_rows_where_all_logits_are_too_many(monkeypatch):
    eager, seen = get_backend("eager"), []
    forward = type(eager).forward

    def noted(self, inputs, wanted):
        seen.append(len(inputs.logits))
        return forward(self, inputs, wanted)

    monkeypatch.setattr(type(eager), "forward", noted)
    hidden, weight, labels = arguments(PROBLEM)
    log_probs_from_hidden(hidden, weight, labels, backend="eager")
    monkeypatch.setattr(chunked, "WORKSPACE_OF_EAGER", 0)
    for module in (base, chunked):
        monkeypatch.setattr(module, "total_memory", lambda device_type: 4 * 100 * (4100 + 64) * 4)
    log_probs_from_hidden(hidden, weight, labels, backend="eager")
    assert seen == [300, 100, 100, 100]


def test_the_memory_of_the_device_is_known_on_a_cpu_and_of_none_that_is_not_here():
    assert total_memory("cpu") > 2**28
    assert total_memory("xpu") is None


class Fails(type(CHUNKED_64)):
    name, summary, row_invariant = "fails", "raises in forward", False

    def __init__(self) -> None:
        super().__init__("fails", self.summary, 64)

    def why_not(self, problem):
        return None

    def forward(self, inputs, wanted, logits_backend, *, keep):
        raise RuntimeError("not today")


def test_what_stands_in_for_a_backend_that_fails_keeps_to_the_limit(own_registry, mode, checks):
    mode("lookup")
    clp.register_backend("fails", Fails(), from_hidden=True)
    assert why_not("eager", TIGHT) is not None and why_not("chunked_vocab", TIGHT) is None
    memory.MEMORY.remember(TIGHT, policy(), Choice("fails", "tuned here"))
    hidden, weight, labels = arguments(TIGHT)
    with pytest.warns(RuntimeWarning, match="not today\nchunked_vocab serves the call"):
        first = log_probs_from_hidden(hidden, weight, labels, memory_limit=20 * MIB)
    assert auto.choose(TIGHT, CPU, policy())[0] == "chunked_vocab"
    assert torch.equal(first, log_probs_from_hidden(hidden, weight, labels, memory_limit=20 * MIB))
    memory.MEMORY.put_aside("chunked_vocab", TIGHT, RuntimeError("neither"))
    memory.MEMORY.remember(TIGHT, policy(), Choice("fails", "tuned here"))
    with pytest.raises(RuntimeError, match="not today"):
        log_probs_from_hidden(hidden, weight, labels, memory_limit=20 * MIB)


def test_a_hit_can_be_required_and_invariant_rows_are_refused(mode, checks):
    mode("lookup")
    hidden, weight, labels = arguments(PROBLEM)
    with autotune(require_hit=True), pytest.raises(ProfileError, match="no profile decides 384 x 32 x 4100"):
        log_probs_from_hidden(hidden, weight, labels)
    with autotune(row_invariant=True), pytest.raises(BackendUnavailable, match="declares rows whose bits do not"):
        log_probs_from_hidden(hidden, weight, labels)
    publish(answer(bucket(PROBLEM)))
    with autotune(require_hit=True):
        log_probs_from_hidden(hidden, weight, labels)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"needs_grad": False, "weight_grad": False},
        {"bias": True, "softcap": True, "entropy": True, "temperature": "per_token", "weight_grad": False},
        {"memory_limit": 64 * MIB, "dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_warm_runs_what_serves_without_measuring(changes, mode, checks, monkeypatch):
    mode("tune")
    monkeypatch.setattr("compiled_logprobs.choose.tune.Tuner", lambda *_, **__: pytest.fail("it measured"))
    problem = PROBLEM._replace(**changes)
    assert clp.warm(problem) == {problem: "whole"}
    assert clp.warm(problem, backend="chunked_64") == {problem: "chunked_64"}
    assert auto.choose(problem, CPU, policy())[0] == "whole"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"inplace_backward": True}, "the mode inplace with a hidden size"),
        ({"layout": "slice"}, "the layout slice with a hidden size"),
        ({"needs_grad": False}, "a gradient of the weight without needs_grad"),
        ({"hidden": None}, "weight grad without a hidden size"),
    ],
)
def test_problems_that_no_call_poses_are_refused(changes, said):
    for function in (clp.explain, clp.warm, clp.tune):
        with pytest.raises(LogProbsError, match=said):
            function(PROBLEM._replace(**changes))

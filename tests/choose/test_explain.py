"""`explain`: what the next call takes, and why, for people and for programs; it changes nothing."""

import dataclasses
import json
import sys

import pytest
import torch

import compiled_logprobs as clp
from compiled_logprobs.backends.compiled import Compiled
from compiled_logprobs.backends.cpp import Cpp
from compiled_logprobs.choose import auto, memory, rule
from compiled_logprobs.choose.explain import candidate_figures, nearest_stored
from compiled_logprobs.choose.memory import Choice
from compiled_logprobs.decision import Candidate, Speedup
from compiled_logprobs.machine.environment import environment_at
from compiled_logprobs.policy import policy
from compiled_logprobs.store import user_store
from compiled_logprobs.store.files import Store
from compiled_logprobs.tuning.tuner import TuningFailed
from tests.helpers.stored_decisions import CPU, LARGE, NEW, all_measured, decided, measured, publish, raising, undecided

LOGITS, LABELS = torch.randn(1024, 1031), torch.randint(1031, (1024,))
NAMED = "1024 x 1031 float32 on cpu (not 16-byte aligned)"


@pytest.fixture(autouse=True)
def in_tune_mode(nothing_measures, elsewhere, mode):
    mode("tune")


def explained(logits=LOGITS, labels=LABELS, **options) -> clp.Explanation:
    """What is told; both forms of it are there, and agree; it has remembered nothing."""
    before = dict(memory.MEMORY.choices), dict(memory.MEMORY.decided)
    explanation = clp.explain(logits, labels, **options)
    assert before == (memory.MEMORY.choices, memory.MEMORY.decided)
    plain = json.loads(json.dumps(explanation.to_dict(), allow_nan=False))
    assert set(plain) == {field.name for field in dataclasses.fields(explanation)} | {"bucket_rows", "headline"}
    first, second = str(explanation).splitlines()[:2]
    assert first.endswith(f": {explanation.headline}") and second == f"  {explanation.why}"
    return explanation


def call(problem=LARGE) -> None:
    auto.choose(problem, CPU, policy())


def test_a_small_problem(monkeypatch):
    monkeypatch.setattr(Cpp, "is_warm", lambda self, problem: True)
    assert str(explained(LOGITS[:3], LABELS[:3])).splitlines() == [
        "3 x 1031 float32 on cpu (not 16-byte aligned): cpp",
        "  fewer than 2^20 logits, and no profile decides it: the first of the list that is ready without compiling",
        "  remembered: this process has not chosen for it yet",
        "  stored: no profile decides it",
    ]


def test_the_walk_of_a_problem_that_the_next_call_measures():
    explanation = explained()
    assert str(explanation).splitlines() == [
        f"{NAMED}: not decided yet",
        "  the next call measures it, within its budget",
        "  remembered: this process has not chosen for it yet",
        "  stored: no profile decides it",
        "  small: it has 2^20 logits or more",
        "  near: no profile decides the same problem at another N",
    ]
    assert explanation.backend is None and explanation.source is None and explanation.decision is None


@pytest.mark.parametrize("name", ["off", "lookup"])
def test_a_problem_that_the_default_rule_takes_says_before_and_after_why_nothing_is_measured(name, checks, mode):
    mode(name)
    explanation = explained()
    assert list(explanation.steps) == list(rule.STEPS) and explanation.backend is None
    assert explanation.why == (
        "the next call takes the first of cpp, compiled, triton, flash_attn, eager that can run it and passes a short "
        "check; "
        f"nothing is measured now, because the mode is '{name}'"
    )
    call()
    explanation = explained()
    assert (explanation.backend, explanation.source) == ("cpp", "default rule")
    assert explanation.why == (
        "by the default rule: the first that can run it and passes a short check; nothing is measured now, because the "
        f"mode is '{name}'"
    )


def test_after_a_measurement_that_failed_it_says_so(fake, checks):
    fake.answer = raising(TuningFailed("the budget ended"))
    call()
    assert explained().why.endswith("nothing is measured now, because measuring came to no decision: the budget ended")


def test_options_count():
    options = {"temperature": 0.7, "return_entropy": True, "out_dtype": torch.bfloat16}
    explanation = explained(LOGITS.clone().requires_grad_(), LABELS, **options)
    assert "(gradient, entropy, temperature (number), not 16-byte aligned, result in bfloat16)" in str(explanation)


def test_wrong_arguments_are_told_as_by_the_call():
    with pytest.raises(clp.InputError, match="labels\\[0\\]"):
        clp.explain(LOGITS, LABELS + 1031)


def test_a_decision_with_all_that_is_known_of_it():
    compiled = measured("compiled", seconds=1e-3, speedup_over_plain=Speedup(3.8, 4.0, 4.2))
    publish(decided(chosen="compiled", candidates=all_measured() | {"compiled": compiled}))
    explanation = explained()
    assert (explanation.backend, explanation.source) == ("compiled", "user store")
    lines = str(explanation).splitlines()
    assert lines[1:5] == [
        "  stored in the user's profiles",
        "  remembered: this process has not chosen for it yet",
        "  FASTER_CLEAR: compiled is faster",
        f"  measured {explanation.decision.measured_at} at N = 1024: 10 rounds, full check",
    ]
    assert sorted(line for line in lines[5:] if line[2] != " ") == [
        "  compiled    chosen: slower, as it was",
        "  cpp         slower: slower, as it was",
        "  eager       slower: slower, as it was",
        "  flash_attn  unavailable: needs a GPU",
        "  log_softmax and gather, which people use today: 4 ms a call",
        "  triton      unavailable: needs a GPU",
    ]
    assert (
        "              1 ms a call, 4.00x (3.80 to 4.20) the speed of log_softmax and gather, 1.00x (0.90 to 1.10) the "
        "speed of eager, 0.50 x the logits of extra memory, 40 % of bandwidth, 1 of 1 checks, row invariant, first "
        "call 0.5 s, paid for after 500 calls"
    ) in lines


def test_what_pays_at_the_first_call_is_told_in_the_singular():
    compiled = measured("compiled", first_call_seconds=0.05, seconds=0.1)
    candidates = {"compiled": compiled, "eager": measured("eager", seconds=0.2)}
    decision = decided(chosen="compiled", candidates=candidates)
    assert candidate_figures(decision, "compiled").endswith("first call 0.05 s, paid for after 1 call")


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("user store", "stored in the user's profiles"),
        ("project profiles", "stored in the profiles of the current folder"),
        ("bundled profiles", "stored in the profiles that came with the package"),
        ("tuned here", "measured by this process"),
        ("ranks", "agreed between the ranks by tune(group=...)"),
    ],
)
def test_where_a_decision_comes_from(source, why, elsewhere):
    folder = {"user store": user_store().root, "project profiles": elsewhere / "profiles"}.get(source)
    if source in ("tuned here", "ranks"):
        memory.MEMORY.hold(LARGE, Choice("eager", source, decided()))
    else:
        publish(decided(), Store(folder or elsewhere / "bundled"))
    for _ in range(2):  # before and after a call
        explanation = explained()
        assert (explanation.backend, explanation.source, explanation.why) == ("eager", source, why)
        call()


@pytest.mark.parametrize(
    ("other", "source", "measured_for"),
    [
        ({"rows": 2048}, "near", "N = 2048"),
        ({"temperature": "number", "layout": "rows"}, "related", "layout rows, temperature number at N = 1024"),
        ({"entropy": True, "aligned": True}, "related", "entropy, aligned to 16 bytes at N = 1024"),
    ],
)
def test_the_decision_for_the_nearest_kind_of_problem(other, source, measured_for, mode, checks):
    fast = measured("cpp", speedup_over_plain=Speedup(2.0, 2.1, 2.2))
    publish(decided(LARGE._replace(**other), "cpp", candidates=all_measured() | {"cpp": fast}, measured_rows=512))
    why = {
        "near": "stored for the same problem with another number of rows; tune(...) measures this one",
        "related": "stored for the nearest kind of problem that was measured",
    }[source]
    mode("tune")
    meanwhile = f"within its budget; where it must not, cpp serves, by the decision for {measured_for}"
    assert (source == "related") == explained().why.endswith(meanwhile)
    mode("lookup")
    for is_checked in (set(other) == {"rows"}, True):  # before and after a call
        explanation = explained()
        assert (explanation.backend, explanation.source) == ("cpp", source)
        assert explanation.headline == (
            f"cpp, by the decision for {measured_for}: 2.10x (2.00 to 2.20) the speed of log_softmax and gather"
        )
        assert explanation.why.startswith(why) and set(explanation.problem_differs) == set(other)
        assert ("once it has passed a short check" in explanation.why) == (not is_checked)
        assert (source == "near") != explanation.why.endswith("nothing is measured now, because the mode is 'lookup'")
        assert "timed with 512 rows" in str(explanation)
        call()


def test_what_was_settled_by_least_regret_says_so(mode):
    publish(undecided(reason="settled by least regret, not by the rounds: 12 rounds do not tell"))
    explanation = explained()
    assert (explanation.backend, explanation.source) == ("eager", "user store")
    assert f"  LEAST_REGRET: {explanation.decision.reason}" in str(explanation).splitlines()


def test_a_stale_decision(mode):
    changed = {"compiled": measured("compiled", fingerprint=NEW)}
    publish(decided(candidates=all_measured() | changed))
    explanation = explained()
    assert explanation.backend is None and explanation.decision is not None  # what is known, and that it will not do
    assert explanation.why == "the next call measures it again, since what is stored of it is stale, within its budget"
    assert "  stale: backend 'compiled' has changed since this was measured" in str(explanation).splitlines()
    mode("lookup")
    explanation = explained()
    assert (explanation.backend, explanation.source) == ("eager", "user store")
    assert explanation.stale == "backend 'compiled' has changed since this was measured"


def test_facts_that_differ_but_do_not_count():
    publish(decided(environment={**environment_at(CPU).to_dict(), "python": "3.0.1", "memory_bytes": None}))
    explanation = explained()
    assert explanation.differs["python"][0] == "3.0.1" and set(explanation.differs) == {"python", "memory_bytes"}
    assert f"  python was 3.0.1 then, and is {explanation.differs['python'][1]} here" in str(explanation).splitlines()


def test_what_requires_a_hit(mode):
    with clp.autotune(require_hit=True):
        explanation = explained()
        assert explanation.backend is None
        assert explanation.why.startswith(f"the next call raises ProfileError: no profile decides {NAMED}")
        mode("off")
        with clp.autotune("off"):
            assert "the mode is 'off', in which no profile is looked at" in explained().why


def test_what_requires_invariant_rows(checks, monkeypatch):
    publish(decided(chosen="compiled"))
    with clp.autotune(row_invariant=True):
        explanation = explained()
        assert list(explanation.steps) == ["remembered", "invariant"] and explanation.backend is None
        assert explanation.why == "the next call checks cpp, which declares invariant rows, and takes it if it passes"
        call()
        explanation = explained(LOGITS[:3], LABELS[:3])
        assert (explanation.backend, explanation.source) == ("cpp", "row invariant")
        assert explanation.why.endswith("passes the check of them, for all calls of a kind")
        monkeypatch.setattr(Compiled, "row_invariant", False)
        memory.MEMORY.put_aside("cpp", LARGE, RuntimeError("it broke"))
        assert explained().why.startswith("the next call raises BackendUnavailable: got 1024 x 1031")


def test_what_was_decided_but_failed_is_not_measured_again():
    publish(decided(chosen="compiled"))
    memory.MEMORY.put_aside("compiled", LARGE, RuntimeError("it broke"))
    explanation = explained()
    assert explanation.set_aside == {"compiled": "RuntimeError: it broke"}
    assert "which it chose, failed in this process and is set aside" in explanation.steps["stored"]
    assert explanation.why.endswith("it has been measured already, without a choice that may serve now")


def test_no_backend_of_others_is_imported(own_registry):
    clp.register_backend("elsewhere", "antigravity:Backend")
    assert explained().backend is None
    publish(decided(candidates=all_measured() | {"elsewhere": Candidate("unavailable", "not installed")}))
    assert explained().backend == "eager"
    assert "antigravity" not in sys.modules


def test_a_measurement_without_figures_can_be_shown():
    nothing = ("speedup", "seconds", "first_call_seconds", "extra_bytes", "extra_multiple", "percent_of_bandwidth")
    bare = measured("compiled", **dict.fromkeys(nothing), checks=(), row_invariant=None)
    beside = measured("eager", seconds=2e-3, host_seconds=3e-4)  # as a GPU's has it
    candidates = all_measured() | {"compiled": bare, "eager": beside}
    publish(decided(chosen="compiled", candidates=candidates, plain_seconds=None))
    lines = str(explained()).splitlines()
    assert sum(line.startswith("              ") for line in lines) == 2  # eager's and cpp's
    assert sum("2 ms a call (of the host 0.3 ms), " in line for line in lines) == 1


# What is stored near it


def test_what_could_serve_comes_first_and_then_what_differs_in_the_fewest_fields():
    others = [
        LARGE._replace(rows=8192),
        LARGE._replace(rows=2048),
        LARGE._replace(entropy=True, rows=2048),
        LARGE._replace(temperature="number"),
        LARGE._replace(dtype=torch.bfloat16, needs_grad=True, vocab=7),
    ]
    for other in others:
        publish(decided(other))
    publish(undecided(LARGE._replace(layout="rows")))  # which serves nobody else
    neighbours = nearest_stored(rule.context_of(LARGE, CPU, policy()), most=5)
    assert [neighbour.problem for neighbour in neighbours] == [others[1], others[3], others[2], others[0], others[4]]
    assert neighbours[2].differs == {"rows": (2048, 1024), "entropy": (True, False)}
    assert str(neighbours[1]) == "1024 x 1031 float32 on cpu (user store): temperature is number there, and none here"
    explanation = explained()
    assert len(explanation.nearest) == 3 and f"  nearest: {neighbours[0]}" in str(explanation).splitlines()
    assert explanation.to_dict()["nearest"][0]["differs"] == {"rows": (2048, 1024)}
    publish(decided())
    assert explained().nearest == ()


def test_facts_of_another_environment_are_told():
    there = dataclasses.replace(environment_at(CPU), torch="1.0", cpu_threads=999, python="2.7")
    user_store().publish(there, decided())
    (neighbour,) = explained().nearest
    assert neighbour.differs == {  # and not python, which is no part of the key
        "cpu_threads": (999, torch.get_num_threads()),
        "torch": ("1.0", torch.__version__),
    }

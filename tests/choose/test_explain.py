"""`explain`: what the next call takes, and why, for people and for programs; it changes nothing."""

import dataclasses
import json
import sys

import pytest
import torch

import compiled_logprobs as clp
from compiled_logprobs import policy as policy_module
from compiled_logprobs.choose import rule as decisions
from compiled_logprobs.choose import serving
from compiled_logprobs.decision import Candidate
from compiled_logprobs.machine.environment import environment_at
from compiled_logprobs.store import files as store
from compiled_logprobs.store import user_store
from compiled_logprobs.store.files import Store
from tests.helpers.stored_decisions import CPU, LARGE, FakeTuner, all_measured, decided, measured, publish

LOGITS, LABELS = torch.randn(1024, 1031), torch.randint(1031, (1024,))
NAMED = "1024 x 1031 float32 on cpu (not 16-byte aligned)"


@pytest.fixture(autouse=True)
def nothing_measures(monkeypatch, tmp_path, mode):
    def fail(*_, **__):
        pytest.fail("it measured")

    monkeypatch.setattr(serving, "Tuner", fail)
    monkeypatch.setattr(serving, "check_backend", fail)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(store, "bundled_store", lambda: Store(tmp_path / "bundled"))
    mode("tune")


def explained(logits=LOGITS, labels=LABELS, **options) -> clp.Explanation:
    """What is told; both forms of it are there, and agree."""
    stored = {path: path.read_bytes() for path in user_store().root.rglob("*") if path.is_file()}
    known = dict(decisions._served), dict(decisions._decided)
    found = clp.explain(logits, labels, **options)
    assert known == (decisions._served, decisions._decided)  # it has remembered nothing
    assert stored == {path: path.read_bytes() for path in user_store().root.rglob("*") if path.is_file()}
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert set(plain) == {field.name for field in dataclasses.fields(found)} | {"bucket_rows"}
    assert (plain["backend"], plain["source"], plain["why"]) == (found.backend, found.source, found.why)
    first, second = str(found).splitlines()[:2]
    assert first.endswith(f": {found.backend or 'not decided yet'}") and second == f"  {found.why}"
    return found


def test_a_small_problem():
    found = explained(LOGITS[:3], LABELS[:3])
    assert str(found) == (
        "3 x 1031 float32 on cpu (not 16-byte aligned): eager\n"
        "  fewer than 2^20 logits, and no profile decides it: eager by rule, since a launch costs more than the work"
    )
    assert found.to_dict() | {"problem": None} == {
        "problem": None,
        "bucket_rows": 3,
        "backend": "eager",
        "source": "small",
        "why": "fewer than 2^20 logits, and no profile decides it: eager by rule, since a launch costs more than the work",
        "decision": None,
        "stale": None,
        "differs": {},
        "measured_rows": [],
        "nearest": [],
        "set_aside": {},
    }


def test_the_nearest_that_are_stored_are_told_where_none_is_exact():
    publish(decided(LARGE._replace(rows=8192, temperature="number")))
    publish(decided(LARGE._replace(needs_grad=True)))
    lines = str(explained()).splitlines()
    assert lines[2:] == [
        "  near: 1024 x 1031 float32 on cpu (user store): needs_grad is True there, and False here",
        "  near: 8192 x 1031 float32 on cpu (user store): rows is 8192 there, and 1024 here; temperature is number there, and "
        "none here",
    ]
    assert explained().to_dict()["nearest"][0]["differs"] == {"needs_grad": [True, False]}
    publish(decided())
    assert explained().nearest == ()


def test_a_problem_that_the_next_call_measures():
    found = explained()
    assert str(found) == f"{NAMED}: not decided yet\n  the next call measures it, within its budget"
    assert found.backend is None and found.source is None and found.decision is None


@pytest.mark.parametrize(("name", "why"), [("off", "the mode is 'off'"), ("lookup", "the mode is 'lookup'")])
def test_a_problem_that_the_default_rule_will_take(name, why, mode):
    mode(name)
    told = f"the next call takes the default rule; it does not measure, because {why}"
    assert str(explained()) == f"{NAMED}: not decided yet\n  {told}"


def test_a_forked_child_and_one_of_several_ranks(monkeypatch):
    monkeypatch.setattr(serving, "_forked", True)
    assert explained().why.endswith("it does not measure, because this process is a forked child of another")
    monkeypatch.setattr(serving, "_forked", False)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert "this process is one of several ranks; call tune(..., group=...) on all of them" in explained().why


def test_options_count():
    options = {"temperature": 0.7, "return_entropy": True, "out_dtype": torch.bfloat16}
    found = explained(LOGITS.clone().requires_grad_(), LABELS, **options)
    assert found.problem.needs_grad and found.problem.entropy and found.problem.out_dtype == torch.bfloat16
    assert "(gradient, entropy, temperature (number), not 16-byte aligned, result in bfloat16)" in str(found)
    assert explained(LOGITS[None, :, :], LABELS[None, :, None]).problem == explained().problem


def test_wrong_arguments_are_told_as_by_the_call():
    with pytest.raises(clp.InputError, match="labels"):
        clp.explain(LOGITS, LABELS[:3])
    with pytest.raises(clp.InputError, match="labels\\[0\\]"):
        clp.explain(LOGITS, LABELS + 1031)


def test_a_decision_with_all_that_was_found():
    publish(decided(chosen="compiled", candidates=all_measured() | {"compiled": measured("compiled", seconds=1e-3)}))
    found = explained()
    assert (found.backend, found.source, found.measured_rows) == ("compiled", "user store", (1024,))
    lines = str(found).splitlines()
    assert lines[1:5] == [
        "  stored in the user's profiles",
        "  profiles hold it for N of 1024",
        "  FASTER_CLEAR: compiled is faster",
        f"  measured {found.decision.measured_at} at N = 1024: 10 rounds, full check",
    ]
    assert sorted(line for line in lines[5:] if line[2] != " ") == [
        "  compiled    chosen: slower, as it was",
        "  cpp         slower: slower, as it was",
        "  eager       slower: slower, as it was",
        "  flash_attn  unavailable: needs a GPU",
    ]
    assert (
        "              1 ms a call, 1.00x (0.90 to 1.10) the speed of eager, 0.50 x the logits of extra memory, 40 % of "
        "bandwidth, 1 of 1 checks, row invariant, first call 0.5 s, paid for after 500 calls"
    ) in lines
    assert found.to_dict()["decision"]["candidates"]["compiled"]["speedup"] == {"low": 0.9, "median": 1.0, "high": 1.1}


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
def test_where_a_decision_comes_from(source, why, tmp_path, monkeypatch):

    monkeypatch.setattr(store, "bundled_store", lambda: Store(tmp_path / "bundled"))
    places = {
        "user store": user_store(),
        "project profiles": Store(tmp_path / "profiles"),
        "bundled profiles": Store(tmp_path / "bundled"),
    }
    if source in places:
        publish(decided(), places[source])
    else:
        decisions.remember_decision(decided(), source)
    for _ in range(2):  # before and after a call
        found = explained()
        assert (found.backend, found.source, found.why) == ("eager", source, why)
        serving.serve(found.problem, CPU, policy_module.policy())


def test_the_nearest_decision(mode):
    publish(decided(LARGE._replace(rows=2048)))
    publish(decided(LARGE._replace(rows=8192), measured_rows=1024))
    found = explained()
    assert found.backend is None and found.measured_rows == (2048, 8192)  # since the call measures it
    mode("lookup")
    for _ in range(2):
        found = explained()
        assert (found.backend, found.source) == ("eager", "nearest")
        assert found.why == "stored for another number of rows, the nearest that was measured"
        assert "profiles hold it for N of 2048, 8192" in str(found)
        assert found.decision is not None and found.decision.problem.rows == 2048
        serving.serve(found.problem, CPU, policy_module.policy())
    big = torch.empty(1, 1031).expand(8192, 1031).contiguous()
    assert "at N = 8192, timed with 1024 rows" in str(explained(big, LABELS.repeat(8)))


def test_the_default_rule_and_a_backend_that_was_set_aside(monkeypatch, mode):
    mode("lookup")
    monkeypatch.setattr(serving, "_short_check", lambda *_: serving._Short(True, True))
    serving.serve(LARGE, CPU, policy_module.policy())
    found = explained()
    assert (found.backend, found.source) == ("cpp", "default rule")
    assert "the first that can run it and passes a short check here; nothing was measured" in found.why
    decisions.set_aside("cpp", LARGE, RuntimeError("it broke"))
    found = explained()
    assert (found.backend, found.source) == ("eager", "set aside")
    assert found.why == "the backend that served it failed, and is set aside in this process"


def test_a_stale_decision(mode):
    changed = {"compiled": measured("compiled", fingerprint="0" * 16)}
    publish(decided(candidates=all_measured() | changed))
    found = explained()
    assert found.backend is None and found.decision is not None  # what is known, and that it will not do
    assert found.why == "the next call measures it again, since what is known of it is stale, within its budget"
    assert "  stale: backend 'compiled' has changed since this was measured" in str(found).splitlines()
    mode("lookup")
    found = explained()
    assert (found.backend, found.source) == ("eager", "user store")
    assert found.stale == "backend 'compiled' has changed since this was measured"


def test_facts_that_differ_but_do_not_count():
    environment = {**environment_at(CPU).to_dict(), "python": "3.0.1", "memory_bytes": None}
    publish(decided(environment=environment))
    found = explained()
    assert found.differs["python"][0] == "3.0.1" and set(found.differs) == {"python", "memory_bytes"}
    assert f"  python was 3.0.1 then, and is {found.differs['python'][1]} here" in str(found).splitlines()


def test_what_requires_a_hit_or_invariant_rows(mode):
    publish(decided(LARGE._replace(rows=2048)))
    with clp.autotune(require_hit=True):
        found = explained()
        assert found.backend is None
        assert found.why.startswith(f"the next call raises ProfileError: no profile decides {NAMED}")
        mode("off")
        with clp.autotune("off"):
            assert "the mode is 'off', in which no profile is looked at" in explained().why
    no = {"row_invariant": False}
    candidates = all_measured() | {name: measured(name, **no) for name in ("cpp", "compiled")}
    publish(decided(LARGE._replace(needs_grad=True), chosen="compiled", candidates=candidates))
    with clp.autotune("lookup", row_invariant=True):
        found = explained()
        assert (found.backend, found.source) == ("eager", "user store")
        assert "rows depend on N" in str(found)


def test_what_was_decided_but_failed_is_not_measured_again():
    publish(decided(chosen="compiled"))
    decisions.set_aside("compiled", LARGE, RuntimeError("it broke"))
    assert explained().set_aside == {"compiled": "RuntimeError: it broke"}
    assert "  set aside: compiled raised RuntimeError: it broke" in str(explained()).splitlines()
    assert explained().why == (
        "the next call takes the default rule; it does not measure, because it has been measured already, and what was "
        "chosen may not serve now"
    )


def test_no_backend_of_others_is_imported(monkeypatch):
    module = sys.modules["compiled_logprobs.backends"]  # a function of that name stands before it in the package
    monkeypatch.setattr(module, "_targets", dict(module._targets))
    clp.register_backend("elsewhere", "antigravity:Backend")
    assert explained().backend is None
    publish(decided(candidates=all_measured() | {"elsewhere": Candidate("unavailable", "not installed")}))
    assert explained().backend == "eager"
    assert "antigravity" not in sys.modules


def test_what_was_stored_by_a_measurement_without_figures_can_be_shown():
    bare = measured(
        "compiled",
        speedup=None,
        seconds=None,
        first_call_seconds=None,
        extra_bytes=None,
        extra_multiple=None,
        percent_of_bandwidth=None,
        checks=(),
        row_invariant=None,
    )
    publish(decided(chosen="compiled", candidates=all_measured() | {"compiled": bare}))
    lines = str(explained()).splitlines()
    assert sum(line.startswith("              ") for line in lines) == 2  # eager's and cpp's


def test_a_measurement_of_this_very_process_can_be_shown(monkeypatch):
    monkeypatch.setattr(serving, "Tuner", FakeTuner())
    clp.log_probs_from_logits(LOGITS, LABELS)
    found = explained()
    assert (found.backend, found.source) == ("eager", "tuned here") and found.measured_rows == (1024,)

"""Decisions as profiles hold them: they come back as they were, and nothing else is taken for one."""

import copy
import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiled_logprobs.choose.explain import candidate_figures
from compiled_logprobs.decision import Candidate, CheckResult, Decision, Record, Speedup
from compiled_logprobs.errors import ProfileError
from compiled_logprobs.problem import Problem
from compiled_logprobs.store import bundled_store
from tests.helpers.stored_decisions import LARGE, decided, measured

JSON = {"null": None, "bool": True, "int": 7, "float": 1.5, "string": "text", "array": [[7]], "object": {"a": [7]}}
"""A value of each of JSON's types; the last two are no valid content of any field."""
PLACES: dict[type, tuple[str | int, ...]] = {
    Record: (),
    Candidate: ("candidates", "eager"),
    Speedup: ("candidates", "eager", "speedup"),
    CheckResult: ("candidates", "eager", "checks", 0),
}
"""Where in a record an object of each class lies."""


def plain(decision: Decision) -> dict[str, Any]:
    return json.loads(json.dumps(decision.record(), allow_nan=False))


def kinds(annotation: Any) -> Iterator[str]:
    """JSON's types of a field that is annotated so."""
    if isinstance(annotation, types.UnionType):
        for each in typing.get_args(annotation):
            yield from kinds(each)
    elif annotation is float:
        yield from ("float", "int")
    else:
        yield from {types.NoneType: ["null"], bool: ["bool"], int: ["int"], str: ["string"]}.get(annotation, [])


def wrong_values(owner: type, name: str) -> list[Any]:
    right = set(kinds(typing.get_type_hints(owner)[name]))
    return [value for kind, value in JSON.items() if kind not in right]


FIELDS = [(owner, field.name) for owner in PLACES for field in dataclasses.fields(owner)]


def within(record: dict[str, Any], owner: type) -> Any:
    for step in PLACES[owner]:
        record = record[step]  # type: ignore[index]
    return record


def test_a_decision_comes_back_from_its_record():
    decision = decided(chosen="compiled", left_out=("other",), telemetry=None, telemetry_reason="no such device")
    assert Decision.from_record(LARGE, plain(decision)) == decision
    for name, candidate in (told := decision.to_dict())["candidates"].items():
        assert candidate.pop("worst_error") == decision.candidates[name].worst_error
        assert candidate.pop("calls_to_pay") == decision.calls_to_pay(name)
    assert told == {**decision.record(), "problem": told["problem"]}
    assert json.loads(json.dumps(decision.to_dict(), allow_nan=False))["problem"]["vocab"] == 1031


@pytest.mark.parametrize(("owner", "name"), FIELDS, ids=lambda part: getattr(part, "__name__", part))
def test_no_field_may_have_another_type(owner, name):
    tried = wrong_values(owner, name)
    assert len(tried) >= 3
    for value in tried:
        record = plain(decided())
        within(record, owner)[name] = value
        with pytest.raises(ProfileError, match=f"its decision has no valid .*{name}"):
            Decision.from_record(LARGE, record)


REQUIRED = [
    (owner, field.name)
    for owner in PLACES
    for field in dataclasses.fields(owner)
    if field.default is dataclasses.MISSING
]


@pytest.mark.parametrize(("owner", "name"), REQUIRED, ids=lambda part: getattr(part, "__name__", part))
def test_no_field_may_be_missing(owner, name):
    record = plain(decided())
    del within(record, owner)[name]
    with pytest.raises(ProfileError, match=f"its decision has no valid .*{name}"):
        Decision.from_record(LARGE, record)


def test_fields_that_a_later_release_adds_are_passed_over():
    record = plain(decided())
    for owner in PLACES:
        within(record, owner)["colour"] = "red"
    assert Decision.from_record(LARGE, record) == decided()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"chosen": "flash_attn"}, "its chosen backend 'flash_attn' is not among those that it measured"),
        ({"chosen": "other"}, "its chosen backend 'other' is not among"),
        ({"chosen": "os:system"}, "its chosen backend 'os:system' is not among"),
        ({"baseline": "other"}, "its baseline backend 'other' is not among"),
        ({"candidates": {}}, "its chosen backend 'eager' is not among"),
        ({"measured_rows": 0}, "it was measured with 0 rows; valid is 1 or more"),
        ({"measured_rows": -4}, "it was measured with -4 rows"),
    ],
)
def test_a_record_that_contradicts_itself_is_none(change, told):
    with pytest.raises(ProfileError) as error:
        Decision.from_record(LARGE, plain(decided()) | change)
    assert told in str(error.value)


NUMBERS = st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(FIELDS), VALUES)
def test_whatever_a_field_holds_it_is_told_in_words_or_can_be_shown(field, value):
    owner, name = field
    record = copy.deepcopy(plain(decided(chosen="compiled")))
    within(record, owner)[name] = value
    try:
        decision = Decision.from_record(LARGE, record)
    except ProfileError:
        return
    json.dumps(decision.to_dict(), allow_nan=False)
    decision.best_row_invariant()
    for each in decision.candidates:
        candidate_figures(decision, each)


@given(NUMBERS, NUMBERS, NUMBERS, st.integers(1, 2**62))
def test_the_calls_that_pay_are_a_number_or_none(first, slow, fast, rows):
    candidates = {"eager": measured("eager", seconds=slow), "compiled": measured("compiled", seconds=fast)}
    candidates["compiled"] = dataclasses.replace(candidates["compiled"], first_call_seconds=first)
    calls = decided(candidates=candidates, measured_rows=rows).calls_to_pay("compiled")
    assert calls is None or calls >= 1


def test_a_first_call_is_paid_for_by_what_the_others_save():
    candidates = {"eager": measured("eager", seconds=3e-3), "compiled": measured("compiled", seconds=1e-3)}
    assert decided(candidates=candidates).calls_to_pay("compiled") == 250  # 0.5 s, at 2 ms a call
    assert (
        decided(candidates=candidates, measured_rows=512).calls_to_pay("compiled") == 125
    )  # at 4 ms a call of all rows
    assert decided(candidates=candidates).calls_to_pay("eager") is None
    candidates["compiled"] = measured("compiled", seconds=1e-3, first_call_seconds=None)
    assert decided(candidates=candidates).calls_to_pay("compiled") is None


def test_the_fastest_of_those_whose_rows_do_not_depend_on_n():
    slow, fast = measured("eager", seconds=3e-3), measured("compiled", seconds=1e-3)
    no = {"row_invariant": False}
    assert decided(chosen="eager").best_row_invariant() == "eager"
    both = {"eager": slow, "compiled": fast, "third": measured("eager", seconds=2e-3, **no)}
    assert decided(chosen="third", candidates=dict(both)).best_row_invariant() == "compiled"
    both["compiled"] = measured("compiled", seconds=1e-3, row_invariant=None)  # it was not found out
    assert decided(chosen="third", candidates=dict(both)).best_row_invariant() == "eager"
    both["eager"] = measured("eager", **no)
    assert decided(chosen="third", candidates=dict(both)).best_row_invariant() is None


def test_a_speedup_in_words():
    assert str(Speedup(1.5, 2.0, 2.5)) == "2.00x (1.50 to 2.50)"
    assert str(Speedup(None, 2.0, None)) == "2.00x"


def test_a_decision_is_for_the_problem_that_it_was_read_for():
    other = Problem("cpu", 2048, 1031, LARGE.dtype)
    assert Decision.from_record(other, plain(decided())).problem == other


def test_the_profiles_that_ship_are_whole_and_name_nobody():
    stored = list(bundled_store().records())
    assert stored
    for environment, problem, record in stored:
        decision = Decision.from_record(problem, record)
        assert decision.winner.checks and decision.winner.checks_passed == len(decision.winner.checks)
        assert decision.environment["fingerprint"] == environment and not decision.short_check
        assert bundled_store().evidence(environment, problem)["seconds"].keys() >= {decision.chosen, decision.baseline}
    for file in bundled_store().root.rglob("*.json"):
        assert not re.search(r"/(home|root|tmp|usr|opt|work|Users)/", file.read_text()), file

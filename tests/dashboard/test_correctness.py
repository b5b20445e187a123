"""Correctness: all shapes first, signs before the rest, then one check of one backend to the inputs and tokens."""

import dataclasses

import pytest
from compiled_logprobs_dashboard.tables import correctness as tables

from tests.helpers.dashboard_checked import checked, detailed
from tests.helpers.dashboard_pages import opened, table_of, text_of
from tests.helpers.dashboard_stores import here, problem


@pytest.fixture
def found(load, scenario):
    """Frames, profile, and the counts of a store whose check has details."""
    detailed(scenario("no profile"))
    frames, profile = load()
    return frames, profile, tables.counts(frames, profile)


def test_counts_are_over_all_decisions_failures_of_signs_first(load):
    frames, profile = load("signs")
    table = tables.counts(frames, profile)
    rows = {(row.backend, row.check): (row.passed, row.failed) for row in table.itertuples()}
    assert rows["compiled", "log_prob_sign"] == (0, 2) and rows["compiled", "log_prob_error"] == (35, 2)
    assert rows["cpp", "gradient_error"] == (37, 0)
    assert table[["backend", "check"]].values.tolist()[:2] == [
        ["compiled", "log_prob_sign"],
        ["compiled", "log_prob_error"],
    ]
    wide = tables.matrix(frames, profile, table)
    assert list(wide.columns) == ["lost", "cannot run", "log_prob_sign", "log_prob_error", "gradient_error"]
    assert wide.index[0] == "compiled" and wide.loc["compiled", "log_prob_error"] == "✗ 2 of 37"
    assert wide.loc["cpp", "log_prob_error"] == "✓ 37" and wide.loc["cpp", "log_prob_sign"] == ""
    assert wide.loc["flash_attn", "cannot run"] == 37 and wide["lost"].tolist() == [0] * 4


def test_what_did_not_get_as_far_is_counted_beside(found):
    wide = tables.matrix(*found)
    assert wide.loc["lost", "lost"] == 1 and wide.loc["nan", "nan_pattern"].startswith("✗ 1 of 1")
    assert wide.columns[2] == "log_prob_sign" and wide.columns[3].startswith("log_prob_error"), (
        "signs, then what failed"
    )
    assert set(wide.index[:2]) == {"compiled", "nan"} and wide.loc["cpp", "log_prob_error"] == "✓ 2"


def test_where_a_check_failed_comes_first(load):
    frames, profile = load("signs")
    places = tables.where(frames, profile, "compiled", "log_prob_error")
    assert len(places) == 37 and (places["verdict"] == tables.FAILED).sum() == 2
    assert places["verdict"].tolist()[:3] == [tables.FAILED, tables.FAILED, tables.PASSED]
    assert set(places["N"][:2]) == {512}


def test_one_check_by_input_and_the_worst_tokens(found):
    frames, profile, _ = found
    key = int(tables.where(frames, profile, "compiled", "log_prob_error")["key"].iloc[0])
    decision = frames.decision(key)
    evidence = frames.evidence(key, decision)
    inputs = tables.by_input(decision.candidates["compiled"], evidence, "compiled", "log_prob_error")
    by = inputs.set_index("input")
    assert by["verdict"].iloc[0] == tables.FAILED and {"all inputs", "wide", "normal"} <= set(by.index)
    assert float(by.loc["wide", "worst"]) == pytest.approx(0.5, rel=1e-2) and by.loc["wide", "of the limit"].endswith(
        "times the limit"
    )
    tokens = tables.tokens(evidence, "compiled")
    assert tokens["error"].map(float).is_monotonic_decreasing and tokens["of"].iloc[0] == "log-probability"
    half = tokens[tokens["input"] == "wide"].iloc[0]
    assert float(half["float64"]) - float(half["got"]) == pytest.approx(0.5, rel=1e-3) and half["token"] >= 0
    assert tables.tokens(evidence, "nan").iloc[0][["got", "of the limit"]].tolist() == ["nan", "no number"]
    assert (
        tables.tokens(None, "cpp").empty and len(tables.by_input(decision.candidates["cpp"], None, "cpp", "runs")) == 1
    )


@pytest.mark.slow
def test_the_page_goes_from_all_shapes_to_one_token(scenario):
    where = scenario("no profile")
    detailed(where)
    at = opened("correctness")
    assert not at.exception and "WRONG in 1 of 2 decisions" in at.error[0].value.replace("\\", "")
    matrix = table_of(at, "backend", "lost", "log_prob_sign")
    assert set(matrix["backend"]) == {"eager", "cpp", "flash_attn", "compiled", "nan", "lost"}
    assert (at.selectbox(key="backend").value, at.selectbox(key="check").value)[0] in ("compiled", "nan")
    at = opened("correctness", backend="compiled", check="log_prob_error")
    assert at.error[1].value.replace("\\", "") == "**log_prob_error: off**", "the cause"
    assert table_of(at, "of the limit", "verdict")["verdict"].iloc[0] == tables.FAILED
    assert table_of(at, "got", "float64") is not None and at.query_params["backend"] == "compiled"
    at.selectbox(key="backend").set_value("cpp").run()
    assert not at.exception and any("cpp passed log_prob_error" in one.value.replace("\\", "") for one in at.success)


@pytest.mark.slow
def test_without_evidence_that_is_said(scenario):
    decision, evidence = checked(problem(), with_failures=False)
    scenario("no profile").publish(here(), decision, dataclasses.replace(evidence, cases={}))
    said = text_of(opened("correctness"))
    assert "No check failed in 1 decision: cpp, eager" in said and "No details by input are stored" in said

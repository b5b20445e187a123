"""The tables of the sign check: verdicts by backend, dtype and input, errors, and the tokens most off."""

import json
import math

import pytest
from compiled_logprobs_dashboard import data, index
from compiled_logprobs_dashboard.charts import sign_check as figures
from compiled_logprobs_dashboard.tables import sign_check as evidence

from compiled_logprobs.check.report import MEANING
from compiled_logprobs.decision import QUANTILES
from tests.helpers.dashboard_checked import checked, detailed, gate, half_a_nat_off
from tests.helpers.dashboard_stores import (
    good,
    here,
    problem,
    scenario,  # noqa: F401 - a fixture
)


@pytest.fixture
def found(scenario, tmp_path):  # noqa: F811
    store = scenario("no profile")
    detailed(store)
    return gathered(tmp_path)


def gathered(tmp_path):
    tables = index.load(index.sources(), tmp_path / "cache")
    (row,) = tables.environments.itertuples()
    shape = data.first_shape(tables, row.source, row.environment)
    return evidence.gather(tables, row.source, row.environment, shape)[0]


def cell(table, **where):
    for column, value in where.items():
        table = table[table[column] == value]
    (row,) = table.to_dict("records")
    return row


def test_every_dtype_is_gathered(found):
    assert [one.dtype for one in found] == ["float32", "bfloat16"]
    assert all(one.exact and not one.missing for one in found)


def test_the_overview_has_a_verdict_of_each(found):
    table = evidence.overview(found)
    assert list(table.columns) == evidence.CHECKS
    assert cell(table, backend="cpp", dtype="float32", check="log_prob_error")["verdict"] == "pass"
    failed = cell(table, backend="compiled", dtype="float32", check="log_prob_error")
    assert failed["verdict"] == "fail" and failed["figure"] == pytest.approx(0.5, rel=1e-2) and failed["limit"] < 0.5
    assert "limit" in failed["detail"]
    lost = cell(table, backend="lost", dtype="float32", check="log_prob_error")
    assert lost["verdict"] == "error" and lost["detail"] == "crashed: check: killed by SIGSEGV"
    unable = cell(table, backend="flash_attn", dtype="bfloat16", check="log_prob_error")
    assert unable["verdict"] == "unsupported" and "needs a GPU" in unable["detail"]


def test_by_input(found):
    table = evidence.by_input(found)
    wide = cell(table, backend="compiled", dtype="float32", input="wide", check="log_prob_error")
    _, cases = gate(half_a_nat_off)
    told = next(
        check for case in cases if case.case == "wide" for check in case.checks if check.name == "log_prob_error"
    )
    assert wide["verdict"] == "fail" and wide["figure"] == pytest.approx(told.figure, rel=1e-5)
    # Only the ordinary input is run twice, so that nothing else can show a stale result.
    assert set(table.loc[table["check"] == "stale_result", "input"]) == {"normal"}
    assert list(dict.fromkeys(table["check"])) == [name for name in MEANING if name in set(table["check"])]
    assert list(dict.fromkeys(table["input"]))[:3] == ["no rows", "one row", "normal"]


def test_what_a_stop_left_out_was_not_run(found):
    """A NaN in front stops nothing, so that this is of a candidate whose case is cut short."""
    one = found[0]
    cut = one.evidence.cases["nan"][:3]
    short = one._replace(evidence=type(one.evidence)({}, {**one.evidence.cases, "nan": cut}))
    table = evidence.by_input([short])
    assert cell(table, backend="nan", input="wide", check="runs")["verdict"] == "not run"
    assert cell(table, backend="nan", input="wide", check="runs")["detail"].startswith("not run, since another check")


def test_the_matrix_has_glyphs_and_words(found):
    table = evidence.by_input(found)
    wide = evidence.matrix(table, ["backend", "dtype", "check"], "input").shown
    row = wide[(wide["backend"] == "compiled") & (wide["check"] == "log_prob_error")].iloc[0]
    assert row["wide"] == "✗ FAIL" and row["no rows"] == ""
    assert set(wide["wide"]) <= {"✓ pass", "✗ FAIL", "· not run", "– unsupported", "! error", ""}
    assert len(wide) == len(table.drop_duplicates(["backend", "dtype", "check"]))


def test_the_check_of_the_dtype_is_no_key(found):
    """Nor does a foreign name that a key has stand in its way."""
    table = evidence.overview(found)
    table.loc[table["check"] == "shape", "check"] = "backend"
    matrix = evidence.matrix(table, ["backend", "dtype"], "check")
    assert list(matrix.shown.columns[:2]) == ["backend", "logits"] and matrix.across["dtype"] == "dtype"
    assert matrix.across["backend ·"] == "backend" and matrix.shown.columns.is_unique
    assert list(matrix.keys.columns) == ["backend", "dtype"] and len(matrix.keys) == len(matrix.shown)


def test_failures_alone(found):
    table = evidence.overview(found)
    failed = table[evidence.has_failed(table)]
    assert set(failed["verdict"]) == {"fail", "error"} and set(failed["dtype"]) == {"float32"}
    assert set(failed["backend"]) == {"compiled", "nan", "lost"}


def test_errors_and_their_charts(found):
    table = evidence.errors(found)
    part = table[(table["dtype"] == "float32") & (table["what"] == "log_prob")]
    row = cell(part, backend="compiled", input="wide")
    assert row["q100"] == pytest.approx(0.5, rel=1e-2) and row["limit"] < 1e-2
    ranges = figures.ranges(part, "log_prob")
    medians = [trace for trace in ranges.data if trace.name.endswith("median")]
    assert {trace.name.split(",")[0] for trace in medians} == {"P cpp", "C compiled", "E eager", "N nan"}
    drawn = next(trace for trace in medians if "compiled" in trace.name)
    assert max(drawn.x) == pytest.approx(0.5, rel=1e-2)
    assert ranges.layout.xaxis.type == "log"
    one = part[part["input"] == "wide"]
    shares = figures.shares(one, "log_prob")
    assert all(list(trace.y) == [100 * share for share in QUANTILES] for trace in shares.data)
    assert "compiled at most 0.5" in figures.in_words(one, "log_prob")
    assert "<b> at most" in figures.in_words(one.assign(backend="<b>"), "log_prob"), (
        "a text, which is escaped elsewhere"
    )


def test_an_error_of_zero_can_be_drawn(found):
    table = evidence.errors(found).assign(q0=0.0, q5=0.0)
    part = table[(table["dtype"] == "float32") & (table["what"] == "log_prob")]
    drawn = [x for trace in figures.ranges(part, "log_prob").data for x in trace.x if x is not None]
    assert drawn and min(drawn) > 0


def test_the_worst_tokens_come_first(found):
    table = evidence.tokens(found)
    assert table.iloc[0]["backend"] == "nan" and table.iloc[0]["got"] == "nan" and table.iloc[0]["error"] == math.inf
    errors = table["error"].tolist()
    assert errors == sorted(errors, reverse=True)
    assert {"compiled", "cpp", "eager"} <= set(table["backend"])
    half = table[(table["backend"] == "compiled") & (table["input"] == "wide")].iloc[0]
    assert float(half["float64"]) - float(half["got"]) == pytest.approx(0.5, rel=1e-3) and half["token"] >= 0


def test_what_is_recorded_is_told(found):
    table = evidence.recorded(found)
    assert cell(table, backend="cpp", dtype="float32")["row invariant"] == "yes"


def test_a_profile_without_details_says_so(scenario, tmp_path):  # noqa: F811
    scenario("one")
    (one,) = gathered(tmp_path)
    assert one.missing == "what is stored beside the decision tells only times"
    assert evidence.by_input([one]).empty and evidence.errors([one]).empty and evidence.tokens([one]).empty
    assert not evidence.overview([one]).empty
    assert evidence.without_details([one]) == {"bfloat16": ["compiled", "cpp", "eager"]}


def test_evidence_that_is_not_there_or_not_valid(scenario, tmp_path):  # noqa: F811
    scenario("partial")
    found = gathered(tmp_path)
    assert [one.missing for one in found] == ["nothing is stored beside the decision"]
    store = scenario("no profile")
    store.publish(here(), good(), {"seconds": {}, "cases": {"cpp": "all well"}})
    (one,) = gathered(tmp_path)
    assert one.missing.startswith("its evidence has no valid cases.cpp")


def test_backends_of_which_details_are_missing_are_named(scenario, tmp_path):  # noqa: F811
    store = scenario("no profile")
    decision, whole = checked(problem(), with_failures=False)
    record = json.loads(json.dumps(whole.record()))
    del record["cases"]["eager"]
    store.publish(here(), decision, record)
    (one,) = gathered(tmp_path)
    assert evidence.without_details([one]) == {"bfloat16": ["eager"]}
    assert "eager" not in set(evidence.by_input([one])["backend"])

"""The sign check, its tables and its page: verdicts by backend, dtype and input, errors, and the tokens most off."""

import dataclasses
import math

import pytest
from compiled_logprobs_dashboard import selection
from compiled_logprobs_dashboard.charts import sign_check as charts
from compiled_logprobs_dashboard.tables import sign_check as tables

from compiled_logprobs.check.report import MEANING
from compiled_logprobs.decision import QUANTILES
from tests.helpers.dashboard_checked import checked, detailed, gate
from tests.helpers.dashboard_pages import charts_of, metrics_of, opened, table_of, text_of
from tests.helpers.dashboard_stores import here, problem
from tests.helpers.functions_to_check import half_a_nat_off

KEYS = ["backend", "dtype"]


@pytest.fixture
def gathered(load):
    def of(name=None):
        frames, profile = load(name)
        return tables.gather(frames, profile, selection.first_shape(frames, profile))[0]

    return of


@pytest.fixture
def found(scenario, gathered):
    detailed(scenario("no profile"))
    return gathered()


def cell(table, **where):
    for column, value in where.items():
        table = table[table[column] == value]
    (row,) = table.to_dict("records")
    return row


def test_the_overview_has_a_verdict_of_each(found):
    assert [one.dtype for one in found] == ["float32", "bfloat16"]
    assert all(one.exact and not one.missing for one in found)
    table = tables.overview(found)
    assert cell(table, backend="cpp", dtype="float32", check="log_prob_error")["verdict"] == "pass"
    failed = cell(table, backend="compiled", dtype="float32", check="log_prob_error")
    assert failed["verdict"] == "fail" and failed["figure"] == pytest.approx(0.5, rel=1e-2) and failed["limit"] < 0.5
    assert "limit" in failed["detail"]
    lost = cell(table, backend="lost", dtype="float32", check="log_prob_error")
    assert lost["verdict"] == "error" and lost["detail"] == "crashed: check: killed by SIGSEGV"
    unable = cell(table, backend="flash_attn", dtype="bfloat16", check="log_prob_error")
    assert unable["verdict"] == "unsupported" and "needs a GPU" in unable["detail"]
    failed = table[tables.has_failed(table)]
    assert set(failed["verdict"]) == {"fail", "error"} and set(failed["dtype"]) == {"float32"}
    assert set(failed["backend"]) == {"compiled", "nan", "lost"}
    assert cell(tables.recorded(found), backend="cpp", dtype="float32")["row invariant"] == "yes"


def test_by_input(found):
    table = tables.by_input(found)
    wide = cell(table, backend="compiled", dtype="float32", input="wide", check="log_prob_error")
    _, cases = gate(half_a_nat_off)
    (told,) = (check for case in cases if case.case == "wide" for check in case.checks if check.name == wide["check"])
    assert wide["verdict"] == "fail" and wide["figure"] == pytest.approx(told.figure, rel=1e-5)
    # Only the ordinary input is run twice, so that nothing else can show a stale result.
    assert set(table.loc[table["check"] == "stale_result", "input"]) == {"normal"}
    assert list(dict.fromkeys(table["check"])) == [name for name in MEANING if name in set(table["check"])]
    assert list(dict.fromkeys(table["input"]))[:3] == ["no rows", "one row", "normal"]


def test_what_a_stop_left_out_was_not_run(found):
    evidence = found[0].evidence
    cases = {**evidence.cases, "nan": evidence.cases["nan"][:3]}  # a NaN in front stops nothing: so it is cut short
    table = tables.by_input([found[0]._replace(evidence=dataclasses.replace(evidence, cases=cases))])
    row = cell(table, backend="nan", input="wide", check="runs")
    assert row["verdict"] == "not run" and row["detail"].startswith("not run, since another check")


def test_the_matrix_has_glyphs_and_words(found):
    table = tables.by_input(found)
    wide = tables.matrix(table, [*KEYS, "check"], "input").shown
    row = wide[(wide["backend"] == "compiled") & (wide["check"] == "log_prob_error")].iloc[0]
    assert row["wide"] == "✗ FAIL" and row["no rows"] == ""
    assert set(wide["wide"]) <= {"✓ pass", "✗ FAIL", "· not run", "– unsupported", "! error", ""}
    assert len(wide) == len(table.drop_duplicates([*KEYS, "check"]))
    matrix = tables.matrix(tables.overview(found), KEYS, "check")
    assert matrix.across["dtype"] == "dtype" and matrix.shown.columns.is_unique, "a check is called as a key is"
    assert list(matrix.shown.columns[:2]) == ["backend", "logits"] and len(matrix.keys) == len(matrix.shown)


def test_errors_and_their_charts(found):
    table = tables.errors(found)
    part = table[(table["dtype"] == "float32") & (table["what"] == "log_prob")]
    row = cell(part, backend="compiled", input="wide")
    assert row["q100"] == pytest.approx(0.5, rel=1e-2) and row["limit"] < 1e-2
    ranges = charts.ranges(part, "log_prob")
    medians = [trace for trace in ranges.data if trace.name.endswith("median")]
    assert {trace.name.split(",")[0] for trace in medians} == {"P cpp", "C compiled", "E eager", "N nan"}
    drawn = next(trace for trace in medians if "compiled" in trace.name)
    assert max(drawn.x) == pytest.approx(0.5, rel=1e-2)
    assert ranges.layout.xaxis.type == "log"
    one = part[part["input"] == "wide"]
    shares = charts.shares(one, "log_prob")
    assert all(list(trace.y) == [100 * share for share in QUANTILES] for trace in shares.data)
    assert "compiled at most 0.5" in charts.in_words(one, "log_prob")
    exact = charts.ranges(part.assign(q0=0.0, q5=0.0), "log_prob")
    assert min(x for trace in exact.data for x in trace.x if x is not None) > 0, "a logarithmic axis has no 0"


def test_the_worst_tokens_come_first(found):
    table = tables.tokens(found)
    assert table.iloc[0]["backend"] == "nan" and table.iloc[0]["got"] == "nan" and table.iloc[0]["error"] == math.inf
    errors = table["error"].tolist()
    assert errors == sorted(errors, reverse=True)
    assert {"compiled", "cpp", "eager"} <= set(table["backend"])
    half = table[(table["backend"] == "compiled") & (table["input"] == "wide")].iloc[0]
    assert float(half["float64"]) - float(half["got"]) == pytest.approx(0.5, rel=1e-3) and half["token"] >= 0


@pytest.mark.filterwarnings("ignore:the stored profile .* is passed over:RuntimeWarning")
def test_a_profile_without_details_says_so(gathered, scenario):
    (bare,) = gathered("one")
    assert bare.missing == "what is stored beside the decision tells only times"
    assert tables.by_input([bare]).empty and tables.errors([bare]).empty and tables.tokens([bare]).empty
    assert not tables.overview([bare]).empty
    assert set(tables.without_details([bare])["bfloat16"]) == {"compiled", "cpp", "eager"}
    gathered("partial")
    for _ in range(2):  # without it, and with one that is no evidence
        assert [each.missing for each in gathered()] == ["nothing that can be read is stored beside the decision"]
        path = scenario("partial").path(here().fingerprint(), problem()).with_suffix(".evidence.json")
        path.write_text('{"cases": 1}')
    decision, evidence = checked(problem(), with_failures=False)
    del evidence.cases["eager"]
    scenario("no profile").publish(here(), decision, evidence)
    found = gathered()
    assert tables.without_details(found) == {"bfloat16": ["eager"]}
    assert "eager" not in set(tables.by_input(found)["backend"])


@pytest.mark.slow
def test_the_page_shows_what_failed_first_and_all_on_demand(scenario):
    detailed(scenario("no profile"))
    at = opened("sign_check")
    assert not at.exception and at.toggle(key="only_failures").value is True
    assert "compiled (float32): FAIL: log_prob_error" in text_of(at)
    assert "lost (float32): could not be checked: crashed" in text_of(at)
    overview = table_of(at, "logits", "log_prob_error")
    assert set(overview["backend"]) == {"compiled", "nan", "lost"} and set(overview["logits"]) == {"float32"}
    assert [chart.alt.split(" of ")[0] for chart in charts_of(at)] == ["Absolute errors", "Share"]
    assert table_of(at, "got").iloc[0]["got"] == "nan" and "row invariant" in table_of(at, "repeatable")

    at.toggle(key="only_failures").set_value(False).run()
    matrix = table_of(at, "logits", "wide")
    assert {"eager", "cpp", "flash_attn", "compiled", "nan", "lost"} == set(matrix["backend"])
    assert set(matrix["logits"]) == {"float32", "bfloat16"} and "✓ pass" in set(matrix["wide"])

    for key, value in (("check_backend", "compiled"), ("check_name", "log_prob_error"), ("check_input", "wide")):
        at.selectbox(key=key).set_value(value).run()  # as a click on a cell does
    assert not at.exception and "✗ FAIL" in text_of(at) and "wide: 0.5" in text_of(at)
    assert metrics_of(at)["Worst that was seen"].startswith("0.5") and float(metrics_of(at)["Limit"]) < 0.01

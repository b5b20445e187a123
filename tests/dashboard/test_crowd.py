"""Hundreds of candidates in one decision, as a foreign profile may have: some are shown, and how many are not is said."""

import dataclasses
import json
from pathlib import Path

import pandas as pd
import pytest
import streamlit as st
from compiled_logprobs_dashboard import data, index
from compiled_logprobs_dashboard import looks as palette
from compiled_logprobs_dashboard import selection as session
from compiled_logprobs_dashboard.charts import decide as figures
from compiled_logprobs_dashboard.tables import decide as verdict
from compiled_logprobs_dashboard.tables import decide_map as winners
from compiled_logprobs_dashboard.tables import sign_check as evidence
from streamlit.testing.v1 import AppTest

from compiled_logprobs.decision import Candidate, CaseEvidence, Check, Decision, Evidence, Speedup, Spread
from tests.helpers import dashboard_stores as stores

APP = str(Path(session.__file__).with_name("app.py"))
COUNT = 200
PAGES = ["decide", "throughput", "memory", "sign_check", "compare", "profiles"]


def crowded(what=None, failing: int = 0) -> Decision:
    """`COUNT` candidates more than the usual ones, each a little slower than the one before; the last have failed a check."""
    candidates = stores.good_candidates()
    like = candidates["compiled"]
    for number in range(COUNT):
        ratio = 2.0 - number / COUNT
        candidates[f"crowd{number:03}"] = dataclasses.replace(
            like, speedup=Speedup(0.95 * ratio, ratio, 1.05 * ratio), seconds=0.2 / ratio
        )
    wrong = (Check("sign", False, 1.0, 0.0, "positive"),)
    for number in range(COUNT - failing, COUNT):
        candidates[f"crowd{number:03}"] = Candidate("wrong", "sign: positive", "0" * 16, checks=wrong)
    return stores.good(what, candidates=candidates)


def details(decision: Decision, inputs: int, checks: int) -> Evidence:
    """The same findings of each candidate, with so many kinds of input and so many checks."""
    told = tuple(Check(f"check {number}") for number in range(checks))
    spread = Spread("log_prob", 10, (1e-7,) * 9, ())
    cases = tuple(CaseEvidence(f"input {number}", 4, told, (spread,)) for number in range(inputs))
    return Evidence({}, {name: cases for name, one in decision.candidates.items() if one.checks})


@pytest.fixture(autouse=True)
def _nothing_cached():
    st.cache_resource.clear()
    yield
    st.cache_resource.clear()


def published(where, decision: Decision, more: Evidence) -> None:
    where.publish(stores.here(), decision, more)


def opened(name: str) -> AppTest:
    at = AppTest.from_file(APP, default_timeout=120)
    at.query_params["only_failures"] = "false"
    at.switch_page(f"app_pages/{name}.py")
    return at.run()


def text_of(at: AppTest) -> str:
    parts = [*at.markdown, *at.caption, *at.info, *at.warning, *at.success, *at.error]
    return " ".join(str(one.value) for one in parts).replace("\\", "")


@pytest.mark.parametrize("name", PAGES)
def test_a_page_shows_some_and_says_how_many_it_does_not(scenario, name):
    where = scenario("no profile")
    for rows in (64, 512):
        decision = crowded(stores.problem(rows), failing=30)
        published(where, decision, details(decision, 3, 3))
    at = opened(name)
    assert not at.exception
    for chart in at.get("plotly_chart"):
        names = {trace["name"].split(",")[0] for trace in json.loads(chart.proto.spec)["data"] if trace.get("name")}
        assert len(names) <= data.MOST_BACKENDS + 4, "with what lines stand for beside the backends"
        assert len(chart.proto.alt) < 4000
    left_out = COUNT + len(stores.good_candidates()) - data.MOST_BACKENDS
    said = {
        "decide": f"{left_out} more candidates are not shown",
        "sign_check": f"bfloat16: {left_out} more candidates are not shown",
        "throughput": f"Not drawn: {left_out - 31} backends more than the {data.MOST_BACKENDS} that are shown",
        "memory": f"Not drawn: {left_out - 31} backends more than the {data.MOST_BACKENDS} that are shown",
        "compare": f"{left_out - 31} more backends are not shown",
        "profiles": "",
    }
    assert said[name] in text_of(at)


def test_the_foremost_are_the_chosen_the_baseline_and_the_fastest():
    decision = crowded(failing=5)
    part, left_out = data.foremost(decision)
    assert len(part.candidates) == data.MOST_BACKENDS and left_out == len(decision.candidates) - data.MOST_BACKENDS
    assert {"cpp", "eager", "compiled", "crowd000", "crowd016"} <= set(part.candidates)
    assert verdict.leaderboard(part)["backend"].iloc[:3].tolist() == ["cpp", "compiled", "crowd000"]
    part, _ = data.foremost(decision, failures_first=True)
    assert {"cpp", "eager", "crowd195", "crowd199", "crowd000"} <= set(part.candidates)
    assert data.foremost(stores.good()) == (stores.good(), 0)


def test_a_matrix_is_cut_and_says_so(scenario, tmp_path):
    where = scenario("no profile")
    decision = stores.good()
    published(where, decision, details(decision, 2 * evidence.MOST_ACROSS, evidence.MOST_DOWN))
    tables = index.load(index.sources(), tmp_path / "cache")
    (row,) = tables.environments.itertuples()
    shape = data.first_shape(tables, row.source, row.environment)
    found, _ = evidence.gather(tables, row.source, row.environment, shape)
    matrix = evidence.matrix(evidence.by_input(found), ["backend", "dtype", "check"], "input")
    assert matrix.shown.shape == (evidence.MOST_DOWN, 3 + evidence.MOST_ACROSS)
    assert len(matrix.keys) == evidence.MOST_DOWN and len(matrix.across) == evidence.MOST_ACROSS
    rows = 3 * evidence.MOST_DOWN + 1  # and that it runs, of flash_attn, which was not checked
    assert matrix.left_out in (
        f"{rows - evidence.MOST_DOWN} rows more and {evidence.MOST_ACROSS} inputs more",
        f"{rows - 1 - evidence.MOST_DOWN} rows more and {evidence.MOST_ACROSS} inputs more",
    )
    at = opened("sign_check")
    assert not at.exception and f"Not shown: {matrix.left_out}." in text_of(at)


def test_squares_of_many_winners_are_put_together():
    names = [f"crowd{number:03}" for number in range(COUNT)]
    table = pd.DataFrame({"rows": range(1, COUNT + 1), "vocab": 1000, "backend": names}).reindex(
        columns=winners.COLUMNS
    )
    table = table.assign(state="alone", opacity=1.0)
    figure = figures.winner_map(table)
    drawn = {trace.name for trace in figure.data}
    assert len(drawn) == data.MOST_BACKENDS + 1
    assert f"… {COUNT - data.MOST_BACKENDS} others, nothing else ran" in drawn
    assert sum(len(trace.x) for trace in figure.data) == COUNT, "each can still be clicked"
    text = winners.in_words(table)
    assert text.endswith(f", {COUNT - data.MOST_BACKENDS} others {COUNT - data.MOST_BACKENDS}.") and len(text) < 400


def test_a_third_partys_letter_is_the_same_on_all_pages(scenario):
    """Beside others of that letter in one decision, and alone in another."""
    where = scenario("no profile")
    like = stores.good_candidates()["compiled"]
    stores.publish(where, stores.good(candidates={**stores.good_candidates(), "mat": like}))
    other = stores.good(stores.problem(64), candidates={**stores.good_candidates(), "mast": like})
    stores.publish(where, other)
    letter = palette.looks(["mat"], ["mast"])["mat"].letter
    assert letter == "A"
    for name in ("decide", "throughput", "memory", "compare"):
        at = AppTest.from_file(APP, default_timeout=120)
        at.query_params["rows"] = "512"
        at.switch_page(f"app_pages/{name}.py").run()
        specs = "".join(chart.proto.spec for chart in at.get("plotly_chart"))
        assert f'"{letter}  mat"' in specs or f'"{letter} mat"' in specs, name
        assert '"M mat"' not in specs and '"M  mat"' not in specs, name

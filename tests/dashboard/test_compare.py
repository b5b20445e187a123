"""Profiles, and dates of one, side by side; and one problem over time."""

import dataclasses

import numpy as np
import pytest
from compiled_logprobs_dashboard.charts import overview as charts
from compiled_logprobs_dashboard.tables import compare as tables
from compiled_logprobs_dashboard.tables.compare import Side

from tests.helpers import dashboard_stores as stores
from tests.helpers.dashboard_pages import charts_of, opened, table_of, text_of


@pytest.fixture
def dated(load):
    frames, profile = load("dated")
    return frames, Side(profile, "2026-10-20"), Side(profile)


def test_a_profile_is_there_as_of_each_day_that_it_was_measured_on(dated):
    frames, before, now = dated
    assert list(tables.sides(frames).values()) == [now, before]
    assert tables.days(frames, now.profile) == ["2026-10-20", "2026-11-20"]
    assert tables.side_in_words(frames, before).endswith(", as of 2026-10-20")
    assert len(frames.past.decisions) == 2 and len(frames.decisions) == 2


def test_two_dates_regressions_first_with_what_won(dated):
    frames, before, now = dated
    table, left_out = tables.matched(frames, before, [now])
    assert table["verdict"].tolist() == ["slower", "faster"] and left_out == []
    slower, faster = table.iloc[0], table.iloc[1]
    assert slower["change"] == pytest.approx(50) and slower["low"] < 50 < slower["high"] and slower["ms"] == 45
    assert (faster["winner"], faster["base winner"]) == ("eager", "cpp")
    words = tables.in_words(table, "before")
    assert words.startswith("Against before, 2 problems: slower 1, faster 1; median ") and words.endswith(
        "another winner in 1."
    )
    figure = charts.changes(table, "before")
    assert {trace.name for trace in figure.data} == {"▲ slower", "▼ faster"} and figure.layout.xaxis.ticksuffix == " %"


def test_any_number_of_profiles_and_what_is_left_out(load):
    frames, profile = load("many")
    sides = list(tables.sides(frames).values())
    assert len(sides) == 3 and sides[0] == Side(profile)
    table, left_out = tables.matched(frames, sides[0], sides[1:])
    assert table["side"].nunique() == 2 and len(left_out) == 2 and left_out[0].endswith("one of both sides lacks")
    older = table[table["side"].str.contains("2.12.0+cpu", regex=False)]
    assert set(older["verdict"]) == {"slower"} and older["change"].tolist() == pytest.approx([40, 40])
    differing = tables.differences(frames, sides[0], sides[1:]).set_index("fact")
    assert differing.loc["torch", "decides"] and len(differing.columns) == 4
    assert tables.in_words(table[:0], "x") == "No problem was decided on both sides."
    assert len({*charts.changes(table, "x").layout.yaxis.categoryarray}) == min(charts.MOST, len(table))


def test_what_is_undecided_is_in_no_figure(load):
    frames, profile = load("undecided")
    table, left_out = tables.matched(frames, Side(profile), [Side(profile)])
    assert len(left_out) in (0, 1) and "undecided" not in set(table["winner"])


def test_times_over_dates(dated):
    frames, _, now = dated
    past = tables.history(frames, stores.problem(64), frames.facts(now.profile)["device"])
    assert past["label"].nunique() == 2 and past["measured_at"].is_monotonic_increasing
    cpp = past[past["backend"] == "cpp"]
    assert cpp["seconds"].tolist() == pytest.approx([0.03, 0.045]) and cpp["chosen"].all()
    figure = charts.trend(past)
    assert len(figure.data) == 3 and figure.layout.yaxis.ticktext[0] == "0" and "ms" in figure.layout.yaxis.ticktext[1]


def test_no_line_goes_through_a_date_on_which_a_backend_was_wrong(load, scenario):
    bad = dataclasses.replace(stores.wrong_sign(stores.problem(64)), measured_at=stores.EARLIER)
    for decision in (stores.good(stores.problem(64), measured_at="2026-09-20T12:00:00Z"), bad):
        stores.publish(scenario("no profile"), decision)
    stores.publish(scenario("no profile"), stores.good(stores.problem(64)))
    frames, profile = load()
    past = tables.history(frames, stores.problem(64), frames.facts(profile)["device"])
    assert past["label"].nunique() == 3 and past.loc[past["is_wrong"], "seconds"].isna().all()
    by = {trace.name: trace for trace in charts.trend(past).data}
    line, cross = by["C compiled"], by["✗ WRONG there, so not drawn"]
    assert np.isnan(line.y).tolist() == [False, True, False] and line.connectgaps is False
    assert list(cross.x) == [line.x[1]] and cross.text == ("C",) and list(cross.y) == [0]
    assert not np.isnan(by["P cpp"].y).any()


def test_a_candidate_that_was_timed_and_failed_a_check_is_in_no_line(load, scenario):
    failed = stores.wrong_sign().candidates["compiled"].checks
    candidates = stores.with_changes(stores.good_candidates(), "compiled", checks=failed)
    stores.publish(scenario("no profile"), stores.good(stores.problem(64), candidates=candidates))
    frames, profile = load()
    past = tables.history(frames, stores.problem(64), frames.facts(profile)["device"]).set_index("backend")
    assert past.loc["compiled", "is_wrong"] and np.isnan(past.loc["compiled", "seconds"])


def test_times_over_versions(load):
    frames, profile = load("many")
    past = tables.history(frames, stores.problem(), frames.facts(profile)["device"])
    assert past["torch"].nunique() == 2, "the same device under another torch"


def test_what_is_compared_first(load, scenario):
    """A profile with its last day before; else with one of the same device, which need not be the first."""
    frames, profile = load("many")
    here, earlier = stores.here().fingerprint(), stores.an_earlier_torch().fingerprint()
    assert tables.usual(frames, profile) == [earlier, here]
    assert tables.usual(frames, frames.profiles[earlier]) == [here, earlier]
    for day in ("2026-11-21", "2026-11-22"):
        stores.publish(scenario("no profile"), stores.good(measured_at=f"{day}T12:00:00Z"))
    frames, profile = load()
    assert tables.usual(frames, profile) == [f"{here}@2026-11-21", here]


@pytest.mark.slow
def test_nothing_is_compared_unasked_where_nothing_was_measured(scenario):
    where, gpu = scenario("other device"), stores.H100.fingerprint()
    stores.publish(where, stores.good(), stores.an_earlier_torch())
    at = opened(tab="compare")
    assert "The first call of a new shape measures it" in text_of(at) and not charts_of(at) and not at.exception
    at = opened(tab="compare", profile=gpu)
    assert at.query_params["sides"] == [stores.an_earlier_torch().fingerprint(), gpu] and not at.exception
    assert "was not measured twice on this device" in text_of(at)


@pytest.mark.slow
def test_the_tab(scenario):
    scenario("dated")
    at = opened(tab="compare")
    assert not at.exception and "slower 1, faster 1" in text_of(at) and len(charts_of(at)) == 2
    assert table_of(at, "problem", "verdict")["verdict"].tolist() == ["slower", "faster"]
    assert at.query_params["sides"][0].endswith("@2026-10-20")
    at.multiselect(key="sides").set_value(at.multiselect(key="sides").value[:1]).run()
    assert "Choose two or more" in text_of(at) and not at.exception

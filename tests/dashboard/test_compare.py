"""Profiles, and dates of one, side by side; and one problem over time."""

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


def test_times_over_versions(load):
    frames, profile = load("many")
    past = tables.history(frames, stores.problem(), frames.facts(profile)["device"])
    assert past["torch"].nunique() == 2, "the same device under another torch"


@pytest.mark.slow
def test_the_tab(scenario):
    scenario("dated")
    at = opened(tab="compare")
    assert not at.exception and "slower 1, faster 1" in text_of(at) and len(charts_of(at)) == 2
    assert table_of(at, "problem", "verdict")["verdict"].tolist() == ["slower", "faster"]
    assert at.query_params["sides"][0].endswith("@2026-10-20")
    at.multiselect(key="sides").set_value(at.multiselect(key="sides").value[:1]).run()
    assert "Choose two or more" in text_of(at) and not at.exception

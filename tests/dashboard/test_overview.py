"""The overview: all decisions, what is wrong, who wins where; and what no page lets one overlook."""

import json

import numpy as np
import pandas as pd
import pytest
from compiled_logprobs_dashboard import selection
from compiled_logprobs_dashboard.charts import overview as charts
from compiled_logprobs_dashboard.looks import BACKENDS, BAD
from compiled_logprobs_dashboard.tables import overview as tables

from compiled_logprobs.tuning.presets import MODELS
from tests.helpers import dashboard_stores as stores
from tests.helpers.dashboard_pages import charts_of, links_of, metrics_of, opened, table_of

PAGES = ("overview", "shape", "correctness", "measure")


@pytest.fixture
def seen(load):
    """Frames, profile and all decisions of a scenario."""

    def of(name):
        frames, profile = load(name)
        return frames, profile, tables.decisions(frames, profile)

    return of


def test_a_row_a_decision_with_what_is_wrong_first(seen):
    _, _, table = seen("signs")
    assert len(table) == 37 and table["is"].str[0].tolist()[:4] == ["wrong", "wrong", "undecided", "fine"]
    first, open_ = table.iloc[0], table.iloc[2]
    assert first["check"] == "✗ compiled: log_prob_sign, log_prob_error" and first["winner"] == "cpp"
    assert (first["speed-up"], first["over plain"]) == pytest.approx((6.67, 8.004)) and first["low"] < 6.67 < first[
        "high"
    ]
    assert (first["ms"], first["memory"], first["roof"]) == pytest.approx((30.0, 1.0, 40.0), rel=0.01)
    assert first["age"] >= 0 and table["check"].iloc[3] == "✓ 2 of 2"
    assert open_["winner"] == "? undecided" and open_[["speed-up", "low", "high", "over plain"]].isna().all()


def test_a_filter_takes_one_value_of_each_column(seen):
    _, _, table = seen("signs")
    assert list(tables.facets(table))[:4] == ["wrong", "undecided", "stale", "fine"]
    assert len(tables.filtered(table, ["wrong"])) == 2 and len(tables.filtered(table, ["stale"])) == 0
    part = tables.filtered(table, ["wrong", "fine", "float32", "V 151936 (qwen3)", "nonsense"])
    assert set(part["dtype"]) == {"float32"} and set(part["V"]) == {stores.QWEN} and len(part) == 6


def test_the_figures_of_all_and_of_each_backend(seen):
    frames, profile, table = seen("signs")
    assert tables.figures(frames, profile, table) == [
        ("Faster than eager", "6.67x", "Geometric mean of the winners' speed-ups over eager."),
        ("Check passed by", "98.20 %", "109 of 111 candidates passed all that was run."),
        ("Worst memory", "1.00 x logits", "Of a winner: N 4,096, V 151,936, forward."),
        ("Decisions", "37", "1 undecided, 0 stale."),
    ]
    by = tables.by_backend(frames, profile, table).set_index("backend")
    assert by.index[0] == "cpp" and by.loc["cpp", "won"] == 36 and by.loc["eager", "won"] == 0
    assert by.loc["compiled", "check"] == "✗ in 2 of 37" and by.loc["flash_attn", "check"] == "not run"
    assert by.loc["eager", "speed-up"] == pytest.approx(1.0)


def test_what_was_not_measured_is_not_0(seen):
    frames, profile, table = seen("partial")
    values = [value for _, value, _ in tables.figures(frames, profile, table)]
    assert values == ["1.50x", "not stored", "not measured", "2"]
    assert set(table["check"]) == {"not stored"} and table[["memory", "roof"]].isna().all(axis=None)


def test_what_is_wrong_is_said_in_a_sentence_signs_first(seen):
    frames, profile, _ = seen("signs")
    found = tables.wrong(frames, profile)
    words = "compiled: WRONG SIGN in 2 of 37 decisions (log_prob_sign, log_prob_error)"
    assert tables.wrong_in_words(found, 37) == words


def test_another_check_is_no_wrong_sign(seen):
    frames, profile, _ = seen("all failed")
    assert tables.wrong_in_words(tables.wrong(frames, profile), 2) == "cpp: WRONG in 2 of 2 decisions (log_prob_error)"


def drawn(frames, profile, table):
    return tables.maps(tables.squares(frames, profile, table))


def test_maps_have_a_square_a_decision_with_letter_margin_and_state(seen):
    frames, profile, table = seen("many")
    assert tables.wrong(frames, profile).empty
    squares = tables.squares(frames, profile, table).set_index(["mode", "dtype", "rows", "vocab"])
    assert len(squares) == 36
    one, tied = (squares.loc[("backward", "bfloat16", rows, stores.QWEN)] for rows in (512, 64))
    assert (one["state"], one["backend"], one["beside"]) == ("won", "cpp", "compiled") and one["opacity"] == 1.0
    assert tied["state"] == "tie" and tied["opacity"] < 0.5
    assert squares.loc[("backward", "bfloat16", 64, MODELS["gpt2"]), "backend"] == "eager"
    maps, left_out = drawn(frames, profile, table)
    assert [kind[:2] for kind in maps] == [(m, d) for m in ("forward", "backward") for d in ("bfloat16", "float32")]
    figure = charts.winner_maps(maps, among=frames.backends)
    by = {trace.name: trace for trace in figure.data}
    assert left_out == "" and {"P cpp", "P cpp, tie", "E eager"} <= set(by) and set(by["P cpp"].text) == {"P"}
    assert by["P cpp, tie"].marker.symbol == "square-open"
    assert sorted(key for trace in figure.data for key in trace.customdata) == sorted(table["key"]), (
        "each can be clicked"
    )
    assert list(figure.layout.xaxis.categoryarray) == ["64", "512", "2048"], "by number, not by text"
    assert figure.layout.yaxis.ticktext[-1] == "qwen3 151k"
    assert "cpp 32, eager 4, tie 4; a backend was wrong in 0." in tables.in_words(
        tables.squares(frames, profile, table)
    )


def test_wrong_has_its_own_colour_and_letter_and_undecided_is_no_win(seen):
    frames, profile, table = seen("signs")
    maps, _ = drawn(frames, profile, table)
    figure = charts.winner_maps(maps, among=frames.backends)
    crosses = [trace for trace in figure.data if trace.legendgroup.startswith("✗ WRONG")]
    assert len(crosses) == 2 and {trace.marker.color for trace in crosses} == {BAD} and crosses[0].mode == "markers"
    assert "P✗" in {letter for trace in figure.data for letter in trace.text or ()}
    assert BAD not in {look.colour for look in BACKENDS.values()} and "log_prob_sign" in crosses[0].hovertext[0]
    assert [trace.showlegend for trace in crosses] == [True, False], "once in the legend"
    (open_,) = (trace for trace in figure.data if trace.legendgroup == "? undecided")
    assert set(open_.text) == {"?"} and "1.00x" not in open_.hovertext[0]


def test_of_many_the_wrong_are_drawn_and_the_rest_is_said():
    count = 400
    found = pd.DataFrame({"key": range(count), "mode": "forward", "dtype": "float32", "rows": 64, "wrong": ""})
    found["vocab"], found["state"], found["backend"] = np.arange(count) + 1000, "won", "cpp"
    found = found.assign(chosen="cpp", against="eager", beside="eager", speedup=2.0, speedup_low=1.9, speedup_high=2.1)
    found.loc[count - 1, "wrong"] = "✗ compiled: log_prob_sign"
    ((_, _, part),), left_out = tables.maps(found)
    assert len(part) == tables.MOST_VOCABS and count - 1 in set(part["key"])
    assert left_out == "12 of 400 are drawn; filter for the others."


@pytest.mark.slow
def test_the_page_and_what_it_leads_to(scenario):
    scenario("signs")
    at = opened()
    assert metrics_of(at) == {
        "Faster than eager": "6.67x",
        "Check passed by": "98.20 %",
        "Worst memory": "1.00 x logits",
        "Decisions": "37",
    }
    table = table_of(at, "is", "winner")
    assert len(table) == 37 and "key" not in table and at.get("download_button")[0].label == "37 decisions as CSV"
    at.multiselect(key="filter").set_value(["wrong"]).run()
    assert len(table_of(at, "is", "winner")) == 2 and at.query_params["filter"] == "wrong"
    assert "2 decisions as CSV" in [one.label for one in at.get("download_button")]
    at.toggle(key="as_tables").set_value(True).run()
    assert not charts_of(at) and table_of(at, "name", "x", "y") is not None, "one switch for all charts"
    assert not at.exception


@pytest.mark.slow
def test_one_wrong_sign_among_thousands_is_on_every_page(scenario):
    stores.generate(scenario("no profile"), 5_000, wrong=1)
    at = opened()
    for page in PAGES:
        at.switch_page(f"app_pages/{page}.py").run()
        (banner, *_) = at.error
        words = "compiled: WRONG SIGN in 1 of 5,000 decisions (log_prob_sign, log_prob_error)"
        assert words in banner.value.replace("\\", "") and not at.exception, page
        assert (
            links_of(at)["**See what is wrong**"].startswith("correctness?")
            and "backend=compiled" in links_of(at)["**See what is wrong**"]
        )
    at.switch_page("app_pages/overview.py").run()
    assert metrics_of(at)["Check passed by"] == "99.99 %" and table_of(at, "is", "winner")["is"].iloc[0] == ["wrong"]
    (chart,) = charts_of(at)
    names = [trace["name"] for trace in json.loads(chart.spec)["data"]]
    assert "a backend was wrong in 1." in chart.alt and "✗ WRONG: a backend failed a check there" in names
    assert selection.current_frames() is selection.current_frames()

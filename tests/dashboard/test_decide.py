"""The page Decide: its words, its figures and its winner map, from decisions made by hand; and the page itself."""

import dataclasses
import json
import sys
from datetime import datetime, timezone
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import streamlit as st
import torch
from compiled_logprobs_dashboard import selection
from compiled_logprobs_dashboard.charts import decide as charts
from compiled_logprobs_dashboard.looks import BACKENDS, MOST_BACKENDS
from compiled_logprobs_dashboard.tables import decide as tables

from compiled_logprobs.decision import Speedup
from compiled_logprobs.tuning import presets
from tests.helpers import dashboard_stores as stores
from tests.helpers.dashboard_pages import charts_of, metrics_of, opened, text_of


def with_winner(**changes):
    decision = stores.good()
    candidates = {**decision.candidates, "cpp": dataclasses.replace(decision.winner, **changes)}
    return dataclasses.replace(decision, candidates=candidates)


def test_the_sentence():
    assert tables.sentence(stores.good()) == (
        "Use cpp: 8.00x faster than plain log_softmax (7.60 to 8.40), 6.67x eager, 0.3x the logits less memory, 2 of "
        "2 checks, 40 % of measured bandwidth"
    )
    assert tables.sentence(with_winner(speedup_over_plain=None)).startswith(
        "Use cpp: 6.67x faster than eager (6.34 to 7.00), 0.3x"
    )
    assert tables.sentence(stores.all_failed()).startswith(
        "Use eager: nothing but eager could be measured, 1.20x faster than plain log_softmax (1.14 to 1.26), 1.31x "
        "the logits of "
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"extra_multiple": 2.31}, "1.0x the logits more memory"),
        ({"extra_multiple": 1.33}, "as much memory as eager"),
        ({"extra_multiple": None}, "extra memory not measured"),
        ({"speedup_over_plain": Speedup(None, 0.5, None)}, "0.50x the speed of plain log_softmax, 6.67x eager"),
        ({"speedup": Speedup(None, 1.5, None), "speedup_over_plain": None}, "1.50x faster than eager,"),
        ({"speedup": None, "speedup_over_plain": None}, "its speed against eager is not known"),
        ({"checks": ()}, "checks not stored"),
    ],
)
def test_what_is_not_known_is_said(changes, words):
    assert words in tables.sentence(with_winner(**changes))


def test_the_four_figures_are_those_of_the_decision():
    assert {one.label: (one.value, one.beside) for one in tables.figures(stores.good())} == {
        "A call, N 512": ("30 ms", "eager: 200 ms"),
        "Extra memory": ("148 MiB", "1.00 x logits"),
        "Bandwidth": ("40 %", "of what was measured on this device"),
        "Checks passed": ("2 of 2", "worst error 10% of its limit"),
    }
    fewer = dataclasses.replace(stores.good(), measured_rows=128)
    assert "Timed with 128 rows" in tables.figures(fewer)[0].meaning
    unknown = with_winner(percent_of_bandwidth=None)
    assert "bandwidth" not in tables.sentence(unknown) and tables.figures(unknown)[2].value == "not measured"


def test_the_ranking_has_the_chosen_one_first_then_the_fastest():
    board = tables.leaderboard(stores.tied(stores.problem()))
    assert board["backend"].tolist() == ["cpp", "compiled", "eager", "flash_attn"]
    assert board["outcome"].tolist() == ["★ chosen", "≈ tie", "▽ slower", "– unavailable"]
    assert board["letter"].tolist() == ["P", "C", "E", "F"]
    assert np.isnan(board["ms"].iloc[3]) and np.isnan(board["extra_mib"].iloc[3]), "not measured is not 0"
    assert board["ratio"].tolist()[:3] == [6.67, 6.6, 1.0] and board["speedup"].iloc[1] == 7.9
    figure = charts.ranking(board, "plain log_softmax")
    (cpp,) = (trace for trace in figure.data if trace.name == "cpp")
    assert cpp.x[0] == pytest.approx(8.004) and cpp.error_x.array[0] == pytest.approx(0.05 * 8.004)
    assert cpp.marker.color == BACKENDS["cpp"].colour and "plain log_softmax" in figure.layout.xaxis.title.text
    assert charts.ranking_in_words(board, "plain log_softmax") == (
        "Speed over plain log_softmax: cpp 8.00x, compiled 7.90x, eager 1.20x. 1 more was not timed."
    )
    assert len(charts.ranking(board.iloc[3:], "eager").data) == 0


def test_why_the_others_lost_is_what_the_tuner_recorded():
    lost = tables.why_lost(stores.all_failed()).set_index("backend")
    assert lost["why"].to_dict() == {
        "cpp": "log_prob_error: row 3 is off by 0.7",
        "compiled": "the worker ended with signal 11",
        "flash_attn": "out of memory",
        "third": "not done within 20 s",
        "fourth": "RuntimeError: no",
    }
    assert lost.loc["cpp", "outcome"] == "✗ WRONG" and lost.loc["third", "figures"] == "nothing was measured"


def test_a_memory_cap_changes_the_choice_where_it_has_to():
    decision = with_winner(extra_multiple=3.0)
    need = tables.needed(decision, 512)
    logits = 512 * stores.QWEN * 2
    assert need == {"eager": 1.31 * logits, "cpp": 3.0 * logits, "compiled": 1.0 * logits}
    assert tables.needed(decision, 1024)["cpp"] == 2 * need["cpp"]
    assert tables.under_cap(decision, need["cpp"], 512).name == "cpp"
    assert tables.under_cap(decision, need["cpp"] - 1, 512).name == "compiled", (
        "the fastest that fits, not the smallest"
    )
    assert tables.under_cap(decision, need["compiled"] - 1, 512).name is None
    assert tables.under_cap(decision, 0.0, 512).why.startswith("none fits; the least that one takes is 148 MiB")
    unknown = tables.under_cap(with_winner(extra_multiple=None), 2.0**40, 512)
    assert unknown.name == "compiled" and "Of cpp the memory is not known" in unknown.why


@pytest.mark.parametrize("mode", ["forward", "backward", "inplace", "entropy"])
def test_the_command_poses_the_problem_that_was_decided(mode):
    for problem in (stores.problem(512, mode=mode), stores.problem(96, 50257, torch.float32, mode)):
        words = tables.command(stores.good(problem)).split()
        assert words[:2] == ["compiled-logprobs", "profile"] and words[-1] == "--again"
        named = dict(zip(words[2:-1:2], words[3:-1:2], strict=True))
        (posed,) = presets.grid(
            named["--device"],
            vocabs=[presets.vocab_of(named["--vocab"])],
            rows=[presets.rows_of(named["--rows"])],
            dtypes=[presets.dtype_of(named["--dtype"])],
            modes=[presets.mode_of(named["--mode"])],
        )
        assert posed == problem


def test_the_command_says_what_else_was_so(monkeypatch):
    assert tables.command(stores.good(stores.problem()._replace(masked_logits=True))) is None
    candidates = {name: one for name, one in stores.good_candidates().items() if name != "flash_attn"}
    few = stores.good(candidates=candidates, left_out=("flash_attn",))
    assert "--backend compiled --backend cpp --again" in tables.command(few)
    threads = {**stores.here().to_dict(), "cpu_threads": stores.here().cpu_threads + 7}
    other = tables.command(dataclasses.replace(stores.good(), environment=threads))
    assert other.startswith(f"OMP_NUM_THREADS={threads['cpu_threads']} compiled-logprobs profile")
    foreign = stores.good(
        candidates={**stores.good_candidates(), "third": stores.good().winner, "no name": stores.good().winner}
    )
    words = "--backend compiled --backend cpp --backend flash_attn --backend third --again"
    assert tables.command(foreign).endswith(words) and tables.of_others(foreign) == ["third"]
    monkeypatch.setitem(sys.modules["compiled_logprobs.backends"]._targets, "third", "package.module:Third")
    assert tables.command(foreign).endswith(words.replace("third", "package.module:Third")), (
        "this process knows where from"
    )


@pytest.mark.parametrize("mode", ["forward", "backward", "inplace", "entropy"])
def test_the_snippet_runs(mode):
    problem = stores.problem(4, 16, torch.float32, mode)
    # In-place gradients are for logits that a model made.
    leaf = torch.randn(4, 16, requires_grad=problem.needs_grad)
    scope = {"logits": leaf * 1.0, "labels": torch.tensor([0, 1, 2, 3])}
    exec(tables.snippet(problem, "cpp"), scope)
    assert (scope["log_probs"] <= 0).all() and ("entropy" in scope) == (mode == "entropy")
    assert (leaf.grad is not None) == problem.needs_grad


def test_ages_sizes_and_durations():
    now = datetime(2026, 11, 24, 12, tzinfo=timezone.utc)
    days = ["2026-11-24T07:00:00Z", "2026-11-23T07:00:00Z", "2026-11-20T07:00:00Z", "<b>"]
    assert [tables.age(day, now) for day in days] == ["today", "1 day ago", "4 days ago", ""]
    sizes = ["not measured", "12 bytes", "2 KiB", "3 MiB", "2.5 GiB"]
    assert [tables.size(number) for number in (None, 12, 2048, 3 * 2**20, 2.5 * 2**30)] == sizes
    durations = {None: "not measured", 2.0: "2 s", 0.0312: "31.2 ms", 4.2e-6: "4.2 µs"}
    assert {seconds: tables.duration(seconds) for seconds in durations} == durations


# --- the winner map ---------------------------------------------------------------------------------------------------


@pytest.fixture
def squares(load):
    def of(name: str | None = None) -> pd.DataFrame:
        return tables.winners(*load(name), "backward", "bfloat16")

    return of


def test_what_an_earlier_decision_measured_is_compared_by_its_speed_up(scenario, squares):
    """Its seconds are of another run: here a tenth of what compiled takes beside the others."""
    decision = stores.good()
    carried = dataclasses.replace(decision.candidates["compiled"], seconds=0.0075, measured_at="2026-01-01T00:00:00Z")
    decision.candidates["compiled"] = carried
    stores.publish(scenario("no profile"), decision)
    (square,) = squares().to_dict("records")
    assert (square["backend"], square["runner_up"]) == ("cpp", "compiled")
    assert square["margin"] == pytest.approx(6.67 / 2.67) and square["speedup"] == pytest.approx(1.2 * 6.67)
    assert tables.leaderboard(decision)["backend"].tolist() == ["cpp", "compiled", "eager", "flash_attn"]


def test_many_decisions_of_their_own_shapes_make_no_millions_of_squares(scenario, squares, monkeypatch):
    monkeypatch.setattr(tables, "MOST_SQUARES", 3)
    for number in (4, 8):
        stores.publish(scenario("no profile"), stores.good(stores.problem(number, 1000 * number)))
    table = squares()
    assert sorted(table["rows"]) == [4, 8] and "unmeasured" not in set(table["state"])


def test_the_winner_map_has_a_square_for_every_pair(scenario, squares):
    stores.publish(scenario("no profile"), stores.good(stores.problem(8, 1024)))
    whole = squares("many")
    table = whole.set_index(["rows", "vocab"])
    assert len(table) == 4 * 4 and (table["state"] == "unmeasured").sum() == 16 - 9 - 1
    assert table.loc[(64, stores.QWEN), "state"] == "tie" and table.loc[(64, 50257), "backend"] == "eager"
    assert table.loc[(512, stores.QWEN), ["state", "backend", "runner_up"]].tolist() == ["won", "cpp", "compiled"]
    assert table.loc[(512, stores.QWEN), "margin"] == pytest.approx(2.5, rel=1e-2)
    assert table.loc[(8, stores.QWEN), ["backend", "margin", "key"]].isna().all()
    assert tables.map_in_words(whole) == (
        "Winner by N and V, 16 squares: cpp 9, eager 1. Ties, drawn hollow: 1. Not measured, drawn grey: 6."
    )
    figure = charts.winner_map(whole, 512, stores.QWEN)
    by = {trace.name: trace for trace in figure.data}
    assert {"P cpp", "P cpp, tie", "E eager", "shown above", "· not measured"} <= set(by)
    assert set(by["P cpp"].text) == {"P"} and by["P cpp, tie"].marker.symbol == "square-open"
    for name in ("cpp", "eager"):
        red, green, blue = (int(BACKENDS[name].colour[start : start + 2], 16) for start in (1, 3, 5))
        trace = by[f"{BACKENDS[name].letter} {name}"]
        assert all(colour.startswith(f"rgba({red},{green},{blue},") for colour in trace.marker.color)
    places = {tuple(one) for trace in figure.data for one in trace.customdata}
    assert places == set(zip(whole["rows"], whole["vocab"], strict=True)), "each can be clicked"
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "category"
    assert list(figure.layout.xaxis.categoryarray) == ["8", "64", "512", "2048"], "by number, not by text"


def test_a_winner_without_rivals_is_alone(squares):
    assert set(squares("all failed")["state"]) == {"alone"}


def test_squares_of_many_winners_are_put_together():
    names = [f"crowd{number:03}" for number in range(200)]
    table = pd.DataFrame({"rows": range(1, 201), "vocab": 1000, "backend": names}).reindex(columns=tables.SQUARE)
    figure = charts.winner_map(table.assign(state="alone", opacity=1.0))
    drawn = {trace.name for trace in figure.data}
    assert len(drawn) == MOST_BACKENDS + 1 and f"… {200 - MOST_BACKENDS} others, nothing else ran" in drawn
    assert sum(len(trace.x) for trace in figure.data) == 200, "each can still be clicked"
    text = tables.map_in_words(table)
    assert text.endswith(f", {200 - MOST_BACKENDS} others {200 - MOST_BACKENDS}.") and len(text) < 400


def test_opacity_is_the_margin():
    shown = tables.opacity(pd.Series([1.0, 0.9, 2**0.5, 2.0, 50.0, np.nan]))
    assert shown.tolist() == pytest.approx([0.35, 0.35, 0.675, 1.0, 1.0, 0.35])


def test_a_large_map_is_cut_round_the_shape():
    table = pd.DataFrame({"rows": np.repeat(2 ** np.arange(1, 61), 30), "vocab": np.tile(np.arange(1, 31) * 1000, 60)})
    part = tables.around(table, 2**30, 5000)
    assert part["rows"].nunique() == tables.MOST_ROWS and part["vocab"].nunique() == tables.MOST_VOCABS
    assert 2**30 in set(part["rows"]) and 5000 in set(part["vocab"])


def test_no_name_becomes_markup_in_a_chart(squares):
    table = squares("hostile")
    candidates = {**stores.good_candidates(), stores.HOSTILE: stores.good().winner}
    board = tables.leaderboard(dataclasses.replace(stores.good(), candidates=candidates))
    table.loc[0, ["backend", "runner_up", "stale"]] = stores.HOSTILE
    for figure in (charts.winner_map(table), charts.ranking(board, stores.HOSTILE)):
        text = figure.to_json()
        assert "onclick" in text and "<b onclick" not in text and "\\u003cb onclick" not in text


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_link_leads_to_a_shape(scenario):
    scenario("many")
    at = opened(rows=100, vocab=50257, mode="forward", dtype="float32")
    assert (at.number_input(key="rows").value, at.number_input(key="vocab").value) == (100, 50257)
    assert (at.selectbox(key="mode").value, at.selectbox(key="dtype").value) == ("forward", "float32")
    assert "nearest: N 64" in text_of(at) and at.selectbox(key="model").value == "gpt2"
    at.selectbox(key="model").select("llama3").run()
    assert at.number_input(key="vocab").value == 128256 and not at.exception
    at.number_input(key="vocab").set_value(1234).run()
    assert at.selectbox(key="model").value == selection.OTHER and at.number_input(key="vocab").value == 1234


@pytest.mark.slow
@pytest.mark.parametrize(
    "query",
    [
        {"rows": "x"},
        {"rows": 10**30},
        {"rows": -1, "mode": "<script>", "dtype": "int4"},
        {"profile": "../../etc", "cap": "nan"},
    ],
    ids=str,
)
def test_a_link_that_leads_nowhere_falls_back(scenario, query):
    scenario("one")
    at = opened(**query)
    assert not at.exception and "Use cpp" in text_of(at)


@pytest.mark.slow
def test_badges(scenario):
    scenario("many")
    at = opened(rows=2000)
    assert "exact" in text_of(at) and "stale" not in text_of(at)
    at.number_input(key="rows").set_value(1).run()
    assert "Use eager, by rule" in text_of(at) and not at.metric
    at.number_input(key="rows").set_value(100).run()
    assert "nearest: N 64" in text_of(at)
    at.selectbox(key="mode").select("entropy").run()
    assert "Not measured" in text_of(at) and "Nothing was measured in this profile for entropy" in text_of(at)
    at.selectbox(key="profile").select(
        next(name for name in at.selectbox(key="profile").options if "H100" in name)
    ).run()
    at.selectbox(key="mode").select("backward").run()
    assert "Stale: measured with torch 2.12.0" in text_of(at) and "another device" in text_of(at) and not at.exception


@pytest.mark.slow
def test_what_to_do_with_it(scenario):
    scenario("one")
    at = opened()
    assert len(metrics_of(at)) == 4 and not at.success and not at.warning
    assert "from compiled_logprobs import log_probs_from_logits" in at.code[0].value
    assert at.code[1].value == (
        f"compiled-logprobs profile --device cpu --vocab {stores.QWEN} --rows 512 --dtype bfloat16 --mode backward "
        "--again"
    )
    at.number_input(key="cap").set_value(1000.0).run()
    assert "use **cpp**" in at.success[0].value
    at.number_input(key="cap").set_value(1.0).run()
    assert "use nothing" in at.warning[0].value and "none fits" in at.warning[0].value


@pytest.mark.slow
def test_a_square_carries_the_shape_that_a_click_takes(scenario, monkeypatch):
    scenario("many")
    squares = [tuple(one) for trace in json.loads(charts_of(opened())[1].spec)["data"] for one in trace["customdata"]]
    assert (64, 50257) in squares
    taken = {}
    monkeypatch.setattr(st, "session_state", taken)
    for customdata in ([64, 50257], None):
        selection.select_square(SimpleNamespace(selection=SimpleNamespace(points=[{"customdata": customdata}])))
    selection.select_square(SimpleNamespace(selection=SimpleNamespace(points=[])))
    assert taken == {"rows": 64, "vocab": 50257}


@pytest.mark.slow
def test_what_changes_meanwhile_appears(scenario):
    where = scenario("no profile")
    at = opened()
    assert "No profile" in text_of(at)
    stores.publish(where, stores.good())
    assert "Use cpp" in text_of(at.run())
    where.path(stores.here().fingerprint(), stores.problem()).write_bytes(b"{")  # in place, so that no folder changes
    with pytest.warns(RuntimeWarning, match="is passed over"):
        assert not at.run().exception
    assert "Not measured" in text_of(at)

"""The landing page's words and charts, from decisions made by hand."""

import dataclasses
import sys
from datetime import datetime, timezone

import numpy as np
import pandas as pd
import pytest
from compiled_logprobs_dashboard import index
from compiled_logprobs_dashboard.charts import decide as figures
from compiled_logprobs_dashboard.looks import BACKENDS
from compiled_logprobs_dashboard.tables import decide as verdict
from compiled_logprobs_dashboard.tables import decide_map as winners
from typer.testing import CliRunner

from compiled_logprobs.cli import profile
from compiled_logprobs.cli.main import app
from compiled_logprobs.decision import Speedup
from tests.helpers import dashboard_stores as stores


def test_the_sentence():
    assert verdict.sentence(stores.good()) == (
        "Use cpp: 6.67x faster than eager (6.34 to 7.00), 0.3x the logits less memory, 2 of 2 checks, 40 % of measured bandwidth"
    )
    failed = verdict.sentence(stores.all_failed())
    assert failed.startswith(
        "Use eager: nothing but eager could be measured, 1.31x the logits of extra memory, 2 of 2 checks"
    )


def with_winner(**changes):
    decision = stores.good()
    candidates = {**decision.candidates, "cpp": dataclasses.replace(decision.winner, **changes)}
    return dataclasses.replace(decision, candidates=candidates)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"extra_multiple": 2.31}, "1.0x the logits more memory"),
        ({"extra_multiple": 1.33}, "as much memory as eager"),
        ({"extra_multiple": None}, "extra memory not measured"),
        ({"speedup": Speedup(None, 1.5, None)}, "1.50x faster than eager,"),
        ({"speedup": None}, "its speed against eager is not known"),
        ({"checks": ()}, "checks not stored"),
    ],
)
def test_what_is_not_known_is_said(changes, words):
    assert words in verdict.sentence(with_winner(**changes))


def test_nothing_is_said_of_a_bandwidth_that_was_not_measured():
    decision = with_winner(percent_of_bandwidth=None)
    assert "bandwidth" not in verdict.sentence(decision)
    assert verdict.figures(decision)[2].value == "not measured"


def test_the_four_figures_are_those_of_the_record():
    found = {one.label: (one.value, one.beside) for one in verdict.figures(stores.good())}
    assert found == {
        "A call, N 512": ("30 ms", "eager: 200 ms"),
        "Extra memory": ("148 MiB", "1.00 x logits"),
        "Bandwidth": ("40 %", "of what was measured on this device"),
        "Checks passed": ("2 of 2", "worst error 10% of its limit"),
    }
    fewer = dataclasses.replace(stores.good(), measured_rows=128)
    assert "Timed with 128 rows" in verdict.figures(fewer)[0].meaning


def test_the_ranking_has_the_chosen_one_first_then_the_fastest():
    board = verdict.leaderboard(stores.tied(stores.problem()))
    assert board["backend"].tolist() == ["cpp", "compiled", "eager", "flash_attn"]
    assert board["outcome"].tolist() == ["★ chosen", "≈ tie", "▽ slower", "– unavailable"]
    assert board["letter"].tolist() == ["P", "C", "E", "F"]
    assert np.isnan(board["ms"].iloc[3]) and np.isnan(board["extra_mib"].iloc[3]), "not measured is not 0"
    assert board["speedup"].tolist()[:3] == [6.67, 6.6, 1.0]


def test_why_the_others_lost_is_what_the_tuner_recorded():
    lost = verdict.why_lost(stores.all_failed()).set_index("backend")
    assert lost["why"].to_dict() == {
        "cpp": "log_prob_error: row 3 is off by 0.7",
        "compiled": "the worker ended with signal 11",
        "flash_attn": "out of memory",
        "third": "not done within 20 s",
        "fourth": "RuntimeError: no",
    }
    assert lost.loc["cpp", "outcome"] == "✗ WRONG" and lost.loc["third", "figures"] == "nothing was measured"


def test_a_memory_cap_changes_the_choice_where_it_has_to():
    decision = stores.good()
    candidates = {**decision.candidates}
    candidates["cpp"] = dataclasses.replace(candidates["cpp"], extra_multiple=3.0)
    decision = dataclasses.replace(decision, candidates=candidates)
    need = verdict.needed(decision, 512)
    assert need == {
        name: multiple * 512 * stores.QWEN * 2 for name, multiple in (("eager", 1.31), ("cpp", 3.0), ("compiled", 1.0))
    }
    assert verdict.needed(decision, 1024)["cpp"] == 2 * need["cpp"]
    assert verdict.under_cap(decision, need["cpp"], 512).name == "cpp"
    assert verdict.under_cap(decision, need["cpp"] - 1, 512).name == "compiled", (
        "the fastest that fits, not the smallest"
    )
    assert verdict.under_cap(decision, need["compiled"] - 1, 512).name is None
    assert verdict.under_cap(decision, 0.0, 512).why.startswith("none fits; the least that one takes is 148 MiB")
    candidates["cpp"] = dataclasses.replace(candidates["cpp"], extra_multiple=None)
    unknown = verdict.under_cap(dataclasses.replace(decision, candidates=candidates), 2.0**40, 512)
    assert unknown.name == "compiled" and "Of cpp the memory is not known" in unknown.why


def test_the_command_poses_the_problem_that_was_decided(monkeypatch):
    posed = []
    monkeypatch.setattr(profile, "_profile", lambda problems, *rest: posed.extend(problems) or ([], False))
    for mode in ("forward", "backward", "inplace", "entropy"):
        for what in (stores.problem(512, mode=mode), stores.problem(96, 50257, stores.torch.float32, mode)):
            posed.clear()
            words = verdict.command(stores.good(what)).split()
            assert words[:2] == ["compiled-logprobs", "profile"] and words[-1] == "--again"
            CliRunner().invoke(app, words[1:])
            assert posed == [what]


def test_the_command_says_what_else_was_so():
    assert verdict.command(stores.good(stores.problem()._replace(masked_logits=True))) is None
    candidates = {name: one for name, one in stores.good_candidates().items() if name != "flash_attn"}
    few = stores.good(candidates=candidates, left_out=("flash_attn",))
    assert "--backend compiled --backend cpp --again" in verdict.command(few)
    threads = {**stores.here().to_dict(), "cpu_threads": stores.here().cpu_threads + 7}
    other = verdict.command(dataclasses.replace(stores.good(), environment=threads))
    assert other.startswith(f"OMP_NUM_THREADS={threads['cpu_threads']} compiled-logprobs profile")


def test_the_command_names_what_others_registered(monkeypatch):
    candidates = {**stores.good_candidates(), "third": stores.good().winner, "no name": stores.good().winner}
    decision = stores.good(candidates=candidates)
    words = "--backend compiled --backend cpp --backend flash_attn --backend third --again"
    assert verdict.command(decision).endswith(words) and verdict.of_others(decision) == ["third"]
    monkeypatch.setitem(
        sys.modules["compiled_logprobs.backends"]._targets, "third", "package.module:Third"
    )  # this process knows where it comes from
    words = words.replace("third", "package.module:Third")
    assert verdict.command(decision).endswith(words) and verdict.of_others(decision) == []


def test_the_command_takes_what_is_the_baseline_for_want_of_eager():
    candidates = {**stores.good_candidates(), "third": stores.good().winner}
    assert "--backend compiled --backend cpp" in verdict.command(
        stores.good(candidates=candidates, baseline="compiled")
    )


@pytest.mark.parametrize("mode", ["forward", "backward", "inplace", "entropy"])
def test_the_snippet_runs(mode):
    import torch

    problem = stores.problem(4, 16, torch.float32, mode)
    # In-place gradients are for logits that a model made.
    leaf = torch.randn(4, 16, requires_grad=problem.needs_grad)
    scope = {"logits": leaf * 1.0, "labels": torch.tensor([0, 1, 2, 3])}
    exec(verdict.snippet(problem, "cpp"), scope)
    assert (scope["log_probs"] <= 0).all() and ("entropy" in scope) == (mode == "entropy")
    assert (leaf.grad is not None) == problem.needs_grad


def test_ages_sizes_and_durations():
    now = datetime(2026, 11, 24, 12, tzinfo=timezone.utc)
    assert [
        verdict.age(at, now) for at in ("2026-11-24T07:00:00Z", "2026-11-23T07:00:00Z", "2026-11-20T07:00:00Z", "<b>")
    ] == ["today", "1 day ago", "4 days ago", ""]
    assert [verdict.size(one) for one in (None, 12, 2048, 3 * 2**20, 2.5 * 2**30)] == [
        "not measured",
        "12 bytes",
        "2 KiB",
        "3 MiB",
        "2.5 GiB",
    ]
    assert [verdict.duration(one) for one in (None, 2.0, 0.0312, 4.2e-6)] == [
        "not measured",
        "2 s",
        "31.2 ms",
        "4.2 µs",
    ]


@pytest.fixture
def squares(scenario, tmp_path):
    def load(name: str, mode: str = "backward") -> pd.DataFrame:
        scenario(name)
        tables = index.load(index.sources(), tmp_path / "index")
        environment = tables.environments.sort_values("here", ascending=False)["environment"].iloc[0]
        return winners.winners(tables, "yours", environment, mode, "bfloat16")

    return load


def test_what_an_earlier_decision_measured_is_compared_by_its_speed_up(scenario, tmp_path):
    """Its seconds are of another run, and perhaps of other rows: here a tenth of what compiled takes beside the others."""
    decision = stores.good()
    carried = dataclasses.replace(decision.candidates["compiled"], seconds=0.0075, measured_at="2026-01-01T00:00:00Z")
    decision.candidates["compiled"] = carried
    stores.publish(scenario("no profile"), decision)
    tables = index.load(index.sources(), tmp_path / "index")
    environment = tables.environments["environment"].iloc[0]
    (square,) = winners.winners(tables, "yours", environment, "backward", "bfloat16").to_dict("records")
    assert (square["backend"], square["runner_up"]) == ("cpp", "compiled")
    assert square["margin"] == pytest.approx(6.67 / 2.67)
    assert verdict.leaderboard(decision)["backend"].tolist() == ["cpp", "compiled", "eager", "flash_attn"]


def test_many_decisions_of_their_own_shapes_make_no_millions_of_squares(scenario, tmp_path, monkeypatch):
    monkeypatch.setattr(winners, "MOST_SQUARES", 3)
    where = scenario("no profile")
    for number in (4, 8):
        stores.publish(where, stores.good(stores.problem(number, 1000 * number)))
    tables = index.load(index.sources(), tmp_path / "index")
    environment = tables.environments["environment"].iloc[0]
    table = winners.winners(tables, "yours", environment, "backward", "bfloat16")
    assert sorted(table["rows"]) == [4, 8] and "unmeasured" not in set(table["state"])


def test_the_winner_map_has_a_square_for_every_pair(scenario, squares, tmp_path):
    stores.publish(scenario("no profile"), stores.good(stores.problem(8, 1024)))
    table = squares("many").set_index(["rows", "vocab"])
    assert len(table) == 4 * 4 and (table["state"] == "unmeasured").sum() == 16 - 9 - 1
    assert table.loc[(64, stores.QWEN), "state"] == "tie" and table.loc[(64, 50257), "backend"] == "eager"
    assert table.loc[(512, stores.QWEN), ["state", "backend", "runner_up"]].tolist() == ["won", "cpp", "compiled"]
    assert table.loc[(512, stores.QWEN), "margin"] == pytest.approx(2.5, rel=1e-2)
    assert table.loc[(8, stores.QWEN), ["backend", "margin", "key"]].isna().all()


def test_a_winner_without_rivals_is_alone(squares):
    assert set(squares("all failed")["state"]) == {"alone"}


def test_opacity_is_the_margin():
    shown = winners.opacity(pd.Series([1.0, 0.9, 2**0.5, 2.0, 50.0, np.nan]))
    assert shown.tolist() == pytest.approx([0.35, 0.35, 0.675, 1.0, 1.0, 0.35])


def test_squares_have_colour_letter_and_place(squares):
    table = squares("many")
    figure = figures.winner_map(table, 512, stores.QWEN)
    by = {trace.name: trace for trace in figure.data}
    assert {"P cpp", "P cpp, tie", "E eager", "shown above"} <= set(by)
    assert set(by["P cpp"].text) == {"P"} and by["P cpp, tie"].marker.symbol == "square-open"
    for name in ("cpp", "eager"):
        wanted = tuple(int(BACKENDS[name].colour[start : start + 2], 16) for start in (1, 3, 5))
        trace = by[f"{BACKENDS[name].letter} {name}"]
        assert all(colour.startswith(f"rgba({wanted[0]},{wanted[1]},{wanted[2]},") for colour in trace.marker.color)
    places = {tuple(one) for trace in figure.data for one in trace.customdata}
    assert places == set(zip(table["rows"], table["vocab"], strict=True)), "each can be clicked"
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "category"
    assert list(figure.layout.xaxis.categoryarray) == ["64", "512", "2048"], "by number, not by text"
    assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0,0,0,0)"
    assert winners.in_words(table) == "Winner by N and V, 9 squares: cpp 8, eager 1. Ties, drawn hollow: 1."


def test_unmeasured_squares_are_grey(scenario, squares):
    stores.publish(scenario("no profile"), stores.good(stores.problem(8, 1024)))
    table = squares("one")
    (grey,) = (trace for trace in figures.winner_map(table).data if trace.name == "· not measured")
    assert len(grey.x) == 2 and "not measured" in grey.hovertext[0] and "drawn grey: 2" in winners.in_words(table)


def test_a_large_map_is_cut_round_the_shape():
    table = pd.DataFrame({"rows": np.repeat(2 ** np.arange(1, 61), 30), "vocab": np.tile(np.arange(1, 31) * 1000, 60)})
    part = winners.around(table, 2**30, 5000)
    assert part["rows"].nunique() == winners.MOST_ROWS and part["vocab"].nunique() == winners.MOST_VOCABS
    assert 2**30 in set(part["rows"]) and 5000 in set(part["vocab"])


def test_no_name_becomes_markup_in_a_chart(squares):
    table = squares("hostile")
    board = verdict.leaderboard(
        dataclasses.replace(
            stores.good(), candidates={**stores.good_candidates(), stores.HOSTILE: stores.good().winner}
        )
    )
    table.loc[0, ["backend", "runner_up", "stale"]] = stores.HOSTILE
    for figure in (figures.winner_map(table), figures.ranking(board, stores.HOSTILE)):
        text = figure.to_json()
        assert "onclick" in text and "<b onclick" not in text and "\\u003cb onclick" not in text


def test_the_ranking_shows_intervals():
    board = verdict.leaderboard(stores.good())
    figure = figures.ranking(board, "eager")
    (cpp,) = (trace for trace in figure.data if trace.name == "cpp")
    assert (
        cpp.x[0] == 6.67
        and cpp.error_x.array[0] == pytest.approx(0.3335)
        and cpp.marker.color == BACKENDS["cpp"].colour
    )
    assert figures.ranking_in_words(board, "eager") == (
        "Speed over eager: cpp 6.67x, compiled 2.67x, eager 1.00x. 1 more was not timed."
    )
    assert len(figures.ranking(board.iloc[3:], "eager").data) == 0

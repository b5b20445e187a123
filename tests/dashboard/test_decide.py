"""The page Decide: its words, its figures and its winner map, from decisions made by hand; and the page itself."""

import dataclasses
import sys
from datetime import datetime, timezone

import numpy as np
import pandas as pd
import pytest
import torch
from compiled_logprobs_dashboard import selection
from compiled_logprobs_dashboard.charts import decide as charts
from compiled_logprobs_dashboard.charts import in_rgb
from compiled_logprobs_dashboard.looks import BACKENDS
from compiled_logprobs_dashboard.tables import decide as tables

from compiled_logprobs.decision import Speedup
from tests.helpers import dashboard_stores as stores
from tests.helpers.dashboard_pages import metrics_of, opened, text_of


def with_winner(**changes):
    return stores.good(candidates=stores.with_changes(stores.good_candidates(), "cpp", **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {},
            "Use cpp: 8.00x faster than plain log_softmax (7.60 to 8.40), 6.67x eager, 0.3x the logits less memory, 2 "
            "of 2 checks, 40 % of measured bandwidth",
        ),
        ({"speedup_over_plain": None}, "Use cpp: 6.67x faster than eager (6.34 to 7.00), 0.3x"),
        ({"speedup_over_plain": Speedup(None, 0.5, None)}, "0.50x the speed of plain log_softmax, 6.67x eager"),
        ({"speedup": Speedup(None, 1.5, None), "speedup_over_plain": None}, "1.50x faster than eager,"),
        ({"speedup": None, "speedup_over_plain": None}, "its speed against eager is not known"),
        ({"extra_multiple": 2.31}, "1.0x the logits more memory"),
        ({"extra_multiple": 1.33}, "as much memory as eager"),
        ({"extra_multiple": None}, "extra memory not measured"),
        ({"checks": ()}, "checks not stored"),
    ],
)
def test_the_sentence(changes, words):
    assert words in tables.sentence(with_winner(**changes))


def test_the_four_figures_are_those_of_the_decision():
    assert {figure.label: (figure.value, figure.beside) for figure in tables.figures(stores.good())} == {
        "A call, N 512": ("30 ms", "eager: 200 ms"),
        "Extra memory": ("148 MiB", "1.00 x logits"),
        "Bandwidth": ("40 %", "of what was measured on this device"),
        "Checks passed": ("2 of 2", "worst error 10% of its limit"),
    }
    fewer = dataclasses.replace(with_winner(percent_of_bandwidth=None, host_seconds=3e-4), measured_rows=128)
    call, _, bandwidth, _ = tables.figures(fewer)
    assert "The host takes 300 µs a call. Timed with 128 rows." in call.meaning and bandwidth.value == "not measured"
    assert "bandwidth" not in tables.sentence(fewer)


def test_the_ranking_has_the_chosen_one_first_then_the_fastest():
    board = tables.leaderboard(stores.tied(stores.problem()))
    assert board["backend"].tolist() == ["cpp", "compiled", "eager", "flash_attn"]
    assert board["outcome"].tolist() == ["★ chosen", "≈ tie", "▽ slower", "– unavailable"]
    assert board["letter"].tolist() == ["P", "C", "E", "F"]
    assert np.isnan(board["ms"].iloc[3]) and np.isnan(board["extra_mib"].iloc[3]), "not measured is not 0"
    assert board["ratio"].tolist()[:3] == [6.67, 6.6, 1.0] and board["speedup"].iloc[1] == 7.9
    cpp = charts.ranking(board, "plain log_softmax").data[0]
    assert cpp.x[0] == pytest.approx(8.004) and cpp.error_x.array[0] == pytest.approx(0.05 * 8.004)
    assert charts.ranking_in_words(board, "plain log_softmax") == (
        "Speed over plain log_softmax: cpp 8.00x, compiled 7.90x, eager 1.20x. 1 more was not timed."
    )


def test_why_the_others_lost_is_what_the_tuner_recorded():
    decision = stores.all_failed()
    assert tables.sentence(decision).startswith(
        "Use eager: nothing but eager could be measured, 1.20x faster than plain log_softmax (1.14 to 1.26), 1.31x "
    )
    lost = tables.why_lost(decision).set_index("backend")
    reasons = {name: each.reason for name, each in decision.candidates.items() if name != "eager"}
    assert lost["why"].to_dict() == reasons and len(reasons) == 5
    assert lost.loc["cpp", "outcome"] == "✗ WRONG" and lost.loc["third", "figures"] == "nothing was measured"


def test_a_memory_cap_changes_the_choice_where_it_has_to():
    decision = with_winner(extra_multiple=3.0)
    need = tables.needed(decision, 512)
    logits = 512 * stores.QWEN * 2
    assert need == {"eager": 1.31 * logits, "cpp": 3.0 * logits, "compiled": 1.0 * logits}
    assert tables.needed(decision, 1024)["cpp"] == 2 * need["cpp"]
    # Without room for cpp, the fastest that fits, and not the smallest.
    for cap, name in ((need["cpp"], "cpp"), (need["cpp"] - 1, "compiled"), (need["compiled"] - 1, None)):
        assert tables.under_cap(decision, cap, 512).name == name
    assert tables.under_cap(decision, 0.0, 512).why.startswith("none fits; the least that one takes is 148 MiB")
    unknown = tables.under_cap(with_winner(extra_multiple=None), 2.0**40, 512)
    assert unknown.name == "compiled" and "Of cpp the memory is not known" in unknown.why


@pytest.mark.parametrize("mode", ["forward", "backward", "inplace"])
def test_the_command_poses_the_problem_that_was_decided(mode):
    problem = stores.problem(96, 50257, torch.float32, mode)
    words = tables.command(stores.good(problem)).split()
    assert words[:4] == ["compiled-logprobs", "profile", "--device=cpu", "--preset=quick"] and words[-1] == "--again"
    named = dict(word.removeprefix("--").split("=") for word in words[4:-1])
    assert named == {"vocab": "50257", "rows": "96", "dtype": "float32", "mode": mode}


def test_what_is_undecided_is_said_with_who_is_open_and_what_to_do():
    decision = stores.undecided()
    words = (
        "12 rounds do not tell whether cpp (4.83x, 0.24 to 31.85) is faster than eager; eager serves by least regret"
    )
    assert tables.sentence(decision) == f"Undecided: {words}"
    assert not tables.command(decision).endswith("--again"), "which is measured again in any case, and for longer"
    for candidates in (decision.candidates, stores.with_changes(decision.candidates, speedup_over_plain=None)):
        board = tables.leaderboard(dataclasses.replace(decision, candidates=candidates)).set_index("name")
        assert board["outcome"].to_dict() == {
            "eager": "? undecided",
            "cpp": "? undecided",
            "compiled": "▽ slower",
            "flash_attn": "– unavailable",
        }
        assert 1.0 not in board.loc["eager", ["speedup", "low", "high", "ratio"]].tolist()


def test_the_command_says_what_else_was_so(monkeypatch):
    assert tables.command(stores.good(stores.problem()._replace(out_dtype=torch.bfloat16))) is None
    special = stores.problem()._replace(layout="slice", temperature="per_token", labels_per_row=4, entropy=True)
    words = "--mode=backward --layout=slice --labels=4 --temperature=per-token --entropy --sum-p-squared --again"
    assert tables.command(stores.good(special._replace(sum_p_squared=True))).endswith(words)
    few = stores.good(left_out=("flash_attn",))
    assert "--backend=cpp,compiled,flash_attn --again" in tables.command(few).replace("compiled,cpp", "cpp,compiled")
    threads = stores.here().cpu_threads + 7
    other = stores.good(environment={**stores.here().to_dict(), "cpu_threads": threads})
    assert tables.command(other).startswith(f"OMP_NUM_THREADS={threads} compiled-logprobs profile")
    more = dict.fromkeys(("third", "no name"), stores.good().winner)
    foreign = stores.good(candidates={**stores.good_candidates(), **more})
    words = "--backend=compiled,cpp,flash_attn,third --again"
    assert tables.command(foreign).endswith(words) and tables.of_others(foreign) == ["third"]
    monkeypatch.setitem(sys.modules["compiled_logprobs.backends"]._targets, "third", "package.module:Third")
    assert tables.command(foreign).endswith(words.replace("third", "package.module:Third")), "known to this process"


@pytest.mark.parametrize("mode", ["forward", "backward", "inplace", "forward, entropy"])
def test_the_snippet_runs(mode):
    problem = stores.problem(4, 16, torch.float32, mode)
    leaf = torch.randn(4, 16, requires_grad=problem.needs_grad)  # in-place gradients are for logits that a model made
    scope = {"logits": leaf * 1.0, "labels": torch.tensor([0, 1, 2, 3])}
    exec(tables.snippet(problem, "cpp"), scope)
    assert (scope["log_probs"] <= 0).all() and ("entropy" in scope) == ("entropy" in mode)
    assert (leaf.grad is not None) == problem.needs_grad


def test_ages_and_sizes_in_words():
    now = datetime(2026, 11, 24, 12, tzinfo=timezone.utc)
    days = {"24T07": "today", "23T07": "1 day ago", "20T07": "4 days ago", "<b>": ""}
    assert {day: tables.age(f"2026-11-{day}:00:00Z", now) for day in days} == days
    assert [*map(tables.size, (None, 12, 2.5 * 2**30))] == ["not measured", "12 bytes", "2.5 GiB"]


@pytest.fixture
def squares(load):
    return lambda name=None: tables.winners(*load(name), "backward", "bfloat16")


def test_what_an_earlier_decision_measured_is_compared_by_its_speed_up(scenario, squares):
    """Its seconds are of another run: here a tenth of what compiled takes beside the others."""
    earlier = {"seconds": 0.0075, "measured_at": "2026-01-01T00:00:00Z"}
    decision = stores.good(candidates=stores.with_changes(stores.good_candidates(), "compiled", **earlier))
    stores.publish(scenario("no profile"), decision)
    (square,) = squares().to_dict("records")
    assert (square["backend"], square["runner_up"]) == ("cpp", "compiled")
    assert square["margin"] == pytest.approx(6.67 / 2.67) and square["speedup"] == pytest.approx(1.2 * 6.67)
    assert tables.leaderboard(decision)["backend"].tolist() == ["cpp", "compiled", "eager", "flash_attn"]


def test_the_winner_map_has_a_square_for_every_pair(scenario, squares):
    stores.publish(scenario("no profile"), stores.good(stores.problem(8, 1024)))
    whole = squares("many")
    table = whole.set_index(["rows", "vocab"])
    assert len(table) == 4 * 4 and (table["state"] == "unmeasured").sum() == 16 - 9 - 1
    assert table.loc[(64, stores.QWEN), "state"] == "tie" and table.loc[(64, 50257), "backend"] == "eager"
    assert table.loc[(512, stores.QWEN), ["state", "backend", "runner_up"]].tolist() == ["won", "cpp", "compiled"]
    assert table.loc[(512, stores.QWEN), "margin"] == pytest.approx(2.5, rel=1e-2)
    assert table.loc[(8, stores.QWEN), ["backend", "margin", "key"]].isna().all()
    shown = tables.opacity(pd.Series([1.0, 0.9, 2**0.5, 2.0, 50.0, np.nan]))
    assert shown.tolist() == pytest.approx([0.35, 0.35, 0.675, 1.0, 1.0, 0.35]), "the margin"
    assert tables.map_in_words(whole) == (
        "Winner by N and V, 16 squares: cpp 9, eager 1. Ties, drawn hollow: 1. Not measured, drawn grey: 6."
    )
    figure = charts.winner_map(whole, 512, stores.QWEN)
    by = {trace.name: trace for trace in figure.data}
    assert {"P cpp", "P cpp, tie", "E eager", "shown above", "· not measured"} <= set(by)
    assert set(by["P cpp"].text) == {"P"} and by["P cpp, tie"].marker.symbol == "square-open"
    assert all(in_rgb(BACKENDS["cpp"].colour, 1.0)[:-5] in colour for colour in by["P cpp"].marker.color)
    places = {tuple(place) for trace in figure.data for place in trace.customdata}
    assert places == set(zip(whole["rows"], whole["vocab"], strict=True)), "each can be clicked"
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "category"
    assert list(figure.layout.xaxis.categoryarray) == ["8", "64", "512", "2048"], "by number, not by text"
    open_ = squares("undecided").set_index(["rows", "vocab"]).loc[(512, stores.QWEN)]
    assert open_["state"] == "undecided" and open_[["backend", "speedup", "margin"]].isna().all()
    text = tables.map_in_words(squares("undecided"))
    assert "cpp 8, eager 1. Ties, drawn hollow: 1. Undecided: 1." in text, "and eager has won no more than before"
    assert "? undecided" in {trace.name for trace in charts.winner_map(squares("undecided")).data}
    assert squares("all failed").set_index(["rows", "vocab"]).loc[(512, stores.QWEN), "state"] == "alone"


def test_a_large_map_is_cut_round_the_shape(scenario, squares, monkeypatch):
    table = pd.DataFrame({"rows": np.repeat(2 ** np.arange(1, 61), 30), "vocab": np.tile(np.arange(1, 31) * 1000, 60)})
    part = tables.around(table, 2**30, 5000)
    assert part["rows"].nunique() == tables.MOST_ROWS and part["vocab"].nunique() == tables.MOST_VOCABS
    assert 2**30 in set(part["rows"]) and 5000 in set(part["vocab"])
    monkeypatch.setattr(tables, "MOST_SQUARES", 3)
    for number in (4, 8):
        stores.publish(scenario("no profile"), stores.good(stores.problem(number, 1000 * number)))
    assert sorted(squares()["rows"]) == [4, 8] and "unmeasured" not in set(squares()["state"])


def test_no_name_becomes_markup_in_a_chart(squares):
    table = squares("hostile")
    board = tables.leaderboard(
        stores.good(candidates={**stores.good_candidates(), stores.HOSTILE: stores.good().winner})
    )
    table.loc[0, ["backend", "runner_up", "stale"]] = stores.HOSTILE
    for figure in (charts.winner_map(table), charts.ranking(board, stores.HOSTILE)):
        text = figure.to_json()
        assert "onclick" in text and "<b onclick" not in text and "\\u003cb onclick" not in text


@pytest.mark.slow
def test_a_link_leads_to_a_shape_which_the_next_page_keeps(scenario):
    scenario("many")
    at = opened(rows=100, vocab=50257, mode="forward", dtype="float32")
    assert (at.number_input(key="rows").value, at.number_input(key="vocab").value) == (100, 50257)
    assert (at.selectbox(key="mode").value, at.selectbox(key="dtype").value) == ("forward", "float32")
    assert "nearest: N = 64" in text_of(at) and at.selectbox(key="model").value == "gpt2"
    at.selectbox(key="model").select("llama3").run()
    assert at.number_input(key="vocab").value == 128256 and not at.exception
    at.number_input(key="vocab").set_value(1234).run()
    at.switch_page("app_pages/throughput.py").run()
    assert at.selectbox(key="model").value == selection.OTHER and at.number_input(key="vocab").value == 1234


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["x", 10**30, -1, "9" * 400], ids=lambda rows: str(rows)[:5])
def test_a_link_that_leads_nowhere_falls_back(scenario, rows):
    scenario("one")
    at = opened(rows=rows, mode="<script>", dtype="int4", profile="../../etc", cap="nan")
    assert not at.exception and "Use cpp" in text_of(at)


@pytest.mark.slow
def test_badges_and_what_to_do(scenario):
    scenario("many")
    at = opened(rows=2000)
    assert "exact" in text_of(at) and "stale" not in text_of(at) and len(metrics_of(at)) == 4
    assert "from compiled_logprobs import log_probs_from_logits" in at.code[0].value
    assert at.code[1].value == (
        f"compiled-logprobs profile --device=cpu --preset=quick --vocab={stores.QWEN} --rows=2048 --dtype=bfloat16 "
        "--mode=backward --again"
    )
    at.number_input(key="cap").set_value(1000.0).run()
    assert "use **cpp**" in at.success[0].value and not at.warning
    at.number_input(key="cap").set_value(1.0).run()
    assert "use nothing" in at.warning[0].value and "none fits" in at.warning[0].value
    at.number_input(key="rows").set_value(1).run()
    assert "By rule, what is ready" in text_of(at) and not at.metric
    at.number_input(key="rows").set_value(100).run()
    assert "nearest: N = 64" in text_of(at)
    at.selectbox(key="mode").select("forward, entropy").run()
    assert "nearest: no entropy at N = 64" in text_of(at)
    at.selectbox(key="mode").select("inplace").run()
    assert "Not measured" in text_of(at) and "Nothing was measured in this profile for inplace" in text_of(at)
    other = next(name for name in at.selectbox(key="profile").options if "H100" in name)
    at.selectbox(key="profile").select(other).run()
    at.selectbox(key="mode").select("backward").run()
    assert "Stale: measured with torch 2.12.0" in text_of(at) and "another device" in text_of(at) and not at.exception


@pytest.mark.slow
def test_what_is_undecided_has_no_winners_figures(scenario):
    where = scenario("undecided")
    stores.publish(where, stores.good(stores.problem(1024)))  # which does not serve another bucket that was measured
    at = opened(rows=512)
    assert "Undecided: 12 rounds do not tell" in text_of(at) and "eager serves by least regret" in text_of(at)
    assert not at.metric and not at.exception


@pytest.mark.slow
def test_what_changes_meanwhile_appears(scenario):
    where = scenario("no profile")
    at = opened()
    assert "No profile" in text_of(at)
    stores.publish(where, stores.good())
    assert "Use cpp" in text_of(at.run()) and selection.current_frames() is selection.current_frames()
    where.path(stores.here().fingerprint(), stores.problem()).write_bytes(b"{")  # in place, so that no folder changes
    with pytest.warns(RuntimeWarning, match="is passed over"):
        assert not at.run().exception
    assert "Not measured" in text_of(at)
    where.path(stores.here().fingerprint(), stores.problem()).unlink()
    assert "No profile" in text_of(at.run())

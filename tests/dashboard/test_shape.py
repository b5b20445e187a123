"""One shape: the sentence, the ranking, memory caps, how to call and measure it, and how all of that scales."""

import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import torch
from compiled_logprobs_dashboard.charts import shape as charts
from compiled_logprobs_dashboard.charts import upward
from compiled_logprobs_dashboard.humanize import duration, size
from compiled_logprobs_dashboard.tables import scaling
from compiled_logprobs_dashboard.tables import shape as tables

from compiled_logprobs.decision import Speedup
from compiled_logprobs.problem import as_it_lies
from tests.helpers import dashboard_stores as stores
from tests.helpers.dashboard_pages import charts_of, links_of, opened, table_of, text_of

QWEN, GIB = stores.QWEN, 2**30
FASTER = "Use cpp: 8.00x (7.60 to 8.40) faster than plain log_softmax, "


def with_winner(**changes):
    return stores.good(candidates=stores.with_changes(stores.good_candidates(), "cpp", **changes))


def test_the_sentence_says_what_to_use_and_whether_it_is_right():
    assert tables.sentence(stores.good()) == FASTER + "and it is right: passed 2 of 2 checks"
    assert tables.sentence(stores.good(short_check=True)).endswith("2 of 2 checks (the short ones)")
    assert tables.sentence(with_winner(checks=())) == FASTER + "and whether it is right is not stored"
    slower = with_winner(speedup_over_plain=None, speedup=Speedup(None, 0.9, None))
    assert tables.sentence(slower).startswith("Use cpp: 0.90x the speed of ")
    bad = stores.wrong_sign().candidates["compiled"].checks
    assert tables.sentence(with_winner(checks=bad)).endswith("and it is ✗ WRONG: log_prob_sign, log_prob_error")
    assert tables.sentence(stores.all_failed()).startswith("Use eager: 1.20x (1.14 to 1.26) faster than plain ")
    words = (
        "12 rounds do not tell whether cpp (4.83x, 0.24 to 31.85) is faster than eager; eager serves by least regret"
    )
    assert tables.sentence(stores.undecided()) == f"Undecided: {words}"


def test_the_ranking_has_the_one_that_serves_first_then_the_fastest():
    board = tables.ranking(stores.tied(stores.problem()))
    assert board["backend"].tolist() == ["P  cpp", "C  compiled", "E  eager", "F  flash_attn"]
    assert board["outcome"].tolist() == ["★ chosen", "≈ tie", "▽ slower", "– unavailable"]
    assert board.loc[3, ["ms", "MiB", "tokens", "roof"]].isna().all(), "not measured is not 0"
    assert board["over eager"].tolist()[:3] == [6.67, 6.6, 1.0] and board["speed-up"].iloc[1] == 7.9
    assert board["why"].iloc[1] == "as fast as cpp, within 3%" and board["checks"].tolist()[2:] == [
        "✓ 2 of 2",
        "not run",
    ]
    wrong = tables.ranking(stores.wrong_sign()).set_index("name").loc["compiled"]
    assert wrong["checks"] == "✗ log_prob_sign, log_prob_error" and wrong["outcome"] == "✗ WRONG"
    open_ = tables.ranking(stores.undecided()).set_index("name")
    assert open_["outcome"].tolist()[:2] == ["? undecided", "? undecided"]
    assert 1.0 not in open_.loc["eager", ["speed-up", "low", "high", "over eager"]].tolist()


def test_what_an_earlier_decision_measured_is_ranked_by_its_speed_up():
    """Its seconds are of another run: here a tenth of what compiled takes beside the others."""
    earlier = {"seconds": 0.0075, "measured_at": "2026-01-01T00:00:00Z"}
    decision = stores.good(candidates=stores.with_changes(stores.good_candidates(), "compiled", **earlier))
    assert tables.ranking(decision)["name"].tolist() == ["cpp", "compiled", "eager", "flash_attn"]


def test_a_memory_cap_changes_the_choice_where_it_has_to():
    decision, logits = with_winner(extra_multiple=3.0), 512 * QWEN * 2
    # Without room for cpp, the fastest that fits, and not the smallest.
    for cap, name in ((3 * logits, "cpp"), (3 * logits - 1, "compiled"), (logits - 1, None)):
        assert tables.under_cap(decision, cap, 512)[0] == name
    assert tables.under_cap(decision, 3 * logits, 1024)[0] == "compiled", "it grows with N"
    assert tables.under_cap(decision, 0.0, 512)[1] == "the least that one takes beside the logits is 148 MiB"
    name, why = tables.under_cap(with_winner(extra_multiple=None), 2.0**40, 512)
    assert name == "compiled" and why.endswith("of cpp the memory is not known")


@pytest.mark.parametrize("mode", ["forward", "backward", "inplace"])
def test_the_command_poses_the_problem_that_was_decided(mode):
    problem = stores.problem(96, 50257, torch.float32, mode)
    words = tables.command(stores.good(problem)).split()
    assert words[:4] == ["compiled-logprobs", "profile", "--device=cpu", "--preset=quick"] and words[-1] == "--again"
    named = dict(word.removeprefix("--").split("=") for word in words[4:-1])
    assert named == {"vocab": "50257", "rows": "96", "dtype": "float32", "mode": mode}


def test_the_command_says_what_else_was_so(monkeypatch):
    assert tables.command(stores.good(stores.problem()._replace(out_dtype=torch.bfloat16))) is None
    special = stores.problem()._replace(layout="slice", temperature="per_token", labels_per_row=4, entropy=True)
    words = "--mode=backward --layout=slice --labels=4 --temperature=per-token --entropy --sum-p-squared --again"
    assert tables.command(stores.good(special._replace(sum_p_squared=True))).endswith(words)
    assert not tables.command(stores.undecided()).endswith("--again"), "which is measured again in any case, for longer"
    few = stores.good(left_out=("flash_attn",))
    assert "--backend=cpp,compiled,flash_attn --again" in tables.command(few).replace("compiled,cpp", "cpp,compiled")
    threads = stores.here().cpu_threads + 7
    other = stores.good(environment={**stores.here().to_dict(), "cpu_threads": threads})
    assert tables.command(other).startswith(f"OMP_NUM_THREADS={threads} compiled-logprobs profile")
    more = dict.fromkeys(("third", "no name"), stores.good().winner)
    foreign = stores.good(candidates={**stores.good_candidates(), **more})
    words = "--backend=compiled,cpp,flash_attn,third --again"
    assert tables.command(foreign).endswith(words)
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


def test_from_hidden_states_it_is_another_call(scenario):
    posed = stores.problem()._replace(hidden=4096, bias=True, memory_limit=2**30)
    words = "log_probs = log_probs_from_hidden(hidden, weight, labels, bias=bias, memory_limit=1073741824)"
    assert words in tables.snippet(posed, "cpp") and "weight: [151936, 4096] bfloat16" in tables.snippet(posed, "cpp")


def test_time_against_memory_has_the_limit_and_nothing_that_was_wrong():
    posed = stores.problem()._replace(hidden=4096, memory_limit=2**30)
    decision = stores.wrong_sign(posed)
    points, left_out = tables.trade_off(decision)
    assert set(points["backend"]) == {"cpp", "eager"} and left_out[0].startswith("compiled, ✗ WRONG: returns the loss")
    figure = charts.trade_off(points, posed.memory_limit)
    assert figure.layout.shapes[0].x0 == 2**30 and figure.layout.shapes[0].label.text == "limit: 1 GiB"
    assert {trace.name for trace in figure.data} == {"P cpp", "E eager"} and figure.layout.yaxis.ticktext[0] == "0"


# How it scales


@pytest.fixture
def along(load):
    def of(name="many", axis="rows", **changes):
        return scaling.scaling(*load(name), as_it_lies(stores.problem()._replace(**changes)), axis)

    return of


def of(points, backend, rows=512):
    (row,) = points[(points["backend"] == backend) & (points["rows"] == rows)].to_dict("records")
    return row


def test_points_are_of_a_call_of_all_rows(along):
    found = along()
    assert sorted(found.points["rows"].unique()) == [64, 512, 2048] and found.left_out == []
    cpp, logits = of(found.points, "cpp"), 512 * QWEN * 2
    assert (
        cpp["seconds"] == pytest.approx(0.03) and cpp["seconds_low"] < 0.03 and cpp["percent"] == pytest.approx(40.02)
    )
    assert cpp["memory"] == pytest.approx(2 * logits) and cpp["least"] == pytest.approx(2 * logits + 512 * 4)
    assert found.roof == 3.1e10, "what a backward pass is held against"
    seconds, _, _ = charts.values_of(found.points, "tokens/s")
    assert seconds.max() == pytest.approx(512 / 0.03, rel=0.3)
    assert sorted(along(None, "vocab").points["vocab"].unique()) == [50257, 128256, 151936]
    assert set(along(None, "vocab", rows=1400).points["rows"]) == {2048}, "the nearest that there is"
    fewer = of(along("partial").points, "cpp")
    assert fewer["seconds"] == pytest.approx(4 * 0.03) and fewer["note"] == "timed with 128 rows"
    assert math.isnan(fewer["seconds_low"]) and math.isnan(fewer["memory"])


def test_no_line_goes_through_a_point_where_a_backend_was_wrong(along):
    points = along("signs").points
    wrong = of(points, "compiled")
    assert wrong["state"] == "wrong" and math.isnan(wrong["seconds"]) and "log_prob_sign" in wrong["note"]
    for metric in charts.METRICS:
        figure = charts.scaling(points, "rows", metric, roof=3e10, capacity=8.0 * GIB)
        by = {trace.name: trace for trace in figure.data if trace.name}
        line, cross = by["C compiled"], by["✗ WRONG there, so not drawn"]
        assert [x for x, y in zip(line.x, line.y, strict=True) if np.isnan(y)] == [512] and line.connectgaps is False
        assert list(cross.x) == [512] and cross.text == ("C",) and "log_prob_sign" in cross.hovertext[0]
        words = " ".join([*figure.layout.yaxis.ticktext, figure.layout.yaxis.title.text])
        assert "e+" not in words and "not measured" not in words, metric
    assert "Wrong somewhere, and not drawn there: compiled." in scaling.in_words(
        points, "rows", points["seconds"], duration
    )


def test_the_line_where_memory_runs_out(along):
    points = along().points
    figure = charts.scaling(points, "rows", "memory", capacity=8.0 * GIB)
    full = [trace for trace in figure.data if not trace.name and trace.hovertext]
    assert len(full) == 3 and all(trace.y[-1] == 8.0 * GIB for trace in full)
    assert figure.layout.shapes[0].y0 == 8.0 * GIB and "8 GiB" in figure.layout.shapes[0].label.text
    fits = scaling.largest(points, 8.0 * GIB).set_index("backend")["rows"]
    assert fits["cpp"] == pytest.approx(8 * GIB / (2 * QWEN * 2), abs=1) and fits["eager"] < fits["cpp"]


def test_memory_is_not_carried_on_to_where_a_backend_was_wrong(along, scenario):
    stores.publish(scenario("no profile"), stores.good(stores.problem(64)))
    stores.publish(scenario("no profile"), stores.wrong_sign(stores.problem(512)))
    points = along(None).points
    figure = charts.scaling(points, "rows", "memory", capacity=8.0 * GIB)
    assert len([trace for trace in figure.data if not trace.name and trace.hovertext]) == 2
    assert set(scaling.largest(points, 8.0 * GIB)["backend"]) == {"cpp", "eager"}
    stores.publish(scenario("no profile"), stores.good(stores.problem(2048)))  # right again at a larger N
    assert "compiled" in set(scaling.largest(along(None).points, 8.0 * GIB)["backend"])


def test_what_an_earlier_decision_timed_has_no_band(along, scenario):
    candidates = stores.good_candidates()
    candidates["compiled"] = dataclasses.replace(candidates["compiled"], measured_at="2026-01-01T00:00:00Z")
    stores.publish(scenario("no profile"), stores.good(stores.problem(512), candidates=candidates))
    stores.publish(scenario("no profile"), stores.good(stores.problem(2048), candidates=candidates, measured_rows=1024))
    found = along(None)
    one = of(found.points, "compiled")
    assert one["seconds"] > 0 and math.isnan(one["seconds_low"])
    assert found.left_out == ["compiled at N 2,048: timed for an earlier decision, with unknown rows"]


def test_idioms_that_people_use_are_further_lines_where_their_results_lie_in_the_store(along, scenario):
    where = scenario("many")
    row = {"rows": 512, "vocab": QWEN, "dtype": "bfloat16", "device": "cpu", "mode": "backward", "kind": "peer"}
    row |= {"outcome": "measured", "candidate": "torch.compile", "ms": 50.0, "extra_multiple": 2.0}
    others = [{**row, "kind": "ours"}, {**row, "vocab": 7}, {**row, "outcome": "oom"}, {**row, "mode": "forward"}]
    told = {"environment": stores.here().to_dict(), "rows": [row, *others]}
    told["rows"] += [{**row, "rows": 64}, {**row, "rows": 2048}, {**row, "candidate": "late", "outcome": "wrong"}]
    told["rows"] += [{**row, "candidate": "late", "rows": 64}, {**row, "candidate": "late", "rows": 2048}]
    (where.root / "peers.json").write_text(json.dumps(told))
    (where.root / "peers-b.json").write_text('{"rows": 1}')
    points = along(None).points
    assert of(points, "torch.compile")["seconds"] == 0.05 and len(points[points["is_peer"]]) == 6
    by = {trace.name: trace for trace in charts.scaling(points, "rows", "time").data}
    assert not np.isnan(by["torch.compile (peer)"].y).any() and by["✗ WRONG there, so not drawn"].text == ("peer",)
    assert np.isnan(by["late (peer)"].y).tolist() == [False, True, False], "where it was wrong, no line"
    assert not along(None, "rows", temperature="number").points["is_peer"].any()


def test_of_many_the_nearest_are_drawn_and_axes_have_round_marks(along, monkeypatch):
    monkeypatch.setattr(scaling, "MOST", 2)
    found = along()
    assert sorted(found.points["rows"].unique()) == [512, 2048] and found.left_out == [
        "of 3 decisions, the 2 nearest are shown"
    ]
    axis = upward([1e-4, 0.03], "t", duration, log=True)
    assert axis["ticktext"][:4] == ["100 µs", "200 µs", "500 µs", "1 ms"]
    assert upward([3e9], "m", size, log=True, base=2)["ticktext"][-1] in ("2 GiB", "4 GiB")
    assert upward([2.9], "x", lambda value: f"{value:g}", log=False)["ticktext"][:3] == ["0", "1", "2"]
    assert upward([None, math.nan], "x", str, log=True)["type"] == "log"


@pytest.mark.slow
def test_the_page(scenario):
    scenario("many")
    at = opened("shape", rows=2000, metric="memory")
    said = text_of(at)
    assert not at.exception and "measured" in said and "stale" not in said
    assert "N 2,000, V 151,936, bfloat16, backward, on " in said and stores.here().torch in said
    assert at.code[0].value.startswith("from compiled_logprobs import log_probs_from_logits")
    assert at.code[1].value == (
        f"compiled-logprobs profile --device=cpu --preset=quick --vocab={QWEN} --rows=2048 --dtype=bfloat16 "
        "--mode=backward --again"
    )
    assert "part=run" in links_of(at)["**Measure again**"] and "this=shape" in links_of(at)["**Measure again**"]
    assert table_of(at, "outcome")["outcome"].iloc[0] == "★ chosen" and "use cpp" in at.success[0].value
    assert "tab=compare" in links_of(at)["Over time"] and "rows=2000" in links_of(at)["Over time"]
    at.number_input(key="free").set_value(0.001).run()
    assert "use fewer rows" in at.warning[0].value
    at.number_input(key="rows").set_value(1).run()
    assert "By rule, what is ready" in text_of(at)
    at.selectbox(key="mode").select("inplace").run()
    at.number_input(key="rows").set_value(512).run()
    assert "Not measured" in text_of(at) and "Nothing was timed in this profile" in text_of(at)
    assert "this=shape" in links_of(at)["**Measure this shape**"]


@pytest.mark.slow
def test_the_free_memory_is_that_of_the_profile(scenario):
    scenario("many")
    at, gpu = opened("shape", rows=2048, metric="memory"), stores.H100.fingerprint()
    at.selectbox(key="profile").select(gpu).run()
    assert "fits into 80 GiB" in text_of(at) and "free" not in at.query_params
    at.number_input(key="free").set_value(1.0).run()
    assert "fits into 1 GiB" in text_of(at) and at.query_params["free"] == "1.0"
    at.selectbox(key="profile").select(stores.here().fingerprint()).run()
    assert "fits into 1 GiB" not in text_of(at) and at.number_input(key="free").value is None and not at.exception
    assert "fits into 40 GiB" in text_of(opened("shape", rows=2048, metric="memory", profile=gpu, free=40))


@pytest.mark.slow
def test_of_a_part_of_the_columns_the_limit_is_in_proportion(scenario):
    posed = stores.problem()._replace(hidden=4096, memory_limit=2**30)
    stores.publish(scenario("no profile"), stores.good(posed, measured_vocab=QWEN // 4))
    at = opened("shape")
    shapes = json.loads(charts_of(at)[0].spec)["layout"]["shapes"]
    assert shapes[0]["x0"] == 2**28 and "the limit in proportion to the columns" in text_of(at) and not at.exception


@pytest.mark.slow
def test_what_changes_meanwhile_appears(scenario):
    where = scenario("no profile")
    at = opened("shape")
    assert "Use cpp" not in text_of(at)
    stores.publish(where, stores.good())
    at = opened("shape")
    assert "Use cpp" in text_of(at)
    where.path(stores.here().fingerprint(), stores.problem()).write_bytes(b"{")  # in place, so that no folder changes
    with pytest.warns(RuntimeWarning, match="is passed over"):
        assert not at.run().exception
    assert "Not measured" in text_of(at)
    where.path(stores.here().fingerprint(), stores.problem()).unlink()
    assert not at.run().exception and "Use cpp" not in text_of(at)

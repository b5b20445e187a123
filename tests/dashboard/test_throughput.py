"""Throughput: its tables, its charts, and the page."""

import dataclasses
import json
import math

import pandas as pd
import pytest
import torch
from compiled_logprobs_dashboard import charts as shared
from compiled_logprobs_dashboard.charts import throughput as charts
from compiled_logprobs_dashboard.frames import Shape
from compiled_logprobs_dashboard.tables import throughput as tables

from tests.helpers.dashboard_pages import charts_of, opened, text_of
from tests.helpers.dashboard_stores import QWEN, good, good_candidates, problem, publish

SHAPE = Shape("backward", "bfloat16", 512, QWEN)


@pytest.fixture
def along(load):
    """Points and what is left out, along an axis of the profile that is shown first."""
    return lambda name="many", axis="rows", shape=SHAPE: tables.throughput(*load(name), shape, axis, None)


def test_rates_are_of_the_bytes_that_must_move(along):
    points, left_out = along()
    assert not left_out and list(points["rows"].unique()) == [64, 512, 2048]
    one = points[(points["backend"] == "compiled") & (points["rows"] == 512)].iloc[0]
    size = 3 * 512 * QWEN * 2  # the logits twice, and their gradient; and some for labels and results
    assert one["gbps"] * 1e9 * one["seconds"] == pytest.approx(size, rel=1e-3)
    assert one["tokens"] == pytest.approx(512 / one["seconds"])
    assert 0 < one["tokens_low"] < one["tokens_high"] and one["percent"] == pytest.approx(6 * 2.67)


def test_what_was_not_timed_or_stored_is_not_drawn(along):
    points, _ = along("partial", shape=SHAPE._replace(rows=64))
    assert points["percent"].isna().all() and points.loc[points["rows"] == 512, "gbps_low"].isna().all()
    assert set(along("all failed", shape=SHAPE._replace(mode="forward"))[0]["backend"]) == {"eager"}


def test_along_the_vocabulary(along, load):
    points, _ = along(axis="vocab", shape=SHAPE._replace(rows=500))
    assert set(points["rows"]) == {512} and len(points["vocab"].unique()) == 3
    frames, profile = load()
    keys, _ = tables.keys_along(frames, profile, SHAPE._replace(rows=1400), "vocab")
    assert set(frames.decisions.loc[keys, "rows"]) == {2048}, "the nearest that there is"


def test_of_many_the_nearest_are_drawn(along, monkeypatch):
    monkeypatch.setattr(tables, "MOST", 2)
    points, left_out = along()
    assert sorted(points["rows"].unique()) == [512, 2048] and left_out == ["of 3 decisions, the 2 nearest are shown"]
    assert len(shared.across(pd.Series(range(1, 101)), "N")["tickvals"]) <= shared.MOST_TICKS, "marks are thinned"


def test_what_an_earlier_decision_timed_has_no_band(along, scenario):
    candidates = good_candidates()
    candidates["compiled"] = dataclasses.replace(candidates["compiled"], measured_at="2026-01-01T00:00:00Z")
    publish(scenario("no profile"), good(problem(512), candidates=candidates))
    publish(scenario("no profile"), good(problem(2048), candidates=candidates, measured_rows=1024))
    points, left_out = along(None)
    one = points[(points["backend"] == "compiled") & (points["rows"] == 512)].iloc[0]
    assert one["tokens"] > 0 and math.isnan(one["tokens_low"])
    assert "compiled" not in set(points.loc[points["rows"] == 2048, "backend"])
    assert left_out[0].startswith("compiled at N 2048: it was timed for an earlier decision") and len(left_out) == 1


def test_more_than_the_roof_has_a_reason():
    timed, size = problem(64), 64 * QWEN * 2
    fits = "the logits (19 MiB) fit into the last cache"
    assert tables.why_above(99.0, timed, None) == tables.why_above(math.nan, timed, None) == ""
    assert tables.why_above(50.0, timed, size) == f"cache-resident: {fits}"
    assert tables.why_above(130.0, timed, size).startswith(f"above the roof: {fits}")
    assert "forward had left in the cache" in tables.why_above(130.0, timed, size - 1)
    assert "no sign that the device can do more" in tables.why_above(130.0, timed._replace(needs_grad=False), None)


def test_lines_bands_and_roofs(along, load):
    points, _ = along()
    roofs = tables.roofs(load()[0], points["key"].unique())
    assert roofs == {"read": (35.0, 35.0), "copy": (31.0, 31.0)}, "what forward and backward are held against"
    figure = charts.rate(points, "rows", "gbps", roofs)
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    bands = [trace for trace in figure.data if trace.fill == "toself"]
    assert {trace.name for trace in lines} == {"P cpp", "C compiled", "E eager"}
    assert len(bands) == 3 and all(len(trace.x) == 6 for trace in bands)
    assert figure.layout.xaxis.type == "log" and list(figure.layout.xaxis.ticktext) == ["64", "512", "2048"]
    positions = {shape.label.textposition for shape in figure.layout.shapes}
    assert len(figure.layout.shapes) == len(positions) == 2, "as high as one another, and both readable"
    points.loc[points["rows"] == 64, "percent"] = 140.0
    figure = charts.share(points, "rows")
    for trace in figure.data:
        assert [symbol.endswith("-open") for symbol in trace.marker.symbol] == [y > 100 for y in trace.y], "hollow"
    assert figure.layout.shapes[0].y0 == 100


def test_a_single_decision_has_bars_and_the_time_of_the_first_call(along):
    points, _ = along("one")
    figure = charts.rate(points, "rows", "tokens")
    assert all(trace.error_y.array is not None and trace.fill is None for trace in figure.data)
    (bars,) = charts.first_calls(points).data
    by_name = dict(zip(bars.y, bars.text, strict=True))
    assert by_name["C compiled"] == "0.5 s, paid after 4 calls" and by_name["E eager"] == "0.5 s"


def test_the_model_of_bytes_is_told():
    told = tables.bytes_model(problem(512, dtype=torch.float32, mode="backward"))
    assert told.startswith("N x V x 4 bytes of logits = 311 MB; ") and told.endswith("in all 934 MB a call of 512 rows")
    assert "backward" in told and "backward" not in tables.bytes_model(problem(512, mode="forward"))


@pytest.mark.slow
def test_the_page_goes_along_the_vocabulary_and_says_what_was_not_measured(scenario):
    scenario("many")
    at = opened("throughput", along="V, vocabulary", rows=512)
    assert not at.exception and at.segmented_control(key="along").value == "V, vocabulary"
    axis = json.loads(charts_of(at)[0].spec)["layout"]["xaxis"]
    assert axis["ticktext"] == ["50257", "128256", "151936"]
    at.segmented_control(key="along").set_value("N, rows")
    at.number_input(key="vocab").set_value(999).run()
    assert not at.exception and not charts_of(at) and "Nothing was measured in this profile for backward" in text_of(at)

"""Throughput: its tables, its charts, and the page."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import streamlit as st
import torch
from compiled_logprobs_dashboard import data, index
from compiled_logprobs_dashboard.charts import throughput as figures
from compiled_logprobs_dashboard.tables import throughput as roof
from streamlit.testing.v1 import AppTest

from compiled_logprobs.machine.bandwidth import minimum_bytes
from tests.helpers.dashboard_stores import QWEN, SCENARIOS, good, good_candidates, problem, publish

APP = Path(__file__).parent.parent / "compiled_logprobs/dashboard/app.py"
SHAPE = data.Shape("backward", "bfloat16", 512, QWEN)


@pytest.fixture(autouse=True)
def _nothing_cached():
    st.cache_data.clear()
    st.cache_resource.clear()
    yield
    st.cache_data.clear()
    st.cache_resource.clear()


@pytest.fixture
def along(scenario, tmp_path):
    """From a scenario, or what fills a store, to the throughput along an axis."""

    def found(name="many", axis="rows", shape=SHAPE, cache_bytes=None, fill=None):
        store = scenario(name)
        if fill is not None:
            fill(store)
        tables = index.load(index.sources(), tmp_path / "cache")
        row = tables.environments.sort_values("here", ascending=False).iloc[0]
        return roof.throughput(tables, row["source"], row["environment"], shape, axis, cache_bytes), tables

    return found


def test_rates_are_the_bytes_and_rows_of_what_was_timed(along):
    (points, left_out), _ = along()
    assert not left_out and sorted(points["rows"].unique()) == [64, 512, 2048]
    one = points[(points["backend"] == "compiled") & (points["rows"] == 512)].iloc[0]
    assert one["seconds"] == 0.075
    assert one["gbps"] == pytest.approx(minimum_bytes(problem(512)) / 0.075 / 1e9)
    assert one["tokens"] == pytest.approx(512 / 0.075)
    times = [0.075 * (0.95 + 0.005 * number) for number in range(10)]
    low, high = np.percentile(times, [20, 80])
    assert one["tokens_low"] == pytest.approx(512 / high) and one["tokens_high"] == pytest.approx(512 / low)
    assert one["percent"] == pytest.approx(6.0 * 2.67)


def test_what_was_timed_with_fewer_rows_counts_as_these(along):
    (points, _), _ = along("partial")
    assert set(points["timed_rows"]) == {128} and points["tokens"].notna().all()
    one = points[(points["rows"] == 512) & (points["backend"] == "eager")].iloc[0]
    assert one["gbps"] == pytest.approx(minimum_bytes(problem(512)._replace(rows=128)) / 0.2 / 1e9)
    # Nothing is stored beside this decision, and what was not measured is missing, not 0.
    assert math.isnan(one["tokens_low"]) and math.isnan(one["percent"]) and math.isnan(one["first_call_seconds"])


def test_along_the_vocabulary(along):
    (points, _), tables = along(axis="vocab", shape=SHAPE._replace(rows=500))
    assert set(points["rows"]) == {512} and len(points["vocab"].unique()) == 3
    row = tables.environments.sort_values("here", ascending=False).iloc[0]
    keys, _ = roof.keys_along(tables, row["source"], row["environment"], SHAPE._replace(rows=1400), "vocab")
    assert set(tables.decisions.set_index("key").loc[keys, "rows"]) == {2048}  # the nearest that there is


def test_of_many_the_nearest_are_drawn(along, monkeypatch):
    monkeypatch.setattr(roof, "MOST", 2)
    (points, left_out), _ = along()
    assert sorted(points["rows"].unique()) == [512, 2048] and left_out == ["of 3 decisions, the 2 nearest are shown"]


def test_only_what_was_timed_is_drawn(along):
    (points, _), _ = along("all failed")
    assert set(points["backend"]) == {"eager"}


def test_what_an_earlier_decision_timed_has_no_band(along):
    def carried(store):
        candidates = good_candidates()
        candidates["compiled"] = dataclasses.replace(candidates["compiled"], measured_at="2026-01-01T00:00:00Z")
        publish(store, good(problem(512), candidates=candidates))
        publish(store, good(problem(2048), candidates=candidates, measured_rows=1024))

    (points, left_out), _ = along("no profile", fill=carried)
    one = points[(points["backend"] == "compiled") & (points["rows"] == 512)].iloc[0]
    assert one["tokens"] > 0 and math.isnan(one["tokens_low"])
    assert "compiled" not in set(points.loc[points["rows"] == 2048, "backend"])
    assert left_out == [
        "compiled at N 2048: it was timed for an earlier decision, and with how many rows is not stored"
    ]


def test_more_than_the_roof_has_a_reason():
    timed = problem(64)
    size = 64 * QWEN * 2
    assert roof.why_above(99.0, timed, None) == ""
    assert roof.why_above(50.0, timed, size) == "cache-resident: the logits (19 MiB) fit into the last cache"
    assert roof.why_above(130.0, timed, size).startswith("above the roof: the logits (19 MiB) fit into the last cache")
    assert "forward had left in the cache" in roof.why_above(130.0, timed, size - 1)
    assert "it is no sign that the device can do more" in roof.why_above(130.0, timed._replace(needs_grad=False), None)
    assert roof.why_above(math.nan, timed, None) == ""


def test_points_above_the_roof_are_hollow(along):
    (points, _), _ = along()
    points.loc[points["rows"] == 64, "percent"] = 140.0
    figure = figures.share(points, "rows")
    for trace in figure.data:
        assert [symbol.endswith("-open") for symbol in trace.marker.symbol] == [one > 100 for one in trace.y]
    assert figure.layout.shapes[0].y0 == 100


def test_lines_and_bands(along):
    (points, _), tables = along()
    roofs = roof.roofs(tables, points["key"].unique())
    assert roofs == {"read": (35.0, 35.0), "copy": (31.0, 31.0)}  # what backward and forward are held against
    figure = figures.rate(points, "rows", "gbps", roofs)
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    bands = [trace for trace in figure.data if trace.fill == "toself"]
    assert [trace.name for trace in lines] == ["P cpp", "C compiled", "E eager"] or len(lines) == 3
    assert len(bands) == 3 and all(len(trace.x) == 6 for trace in bands)
    assert figure.layout.xaxis.type == "log" and list(figure.layout.xaxis.ticktext) == ["64", "512", "2048"]
    assert len({shape.label.textposition for shape in figure.layout.shapes}) == 2, (
        "as high as one another, and both readable"
    )
    assert len(figure.layout.shapes) == 2


def test_one_point_has_bars_in_place_of_a_band(along):
    (points, _), _ = along("one")
    figure = figures.rate(points, "rows", "tokens")
    assert all(trace.error_y.array is not None and trace.fill is None for trace in figure.data)


def test_many_marks_are_thinned():
    marks = figures.across(pd.Series(range(1, 101)), "N")
    assert len(marks["tickvals"]) <= figures.MOST_TICKS


def test_the_first_call_and_when_it_pays(along):
    (points, _), _ = along("one")
    figure = figures.first_calls(points)
    (bars,) = figure.data
    by_name = dict(zip(bars.y, bars.text, strict=True))
    assert by_name["C compiled"] == "0.5 s, paid after 4 calls" and by_name["E eager"] == "0.5 s"


def test_the_model_of_bytes_is_told():
    told = roof.bytes_model(problem(512, dtype=torch.float32, mode="backward"))
    assert told.startswith(
        "N x V x 4 bytes of logits = 311 MB; forward reads them once, with labels and results 311 MB; "
    )
    assert told.endswith("in all 934 MB a call of 512 rows")
    assert "backward" not in roof.bytes_model(problem(512, mode="forward"))


# --- the page ---------------------------------------------------------------------------------------------------------


def page(**parameters) -> AppTest:
    app = AppTest.from_file(str(APP), default_timeout=60)
    for name, value in parameters.items():
        app.query_params[name] = str(value)
    app.switch_page("app_pages/throughput.py")
    return app.run()


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_page_takes_every_store(scenario, name):
    scenario(name)
    app = page()
    assert not app.exception
    assert app.title[0].value == "Throughput"
    charts = app.get("plotly_chart")
    assert len(charts) == {"no profile": 0, "partial": 2}.get(name, 4)
    for chart in charts:
        assert chart.proto.alt and json.loads(chart.proto.spec)["data"]
        assert "<b onclick" not in chart.proto.spec and "<a href" not in chart.proto.spec


def test_against_the_vocabulary_by_the_address(scenario):
    scenario("many")
    app = page(along="V, vocabulary", rows=512)
    assert not app.exception
    assert app.segmented_control(key="along").value == "V, vocabulary"
    spec = json.loads(app.get("plotly_chart")[0].proto.spec)
    assert spec["layout"]["xaxis"]["ticktext"] == ["50257", "128256", "151936"]


def test_a_shape_that_was_not_measured(scenario):
    scenario("many")
    app = page(vocab=999)
    assert not app.exception and not app.get("plotly_chart")
    assert any("Nothing was measured in this profile for backward" in one.value for one in app.info)

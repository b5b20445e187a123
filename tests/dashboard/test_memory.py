"""Memory: its tables, its charts, and the page."""

import dataclasses
import json
import math
from pathlib import Path

import pandas as pd
import pytest
import streamlit as st
import torch
from compiled_logprobs_dashboard import data, index
from compiled_logprobs_dashboard.charts import memory as figures
from compiled_logprobs_dashboard.tables import memory as data_memory
from streamlit.testing.v1 import AppTest

from tests.helpers.dashboard_stores import (
    H100,
    QWEN,
    SCENARIOS,
    problem,
    scenario,  # noqa: F401 - a fixture
)

APP = Path(__file__).parent.parent / "compiled_logprobs/dashboard/app.py"
SHAPE = data.Shape("backward", "bfloat16", 512, QWEN)
LOGITS = 512 * QWEN * 2


@pytest.fixture(autouse=True)
def _nothing_cached():
    st.cache_data.clear()
    st.cache_resource.clear()
    yield
    st.cache_data.clear()
    st.cache_resource.clear()


@pytest.fixture
def tables_of(scenario, tmp_path):  # noqa: F811
    def found(name):
        scenario(name)
        tables = index.load(index.sources(), tmp_path / "cache")
        row = tables.environments.sort_values("here", ascending=False).iloc[0]
        return tables, row["source"], row["environment"]

    return found


def test_the_least_is_the_gradient_and_the_results():
    assert data_memory.least_bytes(problem(512, mode="forward")) == 512 * 4
    assert data_memory.least_bytes(problem(512, mode="backward")) == LOGITS + 512 * 4
    assert data_memory.least_bytes(problem(512, mode="inplace")) == 512 * 4
    assert data_memory.least_bytes(problem(512, mode="entropy")) == 2 * 512 * 4
    more = problem(512, mode="forward")._replace(labels_per_row=3, out_dtype=torch.bfloat16)
    assert data_memory.least_bytes(more) == 3 * 512 * 2


def test_extra_memory_beside_the_least(tables_of):
    points, left_out = data_memory.memory(*tables_of("one"), SHAPE)
    assert not left_out and set(points["backend"]) == {"eager", "compiled", "cpp"}
    eager = points[points["backend"] == "eager"].iloc[0]
    assert eager["extra_bytes"] == int(1.31 * LOGITS) and eager["extra_multiple"] == 1.31
    assert eager["logits_bytes"] == LOGITS and eager["least_multiple"] == pytest.approx(1.0, abs=1e-4)


def test_what_was_not_measured_is_told_and_not_drawn(tables_of):
    points, left_out = data_memory.memory(*tables_of("partial"), SHAPE)
    assert points.empty and "cpp at N 512: its memory was not measured" in left_out


def test_the_largest_n_that_fits(tables_of):
    points, _ = data_memory.memory(*tables_of("many"), SHAPE)
    fits = data_memory.largest(points, QWEN, 2, 80e9)
    eager = fits[fits["backend"] == "eager"].iloc[0]
    assert eager["largest_rows"] == math.floor(80e9 / (QWEN * 2 * 2.31)) and eager["at_rows"] == 2048
    assert eager["extrapolated"]
    # As much as it says fits, and one row more does not.
    need = eager["largest_rows"] * QWEN * 2 * (1 + eager["multiple"])
    assert need <= 80e9 < need + QWEN * 2 * (1 + eager["multiple"])
    assert fits.iloc[0]["multiple"] == 1.0 and fits["multiple"].is_monotonic_increasing
    assert data_memory.largest(points, QWEN, 2, None)["largest_rows"].isna().all()
    assert not data_memory.largest(points, QWEN, 2, 1e6)["extrapolated"].any()


def test_the_capacity_is_that_of_the_profiles_device(tables_of):
    tables, source, environment = tables_of("other device")
    assert data_memory.capacity(tables, source, environment) == (80 * 2**30, "as the profile says of its device")
    tables.environments["memory_bytes"] = float("nan")
    unknown = data_memory.capacity(tables, source, environment)
    assert unknown.bytes is None and "this machine is another environment" in unknown.source


def test_without_a_figure_this_machine_stands_in_if_it_is_the_same(tables_of):
    tables, source, environment = tables_of("one")
    tables.environments["memory_bytes"] = float("nan")
    found = data_memory.capacity(tables, source, environment)
    assert found.bytes and found.source.startswith("of this machine")


def test_bars_and_the_least(tables_of):
    points, _ = data_memory.memory(*tables_of("one"), SHAPE)
    figure = figures.bars(points)
    bars, least = figure.data
    assert list(bars.x) == sorted(bars.x) and any("1.31 x logits" in one for one in bars.text)
    assert set(least.x) == {(LOGITS + 2048) / 2**20}
    assert figure.layout.yaxis.type == "category"
    assert data_memory.in_words(points).endswith("The least possible: 148 MiB.")


def test_growth_up_to_what_the_device_has(tables_of):
    points, _ = data_memory.memory(*tables_of("many"), SHAPE)
    figure = figures.growth(points, 80 * 2.0**30, 60 * 2.0**30)
    assert [shape.y0 for shape in figure.layout.shapes] == [80, 60]
    eager = next(trace for trace in figure.data if "eager" in trace.name)
    assert list(eager.x) == [64, 512, 2048] and figure.layout.xaxis.type == "log"
    assert not figures.growth(points, None, None).layout.shapes


# --- the page ---------------------------------------------------------------------------------------------------------


def page(**parameters) -> AppTest:
    app = AppTest.from_file(str(APP), default_timeout=60)
    for name, value in parameters.items():
        app.query_params[name] = str(value)
    app.switch_page("app_pages/memory.py")
    return app.run()


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_page_takes_every_store(scenario, name):  # noqa: F811
    scenario(name)
    app = page()
    assert not app.exception
    assert app.title[0].value == "Memory"
    charts = app.get("plotly_chart")
    assert len(charts) == {"no profile": 0, "partial": 0}.get(name, 2)
    for chart in charts:
        assert chart.proto.alt and json.loads(chart.proto.spec)["data"]
        assert "<b onclick" not in chart.proto.spec and "<a href" not in chart.proto.spec
    explained = any("max_memory_reserved" in one.value for one in app.markdown)
    assert explained is (name != "no profile")


def test_what_others_take_is_taken_off(scenario):  # noqa: F811
    scenario("other device")
    app = page()
    before = {one.label: int(one.value[2:].replace(",", "")) for one in app.metric}
    app.number_input(key="taken").set_value(40.0).run()
    assert not app.exception
    after = {one.label: int(one.value[2:].replace(",", "")) for one in app.metric}
    assert before.keys() == after.keys() == {"compiled", "eager"}
    for name, rows in before.items():
        assert after[name] == pytest.approx(rows / 2, rel=1e-3)


def test_a_device_of_unknown_size(scenario, monkeypatch):  # noqa: F811
    monkeypatch.setattr("tests.dashboard_stores.H100", dataclasses.replace(H100, memory_bytes=None))
    scenario("other device")
    app = page()
    assert not app.exception and not app.metric
    assert any("The device's memory is not known" in one.value for one in app.caption)
    app.number_input(key="free").set_value(24.0).run()
    assert not app.exception and len(app.metric) == 2


def test_the_table_of_what_fits_has_no_number_where_nothing_is_known():
    columns = ["backend", "timed_rows", "extra_multiple"]
    points = pd.DataFrame([("eager", 512, 1.3)], columns=columns)
    assert data_memory.largest(points, QWEN, 2, None).iloc[0]["at_rows"] == 512

"""Memory: its tables, its charts, and the page."""

import dataclasses
import shutil

import pytest
import torch
from compiled_logprobs_dashboard.charts import memory as charts
from compiled_logprobs_dashboard.frames import Shape
from compiled_logprobs_dashboard.tables import memory as tables

from tests.helpers import dashboard_stores as stores
from tests.helpers.dashboard_pages import opened, text_of
from tests.helpers.dashboard_stores import H100, QWEN, problem

SHAPE = Shape("backward", "bfloat16", 512, QWEN)
LOGITS = 512 * QWEN * 2


@pytest.mark.parametrize(
    ("mode", "least"), [("forward", 2048), ("backward", LOGITS + 2048), ("inplace", 2048), ("forward, entropy", 4096)]
)
def test_the_least_is_the_gradient_and_the_results(mode, least):
    assert tables.least_bytes(problem(512, mode=mode)) == least
    more = problem(512, mode="forward")._replace(labels_per_row=3, out_dtype=torch.bfloat16)
    assert tables.least_bytes(more) == 3 * 512 * 2


def test_extra_memory_beside_the_least(load):
    points, left_out = tables.memory(*load("one"), SHAPE)
    assert not left_out and set(points["backend"]) == {"eager", "compiled", "cpp"}
    eager = points[points["backend"] == "eager"].iloc[0]
    assert eager["extra_bytes"] == int(1.31 * LOGITS) and eager["extra_multiple"] == 1.31
    assert eager["logits_bytes"] == LOGITS and eager["least_multiple"] == pytest.approx(1.0, abs=1e-4)
    bars, least = charts.bars(points).data
    assert list(bars.x) == sorted(bars.x) and any("1.31 x logits" in text for text in bars.text)
    assert set(least.x) == {(LOGITS + 2048) / 2**20}
    assert tables.in_words(points).endswith("The least possible: 148 MiB.")
    points, left_out = tables.memory(*load("partial"), SHAPE)
    assert points.empty and "cpp at N 512: its memory was not measured" in left_out


def test_the_largest_n_that_fits(load):
    points, _ = tables.memory(*load("many"), SHAPE)
    fits = tables.largest(points, QWEN, 2, 80e9)
    (eager,) = fits[fits["backend"] == "eager"].to_dict("records")
    # As much as it says fits, and one row more does not.
    row = QWEN * 2 * (1 + 1.31)
    assert eager["largest_rows"] * row <= 80e9 < (eager["largest_rows"] + 1) * row
    assert eager["at_rows"] == 2048 and eager["extrapolated"]
    assert fits.iloc[0]["multiple"] == 1.0 and fits["multiple"].is_monotonic_increasing
    assert tables.largest(points, QWEN, 2, None)["largest_rows"].isna().all()
    assert not tables.largest(points, QWEN, 2, 1e6)["extrapolated"].any()
    figure = charts.growth(points, 80 * 2.0**30, 60 * 2.0**30)
    assert [shape.y0 for shape in figure.layout.shapes] == [80, 60] and figure.layout.xaxis.type == "log"
    assert list(next(trace for trace in figure.data if "eager" in trace.name).x) == [64, 512, 2048]


def test_the_capacity_is_that_of_the_profiles_device_or_of_this_machine_if_it_is_the_same(load):
    frames, profile = load("other device")
    assert tables.capacity(frames, profile) == (80 * 2**30, "as the profile says of its device")
    frames.environments["memory_bytes"] = float("nan")
    unknown = tables.capacity(frames, profile)
    assert unknown.bytes is None and "this machine is another environment" in unknown.source
    known = load("one")[0]
    known.environments["memory_bytes"] = float("nan")
    here = tables.capacity(known, next(iter(known.labels().values())))
    assert here.bytes and here.source.startswith("of this machine")


@pytest.mark.slow
def test_what_others_take_is_taken_off_and_an_unknown_size_is_asked_for(scenario, monkeypatch):
    def largest(at) -> dict[str, int]:
        assert not at.exception
        return {metric.label: int(metric.value[2:].replace(",", "")) for metric in at.metric}

    where = scenario("other device")
    at = opened("memory")
    before = largest(at)
    after = largest(at.number_input(key="taken").set_value(40.0).run())
    assert before.keys() == after.keys() == {"compiled", "eager"}
    assert all(after[name] == pytest.approx(rows / 2, rel=1e-3) for name, rows in before.items())

    shutil.rmtree(where.path(H100.fingerprint(), problem()).parents[1])  # of another size it is another environment
    monkeypatch.setattr(stores, "H100", dataclasses.replace(H100, memory_bytes=None))
    scenario("other device")
    at = opened("memory")
    assert largest(at) == {} and "The device's memory is not known" in text_of(at)
    assert len(largest(at.number_input(key="free").set_value(24.0).run())) == 2

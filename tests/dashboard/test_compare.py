"""Two profiles side by side, and a shape's history."""

import dataclasses

import numpy as np
import pytest
from compiled_logprobs_dashboard.charts import compare as charts
from compiled_logprobs_dashboard.frames import Profile, device_name
from compiled_logprobs_dashboard.tables import compare as tables

from compiled_logprobs.decision import Speedup
from tests.helpers import dashboard_stores as stores
from tests.helpers.dashboard_pages import opened, text_of

ENVIRONMENTS = (stores.here(), stores.an_earlier_torch(), stores.H100)
HERE, EARLIER, OTHER = (Profile("yours", environment.fingerprint()) for environment in ENVIRONMENTS)


def test_what_differs_comes_first_and_what_decides_before_the_rest(load):
    frames, _ = load("many")
    found = tables.differences(frames, HERE, EARLIER)
    assert found.values.tolist() == [["torch", stores.here().torch, "2.12.0+cpu", True]]
    other = tables.differences(frames, HERE, OTHER)
    assert other["decides"].tolist() == sorted(other["decides"], reverse=True)
    deciding = set(other.loc[other["decides"], "fact"])
    assert {"device_type", "compute_capability", "torch"} <= deciding and "driver" not in deciding
    assert other.set_index("fact").loc["gpu_name", "this"] == "not known"
    assert tables.differences(frames, HERE, HERE).empty


def test_only_what_both_have_is_compared(load):
    frames, _ = load("many")
    found = tables.matched(frames, HERE, EARLIER)
    assert len(found.table) == 2 and (found.only_this, found.only_that, found.untimed) == (34, 0, 0)
    assert found.table["ratio"].tolist() == pytest.approx([1.4, 1.4])
    width = 2**0.5 * np.log(1.05 / 0.95) / 2  # of both together
    assert found.table["low"].tolist() == pytest.approx([1.4 * np.exp(-width)] * 2)
    assert tables.in_words(found) == (
        "Of 2 problems that both timed: this is faster in 2. Median ratio 1.40: above 1, this one is faster."
    )
    back = tables.matched(frames, EARLIER, HERE)
    assert set(back.table["verdict"]) == {"that is faster"} and (back.only_this, back.only_that) == (0, 34)
    (trace,) = charts.ratios(found.table.assign(problem="x" * 100)).data
    assert trace.name == "▲ this is faster" and len(set(trace.y)) == 2, "each has a line of its own"


def test_noise_is_no_difference_and_times_of_fewer_rows_are_scaled(scenario, load):
    earlier = stores.good(scale=0.52, measured_rows=256)
    stores.publish(scenario("many"), earlier, stores.an_earlier_torch())
    found = tables.matched(load()[0], HERE, EARLIER).table.set_index("mode")
    assert found["verdict"].to_dict() == {"backward": "within noise", "forward": "this is faster"}
    assert found.loc["backward", "ratio"] == pytest.approx(1.04)


def test_a_backend_can_be_compared_on_its_own(load):
    frames, _ = load("many")
    found = tables.matched(frames, HERE, OTHER, "eager")
    assert set(found.table["backend_this"]) == set(found.table["backend_that"]) == {"eager"}
    both = tables.matched(frames, HERE, OTHER)
    assert set(both.table["winner_this"]) == {"cpp"} and set(both.table["winner_that"]) == {"compiled"}
    none = tables.matched(frames, HERE, OTHER, "cpp")
    assert none.table.empty and none.untimed == 2 and tables.in_words(none) == "No problem was timed in both."
    assert tables.backends_of(frames, HERE, OTHER) == ["compiled", "cpp", "eager"]


def test_what_is_undecided_has_no_winner_to_compare(scenario, load):
    stores.publish(scenario("undecided"), stores.good(measured_at=stores.EARLIER), stores.an_earlier_torch())
    frames, _ = load()
    assert tables.matched(frames, HERE, EARLIER).untimed == 1
    assert tables.matched(frames, HERE, EARLIER, "cpp").table["winner_this"].tolist() == ["undecided"]
    history = tables.history(frames, stores.problem(), device_name(stores.here().to_dict()))
    assert history.loc[history["chosen"], "measured_at"].tolist() == [stores.EARLIER]


def test_without_intervals_the_noise_is_not_known(scenario, load):
    candidates = stores.with_changes(stores.good_candidates(), speedup=Speedup(None, 1.0, None))
    stores.publish(scenario("partial"), stores.good(candidates=candidates), stores.an_earlier_torch())
    table = tables.matched(load()[0], HERE, EARLIER).table
    assert table["verdict"].tolist() == ["noise not known"] and table["low"].isna().all()
    assert len(charts.ratios(table).data) == 1


def test_the_history_goes_over_versions_of_one_device(load):
    frames, _ = load("many")
    device = device_name(stores.here().to_dict())
    found = tables.history(frames, stores.problem(), device)
    assert found["measured_at"].tolist() == [stores.EARLIER] * 3 + [stores.AT] * 3
    assert found["torch"].unique().tolist() == ["2.12.0+cpu", stores.here().torch]
    cpp = found[found["backend"] == "cpp"]
    assert cpp["ms"].tolist() == pytest.approx([42.0, 30.0]) and cpp["chosen"].all()
    assert (cpp["low"] < cpp["ms"]).all() and (cpp["ms"] < cpp["high"]).all()
    figure = charts.history(found)
    labels = ["2026-10-20, torch 2.12.0+cpu", f"2026-11-20, torch {stores.here().torch}"]
    assert list(figure.layout.xaxis.categoryarray) == labels and len(figure.data) == 3


def test_each_measurement_has_a_place_of_its_own_in_the_history(scenario, load):
    where = scenario("one")
    for number, cuda in enumerate(("10.1", "10.2")):  # the same device, day and torch, for another CUDA
        stores.publish(where, stores.good(scale=2 + number), dataclasses.replace(stores.here(), cuda=cuda))
    found = tables.history(load()[0], stores.problem(), device_name(stores.here().to_dict()))
    measured = found[found["backend"] == "cpp"]
    assert len(measured) == 3 and measured["label"].is_unique, measured["label"].tolist()
    (trace,) = (trace for trace in charts.history(found).data if "cpp" in trace.name)
    assert len(set(trace.x)) == 3


@pytest.mark.slow
def test_the_page_compares_with_what_is_chosen(scenario):
    scenario("many")
    at = opened("compare")
    other = next(name for name in at.selectbox(key="against").options if "H100" in name)
    at.selectbox(key="against").select(other).run()
    assert not at.exception and "device type" in at.warning[0].value
    at.selectbox(key="backend").select("eager").run()
    assert not at.exception and "Of 2 problems that both timed" in text_of(at)
    at.selectbox(key="against").select(at.selectbox(key="profile").value).run()
    assert not at.exception and at.warning[0].value == "Both are the same profile: every ratio is 1."

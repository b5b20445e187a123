"""Two profiles side by side, and a shape's history."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from compiled_logprobs_dashboard import index
from compiled_logprobs_dashboard import selection as session
from compiled_logprobs_dashboard.charts import compare as figures
from compiled_logprobs_dashboard.facts import device_name
from compiled_logprobs_dashboard.tables import compare as comparison
from streamlit.testing.v1 import AppTest

from compiled_logprobs.decision import Speedup
from compiled_logprobs.store.files import Store
from tests.helpers import dashboard_stores as stores

APP = str(Path(session.__file__).with_name("app.py"))


@pytest.fixture
def tables(scenario, tmp_path):
    scenario("many")
    return lambda: index.load(index.sources(), tmp_path / "index")


def profile(environment) -> tuple[str, str]:
    return "yours", environment.fingerprint()


def test_what_differs_comes_first_and_what_decides_before_the_rest(tables):
    found = comparison.differences(tables(), profile(stores.here()), profile(stores.an_earlier_torch()))
    assert found[["fact", "this", "that", "decides"]].values.tolist() == [
        ["torch", stores.here().torch, "2.12.0+cpu", True]
    ]
    other = comparison.differences(tables(), profile(stores.here()), profile(stores.H100))
    assert other["decides"].tolist() == sorted(other["decides"], reverse=True)
    deciding = set(other.loc[other["decides"], "fact"])
    assert {"device_type", "compute_capability", "torch"} <= deciding and "driver" not in deciding
    assert other.set_index("fact").loc["gpu_name", "this"] == "not known"
    assert comparison.differences(tables(), profile(stores.here()), profile(stores.here())).empty


def test_only_what_both_have_is_compared(tables):
    found = comparison.matched(tables(), profile(stores.here()), profile(stores.an_earlier_torch()))
    assert len(found.table) == 2 and (found.only_this, found.only_that, found.untimed) == (34, 0, 0)
    assert found.table["ratio"].tolist() == pytest.approx([1.4, 1.4])
    width = np.hypot(np.log(1.05 / 0.95) / 2, np.log(1.05 / 0.95) / 2)
    assert found.table["low"].tolist() == pytest.approx([1.4 * np.exp(-width)] * 2)
    assert set(found.table["verdict"]) == {"this is faster"}
    assert comparison.in_words(found) == (
        "Of 2 problems that both timed: this is faster in 2. Median ratio 1.40: above 1, this one is faster."
    )
    back = comparison.matched(tables(), profile(stores.an_earlier_torch()), profile(stores.here()))
    assert set(back.table["verdict"]) == {"that is faster"} and (back.only_this, back.only_that) == (0, 34)


def test_noise_is_no_difference(scenario, tables):
    stores.publish(scenario("many"), stores.good(scale=1.04), stores.an_earlier_torch())
    found = comparison.matched(tables(), profile(stores.here()), profile(stores.an_earlier_torch()))
    assert found.table.set_index("mode")["verdict"].to_dict() == {
        "backward": "within noise",
        "forward": "this is faster",
    }


def test_a_backend_can_be_compared_on_its_own(tables):
    found = comparison.matched(tables(), profile(stores.here()), profile(stores.H100), "eager")
    assert set(found.table["backend_this"]) == set(found.table["backend_that"]) == {"eager"}
    both = comparison.matched(tables(), profile(stores.here()), profile(stores.H100))
    assert set(both.table["winner_this"]) == {"cpp"} and set(both.table["winner_that"]) == {"compiled"}
    none = comparison.matched(tables(), profile(stores.here()), profile(stores.H100), "cpp")
    assert none.table.empty and none.untimed == 2 and comparison.in_words(none) == "No problem was timed in both."
    assert comparison.backends_of(tables(), profile(stores.here()), profile(stores.H100)) == [
        "compiled",
        "cpp",
        "eager",
    ]


def test_times_of_fewer_rows_are_scaled(scenario, tables):
    half = stores.good(scale=0.5, measured_rows=256)
    stores.publish(scenario("no profile"), half, dataclasses.replace(stores.here(), torch="2.11.0"))
    other = dataclasses.replace(stores.here(), torch="2.11.0")
    found = comparison.matched(tables(), profile(stores.here()), profile(other))
    assert found.table["ratio"].tolist() == pytest.approx([1.0])


def test_without_intervals_the_noise_is_not_known(scenario, tmp_path):
    where = scenario("partial")
    candidates = {
        name: dataclasses.replace(one, speedup=Speedup(None, 1.0, None)) if one.speedup else one
        for name, one in stores.good_candidates().items()
    }
    stores.publish(where, stores.good(candidates=candidates), stores.an_earlier_torch())
    tables = index.load(index.sources(), tmp_path / "index")
    found = comparison.matched(tables, profile(stores.here()), profile(stores.an_earlier_torch()))
    assert found.table["verdict"].tolist() == ["noise not known"] and found.table["low"].isna().all()
    assert len(figures.ratios(found.table).data) == 1


def test_the_history_goes_over_versions_of_one_device(tables):
    device = device_name(stores.here().to_dict())
    found = comparison.history(tables(), stores.problem(), device)
    assert found["measured_at"].tolist() == [stores.EARLIER] * 3 + [stores.AT] * 3
    assert found["torch"].unique().tolist() == ["2.12.0+cpu", stores.here().torch]
    cpp = found[found["backend"] == "cpp"]
    assert cpp["ms"].tolist() == pytest.approx([42.0, 30.0]) and cpp["chosen"].all()
    assert (cpp["low"] < cpp["ms"]).all() and (cpp["ms"] < cpp["high"]).all()
    assert comparison.history(tables(), stores.problem(3), device).empty
    figure = figures.history(found)
    assert figure.layout.xaxis.type == "category" and len(figure.data) == 3
    assert list(figure.layout.xaxis.categoryarray) == [
        "2026-10-20, torch 2.12.0+cpu",
        f"2026-11-20, torch {stores.here().torch}",
    ]


def test_each_measurement_has_a_place_of_its_own_in_the_history(scenario, tmp_path):
    where = scenario("one")
    for number, cuda in enumerate(("12.8", "13.0")):  # the same device, day and torch
        stores.publish(where, stores.good(scale=2 + number), dataclasses.replace(stores.here(), cuda=cuda))
    later = stores.AT.replace("12:00", "13:00")
    stores.publish(Store(tmp_path / "other"), stores.good(measured_at=later))
    sources = [*index.sources(), index.Source("project", tmp_path / "other")]
    tables = index.load(sources, tmp_path / "index")
    found = comparison.history(tables, stores.problem(), device_name(stores.here().to_dict()))
    measured = found[found["backend"] == "cpp"]
    assert len(measured) == 4 and measured["label"].is_unique, measured["label"].tolist()
    (trace,) = (one for one in figures.history(found).data if "cpp" in one.name)
    assert len(set(trace.x)) == 4


def test_problems_of_the_same_name_have_lines_of_their_own(tables):
    found = comparison.matched(tables(), profile(stores.here()), profile(stores.an_earlier_torch()))
    (trace,) = figures.ratios(found.table.assign(problem="x" * 100)).data
    assert len(set(trace.y)) == 2


def test_each_verdict_has_a_symbol_and_a_word_of_its_own(tables):
    found = comparison.matched(tables(), profile(stores.here()), profile(stores.an_earlier_torch()))
    figure = figures.ratios(found.table)
    assert [trace.name for trace in figure.data] == ["▲ this is faster"]
    assert figure.layout.xaxis.type == "log" and figure.layout.yaxis.type == "category"
    assert len({symbol for _, _, symbol in figures.VERDICTS.values()}) == len(figures.VERDICTS)


def opened(**query) -> AppTest:
    at = AppTest.from_file(APP, default_timeout=60).run().switch_page("app_pages/compare.py")
    for name, value in query.items():
        at.query_params[name] = value
    return at.run()


@pytest.mark.parametrize("name", stores.SCENARIOS)
def test_the_page_shows_every_kind_of_store(name, scenario):
    scenario(name)
    at = opened()
    assert not at.exception
    said = " ".join(str(one.value) for one in [*at.info, *at.warning, *at.markdown, *at.caption])
    words = {"no profile": "No profile is stored yet", "many": "what differs below comes from these"}
    assert words.get(name, "There is one profile") in said
    charts = at.get("plotly_chart")
    assert len(charts) == {"no profile": 0, "many": 2}.get(name, 1) and all(chart.proto.alt for chart in charts)
    assert "<b onclick" not in "".join(chart.proto.spec for chart in charts)


def test_the_page_compares_with_what_is_chosen(scenario):
    scenario("many")
    at = opened()
    labels = at.selectbox(key="against").options
    at.selectbox(key="against").select(next(one for one in labels if "H100" in one)).run()
    assert not at.exception and "device type" in at.warning[0].value
    at.selectbox(key="backend").select("eager").run()
    assert not at.exception and any("Of 2 problems that both timed" in one.value for one in at.markdown)
    at.selectbox(key="against").select(at.selectbox(key="profile").value).run()
    assert not at.exception and at.warning[0].value == "Both are the same profile: every ratio is 1."

"""Every page with every kind of store: what it says and draws, and that no name becomes markup."""

import json

import pytest
from compiled_logprobs_dashboard.looks import looks

from tests.helpers import dashboard_stores as stores
from tests.helpers.dashboard_pages import charts_of, opened, text_of

pytestmark = pytest.mark.slow
NOTHING = dict.fromkeys(("overview", "shape", "correctness"), "The first call of a new shape measures it")
SAYS = {
    "no profile": NOTHING,
    "other device": NOTHING,
    "hostile": NOTHING,
    "one": {
        "shape": "Use cpp: 8.00x (7.60 to 8.40) faster than plain log_softmax, and it is right: passed 2 of 2 checks"
    },
    "many": {"shape": "Use cpp: 8.00x", "correctness": "No check failed in 36 decisions: compiled, cpp, eager."},
    "corrupt": {"overview": "5 files could not be read", "measure": "5 files could not be read"},
    "partial": {"shape": "whether it is right is not stored", "correctness": "not known what they came to"},
    "all failed": {"shape": "Use eager: 1.20x", "correctness": "log_prob_error: row 3 is off by 0.7"},
    "undecided": {"shape": "Undecided: 12 rounds do not tell whether cpp (4.83x, 0.24 to 31.85) is faster than eager"},
    "signs": {"measure": "compiled: WRONG SIGN in 2 of 37 decisions", "correctness": "returns the loss"},
    "dated": {"shape": "Use eager: 1.20x"},
}
CHARTS = {"overview": 1, "shape": 1, "correctness": 0, "measure": 0}


@pytest.mark.parametrize("name", stores.SCENARIOS)
def test_each_page_shows_every_kind_of_store(scenario, name):
    scenario(name)
    query = {"profile": stores.H100.fingerprint()} if name == "other device" else {}
    at = opened()
    for page, expected in CHARTS.items():
        at.switch_page(f"app_pages/{page}.py").run()
        assert not at.exception, page
        assert len(at.title) == 1 and SAYS[name].get(page, "") in text_of(at), page
        charts = charts_of(at)
        assert len(charts) == (0 if SAYS[name] is NOTHING else expected), page
        assert not any(one.allow_html for one in at.markdown)
        for chart in charts:
            assert chart.alt and json.loads(chart.spec)["data"] and not json.loads(chart.config).get("showSendToCloud")
    for query in ({"tab": "compare"}, {"part": "machine"}, {"part": "profiles"}):
        at = opened("overview" if "tab" in query else "measure", **query)
        assert not at.exception, query


def test_no_name_becomes_markup(scenario):
    scenario("hostile")
    (profile,) = opened().selectbox(key="profile").options[1:]
    environment = next(iter(stores.Store(scenario("no profile").root).environments()))
    assert stores.HOSTILE in profile
    for page in ("overview", "shape", "correctness"):
        for tables in ("false", "true"):
            at = opened(page, profile=environment, rows=2048)
            at.toggle(key="as_tables").set_value(tables == "true").run()
            assert not at.exception and not any(one.allow_html for one in at.markdown), page
            for chart in charts_of(at):
                spec = chart.spec.replace("\\u003c", "<")  # which plotly writes for it
                assert "<b onclick" not in spec and "<a href" not in spec, page
    assert stores.HOSTILE in text_of(opened("shape", profile=environment, rows=2048))


def test_a_third_partys_letter_is_the_same_on_all_pages(scenario):
    """Beside others of that letter in one decision, and alone in another."""
    where = scenario("no profile")
    like = stores.good_candidates()["compiled"]
    stores.publish(where, stores.good(candidates={**stores.good_candidates(), "mat": like}))
    stores.publish(where, stores.good(stores.problem(64), candidates={**stores.good_candidates(), "mast": like}))
    letter = looks(["mat"], ["mast"])["mat"].letter
    assert letter == "A"
    at = opened("shape", rows=512)
    assert f'"{letter} mat"' in charts_of(at)[0].spec
    assert f"{letter}  mat" in set(at.dataframe[0].value["backend"])

"""Every page with every kind of store: what it says and draws, and that no name becomes markup."""

import json

import pytest
from compiled_logprobs_dashboard.looks import looks

from tests.helpers import dashboard_stores as stores
from tests.helpers.dashboard_pages import charts_of, opened, text_of

pytestmark = pytest.mark.slow
SAYS = {
    "no profile": dict.fromkeys(
        ("decide", "compare", "throughput", "memory", "sign_check"), "No profile is stored yet"
    ),
    "one": {"decide": "Use cpp: 8.00x faster than plain log_softmax", "compare": "There is one profile"},
    "many": {"decide": "Use cpp: 8.00x faster", "compare": "what differs below comes from these"},
    "corrupt": {"decide": "5 files could not be read", "profiles": "5 files are passed over"},
    "partial": {"decide": "extra memory not measured, checks not stored", "sign_check": "not known what they came to"},
    "other device": {"decide": "another device", "sign_check": "No check failed"},
    "all failed": {"decide": "Use eager: nothing but eager could be measured", "sign_check": "FAIL: log_prob_error"},
    "undecided": {
        "decide": "Undecided: 12 rounds do not tell whether cpp (4.83x, 0.24 to 31.85) is faster than eager",
        "profiles": "yours",
    },
    "hostile": {"decide": stores.HOSTILE},
}
CHARTS = {"decide": 2, "compare": 1, "throughput": 4, "memory": 2, "sign_check": 0, "profiles": 0, "run": 0}
OTHER_CHARTS = {("many", "compare"): 2, ("partial", "throughput"): 2, ("partial", "memory"): 0}


@pytest.mark.parametrize("name", stores.SCENARIOS)
def test_each_page_shows_every_kind_of_store(scenario, name):
    scenario(name)
    at = opened()
    for page, expected in CHARTS.items():
        at.switch_page(f"app_pages/{page}.py").run()
        assert not at.exception, page
        assert len(at.title) == 1 and SAYS[name].get(page, "") in text_of(at), page
        charts = charts_of(at)
        assert len(charts) == (0 if name == "no profile" else OTHER_CHARTS.get((name, page), expected)), page
        assert not any(one.allow_html for one in at.markdown)
        for chart in charts:
            assert chart.alt and json.loads(chart.spec)["data"] and not json.loads(chart.config).get("showSendToCloud")
            spec = chart.spec.replace("\\u003c", "<")  # which plotly writes for it
            assert "<b onclick" not in spec and "<a href" not in spec


def test_a_third_partys_letter_is_the_same_on_all_pages(scenario):
    """Beside others of that letter in one decision, and alone in another."""
    where = scenario("no profile")
    like = stores.good_candidates()["compiled"]
    stores.publish(where, stores.good(candidates={**stores.good_candidates(), "mat": like}))
    stores.publish(where, stores.good(stores.problem(64), candidates={**stores.good_candidates(), "mast": like}))
    letter = looks(["mat"], ["mast"])["mat"].letter
    assert letter == "A"
    at = opened(rows=512)
    for page in ("decide", "throughput", "memory", "compare"):
        at.switch_page(f"app_pages/{page}.py").run()
        specs = "".join(chart.spec for chart in charts_of(at))
        assert f'"{letter}  mat"' in specs or f'"{letter} mat"' in specs, page
        assert '"M mat"' not in specs and '"M  mat"' not in specs, page

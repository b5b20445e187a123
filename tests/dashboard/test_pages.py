"""Every page with every kind of store: what it says and draws, and that no name becomes markup."""

import json
import re

import pytest
from compiled_logprobs_dashboard.looks import looks

from tests.helpers import dashboard_stores as stores
from tests.helpers.dashboard_pages import charts_of, metrics_of, opened, text_of

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


NOT_FOR_PEOPLE = re.compile(r"\de\+\d|\.0{5,}(?!\d)|\.0*[1-9]\d{4,}|\d{5,}[.\d]* ?%")
"""Exponents of what is large, zeros in place of digits, more digits than were measured, thousands of per cents."""


def numbers_of(at):
    """All texts of a page that can hold a figure, as the browser shows them."""
    yield from (text_of(at), *metrics_of(at).values())
    for chart in charts_of(at):
        figure = json.loads(chart.spec)
        yield chart.alt
        for axis in (value for name, value in figure["layout"].items() if name[1:5] == "axis"):
            yield from axis.get("ticktext", ())
        for trace in figure["data"]:
            yield from trace.get("hovertext", ())
    for one in at.dataframe:
        settings = json.loads(one.proto.columns or "{}")
        for name, column in one.value.items():
            form = (settings.get(name) or {}).get("type_config", {}).get("format") or ""
            for value in column.dropna():
                is_formed = isinstance(value, float) and "%" in form
                yield f"{name}: " + (form % value if is_formed else str(value))


@pytest.mark.slow
def test_numbers_are_for_people_on_all_pages(scenario):
    """Of a GPU's figures, a sign that is wrong by far, and another error that is."""
    where, gpu = scenario("signs"), stores.H100.fingerprint()
    scenario("other device")
    check = stores.Check("log_prob_error", False, 2.8628591e6, 1e-5, "row 3 is off by 2.86 million")
    candidates = stores.good_candidates()
    candidates["compiled"] = stores.Candidate("wrong", "log_prob_error", "0" * 16, checks=(check,))
    stores.publish(where, stores.good(stores.problem(4096), candidates=candidates))
    shape = {"profile": gpu, "rows": 2048}
    looks = [("overview", {}), ("overview", {"tab": "compare"}), ("measure", {"part": "profiles"})]
    looks += [("shape", {**shape, "metric": metric}) for metric in ("time", "tokens/s", "GB/s", "% of roof", "memory")]
    looks += [("correctness", {"backend": "compiled", "check": "log_prob_error"})]
    for page, query in looks:
        at = opened(page, **query)
        found = [text for text in numbers_of(at) if NOT_FOR_PEOPLE.search(text)]
        assert not at.exception and found == [], (page, query)

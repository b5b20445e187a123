"""The landing page, in Streamlit's own test harness."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import streamlit as st
from compiled_logprobs_dashboard import index
from compiled_logprobs_dashboard import selection as session
from streamlit.testing.v1 import AppTest

from tests.helpers import dashboard_stores as stores

APP = str(Path(session.__file__).with_name("app.py"))


def opened(**query) -> AppTest:
    at = AppTest.from_file(APP, default_timeout=60)
    for name, value in query.items():
        at.query_params[name] = str(value)
    return at.run()


def text_of(at: AppTest) -> str:
    parts = [*at.title, *at.subheader, *at.markdown, *at.caption, *at.info, *at.warning, *at.success, *at.error]
    return " ".join(str(one.value) for one in parts).replace("\\", "")


SAYS = {
    "no profile": "No profile is stored yet",
    "one": "Use cpp: 6.67x faster than eager",
    "many": "Use cpp: 6.67x faster than eager",
    "corrupt": "10 files could not be read",
    "partial": "extra memory not measured, checks not stored",
    "other device": "another device",
    "all failed": "Use eager: nothing but eager could be measured",
    "hostile": stores.HOSTILE,
}


@pytest.mark.parametrize("name", stores.SCENARIOS)
def test_it_shows_every_kind_of_store(scenario, name):
    scenario(name)
    at = opened()
    assert not at.exception and SAYS[name] in text_of(at)
    assert not any(one.allow_html for one in at.markdown)
    charts = at.get("plotly_chart")
    assert len(charts) == (0 if name == "no profile" else 2)
    assert all(chart.proto.alt and not json.loads(chart.proto.config).get("showSendToCloud") for chart in charts)
    assert "<b onclick" not in "".join(chart.proto.spec for chart in charts)
    assert len(at.metric) == (0 if name == "no profile" else 4)


def test_a_link_leads_to_a_shape(scenario):
    scenario("many")
    at = opened(rows=100, vocab=50257, mode="forward", dtype="float32")
    assert (at.number_input(key="rows").value, at.number_input(key="vocab").value) == (100, 50257)
    assert (at.selectbox(key="mode").value, at.selectbox(key="dtype").value) == ("forward", "float32")
    assert "nearest: N 64" in text_of(at) and at.selectbox(key="model").value == "gpt2"


@pytest.mark.parametrize(
    "query",
    [
        {"rows": "x"},
        {"rows": -1},
        {"rows": 10**30},
        {"mode": "<script>"},
        {"dtype": "int4"},
        {"profile": "../../etc"},
        {"cap": "nan"},
    ],
)
def test_a_link_that_leads_nowhere_falls_back(scenario, query):
    scenario("one")
    at = opened(**query)
    assert not at.exception and "Use cpp" in text_of(at)


def test_badges(scenario):
    scenario("many")
    at = opened(rows=2000)
    assert "exact" in text_of(at) and "stale" not in text_of(at)
    at.number_input(key="rows").set_value(1).run()
    assert "Use eager, by rule" in text_of(at) and not at.metric
    at.number_input(key="rows").set_value(100).run()
    assert "nearest: N 64" in text_of(at)
    at.selectbox(key="mode").select("entropy").run()
    assert "Not measured" in text_of(at) and "Nothing was measured in this profile for entropy" in text_of(at)
    assert not at.exception


def test_a_stale_decision_says_why(scenario):
    scenario("other device")
    assert "Stale: measured with torch 2.12.0" in text_of(opened())


def test_a_model_fills_in_the_vocabulary(scenario):
    scenario("many")
    at = opened()
    at.selectbox(key="model").select("llama3").run()
    assert at.number_input(key="vocab").value == 128256 and not at.exception
    at.number_input(key="vocab").set_value(1234).run()
    assert at.selectbox(key="model").value == session.OTHER and at.number_input(key="vocab").value == 1234


def test_a_cap_on_memory_changes_what_to_use(scenario):
    scenario("one")
    at = opened()
    assert not at.success and not at.warning
    at.number_input(key="cap").set_value(1000.0).run()
    assert "use **cpp**" in at.success[0].value
    at.number_input(key="cap").set_value(1.0).run()
    assert "use nothing" in at.warning[0].value and "none fits" in at.warning[0].value


def test_code_and_command(scenario):
    scenario("one")
    code = [one.value for one in opened().code]
    assert "from compiled_logprobs import log_probs_from_logits" in code[0]
    assert code[1] == (
        f"compiled-logprobs profile --device cpu --vocab {stores.QWEN} --rows 512 --dtype bfloat16 --mode backward --again"
    )


def test_a_square_that_is_clicked_is_selected(scenario):
    """The harness has no clicks on charts: the callback is called as Streamlit does, with what a square carries."""

    def page(app):
        import runpy

        import streamlit as st

        if not st.session_state.get("clicked"):
            st.session_state["clicked"] = True
            st.session_state["rows"], st.session_state["vocab"] = st.session_state["square"]
        runpy.run_path(app)

    scenario("many")
    chart = opened().get("plotly_chart")[1]
    squares = [tuple(one) for trace in json.loads(chart.proto.spec)["data"] for one in trace["customdata"]]
    assert (64, 50257) in squares
    at = AppTest.from_function(page, args=(str(Path(APP).parent / "app_pages" / "decide.py"),), default_timeout=60)
    at.session_state["square"] = (64, 50257)
    at.run()
    assert not at.exception and "Use eager" in text_of(at)


def test_the_click_takes_what_the_square_carries(monkeypatch):
    taken = {}
    monkeypatch.setattr(st, "session_state", taken)
    session.select_square(SimpleNamespace(selection=SimpleNamespace(points=[{"customdata": [64, 50257]}])))
    assert taken == {"rows": 64, "vocab": 50257}
    session.select_square(SimpleNamespace(selection=SimpleNamespace(points=[])))
    session.select_square(SimpleNamespace(selection=SimpleNamespace(points=[{"customdata": None}])))
    assert taken == {"rows": 64, "vocab": 50257}


def test_a_decision_that_breaks_meanwhile_is_told(scenario, monkeypatch):
    where = scenario("one")
    at = opened()
    where.path(stores.here().fingerprint(), stores.problem()).write_bytes(b"{")  # in place, so that no folder changes
    at.run()
    assert not at.exception and "not JSON" in text_of(at)


def test_what_is_stored_meanwhile_appears(scenario):
    where = scenario("no profile")
    at = opened()
    assert "No profile" in text_of(at)
    stores.publish(where, stores.good())
    at.run()
    assert "Use cpp" in text_of(at)


def test_no_file_but_the_shown_one_is_opened_once_the_index_is_there(scenario, monkeypatch):
    stores.generate(scenario("no profile"), 400)
    opened()
    read = []
    real = index.read_file
    monkeypatch.setattr(index, "read_file", lambda path: read.append(path.name) or real(path))
    session._shelf.clear()  # as in a new process
    at = opened(mode="forward", dtype="float32")
    assert not at.exception and set(read) == {"environment.json"}


def test_time_alone_has_nothing_read_again_and_a_change_in_place_does(scenario, monkeypatch):
    where = scenario("one")
    loads, real = [], index.load
    monkeypatch.setattr(index, "load", lambda *arguments: loads.append(1) or real(*arguments))
    session._shelf.clear()
    monkeypatch.setattr(session, "LOOK_AGAIN_S", 0.0)
    first = session.tables()
    assert session.tables() is first and session.tables() is first and len(loads) == 1
    where.path(stores.here().fingerprint(), stores.problem()).write_bytes(b"{")  # so that no folder changes
    assert len(session.tables().broken) == 1 and len(loads) == 2


def test_progress_is_shown_while_much_is_read(scenario, monkeypatch):
    import threading

    scenario("one")
    go_on, real = threading.Event(), index.load
    told = []

    def slowly(found, cache, progress):
        progress(500, 1000)
        assert go_on.wait(30)
        return real(found, cache, progress)

    class Place:
        def progress(self, share, text):
            told.append((share, text))
            go_on.set()

        def empty(self):
            told.append("gone")

    monkeypatch.setattr(index, "load", slowly)
    monkeypatch.setattr(session.st, "empty", Place)
    session._shelf.clear()
    assert len(session.tables().decisions) == 1
    assert (
        told[0] == (0.5, "Reading profiles: 500 of 1,000 decisions. Only new ones are read the next time.")
        and told[-1] == "gone"
    )


def test_an_error_while_reading_is_raised_each_time_and_tried_again(scenario, monkeypatch):
    scenario("one")

    def broken(*_):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(index, "load", broken)
        session._shelf.clear()
        with pytest.raises(MemoryError):
            session.tables()
    assert len(session.tables().decisions) == 1

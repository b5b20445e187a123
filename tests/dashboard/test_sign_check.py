"""The page Sign check, as Streamlit runs it."""

import json
from pathlib import Path

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from tests.helpers.dashboard_checked import detailed
from tests.helpers.dashboard_stores import (
    SCENARIOS,
    scenario,  # noqa: F401 - a fixture
)

APP = Path(__file__).parent.parent / "compiled_logprobs/dashboard/app.py"


@pytest.fixture(autouse=True)
def _nothing_cached():
    st.cache_data.clear()
    st.cache_resource.clear()
    yield
    st.cache_data.clear()
    st.cache_resource.clear()


def page(**parameters) -> AppTest:
    app = AppTest.from_file(str(APP), default_timeout=60)
    for name, value in parameters.items():
        app.query_params[name] = str(value)
    app.switch_page("app_pages/sign_check.py")
    return app.run()


def text(app: AppTest) -> str:
    """All that the page says."""
    kinds = ("markdown", "caption", "info", "error", "success", "warning", "subheader", "title")
    return "\n".join(str(one.value) for kind in kinds for one in getattr(app, kind))


def table(app: AppTest, column: str, *, also: str = ""):
    """The first table with these columns."""
    return next(one.value for one in app.dataframe if {column, also or column} <= set(one.value.columns))


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_page_takes_every_store(scenario, name):  # noqa: F811
    scenario(name)
    app = page()
    assert not app.exception
    assert app.title[0].value == "Sign check"
    said = text(app)
    expected = {
        "no profile": "No profile is stored yet",
        "one": "No details stored",
        "partial": "it is not known what they came to",
        "all failed": "FAIL\\: log",
        "other device": "No check failed",
    }.get(name, "")
    assert expected in said or expected in [one.proto.title for one in app.info]


def test_what_failed_is_shown_first(scenario):  # noqa: F811
    detailed(scenario("no profile"))
    app = page()
    assert not app.exception
    assert app.toggle(key="only_failures").value is True
    said = text(app)
    assert "compiled \\(float32\\)\\: FAIL\\: log\\_prob\\_error" in said
    assert "lost \\(float32\\)\\: could not be checked\\: crashed" in said
    overview = table(app, "logits", also="log_prob_error")
    assert set(overview["backend"]) == {"compiled", "nan", "lost"} and set(overview["logits"]) == {"float32"}
    assert overview.loc[overview["backend"] == "compiled", "log_prob_error"].item() == "✗ FAIL"
    assert overview.loc[overview["backend"] == "lost", "log_prob_error"].item() == "! error"


def test_all_verdicts_on_demand(scenario):  # noqa: F811
    detailed(scenario("no profile"))
    app = page()
    app.toggle(key="only_failures").set_value(False).run()
    assert not app.exception
    matrix = table(app, "logits", also="wide")
    assert {"eager", "cpp", "flash_attn", "compiled", "nan", "lost"} == set(matrix["backend"])
    assert set(matrix["logits"]) == {"float32", "bfloat16"}
    row = matrix[(matrix["backend"] == "cpp") & (matrix["logits"] == "float32") & (matrix["check"] == "runs")]
    assert row["wide"].item() == "✓ pass"


def test_the_values_of_one_verdict(scenario):  # noqa: F811
    """A click on a cell sets these widgets."""
    detailed(scenario("no profile"))
    app = page()
    app.selectbox(key="check_backend").set_value("compiled").run()
    app.selectbox(key="check_name").set_value("log_prob_error").run()
    app.selectbox(key="check_input").set_value("wide").run()
    assert not app.exception
    metrics = {one.label: one.value for one in app.metric}
    assert metrics["Worst that was seen"].startswith("0.5") and float(metrics["Limit"]) < 0.01
    assert "✗ FAIL" in text(app) and "largest error of a log" in text(app) and "wide\\: 0\\.5" in text(app)


def test_the_charts_have_texts_and_tokens_are_listed(scenario):  # noqa: F811
    detailed(scenario("no profile"))
    app = page()
    charts = {one.proto.id.rsplit("-", 1)[0]: one.proto for one in app.get("plotly_chart")}
    assert len(charts) == 2 and all(
        one.alt.startswith(("Absolute errors", "Share of the values")) for one in charts.values()
    )
    assert all(json.loads(one.spec)["data"] for one in charts.values())
    assert table(app, "got").iloc[0]["got"] == "nan"
    assert "row invariant" in table(app, "repeatable").columns


def test_markup_in_names_stays_text(scenario):  # noqa: F811
    scenario("hostile")
    app = page()
    assert not app.exception
    assert not any("<b onclick" in one for one in text(app).replace("\\<", "").split("\n"))

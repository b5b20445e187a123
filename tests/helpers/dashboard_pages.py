"""The dashboard's pages as Streamlit's own test driver runs them: opened, and read."""

from pathlib import Path
from typing import Any

import compiled_logprobs_dashboard
from streamlit.testing.v1 import AppTest

APP = Path(compiled_logprobs_dashboard.__file__).with_name("app.py")


def opened(name: str = "overview", **query: object) -> AppTest:
    """That page, as a link with `query` leads to it."""
    at = AppTest.from_file(str(APP), default_timeout=60)
    for key, value in query.items():
        at.query_params[key] = str(value)
    at.switch_page(f"app_pages/{name}.py").run()
    return at


def text_of(at: AppTest) -> str:
    """What the page says, without the marks that keep text from being Markdown."""
    kinds = ("title", "subheader", "markdown", "caption", "info", "warning", "success", "error")
    return "\n".join(str(one.value) for kind in kinds for one in getattr(at, kind)).replace("\\", "")


def metrics_of(at: AppTest) -> dict[str, str]:
    """By label, what each figure is; the last of those with the same label."""
    return {one.label: one.value for one in at.metric}


def charts_of(at: AppTest) -> list[Any]:
    """Each chart as it is sent to the browser: `alt`, `config` and `spec` (JSON)."""
    return [chart.proto for chart in at.get("plotly_chart")]


def table_of(at: AppTest, *columns: str) -> Any:
    """The first table that has these columns; None if there is none."""
    return next((one.value for one in at.dataframe if set(columns) <= set(one.value.columns)), None)


def links_of(at: AppTest) -> dict[str, str]:
    """By label, where each link to a page leads: the page, and the parameters of its address."""
    return {link.proto.label: f"{link.proto.page}?{link.proto.query_string}" for link in at.get("page_link")}

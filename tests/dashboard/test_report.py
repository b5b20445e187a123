"""The report: one file that needs nothing else."""

import re
from html.parser import HTMLParser

import pytest
from compiled_logprobs_dashboard.report import POLICY, report

from tests.helpers import dashboard_stores as stores


class Page(HTMLParser):
    """The text that is not a script, the tags, and their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags, self.attributes = "", [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_data(self, text):
        if self.tags[-1:] not in (["script"], ["style"]):
            self.text += text + " "


@pytest.fixture
def made(load):
    return lambda name: Page(report(*load(name), "2026-11-24 12:00 UTC"))


@pytest.mark.parametrize("name", ["one", "partial", "all failed", "hostile"])
def test_it_asks_for_nothing(made, name):
    page = made(name)
    fetching = ("src", "href", "action", "srcset", "data", "poster")
    assert [place for place in page.attributes if place[1] in fetching] == [("link", "href", "data:,")]
    assert ("meta", "content", POLICY) in page.attributes and "default-src 'none'" in POLICY and "http" not in POLICY
    assert not {"iframe", "object", "embed", "form", "base"} & set(page.tags)
    assert not [one for one in page.attributes if one[1].startswith("on")]


def test_it_says_what_was_measured(made):
    page = made("many")
    said = "36 decisions, 6.67, 8, cpp, eager, ✓ 2 of 2, over log_softmax, Winners of 36 decisions"
    for text in (*said.split(", "), stores.here().torch):
        assert text in page.text, text
    labels = [value for tag, name, value in page.attributes if name == "aria-label"]
    assert len(labels) == 1 and labels[0].startswith("Winners of 36 decisions: cpp 32, eager 4")


def test_what_was_not_measured_is_not_0(made):
    page = made("partial")
    assert "not stored" in page.text and not re.search(r"\b0 (ms|MiB|%)", page.text) and "nan" not in page.text.lower()


def test_failures_are_told_first(made):
    page = made("all failed")
    for text in ("✗ WRONG", "row 3 is off by 0.7", "the worker ended with signal 11", "✗ out of memory"):
        assert text in page.text
    assert (
        0 < page.text.index("cpp: WRONG in 2 of 2 decisions (log_prob_error)") < page.text.index("Device and versions")
    )


def test_what_is_undecided_has_no_winner(made):
    text = made("undecided").text
    assert "? undecided" in text and "undecided 1; a backend was wrong in 0." in text and "1.00x" not in text


def test_hostile_names_stay_text(made):
    page = made("hostile")
    assert stores.HOSTILE in page.text, "escaped once, so that it reads as it is"
    assert not {"a", "b"} & set(page.tags)

"""Numbers for people: no exponent, no figure of nothing."""

import math
from datetime import datetime, timezone

import pandas as pd
import pytest
from compiled_logprobs_dashboard import humanize


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (humanize.duration(0.0302), "30.2 ms"),
        (humanize.duration(2e-7), "200 ns"),
        (humanize.duration(35), "35 s"),
        (humanize.duration(300), "5 min"),
        (humanize.duration(7.5e6), "2,083.3 h"),
        (humanize.duration(None), "not measured"),
        (humanize.size(2.5 * 2**30), "2.5 GiB"),
        (humanize.size(12), "12 bytes"),
        (humanize.size(3e15), "2,728 TiB"),
        (humanize.size(math.nan), "not measured"),
        (humanize.rate(3.036e6, "tokens"), "3.04 Mtokens/s"),
        (humanize.rate(3e12, "B"), "3 TB/s"),
        (humanize.rate(999.9e9, "B"), "1,000 GB/s"),
        (humanize.rate(None, "B"), "not measured"),
        (humanize.times(8.0, 7.6, 8.4), "8.00x (7.60 to 8.40)"),
        (humanize.times(8.0, None, 8.4), "8.00x"),
        (humanize.times(None), "not measured"),
        (humanize.percent(40.2), "40 %"),
        (humanize.of_limit(2e-6, 1e-5), "20 % of the limit"),
        (humanize.of_limit(-28.6, 1e-5), "2.86 million times the limit"),
        (humanize.of_limit(1.0, 1e-30), "over a trillion times the limit"),
        (humanize.of_limit(20.3, 0.0), "0 is allowed"),
        (humanize.of_limit(None, 1.0), ""),
        (humanize.plural(1, "file"), "1 file"),
        (humanize.plural(5000, "decision"), "5,000 decisions"),
    ],
)
def test_figures_in_words(said, expected):
    assert said == expected and "e+" not in said


def test_ages_and_columns():
    now = datetime(2026, 11, 24, 12, tzinfo=timezone.utc)
    days = {"24T07": "today", "23T07": "1 day ago", "20T07": "4 days ago", "<b>": ""}
    assert {day: humanize.age(f"2026-11-{day}:00:00Z", now) for day in days} == days
    values = humanize.significant(pd.Series([1234.5, 0.0123456, math.nan]))
    assert values.tolist()[:2] == [1230, 0.0123] and math.isnan(values[2])

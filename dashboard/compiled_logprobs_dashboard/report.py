"""A profile as one HTML file that needs no network, no server and no other file: for a ticket, a pull request or a
colleague.

The drawing library lies inside it. What comes from profiles is escaped, and the file's own policy forbids every
request.
"""

from html import escape
from typing import Any

import pandas as pd
import plotly.io

from compiled_logprobs_dashboard.charts import TEMPLATE
from compiled_logprobs_dashboard.charts.overview import winner_maps
from compiled_logprobs_dashboard.frames import Frames, Profile
from compiled_logprobs_dashboard.humanize import plural, short_number
from compiled_logprobs_dashboard.looks import outcome, plain_line
from compiled_logprobs_dashboard.tables import overview as tables

MOST_ROWS = 2000
"""Of decisions in the table, so that a browser can hold it."""
CONFIG = {"displayModeBar": False, "staticPlot": False, "showSendToCloud": False, "plotlyServerURL": ""}
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; background: #fff; color: #1a1d21; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #9aa0a6; padding: 0.25rem 0.75rem; text-align: left; white-space: nowrap; }
.chart { background: #fff; } .wrong { border: 3px solid #d4002a; padding: 0.5rem 1rem; font-weight: bold; }
"""
HEADS = {"speed-up": "over eager", "over plain": "over log_softmax", "ms": "a call, ms", "memory": "x logits"}
HIDDEN = ("source", "environment", "here", "decisions", "device", "measured_at")


def report(frames: Frames, profile: Profile, made_at: str) -> str:
    """The report of one profile, as HTML; everything that its charts show stands in its tables, too."""
    facts, decisions = frames.facts(profile), tables.decisions(frames, profile)
    squares, wrong = tables.squares(frames, profile, decisions), tables.wrong(frames, profile)
    maps, left_out = tables.maps(squares)
    figure = winner_maps(maps, among=frames.backends).update_layout(template=f"plotly_white+{TEMPLATE}")
    shown = {name: value for name, value in facts.items() if value is not None and name not in HIDDEN}
    told = [(name.replace("_", " "), value) for name, value in shown.items()]
    lost = frames.candidates_of(profile)
    lost = lost[lost["seconds"].isna()].groupby(["backend", "outcome", "reason"]).size().head(MOST_ROWS)
    lost = lost.reset_index(name="decisions").assign(outcome=lambda table: table["outcome"].map(outcome))
    device, words = _text(facts.get("device") or "unknown device"), tables.in_words(squares)
    banner = f'<p class="wrong">{_text(tables.wrong_in_words(wrong, len(decisions)))}</p>' if len(wrong) else ""
    fares, listed = tables.by_backend(frames, profile, decisions), decisions.drop(columns="key").head(MOST_ROWS)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><link rel="icon" href="data:,">'
        f"<title>{device}: compiled-logprobs</title><style>{STYLE}</style></head><body><main>"
        f"<h1>Which backend on {device}?</h1>{banner}<p>{plural(len(decisions), 'decision')} of environment "
        f"{_text(profile.environment)}, from the {_text(profile.source)} profiles. Made {_text(made_at)} by "
        "compiled-logprobs. A backend was timed only after its sign, values and gradient had been held against "
        f"float64.</p><h2>Device and versions</h2>{_table(pd.DataFrame(told, columns=['fact', 'value']))}"
        f"<h2>Winners by N and V</h2><p>{_text(words)} {_text(left_out)} The fainter, the closer the next one.</p>"
        f'<div class="chart" role="img" aria-label="{escape(words)}">'
        f"{plotly.io.to_html(figure, full_html=False, include_plotlyjs=True, config=CONFIG)}</div>"
        f"<h2>How the backends fare</h2>{_table(fares)}<h2>Decisions, at most {MOST_ROWS:,}</h2>{_table(listed)}"
        f"<h2>What did not get through</h2>{_table(lost)}</main></body></html>\n"
    )


def _table(content: pd.DataFrame) -> str:
    return str(content.rename(columns=HEADS).map(_cell).to_html(index=False, border=0))  # which escapes


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    if isinstance(value, float):
        return "" if pd.isna(value) else short_number(value)
    return "" if value is None else plain_line(value)


def _text(value: object) -> str:
    return escape(plain_line(value))

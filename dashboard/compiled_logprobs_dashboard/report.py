"""A profile as one HTML file that needs no network, no server and no other file: for a ticket, a pull request or a
colleague.

The drawing library lies inside it. What comes from profiles is escaped, and the file's own policy forbids every
request.
"""

import math
from html import escape
from typing import Any

import pandas as pd
import plotly.io

from compiled_logprobs_dashboard.charts import TEMPLATE
from compiled_logprobs_dashboard.charts.decide import winner_map
from compiled_logprobs_dashboard.frames import Frames, Profile
from compiled_logprobs_dashboard.looks import outcome, plain_line
from compiled_logprobs_dashboard.tables.decide import around, map_in_words, winners

MOST_ROWS = 2000
"""Of decisions in the table, so that a browser can hold it."""
HEAD = (
    "mode, dtype, N, V, timed N, winner, speed-up, over, over the baseline, a call, extra memory, checks passed, "
    "bandwidth, why, measured, stale"
)
CONFIG = {"displayModeBar": False, "staticPlot": False, "showSendToCloud": False, "plotlyServerURL": ""}
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
body { background: #ffffff; color: #1a1d21; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #9aa0a6; padding: 0.25rem 0.75rem; text-align: left; white-space: nowrap; }
td.n { text-align: right; }
.chart { background: #ffffff; border-radius: 4px; }
@media (prefers-color-scheme: dark) { body { background: #14171a; color: #e8eaed; } }
"""


def report(frames: Frames, profile: Profile, made_at: str) -> str:
    """The report of one profile, as HTML; everything that its charts show stands in its tables, too."""
    rows = frames.of(profile).sort_values(["mode", "dtype", "vocab", "rows"], kind="stable")
    facts = frames.facts(profile)
    device = str(facts.get("device") or "unknown device")
    parts = [
        f"<h1>Which backend on {_text(device)}?</h1>",
        f"<p>{len(rows)} decisions of environment {_text(profile.environment)}, from the {_text(profile.source)} "
        f"profiles. Made {_text(made_at)} by compiled-logprobs. Speed-ups are over what stands in the column 'over', "
        "with their confidence intervals, and beside that over the baseline; a backend was timed only after its "
        "sign, values and gradient had been held against float64.</p>",
        "<h2>Device and versions</h2>",
        _table(
            ["fact", "value"],
            [[name.replace("_", " "), _fact(value)] for name, value in facts.items() if _is_fact(name, value)],
        ),
        "<h2>Winners by N and V</h2>",
        *_maps(frames, profile, rows),
        "<h2>Decisions</h2>",
        _decisions(frames, rows),
        "<h2>What did not get through</h2>",
        _failures(frames, rows),
    ]
    head = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{_text(device)}: compiled-logprobs</title><style>{STYLE}</style></head>"
    )
    return f"{head}<body><main>{''.join(parts)}</main></body></html>\n"


def _maps(frames: Frames, profile: Profile, found: pd.DataFrame) -> list[str]:
    parts, library = [], True
    for mode, dtype in found[["mode", "dtype"]].drop_duplicates().itertuples(index=False):
        table = winners(frames, profile, mode, dtype)
        last = table.dropna(subset=["key"]).iloc[-1]
        table = around(table, int(last["rows"]), int(last["vocab"]))
        figure = winner_map(table, among=frames.backends).update_layout(template=f"plotly_white+{TEMPLATE}")
        chart = plotly.io.to_html(figure, full_html=False, include_plotlyjs=library, config=CONFIG)
        library = False
        text = map_in_words(table)
        parts.append(
            f"<h3>{_text(mode)}, {_text(dtype)}</h3><p>{_text(text)} The fainter a square, the closer the "
            "runner-up.</p>"
            f'<div class="chart" role="img" aria-label="{escape(text)}">{chart}</div>'
        )
    return parts or ["<p>Nothing was measured.</p>"]


def _decisions(frames: Frames, decisions: pd.DataFrame) -> str:
    chosen = frames.candidates[frames.candidates["chosen"]].set_index("key")
    rows = []
    for row in decisions.head(MOST_ROWS).itertuples():
        best: Any = chosen.loc[row.key]
        ends = best["speedup_low"], best["speedup_high"]
        band = "" if any(map(math.isnan, ends)) else f" ({ends[0]:.2f} to {ends[1]:.2f})"
        figures = [
            "baseline" if row.chosen == row.against else _number(best["speedup"], ".2f", "x") + band,
            row.against,
            "baseline" if row.chosen == row.baseline else _number(best["ratio"], ".2f", "x"),
            _number(best["seconds"] * 1e3, ".3g", " ms"),
            _number(best["extra_bytes"] / 2**20, ".0f", " MiB"),
            f"{best['checks_passed']} of {best['checks_total']}" if best["checks_total"] else "not stored",
            _number(best["percent_of_bandwidth"], ".0f", " %"),
        ]
        rows.append(
            [
                *(row.mode, row.dtype, row.rows, row.vocab, row.measured_rows),
                *([row.chosen, *figures] if row.is_decided else ["undecided", *[""] * len(figures)]),
                *(row.code, row.measured_at, row.stale if isinstance(row.stale, str) else ""),
            ]
        )
    note = "" if len(decisions) <= MOST_ROWS else f"<p>The first {MOST_ROWS} of {len(decisions)}.</p>"
    return note + _table(HEAD.split(", "), rows)


def _failures(frames: Frames, table: pd.DataFrame) -> str:
    lost = frames.candidates[frames.candidates["key"].isin(table["key"]) & frames.candidates["seconds"].isna()]
    counted = lost.groupby(["backend", "outcome", "reason"], sort=True).size().head(MOST_ROWS)
    rows = [[backend, outcome(what), why, count] for (backend, what, why), count in counted.items()]
    return _table(["backend", "outcome", "why", "decisions"], rows) if rows else "<p>Everything did.</p>"


def _table(head: list[str], rows: list[list[Any]]) -> str:
    def cell(value: Any) -> str:
        return f'<td class="n">{value}</td>' if isinstance(value, int) else f"<td>{_text(value)}</td>"

    heads = "".join(f"<th>{_text(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: object) -> str:
    return escape(plain_line(value))


def _number(value: float, form: str, unit: str) -> str:
    return f"{value:{form}}{unit}" if math.isfinite(value) else "not measured"


def _is_fact(name: str, value: object) -> bool:
    return value is not None and name not in ("source", "environment", "here", "decisions", "device", "measured_at")


def _fact(value: object) -> str:
    return f"{value:.0f}" if isinstance(value, float) else str(value)

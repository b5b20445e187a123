"""Overview, the landing page: all decisions of a profile at once, who wins where, and profiles side by side."""

from typing import Any

import pandas as pd
import streamlit as st
from compiled_logprobs_dashboard import selection
from compiled_logprobs_dashboard.charts import overview as charts
from compiled_logprobs_dashboard.frames import Frames, Profile
from compiled_logprobs_dashboard.humanize import in_one_line, plural
from compiled_logprobs_dashboard.looks import UNDECIDED, plain, plain_line
from compiled_logprobs_dashboard.tables import compare
from compiled_logprobs_dashboard.tables import overview as tables

from compiled_logprobs.problem import bucket

TABS = {"shapes": "All shapes", "compare": "Compare"}
number, text, bar = st.column_config.NumberColumn, st.column_config.TextColumn, st.column_config.ProgressColumn
OF_BACKENDS = {
    "speed-up": number("over eager", format="%.2fx", help="Geometric mean of the speed-ups over eager."),
    "check": text("passed the check", help="Of the decisions in which it was checked."),
    "memory": number("worst memory", format="%.2f x logits", help="Extra memory, as a multiple of the logits."),
}
STATES = "wrong: a backend failed a check; undecided: the rounds did not tell; stale: something changed since."
COLUMNS = {
    "is": st.column_config.MultiselectColumn(
        "state", options=tables.STATES, color=["#D4002A", "orange", "violet", "gray"], pinned=True, help=STATES
    ),
    "N": number("N", format="localized"),
    "V": number("V", format="localized"),
    "winner": text("winner", width="small"),
    "check": text("check", help="Of the winner; or which backend failed which check."),
    "speed-up": number("over eager", format="%.2fx", help="Of the winner; the ends of its interval beside it."),
    "low": number("from", format="%.2f"),
    "high": number("to", format="%.2f"),
    "over plain": number("over log_softmax", format="%.2fx", help="Over plain log_softmax and gather."),
    "ms": number("a call, ms"),
    "memory": number("extra memory, x logits", format="%.2f"),
    "roof": bar("of roof", format="%.0f %%", min_value=0, max_value=100, help="Share of the measured bandwidth."),
    "age": number("age, days", format="%d"),
}
CHANGES: dict[str, Any] = {"ms": number("a call, ms"), "base ms": number("base, ms")}
CHANGES |= {at: number(of, format="%+.1f %%") for at, of in {"change": "time", "low": "from", "high": "to"}.items()}


def show() -> None:
    """The page."""
    frames = selection.current_frames()
    profile = selection.profile_of(frames)
    with st.container(horizontal=True, vertical_alignment="center"):
        st.title("Overview")
        tab = selection.switch("What", TABS, "tab")
    if tab == "compare" and (profile is not None or st.session_state.get("sides")):
        _compare(frames, profile)
    elif profile is None:
        selection.nothing_here(frames)
    else:
        _shapes(frames, profile)


def _shapes(frames: Frames, profile: Profile) -> None:
    whole = frames.once(("decisions", profile), lambda: tables.decisions(frames, profile))
    known = frames.once(("facets", profile), lambda: list(tables.facets(whole)))
    st.session_state["filter"] = [words for words in st.session_state.get("filter", []) if words in known]
    top = st.container(horizontal=True, gap="small", vertical_alignment="bottom")
    words = "All decisions: type wrong, a dtype, a mode, a winner, a model"
    options: Any = {"key": "filter", "placeholder": words, "label_visibility": "collapsed", "width": 560}
    asked = top.multiselect("Filter", known, **options)
    view = frames.once(("view", profile, *asked), lambda: _view(frames, profile, tables.filtered(whole, asked)))
    part, figures, fares, alt, figure, left_out = view
    for label, value, meaning in figures:
        top.metric(label, value, help=plain(meaning) or None, border=True, width="stretch")
    clicked = [] if figure is None else selection.chart(figure, alt=alt, key="maps", selects=True)
    if figure is not None:
        st.caption(f"Winner by N and V; the fainter, the closer the next; hollow: a tie. A click opens it. {left_out}")
    shown = part.drop(columns="key").dropna(axis="columns", how="all")
    row = selection.table(shown, alt=alt, key="decisions", columns=COLUMNS, height=390, selects=True)
    with st.container(horizontal=True):
        name = f"{plural(len(part), 'decision')} as CSV"
        selection.download(name, lambda: shown.to_csv(index=False), "decisions.csv", "text/csv")
        if (open_ := int((whole["winner"] == UNDECIDED).sum())) and frames.facts(profile)["here"]:
            words = f"Measure {plural(open_, 'undecided decision')} again, with more time"
            selection.link("measure", words, icon=":material/replay:", part="run", this="undecided")
    selection.table(fares, alt="Each backend", key="backends", columns=OF_BACKENDS)
    keys = [*clicked, *([part["key"].iloc[row]] if row is not None else [])]
    if keys:
        selection.go_to("shape", **selection.as_selected(frames.decisions["problem"].iloc[int(keys[0])]))


def _view(frames: Frames, profile: Profile, part: pd.DataFrame) -> tuple[Any, ...]:
    """What is shown of these decisions: themselves, figures, backends, words, the maps, and what these leave out."""
    squares = tables.squares(frames, profile, part)
    drawn, left_out = tables.maps(squares)
    figure = charts.winner_maps(drawn, among=frames.backends) if drawn else None
    told = (tables.figures(frames, profile, part), tables.by_backend(frames, profile, part))
    return part, *told, tables.in_words(squares), figure, left_out


def _compare(frames: Frames, profile: Profile | None) -> None:
    known = compare.sides(frames)
    if len(known) < 2:
        words = "There is one profile, measured on one day. Measure again, on another device or with another torch,"
        st.info(f"{words} or bring in a profile on the page Measure.", title="Nothing to compare with")
        return
    usual = [] if profile is None else compare.usual(frames, profile)
    st.session_state["sides"] = [name for name in st.session_state.get("sides", []) if name in known] or usual
    words = "Profiles, or one as it was at the end of a day: what is measured again keeps the decisions before."
    more: Any = {"format_func": lambda name: compare.side_in_words(frames, known[name]), "help": words}
    chosen = st.multiselect("The base, and what is compared with it", list(known), key="sides", **more)
    if len(chosen) < 2:
        st.info("Choose two or more.")
        return
    base, *rest = (known[name] for name in chosen)
    words = compare.side_in_words(frames, base)
    table, left_out = compare.matched(frames, base, rest)
    st.write(plain(compare.in_words(table, words), 600))
    selection.say_left_out(left_out)
    differing = compare.differences(frames, base, rest)
    if len(differing):
        deciding = ", ".join(differing.loc[differing["decides"], "fact"]) or "nothing that decides speed"
        with st.expander(f"What differs between them: {plain(deciding, 300)}"):
            selection.table(differing, alt="Facts that differ", key="differences")
    if len(table):
        figure = charts.changes(table, words)
        selection.chart(figure, alt=compare.in_words(table, words), key="changes")
        if len(table) > charts.MOST:
            st.caption(f"The {charts.MOST} that differ most, of {len(table):,}; all of them are in the table.")
        selection.table(table, alt="Each problem, regressions first", key="pairs", columns=CHANGES, height=430)
    shown_device = base.profile if profile is None else profile
    problem = bucket(selection.shape_of(frames, shown_device))
    past = compare.history(frames, problem, frames.facts(shown_device)["device"])
    words, count = plain(in_one_line(problem)), past["label"].nunique()
    if count > 1:
        st.subheader(f"{words} over time")
        bad = ", ".join(plain_line(name, 40) for name in sorted(past.loc[past["is_wrong"], "backend"].unique()))
        alt = f"Times over {count} measurements." + (f" Wrong somewhere, and not drawn there: {bad}." if bad else "")
        selection.chart(charts.trend(past, among=frames.backends), alt=alt, key="trend")
    else:
        st.caption(f"Nothing is shown over time: {words} was not measured twice on this device.")


show()

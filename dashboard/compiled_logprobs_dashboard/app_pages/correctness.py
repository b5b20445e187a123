"""Correctness: what each backend passed and failed, over all shapes; then one check of one backend, to the token."""

from functools import partial

import pandas as pd
import streamlit as st
from compiled_logprobs_dashboard import selection
from compiled_logprobs_dashboard.answers import look_up
from compiled_logprobs_dashboard.frames import Frames, Profile
from compiled_logprobs_dashboard.humanize import plural
from compiled_logprobs_dashboard.looks import WRONG, plain, plain_line
from compiled_logprobs_dashboard.tables import correctness as tables

from compiled_logprobs.check.report import MEANING
from compiled_logprobs.errors import ProfileError

number, text = st.column_config.NumberColumn, st.column_config.TextColumn
LOST = {
    "backend": text("backend", pinned=True),
    "lost": number("lost", help="Decisions in which it failed, crashed, or ran out of memory or time before."),
    "cannot run": number("cannot run", help="Decisions that it cannot run, or whose package is not there."),
}
SHAPES = {"N": number(format="localized"), "V": number(format="localized")}
TOKENS = {
    "row": number("row", help="Of N."),
    "token": number("token", help="The label whose log-probability it is, or the logit whose gradient."),
    "float64": text("in float64"),
    "error": text("error", help="Infinite where only one of both is a number."),
}


def show() -> None:
    """The page."""
    st.title("Correctness")
    frames = selection.current_frames()
    profile = selection.profile_of(frames)
    if profile is None:
        selection.nothing_here(frames)
        return
    found = frames.once(("counts", profile), lambda: tables.counts(frames, profile))
    if found.empty:
        st.info("The decisions are stored without results of their checks, so that it is not known what they came to.")
        return
    _all(frames, profile, found)
    _one(frames, profile, found)


def _all(frames: Frames, profile: Profile, found: pd.DataFrame) -> None:
    failed, decisions = found[found["failed"] > 0], plural(len(frames.of(profile)), "decision")
    if failed.empty:
        names = ", ".join(plain_line(name, 40) for name in sorted(found["backend"].unique()))
        words = f"No check failed in {decisions}: {names}. Sign, values and gradient were held against float64."
        st.success(plain(words, 900), icon=":material/verified:")
    matrix = tables.matrix(frames, profile, found)
    shown = matrix.reset_index()
    shown["backend"] = shown["backend"].map(lambda name: plain_line(name, 40))
    checks = {name: text(plain_line(name, 40), help=plain(MEANING.get(name, name))) for name in matrix.columns[2:]}
    worst = failed.head(6).itertuples()
    said = [f"{plain_line(row.backend, 40)} failed {row.check} in {row.failed:,}" for row in worst]
    st.dataframe(
        shown.style.map(_tint),
        hide_index=True,
        key="matrix",
        on_select=partial(_take, matrix),
        selection_mode="single-cell",
        alt="; ".join(said) or "No check failed.",
        column_config={**LOST, **checks},
        height=min(38 + 35 * len(shown), 360),
    )
    st.caption(f"Of {decisions}; signs first, then what failed somewhere. A click on a cell shows it below.")


def _take(matrix: pd.DataFrame) -> None:
    """Let the clicked cell be what is looked at."""
    for row, column in st.session_state["matrix"].selection.cells:
        if row < len(matrix) and column in matrix.columns[2:]:
            st.session_state["backend"], st.session_state["check"] = matrix.index[row], column


def _tint(value: object) -> str:
    """Words and glyphs say it all; the colour only helps to find them."""
    if isinstance(value, str) and value.startswith(WRONG):
        return "background-color: rgba(212,0,42,0.25); font-weight: bold"
    return "background-color: rgba(0,158,115,0.12)" if isinstance(value, str) and value.startswith("✓") else ""


def _one(frames: Frames, profile: Profile, found: pd.DataFrame) -> None:
    backends = list(dict.fromkeys(found["backend"]))
    checks = list(found.loc[found["backend"] == st.session_state["backend"], "check"])
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        short = partial(plain_line, longest=60)
        backend = st.selectbox("Backend", backends, key="backend", format_func=short, width=220)
        check = st.selectbox("Check", checks, key="check", format_func=short, width=260)
        said = MEANING.get(check, check)
        st.write(f"{plain(said[:1].upper() + said[1:])}.")
    places = tables.where(frames, profile, backend, check)
    left, right = st.columns([2, 3])
    with left:
        name, shown = f"places-{backend}-{check}", places.drop(columns="key")
        row = selection.table(shown, alt="Where, failures first", key=name, columns=SHAPES, height=320, selects=True)
    if row is None:  # the selected shape, unless something worse is there
        answer = look_up(frames, profile, selection.shape_of(frames, profile))
        same = places.index[(places["key"] == answer.key) & (places["verdict"] == places["verdict"].iloc[0])]
        row = int(same[0]) if len(same) else 0
    key = int(places["key"].iloc[row])
    try:
        decision = frames.decision(key)
    except ProfileError as error:
        right.error(plain(error), title="The decision cannot be read")
        return
    candidate, evidence = decision.candidates[backend], frames.evidence(key, decision)
    at, name = plain(frames.decisions["name"].iloc[key]), plain(backend, 40)
    with right:
        if places["verdict"].iloc[row] == tables.FAILED:
            st.error(f"**{plain(candidate.reason, 600)}**", title=f"{name} is WRONG: {at}", icon=":material/gpp_bad:")
        else:
            st.success(f"{name} passed {plain(check)}: {at}", icon=":material/check:")
        inputs = tables.by_input(candidate, evidence, backend, check)
        selection.table(inputs, alt="By kind of input, failures first", key="inputs", height=250)
        if evidence is None or backend not in evidence.cases:
            why = "it is older, or was carried here without its evidence. Measured again, it has them."
            st.caption(f"No details by input are stored: {why}")
    tokens = tables.tokens(evidence, backend)
    if len(tokens):
        st.caption(f"The values of {name} that are most off from float64, in {at}:")
        selection.table(tokens, alt="The values that are most off", key="tokens", columns=TOKENS, height=320)


show()

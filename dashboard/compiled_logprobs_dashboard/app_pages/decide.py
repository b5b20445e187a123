"""Decide, the landing page: which backend to use for a shape, and why; and the winner map."""

from datetime import datetime, timezone
from typing import Any

import streamlit as st
from compiled_logprobs_dashboard import selection
from compiled_logprobs_dashboard.charts import decide as charts
from compiled_logprobs_dashboard.frames import Answer, Frames, Profile, Shape, against, look_up
from compiled_logprobs_dashboard.looks import plain, plain_line
from compiled_logprobs_dashboard.tables import decide as tables

from compiled_logprobs.choose.explain import what_was_measured
from compiled_logprobs.decision import Decision
from compiled_logprobs.errors import ProfileError

MAP = "winner_map"
RANKED = ["backend", "outcome", "speedup", "low", "high", "ratio"]
COLUMNS = {
    "backend": st.column_config.TextColumn("backend", pinned=True),
    "letter": st.column_config.TextColumn("", help="As in the charts.", width="small"),
    "outcome": st.column_config.TextColumn("outcome"),
    "ms": st.column_config.NumberColumn("a call", format="%.3g ms"),
    "speedup": st.column_config.NumberColumn("speed-up", format="%.2fx", help="Below is told over whom."),
    "low": st.column_config.NumberColumn("from", format="%.2fx", help="End of the confidence interval."),
    "high": st.column_config.NumberColumn("to", format="%.2fx", help="End of the confidence interval."),
    "ratio": st.column_config.NumberColumn(
        "over the baseline", format="%.2fx", help="The baseline's time over its own."
    ),
    "extra_mib": st.column_config.NumberColumn("extra memory", format="%.0f MiB"),
    "extra_multiple": st.column_config.NumberColumn("x logits", format="%.2f"),
    "percent_of_bandwidth": st.column_config.NumberColumn("bandwidth", format="%.0f %%"),
    "checks": st.column_config.TextColumn("checks passed"),
    "first_call_s": st.column_config.NumberColumn("first call", format="%.2g s"),
    "pays_after": st.column_config.NumberColumn(
        "paid after", format="%.0f calls", help="Calls after which the first call, compiling included, has paid."
    ),
}


def show() -> None:
    """The page."""
    st.title("Which backend?")
    frames = selection.current_frames()
    profile = selection.choose_profile(frames)
    if profile is None:
        return
    shape = selection.choose_shape(frames, profile)
    answer = look_up(frames, profile, shape)
    try:
        decision = None if answer.key is None else frames.decision(answer.key)
    except ProfileError as error:
        st.error(plain(error), title="The decision cannot be read")
        return
    _headline(frames, profile, shape, answer, decision)
    if decision is not None and answer.key is not None:
        _ranking(frames, decision)
        _why(decision)
        _what_if(decision, shape)
        _code(decision, answer)
    _map(frames, profile, shape, answer, decision)


def _headline(frames: Frames, profile: Profile, shape: Shape, answer: Answer, decision: Decision | None) -> None:
    asked = f"N {shape.rows}, V {shape.vocab}, {plain(shape.dtype)}, {plain(shape.mode)}"
    if decision is None or answer.key is None:
        rule = (
            "has fewer than 2^20 logits, and no profile decides it: the first that is ready without compiling serves."
        )
        none = "was not measured in this profile, nor was another N of it. The map below shows what was."
        st.subheader("By rule, what is ready" if answer.kind == "rule" else "Not measured")
        st.write(f"{asked} {rule if answer.kind == 'rule' else none}")
        return
    st.subheader(plain(tables.sentence(decision), 600))
    _badges(frames, profile, answer, decision)
    with st.container(horizontal=True):
        for figure in tables.figures(decision) if decision.is_decided else []:
            selection.metric(*figure)


def _badges(frames: Frames, profile: Profile, answer: Answer, decision: Decision) -> None:
    row, facts = frames.decisions.iloc[answer.key or 0], frames.facts(profile)
    rows, is_stale = decision.problem.rows, isinstance(row["stale"], str)
    when = tables.age(decision.measured_at, datetime.now(timezone.utc))
    there = plain(what_was_measured(decision.problem, answer.problem))
    kinds = {
        "exact": ("exact", "check", "green", f"Decided for N up to {rows}, the bucket of this one."),
        "nearest": (f"nearest: {there}", "near_me", "orange", "No decision for exactly this problem is stored."),
        "undecided": (
            "undecided",
            "question_mark",
            "orange",
            "Least regret serves. Measured again, it gets more time.",
        ),
    }
    badges: list[tuple[str, str, Any, str]] = [
        kinds[answer.kind],
        ("stale" if is_stale else "", "history", "red", plain(row["stale"])),
        ("" if facts.get("here") else "another device", "devices_other", "violet", "Not used on this machine."),
        (when, "schedule", "gray", f"Measured {plain(decision.measured_at)}."),
    ]
    with st.container(horizontal=True):
        for text, icon, colour, meaning in badges:
            if text:
                st.badge(text, icon=f":material/{icon}:", color=colour, help=meaning)
    if is_stale:
        st.caption(f"Stale: {plain(row['stale'])}. Measuring it again would tell whether it still holds.")


def _ranking(frames: Frames, decision: Decision) -> None:
    st.subheader("Ranking")
    board = tables.leaderboard(decision, frames.backends)
    over, beside = against(decision), f", and beside that over the baseline, {plain(decision.baseline)}"
    if over == decision.baseline:
        board, beside = board.drop(columns="ratio"), ""
    alt = "The candidates, the chosen one first"
    shown = board.drop(columns="name")
    st.dataframe(shown, hide_index=True, column_config=COLUMNS, key="leaderboard", alt=alt, placeholder="–")
    timed = f", timed with {decision.timed_in_words}" if decision.timed_in_words else ""
    st.caption(
        f"{plain(decision.code)}: {plain(decision.reason)}. {decision.rounds} rounds{timed}. Speed-ups are over "
        f"{plain(over)}{beside}."
    )
    selection.chart(
        charts.ranking(board, over, among=frames.backends),
        alt=charts.ranking_in_words(board, over),
        key="ranking",
        table=shown[[name for name in RANKED if name in shown]],
        columns=COLUMNS,
    )


def _why(decision: Decision) -> None:
    lost = tables.why_lost(decision)
    st.subheader("Why not the others" if decision.is_decided else "What became of the others")
    if lost.empty:
        st.write("There were no others.")
    for row in lost.itertuples():
        st.markdown(f"**{plain(row.backend)}**, {plain(row.outcome)}: {plain(row.why, 500)}")
        st.caption(plain(row.figures, 600))


def _what_if(decision: Decision, shape: Shape) -> None:
    st.subheader("What if memory is short?")
    need = tables.needed(decision, shape.rows)
    if not need:
        st.write("The extra memory of none of them was measured.")
        return
    by_need = sorted(need.items(), key=lambda item: item[1])
    listed = ", ".join(f"{plain(name, 40)} {tables.size(number)}" for name, number in by_need)
    st.write(f"For N {shape.rows}, beside the logits: {listed}.")
    if not decision.is_decided:
        return
    cap = st.number_input(
        "Extra memory that is free, MiB",
        min_value=0.0,
        max_value=2.0**40,
        value=None,
        placeholder="no cap",
        key="cap",
        bind="query-params",
        help="Beside the logits. Extra memory grows with N: for another N, its measured multiple is taken.",
    )
    if cap is None:
        return
    advice = tables.under_cap(decision, cap * 2**20, shape.rows)
    name = "nothing" if advice.name is None else f"**{plain(advice.name)}**"
    show = st.success if advice.name == decision.chosen else st.warning
    show(f"Under {cap:,.0f} MiB, for N {shape.rows}: use {name}: {plain(advice.why, 600)}")


def _code(decision: Decision, answer: Answer) -> None:
    st.subheader("Use it")
    st.code(tables.snippet(answer.problem, decision.chosen if decision.is_decided else None), language="python")
    command = tables.command(decision)
    if command is None:
        st.caption("No command poses these options; a call of the function itself, with `autotune`, measures them.")
    else:
        more = "" if decision.is_decided else ", with more time than before, since it is undecided"
        st.caption(f"Measures this row again{more}, and stores it:")
        st.code(command, language="bash", wrap_lines=True)
        if others := [plain_line(name, 40) for name in tables.of_others(decision)]:
            st.caption(
                f"Where {plain(', '.join(others), 900)} came from is not stored: in its place, write "
                "`package.module:Class`."
            )
    selection.download("Download this decision (JSON)", decision.to_json, "decision.json", "application/json")


def _map(frames: Frames, profile: Profile, shape: Shape, answer: Answer, decision: Decision | None) -> None:
    st.subheader("Winners by N and V")
    table = tables.winners(frames, profile, shape.mode, shape.dtype)
    if table.empty:
        st.info(f"Nothing was measured in this profile for {plain(shape.mode)} and {plain(shape.dtype)}.")
        return
    part = tables.around(table, shape.rows, shape.vocab)
    text = tables.map_in_words(part)
    st.caption(
        f"A click on a square selects its shape. {plain(text)} The fainter a square, the closer the runner-up."
        + (f" Of {len(table)} squares, the nearest are shown." if len(part) < len(table) else "")
    )
    frame = (None, None) if decision is None else (decision.problem.rows, decision.problem.vocab)
    selection.chart(
        charts.winner_map(part, *frame, among=frames.backends),
        alt=text,
        key=MAP,
        table=part[["rows", "vocab", "state", "backend", "speedup", "low", "high", "runner_up", "margin"]],
        on_select=lambda: selection.select_square(st.session_state[MAP]),
    )


show()

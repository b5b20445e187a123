"""Shape: which backend to use for one shape, whether it is right, how all of them scale, and how to call it."""

from datetime import datetime, timezone
from typing import Any

import streamlit as st
from compiled_logprobs_dashboard import selection
from compiled_logprobs_dashboard.answers import Answer, look_up
from compiled_logprobs_dashboard.charts import shape as charts
from compiled_logprobs_dashboard.frames import Frames, Profile, against
from compiled_logprobs_dashboard.humanize import age, duration, size
from compiled_logprobs_dashboard.looks import plain, plain_line
from compiled_logprobs_dashboard.tables import scaling
from compiled_logprobs_dashboard.tables import shape as tables

from compiled_logprobs.choose.explain import what_was_measured
from compiled_logprobs.decision import Decision
from compiled_logprobs.errors import ProfileError
from compiled_logprobs.problem import Problem, mode_name, short_name

GIB = 2**30
BY_RULE = "It has fewer than 2^20 logits, and no profile decides it: the first that is ready without compiling serves."
number, text, bar = st.column_config.NumberColumn, st.column_config.TextColumn, st.column_config.ProgressColumn
COLUMNS = {
    "backend": text("backend", pinned=True),
    "outcome": text("outcome"),
    "checks": text("checks", help="Passed, of those that were run; or which failed."),
    "ms": number("a call, ms"),
    "speed-up": number("speed-up", format="%.2fx", help="Over plain log_softmax and gather, as far as that was timed."),
    "low": number("from", format="%.2f", help="The ends of the confidence interval."),
    "high": number("to", format="%.2f"),
    "over eager": number("over baseline", format="%.2fx", help="Over eager, unless that could not be measured."),
    "tokens": number("tokens/s", format="compact"),
    "roof": bar("of roof", format="%.0f %%", min_value=0, max_value=100, help="Share of the measured bandwidth."),
    "MiB": number("extra, MiB", format="localized", help="Peak memory beyond the logits; results and gradient count."),
    "multiple": number("x logits", format="%.2f"),
    "why": text("why", width="large"),
}


def show() -> None:
    """The page."""
    st.title("Shape")
    frames = selection.current_frames()
    profile = selection.profile_of(frames)
    problem = selection.choose_shape(frames, profile)
    if profile is None:
        selection.nothing_here(frames)
        return
    answer = look_up(frames, profile, problem)
    try:
        decision = None if answer.key is None else frames.decision(answer.key)
    except ProfileError as error:
        st.error(plain(error), title="The decision cannot be read")
        return
    _headline(frames, profile, problem, answer, decision)
    if decision is not None:
        board = tables.ranking(decision, frames.backends).drop(columns="name").dropna(axis="columns", how="all")
        selection.table(board, alt=tables.sentence(decision), key="ranking", columns=COLUMNS)
    chart, use = st.columns([3, 2])
    with chart:
        _scaling(frames, profile, problem, decision)
    with use:
        _use(problem, answer, decision)


def _headline(frames: Frames, profile: Profile, problem: Problem, answer: Answer, decision: Decision | None) -> None:
    asked = f"N {problem.rows:,}, V {problem.vocab:,}, {short_name(problem.dtype)}, {mode_name(problem)}"
    on = f"{plain(asked)}, on {plain(frames.label(profile), 160)}"
    if decision is None or answer.key is None:
        is_small = answer.kind == "rule"
        st.subheader("By rule, what is ready" if is_small else "Not measured")
        st.write(f"{on}. {BY_RULE if is_small else 'Neither this shape nor another N of it was measured here.'}")
        return
    st.subheader(plain(tables.sentence(decision), 600))
    stale = frames.decisions["stale"].iloc[answer.key]
    there = plain(what_was_measured(decision.problem, answer.problem))
    badge, meaning = {
        "exact": (":green-badge[measured]", f"for N up to {decision.problem.rows:,}"),
        "nearest": (f":orange-badge[nearest: {there}]", "no decision for exactly this is stored"),
        "undecided": (":orange-badge[undecided]", "measured again, it gets more time"),
    }[answer.kind]
    said = [on, meaning, f"timed with {decision.timed_in_words}" if decision.timed_in_words else ""]
    said += [age(decision.measured_at, datetime.now(timezone.utc)), f"speed-ups over {plain(against(decision))}"]
    old = f":red-badge[stale: {plain(stale, 160)}] " if isinstance(stale, str) else ""
    st.markdown(f"{badge} {old}{'; '.join(one for one in said if one)}.")


def _scaling(frames: Frames, profile: Profile, problem: Problem, decision: Decision | None) -> None:
    if decision is not None and decision.problem.hidden is not None:
        _trade_off(frames, decision)
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        metric = selection.switch("Scaling", selection.METRICS, "metric")
        along: scaling.Axis = "vocab" if selection.switch("Against", ("N", "V"), "along") == "V" else "rows"
    found = scaling.scaling(frames, profile, problem, along)
    points = found.points
    if not points["seconds"].notna().any() and not (points["state"] == "wrong").any():
        asked = f"{mode_name(problem)}, {short_name(problem.dtype)}" + f", V {problem.vocab:,}" * (along == "rows")
        st.info(f"Nothing was timed in this profile for {plain(asked)}.")
        return
    free = _free(frames, profile) if metric == "memory" else None
    figure = charts.scaling(points, along, metric, roof=found.roof, capacity=free, among=frames.backends)
    values, words = charts.values_of(points, metric)[0], charts.METRICS[metric].words
    selection.chart(figure, alt=scaling.in_words(points, along, values, words), key="scaling")
    if free is not None and along == "rows":
        largest = scaling.largest(points, free).itertuples()
        fits = ", ".join(f"{plain(row.backend, 40)} {row.rows:,.0f}" for row in largest)
        st.caption(f"The largest N that fits into {size(free)}, as memory grows with N: {fits}.")
        if decision is not None and decision.is_decided:
            name, why = tables.under_cap(decision, free - scaling.logits_bytes(problem), problem.rows)
            tell = st.success if name == decision.chosen else st.warning
            tell(f"For N {problem.rows:,}: use {plain(name or 'fewer rows', 40)}: {plain(why, 400)}.")
    selection.say_left_out(found.left_out)


def _trade_off(frames: Frames, decision: Decision) -> None:
    points, left_out = tables.trade_off(decision)
    if len(points):
        whole, timed = decision.problem, decision.timed
        limit = whole.memory_limit and whole.memory_limit * timed.vocab // whole.vocab
        figure = charts.trade_off(points, limit, among=frames.backends)
        fastest, least = (points.loc[points[name].idxmin()] for name in ("seconds", "bytes"))
        words = f"Time against memory. The fastest: {duration(fastest['seconds'])} and {size(fastest['bytes'])}, "
        words += f"{fastest['backend']}; the least memory: {size(least['bytes'])}, {least['backend']}."
        selection.chart(figure, alt=plain_line(words), key="trade_off")
        part = f" Timed with {decision.timed_in_words}, the limit in proportion to the columns."
        st.caption(plain(words) + ("" if timed == whole else part))
    selection.say_left_out(left_out)


def _free(frames: Frames, profile: Profile) -> float | None:
    known, words = scaling.capacity(frames, profile), "What a model and other tensors hold has to be taken off."
    usual = "not known" if known is None else f"{known / GIB:,.1f}, all of it"
    options: Any = {"value": None, "placeholder": usual, "help": words, "width": 200}
    given = st.number_input("Free memory, GiB", 0.0, 2.0**20, key="free", **options)
    return given * GIB if given else known


def _use(problem: Problem, answer: Answer, decision: Decision | None) -> None:
    name = decision.chosen if decision is not None and decision.is_decided else None
    st.code(tables.snippet(problem, name), language="python", wrap_lines=True)
    request, is_its = tables.request_of(answer.problem), answer.kind in ("exact", "undecided")
    if request is None:
        st.caption("No command poses these options; a call of the function itself, with `autotune`, measures them.")
    else:
        again = {"undecided": "again, with more time", "exact": "again"}.get(answer.kind, "this shape")
        selection.link("measure", f"**Measure {again}**", icon=":material/speed:", part="run", this="shape")
        command = tables.command(decision) if decision is not None and is_its else None
        st.code(command or request.command_line(), language="bash", wrap_lines=True)
    if decision is not None:
        where = {"backend": decision.chosen, "check": "log_prob_sign"}
        selection.link("correctness", "Its checks, input by input", icon=":material/fact_check:", **where)
        selection.link("overview", "Over time", icon=":material/timeline:", tab="compare")
        selection.download("This decision (JSON)", decision.to_json, "decision.json", "application/json")


show()

"""Compare: two profiles where both measured the same problem, and a shape's history."""

import streamlit as st
from compiled_logprobs_dashboard import selection
from compiled_logprobs_dashboard.charts import compare as charts
from compiled_logprobs_dashboard.frames import Frames, Profile, problem_of
from compiled_logprobs_dashboard.looks import plain, plain_line
from compiled_logprobs_dashboard.tables import compare as tables

from compiled_logprobs.problem import bucket

RATIO = {
    "ratio": st.column_config.NumberColumn("ratio", format="%.2fx", help="Above 1, this profile is faster."),
    "low": st.column_config.NumberColumn("from", format="%.2fx"),
    "high": st.column_config.NumberColumn("to", format="%.2fx"),
    "seconds_this": st.column_config.NumberColumn("this, s", format="%.3g"),
    "seconds_that": st.column_config.NumberColumn("that, s", format="%.3g"),
}


def show() -> None:
    """The page."""
    st.title("Compare")
    frames = selection.current_frames()
    this = selection.choose_profile(frames)
    if this is None:
        return
    if len(frames.environments) < 2:
        st.info(
            "There is one profile, and two or more can be compared. Measure another device or version of torch, or "
            "take a profile from elsewhere on the page **Profiles**.",
            title="Nothing to compare with",
        )
    else:
        that = selection.choose_profile(frames, key="against", label="Against", place=st, other_than=this)
        if that is not None:
            _guard(frames, this, that)
            _ratios(frames, this, that)
    _history(frames, this)


def _guard(frames: Frames, this: Profile, that: Profile) -> None:
    if this == that:
        st.warning("Both are the same profile: every ratio is 1.")
        return
    differing = tables.differences(frames, this, that)
    if differing.empty:
        st.success("Device and versions are the same in both.", title="What differs")
        return
    deciding = [plain(name.replace("_", " ")) for name in differing.loc[differing["decides"], "fact"]]
    if deciding:
        st.warning(
            f"{', '.join(deciding)}: what differs below comes from these as much as from the backends.",
            title="What differs",
        )
    else:
        st.info("Nothing that decides how fast a backend is.", title="What differs")
    st.dataframe(
        differing,
        hide_index=True,
        key="differences",
        alt="Facts that differ between the two profiles",
        column_config={
            "decides": st.column_config.CheckboxColumn("decides", help="Whether it makes another environment.")
        },
    )


def _ratios(frames: Frames, this: Profile, that: Profile) -> None:
    names = tables.backends_of(frames, this, that)
    backend = st.selectbox("Times of", [tables.WINNER, *names], key="backend", bind="query-params")
    pairs = tables.matched(frames, this, that, backend or tables.WINNER)
    text = tables.in_words(pairs)
    st.write(plain(text))
    left = [
        f"{count} {what}"
        for count, what in (
            (pairs.only_this, "only in this"),
            (pairs.only_that, "only in that"),
            (pairs.untimed, "not timed, or undecided, in one of them"),
        )
        if count
    ]
    if left:
        st.caption(f"Left out of all figures: {', '.join(left)}.")
    if pairs.table.empty:
        return
    selection.chart(charts.ratios(pairs.table), alt=text, key="ratios", table=pairs.table, columns=RATIO)
    st.caption(
        "Times are scaled to N where fewer rows were timed. The band is the width of the widest interval of each "
        "decision, both together: what varies within a run. From day to day, clocks and load can change more than "
        "that."
    )


def _history(frames: Frames, this: Profile) -> None:
    st.subheader("History of a shape")
    shape = selection.choose_shape(frames, this)
    problem = bucket(problem_of(frames, this, shape))
    device = frames.facts(this)["device"]
    timings = tables.history(frames, problem, device)
    what = f"N {problem.rows}, V {problem.vocab}, {plain(shape.dtype)}, {plain(shape.mode)}, on {plain(device)}"
    if timings.empty:
        st.info(f"{what}: nothing was measured.")
        return
    times = timings["label"].nunique()
    winners = ", ".join(
        f"{plain_line(row.label)}: {plain_line(row.backend, 40)}" for row in timings[timings["chosen"]].itertuples()
    )
    if times == 1:
        st.caption(f"{what}: measured once. Each other version of torch, or number of threads, adds to this.")
    selection.chart(
        charts.history(timings, among=frames.backends),
        alt=f"Times over {times} measurements. Winners: {winners}.",
        key="history",
        table=timings,
    )


show()

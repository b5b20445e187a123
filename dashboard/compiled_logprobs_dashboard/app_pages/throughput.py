"""Throughput: bytes and tokens a second against N and V, the share of the roof, and the first call's cost."""

import pandas as pd
import streamlit as st
from compiled_logprobs_dashboard import selection
from compiled_logprobs_dashboard.charts import throughput as charts
from compiled_logprobs_dashboard.frames import Frames, Profile, Shape, look_up, problem_of
from compiled_logprobs_dashboard.looks import plain, plain_line
from compiled_logprobs_dashboard.tables import throughput as tables

from compiled_logprobs.machine.clock import cache_bytes

ALONG: dict[str, tables.Axis] = {"N, rows": "rows", "V, vocabulary": "vocab"}
COLUMNS = {
    "seconds": st.column_config.NumberColumn("a call, s", format="%.4g"),
    "gbps": st.column_config.NumberColumn("GB/s", format="%.4g"),
    "gbps_low": st.column_config.NumberColumn("GB/s, from", format="%.4g", help="The middle 60 % of the calls."),
    "gbps_high": st.column_config.NumberColumn("GB/s, to", format="%.4g", help="The middle 60 % of the calls."),
    "tokens": st.column_config.NumberColumn("tokens/s", format="%.4g"),
    "tokens_low": st.column_config.NumberColumn("tokens/s, from", format="%.4g"),
    "tokens_high": st.column_config.NumberColumn("tokens/s, to", format="%.4g"),
    "percent": st.column_config.NumberColumn("% of the roof", format="%.1f"),
    "first_call_seconds": st.column_config.NumberColumn("first call, s", format="%.3g"),
    "pays_after": st.column_config.NumberColumn("paid after, calls", format="%.0f"),
}


def show() -> None:
    """The page."""
    st.title("Throughput")
    frames = selection.current_frames()
    profile = selection.choose_profile(frames)
    if profile is None:
        return
    shape = selection.choose_shape(frames, profile)
    cache = _cache_bytes(frames, profile)
    chosen = st.segmented_control(
        "Against", list(ALONG), default="N, rows", key="along", bind="query-params", required=True
    )
    along = ALONG[chosen if chosen in ALONG else "N, rows"]
    rates = tables.throughput(frames, profile, shape, along, cache)
    selection.say_left_out(rates.left_out)
    points = rates.points
    if points.empty:
        st.info(
            f"Nothing was measured in this profile for {plain(shape.mode)}, {plain(shape.dtype)}"
            + (f" and V {shape.vocab}" if along == "rows" else "")
            + ". The sidebar selects another shape; the page **Run** measures this one.",
            title="Not measured",
        )
        return
    other = f"V {shape.vocab}" if along == "rows" else f"N {points['rows'].iloc[0]}"
    if along == "vocab" and points["rows"].iloc[0] < shape.rows:
        st.caption(f"For N {shape.rows} nothing is stored; what is shown is the nearest N, {points['rows'].iloc[0]}.")
    st.caption(f"{other}, {plain(shape.dtype)}, {plain(shape.mode)}.")
    _rates(frames, points, along)
    _roof(frames, points, along, cache)
    _first_calls(frames, profile, shape, points)
    _bytes_model(frames, profile, shape)


def _rates(frames: Frames, points: pd.DataFrame, along: tables.Axis) -> None:
    for column, title, unit in (("gbps", "Bytes a second", "GB/s"), ("tokens", "Tokens a second", "tokens/s")):
        st.subheader(title)
        if points[f"{column}_low"].isna().all():
            st.caption("The raw times are not stored with these decisions, so that there are no bands: medians alone.")
        else:
            st.caption(
                "Median of the calls, and as a band the middle 60 % of them (from the 20th to the 80th percentile)."
            )
        roofs = tables.roofs(frames, points["key"].unique().tolist()) if column == "gbps" else None
        selection.chart(
            charts.rate(points, along, column, roofs, among=frames.backends),
            alt=tables.in_words(points, along, column, unit),
            key=f"rate-{column}",
            table=points.drop(columns=["key", "chosen"]),
            columns=COLUMNS,
        )


def _roof(frames: Frames, points: pd.DataFrame, along: tables.Axis, cache: float | None) -> None:
    st.subheader("How near to the roof")
    if points["percent"].isna().all():
        st.info("The bandwidth of the device was not measured with these decisions, so that there is no tables.")
        return
    st.caption(
        "The time that the bytes which must move take at the bandwidth measured on this device in the same run, in "
        "per cent of the time of a call: forward at the bandwidth of reading, backward at that of copying. Hollow "
        "points are above it."
    )
    selection.chart(
        charts.share(points, along, among=frames.backends),
        alt=tables.in_words(points, along, "percent", "% of the measured roof"),
        key="share",
        table=points.drop(columns=["key", "chosen"]),
        columns=COLUMNS,
    )
    noted = points[points["note"] != ""].drop_duplicates("note")
    for row in noted.itertuples():
        st.caption(f"{plain(row.backend, 40)}, N {row.rows}, V {row.vocab}: {plain(row.note, 400)}.")
    if cache is None:
        st.caption("The size of this device's cache is not known here, so that nothing is said of what stays in it.")
    st.caption("How long a launch takes was not measured, so that no point is marked as bound by it.")


def _first_calls(frames: Frames, profile: Profile, shape: Shape, points: pd.DataFrame) -> None:
    st.subheader("What the first call costs")
    answer = look_up(frames, profile, shape)
    part = points[points["key"] == answer.key] if answer.key is not None else points.iloc[:0]
    if part.empty:
        part = points[points["key"] == points["key"].iloc[-1]]
    at = f"N {part['rows'].iloc[0]}, V {part['vocab'].iloc[0]}"
    if part["first_call_seconds"].isna().all():
        st.info(f"The first calls for {at} were not timed.")
        return
    st.caption(
        f"For {at}: the first call, compiling included as far as the compiler's cache did not spare it, and after how "
        "many calls it has paid against the baseline. What has no such number is no faster than the baseline, or is "
        "the baseline."
    )
    seconds = ", ".join(
        f"{plain_line(row.backend, 40)} {row.first_call_seconds:.2g} s"
        for row in part.dropna(subset=["first_call_seconds"]).itertuples()
    )
    selection.chart(
        charts.first_calls(part, among=frames.backends),
        alt=f"Seconds of the first call for {at}: {seconds}.",
        key="first-calls",
        table=part[["backend", "first_call_seconds", "pays_after"]],
        columns=COLUMNS,
    )


def _bytes_model(frames: Frames, profile: Profile, shape: Shape) -> None:
    with st.expander("Which bytes are counted"):
        problem = problem_of(frames, profile, shape)
        st.write(f"For N {shape.rows}, V {shape.vocab}: {plain(tables.bytes_model(problem), 600)}.")
        st.write(
            "These are the bytes that every backend has to move. One that moves more, such as eager with its copies, "
            "gets no credit for them: its GB/s are those of the useful bytes."
        )


def _cache_bytes(frames: Frames, profile: Profile) -> float | None:
    """Of the last cache: from the profile for a GPU, of this machine if the profile is its; else not known."""
    facts = frames.facts(profile)
    if facts.get("l2_bytes"):
        return float(facts["l2_bytes"])
    if facts.get("here") and facts.get("device_type") == "cpu":
        return float(cache_bytes("cpu"))
    return None


show()

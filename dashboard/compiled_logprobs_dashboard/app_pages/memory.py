"""Memory: what each backend takes beside the logits, against the least possible, and the largest N that fits."""

import pandas as pd
import streamlit as st
from compiled_logprobs_dashboard import selection
from compiled_logprobs_dashboard.charts import memory as charts
from compiled_logprobs_dashboard.frames import Frames, Profile, Shape, look_up
from compiled_logprobs_dashboard.looks import plain, plain_line
from compiled_logprobs_dashboard.tables import memory as tables
from compiled_logprobs_dashboard.tables.memory import Capacity

GIB = 2**30
THREE_NUMBERS = """
Three numbers are called "the memory that is used", and they differ:

* **Allocated**: what tensors hold just now. Its peak during a call, less what was held before, is the **extra memory**
  on this page. torch tells the peak as `torch.cuda.max_memory_allocated()`.
* **Reserved**: what torch's allocator has taken from the device and keeps, so that the next tensor is quick to get: at
  least what is allocated, often more, in blocks that may be too small for the next request:
  `torch.cuda.max_memory_reserved()`.
* **Device used**: what all processes have taken: what each of them has reserved, their contexts (hundreds of MiB each),
  and what libraries hold: `nvidia-smi`, and the page **Live GPU**.

An allocation fails when neither the allocator's blocks nor the rest of the device has room for it, which can be while
*allocated* is far below the device's size. On a CPU there is one number: what the process has in memory, whose growth
in a call is taken.
"""
COLUMNS = {
    "extra_bytes": st.column_config.NumberColumn("extra, bytes", format="localized"),
    "extra_multiple": st.column_config.NumberColumn("extra, x logits", format="%.3f"),
    "least_bytes": st.column_config.NumberColumn("the least possible, bytes", format="localized"),
    "least_multiple": st.column_config.NumberColumn("the least possible, x logits", format="%.3f"),
    "logits_bytes": st.column_config.NumberColumn("logits, bytes", format="localized"),
    "timed_rows": st.column_config.NumberColumn("N that was timed"),
    "multiple": st.column_config.NumberColumn("extra, x logits", format="%.3f"),
    "at_rows": st.column_config.NumberColumn("measured at N"),
    "largest_rows": st.column_config.NumberColumn("largest N that fits", format="localized"),
    "extrapolated": st.column_config.CheckboxColumn("beyond what was measured"),
}


def show() -> None:
    """The page."""
    st.title("Memory")
    frames = selection.current_frames()
    profile = selection.choose_profile(frames)
    if profile is None:
        return
    shape = selection.choose_shape(frames, profile)
    points, left_out = tables.memory(frames, profile, shape)
    selection.say_left_out(left_out)
    if points.empty:
        st.info(
            f"No extra memory was measured in this profile for {plain(shape.mode)}, {plain(shape.dtype)} and V "
            f"{shape.vocab}.",
            title="Not measured",
        )
    else:
        _one_decision(frames, profile, shape, points)
        _growth(frames, profile, shape, points)
    with st.expander("Which memory? Allocated, reserved, device used"):
        st.markdown(THREE_NUMBERS)


def _one_decision(frames: Frames, profile: Profile, shape: Shape, points: pd.DataFrame) -> None:
    answer = look_up(frames, profile, shape)
    part = points[points["key"] == answer.key]
    if part.empty:
        distance = (points["rows"] - shape.rows).abs()
        part = points[points["key"] == points.loc[distance.idxmin(), "key"]]
    rows, timed = int(part["rows"].iloc[0]), int(part["timed_rows"].iloc[0])
    st.subheader("Beside the logits")
    st.caption(
        f"For N up to {rows}, V {shape.vocab}, {plain(shape.dtype)}, {plain(shape.mode)}"
        + ("" if timed == rows else f"; measured with {timed} rows")
        + ("" if answer.kind != "nearest" else ". For exactly this problem nothing is stored; this is the nearest")
        + ". The least possible is what no backend can do without: the results, and the gradient unless it is written "
        "over the logits."
    )
    selection.chart(
        charts.bars(part, among=frames.backends),
        alt=tables.in_words(part),
        key="memory-bars",
        table=part[["backend", "extra_bytes", "extra_multiple", "least_bytes", "least_multiple", "logits_bytes"]],
        columns=COLUMNS,
    )


def _growth(frames: Frames, profile: Profile, shape: Shape, points: pd.DataFrame) -> None:
    st.subheader("The largest N that fits")
    has = tables.capacity(frames, profile)
    free = _free(has)
    fits = tables.largest(points, shape.vocab, tables.itemsize_of(shape.dtype), free)
    if free is not None:
        with st.container(horizontal=True):
            for row in fits.itertuples():
                beside = "beyond what was measured" if row.extrapolated else ""
                meaning = f"Extra memory of {row.multiple:.2f} x the logits, as measured at N {row.at_rows}."
                selection.metric(plain(row.backend, 40), f"N {row.largest_rows:,.0f}", beside, meaning)
    st.caption(tables.RULE)
    sizes = (
        ""
        if free is None
        else f" With {free / GIB:.3g} GiB free: "
        + ", ".join(f"{plain_line(row.backend, 40)} N {row.largest_rows:,.0f}" for row in fits.itertuples())
    )
    selection.chart(
        charts.growth(points, has.bytes, free, among=frames.backends),
        alt=f"Logits and extra memory by N, at V {shape.vocab}.{sizes}",
        key="memory-growth",
        table=points.drop(columns=["key", "chosen"]),
        columns=COLUMNS,
    )
    st.dataframe(fits, hide_index=True, column_config=COLUMNS, key="largest", alt="The largest N that fits, by backend")


def _free(has: Capacity) -> float | None:
    if has.bytes is None:
        st.caption(f"The device's memory is {plain(has.source)}. Say what is free, and the largest N is told.")
        given = st.number_input("Free memory, GiB", 0.0, 1e6, 0.0, key="free", persist_state="session")
        return given * GIB if given > 0 else None
    whole = has.bytes / GIB
    st.caption(f"The device has {whole:.4g} GiB, {plain(has.source)}.")
    taken = st.number_input(
        "Of it taken by others, GiB",
        0.0,
        float(whole),
        0.0,
        key="taken",
        persist_state="session",
        help="A model, its gradients and optimizer, activations, other processes.",
    )
    return (whole - taken) * GIB


show()

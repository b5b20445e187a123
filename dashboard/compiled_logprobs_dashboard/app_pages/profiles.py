"""Profiles: what is stored and what cannot be read; take one along, bring one in, make a report."""

from datetime import datetime, timezone

import streamlit as st
from compiled_logprobs_dashboard import selection as session
from compiled_logprobs_dashboard.index import Tables
from compiled_logprobs_dashboard.looks import plain_line
from compiled_logprobs_dashboard.report import report

STORED = "stored_upload"
SOURCES = (
    "yours: stored by this user; project: the folder `profiles` that the dashboard was started in; bundled: came along."
)
COLUMNS = {
    "here": st.column_config.CheckboxColumn("this machine", help="Whether the library uses it here."),
    "memory_bytes": st.column_config.NumberColumn("memory", format="bytes"),
    "l2_bytes": st.column_config.NumberColumn("L2", format="bytes"),
    "cpu_threads": st.column_config.NumberColumn("threads", format="%d"),
    "multiprocessors": st.column_config.NumberColumn("SMs", format="%d"),
}


def show() -> None:
    """The page."""
    st.title("Profiles")
    tables = session.tables()
    _list(tables)
    profile = session.choose_profile(tables)
    if profile is not None:
        _report(tables, profile)


def _list(tables: Tables) -> None:
    found = tables.environments
    if len(found):
        stale = tables.decisions[tables.decisions["stale"].notna()].groupby(["source", "environment"]).size()
        shown = found.assign(
            stale=[int(stale.get(pair, 0)) for pair in zip(found["source"], found["environment"], strict=True)]
        )
        first = ["source", "device", "here", "decisions", "stale", "measured_at", "torch", "triton", "environment"]
        rest = [name for name in shown if name not in first]
        st.dataframe(
            shown[[*first, *rest]],
            hide_index=True,
            column_config=COLUMNS,
            key="profiles",
            alt="The profiles that are stored",
        )
        st.caption(SOURCES)
    broken = tables.broken
    if len(broken):
        st.warning(
            f"{len(broken)} files are passed over. What they told can be measured again; `compiled-logprobs prune` removes "
            "those that are broken.",
            title="Not readable",
        )
        st.dataframe(
            broken.assign(reason=broken["reason"].map(plain_line)),
            hide_index=True,
            key="broken",
            alt="Files that could not be read, with the reason",
        )


def _report(tables: Tables, profile: session.Profile) -> None:
    st.subheader("Report")
    st.caption("One HTML file with the winner maps and all decisions. It opens without a network.")
    if st.button("Make the report", key="make_report", icon=":material/summarize:"):
        with st.spinner("Drawing"):
            made = report(tables, *profile, f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC")
        st.download_button(
            f"Download {len(made.encode()):,} bytes",
            made,
            file_name=f"compiled-logprobs-{profile.environment}.html",
            mime="text/html",
            icon=":material/download:",
            on_click="ignore",
        )

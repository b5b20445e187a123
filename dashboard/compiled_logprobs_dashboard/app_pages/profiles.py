"""Profiles: what is stored and what cannot be read; take one along, bring one in, make a report."""

import hashlib
from datetime import datetime, timezone

import streamlit as st
from compiled_logprobs_dashboard import data, uploads
from compiled_logprobs_dashboard import selection as session
from compiled_logprobs_dashboard.index import Tables
from compiled_logprobs_dashboard.looks import plain, plain_line
from compiled_logprobs_dashboard.report import report

from compiled_logprobs.errors import ProfileError
from compiled_logprobs.store import user_store
from compiled_logprobs.store.files import Store

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
        _take_along(tables, profile)
        _report(tables, profile)
    _bring_in()


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


def _take_along(tables: Tables, profile: session.Profile) -> None:
    st.subheader("Download")
    st.caption(
        "The archive that `compiled-logprobs export` writes, of the selected profile, for `import` on another machine."
    )
    evidence = st.checkbox("With raw times and the check's details", value=True, key="evidence")
    if not st.button("Prepare the archive", key="prepare", icon=":material/inventory_2:"):
        return
    try:
        with st.spinner("Reading the decisions"):
            content, left_out = uploads.archive_of(
                Store(data.root_of(tables, profile.source)), profile.environment, evidence=evidence
            )
    except ProfileError as error:
        st.error(plain(error, 1000), title="It cannot be exported")
        return
    for why in left_out[:20]:
        st.caption(f"Left out: {plain(why)}")
    st.download_button(
        f"Download {len(content):,} bytes",
        content,
        file_name=f"compiled-logprobs-{profile.environment}.jsonl",
        mime="application/jsonl",
        icon=":material/download:",
        on_click="ignore",
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


def _bring_in() -> None:
    st.subheader("Upload")
    st.caption(
        "An archive from `compiled-logprobs export`, at most 8 MiB. It is checked as a whole, and shown, before it is stored. "
        "A profile names backends, it never brings code."
    )
    file = st.file_uploader("Archive", type=["jsonl", "json"], key="upload", max_upload_size=8)
    if file is None:
        return
    content = file.getvalue()
    try:
        entries = uploads.read(content)
        name = hashlib.sha256(content).hexdigest()
        if st.session_state.get(STORED) == name:
            st.success(f"Done: {st.session_state['upload_done']}.", title="Stored")
            return
        foreseen = uploads.foreseen(user_store(), entries)
    except ProfileError as error:
        st.error(plain(error, 1000), title="Nothing was stored")
        return
    st.dataframe(foreseen, hide_index=True, key="foreseen", alt="What storing the archive would do")
    new = int(foreseen["fate"].isin(["added", "replaced"]).sum())
    st.write(
        f"{len(foreseen)} decisions, {new} of which would be stored in your profiles. What is there and newer stays."
    )
    if st.button("Store them", key="store", type="primary", disabled=new == 0):
        try:
            done = uploads.take(user_store(), entries)
        except ProfileError as error:
            st.error(plain(error, 1000), title="Nothing was stored")
            return
        st.session_state[STORED] = name
        counts = ", ".join(f"{count} {fate}" for fate, count in done["fate"].value_counts().items())
        st.session_state["upload_done"] = counts
        st.rerun()


show()

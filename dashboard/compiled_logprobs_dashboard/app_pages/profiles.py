"""Profiles: what is stored and what cannot be read; take one along, bring one in, make a report."""

import hashlib
from datetime import datetime, timezone

import streamlit as st
from compiled_logprobs_dashboard import selection
from compiled_logprobs_dashboard.frames import Frames, Profile
from compiled_logprobs_dashboard.guard import UPLOAD_LIMIT_MB
from compiled_logprobs_dashboard.looks import plain, plain_line
from compiled_logprobs_dashboard.report import report
from compiled_logprobs_dashboard.tables import profiles as tables

from compiled_logprobs.errors import ProfileError
from compiled_logprobs.store import user_store
from compiled_logprobs.store.transfer import export_archive, import_archive

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
    frames = selection.current_frames()
    _list(frames)
    profile = selection.choose_profile(frames)
    if profile is not None:
        _take_along(frames, profile)
        _report(frames, profile)
    _bring_in()


def _list(frames: Frames) -> None:
    if len(frames.environments):
        alt = "The profiles that are stored"
        st.dataframe(tables.stored(frames), hide_index=True, column_config=COLUMNS, key="profiles", alt=alt)
        st.caption(SOURCES)
    broken = frames.broken
    if len(broken):
        st.warning(
            f"{len(broken)} files are passed over. What they told can be measured again; `compiled-logprobs prune` "
            "removes those that are broken.",
            title="Not readable",
        )
        st.dataframe(
            broken.assign(reason=broken["reason"].map(plain_line)),
            hide_index=True,
            key="broken",
            alt="Files that could not be read, with the reason",
        )


def _take_along(frames: Frames, profile: Profile) -> None:
    st.subheader("Download")
    st.caption(
        "The archive that `compiled-logprobs export` writes, of the selected profile, for `import` on another machine."
    )
    evidence = st.checkbox("With raw times and the check's details", value=True, key="evidence")
    if not st.button("Prepare the archive", key="prepare", icon=":material/inventory_2:"):
        return
    try:
        with st.spinner("Reading the decisions"):
            archive, _ = export_archive(frames.stores[profile.source], [profile.environment], evidence=evidence)
    except ProfileError as error:
        st.error(plain(error, 1000), title="It cannot be exported")
        return
    name = f"compiled-logprobs-{profile.environment}.tar.gz"
    selection.download(f"Download {len(archive):,} bytes", archive, name, "application/gzip")


def _report(frames: Frames, profile: Profile) -> None:
    st.subheader("Report")
    st.caption("One HTML file with the winner maps and all decisions. It opens without a network.")
    if st.button("Make the report", key="make_report", icon=":material/summarize:"):
        with st.spinner("Drawing"):
            made = report(frames, profile, f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC")
        name = f"compiled-logprobs-{profile.environment}.html"
        selection.download(f"Download {len(made.encode()):,} bytes", made, name, "text/html")


def _bring_in() -> None:
    st.subheader("Upload")
    st.caption(
        f"An archive from `compiled-logprobs export`, at most {UPLOAD_LIMIT_MB} MB. What it would do is shown before "
        "anything is stored. A profile names backends, it never brings code."
    )
    file = st.file_uploader("Archive", type=["tar.gz", "gz"], key="upload", max_upload_size=UPLOAD_LIMIT_MB)
    if file is None:
        return
    digest = hashlib.sha256(file.getvalue()).hexdigest()
    if st.session_state.get(STORED, ("", ""))[0] == digest:
        st.success(f"Done: {st.session_state[STORED][1]}.", title="Stored")
        return
    try:
        foreseen = tables.imported(import_archive(user_store(), file, dry_run=True))
        st.dataframe(foreseen, hide_index=True, key="foreseen", alt="What storing the archive would do")
        new = int(foreseen["fate"].isin(["added", "replaced"]).sum())
        st.write(
            f"{len(foreseen)} decisions, {new} of which would be stored in your profiles. What is there and newer "
            "stays."
        )
        if st.button("Store them", key="store", type="primary", disabled=new == 0):
            file.seek(0)
            fates = tables.imported(import_archive(user_store(), file))["fate"].value_counts()
            st.session_state[STORED] = digest, ", ".join(f"{count} {fate}" for fate, count in fates.items())
            st.rerun()
    except ProfileError as error:
        st.error(plain(error, 1000), title="Nothing more was stored")


show()

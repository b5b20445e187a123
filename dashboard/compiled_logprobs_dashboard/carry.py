"""Profiles that are stored: take one along, bring one in, prune. A part of the page Measure."""

import hashlib
from datetime import datetime, timezone
from typing import Any

import streamlit as st

from compiled_logprobs.errors import ProfileError
from compiled_logprobs.machine.environment import environments
from compiled_logprobs.store import user_store
from compiled_logprobs.store.transfer import export_archive, import_archive, prune
from compiled_logprobs_dashboard import selection
from compiled_logprobs_dashboard.frames import Frames, Profile
from compiled_logprobs_dashboard.guard import UPLOAD_LIMIT_MB
from compiled_logprobs_dashboard.humanize import plural, size
from compiled_logprobs_dashboard.looks import plain, plain_line
from compiled_logprobs_dashboard.report import report
from compiled_logprobs_dashboard.tables import measure as tables

DONE = "stored_upload"
SOURCES = "yours: this user's; project: the folder `profiles` where the dashboard was started; bundled: came along."
number = st.column_config.NumberColumn
COLUMNS = {
    "here": st.column_config.CheckboxColumn("this machine", help="Whether the library uses it here."),
    "memory bytes": number("memory", format="bytes"),
    "l2 bytes": number("L2", format="bytes"),
    "CPU threads": number("threads", format="%d"),
    "multiprocessors": number("SMs", format="%d"),
}


def show(frames: Frames) -> None:
    """What is stored, and what can be done with it."""
    if len(frames.environments):
        selection.table(tables.stored(frames), alt="The stored profiles", key="profiles", columns=COLUMNS, height=300)
        st.caption(SOURCES)
    if len(frames.broken):
        words = f"{plural(len(frames.broken), 'file')} passed over. What they told can be measured again."
        st.warning(f"{words} Pruning removes what is broken.", title="Not readable")
        broken = frames.broken.assign(reason=frames.broken["reason"].map(plain_line))
        selection.table(broken, alt="Files that could not be read", key="broken", height=200)
    profile = selection.profile_of(frames)
    for column, title, act in zip(st.columns(3), ("Take along", "Bring in", "Prune"), (_out, _in, _prune), strict=True):
        with column:
            st.subheader(title)
            try:
                act(frames, profile)
            except ProfileError as error:
                st.error(plain(error, 1000), title="That cannot be done")


def _out(frames: Frames, profile: Profile | None) -> None:
    if profile is None:
        st.caption("Nothing was measured on this machine; the box at the top selects another profile.")
        return
    words = "what `compiled-logprobs export` writes, with its history; or a report, one HTML file."
    st.caption(f"{plain(frames.label(profile), 200)}: {words}")
    evidence = st.checkbox("With raw times and the check's details", value=True, key="evidence")
    name = f"compiled-logprobs-{profile.environment}"
    if st.button("Prepare the archive", key="prepare", icon=":material/inventory_2:"):
        archive, _ = export_archive(frames.stores[profile.source], [profile.environment], evidence=evidence)
        selection.download(f"Download {size(len(archive))}", archive, f"{name}.tar.gz", "application/gzip")
    if st.button("Make the report", key="make_report", icon=":material/summarize:"):
        made = report(frames, profile, f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC")
        selection.download(f"Download {size(len(made.encode()))}", made, f"{name}.html", "text/html")


def _in(frames: Frames, profile: Profile | None) -> None:
    words = f"An archive from `compiled-logprobs export`, at most {UPLOAD_LIMIT_MB} MB. You see first what it would do."
    st.caption(f"{words} A profile names backends, it never brings code.")
    label, kinds = "Archive", ["tar.gz", "gz"]
    file = st.file_uploader(label, kinds, key="upload", max_upload_size=UPLOAD_LIMIT_MB, label_visibility="collapsed")
    if file is None:
        return
    digest = hashlib.sha256(file.getvalue()).hexdigest()
    if st.session_state.get(DONE, ("", ""))[0] == digest:
        st.success(f"Done: {st.session_state[DONE][1]}.", title="Stored")
        return
    foreseen = tables.imported(import_archive(user_store(), file, dry_run=True))
    selection.table(foreseen, alt="What storing the archive would do", key="foreseen", height=200)
    new = int(foreseen["fate"].isin(["added", "replaced"]).sum())
    words = f"{plural(len(foreseen), 'decision')}, {new:,} of which would be stored in your profiles."
    st.write(f"{words} What is there and newer stays.")
    if st.button("Store them", key="store", type="primary", disabled=new == 0):
        file.seek(0)
        fates = tables.imported(import_archive(user_store(), file))["fate"].value_counts()
        st.session_state[DONE] = digest, ", ".join(f"{count:,} {fate}" for fate, count in fates.items())
        st.rerun()


def _prune(frames: Frames, profile: Profile | None) -> None:
    st.caption("Removes from your profiles what is broken, and what else you name. You see first what would go.")
    older = "Also what is older than so many days"
    days = st.number_input(older, 1, 36500, None, key="prune_days", placeholder="whatever its age")
    others = st.checkbox("Also what is not for this machine as it is now", key="prune_others")
    here = [environment.fingerprint() for environment in environments()]
    options: dict[str, Any] = {"older_than_days": days, "other_environments": others}
    if not st.toggle("Show what would go", key="prune_show"):
        return
    waste = prune(user_store(), here, **options, dry_run=True)
    st.write(f"{plural(len(waste), 'file')}, {size(sum(one.bytes for one in waste))}.")
    if waste:
        lines = (f"{plain_line(one.path.name, 120)}: {plain_line(one.why, 120)}" for one in waste[:200])
        st.code("\n".join(lines), language=None, height=160)
        if st.button(f"Remove {plural(len(waste), 'file')}", key="prune", type="primary", icon=":material/delete:"):
            prune(user_store(), here, **options)
            st.rerun()

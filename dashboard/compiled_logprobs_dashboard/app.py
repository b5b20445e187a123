"""The frame of every page: the selection from the address, the links, what is wrong, and then the page itself."""

from pathlib import Path

import streamlit as st

from compiled_logprobs_dashboard import selection
from compiled_logprobs_dashboard.frames import Frames, Profile
from compiled_logprobs_dashboard.humanize import plural
from compiled_logprobs_dashboard.looks import plain
from compiled_logprobs_dashboard.selection import HERE, PAGES
from compiled_logprobs_dashboard.tables.overview import wrong, wrong_in_words

FOLDER = Path(__file__).parent


def bar(frames: Frames) -> None:
    """The links to all pages, and the profile."""
    named = frames.profiles()
    names = list(named) if frames.environments["here"].any() else [HERE, *named]
    with st.container(horizontal=True, vertical_alignment="center", gap="small", key="bar"):
        for page, (title, icon) in PAGES.items():
            selection.link(page, title, icon=icon)
        st.selectbox(
            "Profile",
            names,
            key="profile",
            label_visibility="collapsed",
            format_func=lambda name: frames.label(named[name]) if name in named else "this machine: nothing measured",
            help="A device and the versions on it. One is shown at a time; Overview compares several.",
            width=520,
        )
        st.toggle("Tables", key="as_tables", help="Show what is in a chart as a table instead.")


def warnings(frames: Frames, profile: Profile | None) -> None:
    """What must not be overlooked, on every page: what is wrong, and whose profile that is."""
    for note in st.session_state[selection.NOTES]:
        st.warning(plain(note, 400), icon=":material/link_off:")
    if len(frames.broken):
        st.caption(f"{plural(len(frames.broken), 'file')} could not be read: Measure, profiles, says why.")
    if profile is None:
        return
    found = wrong(frames, profile)
    if len(found):
        with st.container(horizontal=True, vertical_alignment="center", gap="small", key="wrong"):
            st.error(
                f"**{plain(wrong_in_words(found, len(frames.of(profile))), 900)}**. It does not serve there.",
                icon=":material/gpp_bad:",
            )
            first = found.iloc[0]
            check = first["checks"][0] if first["checks"] else "all"
            selection.link(
                "correctness",
                "**See what is wrong**",
                icon=":material/arrow_forward:",
                backend=first["backend"],
                check=check,
            )
    facts = frames.facts(profile)
    if not facts.get("here"):
        st.warning(
            f"**Another machine's profile**: {plain(frames.label(profile), 200)}. It does not say what holds here.",
            icon=":material/devices_other:",
        )


st.set_page_config(page_title="compiled-logprobs", page_icon=str(FOLDER / "icon.png"), layout="wide")
pages = [
    st.Page(FOLDER / "app_pages" / f"{name}.py", title=title, icon=icon, url_path=name, default=name == "overview")
    for name, (title, icon) in PAGES.items()
]
page = st.navigation(pages, position="hidden")
selection.take_address()
frames = selection.current_frames()
selection.settle(frames)
bar(frames)
warnings(frames, selection.profile_of(frames))
page.run()
selection.keep_address(next(name for name, each in zip(PAGES, pages, strict=True) if each == page))

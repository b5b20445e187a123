"""The frame of every page: the selection from the address, the links, what is wrong, and then the page itself."""

from pathlib import Path
from typing import Any

import streamlit as st

from compiled_logprobs_dashboard import selection
from compiled_logprobs_dashboard.frames import Frames, Profile
from compiled_logprobs_dashboard.humanize import plural
from compiled_logprobs_dashboard.looks import plain
from compiled_logprobs_dashboard.selection import HERE, PAGES
from compiled_logprobs_dashboard.tables.correctness import counts
from compiled_logprobs_dashboard.tables.overview import wrong, wrong_in_words

FOLDER = Path(__file__).parent


def bar(frames: Frames) -> None:
    """The links to all pages, and the profile."""
    named = frames.profiles
    names = list(named) if frames.environments["here"].any() else [HERE, *named]
    with st.container(horizontal=True, vertical_alignment="center", gap="small", key="bar"):
        for page, (title, icon) in PAGES.items():
            selection.link(page, title, icon=icon)
        say = {HERE: "this machine: nothing measured"} | {name: frames.label(of) for name, of in named.items()}
        hidden: Any = {"label_visibility": "collapsed", "width": 520, "format_func": lambda name: say.get(name, name)}
        st.selectbox("Profile", names, key="profile", **hidden)
        st.toggle("Tables", key="as_tables", help="Show what is in a chart as a table instead.")


def settle_check(frames: Frames, profile: Profile | None) -> None:
    """Select a backend and a check of it that there are, on all pages: a link has the whole address then."""
    found = None if profile is None else frames.once(("counts", profile), lambda: counts(frames, profile))
    if found is None or found.empty:
        return
    state, worst = st.session_state, found.iloc[0]
    if state.get("backend") not in set(found["backend"]):
        state["backend"] = worst["backend"]
    checks = list(found.loc[found["backend"] == state["backend"], "check"])
    if state.get("check") not in checks:
        state["check"] = "log_prob_sign" if not worst["failed"] and "log_prob_sign" in checks else checks[0]


def warnings(frames: Frames, profile: Profile | None) -> None:
    """What must not be overlooked, on every page: what is wrong, and whose profile that is."""
    for note in st.session_state[selection.NOTES]:
        st.warning(plain(note, 400), icon=":material/link_off:")
    if len(frames.broken):
        st.caption(f"{plural(len(frames.broken), 'file')} could not be read: Measure, profiles, says why.")
    if profile is None:
        return
    found = frames.once(("wrong", profile), lambda: wrong(frames, profile))
    if len(found):
        with st.container(horizontal=True, vertical_alignment="center", gap="small", key="wrong"):
            words = plain(wrong_in_words(found, len(frames.of(profile))), 900)
            st.error(f"**{words}**. It does not serve there.", icon=":material/gpp_bad:")
            backend, checks = found.iloc[0][["backend", "checks"]]
            at = {"backend": backend, "check": checks[0] if checks else "all"}
            selection.link("correctness", "**See what is wrong**", icon=":material/arrow_forward:", **at)
    if not frames.facts(profile).get("here"):
        words = f"**Another machine's profile**: {plain(frames.label(profile), 200)}. It does not say what holds here."
        st.warning(words, icon=":material/devices_other:")


st.set_page_config(page_title="compiled-logprobs", page_icon=str(FOLDER / "icon.png"), layout="wide")
pages = [
    st.Page(FOLDER / "app_pages" / f"{name}.py", title=title, icon=icon, url_path=name, default=name == "overview")
    for name, (title, icon) in PAGES.items()
]
page = st.navigation(pages, position="hidden")
selection.take_address()
frames = selection.current_frames()
selection.settle(frames)
profile = selection.profile_of(frames)
settle_check(frames, profile)
bar(frames)
warnings(frames, profile)
page.run()
selection.keep_address(next(name for name, each in zip(PAGES, pages, strict=True) if each == page))

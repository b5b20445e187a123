"""The dashboard's frame: the eight pages and how to get from one to another. `server.py` has Streamlit run this."""

import contextlib
import math
from pathlib import Path

import streamlit as st

from compiled_logprobs_dashboard import selection

HERE = Path(__file__).parent
PAGES = {
    "Choose": [("decide", "Decide", ":material/rule:"), ("compare", "Compare", ":material/compare_arrows:")],
    "Look closer": [
        ("throughput", "Throughput", ":material/speed:"),
        ("memory", "Memory", ":material/memory:"),
        ("sign_check", "Sign check", ":material/fact_check:"),
    ],
    "Measure": [
        ("live_gpu", "Live GPU", ":material/monitoring:"),
        ("run", "Run", ":material/play_circle:"),
        ("profiles", "Profiles", ":material/folder_open:"),
    ],
}

for name, text in st.query_params.to_dict().items():
    with contextlib.suppress(ValueError):
        if math.isinf(float(text)):  # a link may say anything, and Streamlit fails on a number that is too large for it
            del st.query_params[name]
            st.rerun()
for key in (selection.PROFILE, selection.MODE, selection.DTYPE, selection.ROWS, selection.VOCAB):
    if key in st.session_state:  # Streamlit forgets on the next page what came from a link; what is set by hand stays
        st.session_state[key] = st.session_state[key]
st.set_page_config(page_title="compiled-logprobs", page_icon=str(HERE / "icon.png"), layout="wide")
st.navigation(
    {
        section: [
            st.Page(HERE / "app_pages" / f"{name}.py", title=title, icon=icon, url_path=name, default=name == "decide")
            for name, title, icon in pages
        ]
        for section, pages in PAGES.items()
    }
).run()

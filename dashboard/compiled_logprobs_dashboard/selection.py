"""What all pages share while somebody looks at them: the profile and shape that are selected, and how a chart is shown.

Selections are widgets in the sidebar whose values are kept in the URL, so that a link leads to what was seen, and so
that they stay from one page to another. Each page calls `current_frames`, `choose_profile` and, where it needs one,
`choose_shape`.
"""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from compiled_logprobs.store.files import Store
from compiled_logprobs.tuning.presets import MODELS
from compiled_logprobs_dashboard import frames as of_stores
from compiled_logprobs_dashboard.charts import drawn
from compiled_logprobs_dashboard.frames import ASKED, Frames, Profile, Shape, dtypes
from compiled_logprobs_dashboard.looks import plain

PROFILE, MODE, DTYPE, ROWS, VOCAB, MODEL = "profile", "mode", "dtype", "rows", "vocab", "model"
"""Keys of the widgets; all but the last are parameters of the URL."""
MOST = 2**31 - 1
"""Of N and V, as the command line takes them."""
OTHER = "another"
CONFIG = {
    "displaylogo": False,
    "showSendToCloud": False,
    "plotlyServerURL": "",
    "scrollZoom": False,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "sendDataToCloud", "sendChartToCloud"],
    "toImageButtonOptions": {"filename": "compiled-logprobs"},
}
"""Of every chart: nothing in it leads elsewhere."""
NO_PROFILES = (
    "No profile is stored yet. `compiled-logprobs profile` measures this machine, the page **Run** does it from "
    "here, and the page **Profiles** takes one that was exported elsewhere."
)


def current_frames() -> Frames:
    """All profiles that are found, as they are now."""
    return _load(tuple((source, store, store.newest()) for source, store in of_stores.sources().items()))


@st.cache_resource(
    max_entries=1, show_spinner="Reading profiles"
)  # not cache_data: nobody writes to them, and copies cost
def _load(state: tuple[tuple[str, Store, int], ...]) -> Frames:
    return of_stores.load({source: store for source, store, _ in state})


def choose_profile(
    frames: Frames, *, key: str = PROFILE, label: str = "Profile", place: Any = None, other_than: Profile | None = None
) -> Profile | None:
    """The profile that is selected in the sidebar; None, with a sentence on the page, where there is none.

    `key` is of the widget and its parameter in the URL; it is in `place`, by default the sidebar, and what it shows at
    first is not `other_than`.
    """
    if frames.environments.empty:
        st.info(NO_PROFILES, title="Nothing measured yet")
        return None
    if len(frames.broken):
        (place or st.sidebar).caption(f"{len(frames.broken)} files could not be read: the page Profiles says why.")
    labels = frames.labels()
    names = list(labels)
    first = next((place for place, name in enumerate(names) if labels[name] != other_than), 0)
    asked = st.session_state.get(key)
    if asked is not None and asked not in labels:  # it was pruned meanwhile
        del st.session_state[key]
    chosen = (place or st.sidebar).selectbox(
        label,
        names,
        index=first,
        key=key,
        bind="query-params",
        help="A device and the versions on it. One is shown at a time.",
    )
    return labels[chosen if chosen in labels else names[first]]


def choose_shape(frames: Frames, profile: Profile, *, dtype: bool = True) -> Shape:
    """The shape that is selected in the sidebar; without a widget for the dtype where a page shows all of them."""
    first = first_shape(frames, profile)
    modes = list(dict.fromkeys([*ASKED, *sorted(frames.decisions["mode"].unique())]))
    bar = st.sidebar
    mode = bar.selectbox(
        "Mode",
        modes,
        index=modes.index(first.mode),
        key=MODE,
        bind="query-params",
        help="forward alone; backward: with gradient; inplace: it overwrites the logits; and what else is asked for.",
    )
    name = st.session_state.get(DTYPE)
    if dtype:
        names = dtypes(frames)
        index = names.index(first.dtype)
        name = bar.selectbox("dtype of the logits", names, index=index, key=DTYPE, bind="query-params")
    rows = bar.number_input(
        "N, rows",
        1,
        MOST,
        first.rows,
        key=ROWS,
        bind="query-params",
        help="Positions: batch times length. N between two powers of two share a decision: see the page Decide.",
    )
    return Shape(mode or first.mode, name or first.dtype, int(rows), _choose_vocab(first.vocab))


def first_shape(frames: Frames, profile: Profile) -> Shape:
    """The shape of a profile to begin with: of a training step with a large vocabulary, as far as it was measured."""
    table = frames.of(profile)
    for column, value in {"mode": "backward", "dtype": "bfloat16", "vocab": MODELS["qwen3"]}.items():
        narrower = table[table[column] == value]
        table = table if narrower.empty else narrower
    if table.empty:
        return Shape("backward", "bfloat16", 512, MODELS["qwen3"])
    row = table.sort_values(["rows", "measured_at"]).iloc[-1]
    return Shape(row["mode"], row["dtype"], min(max(1, int(row["rows"])), MOST), min(max(1, int(row["vocab"])), MOST))


def _choose_vocab(first: int) -> int:
    names = {vocab: name for name, vocab in MODELS.items()}
    place = st.sidebar.container()
    number = int(
        st.sidebar.number_input("V, vocabulary", 1, MOST, first, key=VOCAB, bind="query-params", help="Exact.")
    )
    st.session_state[MODEL] = names.get(number, OTHER)
    place.selectbox("Model", [*MODELS, OTHER], key=MODEL, on_change=_take_model, help="Fills in V, the vocabulary.")
    return number


def _take_model() -> None:
    if (name := st.session_state[MODEL]) in MODELS:
        st.session_state[VOCAB] = MODELS[name]


def select_square(selected: Any) -> None:
    """Select the shape [N, V] of the square that was clicked in a map; in a widget's callback only."""
    points = selected.selection.points
    if points and (place := points[0].get("customdata")):
        # At once, since the chart forgets what is selected as soon as it changes.
        st.session_state[ROWS], st.session_state[VOCAB] = (min(max(1, int(number)), MOST) for number in place[:2])


def chart(
    figure: go.Figure,
    *,
    alt: str,
    key: str,
    table: pd.DataFrame | None = None,
    columns: Mapping[str, Any] | None = None,
    on_select: Any = None,
) -> None:
    """Show `figure` as every chart here is shown, and below it what is in it in another way.

    `alt` says what it shows, in a sentence or two with figures, for those who do not see it; `table` is the same as a
    table, by default what is drawn, with `columns` as its `column_config`.
    """
    options = {} if on_select is None else {"on_select": on_select, "selection_mode": "points"}
    st.plotly_chart(figure, key=key, alt=alt, config=CONFIG, **options)
    with st.expander("As a table"):
        st.caption(plain(alt, 2000))
        shown = drawn(figure) if table is None else table
        st.dataframe(shown, hide_index=True, column_config=columns, key=f"{key}-table", placeholder="–")


def metric(label: str, value: str, beside: str, meaning: str | None = None) -> None:
    """Show a figure in a box, with what it is to be compared with."""
    grey: Any = {"delta_color": "off", "delta_arrow": "off", "border": True, "width": "stretch"}
    st.metric(label, value, plain(beside) or None, help=meaning, **grey)


def download(label: str, content: Any, name: str, mime: str) -> None:
    """Show a button that saves `content`, or what it returns when it is pressed, as a file of that name."""
    icon = ":material/download:"
    st.download_button(label, content, file_name=name, mime=mime, icon=icon, on_click="ignore")


def say_left_out(reasons: list[str]) -> None:
    """Say why something is not drawn; of many reasons the first ten."""
    for reason in [*reasons[:10], *([f"{len(reasons) - 10} more."] if len(reasons) > 10 else [])]:
        st.caption(f"Not drawn: {plain(reason, 400)}")

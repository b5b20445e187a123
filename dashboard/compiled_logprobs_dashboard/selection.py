"""What all pages share while somebody looks at them: the tables, the profile and shape that are selected, how a chart is shown.

Selections are widgets in the sidebar whose values are kept in the URL, so that a link leads to what was seen, and so that they
stay from one page to another. Each page calls `tables`, `choose_profile` and, where it needs one, `choose_shape`.
"""

import threading
import time
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import pandas as pd
import plotly.graph_objects as go
import streamlit as st
from platformdirs import user_cache_path

from compiled_logprobs.tuning.presets import MODELS
from compiled_logprobs_dashboard import data, index
from compiled_logprobs_dashboard.index import Source, Tables
from compiled_logprobs_dashboard.looks import plain

PROFILE, MODE, DTYPE, ROWS, VOCAB, MODEL = "profile", "mode", "dtype", "rows", "vocab", "model"
"""Keys of the widgets; all but the last are parameters of the URL."""
OTHER = "another"
LOOK_AGAIN_S = 60.0
"""After which it is also asked whether somebody has written over a file in place, which no folder tells."""
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
    "No profile is stored yet. `compiled-logprobs profile` measures this machine, the page **Run** does it from here, and the "
    "page **Profiles** takes one that was exported elsewhere."
)


class Reading(threading.Thread):
    """Reads the tables, whatever becomes of the page that asked for them: a click does not make it start anew."""

    def __init__(self, found: list[Source]) -> None:
        super().__init__(name="profiles", daemon=True)
        self.progress = 0, 0
        self.tables: Tables | None = None
        self.error: Exception | None = None
        self._found = found
        self.start()

    def run(self) -> None:
        """Of the thread."""
        try:
            self.tables = index.load(self._found, cache_folder(), self._report)
        except Exception as error:  # noqa: BLE001 - raised where the tables are asked for
            self.error = error

    def _report(self, done: int, of: int) -> None:
        self.progress = done, of


class _Shelf:
    """The tables that were read last, for all sessions."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: object = None
        self._at = 0.0
        self._reading: Reading | None = None

    def reading(self) -> Reading:
        with self._lock:
            found = index.sources()
            key = found, index.signature(found)
            under_way = self._reading is not None and self._reading.is_alive()
            if not under_way and (key != self._key or self._has_changed(found)):
                self._key, self._at = key, time.monotonic()
                self._reading = Reading(found)
            assert self._reading is not None
            return self._reading

    def _has_changed(self, found: list[Source]) -> bool:
        """Whether what was read last is no more what the files hold, although no folder says so."""
        if self._reading is None or self._reading.tables is None:
            return True
        if time.monotonic() - self._at <= LOOK_AGAIN_S:
            return False
        self._at = time.monotonic()
        return index.state(found) != self._reading.tables.state


@st.cache_resource(show_spinner=False)
def _shelf() -> _Shelf:
    return _Shelf()


def cache_folder() -> Any:
    """Where the indices are kept."""
    return user_cache_path("compiled-logprobs") / "dashboard"


def read_ahead() -> None:
    """Begin to read the profiles, before anybody looks."""
    _shelf().reading()


def tables() -> Tables:
    """All profiles that are found, as they are now. Shows how far it is where that takes a while."""
    reading = _shelf().reading()
    reading.join(0.2)
    if reading.is_alive():
        place = st.empty()
        while reading.is_alive():
            done, of = reading.progress
            share = done / of if of else 0.0
            place.progress(
                share, f"Reading profiles: {done:,} of {of:,} decisions. Only new ones are read the next time."
            )
            reading.join(0.25)
        place.empty()
    if reading.error is not None:
        raise reading.error
    assert reading.tables is not None
    return reading.tables


class Profile(NamedTuple):
    """What is looked at: one environment of one source."""

    source: str
    environment: str


def choose_profile(
    found: Tables, *, key: str = PROFILE, label: str = "Profile", place: Any = None, other_than: Profile | None = None
) -> Profile | None:
    """The profile that is selected in the sidebar; None, with a sentence on the page, where there is none.

    Args:
        found: where from.
        key: of the widget and its parameter in the URL.
        label: what the widget is called.
        place: where the widget is; by default the sidebar.
        other_than: not to be what is selected at first.
    """
    if found.environments.empty:
        st.info(NO_PROFILES, title="Nothing measured yet")
        return None
    if len(found.broken):
        (place or st.sidebar).caption(f"{len(found.broken)} files could not be read: the page Profiles says why.")
    labels = data.profile_labels(found)
    names = list(labels)
    first = next((n for n, name in enumerate(names) if labels[name] != other_than), 0)
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
    return Profile(*labels[chosen if chosen in labels else names[first]])


def choose_shape(
    found: Tables, profile: Profile, *, rows: bool = True, vocab: bool = True, mode: bool = True, dtype: bool = True
) -> data.Shape:
    """The shape that is selected in the sidebar. What a page does not need gets no widget, and keeps the value that it had."""
    modes, dtypes = data.modes(found), data.dtypes(found)
    first = data.first_shape(found, *profile)
    bar = st.sidebar
    asked = {key: st.session_state.get(key) for key in (MODE, DTYPE, ROWS, VOCAB)}
    shape = first._replace(**{key: value for key, value in asked.items() if value is not None})
    if mode:
        chosen = bar.selectbox(
            "Mode",
            modes,
            index=modes.index(first.mode),
            key=MODE,
            bind="query-params",
            help="forward alone; backward: with the gradient; inplace: the gradient over the logits; entropy: with the entropy.",
        )
        shape = shape._replace(mode=chosen or first.mode)
    if dtype:
        chosen = bar.selectbox(
            "dtype of the logits", dtypes, index=dtypes.index(first.dtype), key=DTYPE, bind="query-params"
        )
        shape = shape._replace(dtype=chosen or first.dtype)
    if rows:
        number = bar.number_input(
            "N, rows",
            1,
            data.MOST,
            first.rows,
            key=ROWS,
            bind="query-params",
            help="Positions: batch times length. N between two powers of two share a decision: see the page Decide.",
        )
        shape = shape._replace(rows=int(number))
    if vocab:
        shape = shape._replace(vocab=_choose_vocab(first.vocab))
    return shape


def _choose_vocab(first: int) -> int:
    names = {vocab: name for name, vocab in MODELS.items()}
    place = st.sidebar.container()
    number = int(
        st.sidebar.number_input("V, vocabulary", 1, data.MOST, first, key=VOCAB, bind="query-params", help="Exact.")
    )
    st.session_state[MODEL] = names.get(number, OTHER)
    place.selectbox("Model", [*MODELS, OTHER], key=MODEL, on_change=_take_model, help="Fills in V, the vocabulary.")
    return number


def _take_model() -> None:
    if (name := st.session_state[MODEL]) in MODELS:
        st.session_state[VOCAB] = MODELS[name]


def select_square(selected: Any) -> None:
    """Let the square that was clicked in a map, of which each carries [N, V], be the shape; in a widget's callback only."""
    points = selected.selection.points
    if points and (found := points[0].get("customdata")):
        # At once, since the chart forgets what is selected as soon as it changes.
        st.session_state[ROWS], st.session_state[VOCAB] = (min(max(1, int(one)), data.MOST) for one in found[:2])


def chart(
    figure: go.Figure,
    *,
    alt: str,
    key: str,
    table: pd.DataFrame | None = None,
    columns: Mapping[str, Any] | None = None,
    on_select: Any = "ignore",
    selection_mode: Literal["points", "box", "lasso"] = "points",
    **options: Any,
) -> Any:
    """Show `figure` as every chart here is shown, and below it what is in it in another way.

    Args:
        figure: without a background of its own, so that it fits light and dark.
        alt: what it shows, in a sentence or two with figures, for those who do not see it.
        key: of the widget.
        table: the same as a table; by default what is drawn.
        columns: how the table's columns are shown, as `column_config` of `st.dataframe`.
        on_select: as of `st.plotly_chart`.
        selection_mode: the same.
        options: more for `st.plotly_chart`.
    """
    if on_select != "ignore":
        options |= {"on_select": on_select, "selection_mode": selection_mode}
    selected = st.plotly_chart(figure, key=key, alt=alt, config=CONFIG, **options)
    with st.expander("As a table"):
        st.caption(plain(alt, 2000))
        shown = data.drawn(figure) if table is None else table
        st.dataframe(shown, hide_index=True, column_config=columns, key=f"{key}-table", placeholder="–")
    return selected

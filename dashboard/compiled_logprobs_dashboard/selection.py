"""What is selected, in widgets and in the address; links that keep it; how a chart and a table are shown.

The address always carries the selection. Where it is not as we wrote it last, somebody followed a link or went back:
then it says what is selected. Else the widgets do, and the address follows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import streamlit as st
import torch

from compiled_logprobs.problem import MODES, RESULTS, Problem, as_it_lies, short_name
from compiled_logprobs.store.files import Store
from compiled_logprobs.tuning import presets
from compiled_logprobs.tuning.presets import MODELS
from compiled_logprobs_dashboard import frames as of_stores
from compiled_logprobs_dashboard.charts import drawn
from compiled_logprobs_dashboard.frames import Frames, Profile
from compiled_logprobs_dashboard.humanize import size
from compiled_logprobs_dashboard.looks import plain, plain_line

PAGES = {
    "overview": ("Overview", ":material/dashboard:"),
    "shape": ("Shape", ":material/straighten:"),
    "correctness": ("Correctness", ":material/fact_check:"),
    "measure": ("Measure", ":material/speed:"),
}
MOST = 2**31 - 1
"""Of N and V, as the command line takes them."""
HERE = "here"
"""In place of a profile, where nothing was measured on this machine."""
OPTIONS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": "number"},
    "temperature-a-token": {"temperature": "per_token"},
    "slice": {"layout": "slice"},
    "rows": {"layout": "rows"},
    **{name.replace("_", "-"): {name: True} for name in RESULTS},
    "masked": {"masked_logits": True},
    "unaligned": {"aligned": False},
    **{name.replace("_", "-"): {name: True} for name in ("weight_grad", "bias", "softcap")},
}
"""What a call can be beside its mode, by its name in links: fields of its problem."""
VALUED: dict[str, tuple[str, Callable[[str], Any]]] = {
    "labels": ("labels_per_row", presets.labels_of),
    "out": ("out_dtype", presets.dtype_of),
    "hidden": ("hidden", presets.hidden_of),
    "within": ("memory_limit", presets.memory_of),
}
"""Those with a value behind a hyphen: from hidden states of a size is one of them."""
WORDS = {
    "temperature": "temperature (a number)",
    "temperature-a-token": "temperature a token",
    "slice": "slice, as logits[:, :-1]",
    "rows": "gaps between rows",
    "sum-p-squared": "sum of p²",
    "masked": "masked logits",
    "unaligned": "not 16-byte aligned",
}
MODE_WORDS = {"forward": "forward only", "backward": "training: with gradient", "inplace": "training: in place"}
METRICS = ("time", "tokens/s", "GB/s", "% of roof", "memory")


def fields_of(option: str) -> dict[str, Any]:
    """The fields of a problem that `option` stands for. Raises ValueError if it is none."""
    kind, hyphen, value = option.partition("-")
    if hyphen and kind in VALUED:
        field, parse = VALUED[kind]
        return {field: parse(value)}
    return OPTIONS[_one_of(*OPTIONS)(option)]


def options_of(problem: Problem) -> list[str]:
    """The options that make `problem` of its mode."""
    usual, found = as_it_lies(problem._replace(aligned=True)), []
    for name, fields in OPTIONS.items():
        has = all(getattr(problem, field) == value for field, value in fields.items())
        found += [name] if has and (name != "unaligned" or usual.aligned) else []
    for name, (field, _) in VALUED.items():
        value = getattr(problem, field)
        if value != Problem._field_defaults[field]:
            found.append(f"{name}-{short_name(value) if field == 'out_dtype' else value}")
    return found


def _one_of(*valid: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in valid:
            raise ValueError(f"{text!r:.60} is none of {', '.join(valid)}")
        return text

    return parse


SELECTED: dict[str, Callable[[str], Any]] = {
    "profile": str,
    "vocab": lambda text: str(presets.vocab_of(text)),
    "rows": presets.rows_of,
    "dtype": lambda text: short_name(presets.dtype_of(text)),
    "mode": presets.mode_of,
    "options": lambda text: text if fields_of(text) else "",
}
"""On every page: the key of the widget, which is the parameter in the address, and from its text to its value."""
THIS = ("shape", "undecided")
"""What a link to Measure can ask for; only that link, so that none of those that keep the selection does."""
OF_PAGE: dict[str, dict[str, Callable[[str], Any]]] = {
    "overview": {"tab": _one_of("shapes", "compare"), "filter": str, "sides": str},
    "shape": {"metric": _one_of(*METRICS), "along": _one_of("N", "V"), "free": float},
    "correctness": {"backend": str, "check": str},
    "measure": {"part": _one_of("run", "machine", "profiles"), "this": _one_of(*THIS)},
}
FIRST = {"tab": "shapes", "filter": [], "metric": METRICS[0], "along": "N", "part": "run"}
SEVERAL = ("options", "filter", "sides")
WRITTEN, SEEN, NOTES, FOLLOWED = "_written", "_seen", "_notes", "_followed"
"""In the state: the address as written, the widgets then, what is wrong with a link; whether one was followed."""


def take_address() -> None:
    """At the start of a run: let the address say what is selected, where it is not as it was written last."""
    state, asked = st.session_state, {name: st.query_params.get_all(name) for name in st.query_params}
    known = {name: parse for part in (SELECTED, *OF_PAGE.values()) for name, parse in part.items()}
    state[NOTES] = []
    is_touched = any(state.get(name, value) != value for name, value in state.get(SEEN, {}).items())
    for name in known:
        if name in state:  # Streamlit forgets what no widget of this page shows
            state[name] = state[name]
    state[FOLLOWED] = not is_touched and asked != state.get(WRITTEN)
    if not state[FOLLOWED]:
        return
    state.pop("this", None)
    for name in asked.keys() & known.keys():
        try:
            values = [known[name](text[:200]) for text in asked[name] if text]
        except (ValueError, OverflowError) as error:
            state[NOTES].append(f"The link's {name}: {error}")
            continue
        if name in SEVERAL:
            state[name] = values
        elif values:
            state[name] = values[-1]
    if "page" in asked:
        pages = ", ".join(title for title, _ in PAGES.values())
        state[NOTES].append(f"There is no page {asked['page'][-1]!r:.60}; these there are: {pages}.")


def keep_address(page: str) -> None:
    """At the end of a run: have the address carry what is selected."""
    state = st.session_state
    seen = {name: state[name] for name in (*SELECTED, *OF_PAGE[page]) if state.get(name) is not None}
    written = {
        name: [str(one) for one in value] or [""] if name in SEVERAL else [str(value)] for name, value in seen.items()
    }
    if written != {name: st.query_params.get_all(name) for name in st.query_params}:
        st.query_params.from_dict(written)
    state[WRITTEN], state[SEEN] = written, seen


def _parameters(page: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Of a link that keeps what is selected, there, too, but for `changes`: so that one step back leads from there."""
    state = st.session_state
    names = [name for name in (*SELECTED, *OF_PAGE[page]) if name != "this" and state.get(name) is not None]
    kept = {name: state[name] for name in names}
    return {name: value or [""] if name in SEVERAL else str(value) for name, value in (kept | dict(changes)).items()}


def link(page: str, label: str, *, icon: str | None = None, **changes: Any) -> None:
    """Show a link to a page, with what is selected but for `changes`."""
    st.page_link(f"app_pages/{page}.py", label=label, icon=icon, query_params=_parameters(page, changes))


def go_to(page: str, **changes: Any) -> None:
    """Go to a page, with what is selected but for `changes`."""
    st.switch_page(f"app_pages/{page}.py", query_params=_parameters(page, changes))


def as_selected(problem: Problem) -> dict[str, Any]:
    """The changes that select `problem`."""
    vocab, rows = str(problem.vocab), min(max(1, problem.rows), MOST)
    shape = {"vocab": vocab, "rows": rows, "dtype": short_name(problem.dtype), "mode": problem.mode}
    return {**shape, "options": options_of(problem)}


# The profile and the shape


def current_frames() -> Frames:
    """All profiles that are found, as they are now."""
    return _load(tuple((source, store, store.newest()) for source, store in of_stores.sources().items()))


@st.cache_resource(max_entries=1, show_spinner="Reading profiles")  # not cache_data: nobody writes to them
def _load(state: tuple[tuple[str, Store, int], ...]) -> Frames:
    return of_stores.load({source: store for source, store, _ in state})


def profile_of(frames: Frames) -> Profile | None:
    """The profile that is selected; None where nothing was measured on this machine, and no other was chosen."""
    return frames.profiles.get(st.session_state.get("profile", HERE))


def settle(frames: Frames) -> None:
    """Select what nobody has selected, or what is not there: this machine's profile, and a shape that it decided."""
    state, named, is_here = st.session_state, frames.profiles, bool(frames.environments["here"].any())
    asked = state.get("profile")
    if asked not in named and (asked != HERE or is_here):
        if asked not in (None, HERE):
            state[NOTES].append(f"There is no profile {asked!r:.60} here; the box above has those that there are.")
        state["profile"] = next(iter(named)) if is_here else HERE
    is_other = state.get(SEEN, {}).get("profile", state["profile"]) != state["profile"]
    if is_other and not (state[FOLLOWED] and "free" in st.query_params):
        state["free"] = None  # of the device that was looked at before
    profile = profile_of(frames)
    table = frames.decisions.iloc[:0] if profile is None else frames.of(profile)
    for column, value in {"mode": "backward", "dtype": "bfloat16", "vocab": MODELS["qwen3"]}.items():
        narrower = table[table[column] == value]  # a training step with a large vocabulary, if that was measured
        table = table if narrower.empty else narrower
    first = Problem("cpu", 4096, MODELS["qwen3"], torch.bfloat16, needs_grad=True)
    if len(table):
        first = table.sort_values(["rows", "measured_at"])["problem"].iloc[-1]
    for name, value in {**FIRST, **as_selected(first)}.items():
        state.setdefault(name, value)


def shape_of(frames: Frames, profile: Profile | None) -> Problem:
    """The problem that is selected, on the device of the profile."""
    state = st.session_state
    device = ("cpu" if profile is None else frames.facts(profile).get("device_type")) or "cpu"
    fields: dict[str, Any] = dict(MODES[state["mode"]])
    for option in state["options"]:
        fields |= fields_of(option)
    problem = Problem(device, int(state["rows"]), int(state["vocab"]), getattr(torch, state["dtype"]), **fields)
    return problem if "unaligned" in state["options"] else as_it_lies(problem)


def choose_shape(frames: Frames, profile: Profile | None) -> Problem:
    """The widgets of the shape, in one row."""
    state = st.session_state
    stored = frames.decisions if profile is None else frames.of(profile)
    models = {str(vocab): name for name, vocab in MODELS.items()}
    vocabs = dict.fromkeys([*models, *map(str, sorted(stored["vocab"].unique())[:200]), state["vocab"]])
    dtypes = dict.fromkeys([*map(short_name, presets.DTYPES), state["dtype"]])
    named = {text: f"{models[text]} ({int(text):,})" if text in models else text for text in vocabs}
    typed: Any = {"accept_new_options": True, "on_change": _take_vocab, "args": (state["vocab"],)}
    typed |= {"format_func": lambda text: named.get(text, text), "width": 210}
    typed |= {"help": "The vocabulary: a model, its id on Hugging Face, or a number."}
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        st.selectbox("Model, or V", list(vocabs), key="vocab", **typed)
        st.number_input("N, tokens", 1, MOST, key="rows", help="Positions: batch times length.", width=150)
        st.selectbox("dtype", list(dtypes), key="dtype", width=140)
        st.selectbox("Mode", list(MODES), key="mode", format_func=MODE_WORDS.__getitem__, width=240)
        known, say = dict.fromkeys([*OPTIONS, *state["options"]]), "What else the call asks for, or how its logits lie."
        more: Any = {"placeholder": "none", "help": say, "width": 460}
        words = WORDS | {one: f"within {size(int(one[7:]))}" for one in known if one.startswith("within-")}
        more |= {"format_func": lambda option: words.get(option, option.replace("-", " "))}
        st.multiselect("Options", list(known), key="options", **more)
    return shape_of(frames, profile)


def _take_vocab(before: str) -> None:
    """Make a number of what was typed, or take it back."""
    state = st.session_state
    try:
        state["vocab"] = str(presets.vocab_of(str(state["vocab"] or before).replace(",", "").replace("_", "").strip()))
    except ValueError as error:
        state["vocab"] = before
        st.toast(plain(error), icon=":material/error:")


# How things are shown

CONFIG = {
    "displaylogo": False,
    "showSendToCloud": False,
    "plotlyServerURL": "",
    "scrollZoom": False,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "sendDataToCloud", "sendChartToCloud"],
    "toImageButtonOptions": {"filename": "compiled-logprobs"},
}
"""Of every chart: nothing in it leads elsewhere."""


def chart(figure: go.Figure, *, alt: str, key: str, selects: bool = False) -> list[Any]:
    """Show `figure`, or what is in it as a table where the switch says so; returns what a click on it means.

    `alt` says what it shows, in a sentence or two with figures, for those who do not see it.
    """
    if st.session_state.get("as_tables"):
        st.caption(plain(alt, 2000))
        st.dataframe(drawn(figure), hide_index=True, key=f"{key}-table", placeholder="–")
        return []
    options: dict[str, Any] = {"on_select": "rerun", "selection_mode": "points"} if selects else {}
    event = st.plotly_chart(figure, key=key, alt=alt, config=CONFIG, **options)
    return [point.get("customdata") for point in event.selection.points] if selects else []


def table(
    content: pd.DataFrame,
    *,
    alt: str,
    key: str,
    columns: Mapping[str, Any] | None = None,
    height: int = 10_000,
    selects: bool = False,
) -> int | None:
    """Show a table of at most `height` pixels; returns the place of the row that is selected, if one is."""
    options: dict[str, Any] = {"on_select": "rerun", "selection_mode": "single-row"} if selects else {}
    options |= {"height": min(38 + 35 * max(1, len(content)), height), "column_config": columns, "placeholder": "–"}
    event = st.dataframe(content, hide_index=True, key=key, alt=alt, **options)
    rows = event.selection.rows if selects else []
    return rows[0] if rows and rows[0] < len(content) else None


def switch(label: str, words: Mapping[str, str] | Sequence[str], key: str) -> str:
    """One of several, the first by default; the address carries it."""
    named = words if isinstance(words, Mapping) else {word: word for word in words}
    options: dict[str, Any] = {"format_func": named.__getitem__, "required": True, "label_visibility": "collapsed"}
    return st.segmented_control(label, list(named), key=key, **options) or next(iter(named))


def download(label: str, content: Any, name: str, mime: str) -> None:
    """Show a button that saves `content`, or what it returns when it is pressed, as a file of that name."""
    st.download_button(label, content, file_name=name, mime=mime, icon=":material/download:", on_click="ignore")


def say_left_out(reasons: Sequence[str]) -> None:
    """Say why something is not drawn; of many reasons the first few."""
    if reasons:
        more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        st.caption(f"Not drawn: {plain('; '.join(reasons[:3]), 900)}{more}.")


def nothing_here(frames: Frames) -> None:
    """Say that nothing was measured on this machine, and what can be done: measured, or looked at elsewhere."""
    words = "The first call of a new shape measures it, unless that is forbidden; a run measures many at once."
    st.info(f"{words} No profile of another machine stands in for that.", title="Nothing was measured on this machine")
    words = "**Measure this machine**: the preset quick takes minutes"
    link("measure", words, icon=":material/play_arrow:", part="run")
    for name, profile in list(frames.profiles.items())[:20]:
        label = plain(plain_line(frames.label(profile), 120))
        link("overview", f"Look at another machine's profile: {label}", icon=":material/devices_other:", profile=name)

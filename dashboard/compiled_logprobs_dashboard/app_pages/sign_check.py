"""Sign check: what each check came to by backend, dtype and input, and how far off the errors are."""

from collections.abc import Sequence
from functools import partial

import pandas as pd
import streamlit as st
from compiled_logprobs_dashboard import selection
from compiled_logprobs_dashboard.charts import sign_check as charts
from compiled_logprobs_dashboard.frames import Frames
from compiled_logprobs_dashboard.looks import VERDICTS, plain, plain_line
from compiled_logprobs_dashboard.tables import sign_check as tables
from compiled_logprobs_dashboard.tables.sign_check import ALL, KINDS, UNITS, Checked, Matrix

from compiled_logprobs.check.report import MEANING

OVERVIEW, MATRIX = "checks_overview", "checks_matrix"
# Keys of the widgets that say which verdict is looked at.
BACKEND, DTYPE, CHECK, INPUT = "check_backend", "check_dtype", "check_name", "check_input"
TOKENS = {
    "row": st.column_config.NumberColumn("row", help="Of N."),
    "token": st.column_config.NumberColumn(
        "token", help="The label whose log-probability it is, or the logit whose gradient. An entropy has none."
    ),
    "float64": st.column_config.TextColumn("in float64"),
    "error": st.column_config.NumberColumn("error", format="%.4g", help="Infinite where only one of both is a number."),
}


def show() -> None:
    """The page."""
    st.title("Sign check")
    frames = selection.current_frames()
    profile = selection.choose_profile(frames)
    if profile is None:
        return
    shape = selection.choose_shape(frames, profile, dtype=False)
    by_dtype, broken = tables.gather(frames, profile, shape)
    for why in broken:
        st.error(plain(why), title="A decision cannot be read")
    asked = f"N {shape.rows}, V {shape.vocab}, {plain(shape.mode)}"
    if not by_dtype:
        st.info(f"Nothing was checked in this profile for {asked}.", title="Not checked")
        return
    st.caption(
        f"{asked}, every dtype. What the gate found on the device before anything was timed; all of it is stored."
    )
    for checked in by_dtype:
        if not checked.exact:
            st.caption(
                f"{plain(checked.dtype)}: for exactly this problem nothing is stored; shown is the nearest, N "
                f"{checked.decision.problem.rows}."
            )
    whole = tables.overview(by_dtype)
    if whole.empty:
        st.info("The decisions are stored without verdicts of the checks, so that it is not known what they came to.")
        return
    _summary(whole, by_dtype)
    details = tables.by_input(by_dtype)
    only_failures = _filter(whole)
    _overview(whole, only_failures)
    _without_details(by_dtype)
    if not details.empty:
        _matrix(details, only_failures)
    _one_verdict(whole, details)
    _errors(frames, by_dtype)
    _tokens(by_dtype)
    _recorded(by_dtype)


def _summary(whole: pd.DataFrame, decisions: Sequence[Checked]) -> None:
    failed = whole[tables.has_failed(whole)]
    if failed.empty:
        checked = sorted({plain_line(name, 40) for name in whole.loc[whole["verdict"] == "pass", "backend"]})
        st.success(f"No check failed. Passed by: {plain(', '.join(checked))}.", icon=":material/verified:")
        return
    for backend, part in failed.groupby("backend", sort=False):
        verdicts = {row.verdict for row in part.itertuples()}
        names = ", ".join(dict.fromkeys(part["check"]))
        dtypes = ", ".join(dict.fromkeys(part["dtype"]))
        what = f"FAIL: {names}" if "fail" in verdicts else f"could not be checked: {part['detail'].iloc[0]}"
        st.error(plain(f"{backend} ({dtypes}): {what}", 600), icon=":material/gpp_bad:")
    if any(checked.decision.short_check for checked in decisions):
        st.caption("Some of these are from the short check, which has fewer inputs.")


def _filter(whole: pd.DataFrame) -> bool:
    """Whether only failures are shown: at first where there are some."""
    some = bool(tables.has_failed(whole).any())
    return st.toggle(
        "Only failures", value=some, key="only_failures", bind="query-params", help="FAIL and error, in what follows."
    )


def _kept(table: pd.DataFrame, only_failures: bool) -> pd.DataFrame:
    return table[tables.has_failed(table)] if only_failures else table


def _overview(whole: pd.DataFrame, only_failures: bool) -> None:
    st.subheader("By backend and dtype")
    part = _kept(whole, only_failures)
    text = tables.in_words(part)
    st.caption(f"{plain(text)} The worst over all inputs. A click on a cell shows its values.")
    if part.empty:
        st.info("No check failed: switch off **Only failures** to see all of them.")
        return
    _grid(tables.matrix(part, ["backend", "dtype"], "check"), OVERVIEW, CHECK, text)


def _matrix(details: pd.DataFrame, only_failures: bool) -> None:
    st.subheader("By kind of input")
    part = _kept(details, only_failures)
    if part.empty:
        st.info("No check failed with any input.")
        return
    with st.container(horizontal=True):
        for column, label in (("backend", "Backends"), ("dtype", "dtypes")):
            chosen = st.multiselect(
                label,
                list(dict.fromkeys(part[column])),
                key=f"matrix_{column}",
                placeholder="All",
                format_func=lambda name: plain_line(name, 40),
            )
            part = part[part[column].isin(chosen)] if chosen else part
    text = tables.in_words(part)
    st.caption(f"{plain(text)} Empty: that input does not put it to the test.")
    if not part.empty:
        _grid(tables.matrix(part, ["backend", "dtype", "check"], "input"), MATRIX, INPUT, text)


def _grid(matrix: Matrix, key: str, across: str, text: str) -> None:
    st.session_state[f"{key}-shown"] = matrix
    st.dataframe(
        matrix.shown.style.map(_tint),
        hide_index=True,
        key=key,
        on_select=partial(_take, key, across),
        selection_mode="single-cell",
        alt=text,
        column_config={"backend": st.column_config.TextColumn("backend", pinned=True)},
        height=min(640, 38 + 35 * len(matrix.shown)),
    )


def _tint(value: object) -> str:
    """Words and glyphs say it all; the colour only helps to find them."""
    if value in (VERDICTS["fail"], VERDICTS["error"]):
        return "background-color: rgba(213,94,0,0.30); font-weight: bold"
    return "background-color: rgba(0,158,115,0.12)" if value == VERDICTS["pass"] else ""


def _take(key: str, across: str) -> None:
    """Let the clicked cell be the verdict that is looked at."""
    matrix = st.session_state.get(f"{key}-shown")
    if not isinstance(matrix, Matrix):
        return
    for row, column in st.session_state[key].selection.cells:
        if 0 <= row < len(matrix.keys):
            of = matrix.keys.iloc[row]
            st.session_state[BACKEND], st.session_state[DTYPE] = of["backend"], of["dtype"]
            st.session_state[CHECK] = of.get("check", st.session_state.get(CHECK))
            if across == CHECK:
                st.session_state[INPUT] = ALL
            if column in matrix.across:
                st.session_state[across] = matrix.across[column]


def _one_verdict(whole: pd.DataFrame, details: pd.DataFrame) -> None:
    st.subheader("One verdict")
    both = pd.concat([whole, details], ignore_index=True) if len(details) else whole
    with st.container(horizontal=True):
        for key, column, label in (
            (BACKEND, "backend", "Backend"),
            (DTYPE, "dtype", "dtype"),
            (CHECK, "check", "Check"),
            (INPUT, "input", "Input"),
        ):
            both = _narrowed(both, key, column, label)
    row = both.iloc[0]
    words = VERDICTS[row["verdict"]]
    st.markdown(f"**{plain(words)}**: {plain(MEANING.get(row['check'], row['check']))}.")
    with st.container(horizontal=True):
        for label, value in (("Worst that was seen", row["figure"]), ("Limit", row["limit"])):
            st.metric(label, "none" if pd.isna(value) else f"{value:.4g}", border=True, width="stretch")
    if row["detail"]:
        st.write(plain(row["detail"], 600))


def _narrowed(table: pd.DataFrame, key: str, column: str, label: str) -> pd.DataFrame:
    """A widget for the values of `column` that are left, and what is left of the table."""
    values = list(dict.fromkeys(table[column]))
    failed = table.loc[tables.has_failed(table), column]
    if st.session_state.get(key) not in values:
        st.session_state[key] = failed.iloc[0] if len(failed) else values[0]
    chosen = st.selectbox(label, values, key=key, format_func=lambda name: plain_line(name, 60))
    return table[table[column] == chosen]


def _without_details(decisions: Sequence[Checked]) -> None:
    for checked in decisions:
        if checked.missing:
            st.info(
                f"{plain(checked.dtype)}: this profile tells only the worst of each check, and no details by input: "
                f"{plain(checked.missing)}. It is older, or was carried here without its evidence. `compiled-logprobs "
                "profile --again` measures it anew.",
                title="No details stored",
            )
    for dtype, names in tables.without_details([checked for checked in decisions if not checked.missing]).items():
        st.caption(f"{plain(dtype)}: no details by input are stored of {plain(', '.join(names))}.")


def _errors(frames: Frames, decisions: Sequence[Checked]) -> None:
    table = tables.errors(decisions)
    if table.empty:
        return
    st.subheader("How far off")
    dtypes, kinds = list(dict.fromkeys(table["dtype"])), list(dict.fromkeys(table["what"]))
    with st.container(horizontal=True):
        dtype = st.selectbox("dtype of the errors", dtypes, key="errors_dtype")
        what = st.selectbox("Result", kinds, key="errors_what", format_func=lambda kind: KINDS.get(kind, kind))
    part = table[(table["dtype"] == dtype) & (table["what"] == what)]
    if part.empty:
        st.info(f"No errors of the {KINDS[what]} are stored for {plain(dtype)}.")
        return
    st.caption(
        "Absolute errors against float64. Thin: all values; thick: the middle 90 %; the mark: the median; the grey "
        "bar: the limit of the largest error, which comes from what plain torch makes of the same kind of input."
        + (
            " Quantiles of a gradient are of a sample of its values; its largest error is of all."
            if what == "gradient"
            else ""
        )
    )
    inputs = list(dict.fromkeys(part["input"]))
    selection.chart(
        charts.ranges(part, what, among=frames.backends),
        alt=charts.in_words(part, what),
        key="error-ranges",
        table=part,
    )
    chosen = st.selectbox("Input", inputs, key="errors_input")
    of_input = part[part["input"] == chosen]
    selection.chart(
        charts.shares(of_input, what, among=frames.backends),
        alt=f"Share of the values by error, for the input {plain_line(chosen, 40)!r}. "
        f"{charts.in_words(of_input, what)} Dashed: the limits.",
        key="error-shares",
        table=of_input,
    )


def _tokens(decisions: Sequence[Checked]) -> None:
    table = tables.tokens(decisions)
    if table.empty:
        return
    st.subheader("The worst tokens")
    kinds = list(dict.fromkeys(tables.errors(decisions)["what"]))
    what = st.segmented_control(
        "Of", kinds, default=kinds[0], key="tokens_what", format_func=lambda kind: KINDS.get(kind, kind), required=True
    )
    part = table[table["what"] == what]
    of = st.multiselect(
        "Of which backends",
        list(dict.fromkeys(part["backend"])),
        key="tokens_backends",
        placeholder="All",
        format_func=lambda name: plain_line(name, 40),
    )
    part = part[part["backend"].isin(of)] if of else part
    st.caption(f"The largest errors of each backend, dtype and input, {UNITS.get(str(what), '')}; largest first.")
    st.dataframe(
        part.drop(columns="what").assign(backend=part["backend"].map(lambda name: plain_line(name, 60))),
        hide_index=True,
        column_config=TOKENS,
        key="tokens",
        alt="The tokens that are most off",
    )


def _recorded(decisions: Sequence[Checked]) -> None:
    table = tables.recorded(decisions)
    if table.empty:
        return
    st.subheader("Recorded, and no failure")
    st.caption(
        "Whether the same call gives the same bits twice, and whether a row's bits stay the same whatever N it came "
        "with."
    )
    st.dataframe(table, hide_index=True, key="recorded", alt="Repeatable and row invariant, by backend and dtype")


show()

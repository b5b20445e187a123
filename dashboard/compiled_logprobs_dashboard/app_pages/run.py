"""Run: measure which backend is fastest on this machine, from here; see how far it is, and end it."""

import time
from collections.abc import Callable
from typing import Any, get_args

import streamlit as st
import torch
from compiled_logprobs_dashboard import runs, selection
from compiled_logprobs_dashboard.looks import plain, plain_line
from compiled_logprobs_dashboard.runs import ProfileRun, Request, preflight
from compiled_logprobs_dashboard.tables.run import Seen, decided, losses, outlook, over, standings

from compiled_logprobs.backends import backends
from compiled_logprobs.decision import short
from compiled_logprobs.errors import LogProbsError
from compiled_logprobs.machine.environment import fingerprint_of
from compiled_logprobs.problem import MODES, Layout, Temperature, short_name
from compiled_logprobs.tuning import presets

REFRESH_S = 1.0
DTYPES = [short_name(dtype) for dtype in presets.DTYPES]
PRESETS = {
    "quick": "One vocabulary and one N.",
    "standard": "Two vocabularies, a few N.",
    "rl": "What a trainer calls, for one vocabulary: slices, a temperature, in place, with the entropy.",
    "full": "Every vocabulary, dtype and mode, many N: hours.",
}
ENTROPY = {"without": False, "with": True}
HEADINGS = {
    "running": "A run is going on",
    "stopping": "The run is ending",
    "finished": "The last run has finished",
    "cancelled": "The last run was cancelled",
    "died": "The last run ended before it was done",
}


def in_words(seconds: float) -> str:
    """A time that is no more exact than an estimate."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def in_gib(number: int | None) -> str:
    return "n/a" if number is None else f"{number / 2**30:.2f} GiB"


def numbers(texts: list[str], convert: Callable[[str], int]) -> tuple[int, ...]:
    return tuple(convert(text.strip()) for text in texts)


def several(label: str, options: list[str], **more: Any) -> list[str]:
    """What is chosen of `options`."""
    more.setdefault("placeholder", "as in the preset")
    chosen: list[str] = st.multiselect(label, options, key=f"run_{label.lower()}", **more)
    return chosen


def asked() -> Request | None:
    """The form; None where something in it is not valid, which is then said."""
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    left, right = st.columns(2)
    with left:
        preset = st.segmented_control("Preset", list(PRESETS), default="quick", required=True, key="run_preset")
        preset = preset or "quick"
        st.caption(PRESETS[preset])
        device = st.selectbox("Device", devices, index=len(devices) - 1 if len(devices) > 1 else 0, key="run_device")
        budget = st.number_input(
            "Seconds for each problem",
            min_value=1,
            max_value=3600,
            value=None,
            placeholder="as in the preset",
            key="run_budget",
            help="For timing, once all is compiled and checked. Fewer rows are timed where it would take longer; the "
            "result says so. What was left undecided gets more when it is measured again.",
        )
        again = st.checkbox("Measure also what is stored already", key="run_again")
    with right:
        base = presets.PRESETS[preset]
        vocabs = several(
            "Vocabulary",
            list(presets.MODELS),
            accept_new_options=True,
            help="V: a model, its id on Hugging Face, or a number.",
            format_func=lambda text: f"{text} ({presets.MODELS[text]})" if text in presets.MODELS else text,
        )
        numbers_of_rows = [str(n) for n in base.rows(device.partition(":")[0])]
        rows = several("Rows", numbers_of_rows, accept_new_options=True, help="N: how many positions; type a number.")
        dtypes = several("Dtype", DTYPES)
        modes = several("Mode", list(MODES))
        temperatures = several("Temperature", list(get_args(Temperature)), help="For all rows, or one a token.")
        layouts = several("Layout", list(get_args(Layout)), help="slice: as logits[:, :-1]; rows: with gaps between.")
        entropy = several("Entropy", list(ENTROPY))
        names = several("Backends", backends(), placeholder="all", help="eager is always measured beside them.")
    try:
        return Request(
            device=device,
            preset=preset,
            vocabs=numbers(vocabs, presets.vocab_of),
            rows=numbers(rows, presets.rows_of),
            dtypes=tuple(dtypes),
            modes=tuple(modes),
            temperatures=tuple(temperatures),
            layouts=tuple(layouts),
            entropy=tuple(ENTROPY[name] for name in entropy),
            backends=tuple(names),
            budget_s=None if budget is None else float(budget),
            again=again,
        )
    except LogProbsError as error:
        st.error(plain(error))
        return None


def seconds_before(device: str) -> list[float]:
    """What problems took in this environment before."""
    try:
        table = selection.current_frames().decisions
        return list(table.loc[table["environment"] == fingerprint_of(torch.device(device)), "tuning_seconds"].dropna())
    except (LogProbsError, RuntimeError):
        return []


def form(running: bool) -> None:
    """What to measure, what that would mean, and the button."""
    st.subheader("Before you start")
    request = asked()
    if request is None:
        return
    check = preflight(request, seconds_before=seconds_before(request.device))
    largest = "" if check.largest is None else plain(short(check.largest))
    likely = "nothing was measured here before"
    if check.likely_seconds is not None:
        likely = f"as before: about {in_words(check.likely_seconds)}"
    figures = [
        ("Problems to measure", str(check.to_measure), f"{len(check.problems)} in all, {check.stored} stored already"),
        ("At most about", in_words(check.most_seconds), likely),
        ("Largest logits", in_gib(check.logits_bytes), f"{largest}; needs {in_gib(check.needed_bytes)}"),
        ("Free memory", in_gib(check.free_bytes), f"on {plain(request.device)}"),
    ]
    for column, (label, value, caption) in zip(st.columns(4), figures, strict=True):
        column.metric(label, value)
        column.caption(caption)
    for sentence in check.warnings:
        st.warning(plain(sentence, 1000))
    for sentence in check.obstacles:
        st.error(plain(sentence, 1000))
    st.caption("The same in a terminal:")
    st.code(request.command_line(), language="bash", wrap_lines=True)
    nothing = check.to_measure == 0
    disabled = running or nothing or bool(check.obstacles)
    if st.button("Start", type="primary", key="run_start", disabled=disabled, icon=":material/play_arrow:"):
        try:
            runs.RUNS.start(request)
        except LogProbsError as error:
            st.error(plain(error, 1000))
        else:
            st.rerun()
    if running:
        st.caption("One run at a time: this one can start when the other is over.")
    elif nothing:
        st.caption("All of this is stored already. Tick the box above to measure it again.")


def show_run(run: ProfileRun) -> None:
    """How a run stands, and what it found."""
    status, seen = run.status(), run.seen()
    st.subheader(HEADINGS[status])
    st.caption(plain(run.request.command_line(), 1000))
    if status in ("running", "stopping"):
        show_progress(run, seen)
        if st.button("Cancel", key="run_cancel", disabled=status == "stopping", icon=":material/stop:"):
            run.cancel()
            st.rerun(scope="app")
        st.caption(
            "What is finished is kept, also if you cancel or close this page. It ends with the dashboard."
            if status == "running"
            else "It keeps what is finished, and ends."
        )
    else:
        open_ = sum(not decision.is_decided for decision in seen.decisions)
        st.write(
            f"{len(seen.decisions) - open_} of {len(seen.problems)} problems decided; {seen.measured} were measured by "
            f"this run.{f' Undecided: {open_}; measured again, they get more time.' if open_ else ''}"
        )
        if status == "died":
            st.error(
                f"It ended by itself, with exit code {run.process.returncode}. What was finished before is kept. What "
                "it said last is below."
            )
    show_results(run, seen)


def show_progress(run: ProfileRun, seen: Seen) -> None:
    elapsed = time.time() - run.started_at
    view = outlook(seen, run.request.seconds + runs.READY_S, elapsed)
    left = ""
    if view.seconds_left is not None:
        left = f", {'about' if view.measured else 'at most about'} {in_words(view.seconds_left)} left"
    total = len(seen.problems)
    st.progress(
        view.share, text=f"{seen.finished} of {total} problems after {in_words(elapsed)}{left}" if total else "starting"
    )
    if seen.current is not None:
        st.write(f"{plain(short(seen.current))}: {plain(seen.doing)}")


def show_results(run: ProfileRun, seen: Seen) -> None:
    if seen.decisions:
        st.markdown("**Leaderboard**")
        times = st.column_config.NumberColumn(format="%.2fx")
        st.dataframe(
            standings(seen.decisions),
            hide_index=True,
            key="run_standings",
            column_config={f"median speed-up over {over(seen.decisions)}": times},
        )
        st.markdown("**Winners**")
        figure = st.column_config.NumberColumn(format="%.3f")
        st.dataframe(
            decided(seen.decisions),
            hide_index=True,
            key="run_winners",
            column_config={"a call, ms": figure, "extra memory, MiB": figure},
        )
    if seen.losses:
        st.markdown("**What failed**")
        st.dataframe(losses(seen.losses), hide_index=True, key="run_losses")
    with st.expander("Log", expanded=False):
        st.code("\n".join(plain_line(line) for line in seen.log) or "nothing yet", language=None, height=300)
        said = run.said().strip()
        if said:
            st.caption("On standard error:")
            st.code("\n".join(plain_line(line) for line in said.splitlines()), language=None, height=200)


st.title("Run a profile")
st.write("Measures which backend is right and fastest here, and stores what it finds with your profiles.")
running = runs.RUNS.is_measuring


@st.fragment(run_every=REFRESH_S if running else None)
def show(run: ProfileRun) -> None:
    """How the run stands, again and again while it goes on."""
    show_run(run)
    if running and not run.is_running:
        st.rerun(scope="app")


if runs.RUNS.latest is not None:
    show(runs.RUNS.latest)
form(running)

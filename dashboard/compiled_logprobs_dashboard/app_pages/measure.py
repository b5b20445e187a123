"""Measure: a run from here, what the machine is doing, and the profiles that are stored."""

import time
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any

import streamlit as st
import torch
from compiled_logprobs_dashboard import carry, runs, selection
from compiled_logprobs_dashboard.frames import Frames, Profile
from compiled_logprobs_dashboard.humanize import duration, in_one_line, plural, size
from compiled_logprobs_dashboard.looks import plain, plain_line
from compiled_logprobs_dashboard.machine import look_at, look_at_host
from compiled_logprobs_dashboard.progress import Seen, outlook
from compiled_logprobs_dashboard.runs import ProfileRun, Request, preflight
from compiled_logprobs_dashboard.tables import measure as tables
from compiled_logprobs_dashboard.tables.shape import request_of

from compiled_logprobs.backends import backends
from compiled_logprobs.errors import LogProbsError
from compiled_logprobs.machine.environment import fingerprint_of
from compiled_logprobs.machine.nvml import Gpu, NoTelemetry, gpus
from compiled_logprobs.problem import RESULTS, short_name
from compiled_logprobs.tuning import presets

PARTS = {"run": "Run", "machine": "This machine", "profiles": "Profiles"}
REFRESH_S, LOOK_S = 1.0, 2.0
PRESETS = {
    "quick": "One vocabulary and one N.",
    "standard": "Two vocabularies, a few N.",
    "rl": "What a trainer calls, for one vocabulary: slices, a temperature, in place, with the entropy.",
    "full": "Every vocabulary, dtype and mode, many N: hours.",
}
MODELS = {name: f"{name} ({vocab:,})" for name, vocab in presets.MODELS.items()}
TEMPERATURES = {"none": "none", "number": "number", "per_token": "one a token"}
# Label, known values with their words, how a value is read, and what it means; a string here would be shown.
FORM: dict[str, tuple[str, Any, Any, str]] = {
    "vocabs": ("Vocabulary", MODELS, presets.vocab_of, "V: a model, its id on Hugging Face, or a number."),
    "rows": ("N, tokens", {}, presets.rows_of, "How many positions; type a number."),
    "dtypes": ("dtype", {name: name for name in map(short_name, presets.DTYPES)}, str, "Of the logits."),
    "modes": ("Mode", selection.MODE_WORDS, str, "In place: the gradient is written over the logits."),
    "temperatures": ("Temperature", TEMPERATURES, str, "In the call."),
    "layouts": ("Layout", dict.fromkeys(presets.FEWEST_ROWS), str, "slice: as logits[:, :-1]; rows: with gaps."),
    "labels": ("Labels a position", {}, presets.labels_of, "K; type a number."),
    "hidden": ("Hidden size", {}, presets.hidden_of, "From hidden states instead of logits; type a number."),
    "memory_limits": ("Memory limit", {}, presets.memory_of, "From hidden states; type such as 512MiB."),
}
SWITCHED = (*RESULTS, "masked", *runs.FROM_HIDDEN_SWITCHES)
SWITCHES = {
    f"{'' if on else 'without '}{name.replace('_', ' ')}": (name, on) for name in SWITCHED for on in (True, False)
}
HEADINGS = {
    "running": "A run is going on",
    "stopping": "The run is ending",
    "finished": "The last run has finished",
    "cancelled": "The last run was cancelled",
    "died": "The last run ended before it was done",
}
BUSY = "The share of the last moments in which a kernel was running; one small kernel will do."
number, text, bar = st.column_config.NumberColumn, st.column_config.TextColumn, st.column_config.ProgressColumn
DEVICES = {
    "memory %": bar("memory", format="%.0f %%", min_value=0, max_value=100, help="By processes, not only by torch."),
    "memory": text("in use"),
    "busy %": bar("busy", format="%.0f %%", min_value=0, max_value=100, help=BUSY),
    "power %": bar("power", format="%.0f %%", min_value=0, max_value=100),
    "power": text("of its limit"),
    "°C": number("°C", format="%d"),
}


def show() -> None:
    """The page."""
    frames = selection.current_frames()
    with st.container(horizontal=True, vertical_alignment="center"):
        st.title("Measure")
        part = selection.switch("Part", PARTS, "part")
    running = runs.RUNS.is_measuring
    if part == "machine":
        st.fragment(_machine, run_every=None if running else LOOK_S)()  # looking takes a little from what is measured
    elif part == "profiles":
        carry.show(frames)
    else:
        if runs.RUNS.latest is not None:
            st.fragment(_run, run_every=REFRESH_S if running else None)(runs.RUNS.latest, running)
        _form(frames, running)


# A run


def _form(frames: Frames, running: bool) -> None:
    """What to measure, what that would mean, and the button."""
    if st.session_state[selection.FOLLOWED] and "this" in st.session_state:
        _fill_in(frames, selection.profile_of(frames))
    request = _asked()
    if request is None:
        return
    check = preflight(request, seconds_before=_seconds_before(frames, request.device))
    of = f", {check.stored:,} of {len(check.problems):,} stored already" if check.stored else ""
    likely = "" if check.likely_seconds is None else f", as before about {duration(round(check.likely_seconds))}"
    parts = [f"**{plural(check.to_measure, 'problem')} to measure**{of}"]
    parts += [f"at most about {duration(round(check.most_seconds))}{likely}"] if check.to_measure else []
    if check.largest is not None:
        free = f"{size(check.free_bytes)} are free on {plain(request.device)}"
        parts.append(f"the largest, {plain(in_one_line(check.largest))}, needs {size(check.needed_bytes)}; {free}")
    st.markdown("; ".join(parts) + ".")
    for show, sentences in ((st.warning, check.warnings), (st.error, check.obstacles)):
        for sentence in sentences:
            show(plain(sentence, 1000))
    disabled = running or not check.to_measure or bool(check.obstacles)
    with st.container(horizontal=True, vertical_alignment="center"):
        if st.button("Start", type="primary", key="run_start", disabled=disabled, icon=":material/play_arrow:"):
            _start(request)
        st.code(request.command_line(), language="bash", wrap_lines=True)
    if running:
        st.caption("One run at a time: this one can start when the other is over.")
    elif not check.to_measure:
        st.caption("All of this is stored already. Tick 'again' to measure it once more; what was stored is kept.")


def _start(request: Request) -> None:
    try:
        runs.RUNS.start(request)
    except LogProbsError as error:
        st.error(plain(error, 1000))
    else:
        st.rerun()


def _fill_in(frames: Frames, profile: Profile | None) -> None:
    """Ask for the shape that is selected, or for all that is undecided and has the same options as the first."""
    state, problems = st.session_state, [selection.shape_of(frames, profile)]
    is_open = state["this"] == "undecided" and profile is not None
    if is_open and profile is not None:
        problems = [problem for problem, done in frames.of(profile)[["problem", "is_decided"]].values if not done]
    requests = [request for problem in problems if (request := request_of(problem)) is not None]
    if not requests:
        return
    grid: dict[str, Any] = dict.fromkeys(("vocabs", "rows", "dtypes", "modes"), ())
    requests = [one for one in requests if replace(one, **grid) == replace(requests[0], **grid)]
    if is_open and len(requests) < len(problems):
        st.caption(f"{len(requests):,} of {plural(len(problems), 'undecided problem')}; the others have other options.")
    for name in FORM:  # of what is decided between them nothing is measured again
        state[f"run_{name}"] = list(dict.fromkeys(str(value) for one in requests for value in getattr(one, name)))
    state["run_others"] = [words for words, (name, on) in SWITCHES.items() if on in getattr(requests[0], name)]
    state["run_again"] = not is_open


def _asked() -> Request | None:
    """The form; None where something in it is not valid, which is then said."""
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    columns = st.columns(3)
    with columns[0]:
        words = " ".join(f"{name}: {says}" for name, says in PRESETS.items())
        preset, last = st.selectbox("Preset", list(PRESETS), key="run_preset", help=words), len(devices) - 1
        device = st.selectbox("Device", devices, index=min(1, last), key="run_device")
        words = "eager is always measured beside them. Your own: type package.module:Class."
        own: Any = {"placeholder": "all", "accept_new_options": True, "help": words}
        names = st.multiselect("Backends", backends(), key="run_backends", **own)
        words = "For timing, once all is compiled and checked. What was left undecided gets more when measured again."
        usual: Any = {"placeholder": f"{presets.PRESETS[preset].budget_s:.0f}, as in the preset", "help": words}
        budget = st.number_input("Seconds for each problem", 1, 3600, None, key="run_budget", **usual)
    chosen: dict[str, list[str]] = {}
    known_rows = map(str, presets.PRESETS[preset].rows(device.partition(":")[0]))
    for place, (name, (label, known, _, meaning)) in enumerate(FORM.items()):
        known = dict.fromkeys(known_rows) if name == "rows" else known
        chosen[name] = columns[1 if place < 5 else 2].multiselect(
            label,
            list(known),
            key=f"run_{name}",
            format_func=partial(lambda words, value: words.get(value) or value, known),
            placeholder="as in the preset",
            accept_new_options=name in ("vocabs", "rows", "labels", "hidden", "memory_limits"),
            help=meaning,
        )
    preset_or: Any = {"placeholder": "as in the preset", "help": "Or not; masked: regions of the vocabulary are -inf."}
    others = columns[2].multiselect("Also asked for", list(SWITCHES), key="run_others", **preset_or)
    again = columns[0].checkbox("Measure again what is stored", key="run_again")
    pairs = [SWITCHES[words] for words in others]
    switches = {name: tuple(on for of, on in pairs if of == name) for name in SWITCHED}
    try:
        values = {name: tuple(FORM[name][2](value.strip()) for value in values) for name, values in chosen.items()}
        seconds = None if budget is None else float(budget)
        more: dict[str, Any] = {**values, **switches, "backends": tuple(names), "budget_s": seconds, "again": again}
        return Request(device, preset, **more).valid()
    except LogProbsError as error:
        st.error(plain(error, 600))
        return None


def _seconds_before(frames: Frames, device: str) -> list[float]:
    """What problems took in this environment before."""
    try:
        table = frames.decisions
        return list(table.loc[table["environment"] == fingerprint_of(torch.device(device)), "tuning_seconds"].dropna())
    except (LogProbsError, RuntimeError):
        return []


def _run(run: ProfileRun, was_running: bool) -> None:
    """How a run stands, and what it found."""
    status, seen = run.status(), run.seen()
    if was_running and not run.is_running:
        st.rerun(scope="app")
    with st.container(border=True):
        st.subheader(HEADINGS[status])
        st.caption(plain(run.request.command_line(), 1000))
        if status in ("running", "stopping"):
            _progress(run, seen)
            stopping, words = status == "stopping", "What is finished is kept, also if you close this page."
            if st.button("Cancel", key="run_cancel", disabled=stopping, icon=":material/stop:", help=words):
                run.cancel()
                st.rerun(scope="app")
        else:
            _outcome(run, seen, died=status == "died")
        if seen.decisions:
            columns, found = {"ms": number("a call, ms")}, tables.decided(seen.decisions)
            selection.table(found, alt="Decided", key="run_winners", columns=columns, height=320)
        if seen.losses:
            selection.table(tables.losses(seen.losses), alt="What failed", key="run_losses", height=200)
        with st.expander("Log"):
            st.code("\n".join(plain_line(line) for line in seen.log) or "nothing yet", language=None, height=300)
            if said := run.said().strip():
                st.caption("On standard error:")
                st.code("\n".join(plain_line(line) for line in said.splitlines()), language=None, height=200)


def _outcome(run: ProfileRun, seen: Seen, *, died: bool) -> None:
    """What came of a run that is over, and what can be done next."""
    open_ = sum(not decision.is_decided for decision in seen.decisions)
    decided = f"{len(seen.decisions) - open_} of {plural(len(seen.problems), 'problem')} decided"
    st.write(f"{decided}; {seen.measured:,} were measured by this run.")
    if died:
        code = f"It ended by itself, with exit code {run.process.returncode}."
        st.error(f"{code} What was finished before is kept. What it said last is below.")
    if open_:
        words = f"**{plural(open_, 'problem')} undecided**: the rounds did not tell which backend is fastest."
        st.warning(words, icon=":material/question_mark:")
        if st.button("Again, with more time: three times what it took", key="run_longer", icon=":material/replay:"):
            _start(replace(run.request, again=False))
    if seen.decisions:
        where = {"profile": fingerprint_of(torch.device(run.request.device))}
        last = selection.as_selected(seen.decisions[-1].problem)
        selection.link("shape", "Look at the last of them", icon=":material/arrow_forward:", **where, **last)


def _progress(run: ProfileRun, seen: Seen) -> None:
    elapsed = time.time() - run.started_at
    view = outlook(seen, run.request.seconds + runs.READY_S, elapsed)
    left = "" if view.seconds_left is None else f", about {duration(round(view.seconds_left))} left"
    said = f"{seen.finished} of {plural(len(seen.problems), 'problem')} after {duration(round(elapsed))}{left}"
    st.progress(view.share, text=said if seen.problems else "starting")
    if seen.current is not None:
        st.write(f"{plain(in_one_line(seen.current))}: {plain(seen.doing)}")


# The machine


@st.cache_resource(ttl=60)  # again now and then: a driver may have been loaded, or a GPU lost
def _gpus() -> list[Gpu] | NoTelemetry:
    return gpus()


def _machine() -> None:
    """A row a GPU, and the processes on them, again and again."""
    found = _gpus()
    if isinstance(found, NoTelemetry):
        st.info(f"No NVIDIA GPU is reported on here: {plain(found.reason)}.")
    looks = [] if isinstance(found, NoTelemetry) else look_at(found)
    devices = tables.devices(looks, look_at_host())
    selection.table(devices, alt="A row a GPU, and the CPU", key="devices", columns=DEVICES)
    processes, silent = tables.processes(looks)
    if len(processes):
        selection.table(processes, alt="Processes that compute on the GPUs", key="processes", height=300)
    if silent:
        st.caption(f"Processes are not told to this user by {plain(', '.join(silent), 400)}.")
    often = "not again while a run measures" if runs.RUNS.is_measuring else f"every {LOOK_S:.0f} s"
    st.caption(f"Seen at {datetime.now():%H:%M:%S}, {often}.")


show()

"""Profile runs: what to know before one is started, and one run at a time, as a child of this server.

A run writes its events to a file, so that it goes on whatever becomes of a tab, and any page can tell how it stands. It
ends with the server; what it has finished by then is stored.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from filelock import BaseFileLock, FileLock, Timeout
from platformdirs import user_state_path

from compiled_logprobs.backends import EAGER, backends, backends_for, is_built_in
from compiled_logprobs.choose.tune import current, limit_again
from compiled_logprobs.errors import InputError, LogProbsError
from compiled_logprobs.machine import clock
from compiled_logprobs.machine.environment import fingerprint_of
from compiled_logprobs.machine.nvml import telemetry
from compiled_logprobs.problem import RESULTS, Problem, bucket
from compiled_logprobs.store import user_store
from compiled_logprobs.store.files import Store
from compiled_logprobs.tuning import presets
from compiled_logprobs.tuning.sizes import BUFFERS, SHARE_OF_FREE_MEMORY
from compiled_logprobs.tuning.tuner import alone_on
from compiled_logprobs_dashboard.humanize import in_one_line, size
from compiled_logprobs_dashboard.progress import Seen

START_S = 15.0
"""About what it takes until the first problem begins, and to begin a worker program: torch is imported twice."""
READY_S = 15.0
"""About what it takes at most to import, compile and check the candidates of a problem."""
DISK_A_PROBLEM = 2**18
"""Bytes that a decision and what stands beside it take at most, about."""
BUSY_SHARE = 0.25
"""Of the device: what more than this keeps busy would show in the figures."""
GRACE_S = (15.0, 5.0)
"""After SIGINT, which has the run keep what is finished and end, and after SIGTERM; then it is killed."""
EVENTS, ERRORS, LOCK = "events.jsonl", "errors.txt", "run.lock"

FROM_HIDDEN_SWITCHES = ("weight_grad", "bias", "softcap")
NAMED: dict[str, Callable[[str], Any]] = {"dtypes": presets.dtype_of, "modes": presets.mode_of}
NAMED |= {"temperatures": presets.temperature_of, "layouts": presets.layout_of}
"""How what a request names is read."""

Status = Literal["running", "stopping", "finished", "cancelled", "died"]


@dataclass(frozen=True)
class Request:
    """What to measure: options of `compiled-logprobs profile`. Empty ones are left to the preset, or mean all."""

    device: str
    preset: str = "quick"
    vocabs: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    temperatures: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    entropy: tuple[bool, ...] = ()
    logsumexp: tuple[bool, ...] = ()
    argmax: tuple[bool, ...] = ()
    sum_p_squared: tuple[bool, ...] = ()
    masked: tuple[bool, ...] = ()
    hidden: tuple[int, ...] = ()
    weight_grad: tuple[bool, ...] = ()
    bias: tuple[bool, ...] = ()
    softcap: tuple[bool, ...] = ()
    memory_limits: tuple[int, ...] = ()
    backends: tuple[str, ...] = ()
    budget_s: float | None = None
    """For each problem; None: as the preset says."""
    again: bool = False

    @property
    def seconds(self) -> float:
        """For each problem."""
        return presets.PRESETS[self.preset].budget_s if self.budget_s is None else self.budget_s

    def problems(self) -> list[Problem]:
        """The problems of the run, each bucket of N once, in its order. Raises InputError for what is not valid."""
        named = {name: getattr(self, name) for name in presets.FIELDS}
        named |= {name: [parse(text) for text in named[name]] for name, parse in NAMED.items()}
        return list(dict.fromkeys(map(bucket, presets.grid(self.device.partition(":")[0], self.preset, **named))))

    def valid(self) -> "Request":
        """Itself. Raises InputError for what is not valid, before a program finds that out."""
        self.problems()
        for text in self.backends:
            is_named = is_built_in(text) or text in backends()
            if not is_named and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", text):
                valid = f"{', '.join(backends())}, or package.module:Class of your own is valid"
                raise InputError(f"got backend {text!r:.80}; {valid}.")
        return self

    def arguments(self) -> list[str]:
        """Of the command line, without those that only say how to report."""
        several: dict[str, Sequence[object]] = {"vocab": self.vocabs, "rows": self.rows, "dtype": self.dtypes}
        several |= {"mode": self.modes, "layout": self.layouts, "labels": self.labels, "backend": self.backends}
        several["temperature"] = [name.replace("_", "-") for name in self.temperatures]
        several |= {"hidden": self.hidden, "memory-limit": self.memory_limits}
        several["budget"] = [] if self.budget_s is None else [f"{self.budget_s:g}"]
        named = [f"--{option}={','.join(map(str, values))}" for option, values in several.items() if values]
        switches = {name.replace("_", "-"): getattr(self, name) for name in (*RESULTS, "masked", *FROM_HIDDEN_SWITCHES)}
        named += [f"--{'' if on else 'no-'}{name}" for name, values in switches.items() for on in values]
        start = ["profile", f"--device={self.device}", f"--preset={self.preset}"]
        return [*start, *named, *(["--again"] if self.again else [])]

    def command_line(self) -> str:
        """What to type for the same run in a terminal."""
        return shlex.join(["compiled-logprobs", *self.arguments()])


# Before a run


@dataclass(frozen=True)
class Preflight:
    """What a run would be like. None where this machine does not tell."""

    problems: tuple[Problem, ...]
    stored: int
    """How many of them are stored already, and would not be measured again."""
    most_seconds: float
    likely_seconds: float | None
    """By what problems took here before; None where none was measured."""
    largest: Problem | None
    """The problem with the most logits."""
    needed_bytes: int
    """That its inputs, its gradient and what is taken beside them need."""
    free_bytes: int | None
    warnings: tuple[str, ...]
    obstacles: tuple[str, ...]
    """Why it cannot be started."""

    @property
    def to_measure(self) -> int:
        return len(self.problems) - self.stored


def preflight(request: Request, *, seconds_before: Sequence[float] = (), store: Store | None = None) -> Preflight:
    """What the run would be like here, by the seconds that problems took before. Nothing is measured or written.

    Raises InputError if the request is not valid.
    """
    device = torch.device(request.device)
    store = user_store() if store is None else store
    problems = request.valid().problems()
    named = [EAGER, *request.backends] if request.backends else []
    known = {} if request.again else {p: current(store, p, device, named or backends_for(p)) for p in problems}
    left = [what for what in problems if known.get(what) is None]
    before = [store.read(fingerprint_of(device), what) for what in left]
    limits = [request.seconds if decision is None else limit_again(decision, request.seconds) for decision in before]
    to_measure, stored = len(left), len(problems) - len(left)
    largest = max(problems, key=_logits_bytes, default=None)
    needed = 0 if largest is None else (BUFFERS + largest.needs_grad + 1) * _logits_bytes(largest)
    free = _free_bytes(device)
    warnings = _busy(device)
    if largest is not None and free is not None and needed > SHARE_OF_FREE_MEMORY * free:
        warnings.append(
            f"{in_one_line(largest)} needs {size(needed)}, and the run takes at most {SHARE_OF_FREE_MEMORY:.0%} of the "
            f"{size(free)} that are free: fewer rows will be timed, and the result says so."
        )
    each = min(request.seconds + READY_S, statistics.median(seconds_before)) if seconds_before else None
    return Preflight(
        problems=tuple(problems),
        stored=stored,
        most_seconds=START_S + sum(limits) + READY_S * to_measure,
        likely_seconds=None if each is None else START_S + to_measure * each,
        largest=largest,
        needed_bytes=needed,
        free_bytes=free,
        warnings=tuple(warnings),
        obstacles=tuple(_obstacles(store.root, to_measure)),
    )


def _logits_bytes(problem: Problem) -> int:
    return problem.rows * problem.vocab * problem.dtype.itemsize


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cpu":
        return clock.free_memory(device)
    # Through the driver's library: torch would take some of the GPU's memory to answer, for as long as the dashboard
    # lives.
    seen = telemetry(device).snapshot()
    return None if seen is None else seen.memory_free_bytes  # the total holds what the driver keeps for itself


def _busy(device: torch.device) -> list[str]:
    """What else uses the device now."""
    notes = []
    with alone_on(device, 0) as alone:
        if not alone:
            notes.append(f"Another process of this library is measuring on {device} now; the run would wait for it.")
    if device.type == "cpu":
        cores, load = psutil.cpu_count() or 1, psutil.getloadavg()[0]
        if load > BUSY_SHARE * cores:
            notes.append(
                f"This machine was busy in the last minute: {load:.1f} programs ran or waited, for {cores} cores. "
                "What runs beside the measurement makes it slower and less certain."
            )
    elif (seen := telemetry(device).snapshot()) is not None:
        if seen.processes:
            notes.append(f"Processes that compute on {device} now: {len(seen.processes)}. They would share it.")
        if seen.busy_percent is not None and seen.busy_percent > 100 * BUSY_SHARE:
            notes.append(f"A kernel was running on {device} for {seen.busy_percent} % of the last moments.")
    return notes


def _obstacles(root: Path, problems: int) -> list[str]:
    place = next((folder for folder in (root, *root.parents) if folder.is_dir()), None)
    if place is None or not os.access(place, os.W_OK | os.X_OK):
        return [f"Profiles cannot be written to {root}. Make it writable, or set COMPILED_LOGPROBS_PROFILES."]
    free = shutil.disk_usage(place).free
    if free < problems * DISK_A_PROBLEM:
        return [f"The disk that holds {root} has {size(free)} left. Free some space."]
    return []


# A run


class RunRefused(LogProbsError):
    """A run cannot be started."""


@dataclass
class ProfileRun:
    """A run that was started, be it over or not."""

    request: Request
    process: "subprocess.Popen[bytes]"
    folder: "tempfile.TemporaryDirectory[str]"
    """With what it writes; removed when nobody looks at the run any more."""
    started_at: float = field(default_factory=time.time)
    """Seconds since 1970."""
    is_cancelled: bool = False
    """Whether somebody asked for its end."""
    _seen: Seen = field(default_factory=Seen)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def events(self) -> Path:
        """What it reports, a line an event."""
        return Path(self.folder.name, EVENTS)

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def seen(self) -> Seen:
        """What its events told so far, as a copy: all tabs share this."""
        with self._lock:
            self._seen.read(self.events)
            return self._seen.copy()

    def status(self) -> Status:
        """How it stands."""
        if self.is_running:
            return "stopping" if self.is_cancelled else "running"
        end = self.seen().end
        if end is None:
            return "cancelled" if self.is_cancelled else "died"
        return "cancelled" if end["interrupted"] else "finished"

    def said(self, most: int = 4000) -> str:
        """The last characters that it and foreign code wrote to standard error."""
        return Path(self.folder.name, ERRORS).read_bytes()[-most:].decode("utf-8", "replace")

    def cancel(self) -> threading.Thread:
        """Ask it to end, which keeps what is finished; then insist. Returns at once: a thread sees to it."""
        self.is_cancelled = True
        thread = threading.Thread(target=self._end, name="cancel the run", daemon=True)
        thread.start()
        return thread

    def interrupt(self) -> None:
        """Ask it to end."""
        if self.is_running:
            with contextlib.suppress(OSError):
                self.process.terminate() if os.name == "nt" else self.process.send_signal(signal.SIGINT)

    def _end(self) -> None:
        for end, grace in zip((self.interrupt, self.process.terminate), GRACE_S, strict=True):
            end()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace)
                return
        strays: list[psutil.Process] = []  # its worker program, which it cannot end now
        with contextlib.suppress(psutil.Error):
            strays = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        for stray in strays:
            with contextlib.suppress(psutil.Error):
                stray.kill()


class Runs:
    """The runs of this server: one at a time, and one on this machine by one user."""

    def __init__(self) -> None:
        self.latest: ProfileRun | None = None
        self._lock = threading.Lock()

    @property
    def is_measuring(self) -> bool:
        return self.latest is not None and self.latest.is_running

    def interrupt(self) -> None:
        """Ask a run that is going on to end; for the end of the server."""
        if self.latest is not None:
            self.latest.interrupt()

    def start(self, request: Request) -> ProfileRun:
        """Start a run, and return at once.

        Raises:
            InputError: what is asked for is not valid.
            RunRefused: another run is going on, or the files that this one needs cannot be written.
        """
        request.valid()
        with self._lock:
            try:
                lock = FileLock(user_state_path("compiled-logprobs", ensure_exists=True) / LOCK, thread_local=False)
                lock.acquire(timeout=0)
            except Timeout:
                raise RunRefused("A run is going on already; one at a time. Wait for its end, or cancel it.") from None
            except OSError as error:
                raise _unwritable(error) from error
            try:
                self.latest = _start(request, lock)
            except OSError as error:
                lock.release()
                raise _unwritable(error) from error
            return self.latest


RUNS = Runs()


def _start(request: Request, lock: BaseFileLock) -> ProfileRun:
    folder = tempfile.TemporaryDirectory(prefix="compiled-logprobs-run-", ignore_cleanup_errors=True)
    command = [sys.executable, "-m", "compiled_logprobs", *request.arguments(), "--progress=jsonl"]
    with Path(folder.name, EVENTS).open("wb") as events, Path(folder.name, ERRORS).open("wb") as errors:
        # In a group of its own: Ctrl-C in the dashboard's terminal comes through the dashboard.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=events, stderr=errors, start_new_session=True
        )

    def see_off() -> None:
        process.wait()
        lock.release()

    threading.Thread(target=see_off, name="run", daemon=True).start()
    return ProfileRun(request, process, folder)


def _unwritable(error: OSError) -> RunRefused:
    return RunRefused(f"The run's files cannot be kept in {error.filename}: {error.strerror or error}. Mend that.")

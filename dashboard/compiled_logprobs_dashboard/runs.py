"""One profile run at a time: a process of its own, which outlives a reload, a closed tab and the dashboard itself.

<folder>/latest.json    what was asked for last, when, and the process that does it
<folder>/<id>.jsonl     its events, one a line, as it writes them
<folder>/<id>.txt       what it and foreign code wrote to standard error
<folder>/<id>.exit      its exit code, if a dashboard was there to see it

The run holds a lock from its first to its last moment, however it ends: the lock is taken here, and the process inherits it.
So whoever cannot take the lock knows that a run is going on, and no number of a process can be mistaken for that of another.
The lock lies in the temporary folder of whoever started the run, and latest.json says where, for another's may be another.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from compiled_logprobs.errors import LogProbsError
from compiled_logprobs.problem import Problem, bucket
from compiled_logprobs.tuning import presets as profiling

LATEST = "latest.json"
PATIENCE_S = 0.5
"""For whoever only looks whether the lock is taken."""
GRACE_S = {"SIGINT": 15.0, "SIGTERM": 5.0}
"""After which the next signal follows, SIGKILL at last. The first has the run keep what is finished and end."""
POLL_S = 0.1

_ID = re.compile("[0-9]{8}T[0-9]{6}-[0-9a-f]{8}")
Status = Literal["running", "stopping", "finished", "cancelled", "died"]


class RunRefused(LogProbsError):
    """A run cannot be started."""


@dataclass(frozen=True)
class Request:
    """What to measure: the options of `compiled-logprobs profile`. What is empty is left to the preset, or means all."""

    device: str
    preset: str = "quick"
    vocabs: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    budget_s: float = 60.0
    again: bool = False

    def problems(self) -> list[Problem]:
        """The problems of the run, each bucket of N once, in its order. Raises InputError for what is not valid."""
        grid = profiling.grid(
            self.device.partition(":")[0],
            self.preset,
            vocabs=self.vocabs,
            rows=self.rows,
            dtypes=[profiling.dtype_of(name) for name in self.dtypes],
            modes=[profiling.mode_of(name) for name in self.modes],
        )
        return list(dict.fromkeys(map(bucket, grid)))

    def arguments(self) -> list[str]:
        """Of the command line, without those that only say how to report."""
        several = {
            "--vocab": self.vocabs,
            "--rows": self.rows,
            "--dtype": self.dtypes,
            "--mode": self.modes,
            "--backend": self.backends,
        }
        named = [f"{option}={','.join(map(str, values))}" for option, values in several.items() if values]
        again = ["--again"] if self.again else []
        return [
            "profile",
            f"--device={self.device}",
            f"--preset={self.preset}",
            *named,
            f"--budget={self.budget_s:g}",
            *again,
        ]

    def command_line(self) -> str:
        """What to type for the same run in a terminal."""
        return shlex.join(["compiled-logprobs", *self.arguments()])


@dataclass(frozen=True)
class Job:
    """A run that was started, be it over or not."""

    folder: Path
    id: str
    pid: int
    host: str
    started_at: float
    """Seconds since 1970."""
    request: Request
    lock: str
    """The file that the run holds a lock of."""

    @property
    def events(self) -> Path:
        return self.folder / f"{self.id}.jsonl"

    @property
    def errors(self) -> Path:
        return self.folder / f"{self.id}.txt"

    @property
    def exit_code(self) -> int | None:
        """None while it runs, and where no dashboard saw its end."""
        try:
            return int((self.folder / f"{self.id}.exit").read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None

    @property
    def is_cancelled(self) -> bool:
        """Whether somebody asked for its end."""
        return (self.folder / f"{self.id}.cancel").exists()

    def said(self, most: int = 4000) -> str:
        """The last characters that were written to standard error."""
        try:
            with self.errors.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - most))
                return file.read().decode("utf-8", "replace")
        except OSError:
            return ""


def why_not(folder: Path | None = None) -> str | None:
    """Why no run can be started from here, or followed; None if one can."""
    if os.name != "posix":
        return "Runs are started from here on Linux and macOS only; `compiled-logprobs profile` does the same anywhere."
    folder = state_folder() if folder is None else folder
    job = latest(folder)
    for path in {_lock_path(folder), *([] if job is None else [Path(job.lock)])}:
        try:
            with _lock(path, 0, look=True):
                pass
        except FileNotFoundError:
            continue  # nobody has ever held it, or its temporary folder is gone, and the run with it
        except OSError as error:
            return (
                f"Whether a run is going on cannot be told, since {path} cannot be opened: {error.strerror or error}. If it is "
                "another user's, or no file, have it removed, or set TMPDIR to a folder of your own. `compiled-logprobs profile` "
                "measures without it."
            )
    return None


def state_folder() -> Path:
    """Where the state of this user's runs is kept."""
    from platformdirs import user_state_path

    return user_state_path("compiled-logprobs") / "run"


def start(request: Request, folder: Path | None = None) -> Job:
    """Start a run, and return at once.

    Raises:
        InputError: what is asked for is not valid.
        RunRefused: another run is going on, or this one's state cannot be written.
    """
    folder = state_folder() if folder is None else folder
    if reason := why_not(folder):
        raise RunRefused(reason)
    request.problems()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(_lock_path(folder), PATIENCE_S) as lock:
            before = latest(folder)
            if lock is None or (before is not None and _is_held(before.lock, but=lock)):
                raise RunRefused(
                    "A run is going on already; one at a time can measure. Wait for its end, or cancel it."
                )
            _remove_old(folder)
            return _start(request, folder, lock)
    except OSError as error:
        raise RunRefused(
            f"The run's state cannot be kept in {error.filename or folder}: {error.strerror or error}. Mend that."
        ) from error


def latest(folder: Path | None = None) -> Job | None:
    """The run that was started last on this machine, over or not; None if there is none that can be read."""
    folder = state_folder() if folder is None else folder
    try:
        fields: dict[str, Any] = json.loads((folder / LATEST).read_text(encoding="utf-8"))
        asked: dict[str, Any] = fields.pop("request")
        asked = {name: tuple(value) if isinstance(value, list) else value for name, value in asked.items()}
        request = Request(**asked)
        request.problems()
        job = Job(folder=folder, request=request, **fields)
        right = _ID.fullmatch(job.id) and job.pid > 1 and job.started_at > 0 and request.budget_s > 0
        right = right and os.path.isabs(job.lock) and "\0" not in job.lock
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError, LogProbsError):
        return None
    return job if right and job.host == platform.node() else None  # a home may be shared by machines


def is_running(job: Job) -> bool:
    """Whether it has not ended. Only the latest run can be told about; an earlier one has.

    Where its lock cannot be opened, nothing is known of it, which `why_not` says.
    """
    if os.name != "posix" or not _is_held(job.lock):
        return False
    newest = latest(job.folder)
    return newest is not None and newest.id == job.id


def cancel(job: Job) -> threading.Thread | None:
    """Ask the run to end, which keeps what is finished; then insist. Returns at once: a thread sees to it.

    Pressing twice is harmless. None if it is over.
    """
    if not is_running(job):
        return None
    with contextlib.suppress(OSError):
        (job.folder / f"{job.id}.cancel").touch()
    thread = threading.Thread(target=_end, args=(job,), name="cancel the run", daemon=True)
    thread.start()
    return thread


def _end(job: Job) -> None:
    for name, grace in GRACE_S.items():
        _signal(job, signal.Signals[name])
        until = time.monotonic() + grace
        while time.monotonic() < until:
            if not is_running(job):
                return
            time.sleep(POLL_S)
    _signal(job, signal.SIGKILL)


def _signal(job: Job, number: signal.Signals) -> None:
    """To the run and all of its process group; its worker program is in another, and ends with it."""
    if is_running(job):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(job.pid, number)


def _start(request: Request, folder: Path, lock: int) -> Job:
    name = time.strftime("%Y%m%dT%H%M%S-") + secrets.token_hex(4)
    events, errors = folder / f"{name}.jsonl", folder / f"{name}.txt"
    command = [sys.executable, "-m", "compiled_logprobs", *request.arguments(), "--progress=jsonl"]
    with events.open("wb") as output, errors.open("wb") as said:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,  # a file, not a pipe: a pipe would end the run together with the dashboard
            stderr=said,
            pass_fds=[lock],
            start_new_session=True,  # Ctrl-C in the dashboard's terminal is not for the run
        )
    job = Job(folder, name, process.pid, platform.node(), time.time(), request, str(_lock_path(folder)))
    threading.Thread(target=_see_off, args=(process, folder / f"{name}.exit"), name="run", daemon=True).start()
    fields: dict[str, Any] = asdict(job)
    del fields["folder"]
    new = folder / f"{LATEST}.{secrets.token_hex(4)}.tmp"
    try:
        new.write_text(json.dumps(fields), encoding="utf-8")
        os.replace(new, folder / LATEST)
    except BaseException:  # nobody could find the run, or end it
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return job


def _see_off(process: "subprocess.Popen[bytes]", file: Path) -> None:
    """Wait for the end of the process, which the system keeps until then, and note its exit code."""
    code = process.wait()
    with contextlib.suppress(OSError):
        file.write_text(str(code), encoding="ascii")


def _remove_old(folder: Path) -> None:
    """The files of runs that are over; only the latest is of interest."""
    (folder / LATEST).unlink(missing_ok=True)
    for file in folder.iterdir():
        if file.suffix in (".jsonl", ".txt", ".exit", ".cancel", ".tmp"):
            file.unlink(missing_ok=True)


def _lock_path(folder: Path) -> Path:
    """The file whose lock a run of that folder holds.

    It lies beside other temporary files, for a home can be on a network file system, where locks are not inherited.
    """
    name = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:16]
    return Path(tempfile.gettempdir(), f"compiled-logprobs-run-{name}.lock").absolute()


def _is_held(path: str, *, but: int | None = None) -> bool:
    """Whether a run holds that lock; not if it is the one that was taken here, as the descriptor `but`."""
    try:
        if but is not None and os.path.samestat(os.stat(path), os.fstat(but)):
            return False
        with _lock(Path(path), 0, look=True) as lock:
            return lock is None
    except OSError:
        return False


@contextlib.contextmanager
def _lock(path: Path, within: float, *, look: bool = False) -> Iterator[int | None]:
    """Hold that lock; its descriptor, or None if a run holds it for longer than `within` s. Raises OSError if it is no such file.

    Those who only look whether they could have it do not disturb one another.
    """
    import fcntl

    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (0 if look else os.O_CREAT)
    descriptor = os.open(path, flags, 0o600)
    try:
        until = time.monotonic() + within
        while True:
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_SH if look else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= until:
                    yield None
                    return
                time.sleep(0.02)
            else:
                break
        yield descriptor  # what inherited it goes on holding it when it is closed here
    finally:
        os.close(descriptor)

"""The worker program from outside: start it, listen to it, and end it with all that it started.

Whatever happens in there, nothing worse than `WorkerLost` happens here.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue
from typing import Any, Literal

from compiled_logprobs.machine.environment import without_paths
from compiled_logprobs.policy import MODE_VARIABLE

Event = dict[str, Any]

POLL_S = 0.1
"""Between two looks at whether the process still lives: what it left behind may hold its pipes open."""
GRACE_S = 0.5
"""For the last events of a process that has ended."""
TAIL_LINES, TAIL_CHARACTERS = 20, 2000
"""What is kept of standard error, for the reason of a crash."""
PROCESSES = Path("/proc")
MARK = "COMPILED_LOGPROBS_WORKER"
"""A variable of the environment that all have inherited that the program started, in whatever session they are; but for those
that were given another environment, which `_mark_by_limit` is for."""
SWEEPS = 10
"""How often what is left is looked for, at most: it may start others while it is ended."""
LONGEST_LINE = 2**22
"""Characters of an event; foreign code that finds the pipe cannot fill this process's memory."""


class WorkerLost(Exception):
    """The program crashed, took too long, could not be started, or said what it never says."""

    def __init__(self, outcome: Literal["crashed", "timeout"], reason: str) -> None:
        super().__init__(reason)
        self.outcome = outcome
        self.reason = reason


class Worker:
    """One process of the worker program; a context manager that ends it."""

    def __init__(self) -> None:
        if not sys.executable:
            raise WorkerLost("crashed", "the worker program cannot be started: Python does not know its own executable")
        self._mark = uuid.uuid4().hex
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "compiled_logprobs.tuning.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                # It imports what this process would import, from no other place, and never tunes by itself.
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(dict.fromkeys(_import_path())),
                    "PYTHONSAFEPATH": "1",
                    MODE_VARIABLE: "off",
                    MARK: self._mark,
                },
                text=True,
                encoding="utf-8",
                errors="replace",
                cwd=_folder(),
                start_new_session=True,  # a group of its own, to be killed as one; and Ctrl-C is for the parent
            )
        except OSError as error:
            raise WorkerLost("crashed", f"the worker program cannot be started: {error}") from error
        self._limit = _mark_by_limit(self._process.pid)
        self._lines: Queue[str] = Queue(maxsize=1000)
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._over = False
        threading.Thread(target=self._read_events, daemon=True, name="worker events").start()
        threading.Thread(target=self._read_errors, daemon=True, name="worker errors").start()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def send(self, job: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # if it has ended, `next_event` will notice
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()

    def next_event(self, *, within: float) -> Event:
        """What it says next. WorkerLost if it ends, or says nothing for that many seconds."""
        until = time.monotonic() + within
        ended_at = None
        while True:
            try:
                return _parsed(self._lines.get(timeout=POLL_S))
            except Empty:
                pass
            now = time.monotonic()
            if self._process.poll() is not None:
                ended_at = now if ended_at is None else ended_at
                if now > ended_at + GRACE_S:
                    raise WorkerLost("crashed", self._how_it_ended())
            elif now > until:
                raise WorkerLost("timeout", f"no end after {within:.0f} s")

    def end(self) -> None:
        """Kill the process and all that it started."""
        self._over = True
        with contextlib.suppress(Empty):
            self._lines.get_nowait()  # makes room, so that the thread that fills a full queue gets to see that it is over
        left: set[int] = set()
        if self._process.poll() is None:
            with contextlib.suppress(OSError, AttributeError):  # so that it starts no others; not on Windows
                self._process.send_signal(signal.SIGSTOP)
            left = _descendants(self._process.pid)  # which are nobody's children when it has gone
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        for _ in range(SWEEPS):
            left |= _marked(self._mark, self._limit)
            if not left:
                break
            while left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(left.pop(), signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def _how_it_ended(self) -> str:
        code = self._process.returncode
        # Before it is cut, since half a path is not seen to be one; each line has its own end.
        said = without_paths(" ".join("".join(self._tail).split()))[-TAIL_CHARACTERS:]
        if code >= 0:
            how = f"ended with exit code {code}"
        else:
            names = {s.value: s.name for s in signal.Signals}
            how = f"killed by {names.get(-code, f'signal {-code}')}"
            if code == -signal.SIGKILL:
                how += ", as the system does when memory runs out"
        return f"{how}; it said: {said}" if said else how

    def _read_events(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            while (line := stream.readline(LONGEST_LINE)) and not self._over:
                self._lines.put(line)

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            while line := stream.readline(TAIL_CHARACTERS):
                self._tail.append(line)


def _import_path() -> Iterator[str]:
    """From where this process imports, in absolute paths."""
    for entry in sys.path:
        # Python passes over entries of other types, too; and a variable has no way to tell of those that hold a separator.
        if isinstance(entry, str) and os.pathsep not in entry:
            with contextlib.suppress(FileNotFoundError):  # the current folder is gone, and all in it
                yield os.path.abspath(entry)


def _folder() -> str | None:
    """Where the program is to start, if not in the current folder: in one that was removed, torch cannot be loaded."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return os.sep
    return None


def _descendants(ancestor: int) -> set[int]:
    """The processes that `ancestor` started, and those that these did; on Linux, else none."""
    children: dict[int, list[int]] = {}
    for pid in _pids():
        with contextlib.suppress(OSError, ValueError, IndexError):  # it has ended
            children.setdefault(int(_status(pid)[1]), []).append(pid)
    found: set[int] = set()
    due = [ancestor]
    while due:
        new = set(children.get(due.pop(), [])) - found
        found |= new
        due += new
    return found


def _mark_by_limit(pid: int) -> int | None:
    """Give the process `pid` a limit that no other has, and that all inherit which it starts, in whatever environment; on Linux.

    It is on the time that a process under real-time scheduling may compute without a pause: some ten thousand years and more.
    """
    if sys.platform != "linux":
        return None
    import resource

    limit = 2**59 + secrets.randbits(59)
    with contextlib.suppress(OSError, ValueError):  # it has ended, or a lower limit is set, or it may not be
        _, most = resource.getrlimit(resource.RLIMIT_RTTIME)
        resource.prlimit(pid, resource.RLIMIT_RTTIME, (limit, most))
        return limit
    return None


def _marked(mark: str, limit: int | None) -> set[int]:
    """The processes that live with this mark in their environment, or with this limit; on Linux, else none."""
    marks = {"environ": (f"{MARK}={mark}".encode(), b"\0"), "limits": (str(limit).encode(), None)}
    found = set()
    for pid in _pids():
        for file, (word, separator) in marks.items():
            with contextlib.suppress(OSError, IndexError):  # it has ended, or is another user's
                if word in (PROCESSES / str(pid) / file).read_bytes().split(separator) and not _is_over(pid):
                    found.add(pid)
    return found


def _is_over(pid: int) -> bool:
    """Whether it has ended, and only waits for its parent to ask how; its environment is gone by then, its limits are not."""
    return _status(pid)[0] in (b"Z", b"X")


def _status(pid: int) -> list[bytes]:
    """What follows the name of a process in its status: state, parent, group, session, ..."""
    return (PROCESSES / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()


def _pids() -> list[int]:
    with contextlib.suppress(OSError):
        return [int(name) for name in os.listdir(PROCESSES) if name.isdecimal()]
    return []


def _parsed(line: str) -> Event:
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        raise WorkerLost("crashed", f"wrote {without_paths(line)[:100]!r} where only the worker program writes")
    return event

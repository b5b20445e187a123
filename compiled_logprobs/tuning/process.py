"""The worker program from outside: start it, listen to it, and end it with all that it started.

Candidates run in a process of their own. One that crashes or hangs raises `WorkerLost` here, and nothing worse.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import Empty, Queue
from typing import Any, Literal

import psutil

from compiled_logprobs.machine.environment import without_paths
from compiled_logprobs.policy import MODE_VARIABLE

Event = dict[str, Any]

GRACE_S = 0.5
"""For the last events of a process that has ended."""
END_S = 10.0
"""How long a process that was killed is waited for."""
TAIL_LINES, TAIL_CHARACTERS = 20, 2000
"""What is kept of standard error, for the reason of a crash."""
LONGEST_LINE = 2**22
"""Characters of an event; foreign code that finds the pipe cannot fill this process's memory."""


class WorkerLost(Exception):
    """The program crashed, took too long, could not be started, or said what it never says."""

    def __init__(self, outcome: Literal["crashed", "timeout"], reason: str) -> None:
        super().__init__(reason)
        self.outcome, self.reason = outcome, reason


class Worker:
    """One process of the worker program; a context manager that ends it."""

    def __init__(self) -> None:
        # Python passes over entries of other types; and no variable can hold one with a separator in it.
        entries = (entry for entry in sys.path if isinstance(entry, str) and os.pathsep not in entry)
        folder = _current_folder()
        start = partial(
            subprocess.Popen[str],
            [sys.executable, "-m", "compiled_logprobs.tuning.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # It imports what this process would import, from no other place, and never tunes by itself.
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(os.path.join(folder, entry) for entry in entries),
                "PYTHONSAFEPATH": "1",
                MODE_VARIABLE: "off",
            },
            cwd=folder,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # a group of its own, to be killed as one; Ctrl-C is for the parent
        )
        self._lines: Queue[str | None] = Queue()
        """What it wrote, and None when it has ended: the end of the pipe may never come, children may hold it open."""
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        started: Future[subprocess.Popen[str]] = Future()
        threading.Thread(target=self._start, args=(start, started), daemon=True, name="worker end").start()
        try:
            self._process = started.result()
        except OSError as error:
            raise WorkerLost("crashed", f"the worker program cannot be started: {error}") from error
        try:
            threading.Thread(target=self._read_events, daemon=True, name="worker events").start()
            threading.Thread(target=self._read_errors, daemon=True, name="worker errors").start()
        except RuntimeError:  # no room for another thread
            self.end()
            raise

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
        """Wait for what it says next; raise WorkerLost if it ends, or says nothing for that many seconds."""
        try:
            line = self._lines.get(timeout=max(0.0, within))
        except Empty:
            raise WorkerLost("timeout", f"no end after {within:.0f} s") from None
        if line is None:
            raise WorkerLost("crashed", self._how_it_ended())
        return _parsed(line)

    def give_way(self) -> None:
        """Have it and what it started run only where others leave a processor idle."""
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(self._process.pid)
            for each in (process, *process.children(recursive=True)):
                each.nice(19 if os.name == "posix" else psutil.IDLE_PRIORITY_CLASS)
        with contextlib.suppress(OSError, AttributeError):  # Windows has no groups
            if os.getpgid(self._process.pid) == self._process.pid:  # all threads of its group; Linux has one for each
                os.setpriority(os.PRIO_PGRP, self._process.pid, 19)

    def end(self) -> None:
        """Kill the process and all that it started."""
        strays: list[psutil.Process] = []
        if self._process.poll() is None:  # else its children have other parents, and its id may be another's
            with contextlib.suppress(psutil.Error):
                strays = psutil.Process(self._process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError, PermissionError, AttributeError):  # Windows has no groups
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        for stray in strays:  # those that have left the group
            with contextlib.suppress(psutil.Error):
                stray.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver that hangs can hold up even that
            self._process.wait(END_S)
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def _how_it_ended(self) -> str:
        code = self._process.returncode
        # Before it is cut, since half a path is not seen to be one; each line has its own end.
        said = without_paths(" ".join("".join(self._tail).split()))[-TAIL_CHARACTERS:]
        names = {-each.value: f"killed by {each.name}" for each in signal.Signals}
        how = names.get(code, f"ended with exit code {code}")
        if code == -signal.SIGKILL:
            how += ", as the system does when memory runs out"
        return f"{how}; it said: {said}" if said else how

    def _read_events(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            while line := stream.readline(LONGEST_LINE):
                self._lines.put(line)

    def _start(self, start: Callable[[], "subprocess.Popen[str]"], started: "Future[subprocess.Popen[str]]") -> None:
        """Start the process and wait for its end: what the system takes for its parent is the thread that started it,
        not the process, and it ends with its parent."""
        try:
            process = start()
        except BaseException as error:  # noqa: BLE001 - the caller's, who waits for it
            started.set_exception(error)
            return
        started.set_result(process)
        process.wait()
        time.sleep(GRACE_S)
        self._lines.put(None)

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            while line := stream.readline(TAIL_CHARACTERS):
                self._tail.append(line)


def _current_folder() -> str:
    """Another one where it was removed: torch cannot be loaded in there."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return os.sep


def _parsed(line: str) -> Event:
    event = None
    with contextlib.suppress(ValueError):
        event = json.loads(line)
    if not isinstance(event, dict) or "event" not in event:
        raise WorkerLost("crashed", f"wrote {without_paths(line)[:100]!r} where only the worker program writes")
    return event

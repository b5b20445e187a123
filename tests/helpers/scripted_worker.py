"""In the place of the worker program: says what a script tells it to, and nothing takes any time."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from compiled_logprobs.machine.environment import fingerprint_of
from compiled_logprobs.tuning import tally, tuner
from compiled_logprobs.tuning.process import Event, WorkerLost

CRASH = WorkerLost("crashed", "killed by SIGSEGV")
HANG = object()
"""In a script: says nothing more, until whoever waits has had enough."""
CHECK = {"name": "log_prob_error", "passed": True, "figure": 0.5, "limit": 1.0, "detail": ""}


def step(candidate: str | None, name: str) -> Event:
    return {"event": "step", "candidate": candidate, "step": name}


def rounds(
    count: int, plain: float | None = None, host: dict[str, float] | None = None, **seconds: float
) -> list[Event]:
    """So many rounds, each of which ends in a step that times the first candidate."""
    one = {"event": "round", "seconds": seconds, "host_seconds": host or {}, "plain": plain}
    return [event for _ in range(count) for event in (step(next(iter(seconds)), "time"), one)]


def ready(*names: str) -> list[Event]:
    """What is said up to the rounds."""
    return [*checked(*names), step(None, "inputs"), {"event": "measuring", "rows": 256, "vocab": 4096}]


def checked(*names: str) -> list[Event]:
    """What is said of each candidate until it has passed the check."""
    events: list[Event] = []
    for name in names:
        passed = {"event": "checked", "candidate": name, "rows": 16, "fewer_for_memory": False, "checks": [CHECK]}
        events += [
            step(name, "import"),
            {"event": "loaded", "candidate": name, "fingerprint": f"print of {name}"},
            step(name, "compile"),
            {"event": "first_call", "candidate": name, "seconds": 2.0},
            step(name, "check"),
            {**passed, "repeatable": True, "row_invariant": None},
        ]
    return events


class Takes(float):
    """In a script: so many seconds, in which a budget may end."""


Script = Iterable[object] | Callable[[dict], Iterable[object]]


class ScriptedWorkers:
    """Each program that is started plays the next script, which answers one job; the last goes on with 'done'.

    A script may depend on the job.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *scripts: Script) -> None:
        self.now = 0.0
        self.jobs: list[dict] = []
        self.ended = 0
        self._scripts = iter(scripts)
        clock = SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr(tuner, "time", clock)
        monkeypatch.setattr(tally, "time", clock)
        monkeypatch.setattr(tuner, "Worker", self._start)

    def _start(self) -> "ScriptedWorkers":
        self._said: Iterator[object] = self._say(next(self._scripts))
        return self

    def _say(self, script: Script) -> Iterator[object]:
        yield {"event": "ready"}
        yield {"event": "started", "environment": fingerprint_of(torch.device("cpu"))}
        yield from script(self.jobs[-1]) if callable(script) else script
        yield {"event": "done"}

    def send(self, job: dict) -> None:
        self.jobs.append(job)

    def next_event(self, *, within: float) -> Event:
        said = next(self._said, CRASH)
        if said is HANG:
            self.now += max(0.0, within)
            raise WorkerLost("timeout", f"no end after {within:.0f} s")
        if isinstance(said, WorkerLost):
            raise said
        if isinstance(said, Takes) and said > within:
            self.now += max(0.0, within)
            self._said = chain([Takes(said - within)], self._said)
            raise WorkerLost("timeout", f"no end after {within:.0f} s")
        if isinstance(said, float):  # so many seconds pass
            self.now += said
            return self.next_event(within=within - said)
        assert isinstance(said, dict)
        return said

    def give_way(self) -> None: ...

    def __enter__(self) -> "ScriptedWorkers":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        self.ended += 1

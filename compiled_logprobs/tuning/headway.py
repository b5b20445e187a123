"""What processes have done of measuring a kind of problem, left behind for the next one to go on from.

It lies in the folder of torch's compiler cache and goes with it: where nothing is compiled, nothing is known to be.
"""

import getpass
import json
import os
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from compiled_logprobs.backends import code_of, is_built_in
from compiled_logprobs.decision import Check, from_plain, parse_json
from compiled_logprobs.errors import ProfileError
from compiled_logprobs.policy import BUDGET_S
from compiled_logprobs.problem import Problem, bucket, problem_name
from compiled_logprobs.store.files import LIMIT, read_bytes, write_bytes
from compiled_logprobs.tuning.process import Event

MOST_CUTS = 2
"""In so many processes that bring it no further a candidate may be at work when the time to get ready ends; the next
one decides without it."""
SHRINKS = 2
"""After so many processes that had less and less to time, and no time for it, the next ones have more time."""
MOST_SLOW = 16
"""More processes than are ever too slow for one problem: what a broken file says beyond it counts as so many."""

_FIELDS = {
    "loaded": {"fingerprint"},
    "compiled": set[str](),
    "first_call": {"seconds"},
    "checked": {"rows", "fewer_for_memory", "checks", "repeatable", "row_invariant"},
}
"""What an event that is left behind says beside its kind and its candidate. The second kind is of no worker program."""


@dataclass
class Headway:
    """Of one kind of problem, whatever its N.

    What cannot be read was never there; where nothing can be left behind, nobody is the first, and nothing is known.
    Several processes may write, since some go on in the background: each reads again before it adds its own.
    """

    path: Path | None
    problem: Problem
    is_first: bool = False
    """Whether no process has begun before."""
    said: dict[str, dict[str, Event]] = field(default_factory=dict)
    """By candidate and kind, what the worker program said of it: that it was loaded, called, and has passed the
    check."""
    cut: dict[str, int] = field(default_factory=dict)
    """In how many processes it was at work when the time to get ready ended, since it came further."""
    too_slow: int = 0
    """How often a budget ended before the rounds were enough: the next process times less."""

    def hear(self, event: Event) -> None:
        """Note an event of the worker program; keep it, where that spares the next process something."""
        kind, name = event["event"], event.get("candidate") or ""
        if not is_built_in(name):  # nor is another's code imported to see whether it is the same
            return
        if kind == "loaded" and self._fingerprint(name) != event["fingerprint"]:
            self.said[name] = {kind: event}
        elif kind == "first_call" or (kind == "checked" and all(check["passed"] for check in event["checks"])):
            if kind not in self.said.get(name, {}):  # it has come further than ever
                self.read()
                self.said.setdefault(name, {})[kind] = event
                self.cut.pop(name, None)
                self.keep()
        elif kind == "lost" and name in self.said:
            self.read()
            del self.said[name]
            self.keep()

    def note_cut(self, name: str | None, *, in_rounds: bool) -> None:
        """Note that a budget ended while the candidate `name` was at work."""
        self.read()
        if in_rounds:
            self.too_slow += 1
        elif name is not None:
            self.cut[name] = self.cut.get(name, 0) + 1
        self.keep()

    def settle(self) -> None:
        """Keep what is compiled alone: the problem is decided."""
        self.read()
        self.cut, self.too_slow = {}, 0
        for said in self.said.values():
            said.pop("checked", None)
        self.keep()

    def budget(self, seconds: float) -> float:
        """For the rounds: `seconds`, or more, up to what is usual, where ever less to time did not fit into them.

        However little is timed, each call takes its time to begin: a cache is emptied before it.
        """
        return max(seconds, min(BUDGET_S, seconds * 2.0 ** max(0, self.too_slow - SHRINKS)))

    def has_compiled(self, name: str) -> bool:
        """Whether the backend called `name` has run here, so that it finds what it compiles in its cache."""
        return self.path is None or bool({"first_call", "compiled"} & self.said.get(name, {}).keys())

    def note_compiled(self, name: str, fingerprint: str) -> None:
        """Note that the backend called `name`, of this code, is compiled outside of the worker program."""
        self.read()
        said = {"loaded": {"fingerprint": fingerprint}, "compiled": {}}
        self.said[name] = {kind: {"event": kind, "candidate": name, **event} for kind, event in said.items()}
        self.keep()

    @property
    def passed(self) -> list[str]:
        """The candidates that have passed the check."""
        return [name for name, said in list(self.said.items()) if "checked" in said]

    def read(self) -> bool:
        """Take over what processes have left behind by now; whether any has begun."""
        try:
            data = None if self.path is None else read_bytes(self.path, LIMIT)
            if data is None:
                return False
            kept = from_plain(parse_json(data), _Kept)
        except ProfileError:
            return True
        self.cut, self.too_slow = kept.cut, min(max(0, kept.too_slow), MOST_SLOW)
        for name, events in kept.said.items():
            if self._is_known(name, events):
                self.said[name] = events | self.said.get(name, {})
        return True

    def keep(self) -> bool:
        """Leave it behind; whether that is possible."""
        if self.path is None:
            return False
        with suppress(OSError):
            kept = asdict(_Kept(self.said, self.cut, self.too_slow))
            write_bytes(self.path, json.dumps(kept, allow_nan=False).encode())
            return True
        self.path = None
        return False

    def _fingerprint(self, name: str) -> str | None:
        fingerprint: str | None = self.said.get(name, {}).get("loaded", {}).get("fingerprint")
        return fingerprint

    def _is_known(self, name: str, events: dict[str, Event]) -> bool:
        """Whether that was said of a candidate's present code, and in the form of this release."""
        fingerprint = events.get("loaded", {}).get("fingerprint")
        if not is_built_in(name) or fingerprint != code_of(name, self.problem):
            return False
        for kind, event in events.items():
            is_its = event.get("event") == kind and event.get("candidate") == name
            if not is_its or kind not in _FIELDS or not event.keys() >= _FIELDS[kind]:
                return False
        with suppress(ProfileError):
            from_plain(events.get("checked", {}).get("checks", ()), tuple[Check, ...])
            return self._fingerprint(name) in (None, fingerprint)
        return False


@dataclass
class _Kept:
    """What lies in the file."""

    said: dict[str, dict[str, Event]]
    cut: dict[str, int]
    too_slow: int


def headway_of(environment: str, problem: Problem, *, begins: bool = True) -> Headway:
    """What was left behind for the kind of `problem`, in the environment of this fingerprint; a mark that somebody has
    begun, from now on, unless this only looks."""
    kind, folder = bucket(problem)._replace(rows=0), cache_folder()
    path = None if folder is None else folder / "compiled-logprobs" / environment / f"{problem_name(kind)}.json"
    headway = Headway(path, kind)
    if not headway.read() and begins:
        headway.is_first = headway.keep()
    return headway


def cache_folder() -> Path | None:
    """Where torch's compiler keeps what it compiled; None where that is not known."""
    if folder := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return Path(folder)
    try:
        return Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
    except (OSError, KeyError, ImportError):  # a user without a name
        return None

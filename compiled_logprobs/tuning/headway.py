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
from compiled_logprobs.errors import ProfileError
from compiled_logprobs.policy import BUDGET_S
from compiled_logprobs.problem import Problem, problem_name
from compiled_logprobs.store.files import LIMIT, read_bytes, write_bytes
from compiled_logprobs.tuning.process import Event

MOST_CUTS = 2
"""In so many processes that bring it no further a candidate may be at work when the time to get ready ends; the next
one decides without it."""
SHRINKS = 2
"""After so many processes that had less and less to time, and no time for it, the next ones have more time."""


@dataclass
class Headway:
    """Of one kind of problem, whatever its N.

    What cannot be read was never there; where nothing can be left behind, nobody is the first, and nothing is known.
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
            said = self.said.setdefault(name, {})
            if kind not in said:  # it has come further than ever
                said[kind] = event
                self.cut.pop(name, None)
                self.keep()
        elif kind == "lost":
            self.said.pop(name, None)

    def note_cut(self, name: str | None, *, in_rounds: bool) -> None:
        """Note that a budget ended while the candidate `name` was at work."""
        if in_rounds:
            self.too_slow += 1
        elif name is not None:
            self.cut[name] = self.cut.get(name, 0) + 1
        self.keep()

    def settle(self) -> None:
        """Keep what is compiled alone: the problem is decided."""
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
        return self.path is None or "first_call" in self.said.get(name, {})

    def note_compiled(self, name: str, fingerprint: str) -> None:
        """Note that the backend called `name`, of this code, is compiled outside of the worker program."""
        self.said[name] = {"loaded": {"fingerprint": fingerprint}, "first_call": {}}
        self.keep()

    @property
    def passed(self) -> list[str]:
        """The candidates that have passed the check."""
        return [name for name, said in list(self.said.items()) if "checked" in said]

    def keep(self) -> bool:
        """Leave it behind; whether that is possible."""
        if self.path is None:
            return False
        with suppress(OSError):
            kept = {name: value for name, value in asdict(self).items() if name in _KEPT}
            write_bytes(self.path, json.dumps(kept, allow_nan=False).encode())
            return True
        self.path = None
        return False

    def _fingerprint(self, name: str) -> str | None:
        fingerprint: str | None = self.said.get(name, {}).get("loaded", {}).get("fingerprint")
        return fingerprint


_KEPT = ("said", "cut", "too_slow")


def headway_of(environment: str, problem: Problem) -> Headway:
    """What was left behind for the kind of `problem`, in the environment of this fingerprint; a mark that somebody has
    begun, from now on."""
    kind, folder = problem._replace(rows=0), cache_folder()
    if folder is None:
        return Headway(None, kind)
    headway = Headway(folder / "compiled-logprobs" / environment / f"{problem_name(kind)}.json", kind)
    assert headway.path is not None
    try:
        data = read_bytes(headway.path, LIMIT)
        if data is not None:
            kept = json.loads(data)
            headway.cut = {str(name): int(count) for name, count in kept["cut"].items()}
            headway.too_slow = int(kept["too_slow"])
            said = {name: dict(events) for name, events in kept["said"].items() if is_built_in(name)}
            headway.said = {
                name: events for name, events in said.items() if events["loaded"]["fingerprint"] == code_of(name, kind)
            }
            return headway
    except (ProfileError, ValueError, TypeError, KeyError, AttributeError):
        return Headway(headway.path, kind)
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

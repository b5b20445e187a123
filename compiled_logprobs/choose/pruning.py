"""Removing from a store what serves nobody any more, or what is asked to go."""

import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Literal, NamedTuple

from compiled_logprobs.backends import backends, why_not
from compiled_logprobs.choose import rule as decisions
from compiled_logprobs.decision import Decision, moment
from compiled_logprobs.errors import ProfileError
from compiled_logprobs.store.files import EVIDENCE, FACTS, Store, standing

Kind = Literal["broken", "stale", "unregistered", "old", "other environment"]


@dataclass(frozen=True)
class Waste:
    """A file that would go, or has gone."""

    path: Path
    kind: Kind
    why: str
    bytes: int
    failed: str | None = None
    """Why it is there still, though it was to be removed."""

    def to_dict(self) -> dict[str, Any]:
        """For programs: plain values only."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "why": self.why,
            "bytes": self.bytes,
            "failed": self.failed,
        }


class Asked(NamedTuple):
    """Which decisions are to go. Without any, only what is broken is."""

    broken: bool = False
    """Files that no release up to this one can read, evidence of no decision, and what killed writers left."""
    stale: bool = False
    """Decisions for this machine whose choice can no longer serve, since its code is not what was measured."""
    unregistered: bool = False
    """Decisions for this machine that chose a backend which is not registered in this process; in another it may be."""
    older_than_days: float | None = None
    other_environments: bool = False
    """Decisions for what is not an environment of this machine now: also for another number of threads, or another torch."""


def prune(store: Store, asked: Asked, here: Collection[str], *, dry_run: bool = False) -> list[Waste]:
    """Remove from `store` what is asked for; returns what has gone, or would go.

    What a newer release wrote, what cannot be read at present, and files that are none of a store's always stay.

    Args:
        store: where.
        asked: what.
        here: the fingerprints of the environments of this machine.
        dry_run: whether to remove nothing.
    """
    if not any(asked):
        asked = asked._replace(broken=True)
    found: dict[Path, Waste] = {}
    seen: dict[Path, tuple[int, int, int]] = {}
    for path, kind, why in _wanted(store, asked, here):
        try:
            what = path.lstat()
        except OSError:  # it has gone meanwhile, or is none
            continue
        if path not in found and (stat.S_ISREG(what.st_mode) or stat.S_ISLNK(what.st_mode)):
            found[path] = Waste(path, kind, why, what.st_size)
            seen[path] = _signature(what)
    if dry_run:
        return list(found.values())
    tried = [_removed(waste, seen[waste.path]) for waste in found.values()]
    # Only of other machines' folders, in which nobody writes just now.
    for folder in dict.fromkeys(waste.path.parent for waste in found.values() if waste.kind == "other environment"):
        _remove_if_empty(folder)
    return [waste for waste in tried if waste is not None]


def _wanted(store: Store, asked: Asked, here: Collection[str]) -> Iterator[tuple[Path, Kind, str]]:
    if asked.broken:
        for path, why in store.rubbish():
            yield path, "broken", why
    for environment, problem in store.problems():
        path, record = store.path(environment, problem), store.peek(environment, problem)
        if record is None:
            continue
        try:
            decision = Decision.from_record(problem, record)
        except ProfileError as error:
            if asked.broken:
                yield from _with_evidence(path, "broken", str(error))
            continue
        verdict = _verdict(environment, decision, asked, here)
        if verdict is not None and not store.is_newer(environment, problem):
            yield from _with_evidence(path, *verdict)


def _verdict(environment: str, decision: Decision, asked: Asked, here: Collection[str]) -> tuple[Kind, str] | None:
    """Why `decision` is to go, if it is."""
    if asked.other_environments and environment not in here:
        return "other environment", "not for this machine as it is now"
    if asked.older_than_days is not None:
        when = moment(decision.measured_at)
        if when is None:
            return "old", "it does not say when it was measured"
        if datetime.now(timezone.utc) - when > timedelta(days=asked.older_than_days):
            return "old", f"measured on {when:%Y-%m-%d}"
    if environment not in here:
        return None  # with the versions there, the same backend may have another fingerprint
    if decision.chosen not in backends():
        return (
            ("unregistered", f"backend {decision.chosen!r:.100} is not registered here") if asked.unregistered else None
        )
    if asked.stale and not any(_has_its_code(decision, name) for name in {decision.chosen, _invariant(decision)}):
        return "stale", f"the code of backend {decision.chosen!r} has changed since it was measured"
    return None


def _invariant(decision: Decision) -> str:
    """What serves where rows have to be invariant, which may be another candidate than the chosen one."""
    return decision.best_row_invariant() or decision.chosen


def _has_its_code(decision: Decision, name: str) -> bool:
    """Or may have: what cannot run at present, for want of a compiler perhaps, may serve again."""
    if name not in backends():
        return False
    return decisions.holds(decision, name) or why_not(name, decision.problem) is not None


def _with_evidence(path: Path, kind: Kind, why: str) -> Iterator[tuple[Path, Kind, str]]:
    yield path, kind, why
    yield path.with_suffix(EVIDENCE), kind, "what that decision rests on"


def _removed(waste: Waste, seen: tuple[int, int, int]) -> Waste | None:
    """None if another process has replaced or removed the file meanwhile."""
    try:
        if _signature(waste.path.lstat()) != seen:
            return None
        waste.path.unlink()
    except FileNotFoundError:
        return None
    except OSError as error:
        return replace(waste, failed=error.strerror or str(error))
    return waste


def _signature(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_mtime_ns, found.st_size


def _remove_if_empty(folder: Path) -> None:
    """With the facts above it, which are of no use without a decision."""
    facts = folder.parent / FACTS
    try:
        folder.rmdir()
        if standing(facts) == "whole":
            facts.unlink()
        folder.parent.rmdir()
    except OSError:  # it is not empty
        return

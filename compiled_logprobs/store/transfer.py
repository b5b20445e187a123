"""Carry decisions between stores as one file, and remove those that serve nobody.

An archive is a folder of a store as .tar.gz. It may come from anywhere: only files with a name and a size of a store's
are looked at, each is read as the store reads its own, and where a decision goes follows from its environment and
problem.
"""

import gzip
import re
import tarfile
import time
import zlib
from collections.abc import Collection
from contextlib import suppress
from dataclasses import fields
from datetime import datetime, timedelta, timezone
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from compiled_logprobs.decision import Decision, moment
from compiled_logprobs.errors import ProfileError
from compiled_logprobs.machine.environment import Environment
from compiled_logprobs.store.files import (
    EVIDENCE,
    EVIDENCE_LIMIT,
    FACTS,
    HISTORY,
    KEPT,
    LIMIT,
    TEMPORARY,
    VERSION,
    Store,
    listing,
    parse_decision,
    parse_evidence,
    past_files,
    read_decision,
    read_evidence,
    read_facts,
    read_past,
)

MOST_BYTES = 2**28
"""Of an archive when unpacked, so that a wrong one costs little memory. The preset `full` with evidence takes 40 MB."""
AHEAD = timedelta(days=1)
"""How far another machine's clock may be ahead: a decision of the year 9999 would win over every later one for ever."""
AT_WORK_S = 3600.0
"""Within which a file that belongs to no decision may be that of a writer at work."""
_MEMBER = re.compile(
    rf"(?P<folder>{VERSION}/(?P<environment>[0-9a-f]{{16}})/decisions/)(?P<name>[a-z0-9_-]{{1,240}})"
    r"(?P<evidence>\.evidence)?\.json"
)
_PAST = re.compile(
    rf"{VERSION}/(?P<environment>[0-9a-f]{{16}})/{HISTORY}/(?P<name>[a-z0-9_-]{{1,240}})/[0-9]{{8}}T[0-9]{{6}}Z\.json"
)
_TEMPORARY = re.compile(rf"\.[0-9a-f]{{16}}{TEMPORARY}")

Fate = Literal["added", "replaced", "kept", "same", "broken"]


class Imported(NamedTuple):
    """What became of one decision of an archive, or of what else is in there."""

    name: str
    """Of its problem, or of the file."""
    fate: Fate
    """Kept: what was stored, and not this; same: it was stored already; broken: it was passed over."""
    why: str
    environment: str | None = None
    decision: Decision | None = None
    """None where it is broken."""


class Pruned(NamedTuple):
    """A file that would go, or has gone."""

    path: Path
    why: str
    bytes: int


def export_archive(
    store: Store, environments: Collection[str] | None = None, *, evidence: bool = True
) -> tuple[bytes, int]:
    """The decisions of `store` with their history as one file, of these environments or of all, and how many they are.

    The same decisions give the same bytes. Raises ProfileError if there is none.
    """
    content, decisions = BytesIO(), 0
    with tarfile.open(fileobj=content, mode="w") as archive:
        for environment, decision in store.decisions():
            if environments is not None and environment not in environments:
                continue
            path, decisions = store.path(environment, decision.problem), decisions + 1
            beside = store.evidence(environment, decision) if evidence else None
            earlier = [(store.past(environment, one), one) for one in store.history(environment, decision.problem)]
            for file, of in ((path, decision), (path.with_suffix(EVIDENCE), beside), *earlier):
                if of is not None:
                    data, member = of.to_json(), tarfile.TarInfo(file.relative_to(store.root).as_posix())
                    member.size = len(data)
                    archive.addfile(member, BytesIO(data))
    if not decisions:
        which = "" if environments is None else f" for {', '.join(sorted(environments))}"
        raise ProfileError(
            f"{store.root} holds no decision{which}, and an archive of one or more is valid.\n`compiled-logprobs "
            "profile` measures some; `compiled-logprobs show --all` lists what is stored for which environment."
        )
    return gzip.compress(content.getvalue(), 6, mtime=0), decisions


def import_archive(store: Store, source: IO[bytes], *, dry_run: bool = False) -> list[Imported]:
    """Store the decisions of an archive, and say what became of each: what is stored and as new, or newer, stays.

    With `dry_run` nothing is stored. Raises ProfileError if it is no archive, is not whole, or is too large, and then
    nothing was stored; or if a decision cannot be stored, and those before it are.
    """
    files, imported = _unpack(source)
    for path, data in files.items():
        place = _MEMBER.fullmatch(path)
        if place is None or place["evidence"]:
            continue
        beside = files.get(place["folder"] + place["name"] + EVIDENCE)
        try:
            decision = parse_decision(data, place["name"])
            home = _home(decision, place["environment"])
            evidence = None if beside is None else parse_evidence(beside, decision)
        except ProfileError as error:
            imported.append(Imported(place["name"], "broken", str(error), place["environment"]))
            continue
        fate, why = _fate(decision, store.path(place["environment"], decision.problem))
        if fate in ("added", "replaced") and not dry_run:
            store.publish(home, decision, evidence)
        imported.append(Imported(place["name"], fate, why, place["environment"], decision))
    return imported + _import_past(store, files, dry_run=dry_run)


def _import_past(store: Store, files: dict[str, bytes], *, dry_run: bool) -> list[Imported]:
    """Store what an archive has of the past; returns what of it is broken."""
    broken = []
    for path, data in files.items():
        if (place := _PAST.fullmatch(path)) is not None:
            try:
                decision = parse_decision(data, place["name"])
                _home(decision, place["environment"])
            except ProfileError as error:
                broken.append(Imported(place["name"], "broken", str(error), place["environment"]))
                continue
            if not dry_run:
                store.remember(place["environment"], decision)
    return broken


def _unpack(source: IO[bytes]) -> tuple[dict[str, bytes], list[Imported]]:
    """The files of decisions and of evidence, by path, and what else there is."""
    files: dict[str, bytes] = {}
    others = []
    try:
        with gzip.GzipFile(fileobj=source) as packed:
            data = packed.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ProfileError(f"it has more than {MOST_BYTES} bytes unpacked")
        with tarfile.open(fileobj=BytesIO(data), mode="r:") as archive:
            for member in archive:
                place = _MEMBER.fullmatch(member.name)
                limit = EVIDENCE_LIMIT if place and place["evidence"] else LIMIT
                is_known = place or _PAST.fullmatch(member.name)
                if member.isdir() or member.name.endswith(f"/{FACTS}"):
                    continue  # the facts are those in the decisions
                if not is_known or member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    others.append(Imported(member.name, "broken", "it is no file of a store"))
                elif member.size > limit:
                    others.append(Imported(member.name, "broken", f"it has more than {limit} bytes"))
                elif (file := archive.extractfile(member)) is not None:
                    files[member.name] = file.read()
    except (ProfileError, OSError, EOFError, ValueError, RecursionError, zlib.error, tarfile.TarError) as error:
        raise ProfileError(
            f"the archive cannot be used: {str(error)[:200]}.\nValid is a .tar.gz as `compiled-logprobs export` writes "
            f"it, whole, of at most {MOST_BYTES} bytes unpacked. Export it again; where it is too large, without the "
            "evidence (--no-evidence), or one environment at a time (--environment). What an earlier release wrote has "
            "to be measured anew, by `compiled-logprobs profile`."
        ) from error
    return files, others


def _home(decision: Decision, environment: str) -> Environment:
    """The environment of `decision`. Raises ProfileError if that is another, or if its date cannot be."""
    facts: dict[str, Any] = {fact.name: decision.environment.get(fact.name) for fact in fields(Environment)}
    home, when = Environment(**facts), moment(decision.measured_at)
    if home.fingerprint() != environment:
        raise ProfileError(f"its facts are those of another environment than {environment}")
    if when is None or when > datetime.now(timezone.utc) + AHEAD:
        raise ProfileError(
            f"it was measured at {decision.measured_at!r:.40}; UTC as 2026-11-24T07:00:00Z is valid, and not to come"
        )
    return home


def _fate(decision: Decision, path: Path) -> tuple[Fate, str]:
    try:
        stored = read_decision(path)
    except ProfileError as error:
        return "replaced", f"what was stored cannot be used: {error}"
    if stored is None:
        return "added", "nothing was stored for it"
    if stored == decision:
        return "same", "it was stored already"
    if decision.measured_at > stored.measured_at:  # the form is the same, so that they sort as the times do
        return "replaced", f"what was stored is older, of {stored.measured_at}"
    return "kept", f"what is stored is as new, or newer, of {stored.measured_at}"


def prune(
    store: Store,
    here: Collection[str],
    *,
    older_than_days: float | None = None,
    other_environments: bool = False,
    dry_run: bool = False,
) -> list[Pruned]:
    """Remove from `store` what is broken, and what else is asked for; returns what has gone, or would go.

    Broken are files that this release cannot use, evidence of no decision, more history than is kept, and what killed
    writers left. What cannot be read at present, and files that are none of a store's, always stay.

    Args:
        store: where.
        here: the fingerprints of the environments of this machine.
        older_than_days: also decisions that were measured longer ago.
        other_environments: also decisions that are for none of `here`.
        dry_run: whether to remove nothing.

    Raises ProfileError if a file cannot be removed; those before it have gone.
    """
    pruned = []
    for folder in store.folders():
        elsewhere = other_environments and folder.name not in here
        past = [path for problem in listing(folder / HISTORY) for path in listing(problem)]
        for path in (*listing(folder / "decisions"), *past, *listing(folder)):
            if path.is_dir() or not (path.suffix == ".json" or _TEMPORARY.fullmatch(path.name)):
                continue
            try:
                why = "not for this machine as it is now" if elsewhere else _why_waste(path, older_than_days)
                if why is not None:
                    pruned.append(Pruned(path, why, path.lstat().st_size))
                    if not dry_run:
                        path.unlink()
            except FileNotFoundError:
                pass  # another process was quicker
            except OSError as error:
                raise ProfileError(
                    f"{path} cannot be removed: {error.strerror}. Valid is a folder that this process may write to."
                ) from error
        if elsewhere and not dry_run:
            with suppress(OSError):  # a person's file is in there
                for emptied in (*listing(folder / HISTORY), folder / HISTORY, folder / "decisions"):
                    if emptied.is_dir():
                        emptied.rmdir()
                folder.rmdir()
    return pruned


def _why_waste(path: Path, older_than_days: float | None) -> str | None:
    """Why the file at `path` is to go, if it is."""
    is_left = time.time() - path.lstat().st_mtime > AT_WORK_S  # no writer can be at work on it any more
    if _TEMPORARY.fullmatch(path.name):
        return "a writer was killed before it had finished it" if is_left else None
    try:
        if path.name == FACTS:
            read_facts(path)
            return None
        if path.parents[1].name == HISTORY:
            if path in past_files(path.parent)[:-KEPT]:
                return f"more than {KEPT} earlier decisions are there"
            return _why_old(read_past(path), older_than_days)
        decision = read_decision(path.with_name(path.name.replace(EVIDENCE, ".json")))
        if path.name.endswith(EVIDENCE):
            evidence = None if decision is None else read_evidence(path, decision)
            if evidence is None and is_left:
                return "it is of no decision that is there"
    except ProfileError as error:
        # That it cannot be read by this process, or now, says nothing about what is in it.
        return None if isinstance(error.__cause__, OSError) else f"broken: {error}"
    return _why_old(decision, older_than_days)


def _why_old(decision: Decision | None, older_than_days: float | None) -> str | None:
    when = None if decision is None else moment(decision.measured_at)
    if (
        when is None
        or older_than_days is None
        or (datetime.now(timezone.utc) - when) / timedelta(days=1) <= older_than_days
    ):
        return None
    return f"measured on {when:%Y-%m-%d}"

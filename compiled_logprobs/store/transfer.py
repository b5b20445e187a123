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
from compiled_logprobs.problem import problem_to_dict
from compiled_logprobs.store.files import (
    EVIDENCE,
    EVIDENCE_LIMIT,
    FACTS,
    LIMIT,
    TEMPORARY,
    VERSION,
    Store,
    listing,
    parse_decision,
    parse_evidence,
    pass_over,
    read_bytes,
    read_decision,
    read_facts,
)

MOST_BYTES = 2**28
"""Of an archive when unpacked, so that a wrong one costs little memory. The preset `full` with evidence takes 40 MB."""
AHEAD = timedelta(days=1)
"""How far another machine's clock may be ahead: a decision of the year 9999 would win over every later one for ever."""
AT_WORK_S = 3600.0
"""Within which a file that belongs to no decision may be that of a writer at work."""
_MEMBER = re.compile(
    rf"{VERSION}/(?P<environment>[0-9a-f]{{16}})/decisions/(?P<name>[a-z0-9_-]{{1,240}})(?P<evidence>\.evidence)?\.json"
)
_TEMPORARY = re.compile(rf"\.[0-9a-f]{{16}}{TEMPORARY}")

Files = dict[tuple[str, str], bytes]
"""Their content, by environment and name of the problem."""
Fate = Literal["added", "replaced", "kept", "same", "broken"]
Waste = Literal["broken", "old", "other environment"]


class Archive(NamedTuple):
    """Decisions as one file."""

    content: bytes
    decisions: int
    environments: list[str]
    """Their fingerprints."""


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

    def to_dict(self) -> dict[str, Any]:
        """For programs: plain values only."""
        told: dict[str, Any] = self._asdict()
        if (decision := told.pop("decision")) is not None:
            told |= {"chosen": decision.chosen, "measured_at": decision.measured_at}
            told["problem"] = problem_to_dict(decision.problem)
        return told


class Pruned(NamedTuple):
    """A file that would go, or has gone."""

    path: Path
    kind: Waste
    why: str
    bytes: int
    failed: str | None = None
    """Why it is there still, though it was to be removed."""

    def to_dict(self) -> dict[str, Any]:
        """For programs: plain values only."""
        return {**self._asdict(), "path": str(self.path)}


def export_archive(store: Store, environments: Collection[str] | None = None, *, evidence: bool = True) -> Archive:
    """The decisions of `store` as one file, of these environments or of all; the same decisions give the same bytes.

    Raises:
        ProfileError: there is nothing to export, or more than an archive may hold.
    """
    content, seen, decisions = BytesIO(), list[str](), 0
    with (
        gzip.GzipFile("", "wb", 6, content, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for environment, decision in store.decisions():
            if environments is not None and environment not in environments:
                continue
            path = store.path(environment, decision.problem)
            files = [path, path.with_suffix(EVIDENCE)] if evidence else [path]
            if environment not in seen:
                seen.append(environment)
                files.append(path.parents[1] / FACTS)
            for file in files:
                try:
                    data = read_bytes(file, EVIDENCE_LIMIT)
                except ProfileError as error:
                    pass_over(file, error)
                    continue
                if data is None:
                    continue
                member = tarfile.TarInfo(file.relative_to(store.root).as_posix())
                member.size = len(data)
                archive.addfile(member, BytesIO(data))
            decisions += 1
        size = packed.tell()
    if size > MOST_BYTES:
        raise ProfileError(
            f"the archive would have {size} bytes unpacked; at most {MOST_BYTES} are valid. Leave out the evidence "
            "(--no-evidence), or export one environment at a time (--environment)."
        )
    if not decisions:
        which = "" if environments is None else f" for {', '.join(sorted(environments))}"
        raise ProfileError(
            f"{store.root} holds no decision{which}, and an archive of one or more is valid.\n"
            "`compiled-logprobs profile` measures some; `compiled-logprobs show --all` lists what is stored for which "
            "environment."
        )
    return Archive(content.getvalue(), decisions, seen)


def import_archive(store: Store, source: IO[bytes], *, replace: bool = False, dry_run: bool = False) -> list[Imported]:
    """Store the decisions of an archive, and say what became of each: what is stored and as new, or newer, stays.

    Args:
        store: where to.
        source: the archive.
        replace: whether to replace also what is newer.
        dry_run: whether to store nothing, and only say what would become of each.

    Raises:
        ProfileError: it is no archive, is not whole, or is too large, and nothing was stored; or a decision cannot be
            stored, and those before it are.
    """
    decisions, beside, imported = _unpack(source)
    for key, data in decisions.items():
        environment, name = key
        evidence = None
        try:
            decision = parse_decision(data, name)
            home = _home(decision, environment)
            fate, why = _fate(decision, store.path(environment, decision.problem), replace)
            try:
                evidence = parse_evidence(beside.pop(key), decision) if key in beside else None
            except ProfileError as error:
                why += f"; its evidence is passed over: {error}"
        except ProfileError as error:
            imported.append(Imported(name, "broken", str(error), environment))
            continue
        if fate in ("added", "replaced") and not dry_run:
            store.publish(home, decision, evidence)
        imported.append(Imported(name, fate, why, environment, decision))
    return imported


def _unpack(source: IO[bytes]) -> tuple[Files, Files, list[Imported]]:
    """The files of decisions, those of evidence, and what else there is."""
    decisions: Files = {}
    beside: Files = {}
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
                if member.isdir() or member.name.endswith(f"/{FACTS}"):
                    continue  # the facts are those in the decisions
                if not place or member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    others.append(Imported(member.name, "broken", "it is no file of a store"))
                elif member.size > limit:
                    others.append(Imported(member.name, "broken", f"it has more than {limit} bytes"))
                elif (file := archive.extractfile(member)) is not None:
                    files = beside if place["evidence"] else decisions
                    files[place["environment"], place["name"]] = file.read()
    except (ProfileError, OSError, EOFError, ValueError, RecursionError, zlib.error, tarfile.TarError) as error:
        raise ProfileError(
            f"the archive cannot be used: {str(error)[:200]}.\nValid is a .tar.gz as `compiled-logprobs export` writes "
            f"it, whole, of at most {MOST_BYTES} bytes unpacked. Export it again, with this release."
        ) from error
    others += [
        Imported(name, "broken", "it is the evidence of no decision in the archive", environment)
        for environment, name in beside.keys() - decisions.keys()
    ]
    return decisions, beside, others


def _home(decision: Decision, environment: str) -> Environment:
    """The environment of `decision`. Raises ProfileError if that is another, or if its date cannot be."""
    facts: dict[str, Any] = {one.name: decision.environment.get(one.name) for one in fields(Environment)}
    home, when = Environment(**facts), moment(decision.measured_at)
    if home.fingerprint() != environment:
        raise ProfileError(f"its facts are those of another environment than {environment}")
    if when is None:
        raise ProfileError(f"it was measured at {decision.measured_at!r:.40}; UTC as 2026-11-24T07:00:00Z is valid")
    if when > datetime.now(timezone.utc) + AHEAD:
        raise ProfileError(f"it was measured at {decision.measured_at}, which is yet to come: a clock is wrong")
    return home


def _fate(decision: Decision, path: Path, replace: bool) -> tuple[Fate, str]:
    try:
        stored = read_decision(path)
    except ProfileError as error:
        return "replaced", f"what was stored cannot be used: {error}"
    if stored is None:
        return "added", "nothing was stored for it"
    if stored == decision:
        return "same", "it was stored already"
    if moment(stored.measured_at) is None:
        return "replaced", "what was stored does not say when it was measured"
    if decision.measured_at > stored.measured_at:  # the form is the same, so that they sort as the times do
        return "replaced", f"what was stored is older, of {stored.measured_at}"
    if replace:
        return "replaced", f"as was asked, though what was stored is of {stored.measured_at}"
    how = "as new" if decision.measured_at == stored.measured_at else "newer"
    return "kept", f"what is stored is {how}, of {stored.measured_at}"


def prune(
    store: Store,
    here: Collection[str],
    *,
    broken: bool = False,
    older_than_days: float | None = None,
    other_environments: bool = False,
    dry_run: bool = False,
) -> list[Pruned]:
    """Remove from `store` what is asked for, by default what is broken; returns what has gone, or would go.

    What cannot be read at present, and files that are none of a store's, always stay.

    Args:
        store: where.
        here: the fingerprints of the environments of this machine.
        broken: files that this release cannot use, evidence of no decision, and what killed writers left.
        older_than_days: decisions that were measured longer ago.
        other_environments: decisions that are for none of `here`.
        dry_run: whether to remove nothing.
    """
    broken = broken or (older_than_days is None and not other_environments)
    gone = []
    for folder in store.folders():
        elsewhere = other_environments and folder.name not in here
        for path in (*listing(folder / "decisions"), *listing(folder)):
            if path.is_dir() or not (path.suffix == ".json" or _TEMPORARY.fullmatch(path.name)):
                continue
            verdict: tuple[Waste, str] | None = ("other environment", "not for this machine as it is now")
            with suppress(FileNotFoundError):  # another process was quicker
                if not elsewhere:
                    verdict = _judge(path, broken, older_than_days)
                if verdict is not None:
                    gone.append(_remove(path, *verdict, dry_run))
        if elsewhere and not dry_run:
            with suppress(OSError):  # a person's file is in there
                (folder / "decisions").rmdir()
                folder.rmdir()
    return gone


def _remove(path: Path, kind: Waste, why: str, dry_run: bool) -> Pruned:
    pruned = Pruned(path, kind, why, path.lstat().st_size)
    try:
        if not dry_run:
            path.unlink()
    except FileNotFoundError:
        raise
    except OSError as error:
        return pruned._replace(failed=error.strerror or str(error))
    return pruned


def _judge(path: Path, broken: bool, older_than_days: float | None) -> tuple[Waste, str] | None:
    """Why the file at `path` is to go, if it is."""
    if broken and (why := _why_broken(path)) is not None:
        return "broken", why
    if older_than_days is None or path.name == FACTS or _TEMPORARY.fullmatch(path.name):
        return None
    try:
        decision = read_decision(_decision_of(path))
    except ProfileError:
        return None
    when = None if decision is None else moment(decision.measured_at)
    is_old = when is not None and datetime.now(timezone.utc) - when > timedelta(days=older_than_days)
    return ("old", f"measured on {when:%Y-%m-%d}") if is_old else None


def _why_broken(path: Path) -> str | None:
    try:
        if _TEMPORARY.fullmatch(path.name):
            return "a writer was killed before it had finished it" if _is_left(path) else None
        if path.name == FACTS:
            read_facts(path)
        elif path.name.endswith(EVIDENCE):
            data, decision = read_bytes(path, EVIDENCE_LIMIT), read_decision(_decision_of(path))
            belongs = data is not None and decision is not None and parse_evidence(data, decision) is not None
            return None if belongs or not _is_left(path) else "it is of no decision that is there"
        else:
            read_decision(path)
    except ProfileError as error:
        # That it cannot be read by this process, or now, says nothing about what is in it.
        return None if isinstance(error.__cause__, OSError) else str(error)
    return None


def _decision_of(path: Path) -> Path:
    return path.with_name(path.name.replace(EVIDENCE, ".json"))


def _is_left(path: Path) -> bool:
    """Whether no writer can be at work on it any more."""
    return time.time() - path.lstat().st_mtime > AT_WORK_S
